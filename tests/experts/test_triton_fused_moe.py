"""TritonFusedMoE against the oracle, its gates, its workspace and its tile sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken, MoEConfig, ParallelConfig, QuantConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.experts.triton_fused_moe import (
    Buffers,
    TritonFusedMoE,
    contiguous_slots,
    hopper_buffers,
    hopper_tiles_of,
    standard_buffers,
)
from moe_plugin.kernels import quantize_rows as quantize_rows_kernels
from moe_plugin.kernels.hopper_tiling import batched_hopper_tiles
from moe_plugin.kernels.tiling import block_config, cdiv, down_block_config, max_num_blocks, shared_memory_bytes
from moe_plugin.modular_kernel import ActivationFormat
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.quantization import FP8_DTYPE, GROUP_SIZE, has_static_activations, input_group_size, quantize_rows
from moe_plugin.workspace import WorkspaceArena
from tests.experts.cases import (
    DEVICE,
    Layer,
    check_graph_replays,
    group_major,
    make_config,
    normal,
    packed_with_scales,
    quantizer,
    random_ids,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_standard(dtype: torch.dtype, weighted: bool) -> None:
    layer = Layer.of(TritonFusedMoE, dtype=dtype)
    layer.check_standard(layer.rows(19), random_ids(19, 2, 5), normal(19, 2, seed=7) if weighted else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(Activation))
def test_activations_with_bias(activation: Activation, dtype: torch.dtype) -> None:
    layer = Layer.of(TritonFusedMoE, dtype=dtype, activation=activation, has_bias=True, swiglu_limit=2.0)
    layer.check_standard(layer.rows(6) * 3, random_ids(6, 2, 5), normal(6, 2, seed=7))


FP8_SCHEMES = {
    "block": Fp8Block(),
    "per_token": Fp8PerToken(),
    "per_tensor": Fp8PerTensor(),
    "static": Fp8PerTensor(static_activations=True),
}


@pytest.fixture(params=FP8_SCHEMES)
def scheme(request: pytest.FixtureRequest) -> QuantConfig:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton has e4m3 from SM 89 on")
    return FP8_SCHEMES[request.param]


@pytest.mark.parametrize(
    ("dtype", "has_bias"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float32, False)],
)
def test_fp8(scheme: QuantConfig, dtype: torch.dtype, has_bias: bool) -> None:
    layer = Layer.of(
        TritonFusedMoE,
        quantization=scheme,
        dtype=dtype,
        has_bias=has_bias,
        num_experts=3,
        hidden_size=136,
        intermediate_size=200,
    )
    layer.check_standard(layer.rows(11), random_ids(11, 2, 3), normal(11, 2, seed=7) if has_bias else None)
    layer.check_batched([0, 17, 1], max_tokens=18)


@pytest.mark.parametrize("sizes", [(40, 24), (128, 128), (2880, 32), (576, 704)], ids=str)
def test_fp8_sizes(scheme: QuantConfig, sizes: tuple[int, int]) -> None:
    layer = Layer.of(
        TritonFusedMoE, quantization=scheme, num_experts=2, hidden_size=sizes[0], intermediate_size=sizes[1]
    )
    layer.check_standard(layer.rows(5), random_ids(5, 2, 2), normal(5, 2, seed=7))


@pytest.mark.parametrize("activation", list(Activation))
def test_fp8_activations(scheme: QuantConfig, activation: Activation) -> None:
    layer = Layer.of(TritonFusedMoE, quantization=scheme, activation=activation, has_bias=True, swiglu_limit=2.0)
    layer.check_standard(layer.rows(6), random_ids(6, 2, 5), normal(6, 2, seed=7))


def test_fp8_repeats_bitwise(scheme: QuantConfig) -> None:
    layer = Layer.of(TritonFusedMoE, quantization=scheme)
    rows, ids, weights = layer.rows(40), random_ids(40, 2, 5), normal(40, 2, seed=7)
    first = layer.apply(rows, local_ids=ids, topk_weights=weights)
    assert torch.equal(first, layer.apply(rows, local_ids=ids, topk_weights=weights))


def test_fp8_garbage_in_unwanted_rows_does_not_leak(scheme: QuantConfig) -> None:
    layer = Layer.of(TritonFusedMoE, quantization=scheme)
    ids, weights, rows = random_ids(16, 2, 5), normal(16, 2, seed=7), layer.rows(16)
    ids[::3] = -1
    rows[4] = 0
    expected = layer.expected(rows, ids, weights)
    rows[::3] = torch.nan
    weights[ids < 0] = torch.nan
    assert_close_to_oracle(layer.apply(rows, local_ids=ids, topk_weights=weights), expected, layer.tolerance)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on inf in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fp8_nan_and_inf_stay_in_their_row(scheme: QuantConfig, value: float) -> None:
    layer = Layer.of(TritonFusedMoE, quantization=scheme)
    ids, rows = torch.zeros(5, 2, dtype=torch.int32, device=DEVICE), layer.rows(5)
    expected = layer.expected(rows, ids, None)
    rows[3, 1] = value
    out = layer.apply(rows, local_ids=ids, topk_weights=None)
    others = [0, 1, 2, 4]
    assert_close_to_oracle(out[others], expected[others], layer.tolerance)
    # A given scale saturates Inf to the largest number; a measured one carries it on.
    saturates = has_static_activations(scheme) and value == torch.inf
    assert out[3].isfinite().all().item() == saturates


def test_rows_that_the_dispatcher_quantized(scheme: QuantConfig) -> None:
    if has_static_activations(scheme):
        pytest.skip("a dispatcher has no static scale")
    layer = Layer.of(TritonFusedMoE, quantization=scheme, hidden_size=200)
    rows, ids, weights = layer.rows(9), random_ids(9, 2, 5), normal(9, 2, seed=7)
    quantized, scales = quantize_rows(rows, input_group_size(scheme))
    expected = layer.apply(rows, local_ids=ids, topk_weights=weights)
    assert_close_to_oracle(expected, layer.expected(rows, ids, weights), layer.tolerance)
    for sent in ((quantized, group_major(scales)), packed_with_scales(quantized, scales)):
        out = layer.apply(sent[0], local_ids=ids, topk_weights=weights, scales=sent[1])
        assert torch.equal(out, expected)


SEGMENTS = [0, 17, 0, 130, 0]
"""Rows of each expert; empty segments leading, in the middle and trailing, and one of two blocks."""


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter programs that find no rows cost milliseconds each."""
    if DEVICE == "cpu":
        monkeypatch.setattr(quantize_rows_kernels, "_RESIDENT_WARPS", 4)


