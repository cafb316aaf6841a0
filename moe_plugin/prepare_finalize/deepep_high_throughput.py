"""Dispatch and combine by DeepEP's high-throughput kernels: NVLink inside a node of 8, RDMA between nodes.

Dispatch
 1. Rows whose experts compute on fp8 and take it so are quantized before they travel, with their scales; all others
    travel in bf16 and are quantized by the experts. Rows are padded with zeros to a multiple of 512 bytes.
 2. One launch looks ids up in the placement table and makes the layout that DeepEP wants (`kernels/dispatch_layout`).
    Flags of errors travel with the counts in it.
 3. DeepEP's dispatch. The host waits for the counts, which say how much memory to take, whether some rank has raised
    a flag, in which case all raise together, and how many pairs each expert has got.

Combine sums the ranks' rows of a token, without weights: the experts have applied them. It takes and gives bf16.

With `cuda_graph=True` DeepEP is told the most rows that can arrive, one from every token of every rank, and nothing
waits for the host. Rows that nobody has sent carry ids of -1. Flags then stay on the device, and the ranks tell each
other of them at the next host point, `check_errors`.

The asynchronous halves run on DeepEP's own stream between events: it waits for what the current stream has done so far,
and the receiver makes the current stream wait for it. Everything about a call travels in its handle, so that any number
of calls may be between the two.

DeepEP itself gives up on a rank that does not come after a time that it was compiled with, 100 s as released.

With EP + TP every TP rank runs the exchange in its own EP group, and the partial sums are added over the TP group; TP
ranks must be called with the same arguments.

Source: vLLM's DeepEP high-throughput class, https://github.com/vllm-project/vllm, for what it does in this order, and
https://github.com/deepseek-ai/DeepEP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from moe_plugin.compat import deep_ep
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError, HandleError, InputError
from moe_plugin.kernels.dispatch_layout import (
    DispatchLayout,
    dispatch_layout,
    dispatch_layout_launches,
    error_count,
    single_launch,
)
from moe_plugin.kernels.launch_sequence import LaunchSequence, one_object
from moe_plugin.kernels.placement_lookup import LookupTables, uses_triton
from moe_plugin.modular_kernel import (
    Dispatched,
    DispatchHandle,
    Experts,
    PrepareAndFinalize,
    Receiver,
    RouterWeightStage,
)
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import ErrorFlag, flags_of_all, raise_together
from moe_plugin.prepare_finalize.local import weigh_input
from moe_plugin.quantization import FP8_DTYPE, dispatched_groups, input_group_size, quantize_rows
from moe_plugin.verdict import Gate, Verdict, gate_cuda_graph, gate_dtype, gate_package
from moe_plugin.workspace import Workspace, WorkspaceArena

ROW_UNIT = 512
"""Bytes: DeepEP's copies go by warps of 32 lanes and 16 bytes."""
MAX_ROW_BYTES = 16352
"""Half a row and a barrier stand in the 8 KiB of shared memory that its dispatch gives a warp."""
NODE_SIZES = (2, 4, 8)
"""Ranks of a node that its kernels are compiled for; between nodes 8 of each."""
MAX_RANKS = 160
MAX_LOCAL_EXPERTS, MAX_TOP_K = 128, 32
"""Of its kernels: experts of a rank are counted by a thread each, of 128."""


@dataclass(slots=True)
class DeepEPHandle(DispatchHandle):
    """raw: DeepEP's own handle. buffer: its Buffer that made it."""

    raw: Any
    buffer: Any


