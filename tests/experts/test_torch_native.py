"""TorchNative against the oracle, with the segment ends read by the host and kept on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken, ParallelConfig, QuantConfig
from moe_plugin.environment import Environment
from moe_plugin.experts import torch_native
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import ActivationFormat, ExpertWeights
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.quantization import has_static_activations, input_group_size, quantize_rows
from moe_plugin.reference import reference_moe
from moe_plugin.testing.cases import Weights
from moe_plugin.workspace import WorkspaceArena
from tests.experts.cases import DEVICE, Layer, make_config, normal, packed_with_scales, quantizer, random_ids

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.fixture(params=["host_loop", "grouped_mm"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the segment ends are used; grouped_mm also runs on a CPU, and leaves NaN past the last group."""
    if request.param == "grouped_mm":
        compute = torch_native._grouped_mm

        def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
            out = compute(rows, weight, offs=offs)
            past = torch.arange(len(out), device=out.device) >= offs[-1]
            return out.masked_fill_(past[:, None], torch.nan)

        monkeypatch.setattr(torch_native, "_grouped_mm", grouped_mm)
    use_grouped_mm = request.param == "grouped_mm"
    monkeypatch.setattr(torch_native, "_why_host_sync", lambda *_: None if use_grouped_mm else "the test says so")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_standard(ends: str, dtype: torch.dtype, weighted: bool) -> None:
    layer = Layer.of(TorchNative, dtype=dtype)
    layer.check_standard(layer.rows(19), random_ids(19, 2, 5), normal(19, 2, seed=7) if weighted else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(Activation))
def test_activations_with_bias(ends: str, activation: Activation, dtype: torch.dtype) -> None:
    layer = Layer.of(TorchNative, dtype=dtype, activation=activation, has_bias=True, swiglu_limit=2.0)
    layer.check_standard(layer.rows(6) * 3, random_ids(6, 2, 5), normal(6, 2, seed=7))


@pytest.mark.parametrize("sizes", [(576, 704), (33, 7), (1, 1)], ids=str)
def test_odd_sizes(sizes: tuple[int, int]) -> None:
    layer = Layer.of(TorchNative, num_experts=2, hidden_size=sizes[0], intermediate_size=sizes[1])
    layer.check_standard(layer.rows(5), random_ids(5, 2, 2), normal(5, 2, seed=7))


@pytest.mark.parametrize(
    "local_ids",
    [[[4, 4]] * 9, [[-1, -1]] * 3, [[-1, 2], [0, -1], [-1, -1]], [[3, 3], [0, 3]]],
    ids=["one expert", "none here", "some skipped", "twice in a row"],
)
def test_routings(ends: str, local_ids: list[list[int]]) -> None:
    layer = Layer.of(TorchNative, dtype=torch.float32, has_bias=True)
    ids = torch.tensor(local_ids, dtype=torch.int32, device=DEVICE)
    out = layer.check_standard(layer.rows(len(ids)), ids, normal(len(ids), 2, seed=7))
    assert (out[(ids < 0).all(dim=1)] == 0).all()


def test_expert_parallel_rank_sees_its_own_experts_only(ends: str) -> None:
    layer = Layer.of(TorchNative, num_experts=7, parallel=ParallelConfig(ep_size=2, ep_rank=1))
    assert layer.config.num_local_experts == 3
    layer.check_standard(layer.rows(12), random_ids(12, 2, 3), normal(12, 2, seed=7))


@pytest.mark.parametrize("num_rows", [0, 4])
def test_rank_without_experts(ends: str, num_rows: int) -> None:
    layer = Layer.of(TorchNative, num_experts=2, parallel=ParallelConfig(ep_size=3, ep_rank=2))
    assert layer.config.num_local_experts == 0
    ids = torch.full((num_rows, 2), -1, dtype=torch.int32, device=DEVICE)
    out = layer.apply(layer.rows(num_rows), local_ids=ids, topk_weights=normal(num_rows, 2, seed=7))
    assert torch.equal(out, torch.zeros_like(out))
    batch = torch.empty(0, 4, 40, dtype=torch.bfloat16, device=DEVICE)
    counts = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert layer.apply(batch, expert_num_tokens=counts).shape == batch.shape


