"""Worker processes, one a rank, that run functions together; started once and kept for a whole test session."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_plugin.config import ParallelConfig

RUN_SECONDS = 90.0
START_SECONDS = 120.0


class RankError(AssertionError):
    """A function failed on one or more ranks; the message holds their tracebacks."""


class RankContext:
    """What a function sees on its rank: `rank` of `size` ranks, `device`, and the parallel layout over them."""

    def __init__(self, rank: int, device: torch.device, world_size: int) -> None:
        self.rank = rank
        self.size = 1
        self.device = device
        self._groups: dict[tuple[int, ...], Any] = {}
        # Every rank creates every group, in one order, though a run may leave ranks out.
        for ranks in sorted({group for size in range(2, world_size + 1) for group in _layouts(size)}):
            self._groups[ranks] = dist.new_group(list(ranks))

    def parallel(self, tp_size: int = 1, timeout_seconds: float = 30.0) -> ParallelConfig:
        """EP x TP over the ranks of this run; TP ranks are neighbours."""
        ep_ranks, tp_ranks = _ep_and_tp_ranks(self.rank, self.size, tp_size)
        return ParallelConfig(
            ep_group=self._groups.get(ep_ranks), tp_group=self._groups.get(tp_ranks), timeout_seconds=timeout_seconds
        )


def _ep_and_tp_ranks(rank: int, size: int, tp_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ep_ranks = tuple(range(rank % tp_size, size, tp_size))
    first = rank - rank % tp_size
    return ep_ranks, tuple(range(first, first + tp_size))


def _layouts(size: int) -> set[tuple[int, ...]]:
    """The EP and TP groups of every layout over `size` ranks."""
    tp_sizes = [tp_size for tp_size in range(1, size + 1) if size % tp_size == 0]
    groups = {group for tp_size in tp_sizes for rank in range(size) for group in _ep_and_tp_ranks(rank, size, tp_size)}
    return {group for group in groups if len(group) > 1}


class RankPool:
    """`max_ranks` processes with a torch.distributed world, waiting for work.

    device_type: "cpu" (gloo) or "cuda" (NCCL, one device a rank).
    """

    def __init__(self, max_ranks: int, device_type: str = "cpu") -> None:
        self.max_ranks, self.device_type = max_ranks, device_type
        context = mp.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        with _environment(TRITON_INTERPRET="1" if device_type == "cpu" else "0"):
            for rank in range(max_ranks):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, rank, max_ranks, port, device_type), daemon=True)
                process.start()
                self._pipes.append(mine)
                self._processes.append(process)
        self._collect(list(range(max_ranks)), START_SECONDS)

    def run(self, function: Callable[..., Any], *args: Any, ranks: int, seconds: float = RUN_SECONDS) -> list[Any]:
        """Call `function(context, *args)` on ranks 0 to `ranks` - 1; results in rank order.

        function must be importable by name. Raises RankError when it raises on any rank or does not return in time;
        after the latter the pool is gone.
        """
        members = list(range(ranks))
        for rank in members:
            self._pipes[rank].send((function, args, ranks))
        return self._collect(members, seconds)

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def _collect(self, members: list[int], seconds: float) -> list[Any]:
        results, failures = [], []
        deadline = time.monotonic() + seconds
        for rank in members:
            try:
                if not self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                    failures.append(f"rank {rank}: no answer within {seconds:g} s")
                    continue
                ok, value = self._pipes[rank].recv()
            except EOFError:
                failures.append(f"rank {rank}: died")
                continue
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}:\n{value}")
        if any("no answer" in failure or "died" in failure for failure in failures):
            self.close()
        if failures:
            raise RankError("\n".join(failures))
        return results


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables that processes started meanwhile inherit; Triton reads them when it is imported."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


_pools: dict[tuple[str, int], RankPool] = {}


def shared_pool(device_type: str, max_ranks: int) -> RankPool:
    """The pool of this process; a new one when the last one broke."""
    pool = _pools.get((device_type, max_ranks))
    if pool is None or not pool.alive:
        if pool is not None:
            pool.close()
        pool = _pools[device_type, max_ranks] = RankPool(max_ranks, device_type)
        atexit.register(pool.close)
    return pool


def _serve(pipe: Connection, rank: int, world_size: int, port: int, device_type: str) -> None:
    if device_type == "cpu":
        torch.set_num_threads(1)
        device = torch.device("cpu")
    else:
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
        device_id=device if device_type == "cuda" else None,
    )
    context = RankContext(rank, device, world_size)
    pipe.send((True, None))
    while True:
        try:
            function, args, context.size = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(context, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
