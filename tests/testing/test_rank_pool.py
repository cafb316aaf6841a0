"""Worker processes that run functions together, and what is left of them when one fails."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from moe_plugin.testing import RankPool, shared_pool
from moe_plugin.testing.rank_pool import RankContext, RankError, _layouts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


def describe(context: RankContext, word: str) -> tuple[str, int, int, str, str | None]:
    return word, context.rank, context.size, context.device.type, os.environ.get("TRITON_INTERPRET")


def layout(context: RankContext, tp_size: int) -> tuple[int, int, int, int, float]:
    parallel = context.parallel(tp_size, timeout_seconds=7.0)
    return parallel.ep_rank, parallel.ep_size, parallel.tp_rank, parallel.tp_size, parallel.timeout_seconds


def sum_over_ranks(context: RankContext) -> float:
    total = torch.tensor(float(context.rank + 1))
    dist.all_reduce(total, group=context.parallel().ep_group)
    return total.item()


def fail_on(context: RankContext, ranks: list[int]) -> str:
    if context.rank in ranks:
        raise ValueError(f"wrong on {context.rank}")
    return "right"


def sleep_on(context: RankContext, rank: int, seconds: float) -> None:
    if context.rank == rank:
        time.sleep(seconds)


def die_on(context: RankContext, rank: int) -> None:
    if context.rank == rank:
        os._exit(3)


def test_results_are_in_the_order_of_ranks(pool: RankPool) -> None:
    assert pool.run(describe, "hello", ranks=3) == [("hello", rank, 3, "cpu", "1") for rank in range(3)]
    assert pool.run(describe, "hi", ranks=1) == [("hi", 0, 1, "cpu", "1")]


def test_the_caller_s_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    other = RankPool(1)
    try:
        assert other.run(describe, "", ranks=1)[0][-1] == "1"
        assert os.environ["TRITON_INTERPRET"] == "0"
    finally:
        other.close()
    assert not other.alive


def test_ranks_form_groups_of_the_size_of_a_run(pool: RankPool) -> None:
    assert pool.run(sum_over_ranks, ranks=2) == [3.0, 3.0]
    assert pool.run(sum_over_ranks, ranks=3) == [6.0, 6.0, 6.0]
    assert pool.run(layout, 1, ranks=3) == [(rank, 3, 0, 1, 7.0) for rank in range(3)]
    assert pool.run(layout, 2, ranks=2) == [(0, 1, rank, 2, 7.0) for rank in range(2)]
    assert pool.run(layout, 1, ranks=1) == [(0, 1, 0, 1, 7.0)]


def test_layouts_cover_every_tensor_parallel_size() -> None:
    assert _layouts(1) == set()
    assert _layouts(3) == {(0, 1, 2)}
    assert _layouts(4) == {(0, 1, 2, 3), (0, 1), (2, 3), (0, 2), (1, 3)}


def test_an_error_has_the_traceback_of_its_rank_and_the_pool_goes_on(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(fail_on, [1, 2], ranks=3)
    message = str(caught.value)
    assert "rank 1:\nTraceback" in message
    assert "ValueError: wrong on 1" in message
    assert "ValueError: wrong on 2" in message
    assert "rank 0" not in message
    assert pool.alive
    assert pool.run(fail_on, [], ranks=3) == ["right"] * 3


def test_a_rank_that_dies_ends_the_pool() -> None:
    pool = RankPool(2)
    with pytest.raises(RankError, match="rank 1: died"):
        pool.run(die_on, 1, ranks=2, seconds=60)
    assert not pool.alive


def test_a_rank_that_does_not_return_ends_the_pool() -> None:
    pool = RankPool(2)
    with pytest.raises(RankError, match=r"rank 1: no answer within 0\.5 s"):
        pool.run(sleep_on, 1, 600.0, ranks=2, seconds=0.5)
    assert not pool.alive


def test_a_shared_pool_that_broke_is_replaced_and_the_others_are_kept() -> None:
    first, kept = shared_pool("cpu", 1), shared_pool("cpu", 4)
    assert shared_pool("cpu", 1) is first
    first.close()
    second = shared_pool("cpu", 1)
    assert second is not first
    assert second.run(describe, "again", ranks=1)[0][0] == "again"
    second.close()
    assert shared_pool("cpu", 4) is kept
