"""Three ways to move rows in one class: NVLink kernels, torch.distributed, and rails between nodes before either.

The behaviour matrix runs the class as it chooses for itself. Here are the other choice on each kind of machine, several
nodes, and what only this class has. Without a GPU the NVLink kernels run in Triton's interpreter, between processes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import moe_plugin
from moe_plugin.config import (
    ExpertPlacement,
    Fp8Block,
    Fp8PerTensor,
    Fp8PerToken,
    MoEConfig,
    ParallelConfig,
    QuantConfig,
)
from moe_plugin.environment import Environment
from moe_plugin.errors import (
    DtypeError,
    ExpertIdError,
    HandleError,
    InputError,
    MemoryLimitError,
    PeerLostError,
    ShapeError,
)
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.kernels.dense_routing import dense_routing
from moe_plugin.kernels.pack_rows import triton
from moe_plugin.modular_kernel import (
    CONTIGUOUS_ALIGNMENT,
    ActivationFormat,
    Dispatched,
    ModularKernel,
    RouterWeightStage,
)
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.prepare_finalize import collective_transport, hybrid_dense_routing
from moe_plugin.prepare_finalize.hybrid_dense_routing import HybridDenseRouting
from moe_plugin.prepare_finalize.nvlink_transport import NUM_SETS
from moe_plugin.quantization import input_group_size, quantize_rows
from moe_plugin.testing import shared_pool
from moe_plugin.testing.cases import Case, Inputs
from moe_plugin.testing.checks import call_and_check_errors, check_call, expect, run_call
from moe_plugin.testing.pytest_tests import run_check
from moe_plugin.testing.rank_pool import RankContext
from moe_plugin.workspace import WorkspaceArena
from tests.prepare_finalize.test_nccl_all_to_all import counted_collectives
from tests.strategies.machines import CPU as CPU_MACHINE
from tests.strategies.machines import gpu, layer_config

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")


class OverNvlink(HybridDenseRouting):
    """By NVLink kernels, with few programs, since the interpreter runs them one after the other."""

    name = "over_nvlink"

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(replace(config, dispatch_transport="nvlink", dispatch_num_sms=2), arena)


class InGroups(OverNvlink):
    """The same, in expert-grouped order."""

    name = "in_groups"

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(replace(config, dispatch_permute=True), arena)


class OverCollectives(HybridDenseRouting):
    """By torch.distributed, also between GPUs that could write to each other."""

    name = "over_collectives"

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(replace(config, dispatch_transport="collective"), arena)


def register() -> None:
    for each in (OverNvlink, InGroups, OverCollectives):
        moe_plugin.register_prepare_finalize(each)


WAYS = [
    pytest.param("over_collectives", id="collective"),
    pytest.param("over_nvlink", id="nvlink", marks=needs_triton),
]
each_way = pytest.mark.parametrize("way", WAYS)


def run_on_ranks(function: Callable[..., Any], *args: Any, ranks: int, device_type: str = "cpu") -> list[Any]:
    pool = shared_pool(device_type, 4 if device_type == "cpu" else torch.cuda.device_count())
    return pool.run(_run_registered, function, args, ranks=ranks, seconds=240 if device_type == "cuda" else 90)


def _run_registered(context: RankContext, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    register()
    return function(context, *args)


def parts_of(case: Case) -> tuple[ModularKernel, HybridDenseRouting]:
    layer = case.layer
    assert isinstance(layer, ModularKernel)
    assert isinstance(layer.prepare_finalize, HybridDenseRouting)
    return layer, layer.prepare_finalize


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "row",
    [
        "dropped_ids",
        "all_to_one_rank",
        "id_out_of_range",
        "placements",
        "micro_batches_interleaved",
        "handle_misuse",
        "router_weight_on_input",
        "fp8_block",
    ],
)
def test_rows_of_the_matrix_over_nvlink(row: str) -> None:
    dtype = torch.bfloat16 if row.startswith("fp8_") else torch.float32
    run_check(row, "over_nvlink+torch_native", dtype, 2, setup=register)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "row",
    ["no_tokens", "dropped_ids", "duplicate_experts", "micro_batches_interleaved", "fp8_block"],
)
def test_rows_of_the_matrix_in_expert_grouped_order(row: str) -> None:
    dtype = torch.bfloat16 if row.startswith("fp8_") else torch.float32
    run_check(row, "in_groups+torch_native", dtype, 2, setup=register)


def rows_lie_in_groups(context: RankContext) -> list[int]:
    """The pairs of each expert of this rank as dispatched; rows of a segment are its expert's."""
    case = Case(context, "in_groups+torch_native", torch.float32, {"num_experts": 6, "top_k": 3})
    layer, _ = parts_of(case)
    inputs = case.inputs(5)
    # A row tells its token and rank apart from all others.
    tokens = torch.arange(5, device=context.device)[:, None] + 100 * context.rank
    inputs = replace(inputs, hidden_states=tokens.expand(5, case.config.hidden_size).to(torch.float32))
    dispatched = layer.prepare(*inputs.as_tuple())
    assert dispatched.activation_format is ActivationFormat.CONTIGUOUS
    assert dispatched.router_weight_stage is RouterWeightStage.COMBINE
    assert dispatched.group_ends is not None
    assert dispatched.num_rows == context.size * case.config.max_tokens_per_rank
    everyone = [case.inputs(5).topk_ids if rank == context.rank else None for rank in range(context.size)]
    ids = torch.cat(
        [
            Inputs.random(case.config, 5, context.device, rank).topk_ids if own is None else own
            for rank, own in enumerate(everyone)
        ]
    )
    start, counts = 0, []
    for slot, expert in enumerate(case.config.expert_placement.experts_of_rank[context.rank]):
        end = int(dispatched.group_ends[slot])
        rank_and_token = [divmod(row, 5) for row in (ids == expert).any(1).nonzero().flatten().tolist()]
        expected = [100.0 * rank + token for rank, token in rank_and_token]
        assert dispatched.activations[start:end, 0].tolist() == expected, f"rows of expert {expert}"
        counts.append(end - start)
        start = -(-end // CONTIGUOUS_ALIGNMENT) * CONTIGUOUS_ALIGNMENT
    layer.finalize(layer.apply_experts(dispatched), dispatched)
    return counts


@pytest.mark.slow
@needs_triton
def test_expert_grouped_rows_are_in_the_order_of_tokens() -> None:
    assert sum(map(sum, run_on_ranks(rows_lie_in_groups, ranks=2))) == 2 * 5 * 3


@pytest.mark.slow
@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("row", ["no_tokens", "dropped_ids", "id_out_of_range", "fixed_capacity", "cuda_graph_replay"])
def test_rows_of_the_matrix_over_nccl(row: str) -> None:
    run_check(row, "over_collectives+triton_fused_moe", torch.bfloat16, 2, setup=register)


def with_replicas(num_ranks: int) -> ExpertPlacement:
    """Expert 0 on every rank, so that physical ids are not those of the layer."""
    linear = ExpertPlacement.linear(8, num_ranks).experts_of_rank
    return ExpertPlacement.from_table(8, [list(dict.fromkeys((*experts, 0))) for experts in linear])


def nodes_case(context: RankContext, way: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Case:
    """Two nodes; one rank each, or two."""
    settings = {"top_k": 3, "placement": with_replicas, "max_tokens_per_rank": 6} | overrides
    return Case(context, f"{way}+torch_native", dtype, settings, num_nodes=2)


def calls_between_nodes(context: RankContext, way: str) -> None:
    case = nodes_case(context, way)
    for counts in ((5, 0, 3, 2), (1, 6, 0, 4), (0, 0, 0, 0)):
        inputs = case.inputs(counts[context.rank], seed=counts[0])
        ids = inputs.topk_ids.clone()
        ids[::3, 1], ids[1:2] = -1, -1
        check_call(case, inputs.with_ids(ids))
    # Fewer tokens announced, and a token for one rank of the other node alone.
    alone = case.inputs(2).with_ids(torch.tensor([[7, 7, -1], [-1, -1, 0]]))
    check_call(case, alone, max_num_tokens=2)
    _, dispatch = parts_of(case)
    assert list(dispatch.counters().values()) == [4]
    quantized = nodes_case(context, way, torch.bfloat16, quantization=Fp8PerToken(), hidden_size=96)
    check_call(quantized, quantized.inputs([4, 0, 6, 3][context.rank]))


on_each_device = pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu(4))])


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("ranks", [2, 4])
@on_each_device
def test_two_nodes(device_type: str, way: str, ranks: int) -> None:
    """Unequal tokens, dropped ids, replicas, fp8."""
    run_on_ranks(calls_between_nodes, way, ranks=ranks, device_type=device_type)