class DeepEPHighThroughput(PrepareAndFinalize):
    """See this module's docstring."""

    name = "deepep_high_throughput"
    description = "DeepEP's high-throughput kernels over NVLink and RDMA; rows once per rank, sums in bf16"

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(config, arena)
        parallel, device = config.parallel, arena.device
        self._ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)
        self._tp = Communicator(parallel.tp_group, parallel.tp_size, parallel.tp_rank, parallel.timeout_seconds)
        # TP ranks get the same arguments and so have the same errors: each EP group raises for itself.
        self._no_tp = Communicator(None, 1, 0, parallel.timeout_seconds)
        self._tables = LookupTables.of(config.expert_placement.tables(device))
        self._use_triton = uses_triton(device)
        self._slots = _slots_per_rank(config)
        self._id_dtype = getattr(deep_ep.library(), "topk_idx_t", torch.int64)
        self._flags = torch.zeros(1, dtype=torch.int32, device=device)
        self._row_width = _row_width(config.hidden_size, config.dtype)
        self._groups = 0
        self._calls = 0
        self._buffer = deep_ep.shared_buffer(parallel.ep_group)
        self._dispatch_config, self._combine_config = deep_ep.high_throughput_configs(
            parallel.ep_size, config.dispatch_num_sms
        )

    def accommodate(self, experts: type[Experts]) -> None:
        config = self.config
        self._groups = dispatched_groups(config.quantization, config.hidden_size) if experts.takes_quantized else 0
        sent = FP8_DTYPE if self._groups else config.dtype
        row_bytes = _row_width(config.hidden_size, sent) * sent.itemsize
        if row_bytes > MAX_ROW_BYTES:
            raise ConfigError(
                f"{self.name} sends rows of at most {MAX_ROW_BYTES} bytes, and those of hidden_size "
                f"{config.hidden_size} have {row_bytes} on their way to {experts.name}"
            )
        self._buffer.join(self)
        self._buffer.reserve_high_throughput(self._row_width * config.dtype.itemsize, config.dispatch_num_sms)

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        parallel, slots = config.parallel, _slots_per_rank(config)
        package = environment.package(deep_ep.PACKAGE)
        in_one_node = parallel.ep_size in NODE_SIZES
        sizes = ", ".join(map(str, NODE_SIZES))
        between = parallel.ep_size % deep_ep.NODE_RANKS == 0 and parallel.ep_size <= MAX_RANKS
        nodes = max(parallel.ep_size // deep_ep.NODE_RANKS, 1)
        sm = "no CUDA device" if environment.sm is None else f"SM {environment.sm}"
        why_not = "the host waits for the counts of received rows"
        if not in_one_node and between:
            why_not += ", and DeepEP can do without only inside a node"
        elif "num_worst_tokens" not in package.features:
            why_not += ", and the installed DeepEP has no num_worst_tokens"
        return Verdict.of(
            gate_dtype(config, torch.bfloat16),
            gate_package(environment, deep_ep.PACKAGE, deep_ep.INSTALL),
            Gate("Buffer", "Buffer" in package.features, package.describe(), "DeepEP's Buffer", deep_ep.INSTALL),
            Gate(
                "sm",
                "cpu" in package.features or (environment.sm or 0) >= 80,
                sm,
                "SM 80 or newer, SM 90 as DeepEP is built by default",
            ),
            Gate(
                "ep_size",
                in_one_node or between,
                str(parallel.ep_size),
                f"{sizes}, or nodes of {deep_ep.NODE_RANKS} ranks, up to {MAX_RANKS} in all",
            ),
            Gate(
                "num_nodes",
                parallel.num_nodes in (1, nodes),
                f"{parallel.num_nodes} for ep_size {parallel.ep_size}",
                f"{nodes}: DeepEP takes {deep_ep.NODE_RANKS} consecutive ranks for a node",
            ),
            Gate(
                "num_experts",
                slots <= MAX_LOCAL_EXPERTS,
                f"{slots} on a rank",
                f"at most {MAX_LOCAL_EXPERTS} on a rank",
            ),
            Gate(
                "max_tokens_per_rank",
                parallel.ep_size * config.max_tokens_per_rank * config.top_k < error_count(parallel.ep_size),
                str(config.max_tokens_per_rank),
                f"fewer than {error_count(parallel.ep_size)} pairs of all ranks: larger counts tell of errors",
            ),
            Gate(
                "hidden_size",
                _least_row_bytes(config) <= MAX_ROW_BYTES,
                f"{config.hidden_size}, {_least_row_bytes(config)} bytes",
                f"rows of at most {MAX_ROW_BYTES} bytes",
            ),
            Gate("top_k", config.top_k <= MAX_TOP_K, str(config.top_k), f"at most {MAX_TOP_K}"),
            Gate(
                "dispatch_num_sms",
                config.dispatch_num_sms % 2 == 0,
                str(config.dispatch_num_sms),
                "an even number: half of them send, half receive",
            ),
            gate_cuda_graph(config, in_one_node and "num_worst_tokens" in package.features, why_not),
        )

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        return 0 if config.cuda_graph else 1

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> Mapping[str, str]:
        ranks = config.parallel.ep_size
        words = "NVLink" if ranks <= deep_ep.NODE_RANKS else f"NVLink in nodes of {deep_ep.NODE_RANKS}, RDMA between"
        words += f", {config.dispatch_num_sms} SMs"
        width = _row_width(config.hidden_size, config.dtype)
        if width != config.hidden_size:
            words += f", rows padded to {width} columns"
        return {
            "transport": words,
            "combine": "in bf16, the only dtype that DeepEP sums",
            "time limit": "DeepEP's own, 100 s as released, for a rank that does not come",
        }

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """DeepEP's buffer, one for all layers of a group, and what it takes for the rows of a call."""
        ranks, most = config.parallel.ep_size, config.parallel.ep_size * config.max_tokens_per_rank
        width = _row_width(config.hidden_size, config.dtype)
        row_bytes = width * config.dtype.itemsize
        pair_bytes = config.top_k * (torch.int64.itemsize + torch.float32.itemsize)
        needed = {
            "DeepEP buffer": deep_ep.high_throughput_bytes(row_bytes, ranks, config.dispatch_num_sms),
            "received rows": most * (row_bytes + pair_bytes),
            "layout": config.max_tokens_per_rank * (pair_bytes + ranks),
            "result": config.max_tokens_per_rank * row_bytes,
        }
        if width != config.hidden_size:
            needed["padded rows"] = most * row_bytes
        return needed

    def counters(self) -> Mapping[str, int]:
        return {"intranode" if self._ep.size <= deep_ep.NODE_RANKS else "internode": self._calls}

    @property
    def num_sms(self) -> int:
        """SMs that its kernels take."""
        return self.config.dispatch_num_sms

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        return self._start_dispatch(hidden_states, topk_ids, topk_weights, max_num_tokens, asynchronous=False)()

    def prepare_async(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Receiver[Dispatched]:
        return Receiver(self._start_dispatch(hidden_states, topk_ids, topk_weights, max_num_tokens, asynchronous=True))

    def abort(self, problem: InputError, max_num_tokens: int | None = None) -> NoReturn:
        """Join the exchange with no tokens and the abort flag, so that every rank raises."""
        config, device = self.config, self.arena.device
        nothing = torch.empty(0, config.hidden_size, dtype=config.dtype, device=device)
        ids = torch.empty(0, config.top_k, dtype=torch.int32, device=device)
        start = self._start_dispatch(nothing, ids, ids.float(), max_num_tokens, asynchronous=False, problem=problem)
        # Only where the peers did not hear of it with the counts: they are on their way to combine.
        dispatched = start()
        handle = dispatched.handle
        handle.consume(self)
        rows = torch.zeros(dispatched.activations.shape, dtype=config.dtype, device=device)
        assert isinstance(handle, DeepEPHandle)
        self._combine(rows, handle, asynchronous=False)
        handle.workspace.release()
        raise problem

    def _start_dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None,
        *,
        asynchronous: bool,
        problem: InputError | None = None,
    ) -> Callable[[], Dispatched]:
        """problem: what this rank was called with wrongly, or None."""
        self._calls += 1
        config, workspace = self.config, self.arena.lease()
        activations, stage = hidden_states, RouterWeightStage.EXPERTS_GATHER
        if config.apply_router_weight_on_input:
            activations, _, stage = weigh_input(config, hidden_states, topk_weights)
        rows = self._rows(activations, workspace)
        layout, weights = self._layout(topk_ids, topk_weights, workspace, problem)
        worst = self._ep.size * (max_num_tokens or config.max_tokens_per_rank) if config.cuda_graph else 0
        buffer = self._buffer.start_high_throughput()
        received, ids, received_weights, counts, raw, event = self._ep.guard(
            "dispatch",
            lambda: buffer.dispatch(
                rows,
                num_tokens_per_rank=layout.rank_counts,
                num_tokens_per_rdma_rank=layout.node_counts,
                is_token_in_rank=layout.is_in_rank,
                num_tokens_per_expert=layout.expert_counts,
                topk_idx=layout.ids,
                topk_weights=weights,
                num_worst_tokens=worst,
                config=self._dispatch_config,
                previous_event=buffer.capture() if asynchronous else None,
                async_finish=asynchronous,
            ),
        )
        if (counts and counts[0] >= error_count(self._ep.size)) or (worst and self._tell_at_once(problem)):
            self._raise_together(event if asynchronous else None, workspace, problem)
        handle = DeepEPHandle(self, hidden_states.shape[0], workspace, raw, buffer)
        arrived, scales = received if isinstance(received, tuple) else (received, None)
        dispatched = Dispatched(
            activations=arrived[:, : config.hidden_size],
            activation_format=self.activation_format,
            router_weight_stage=stage,
            handle=handle,
            local_ids=_low_words(ids),
            topk_weights=received_weights if stage is RouterWeightStage.EXPERTS_GATHER else None,
            expert_num_tokens_host=counts[: config.num_local_experts] if counts else None,
            scales=scales,
        )

        def complete(inputs: tuple[Any, ...] = (rows, layout, weights)) -> Dispatched:
            # Until the current stream waits, the memory of `inputs` must not go back to it.
            if asynchronous:
                event.current_stream_wait()
            return dispatched

        return complete

    def _tell_at_once(self, problem: InputError | None) -> bool:
        """Whether a rank has a flag, where no counts tell: asked on CPU alone, since on CUDA it would be a wait."""
        return not self._flags.is_cuda and flags_of_all(self._ep, self._no_tp, self._flags) != 0

    def _raise_together(self, event: Any, workspace: Workspace, problem: InputError | None) -> NoReturn:
        if event is not None:
            event.current_stream_wait()
        workspace.release()
        flags = int(self._flags)
        self._flags.zero_()
        raise_together(self.config, self._ep, self._no_tp, problem, flags)

    def _rows(self, x: torch.Tensor, workspace: Workspace) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] as it travels: contiguous rows of whole units, in fp8 with scales [T, groups] where they do."""
        num_tokens, hidden_size = x.shape
        dtype = FP8_DTYPE if self._groups else x.dtype
        width = _row_width(hidden_size, dtype)
        if not self._groups:
            return x.contiguous() if width == hidden_size else _padded(x, width, "padded input", workspace)
        scheme = self.config.quantization
        assert scheme is not None
        if not self._use_triton or num_tokens == 0:
            values, scales = quantize_rows(x, input_group_size(scheme))
            if width != hidden_size:
                values = torch.nn.functional.pad(values.view(torch.uint8), (0, width - hidden_size)).view(FP8_DTYPE)
            return values, scales
        from moe_plugin.kernels.quantize_rows import quantize_rows as launch_quantize_rows

        room = workspace.tensor("quantized rows", (num_tokens, width), FP8_DTYPE)
        scales = workspace.tensor("quantized row scales", (num_tokens, self._groups), torch.float32)
        if width != hidden_size:
            room[:, hidden_size:].view(torch.uint8).zero_()
        launch_quantize_rows(x if x.stride(1) == 1 else x.contiguous(), room[:, :hidden_size], scales)
        return room, scales

    def _layout(
        self, topk_ids: torch.Tensor, topk_weights: torch.Tensor, workspace: Workspace, problem: InputError | None
    ) -> tuple[DispatchLayout, torch.Tensor]:
        """What DeepEP is told of the routing, and router weights fp32 [T, K], contiguous."""
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
        if not self._use_triton or not single_launch(topk_ids):
            dispatch_layout(topk_ids, given, self._tables, layout, target, self._flags, _EXPERT_ID, flags=flags)
            return layout, weights
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
        return layout, weights

    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._start_combine(expert_output, handle, out, asynchronous=False)()

    def finalize_async(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> Receiver[torch.Tensor]:
        return Receiver(self._start_combine(expert_output, handle, out, asynchronous=True))

    def _start_combine(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None, *, asynchronous: bool
    ) -> Callable[[], torch.Tensor]:
        handle.consume(self)
        assert isinstance(handle, DeepEPHandle)
        combined, event, rows = self._combine(expert_output, handle, asynchronous)
        hidden_size = self.config.hidden_size

        def complete(inputs: tuple[torch.Tensor, ...] = (rows, expert_output)) -> torch.Tensor:
            # As for dispatch, `inputs` must live until the current stream waits.
            if asynchronous:
                event.current_stream_wait()
            total = combined if combined.shape[1] == hidden_size else combined[:, :hidden_size].contiguous()
            if self._tp.size > 1:
                self._tp.all_reduce(total, "combine").wait()
            handle.workspace.release()
            return total if out is None else out.copy_(total)

        return complete

    def _combine(
        self, expert_output: torch.Tensor, handle: DeepEPHandle, asynchronous: bool
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """The sums [T, width] of this rank's tokens, when they are there, and the rows that were sent."""
        buffer = self._buffer.start_high_throughput()
        if buffer is not handle.buffer:
            raise HandleError(
                f"{self.name}: DeepEP's buffer was replaced while this call was between prepare and finalize; build "
                "layers while no call is in flight"
            )
        rows, width = expert_output, self._row_width
        if width != expert_output.shape[1]:
            rows = _padded(expert_output, width, "padded output", handle.workspace)
        combined, _, event = self._ep.guard(
            "combine",
            lambda: buffer.combine(
                rows,
                handle.raw,
                config=self._combine_config,
                previous_event=buffer.capture() if asynchronous else None,
                async_finish=asynchronous,
            ),
        )
        return combined, event, rows

    def close(self) -> None:
        self._buffer.leave(self)

    def check_errors(self) -> None:
        """Flags of captured calls; eager calls without CUDA graphs raise at once."""
        if not self.config.cuda_graph or not self._flags.is_cuda:
            return
        everyone = flags_of_all(self._ep, self._no_tp, self._flags)
        if everyone:
            own = int(self._flags)
            self._flags.zero_()
            raise_together(self.config, self._ep, self._no_tp, None, own, everyone)


