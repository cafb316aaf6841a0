"""Collectives on one rank and on several, and who is said to be missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_plugin.errors import ConfigError, PeerLostError
from moe_plugin.prepare_finalize import communicator
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.testing import RankPool
from moe_plugin.testing.rank_pool import RankContext

RANKS = 2


@pytest.fixture
def alone() -> Communicator:
    return Communicator(None, 1, 0, 30.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """A pool of its own: these tests leave the roll calls of their ranks out of step."""
    pool = RankPool(RANKS)
    yield pool
    pool.close()


def communicator_of(context: RankContext, seconds: float = 30.0) -> Communicator:
    parallel = context.parallel()
    return Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, seconds)


def test_several_ranks_need_a_group() -> None:
    with pytest.raises(ConfigError, match="a layer over 2 ranks needs its process group"):
        Communicator(None, 2, 0, 30.0)


def test_collectives_of_one_rank_are_copies(alone: Communicator) -> None:
    rows = torch.arange(6.0).view(3, 2)
    out = torch.empty(3, 2)
    alone.all_to_all(out, rows, "x", [3], [3]).wait()
    assert torch.equal(out, rows)
    gathered = torch.empty(1, 3, 2)
    alone.all_gather(gathered, rows, "x").wait()
    assert torch.equal(gathered[0], rows)
    alone.reduce_scatter(out.zero_(), rows, "x").wait()
    assert torch.equal(out, rows)
    alone.all_reduce(out, "x").wait()
    assert torch.equal(out, rows)
    assert alone.gather_objects("mine", "x") == ["mine"]


def test_what_is_on_the_host_is_read_at_once(alone: Communicator) -> None:
    assert alone.read_host(torch.tensor([[1, 2], [3, 4]]), None, "x") == [[1, 2], [3, 4]]


def test_no_communication_stream_without_a_gpu() -> None:
    assert communicator.communication_stream(torch.device("cpu")) is None


def collectives(context: RankContext) -> dict[str, Any]:
    ours, rank = communicator_of(context), context.rank
    gathered = torch.empty(RANKS, 1, 2)
    ours.all_gather(gathered, torch.full((1, 2), float(rank)), "x").wait()
    # Rank 0 sends one row to itself and two to rank 1; rank 1 sends none and one.
    splits = [[1, 2], [0, 1]][rank]
    received_splits = [[1, 0], [2, 1]][rank]
    rows = torch.arange(sum(splits))[:, None] + 10 * rank
    uneven = torch.empty(sum(received_splits), 1, dtype=rows.dtype)
    ours.all_to_all(uneven, rows, "x", received_splits, splits).wait()
    even = torch.empty(RANKS, 1)
    ours.all_to_all(even, torch.tensor([[0.0], [1.0]]) + 10 * rank, "x").wait()
    total = torch.tensor([1.0 + rank])
    ours.all_reduce(total, "x").wait()
    part = torch.empty(1, 2)
    ours.reduce_scatter(part, torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank + 1), "x").wait()
    return {
        "all_gather": gathered.tolist(),
        "uneven": uneven.flatten().tolist(),
        "even": even.flatten().tolist(),
        "all_reduce": total.item(),
        "reduce_scatter": part.tolist(),
        "objects": ours.gather_objects({"rank": rank}, "x"),
        "is_nccl": ours.is_nccl,
    }


@pytest.mark.slow
def test_collectives_over_ranks(pool: RankPool) -> None:
    answers = pool.run(collectives, ranks=RANKS)
    for answer in answers:
        assert answer["all_gather"] == [[[0.0, 0.0]], [[1.0, 1.0]]]
        assert answer["all_reduce"] == 3.0
        assert answer["objects"] == [{"rank": 0}, {"rank": 1}]
        assert not answer["is_nccl"]
    assert [answer["uneven"] for answer in answers] == [[0], [1, 2, 10]]
    assert [answer["even"] for answer in answers] == [[0, 10], [1, 11]]
    assert [answer["reduce_scatter"] for answer in answers] == [[[3.0, 6.0]], [[9.0, 12.0]]]


def mistaken_call(context: RankContext) -> tuple[str, str]:
    def fail() -> None:
        raise RuntimeError("splits do not add up")

    try:
        communicator_of(context).guard("dispatch", fail)
    except (RuntimeError, PeerLostError) as problem:
        return type(problem).__name__, str(problem)
    raise AssertionError("nothing was raised")


@pytest.mark.slow
def test_a_mistake_in_the_call_is_no_lost_peer(pool: RankPool) -> None:
    assert pool.run(mistaken_call, ranks=RANKS) == [("RuntimeError", "splits do not add up")] * RANKS


class NeverDone:
    """An event of a collective that hangs."""

    def query(self) -> bool:
        return False


def wait_in_vain(context: RankContext) -> tuple[tuple[int, ...] | None, str, str] | None:
    """Rank 0 waits for what never comes; rank 1 does not answer its roll call."""
    if context.rank != 0:
        return None
    communicator.ROLL_CALL_SECONDS = 0.3
    try:
        communicator_of(context, seconds=0.2).read_host(torch.zeros(1), NeverDone(), "count exchange")
    except PeerLostError as problem:
        return problem.ranks, problem.phase, str(problem)
    raise AssertionError("nothing was raised")


def roll_call(context: RankContext, present: list[int]) -> list[int] | None:
    """Who is missing, on a communicator of its own: a layer makes several on one group."""
    communicator.ROLL_CALL_SECONDS = 0.5
    return communicator_of(context).missing_ranks() if context.rank in present else None


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_named(pool: RankPool) -> None:
    (ranks, phase, message), _ = pool.run(wait_in_vain, ranks=RANKS)
    assert (ranks, phase) == ((1,), "count exchange")
    assert "rank 1 lost or late in phase 'count exchange' (time limit 0.2 s)" in message


@pytest.mark.slow
def test_an_answer_to_an_earlier_roll_call_does_not_count() -> None:
    pool = RankPool(RANKS)
    try:
        assert pool.run(roll_call, [0, 1], ranks=RANKS) == [[], []]
        assert pool.run(roll_call, [0], ranks=RANKS) == [[1], None]
    finally:
        pool.close()
