"""What only the low-latency class has, against the double of DeepEP; the behaviour matrix has the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

import moe_plugin
from moe_plugin.compat import deep_ep
from moe_plugin.config import ExpertPlacement, Fp8Block, Fp8PerToken, MoEConfig, ParallelConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ExpertIdError, HandleError, ShapeError
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.kernels.pack_rows import triton
from moe_plugin.modular_kernel import ActivationFormat, Dispatched, ModularKernel, RouterWeightStage
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deepep_low_latency import DeepEPLowLatency, buffer_bytes
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors
from moe_plugin.quantization import FP8_DTYPE, unpack_ue8m0
from moe_plugin.strategies.report import Entry
from moe_plugin.strategies.selector import explain
from moe_plugin.testing import shared_pool
from moe_plugin.testing.cases import Case, Inputs, tokens_of_rank
from moe_plugin.testing.checks import call_and_check_errors, check_call, expect
from moe_plugin.testing.rank_pool import RankContext
from moe_plugin.workspace import Workspace
from tests.doubles import deep_ep as double
from tests.doubles import deep_gemm as deep_gemm_double
from tests.strategies.machines import CPU, DEEP_EP, TRITON, gpu

BF16 = torch.bfloat16
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")


class InPlace(DeepEPLowLatency):
    """As between nodes, where combine takes rows from where experts wrote them."""

    name = "low_latency_in_place"
    zero_copy: ClassVar[bool | None] = True


class Writing(TorchNative):
    """Writes to the memory that it is given, whatever its strides."""

    name = "writing"
    writes_strided = True

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        rows = super().apply(dispatched, workspace)
        return rows if output is None else output.copy_(rows)


class Packed(TorchNative):
    """Wants scales packed, on every device."""

    name = "packed"
    ue8m0_from_sm = 0

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        scales = dispatched.scales
        if scales is not None:
            assert scales.dtype is torch.int32
            dispatched = replace(dispatched, scales=unpack_ue8m0(scales, self.config.hidden_size // 128))
        return super().apply(dispatched, workspace)


def on_ranks(function: Callable[[RankContext], Any], ranks: int = 2) -> list[Any]:
    return shared_pool("cpu", 4).run(_with_double, function, ranks=ranks)


def _with_double(context: RankContext, function: Callable[[RankContext], Any]) -> Any:
    moe_plugin.register_prepare_finalize(InPlace)
    moe_plugin.register_experts(Writing)
    moe_plugin.register_experts(Packed)
    with double.installed(), deep_gemm_double.installed():
        try:
            return function(context)
        finally:
            deep_ep.release_buffers()


def make(context: RankContext, strategy: str = "deepep_low_latency+torch_native", **overrides: Any) -> Case:
    return Case(context, strategy, BF16, overrides)


def kernel(case: Case) -> ModularKernel:
    assert isinstance(case.layer, ModularKernel)
    return case.layer


def check(out: torch.Tensor, case: Case, inputs: Inputs) -> None:
    assert_close_to_oracle(out, case.expected(inputs), case.tolerance)


def rows_sent_from_where_they_were_written(context: RankContext, experts: str) -> None:
    case = make(context, f"low_latency_in_place+{experts}", top_k=3)
    for seed in range(3):  # an odd number of dispatches in either half
        check_call(case, case.inputs(tokens_of_rank(context, 1, 7, 0, 3), seed))
    counters = case.layer.counters()
    assert counters["low_latency_in_place.zero_copy"] == counters["low_latency_in_place.bf16"] == 3
    layer, inputs = kernel(case), case.inputs(5)
    dispatched = layer.prepare(*inputs.as_tuple())
    rows = layer.apply_experts(dispatched)
    assert not rows.is_contiguous()
    check(layer.finalize_async(rows, dispatched).wait(), case, inputs)


@pytest.mark.parametrize("experts", ["writing", pytest.param("triton_fused_moe", marks=needs_triton)])
def test_rows_sent_from_where_they_were_written(experts: str) -> None:
    on_ranks(functools.partial(rows_sent_from_where_they_were_written, experts=experts))


def rows_that_are_copied(context: RankContext) -> None:
    """By experts that take no such memory, and between ranks of one node, where it is not worth it."""
    for strategy in ("low_latency_in_place+torch_native", "deepep_low_latency+writing"):
        case = make(context, strategy)
        check_call(case, case.inputs(4))
        assert "zero_copy" not in str(case.layer.counters())


def test_rows_that_are_copied() -> None:
    on_ranks(rows_that_are_copied)


def rows_lent_when_the_next_call_starts(context: RankContext) -> None:
    """They are saved, and nothing is lent any more."""
    case = make(context, "low_latency_in_place+writing")
    layer, (a, b) = kernel(case), (case.inputs(6, seed=seed) for seed in (1, 2))
    first = layer.prepare(*a.as_tuple())
    rows_a = layer.apply_experts(first)
    second = layer.prepare(*b.as_tuple())
    rows_b = layer.apply_experts(second)
    assert not rows_a.is_contiguous()
    assert rows_b.is_contiguous()
    check(layer.finalize(rows_a, first), case, a)
    check(layer.finalize(rows_b, second), case, b)
    check_call(case, a)
    assert "zero_copy" not in str(layer.counters())


def test_rows_lent_when_the_next_call_starts() -> None:
    on_ranks(rows_lent_when_the_next_call_starts)


def calls_in_flight(context: RankContext) -> None:
    case = make(context)
    layer, inputs = kernel(case), case.inputs(4)
    other = make(context)  # the halves are those of the group
    dispatched = [each.prepare(*inputs.as_tuple()) for each in (layer, kernel(other))]
    expect(HandleError, lambda: layer.prepare(*inputs.as_tuple()), "2 low-latency calls are in flight")
    wrong = Inputs(inputs.hidden_states[:, 1:], inputs.topk_ids, inputs.topk_weights)
    expect(
        ShapeError if context.rank == 0 else HandleError,
        lambda: layer.prepare(*(wrong if context.rank == 0 else inputs).as_tuple()),
    )
    check(layer.finalize(layer.apply_experts(dispatched[0]), dispatched[0]), case, inputs)
    third = layer.prepare(*inputs.as_tuple())
    for owner, each in ((kernel(other), dispatched[1]), (layer, third)):
        check(owner.finalize(owner.apply_experts(each), each), case, inputs)
    dropped = layer.prepare(*inputs.as_tuple())
    del dropped  # given up, on all ranks
    layer.prepare(*inputs.as_tuple())
    check_call(case, inputs)


def test_two_calls_in_flight_and_no_third() -> None:
    on_ranks(calls_in_flight)


def halves_out_of_turn(context: RankContext) -> None:
    """Each kernel is received before the next is launched, in whatever order receivers are waited for."""
    case = make(context, num_experts=6, top_k=3)
    layer, (a, b) = kernel(case), (case.inputs(tokens_of_rank(context, 1, 6, 4), seed=seed) for seed in (1, 2))
    first, second = (layer.prepare_async(*each.as_tuple()) for each in (a, b))
    dispatched_b, dispatched_a = second.wait(), first.wait()
    rows_a, rows_b = layer.apply_experts(dispatched_a), layer.apply_experts(dispatched_b)
    out = torch.full_like(a.hidden_states, torch.nan)
    done_a = layer.finalize_async(rows_a, dispatched_a, out)
    done_b = layer.finalize_async(rows_b, dispatched_b)
    third = layer.prepare_async(*a.as_tuple())
    check(done_b.wait(), case, b)
    assert done_a.wait() is out
    check(out, case, a)
    dispatched = third.wait()
    check(layer.finalize(layer.apply_experts(dispatched), dispatched), case, a)


def test_halves_out_of_turn() -> None:
    on_ranks(halves_out_of_turn)


def without_the_rest(context: RankContext) -> None:
    """An installation without hooks, and without a way to say where results go."""
    case = make(context)
    layer = kernel(case)
    assert isinstance(layer.prepare_finalize, DeepEPLowLatency)
    layer.prepare_finalize._features = frozenset({"low_latency"})
    inputs = case.inputs(5)
    receiver = layer.prepare_async(*inputs.as_tuple())
    dispatched = receiver.wait()
    out = torch.empty_like(inputs.hidden_states)
    assert layer.finalize_async(layer.apply_experts(dispatched), dispatched, out).wait() is out
    check(out, case, inputs)


def test_an_installation_without_hooks() -> None:
    on_ranks(without_the_rest)


def quantized_rows_travel(context: RankContext) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 128, "num_experts": 4}
    for experts in ("torch_native", "deep_gemm_hybrid", "triton_fused_moe")[: 1 if triton is None else 3]:
        case = make(context, f"deepep_low_latency+{experts}", quantization=Fp8Block(), **sizes)
        inputs = case.inputs(tokens_of_rank(context, 1, 33, 20))
        dispatched = kernel(case).prepare(*inputs.as_tuple())
        assert dispatched.activations.dtype is FP8_DTYPE
        assert dispatched.scales is not None
        # Column by column, as DeepGEMM reads them.
        assert dispatched.scales.shape == (2, 128, 4)
        assert dispatched.scales.stride() == (4 * 128, 1, 128)
        out = kernel(case).finalize(kernel(case).apply_experts(dispatched), dispatched)
        check(out, case, inputs)
        assert case.layer.counters()["deepep_low_latency.fp8"] == 1
    for other in ({"quantization": Fp8PerToken()}, {"quantization": Fp8Block(), "hidden_size": 192}, {}):
        case = make(context, **{**sizes, **other})
        check_call(case, case.inputs(33))
        assert case.layer.counters() == {"deepep_low_latency.bf16": 1}


def test_quantized_rows_travel() -> None:
    on_ranks(quantized_rows_travel)


def packed_scales(context: RankContext) -> None:
    settings = {"hidden_size": 512, "intermediate_size": 128, "quantization": Fp8Block()}
    case = make(context, "deepep_low_latency+packed", **settings)
    inputs = case.inputs(33)
    # Groups whose scale is 2^-7 in any case.
    inputs.hidden_states.clamp_(-3.5, 3.5).unflatten(1, (4, 128))[..., 5] = 3.5
    check_call(case, inputs)
    assert case.layer.counters() == {"deepep_low_latency.fp8": 1}
    # One that cannot pack them leaves quantization to the experts.
    part = kernel(case).prepare_finalize
    assert isinstance(part, DeepEPLowLatency)
    part._features -= {"ue8m0"}
    part.accommodate(Packed)
    check_call(case, inputs)
    assert case.layer.counters() == {"deepep_low_latency.fp8": 1, "deepep_low_latency.bf16": 1}


def test_scales_packed_where_the_experts_ask() -> None:
    on_ranks(packed_scales)


def uneven_ranks(context: RankContext) -> None:
    def uneven(num_ranks: int) -> ExpertPlacement:
        return ExpertPlacement.from_table(5, [[4, 0, 2, 1], [0, 3]])

    for strategy in ("deepep_low_latency+torch_native", "deepep_low_latency+writing", "low_latency_in_place+writing"):
        case = make(context, strategy, num_experts=5, top_k=3, placement=uneven)
        check_call(case, case.inputs(tokens_of_rank(context, 1, 9, 4)))
        dispatched = kernel(case).prepare(*case.inputs(3).as_tuple())
        assert dispatched.activation_format is ActivationFormat.BATCHED_EXPERTS
        assert dispatched.router_weight_stage is RouterWeightStage.COMBINE
        assert dispatched.activations.shape == (4 - 2 * context.rank, 128, 64)
        assert dispatched.activations.is_contiguous()
        given = kernel(case).prepare_finalize.expert_output(dispatched.handle)
        # Room for four slots on the rank that has two; where rows are sent from it there is always room.
        assert (given is None) == (context.rank == 0 and "in_place" not in strategy)
        kernel(case).finalize(kernel(case).apply_experts(dispatched), dispatched)
    empty = make(context, num_experts=1, top_k=1, apply_router_weight_on_input=True)
    check_call(empty, empty.inputs(4))


def test_uneven_ranks_and_one_without_experts() -> None:
    on_ranks(uneven_ranks)


def experts_named_twice(context: RankContext) -> None:
    """By every token of a full batch: DeepEP has room for each token once per expert."""
    case = make(context, top_k=3)
    inputs = case.inputs(64)
    ids = torch.tensor([[1, 1, 6], [5, 0, 5], [7, 7, 7], [2, -1, 2]]).repeat(16, 1)
    check_call(case, inputs.with_ids(ids))


def test_experts_named_twice_never_overflow() -> None:
    on_ranks(experts_named_twice)


def layers_of_several_shapes(context: RankContext) -> None:
    """Counters of one lie where the other has rows, so they are cleaned between calls, and only then."""
    few, many = make(context, num_experts=4), make(context, num_experts=80, top_k=3)
    for case in (few, many, many, few):
        check_call(case, case.inputs(5))
    a, b = few.inputs(5), many.inputs(4)
    first, second = kernel(few).prepare(*a.as_tuple()), kernel(many).prepare(*b.as_tuple())
    check(kernel(many).finalize(kernel(many).apply_experts(second), second), many, b)
    check(kernel(few).finalize(kernel(few).apply_experts(first), first), few, a)
    between = kernel(few).prepare(*a.as_tuple())
    larger = make(context, num_experts=8, max_tokens_per_rank=600)
    expect(HandleError, lambda: kernel(few).finalize(kernel(few).apply_experts(between), between), "replaced")
    check_call(larger, larger.inputs(600))  # also more than the queues of the first buffer held
    deep_ep.release_buffers()
    expect(HandleError, lambda: few.layer(*a.as_tuple()), "released")


def test_layers_of_several_shapes() -> None:
    on_ranks(layers_of_several_shapes)


def errors_together(context: RankContext) -> None:
    case = make(context)
    layer, inputs = kernel(case), case.inputs(3)
    ids = inputs.topk_ids.clone()
    if context.rank == 1:
        ids[2, 1] = 8
    message = expect(ExpertIdError, lambda: call_and_check_errors(case, inputs.with_ids(ids)), "[-1, 8)")
    assert "EP rank 1" in message
    check_call(case, inputs)
    # What calls on GPUs leave behind is told to all at a host point.
    parallel = case.config.parallel
    ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, 30.0)
    errors, tp = DeferredErrors(case.config, torch.device("cpu")), Communicator(None, 1, 0, 30.0)
    errors.raise_gathered(ep, tp)
    if context.rank == 0:
        errors.refused(ShapeError("topk_ids must be [3, 2]"))
        errors.refused(ShapeError("a later one"))
    else:
        errors.kernel_word().fill_(1)
    assert "EP rank 0: topk_ids must be [3, 2]" in expect(ShapeError, lambda: errors.raise_gathered(ep, tp))
    errors.raise_gathered(ep, tp)
    if context.rank == 1:
        errors.kernel_word().fill_(1)
    assert "EP rank 1" in expect(ExpertIdError, lambda: errors.raise_gathered(ep, tp))
    assert layer.counters() == {"deepep_low_latency.bf16": 1}


def test_errors_are_raised_together() -> None:
    on_ranks(errors_together)


def outputs_of_all_kinds(context: RankContext) -> None:
    case = make(context)
    inputs = case.inputs(5)
    wide = torch.full((5, 128), torch.nan, dtype=BF16)
    shifted = torch.full((5 * 64 + 1,), torch.nan, dtype=BF16)[1:].view(5, 64)
    for out in (wide[:, :64], wide[:, 64:], shifted):
        assert check_call(case, inputs, out=out) is out
    misaligned = torch.empty(5 * 64 + 1, dtype=BF16)[1:].view(5, 64).copy_(inputs.hidden_states)
    check_call(case, replace(inputs, hidden_states=misaligned))


def test_outputs_and_inputs_that_kernels_cannot_take() -> None:
    on_ranks(outputs_of_all_kinds)


def tensor_parallel(context: RankContext) -> None:
    case = Case(context, "deepep_low_latency+torch_native", BF16, {}, tp_size=2)
    check_call(case, case.inputs(tokens_of_rank(context, 2, 5, 3)))
    ids = case.inputs(3).topk_ids
    wrong = case.inputs(3).with_ids(ids.fill_(8) if context.rank == 3 else ids)
    expect(ExpertIdError, lambda: case.layer(*wrong.as_tuple()), "EP rank 1, TP rank 1")
    check_call(case, case.inputs(3))


def test_tensor_parallel() -> None:
    on_ranks(tensor_parallel, ranks=4)


def machine(features: frozenset[str] = DEEP_EP.features, sm: int = 90) -> Environment:
    return gpu(sm, packages=TRITON | {"deep_ep": replace(DEEP_EP, features=features)})


def config(ep_size: int = 8, **changes: Any) -> MoEConfig:
    defaults = {"num_experts": 256, "top_k": 8, "hidden_size": 2048, "intermediate_size": 512}
    settings = {"max_tokens_per_rank": 100} | defaults | changes
    return MoEConfig(**settings, parallel=ParallelConfig(ep_size=ep_size))


def entry(layer: MoEConfig, environment: Environment) -> Entry:
    return explain(layer, "deepep_low_latency+triton_fused_moe", environment).entry("decode")


@pytest.mark.parametrize(
    ("changes", "environment", "gate", "words"),
    [
        ({"dtype": torch.float16}, machine(), "dtype", "bfloat16: DeepEP combines nothing else"),
        ({}, gpu(90, packages=TRITON), "deep_ep low_latency network card", "build it from"),
        ({}, machine(frozenset({"ElasticBuffer", "rdma"})), "low_latency", "saw ElasticBuffer"),
        ({}, machine(DEEP_EP.features - {"rdma"}), "network card", "set MOE_PLUGIN_DEEPEP_NVLINK_ONLY=1"),
        ({}, machine(sm=80), "sm", "SM 90 or newer"),
        ({"ep_size": 1}, machine(), "ep_size", "2 or more"),
        ({"hidden_size": 4096}, machine(), "hidden_size", "one of 2048, for which"),
        (
            {"hidden_size": 3072},
            machine(DEEP_EP.features - {"ll_hidden_2048"}),
            "hidden_size",
            "2048, 2560, 4096, 5120",
        ),
        ({"top_k": 12}, machine(), "top_k", "at most 11"),
        ({"num_experts": 1849}, machine(), "num_experts", "at most 1848"),
        ({}, CPU.pretend(packages=machine().packages, triton_interpret=True), "sm", "no CUDA device"),
    ],
)
def test_refusals(changes: dict[str, Any], environment: Environment, gate: str, words: str) -> None:
    verdict = DeepEPLowLatency.supports(config(**changes), environment)
    assert " ".join(each.name for each in verdict.failed) == gate
    assert words in verdict.reason


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("way", ["rdma", "nvlink_only"])
def test_it_runs_on_gpus_and_waits_for_nothing(way: str, cuda_graph: bool) -> None:
    found = entry(config(cuda_graph=cuda_graph), machine(DEEP_EP.features - {"rdma"} | {way}))
    assert found.runs, found.verdict.reason
    assert found.host_syncs == 0


def test_what_the_report_says() -> None:
    found = entry(config(), machine())
    assert "NVLink, at most 112 tokens of a rank, 2 calls in flight" in str(found.details)
    assert "bf16; combined in bf16" in str(found.details)
    between = entry(config(16, quantization=Fp8Block()), machine())
    assert "RDMA between nodes, without a copy" in str(between.details)
    assert "fp8 to experts that take them quantized" in str(between.details)


@pytest.mark.parametrize(
    ("max_tokens", "hidden", "ranks", "experts", "expected"),
    [(128, 7168, 4, 256, 1908e6), (64, 2048, 2, 16, None), (130, 64, 2, 6, None), (1, 512, 4, 4, None)],
)
def test_the_size_of_the_buffer(max_tokens: int, hidden: int, ranks: int, experts: int, expected: float | None) -> None:
    size = buffer_bytes(deep_ep.LowLatencyShape(max_tokens, hidden, experts))
    if hidden % 128 == 0:
        assert size == double.Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, ranks, experts)
    assert expected is None or abs(size / expected - 1) < 1e-3


def test_memory_is_known_before_anything_is_allocated() -> None:
    shape = deep_ep.LowLatencyShape(112, 2048, 256)
    needed = DeepEPLowLatency.memory(config())
    assert needed["DeepEP buffer"] == buffer_bytes(shape)
    assert needed["received rows"] == 32 * 8 * 112 * 2048 * 2
    assert "padded rows" not in needed
    assert "padded rows" in DeepEPLowLatency.memory(config(num_experts=250))
