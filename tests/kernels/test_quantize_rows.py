"""Quantized and permuted rows against the torch definition in moe_plugin.quantization."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import moe_plugin.kernels.quantize_rows as quantize_rows_module
import moe_plugin.quantization as definition
from moe_plugin.errors import ShapeError
from moe_plugin.kernels.quantize_rows import permute_rows, quantize_rows
from moe_plugin.kernels.tiling import cdiv
from moe_plugin.quantization import FP8_DTYPE, GROUP_SIZE, LEAST_AMAX

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="Triton has e4m3 from SM 89 on"
)
GROUP_SIZES = [pytest.param(GROUP_SIZE, id="group"), pytest.param(None, id="row")]
CANARY = 3.0


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def canaries(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, CANARY, device=DEVICE).to(dtype)


def quantized(
    x: torch.Tensor, group_size: int | None, expert_num_tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    out = canaries(*x.shape, dtype=FP8_DTYPE)
    scales = canaries(*x.shape[:-1], cdiv(x.shape[-1], group_size or x.shape[-1]))
    quantize_rows(x, out, scales, expert_num_tokens=expert_num_tokens)
    return out, scales


def check_quantized(actual: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, group_size: int | None) -> None:
    expected, expected_scales = definition.quantize_rows(x, group_size)
    torch.testing.assert_close(actual[1], expected_scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(actual[0].float(), expected.float(), rtol=0, atol=0, equal_nan=True)


def test_docstring_example() -> None:
    x = torch.tensor([[896.0, 3.0], [0.0, 0.0]], device=DEVICE)
    out, scales = quantized(x, None)
    least = torch.tensor(LEAST_AMAX).div(448).item()
    assert out.tolist() == [[448, 1.5], [0, 0]]
    assert scales.tolist() == [[2], [least]]
    slots = torch.tensor([[2, 0], [-1, 1]], dtype=torch.int32, device=DEVICE)
    out, scales = canaries(3, 2, dtype=FP8_DTYPE), canaries(1, 3)
    permute_rows(x, slots, out, scales)
    assert out.tolist() == [[448, 1.5], [0, 0], [448, 1.5]]
    assert scales.tolist() == [[2, least, 2]]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 40, 128, 576, 2880, 7168])
def test_random_rows(hidden_size: int, dtype: torch.dtype, group_size: int | None) -> None:
    x = normal(3, hidden_size, dtype=dtype) * torch.tensor([[1.0], [1e-3], [300.0]], device=DEVICE).to(dtype)
    check_quantized(quantized(x, group_size), x, group_size)


@pytest.mark.parametrize("hidden_size", [40, 576])
def test_static_scale(hidden_size: int) -> None:
    """1000 and Inf saturate."""
    x = normal(4, hidden_size)
    x[0, 0], x[0, 1], x[1, 2], x[2, 3] = 1000.0, torch.inf, -1000.0, torch.nan
    scale = torch.tensor([0.3], device=DEVICE)
    out = canaries(4, hidden_size, dtype=FP8_DTYPE)
    quantize_rows(x, out, static_scale=scale)
    torch.testing.assert_close(
        out.float(), definition.quantize_static(x, scale).float(), rtol=0, atol=0, equal_nan=True
    )
    assert out[0, :2].tolist() == [448, 448]
    assert out[1, 2].item() == -448
    assert out.float().isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_zero_rows_subnormals_and_large_values_are_finite(group_size: int | None) -> None:
    x = torch.zeros(4, 200, device=DEVICE)
    x[1] = 1e-40
    x[2, 7] = 3e38
    x[3, 150] = 448.0
    out, scales = quantized(x, group_size)
    check_quantized((out, scales), x, group_size)
    assert (scales >= torch.tensor(LEAST_AMAX).div(448).item()).all()
    assert out.float().isfinite().all()
    assert scales.isfinite().all()
    assert out[2, 7].item() == out[3, 150].item() == 448


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on inf in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_group(value: float) -> None:
    x = normal(3, 300, dtype=torch.float32)
    x[1, 130] = value
    out, scales = quantized(x, GROUP_SIZE)
    product = definition.dequantize_rows(out, scales, GROUP_SIZE)
    bad = torch.zeros(3, 300, dtype=torch.bool, device=DEVICE)
    bad[1, 128:256] = True
    assert torch.equal(product.isnan(), bad)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_strided_rows(group_size: int | None) -> None:
    wide = normal(5, 400)
    x = wide[::2, 32:232]
    out = canaries(3, 256, dtype=FP8_DTYPE)
    scales = canaries(cdiv(200, group_size or 200), 3).T
    quantize_rows(x, out[:, 16:216], scales)
    check_quantized((out[:, 16:216], scales), x, group_size)
    assert (out[:, :16].float() == CANARY).all()
    assert (out[:, 216:].float() == CANARY).all()
    x = normal(1, 200).expand(4, -1)
    check_quantized(quantized(x, group_size), x, group_size)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_batched_experts_leave_padding_alone(group_size: int | None) -> None:
    x = normal(3, 4, 160)
    counts = torch.tensor([2, 0, 4], dtype=torch.int32, device=DEVICE)
    used = torch.arange(4, device=DEVICE) < counts[:, None]
    x[~used] = torch.nan
    out, scales = quantized(x, group_size, counts)
    check_quantized((out[used], scales[used]), x[used], group_size)
    assert (out[~used].float() == CANARY).all()
    assert (scales[~used] == CANARY).all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rows_at_once", [1, 9999])
def test_rows_of_groups(rows_at_once: int, group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 0, 1, 9, 0, 8 and 0 rows from multiples of 8; those between and behind them are left alone."""
    monkeypatch.setattr(quantize_rows_module, "_RESIDENT_WARPS", rows_at_once)
    group_ends = torch.tensor([0, 1, 17, 24, 32, 32], dtype=torch.int32, device=DEVICE)
    used = torch.zeros(48, dtype=torch.bool, device=DEVICE)
    used[0] = used[8:17] = used[24:32] = True
    x = normal(48, 160)
    x[~used] = torch.nan
    groups = cdiv(160, group_size or 160)
    out, scales, static = canaries(48, 160, dtype=FP8_DTYPE), canaries(groups, 48), torch.tensor([0.3], device=DEVICE)
    quantize_rows(x, out, scales.T, group_ends=group_ends, alignment=8)
    check_quantized((out[used], scales.T[used]), x[used], group_size)
    assert (out[~used].float() == CANARY).all()
    assert (scales[:, ~used] == CANARY).all()
    quantize_rows(x, out, static_scale=static, group_ends=group_ends, alignment=8)
    assert torch.equal(out[used].float(), definition.quantize_static(x[used], static).float())
    assert (out[~used].float() == CANARY).all()


