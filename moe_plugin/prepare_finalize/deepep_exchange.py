"""How the installed DeepEP moves rows for the high-throughput class: by `Buffer` in V1, by `ElasticBuffer` in V2.

|                        | `BufferExchange`                            | `ElasticExchange`                           |
| ---------------------- | ------------------------------------------- | ------------------------------------------- |
| is told of the routing | ids, and the layout that follows from them  | ids, an expert once in a token              |
| an error on a rank     | a large number among the counts             | an all-gather of flags ahead of the rows    |
| rows behind the last   | ids of -1                                   | ids of what was there before: set to -1     |
| time limit             | the library's, 100 s as released            | the longest of all layers of the group      |
| kernels                | compiled with it, for nodes of 2, 4, 8      | compiled by nvcc when first launched        |

`ElasticBuffer` compiles its kernels for a number of tokens. So in calls for CUDA graphs the announced bound is rounded
up to a power of two: a server that captures many sizes has few of them compiled.

Source: https://github.com/deepseek-ai/DeepEP.
"""

from __future__ import annotations

import abc
import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moe_plugin.compat import deep_ep
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.errors import InputError
from moe_plugin.kernels.dispatch_layout import (
    DispatchLayout,
    dispatch_layout,
    dispatch_layout_launches,
    error_count,
    single_launch,
)
from moe_plugin.kernels.launch_sequence import LaunchSequence, one_object
from moe_plugin.kernels.placement_lookup import LookupTables, uses_triton
from moe_plugin.kernels.tiling import next_power_of_2
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import ErrorFlag
from moe_plugin.prepare_finalize.placement_lookup import PlacementLookup
from moe_plugin.quantization import FP8_DTYPE, dispatched_groups
from moe_plugin.verdict import Gate, gate_cuda_graph
from moe_plugin.workspace import Workspace

ROW_UNIT = 512
"""Bytes: DeepEP's copies go by warps of 32 lanes and 16 bytes."""

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""[N, width], in fp8 with scales [N, groups]."""


@dataclass(slots=True)
class Routing:
    """Of one call, as DeepEP takes it.

    ids: int32 or int64 [T, K], rank * slots + slot, -1 where dropped. weights: fp32 [T, K], contiguous.
    layout: what `BufferExchange` tells besides.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    layout: DispatchLayout | None = None


@dataclass(slots=True)
class Arrival:
    """What a dispatch brought. With an event it is there once that was waited for.

    ids: [N, K], slots of this rank, -1 elsewhere. weights: fp32 [N, K]. counts: of pairs for each slot; None in calls
    for CUDA graphs. raw: DeepEP's handle. is_refused: some rank has told of an error, and nothing may be used.
    """

    rows: Rows
    ids: torch.Tensor
    weights: torch.Tensor
    counts: list[int] | None
    raw: Any
    event: Any
    is_refused: bool


