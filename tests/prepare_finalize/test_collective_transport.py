"""Rows arrive where a brute-force walk over all ids says, and come back summed in rank order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from moe_plugin.kernels.dense_routing import DenseRouting, dense_routing
from moe_plugin.prepare_finalize.collective_transport import (
    CollectiveTransport,
    Received,
    row_layout,
    wanted_ranks,
)
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import ErrorFlag
from moe_plugin.quantization import FP8_DTYPE
from moe_plugin.testing import shared_pool
from moe_plugin.testing.rank_pool import RankContext
from moe_plugin.workspace import Workspace, WorkspaceArena

CPU = torch.device("cpu")
SLOTS = 3
HIDDEN = 130


@dataclass(frozen=True)
class Batch:
    """What one rank brings."""

    activations: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor | None
    scales: torch.Tensor | None
    flags: torch.Tensor


def batch_of(rank: int, num_tokens: int, num_slots: int, top_k: int, dtype: torch.dtype, seed: int = 0) -> Batch:
    """Small whole numbers, whose sums are exact in every dtype; ids with repetitions and dropped pairs."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    activations = torch.randint(-8, 9, (HIDDEN, num_tokens), generator=generator).T.to(dtype)  # strided
    ids = torch.randint(-1, num_slots, (num_tokens, top_k), generator=generator, dtype=torch.int16)
    ids[::4] = -1
    weights = torch.rand(num_tokens, top_k, generator=generator) if seed % 2 == 0 else None
    scales = torch.rand(num_tokens, 2, generator=generator) if dtype is FP8_DTYPE else None
    return Batch(activations, ids, weights, scales, torch.zeros(1, dtype=torch.int32))


def transport_of(
    context: RankContext, static: bool = False, dispatch_capacity: int | None = None
) -> CollectiveTransport:
    parallel = context.parallel()
    communicator = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, 30.0)
    return CollectiveTransport(communicator, SLOTS, context.device, static, dispatch_capacity)


def lease() -> Workspace:
    return WorkspaceArena(CPU, poison=True).lease()


def local_ids_of(ids: torch.Tensor, rank: int) -> torch.Tensor:
    is_here = (ids >= rank * SLOTS) & (ids < (rank + 1) * SLOTS)
    return torch.where(is_here, ids - rank * SLOTS, -1).int()


def assert_received(received: Received, batches: list[Batch], rank: int, room: int | None) -> None:
    """Tokens of all ranks that name an expert of `rank`, in order; at most `room` of a rank, in its part, if given."""
    row = 0
    unused = torch.ones(received.local_ids.shape[0], dtype=torch.bool)
    for source, batch in enumerate(batches):
        local_ids = local_ids_of(batch.ids, rank)
        tokens = [t for t, row_ids in enumerate(local_ids.tolist()) if max(row_ids) >= 0]
        if room is not None:
            row, tokens = source * room, tokens[:room]
        for token in tokens:
            assert torch.equal(received.activations[row].float(), batch.activations[token].float())
            assert torch.equal(received.local_ids[row], local_ids[token])
            if batch.weights is not None:
                assert received.topk_weights is not None
                assert torch.equal(received.topk_weights[row], batch.weights[token])
            if batch.scales is not None:
                assert received.scales is not None
                assert torch.equal(received.scales[row], batch.scales[token])
            unused[row] = False
            row += 1
    assert (received.topk_weights is None, received.scales is None) == (batch.weights is None, batch.scales is None)
    assert received.activations.shape[0] == (row if room is None else room * len(batches))
    assert (received.local_ids[unused] == -1).all()


def expert_rows(received: Received, rank: int) -> torch.Tensor:
    """What the experts of `rank` make of the rows: rank + 1 times them, NaN where no row is."""
    rows = received.activations.float() * (rank + 1)
    return torch.where((received.local_ids >= 0).any(1, keepdim=True), rows, torch.nan).to(torch.bfloat16)