def test_no_rows_of_groups() -> None:
    out, scales = canaries(16, 40, dtype=FP8_DTYPE), canaries(16, 1)
    for ends in ([0, 0], [0]):
        group_ends = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        quantize_rows(normal(16, 40), out, scales, group_ends=group_ends, alignment=8)
    assert (out.float() == CANARY).all()
    assert (scales == CANARY).all()


@pytest.mark.parametrize("rows_at_once", [1, 4, 9999])
def test_rows_in_use_are_shared_by_any_number_of_programs(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of one expert, of none and of all; slices of `out` longer than those of x."""
    monkeypatch.setattr(quantize_rows_module, "_RESIDENT_WARPS", rows_at_once)
    x = normal(4, 5, 160)
    counts = torch.tensor([0, 5, 0, 2], dtype=torch.int32, device=DEVICE)
    used = torch.arange(5, device=DEVICE) < counts[:, None]
    x[~used] = torch.nan
    out, scales = canaries(4, 8, 200, dtype=FP8_DTYPE), canaries(4, 2, 8)
    quantize_rows(x, out[:, :, 24:184], scales.mT, expert_num_tokens=counts)
    check_quantized((out[:, :5, 24:184][used], scales.mT[:, :5][used]), x[used], GROUP_SIZE)
    empty = torch.ones(4, 8, dtype=torch.bool, device=DEVICE)
    empty[:, :5] = ~used
    assert (out[empty].float() == CANARY).all()
    assert (scales.mT[empty] == CANARY).all()
    assert (out[..., :24].float() == CANARY).all()
    assert (out[..., 184:].float() == CANARY).all()


@pytest.mark.parametrize("hidden_size", [40, 576, 1024, 1100])
def test_ue8m0(hidden_size: int) -> None:
    """Scales above, below and exactly at a power of two; rows packed side by side, and group by group."""
    x = normal(6, hidden_size) * torch.tensor([[1.0], [1e-3], [300.0], [0.0], [1.0], [1.0]], device=DEVICE).bfloat16()
    x[4:] = x[4:].clamp(-3, 3)
    x[4, ::16], x[5, ::16] = 448 * 2**-5, 450 * 2**-5
    expected, expected_scales = definition.quantize_rows(x, GROUP_SIZE, ue8m0=True)
    packs = cdiv(cdiv(hidden_size, GROUP_SIZE), 4)
    for scales in (canaries(6, packs, dtype=torch.int32), canaries(packs, 6, dtype=torch.int32).T):
        out = canaries(6, hidden_size, dtype=FP8_DTYPE)
        quantize_rows(x, out, scales)
        assert torch.equal(out.float(), expected.float())
        assert torch.equal(scales, definition.pack_ue8m0(expected_scales))
    assert expected_scales[4, 0].item() == 2**-5
    assert expected_scales[5, 0].item() == 2**-4


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on inf in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ue8m0_of_nan_and_inf(value: float) -> None:
    x = normal(2, 300, dtype=torch.float32)
    x[1, 130] = value
    out, scales = canaries(2, 300, dtype=FP8_DTYPE), canaries(2, 1, dtype=torch.int32)
    quantize_rows(x, out, scales)
    assert (scales >> 8 & 0xFF).flatten().tolist()[1] == 255
    product = definition.dequantize_rows(out, definition.unpack_ue8m0(scales, 3), GROUP_SIZE)
    bad = torch.zeros(2, 300, dtype=torch.bool, device=DEVICE)
    bad[1, 128:256] = True
    assert torch.equal(product.isnan(), bad)


def test_ue8m0_of_batched_experts() -> None:
    x = normal(3, 4, 700)
    counts = torch.tensor([2, 0, 4], dtype=torch.int32, device=DEVICE)
    used = torch.arange(4, device=DEVICE) < counts[:, None]
    x[~used] = torch.nan
    out, scales = canaries(3, 4, 700, dtype=FP8_DTYPE), canaries(3, 2, 6, dtype=torch.int32)
    quantize_rows(x, out, scales[..., :4].mT, expert_num_tokens=counts)
    expected, expected_scales = definition.quantize_rows(x[used], GROUP_SIZE, ue8m0=True)
    assert torch.equal(out[used].float(), expected.float())
    assert torch.equal(scales[..., :4].mT[used], definition.pack_ue8m0(expected_scales))
    assert (out[~used].float() == CANARY).all()
    assert (scales[..., :4].mT[~used] == CANARY).all()
    assert (scales[..., 4:] == CANARY).all()


SLOTS = [[4, 0], [-1, 6], [-1, -1], [2, 3]]


def permuted_case(hidden_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """x [4, H], slot_of_pair [4, 2], the row in each of 8 slots, and the slots that hold one."""
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)
    source = {slot: row for row, pair in enumerate(SLOTS) for slot in pair if slot >= 0}
    filled = sorted(source)
    x = normal(4, hidden_size, dtype=dtype)
    return x, slots, x[[source[slot] for slot in filled]], filled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden_size", [40, 1100])
def test_permuted_copy(hidden_size: int, dtype: torch.dtype) -> None:
    x, slots, expected, filled = permuted_case(hidden_size, dtype)
    out = canaries(8, hidden_size, dtype=dtype)
    permute_rows(x, slots, out)
    assert torch.equal(out[filled], expected)
    assert (out[[slot for slot in range(8) if slot not in filled]] == CANARY).all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("hidden_size", [40, 576, 2880, 7168])
def test_permuted_rows_equal_quantized_rows(hidden_size: int, group_size: int | None) -> None:
    x, slots, expected, filled = permuted_case(hidden_size, torch.bfloat16)
    out = canaries(8, hidden_size, dtype=FP8_DTYPE)
    scales = canaries(cdiv(hidden_size, group_size or hidden_size), 8)
    permute_rows(x, slots, out, scales)
    expected_out, expected_scales = quantized(expected, group_size)
    assert torch.equal(out[filled].float(), expected_out.float())
    assert torch.equal(scales.T[filled], expected_scales)
    empty = [slot for slot in range(8) if slot not in filled]
    assert (out[empty].float() == CANARY).all()
    assert (scales[:, empty] == CANARY).all()


@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("experts", [None, 4, 1])
@pytest.mark.parametrize("hidden_size", [40, 576])
def test_permuted_with_every_kind_of_group_scales(hidden_size: int, experts: int | None, ue8m0: bool) -> None:
    """Contiguous, and masked with 2 or 8 slots per expert."""
    x, slots, expected, filled = permuted_case(hidden_size, torch.bfloat16)
    groups = cdiv(hidden_size, GROUP_SIZE)
    shape = (cdiv(groups, 4) if ue8m0 else groups, 8 // (experts or 1))
    scales = canaries(*([] if experts is None else [experts]), *shape, dtype=torch.int32 if ue8m0 else torch.float32)
    out = canaries(8, hidden_size, dtype=FP8_DTYPE)
    permute_rows(x, slots, out, scales)
    expected_out, expected_scales = definition.quantize_rows(expected, GROUP_SIZE, ue8m0)
    by_slot = scales.mT.reshape(8, -1)
    assert torch.equal(out[filled].float(), expected_out.float())
    assert torch.equal(by_slot[filled], definition.pack_ue8m0(expected_scales) if ue8m0 else expected_scales)
    empty = [slot for slot in range(8) if slot not in filled]
    assert (out[empty].float() == CANARY).all()
    assert (by_slot[empty] == CANARY).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("experts", [None, 4])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("hidden_size", [48, 2880])
def test_rows_that_are_quantized_move_as_they_are(
    hidden_size: int, group_size: int | None, experts: int | None, packed: bool
) -> None:
    """With NaN, whose bits stay too; from separate tensors, and from rows that their scales follow in one buffer."""
    x, slots, _, filled = permuted_case(hidden_size, torch.bfloat16)
    x[3, 5] = torch.nan
    sent, sent_scales = quantized(x, group_size)
    groups = sent_scales.shape[1]
    if packed:
        buffer = torch.zeros(4, hidden_size + 4 * groups, dtype=torch.uint8, device=DEVICE)
        buffer[:, :hidden_size] = sent.view(torch.uint8)
        buffer[:, hidden_size:] = sent_scales.view(torch.uint8)
        sent, sent_scales = buffer[:, :hidden_size].view(FP8_DTYPE), buffer[:, hidden_size:].view(torch.float32)
    place = [] if experts is None else [experts]
    here, here_scales = canaries(8, hidden_size, dtype=FP8_DTYPE), canaries(*place, groups, 8 // (experts or 1))
    out, scales = here.clone(), here_scales.clone()
    permute_rows(x, slots, here, here_scales)
    permute_rows(sent, slots, out, scales, x_scales=sent_scales)
    assert torch.equal(out.view(torch.uint8), here.view(torch.uint8))
    assert torch.equal(scales.view(torch.int32), here_scales.view(torch.int32))
    empty = [slot for slot in range(8) if slot not in filled]
    assert (out[empty].float() == CANARY).all()


def test_two_pairs_of_one_slot() -> None:
    """As the masked layout has it for two k with one expert."""
    x = normal(2, 200)
    slots = torch.tensor([[3, 3], [1, -1]], dtype=torch.int32, device=DEVICE)
    out, scales = canaries(4, 200, dtype=FP8_DTYPE), canaries(2, 2, 2)
    permute_rows(x, slots, out, scales)
    check_quantized((out[[3, 1]], scales.mT.reshape(4, 2)[[3, 1]]), x, GROUP_SIZE)
    assert (out[[0, 2]].float() == CANARY).all()


def test_offsets_beyond_32_bits() -> None:
    """Slot 4 of `out` and group 4 of the scales begin at element 2^31."""
    try:
        storage = torch.empty(2**31 + 2048, dtype=torch.float32, device=DEVICE)
    except RuntimeError:
        pytest.skip("not enough memory")
    x = normal(3, 640)
    slots = torch.tensor([[4], [0], [1]], dtype=torch.int32, device=DEVICE)
    out = storage.view(FP8_DTYPE).as_strided((5, 640), (2**29, 1))
    scales = storage[1024:].as_strided((5, 5), (2**29, 1))
    permute_rows(x, slots, out, scales)
    check_quantized((out[[4, 0, 1]], scales.T[[4, 0, 1]]), x, GROUP_SIZE)


def test_permuted_with_a_static_scale() -> None:
    x, slots, expected, filled = permuted_case(200, torch.bfloat16)
    out, scale = canaries(8, 200, dtype=FP8_DTYPE), torch.tensor([0.013], device=DEVICE)
    permute_rows(x, slots, out, static_scale=scale)
    assert torch.equal(out[filled].float(), definition.quantize_static(expected, scale).float())


@pytest.mark.parametrize(("num_rows", "top_k"), [(0, 2), (3, 0)])
def test_nothing_to_permute(num_rows: int, top_k: int) -> None:
    out = canaries(2, 40, dtype=torch.bfloat16)
    permute_rows(normal(num_rows, 40), torch.empty(num_rows, top_k, dtype=torch.int32, device=DEVICE), out)
    assert (out == CANARY).all()


def test_no_rows() -> None:
    for shape in ((0, 40), (0, 3, 40), (3, 0, 40)):
        out, scales = quantized(normal(*shape), GROUP_SIZE)
        assert out.numel() == scales.numel() == 0


def test_large_calls_take_larger_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_rows_module, "_ENOUGH_PROGRAMS", 8)
    x = normal(9, 1000)
    check_quantized(quantized(x, GROUP_SIZE), x, GROUP_SIZE)


def test_scales_that_do_not_fit_are_refused() -> None:
    x, out, one = normal(2, 300), canaries(2, 300, dtype=FP8_DTYPE), torch.ones(1, device=DEVICE)
    with pytest.raises(ShapeError, match="3"):
        quantize_rows(x, out, canaries(2, 2))
    with pytest.raises(ShapeError, match="packed"):
        quantize_rows(x, out, canaries(2, 3, dtype=torch.int32))
    with pytest.raises(ShapeError, match="either"):
        quantize_rows(x, out)
    with pytest.raises(ShapeError, match="either"):
        quantize_rows(x, out, canaries(2, 3), static_scale=one)
    slots = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ShapeError, match="neither"):
        permute_rows(x, slots, canaries(2, 300, dtype=x.dtype), static_scale=one)
    with pytest.raises(ShapeError, match="neither"):
        permute_rows(x, slots, out)
    sent, filled = canaries(2, 300, dtype=FP8_DTYPE), canaries(3, 2)
    for rows, given, to in (
        (sent, None, filled),
        (x, canaries(2, 3), filled),
        (sent, canaries(2, 1), filled),
        (sent, canaries(1, 3), filled),
        (sent, canaries(2, 1), canaries(1, 2, dtype=torch.int32)),
    ):
        with pytest.raises(ShapeError, match="x_scales"):
            permute_rows(rows, slots, out, to, x_scales=given)