class Exchange(abc.ABC):
    """One layer's way to a DeepEP buffer.

    interface: the name of the class in DeepEP. max_row_bytes: of what it sends.
    flags: int32 [1] on the device, where errors of calls are left.
    """

    interface: ClassVar[str]
    max_row_bytes: ClassVar[int]
    _buffer: deep_ep.GroupBuffer

    def __init__(self, config: MoEConfig, ep: Communicator, device: torch.device, flags: torch.Tensor) -> None:
        self._config, self._ep, self._flags = config, ep, flags
        self._id_dtype: torch.dtype = getattr(deep_ep.library(), "topk_idx_t", torch.int64)

    @classmethod
    @abc.abstractmethod
    def gates(cls, config: MoEConfig, environment: Environment) -> tuple[Gate, ...]:
        """What it needs besides its interface."""

    @classmethod
    @abc.abstractmethod
    def details(cls, config: MoEConfig) -> Mapping[str, str]:
        """Interface, transport and time limit in words."""

    @classmethod
    @abc.abstractmethod
    def memory(cls, config: MoEConfig, width: int) -> Mapping[str, int]:
        """Bytes of the buffer, one for all layers of a group, and of what it is told; rows of `width` columns."""

    @property
    @abc.abstractmethod
    def way(self) -> str:
        """What its calls are counted as."""

    def join(self, user: object) -> None:
        """Keep the buffer for `user` until it leaves."""
        self._buffer.join(user)

    def leave(self, user: object) -> None:
        """The last user to leave gives the buffer back. A collective."""
        self._buffer.leave(user)

    @abc.abstractmethod
    def reserve(self, width: int) -> None:
        """Make room for rows of `width` columns. A collective. Raises ConfigError when a CUDA graph forbids it."""

    @abc.abstractmethod
    def route(
        self, topk_ids: torch.Tensor, topk_weights: torch.Tensor, workspace: Workspace, problem: InputError | None
    ) -> Routing:
        """Look up where each pair goes, and leave flags of errors. problem: what this rank was called with wrongly."""

    @abc.abstractmethod
    def start(self) -> Any:
        """The buffer, for a call now. Raises HandleError once it was released."""

    @abc.abstractmethod
    def dispatch(self, buffer: Any, rows: Rows, routing: Routing, max_tokens: int, asynchronous: bool) -> Arrival:
        """max_tokens: of any rank in this call. The host waits for counts unless the layer is for CUDA graphs.

        Raises PeerLostError.
        """

    @abc.abstractmethod
    def mark_rest(self, arrival: Arrival) -> None:
        """In calls for CUDA graphs, on a stream where the rows are there: ids of -1 behind the last of them."""

    @abc.abstractmethod
    def combine(self, buffer: Any, rows: torch.Tensor, raw: Any, asynchronous: bool) -> tuple[torch.Tensor, Any]:
        """rows: bf16 [N, width]. The sums [T, width] of this rank's tokens, and the event. Raises PeerLostError."""


