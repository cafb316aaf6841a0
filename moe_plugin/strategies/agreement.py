"""Ranks compare what they are about to build, once, so that a difference raises everywhere instead of hanging later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from moe_plugin.config import ParallelConfig
from moe_plugin.errors import StrategyMismatchError, rebuild
from moe_plugin.prepare_finalize.communicator import Communicator

T = TypeVar("T")

Account = tuple[tuple[str, str] | None, dict[str, str]]
"""What one rank tells the others: its problem (class name, message) if any, and its fields."""


def agree(parallel: ParallelConfig, fields: Mapping[str, str], problem: Exception | None) -> None:
    """Meet all ranks of the layer. Every rank must call this, also one that already failed.

    Raises, on all ranks alike: the first rank's problem if any rank has one, else StrategyMismatchError when the
    fields differ.
    """
    mine: Account = (None if problem is None else (type(problem).__name__, str(problem)), dict(fields))
    accounts = gather(parallel, mine, "strategy agreement")
    for rank, (reported, _) in accounts.items():
        if reported is not None:
            if parallel.world_size == 1 and problem is not None:
                raise problem
            kind, text = reported
            raise rebuild(kind, f"rank {rank}: {text}") from problem
    differing = {
        name: {rank: theirs.get(name, "") for rank, (_, theirs) in accounts.items()}
        for name in fields
        if any(theirs.get(name) != fields[name] for _, theirs in accounts.values())
    }
    if differing:
        shown = "; ".join(f"{name}: {_by_value(values)}" for name, values in differing.items())
        raise StrategyMismatchError(f"the ranks of one layer disagree on {shown}", differing)


def gather(parallel: ParallelConfig, mine: T, phase: str) -> dict[int, T]:
    """What every rank of the layer brings, by rank. `phase` names the exchange in the error for a lost peer."""
    ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)
    tp = Communicator(parallel.tp_group, parallel.tp_size, parallel.tp_rank, parallel.timeout_seconds)
    by_tp = tp.gather_objects(ep.gather_objects(mine, phase), phase)
    return {
        ep_rank * tp.size + tp_rank: theirs for tp_rank, row in enumerate(by_tp) for ep_rank, theirs in enumerate(row)
    }


def _by_value(values: Mapping[int, str]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank in sorted(values):
        ranks.setdefault(values[rank], []).append(str(rank))
    return ", ".join(f"{value} on rank {'/'.join(who)}" for value, who in ranks.items())