def errors_between_nodes(context: RankContext, way: str) -> None:
    case = nodes_case(context, way)
    last = context.rank == context.size - 1
    inputs = case.inputs(3)
    ids = inputs.topk_ids.clone()
    ids[1, 0] = 8 if last else 0
    expect(ExpertIdError, lambda: call_and_check_errors(case, inputs.with_ids(ids)), "[-1, 8)")
    check_call(case, inputs)
    states = inputs.hidden_states[:, 1:] if last else inputs.hidden_states
    expect(InputError, lambda: call_and_check_errors(case, replace(inputs, hidden_states=states)))
    with contextlib.suppress(InputError):
        case.layer.check_errors()  # the rank that was called wrongly meets its own flag too
    check_call(case, inputs)


@pytest.mark.slow
@each_way
@on_each_device
def test_errors_reach_the_ranks_of_all_nodes(device_type: str, way: str) -> None:
    run_on_ranks(errors_between_nodes, way, ranks=4, device_type=device_type)


def lost_in_node(context: RankContext) -> tuple[tuple[int, ...] | None, str]:
    _, dispatch = parts_of(nodes_case(context, "over_nvlink"))
    # As kernels report that they waited in vain for the node's second rank, in epoch 5 of combine.
    dispatch._errors.kernel_words()[6:].view(torch.int64).fill_(5 << 16 | 2 << 8 | 2)
    with pytest.raises(PeerLostError, match="in epoch 5 of") as caught:
        dispatch.check_errors()
    return caught.value.ranks, caught.value.phase


