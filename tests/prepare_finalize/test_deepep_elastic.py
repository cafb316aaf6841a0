"""The high-throughput class on DeepEP V2's ElasticBuffer.

Functions of a rank are written once and run twice: on CPU against a double of the library over gloo, on GPUs against
the library, where the installed one is V2.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moe_plugin.compat import deep_ep
from moe_plugin.compat.deep_ep import ElasticShape
from moe_plugin.config import Fp8Block, MoEConfig, ParallelConfig
from moe_plugin.environment import Package
from moe_plugin.errors import ConfigError, ExpertIdError, HandleError, PeerLostError
from moe_plugin.modular_kernel import Dispatched, ModularKernel
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deepep_exchange import (
    BufferExchange,
    ElasticExchange,
    _naming_timeouts,
    exchange_class,
)
from moe_plugin.prepare_finalize.deepep_high_throughput import DeepEPHandle, DeepEPHighThroughput
from moe_plugin.testing import CHECKS, shared_pool
from moe_plugin.testing.cases import Case, Inputs, tokens_of_rank
from moe_plugin.testing.checks import Refused, check_call, expect
from moe_plugin.testing.rank_pool import RankContext
from tests.doubles import deep_ep_elastic as double
from tests.strategies.machines import DEEP_EP, TRITON, gpu

BF16 = torch.bfloat16
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
STRATEGY = "deepep_high_throughput+torch_native"
PLACES = [
    pytest.param(("cpu", 2), id="double-2"),
    *(
        pytest.param(
            ("cuda", ranks),
            id=f"library-{ranks}",
            marks=[pytest.mark.gpu, pytest.mark.deep_ep, pytest.mark.multi_gpu(ranks)],
        )
        for ranks in (2, 4)
    ),
]
ROWS = [
    "top_k_2",
    "top_k_6",
    "no_tokens",
    "all_to_one_rank",
    "dropped_ids",
    "id_out_of_range",
    "wrong_arguments_on_one_rank",
    "duplicate_experts",
    "placements",
    "input_dtypes",
    "literal_router_weights",
    "router_weight_on_input",
    "output_argument",
    "micro_batches_interleaved",
    "asynchronous_halves",
    "handle_misuse",
    "fp8_block",
    "fp8_per_token",
]
ROWS_ON_GPUS = ["tensor_parallel", "fixed_capacity", "cuda_graph_replay", "fp8_cuda_graph_replay", "repeatable"]
V2 = Package("deep_ep", "2.1.0", features=DEEP_EP.features | {"ElasticBuffer"})


@contextlib.contextmanager
def library(context: RankContext) -> Iterator[None]:
    """The double where there is no GPU. Buffers are given back afterwards."""
    with double.installed() if context.device.type == "cpu" else contextlib.nullcontext():
        try:
            yield
        finally:
            deep_ep.release_buffers()


def with_library(context: RankContext, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with library(context):
        return function(context, *args)


def on_ranks(place: tuple[str, int], function: Callable[..., Any], *args: Any) -> list[Any]:
    device_type, ranks = place
    if device_type == "cuda" and not deep_ep.uses_elastic(deep_ep.probe()):
        pytest.skip("the installed deep_ep has no ElasticBuffer")
    pool = shared_pool(device_type, 4 if device_type == "cpu" else torch.cuda.device_count())
    # The library compiles its kernels when they are first needed.
    return pool.run(with_library, function, args, ranks=ranks, seconds=90 if device_type == "cpu" else 500)


def make(context: RankContext, tp_size: int = 1, timeout_seconds: float = 30.0, **overrides: Any) -> Case:
    return Case(context, STRATEGY, BF16, overrides, tp_size, timeout_seconds)


def kernel(case: Case) -> ModularKernel:
    assert isinstance(case.layer, ModularKernel)
    return case.layer


def check(out: torch.Tensor, case: Case, inputs: Inputs) -> None:
    assert_close_to_oracle(out, case.expected(inputs), case.tolerance)


def raw_handle(dispatched: Dispatched) -> Any:
    assert isinstance(dispatched.handle, DeepEPHandle)
    return dispatched.handle.raw


def run_row(context: RankContext, experts: str, row: str) -> str | None:
    """Why a gate refuses it, or None."""
    try:
        CHECKS[row](context, f"deepep_high_throughput+{experts}", BF16)
    except Refused as refusal:
        return str(refusal)
    return None


def check_row(place: tuple[str, int], experts: str, row: str) -> None:
    refusals = on_ranks(place, run_row, experts, row)
    if any(refusals):
        assert place[0] == "cuda", refusals
        assert all(refusals), f"only some ranks refused: {refusals}"
        pytest.skip(f"refused: {refusals[0]}")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_matrix(place: tuple[str, int], row: str) -> None:
    check_row(place, "torch_native", row)


@needs_triton
@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("row", [*ROWS, *ROWS_ON_GPUS])
def test_rows_of_the_matrix_with_kernels(place: tuple[str, int], row: str) -> None:
    check_row(place, "triton_fused_moe", row)


@needs_triton
def test_calls_without_the_host() -> None:
    refusals = on_ranks(("cpu", 2), run_row, "triton_fused_moe", "fixed_capacity")
    # Of its last part, where both ranks are one of TP.
    assert all("ep_size: needs 2 to 1024 ranks, saw 1." in str(refusal) for refusal in refusals), refusals


def calls_that_expect_a_bound(context: RankContext) -> None:
    """Rows behind the last one have ids of -1, and the number that kernels are compiled for is a power of two."""
    case = Case(
        context, "deepep_high_throughput+triton_fused_moe", BF16, {"cuda_graph": True, "max_tokens_per_rank": 12}
    )
    layer, size = kernel(case), context.size
    for announced, bound in ((5, 8), (12, 12), (None, 12)):
        for is_asynchronous in (False, True):
            inputs = case.inputs(tokens_of_rank(context, 1, 5, 0))
            if is_asynchronous:
                dispatched = layer.prepare_async(*inputs.as_tuple(), max_num_tokens=announced).wait()
            else:
                dispatched = layer.prepare(*inputs.as_tuple(), max_num_tokens=announced)
            assert raw_handle(dispatched).num_max_tokens_per_rank == bound
            assert dispatched.local_ids is not None
            assert dispatched.local_ids.shape == (size * bound, 2)
            assert dispatched.expert_num_tokens_host is None
            arrived = int(raw_handle(dispatched).psum_num_recv_tokens_per_scaleup_rank[-1])
            assert 0 < arrived <= 5 * size
            assert (dispatched.local_ids[:arrived] >= 0).any(1).all()
            assert (dispatched.local_ids[arrived:] == -1).all()
            out = layer.finalize(layer.apply_experts(dispatched), dispatched)
            case.layer.check_errors()
            check(out, case, inputs)
    # Eager ones take one number, whatever is announced.
    eager = make(context, max_tokens_per_rank=12)
    dispatched = kernel(eager).prepare(*eager.inputs(3).as_tuple(), max_num_tokens=3)
    assert raw_handle(dispatched).num_max_tokens_per_rank == 12
    assert dispatched.expert_num_tokens_host is not None
    assert dispatched.local_ids is not None
    assert sum(dispatched.expert_num_tokens_host) == int((dispatched.local_ids >= 0).sum())
    kernel(eager).finalize(kernel(eager).apply_experts(dispatched), dispatched)


@needs_triton
@pytest.mark.parametrize("place", PLACES)
def test_calls_that_expect_a_bound(place: tuple[str, int]) -> None:
    on_ranks(place, calls_that_expect_a_bound)


def layers_of_several_sizes(context: RankContext) -> None:
    small = make(context, max_tokens_per_rank=8, timeout_seconds=7.5)
    shared = deep_ep.shared_elastic_buffer(small.config.parallel.ep_group)
    first = shared.raw
    alike = make(context, max_tokens_per_rank=8, timeout_seconds=3.0)
    assert shared.raw is first
    between = kernel(small).prepare(*small.inputs(4).as_tuple())
    large = make(context, max_tokens_per_rank=3000, top_k=3, hidden_size=320, timeout_seconds=40.2)
    assert shared.raw is not first
    assert first.runtime is None
    for case in (small, large, alike):
        check_call(case, case.inputs(8))
    expect(HandleError, lambda: kernel(small).finalize(kernel(small).apply_experts(between), between), "replaced")
    shape = ElasticShape(3000, 512, 3, 41)
    assert shared._shape == shape
    if context.device.type == "cpu":
        assert first.timeouts == (8, 8)
        assert shared.raw.timeouts == (41, 41)
    assert shape.num_bytes(context.size) - shared.raw.num_bytes == 14 << 20  # counters of the library
    raw = shared.raw
    for case in (small, alike, large):
        assert raw.runtime is not None
        case.layer.close()
    assert raw.runtime is None
    expect(HandleError, lambda: small.layer(*small.inputs(4).as_tuple()), "released")
    again = make(context, max_tokens_per_rank=8)
    check_call(again, again.inputs(8))


@pytest.mark.parametrize("place", PLACES)
def test_layers_of_several_sizes(place: tuple[str, int]) -> None:
    on_ranks(place, layers_of_several_sizes)


def a_buffer_in_a_graph(context: RankContext) -> None:
    case = make(context, max_tokens_per_rank=8)
    shared = deep_ep.shared_elastic_buffer(case.config.parallel.ep_group)
    # As a capture leaves it.
    shared._is_captured = True
    shared._captured_users.update(shared._users)
    expect(ConfigError, lambda: make(context, max_tokens_per_rank=9), "is in a CUDA graph", "max_tokens=9")
    check_call(case, case.inputs(8))


def test_a_buffer_in_a_graph_is_not_replaced() -> None:
    on_ranks(("cpu", 2), a_buffer_in_a_graph)


def tensor_parallel_of_two(context: RankContext) -> None:
    case = make(context, tp_size=2, has_bias=True)
    for counts in ((5, 3), (0, 4)):
        check_call(case, case.inputs(tokens_of_rank(context, 2, *counts)))
    inputs = case.inputs(3)
    ids = inputs.topk_ids.clone()
    if context.rank >= 2:
        ids[0, 0] = 99
    expect(ExpertIdError, lambda: case.layer(*inputs.with_ids(ids).as_tuple()), "EP rank 1")
    assert case.layer.counters()["deepep_high_throughput.elastic"] == 3


def test_tensor_parallel() -> None:
    on_ranks(("cpu", 4), tensor_parallel_of_two)


def three_ranks(context: RankContext) -> None:
    case = make(context, num_experts=10, top_k=3)
    check_call(case, case.inputs(tokens_of_rank(context, 1, 5, 0, 7)))


def test_a_number_of_ranks_that_v1_does_not_take() -> None:
    on_ranks(("cpu", 3), three_ranks)


def config(**changes: Any) -> MoEConfig:
    defaults: dict[str, Any] = {
        "num_experts": 64,
        "top_k": 8,
        "hidden_size": 2048,
        "intermediate_size": 512,
        "dtype": BF16,
        "max_tokens_per_rank": 4096,
        "parallel": ParallelConfig(ep_size=8),
    }
    return MoEConfig(**(defaults | changes))


def refused(sm: int = 90, package: Package = V2, nvcc: bool = True, **changes: Any) -> list[str]:
    """Names of the gates that refuse."""
    machine = gpu(sm, packages=TRITON | {"deep_ep": package}, nvcc=nvcc)
    return [gate.name for gate in DeepEPHighThroughput.supports(config(**changes), machine).failed]


def test_which_of_the_two_is_used() -> None:
    assert exchange_class(V2) is ElasticExchange
    assert exchange_class(DEEP_EP) is BufferExchange
    assert exchange_class(Package("deep_ep")) is BufferExchange
    with double.installed():
        assert exchange_class(deep_ep.probe()) is ElasticExchange
        assert "DeepEP buffer" in DeepEPHighThroughput.memory(config())


def test_gates() -> None:
    assert refused() == []
    assert refused(sm=80) == ["sm"]
    assert refused(nvcc=False) == ["nvcc"]
    assert refused(package=Package("deep_ep")) == ["deep_ep", "Buffer"]
    assert refused(dtype=torch.float16) == ["dtype"]
    assert refused(cuda_graph=True) == []
    assert refused(dispatch_num_sms=21) == []
    assert refused(dispatch_num_sms=162) == ["dispatch_num_sms"]
    for ranks in (2, 3, 12, 64):
        assert refused(parallel=ParallelConfig(ep_size=ranks)) == []
    assert refused(parallel=ParallelConfig(ep_size=1)) == ["ep_size"]
    assert refused(parallel=ParallelConfig(ep_size=16, num_nodes=2)) == []
    assert refused(parallel=ParallelConfig(ep_size=16, num_nodes=2), cuda_graph=True) == ["cuda_graph"]
    assert refused(num_experts=2049) == ["num_experts"]
    assert refused(num_experts=512, parallel=ParallelConfig(ep_size=2)) == []
    assert refused(num_experts=514, parallel=ParallelConfig(ep_size=2)) == ["num_experts"]
    assert refused(top_k=33) == ["top_k"]
    assert refused(hidden_size=32768, quantization=None) == []
    assert refused(hidden_size=32769) == ["hidden_size"]
    assert refused(hidden_size=65536, quantization=Fp8Block()) == []
    assert refused(max_tokens_per_rank=2**31 // 80 + 1) == ["max_tokens_per_rank"]


def test_details_say_which_and_how_long() -> None:
    machine = gpu(90, packages=TRITON | {"deep_ep": V2})
    parallel = ParallelConfig(ep_size=16, num_nodes=2, timeout_seconds=12.5)
    words = DeepEPHighThroughput.details(config(parallel=parallel, hidden_size=2880), machine)
    assert words["transport"].startswith("NVLink in 2 nodes, RDMA between, 24 SMs")
    assert words["interface"] == "DeepEP's ElasticBuffer, of V2"
    assert "3072 columns" in words["transport"]
    assert words["time limit"].startswith("13 s")
    older = gpu(90, packages=TRITON | {"deep_ep": DEEP_EP})
    assert DeepEPHighThroughput.details(config(), older)["interface"] == "DeepEP's Buffer, of V1"


def test_bytes_of_the_buffer() -> None:
    # 4 ranks of 4096 tokens: rows of 14336 bytes, 8 ids, weights and places, and a number.
    one_node = 4 * 4096 * (14336 + 128)
    assert ElasticShape(4096, 7168, 8, 30).num_bytes(4) == one_node + (14 << 20)
    # In combine, with two nodes: rows of each rank of a node for the tokens of both, of each node, and on their way.
    two_nodes = (8 * 2 * 4096 + 2 * 4096 + 2 * (4096 + 1280)) * (14336 + 64)
    assert 0 <= ElasticShape(4096, 7168, 8, 30, num_nodes=2).num_bytes(16) - two_nodes - (14 << 20) < 2 << 20


def out_of_time() -> None:
    raise RuntimeError("Dispatch CPU wait exception (buffer.hpp:1011): CPU side received count (scaleup: 0): 3 0 # 0 0")


def fails() -> None:
    raise RuntimeError("Assertion exception (buffer.hpp:800): num_sms > 0")


def a_rank_that_does_not_come(context: RankContext) -> None:
    """Its name is not known here: all answer the roll call."""
    parallel = context.parallel()
    ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, 30.0)
    problem = expect(PeerLostError, lambda: ep.guard("dispatch", lambda: _naming_timeouts(out_of_time)), "dispatch")
    assert "CPU wait" in problem


def test_a_rank_that_does_not_come_is_named_so() -> None:
    on_ranks(("cpu", 2), a_rank_that_does_not_come)
    with pytest.raises(RuntimeError, match=r"^Assertion"):
        _naming_timeouts(fails)


@pytest.mark.gpu
@pytest.mark.deep_ep
def test_parameters_of_the_double_are_those_of_the_library() -> None:
    module, package = deep_ep.find()
    if module is None or not deep_ep.uses_elastic(package):
        pytest.skip("the installed deep_ep has no ElasticBuffer")
    for name in ("__init__", "dispatch", "combine", "destroy"):
        theirs = inspect.signature(getattr(module.ElasticBuffer, name)).parameters
        ours = inspect.signature(getattr(double.ElasticBuffer, name)).parameters
        assert list(theirs) == list(ours)
        assert [each.default for each in theirs.values()] == [each.default for each in ours.values()]
