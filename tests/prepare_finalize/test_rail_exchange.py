"""Tokens cross to the nodes of their experts along rails, meet the node's transport there, and come back summed."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.prepare_finalize.collective_transport import CollectiveTransport, row_layout
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import ErrorFlag
from moe_plugin.prepare_finalize.node_groups import node_groups
from moe_plugin.prepare_finalize.rail_exchange import NodeTokens, RailExchange
from moe_plugin.quantization import FP8_DTYPE
from moe_plugin.testing import shared_pool
from moe_plugin.testing.rank_pool import RankContext
from moe_plugin.workspace import Workspace, WorkspaceArena
from tests.prepare_finalize.test_collective_transport import HIDDEN, SLOTS, Batch, batch_of, expected_out, expert_rows

CPU = torch.device("cpu")


def lease() -> Workspace:
    return WorkspaceArena(CPU, poison=True).lease()


def ep_of(context: RankContext) -> Communicator:
    parallel = context.parallel()
    return Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, 30.0)


def assert_arrived(tokens: NodeTokens, batches: list[Batch], node: int, slots_per_node: int, capacity: int) -> None:
    """batches: of the ranks of the rail, by node."""
    first = node * slots_per_node
    assert tokens.activations.shape == (len(batches) * capacity, HIDDEN)
    assert tokens.ids.dtype == torch.int16
    assert tokens.ids.is_contiguous()
    for source, batch in enumerate(batches):
        num_tokens = batch.ids.shape[0]
        part = slice(source * capacity, source * capacity + num_tokens)
        is_here = (batch.ids >= first) & (batch.ids < first + slots_per_node)
        assert torch.equal(tokens.ids[part], torch.where(is_here, batch.ids - first, -1).short())
        assert (tokens.ids[part.stop : (source + 1) * capacity] == -1).all()
        wanted = is_here.any(1)
        assert torch.equal(tokens.activations[part][wanted].float(), batch.activations[wanted].float())
        if batch.scales is not None:
            assert tokens.scales is not None
            assert torch.equal(tokens.scales[part][wanted], batch.scales[wanted])
        if batch.weights is not None:
            assert tokens.topk_weights is not None
            assert torch.equal(tokens.topk_weights[part][wanted], batch.weights[wanted])
    assert (tokens.topk_weights is None, tokens.scales is None) == (batch.weights is None, batch.scales is None)


def hybrid_round_trip(
    context: RankContext, num_nodes: int, tokens_of_rank: list[int], dtype: torch.dtype, seed: int, static: bool
) -> None:
    ep = ep_of(context)
    groups = node_groups(ep, num_nodes)
    ranks_per_node = groups.node.size
    slots_per_node, capacity = ranks_per_node * SLOTS, max(tokens_of_rank) + 1
    batches = [batch_of(rank, n, ep.size * SLOTS, 3, dtype, seed) for rank, n in enumerate(tokens_of_rank)]
    mine, workspace = batches[ep.rank], lease()
    mine.flags.fill_(int(ErrorFlag.EXPERT_ID) if ep.rank == 0 else 0)

    rails = RailExchange(groups.rail, slots_per_node)
    tokens = rails.dispatch(mine.activations, mine.ids, mine.weights, mine.flags, capacity, workspace, mine.scales)
    assert_arrived(tokens, batches[groups.node.rank :: ranks_per_node], groups.rail.rank, slots_per_node, capacity)

    transport = CollectiveTransport(groups.node, SLOTS, CPU, static)
    received = transport.dispatch(
        tokens.activations,
        tokens.ids,
        tokens.topk_weights,
        tokens.flags,
        num_nodes * capacity,
        workspace,
        tokens.scales,
    )
    assert received.flags.tolist() == [ErrorFlag.EXPERT_ID]
    in_node = torch.full((num_nodes * capacity, HIDDEN), torch.nan, dtype=torch.bfloat16)
    transport.combine(expert_rows(received, ep.rank), received.handle, in_node)
    # Rows of tokens that this node did not want are not read.
    in_node[(tokens.ids < 0).all(1)] = torch.nan
    out = torch.full((tokens_of_rank[ep.rank], HIDDEN), torch.nan)
    assert rails.combine(in_node, tokens.handle, out) is out
    assert torch.equal(out, expected_out(mine, ep.size))


def all_hybrid_round_trips(context: RankContext) -> None:
    nodes_of_size = {2: [1, 2], 3: [3], 4: [2]}
    for num_nodes in nodes_of_size[context.size]:
        tokens = [3, 0, 6, 5][: context.size]
        hybrid_round_trip(context, num_nodes, tokens, torch.float32, 0, static=False)
        hybrid_round_trip(context, num_nodes, tokens, torch.bfloat16, 1, static=True)
        hybrid_round_trip(context, num_nodes, tokens, FP8_DTYPE, 2, static=False)
        hybrid_round_trip(context, num_nodes, [0] * context.size, torch.float32, 0, static=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tokens_cross_nodes_and_come_back(ranks: int) -> None:
    """One node of two ranks, two and three nodes of one rank, two nodes of two."""
    shared_pool("cpu", 4).run(all_hybrid_round_trips, ranks=ranks)


def docstring_example(context: RankContext) -> list[list[int]]:
    ids = torch.tensor([[[0, 3]], [[2, 2], [1, -1]]][context.rank], dtype=torch.int16)
    rails = RailExchange(ep_of(context), slots_per_node=2)
    flags = torch.zeros(1, dtype=torch.int32)
    return rails.dispatch(torch.ones(len(ids), HIDDEN), ids, None, flags, 2, lease()).ids.tolist()


@pytest.mark.slow
def test_docstring_example() -> None:
    node_0, node_1 = shared_pool("cpu", 4).run(docstring_example, ranks=2)
    assert node_0 == [[0, -1], [-1, -1], [-1, -1], [1, -1]]
    assert node_1 == [[-1, 1], [-1, -1], [0, 0], [-1, -1]]


def test_two_micro_batches_and_fewer_tokens_than_before() -> None:
    rails, workspaces = RailExchange(Communicator(None, 1, 0, 30.0), SLOTS), [lease() for _ in range(2)]
    for num_tokens in (5, 2):
        calls = []
        for seed, workspace in enumerate(workspaces):
            batch = batch_of(0, num_tokens, SLOTS, 2, torch.float32, seed)
            tokens = rails.dispatch(batch.activations, batch.ids, batch.weights, batch.flags, 5, workspace)
            calls.append((batch, tokens))
        for batch, tokens in reversed(calls):
            assert_arrived(tokens, [batch], 0, SLOTS, 5)
            out = rails.combine(tokens.activations.contiguous(), tokens.handle, torch.empty(num_tokens, HIDDEN))
            assert torch.equal(out, expected_out(batch, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8_DTYPE])
def test_memory_is_what_a_call_takes(dtype: torch.dtype) -> None:
    num_tokens = 80
    batch, arena = batch_of(0, num_tokens, SLOTS, 3, dtype), WorkspaceArena(CPU)
    rails, workspace = RailExchange(Communicator(None, 1, 0, 30.0), SLOTS), arena.lease()
    tokens = rails.dispatch(
        batch.activations, batch.ids, batch.weights, batch.flags, num_tokens, workspace, batch.scales
    )
    rails.combine(torch.zeros(num_tokens, HIDDEN, dtype=torch.bfloat16), tokens.handle, torch.empty(num_tokens, HIDDEN))
    workspace.release()
    layout = row_layout(batch.activations, batch.ids, batch.scales)
    assert arena.nbytes == sum(RailExchange.memory(layout, torch.bfloat16, 1, num_tokens).values())