@pytest.mark.parametrize(("dtype", "has_bias"), [(torch.bfloat16, True), (torch.float32, False)])
def test_contiguous(dtype: torch.dtype, has_bias: bool) -> None:
    layer = Layer.of(TritonFusedMoE, dtype=dtype, has_bias=has_bias)
    layer.check_contiguous(SEGMENTS)
    layer.check_contiguous([0] * 5, num_rows=1)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("has_bias", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_contiguous_fp8(scheme: QuantConfig, has_bias: bool) -> None:
    """Quantized before dispatch or after it, to the same bits."""
    counts = SEGMENTS if DEVICE == "cuda" else [0, 17, 0, 3, 0]
    layer = Layer.of(TritonFusedMoE, quantization=scheme, hidden_size=144, intermediate_size=144, has_bias=has_bias)
    here = layer.check_contiguous(counts, num_rows=9)
    if not has_static_activations(scheme):
        assert torch.equal(layer.check_contiguous(counts, quantizer(scheme), num_rows=9), here)
        # Whichever way the scales lie.
        activations, group_ends, expert_of = layer.segments(counts)
        rows, scales = quantize_rows(activations, input_group_size(scheme))
        out = layer.apply(rows, group_ends=group_ends, scales=scales.contiguous(), num_rows=9)
        assert_close_to_oracle(out[expert_of >= 0], here, layer.tolerance)


@pytest.mark.parametrize("num_rows", [1, 60, 200, 1000])
def test_contiguous_in_every_block(num_rows: int) -> None:
    """The number of rows that may arrive decides about tiles, the group ends about work."""
    layer = Layer.of(TritonFusedMoE, max_tokens_per_rank=1024)
    layer.check_contiguous([5, 0, 130, 1, 0], num_rows=num_rows)


def test_contiguous_without_slots_or_experts() -> None:
    layer = Layer.of(TritonFusedMoE, num_experts=2)
    none = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert layer.apply(layer.rows(0), group_ends=none, num_rows=1).shape == (0, 40)
    layer = Layer.of(TritonFusedMoE, num_experts=2, parallel=ParallelConfig(ep_size=3, ep_rank=2))
    assert layer.apply(layer.rows(128), group_ends=none[:0], num_rows=1).shape == (128, 40)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("quantization", [None, Fp8Block()], ids=str)
def test_contiguous_calls_share_one_workspace(quantization: QuantConfig | None) -> None:
    """Other rows in the same buffers, into `output` or memory of the workspace; no more of it than declared."""
    layer = Layer.of(TritonFusedMoE, quantization=quantization, max_tokens_per_rank=6)
    declared = TritonFusedMoE.memory(layer.config)
    handle = layer.handle(6)
    # 6 rows, each with two pairs, need as many slots as these at most.
    slots = contiguous_slots(layer.config, 6)
    for counts in ([2, 0, 9, 1, 0], [0, 0, 0, 0, 12], [1, 1, 1, 1, 8]):
        rows, group_ends, expert_of = layer.segments(counts)
        rows = torch.cat([rows, rows.new_full((slots, 40), torch.nan)])[:slots]
        fields = {"group_ends": group_ends, "num_rows": 6}
        for output in (None, torch.full_like(rows, torch.nan)):
            out = layer.apply(rows, handle=handle, output=output, **fields)
            used = (expert_of >= 0).nonzero()[:, 0]
            expected = layer.expected(rows[used], expert_of[used, None].int(), None)
            assert_close_to_oracle(out[used], expected, layer.tolerance)
            assert output is None or out is output
    assert handle.workspace.nbytes <= sum(declared.values()) + 16 * len(declared)


@pytest.mark.parametrize("quantization", [None, Fp8Block()], ids=str)
def test_result_goes_where_finalize_wants_it(quantization: QuantConfig | None) -> None:
    layer = Layer.of(TritonFusedMoE, quantization=quantization)
    rows, ids = layer.rows(9), random_ids(9, 2, 5)
    expected = layer.apply(rows, local_ids=ids, topk_weights=None)
    output = torch.full_like(expected, torch.nan)
    assert layer.apply(rows, output=output, local_ids=ids, topk_weights=None) is output
    assert torch.equal(output, expected)
    counts = torch.tensor([3, 0, 2, 1, 3], dtype=torch.int32, device=DEVICE)
    batch = normal(5, 3, 40, seed=6, dtype=torch.bfloat16)
    expected = layer.apply(batch, expert_num_tokens=counts)
    output = torch.full_like(expected, torch.nan)
    assert layer.apply(batch, output=output, expert_num_tokens=counts) is output
    used = torch.arange(3, device=DEVICE) < counts[:, None]
    assert torch.equal(output[used], expected[used])


@pytest.mark.parametrize("sizes", [(576, 704), (33, 7), (1, 1)], ids=str)
def test_odd_sizes(sizes: tuple[int, int]) -> None:
    layer = Layer.of(TritonFusedMoE, num_experts=2, hidden_size=sizes[0], intermediate_size=sizes[1])
    layer.check_standard(layer.rows(5), random_ids(5, 2, 2), normal(5, 2, seed=7))


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_top_k(top_k: int) -> None:
    layer = Layer.of(TritonFusedMoE, num_experts=9, top_k=top_k, dtype=torch.float32)
    layer.check_standard(layer.rows(7), random_ids(7, top_k, 9), normal(7, top_k, seed=7))


@pytest.mark.parametrize(
    "local_ids",
    [[[4, 4]] * 9, [[-1, -1]] * 3, [[-1, 2], [0, -1], [-1, -1]], [[3, 3], [0, 3]]],
    ids=["one expert", "none here", "some skipped", "twice in a row"],
)
def test_routings(local_ids: list[list[int]]) -> None:
    layer = Layer.of(TritonFusedMoE, dtype=torch.float32, has_bias=True)
    ids = torch.tensor(local_ids, dtype=torch.int32, device=DEVICE)
    out = layer.check_standard(layer.rows(len(ids)), ids, normal(len(ids), 2, seed=7))
    assert (out[(ids < 0).all(dim=1)] == 0).all()


def test_expert_parallel_rank_sees_its_own_experts_only() -> None:
    layer = Layer.of(TritonFusedMoE, num_experts=7, parallel=ParallelConfig(ep_size=2, ep_rank=1))
    assert layer.config.num_local_experts == 3
    layer.check_standard(layer.rows(12), random_ids(12, 2, 3), normal(12, 2, seed=7))


@pytest.mark.parametrize("num_rows", [0, 4])
def test_rank_without_experts(num_rows: int) -> None:
    layer = Layer.of(TritonFusedMoE, num_experts=2, parallel=ParallelConfig(ep_size=3, ep_rank=2))
    assert layer.config.num_local_experts == 0
    ids = torch.full((num_rows, 2), -1, dtype=torch.int32, device=DEVICE)
    out = layer.apply(layer.rows(num_rows), local_ids=ids, topk_weights=normal(num_rows, 2, seed=7))
    assert torch.equal(out, torch.zeros_like(out))
    batch = torch.empty(0, 4, 40, dtype=torch.bfloat16, device=DEVICE)
    counts = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert layer.apply(batch, expert_num_tokens=counts).shape == batch.shape


def test_no_rows() -> None:
    layer = Layer.of(TritonFusedMoE)
    layer.check_standard(layer.rows(0), random_ids(0, 2, 5), normal(0, 2, seed=7))


def test_garbage_in_unwanted_rows_does_not_leak() -> None:
    layer = Layer.of(TritonFusedMoE)
    ids, weights, rows = random_ids(16, 2, 5), normal(16, 2, seed=7), layer.rows(16)
    ids[::3] = -1
    expected = layer.expected(rows, ids, weights)
    rows[::3] = torch.nan
    weights[ids < 0] = torch.nan
    assert_close_to_oracle(layer.apply(rows, local_ids=ids, topk_weights=weights), expected, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on inf in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_row(value: float) -> None:
    layer = Layer.of(TritonFusedMoE, dtype=torch.float32)
    ids, rows = torch.zeros(5, 2, dtype=torch.int32, device=DEVICE), layer.rows(5)
    expected = layer.expected(rows, ids, None)
    rows[3, 1] = value
    out = layer.apply(rows, local_ids=ids, topk_weights=None)
    others = [0, 1, 2, 4]
    assert_close_to_oracle(out[others], expected[others], torch.float32)
    assert not out[3].isfinite().all()


def test_strided_rows_and_ids() -> None:
    layer = Layer.of(TritonFusedMoE)
    rows = normal(8, 100, seed=5, dtype=torch.bfloat16)[:, 16:56]
    layer.check_standard(rows, random_ids(8, 6, 5)[:, ::3], normal(8, 4, seed=7)[:, 1:3])
    layer.check_standard(rows[:1].expand(8, -1), random_ids(8, 2, 5), normal(8, 2, seed=7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_batched_experts(dtype: torch.dtype, has_bias: bool) -> None:
    layer = Layer.of(TritonFusedMoE, dtype=dtype, has_bias=has_bias)
    layer.check_batched([0, 17, 1, 33, 0], max_tokens=33)


def test_batched_experts_without_tokens() -> None:
    Layer.of(TritonFusedMoE).check_batched([0, 0, 0, 0, 0], max_tokens=3)


@pytest.mark.parametrize("max_tokens", [64, 128, 24, 40])
@pytest.mark.parametrize("quantization", [None, *FP8_SCHEMES.values()], ids=["none", *FP8_SCHEMES])
def test_batches_of_whole_and_of_part_blocks(
    quantization: QuantConfig | None, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper in blocks that divide `max_tokens`, so that no store reaches into the next expert's rows."""
    if quantization is not None and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton has e4m3 from SM 89 on")
    # On tensor cores a short row may hold one flipped value too many.
    size = 256 if DEVICE == "cuda" else 128
    layer = Layer.of(TritonFusedMoE, quantization=quantization, hidden_size=size, intermediate_size=size)
    most = max_tokens
    if DEVICE == "cpu":
        # In the interpreter rows, and programs that find none, cost milliseconds each.
        most = 18
        monkeypatch.setattr(quantize_rows_kernels, "_RESIDENT_WARPS", 4)
    layer.check_batched([0, most, 1, 0, min(most, 17)], max_tokens)
    layer.check_batched([3, 0, 0, 0, most - 1], max_tokens)


def test_every_batch_of_a_multiple_of_eight_rows_has_a_block_on_hopper() -> None:
    for max_tokens in range(1, 300):
        for rows_per_expert in (1, 4, 16, 64, max_tokens):
            for element_size in (1, 2):
                tiles = batched_hopper_tiles(rows_per_expert, max_tokens, element_size)
                assert (tiles is not None) == (max_tokens % 8 == 0)
                if tiles is not None:
                    assert max_tokens % tiles.block_x == 0
                    assert tiles.gate_up.block_x == tiles.down.block_x
                    assert tiles.gate_up.wide == tiles.down.wide


def test_repeats_bitwise() -> None:
    layer = Layer.of(TritonFusedMoE)
    rows, ids, weights = layer.rows(40), random_ids(40, 2, 5), normal(40, 2, seed=7)
    first = layer.apply(rows, local_ids=ids, topk_weights=weights)
    assert torch.equal(first, layer.apply(rows, local_ids=ids, topk_weights=weights))


@pytest.mark.parametrize("quantization", [None, *FP8_SCHEMES.values()], ids=["none", *FP8_SCHEMES])
def test_steady_state_allocates_nothing(quantization: QuantConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer.of(TritonFusedMoE, quantization=quantization)
    rows, ids, weights = layer.rows(9), random_ids(9, 2, 5), normal(9, 2, seed=7)
    handle = layer.handle(9)
    first = layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
    held = handle.workspace.nbytes
    for name in ("empty", "zeros", "full", "empty_like", "zeros_like"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("allocates"))
    again = layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
    assert again.data_ptr() == first.data_ptr()
    assert handle.workspace.nbytes == held


@pytest.mark.parametrize("quantization", [None, *FP8_SCHEMES.values()], ids=["none", *FP8_SCHEMES])
@pytest.mark.parametrize("num_tokens", [1, 9, 64])
def test_declared_memory_covers_a_call(num_tokens: int, quantization: QuantConfig | None) -> None:
    layer = Layer.of(TritonFusedMoE, quantization=quantization)
    handle = layer.handle(num_tokens)
    rows, ids = layer.rows(num_tokens), random_ids(num_tokens, 2, 5)
    layer.apply(rows, handle=handle, local_ids=ids, topk_weights=normal(num_tokens, 2, seed=7))
    declared = TritonFusedMoE.memory(layer.config)
    for buffers in (standard_buffers(layer.config, num_tokens, 2), buffers_of_hopper_kernels(layer.config, num_tokens)):
        for name, size in nbytes(buffers).items():
            assert size <= declared[name], name
    assert handle.workspace.nbytes <= sum(declared.values()) + 16 * len(declared)


def buffers_of_hopper_kernels(config: MoEConfig, num_rows: int) -> Buffers:
    return hopper_buffers(config, num_rows, config.top_k, hopper_tiles_of(config, num_rows).block_x)


def nbytes(buffers: Buffers) -> dict[str, int]:
    return {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in buffers.items()}


def test_memory_of_a_large_layer_is_exact_arithmetic() -> None:
    config = make_config(
        num_experts=256,
        top_k=8,
        hidden_size=7168,
        intermediate_size=2048,
        max_tokens_per_rank=65536,
        parallel=ParallelConfig(ep_size=8),
    )
    pairs = 8 * 65536 * 8
    slots = 128 * max_num_blocks(pairs, 32, 128)
    memory = TritonFusedMoE.memory(config)
    assert memory["activations"] == memory["slot_output"] == slots * 7168 * 2 > 2**31
    assert memory["intermediate"] == slots * 2048 * 2 > 2**31
    assert memory["sorted_pairs"] == slots * 4
    assert memory["output"] == 8 * 65536 * 7168 * 2
    # The portable kernels quantize rows where they lie, the others copy them to slots: the larger need is declared.
    quantized = TritonFusedMoE.memory(replace(config, quantization=Fp8Block()))
    assert quantized["activations"] == slots * 7168
    assert quantized["activation_scale"] == slots * 56 * 4
    assert quantized["intermediate"] == slots * 2048
    assert quantized["intermediate_scale"] == slots * 16 * 4
    portable = nbytes(standard_buffers(replace(config, quantization=Fp8Block()), 8 * 65536, 8))
    slots = 64 * max_num_blocks(pairs, 32, 64)
    assert portable["activations"] == 8 * 65536 * 7168
    assert portable["activation_scale"] == 8 * 65536 * 56 * 4
    assert portable["intermediate"] == slots * 2048
    assert portable["intermediate_scale"] == slots * 16 * 4


@pytest.mark.parametrize("quantization", [None, *FP8_SCHEMES.values()], ids=["none", *FP8_SCHEMES])
def test_declared_memory_covers_both_kinds_of_kernels(quantization: QuantConfig | None) -> None:
    config = make_config(quantization=quantization, num_experts=16, top_k=4, max_tokens_per_rank=700)
    declared = TritonFusedMoE.memory(config)
    needed: dict[str, int] = {}
    for num_rows in range(1, 701):
        for buffers in (standard_buffers(config, num_rows, 4), buffers_of_hopper_kernels(config, num_rows)):
            for name, size in nbytes(buffers).items():
                needed[name] = max(needed.get(name, 0), size)
    # A smaller call may take smaller blocks, and so more of them: four bytes each.
    assert {name for name, size in needed.items() if size > declared[name]} <= {"block_expert"}
    # The other way round only for what takes most of the memory: nothing of it is declared in vain.
    for name in ("activations", "intermediate", "slot_output"):
        assert needed[name] == declared[name], name
    dynamic = quantization is not None and not has_static_activations(quantization)
    assert ("activation_scale" in declared) == ("intermediate_scale" in declared) == dynamic


@pytest.mark.parametrize("on_input", [False, True])
def test_warming_up_runs_calls_of_every_size(on_input: bool) -> None:
    layer = Layer.of(TritonFusedMoE, max_tokens_per_rank=3, top_k=1, apply_router_weight_on_input=on_input)
    steps = list(layer.experts.warm_up_steps(layer.arena))
    assert [name for name, _ in steps] == [f"triton_fused_moe, {rows} rows" for rows in (3, 2, 1)]
    held = []
    for _, step in steps:
        step()
        held.append(layer.arena.nbytes)
    # The largest call comes first, and the later ones find its memory.
    assert held == [held[0]] * 3
    handle = layer.handle(3)
    handle.workspace = handle.workspace.scoped(layer.experts.name)
    layer.apply(layer.rows(3), handle=handle, local_ids=random_ids(3, 1, 5))
    handle.workspace.release()
    assert layer.arena.nbytes == held[0]


def test_warming_up_a_rank_without_experts() -> None:
    parallel = ParallelConfig(ep_size=3, ep_rank=2)
    layer = Layer.of(TritonFusedMoE, num_experts=2, max_tokens_per_rank=1, parallel=parallel)
    steps = list(layer.experts.warm_up_steps(layer.arena))
    assert len(steps) == layer.config.max_received_rows == 3
    for _, step in steps:
        step()


def test_dispatch_capacity_bounds_memory() -> None:
    small = make_config(dispatch_capacity=8, cuda_graph=True, parallel=ParallelConfig(ep_size=4))
    assert TritonFusedMoE.memory(small)["output"] == 4 * 8 * 40 * 2


@pytest.fixture
def h200() -> Iterator[Environment]:
    return Environment(packages={"triton": Package("triton", "3.6.0")}).pretend(sm=90)


def test_supported(h200: Environment) -> None:
    assert TritonFusedMoE.supports(make_config(cuda_graph=True), h200).ok
    assert TritonFusedMoE.supports(make_config(), h200.pretend(sm=80)).ok
    interpreter = Environment(packages={"triton": Package("triton", "3.6.0")}, triton_interpret=True)
    assert TritonFusedMoE.supports(make_config(dtype=torch.float32), interpreter).ok
    for quantization in FP8_SCHEMES.values():
        for environment in (h200, h200.pretend(sm=89), interpreter):
            assert TritonFusedMoE.supports(make_config(quantization=quantization), environment).ok
    assert TritonFusedMoE.activation_formats == set(ActivationFormat)


@pytest.mark.parametrize(
    ("gate", "overrides", "changes"),
    [
        ("quantization", {"quantization": Fp8Block(64, 128)}, {}),
        ("sm", {}, {"sm": 75}),
        ("sm", {"quantization": Fp8PerToken()}, {"sm": 80}),
        ("triton", {}, {"packages": {}}),
        ("device", {}, {"device_type": "cpu", "sm": None}),
    ],
)
def test_refused(h200: Environment, gate: str, overrides: dict[str, Any], changes: dict[str, Any]) -> None:
    verdict = TritonFusedMoE.supports(make_config(**overrides), h200.pretend(**changes))
    assert [failed.name for failed in verdict.failed] == [gate]


def test_the_refusal_of_fp8_says_why(h200: Environment) -> None:
    verdict = TritonFusedMoE.supports(make_config(quantization=Fp8Block()), h200.pretend(sm=80))
    assert verdict.reason == "sm: needs SM 89 or newer, since Triton has no fp8 e4m3 before it, saw SM 80"


def kernels(environment: Environment, **overrides: Any) -> str:
    config = make_config(**overrides)
    assert TritonFusedMoE.supports(config, environment).ok
    return TritonFusedMoE.details(config, environment)["kernels"]


@pytest.mark.parametrize("quantization", [None, *FP8_SCHEMES.values()], ids=["none", *FP8_SCHEMES])
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_hopper_kernels_where_they_run(h200: Environment, version: str, quantization: QuantConfig | None) -> None:
    machine = h200.pretend(packages={"triton": Package("triton", version)})
    words = kernels(machine, quantization=quantization, hidden_size=64, intermediate_size=48)
    assert words == "hopper: TMA, wgmma, warp specialization"


@pytest.mark.parametrize(
    ("overrides", "changes", "gates", "seen"),
    [
        ({}, {"sm": 80}, ["sm"], "SM 80"),
        ({}, {"sm": 89}, ["sm"], "SM 89"),
        ({}, {"sm": 100}, ["sm"], "SM 100"),
        ({"quantization": Fp8Block(), "hidden_size": 48, "intermediate_size": 16}, {"sm": 89}, ["sm"], "SM 89"),
        ({}, {"packages": {"triton": Package("triton", "3.5.1")}}, ["triton"], "3.5.1"),
        ({"dtype": torch.float32}, {}, ["dtype"], "float32"),
        ({"hidden_size": 36}, {}, ["sizes"], "H 36, I 24"),
        ({"intermediate_size": 7}, {}, ["sizes"], "H 40, I 7"),
        ({"quantization": Fp8PerToken(), "hidden_size": 72, "intermediate_size": 16}, {}, ["sizes"], "H 72, I 16"),
        ({"dtype": torch.float32, "hidden_size": 33}, {"sm": 80}, ["sm", "dtype", "sizes"], "H 33, I 24"),
    ],
    ids=str,
)
def test_portable_kernels_elsewhere_and_why(
    h200: Environment, overrides: dict[str, Any], changes: dict[str, Any], gates: list[str], seen: str
) -> None:
    words = kernels(h200.pretend(**changes), **overrides)
    kind, _, reasons = words.partition(": ")
    assert kind == "portable"
    assert [reason.partition(":")[0] for reason in reasons.split("; ")] == gates
    assert all("needs" in reason and "saw" in reason for reason in reasons.split("; "))
    assert words.endswith(f"saw {seen}")


def test_portable_kernels_in_the_interpreter() -> None:
    interpreter = Environment(packages={"triton": Package("triton", "3.6.0")}, triton_interpret=True)
    assert kernels(interpreter) == "portable: sm: needs SM 90: wgmma exists nowhere else, saw no CUDA device"


def test_missing_triton_is_named_even_where_the_layer_is_refused(h200: Environment) -> None:
    environment = h200.pretend(packages={})
    assert not TritonFusedMoE.supports(make_config(), environment).ok
    assert "saw not installed" in TritonFusedMoE.details(make_config(), environment)["kernels"]


@pytest.mark.parametrize("dtype", [*DTYPES, FP8_DTYPE])
@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120, 75])
@pytest.mark.parametrize("rows_per_expert", [0, 1, 16, 17, 64, 100, 128, 5000])
def test_tiles_fit_the_gpu(rows_per_expert: int, sm: int, dtype: torch.dtype) -> None:
    limit = shared_memory_bytes(sm)
    gate_up = block_config(rows_per_expert, dtype, limit)
    down = down_block_config(gate_up, dtype, limit)
    assert down.block_m == gate_up.block_m
    for block in (gate_up, down):
        assert block.shared_memory(dtype) <= limit
        assert block.num_stages >= 2
        accumulators = block.block_m * block.block_n // (32 * block.num_warps)
        assert accumulators <= (64 if dtype is FP8_DTYPE else 128)
        for size in (block.block_m, block.block_n // 2, block.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
    if dtype is FP8_DTYPE:
        assert gate_up.block_n == 2 * GROUP_SIZE
        assert gate_up.block_k == down.block_k == GROUP_SIZE


def test_tiles_grow_with_the_rows() -> None:
    def block_m(rows: int) -> int:
        return block_config(rows, torch.bfloat16, shared_memory_bytes(90)).block_m

    assert [block_m(rows) for rows in (0, 1, 16, 17, 33, 65, 1000)] == [16, 16, 16, 32, 64, 128, 128]


@pytest.mark.parametrize("rows_per_expert", [1, 60, 1000])
def test_rows_per_block_do_not_depend_on_the_gpu(rows_per_expert: int) -> None:
    sizes = {block_config(rows_per_expert, torch.bfloat16, shared_memory_bytes(sm)).block_m for sm in (80, 89, 90)}
    assert len(sizes) == 1


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 64, 700, 4000])
def test_every_tile_on_the_gpu(num_rows: int, dtype: torch.dtype) -> None:
    layer = Layer.of(
        TritonFusedMoE, num_experts=16, hidden_size=576, intermediate_size=704, dtype=dtype, max_tokens_per_rank=4096
    )
    layer.check_standard(layer.rows(num_rows), random_ids(num_rows, 2, 16), normal(num_rows, 2, seed=7))
    layer.check_batched([0, num_rows, 1, 5] * 4, max_tokens=num_rows)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64, 128, 129, 700])
def test_every_fp8_tile_on_the_gpu(num_rows: int, scheme: QuantConfig) -> None:
    layer = Layer.of(
        TritonFusedMoE,
        quantization=scheme,
        num_experts=16,
        hidden_size=576,
        intermediate_size=704,
        max_tokens_per_rank=4096,
    )
    layer.check_standard(layer.rows(num_rows), random_ids(num_rows, 2, 16), normal(num_rows, 2, seed=7))
    layer.check_batched([0, num_rows, 1, min(num_rows, 5)] * 4, max_tokens=num_rows)


def on_hopper(**overrides: Any) -> Layer:
    """A layer for every tile of the Hopper kernels, which it must take."""
    sizes = {"num_experts": 16, "hidden_size": 576, "intermediate_size": 704, "max_tokens_per_rank": 4096}
    layer = Layer.of(TritonFusedMoE, **(sizes | overrides))
    assert isinstance(layer.experts, TritonFusedMoE)
    assert layer.experts.kernels == "hopper"
    return layer


def strided(weights: torch.Tensor) -> torch.Tensor:
    """The same numbers, each row followed by 16 others: weights that TMA does not take as one matrix."""
    return torch.cat([weights, torch.zeros_like(weights[..., :16])], dim=-1)[..., :-16]


def on_portable(layer: Layer) -> Layer:
    """The same layer, computed by the portable kernels."""
    weights = replace(layer.weights, w13=strided(layer.weights.w13), w2=strided(layer.weights.w2))
    experts = TritonFusedMoE(layer.config, weights)
    assert experts.kernels == "portable"
    return Layer(layer.config, weights, experts, WorkspaceArena(DEVICE, poison=True))


def switch_points(**overrides: Any) -> list[int]:
    """Numbers of rows just before and just after another tile is chosen, and the next one."""
    config = make_config(num_experts=16, **overrides)
    tiles = [hopper_tiles_of(config, num_rows) for num_rows in range(1, 1200)]
    last = [num_rows for num_rows in range(1, 1199) if tiles[num_rows - 1] != tiles[num_rows]]
    return sorted({num_rows + after for num_rows in last for after in (0, 1)})


SCHEMES = {"none": None} | FP8_SCHEMES
LAYERS_AT_SWITCH_POINTS = [
    pytest.param(scheme, num_rows, id=f"{name}-{num_rows}")
    for name, scheme in SCHEMES.items()
    for num_rows in switch_points(quantization=scheme)
]
hopper_only = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def test_there_are_switch_points_of_every_kind() -> None:
    for scheme in SCHEMES.values():
        config = make_config(num_experts=16, quantization=scheme)
        tiles = [hopper_tiles_of(config, num_rows).gate_up for num_rows in switch_points(quantization=scheme)]
        assert {tile.wide for tile in tiles} == {False, True}
        assert len({tile.block_x for tile in tiles}) >= 3


@hopper_only
@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize(("quantization", "num_rows"), LAYERS_AT_SWITCH_POINTS)
def test_tiles_of_the_hopper_kernels(quantization: QuantConfig | None, num_rows: int) -> None:
    layer = on_hopper(quantization=quantization)
    layer.check_standard(layer.rows(num_rows), random_ids(num_rows, 2, 16), normal(num_rows, 2, seed=7))


def counts_of(num_rows: int) -> list[int]:
    """Rows of 16 experts that are sent 2 pairs of each row: none, one, all, and shares that fill no block."""
    most = max(num_rows // 4, 1)
    return [0, 1, most, most + 1, 0, num_rows, 2, 0, *[most // 2] * 7, 0]


@hopper_only
@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize(("quantization", "num_rows"), LAYERS_AT_SWITCH_POINTS)
def test_contiguous_in_tiles_of_the_hopper_kernels(quantization: QuantConfig | None, num_rows: int) -> None:
    layer = on_hopper(quantization=quantization)
    here = layer.check_contiguous(counts_of(num_rows), num_rows=num_rows)
    if quantization is not None and not has_static_activations(quantization):
        sent = layer.check_contiguous(counts_of(num_rows), quantizer(quantization), num_rows=num_rows)
        assert torch.equal(sent, here)


@hopper_only
@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("num_rows", [3, 200, 700])
@pytest.mark.parametrize("quantization", [Fp8Block(), Fp8PerToken(), Fp8PerTensor()], ids=str)
def test_hopper_kernels_on_rows_that_the_dispatcher_quantized(quantization: QuantConfig, num_rows: int) -> None:
    layer = on_hopper(quantization=quantization)
    rows, ids, weights = layer.rows(num_rows), random_ids(num_rows, 2, 16), normal(num_rows, 2, seed=7)
    expected = layer.apply(rows, local_ids=ids, topk_weights=weights).clone()
    quantized, scales = quantize_rows(rows, input_group_size(quantization))
    for sent in ((quantized, scales), packed_with_scales(quantized, scales)):
        out = layer.apply(sent[0], local_ids=ids, topk_weights=weights, scales=sent[1])
        assert torch.equal(out, expected)
    batch, counts, used = layer.batch([0, min(num_rows, 40), 1, 17] * 4, 40)
    expected = layer.apply(batch, expert_num_tokens=counts)[used].clone()
    quantized, scales = quantize_rows(batch, input_group_size(quantization))
    for each in (scales, group_major(scales)):
        assert torch.equal(layer.apply(quantized, expert_num_tokens=counts, scales=each)[used], expected)


@hopper_only
@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("num_rows", [9, 700])
@pytest.mark.parametrize("is_sent_quantized", [False, True])
@pytest.mark.parametrize("quantization", [None, Fp8Block()], ids=str)
def test_graph_replays_of_contiguous_rows(
    quantization: QuantConfig | None, is_sent_quantized: bool, num_rows: int
) -> None:
    """Each replay finds other group ends in the same places, and its kernels begin while the ones before end."""
    layer = on_hopper(quantization=quantization)
    slots = contiguous_slots(layer.config, num_rows)
    scheme = quantization if is_sent_quantized else None
    rows = torch.empty(slots, 576, dtype=torch.bfloat16 if scheme is None else FP8_DTYPE, device=DEVICE)
    scales = None if scheme is None else torch.empty(cdiv(576, 128), slots, device=DEVICE).T
    group_ends = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    handle = layer.handle(num_rows)

    def fill(counts: list[int]) -> torch.Tensor:
        given, ends, expert_of = layer.segments(counts)
        group_ends.copy_(ends)
        sent = (given, None) if scheme is None else quantizer(scheme)(given)
        length = min(slots, len(given))
        rows.view(torch.uint8)[:length] = sent[0].view(torch.uint8)[:length]
        if scales is not None:
            scales[:length] = sent[1][:length]
        return expert_of[:length] >= 0

    def run() -> torch.Tensor:
        return layer.apply(rows, handle=handle, group_ends=group_ends, scales=scales, num_rows=num_rows)

    fill([0] * 16)
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for counts in ([0] * 15 + [2 * num_rows], [num_rows // 8] * 16, [0] * 16, [1, 0, num_rows, 3] + [0] * 12):
        used = fill(counts)
        graph.replay()
        replayed = out[: len(used)][used].clone()
        expected = layer.check_contiguous(counts, None if scheme is None else quantizer(scheme), num_rows=num_rows)
        assert torch.equal(replayed, expected)


@hopper_only
@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("num_rows", [3, 700])
@pytest.mark.parametrize("quantization", SCHEMES.values(), ids=SCHEMES)
def test_hopper_and_portable_kernels_agree(quantization: QuantConfig | None, num_rows: int) -> None:
    layer = on_hopper(quantization=quantization)
    rows, ids, weights = layer.rows(num_rows), random_ids(num_rows, 2, 16), normal(num_rows, 2, seed=7)
    first = layer.apply(rows, local_ids=ids, topk_weights=weights)
    second = on_portable(layer).apply(rows, local_ids=ids, topk_weights=weights)
    assert_close_to_oracle(first, second, layer.tolerance)


@hopper_only
@pytest.mark.gpu
@pytest.mark.sm90
def test_the_kernels_that_run_are_those_that_are_named() -> None:
    import triton

    def launched(call: Callable[[], object]) -> list[str]:
        names: list[str] = []

        def note(metadata: Any) -> None:
            names.append(metadata.get()["name"])

        hooks = triton.knobs.runtime.launch_enter_hook
        hooks.add(note)
        try:
            call()
        finally:
            hooks.remove(note)
        return names

    def standard(layer: Layer) -> None:
        layer.apply(layer.rows(5), local_ids=random_ids(5, 2, 16), topk_weights=normal(5, 2, seed=7))

    def batched(max_tokens: int) -> Callable[[], object]:
        return lambda: on_hopper().check_batched([3, 0, 1, 2] * 4, max_tokens)

    for call in (lambda: standard(on_hopper()), batched(24), batched(128)):
        assert launched(call).count("hopper_gemm_kernel") == 2
    for call in (lambda: standard(on_portable(on_hopper())), batched(20)):
        names = launched(call)
        assert "hopper_gemm_kernel" not in names
        assert {"_gate_up_activation_kernel", "_down_kernel"} <= set(names)


@hopper_only
@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("num_rows", [9, 700])
@pytest.mark.parametrize("quantization", [None, Fp8Block(), Fp8PerTensor(static_activations=True)], ids=str)
def test_hopper_kernels_confine_nan_and_repeat_bitwise(quantization: QuantConfig | None, num_rows: int) -> None:
    layer = on_hopper(quantization=quantization)
    rows, ids, weights = layer.rows(num_rows), random_ids(num_rows, 2, 16), normal(num_rows, 2, seed=7)
    ids[3] = torch.tensor([2, 5])
    first = layer.apply(rows, local_ids=ids, topk_weights=weights).clone()
    assert torch.equal(layer.apply(rows, local_ids=ids, topk_weights=weights), first)
    rows[3, 1] = torch.nan
    out = layer.apply(rows, local_ids=ids, topk_weights=weights)
    others = torch.arange(num_rows, device=DEVICE) != 3
    assert out[3].isnan().all()
    assert torch.equal(out[others], first[others])


@hopper_only
@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("num_rows", [9, 700])
@pytest.mark.parametrize("quantization", [None, Fp8Block()], ids=str)
def test_graph_replays_of_the_hopper_kernels(quantization: QuantConfig | None, num_rows: int) -> None:
    check_graph_replays(on_hopper(quantization=quantization), num_rows, num_experts=16)


@needs_cuda
@pytest.mark.gpu
def test_graph_replay_with_new_routing() -> None:
    layer = Layer.of(TritonFusedMoE, num_experts=16, hidden_size=256, intermediate_size=128)
    rows, ids, weights = layer.rows(32), random_ids(32, 2, 16), normal(32, 2, seed=7)
    handle = layer.handle(32)
    layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
    for seed in range(3):
        rows.copy_(normal(32, 256, seed=seed, dtype=torch.bfloat16))
        ids.copy_(torch.randint(-1, 16, (32, 2), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert_close_to_oracle(out, layer.expected(rows, ids, weights), torch.bfloat16)
