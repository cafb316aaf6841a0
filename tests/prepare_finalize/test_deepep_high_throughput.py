"""What only the high-throughput class has, against the double of DeepEP; the behaviour matrix has the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_plugin.compat import deep_ep
from moe_plugin.config import Fp8Block, MoEConfig, ParallelConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ExpertIdError, HandleError, ShapeError
from moe_plugin.modular_kernel import ModularKernel
from moe_plugin.prepare_finalize.deepep_high_throughput import DeepEPHighThroughput
from moe_plugin.quantization import FP8_DTYPE, dequantize_rows, quantize_rows
from moe_plugin.strategies.report import Entry
from moe_plugin.strategies.selector import explain
from moe_plugin.testing import shared_pool
from moe_plugin.testing.cases import Case, Inputs
from moe_plugin.testing.checks import check_call, expect
from moe_plugin.testing.rank_pool import RankContext
from tests.doubles import deep_ep as double
from tests.strategies.machines import DEEP_EP, TRITON, gpu, layer_config

BF16 = torch.bfloat16
STRATEGY = "deepep_high_throughput+torch_native"


def on_ranks(*functions: Callable[[RankContext], Any]) -> None:
    """On 2 gloo ranks, with the double in the place of the library."""
    shared_pool("cpu", 4).run(_with_double, functions, ranks=2)


def _with_double(context: RankContext, functions: tuple[Callable[[RankContext], Any], ...]) -> None:
    with double.installed():
        for function in functions:
            function(context)
        deep_ep.release_buffers()


def make(context: RankContext, **overrides: Any) -> tuple[Case, ModularKernel, DeepEPHighThroughput]:
    case = Case(context, STRATEGY, BF16, overrides)
    assert isinstance(case.layer, ModularKernel)
    dispatch = case.layer.prepare_finalize
    assert isinstance(dispatch, DeepEPHighThroughput)
    return case, case.layer, dispatch


def what_arrives(context: RankContext) -> None:
    """Rows are padded on their way and arrive in their own width, with counts that the host has anyway."""
    case, layer, _ = make(context)
    inputs = case.inputs(6)
    dispatched = layer.prepare(*inputs.as_tuple())
    assert dispatched.activations.stride() == (256, 1), "512 bytes in bf16"
    assert dispatched.activations.shape[1] == 64
    ids = dispatched.local_ids
    assert ids is not None
    assert ids.dtype == torch.int32
    assert (ids >= 0).any(1).all(), "a row that asks for nothing"
    counts = [int((ids == expert).sum()) for expert in range(4)]
    assert list(dispatched.expert_num_tokens_host or ()) == counts
    check_finished(case, layer, dispatched, inputs)
    wide = case.inputs(5)
    spread = torch.stack((wide.hidden_states, wide.hidden_states), 2).flatten(1)[:, ::2]
    check_call(case, replace(wide, hidden_states=spread, topk_weights=wide.topk_weights.half()))
    assert dict(case.layer.counters()) == {"deepep_high_throughput.intranode": 2}
    layer.close()


def check_finished(case: Case, layer: ModularKernel, dispatched: Any, inputs: Inputs) -> None:
    out = layer.finalize(layer.apply_experts(dispatched), dispatched)
    torch.testing.assert_close(out.float(), case.expected(inputs), rtol=0.02, atol=0.02)


def quantized_rows_travel(context: RankContext) -> None:
    case, layer, _ = make(context, hidden_size=192, intermediate_size=128, quantization=Fp8Block())
    inputs = case.inputs(3)
    everywhere = torch.tensor([[0, 7]]).expand(3, 2)
    dispatched = layer.prepare(inputs.hidden_states, everywhere, inputs.topk_weights)
    rows, scales = dispatched.activations, dispatched.scales
    assert rows.dtype is FP8_DTYPE
    assert scales is not None
    assert scales.shape == (6, 2)
    mine = slice(3 * context.rank, 3 * context.rank + 3)
    expected = dequantize_rows(*quantize_rows(inputs.hidden_states, 128), 128)
    torch.testing.assert_close(dequantize_rows(rows[mine], scales[mine], 128), expected, rtol=0, atol=0)
    check_finished(case, layer, dispatched, inputs.with_ids(everywhere))
    layer.close()


def kernels_make_rows_and_routing(context: RankContext) -> None:
    """As on GPUs, in one program and in several, repeated at other addresses."""
    sizes = {"hidden_size": 192, "intermediate_size": 16, "top_k": 8, "max_tokens_per_rank": 260}
    case, layer, dispatch = make(context, quantization=Fp8Block(), **sizes)
    dispatch._use_triton = dispatch._exchange._use_triton = True  # type: ignore[attr-defined]
    for seed, tokens in enumerate((5, 5, 5, 260, 260, 5)):
        check_call(case, case.inputs(tokens, seed))
    inputs = case.inputs(4)
    ids = inputs.topk_ids.clone()
    ids[0, 0] = 8 if context.rank else 0
    expect(ExpertIdError, lambda: layer(*inputs.with_ids(ids).as_tuple()), "EP rank 1")
    check_call(case, inputs)
    layer.close()


def any_number_of_calls_in_flight(context: RankContext) -> None:
    case, layer, _ = make(context)
    batches = [case.inputs(3 + seed + context.rank, seed) for seed in range(4)]
    flying = [layer.prepare_async(*batch.as_tuple()).wait() for batch in batches]
    combined = [layer.finalize_async(layer.apply_experts(each), each) for each in reversed(flying)]
    for batch, receiver in zip(reversed(batches), combined, strict=True):
        torch.testing.assert_close(receiver.wait().float(), case.expected(batch), rtol=0.02, atol=0.02)
    layer.close()


def errors_are_told_with_the_counts(context: RankContext) -> None:
    case, layer, dispatch = make(context)
    last = context.rank == context.size - 1
    inputs = case.inputs(4)
    ids = inputs.topk_ids.clone()
    ids[2, 1] = 8 if last else 3
    expect(ExpertIdError, lambda: layer(*inputs.with_ids(ids).as_tuple()), "EP rank 1")
    assert not dispatch._flags.any(), "told once"
    states = inputs.hidden_states[:, 1:] if last else inputs.hidden_states
    for call in (layer, layer.prepare_async):
        expect(ShapeError, lambda: call(states, inputs.topk_ids, inputs.topk_weights), "EP rank 1")  # noqa: B023
    check_call(case, inputs)
    layer.close()


def captured_layers_have_room_for_all(context: RankContext) -> None:
    """What `cuda_graph` makes of the dispatch; experts that run so in the interpreter are in the matrix."""
    config = replace(make(context)[0].config, cuda_graph=True, max_tokens_per_rank=9)
    case = Case(context, STRATEGY, BF16)
    dispatch = DeepEPHighThroughput(config, case.arena)
    dispatch.accommodate(type(case.layer.experts))  # type: ignore[attr-defined]
    inputs = case.inputs(3 + context.rank)
    for announced, room in ((None, 18), (5, 10)):
        dispatched = dispatch.prepare(*inputs.as_tuple(), announced)
        assert dispatched.activations.shape == (room, 64)
        assert dispatched.expert_num_tokens_host is None
        ids = dispatched.local_ids
        assert ids is not None
        assert (ids[7:] == -1).all(), "rows that nobody has sent"
        rows = torch.ones(room, 64, dtype=BF16)
        needed = torch.stack([inputs.topk_ids < 4, inputs.topk_ids >= 4]).any(2).sum(0)
        out = dispatch.finalize(rows, dispatched.handle)
        torch.testing.assert_close(out, needed[:, None].expand(-1, 64).to(BF16))
    wrong = inputs.with_ids(torch.full_like(inputs.topk_ids, 8 if context.rank else 0))
    expect(ExpertIdError, lambda: dispatch.prepare(*wrong.as_tuple()))
    dispatch.check_errors()


def the_buffer_is_shared_and_given_back(context: RankContext) -> None:
    small, layer, dispatch = make(context)
    inputs = small.inputs(4)
    waiting = layer.prepare(*inputs.as_tuple())
    large, larger_layer, other = make(context, hidden_size=1024)
    assert dispatch._exchange._buffer is other._exchange._buffer
    rows = layer.apply_experts(waiting)
    expect(HandleError, lambda: layer.finalize(rows, waiting), "replaced")
    check_call(small, inputs)
    check_call(large, large.inputs(3))
    layer.close()
    check_call(large, large.inputs(3))
    larger_layer.close()
    expect(HandleError, lambda: larger_layer(*large.inputs(3).as_tuple()), "released")
    again, last_layer, _ = make(context)
    check_call(again, again.inputs(2))
    last_layer.close()


def test_on_ranks() -> None:
    on_ranks(
        what_arrives,
        quantized_rows_travel,
        kernels_make_rows_and_routing,
        any_number_of_calls_in_flight,
        errors_are_told_with_the_counts,
        captured_layers_have_room_for_all,
        the_buffer_is_shared_and_given_back,
    )


def machine(*missing: str, sm: int = 90) -> Environment:
    package = replace(DEEP_EP, features=DEEP_EP.features - set(missing))
    return gpu(sm, packages=TRITON | {"deep_ep": package})


def config(ep_size: int = 8, num_nodes: int = 1, **changes: Any) -> MoEConfig:
    parallel = ParallelConfig(ep_size=ep_size, num_nodes=num_nodes)
    return replace(layer_config(**changes), parallel=parallel, placement=None)


def entry(layer: MoEConfig, environment: Environment) -> Entry:
    return next(e for e in explain(layer, STRATEGY, environment).entries["decode"] if e.strategy == STRATEGY)


@pytest.mark.parametrize(
    ("layer", "environment", "gate", "words"),
    [
        (config(dtype=torch.float16), machine(), "dtype", "one of bfloat16"),
        (config(), gpu(90), "deep_ep", "build it from https://github.com/deepseek-ai/DeepEP"),
        (config(), machine(sm=75), "sm", "SM 80 or newer"),
        (config(ep_size=3), machine(), "ep_size", "2, 4, 8, or nodes of 8 ranks, up to 160"),
        (config(ep_size=12), machine(), "ep_size", "saw 12"),
        (config(ep_size=16, num_nodes=4), machine(), "num_nodes", "takes 8 consecutive ranks for a node"),
        (config(ep_size=2, num_experts=258), machine(), "num_experts", "at most 128 on a rank, saw 129 on a rank"),
        (config(hidden_size=8192), machine(), "hidden_size", "saw 8192, 16384 bytes"),
        (config(dispatch_num_sms=21), machine(), "dispatch_num_sms", "an even number"),
        (config(cuda_graph=True), machine("num_worst_tokens"), "cuda_graph", "has no num_worst_tokens"),
        (config(ep_size=16, num_nodes=2, cuda_graph=True), machine(), "cuda_graph", "only inside a node"),
        (config(max_tokens_per_rank=1 << 24), machine(), "max_tokens_per_rank", "larger counts tell of errors"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refusals(layer: MoEConfig, environment: Environment, gate: str, words: str) -> None:
    failed = entry(layer, environment).verdict.failed
    assert failed[0].name == gate
    assert words in str(failed[0])


def test_it_waits_for_the_host_but_under_graphs() -> None:
    assert entry(config(), machine()).host_syncs == 1
    captured = entry(config(cuda_graph=True), machine())
    assert captured.verdict.ok
    assert captured.host_syncs == 0
    fp8 = config(hidden_size=8192, quantization=Fp8Block())
    assert entry(fp8, machine()).verdict.ok, "fp8 rows are half as long"


def test_what_the_report_says() -> None:
    found = entry(config(hidden_size=2880), machine())
    assert found.details["deepep_high_throughput.transport"] == "NVLink, 24 SMs, rows padded to 3072 columns"
    assert "the only dtype that DeepEP sums" in found.details["deepep_high_throughput.combine"]
    between = entry(config(ep_size=16, num_nodes=2), machine()).details["deepep_high_throughput.transport"]
    assert between == "NVLink in nodes of 8, RDMA between, 24 SMs, rows padded to 256 columns"


def test_memory_is_known_before_anything_is_allocated() -> None:
    needed = DeepEPHighThroughput.memory(config(ep_size=4, hidden_size=7168))
    assert needed["DeepEP buffer"] == pytest.approx(201425920, rel=1e-3), "what the library asks for on 4 ranks"
    assert needed["received rows"] == 4 * 4096 * (2 * 7168 + 4 * 12)
    padded = DeepEPHighThroughput.memory(config(ep_size=4, hidden_size=2880))
    assert padded["padded rows"] == 4 * 4096 * 2 * 3072
