"""The grouped GEMMs against one plain matrix product per pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.activation import gated_activation
from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken, QuantConfig
from moe_plugin.kernels.counting_sort import counting_sort
from moe_plugin.kernels.grouped_gemm import BatchedRows, SortedRows, down, gate_up_activation
from moe_plugin.kernels.tiling import BlockConfig, cdiv, counting_sort_shapes
from moe_plugin.numerics import TOLERANCES, Tolerance, assert_close_to_oracle
from moe_plugin.quantization import (
    FP8_DTYPE,
    FP8_MAX,
    GROUP_SIZE,
    LEAST_AMAX,
    dequantize_rows,
    dequantize_weights,
    quantize_rows,
    quantize_static,
    quantize_weights,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CANARY = -123.0
BLOCK = BlockConfig(block_m=16, block_n=64, block_k=32, group_m=2, num_warps=4, num_stages=2)
FP8_BLOCK = BlockConfig(block_m=16, block_n=256, block_k=128, group_m=2, num_warps=4, num_stages=2)
# Sums of 128 products in a tensor core keep about 14 bits; the interpreter's are full fp32.
FP8_PRODUCTS = Tolerance(frobenius=1e-3, row=2e-3) if DEVICE == "cuda" else TOLERANCES[torch.float32]
needs_fp8 = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="Triton has e4m3 from SM 89 on"
)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def canaries(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, CANARY, dtype=dtype, device=DEVICE)


def sort_rows(local_ids: torch.Tensor, num_experts: int, block: BlockConfig) -> SortedRows:
    shapes = counting_sort_shapes(*local_ids.shape, num_experts, block.block_m)
    buffers = {name: torch.empty(shape, dtype=torch.int32, device=DEVICE) for name, shape in shapes.items()}
    counting_sort(local_ids, num_experts, block.block_m, **buffers)
    return SortedRows(buffers["sorted_pairs"], buffers["block_expert"], local_ids.numel(), local_ids.shape[1])


def slots_of(rows: SortedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that hold a pair, and their pairs."""
    slots = (rows.sorted_pairs < rows.num_pairs).nonzero().flatten()
    return slots, rows.sorted_pairs[slots].long()


def expected_gate_up(
    x: torch.Tensor, w13: torch.Tensor, bias: torch.Tensor | None, activation: Activation = Activation.SILU_AND_MUL
) -> torch.Tensor:
    """x [P, H] with a weight matrix per row, w13 [P, 2I, H] -> fp32 [P, I]."""
    gate_up = torch.einsum("ph,pih->pi", x.double(), w13.double())
    if bias is not None:
        gate_up += bias.double()
    return gated_activation(gate_up, activation).float()


