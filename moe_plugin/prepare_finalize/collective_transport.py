"""Dense-routing dispatch and combine over torch.distributed: gloo on CPU, NCCL on GPUs that cannot write to each other.

Dispatch
 1. Ranks gather the physical ids of all their tokens, dense rows int16 [C, K], and their error flags, in one payload
    of bytes: NCCL has no int16. From then on every rank knows where every row of every rank goes.
 2. The dense scan numbers the rows that each rank gets; see `moe_plugin.kernels.dense_routing`.
 3. A token goes to a rank once, however many of its experts live there: one packed row, one all-to-all. Rows arrive in
    global token order: by source rank, then by token.

Combine sends rows back along the same splits. They arrive in the order in which they were sent, and the rows of a token
are summed in fp32 in ascending rank order.

On CPU the splits are exact. On CUDA, and wherever calls are to be captured, they are equal parts, one row of room for
each token of a rank pair or `dispatch_capacity`, so that nothing waits for the host; unused rows name no expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from moe_plugin.kernels.dense_routing import DenseRouting, dense_routing
from moe_plugin.kernels.pack_rows import pack_tokens, unpack_rows
from moe_plugin.kernels.row_sum import row_sum
from moe_plugin.kernels.send_plan import SendPlan
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import ErrorFlag, or_rows
from moe_plugin.prepare_finalize.nccl_all_to_all import RowLayout
from moe_plugin.workspace import Workspace

_PAYLOAD_ALIGNMENT = 16
"""Bytes; collectives take their widest loads where the parts of all ranks begin at such multiples."""
_IDS_AT = _PAYLOAD_ALIGNMENT
"""Of a rank's payload; the error flags stand before them."""


@dataclass(frozen=True, slots=True)
class CollectiveRouting:
    """Where the rows of a call go, for any rows with the same ids. No part of it lies in a workspace.

    room: rows of a rank pair where parts are equal, else None. num_sent, num_received: rows of the exchange.
    splits, received_splits: per rank; None where they are equal parts. flags: int32 [1], of all ranks.
    """

    plan: SendPlan
    flags: torch.Tensor
    room: int | None
    num_sent: int
    num_received: int
    splits: list[int] | None
    received_splits: list[int] | None


@dataclass(slots=True)
class CollectiveHandle:
    """What combine needs to know about its dispatch.

    row_index: int32 [T, R], where token t's row for rank r lies among the rows sent, -1 if it was not sent.
    """

    workspace: Workspace
    row_index: torch.Tensor
    routing: CollectiveRouting


@dataclass(frozen=True, slots=True)
class Received:
    """Rows that ask for an expert of this rank, in global token order, in the workspace of the dispatch.

    activations: [N, H]; scales: fp32 [N, groups] or None. Rows of both are strided.
    local_ids: int32 [N, K], slots of this rank's experts, -1 elsewhere and in unused rows. topk_weights: fp32 [N, K],
    undefined in unused rows, or None. flags: int32 [1], the error flags of all ranks.
    """

    activations: torch.Tensor
    scales: torch.Tensor | None
    local_ids: torch.Tensor
    topk_weights: torch.Tensor | None
    flags: torch.Tensor
    handle: CollectiveHandle


