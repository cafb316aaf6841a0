"""Scratch memory for layers: one arena per device, leased per call, so that steady state allocates nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, ClassVar, TypeVar

import torch

V = TypeVar("V")

_MAX_DERIVED = 1024
"""Views and cached values that one workspace keeps; a server that sees every T must not collect them for ever."""


class Workspace:
    """Named buffers that one call holds from prepare to finalize. Contents are undefined when leased."""

    def __init__(self, arena: WorkspaceArena) -> None:
        self._arena = arena
        self._buffers: dict[Hashable, torch.Tensor] = {}
        self._host: dict[Hashable, torch.Tensor] = {}
        self._retired: list[torch.Tensor] = []
        self._derived: dict[Hashable, Any] = {}
        self._replaced = 0
        self._is_leased = True
        self._stream: int | None = None
        self._released: torch.cuda.Event | None = None
        self.captured = False
        """A CUDA graph holds addresses in here: buffers that are outgrown must stay alive."""

    def tensor(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized contiguous tensor; the same name in the same lease is the same memory.

        When name, shape and dtype repeat, even in a later lease, it is the same object: change only its contents.
        """
        key = (name, shape if type(shape) is tuple else tuple(shape), dtype)
        view: torch.Tensor | None = self._derived.get(key)
        return self._make_view(*key) if view is None else view

    def _make_view(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        # An inference tensor could not be written by a later call outside of inference mode.
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < size:
                if buffer is not None:
                    self._replaced += 1
                    self._derived.clear()
                    if self.captured:
                        self._retired.append(buffer)
                buffer = torch.empty(max(size, 16), dtype=torch.uint8, device=self._arena.device)
                self._buffers[name] = buffer
                if self._arena.poison:
                    buffer.fill_(0xFF)
            return self._keep((name, shape, dtype), buffer[:size].view(dtype).view(shape))

    def cached(self, key: Hashable, build: Callable[[], V]) -> V:
        """What `build()` returns, kept across leases until a buffer of this workspace is replaced by a larger one.

        For what derives from its tensors, which `build` asks for: sets of views, addresses, arguments of launches.
        The key must name everything else that the value depends on.
        """
        value: V | None = self._derived.get((_CACHED, key))
        while value is None:
            replaced = self._replaced
            value = build()
            if self._replaced == replaced:
                return self._keep((_CACHED, key), value)
            value = None  # it may hold views of a buffer that `build` itself made too small
        return value

    def _keep(self, key: Hashable, value: V) -> V:
        if len(self._derived) >= _MAX_DERIVED:
            self._derived.clear()
        self._derived[key] = value
        return value

    def host_tensor(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
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


_CACHED = object()


class _ScopedWorkspace(Workspace):
    """Made in every call, so it is nothing but a prefix of names."""

    def __init__(self, whole: Workspace, scope: str) -> None:
        self._whole, self._scope = whole, scope

    def tensor(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._whole.tensor((self._scope, name), shape, dtype)

    def cached(self, key: Hashable, build: Callable[[], V]) -> V:
        return self._whole.cached((self._scope, key), build)

    def host_tensor(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._whole.host_tensor((self._scope, name), shape, dtype)

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
        self._is_cuda = self.device.type == "cuda"
        # Streams that released something, by handle. Events cost microseconds, and one stream needs none.
        self._streams: dict[int, torch.cuda.Stream] = {}
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
        workspace._is_leased = True
        if self._is_cuda:
            self._order_after_release(workspace)
        if self.poison:
            for buffer in workspace._buffers.values():
                buffer.fill_(0xFF)
        return workspace

    def _order_after_release(self, workspace: Workspace) -> None:
        if torch.cuda.is_current_stream_capturing():
            if not workspace.captured:
                self._captured.append(workspace)
            workspace.captured = True
            return
        if workspace._stream is None or workspace._stream == _stream_handle(self.device.index):
            return
        current = torch.cuda.current_stream(self.device)
        # Without an event of its own it was released when all work ran on one stream, which this then waits for.
        current.wait_event(workspace._released or self._streams[workspace._stream].record_event())

    def _give_back(self, workspace: Workspace) -> None:
        if self._is_cuda and not torch.cuda.is_current_stream_capturing():
            stream = _stream_handle(self.device.index)
            if stream not in self._streams:
                self._streams[stream] = torch.cuda.current_stream(self.device)
            workspace._stream = stream
            workspace._released = self._streams[stream].record_event() if len(self._streams) > 1 else None
        with self._lock:
            # Released twice, it would be leased to two calls at once.
            if workspace._is_leased:
                workspace._is_leased = False
                self._free.append(workspace)

    @property
    def nbytes(self) -> int:
        """Bytes held by workspaces that are not leased at the moment."""
        return sum(workspace.nbytes for workspace in self._free)


def _current_stream_handle(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


_stream_handle: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream_handle)