@pytest.mark.slow
@needs_triton
def test_ranks_of_a_node_are_named_by_their_number_in_the_world() -> None:
    assert run_on_ranks(lost_in_node, ranks=4) == [((1,), "combine")] * 2 + [((3,), "combine")] * 2


def wrong_on_one_tp_rank(context: RankContext) -> str:
    case = Case(context, "over_collectives+torch_native", torch.float32, tp_size=2)
    inputs = case.inputs(4)
    states = inputs.hidden_states[:, 1:] if context.rank == 3 else inputs.hidden_states
    words = expect(ShapeError, lambda: case.layer(states, inputs.topk_ids, inputs.topk_weights))
    check_call(case, inputs)
    return words


@pytest.mark.slow
def test_a_mistake_on_one_tp_rank_is_the_same_error_everywhere() -> None:
    (words,) = set(run_on_ranks(wrong_on_one_tp_rank, ranks=4))
    assert words.startswith("EP rank 1, TP rank 1: hidden_states must be [T, 64]")


def third_micro_batch(context: RankContext) -> None:
    case = Case(context, "over_nvlink+torch_native", torch.float32, {"max_tokens_per_rank": 8})
    layer, _ = parts_of(case)
    batches = [case.inputs(4, seed=seed) for seed in range(NUM_SETS)]
    for _ in range(2):
        flying = [layer.prepare(*batch.as_tuple()) for batch in batches]
        expect(HandleError, lambda: layer.prepare(*batches[0].as_tuple()), f"{NUM_SETS} micro-batches", "finalize")
        for batch, dispatched in reversed(list(zip(batches, flying, strict=True))):
            out = layer.finalize(layer.apply_experts(dispatched), dispatched)
            assert_close_to_oracle(out, case.expected(batch), case.tolerance)


@pytest.mark.slow
@needs_triton
def test_more_micro_batches_than_there_are_buffers_for() -> None:
    run_on_ranks(third_micro_batch, ranks=2)