class BufferExchange(Exchange):
    """By V1's `Buffer`."""

    interface = "Buffer"
    _buffer: deep_ep.SharedBuffer
    max_row_bytes = 16352
    """Half a row and a barrier stand in the 8 KiB of shared memory that its dispatch gives a warp."""
    node_sizes: ClassVar[tuple[int, ...]] = (2, 4, 8)
    """Ranks of a node that its kernels are compiled for; between nodes 8 of each."""
    max_ranks: ClassVar[int] = 160
    max_slots: ClassVar[int] = 128
    """Experts of a rank are counted by a thread each."""
    max_top_k: ClassVar[int] = 32

    def __init__(self, config: MoEConfig, ep: Communicator, device: torch.device, flags: torch.Tensor) -> None:
        super().__init__(config, ep, device, flags)
        self._tables = LookupTables.of(config.expert_placement.tables(device))
        self._use_triton = uses_triton(device)
        self._slots = config.expert_placement.slots_per_rank
        self._buffer = deep_ep.shared_buffer(config.parallel.ep_group)
        self._dispatch_config, self._combine_config = deep_ep.high_throughput_configs(ep.size, config.dispatch_num_sms)

    @classmethod
    def gates(cls, config: MoEConfig, environment: Environment) -> tuple[Gate, ...]:
        parallel, slots = config.parallel, config.expert_placement.slots_per_rank
        package = environment.package(deep_ep.PACKAGE)
        in_one_node = parallel.ep_size in cls.node_sizes
        sizes = ", ".join(map(str, cls.node_sizes))
        between = parallel.ep_size % deep_ep.NODE_RANKS == 0 and parallel.ep_size <= cls.max_ranks
        nodes = max(parallel.ep_size // deep_ep.NODE_RANKS, 1)
        why_not = "the host waits for the counts of received rows"
        if not in_one_node and between:
            why_not += ", and DeepEP can do without only inside a node"
        elif "num_worst_tokens" not in package.features:
            why_not += ", and the installed DeepEP has no num_worst_tokens"
        return (
            _gate_sm(environment, 80, "SM 80 or newer, SM 90 as DeepEP is built by default"),
            Gate(
                "ep_size",
                in_one_node or between,
                str(parallel.ep_size),
                f"{sizes}, or nodes of {deep_ep.NODE_RANKS} ranks, up to {cls.max_ranks} in all",
            ),
            Gate(
                "num_nodes",
                parallel.num_nodes in (1, nodes),
                f"{parallel.num_nodes} for ep_size {parallel.ep_size}",
                f"{nodes}: DeepEP takes {deep_ep.NODE_RANKS} consecutive ranks for a node",
            ),
            Gate("num_experts", slots <= cls.max_slots, f"{slots} on a rank", f"at most {cls.max_slots} on a rank"),
            Gate(
                "max_tokens_per_rank",
                parallel.ep_size * config.max_tokens_per_rank * config.top_k < error_count(parallel.ep_size),
                str(config.max_tokens_per_rank),
                f"fewer than {error_count(parallel.ep_size)} pairs of all ranks: larger counts tell of errors",
            ),
            _gate_row_bytes(config, cls.max_row_bytes),
            Gate("top_k", config.top_k <= cls.max_top_k, str(config.top_k), f"at most {cls.max_top_k}"),
            Gate(
                "dispatch_num_sms",
                config.dispatch_num_sms % 2 == 0,
                str(config.dispatch_num_sms),
                "an even number: half of them send, half receive",
            ),
            gate_cuda_graph(config, in_one_node and "num_worst_tokens" in package.features, why_not),
        )

    @classmethod
    def details(cls, config: MoEConfig) -> Mapping[str, str]:
        ranks = config.parallel.ep_size
        words = "NVLink" if ranks <= deep_ep.NODE_RANKS else f"NVLink in nodes of {deep_ep.NODE_RANKS}, RDMA between"
        return {
            "interface": "DeepEP's Buffer, of V1",
            "transport": f"{words}, {config.dispatch_num_sms} SMs",
            "time limit": "DeepEP's own, 100 s as released, for a rank that does not come",
        }

    @classmethod
    def memory(cls, config: MoEConfig, width: int) -> Mapping[str, int]:
        ranks, row_bytes = config.parallel.ep_size, width * config.dtype.itemsize
        return {
            "DeepEP buffer": deep_ep.high_throughput_bytes(row_bytes, ranks, config.dispatch_num_sms),
            "layout": config.max_tokens_per_rank * (pair_bytes(config) + ranks),
        }

    @property
    def way(self) -> str:
        return "intranode" if self._ep.size <= deep_ep.NODE_RANKS else "internode"

    def reserve(self, width: int) -> None:
        config = self._config
        self._buffer.reserve_high_throughput(width * config.dtype.itemsize, config.dispatch_num_sms)

    def route(
        self, topk_ids: torch.Tensor, topk_weights: torch.Tensor, workspace: Workspace, problem: InputError | None
    ) -> Routing:
        (num_tokens, top_k), ranks = topk_ids.shape, self._ep.size
        num_nodes = max(ranks // deep_ep.NODE_RANKS, 1)
        num_counts = ranks * (self._slots + 1) + (num_nodes if num_nodes > 1 else 0)

        def build() -> DispatchLayout:
            return DispatchLayout.of(
                workspace.tensor("ids", (num_tokens, top_k), self._id_dtype),
                workspace.tensor("is in rank", (num_tokens, ranks), torch.bool),
                workspace.tensor("counts", (num_counts,), torch.int32),
                num_nodes,
            )

        layout = workspace.cached(("layout", num_tokens, top_k, ranks, num_counts, self._id_dtype), build)
        weights, given = topk_weights, None
        # Without tokens they are of the workspace, as ids are: DeepEP wants both of them to have an address, or none.
        if topk_weights.dtype is not torch.float32 or not topk_weights.is_contiguous() or num_tokens == 0:
            weights, given = workspace.tensor("router weights", (num_tokens, top_k), torch.float32), topk_weights
        flags = 0 if problem is None else int(ErrorFlag.ABORTED)
        target = None if given is None else weights
        if not self._use_triton:
            dispatch_layout(topk_ids, given, self._tables, layout, target, self._flags, _EXPERT_ID, flags=flags)
            return Routing(layout.ids, weights, layout)
        if not single_launch(topk_ids):
            layout.counts.zero_()
        kind = one_object(topk_ids.dtype, topk_ids.shape, topk_ids.stride(), self._slots, ranks)
        given_kind = None if given is None else (given.dtype, given.stride())
        tables = self._tables.tables
        moving = [topk_ids, tables.rank, tables.slot, tables.num_replicas, self._flags]
        workspace.cached(("dispatch layout", kind, given_kind, flags), LaunchSequence)(
            moving if given is None else [*moving, given],
            lambda: dispatch_layout_launches(
                topk_ids, given, self._tables, layout, target, self._flags, _EXPERT_ID, flags=flags
            ),
        )
        return Routing(layout.ids, weights, layout)

    def start(self) -> Any:
        return self._buffer.start_high_throughput()

    def dispatch(self, buffer: Any, rows: Rows, routing: Routing, max_tokens: int, asynchronous: bool) -> Arrival:
        layout = routing.layout
        assert layout is not None
        # DeepEP is told the most rows that can arrive, one from every token of every rank.
        worst = self._ep.size * max_tokens if self._config.cuda_graph else 0
        received, ids, weights, counts, raw, event = self._ep.guard(
            "dispatch",
            lambda: buffer.dispatch(
                rows,
                num_tokens_per_rank=layout.rank_counts,
                num_tokens_per_rdma_rank=layout.node_counts,
                is_token_in_rank=layout.is_in_rank,
                num_tokens_per_expert=layout.expert_counts,
                topk_idx=layout.ids,
                topk_weights=routing.weights,
                num_worst_tokens=worst,
                config=self._dispatch_config,
                previous_event=buffer.capture() if asynchronous else None,
                async_finish=asynchronous,
            ),
        )
        is_refused = bool(counts) and counts[0] >= error_count(self._ep.size)
        return Arrival(received, ids, weights, counts or None, raw, event, is_refused)

    def mark_rest(self, arrival: Arrival) -> None:
        """DeepEP does it."""

    def combine(self, buffer: Any, rows: torch.Tensor, raw: Any, asynchronous: bool) -> tuple[torch.Tensor, Any]:
        combined, _, event = self._ep.guard(
            "combine",
            lambda: buffer.combine(
                rows,
                raw,
                config=self._combine_config,
                previous_event=buffer.capture() if asynchronous else None,
                async_finish=asynchronous,
            ),
        )
        return combined, event


class ElasticExchange(Exchange):
    """By V2's `ElasticBuffer`, whose received rows are in no particular order within those of a rank."""

    interface = "ElasticBuffer"
    _buffer: deep_ep.SharedElasticBuffer
    max_row_bytes = 65536
    """A warp holds a whole row in shared memory; of larger ones fewer than three would fit an SM."""
    max_ranks: ClassVar[int] = 1024
    max_experts: ClassVar[int] = 2048
    max_slots: ClassVar[int] = 256
    """What its counters have room for."""
    max_top_k: ClassVar[int] = 32
    """A lane for each."""
    max_sms: ClassVar[int] = 160

    def __init__(self, config: MoEConfig, ep: Communicator, device: torch.device, flags: torch.Tensor) -> None:
        super().__init__(config, ep, device, flags)
        slots, on_cuda = config.expert_placement.slots_per_rank, device.type == "cuda"
        self._num_experts = ep.size * slots
        self._lookup = PlacementLookup(config, device, slots_per_rank=slots)
        self._errors = _FlagWord(flags)
        self._flags_of_ranks = torch.zeros(ep.size, dtype=torch.int32, device=device)
        self._told = torch.zeros(ep.size, dtype=torch.int32, pin_memory=True) if on_cuda else self._flags_of_ranks
        self._has_told = torch.cuda.Event() if on_cuda else None
        # Here, since what a graph has captured is computed only when that runs.
        room = ep.size * config.max_tokens_per_rank if config.cuda_graph else 0
        self._row_numbers = torch.arange(room, dtype=torch.int32, device=device)
        self._buffer = deep_ep.shared_elastic_buffer(config.parallel.ep_group)

    @classmethod
    def gates(cls, config: MoEConfig, environment: Environment) -> tuple[Gate, ...]:
        parallel, slots = config.parallel, config.expert_placement.slots_per_rank
        on_cpu = "cpu" in environment.package(deep_ep.PACKAGE).features
        most = (2**31 - 1) // (parallel.ep_size * (config.top_k + 2))
        return (
            _gate_sm(environment, 90, "SM 90 or newer"),
            Gate(
                "nvcc",
                on_cpu or environment.nvcc,
                "found" if environment.nvcc else "not found",
                "a CUDA compiler, by which ElasticBuffer's kernels are compiled when they are first launched",
                None if environment.nvcc else "set CUDA_HOME to a CUDA toolkit with bin/nvcc",
            ),
            Gate(
                "ep_size", 2 <= parallel.ep_size <= cls.max_ranks, str(parallel.ep_size), f"2 to {cls.max_ranks} ranks"
            ),
            Gate(
                "num_nodes",
                parallel.ep_size % parallel.num_nodes == 0,
                f"{parallel.num_nodes} for ep_size {parallel.ep_size}",
                "as many ranks on every node",
            ),
            Gate(
                "num_experts",
                slots <= cls.max_slots and parallel.ep_size * slots <= cls.max_experts,
                f"{slots} on a rank, {parallel.ep_size * slots} in all",
                f"at most {cls.max_slots} on a rank, {cls.max_experts} in all",
            ),
            Gate(
                "max_tokens_per_rank",
                config.max_tokens_per_rank <= most,
                str(config.max_tokens_per_rank),
                f"at most {most}: places of received rows are numbered in 32 bits",
            ),
            _gate_row_bytes(config, cls.max_row_bytes),
            Gate("top_k", config.top_k <= cls.max_top_k, str(config.top_k), f"at most {cls.max_top_k}"),
            Gate(
                "dispatch_num_sms",
                config.dispatch_num_sms <= cls.max_sms,
                str(config.dispatch_num_sms),
                f"at most {cls.max_sms}",
            ),
            gate_cuda_graph(config, parallel.num_nodes == 1, "between nodes the host waits for the counts of rows"),
        )

    @classmethod
    def details(cls, config: MoEConfig) -> Mapping[str, str]:
        parallel = config.parallel
        words = "NVLink" if parallel.num_nodes == 1 else f"NVLink in {parallel.num_nodes} nodes, RDMA between"
        return {
            "interface": "DeepEP's ElasticBuffer, of V2",
            "transport": f"{words}, {config.dispatch_num_sms} SMs, and all of them to copy rows out of the buffer",
            "time limit": f"{_whole_seconds(config)} s for a rank that does not come, or the longest of the layers "
            "that share the buffer",
        }

    @classmethod
    def memory(cls, config: MoEConfig, width: int) -> Mapping[str, int]:
        return {
            "DeepEP buffer": _elastic_shape(config, width).num_bytes(config.parallel.ep_size),
            "routing": config.max_tokens_per_rank * pair_bytes(config),
        }

    @property
    def way(self) -> str:
        return "elastic"

    def reserve(self, width: int) -> None:
        self._buffer.reserve(_elastic_shape(self._config, width))

    def route(
        self, topk_ids: torch.Tensor, topk_weights: torch.Tensor, workspace: Workspace, problem: InputError | None
    ) -> Routing:
        ids, weights, flags = self._lookup.physical(topk_ids, topk_weights, self._id_dtype, workspace, self._errors)
        assert weights is not None
        if flags is not None:
            self._flags.bitwise_or_(flags)
        if problem is not None:
            self._flags.fill_(int(ErrorFlag.ABORTED))
        return Routing(ids, weights)

    def start(self) -> Any:
        return self._buffer.raw

    def dispatch(self, buffer: Any, rows: Rows, routing: Routing, max_tokens: int, asynchronous: bool) -> Arrival:
        config, waits = self._config, not self._config.cuda_graph
        told = self._tell() if waits else _nothing
        bound = config.max_tokens_per_rank if waits else min(next_power_of_2(max_tokens), config.max_tokens_per_rank)
        received, ids, weights, raw, event = self._ep.guard(
            "dispatch",
            lambda: _naming_timeouts(
                buffer.dispatch,
                rows,
                topk_idx=routing.ids,
                topk_weights=routing.weights,
                num_experts=self._num_experts,
                num_max_tokens_per_rank=bound,
                num_sms=config.dispatch_num_sms,
                async_with_compute_stream=asynchronous,
                # `routing` is in the workspace of the call, which lives until its combine.
                do_handle_copy=False,
                do_cpu_sync=waits,
            ),
        )
        counts = raw.num_recv_tokens_per_expert_list if waits else None
        return Arrival(received, ids, weights, counts, raw, event, told() != 0)

    def _tell(self) -> Callable[[], int]:
        """Gather the flags of all ranks; what reads them, after the dispatch, which is queued behind that."""
        self._ep.all_gather(self._flags_of_ranks, self._flags, "error flags").wait()
        if self._has_told is not None:
            self._told.copy_(self._flags_of_ranks, non_blocking=True)
            self._has_told.record()
        return self._read

    def _read(self) -> int:
        return functools.reduce(operator.or_, self._ep.read_host(self._told, self._has_told, "error flags"))

    def mark_rest(self, arrival: Arrival) -> None:
        num_rows = arrival.raw.psum_num_recv_tokens_per_scaleup_rank[-1]
        is_rest = self._row_numbers[: arrival.ids.shape[0]] >= num_rows
        arrival.ids.masked_fill_(is_rest[:, None], -1)

    def combine(self, buffer: Any, rows: torch.Tensor, raw: Any, asynchronous: bool) -> tuple[torch.Tensor, Any]:
        combined, _, event = self._ep.guard(
            "combine",
            lambda: _naming_timeouts(
                buffer.combine,
                rows,
                raw,
                num_sms=self._config.dispatch_num_sms,
                async_with_compute_stream=asynchronous,
            ),
        )
        return combined, event


def exchange_class(package: Package) -> type[Exchange]:
    """Which of the two moves rows with `package`."""
    return ElasticExchange if deep_ep.uses_elastic(package) else BufferExchange


def row_width(hidden_size: int, dtype: torch.dtype) -> int:
    """Columns of a row in whole units. Example: 2880 in bf16, 5760 bytes -> 3072."""
    unit = ROW_UNIT // dtype.itemsize
    return -(-hidden_size // unit) * unit


def pair_bytes(config: MoEConfig) -> int:
    """Of a token's ids and weights."""
    return config.top_k * (torch.int64.itemsize + torch.float32.itemsize)


@dataclass(frozen=True, slots=True)
class _FlagWord:
    """Where `PlacementLookup` leaves flags."""

    word: torch.Tensor

    def kernel_word(self) -> torch.Tensor:
        return self.word


_EXPERT_ID = int(ErrorFlag.EXPERT_ID)


def _nothing() -> int:
    return 0


def _naming_timeouts(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `call` returns. DeepEP's error on a rank that did not come in time does not say that it is one."""
    try:
        return call(*args, **options)
    except RuntimeError as problem:
        if "CPU wait" not in str(problem):
            raise
        raise RuntimeError(f"DeepEP's time limit has passed: {problem}") from problem


def _gate_sm(environment: Environment, minimum: int, needs: str) -> Gate:
    seen = "no CUDA device" if environment.sm is None else f"SM {environment.sm}"
    on_cpu = "cpu" in environment.package(deep_ep.PACKAGE).features
    return Gate("sm", on_cpu or (environment.sm or 0) >= minimum, seen, needs)


def _gate_row_bytes(config: MoEConfig, most: int) -> Gate:
    # Of a row that is sent to experts that take it quantized, if it can be.
    sent = FP8_DTYPE if dispatched_groups(config.quantization, config.hidden_size) else config.dtype
    row_bytes = row_width(config.hidden_size, sent) * sent.itemsize
    return Gate(
        "hidden_size", row_bytes <= most, f"{config.hidden_size}, {row_bytes} bytes", f"rows of at most {most} bytes"
    )


def _whole_seconds(config: MoEConfig) -> int:
    return math.ceil(config.parallel.timeout_seconds)


def _elastic_shape(config: MoEConfig, width: int) -> deep_ep.ElasticShape:
    return deep_ep.ElasticShape(
        config.max_tokens_per_rank, width, config.top_k, _whole_seconds(config), config.parallel.num_nodes
    )
