"""The language of `--moe_strategy`: auto, a pair, an alias, or one of these for each phase.

auto
nccl_all_to_all+triton_fused_moe
decode=local+triton_fused_moe,prefill=local+torch_native
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from moe_plugin.errors import UnknownStrategyError
from moe_plugin.strategies.aliases import ALIASES

AUTO = "auto"
PHASES = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed `--moe_strategy`: one name per phase, the same one twice unless phases were given.

    is_phased: phases were given, so that each runs under its own configuration even if their names are equal.
    aliases: by phase, the name in ALIASES that was typed, if it was one.
    """

    text: str
    decode: str
    prefill: str
    is_phased: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)


def parse_request(text: str, known: Collection[str]) -> Request:
    """Read a `--moe_strategy` value. `known`: the names of all registered strategies.

    Raises UnknownStrategyError with the nearest match.
    """
    text = text.strip()
    if "=" not in text:
        name = _resolve(text, known)
        return Request(text, name, name, aliases=dict.fromkeys(PHASES, text) if text in ALIASES else {})
    typed: dict[str, str] = {}
    named: dict[str, str] = {}
    for part in text.split(","):
        phase, _, name = part.partition("=")
        phase = phase.strip()
        if phase not in PHASES or phase in named:
            raise UnknownStrategyError(text, "decode=<strategy>,prefill=<strategy>", sorted(known))
        typed[phase] = name.strip()
        named[phase] = _resolve(typed[phase], known)
    aliases = {phase: name for phase, name in typed.items() if name in ALIASES}
    # A phase that is not named is chosen automatically.
    return Request(text, named.get("decode", AUTO), named.get("prefill", AUTO), is_phased=True, aliases=aliases)


def _resolve(name: str, known: Collection[str]) -> str:
    if name == AUTO or name in known:
        return name
    if name in ALIASES and ALIASES[name].strategy in known:
        return ALIASES[name].strategy
    nearest = difflib.get_close_matches(name, [*known, *ALIASES, AUTO], n=1, cutoff=0.4)
    raise UnknownStrategyError(name, nearest[0] if nearest else None, sorted(known))