def again(context: RankContext, way: str, num_nodes: int) -> list[tuple[int, list[str]]]:
    """Scans and collectives of a first and of a second dispatch."""
    case = nodes_case(context, way) if num_nodes > 1 else Case(context, f"{way}+torch_native", torch.float32)
    layer, dispatch = parts_of(case)
    inputs = case.inputs([5, 2][context.rank])

    def finish(dispatched: Dispatched, states: torch.Tensor) -> None:
        out = layer.finalize(layer.apply_experts(dispatched), dispatched)
        expected = case.expected(Inputs(states, inputs.topk_ids, inputs.topk_weights))
        assert_close_to_oracle(out, expected, case.tolerance)

    scan = mock.patch.object(collective_transport, "dense_routing", side_effect=dense_routing)
    with counted_collectives() as first, scan as scans_of_first:
        dispatched = layer.prepare(*inputs.as_tuple())
    flying = dispatch.prepare_again(2 * inputs.hidden_states, dispatched.handle)
    finish(flying, 2 * inputs.hidden_states)
    finish(dispatched, inputs.hidden_states)
    with counted_collectives() as second, scan as scans_of_second:
        later = dispatch.prepare_again(-inputs.hidden_states, dispatched.handle)
    finish(later, -inputs.hidden_states)
    wrongs = inputs.hidden_states[:1], inputs.hidden_states.half()
    for error, wrong in zip((ShapeError, DtypeError), wrongs, strict=True):
        # With NVLink kernels only the rank itself knows in what way it was called wrongly.
        expected = error if context.rank == 0 or way == "over_collectives" else InputError
        states = wrong if context.rank == 0 else inputs.hidden_states
        expect(expected, lambda states=states: dispatch.prepare_again(states, later.handle))  # type: ignore[misc]
        finish(dispatch.prepare_again(inputs.hidden_states, later.handle), inputs.hidden_states)
    check_call(case, inputs)
    return [(scans_of_first.call_count, first), (scans_of_second.call_count, second)]


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_second_dispatch_with_the_same_routing(way: str, num_nodes: int) -> None:
    """Before and after finalize; nothing is scanned again."""
    # A node of one rank has nothing to exchange inside.
    calls = ["all_gather"] if num_nodes > 1 else ["all_gather", "all_to_all"] if way == "over_collectives" else []
    for seen in run_on_ranks(again, way, num_nodes, ranks=2):
        assert seen == [(way == "over_collectives", calls), (0, calls)]


def test_a_handle_of_another_object_is_refused() -> None:
    ours, others = (on_one_rank() for _ in range(2))
    x = torch.ones(2, 32)
    dispatched = ours.prepare(x, torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2))
    with pytest.raises(HandleError, match="prepare_again"):
        others.prepare_again(x, dispatched.handle)


LAYER: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 2,
    "hidden_size": 32,
    "intermediate_size": 16,
    "dtype": torch.float32,
    "max_tokens_per_rank": 12,
}


def on_one_rank(cls: type[HybridDenseRouting] = HybridDenseRouting, **changes: Any) -> HybridDenseRouting:
    dispatch = cls(MoEConfig(**(LAYER | changes)), WorkspaceArena(CPU, poison=True))
    dispatch.accommodate(TorchNative)
    return dispatch


@pytest.mark.parametrize(
    "cls",
    [OverCollectives, pytest.param(OverNvlink, marks=needs_triton)],
    ids=["collective", "nvlink"],
)
@pytest.mark.parametrize("scheme", [Fp8Block(), Fp8PerToken(), Fp8PerTensor()], ids=lambda scheme: scheme.name)
def test_rows_travel_quantized(cls: type[HybridDenseRouting], scheme: QuantConfig) -> None:
    dispatch = on_one_rank(cls, quantization=scheme, hidden_size=160, dtype=torch.bfloat16)
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    dispatched = dispatch.prepare(x, torch.tensor([[3, -1]] * 5), torch.ones(5, 2))
    values, scales = quantize_rows(x, input_group_size(scheme))
    assert dispatched.scales is not None
    assert dispatched.activations.dtype is torch.float8_e4m3fn
    assert torch.equal(dispatched.activations[:5].float(), values.float())
    assert torch.equal(dispatched.scales[:5], scales)


@pytest.mark.parametrize("scheme", [Fp8PerTensor(static_activations=True), Fp8Block(64, 64)], ids=["static", "tiles"])
def test_rows_that_the_experts_quantize_travel_as_they_are(scheme: QuantConfig) -> None:
    dispatch = on_one_rank(quantization=scheme, dtype=torch.bfloat16)
    dispatched = dispatch.prepare(
        torch.ones(3, 32, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    )
    assert (dispatched.scales, dispatched.activations.dtype) == (None, torch.bfloat16)


def test_which_transport_runs_and_why_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    hybrid_dense_routing._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "moe_plugin"):
        dispatches = [on_one_rank() for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "hybrid_dense_routing moves rows between 1 rank(s) of a node over torch.distributed: no CUDA device"
    ]
    assert dispatches[0].counters() == {"collective": 0}
    assert dispatches[0].num_sms is None
    if triton is not None:
        forced = on_one_rank(OverNvlink)
        assert (forced.counters(), forced.num_sms) == ({"nvlink": 0}, 2)


def test_it_has_to_know_its_experts_first() -> None:
    dispatch = HybridDenseRouting(MoEConfig(**LAYER), WorkspaceArena(CPU))
    with pytest.raises(HandleError, match="accommodate"):
        dispatch.prepare(torch.ones(1, 32), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2))


