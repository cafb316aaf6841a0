"""Every rank has the rows of all ranks, call after call, and finds what the plain construction finds in them."""

from __future__ import annotations

import time

import pytest
import torch

from moe_plugin.config import ExpertPlacement, MoEConfig
from moe_plugin.errors import ConfigError, ExpertIdError, PeerLostError, ShapeError
from moe_plugin.kernels.dense_routing import dense_routing_reference, to_dense_ids
from moe_plugin.kernels.placement_lookup import LookupTables, placement_lookup
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors
from moe_plugin.prepare_finalize.routing_exchange import RoutingExchange
from moe_plugin.testing import shared_pool
from moe_plugin.testing.rank_pool import RankContext
from moe_plugin.workspace import WorkspaceArena

pytest.importorskip("triton")

CAPACITY, TOP_K, SLOTS = 40, 3, 5
DEVICE = "cuda" if torch.cuda.device_count() > 1 else "cpu"
SIZES = [[40, 7], [0, 33], [0, 0], [12, 40]]
"""Tokens of each rank, call by call."""


def placement_of(num_ranks: int) -> ExpertPlacement:
    """Seven experts, 0 and 1 on all ranks, and room for one more on most."""
    own = [[expert for expert in range(2, 7) if expert % num_ranks == rank] for rank in range(num_ranks)]
    return ExpertPlacement.from_table(7, [[0, 1, *experts] for experts in own])


def exchange_of(
    context: RankContext, seconds: float = 20.0, num_slots: int = SLOTS
) -> tuple[RoutingExchange, LookupTables, DeferredErrors]:
    parallel = context.parallel(timeout_seconds=seconds)
    config = MoEConfig(num_experts=7, top_k=TOP_K, hidden_size=16, intermediate_size=16, parallel=parallel)
    # The host is to be more patient than the kernel, which says who is missing.
    communicators = [
        Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, limit) for limit in (seconds, 3 * seconds)
    ]
    tables = LookupTables.of(placement_of(context.size).tables(context.device))
    errors = DeferredErrors(config, context.device, communicators[1])
    return (
        RoutingExchange(communicators[0], num_slots, TOP_K, CAPACITY, tables, errors, context.device),
        tables,
        errors,
    )


