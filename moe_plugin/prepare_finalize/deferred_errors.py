"""Errors found on the device, carried to the host without a synchronization."""

from __future__ import annotations

import ctypes
import enum
import functools
import operator
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from moe_plugin.config import MoEConfig
from moe_plugin.errors import CapacityError, ExpertIdError, InputError, PeerLostError, rebuild
from moe_plugin.prepare_finalize.communicator import Communicator


class ErrorFlag(enum.IntFlag):
    """What a kernel or a peer can report; flags of several rows and ranks are or-ed together."""

    EXPERT_ID = 1
    """An id outside [-1, num_experts)."""
    CAPACITY = 2
    """More rows for a rank than a fixed-capacity dispatch has room for."""
    ABORTED = 4
    """The rank was called with arguments of a wrong shape or dtype and sent no tokens."""
    PEER_LOST = 8
    """The rank waited for another in vain, so that what it sends is void."""


PHASES = {1: "dispatch", 2: "combine", 3: "routing"}
"""What kernels can have waited for in vain, by the number they report."""


class DeferredErrors:
    """Sticky error words that calls write on the device and the host reads: one set for eager calls, one for captured.

    Flags get into them in two ways: a kernel stores one into `kernel_word` and the call says so with `launched`, or
    `record` takes a tensor of flags. Both may be captured in a CUDA graph. `raise_pending` is a host point. Where peers
    must raise together it waits for the last eager call, which in a layer stack was a whole forward pass ago; looked at
    earlier, some ranks could see a flag that others do not see yet. For the same reason what replays flagged is raised
    at `synchronize` only.

    Kernels that wait for peers get `kernel_words`: int32 [8], where flag 1 << i goes to word i, and to words 6 and 7,
    as one int64, who was missing, if any: epoch << 16 | number in PHASES << 8 | rank in the group + 1.

    On CUDA these words lie in pinned memory of the host, at the same address for kernels: a call without errors
    writes nothing, copies nothing, and the host has one load to do.

    group: whose ranks raise together, with the time limit on waits; None where a rank raises on its own.
    peers: whose ranks kernels wait for; those of `group` when None.
    lost: int32 [1] on the device, set by kernels that waited in vain, so that those behind them do not wait as long for
        the same rank; other objects may share it.
    """

    EAGER, CAPTURED = 0, 1

    def __init__(
        self,
        config: MoEConfig,
        device: torch.device,
        group: Communicator | None = None,
        peers: Communicator | None = None,
        lost: torch.Tensor | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._group = group
        self._peers = group if peers is None else peers
        self._is_cuda = device.type == "cuda"
        self._words = torch.zeros(2, dtype=torch.int32, device=device)
        # Rows 0 and 1 mirror _words, rows 2 and 3 are written by kernels. Rows of 32 bytes, so that kernels find the
        # same alignment in both.
        self._host = torch.zeros(4, _WORDS, dtype=torch.int32, pin_memory=self._is_cuda)
        self._mirrors = self._host[:2, 0]
        self._all_words = [self._host[2 + kind] for kind in (self.EAGER, self.CAPTURED)]
        self._kernel_words = [words[:1] for words in self._all_words]
        # Reading a tensor's value costs microseconds, reading memory does not.
        self._seen = (ctypes.c_int32 * self._host.numel()).from_address(self._host.data_ptr())
        self.lost = torch.zeros(1, dtype=torch.int32, device=device) if lost is None else lost
        self._event = torch.cuda.Event() if self._is_cuda else None
        self._recorded = False
        self._problem: InputError | None = None

    def kernel_word(self) -> torch.Tensor:
        """int32 [1] where a kernel launched now stores its flag if it has one; the kernel must know a single flag.

        Only for kernels: torch refuses to mix it with CUDA tensors.
        """
        return self._kernel_words[self.CAPTURED if self._is_cuda and _is_capturing() else self.EAGER]

    def kernel_words(self) -> torch.Tensor:
        """int32 [8] for a kernel launched now that may have several flags, or a lost peer, to report."""
        return self._all_words[self.CAPTURED if self._is_cuda and _is_capturing() else self.EAGER]

    def launched(self) -> None:
        """A kernel with `kernel_word` or `kernel_words` was launched on the current stream. On CPU, raise at once."""
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
        flags = self._flags(synchronize)
        seen = self._seen
        missing = seen[_KERNEL[0] + 6] | seen[_KERNEL[1] + 6] if synchronize else seen[_KERNEL[0] + 6]
        if flags or missing:
            self._raise(ErrorFlag(flags), synchronize)

    def refused(self, problem: InputError) -> None:
        """This rank was called wrongly, which the others hear of at `raise_gathered`."""
        self._problem = self._problem or problem

    def raise_gathered(self, ep: Communicator, tp: Communicator) -> None:
        """Wait for the current stream, and raise on all ranks alike what calls and replays have flagged on any of them.

        A collective over both groups, for classes whose calls leave each rank with its own flags. They do not call
        `raise_pending`, by which ranks would raise apart.
        """
        if self._is_cuda:
            if _is_capturing():
                return
            ep.wait_for_event(torch.cuda.current_stream(self._device).record_event(), "error flags")
        problem, own = self._problem, self._flags(captured=True)
        if problem is not None:
            own |= ErrorFlag.ABORTED
        everyone = flags_of_all(ep, tp, torch.tensor([own], dtype=torch.int32, device=self._device))
        if everyone:
            self._problem = None
            self._clear(captured=True)
            raise_together(self._config, ep, tp, problem, own, everyone)

    def _flags(self, captured: bool) -> int:
        """What the host sees of eager calls, and of `captured` ones too."""
        seen = self._seen
        flags = seen[_MIRROR[0]] | seen[_KERNEL[0]] | seen[_KERNEL[0] + 1] | seen[_KERNEL[0] + 2] | seen[_KERNEL[0] + 3]
        if captured:
            flags |= seen[_MIRROR[1]]
            for word in range(_KERNEL[1], _KERNEL[1] + 4):
                flags |= seen[word]
        return flags

    def _raise(self, flags: ErrorFlag, captured: bool) -> NoReturn:
        kinds = (self.EAGER, self.CAPTURED) if captured else (self.EAGER,)
        records = [self._all_words[kind][6:].view(torch.int64).item() for kind in kinds]
        record = int(next((record for record in records if record), 0))
        self._clear(captured)
        if record or ErrorFlag.PEER_LOST in flags:
            raise self._peer_lost(record)
        raise_for_flags(flags, self._config)

    def _peer_lost(self, record: int) -> PeerLostError:
        seconds = self._config.parallel.timeout_seconds
        if not record:
            return PeerLostError(
                "exchange", None, seconds, "a wait was in vain, before or on another rank, and its rows are void"
            )
        rank, phase, epoch = (record & 0xFF) - 1, PHASES[(record >> 8) & 0xFF], record >> 16
        group = None if self._peers is None else self._peers.group
        if group is not None:
            rank = dist.get_global_rank(group, rank)
        return PeerLostError(phase, [rank], seconds, f"in epoch {epoch} of the exchange, by the clock of the device")

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
        for words in self._all_words[:kinds]:
            words.zero_()
        self.lost.zero_()

    def _mark(self) -> None:
        assert self._event is not None
        self._event.record()
        self._recorded = True

    def _wait_for(self, event: torch.cuda.Event) -> None:
        if self._group is None:
            event.synchronize()
        else:
            self._group.wait_for_event(event, "error flags")


_WORDS = 8
_MIRROR, _KERNEL = (0, _WORDS), (2 * _WORDS, 3 * _WORDS)
"""Where the words of eager and of captured calls begin among those that the host reads."""

_is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing


def raise_for_flags(flags: ErrorFlag, config: MoEConfig) -> NoReturn:
    """Raise the error that `flags`, of one or several ranks, stand for."""
    if ErrorFlag.EXPERT_ID in flags:
        raise ExpertIdError(f"topk_ids must lie in [-1, {config.num_experts}); ids outside were found on some rank")
    if ErrorFlag.CAPACITY in flags:
        raise CapacityError(
            "fixed-capacity dispatch overflowed: some rank had more rows for one destination than the capacity; "
            f"raise dispatch_capacity (now {config.dispatch_capacity}) or the max_num_tokens of the call"
        )
    raise InputError("a rank was called with wrong arguments and sent no tokens; its own error says which")


def raise_together(
    config: MoEConfig,
    ep: Communicator,
    tp: Communicator,
    problem: InputError | None,
    own: int,
    everyone: int = 0,
) -> NoReturn:
    """Every rank learns every rank's problem and raises the first one, in rank order; collective over both groups.

    problem: what this rank was called with wrongly, or None. own: this rank's flags. everyone: the flags of all ranks,
    for errors that are no single rank's.
    """
    if problem is None and own & ErrorFlag.EXPERT_ID:
        problem = ExpertIdError(f"topk_ids must lie in [-1, {config.num_experts}); ids outside were found")
    mine = None if problem is None else (type(problem).__name__, str(problem))
    by_tp_rank = tp.gather_objects(ep.gather_objects(mine, "error report"), "error report")
    for ep_rank, row in enumerate(zip(*by_tp_rank, strict=True)):
        for tp_rank, found in enumerate(row):
            if found is not None:
                kind, text = found
                where = f"EP rank {ep_rank}" + (f", TP rank {tp_rank}" if tp.size > 1 else "")
                raise rebuild(kind, f"{where}: {text}") from problem
    raise_for_flags(ErrorFlag(everyone), config)


def flags_of_all(ep: Communicator, tp: Communicator, flags: torch.Tensor) -> int:
    """The bitwise or of every rank's `flags`, int32 [1]. A collective over both groups, for which the host waits."""
    for group in (ep, tp):
        if group.size > 1:
            mine, flags = flags, torch.empty(group.size * flags.numel(), dtype=torch.int32, device=flags.device)
            group.all_gather(flags, mine, "error flags").wait()
    if flags.is_cuda:
        ep.wait_for_event(torch.cuda.current_stream(flags.device).record_event(), "error flags")
    return functools.reduce(operator.or_, flags.tolist())


def or_rows(flags: torch.Tensor) -> torch.Tensor:
    """int32 [1]: the bitwise or of flags int32 [N, 1]."""
    found = [((flags & int(flag)) != 0).any() * int(flag) for flag in ErrorFlag]
    return torch.stack(found).sum(dtype=torch.int32).view(1)