def spread(num_nodes: int, ep_size: int = 8, **changes: Any) -> MoEConfig:
    config = layer_config(**changes)
    return replace(config, placement=None, parallel=ParallelConfig(ep_size=ep_size, num_nodes=num_nodes))


@pytest.mark.parametrize(
    ("config", "gate", "words"),
    [
        (spread(1, 8, num_experts=32769), "num_experts", "32776 with replicas"),
        (replace(spread(1, 2), parallel=ParallelConfig(ep_size=2, tp_size=4, num_nodes=8)), "num_nodes", "8 for ep"),
        (spread(2, cuda_graph=True, dispatch_capacity=64), "dispatch_capacity", "64, num_nodes 2"),
        (spread(1, dispatch_num_sms=133), "dispatch_num_sms", "needs at most 132, saw 133"),
    ],
    ids=["ids", "ranks", "capacity", "sms"],
)
def test_gates(config: MoEConfig, gate: str, words: str) -> None:
    verdict = HybridDenseRouting.supports(config, gpu(90))
    assert [failed.name for failed in verdict.failed] == [gate]
    assert words in verdict.reason


def test_what_gates_let_pass() -> None:
    for config in (spread(4), spread(1, 32, num_experts=32767 // 32 * 32), spread(2, dispatch_capacity=64)):
        assert HybridDenseRouting.supports(config, gpu(90)).ok
        assert HybridDenseRouting.supports(config, CPU_MACHINE).ok
        assert HybridDenseRouting.host_syncs(config, gpu(90)) == 0


@pytest.mark.parametrize(
    ("environment", "num_nodes", "words"),
    [
        (gpu(90), 1, "NVLink kernels on at most 24 SMs, 2 micro-batches in flight"),
        (gpu(90, peer_access=False), 1, "torch.distributed: GPUs of this host without peer access"),
        (gpu(75), 1, "torch.distributed: the kernels need SM 80, saw SM 75"),
        (gpu(90, packages={}), 1, "torch.distributed: Triton is not there to compile kernels"),
        (CPU_MACHINE, 1, "torch.distributed: no CUDA device"),
        (gpu(90), 2, "NVLink kernels on at most 24 SMs, 2 micro-batches in flight"),
    ],
)
def test_the_report_says_what_moves_rows(environment: Environment, num_nodes: int, words: str) -> None:
    details = dict(HybridDenseRouting.details(spread(num_nodes), environment))
    assert details.pop("transport") == words
    assert details == ({} if num_nodes == 1 else {"nodes": "2 of 4 ranks, rails of torch.distributed between them"})


def test_too_many_ranks_for_the_kernels_of_a_node() -> None:
    config = spread(1, 64, num_experts=64)
    assert "32 ranks of a node, and there are 64" in HybridDenseRouting.details(config, gpu(90))["transport"]
    assert (
        "NVLink" in HybridDenseRouting.details(replace(config, parallel=spread(2, 64).parallel), gpu(90))["transport"]
    )


@pytest.mark.parametrize(
    "cls", [OverCollectives, pytest.param(OverNvlink, marks=needs_triton)], ids=["collective", "nvlink"]
)
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 33, "top_k": 3}, {"max_tokens_per_rank": 100}])
def test_memory_is_enough_for_a_call(cls: type[HybridDenseRouting], changes: dict[str, Any]) -> None:
    dispatch = on_one_rank(cls, cuda_graph=True, **changes)
    config = dispatch.config
    x = torch.ones(config.max_tokens_per_rank, config.hidden_size)
    ids = torch.zeros(len(x), config.top_k, dtype=torch.int32)
    dispatched = dispatch.prepare(x, ids, torch.ones(ids.shape))
    dispatch.finalize(torch.zeros_like(dispatched.activations).contiguous(), dispatched.handle)
    computed = dispatch.memory(config)
    taken = dispatch.arena.nbytes
    if dispatch._nvlink is not None:
        taken += dispatch._nvlink._buffers.sets[0].memory.nbytes
        # Regions start at multiples of 128 bytes.
        assert taken <= sum(computed.values()) + NUM_SETS * 128 * len(computed)
        assert all(size > 0 for name, size in computed.items() if "scales" not in name)
    else:
        assert taken <= sum(computed.values()) + 64


def test_memory_grows_with_tokens_ranks_and_nodes() -> None:
    def needed(config: MoEConfig) -> int:
        return sum(HybridDenseRouting.memory(config).values())

    assert needed(spread(1, 2)) < needed(spread(1, 8)) < needed(spread(2, 8))
    assert needed(spread(1, 2)) < needed(spread(1, 2, max_tokens_per_rank=8192))