def expected_out(batch: Batch, num_ranks: int, sent: torch.Tensor | None = None) -> torch.Tensor:
    wanted = wanted_ranks(torch.div(batch.ids, SLOTS, rounding_mode="floor"), num_ranks)
    wanted = wanted if sent is None else wanted & sent
    times = (wanted * torch.arange(1, num_ranks + 1)).sum(1)
    return batch.activations.float() * times[:, None]


def round_trip(context: RankContext, static: bool, tokens_of_rank: list[int], top_k: int, dtype: torch.dtype) -> None:
    rank, num_ranks = context.rank, context.size
    transport, capacity = transport_of(context, static), max(tokens_of_rank) + 2
    workspaces = [lease() for _ in range(2)]
    calls = []
    for seed, workspace in enumerate(workspaces):
        batches = [
            batch_of(r, num_tokens, num_ranks * SLOTS, top_k, dtype, seed)
            for r, num_tokens in enumerate(tokens_of_rank)
        ]
        mine = batches[rank]
        complete = transport.start_dispatch(
            mine.activations, mine.ids, mine.weights, mine.flags, capacity, workspace, mine.scales
        )
        calls.append((batches, complete))
    # The second of two micro-batches in flight is done first.
    for batches, complete in reversed(calls):
        received = complete()
        assert_received(received, batches, rank, capacity if static else None)
        assert received.flags.tolist() == [0]
        out = torch.full((tokens_of_rank[rank], HIDDEN), torch.nan)
        assert transport.combine(expert_rows(received, rank), received.handle, out) is out
        assert torch.equal(out, expected_out(batches[rank], num_ranks))


CASES = [
    ([5, 0, 9], 2, torch.float32),
    ([7, 7, 1], 3, torch.bfloat16),
    ([4, 9, 6], 1, FP8_DTYPE),
    ([0, 0, 0], 2, torch.bfloat16),
]
"""Tokens per rank, top-k, dtype. Payloads of 2 * capacity * top_k bytes, of which few are multiples of 16."""


def all_round_trips(context: RankContext) -> None:
    for static in (False, True):
        for tokens_of_rank, top_k, dtype in CASES:
            round_trip(context, static, tokens_of_rank[: context.size], top_k, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_tokens_go_where_their_experts_are_and_come_back(ranks: int) -> None:
    shared_pool("cpu", 4).run(all_round_trips, ranks=ranks)


def overflow(context: RankContext) -> None:
    """Three tokens of rank 1 want rank 0, and two rows are all there is room for."""
    ids_of_rank = [[[0, 3], [4, 5]], [[0, 1], [1, 4], [2, -1]]]
    transport = transport_of(context, static=True, dispatch_capacity=2)
    batches = []
    for source, ids in enumerate(ids_of_rank):
        numbers = torch.arange(1.0, len(ids) + 1)[:, None] + 10 * source
        flags = torch.zeros(1, dtype=torch.int32)
        batches.append(
            Batch(
                numbers.expand(-1, HIDDEN), torch.tensor(ids, dtype=torch.int16), torch.ones(len(ids), 2), None, flags
            )
        )
    mine, workspace = batches[context.rank], lease()
    received = transport.dispatch(mine.activations, mine.ids, mine.weights, mine.flags, 3, workspace)
    assert_received(received, batches, context.rank, room=2)
    assert received.flags.tolist() == [ErrorFlag.CAPACITY]
    out = transport.combine(expert_rows(received, context.rank), received.handle, torch.empty(len(mine.ids), HIDDEN))
    left_out = torch.ones(len(mine.ids), 2, dtype=torch.bool)
    if context.rank == 1:
        left_out[2, 0] = False
    assert torch.equal(out, expected_out(mine, 2, left_out))
    # As many tokens as there is room for cannot overflow, and nothing of the last call is left.
    received = transport.dispatch(mine.activations[:2], mine.ids[:2], mine.weights, mine.flags, 2, workspace)
    assert received.flags.tolist() == [0]


@pytest.mark.slow
def test_overflow_is_known_on_all_ranks_and_corrupts_nothing() -> None:
    shared_pool("cpu", 4).run(overflow, ranks=2)


def flags_of(context: RankContext, static: bool) -> list[int]:
    flags = torch.tensor([[0, ErrorFlag.EXPERT_ID, ErrorFlag.ABORTED][context.rank]], dtype=torch.int32)
    nothing = torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int16), torch.empty(0, 2)
    return transport_of(context, static).dispatch(*nothing, flags, 0, lease()).flags.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_errors_of_a_rank_are_known_on_all(static: bool) -> None:
    answers = shared_pool("cpu", 4).run(flags_of, static, ranks=3)
    assert answers == [[ErrorFlag.EXPERT_ID | ErrorFlag.ABORTED]] * 3


