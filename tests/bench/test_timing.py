"""Statistics by hand, and the clock on what this machine has."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from moe_plugin.bench.timing import Stopwatch, summarize


def test_summary_of_known_samples() -> None:
    timing = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    # Positions 0.4 and 3.6 of 1, 2, 3, 4, 5.
    assert (timing.median, timing.p10, timing.p90, timing.count) == (3.0, 1.4, 4.6, 5)
    assert summarize([2.0, 4.0]).median == 3.0
    single = summarize([7.25])
    assert (single.median, single.p10, single.p90, single.count) == (7.25, 7.25, 7.25, 1)


def test_an_outlier_does_not_move_the_median() -> None:
    timing = summarize([10.0] * 99 + [1e6])
    assert (timing.median, timing.p90) == (10.0, 10.0)


def test_turns_are_taken_and_timed() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    short, long = stopwatch.take_turns([lambda: call("a", 0.002), lambda: call("b", 0.01)], 0.03, from_idle=True)
    assert order[: len(order) // 2 * 2] == ["a", "b"] * (len(order) // 2)
    assert len(short.times) == len(long.times) >= 3
    assert 2_000 <= min(short.times) < min(long.times)
    assert min(long.times) >= 10_000


def test_an_error_ends_the_turns_of_its_contender_alone() -> None:
    calls = []

    def breaks() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the second call")

    broken, fine = Stopwatch(torch.device("cpu")).take_turns([breaks, lambda: None], 0.001, from_idle=False)
    assert isinstance(broken.problem, ValueError)
    assert len(calls) == 2
    assert fine.problem is None
    assert len(fine.times) >= 3


def test_the_collector_is_back_after_timing() -> None:
    seen = []
    times = Stopwatch(torch.device("cpu")).host_time(lambda: seen.append(gc.isenabled()), 0.001)
    assert gc.isenabled()
    assert not any(seen)
    assert len(times) == len(seen) >= 5


def test_ceilings_of_a_cpu() -> None:
    ceilings = Stopwatch(torch.device("cpu")).ceilings()
    assert ceilings.copy_bytes_per_second > 1e6
    assert ceilings.matmul_flops["bf16"] > 1e6
    assert ceilings.graph_overhead is None


@pytest.mark.gpu
def test_a_graph_replays_into_its_output() -> None:
    stopwatch = Stopwatch(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    stopwatch.warm_up(lambda: x * 2)
    replay, output = stopwatch.capture(lambda: x * 2)
    x.fill_(3)
    replay()
    assert output.tolist() == [6.0] * 4
    (samples,) = stopwatch.take_turns([replay], 0.01, from_idle=False)
    assert min(samples.times) > 0
