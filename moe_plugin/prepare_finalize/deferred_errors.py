"""Errors found on the device, carried to the host without a synchronization."""

from __future__ import annotations

import enum

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
    """Sticky error words on the device and their pinned mirrors on the host: one for eager calls, one for captured.

    `record` may be captured in a CUDA graph. `raise_pending` is a host point. Where peers must raise together it waits
    for the last eager call, which in a layer stack was a whole forward pass ago; looked at earlier, some ranks could
    see a flag that others do not see yet. For the same reason what replays flagged is raised at `synchronize` only.

    group: whose ranks raise together, with the time limit on waits; None where a rank raises on its own.
    """

    EAGER, CAPTURED = 0, 1

    def __init__(self, config: MoEConfig, device: torch.device, group: Communicator | None = None) -> None:
        self._config = config
        self._device = device
        self._group = group
        self._words = torch.zeros(2, dtype=torch.int32, device=device)
        self._mirrors = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._recorded = False

    def record(self, flags: torch.Tensor) -> None:
        """Or `flags` (int32 [1] on the device) into a word and start its copy to the host. On CPU, raise at once."""
        capturing = self._event is not None and torch.cuda.is_current_stream_capturing()
        kind = slice(self.CAPTURED, None) if capturing else slice(self.EAGER, self.CAPTURED)
        self._words[kind].bitwise_or_(flags)
        self._mirrors[kind].copy_(self._words[kind], non_blocking=True)
        if self._event is None:
            self.raise_pending()
        elif not capturing:
            self._event.record()
            self._recorded = True

    def raise_pending(self, synchronize: bool = False) -> None:
        """Raise what eager calls flagged and clear it.

        synchronize: wait for the current stream, and look also at what graphs replayed on it flagged.
        """
        if self._event is not None:
            if torch.cuda.is_current_stream_capturing():
                return
            if synchronize:
                self._wait_for(torch.cuda.current_stream(self._device).record_event())
            elif self._recorded and self._group is not None:
                self._wait_for(self._event)
        seen = self._mirrors if synchronize else self._mirrors[: self.CAPTURED]
        flags = ErrorFlag(0)
        for word in seen.tolist():
            flags |= ErrorFlag(word)
        if not flags:
            return
        if self._event is not None and self._recorded:
            # A later call's copy may still be under way and would set the mirror again.
            self._wait_for(self._event)
        self._words[: len(seen)].zero_()
        seen.zero_()
        raise_for_flags(flags, self._config)

    def _wait_for(self, event: torch.cuda.Event) -> None:
        if self._group is None:
            event.synchronize()
        else:
            self._group.wait_for_event(event, "error flags")


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


def expert_id_flag(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 [1]: ErrorFlag.EXPERT_ID when an id lies outside [-1, num_experts), else 0."""
    outside = ((topk_ids < -1) | (topk_ids >= num_experts)).any()
    return (outside.to(torch.int32) * int(ErrorFlag.EXPERT_ID)).view(1)
