"""Dispatch and combine over torch.distributed: NCCL on GPUs, gloo on CPU, nothing else to install.

Dispatch
 1. Each expert id is looked up in the placement table: destination rank and slot there.
 2. A token goes to a rank once, however many of its experts live there, as one packed row of bytes: hidden states,
    slots (-1 for experts elsewhere), router weights. Rows are sorted by (destination rank, token).
 3. Ranks gather their count rows into one matrix, error flags included; every rank reads the same matrix (the one
    copy to the host), so that all raise together or none does.
 4. One all-to-all moves the rows.

Combine sends each rank's reduced rows back along the same splits. They arrive in the order in which they were sent,
so no index travels; the rows of a token are summed in fp32 in ascending rank order.

With `cuda_graph=True` the exchange has a fixed capacity per rank pair: no count matrix, no copy to the host. Unused
rows carry slots of -1, and error flags travel in every row and are raised at the next host point on all ranks. NCCL
does not destroy a communicator while a graph that captured it lives: delete graphs before the process group.

With EP + TP each TP rank sends only its slice of the tokens to the same TP rank of the owning EP rank, where an
all-gather over the TP group completes them; combine mirrors that with a reduce-scatter and an all-gather.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch

from moe_plugin.config import SUPPORTED_DTYPES, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ExpertIdError, InputError, rebuild
from moe_plugin.kernels.pack_rows import PackedViews, pack_rows
from moe_plugin.kernels.row_sum import row_sum
from moe_plugin.modular_kernel import Dispatched, DispatchHandle, PrepareAndFinalize, Receiver
from moe_plugin.prepare_finalize.communicator import Communicator, communication_stream
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors, ErrorFlag, or_rows
from moe_plugin.prepare_finalize.local import weigh_input
from moe_plugin.prepare_finalize.placement_lookup import Destinations, PlacementLookup
from moe_plugin.verdict import Gate, Verdict, gate_dtype
from moe_plugin.workspace import Workspace, WorkspaceArena

T = TypeVar("T")

ROW_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where things lie in a packed row: hidden states, then slots int32 [K], weights fp32 [K], flags int32 [1].

    Example: H = 64 bf16, K = 2 -> hidden 128 bytes, slots at 128, weights at 136, flags at 144, row of 160 bytes.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype

    @property
    def slots_at(self) -> int:
        return -(-self.hidden_size * self.dtype.itemsize // 4) * 4

    @property
    def row_bytes(self) -> int:
        used = self.slots_at + 8 * self.top_k + 4
        return -(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, H] view of packed rows uint8 [N, row_bytes]."""
        return rows[:, : self.hidden_size * self.dtype.itemsize].view(self.dtype)

    def slots(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.slots_at : self.slots_at + 4 * self.top_k].view(torch.int32)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.slots_at + 4 * self.top_k : self.slots_at + 8 * self.top_k].view(torch.float32)

    def flags(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.slots_at + 8 * self.top_k : self.slots_at + 8 * self.top_k + 4].view(torch.int32)


@dataclass(slots=True)
class AllToAllHandle(DispatchHandle):
    """row_index int32 [t, R]: where token t's row for rank r lies among the rows sent, -1 if it was not sent.

    splits, received_splits: rows to and from each EP rank; None in fixed-capacity mode, where they are equal parts.
    num_sent, num_received: rows of this rank's exchange, before the TP all-gather.
    padded_received: rows per TP rank after it.
    """

    row_index: torch.Tensor
    num_sent: int
    num_received: int
    padded_received: int
    splits: list[int] | None
    received_splits: list[int] | None


@dataclass(frozen=True, slots=True)
class SendPlan:
    """Which token each row to send carries and to whom: token int64 [num_sent] (-1 in unused rows), rank [num_sent].

    flags: int32 [1], the error flags of this rank.
    """

    handle: AllToAllHandle
    token_of_row: torch.Tensor
    rank_of_row: torch.Tensor
    flags: torch.Tensor


