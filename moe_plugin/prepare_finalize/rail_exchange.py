"""Takes tokens from node to node along rails, between ranks of equal place in their nodes, and results back.

N nodes of L ranks, global rank = node * L + local rank. A token leaves its node through the rank that has it, straight
to the rank of the same place in the other node; there the transport of the node takes over, for which the rank has
N * C tokens. So a token crosses to a node once, however many of that node's ranks want it, and comes back as one row
that the node has already reduced.

Every rank gets room for C tokens from each node, token t of node n at n * C + t, and what it gets is the same whatever
the routing: no index travels, nothing waits for the host. Since room that is not used travels all the same, the rows
of a rail are gathered; a token that a node does not want arrives with ids of -1 and is not read.

Example, N = 2, C = 2, two experts to a node, one token on the rank of node 0 and two on that of node 1:

    physical ids    node 0: [[0, 3]]                            node 1: [[2, 2], [1, -1]]
    ids in node     node 0: [[0, -1], -, [-1, -1], [1, -1]]     node 1: [[-1, 1], -, [0, 0], [-1, -1]]

where - is the room of the token that node 0 lacks; its ids are -1 too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_plugin.kernels.pack_rows import pack_tokens
from moe_plugin.kernels.row_sum import row_sum
from moe_plugin.kernels.send_plan import SendPlan
from moe_plugin.prepare_finalize.collective_transport import row_layout, wanted_ranks
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import or_rows
from moe_plugin.prepare_finalize.nccl_all_to_all import RowLayout
from moe_plugin.workspace import Workspace


@dataclass(slots=True)
class RailHandle:
    """row_index: int32 [T, N], where the row that node n returns for token t lies, -1 if the node did not want it."""

    workspace: Workspace
    row_index: torch.Tensor


@dataclass(frozen=True, slots=True)
class NodeTokens:
    """The tokens of one rail, of all nodes: token t of node n in row n * C + t, in the workspace of the dispatch.

    activations: [N * C, H]; scales: fp32 [N * C, groups] or None. Rows of both are strided, and undefined where all ids
    are -1. ids: int16 [N * C, K], physical ids less the first of this node, -1 where the expert is elsewhere.
    topk_weights: fp32 [N * C, K] or None. flags: int32 [1], the error flags of the rail's ranks.
    """

    activations: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor
    topk_weights: torch.Tensor | None
    flags: torch.Tensor
    handle: RailHandle


class RailExchange:
    """Exchange along the rail of this rank.

    rail: one rank of each node, in the order of nodes. slots_per_node: physical ids of one node.
    """

    def __init__(self, rail: Communicator, slots_per_node: int) -> None:
        self._rail, self._slots_per_node = rail, slots_per_node

    @staticmethod
    def memory(layout: RowLayout, result_dtype: torch.dtype, num_nodes: int, max_tokens: int) -> Mapping[str, int]:
        """Bytes of workspace that a call of `max_tokens` tokens takes at most, per buffer.

        layout: of the rows that are sent. result_dtype: of those that come back.
        """
        gathered = num_nodes * max_tokens
        return {
            "rail sent rows": max_tokens * layout.row_bytes,
            "rail received rows": gathered * layout.row_bytes,
            "rail ids and weights": gathered * 6 * layout.top_k,
            "rail returned rows": gathered * layout.hidden_size * result_dtype.itemsize,
            "rail row index": 4 * gathered,
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
    ) -> NodeTokens:
        """Exchange tokens; collective over the rail.

        activations: [T, H] in any strides, with scales fp32 [T, groups] if they are quantized. ids: int16 [T, K],
        physical over all nodes, -1 where dropped. weights: fp32 [T, K] or None. flags: int32 [1], this rank's error
        flags. capacity: C, the most tokens that any rank may bring, the same on all. Raises PeerLostError.
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
    ) -> Callable[[], NodeTokens]:
        """The first half of `dispatch`: up to the start of the exchange. What it returns is the rest."""
        workspace, capacity = workspace.scoped("rail"), max(capacity, 1)
        num_nodes, layout, physical = self._rail.size, row_layout(activations, ids, scales), ids.int()
        sent = workspace.tensor("sent rows", (capacity, layout.row_bytes), torch.uint8)
        # All rows are for one destination, the whole rail, and travel with their ids as slots.
        num_tokens, everywhere = torch.full_like(flags, ids.shape[0]), torch.zeros_like(physical)
        position = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)[:, None]
        plan = SendPlan(everywhere, physical, position, torch.cat((num_tokens, flags)))
        sent_row = torch.empty_like(position)
        pack_tokens(activations, weights, plan, layout.views(sent), sent_row, scales=scales, capacity=capacity)
        received = workspace.tensor("received rows", (num_nodes * capacity, layout.row_bytes), torch.uint8)
        exchange = self._rail.all_gather(received.view(num_nodes, *sent.shape), sent, "dispatch between nodes")
        handle = RailHandle(workspace, self._row_index(physical, capacity, workspace))

        def complete() -> NodeTokens:
            exchange.wait()
            topk_weights = None
            if weights is not None:
                topk_weights = workspace.tensor("topk_weights", (received.shape[0], ids.shape[1]), torch.float32)
                topk_weights.copy_(layout.weights(received))
            return NodeTokens(
                activations=layout.hidden(received),
                scales=None if scales is None else layout.scales(received),
                ids=self._ids_in_node(layout.slots(received), workspace),
                topk_weights=topk_weights,
                flags=or_rows(layout.flags(received)[::capacity]),
                handle=handle,
            )

        return complete

    def _row_index(self, physical: torch.Tensor, capacity: int, workspace: Workspace) -> torch.Tensor:
        node = torch.div(physical, self._slots_per_node, rounding_mode="floor")
        wanted = wanted_ranks(node, self._rail.size)
        token, first_row = (torch.arange(n, dtype=torch.int32, device=node.device) for n in wanted.shape)
        row_index = workspace.tensor("row index", wanted.shape, torch.int32)
        return row_index.copy_(torch.where(wanted, token[:, None] + capacity * first_row, -1))

    def _ids_in_node(self, physical: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        in_node = physical - self._rail.rank * self._slots_per_node
        is_here = (physical >= 0) & (in_node >= 0) & (in_node < self._slots_per_node)
        return workspace.tensor("ids", physical.shape, torch.int16).copy_(torch.where(is_here, in_node, -1))

    def combine(self, rows: torch.Tensor, handle: RailHandle, out: torch.Tensor) -> torch.Tensor:
        """out[t] = the sum, over the nodes that token t was for, of what `rows` [N * C, H] holds for it there.

        Collective over the rail. rows: one for each row of `NodeTokens`, reduced inside the node; those of tokens that
        the node did not want may hold anything. out: [T, H], rows may be strided; zeros for a token without experts.
        Summed in fp32 in ascending order of nodes. Raises PeerLostError.
        """
        return self.start_combine(rows, handle, out)()

    def start_combine(self, rows: torch.Tensor, handle: RailHandle, out: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The first half of `combine`: the start of the exchange. What it returns is the rest."""
        returned = handle.workspace.tensor("returned rows", rows.shape, rows.dtype)
        exchange = self._rail.all_to_all(returned, rows.contiguous(), "combine between nodes")

        def complete() -> torch.Tensor:
            exchange.wait()
            return row_sum(returned, handle.row_index, None, out)

        return complete
