"""The Hopper kernels on a GPU, against torch in fp32 on the same, dequantized, operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.activation import gated_activation_of
from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken, MoEConfig, QuantConfig
from moe_plugin.environment import Environment
from moe_plugin.kernels.hopper_tiling import HopperTile, hopper_verdict
from moe_plugin.kernels.tiling import cdiv
from moe_plugin.numerics import FP8_TOLERANCE, TOLERANCES, assert_close_to_oracle, relative_error
from moe_plugin.quantization import (
    FP8_DTYPE,
    GROUP_SIZE,
    dequantize_rows,
    dequantize_weights,
    fake_quantize,
    has_static_activations,
    input_group_size,
    quantize_rows,
    quantize_static,
    quantize_weights,
)

hopper_gemm = pytest.importorskip("moe_plugin.kernels.hopper_gemm", exc_type=ImportError)

DEVICE = "cuda"
VERDICT = hopper_verdict(MoEConfig(num_experts=1, top_k=1, hidden_size=64, intermediate_size=64), Environment.probe())
pytestmark = [pytest.mark.gpu, pytest.mark.sm90, pytest.mark.skipif(not VERDICT.ok, reason=VERDICT.reason)]

COUNTS = (0, 1, 63, 0, 64, 65, 0, 127, 128, 129, 0)
"""Rows per expert, with empty experts first, last and between."""
GUARD_ROWS = 8
SPARE_BLOCKS = 2
NAN_BYTE = 0xFF
"""Repeated, a NaN of every dtype."""
CANARY_BYTE = 0x55


@dataclass(frozen=True)
class Case:
    """One pair of kernels: the tile of both, and the layer."""

    wide: bool
    block_x: int
    half_w: int
    scheme: QuantConfig | None
    hidden: int
    inner: int
    activation: Activation = Activation.SILU_AND_MUL
    has_bias: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def tile(self) -> HopperTile:
        return HopperTile(self.wide, self.block_x, self.half_w)

    def config(self, num_experts: int) -> MoEConfig:
        return MoEConfig(
            num_experts=num_experts,
            top_k=1,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            dtype=self.dtype,
            activation=self.activation,
            swiglu_limit=2.0,
            quantization=self.scheme,
            has_bias=self.has_bias,
        )

    def __str__(self) -> str:
        scheme = "none" if self.scheme is None else self.scheme.name.removeprefix("fp8_")
        static = "-static" if has_static_activations(self.scheme) else ""
        shape = "wide" if self.wide else "narrow"
        return f"{shape}{self.block_x}x{self.half_w}-{scheme}{static}-H{self.hidden}-I{self.inner}-{self.dtype}"


SILU, GELU, SWIGLU = Activation.SILU_AND_MUL, Activation.GELU_AND_MUL, Activation.SWIGLU_OAI
BLOCK, TOKEN, TENSOR, STATIC = Fp8Block(), Fp8PerToken(), Fp8PerTensor(), Fp8PerTensor(static_activations=True)
# Every tile with 16-bit and with fp8 operands, every scheme narrow and wide, odd and even numbers of depth steps (of 64
# elements of 16 bits or 128 of fp8), from one to 45, and columns that are and are not multiples of a tile.
CASES = [
    Case(False, 8, 64, None, 64, 704),
    Case(False, 8, 128, None, 1024, 96, GELU, has_bias=True),
    Case(False, 16, 64, None, 1024, 704, SILU, has_bias=True),
    Case(False, 16, 128, None, 2880, 512, SWIGLU, has_bias=True, dtype=torch.float16),
    Case(False, 32, 64, None, 2880, 96, dtype=torch.float16),
    Case(False, 32, 128, None, 64, 512, GELU),
    Case(False, 64, 64, None, 64, 96, SILU, has_bias=True, dtype=torch.float16),
    Case(False, 64, 128, None, 2880, 704, SWIGLU, has_bias=True),
    Case(True, 128, 64, None, 1024, 704, SILU, has_bias=True),
    Case(True, 128, 128, None, 2880, 704, GELU),
    Case(True, 128, 128, None, 64, 96, SWIGLU, has_bias=True, dtype=torch.float16),
    Case(False, 8, 64, BLOCK, 2880, 704),
    Case(False, 8, 128, TOKEN, 64, 512, GELU),
    Case(False, 16, 64, STATIC, 1024, 96, SILU, has_bias=True),
    Case(False, 16, 128, BLOCK, 1024, 704, SWIGLU, has_bias=True),
    Case(False, 32, 64, TENSOR, 2880, 512, GELU),
    Case(False, 32, 128, TOKEN, 2880, 704, SILU, has_bias=True),
    Case(False, 64, 64, BLOCK, 64, 96, SILU, has_bias=True, dtype=torch.float32),
    Case(False, 64, 128, STATIC, 2880, 704, dtype=torch.float16),
    Case(True, 128, 64, BLOCK, 2880, 704),
    Case(True, 128, 64, TOKEN, 1024, 512, GELU, has_bias=True),
    Case(True, 128, 64, TENSOR, 64, 704, dtype=torch.float32),
    Case(True, 128, 64, STATIC, 2880, 96, SWIGLU, has_bias=True),
]
NARROW_BF16, WIDE_BF16, NARROW_FP8, WIDE_FP8 = CASES[2], CASES[9], CASES[14], CASES[19]
# One of each kind, for what does not depend on the rest.
KINDS = [NARROW_BF16, WIDE_BF16, NARROW_FP8, WIDE_FP8]


@pytest.fixture(params=["gate_up", "down"])
def gated(request: pytest.FixtureRequest) -> bool:
    return request.param == "gate_up"


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE) * scale


@dataclass
class Slots:
    """Where the rows of `counts` lie: segments of whole blocks, and unused blocks after them, up to `capacity`."""

    counts: Sequence[int]
    block_x: int
    capacity: int | None = None

    def __post_init__(self) -> None:
        experts: list[int] = []
        used: list[bool] = []
        for expert, count in enumerate(self.counts):
            blocks = cdiv(count, self.block_x)
            experts += [expert] * blocks
            used += [row < count for row in range(blocks * self.block_x)]
        self.num_blocks = len(experts)
        self.capacity = self.capacity or self.num_blocks + SPARE_BLOCKS
        spare = self.capacity - self.num_blocks
        self.block_expert = torch.tensor(experts + [-1] * spare, dtype=torch.int32, device=DEVICE)
        self.used = torch.tensor(used + [False] * spare * self.block_x, device=DEVICE)
        self.expert = self.block_expert.repeat_interleave(self.block_x).clamp(min=0).long()

    @property
    def size(self) -> int:
        return self.used.numel()

    @property
    def written(self) -> int:
        """Slots of the blocks in use."""
        return self.num_blocks * self.block_x


class Gemm:
    """One GEMM's operands and output, with NaN wherever no row lies and canaries wherever nothing may be written."""

    def __init__(self, case: Case, gated: bool, slots: Slots, seed: int = 0) -> None:
        self.case, self.gated, self.slots = case, gated, slots
        self.config = case.config(len(slots.counts))
        experts, hidden, inner = len(slots.counts), case.hidden, case.inner
        w_rows, depth, columns = (2 * inner, hidden, inner) if gated else (hidden, inner, hidden)
        scheme = case.scheme
        rows = normal(slots.size, depth, seed=seed + 1)
        weights = normal(experts, w_rows, depth, seed=2, scale=depth**-0.5)
        self.bias = normal(experts, w_rows, seed=3).to(case.dtype) if case.has_bias else None
        self.out_scale: torch.Tensor | None = None
        if scheme is None:
            self.x, self.w = rows.to(case.dtype), weights.to(case.dtype)
            self.x_values, self.w_values = self.x.float(), self.w.float()
            self.x_scale, self.scales = None, None
        else:
            halves = 2 if gated else 1
            self.w, w_scale = quantize_weights(weights, scheme, halves)
            self.w_values = dequantize_weights(self.w, w_scale, scheme, halves)
            self._quantize_rows(rows, scheme)
            self.scales = self._scales(scheme, w_scale, columns)
        del rows, weights
        self.poison(~slots.used)
        out_dtype = (case.dtype if scheme is None else FP8_DTYPE) if gated else case.dtype
        self._frame = torch.empty(slots.size + 2 * GUARD_ROWS, columns, dtype=out_dtype, device=DEVICE)
        self.out = self._frame[GUARD_ROWS:-GUARD_ROWS]
        num_blocks = torch.tensor([slots.num_blocks], dtype=torch.int32, device=DEVICE)
        self.blocks = hopper_gemm.SlotBlocks(slots.block_expert.clone(), num_blocks)

    def _quantize_rows(self, rows: torch.Tensor, scheme: QuantConfig) -> None:
        """x, its scales as the kernel takes them, and the numbers it stands for."""
        if has_static_activations(scheme):
            experts = len(self.slots.counts)
            # One scale for all rows, or one per expert for an intermediate; some rows exceed it and saturate.
            self.x_scale = torch.linspace(3, 5, 1 if self.gated else experts, device=DEVICE) / 448
            of_row = self.x_scale[self.slots.expert if not self.gated else torch.zeros_like(self.slots.expert)][:, None]
            self.x = quantize_static(rows, of_row)
            self.x_values = self.x.float() * of_row
            return
        group_size = input_group_size(scheme) if self.gated else GROUP_SIZE
        self.x, scale = quantize_rows(rows, group_size)
        self.x_values = dequantize_rows(self.x, scale, group_size)
        self.x_scale = scale.T.contiguous()

    def _scales(self, scheme: QuantConfig, w_scale: torch.Tensor, columns: int) -> Any:
        w_kind = {Fp8Block: "block", Fp8PerToken: "channel"}.get(type(scheme), "tensor")
        x_kind: Literal["group", "row", "tensor", "expert"] = "group"
        if has_static_activations(scheme):
            x_kind = "tensor" if self.gated else "expert"
        elif self.gated and input_group_size(scheme) is None:
            x_kind = "row"
        out_kind: Literal["group", "static"] | None = None
        if self.gated:
            out_kind = "static" if has_static_activations(scheme) else "group"
        if out_kind == "static":
            self.out_scale = torch.linspace(1, 2, len(self.slots.counts), device=DEVICE) / 448
        elif out_kind == "group":
            self._scale_frame = torch.empty(cdiv(columns, GROUP_SIZE) + 2, self.slots.size, device=DEVICE)
            self.out_scale = self._scale_frame[1:-1]
        return hopper_gemm.Fp8Scales(self.x_scale, x_kind, w_scale, w_kind, self.out_scale, out_kind)

    def poison(self, rows: torch.Tensor) -> None:
        """NaN in rows of x, and in the scales that are theirs alone."""
        self.x.view(torch.uint8)[rows] = NAN_BYTE
        if self.scales is not None and self.scales.x_kind in ("group", "row"):
            self.scales.x[:, rows] = torch.nan

    def run(self, num_programs: int = 132) -> torch.Tensor:
        """[written, columns]: the slots of the blocks in use, dequantized."""
        self.clear()
        self.launch(num_programs)
        return self.values()

    def launch(self, num_programs: int = 132) -> None:
        arguments = (self.x, self.w, self.bias, self.out, self.blocks, self.case.tile)
        if self.gated:
            hopper_gemm.gate_up_activation(*arguments, self.config, num_programs, self.scales)
        else:
            hopper_gemm.down(*arguments, num_programs, self.scales)

    def clear(self) -> None:
        self._frame.view(torch.uint8).fill_(CANARY_BYTE)
        if self._has_group_scales:
            self._scale_frame.view(torch.uint8).fill_(CANARY_BYTE)

    @property
    def _has_group_scales(self) -> bool:
        return self.scales is not None and self.scales.out_kind == "group"

    def values(self) -> torch.Tensor:
        out, written = self.out[: self.slots.written].float(), self.slots.written
        if self.out_scale is None:
            return out
        if self._has_group_scales:
            return dequantize_rows(out, self.out_scale.T[:written], GROUP_SIZE)
        return out * self.out_scale[self.slots.expert[:written], None]

    def bits(self) -> torch.Tensor:
        """Everything that was written for rows that exist, as bytes."""
        out = self.out[self.slots.used].view(torch.uint8)
        if not self._has_group_scales:
            return out
        assert self.out_scale is not None
        return torch.cat([out, self.out_scale.T[self.slots.used].contiguous().view(torch.uint8)], dim=1)

    def expected(self) -> torch.Tensor:
        """fp32 [rows that exist, columns]."""
        used, results = self.slots.used, []
        for expert in self.slots.expert[used].unique_consecutive().tolist():
            rows = used & (self.slots.expert == expert)
            result = self.x_values[rows] @ self.w_values[expert].T
            if self.bias is not None:
                result += self.bias[expert].float()
            if self.gated:
                result = gated_activation_of(self.config, result)
                if self._has_group_scales:
                    result = fake_quantize(result, GROUP_SIZE)
                elif self.out_scale is not None:
                    result = fake_quantize(result, static_scale=self.out_scale[expert])
            results.append(result)
        return torch.cat(results)

    def check(self) -> None:
        """What was written is right, and nothing else was written."""
        quantizes = self.gated and self.case.scheme is not None
        # Down's sums of fp8 products have no more than the tensor cores' precision, whatever the dtype they end in.
        dtype = torch.bfloat16 if self.case.dtype is torch.float32 else self.case.dtype
        actual = self.values()[self.slots.used[: self.slots.written]]
        assert_close_to_oracle(actual, self.expected(), FP8_TOLERANCE if quantizes else TOLERANCES[dtype])
        self.check_canaries()

    def check_canaries(self) -> None:
        written = self.slots.written
        untouched = [self._frame[:GUARD_ROWS], self.out[written:], self._frame[-GUARD_ROWS:]]
        if self._has_group_scales:
            assert self.out_scale is not None
            untouched += [self._scale_frame[:1], self.out_scale[:, written:], self._scale_frame[-1:]]
        for tensor in untouched:
            assert (tensor.contiguous().view(torch.uint8) == CANARY_BYTE).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(case: Case, gated: bool) -> None:
    gemm = Gemm(case, gated, Slots(COUNTS, case.block_x))
    gemm.run()
    gemm.check()


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_any_number_of_programs_and_any_run_give_the_same_bits(case: Case, gated: bool) -> None:
    gemm = Gemm(case, gated, Slots(COUNTS, case.block_x))
    gemm.run()
    bits = gemm.bits()
    # One program walks over all tiles, 100000 are more than there are tiles.
    for num_programs in (132, 1, 7, 100_000):
        gemm.run(num_programs)
        assert torch.equal(gemm.bits(), bits)
        gemm.check_canaries()