class NcclAllToAll(PrepareAndFinalize):
    """One packed all-to-all each way, over any torch.distributed backend."""

    name = "nccl_all_to_all"
    description = "one packed all-to-all each way over torch.distributed (NCCL, or gloo on CPU)"
    has_capacity = True

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(config, arena)
        parallel = config.parallel
        self._ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)
        self._tp = Communicator(parallel.tp_group, parallel.tp_size, parallel.tp_rank, parallel.timeout_seconds)
        self._layout = RowLayout(config.hidden_size, config.top_k, config.dtype)
        self._lookup = PlacementLookup(config, arena.device)
        self._errors = DeferredErrors(config, arena.device, self._ep)
        self._stream = communication_stream(arena.device)

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
        parallel, layout = config.parallel, RowLayout(config.hidden_size, config.top_k, config.dtype)
        ep, tp, tokens = parallel.ep_size, parallel.tp_size, -(-config.max_tokens_per_rank // parallel.tp_size)
        if config.cuda_graph:
            sent = received = ep * _capacity_limit(config)
        else:
            sent, received = tokens * min(ep, config.top_k), tokens * ep
        row, result = layout.row_bytes, config.hidden_size * config.dtype.itemsize
        return {
            "sent rows": sent * row,
            "received rows": (received + (tp * received if tp > 1 else 0)) * row,
            "slots and weights": tp * received * 8 * config.top_k,
            "reduced rows": received * result if tp > 1 else 0,
            "returned rows": sent * result,
            "row index": 4 * tokens * ep,
            "TP slices": (1 + tp) * tokens * result if tp > 1 else 0,
            "counts": 0 if config.cuda_graph else 4 * (1 + tp) * ep * (ep + 1),
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
        return self._overlapped(lambda: self._start_dispatch(*inputs, max_num_tokens), inputs)

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
        activations, weights, stage = weigh_input(self.config, hidden_states[start:stop], topk_weights[start:stop])
        destinations = self._lookup(topk_ids[start:stop], first_token=start)
        if problem is not None:
            destinations.flags.bitwise_or_(int(ErrorFlag.ABORTED))
        workspace = self.arena.lease()
        plan = self._plan_fixed if self.config.cuda_graph else self._plan_exact
        send_plan = plan(destinations, workspace, num_tokens, max_num_tokens, problem)
        handle = send_plan.handle
        sent = self._pack(activations, destinations, weights, send_plan)
        received = workspace.tensor("received", (handle.padded_received, self._layout.row_bytes), torch.uint8)
        exchange = self._ep.all_to_all(
            received[: handle.num_received], sent, "dispatch", handle.received_splits, handle.splits
        )

        def complete() -> Dispatched:
            exchange.wait()
            rows = self._gather_over_tp(received, handle)
            if self.config.cuda_graph:
                self._errors.record(or_rows(self._layout.flags(rows)))
            local_ids = workspace.tensor("local_ids", (rows.shape[0], self.config.top_k), torch.int32)
            return Dispatched(
                activations=self._layout.hidden(rows),
                activation_format=self.activation_format,
                router_weight_stage=stage,
                handle=handle,
                local_ids=local_ids.copy_(self._layout.slots(rows)),
                topk_weights=None
                if weights is None
                else workspace.tensor("topk_weights", local_ids.shape, torch.float32).copy_(self._layout.weights(rows)),
            )

        return complete

    def _plan_exact(
        self,
        destinations: Destinations,
        workspace: Workspace,
        num_tokens: int,
        max_num_tokens: int | None,
        problem: InputError | None,
    ) -> SendPlan:
        """Rows in (rank, token) order without gaps; the counts of all ranks come to the host once."""
        wanted, position, counts = self._rows_per_rank(destinations)
        matrix = self._count_matrix(counts, destinations.flags, workspace)
        if any(row[-1] for tp_matrix in matrix for row in tp_matrix):
            workspace.release()
            self._raise_together(problem, destinations)
        me, mine = self._ep.rank, matrix[self._tp.rank]
        splits, received_splits = mine[me][:-1], [row[me] for row in mine]
        num_sent = sum(splits)
        ends = counts.cumsum(0, dtype=torch.int32)
        first_row = ends - counts
        row_index, token_of_row = self._row_tables(wanted, position + first_row, num_sent, workspace)
        num_received = sum(received_splits)
        handle = AllToAllHandle(
            self,
            num_tokens,
            workspace,
            row_index,
            num_sent,
            num_received,
            max(sum(row[me] for row in tp_matrix) for tp_matrix in matrix),
            splits,
            received_splits,
        )
        rows = torch.arange(num_sent, dtype=torch.int32, device=ends.device)
        return SendPlan(handle, token_of_row, torch.searchsorted(ends, rows, right=True), destinations.flags)

    def _plan_fixed(
        self,
        destinations: Destinations,
        workspace: Workspace,
        num_tokens: int,
        max_num_tokens: int | None,
        problem: InputError | None,
    ) -> SendPlan:
        """A fixed number of rows per destination; what does not fit is left out and flagged."""
        capacity = self._capacity(max_num_tokens)
        wanted, position, counts = self._rows_per_rank(destinations)
        overflow = (counts > capacity).any().to(torch.int32).view(1) * int(ErrorFlag.CAPACITY)
        first_row = torch.arange(self._ep.size, device=counts.device, dtype=torch.int32) * capacity
        total = self._ep.size * capacity
        row_index, token_of_row = self._row_tables(
            wanted & (position < capacity), position + first_row, total, workspace
        )
        handle = AllToAllHandle(self, num_tokens, workspace, row_index, total, total, total, None, None)
        rank_of_row = torch.arange(total, device=counts.device) // capacity
        return SendPlan(handle, token_of_row, rank_of_row, destinations.flags | overflow)

    def _rows_per_rank(self, destinations: Destinations) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """wanted bool [t, R]: token t goes to rank r; position int32 [t, R]: its row among r's; counts int32 [R].

        Example: two ranks, destination ranks [[0, 1], [1, 1], [0, -1]] -> wanted [[1, 1], [0, 1], [1, 0]],
        position [[0, 0], [-, 1], [1, -]] (- where not wanted) and counts [2, 2].
        """
        rank, size = destinations.rank, self._ep.size
        wanted = torch.zeros(rank.shape[0], size + 1, dtype=torch.int32, device=rank.device)
        wanted.scatter_(1, torch.where(rank < 0, size, rank).long(), 1)
        wanted = wanted[:, :size]
        position = wanted.cumsum(0, dtype=torch.int32) - wanted
        return wanted.bool(), position, wanted.sum(0, dtype=torch.int32)

    def _row_tables(
        self, wanted: torch.Tensor, row: torch.Tensor, num_rows: int, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """row_index int32 [t, R], -1 where not wanted, and its inverse token_of_row int64 [num_rows], -1 if unused."""
        row_index = workspace.tensor("row_index", wanted.shape, torch.int32)
        row_index.copy_(torch.where(wanted, row, -1))
        # Rows that are not wanted all write to one spare entry behind the table.
        token_of_row = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=row.device)
        tokens = torch.arange(wanted.shape[0], device=row.device).unsqueeze(1).expand(wanted.shape)
        token_of_row.scatter_(0, torch.where(wanted, row, num_rows).long().reshape(-1), tokens.reshape(-1))
        return row_index, token_of_row[:num_rows]

    def _pack(
        self, activations: torch.Tensor, destinations: Destinations, weights: torch.Tensor | None, plan: SendPlan
    ) -> torch.Tensor:
        """The rows to send, uint8 [num_sent, row_bytes]."""
        layout = self._layout
        rows = plan.handle.workspace.tensor("sent", (plan.handle.num_sent, layout.row_bytes), torch.uint8)
        views = PackedViews(layout.hidden(rows), layout.slots(rows), layout.weights(rows), layout.flags(rows))
        pack_rows(
            activations,
            weights,
            destinations.rank,
            destinations.slot,
            plan.token_of_row,
            plan.rank_of_row,
            plan.flags,
            views,
        )
        return rows

    def _count_matrix(self, counts: torch.Tensor, flags: torch.Tensor, workspace: Workspace) -> list[list[list[int]]]:
        """[tp_size][R][R + 1] on the host: rows from each rank to each rank, then the sender's error flags."""
        width = self._ep.size + 1
        mine = torch.cat((counts, flags))
        matrix = workspace.tensor("count_matrix", (self._ep.size, width), torch.int32)
        self._ep.all_gather(matrix, mine, "count exchange").wait()
        everyone = workspace.tensor("count_matrices", (self._tp.size, self._ep.size, width), torch.int32)
        self._tp.all_gather(everyone, matrix, "count exchange").wait()
        host = workspace.host_tensor("count_matrices", everyone.shape, torch.int32)
        host.copy_(everyone, non_blocking=True)
        event = torch.cuda.current_stream().record_event() if everyone.is_cuda else None
        return self._ep.read_host(host, event, "count exchange")

    def _gather_over_tp(self, received: torch.Tensor, handle: AllToAllHandle) -> torch.Tensor:
        if self._tp.size == 1:
            return received
        self._layout.slots(received[handle.num_received :]).fill_(-1)
        shape = (self._tp.size * handle.padded_received, self._layout.row_bytes)
        rows = handle.workspace.tensor("gathered", shape, torch.uint8)
        self._tp.all_gather(rows.view(self._tp.size, *received.shape), received, "dispatch").wait()
        return rows

    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._start_combine(expert_output, handle, out)()

    def finalize_async(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> Receiver[torch.Tensor]:
        # The result is the caller's: memory of the caller's stream.
        result = self._new_result(handle) if out is None else out
        return self._overlapped(lambda: self._start_combine(expert_output, handle, result), (expert_output,))

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
        returned = workspace.tensor("returned", (handle.num_sent, hidden_size), self.config.dtype)
        exchange = self._ep.all_to_all(
            returned, rows[: handle.num_received], "combine", handle.splits, handle.received_splits
        )
        result = self._new_result(handle) if out is None else out

        def complete() -> torch.Tensor:
            exchange.wait()
            self._sum_returned(returned, handle, result)
            workspace.release()
            return result

        return complete

    def _sum_returned(self, returned: torch.Tensor, handle: AllToAllHandle, result: torch.Tensor) -> None:
        if self._tp.size == 1:
            row_sum(returned, handle.row_index, None, result)
            return
        per_rank = -(-handle.num_tokens // self._tp.size)
        workspace, hidden_size = handle.workspace, self.config.hidden_size
        mine = workspace.tensor("tp_slice", (per_rank, hidden_size), self.config.dtype)
        row_sum(returned, handle.row_index, None, mine[: handle.row_index.shape[0]])
        everyone = workspace.tensor("tp_slices", (self._tp.size, per_rank, hidden_size), self.config.dtype)
        self._tp.all_gather(everyone, mine, "combine").wait()
        result.copy_(everyone.view(-1, hidden_size)[: handle.num_tokens])

    def check_errors(self) -> None:
        self._errors.raise_pending(synchronize=True)

    def _tp_slice(self, num_tokens: int) -> tuple[int, int]:
        per_rank = -(-num_tokens // self._tp.size)
        start = min(self._tp.rank * per_rank, num_tokens)
        return start, min(start + per_rank, num_tokens)

    def _capacity(self, max_num_tokens: int | None) -> int:
        limit = _capacity_limit(self.config)
        if max_num_tokens is None:
            return limit
        return min(limit, max(1, -(-max_num_tokens // self._tp.size)))

    def _raise_together(self, problem: InputError | None, destinations: Destinations) -> NoReturn:
        """Every rank learns every rank's problem and raises the first one, in rank order."""
        if problem is None and int(destinations.flags) & int(ErrorFlag.EXPERT_ID):
            problem = ExpertIdError(f"topk_ids must lie in [-1, {self.config.num_experts}); ids outside were found")
        mine = None if problem is None else (type(problem).__name__, str(problem))
        by_ep_rank = self._ep.gather_objects(mine, "error report")
        by_tp_rank = self._tp.gather_objects(by_ep_rank, "error report")
        found = [
            (ep, tp, entry)
            for ep, row in enumerate(zip(*by_tp_rank, strict=True))
            for tp, entry in enumerate(row)
            if entry
        ]
        ep_rank, tp_rank, (kind, text) = found[0]
        where = f"EP rank {ep_rank}" + (f", TP rank {tp_rank}" if self._tp.size > 1 else "")
        raise rebuild(kind, f"{where}: {text}") from problem

    def _new_result(self, handle: DispatchHandle) -> torch.Tensor:
        shape = (handle.num_tokens, self.config.hidden_size)
        return torch.empty(shape, dtype=self.config.dtype, device=self.arena.device)

    def _overlapped(self, start: Callable[[], Callable[[], T]], inputs: tuple[torch.Tensor, ...]) -> Receiver[T]:
        """Run on the communication stream; the receiver makes the caller's stream wait. On CPU the receiver waits."""
        if self._stream is None:
            return Receiver(start())
        caller = torch.cuda.current_stream(self.arena.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            result = start()()
            done = self._stream.record_event()

        def complete(inputs: tuple[torch.Tensor, ...] = inputs) -> T:
            # Until the caller's stream waits, memory of `inputs` must not go back to it: this closure holds them.
            torch.cuda.current_stream(self.arena.device).wait_event(done)
            return result

        return Receiver(complete)


def _capacity_limit(config: MoEConfig) -> int:
    return config.dispatch_capacity or -(-config.max_tokens_per_rank // config.parallel.tp_size)
