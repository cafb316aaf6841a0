"""How times are taken: one device clock for every contender, cold caches, contenders in turn.

Before each repetition a buffer of twice the L2 is written, so that nothing of the call before is left in it, and one of
the same size is then read: the lines that the call has to evict are clean, as they are in a server that streams
weights, and it does not pay for writing the flush back. Both lie outside of what is timed.

    graph   events around the replay of a captured graph, the host running ahead
    eager   events around a call that starts on an idle stream: kernels, launches and what the host adds between them
    cpu     host clock around a call, not waiting for the device

On a CPU there is one clock, `time.perf_counter`, no graph and no flush.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_plugin.bench.results import Ceilings, Timing

Call = Callable[[], Any]

WARM_UPS = 2
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
CPU_BURST = 16
"""Eager calls enqueued between two synchronizations when the host is timed: too few to fill a launch queue."""


def summarize(samples: Sequence[float]) -> Timing:
    """Median, 10th, 90th and 95th percentile (linear between neighbours) of microseconds; at least one sample."""
    ordered = sorted(samples)
    return Timing(
        median=round(statistics.median(ordered), 3),
        p10=round(_percentile(ordered, 0.1), 3),
        p90=round(_percentile(ordered, 0.9), 3),
        p95=round(_percentile(ordered, 0.95), 3),
        count=len(ordered),
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@dataclass(slots=True)
class Samples:
    """Microseconds of one contender; `problem` is the exception that ended its turns."""

    times: list[float] = field(default_factory=list)
    problem: Exception | None = None


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.is_cuda else 0
        if self.is_cuda:
            elements = 2 * self.l2_bytes // 4
            self._written = torch.empty(elements, dtype=torch.float32, device=device)
            self._read = torch.zeros(elements, dtype=torch.float32, device=device)
            self._sink = torch.zeros((), dtype=torch.float32, device=device)

    def synchronize(self) -> None:
        """Wait for the device. Raises what the device reports."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Enqueue what leaves the L2 full of clean lines that no contender uses."""
        if self.is_cuda:
            self._written.fill_(1.0)
            torch.sum(self._read, dim=0, out=self._sink)

    def warm_up(self, call: Call) -> Any:
        """Compile and fill caches; the result of the last call."""
        result = None
        for _ in range(WARM_UPS):
            result = call()
        self.synchronize()
        return result

    def capture(self, call: Call) -> tuple[Call, Any]:
        """One call as a CUDA graph: its replay, and the output that every replay writes. Warm up before."""
        replay, output = self.record(call)
        replay()
        self.synchronize()
        return replay, output

    def record(self, call: Call) -> tuple[Call, Any]:
        """As `capture`, without a first replay: ranks replay together, or not at all when one of them could not."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
        return graph.replay, output

    def take_turns(self, calls: Sequence[Call], seconds: float, from_idle: bool) -> list[Samples]:
        """Time each call in turn, round after round, for about `seconds` per call.

        from_idle: each call starts on an idle stream; else the host runs ahead.
        """
        results = [Samples() for _ in calls]
        with no_collection():
            cost = self._round(calls, results, from_idle)
            for result in results:
                result.times.clear()
            rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds * len(calls) / max(cost, 1e-9))))
            if not self.is_cuda:
                rounds = max(3, min(rounds, 50))
            pending: list[tuple[Samples, Any, Any]] = []
            for _ in range(rounds):
                self._round(calls, results, from_idle, pending)
            self.synchronize()
            for result, start, end in pending:
                result.times.append(1000 * start.elapsed_time(end))
        return results

    def host_time(self, call: Call, seconds: float) -> list[float]:
        """Microseconds on the host clock of each of several calls, the device working behind."""
        times: list[float] = []
        with no_collection():
            self.synchronize()
            begin = time.perf_counter()
            while len(times) < LEAST_ROUNDS or (len(times) < MOST_ROUNDS and time.perf_counter() - begin < seconds):
                start = time.perf_counter()
                call()
                times.append(1e6 * (time.perf_counter() - start))
                if len(times) % CPU_BURST == 0:
                    self.synchronize()
            self.synchronize()
        return times

    def _round(
        self,
        calls: Sequence[Call],
        results: Sequence[Samples],
        from_idle: bool,
        pending: list[tuple[Samples, Any, Any]] | None = None,
    ) -> float:
        """One turn of every call that has not failed; the wall seconds it took when `pending` is None."""
        begin = time.perf_counter()
        for call, result in zip(calls, results, strict=True):
            if result.problem is not None:
                continue
            try:
                if self.is_cuda:
                    marks = self._enqueue(call, from_idle)
                    if pending is not None:
                        pending.append((result, *marks))
                else:
                    start = time.perf_counter()
                    call()
                    result.times.append(1e6 * (time.perf_counter() - start))
            except Exception as problem:  # one contender's error must not end the others' turns
                result.problem = problem
        if pending is None:
            self.synchronize()
        return time.perf_counter() - begin

    def _enqueue(self, call: Call, from_idle: bool) -> tuple[Any, Any]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The first record of an event creates it, which must not lie between the two that count.
        start.record()
        end.record()
        self.flush()
        if from_idle:
            self.synchronize()
        start.record()
        call()
        end.record()
        return start, end

    def ceilings(self, seed: int = 0) -> Ceilings:
        """Copy bandwidth, dense matmul rates and the overhead of a graph, on random data."""
        generator = torch.Generator(self.device).manual_seed(seed)
        copied = (512 << 20) if self.is_cuda else (4 << 20)
        source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=self.device, generator=generator)
        target = torch.empty_like(source)
        copy = self._best(lambda: target.copy_(source))
        size = 8192 if self.is_cuda else 64
        a, b = (torch.randn(size, size, device=self.device, generator=generator).bfloat16() for _ in range(2))
        flops = {"bf16": 2 * size**3 / self._best(lambda: a @ b.T)}
        with contextlib.suppress(Exception):  # no fp8 units, or a torch without _scaled_mm for them
            flops["fp8"] = 2 * size**3 / self._best(_fp8_matmul(a, b))
        return Ceilings(
            copy_bytes_per_second=round(2 * copied / copy),
            matmul_flops={name: round(rate) for name, rate in flops.items()},
            graph_overhead=self._graph_overhead(),
        )

    def _best(self, call: Call) -> float:
        """Median seconds of a call."""
        self.warm_up(call)
        (samples,) = self.take_turns([call], 0.05, from_idle=False)
        if samples.problem is not None:
            raise samples.problem
        return statistics.median(samples.times) / 1e6

    def _graph_overhead(self) -> float | None:
        if not self.is_cuda:
            return None
        one = torch.zeros(1, device=self.device)
        self.warm_up(lambda: one.add_(1))
        replay, _ = self.capture(lambda: one.add_(1))
        return round(1e6 * self._best(replay), 3)


def _fp8_matmul(a: torch.Tensor, b: torch.Tensor) -> Call:
    one = torch.ones((), dtype=torch.float32, device=a.device)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    return lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of what is timed."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
