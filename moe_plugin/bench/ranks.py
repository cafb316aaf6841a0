"""What a benchmark over several ranks needs: processes, a start that they share, and times of the slowest.

    with Ranks("cuda", 4) as ranks:
        answers = ranks.run(function, *arguments, seconds=60)    # function(context, *arguments) on every rank

On a rank, `JointStopwatch` times steps that all ranks take together: the L2 is flushed, a barrier on the device holds
everybody until the last rank has arrived, and the clock of each rank starts right behind it. The time of a repetition
is that of its slowest rank (`slowest`). A collective's time is therefore neither shortened by a rank that came late nor
lengthened by waiting for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch

from moe_plugin.bench.timing import LEAST_ROUNDS, MOST_ROUNDS, Call, Stopwatch, no_collection
from moe_plugin.config import ParallelConfig
from moe_plugin.errors import ConfigError
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.strategies.agreement import gather
from moe_plugin.testing.rank_pool import RankContext, RankError, RankPool

T = TypeVar("T")

Repetition = Callable[[], list[float]]
"""Takes every step once, together with the other ranks; microseconds by step."""

MOST_ROUNDS_ON_CPU = 50


class Ranks:
    """`world` processes, one per GPU over NCCL or on the CPU over gloo; started when first asked for work.

    A run that fails or takes too long ends its processes, whose state nobody knows; the next one gets new ones.
    """

    def __init__(self, device_type: str, world: int) -> None:
        devices = torch.cuda.device_count() if device_type == "cuda" else world
        if not 2 <= world <= devices:
            limit = f"one GPU each: 2 to {devices}" if device_type == "cuda" else "2 or more"
            raise ConfigError(f"ranks that exchange tokens are {limit}, got {world}")
        self.device_type, self.world = device_type, world
        self._pool: RankPool | None = None

    def run(self, function: Callable[..., T], *arguments: Any, seconds: float) -> list[T]:
        """`function(context, *arguments)` on every rank, results by rank. function must be importable by name.

        Raises RankError with tracebacks when it raises on a rank or has not returned on all within `seconds`.
        """
        if self._pool is None:
            self._pool = RankPool(self.world, self.device_type)
        try:
            return self._pool.run(function, *arguments, ranks=self.world, seconds=seconds)
        except RankError:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JointStopwatch(Stopwatch):
    """A Stopwatch whose repetitions start on all ranks at once. Every rank makes the same calls in the same order.

    parallel: the ranks as one EP group.
    """

    def __init__(self, context: RankContext) -> None:
        super().__init__(context.device)
        self.parallel: ParallelConfig = context.parallel()
        self.meet: Call = _barrier(context.device, self.parallel)

    def eager(self, steps: Sequence[Call]) -> Repetition:
        """Each step starts on an idle stream of every rank, so that what the host adds shows."""

        def repetition() -> list[float]:
            if not self.is_cuda:
                return [self._seconds(step) * 1e6 for step in steps]
            marks = []
            for step in steps:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                # The first record of an event creates it, which must not lie between the two that count.
                start.record()
                end.record()
                self.flush()
                # Once to bring the hosts together, and once more on the device, for what they still are apart.
                self.meet()
                self.synchronize()
                self.meet()
                start.record()
                step()
                end.record()
                marks.append((start, end))
            self.synchronize()
            return [1000 * start.elapsed_time(end) for start, end in marks]

        return repetition

    def captured(self, steps: Sequence[Call]) -> Repetition:
        """All steps as one CUDA graph, the flush, the barrier and the clock of each step inside. Warm up before."""
        graph = torch.cuda.CUDAGraph()
        marks = [[torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)] for _ in steps]
        with torch.cuda.graph(graph):
            for step, (start, end) in zip(steps, marks, strict=True):
                self.flush()
                self.meet()
                start.record()
                step()
                end.record()

        def repetition() -> list[float]:
            graph.replay()
            self.synchronize()
            return [1000 * start.elapsed_time(end) for start, end in marks]

        return repetition

    def repeat(self, repetition: Repetition, seconds: float) -> list[list[float]]:
        """Microseconds of this rank by step and repetition, as many on every rank, in about `seconds`."""
        with no_collection():
            repetition()
            begin = time.perf_counter()
            repetition()
            costs = gather(self.parallel, time.perf_counter() - begin, "rounds")
            most = MOST_ROUNDS if self.is_cuda else MOST_ROUNDS_ON_CPU
            rounds = max(LEAST_ROUNDS, min(most, int(seconds / max(costs.values()))))
            found = [repetition() for _ in range(rounds)]
        return [list(step) for step in zip(*found, strict=True)]

    def _seconds(self, step: Call) -> float:
        self.meet()
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin


def slowest(by_rank: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """[ranks][steps][repetitions] -> [steps][repetitions], each the largest over the ranks."""
    return [[max(times) for times in zip(*ranks, strict=True)] for ranks in zip(*by_rank, strict=True)]


def _barrier(device: torch.device, parallel: ParallelConfig) -> Call:
    """Enqueues a barrier of all ranks on the device; on a CPU it waits."""
    if device.type == "cuda" and (barrier := _symmetric_memory_barrier(device, parallel.ep_group)) is not None:
        return barrier
    communicator = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)
    one = torch.zeros(1, device=device)
    return lambda: communicator.all_reduce(one, "barrier").wait()


@functools.cache
def _symmetric_memory_barrier(device: torch.device, group: Any) -> Call | None:
    """torch's barrier over signals in peers' memory, microseconds where NCCL takes tens; None where there is none."""
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        memory = symmetric_memory.empty(16, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(memory, group)
    except (ImportError, AttributeError, RuntimeError):  # no peer access, or a torch without it: on all ranks alike
        return None

    def barrier(memory: torch.Tensor = memory) -> None:
        handle.barrier(channel=0)

    return barrier