@pytest.mark.parametrize("counts", [(1,), (0, 0, 0, 3), (300, 0)], ids=str)
@pytest.mark.parametrize("case", [NARROW_FP8, WIDE_BF16], ids=str)
def test_few_tiles(case: Case, counts: Sequence[int]) -> None:
    gemm = Gemm(case, False, Slots(counts, case.block_x))
    gemm.run()
    gemm.check()


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_no_rows(case: Case, gated: bool) -> None:
    gemm = Gemm(case, gated, Slots((0, 0), case.block_x))
    gemm.run()
    gemm.check_canaries()


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_nan_stays_in_its_row(case: Case, gated: bool) -> None:
    gemm = Gemm(case, gated, Slots(COUNTS, case.block_x))
    gemm.run()
    before = gemm.bits()
    row = int(gemm.slots.used.nonzero()[100])
    gemm.x.view(torch.uint8)[row, :2] = NAN_BYTE
    values = gemm.run()
    assert values[row].isnan().all()
    others = torch.arange(len(before), device=DEVICE) != 100
    assert torch.equal(gemm.bits()[others], before[others])
    assert not values[gemm.slots.used[: gemm.slots.written]][others].isnan().any()


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_graph_replay_with_new_routing(case: Case, gated: bool) -> None:
    capacity = Slots(COUNTS, case.block_x).num_blocks + SPARE_BLOCKS
    gemm = Gemm(case, gated, Slots(COUNTS, case.block_x, capacity))
    gemm.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm.launch()
    for seed, counts in enumerate([COUNTS[::-1], (0,) * 10 + (130,), (0,) * 11, COUNTS]):
        other = Gemm(case, gated, Slots(counts, case.block_x, capacity), seed)
        gemm.x.copy_(other.x)
        if gemm.scales is not None:
            gemm.scales.x.copy_(other.scales.x)
        gemm.blocks.block_expert.copy_(other.blocks.block_expert)
        gemm.blocks.num_blocks.copy_(other.blocks.num_blocks)
        gemm.slots, gemm.x_values = other.slots, other.x_values
        gemm.clear()
        graph.replay()
        if sum(counts):
            gemm.check()
        else:
            gemm.check_canaries()


