"""DeepEP, if it is installed: what it has, and the one buffer of a process group that its classes share.

Built with NVSHMEM it looks for network cards when it starts, and V2 has NCCL look for them; on a machine without any
both are told that there are none, unless the environment says something else.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import mmap
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from moe_plugin.environment import Package, register_package_probe
from moe_plugin.errors import ConfigError, HandleError

PACKAGE = "deep_ep"
INSTALL = "build it from https://github.com/deepseek-ai/DeepEP by its guide"
BUFFERS = ("Buffer", "ElasticBuffer", "HybridEPBuffer")
"""Its interfaces, by release: V1, V2 and HybridEP. Those that are there are features of the package."""
NODE_RANKS = 8
"""Ranks that DeepEP takes to be one node, consecutive in their group."""
MAX_LOW_LATENCY_IN_FLIGHT = 2
"""Low-latency calls between dispatch and combine: the buffer has two halves, taken in turn."""
LOW_LATENCY_HIDDEN_SIZES = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
"""Those that every release since V1.2 was compiled for, where the installed one does not tell."""
QUEUE_DEPTH = 1024
"""Of NVSHMEM by default; a dispatch of M tokens needs 2 * (M + 1)."""

RDMA, NVLINK_ONLY = "rdma", "nvlink_only"
NVLINK_ONLY_VARIABLE = "MOE_PLUGIN_DEEPEP_NVLINK_ONLY"

_HIDDEN_SIZE = "ll_hidden_"
_NETWORK_CARDS = Path("/sys/class/infiniband")
_PARAMETERS = {
    "num_worst_tokens": ("Buffer", "dispatch", "num_worst_tokens"),
    "low_latency": ("Buffer", "low_latency_dispatch", "topk_idx"),
    "recv_hook": ("Buffer", "low_latency_dispatch", "return_recv_hook"),
    "ue8m0": ("Buffer", "low_latency_dispatch", "use_ue8m0"),
    "zero_copy": ("Buffer", "low_latency_combine", "zero_copy"),
    "combine_out": ("Buffer", "low_latency_combine", "out"),
    "hybrid_permute": ("HybridEPBuffer", "dispatch_with_permute", "non_blocking"),
    "hybrid_fused_permute": ("HybridEPBuffer", "dispatch_with_permute", "fuse_permute_dispatch"),
}
"""Features that a parameter of a method stands for: {feature: (class, method, parameter)}."""


def probe() -> Package:
    """What is there, by importing it; never raises."""
    return find()[1]


def find() -> tuple[ModuleType | None, Package]:
    """The module, None unless it is usable, and what is known of it; never raises.

    Features of the package are the names in `BUFFERS` that it has, those of `_PARAMETERS`, "ll_hidden_<H>" for every
    hidden size of the low-latency kernels, "hybrid_dense_ids" where HybridEPBuffer takes int16 ids, `RDMA` where there
    is a network card, `NVLINK_ONLY` where the environment says that the low-latency kernels were built to do without,
    and "cpu" where it is a double that computes on CPU tensors.
    """
    try:
        if importlib.util.find_spec(PACKAGE) is None:
            return None, Package(PACKAGE, None, f"not installed: {INSTALL}")
        module = _import()
        features = _features(module)
    except (Exception, SystemExit) as problem:  # whatever a foreign module does while it loads
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        return None, Package(PACKAGE, _version(), f"does not load ({text})")
    if not features.intersection(BUFFERS):
        return None, Package(PACKAGE, _version(), f"has none of {', '.join(BUFFERS)}: {INSTALL}")
    return module, Package(PACKAGE, _version(), None, features)


def library() -> ModuleType:
    """The module. Raises ConfigError when it is not usable, with what `probe` found."""
    module, package = find()
    if module is None:
        raise ConfigError(f"deep_ep cannot be used: {package.describe()}")
    return module


def _features(module: ModuleType) -> frozenset[str]:
    found = {name for name in BUFFERS if hasattr(module, name)}
    for feature, (owner, method, parameter) in _PARAMETERS.items():
        function = getattr(getattr(module, owner, None), method, None)
        with contextlib.suppress(TypeError, ValueError):  # no function, or one without a signature
            if function is not None and parameter in inspect.signature(function).parameters:
                found.add(feature)
    hybrid = getattr(module, "HybridEPBuffer", None)
    # What it does with ids is no parameter; the limit on which it decides is named in its module.
    if hybrid is not None and hasattr(sys.modules.get(hybrid.__module__), "INT16_EXPERT_LIMIT"):
        found.add("hybrid_dense_ids")
    if getattr(module, "COMPUTES_ON_CPU", False):
        found.add("cpu")
    if _has_network_cards():
        found.add(RDMA)
    if os.environ.get(NVLINK_ONLY_VARIABLE) == "1":
        found.add(NVLINK_ONLY)
    if "low_latency" in found:
        found.update(f"{_HIDDEN_SIZE}{size}" for size in _hidden_sizes(module))
    return frozenset(found)


def _import() -> ModuleType:
    if not _has_network_cards():
        os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
        os.environ.setdefault("EP_DISABLE_GIN", "1")
    return importlib.import_module(PACKAGE)


def _has_network_cards() -> bool:
    return _NETWORK_CARDS.is_dir() and any(_NETWORK_CARDS.iterdir())


def _version() -> str:
    for distribution in ("deep-ep", "deep_ep"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(getattr(sys.modules.get(PACKAGE), "__version__", "unknown"))


def uses_elastic(package: Package) -> bool:
    """Whether `package` is DeepEP V2, where ElasticBuffer is the high-throughput interface and Buffer is kept for old
    callers and the low-latency kernels.
    """
    return "ElasticBuffer" in package.features


def low_latency_hidden_sizes(package: Package) -> tuple[int, ...]:
    """Hidden sizes that the low-latency kernels of `package` were compiled for, as its features say.

    `LOW_LATENCY_HIDDEN_SIZES` where they say nothing, as those of a package that was not found do.
    """
    found = [int(each.removeprefix(_HIDDEN_SIZE)) for each in package.features if each.startswith(_HIDDEN_SIZE)]
    return tuple(sorted(found)) or LOW_LATENCY_HIDDEN_SIZES


def _hidden_sizes(module: ModuleType) -> tuple[int, ...]:
    """Read off the names of the kernels in the extension, which has one for every size."""
    sizes = getattr(module, "LOW_LATENCY_HIDDEN_SIZES", None)
    if sizes is not None:
        return tuple(sizes)
    for name in ("_C", "deep_ep_cpp"):
        path = getattr(sys.modules.get(f"{PACKAGE}.{name}") or sys.modules.get(name), "__file__", None)
        if path:
            return _sizes_in(path) or LOW_LATENCY_HIDDEN_SIZES
    return LOW_LATENCY_HIDDEN_SIZES


@functools.cache
def _sizes_in(path: str) -> tuple[int, ...]:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            found = re.findall(rb"internode_ll\d+combine[^\0]{0,40}?Li(\d{4,5})E", text)
    except (OSError, ValueError):
        return ()
    return tuple(sorted({int(size) for size in found}))


@dataclass(frozen=True, slots=True)
class LowLatencyShape:
    """What the low-latency kernels lay out their buffer for; the same on all ranks.

    max_tokens: of a rank in one call. hidden_size: H. num_experts: over all ranks, as many on each.
    """

    max_tokens: int
    hidden_size: int
    num_experts: int


class GroupBuffer:
    """A buffer of one process group that all its layers share, made when the first of them needs it.

    `raw` is that of DeepEP. It grows while layers are built, which replaces it; layers therefore ask for it in every
    call.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._captured_users: weakref.WeakSet[object] = weakref.WeakSet()
        self._raw: Any = None
        self._is_captured = False
        self._may_capture = torch.cuda.is_available()

    def join(self, user: object) -> None:
        """Count `user` among those for whom the buffer is kept, until it leaves or is no more."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """The last one to leave releases the buffer. A collective: users leave in the same order on all ranks."""
        self._users.discard(user)
        self._captured_users.discard(user)
        if _nobody_left(self._group, self._users):
            self.release()

    @property
    def raw(self) -> Any:
        """That of DeepEP. Raises HandleError once it was released."""
        if self._raw is None:
            raise HandleError("the DeepEP buffer of this group was released; build the layer again")
        if self._may_capture and torch.cuda.is_current_stream_capturing():
            self._is_captured = True
            self._captured_users.update(self._users)
        return self._raw

    def _is_in_use_by_a_graph(self) -> bool:
        """Whether a CUDA graph may hold its address: one that was captured while layers that still exist did."""
        if self._is_captured:
            gc.collect()  # so that all ranks find the same layers
        return self._is_captured and bool(self._captured_users)

    def release(self) -> None:
        """Give the memory back. A collective; layers that use it raise HandleError from then on."""
        if self._raw is not None:
            self._captured_users.clear()
            raw, self._raw = self._raw, None
            self._is_captured = False
            raw.destroy()


class SharedBuffer(GroupBuffer):
    """DeepEP's `Buffer` of one process group, for both modes.

    What calls must know of each other in the two halves of the low-latency buffer is kept here.
    """

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self._nvl_bytes = self._rdma_bytes = 0
        self._queues, self._depth = 24, 0
        self._shapes: set[LowLatencyShape] = set()
        self._clean_for: int | None = None
        self._in_flight: weakref.WeakSet[LowLatencyCall] = weakref.WeakSet()
        self._pending: _Receive | None = None
        self._borrower: LowLatencyCall | None = None
        self._lends = True
        self.num_low_latency_calls = 0

    @property
    def num_bytes(self) -> int:
        """Of device memory that the Buffer has for rows."""
        return self._nvl_bytes + self._rdma_bytes

    def reserve_high_throughput(self, row_bytes: int, num_sms: int) -> None:
        """Make room for rows of `row_bytes` bytes moved by `num_sms` SMs. A collective, with the same numbers.

        Raises ConfigError when the buffer would have to grow after a CUDA graph has captured it.
        """
        buffer_class, size = library().Buffer, self._group.size()
        configs = high_throughput_configs(size, num_sms)
        nvl_bytes = max(each.get_nvl_buffer_size_hint(row_bytes, size) for each in configs)
        rdma_bytes = 0
        if size > NODE_RANKS:
            rdma_bytes = max(each.get_rdma_buffer_size_hint(row_bytes, size) for each in configs)
        self._grow(buffer_class, nvl_bytes, rdma_bytes, num_sms)

    def reserve_low_latency(self, shape: LowLatencyShape) -> None:
        """Make room for calls of `shape`. A collective.

        Raises ConfigError as `reserve_high_throughput` does, and when layers of another group have such a buffer: a
        process is part of one NVSHMEM world. Without layers that one is released.
        """
        self._make_way()
        buffer_class, size = library().Buffer, self._group.size()
        depth = max(int(os.environ.get("NVSHMEM_QP_DEPTH", QUEUE_DEPTH)), 2 * (shape.max_tokens + 1))
        os.environ["NVSHMEM_QP_DEPTH"] = str(depth)
        nbytes = buffer_class.get_low_latency_rdma_size_hint(
            shape.max_tokens, shape.hidden_size, size, shape.num_experts
        )
        self._shapes.add(shape)
        self._grow(buffer_class, self._nvl_bytes, nbytes, shape.num_experts // size, depth)

    def _make_way(self) -> None:
        others = [each for each in _buffers.values() if each is not self and each._raw is not None and each._shapes]
        if not others:
            return
        gc.collect()  # so that all ranks find the same layers
        for other in others:
            if other._users:
                raise ConfigError(
                    "deepep_low_latency has a buffer on another process group, and NVSHMEM knows one group of ranks in "
                    "a process; close the layers of that group first"
                )
            other.release()

    def _grow(self, buffer_class: Any, nvl_bytes: int, rdma_bytes: int, queues: int, depth: int = 0) -> None:
        fits = nvl_bytes <= self._nvl_bytes and rdma_bytes <= self._rdma_bytes and queues <= self._queues
        fits = fits and depth <= self._depth
        if self._raw is not None and fits and self._raw.low_latency_mode >= bool(self._shapes):
            return
        if self._raw is not None and self._is_in_use_by_a_graph():
            raise ConfigError(
                f"the DeepEP buffer of {self.num_bytes} bytes is in a CUDA graph and cannot grow to "
                f"{max(nvl_bytes, self._nvl_bytes) + max(rdma_bytes, self._rdma_bytes)}; build all layers before "
                "capturing, the largest first"
            )
        self.release()
        self._nvl_bytes, self._rdma_bytes = max(nvl_bytes, self._nvl_bytes), max(rdma_bytes, self._rdma_bytes)
        self._queues, self._depth = max(queues, self._queues), max(depth, self._depth)
        with _without_network_cards(buffer_class):
            self._raw = buffer_class(
                self._group,
                self._nvl_bytes,
                self._rdma_bytes,
                low_latency_mode=bool(self._shapes),
                num_qps_per_rank=self._queues,
                explicitly_destroy=True,
            )
        # It comes zeroed, which is clean for one number of experts.
        numbers = {each.num_experts for each in self._shapes}
        self._clean_for = numbers.pop() if len(numbers) == 1 else None

    def release(self) -> None:
        if self._raw is not None:
            self._in_flight.clear()
            self._pending = self._borrower = None
        super().release()

    def start_low_latency(self, shape: LowLatencyShape) -> LowLatencyCall:
        """To be called before a low-latency dispatch; `LowLatencyCall.end` after its combine was launched.

        Calls of a group share one stream, or streams that the caller has put in order. Raises HandleError when two
        other calls are in flight.
        """
        if len(self._in_flight) >= MAX_LOW_LATENCY_IN_FLIGHT:
            raise HandleError(
                f"{MAX_LOW_LATENCY_IN_FLIGHT} low-latency calls are in flight, and the buffer has as many halves; "
                "finalize one before the next prepare"
            )
        raw = self.raw
        self._settle()
        # In a graph nobody knows what has run before a replay.
        if self._is_captured:
            self._clean_for = None
        self._clean(shape)
        self.num_low_latency_calls += 1
        call = LowLatencyCall(self, raw, shape, self.num_low_latency_calls)
        self._in_flight.add(call)
        return call

    def start_high_throughput(self) -> Any:
        """The Buffer, for a high-throughput dispatch or combine."""
        if self._group.size() > NODE_RANKS:  # between nodes both modes use the same memory
            self._settle()
            self._clean_for = None
        return self.raw

    def _settle(self) -> None:
        """What must be done before other rows go into the memory: rows received, and those that were lent copied."""
        if self._pending is not None:
            self._pending()
        if self._borrower is not None:
            self._borrower._save()
            # It would be a copy more in every such call, of all the room for rows.
            self._lends, self._borrower = False, None

    def _clean(self, shape: LowLatencyShape) -> None:
        """Zero the counters, which kernels expect so, and leave so for others with as many experts alone.

        They lie at the beginning of the buffer, one for each expert, whatever else a shape says.
        """
        shared = len({each.num_experts for each in self._shapes}) > 1 or self._group.size() > NODE_RANKS
        if shared and self._clean_for != shape.num_experts:
            self.raw.clean_low_latency_buffer(shape.max_tokens, shape.hidden_size, shape.num_experts)
        self._clean_for = shape.num_experts


def _nobody_left(group: Any, users: weakref.WeakSet[object]) -> bool:
    """Whether all ranks have lost all users, who are collected at different times on different ranks. A collective."""
    gc.collect()
    counts: list[int] = [0] * group.size()
    torch.distributed.all_gather_object(counts, len(users), group=group)
    return not any(counts)


class LowLatencyCall:
    """One call between dispatch and combine. raw: the Buffer. number: of the dispatch, counted over all layers."""

    def __init__(self, buffer: SharedBuffer, raw: Any, shape: LowLatencyShape, number: int) -> None:
        self._buffer, self.raw, self._shape, self.number = buffer, raw, shape, number
        self._lent: torch.Tensor | None = None
        self._saved: torch.Tensor | None = None

    @property
    def is_alone(self) -> bool:
        """Whether no other call is in flight, and no dispatch has come after this one's."""
        return len(self._buffer._in_flight) == 1 and self._buffer.num_low_latency_calls == self.number

    def to_receive(self, hook: Callable[[], None]) -> Callable[[], None]:
        """What calls `hook`, the receiving half of a kernel that was just launched for this call, unless it was called.

        Every kernel resets the counters on which the one before it waits, so that one has to be received first. Whoever
        launches the next does that, if it has not been done by then.
        """
        self._buffer._pending = receive = _Receive(self._buffer, hook)
        return receive

    def lend(self, handle: tuple[Any, ...]) -> torch.Tensor | None:
        """Memory of the buffer, bf16 [experts of a rank, R * M, H], from which combine can send rows as they lie.

        Its rows are apart: there is room for what else is in a message. handle: of this call's dispatch. None where
        the memory may be needed for other calls before that.
        """
        buffer = self._buffer
        if not (buffer._lends and self.is_alone):
            return None
        self._lent, buffer._borrower = self.raw.get_next_low_latency_combine_buffer(handle), self
        return self._lent

    def returned(self, rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """What combine takes for `rows`, and whether they lie where it sends them from.

        For rows that were lent it is all that was lent, or the copy of it that had to be made.
        """
        lent, saved = self._lent, self._saved
        if lent is None or rows.data_ptr() != lent.data_ptr():
            return rows, False
        if saved is not None:
            return saved, False
        # It looks at the shape alone, and wants it dense.
        most, hidden = lent.shape[1:]
        return lent.as_strided(lent.shape, (most * hidden, hidden, 1)), True

    def start_combine(self) -> Any:
        """The Buffer, for the combine of this call. Raises HandleError when it is no longer that of the dispatch."""
        buffer = self._buffer
        if buffer.raw is not self.raw:
            raise HandleError(
                "the DeepEP buffer was replaced while a call was between prepare and finalize; build layers while none "
                "is in flight"
            )
        if buffer._borrower is self:
            buffer._borrower = None
        buffer._settle()
        buffer._clean(self._shape)
        return self.raw

    def end(self) -> None:
        """The combine was launched, or the call was given up."""
        buffer = self._buffer
        buffer._in_flight.discard(self)
        if buffer._borrower is self:
            buffer._borrower = None

    def _save(self) -> None:
        assert self._lent is not None
        self._saved = self._lent.clone(memory_format=torch.contiguous_format)


class _Receive:
    """Calls `hook` once."""

    __slots__ = ("_buffer", "_hook")

    def __init__(self, buffer: SharedBuffer, hook: Callable[[], None]) -> None:
        self._buffer = buffer
        self._hook: Callable[[], None] | None = hook

    def __call__(self) -> None:
        hook, self._hook = self._hook, None
        if hook is not None:
            self._buffer._pending = None
            hook()


_buffers: dict[str, SharedBuffer] = {}


def shared_buffer(group: Any) -> SharedBuffer:
    """The buffer of a process group."""
    return _buffers.setdefault(group.group_name, SharedBuffer(group))


@dataclass(frozen=True, slots=True)
class ElasticShape:
    """What an ElasticBuffer is made for; the same on all ranks.

    max_tokens: of a rank in one call. hidden_size: H, in bf16, which any other row is smaller than. top_k: K.
    timeout_seconds: how long a rank waits for others. num_nodes: over which the ranks are spread alike.
    """

    max_tokens: int
    hidden_size: int
    top_k: int
    timeout_seconds: int
    num_nodes: int = 1

    def joined(self, other: ElasticShape) -> ElasticShape:
        """What serves calls of both."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return ElasticShape(*(max(pair) for pair in pairs))

    def num_bytes(self, num_ranks: int) -> int:
        """Of device memory that the buffer takes, without asking DeepEP.

        Source: `ElasticBuffer::calculate_buffer_size` of csrc/elastic/buffer.hpp and the layouts of its
        include/deep_ep/common/layout.cuh.
        """
        most, top_k, nodes = self.max_tokens, self.top_k, self.num_nodes
        local = num_ranks // nodes
        sent = _aligned(2 * self.hidden_size, 32) + _aligned(12 * top_k + 4, 32)
        returned = _aligned(2 * self.hidden_size, 32) + _aligned(8 * top_k, 32)
        if nodes == 1:
            dispatch, combine = num_ranks * most * sent, min(num_ranks, top_k) * most * returned
        else:
            in_channels = most + _ELASTIC_CHANNELS
            dispatch = (local * nodes * most + most + nodes * in_channels) * sent
            combine = (min(local, top_k) * nodes * most + min(nodes, top_k) * most + nodes * in_channels) * returned
        return _aligned(max(dispatch, combine), _ELASTIC_UNIT) + _ELASTIC_WORKSPACE


_ELASTIC_UNIT = 2 << 20
_ELASTIC_CHANNELS = 1280
_ELASTIC_WORKSPACE = 14 << 20
"""Bytes of counters and signals, for up to 1024 ranks with 1024 channels each."""


def _aligned(count: int, unit: int) -> int:
    return -(-count // unit) * unit


class SharedElasticBuffer(GroupBuffer):
    """DeepEP's `ElasticBuffer` of one process group."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self._shape: ElasticShape | None = None

    def reserve(self, shape: ElasticShape) -> None:
        """Make room for calls of `shape`. A collective, with the same shape.

        Raises ConfigError when the buffer would have to be replaced after a CUDA graph has captured it.
        """
        wanted = shape if self._shape is None else self._shape.joined(shape)
        if self._raw is not None and wanted == self._shape:
            return
        if self._raw is not None and self._is_in_use_by_a_graph():
            raise ConfigError(
                f"the DeepEP buffer for {self._shape} is in a CUDA graph and cannot become one for {wanted}; build all "
                "layers before capturing, the largest first"
            )
        self.release()
        self._shape = wanted
        # It takes over the communicator of torch, which makes one when it first needs it.
        torch.distributed.barrier(group=self._group)
        self._raw = library().ElasticBuffer(
            self._group,
            num_max_tokens_per_rank=wanted.max_tokens,
            hidden=wanted.hidden_size,
            num_topk=wanted.top_k,
            # Its way over nodes; inside of one it is not asked to make connections for that.
            allow_hybrid_mode=wanted.num_nodes > 1,
            num_cpu_timeout_secs=wanted.timeout_seconds,
            num_gpu_timeout_secs=wanted.timeout_seconds,
            explicitly_destroy=True,
        )


_elastic_buffers: dict[str, SharedElasticBuffer] = {}


def shared_elastic_buffer(group: Any) -> SharedElasticBuffer:
    """The ElasticBuffer of a process group."""
    return _elastic_buffers.setdefault(group.group_name, SharedElasticBuffer(group))


@dataclass(frozen=True, slots=True)
class HybridShape:
    """What a HybridEPBuffer is made for; the same on all ranks.

    hidden_size: H. max_tokens: of a rank in one call. num_slots: experts of a rank. use_fp8: rows travel in e4m3 with a
    scale for 128 columns. num_sms: that move rows.
    """

    hidden_size: int
    max_tokens: int
    num_slots: int
    use_fp8: bool
    num_sms: int

    def fits(self, other: HybridShape) -> bool:
        """Whether a buffer of this shape serves calls of `other`."""
        return self.max_tokens >= other.max_tokens and replace(self, max_tokens=other.max_tokens) == other

    def num_bytes(self, num_ranks: int) -> int:
        """Of device memory that the buffer takes: rows, a weight for every expert, and scales."""
        rows = num_ranks * -(-self.max_tokens // 64) * 64
        return rows * (2 * self.hidden_size + 4 * num_ranks * self.num_slots + 4 * (self.hidden_size // 128))


class SharedHybridBuffer:
    """DeepEP's HybridEPBuffer for every layer of one process group and shape. Making one is a collective."""

    def __init__(self, group: Any, shape: HybridShape) -> None:
        self.shape = shape
        self._group = group
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._stream: torch.cuda.Stream | None = None
        _prepare_run_time_compiler()
        self._raw: Any = library().HybridEPBuffer(
            group,
            shape.hidden_size,
            shape.max_tokens,
            shape.num_slots,
            use_fp8=shape.use_fp8,
            num_sms_dispatch_api=shape.num_sms,
            num_sms_combine_api=shape.num_sms,
        )
        nodes = self._raw.num_of_nodes
        if nodes != 1:
            self._raw = None
            raise ConfigError(f"HybridEPBuffer finds {nodes} NVLink domains among the ranks of the group; it must be 1")

    def join(self, user: object) -> None:
        """As `SharedBuffer.join`."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """As `SharedBuffer.leave`."""
        self._users.discard(user)
        if _nobody_left(self._group, self._users):
            self.release()

    @property
    def is_released(self) -> bool:
        """Whether nothing can be called any more."""
        return self._raw is None

    @contextlib.contextmanager
    def turn(self) -> Iterator[Any]:
        """The HybridEPBuffer for one call on the current stream, after earlier calls on whatever stream.

        Dispatch and combine use the same memory, and nothing but the order of kernels keeps them apart. Raises
        HandleError once it was released.
        """
        if self._raw is None:
            raise HandleError("the HybridEP buffer of this group was released; build the layer again")
        current = torch.cuda.current_stream() if torch.cuda.is_available() else None
        if current is not None and self._stream is not None and self._stream != current:
            current.wait_stream(self._stream)
        yield self._raw
        self._stream = current

    def release(self) -> None:
        """Give the memory back. A collective; layers that use it raise HandleError from then on."""
        if self._raw is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            torch.distributed.barrier(group=self._group)  # nobody reads or writes this rank's memory any more
            self._raw = None


_hybrid_buffers: dict[str, list[SharedHybridBuffer]] = {}


def shared_hybrid_buffer(group: Any, shape: HybridShape) -> SharedHybridBuffer:
    """A buffer of a process group that serves `shape`. A collective, with the same shape."""
    buffers = _hybrid_buffers.setdefault(group.group_name, [])
    for buffer in buffers:
        if not buffer.is_released and buffer.shape.fits(shape):
            return buffer
    buffers.append(SharedHybridBuffer(group, shape))
    return buffers[-1]


def _prepare_run_time_compiler() -> None:
    """What HybridEP reads in the environment: where nvcc is, and whether to share memory over NVLink between hosts.

    Hopper's NVLink ends at the host, where CUDA's IPC does; its other way fails on machines that say they have it.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is not None and "CUDA_HOME" not in os.environ:
        os.environ["CUDA_HOME"] = str(Path(nvcc).resolve().parent.parent)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (10, 0):
        os.environ.setdefault("USE_MNNVL", "0")


def release_buffers() -> None:
    """Release the buffers of all groups. A collective over each, in the order in which they were first asked for.

    To be called before the process groups are destroyed: DeepEP frees nothing by itself.
    """
    for buffer in _buffers.values():
        buffer.release()
    _buffers.clear()
    for elastic_buffer in _elastic_buffers.values():
        elastic_buffer.release()
    _elastic_buffers.clear()
    for buffers in _hybrid_buffers.values():
        for hybrid_buffer in buffers:
            hybrid_buffer.release()
    _hybrid_buffers.clear()


def high_throughput_configs(num_ranks: int, num_sms: int) -> tuple[Any, Any]:
    """DeepEP's tuned configurations of dispatch and combine, those of the next smaller number where it has none."""
    buffer_class = library().Buffer
    buffer_class.set_num_sms(num_sms)
    return _tuned(buffer_class.get_dispatch_config, num_ranks), _tuned(buffer_class.get_combine_config, num_ranks)


def high_throughput_bytes(row_bytes: int, num_ranks: int, num_sms: int) -> int:
    """Device memory that `SharedBuffer.reserve_high_throughput` takes, without asking DeepEP.

    Source: `Config::get_nvl_buffer_size_hint` and `get_rdma_buffer_size_hint` of csrc/config.hpp, with the largest
    queues of its tuned configurations.
    """
    ranks, nodes, channels = min(num_ranks, NODE_RANKS), max(num_ranks // NODE_RANKS, 1), num_sms // 2
    queued = row_bytes + _SOURCE_BYTES + _MOST_TOP_K * (8 + 4) + _MOST_SCALES * 4
    nvl_rows = 256 if nodes == 1 else 288 if num_ranks <= 64 else 720
    nvl_bytes = channels * ranks * (4 * (2 * nodes + 3) + nvl_rows * queued)
    if nodes == 1:
        return nvl_bytes
    return nvl_bytes + 2 * channels * nodes * (4 * (2 * NODE_RANKS + 2) + 128 * (queued + 16))


_SOURCE_BYTES, _MOST_TOP_K, _MOST_SCALES = 8, 128, 128
"""What DeepEP makes room for beside a row."""


def _tuned(get: Callable[[int], Any], num_ranks: int) -> Any:
    for ranks in range(num_ranks, 1, -1):
        with contextlib.suppress(AssertionError):
            return get(ranks)
    raise ConfigError(f"DeepEP has no configuration for {num_ranks} ranks or fewer")


@contextlib.contextmanager
def _without_network_cards(buffer_class: Any) -> Iterator[None]:
    """On a machine without network cards, keep the constructor from asking NVSHMEM for GPU-initiated transfers.

    It sets the variable itself, and NVSHMEM then fails where there is no card to initiate transfers on.
    """
    module = sys.modules.get(buffer_class.__module__)
    if _has_network_cards() or getattr(module, "os", None) is not os:
        yield
        return
    # Only that module's view of the environment is changed, and only while its constructor runs.
    module.os = SimpleNamespace(environ=_Environment(), getenv=os.getenv, path=os.path)  # type: ignore[union-attr]
    try:
        yield
    finally:
        module.os = os  # type: ignore[union-attr]


class _Environment:
    """os.environ in which GPU-initiated transfers stay off."""

    def __setitem__(self, name: str, value: str) -> None:
        os.environ[name] = "0" if name == "NVSHMEM_IB_ENABLE_IBGDA" else value

    def __getitem__(self, name: str) -> str:
        return os.environ[name]

    def __contains__(self, name: object) -> bool:
        return name in os.environ

    def get(self, name: str, default: Any = None) -> Any:
        return os.environ.get(name, default)


register_package_probe(PACKAGE, probe)
