"""HybridEPBuffer as a transport: what arrives and comes back is what our own transports bring.

Written once and run twice: on CPU against a double of the library over gloo, on GPUs against the library itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_plugin.compat import deep_ep
from moe_plugin.config import ExpertPlacement, Fp8Block, Fp8PerToken, MoEConfig, ParallelConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.errors import ConfigError, DtypeError, ExpertIdError, HandleError, ShapeError
from moe_plugin.modular_kernel import ActivationFormat, Dispatched, ModularKernel, RouterWeightStage
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.prepare_finalize import hybrid_ep_transport
from moe_plugin.prepare_finalize.hybrid_dense_routing import HybridDenseRouting
from moe_plugin.prepare_finalize.hybrid_ep_transport import group_ends, padded_tokens, rank_columns
from moe_plugin.quantization import FP8_DTYPE
from moe_plugin.testing import shared_pool
from moe_plugin.testing.cases import Case, Inputs
from moe_plugin.testing.checks import check_call, expect, run_call
from moe_plugin.testing.rank_pool import RankContext
from tests.doubles import hybrid_ep as double
from tests.strategies.machines import gpu, layer_config

STRATEGY = "hybrid_dense_routing+torch_native"
SUMMATION_NOISE = 2.0**-8
"""Between two orders of adding, or of rounding to bf16 in between: of the whole result, relative."""


@contextlib.contextmanager
def library(context: RankContext, dense: bool) -> Iterator[None]:
    """The double where there is no GPU. Buffers are given back afterwards."""
    on_cpu = context.device.type == "cpu"
    with double.installed(dense) if on_cpu else contextlib.nullcontext():
        yield
        deep_ep.release_buffers()


def hybrid_ep_case(context: RankContext, **overrides: Any) -> Case:
    settings = {"dispatch_transport": "hybrid_ep", "hidden_size": 512, "max_tokens_per_rank": 24} | overrides
    return Case(context, STRATEGY, torch.bfloat16, settings)


def ours_beside(case: Case) -> Case:
    """The same layer with a transport of ours."""
    ours = "nvlink" if case.context.device.type == "cuda" else "collective"
    return Case(case.context, STRATEGY, torch.bfloat16, case.overrides | {"dispatch_transport": ours})


def parts_of(case: Case) -> tuple[ModularKernel, HybridDenseRouting]:
    layer = case.layer
    assert isinstance(layer, ModularKernel)
    assert isinstance(layer.prepare_finalize, HybridDenseRouting)
    return layer, layer.prepare_finalize


def with_replicas(num_ranks: int) -> ExpertPlacement:
    """Expert 0 on every rank, and as many columns a rank as no whole number of words has."""
    linear = ExpertPlacement.linear(5, num_ranks).experts_of_rank
    return ExpertPlacement.from_table(5, [list(dict.fromkeys((*experts, 0))) for experts in linear])


def compare(case: Case, ours: Case, inputs: Inputs, exactly: bool, **options: Any) -> None:
    out, reference = check_call(case, inputs, **options), run_call(ours, inputs, **options)
    if exactly:
        torch.testing.assert_close(out, reference, rtol=0, atol=0)
    difference = torch.linalg.vector_norm(out.float() - reference.float())
    assert difference <= SUMMATION_NOISE * torch.linalg.vector_norm(reference.float())


LAYERS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "placed": {"num_experts": 5, "top_k": 3, "placement": with_replicas},
    "weights on input": {"top_k": 1, "apply_router_weight_on_input": True},
    "fp8": {"quantization": Fp8Block(), "intermediate_size": 128},
    "fp8 per token": {"quantization": Fp8PerToken()},
    "permuted": {"dispatch_permute": True, "top_k": 3},
    "permuted, weights on input": {"dispatch_permute": True, "top_k": 1, "apply_router_weight_on_input": True},
    "permuted fp8": {"dispatch_permute": True, "quantization": Fp8Block(), "intermediate_size": 128},
}


def calls_on_rank(context: RankContext, dense: bool, names: list[str]) -> None:
    with library(context, dense):
        for name in names:
            case = hybrid_ep_case(context, **LAYERS[name])
            ours = ours_beside(case)
            # On GPUs the layouts of the GEMMs follow from how many rows there are room for, and with them the order of
            # sums; three experts of a row are added in the order of ids here and in that of the token there; permuted
            # rows are rounded once more, between their weights and their sum.
            exactly = context.device.type == "cpu" and case.config.top_k <= 2 and "permuted" not in name
            for counts in ((5, 0, 2, 7), (24, 3, 1, 0), (0, 0, 0, 0)):
                inputs = case.inputs(counts[context.rank], seed=counts[0])
                ids = inputs.topk_ids.clone()
                ids[::3, -1], ids[1:2] = -1, -1
                compare(case, ours, inputs.with_ids(ids), exactly)
            # All to the last rank, one expert twice, fewer tokens announced.
            inputs = case.inputs(3)
            ids = torch.full_like(inputs.topk_ids, case.config.num_experts - 1)
            compare(case, ours, inputs.with_ids(ids), False, max_num_tokens=3)
            out = torch.full((6, 2 * 512), torch.nan, dtype=torch.bfloat16, device=context.device)[::2, :512]
            compare(case, ours, inputs, exactly, out=out)
            check_call(case, replace(inputs, hidden_states=inputs.hidden_states.flip(0)[:, :].T.contiguous().T))
            assert dict(case.layer.counters()) == {"hybrid_dense_routing.hybrid_ep": 6}


def run_on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2, device_type: str = "cpu") -> list[Any]:
    if device_type == "cuda" and "HybridEPBuffer" not in deep_ep.probe().features:
        pytest.skip("the installed deep_ep has no HybridEPBuffer")
    pool = shared_pool(device_type, 4 if device_type == "cpu" else torch.cuda.device_count())
    # The library compiles its kernels when they are first needed.
    return pool.run(function, *args, ranks=ranks, seconds=500 if device_type == "cuda" else 90)


@pytest.mark.parametrize("dense", [True, False], ids=["ids", "map"])
def test_results_are_those_of_our_transport(dense: bool) -> None:
    run_on_ranks(calls_on_rank, dense, list(LAYERS) if dense else ["bf16", "permuted"])


@pytest.mark.gpu
@pytest.mark.deep_ep
@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize(
    "ranks", [pytest.param(ranks, marks=pytest.mark.multi_gpu(ranks)) for ranks in (2, 4)], ids="{} ranks".format
)
def test_results_of_the_library_are_those_of_our_kernels(name: str, ranks: int) -> None:
    run_on_ranks(calls_on_rank, True, [name], ranks=ranks, device_type="cuda")


def finish(case: Case, dispatched: Dispatched, inputs: Inputs) -> None:
    layer, _ = parts_of(case)
    out = layer.finalize(layer.apply_experts(dispatched), dispatched)
    assert_close_to_oracle(out, case.expected(inputs), case.tolerance)


def calls_in_flight(context: RankContext, dense: bool) -> list[list[str]]:
    """What was asked of the double, in token order and permuted."""
    asked = []
    with library(context, dense):
        for name in ("bf16", "permuted", "permuted fp8"):
            case = hybrid_ep_case(context, **LAYERS[name])
            layer, dispatch = parts_of(case)
            assert dispatch._hybrid_ep is not None
            buffer: Any = dispatch._hybrid_ep._buffer._raw
            calls = getattr(buffer, "calls", [])
            calls.clear()
            a, b = case.inputs([5, 2, 0, 1][context.rank]), case.inputs([3, 6, 1, 4][context.rank], seed=1)
            flying_a = layer.prepare(*a.as_tuple())
            waiting_b = layer.prepare_async(*b.as_tuple())
            twice = replace(a, hidden_states=2 * a.hidden_states)
            again = dispatch.prepare_again(twice.hidden_states, flying_a.handle)
            flying_b = waiting_b.wait()
            rows_b = layer.apply_experts(flying_b)
            finish(case, again, twice)
            finish(case, flying_a, a)
            out_b = layer.finalize_async(rows_b, flying_b).wait()
            assert_close_to_oracle(out_b, case.expected(b), case.tolerance)
            finish(case, dispatch.prepare_again(a.hidden_states, flying_a.handle), a)
            expect(HandleError, lambda: layer.finalize(rows_b, flying_b))  # noqa: B023
            asked.append([*calls])
    return asked


PERMUTED = ["permuted dispatch{}", "permuted dispatch{}", "permuted dispatch{} again"] + 3 * ["permuted combine"]
PERMUTED += ["permuted dispatch{} again", "permuted combine"]


def test_micro_batches_and_second_dispatches() -> None:
    for asked in run_on_ranks(calls_in_flight, True):
        in_tokens = [call.replace("permuted ", "").format("") for call in PERMUTED]
        fused, unfused = ([call.format(way) for call in PERMUTED] for way in (", fused", ""))
        assert asked == [in_tokens, fused, unfused]


def what_arrives(context: RankContext) -> None:
    """Formats, stages and dtypes by layer."""
    with library(context, True):
        for name, layer_settings in LAYERS.items():
            case = hybrid_ep_case(context, **layer_settings)
            layer, _ = parts_of(case)
            inputs = case.inputs(4)
            dispatched = layer.prepare(*inputs.as_tuple())
            permuted, on_input = "permuted" in name, "input" in name
            expected = ActivationFormat.CONTIGUOUS if permuted else ActivationFormat.STANDARD
            stage = RouterWeightStage.COMBINE if permuted else RouterWeightStage.EXPERTS_GATHER
            assert dispatched.activation_format is expected
            assert dispatched.router_weight_stage is (RouterWeightStage.BEFORE_DISPATCH if on_input else stage)
            # Other scales than those of 128 columns do not travel.
            travels = isinstance(case.config.quantization, Fp8Block)
            assert dispatched.activations.dtype is (FP8_DTYPE if travels else torch.bfloat16)
            assert (dispatched.scales is not None) == travels
            if permuted and dispatched.scales is not None:
                assert dispatched.scales.stride() == (1, len(dispatched.activations))
            if not permuted:
                assert dispatched.local_ids is not None
                assert (dispatched.local_ids >= 0).any(1).all(), "a row that asks for nothing"
            finish(case, dispatched, inputs)


def errors_on_rank(context: RankContext) -> None:
    with library(context, True):
        for name in ("bf16", "permuted"):
            case = hybrid_ep_case(context, **LAYERS[name])
            layer, dispatch = parts_of(case)
            last = context.rank == context.size - 1
            inputs = case.inputs(3)
            ids = inputs.topk_ids.clone()
            ids[1, 0] = 8 if last else 0
            expect(ExpertIdError, lambda: layer(*inputs.with_ids(ids).as_tuple()), "[-1, 8)")  # noqa: B023
            states = inputs.hidden_states[:, 1:] if last else inputs.hidden_states
            for call in (layer, layer.prepare_async):
                expect(ShapeError, lambda: call(states, inputs.topk_ids, inputs.topk_weights), "EP rank")  # noqa: B023
            dispatched = layer.prepare(*inputs.as_tuple())
            wrong = inputs.hidden_states.half() if last else inputs.hidden_states
            expect(DtypeError, lambda: dispatch.prepare_again(wrong, dispatched.handle), "EP rank")  # noqa: B023
            finish(case, dispatched, inputs)
            layer.check_errors()
            check_call(case, inputs)
            deep_ep.release_buffers()
            expect(HandleError, lambda: layer(*inputs.as_tuple()), "released")  # noqa: B023


def memory_on_rank(context: RankContext) -> None:
    with library(context, True):
        for name in ("placed", "permuted", "permuted fp8"):
            case = hybrid_ep_case(context, **LAYERS[name])
            _, dispatch = parts_of(case)
            config = case.config
            inputs = case.inputs(config.max_tokens_per_rank)
            everything = torch.arange(config.top_k, device=context.device).expand(inputs.topk_ids.shape)
            dispatched = dispatch.prepare(inputs.hidden_states, everything, inputs.topk_weights)
            rows = torch.zeros(dispatched.activations.shape, dtype=config.dtype, device=context.device)
            dispatch.finalize(rows, dispatched.handle)
            computed = dispatch.memory(config)
            assert case.arena.nbytes + rows.numel() * 2 <= sum(computed.values()) - computed["HybridEP buffer"] + 1024
            assert dispatch.num_sms == config.dispatch_num_sms


def shared_on_rank(context: RankContext) -> list[bool]:
    """Whether layers share a buffer: a second one, a smaller one, a larger one, one in fp8."""
    with library(context, True):
        buffers = []
        for changes in ({}, {}, {"max_tokens_per_rank": 7}, {"max_tokens_per_rank": 513}, LAYERS["fp8"]):
            _, dispatch = parts_of(hybrid_ep_case(context, **changes))
            assert dispatch._hybrid_ep is not None
            buffers.append(dispatch._hybrid_ep._buffer)
    return [buffer is buffers[0] for buffer in buffers]


def several(context: RankContext) -> list[bool]:
    """What costs a call of the pool each, in one."""
    what_arrives(context)
    errors_on_rank(context)
    memory_on_rank(context)
    return shared_on_rank(context)


def test_formats_errors_memory_and_sharing() -> None:
    assert run_on_ranks(several) == 2 * [[True, True, True, False, False]]


@pytest.mark.gpu
@pytest.mark.deep_ep
@pytest.mark.multi_gpu(2)
def test_calls_in_flight_formats_errors_memory_and_sharing_with_the_library() -> None:
    run_on_ranks(calls_in_flight, True, device_type="cuda")
    assert run_on_ranks(several, device_type="cuda") == 2 * [[True, True, True, False, False]]


HYBRID_EP = frozenset({"HybridEPBuffer", "hybrid_permute", "hybrid_fused_permute", "hybrid_dense_ids"})


def machine(*, without: str = "", sm: int = 90, **changes: Any) -> Environment:
    """A machine with DeepEP's branch hybrid-ep, of which one feature may be missing."""
    package = Package("deep_ep", "1.2.1", features=HYBRID_EP - {without} | {"Buffer"})
    return gpu(sm, packages={"triton": Package("triton", "3.6.0"), "deep_ep": package}, **changes)