@pytest.mark.parametrize("case", [NARROW_BF16, WIDE_FP8], ids=str)
def test_blocks_may_begin_at_any_row(case: Case, gated: bool) -> None:
    """Regions of 256 rows per expert, of which the first ones are in use, as in BatchedExperts."""
    region, counts = 256, (5, 0, 256, 129)
    gemm = Gemm(case, gated, Slots([region] * len(counts), case.block_x, len(counts) * region // case.block_x))
    used = torch.arange(region, device=DEVICE).repeat(len(counts)) % region < torch.tensor(
        counts, device=DEVICE
    ).repeat_interleave(region)
    gemm.poison(~used)
    blocks = [(e, e * region + b * case.block_x) for e, n in enumerate(counts) for b in range(cdiv(n, case.block_x))]
    experts, rows = (
        torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in zip(*blocks[::-1], strict=True)
    )
    num_blocks = torch.tensor([len(blocks)], dtype=torch.int32, device=DEVICE)
    gemm.blocks = hopper_gemm.SlotBlocks(experts, num_blocks, rows)
    gemm.slots = replace(gemm.slots)
    gemm.slots.used = used
    values = gemm.run()
    tolerance = FP8_TOLERANCE if gated and case.scheme is not None else TOLERANCES[case.dtype]
    assert_close_to_oracle(values[used], gemm.expected(), tolerance)
    in_a_block = torch.zeros_like(used)
    for _, row in blocks:
        in_a_block[row : row + case.block_x] = True
    assert (gemm.out[~in_a_block].view(torch.uint8) == CANARY_BYTE).all()


def test_sums_of_fp8_products_keep_their_precision_over_a_great_depth() -> None:
    """A tensor core that added up all 16384 products itself would be off by more than a percent."""
    case = Case(False, 16, 128, TENSOR, 64, 16384, dtype=torch.float32)
    gemm = Gemm(case, False, Slots((16,), case.block_x))
    for operand, values in ((gemm.x, gemm.x_values), (gemm.w, gemm.w_values)):
        operand.view(torch.uint8).bitwise_and_(0x7F)  # without their signs
        values.abs_()
    assert relative_error(gemm.run(), gemm.expected()) < 2e-3
