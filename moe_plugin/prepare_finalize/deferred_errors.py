"""Errors found on the device, carried to the host without a synchronization."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable

import torch

from moe_plugin.config import MoEConfig
from moe_plugin.errors import CapacityError, ExpertIdError, InputError
from moe_plugin.prepare_finalize.communicator import Communicator


class ErrorFlag(enum.IntFlag):
    """What a kernel or a peer can report; flags of several rows and ranks are or-ed together."""

    EXPERT_ID = 1
    """An id outside [-1, num_experts)."""
    CAPACITY = 2
    """More rows for a rank than a fixed-capacity dispatch has room for."""
    ABORTED = 4
    """The rank was called with arguments of a wrong shape or dtype and sent no tokens."""


class DeferredErrors:
    """Sticky error words that calls write on the device and the host reads: one set for eager calls, one for captured.

    Flags get into them in two ways: a kernel stores one into `kernel_word` and the call says so with `launched`, or
    `record` takes a tensor of flags. Both may be captured in a CUDA graph. `raise_pending` is a host point. Where peers
    must raise together it waits for the last eager call, which in a layer stack was a whole forward pass ago; looked at
    earlier, some ranks could see a flag that others do not see yet. For the same reason what replays flagged is raised
    at `synchronize` only.

    On CUDA `kernel_word` lies in pinned memory of the host, at the same address for kernels: a call without errors
    writes nothing, copies nothing, and the host has one load to do.

    group: whose ranks raise together, with the time limit on waits; None where a rank raises on its own.
    """

    EAGER, CAPTURED = 0, 1

    def __init__(self, config: MoEConfig, device: torch.device, group: Communicator | None = None) -> None:
        self._config = config
        self._device = device
        self._group = group
        self._is_cuda = device.type == "cuda"
        self._words = torch.zeros(2, dtype=torch.int32, device=device)
        # Rows 0 and 1 mirror _words, rows 2 and 3 are written by kernels. A word to a row of 16 bytes, so that kernels
        # find the same alignment in both.
        self._host = torch.zeros(4, 4, dtype=torch.int32, pin_memory=self._is_cuda)
        self._mirrors, kernel_words = self._host[:2, 0], self._host[2:]
        self._kernel_words = [kernel_words[kind, :1] for kind in (self.EAGER, self.CAPTURED)]
        # Reading a tensor's value costs microseconds, reading memory does not.
        self._seen = (ctypes.c_int32 * self._host.numel()).from_address(self._host.data_ptr())
        self._event = torch.cuda.Event() if self._is_cuda else None
        self._recorded = False

    def kernel_word(self) -> torch.Tensor:
        """int32 [1] where a kernel launched now stores its flag if it has one; the kernel must know a single flag.

        Only for kernels: torch refuses to mix it with CUDA tensors.
        """
        return self._kernel_words[self.CAPTURED if self._is_cuda and _is_capturing() else self.EAGER]

    def launched(self) -> None:
        """The kernel that got `kernel_word` has been launched on the current stream. On CPU, raise at once."""
        if not self._is_cuda:
            self.raise_pending()
        elif self._group is not None and not _is_capturing():
            self._mark()

    def record(self, flags: torch.Tensor) -> None:
        """Or `flags` (int32 [1] on the device) into a word and start its copy to the host. On CPU, raise at once."""
        capturing = self._is_cuda and _is_capturing()
        kind = slice(self.CAPTURED, None) if capturing else slice(self.EAGER, self.CAPTURED)
        self._words[kind].bitwise_or_(flags)
        self._mirrors[kind].copy_(self._words[kind], non_blocking=True)
        if not self._is_cuda:
            self.raise_pending()
        elif not capturing:
            self._mark()

    def raise_pending(self, synchronize: bool = False) -> None:
        """Raise what eager calls flagged and clear it.

        synchronize: wait for the current stream, and look also at what graphs replayed on it flagged.
        """
        if self._is_cuda:
            if _is_capturing():
                return
            if synchronize:
                self._wait_for(torch.cuda.current_stream(self._device).record_event())
            elif self._recorded and self._group is not None:
                assert self._event is not None
                self._wait_for(self._event)
        seen = self._seen
        flags = seen[0] | seen[8]
        if synchronize:
            flags |= seen[4] | seen[12]
        if flags:
            self._clear(synchronize)
            raise_for_flags(ErrorFlag(flags), self._config)

    def _clear(self, captured: bool) -> None:
        if self._is_cuda:
            # Programs of a call that has been seen may still be writing, and a later call's copy be under way; either
            # would raise the same error again.
            self._wait_for(torch.cuda.current_stream(self._device).record_event())
            if self._recorded:
                assert self._event is not None
                self._wait_for(self._event)
        kinds = self.CAPTURED + 1 if captured else self.CAPTURED
        self._words[:kinds].zero_()
        self._mirrors[:kinds].zero_()
        for word in self._kernel_words[:kinds]:
            word.zero_()

    def _mark(self) -> None:
        assert self._event is not None
        self._event.record()
        self._recorded = True

    def _wait_for(self, event: torch.cuda.Event) -> None:
        if self._group is None:
            event.synchronize()
        else:
            self._group.wait_for_event(event, "error flags")


_is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing


def raise_for_flags(flags: ErrorFlag, config: MoEConfig) -> None:
    """Raise the error that `flags`, of one or several ranks, stand for."""
    if ErrorFlag.EXPERT_ID in flags:
        raise ExpertIdError(f"topk_ids must lie in [-1, {config.num_experts}); ids outside were found on some rank")
    if ErrorFlag.CAPACITY in flags:
        raise CapacityError(
            "fixed-capacity dispatch overflowed: some rank had more rows for one destination than the capacity; "
            f"raise dispatch_capacity (now {config.dispatch_capacity}) or the max_num_tokens of the call"
        )
    raise InputError("a rank was called with wrong arguments and sent no tokens; its own error says which")


def or_rows(flags: torch.Tensor) -> torch.Tensor:
    """int32 [1]: the bitwise or of flags int32 [N, 1]."""
    found = [((flags & int(flag)) != 0).any() * int(flag) for flag in ErrorFlag]
    return torch.stack(found).sum(dtype=torch.int32).view(1)
