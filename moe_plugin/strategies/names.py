"""The language of `--moe_strategy`: auto, a pair, an alias, or one of these for each phase.

auto
nccl_all_to_all+triton_fused_moe
decode=local+triton_fused_moe,prefill=local+torch_native
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from moe_plugin.errors import UnknownStrategyError

AUTO = "auto"
PHASES = ("decode", "prefill")

ALIASES: Mapping[str, str] = {
    "batched_triton": "local+triton_fused_moe",
    "torch": "local+torch_native",
    "triton": "local+triton_fused_moe",
    "nccl": "nccl_all_to_all+triton_fused_moe",
    "gloo": "nccl_all_to_all+torch_native",
}
"""Other names of pairs; `batched_triton` is RTP-LLM's name for its strategy without expert parallelism."""


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed `--moe_strategy`: one name per phase, the same one twice unless phases were given.

    is_phased: phases were given, so that each runs under its own configuration even if their names are equal.
    """

    text: str
    decode: str
    prefill: str
    is_phased: bool = False


def parse_request(text: str, known: Collection[str]) -> Request:
    """Read a `--moe_strategy` value. `known`: the names of all registered strategies.

    Raises UnknownStrategyError with the nearest match.
    """
    text = text.strip()
    if "=" not in text:
        name = _resolve(text, known)
        return Request(text, name, name)
    named: dict[str, str] = {}
    for part in text.split(","):
        phase, _, name = part.partition("=")
        phase = phase.strip()
        if phase not in PHASES or phase in named:
            raise UnknownStrategyError(text, "decode=<strategy>,prefill=<strategy>", sorted(known))
        named[phase] = _resolve(name.strip(), known)
    # A phase that is not named is chosen automatically.
    return Request(text, named.get("decode", AUTO), named.get("prefill", AUTO), is_phased=True)


def _resolve(name: str, known: Collection[str]) -> str:
    if name == AUTO or name in known:
        return name
    if name in ALIASES and ALIASES[name] in known:
        return ALIASES[name]
    nearest = difflib.get_close_matches(name, [*known, *ALIASES, AUTO], n=1, cutoff=0.4)
    raise UnknownStrategyError(name, nearest[0] if nearest else None, sorted(known))
