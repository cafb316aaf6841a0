"""Scratch memory for layers: one arena per device, leased per call, so that steady state allocates nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Workspace:
    """Named buffers that one call holds from prepare to finalize. Contents are undefined when leased."""

    def __init__(self, arena: WorkspaceArena) -> None:
        self._arena = arena
        self._buffers: dict[str, torch.Tensor] = {}
        self._host: dict[str, torch.Tensor] = {}
        self._retired: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._released: torch.cuda.Event | None = None
        self.captured = False
        """A CUDA graph holds addresses in here: buffers that are outgrown must stay alive."""

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized contiguous tensor; the same name in the same lease is the same memory."""
        size = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            if buffer is not None and self.captured:
                self._retired.append(buffer)
            # An inference tensor could not be written by a later call outside of inference mode.
            with torch.inference_mode(False):
                buffer = torch.empty(max(size, 16), dtype=torch.uint8, device=self._arena.device)
            self._buffers[name] = buffer
            if self._arena.poison:
                buffer.fill_(0xFF)
        return buffer[:size].view(dtype).view(tuple(shape))

    def host_tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor on the host, pinned when the arena is on a CUDA device."""
        tensor = self._host.get(name)
        if tensor is None or tensor.shape != torch.Size(shape) or tensor.dtype != dtype:
            with torch.inference_mode(False):
                tensor = torch.empty(tuple(shape), dtype=dtype, pin_memory=self._arena.device.type == "cuda")
            self._host[name] = tensor
        return tensor

    def scoped(self, scope: str) -> Workspace:
        """The same memory under names of its own, for a part that must not meet another's buffers."""
        return _ScopedWorkspace(self, scope)

    def release(self) -> None:
        """Give the buffers back; work already enqueued on the current stream may still use them."""
        self._arena._give_back(self)

    @property
    def nbytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())


class _ScopedWorkspace(Workspace):
    def __init__(self, whole: Workspace, scope: str) -> None:
        super().__init__(whole._arena)
        self._whole, self._scope = whole, scope

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._whole.tensor(f"{self._scope}.{name}", shape, dtype)

    def host_tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._whole.host_tensor(f"{self._scope}.{name}", shape, dtype)

    def release(self) -> None:
        self._whole.release()

    @property
    def nbytes(self) -> int:
        return self._whole.nbytes


class WorkspaceArena:
    """Leases of Workspace for the layers on one device.

    Layers that run one after another reuse one Workspace; micro-batches in flight hold one each. A lease that is
    dropped without release is simply freed. Across CUDA streams, a lease waits for the release before it.

    poison: fill buffers with 0xFF bytes (NaN in every float format) at each lease, to catch reads of padding.
    """

    _shared: ClassVar[dict[torch.device, WorkspaceArena]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device | str, poison: bool = False) -> None:
        self.device = torch.empty(0, device=device).device  # with its index
        self.poison = poison
        self._free: list[Workspace] = []
        # Graphs hold addresses in these, whatever becomes of the calls that leased them.
        self._captured: list[Workspace] = []

    @classmethod
    def shared(cls, device: torch.device | str) -> WorkspaceArena:
        """The arena that all layers of this process use on `device` unless given another."""
        device = torch.device(device)
        with cls._lock:
            return cls._shared.setdefault(device, cls(device))

    def lease(self) -> Workspace:
        with self._lock:
            workspace = self._free.pop() if self._free else Workspace(self)
        stream = _stream(self.device)
        if stream is not None:
            if _is_capturing():
                if not workspace.captured:
                    self._captured.append(workspace)
                workspace.captured = True
            elif workspace._released is not None and workspace._stream != stream:
                stream.wait_event(workspace._released)
        if self.poison:
            for buffer in workspace._buffers.values():
                buffer.fill_(0xFF)
        return workspace

    def _give_back(self, workspace: Workspace) -> None:
        stream = _stream(self.device)
        if stream is not None and not _is_capturing():
            workspace._stream, workspace._released = stream, stream.record_event()
        with self._lock:
            # Released twice, it would be leased to two calls at once.
            if workspace not in self._free:
                self._free.append(workspace)

    @property
    def nbytes(self) -> int:
        """Bytes held by workspaces that are not leased at the moment."""
        return sum(workspace.nbytes for workspace in self._free)
