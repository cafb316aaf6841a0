"""Warming up: which calls are made, with what weights, alone and in several processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moe_plugin.compat import deep_gemm as compat
from moe_plugin.config import Fp8Block, Fp8PerTensor, Fp8PerToken, MoEConfig, ParallelConfig, QuantConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import StrategyUnsupportedError, UnknownStrategyError
from moe_plugin.experts.layout_tables import CONTIGUOUS, LayoutEntry, LayoutTable
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.kernels.measured_tables import ENVIRONMENT_VARIABLE, LayerShape, forget_tables
from moe_plugin.kernels.tiling import counting_sort_shapes
from moe_plugin.modular_kernel import ActivationFormat, Dispatched, RouterWeightStage, warm_up_rows
from moe_plugin.strategies.registry import register_experts
from moe_plugin.strategies.warmup import steps_in_processes, warm_up_steps, zero_weights
from moe_plugin.testing.cases import Weights
from tests.doubles import deep_gemm as double

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "num_experts": 2,
    "top_k": 1,
    "hidden_size": 128,
    "intermediate_size": 128,
    "max_tokens_per_rank": 3,
}
CONFIG = MoEConfig(**TINY)
SCHEMES = [None, Fp8Block(), Fp8PerTensor(), Fp8PerTensor(static_activations=True), Fp8PerToken()]


@pytest.fixture
def deep_gemm() -> Iterator[ModuleType]:
    with double.installed() as module:
        yield module


class Remembers(TorchNative):
    """Keeps what it was called with."""

    name = "remembers"
    description = "keeps what it was called with"

    def __init__(self, config: MoEConfig, weights: Any) -> None:
        super().__init__(config, weights)
        layers.append(self)

    def apply(self, dispatched: Dispatched, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(dispatched)
        return super().apply(dispatched, *arguments, **options)


class OnlyBatched(Remembers):
    """Takes rows from no dispatcher there is."""

    name = "only_batched"
    description = "takes BatchedExperts alone"
    activation_formats = frozenset({ActivationFormat.BATCHED_EXPERTS})


layers: list[Remembers] = []
calls: list[Dispatched] = []


@pytest.fixture(autouse=True)
def _classes() -> None:
    layers.clear()
    calls.clear()
    register_experts(Remembers)
    register_experts(OnlyBatched)


def warm_up(config: MoEConfig, strategy: str) -> list[str]:
    """Make all calls; their names."""
    _, steps = warm_up_steps(config, strategy, device="cpu")
    names = []
    for what, call in steps:
        call()
        names.append(what)
    return names


def test_every_number_of_rows_is_near_one_that_is_called() -> None:
    assert warm_up_rows(1) == [1]
    assert warm_up_rows(3) == [3, 2, 1]
    assert warm_up_rows(64) == list(range(64, 0, -1))
    assert warm_up_rows(72) == [72, 70, 67, *range(64, 0, -1)]
    rows = warm_up_rows(8192)
    assert (rows[0], rows[-1]) == (8192, 1)
    assert rows == sorted(set(rows), reverse=True)
    assert all(above <= max(below + 1, 1.07 * below) for above, below in itertools.pairwise(rows))
    assert len(rows) < 200


def test_calls_are_those_of_the_local_dispatcher_the_largest_first() -> None:
    config = MoEConfig(**(TINY | {"num_experts": 3, "top_k": 2}))
    assert warm_up(config, "local+remembers") == [f"remembers, {rows} rows" for rows in (3, 2, 1)]
    assert [tuple(call.activations.shape) for call in calls] == [(3, 128), (2, 128), (1, 128)]
    first = calls[0]
    assert first.activation_format is ActivationFormat.STANDARD
    assert first.router_weight_stage is RouterWeightStage.EXPERTS_GATHER
    assert first.local_ids is not None
    assert (first.local_ids.tolist(), first.local_ids.dtype) == ([[0, 1], [2, 0], [1, 2]], torch.int32)
    assert first.topk_weights is not None
    assert (first.topk_weights.shape, first.topk_weights.dtype) == ((3, 2), torch.float32)
    assert first.activations.dtype == torch.bfloat16
    assert not first.activations.any()
    # All calls are made on one layer, one after another in the same memory.
    assert len(layers) == 1
    assert len({id(call.handle.workspace) for call in calls}) == 1


def test_router_weights_on_the_input_are_not_applied_again() -> None:
    warm_up(replace(CONFIG, apply_router_weight_on_input=True), "local+remembers")
    assert {call.router_weight_stage for call in calls} == {RouterWeightStage.BEFORE_DISPATCH}
    assert {call.topk_weights for call in calls} == {None}


def test_ranks_are_a_size_and_no_groups() -> None:
    config = MoEConfig(**(TINY | {"num_experts": 5, "parallel": ParallelConfig(ep_size=2, ep_rank=1, tp_size=2)}))
    # Each of two EP ranks may send all its tokens here.
    assert warm_up(config, "nccl_all_to_all+remembers") == [f"remembers, {rows} rows" for rows in range(6, 0, -1)]
    assert tuple(layers[0].weights.w13.shape) == (2, 2 * 64, 128)
    assert max(int(call.local_ids.max()) for call in calls if call.local_ids is not None) == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "experts",
    ["torch_native", *(pytest.param(name, marks=interpreter) for name in ("triton_fused_moe", "deep_gemm_hybrid"))],
)
@pytest.mark.usefixtures("deep_gemm")
def test_a_rank_without_experts(experts: str) -> None:
    config = MoEConfig(
        **(TINY | {"num_experts": 1, "max_tokens_per_rank": 1, "parallel": ParallelConfig(ep_size=2, ep_rank=1)})
    )
    assert config.num_local_experts == 0
    assert warm_up(config, f"nccl_all_to_all+{experts}") == [f"{experts}, 2 rows", f"{experts}, 1 rows"]


def test_phases_are_both_warmed_up_on_the_same_weights() -> None:
    config = replace(CONFIG, decode_max_tokens=2)
    names = warm_up(config, "decode=local+remembers,prefill=local+torch_native")
    assert names == ["remembers, 2 rows", "remembers, 1 rows", *(f"torch_native, {rows} rows" for rows in (3, 2, 1))]
    layers.clear()
    names = warm_up(config, "decode=local+remembers,prefill=local+remembers")
    assert names == [f"remembers, {rows} rows" for rows in (2, 1, 3, 2, 1)]
    decode, prefill = layers
    assert decode.config.max_tokens_per_rank == 2
    assert decode.weights.w13 is prefill.weights.w13


def test_phases_of_one_size_are_warmed_up_once() -> None:
    names = warm_up(CONFIG, "decode=local+remembers,prefill=local+remembers")
    assert names == [f"remembers, {rows} rows" for rows in (3, 2, 1)]


def test_the_format_of_no_dispatcher_has_no_calls() -> None:
    experts = OnlyBatched(CONFIG, zero_weights(CONFIG, CPU))
    assert list(experts.warm_up_steps(None)) == []  # type: ignore[arg-type]


def test_nothing_is_allocated_before_the_first_step() -> None:
    report, steps = warm_up_steps(CONFIG, "local+remembers", device="cpu")
    assert report.chosen_text() == "local+remembers"
    assert layers == []
    next(steps)
    assert len(layers) == 1


def test_what_cannot_run_raises_as_build_does() -> None:
    machine = Environment.probe("cpu").pretend(packages={})
    with pytest.raises(
        StrategyUnsupportedError, match=r"deep_gemm_hybrid\.deep_gemm: needs an importable installation"
    ):
        warm_up_steps(CONFIG, "local+deep_gemm_hybrid", machine, device="cpu")


@interpreter
@pytest.mark.parametrize("features", ["psum", "one expert per row"])
def test_deep_gemm_is_called_with_every_size_of_contiguous_buffers(
    deep_gemm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str
) -> None:
    table = LayoutTable(layer=LayerShape.of(CONFIG), device="cpu", deep_gemm="0", triton="0", date="2026-01-01")
    entry = LayoutEntry(
        rows=1,
        activation_format=ActivationFormat.STANDARD,
        layout=CONTIGUOUS,
        microseconds={CONTIGUOUS: 1.0},
        deep_gemm="0",
        triton="0",
    )
    table.with_entry(entry, "2026-01-01").save(LayoutTable.user_path(tmp_path, "cpu", table.layer))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    forget_tables()
    sizes: list[int] = []
    multiply = deep_gemm.m_grouped_bf16_gemm_nt_contiguous

    @functools.wraps(multiply)
    def with_ends(a: torch.Tensor, *arguments: Any, **options: Any) -> None:
        sizes.append(len(a))
        multiply(a, *arguments, **options)

    def per_row(a: Any, b: Any, d: Any, grouped_layout: Any, compiled_dims: str = "nk") -> None:
        with_ends(a, b, d, grouped_layout, compiled_dims)

    deep_gemm.m_grouped_bf16_gemm_nt_contiguous = with_ends if features == "psum" else per_row  # type: ignore[attr-defined]
    compat.forget()
    *rows, last = warm_up(CONFIG, "local+deep_gemm_hybrid")
    assert rows == [f"deep_gemm_hybrid, {rows} rows" for rows in (3, 2, 1)]
    (most,) = counting_sort_shapes(3, 1, 2, 128)["sorted_pairs"]
    assert last == f"deep_gemm, contiguous, 128 to {most} slots"
    assert set(sizes) == set(range(128, most + 1, 128))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_weights_are_a_rank_s_weights(scheme: QuantConfig | None, has_bias: bool) -> None:
    parallel = ParallelConfig(ep_size=2, ep_rank=1, tp_size=2, tp_rank=1)
    config = MoEConfig(
        num_experts=3,
        top_k=2,
        hidden_size=320,
        intermediate_size=512,
        quantization=scheme,
        has_bias=has_bias,
        parallel=parallel,
    )
    weights = zero_weights(config, CPU)
    weights.check(config)
    # Shapes and dtypes are those of real weights, cut for this rank.
    real = Weights.random(config, CPU).of_rank(config)
    for name, tensor in real.items():
        found = getattr(weights, name)
        assert (found is None) == (tensor is None), name
        if tensor is not None:
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype), name
            assert bool((found.float() == (1 if name.endswith("scale") else 0)).all()), name


@pytest.mark.slow
def test_processes_share_the_steps() -> None:
    with steps_in_processes(CONFIG, "local+torch_native", "cpu", jobs=2) as steps:
        assert [what for what, _ in steps] == [f"torch_native, {rows} rows" for rows in (3, 2, 1)]
        assert [call() for _, call in steps] == [None] * 3


@pytest.mark.slow
def test_an_error_in_a_process_is_raised_here() -> None:
    # Spawned processes know nothing of classes that this one has registered.
    with (
        pytest.raises(UnknownStrategyError, match=r"local\+remembers"),
        steps_in_processes(CONFIG, "local+remembers", "cpu", jobs=1),
    ):
        pass
