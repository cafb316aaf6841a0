"""The collectives that dispatch and combine use, each bounded in time and ending in a PeerLostError that names who.

A group of one rank needs no process group: its collectives are copies.
"""

from __future__ import annotations

import functools
import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_plugin.errors import ConfigError, PeerLostError
from moe_plugin.modular_kernel import Receiver

T = TypeVar("T")

ROLL_CALL_SECONDS = 2.0
"""How long a rank that lost a collective waits for others to say that they are alive."""


_roll_calls: Counter[str] = Counter()


@functools.cache
def communication_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The one stream of `device` on which asynchronous dispatch and combine run; None on CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def overlapped(
    stream: torch.cuda.Stream | None, start: Callable[[], Callable[[], T]], inputs: tuple[torch.Tensor, ...]
) -> Receiver[T]:
    """Run both halves of an operation on `stream`; the receiver makes the caller's stream wait.

    start: begins the operation, and returns its second half. On CPU, where stream is None, the receiver runs that one.
    inputs: what the operation reads.
    """
    if stream is None:
        return Receiver(start())
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        result = start()()
        done = stream.record_event()

    def complete(inputs: tuple[torch.Tensor, ...] = inputs) -> T:
        # Until the caller's stream waits, memory of `inputs` must not go back to it: this closure holds them.
        torch.cuda.current_stream(stream.device).wait_event(done)
        return result

    return Receiver(complete)


def _all_gather(*args: Any, **kwargs: Any) -> Any:
    # torch 2.13 deprecates the older name.
    return getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(*args, **kwargs)


def _reduce_scatter(*args: Any, **kwargs: Any) -> Any:
    return getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(*args, **kwargs)


class PendingCollective:
    """A started collective."""

    def __init__(self, communicator: Communicator, work: Any, phase: str) -> None:
        self._communicator, self._work, self._phase = communicator, work, phase

    def wait(self) -> None:
        """On gloo, block until it is done; on NCCL, make the current stream wait."""
        if self._work is not None:
            self._communicator.guard(self._phase, lambda: self._communicator.wait_for(self._work))