def asked_for(ep_size: int = 8, num_nodes: int = 1, **changes: Any) -> MoEConfig:
    config = layer_config(**({"dispatch_transport": "hybrid_ep"} | changes))
    return replace(config, placement=None, parallel=ParallelConfig(ep_size=ep_size, num_nodes=num_nodes))


@pytest.mark.parametrize(
    ("config", "environment", "gate", "words"),
    [
        (asked_for(), machine(without="HybridEPBuffer"), "HybridEPBuffer", "from its branch hybrid-ep"),
        (asked_for(), machine(sm=80), "sm", "SM 90 or newer"),
        (asked_for(), machine(nvcc=False), "nvcc", "compiles its kernels at run time"),
        (asked_for(dtype=torch.float16), machine(), "dtype", "bfloat16"),
        (asked_for(cuda_graph=True), machine(), "cuda_graph", "waits on the host"),
        (asked_for(num_nodes=2), machine(), "num_nodes", "saw 2"),
        (asked_for(ep_size=1), machine(), "ep_size", "2 to 72"),
        (asked_for(hidden_size=72), machine(), "hidden_size", "a multiple of 16, saw 72"),
        (asked_for(num_experts=1026, ep_size=2), machine(), "experts per rank", "at most 512, saw 513"),
        (asked_for(num_experts=16384, ep_size=64), machine(), "shared memory", "16384 experts"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_gates(config: MoEConfig, environment: Environment, gate: str, words: str) -> None:
    verdict = HybridDenseRouting.supports(config, environment)
    assert [failed.name for failed in verdict.failed] == [gate]
    assert words in verdict.reason


def test_without_the_package_the_fix_is_named() -> None:
    reason = HybridDenseRouting.supports(asked_for(), gpu(90)).reason
    assert "deep_ep: needs an importable installation" in reason
    assert "branch hybrid-ep" in reason


def test_what_gates_let_pass() -> None:
    for config in (asked_for(), asked_for(dispatch_permute=True), asked_for(num_experts=7, hidden_size=7168)):
        assert HybridDenseRouting.supports(config, machine()).ok
        assert HybridDenseRouting.host_syncs(config, machine()) == 2
        assert HybridDenseRouting.why_not_nvlink(config, machine()) == "dispatch_transport = 'hybrid_ep'"


@pytest.mark.parametrize(
    ("changes", "without", "words"),
    [
        ({}, "", "routing as dense int16 ids, bf16 rows in token order"),
        ({}, "hybrid_dense_ids", "routing as a map of booleans, bf16 rows in token order"),
        ({"dispatch_permute": True}, "", "bf16 rows in expert-grouped order, permuted on their way"),
        ({"dispatch_permute": True}, "hybrid_fused_permute", "permuted after it"),
        ({"dispatch_permute": True}, "hybrid_permute", "rows in token order"),
        ({"quantization": Fp8Block(), "hidden_size": 512, "dispatch_permute": True}, "", "fp8 rows in expert-grouped"),
        ({"quantization": Fp8Block(), "hidden_size": 640}, "", "bf16 rows in token order"),
    ],
)
def test_the_report_says_how_rows_go(changes: dict[str, Any], without: str, words: str) -> None:
    details = HybridDenseRouting.details(asked_for(**changes), machine(without=without))
    assert details["transport"].startswith("DeepEP's HybridEPBuffer: ")
    assert words in details["transport"]


def test_a_transport_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="one of nvlink, collective, hybrid_ep, or None, got 'rdma'"):
        layer_config(dispatch_transport="rdma")


def test_an_explicit_transport_never_falls_back() -> None:
    verdict = HybridDenseRouting.supports(asked_for(dispatch_transport="nvlink"), machine(sm=75))
    assert [failed.name for failed in verdict.failed] == ["dispatch_transport"]
    assert "the kernels need SM 80, saw SM 75" in verdict.reason
    assert HybridDenseRouting.supports(asked_for(dispatch_transport="nvlink"), machine()).ok
    assert HybridDenseRouting.supports(asked_for(dispatch_transport="collective"), machine(sm=75)).ok


def test_numbers_that_the_library_can_take() -> None:
    assert [padded_tokens(tokens) for tokens in (0, 1, 4, 5, 4095)] == [4, 4, 4, 8, 4096]
    assert [rank_columns(2, slots) for slots in (1, 2, 3)] == [2, 2, 4]
    assert [rank_columns(3, slots) for slots in (1, 4, 5)] == [4, 4, 8]
    assert rank_columns(4, 7) == 7
    assert group_ends(torch.tensor([2, 0, 5, 1], dtype=torch.int32), 4).tolist() == [2, 4, 9, 13]
    assert hybrid_ep_transport.travelling_groups(layer_config(hidden_size=7168), 56) == 56
    assert hybrid_ep_transport.travelling_groups(layer_config(hidden_size=7168), 1) == 0