def expected_down(x: torch.Tensor, w2: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [P, I], w2 [P, H, I] -> fp32 [P, H]."""
    product = torch.einsum("pi,phi->ph", x.double(), w2.double())
    return (product if bias is None else product + bias.double()).float()


class StandardCase:
    """Random operands of both GEMMs on sorted rows."""

    def __init__(
        self,
        local_ids: torch.Tensor,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        has_bias: bool = False,
        block: BlockConfig = BLOCK,
    ) -> None:
        self.local_ids = local_ids.to(DEVICE, torch.int32)
        self.block = block
        self.rows = sort_rows(self.local_ids, num_experts, block)
        self.slots, self.pairs = slots_of(self.rows)
        self.tokens = self.pairs // self.local_ids.shape[1]
        self.experts = self.local_ids.flatten()[self.pairs].long()
        self.x = normal(local_ids.shape[0], hidden_size, seed=1, dtype=dtype)
        self.w13 = normal(num_experts, 2 * intermediate_size, hidden_size, seed=2, dtype=dtype, scale=hidden_size**-0.5)
        self.w2 = normal(
            num_experts, hidden_size, intermediate_size, seed=3, dtype=dtype, scale=intermediate_size**-0.5
        )
        self.b13 = normal(num_experts, 2 * intermediate_size, seed=4, dtype=dtype) if has_bias else None
        self.b2 = normal(num_experts, hidden_size, seed=5, dtype=dtype) if has_bias else None
        capacity = self.rows.sorted_pairs.numel()
        self.intermediate = normal(capacity, intermediate_size, seed=6, dtype=dtype)

    def check_gate_up(self, activation: Activation = Activation.SILU_AND_MUL) -> torch.Tensor:
        out = canaries(*self.intermediate.shape, dtype=self.x.dtype)
        gate_up_activation(self.x, self.w13, self.b13, out, self.rows, self.block, activation)
        bias = None if self.b13 is None else self.b13[self.experts]
        expected = expected_gate_up(self.x[self.tokens], self.w13[self.experts], bias, activation)
        self._check_rows(out, self.slots, expected)
        return out

    def check_down(self) -> torch.Tensor:
        out = canaries(self.intermediate.shape[0], self.w2.shape[1], dtype=self.x.dtype)
        down(self.intermediate, self.w2, self.b2, out, self.rows, self.block)
        bias = None if self.b2 is None else self.b2[self.experts]
        expected = expected_down(self.intermediate[self.slots], self.w2[self.experts], bias)
        self._check_rows(out, self.slots, expected)
        return out

    def _check_rows(self, out: torch.Tensor, written: torch.Tensor, expected: torch.Tensor) -> None:
        assert_close_to_oracle(out[written], expected, self.x.dtype)
        untouched = torch.ones(out.shape[0], dtype=torch.bool, device=DEVICE)
        untouched[written] = False
        assert (out[untouched] == CANARY).all()


def random_ids(num_rows: int, top_k: int, num_experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randint(-1, num_experts, (num_rows, top_k), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("sizes", [(64, 32), (72, 40), (33, 7)], ids=str)
def test_random_routing(dtype: torch.dtype, has_bias: bool, sizes: tuple[int, int]) -> None:
    case = StandardCase(random_ids(21, 3, 5), 5, *sizes, dtype, has_bias)
    case.check_gate_up()
    case.check_down()


@pytest.mark.parametrize("sizes", [(576, 704), (2880, 96)], ids=str)
def test_sizes_of_real_models(sizes: tuple[int, int]) -> None:
    block = replace(BLOCK, block_n=256, block_k=64)
    case = StandardCase(random_ids(5, 2, 2), 2, *sizes, torch.bfloat16, block=block)
    case.check_gate_up()
    case.check_down()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(Activation))
def test_activations(activation: Activation, dtype: torch.dtype) -> None:
    case = StandardCase(random_ids(9, 2, 3), 3, 48, 24, dtype, has_bias=True)
    # Wide enough for swiglu's limits and for the far tails of the sigmoid.
    case.x *= 8
    case.check_gate_up(activation)


@pytest.mark.parametrize("expert", [0, 2])
def test_all_pairs_to_one_expert(expert: int) -> None:
    case = StandardCase(torch.full((33, 1), expert), 3, 32, 16, torch.float32)
    case.check_gate_up()
    case.check_down()


def test_the_same_expert_twice_in_a_row_makes_two_pairs() -> None:
    case = StandardCase(torch.tensor([[1, 1], [0, 1]]), 2, 32, 16, torch.float32)
    case.check_gate_up()
    case.check_down()
    assert len(case.slots) == 4


def test_nothing_routed_here_writes_nothing() -> None:
    case = StandardCase(torch.full((4, 2), -1), 3, 32, 16, torch.float32)
    assert (case.check_gate_up() == CANARY).all()
    assert (case.check_down() == CANARY).all()


def test_padding_is_not_read() -> None:
    case = StandardCase(random_ids(17, 2, 4), 4, 32, 16, torch.bfloat16)
    used_tokens, used_slots = set(case.tokens.tolist()), set(case.slots.tolist())
    case.x[[n for n in range(17) if n not in used_tokens]] = torch.nan
    case.intermediate[[s for s in range(case.intermediate.shape[0]) if s not in used_slots]] = torch.nan
    case.check_gate_up()
    case.check_down()


@pytest.mark.parametrize("activation", list(Activation))
def test_nan_stays_in_its_row(activation: Activation) -> None:
    case = StandardCase(torch.zeros(6, 1), 1, 32, 16, torch.float32)
    case.x[2, 5] = torch.nan
    out = canaries(*case.intermediate.shape, dtype=torch.float32)
    gate_up_activation(case.x, case.w13, None, out, case.rows, BLOCK, activation)
    assert out[case.slots].isnan().all(dim=1).tolist() == [False, False, True, False, False, False]
    result = canaries(out.shape[0], 32, dtype=torch.float32)
    down(out, case.w2, None, result, case.rows, BLOCK)
    assert result[case.slots].isnan().any(dim=1).tolist() == [False, False, True, False, False, False]


def test_strided_activations_and_weights() -> None:
    case = StandardCase(random_ids(12, 2, 3), 3, 40, 24, torch.bfloat16)
    case.x = normal(12, 100, seed=8, dtype=torch.bfloat16)[:, 30:70]
    case.w13 = normal(3, 48, 90, seed=9, dtype=torch.bfloat16, scale=0.1)[:, :, 16:56]
    case.w2 = normal(3, 80, 24, seed=10, dtype=torch.bfloat16, scale=0.2)[:, ::2]
    case.check_gate_up()
    case.check_down()


def test_fp32_is_full_precision() -> None:
    """A product in TF32 or bf16 would be off by 1e-3."""
    case = StandardCase(torch.zeros(3, 1), 1, 256, 32, torch.float32)
    out = canaries(*case.intermediate.shape, dtype=torch.float32)
    gate_up_activation(case.x, case.w13, None, out, case.rows, BLOCK, Activation.SILU_AND_MUL)
    expected = expected_gate_up(case.x[case.tokens], case.w13[case.experts], None)
    torch.testing.assert_close(out[case.slots], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_m", [16, 32, 128])
def test_block_sizes_give_the_same_result(block_m: int) -> None:
    case = StandardCase(
        random_ids(50, 2, 3), 3, 40, 24, torch.float32, block=replace(BLOCK, block_m=block_m, group_m=8)
    )
    case.check_gate_up()
    case.check_down()


def test_repeats_bitwise() -> None:
    case = StandardCase(random_ids(30, 2, 4), 4, 64, 32, torch.bfloat16)
    assert torch.equal(case.check_gate_up(), case.check_gate_up())
    assert torch.equal(case.check_down(), case.check_down())


def fp8_groups(x: torch.Tensor, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x quantized, its scales, and the numbers that both stand for."""
    quantized, scale = quantize_rows(x, group_size)
    return quantized, scale, dequantize_rows(quantized, scale, group_size)


class Fp8Case:
    """Random fp8 operands of both GEMMs on sorted rows, and the numbers they stand for."""

    def __init__(
        self, scheme: QuantConfig, hidden_size: int, intermediate_size: int, static: bool = False, has_bias: bool = True
    ) -> None:
        num_experts = 4
        local_ids = random_ids(13, 2, num_experts).to(DEVICE)
        self.rows = sort_rows(local_ids, num_experts, FP8_BLOCK)
        self.slots, pairs = slots_of(self.rows)
        self.tokens, self.experts = pairs // 2, local_ids.flatten()[pairs].long()
        self.groups = cdiv(intermediate_size, GROUP_SIZE)
        w13 = normal(num_experts, 2 * intermediate_size, hidden_size, seed=2, scale=hidden_size**-0.5)
        w2 = normal(num_experts, hidden_size, intermediate_size, seed=3, scale=intermediate_size**-0.5)
        self.w13, self.w13_scale = quantize_weights(w13, scheme, halves=2)
        self.w2, self.w2_scale = quantize_weights(w2, scheme)
        self.w13_values = dequantize_weights(self.w13, self.w13_scale, scheme, halves=2)
        self.w2_values = dequantize_weights(self.w2, self.w2_scale, scheme)
        self.b13 = normal(num_experts, 2 * intermediate_size, seed=4, scale=0.3) if has_bias else None
        self.b2 = normal(num_experts, hidden_size, seed=5) if has_bias else None
        x = normal(13, hidden_size, seed=1)
        intermediate = normal(self.rows.sorted_pairs.numel(), intermediate_size, seed=6)
        self.a2_scale = torch.tensor([0.02, 0.01, 0.03, 0.015], device=DEVICE) if static else None
        if self.a2_scale is not None:
            self.x_scale = torch.tensor([0.01], device=DEVICE)
            self.x = quantize_static(x, self.x_scale)
            self.x_values = self.x.float() * self.x_scale
            self.intermediate_scale = self.a2_scale
            scale_of_slot = torch.ones(len(intermediate), 1, device=DEVICE)
            scale_of_slot[self.slots] = self.a2_scale[self.experts, None]
            self.intermediate = quantize_static(intermediate, scale_of_slot)
            self.intermediate_values = self.intermediate.float() * scale_of_slot
        else:
            group_size = GROUP_SIZE if isinstance(scheme, Fp8Block) else None
            self.x, self.x_scale, self.x_values = fp8_groups(x, group_size)
            self.intermediate, self.intermediate_scale, self.intermediate_values = fp8_groups(intermediate, GROUP_SIZE)

    def expected_gate_up(self, activation: Activation = Activation.SILU_AND_MUL) -> torch.Tensor:
        bias = None if self.b13 is None else self.b13[self.experts]
        return expected_gate_up(self.x_values[self.tokens], self.w13_values[self.experts], bias, activation)

    def gate_up(self, out: torch.Tensor, out_scale: torch.Tensor | None) -> None:
        gate_up_activation(
            self.x,
            self.w13,
            self.b13,
            out,
            self.rows,
            FP8_BLOCK,
            Activation.SILU_AND_MUL,
            x_scale=self.x_scale,
            w13_scale=self.w13_scale,
            out_scale=out_scale,
        )


FP8_CASES = [
    pytest.param(Fp8PerTensor(), False, id="per_tensor"),
    pytest.param(Fp8PerTensor(), True, id="per_tensor_static"),
    pytest.param(Fp8PerToken(), False, id="per_token"),
    pytest.param(Fp8Block(), False, id="block"),
]
FP8_SIZES = [(256, 128), (40, 24), (136, 200), (576, 328)]


@needs_fp8
@pytest.mark.parametrize(("scheme", "static"), FP8_CASES)
@pytest.mark.parametrize("sizes", FP8_SIZES, ids=str)
def test_fp8_products(scheme: QuantConfig, static: bool, sizes: tuple[int, int]) -> None:
    """Without quantization of the result, both GEMMs are exact but for fp32 rounding."""
    case = Fp8Case(scheme, *sizes, static)
    out = canaries(len(case.intermediate), sizes[1], dtype=torch.float32)
    case.gate_up(out, None)
    assert_close_to_oracle(out[case.slots], case.expected_gate_up(), FP8_PRODUCTS)
    result = canaries(len(case.intermediate), sizes[0], dtype=torch.float32)
    scales = {"x_scale": case.intermediate_scale, "w2_scale": case.w2_scale}
    for block in (FP8_BLOCK, replace(FP8_BLOCK, block_n=64)):
        down(case.intermediate, case.w2, case.b2, result, case.rows, block, **scales)
        bias = None if case.b2 is None else case.b2[case.experts]
        expected = expected_down(case.intermediate_values[case.slots], case.w2_values[case.experts], bias)
        assert_close_to_oracle(result[case.slots], expected, FP8_PRODUCTS)
    for written in (out, result):
        untouched = torch.ones(len(written), dtype=torch.bool, device=DEVICE)
        untouched[case.slots] = False
        assert (written[untouched] == CANARY).all()


@needs_fp8
@pytest.mark.parametrize(("scheme", "static"), FP8_CASES)
@pytest.mark.parametrize("sizes", FP8_SIZES, ids=str)
def test_the_intermediate_is_quantized(scheme: QuantConfig, static: bool, sizes: tuple[int, int]) -> None:
    case = Fp8Case(scheme, *sizes, static)
    capacity = len(case.intermediate)
    out = torch.full((capacity, sizes[1]), 3.0, device=DEVICE).to(FP8_DTYPE)
    # Scales of a group lie next to each other, as the second GEMM reads them.
    scales = torch.full((case.groups, capacity), CANARY, device=DEVICE).T
    case.gate_up(out, case.a2_scale if static else scales)
    expected = case.expected_gate_up()
    if static:
        expected_fp8 = quantize_static(expected, case.a2_scale[case.experts, None])
    else:
        expected_fp8, expected_scales = quantize_rows(expected, GROUP_SIZE)
        torch.testing.assert_close(scales[case.slots], expected_scales, rtol=1e-4, atol=0)
    step = {"rtol": 1 / 8, "atol": 2**-9}
    torch.testing.assert_close(out[case.slots].float(), expected_fp8.float(), **step)
    assert (out[case.slots].float() != expected_fp8.float()).float().mean() <= 0.01
    untouched = torch.ones(capacity, dtype=torch.bool, device=DEVICE)
    untouched[case.slots] = False
    assert (out[untouched].float() == 3).all()
    assert static or (scales[untouched] == CANARY).all()


@needs_fp8
@pytest.mark.parametrize(("scheme", "static"), FP8_CASES)
def test_fp8_batched_experts(scheme: QuantConfig, static: bool) -> None:
    """The rows of a sorted case laid out per expert give the same bits, with NaN in all padding."""
    case = Fp8Case(scheme, 200, 328, static)
    counts = torch.bincount(case.experts, minlength=4).int()
    max_tokens = int(counts.max()) + 1
    rows = BatchedRows(counts, max_tokens)
    used = torch.arange(max_tokens, device=DEVICE) < counts[:, None]
    nan = torch.tensor(torch.nan, device=DEVICE)

    def batched(values: torch.Tensor) -> torch.Tensor:
        """[slots in use, ...] -> [E, M, ...]"""
        batch = nan.expand(4, max_tokens, values.shape[-1]).to(values.dtype).clone()
        batch.view(torch.uint8 if values.dtype is FP8_DTYPE else values.dtype)[used] = values.view(
            torch.uint8 if values.dtype is FP8_DTYPE else values.dtype
        )
        return batch

    outs, scales = [], []
    for x, x_scale, layout in (
        (case.x, case.x_scale, case.rows),
        (batched(case.x[case.tokens]), case.x_scale if static else batched(case.x_scale[case.tokens]), rows),
    ):
        leading = (len(case.intermediate),) if layout is case.rows else (4, max_tokens)
        out = nan.expand(*leading, 328).to(FP8_DTYPE).clone()
        out_scale = case.a2_scale if static else torch.full((*leading, case.groups), torch.nan, device=DEVICE)
        gate_up_activation(
            x, case.w13, case.b13, out, layout, FP8_BLOCK, Activation.SILU_AND_MUL,
            x_scale=x_scale, w13_scale=case.w13_scale, out_scale=out_scale,
        )  # fmt: skip
        result = canaries(*leading, 200, dtype=torch.bfloat16)
        down(out, case.w2, case.b2, result, layout, FP8_BLOCK, x_scale=out_scale, w2_scale=case.w2_scale)
        chosen = case.slots if layout is case.rows else used
        outs.append(result[chosen])
        scales.append(torch.zeros(1) if static else out_scale[chosen])
        untouched = torch.ones(leading, dtype=torch.bool, device=DEVICE)
        untouched[chosen] = False
        assert (result[untouched] == CANARY).all()
    assert torch.equal(*outs)
    assert torch.equal(*scales)


@needs_fp8
@pytest.mark.parametrize(("scheme", "static"), FP8_CASES)
def test_fp8_padding_is_not_read_and_nan_stays_in_its_row(scheme: QuantConfig, static: bool) -> None:
    case = Fp8Case(scheme, 200, 328, static)
    capacity = len(case.intermediate)
    unused_tokens = torch.ones(13, dtype=torch.bool, device=DEVICE)
    unused_tokens[case.tokens] = False
    bad_token = int(case.tokens[0])
    case.x.view(torch.uint8)[unused_tokens] = 0x7F
    case.x.view(torch.uint8)[bad_token, 150] = 0x7F
    if not static:
        case.x_scale[unused_tokens] = torch.nan
    out = torch.full((capacity, 328), torch.nan, device=DEVICE).to(FP8_DTYPE)
    out_scale = case.a2_scale if static else torch.full((capacity, case.groups), torch.nan, device=DEVICE)
    case.gate_up(out, out_scale)
    result = canaries(capacity, 200, dtype=torch.bfloat16)
    down(out, case.w2, None, result, case.rows, FP8_BLOCK, x_scale=out_scale, w2_scale=case.w2_scale)
    bad = case.tokens == bad_token
    assert torch.equal(result[case.slots].isnan().all(dim=1), bad)
    assert torch.equal(result[case.slots].isnan().any(dim=1), bad)


@needs_fp8
def test_fp8_zero_rows_and_saturation() -> None:
    case = Fp8Case(Fp8PerTensor(), 128, 128, static=True, has_bias=False)
    zero, large = int(case.tokens[0]), int(case.tokens[-1])
    assert zero != large
    case.x.view(torch.uint8)[zero] = 0
    case.x_scale *= 1000
    out = torch.full((len(case.intermediate), 128), torch.nan, device=DEVICE).to(FP8_DTYPE)
    case.gate_up(out, case.a2_scale)
    values = out[case.slots].float()
    assert (values[case.tokens == zero] == 0).all()
    assert values[case.tokens == large].abs().max() == 448
    assert values.isfinite().all()
    scales = torch.full((len(case.intermediate), 1), torch.nan, device=DEVICE)
    case.gate_up(out, scales)
    assert out[case.slots].float().isfinite().all()
    assert scales[case.slots].isfinite().all()
    assert (scales[case.slots] >= torch.tensor(LEAST_AMAX).div(FP8_MAX).item()).all()


def huge(dtype: torch.dtype, numel: int) -> torch.Tensor:
    """Memory that is reserved and hardly touched."""
    try:
        return torch.empty(numel, dtype=dtype, device=DEVICE)
    except RuntimeError:
        pytest.skip("not enough memory")


def test_row_offsets_beyond_32_bits() -> None:
    case = StandardCase(torch.zeros(3, 1), 1, 32, 16, torch.bfloat16)
    far = 2**30
    x = huge(torch.bfloat16, 2 * far + 64).as_strided((3, 32), (far, 1))
    case.x = x.copy_(case.x)
    case.check_gate_up()


def test_expert_offsets_beyond_32_bits() -> None:
    case = StandardCase(torch.tensor([[2]]), 3, 32, 16, torch.bfloat16)
    far = 2**30
    w13 = huge(torch.bfloat16, 2 * far + 2048).as_strided((3, 32, 32), (far, 32, 1))
    w13[2] = case.w13[2]
    case.w13 = w13
    case.check_gate_up()
    w2 = w13.as_strided((3, 32, 16), (far, 16, 1))
    w2[2] = case.w2[2]
    case.w2 = w2
    case.check_down()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("max_tokens", [7, 33])
def test_batched_experts(dtype: torch.dtype, has_bias: bool, max_tokens: int) -> None:
    counts = torch.tensor([0, 1, max_tokens, 3, 0], dtype=torch.int32, device=DEVICE)
    num_experts, hidden_size, inner = 5, 40, 24
    x = normal(num_experts, max_tokens, hidden_size, seed=1, dtype=dtype)
    w13 = normal(num_experts, 2 * inner, hidden_size, seed=2, dtype=dtype, scale=0.15)
    w2 = normal(num_experts, hidden_size, inner, seed=3, dtype=dtype, scale=0.2)
    b13 = normal(num_experts, 2 * inner, seed=4, dtype=dtype) if has_bias else None
    b2 = normal(num_experts, hidden_size, seed=5, dtype=dtype) if has_bias else None
    used = torch.arange(max_tokens, device=DEVICE) < counts[:, None]
    x[~used] = torch.nan
    rows = BatchedRows(counts, max_tokens)
    intermediate = canaries(num_experts, max_tokens, inner, dtype=dtype)
    gate_up_activation(x, w13, b13, intermediate, rows, BLOCK, Activation.SILU_AND_MUL)
    experts = used.nonzero()[:, 0]
    expected = expected_gate_up(x[used], w13[experts], None if b13 is None else b13[experts])
    assert_close_to_oracle(intermediate[used], expected, dtype)
    assert (intermediate[~used] == CANARY).all()

    intermediate[~used] = torch.nan
    out = canaries(num_experts, max_tokens, hidden_size, dtype=dtype)
    down(intermediate, w2, b2, out, rows, BLOCK)
    expected = expected_down(intermediate[used], w2[experts], None if b2 is None else b2[experts])
    assert_close_to_oracle(out[used], expected, dtype)
    assert (out[~used] == CANARY).all()


def test_batched_experts_with_strided_rows() -> None:
    counts = torch.tensor([2, 4], dtype=torch.int32, device=DEVICE)
    x = normal(4, 2, 100, seed=1)[:, :, 20:60].transpose(0, 1)
    w13 = normal(2, 32, 40, seed=2, scale=0.2)
    out = canaries(2, 4, 16, dtype=torch.float32)
    gate_up_activation(x, w13, None, out, BatchedRows(counts, 4), BLOCK, Activation.SILU_AND_MUL)
    expected = expected_gate_up(x[1], w13[1].expand(4, -1, -1), None)
    assert_close_to_oracle(out[1], expected, torch.float32)


@pytest.mark.parametrize(("num_experts", "max_tokens"), [(0, 4), (3, 0)])
def test_nothing_to_compute(num_experts: int, max_tokens: int) -> None:
    counts = torch.zeros(num_experts, dtype=torch.int32, device=DEVICE)
    rows = BatchedRows(counts, max_tokens)
    x, out = normal(num_experts, max_tokens, 32, seed=1), normal(num_experts, max_tokens, 16, seed=2)
    gate_up_activation(x, normal(num_experts, 32, 32, seed=3), None, out, rows, BLOCK, Activation.SILU_AND_MUL)
    down(out, normal(num_experts, 32, 16, seed=4), None, x, rows, BLOCK)