@pytest.mark.parametrize("static", [False, True])
def test_one_rank_needs_no_group_and_fewer_tokens_leave_nothing_behind(static: bool) -> None:
    transport, workspace = CollectiveTransport(Communicator(None, 1, 0, 30.0), SLOTS, CPU, static), lease()
    for num_tokens in (6, 2, 0):
        batch = batch_of(0, num_tokens, SLOTS, 2, torch.float32)
        received = transport.dispatch(batch.activations, batch.ids, batch.weights, batch.flags, 6, workspace)
        assert_received(received, [batch], 0, 6 if static else None)
        out = transport.combine(expert_rows(received, 0), received.handle, torch.empty(num_tokens, HIDDEN))
        assert torch.equal(out, expected_out(batch, 1))


def test_send_plan_docstring_example() -> None:
    transport = CollectiveTransport(Communicator(None, 1, 0, 30.0), 4, CPU)
    ids = torch.tensor([[3, 0], [-1, -1], [2, 2]], dtype=torch.int16)
    send_rows = torch.tensor([[5], [-1], [6], [-1]], dtype=torch.int32)
    plan = transport._send_plan(ids, send_rows, torch.tensor([4], dtype=torch.int32))
    assert plan.position.flatten().tolist() == [0, -1, 1]
    assert plan.counts.tolist() == [2, 4]


def test_wanted_ranks_docstring_example() -> None:
    wanted = wanted_ranks(torch.tensor([[0, 2], [1, 1], [-1, -1]]), 3)
    assert wanted.int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FP8_DTYPE])
@pytest.mark.parametrize(
    ("static", "dispatch_capacity"), [(False, None), (True, None), (True, 30)], ids=["exact", "static", "capacity"]
)
def test_memory_is_what_a_call_takes(dtype: torch.dtype, static: bool, dispatch_capacity: int | None) -> None:
    num_tokens = 80
    batch = batch_of(0, num_tokens, SLOTS, 3, dtype)
    ids = torch.zeros_like(batch.ids)
    arena = WorkspaceArena(CPU)
    transport = CollectiveTransport(Communicator(None, 1, 0, 30.0), SLOTS, CPU, static, dispatch_capacity)
    workspace = arena.lease()
    received = transport.dispatch(
        batch.activations, ids, batch.weights, batch.flags, num_tokens, workspace, batch.scales
    )
    rows = expert_rows(received, 0)
    transport.combine(rows, received.handle, torch.empty(num_tokens, HIDDEN))
    workspace.release()
    layout = row_layout(batch.activations, ids, batch.scales)
    computed = CollectiveTransport.memory(layout, rows.dtype, 1, num_tokens, static, dispatch_capacity)
    assert 0 <= arena.nbytes - sum(computed.values()) <= 16


def test_the_scan_counts_what_is_received() -> None:
    """Rows of the scan are rows of an exact exchange, so that places computed from the one fit the other."""
    batch = batch_of(0, 9, SLOTS, 2, torch.float32)
    routing: DenseRouting = dense_routing(batch.ids[None], 0, SLOTS, places=False)
    transport = CollectiveTransport(Communicator(None, 1, 0, 30.0), SLOTS, CPU)
    received = transport.dispatch(batch.activations, batch.ids, None, batch.flags, 9, lease())
    assert routing.received_rows is not None
    here = routing.received_rows >= 0
    assert torch.equal(received.activations[routing.received_rows[here].long()], batch.activations[here])