def test_no_rows(ends: str) -> None:
    layer = Layer.of(TorchNative)
    layer.check_standard(layer.rows(0), random_ids(0, 2, 5), normal(0, 2, seed=7))


def test_garbage_in_unwanted_rows_does_not_leak(ends: str) -> None:
    layer = Layer.of(TorchNative)
    ids, weights, rows = random_ids(16, 2, 5), normal(16, 2, seed=7), layer.rows(16)
    ids[::3] = -1
    expected = layer.expected(rows, ids, weights)
    rows[::3] = torch.nan
    weights[ids < 0] = torch.nan
    assert_close_to_oracle(layer.apply(rows, local_ids=ids, topk_weights=weights), expected, torch.bfloat16)


def test_nan_stays_in_its_row(ends: str) -> None:
    layer = Layer.of(TorchNative)
    ids, rows = torch.zeros(5, 2, dtype=torch.int32, device=DEVICE), layer.rows(5)
    expected = layer.expected(rows, ids, None)
    rows[3, 1] = torch.nan
    out = layer.apply(rows, local_ids=ids, topk_weights=None)
    others = [0, 1, 2, 4]
    assert_close_to_oracle(out[others], expected[others], torch.bfloat16)
    assert out[3].isnan().all()


def test_strided_rows_and_ids(ends: str) -> None:
    layer = Layer.of(TorchNative)
    rows = normal(8, 100, seed=5, dtype=torch.bfloat16)[:, 16:56]
    layer.check_standard(rows, random_ids(8, 6, 5)[:, ::3], normal(8, 4, seed=7)[:, 1:3])
    layer.check_standard(rows[:1].expand(8, -1), random_ids(8, 2, 5), normal(8, 2, seed=7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_batched_experts(dtype: torch.dtype, has_bias: bool) -> None:
    layer = Layer.of(TorchNative, dtype=dtype, has_bias=has_bias)
    layer.check_batched([0, 17, 1, 33, 0], max_tokens=33)


SEGMENTS = [0, 17, 0, 130, 0]
"""Rows of each expert; empty segments leading, in the middle and trailing, and one of two blocks."""


@pytest.mark.parametrize(("dtype", "has_bias"), [(torch.bfloat16, True), (torch.float32, False)])
def test_contiguous(ends: str, dtype: torch.dtype, has_bias: bool) -> None:
    layer = Layer.of(TorchNative, dtype=dtype, has_bias=has_bias)
    layer.check_contiguous(SEGMENTS)
    layer.check_contiguous([0] * 5)
    rows, group_ends, expert_of = layer.segments(SEGMENTS)
    output = torch.empty_like(rows)
    out = layer.apply(rows, group_ends=group_ends, output=output)
    assert out is output
    assert torch.equal(out[expert_of >= 0], layer.check_contiguous(SEGMENTS))


def test_contiguous_without_slots_or_experts(ends: str) -> None:
    layer = Layer.of(TorchNative, num_experts=2)
    none = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert layer.apply(layer.rows(0), group_ends=none).shape == (0, 40)
    layer = Layer.of(TorchNative, num_experts=2, parallel=ParallelConfig(ep_size=3, ep_rank=2))
    assert layer.apply(layer.rows(128), group_ends=none[:0]).shape == (128, 40)


def test_repeats_bitwise(ends: str) -> None:
    layer = Layer.of(TorchNative)
    rows, ids, weights = layer.rows(40), random_ids(40, 2, 5), normal(40, 2, seed=7)
    first = layer.apply(rows, local_ids=ids, topk_weights=weights)
    assert torch.equal(first, layer.apply(rows, local_ids=ids, topk_weights=weights))


FP8_SCHEMES = {
    "block": Fp8Block(),
    "per_token": Fp8PerToken(),
    "per_tensor": Fp8PerTensor(),
    "static": Fp8PerTensor(static_activations=True),
}
by_scheme = pytest.mark.parametrize("scheme", FP8_SCHEMES.values(), ids=FP8_SCHEMES)


class Fp8Layer(Layer):
    """A layer with fp8 weights; groups of 128 columns are cut short."""

    @classmethod
    def quantized(cls, scheme: QuantConfig, **overrides: Any) -> Fp8Layer:
        sizes = {"hidden_size": 192, "intermediate_size": 160}
        config = make_config(**(sizes | overrides), quantization=scheme)
        weights = ExpertWeights(**Weights.random(config, torch.device(DEVICE)).of_rank(config))
        weights.check(config)
        weights = TorchNative.prepare_weights(config, weights.canonical(config))
        return cls(config, weights, TorchNative(config, weights), WorkspaceArena(DEVICE, poison=True))

    def expected(
        self, activations: torch.Tensor, local_ids: torch.Tensor, topk_weights: torch.Tensor | None
    ) -> torch.Tensor:
        weights = self.weights
        return reference_moe(
            activations,
            local_ids,
            torch.ones(local_ids.shape, device=DEVICE) if topk_weights is None else topk_weights,
            weights.w13,
            weights.w2,
            w13_bias=weights.w13_bias,
            w2_bias=weights.w2_bias,
            quantization=self.config.quantization,
            w13_scale=weights.w13_scale,
            w2_scale=weights.w2_scale,
            a13_scale=weights.a13_scale,
            a2_scale=weights.a2_scale,
        )


@by_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_fp8(scheme: QuantConfig, dtype: torch.dtype, has_bias: bool) -> None:
    layer = Fp8Layer.quantized(scheme, dtype=dtype, has_bias=has_bias)
    layer.check_standard(layer.rows(19), random_ids(19, 2, 5), normal(19, 2, seed=7))
    layer.check_batched([0, 17, 1, 33, 0], max_tokens=33)


@by_scheme
def test_rows_that_the_dispatcher_quantized(scheme: QuantConfig) -> None:
    """Quantized before dispatch or after it, to the same bits."""
    layer = Fp8Layer.quantized(scheme)
    here = layer.check_contiguous(SEGMENTS)
    if has_static_activations(scheme):
        return
    assert torch.equal(layer.check_contiguous(SEGMENTS, quantizer(scheme)), here)
    rows, ids, weights = layer.rows(9), random_ids(9, 2, 5), normal(9, 2, seed=7)
    expected = layer.apply(rows, local_ids=ids, topk_weights=weights)
    quantized, scales = packed_with_scales(*quantize_rows(rows, input_group_size(scheme)))
    assert torch.equal(layer.apply(quantized, local_ids=ids, topk_weights=weights, scales=scales), expected)
    layer.check_batched([0, 3, 1, 0, 2], 3, lambda rows: quantize_rows(rows, input_group_size(scheme)))


@by_scheme
def test_fp8_holds_no_second_copy_of_the_weights(scheme: QuantConfig) -> None:
    layer = Fp8Layer.quantized(scheme)
    assert layer.experts.weights.w13.dtype is torch.float8_e4m3fn
    assert TorchNative.extra_weight_bytes(layer.config) == 0
    assert TorchNative.memory(layer.config)["dequantized_weights"] >= 4 * layer.weights.w13[0].numel()


@pytest.mark.parametrize("num_rows", [0, 4])
def test_fp8_on_a_rank_without_experts(num_rows: int) -> None:
    layer = Fp8Layer.quantized(
        Fp8PerTensor(static_activations=True), num_experts=2, parallel=ParallelConfig(ep_size=3, ep_rank=2)
    )
    ids = torch.full((num_rows, 2), -1, dtype=torch.int32, device=DEVICE)
    assert (layer.apply(layer.rows(num_rows), local_ids=ids) == 0).all()
    batch = torch.empty(0, 4, 192, dtype=torch.bfloat16, device=DEVICE)
    counts = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert layer.apply(batch, expert_num_tokens=counts).shape == batch.shape


def test_fp8_needs_the_host_on_every_machine() -> None:
    environment = Environment(torch_version="2.11.0").pretend(sm=90)
    config = make_config(quantization=Fp8Block())
    assert TorchNative.host_syncs(config, environment) == 1
    verdict = TorchNative.supports(make_config(quantization=Fp8Block(), cuda_graph=True), environment)
    assert [gate.name for gate in verdict.failed] == ["cuda_graph"]
    assert "grouped_mm rounds to bf16 what fp8_block needs in fp32" in verdict.reason


def test_supported_everywhere() -> None:
    environment = Environment(torch_version="2.11.0+cu130")
    for dtype in DTYPES:
        assert TorchNative.supports(make_config(dtype=dtype), environment).ok
        assert TorchNative.supports(make_config(dtype=dtype), environment.pretend(sm=75)).ok
    assert TorchNative.activation_formats == set(ActivationFormat)


def test_old_torch_and_other_blocks_are_refused() -> None:
    assert "2.8" in TorchNative.supports(make_config(), Environment(torch_version="2.7.1")).reason
    environment = Environment(torch_version="2.11.0")
    for scheme in FP8_SCHEMES.values():
        assert TorchNative.supports(make_config(quantization=scheme), environment).ok
    verdict = TorchNative.supports(make_config(quantization=Fp8Block(64, 128)), environment)
    assert verdict.reason == "quantization: needs fp8_block in tiles of 128 x 128, saw fp8_block 64 x 128"


@pytest.mark.parametrize(
    ("overrides", "sm", "reason"),
    [
        ({}, 90, None),
        ({}, 100, None),
        ({}, None, "no CUDA device"),
        ({}, 80, "SM 9x and 10x"),
        ({}, 120, "SM 9x and 10x"),
        ({"dtype": torch.float16}, 90, "bf16"),
        ({"hidden_size": 36}, 90, "multiples of 8"),
        ({"intermediate_size": 24, "parallel": ParallelConfig(tp_size=2)}, 90, "multiples of 8"),
    ],
)
def test_graph_capture_needs_device_side_grouped_mm(
    overrides: dict[str, Any], sm: int | None, reason: str | None
) -> None:
    environment = Environment(torch_version="2.11.0").pretend(sm=sm)
    assert TorchNative.supports(make_config(**overrides), environment).ok
    verdict = TorchNative.supports(make_config(cuda_graph=True, **overrides), environment)
    assert [gate.name for gate in verdict.failed] == ([] if reason is None else ["cuda_graph"])
    assert (reason or "all gates pass") in verdict.reason


def test_memory_of_a_large_layer() -> None:
    config = make_config(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048, max_tokens_per_rank=65536)
    memory = TorchNative.memory(config)
    # Room for the padding of 256 segments.
    assert memory["pair_output"] == (65536 * 8 + 256 * 127) * 7168 * 2 > 2**31
    assert memory["output"] == 65536 * 7168 * 2


@needs_cuda
@pytest.mark.gpu
@pytest.mark.sm90
def test_graph_replay_with_new_routing() -> None:
    layer = Layer.of(TorchNative, num_experts=16, hidden_size=256, intermediate_size=128, cuda_graph=True)
    rows, ids, weights = layer.rows(32), random_ids(32, 2, 16), normal(32, 2, seed=7)
    layer.apply(rows, local_ids=ids, topk_weights=weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.apply(rows, local_ids=ids, topk_weights=weights)
    for seed in range(3):
        rows.copy_(normal(32, 256, seed=seed, dtype=torch.bfloat16))
        ids.copy_(torch.randint(-1, 16, (32, 2), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert_close_to_oracle(out, layer.expected(rows, ids, weights), torch.bfloat16)
