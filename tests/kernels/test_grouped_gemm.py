"""The grouped GEMMs against one plain matrix product per pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.activation import gated_activation
from moe_plugin.config import Activation
from moe_plugin.kernels.counting_sort import counting_sort
from moe_plugin.kernels.grouped_gemm import BatchedRows, SortedRows, down, gate_up_activation
from moe_plugin.kernels.tiling import BlockConfig, counting_sort_shapes
from moe_plugin.numerics import assert_close_to_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CANARY = -123.0
BLOCK = BlockConfig(block_m=16, block_n=64, block_k=32, group_m=2, num_warps=4, num_stages=2)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def canaries(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, CANARY, dtype=dtype, device=DEVICE)


def sort_rows(local_ids: torch.Tensor, num_experts: int, block: BlockConfig) -> SortedRows:
    shapes = counting_sort_shapes(local_ids.numel(), num_experts, block.block_m)
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
        self.topk_weights = normal(*local_ids.shape, seed=7)

    def check_gate_up(self, activation: Activation = Activation.SILU_AND_MUL) -> torch.Tensor:
        out = canaries(*self.intermediate.shape, dtype=self.x.dtype)
        gate_up_activation(self.x, self.w13, self.b13, out, self.rows, self.block, activation)
        bias = None if self.b13 is None else self.b13[self.experts]
        expected = expected_gate_up(self.x[self.tokens], self.w13[self.experts], bias, activation)
        self._check_rows(out, self.slots, expected)
        return out

    def check_down(self, weighted: bool = True) -> torch.Tensor:
        out = canaries(self.rows.num_pairs, self.w2.shape[1], dtype=self.x.dtype)
        topk_weights = self.topk_weights if weighted else None
        down(self.intermediate, self.w2, self.b2, topk_weights, out, self.rows, self.block)
        bias = None if self.b2 is None else self.b2[self.experts]
        expected = expected_down(self.intermediate[self.slots], self.w2[self.experts], bias)
        if weighted:
            expected *= self.topk_weights.flatten()[self.pairs, None]
        self._check_rows(out, self.pairs, expected)
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
    case.check_down(weighted=has_bias)


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
    out = case.check_down(weighted=False)
    assert out.shape[0] == 4


def test_nothing_routed_here_writes_nothing() -> None:
    case = StandardCase(torch.full((4, 2), -1), 3, 32, 16, torch.float32)
    assert (case.check_gate_up() == CANARY).all()
    assert (case.check_down() == CANARY).all()


def test_padding_is_not_read() -> None:
    case = StandardCase(random_ids(17, 2, 4), 4, 32, 16, torch.bfloat16)
    used_tokens, used_slots = set(case.tokens.tolist()), set(case.slots.tolist())
    case.x[[n for n in range(17) if n not in used_tokens]] = torch.nan
    case.intermediate[[s for s in range(case.intermediate.shape[0]) if s not in used_slots]] = torch.nan
    case.topk_weights[case.local_ids < 0] = torch.nan
    case.check_gate_up()
    case.check_down()


@pytest.mark.parametrize("activation", list(Activation))
def test_nan_stays_in_its_row(activation: Activation) -> None:
    case = StandardCase(torch.zeros(6, 1), 1, 32, 16, torch.float32)
    case.x[2, 5] = torch.nan
    out = canaries(*case.intermediate.shape, dtype=torch.float32)
    gate_up_activation(case.x, case.w13, None, out, case.rows, BLOCK, activation)
    assert out[case.slots].isnan().all(dim=1).tolist() == [False, False, True, False, False, False]
    result = canaries(6, 32, dtype=torch.float32)
    down(out, case.w2, None, None, result, case.rows, BLOCK)
    assert result.isnan().any(dim=1).tolist() == [False, False, True, False, False, False]


def test_strided_activations_and_weights() -> None:
    case = StandardCase(random_ids(12, 2, 3), 3, 40, 24, torch.bfloat16)
    case.x = normal(12, 100, seed=8, dtype=torch.bfloat16)[:, 30:70]
    case.w13 = normal(3, 48, 90, seed=9, dtype=torch.bfloat16, scale=0.1)[:, :, 16:56]
    case.w2 = normal(3, 80, 24, seed=10, dtype=torch.bfloat16, scale=0.2)[:, ::2]
    case.topk_weights = normal(12, 6, seed=11)[:, 1:5:2]
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
    down(intermediate, w2, b2, None, out, rows, BLOCK)
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
    down(out, normal(num_experts, 32, 16, seed=4), None, None, x, rows, BLOCK)