def test_too_much_memory_is_refused_before_it_is_taken() -> None:
    config = MoEConfig(**LAYER | {"max_tokens_per_rank": 1 << 20})
    weights = {"w13": torch.ones(8, 32, 32), "w2": torch.ones(8, 32, 16)}
    small = Environment.probe("cpu").pretend(memory_bytes=64 << 20)
    with pytest.raises(MemoryLimitError, match="the largest that fits is max_tokens_per_rank=") as caught:
        moe_plugin.build(config, **weights, strategy="hybrid_dense_routing+torch_native", environment=small)
    assert caught.value.largest_fit is not None
    assert 1 < caught.value.largest_fit < 1 << 20


@pytest.mark.gpu
def test_symmetric_memory_beyond_the_device_is_refused() -> None:
    config = MoEConfig(**LAYER | {"max_tokens_per_rank": 1 << 30})
    dispatch = HybridDenseRouting(config, WorkspaceArena("cuda"))
    with pytest.raises(MemoryLimitError, match="GiB of symmetric memory for 1073741824 tokens") as caught:
        dispatch.accommodate(TorchNative)
    assert caught.value.largest_fit is not None
    assert 0 < caught.value.largest_fit < 1 << 30


def late_rank(context: RankContext) -> tuple[tuple[int, ...] | None, str]:
    """Who was missing where: rank 1 comes to its second call when rank 0 has given that up."""
    case = Case(context, "over_nvlink+torch_native", torch.float32, {"max_tokens_per_rank": 4})
    _, dispatch = parts_of(case)
    assert dispatch._nvlink is not None
    # Of kernels alone: a busy machine may take longer over what gloo does.
    dispatch._nvlink._limit_ns = 2_000_000_000
    inputs, group = case.inputs(3), case.config.parallel.ep_group
    check_call(case, inputs)
    if context.rank == 1:
        torch.distributed.barrier(group=group)
    with pytest.raises(PeerLostError, match=["in epoch 2 of", "its rows are void"][context.rank]) as caught:
        case.layer(*inputs.as_tuple())
    lost = caught.value.ranks, caught.value.phase
    if context.rank == 0:
        torch.distributed.barrier(group=group)
    torch.distributed.barrier(group=group)
    for seed in range(3):
        check_call(case, case.inputs(4, seed=seed))
    return lost


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs tests/prepare_finalize/test_lost_peer.py has it there")
def test_a_late_rank_is_named_and_welcome_in_the_next_call() -> None:
    """Rank 1 finds what rank 0 has sent, and with it that rank 0 has given that call up."""
    assert run_on_ranks(late_rank, ranks=2) == [((1,), "dispatch"), (None, "exchange")]


def replays_on_rank(context: RankContext, num_nodes: int, replays: int) -> int:
    """Replays with a wrong value."""
    layer = {"cuda_graph": True, "max_tokens_per_rank": 16, "num_experts": 16, "top_k": 4}
    case = Case(context, "hybrid_dense_routing+triton_fused_moe", torch.bfloat16, layer, num_nodes=num_nodes)
    batches = [case.inputs(16, seed=seed) for seed in range(8)]
    for batch, live in zip(batches, (16, 0, 5, 16, 1, 16, 9, 16), strict=True):
        batch.topk_ids[live if context.rank % 2 else 16 :] = -1
    expected = [run_call(case, batch).clone() for batch in batches]
    for batch, out in zip(batches, expected, strict=True):
        assert_close_to_oracle(out, case.expected(batch), case.tolerance)
    static = case.inputs(16)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = case.layer(*static.as_tuple())
    wrong = torch.zeros((), dtype=torch.int64, device=context.device)
    for replay in range(replays):
        which = replay % len(batches)
        for target, source in zip(static.as_tuple(), batches[which].as_tuple(), strict=True):
            target.copy_(source)
        graph.replay()
        wrong += (out != expected[which]).any()
    case.layer.check_errors()
    return int(wrong)


@pytest.mark.slow
@pytest.mark.multi_gpu(2)
def test_ten_thousand_replays() -> None:
    assert run_on_ranks(replays_on_rank, 1, 10_000, ranks=2, device_type="cuda") == [0, 0]


@pytest.mark.slow
@pytest.mark.multi_gpu(4)
def test_replays_on_two_nodes() -> None:
    assert run_on_ranks(replays_on_rank, 2, 500, ranks=4, device_type="cuda") == [0] * 4