_EXPERT_ID = int(ErrorFlag.EXPERT_ID)


def _slots_per_rank(config: MoEConfig) -> int:
    """Experts of the rank that holds most."""
    return max(map(len, config.expert_placement.experts_of_rank))


def _row_width(hidden_size: int, dtype: torch.dtype) -> int:
    """Columns of a row in whole units. Example: 2880 in bf16, 5760 bytes -> 3072."""
    unit = ROW_UNIT // dtype.itemsize
    return -(-hidden_size // unit) * unit


def _least_row_bytes(config: MoEConfig) -> int:
    """Of a row that is sent to experts that take it quantized, if it can be."""
    sent = FP8_DTYPE if dispatched_groups(config.quantization, config.hidden_size) else config.dtype
    return _row_width(config.hidden_size, sent) * sent.itemsize


def _padded(x: torch.Tensor, width: int, name: str, workspace: Workspace) -> torch.Tensor:
    rows = workspace.tensor(name, (x.shape[0], width), x.dtype)
    rows[:, : x.shape[1]].copy_(x)
    rows[:, x.shape[1] :].zero_()
    return rows


def _low_words(ids: torch.Tensor) -> torch.Tensor:
    """int64 [N, K] of small numbers -> int32 [N, K] on the same memory; numbers that are not negative, or -1."""
    if ids.dtype is not torch.int64:
        return ids
    # By way of one dimension, since a column alone may have any stride.
    return ids.reshape(-1).view(torch.int32).view(ids.shape[0], 2 * ids.shape[1])[:, ::2]