class CollectiveTransport:
    """Takes rows to the ranks that own their experts and brings results back, over one process group.

    slots_per_rank: S; the expert in slot s of rank r has the physical id r * S + s.
    static: exchange equal parts and never wait for the device; always so on CUDA.
    dispatch_capacity: rows per rank pair where the exchange is static; None for as many as there can be.
    """

    def __init__(
        self,
        communicator: Communicator,
        slots_per_rank: int,
        device: torch.device,
        static: bool = False,
        dispatch_capacity: int | None = None,
    ) -> None:
        self._communicator, self._slots_per_rank = communicator, slots_per_rank
        self._is_static = static or device.type == "cuda"
        self._dispatch_capacity = dispatch_capacity

    @staticmethod
    def memory(
        layout: RowLayout,
        result_dtype: torch.dtype,
        num_ranks: int,
        max_tokens: int,
        static: bool,
        dispatch_capacity: int | None = None,
    ) -> Mapping[str, int]:
        """Bytes of workspace that a call of `max_tokens` tokens on every rank takes at most, per buffer.

        layout: of the rows that are sent. result_dtype: of those that come back.
        """
        if static:
            sent = received = num_ranks * min(max_tokens, dispatch_capacity or max_tokens)
        else:
            sent, received = max_tokens * min(num_ranks, layout.top_k), max_tokens * num_ranks
        payload = _payload_bytes(max_tokens, layout.top_k)
        return {
            "gathered ids": payload * (1 + num_ranks) + 2 * num_ranks * max_tokens * layout.top_k,
            "sent rows": sent * layout.row_bytes,
            "received rows": received * layout.row_bytes,
            "slots and weights": received * 8 * layout.top_k,
            "returned rows": sent * layout.hidden_size * result_dtype.itemsize,
            "routing": 4 * num_ranks * (3 * max_tokens + 1),
        }

    def dispatch(
        self,
        activations: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        flags: torch.Tensor,
        capacity: int,
        workspace: Workspace,
        scales: torch.Tensor | None = None,
    ) -> Received:
        """Exchange rows; collective.

        activations: [T, H] in any strides, with scales fp32 [T, groups] if they are quantized. ids: int16 [T, K],
        physical, -1 where dropped. weights: fp32 [T, K] or None. flags: int32 [1], this rank's error flags. capacity:
        the most tokens that any rank may bring, the same on all.
        Where a rank pair has more rows than room, the last of them stay behind and ErrorFlag.CAPACITY is set in the
        flags that all ranks get. Raises PeerLostError.
        """
        return self.start_dispatch(activations, ids, weights, flags, capacity, workspace, scales)()

    def start_dispatch(
        self,
        activations: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        flags: torch.Tensor,
        capacity: int,
        workspace: Workspace,
        scales: torch.Tensor | None = None,
        routing: CollectiveRouting | None = None,
    ) -> Callable[[], Received]:
        """The first half of `dispatch`: everything up to the start of the all-to-all. What it returns is the rest.

        routing: of an earlier call with the same ids on all ranks, which spares the exchange of ids and the scan; only
            flags are gathered.
        """
        workspace = workspace.scoped("collective")
        if routing is None:
            routing = self._route(ids, flags, capacity, workspace)
        else:
            routing = replace(routing, flags=self._gather_flags(flags))
        row_index = workspace.tensor("row_index", routing.plan.position.shape, torch.int32)
        handle = CollectiveHandle(workspace, row_index, routing)
        layout = row_layout(activations, ids, scales)
        sent, received = (
            workspace.tensor(name, (num_rows, layout.row_bytes), torch.uint8)
            for name, num_rows in (("sent rows", routing.num_sent), ("received rows", routing.num_received))
        )
        views = layout.views(sent)
        pack_tokens(activations, weights, routing.plan, views, row_index, scales=scales, capacity=routing.room)
        exchange = self._communicator.all_to_all(received, sent, "dispatch", routing.received_splits, routing.splits)

        def complete() -> Received:
            exchange.wait()
            views, shape = layout.views(received), (routing.num_received, layout.top_k)
            local_ids = workspace.tensor("local_ids", shape, torch.int32)
            topk_weights = None if weights is None else workspace.tensor("topk_weights", shape, torch.float32)
            unpack_rows(views, routing.num_received, local_ids, topk_weights)
            return Received(views.hidden, views.scales, local_ids, topk_weights, routing.flags, handle)

        return complete

    def _route(self, ids: torch.Tensor, flags: torch.Tensor, capacity: int, workspace: Workspace) -> CollectiveRouting:
        everyone, all_flags = self._gather_ids(ids, flags, capacity, workspace)
        send_rows, received_rows = self._scan(everyone, workspace)
        plan = self._send_plan(ids, send_rows, flags)
        if self._is_static:
            room = min(everyone.shape[1], self._dispatch_capacity or everyone.shape[1])
            num_rows = room * self._communicator.size
            overflow = self._overflow(everyone, room)
            return CollectiveRouting(plan, all_flags | overflow, room, num_rows, num_rows, None, None)
        splits = plan.counts[:-1].tolist()
        received_splits = (received_rows.view(self._communicator.size, -1) >= 0).sum(1).tolist()
        return CollectiveRouting(plan, all_flags, None, sum(splits), sum(received_splits), splits, received_splits)

    def _gather_ids(
        self, ids: torch.Tensor, flags: torch.Tensor, capacity: int, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids of all ranks int16 [R, C, K], -1 past a rank's tokens; flags of all ranks or-ed, int32 [1])."""
        num_ranks, (num_tokens, top_k) = self._communicator.size, ids.shape
        capacity = max(capacity, 1)
        size, ids_end = _payload_bytes(capacity, top_k), _IDS_AT + 2 * capacity * top_k
        mine = workspace.tensor("own ids", (size,), torch.uint8)
        mine[:4].view(torch.int32).copy_(flags)
        my_ids = mine[_IDS_AT:ids_end].view(torch.int16).view(capacity, top_k)
        my_ids[:num_tokens].copy_(ids)
        my_ids[num_tokens:].fill_(-1)
        everyone = workspace.tensor("all payloads", (num_ranks, size), torch.uint8)
        self._communicator.all_gather(everyone, mine, "routing exchange").wait()
        all_ids = workspace.tensor("all ids", (num_ranks, capacity, top_k), torch.int16)
        all_ids.view(num_ranks, -1).copy_(everyone[:, _IDS_AT:ids_end].view(torch.int16))
        return all_ids, or_rows(everyone[:, :4].view(torch.int32))

    def _gather_flags(self, flags: torch.Tensor) -> torch.Tensor:
        everyone = torch.empty(self._communicator.size, 1, dtype=torch.int32, device=flags.device)
        self._communicator.all_gather(everyone, flags, "routing exchange").wait()
        return or_rows(everyone)

    def _scan(self, everyone: torch.Tensor, workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
        """(send_rows, received_rows) of the dense scan."""
        num_ranks, capacity, _ = everyone.shape
        send_rows = workspace.tensor("send_rows", (capacity, num_ranks), torch.int32)
        received_rows = workspace.tensor("received_rows", (num_ranks * capacity,), torch.int32)
        routing = DenseRouting(
            rank=self._communicator.rank,
            num_slots=self._slots_per_rank,
            rows_per_rank=workspace.tensor("rows_per_rank", (num_ranks,), torch.int32),
            send_rows=send_rows,
            received_rows=received_rows,
        )
        dense_routing(everyone, self._communicator.rank, self._slots_per_rank, places=False, out=routing)
        return send_rows, received_rows

    def _overflow(self, everyone: torch.Tensor, room: int) -> torch.Tensor | int:
        """ErrorFlag.CAPACITY, int32 [1], if any rank has more than `room` rows for any other, else 0."""
        num_ranks, capacity, _ = everyone.shape
        if room == capacity:
            return 0
        rank = torch.div(everyone, self._slots_per_rank, rounding_mode="floor")
        rows_per_pair = wanted_ranks(rank, num_ranks).sum(1)
        return (rows_per_pair > room).any().to(torch.int32).view(1) * int(ErrorFlag.CAPACITY)

    def _send_plan(self, ids: torch.Tensor, send_rows: torch.Tensor, flags: torch.Tensor) -> SendPlan:
        """What this rank sends, with rows counted from its own first row on a rank instead of from all ranks' first.

        Example, tokens 0 to 2 of a rank, one destination: send_rows [5, -1, 6] -> position [0, -1, 1], counts [2].
        """
        physical = ids.int()
        rank = torch.div(physical, self._slots_per_rank, rounding_mode="floor")
        wanted = send_rows >= 0
        first = torch.where(wanted, send_rows, torch.iinfo(torch.int32).max).amin(0)
        position = torch.where(wanted, send_rows - first, -1)[: ids.shape[0]]
        counts = torch.cat((wanted.sum(0, dtype=torch.int32), flags))
        return SendPlan(rank, physical - rank * self._slots_per_rank, position, counts)

    def combine(self, rows: torch.Tensor, handle: CollectiveHandle, out: torch.Tensor) -> torch.Tensor:
        """out[t] = the sum, over the ranks that got token t, of what `rows` [N, H] holds for it there; collective.

        rows: one for each row of `Received`; unused ones may hold anything. out: [T, H], rows may be strided; zeros for
        a token that no rank got. Raises PeerLostError.
        """
        return self.start_combine(rows, handle, out)()

    def start_combine(
        self, rows: torch.Tensor, handle: CollectiveHandle, out: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """The first half of `combine`: the start of the all-to-all. What it returns is the rest."""
        routing = handle.routing
        returned = handle.workspace.tensor("returned rows", (routing.num_sent, rows.shape[1]), rows.dtype)
        exchange = self._communicator.all_to_all(
            returned, rows.contiguous(), "combine", routing.splits, routing.received_splits
        )

        def complete() -> torch.Tensor:
            exchange.wait()
            return row_sum(returned, handle.row_index, None, out)

        return complete


def row_layout(activations: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor | None) -> RowLayout:
    """Of packed rows for activations [T, H] with ids [T, K] and scales [T, groups] or None."""
    return RowLayout(activations.shape[1], ids.shape[1], activations.dtype, 0 if scales is None else scales.shape[1])


def wanted_ranks(rank: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Which ranks a token names: bool [..., num_ranks] from rank int [..., K], -1 where a pair is dropped.

    Example: three ranks, [[0, 2], [1, 1], [-1, -1]] -> [[1, 0, 1], [0, 1, 0], [0, 0, 0]].
    """
    wanted = torch.zeros(*rank.shape[:-1], num_ranks + 1, dtype=torch.bool, device=rank.device)
    wanted.scatter_(-1, torch.where(rank < 0, num_ranks, rank).long(), True)
    return wanted[..., :num_ranks]


def _payload_bytes(capacity: int, top_k: int) -> int:
    return _IDS_AT + -(-2 * capacity * top_k // _PAYLOAD_ALIGNMENT) * _PAYLOAD_ALIGNMENT