class Communicator:
    """Collectives over one process group.

    group: None when size is 1. timeout_seconds bounds every wait of the host.
    """

    def __init__(self, group: Any, size: int, rank: int, timeout_seconds: float) -> None:
        if size > 1 and group is None:
            raise ConfigError(
                f"a layer over {size} ranks needs its process group to run; sizes alone only answer explain()"
            )
        self.group, self.size, self.rank = group, size, rank
        self.timeout_seconds = timeout_seconds
        self.is_nccl = group is not None and size > 1 and "nccl" in str(dist.get_backend(group))

    def all_gather(self, out: torch.Tensor, mine: torch.Tensor, phase: str) -> PendingCollective:
        """out [R, *mine.shape] receives every rank's `mine`."""
        if self.size == 1:
            out.view(mine.shape).copy_(mine)
            return PendingCollective(self, None, phase)
        joined = out.view(self.size * mine.shape[0], *mine.shape[1:])
        return self._start(phase, lambda: _all_gather(joined, mine, group=self.group, async_op=True))

    def all_to_all(
        self,
        out: torch.Tensor,
        rows: torch.Tensor,
        phase: str,
        out_splits: Sequence[int] | None = None,
        splits: Sequence[int] | None = None,
    ) -> PendingCollective:
        """Exchange rows of dimension 0: `splits` rows to each rank, `out_splits` from each; equal parts when None."""
        if self.size == 1:
            out.copy_(rows)
            return PendingCollective(self, None, phase)
        received = None if out_splits is None else list(out_splits)
        sent = None if splits is None else list(splits)
        return self._start(
            phase, lambda: dist.all_to_all_single(out, rows, received, sent, group=self.group, async_op=True)
        )

    def all_reduce(self, tensor: torch.Tensor, phase: str) -> PendingCollective:
        """Sum in place."""
        if self.size == 1:
            return PendingCollective(self, None, phase)
        return self._start(phase, lambda: dist.all_reduce(tensor, group=self.group, async_op=True))

    def reduce_scatter(self, out: torch.Tensor, tensor: torch.Tensor, phase: str) -> PendingCollective:
        """out [N, ...] receives this rank's part of the sum of every rank's tensor [R * N, ...]."""
        if self.size == 1:
            out.copy_(tensor)
            return PendingCollective(self, None, phase)
        return self._start(phase, lambda: _reduce_scatter(out, tensor, group=self.group, async_op=True))

    def gather_objects(self, mine: Any, phase: str) -> list[Any]:
        """Every rank's object, in rank order. Slow; for building layers and for reporting errors."""
        if self.size == 1:
            return [mine]
        if self.is_nccl:
            objects: list[Any] = [None] * self.size
            self.guard(phase, lambda: dist.all_gather_object(objects, mine, group=self.group))
            return objects
        # gloo's all_gather_object would wait for the group's own limit, half an hour by default.
        payload = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        sizes = torch.empty(self.size, 1, dtype=torch.int64)
        self.all_gather(sizes, torch.tensor([payload.numel()]), phase).wait()
        rows = torch.zeros(self.size, int(sizes.max()), dtype=torch.uint8)
        self.all_gather(rows, torch.nn.functional.pad(payload, (0, rows.shape[1] - payload.numel())), phase).wait()
        return [
            pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.flatten().tolist(), strict=True)
        ]

    def read_host(self, pinned: torch.Tensor, event: torch.cuda.Event | None, phase: str) -> list[Any]:
        """The values of `pinned` once `event` has passed; PeerLostError when it does not within the time limit."""
        if event is not None:
            self.wait_for_event(event, phase)
        return pinned.tolist()

    def wait_for_event(self, event: torch.cuda.Event, phase: str) -> None:
        """Return once `event` has passed; PeerLostError when it does not within the time limit."""
        deadline = time.monotonic() + self.timeout_seconds
        while not event.query():
            if time.monotonic() > deadline:
                raise PeerLostError(phase, self.missing_ranks(), self.timeout_seconds)

    def wait_for(self, work: Any) -> None:
        if self.is_nccl:
            work.wait()
        else:
            work.wait(timedelta(seconds=self.timeout_seconds))

    def guard(self, phase: str, run: Callable[[], Any]) -> Any:
        """Run part of a collective; what torch.distributed raises becomes a PeerLostError."""
        try:
            return run()
        except (torch.OutOfMemoryError, NotImplementedError):
            raise  # this rank's own trouble
        except RuntimeError as problem:
            detail, missing = str(problem).splitlines()[0], self.missing_ranks()
            if missing == [] and "time" not in detail.lower():
                raise  # everybody is there and in time: not a lost peer but a mistake in the call
            raise PeerLostError(phase, missing, self.timeout_seconds, detail) from problem

    def missing_ranks(self) -> list[int] | None:
        """Global ranks of this group that do not answer a roll call in the store; None if the store is gone too."""
        if self.group is None:
            return None
        members = dist.get_process_group_ranks(self.group)
        # Of the group, not of this object: answers to an earlier roll call must not count as answers to this one.
        call = _roll_calls[self.group.group_name] = _roll_calls[self.group.group_name] + 1
        try:
            store = dist.distributed_c10d._get_default_store()
            prefix = f"moe_plugin/alive/{self.group.group_name}/{call}"
            store.set(f"{prefix}/{dist.get_rank()}", "alive")
            deadline = time.monotonic() + ROLL_CALL_SECONDS
            missing = members
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not store.check([f"{prefix}/{rank}"])]
                time.sleep(0.02)
            return missing
        except (RuntimeError, AttributeError):
            return None

    def _start(self, phase: str, start: Callable[[], Any]) -> PendingCollective:
        return PendingCollective(self, self.guard(phase, start), phase)
