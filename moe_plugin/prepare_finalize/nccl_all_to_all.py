"""Dispatch and combine over torch.distributed: NCCL on GPUs, gloo on CPU, nothing else to install.

Dispatch
 1. One launch looks each expert id up in the placement table (destination rank and slot there), numbers the tokens of
    each rank, and counts them.
 2. A token goes to a rank once, however many of its experts live there, as one packed row of bytes: hidden states,
    slots (-1 for experts elsewhere), router weights. Rows for peers are sorted by (rank, token).
 3. Meanwhile ranks gather their counts into one matrix, error flags included; every rank reads the same matrix (the one
    copy to the host), so that all raise together or none does.
 4. One all-to-all moves the rows. The rank's own rows stay out of it: they are packed during the exchange, straight to
    where they would have arrived, in front of those of peers.

Combine sends each rank's reduced rows back along the same splits. They arrive in the order in which they were sent,
so no index travels; the rows of a token are summed in fp32 in ascending rank order, its own rank's where they lie.

With `cuda_graph=True` the exchange has a fixed capacity per rank pair: no count matrix, no copy to the host. Unused
rows carry slots of -1, and error flags travel in every row and are raised at the next host point on all ranks. NCCL
does not destroy a communicator while a graph that captured it lives: delete graphs before the process group.

With EP + TP each TP rank sends only its slice of the tokens to the same TP rank of the owning EP rank, where an
all-gather over the TP group completes them; combine mirrors that with a reduce-scatter and an all-gather.

Where `quantizes` is set, rows travel in fp8 with their scales, quantized while they are packed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from moe_plugin.config import SUPPORTED_DTYPES, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import InputError
from moe_plugin.kernels.launch_sequence import LaunchSequence, one_object
from moe_plugin.kernels.pack_rows import (
    PackedViews,
    pack_tokens,
    pack_tokens_launches,
    unpack_rows,
    unpack_rows_launches,
)
from moe_plugin.kernels.placement_lookup import LookupTables, uses_triton
from moe_plugin.kernels.row_sum import row_sum, row_sum_launches
from moe_plugin.kernels.send_plan import SendPlan, send_plan, send_plan_launches
from moe_plugin.kernels.tiling import cdiv, next_power_of_2
from moe_plugin.modular_kernel import (
    Dispatched,
    DispatchHandle,
    Experts,
    PrepareAndFinalize,
    Receiver,
    RouterWeightStage,
)
from moe_plugin.prepare_finalize.communicator import Communicator, communication_stream, overlapped
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors, ErrorFlag, raise_together
from moe_plugin.prepare_finalize.local import weigh_input
from moe_plugin.quantization import FP8_DTYPE, dispatched_groups
from moe_plugin.verdict import Gate, Verdict, gate_dtype
from moe_plugin.workspace import Workspace, WorkspaceArena

ROW_ALIGNMENT = 64
"""Strides of rows are multiples of 16 elements of any dtype, which is what Triton compiles wide loads for."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where things lie in a packed row: hidden states, slots int32 [K], weights fp32 [K], flags int32 [1], scales fp32.

    dtype: of the hidden states. num_scales: scales that come with a row of fp8, which not every dispatch has.

    Example: H = 64 bf16, K = 2 -> hidden 128 bytes, slots at 128, weights at 136, flags at 144, row of 192 bytes.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    num_scales: int = 0

    @property
    def slots_at(self) -> int:
        return -(-self.hidden_size * self.dtype.itemsize // 4) * 4

    @property
    def row_bytes(self) -> int:
        used = self._scales_at + 4 * self.num_scales
        return -(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, H] view of packed rows uint8 [N, row_bytes]."""
        return rows[:, : self.hidden_size * self.dtype.itemsize].view(self.dtype)

    def slots(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.slots_at : self.slots_at + 4 * self.top_k].view(torch.int32)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.slots_at + 4 * self.top_k : self.slots_at + 8 * self.top_k].view(torch.float32)

    def flags(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.slots_at + 8 * self.top_k : self._scales_at].view(torch.int32)

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self._scales_at : self._scales_at + 4 * self.num_scales].view(torch.float32)

    @property
    def _scales_at(self) -> int:
        return self.slots_at + 8 * self.top_k + 4

    def views(self, rows: torch.Tensor) -> PackedViews:
        scales = self.scales(rows) if self.num_scales else None
        return PackedViews(self.hidden(rows), self.slots(rows), self.weights(rows), self.flags(rows), scales)


@dataclass(slots=True)
class AllToAllHandle(DispatchHandle):
    """row_index int32 [t, R]: where token t's row for rank r lies among the rows sent, for this rank itself among its
    own rows; -1 if there is none.

    num_own: rows that stay. num_sent: rows that go to peers. num_received: own and those of peers, before the TP
    all-gather. padded_received: rows per TP rank after it. splits, received_splits: rows to and from each EP rank.
    """

    row_index: torch.Tensor
    num_own: int
    num_sent: int
    num_received: int
    padded_received: int
    splits: Sequence[int]
    received_splits: Sequence[int]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """rows: uint8 [N, row_bytes]; views: its parts."""

    rows: torch.Tensor
    views: PackedViews


@dataclass(frozen=True, slots=True)
class _Call:
    """What a dispatch has to pack. weights: router weights that still have to be applied, or None.

    key: stands for the layouts of both. capacity: rows per rank pair; None where counts decide.
    """

    activations: torch.Tensor
    weights: torch.Tensor | None
    plan: SendPlan
    row_index: torch.Tensor
    layout: RowLayout
    key: object
    capacity: int | None
    workspace: Workspace


class NcclAllToAll(PrepareAndFinalize):
    """One packed all-to-all each way, over any torch.distributed backend.

    use_triton: None takes Triton on CUDA devices where it is installed; True also under its interpreter.
    """

    name = "nccl_all_to_all"
    description = "one packed all-to-all each way over torch.distributed (NCCL, or gloo on CPU)"
    has_capacity = True

    def __init__(self, config: MoEConfig, arena: WorkspaceArena, use_triton: bool | None = None) -> None:
        super().__init__(config, arena)
        parallel = config.parallel
        self._ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)
        self._tp = Communicator(parallel.tp_group, parallel.tp_size, parallel.tp_rank, parallel.timeout_seconds)
        self._plain_layout = RowLayout(config.hidden_size, config.top_k, config.dtype)
        self._quantized_layout = _quantized_layout(config)
        self.quantizes = False
        self._tables = LookupTables.of(config.expert_placement.tables(arena.device))
        self._errors = DeferredErrors(config, arena.device, self._ep)
        self._stream = communication_stream(arena.device)
        self._count_stream = _count_stream(arena.device)
        self._use_triton = uses_triton(arena.device) if use_triton is None else use_triton
        # What launches and buffers depend on besides the arguments of a call.
        self._kind = (*self._tables.tables.slot.shape, self._ep.size, self._ep.rank, self._tp.size)

    @property
    def _layout(self) -> RowLayout:
        return self._quantized_layout if self.quantizes else self._plain_layout

    def accommodate(self, experts: type[Experts]) -> None:
        self.quantizes = experts.takes_quantized

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        backend = "nccl" if environment.device_type == "cuda" else "gloo"
        seen = ", ".join(environment.backends) or "none"
        return Verdict.of(
            gate_dtype(config, *SUPPORTED_DTYPES),
            Gate("torch.distributed backend", backend in environment.backends, seen, backend),
        )

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        return 0 if config.cuda_graph else 1

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """Of rows in config.dtype, than which quantized ones are never larger."""
        parallel, layout = config.parallel, RowLayout(config.hidden_size, config.top_k, config.dtype)
        ep, tp, tokens = parallel.ep_size, parallel.tp_size, cdiv(config.max_tokens_per_rank, parallel.tp_size)
        if config.cuda_graph:
            capacity = _capacity_limit(config)
            sent, received = (ep - 1) * capacity, ep * capacity
        else:
            sent, received = max(tokens * min(ep - 1, config.top_k), 1), tokens * ep
        row, result = layout.row_bytes, config.hidden_size * config.dtype.itemsize
        return {
            "sent rows": sent * row,
            "received rows": (received + (tp * received if tp > 1 else 0)) * row,
            "slots and weights": tp * received * 8 * config.top_k,
            "reduced rows": received * result if tp > 1 else 0,
            "returned rows": sent * result,
            "send plan": tokens * (8 * config.top_k + 8 * ep) + 4 * (ep + 1),
            "TP slices": (1 + tp) * tokens * result if tp > 1 else 0,
            "counts": 0 if config.cuda_graph else 4 * (1 + (tp if tp > 1 else 0)) * ep * (ep + 1),
        }

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        return self._start_dispatch(hidden_states, topk_ids, topk_weights, max_num_tokens)()

    def prepare_async(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Receiver[Dispatched]:
        inputs = (hidden_states, topk_ids, topk_weights)
        return overlapped(self._stream, lambda: self._start_dispatch(*inputs, max_num_tokens), inputs)

    def abort(self, problem: InputError, max_num_tokens: int | None = None) -> NoReturn:
        """Join the exchange with no tokens and the abort flag, so that every rank raises."""
        config, device = self.config, self.arena.device
        nothing = torch.empty(0, config.hidden_size, dtype=config.dtype, device=device)
        ids = torch.empty(0, config.top_k, dtype=torch.int32, device=device)
        complete = self._start_dispatch(nothing, ids, ids.float(), max_num_tokens, problem)
        # Only fixed-capacity dispatch gets here. On CPU all ranks see the flag at once; on CUDA the peers raise at
        # their next host point and are on their way to combine.
        try:
            dispatched = complete()
        except InputError:
            raise problem from None
        rows = torch.zeros(dispatched.activations.shape, dtype=config.dtype, device=device)
        self.finalize(rows, dispatched.handle)
        raise problem

    def _start_dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None,
        problem: InputError | None = None,
    ) -> Callable[[], Dispatched]:
        self._errors.raise_pending()
        num_tokens = hidden_states.shape[0]
        start, stop = self._tp_slice(num_tokens)
        if self._tp.size > 1:
            hidden_states, topk_ids, topk_weights = (
                each[start:stop] for each in (hidden_states, topk_ids, topk_weights)
            )
        weights: torch.Tensor | None = topk_weights
        stage = RouterWeightStage.EXPERTS_GATHER
        if self.config.apply_router_weight_on_input:
            hidden_states, weights, stage = weigh_input(self.config, hidden_states, topk_weights)
        workspace = self.arena.lease()
        plan = self._plan(topk_ids, start, workspace, problem)
        layout = self._layout
        call = _Call(
            hidden_states,
            weights,
            plan,
            workspace.tensor("row_index", plan.position.shape, torch.int32),
            layout,
            one_object(self._kind, layout, _layout_of(hidden_states), _layout_of(weights)),
            self._capacity(max_num_tokens) if self.config.cuda_graph else None,
            workspace,
        )
        if call.capacity is None:
            handle = self._pack_exact(call, num_tokens, problem)
        else:
            handle = self._pack_fixed(call, call.capacity, num_tokens)
        sent = self._packed("sent", handle.num_sent, layout, workspace)
        received = self._packed("received", handle.padded_received, layout, workspace)
        exchange = self._ep.all_to_all(
            received.rows[handle.num_own : handle.num_received],
            sent.rows[: handle.num_sent],
            "dispatch",
            handle.received_splits,
            handle.splits,
        )
        self._pack(call, received, handle.num_own, to_self=True)

        def complete() -> Dispatched:
            exchange.wait()
            return self._unpack(call, received, handle, stage)

        return complete

    def _plan(
        self, topk_ids: torch.Tensor, first_token: int, workspace: Workspace, problem: InputError | None
    ) -> SendPlan:
        num_tokens, num_ranks = topk_ids.shape[0], self._ep.size
        plan = SendPlan(
            workspace.tensor("rank", topk_ids.shape, torch.int32),
            workspace.tensor("slot", topk_ids.shape, torch.int32),
            workspace.tensor("position", (num_tokens, num_ranks), torch.int32),
            workspace.tensor("counts", (num_ranks + 1,), torch.int32),
        )
        flags = 0 if problem is None else int(ErrorFlag.ABORTED)
        if not self._use_triton:
            send_plan(topk_ids, self._tables, plan, _EXPERT_ID, flags=flags, first_token=first_token, use_triton=False)
            return plan
        tables = self._tables.tables
        key = ("send_plan", one_object(self._kind, _layout_of(topk_ids)), first_token, flags)
        workspace.cached(key, LaunchSequence)(
            (topk_ids, tables.rank, tables.slot, tables.num_replicas),
            lambda: send_plan_launches(topk_ids, self._tables, plan, _EXPERT_ID, flags=flags, first_token=first_token),
        )
        return plan

    def _pack_exact(self, call: _Call, num_tokens: int, problem: InputError | None) -> AllToAllHandle:
        """Rows for peers without gaps; the counts of all ranks come to the host once, while the rows are packed."""
        workspace, (tokens, num_ranks) = call.workspace, call.plan.position.shape
        planned = None if self._count_stream is None else torch.cuda.current_stream(self.arena.device).record_event()
        most = tokens * min(num_ranks - 1, self.config.top_k)
        self._pack(call, self._packed("sent", most, call.layout, workspace), most, to_self=False)
        matrix = self._count_matrix(call.plan.counts, planned, workspace)
        if any(row[-1] for tp_matrix in matrix for row in tp_matrix):
            flags = int(call.plan.counts[-1])
            workspace.release()
            raise_together(self.config, self._ep, self._tp, problem, flags)
        me, mine = self._ep.rank, matrix[self._tp.rank]
        splits, received_splits = mine[me][:-1], [row[me] for row in mine]
        num_own, num_received = splits[me], sum(received_splits)
        splits[me] = received_splits[me] = 0
        return AllToAllHandle(
            self,
            num_tokens,
            workspace,
            call.row_index,
            num_own,
            sum(splits),
            num_received,
            max(sum(row[me] for row in tp_matrix) for tp_matrix in matrix),
            splits,
            received_splits,
        )

    def _pack_fixed(self, call: _Call, capacity: int, num_tokens: int) -> AllToAllHandle:
        """A fixed number of rows per destination; what does not fit is left out and flagged."""
        num_ranks = self._ep.size
        total, to_peers = num_ranks * capacity, (num_ranks - 1) * capacity
        splits = [capacity] * num_ranks
        splits[self._ep.rank] = 0
        self._pack(call, self._packed("sent", to_peers, call.layout, call.workspace), to_peers, to_self=False)
        return AllToAllHandle(
            self, num_tokens, call.workspace, call.row_index, capacity, to_peers, total, total, splits, splits
        )

    def _packed(self, name: str, num_rows: int, layout: RowLayout, workspace: Workspace) -> PackedRows:
        """Room for at least `num_rows` rows, in one of few sizes, so that few views of it are ever made."""
        room = self._room(num_rows)

        def build() -> PackedRows:
            rows = workspace.tensor(name, (room, layout.row_bytes), torch.uint8)
            return PackedRows(rows, layout.views(rows))

        return workspace.cached((name, room, layout), build)

    def _room(self, num_rows: int) -> int:
        """Exact where it never varies; otherwise a power of two, or what no call of that many exceeds.

        At least one, since launches are repeated at addresses, and a tensor without elements has none.
        """
        if self.config.cuda_graph:
            return num_rows
        num_rows = max(num_rows, 1)
        tokens = cdiv(self.config.max_tokens_per_rank, self._tp.size)
        most = [tokens * ranks for ranks in (min(self._ep.size - 1, self.config.top_k), self._ep.size)]
        most.append(self._tp.size * most[-1])
        return min([next_power_of_2(num_rows), *(rows for rows in most if rows >= num_rows)])

    def _pack(self, call: _Call, out: PackedRows, num_rows: int, to_self: bool) -> None:
        """The rows of this rank itself or those of all others, no more than `num_rows`."""
        rank, capacity, overflow = self._ep.rank, call.capacity, int(ErrorFlag.CAPACITY)
        if not self._use_triton:
            pack_tokens(
                call.activations,
                call.weights,
                call.plan,
                call.layout.views(out.rows[:num_rows]),
                call.row_index,
                own_rank=rank,
                to_self=to_self,
                capacity=capacity,
                overflow=overflow,
                use_triton=False,
            )
            return
        moving = [call.activations] if call.weights is None else [call.activations, call.weights]
        call.workspace.cached(("pack_tokens", call.key, to_self, capacity), LaunchSequence)(
            moving,
            lambda: pack_tokens_launches(
                call.activations,
                call.weights,
                call.plan,
                out.views,
                call.row_index,
                own_rank=rank,
                to_self=to_self,
                capacity=capacity,
                overflow=overflow,
            ),
        )

    def _unpack(
        self, call: _Call, received: PackedRows, handle: AllToAllHandle, stage: RouterWeightStage
    ) -> Dispatched:
        workspace, top_k = call.workspace, self.config.top_k
        num_rows, packed = handle.num_received, received
        if self._tp.size > 1:
            num_rows, packed = self._tp.size * handle.padded_received, self._gather_over_tp(call, received, handle)
        room = packed.rows.shape[0]
        local_ids = workspace.tensor("local_ids", (room, top_k), torch.int32)
        weights = None if call.weights is None else workspace.tensor("topk_weights", (room, top_k), torch.float32)
        if call.capacity is None:
            unpack_rows(packed.views, num_rows, local_ids, weights, use_triton=self._use_triton)
        else:
            self._unpack_fixed(call, packed.views, num_rows, local_ids, weights)
        views = packed.views
        return Dispatched(
            activations=views.hidden[:num_rows],
            activation_format=self.activation_format,
            router_weight_stage=stage,
            handle=handle,
            local_ids=local_ids[:num_rows],
            topk_weights=None if weights is None else weights[:num_rows],
            scales=None if views.scales is None else views.scales[:num_rows],
        )

    def _unpack_fixed(
        self,
        call: _Call,
        packed: PackedViews,
        num_rows: int,
        local_ids: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> None:
        """As `unpack_rows`, with the error flags of all sources."""
        sources = self._tp.size * self._ep.size
        if not self._use_triton:
            words = torch.zeros(8, dtype=torch.int32, device=local_ids.device)
            unpack_rows(packed, num_rows, local_ids, weights, words, sources, use_triton=False)
            self._errors.record(words.sum(dtype=torch.int32).view(1))
            return
        words = self._errors.kernel_words()
        call.workspace.cached(("unpack_rows", call.key, num_rows), LaunchSequence)(
            [words], lambda: unpack_rows_launches(packed, num_rows, local_ids, weights, words, sources)
        )
        self._errors.launched()

    def _count_matrix(
        self, counts: torch.Tensor, planned: torch.cuda.Event | None, workspace: Workspace
    ) -> list[list[list[int]]]:
        """[tp_size][R][R + 1] on the host: rows from each rank to each rank, then the sender's error flags.

        planned: when counts are there. On CUDA the exchange runs beside what the current stream does after that.
        """
        ep, tp, stream = self._ep, self._tp, self._count_stream
        shape = (ep.size, ep.size + 1)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            if stream is not None and planned is not None:
                stream.wait_event(planned)
            matrix = workspace.tensor("count_matrix", shape, torch.int32)
            ep.all_gather(matrix, counts, "count exchange").wait()
            if tp.size > 1:
                everyone = workspace.tensor("count_matrices", (tp.size, *shape), torch.int32)
                tp.all_gather(everyone, matrix, "count exchange").wait()
                matrix = everyone
            host = workspace.host_tensor("count_matrices", (tp.size, *shape), torch.int32)
            host.view(matrix.shape).copy_(matrix, non_blocking=True)
            copied = None if stream is None else stream.record_event()
        return ep.read_host(host, copied, "count exchange")

    def _gather_over_tp(self, call: _Call, received: PackedRows, handle: AllToAllHandle) -> PackedRows:
        padded = received.rows[: handle.padded_received]
        if handle.num_received < handle.padded_received:
            received.views.slots[handle.num_received : handle.padded_received].fill_(-1)
        num_rows = self._tp.size * handle.padded_received
        gathered = self._packed("gathered", num_rows, call.layout, call.workspace)
        self._tp.all_gather(gathered.rows[:num_rows].view(self._tp.size, *padded.shape), padded, "dispatch").wait()
        return gathered

    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._start_combine(expert_output, handle, out)()

    def finalize_async(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> Receiver[torch.Tensor]:
        # The result is the caller's: memory of the caller's stream.
        result = self._new_result(handle) if out is None else out
        return overlapped(self._stream, lambda: self._start_combine(expert_output, handle, result), (expert_output,))

    def _start_combine(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        handle.consume(self)
        assert isinstance(handle, AllToAllHandle)
        workspace, hidden_size = handle.workspace, self.config.hidden_size
        rows = expert_output
        if self._tp.size > 1:
            rows = workspace.tensor("reduced", (handle.padded_received, hidden_size), self.config.dtype)
            self._tp.reduce_scatter(rows, expert_output, "combine").wait()
        returned = workspace.tensor("returned", (self._room(handle.num_sent), hidden_size), self.config.dtype)
        exchange = self._ep.all_to_all(
            returned[: handle.num_sent],
            rows[handle.num_own : handle.num_received],
            "combine",
            handle.splits,
            handle.received_splits,
        )
        result = self._new_result(handle) if out is None else out

        def complete() -> torch.Tensor:
            exchange.wait()
            self._sum_returned(returned, rows, handle, result)
            workspace.release()
            return result

        return complete

    def _sum_returned(
        self, returned: torch.Tensor, rows: torch.Tensor, handle: AllToAllHandle, result: torch.Tensor
    ) -> None:
        if self._tp.size == 1:
            self._sum(returned, rows, handle, result)
            return
        per_rank = cdiv(handle.num_tokens, self._tp.size)
        workspace, hidden_size = handle.workspace, self.config.hidden_size
        mine = workspace.tensor("tp_slice", (per_rank, hidden_size), self.config.dtype)
        self._sum(returned, rows, handle, mine[: handle.row_index.shape[0]])
        everyone = workspace.tensor("tp_slices", (self._tp.size, per_rank, hidden_size), self.config.dtype)
        self._tp.all_gather(everyone, mine, "combine").wait()
        result.copy_(everyone.view(-1, hidden_size)[: handle.num_tokens])

    def _sum(self, returned: torch.Tensor, rows: torch.Tensor, handle: AllToAllHandle, out: torch.Tensor) -> None:
        """Rows that came back, and of `rows`, which the experts made, those of this rank's own tokens."""
        row_index, rank = handle.row_index, self._ep.rank
        if not self._use_triton:
            row_sum(returned, row_index, None, out, False, own_term=rank, own_rows=rows)
            return
        key = ("row_sum", one_object(self._kind, _layout_of(out), rows.stride(0)))
        handle.workspace.cached(key, LaunchSequence)(
            (rows, out), lambda: row_sum_launches(returned, row_index, None, out, own_term=rank, own_rows=rows)
        )

    def check_errors(self) -> None:
        self._errors.raise_pending(synchronize=True)

    def _tp_slice(self, num_tokens: int) -> tuple[int, int]:
        per_rank = cdiv(num_tokens, self._tp.size)
        start = min(self._tp.rank * per_rank, num_tokens)
        return start, min(start + per_rank, num_tokens)

    def _capacity(self, max_num_tokens: int | None) -> int:
        limit = _capacity_limit(self.config)
        if max_num_tokens is None:
            return limit
        return min(limit, max(1, cdiv(max_num_tokens, self._tp.size)))

    def _new_result(self, handle: DispatchHandle) -> torch.Tensor:
        shape = (handle.num_tokens, self.config.hidden_size)
        return torch.empty(shape, dtype=self.config.dtype, device=self.arena.device)


_EXPERT_ID = int(ErrorFlag.EXPERT_ID)


@functools.cache
def _count_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Where counts travel while rows are packed; None on CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _layout_of(tensor: torch.Tensor | None) -> object:
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


def _capacity_limit(config: MoEConfig) -> int:
    return config.dispatch_capacity or cdiv(config.max_tokens_per_rank, config.parallel.tp_size)


def _quantized_layout(config: MoEConfig) -> RowLayout:
    """Of rows in fp8 with the scales that the configuration's scheme measures; in config.dtype where kernels do not."""
    groups = dispatched_groups(config.quantization, config.hidden_size)
    return RowLayout(config.hidden_size, config.top_k, FP8_DTYPE if groups else config.dtype, groups)