def batch_of(rank: int, num_tokens: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    topk_ids = torch.randint(-1, 7, (num_tokens, TOP_K), generator=generator, dtype=torch.int32)
    topk_ids[2::5] = -1
    return topk_ids.to(device), torch.rand(num_tokens, TOP_K, generator=generator).to(device)


def gathered(
    sizes: list[int], capacity: int, seed: int, tables: LookupTables, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What all ranks must have: ids and weights [R, C, K]."""
    ids = torch.full((len(sizes), capacity, TOP_K), -1, dtype=torch.int16, device=device)
    weights = torch.zeros(ids.shape, device=device)
    for rank, num_tokens in enumerate(sizes):
        topk_ids, weights[rank, :num_tokens] = batch_of(rank, num_tokens, seed, device)
        slot = torch.empty(topk_ids.shape, dtype=torch.int32, device=device)
        to_rank = torch.empty_like(slot)
        placement_lookup(topk_ids, tables, slot, torch.zeros_like(slot), 1, rank=to_rank, use_triton=False)
        ids[rank, :num_tokens] = to_dense_ids(to_rank, slot, SLOTS)
    return ids, weights


def check(
    exchange: RoutingExchange,
    tables: LookupTables,
    context: RankContext,
    sizes: list[int],
    seed: int,
    **options: object,
) -> None:
    """One call against the reference; without weights where seed is odd."""
    capacity = CAPACITY if seed % 3 == 0 else max(*sizes, 1)
    topk_ids, topk_weights = batch_of(context.rank, sizes[context.rank], seed, context.device)
    workspace = WorkspaceArena(context.device, poison=True).lease()
    given = None if seed % 2 else topk_weights
    ids, weights, found = exchange.gather(topk_ids, given, capacity, workspace, **options)
    all_ids, all_weights = gathered(sizes, capacity, seed, tables, context.device)
    assert torch.equal(ids, all_ids)
    if given is None:
        assert weights is None
    else:
        assert torch.equal(weights, all_weights)
    expected = dense_routing_reference(all_ids, context.rank, SLOTS, **options)
    for name in ("rows_per_rank", "send_rows", "received_rows", "expert_counts", "segment_starts", "group_ends"):
        value, right = getattr(found, name), getattr(expected, name)
        assert value is right is None or torch.equal(value, right), name
    if expected.positions is not None:
        assert torch.equal(found.places(ids), expected.places(all_ids))
        assert torch.equal(found.send_places(ids), expected.send_places(all_ids))


def calls_in_a_row(context: RankContext) -> None:
    exchange, tables, errors = exchange_of(context)
    for seed, sizes in enumerate(SIZES):
        check(exchange, tables, context, sizes, seed)
    check(exchange, tables, context, SIZES[0], 6, rows_per_expert=100)
    check(exchange, tables, context, SIZES[0], 7, alignment=16, rows=False)
    errors.raise_pending(synchronize=True)


def micro_batches_and_a_slow_rank(context: RankContext) -> None:
    """The same workspace again, whose launches repeat; results of a call stay right while others are made."""
    exchange, tables, errors = exchange_of(context)
    arena = WorkspaceArena(context.device, poison=True)
    for number in range(3):
        workspaces = [arena.lease() for _ in range(3)]
        results = []
        for seed, workspace in enumerate(workspaces):
            if context.rank == (seed + number) % 2:
                time.sleep(0.05)
            topk_ids, topk_weights = batch_of(context.rank, 9, 10 * number + seed, context.device)
            results.append(exchange.gather(topk_ids, topk_weights, 9, workspace))
        for seed, (ids, weights, found) in enumerate(results):
            all_ids, all_weights = gathered([9] * context.size, 9, 10 * number + seed, tables, context.device)
            assert torch.equal(ids, all_ids)
            assert torch.equal(weights, all_weights)
            assert torch.equal(found.places(ids), dense_routing_reference(all_ids, context.rank, SLOTS).places(all_ids))
        for workspace in workspaces:
            workspace.release()
    errors.raise_pending(synchronize=True)


def call(exchange: RoutingExchange, errors: DeferredErrors, topk_ids: torch.Tensor) -> None:
    """Raises what it flags."""
    workspace = WorkspaceArena(topk_ids.device).lease()
    exchange.gather(topk_ids, None, 20, workspace)
    errors.raise_pending(synchronize=True)


def wrong_ids_on_one_rank(context: RankContext) -> None:
    exchange, tables, errors = exchange_of(context)
    topk_ids, _ = batch_of(context.rank, 20, 0, context.device)
    if context.rank == 1:
        topk_ids[19, 1] = 7
    with pytest.raises(ExpertIdError, match=r"\[-1, 7\)"):
        call(exchange, errors, topk_ids)
    check(exchange, tables, context, [20, 3], 1)


def a_rank_that_does_not_come(context: RankContext) -> None:
    exchange, tables, errors = exchange_of(context)
    meeting = Communicator(exchange.communicator.group, context.size, context.rank, 60.0)
    check(exchange, tables, context, [4, 5], 0)
    topk_ids, _ = batch_of(context.rank, 4, 1, context.device)
    if context.rank == 0:
        exchange.communicator.timeout_seconds = 0.02
        with pytest.raises(PeerLostError, match=r"rank 1 lost or late in phase 'routing'.* in epoch 2 "):
            call(exchange, errors, topk_ids)
        exchange.communicator.timeout_seconds = 20.0
    meeting.gather_objects(None, "test")
    if context.rank == 1:
        call(exchange, errors, topk_ids)  # late, and finds what the other has left
    # Both have counted the call, so the next one is whole.
    check(exchange, tables, context, [4, 5], 2)


def limits_are_named(context: RankContext) -> None:
    exchange, _, _ = exchange_of(context)
    topk_ids, _ = batch_of(context.rank, 4, 1, context.device)
    with pytest.raises(ShapeError, match="room for 40 tokens per rank, got a capacity of 41"):
        exchange.gather(topk_ids, None, 41, WorkspaceArena(context.device).lease())
    with pytest.raises(ConfigError, match="32768 physical experts"):
        exchange_of(context, num_slots=1 << 14)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        calls_in_a_row,
        micro_batches_and_a_slow_rank,
        wrong_ids_on_one_rank,
        a_rank_that_does_not_come,
        limits_are_named,
    ],
)
def test_two_ranks(function) -> None:
    shared_pool(DEVICE, 4 if DEVICE == "cpu" else 2).run(function, ranks=2)


def test_one_rank() -> None:
    context = RankContext(0, torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu"), 1)
    exchange, _, errors = exchange_of(context, num_slots=7)
    topk_ids, topk_weights = batch_of(0, 33, 0, context.device)
    ids, weights, found = exchange.gather(
        topk_ids, topk_weights, CAPACITY, WorkspaceArena(context.device, poison=True).lease()
    )
    errors.raise_pending(synchronize=True)
    assert torch.equal(ids[0, :33], topk_ids.to(torch.int16))
    assert torch.equal(weights[0, :33], topk_weights)
    expected = dense_routing_reference(ids, 0, 7)
    assert torch.equal(found.places(ids), expected.places(ids))


def test_memory_is_that_of_two_sets() -> None:
    memory = RoutingExchange.memory(4, 8, 4096)
    assert memory == {"ids": 2 * 4 * 4096 * 8 * 2, "weights": 2 * 4 * 4096 * 8 * 4, "flags": 4 * 16 * 8}
    assert all(size % 128 == 0 for size in RoutingExchange.memory(3, 5, 7).values())
