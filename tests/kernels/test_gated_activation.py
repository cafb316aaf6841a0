"""The activation of slots against `moe_plugin.activation` and the torch definition of fp8, slot by slot."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import moe_plugin.kernels.gated_activation as gated_activation_module
from moe_plugin import quantization
from moe_plugin.activation import gated_activation as definition
from moe_plugin.config import Activation
from moe_plugin.errors import ShapeError
from moe_plugin.kernels.counting_sort import counting_sort
from moe_plugin.kernels.gated_activation import ContiguousRows, GroupedRows, MaskedRows, gated_activation
from moe_plugin.kernels.masked_slots import masked_slots
from moe_plugin.kernels.tiling import cdiv, counting_sort_shapes
from moe_plugin.quantization import FP8_DTYPE, GROUP_SIZE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_FP8 = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="Triton has e4m3 from SM 89 on")
CANARY = 3.0
SILU = Activation.SILU_AND_MUL
BLOCK_ROWS, ROWS_PER_EXPERT = 16, 20
UE8M0 = [pytest.param(False, id="fp32"), pytest.param(True, id="ue8m0")]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that masked rows take several turns."""
    monkeypatch.setattr(gated_activation_module, "_RESIDENT_WARPS", 24)


def canaries(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, CANARY, device=DEVICE).to(dtype)


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def contiguous(local_ids: torch.Tensor, num_experts: int) -> tuple[ContiguousRows, torch.Tensor]:
    """The rows and the slot of each pair."""
    shapes = counting_sort_shapes(*local_ids.shape, num_experts, BLOCK_ROWS)
    buffers = {name: torch.empty(shape, dtype=torch.int32, device=DEVICE) for name, shape in shapes.items()}
    group_ends = torch.empty(num_experts, dtype=torch.int32, device=DEVICE)
    counting_sort(local_ids, num_experts, BLOCK_ROWS, **buffers, group_ends=group_ends)
    return ContiguousRows(buffers["block_expert"], group_ends, BLOCK_ROWS), buffers["slot_of_pair"]


def masked(local_ids: torch.Tensor, num_experts: int) -> tuple[MaskedRows, torch.Tensor]:
    slots = torch.empty(local_ids.shape, dtype=torch.int32, device=DEVICE)
    counts = torch.empty(num_experts, dtype=torch.int32, device=DEVICE)
    masked_slots(local_ids, ROWS_PER_EXPERT, slot_of_pair=slots, expert_num_tokens=counts)
    return MaskedRows(counts, ROWS_PER_EXPERT), slots


def grouped(local_ids: torch.Tensor, num_experts: int) -> tuple[GroupedRows, torch.Tensor]:
    """The same places as in `contiguous`."""
    rows, slots = contiguous(local_ids, num_experts)
    return GroupedRows(rows.group_ends, BLOCK_ROWS), slots


LAYOUTS = [contiguous, grouped, masked]
ROUTINGS = {
    "random": torch.randint(-1, 5, (13, 3), generator=torch.Generator().manual_seed(1)),
    "one expert": torch.full((19, 1), 3),
    "duplicates": torch.tensor([[1, 1], [4, 1], [-1, 4]]),
    "all skipped": torch.full((4, 2), -1),
}


def slots_of(rows: ContiguousRows | GroupedRows | MaskedRows) -> int:
    if isinstance(rows, MaskedRows):
        return rows.expert_num_tokens.numel() * rows.rows_per_expert
    if isinstance(rows, GroupedRows):
        return (cdiv(int(rows.group_ends.max()), BLOCK_ROWS) + 2) * BLOCK_ROWS  # two blocks more than are in use
    return rows.block_expert.numel() * rows.block_rows


def filled(slot_of_pair: torch.Tensor) -> torch.Tensor:
    """Slots that hold a pair, ascending."""
    return slot_of_pair[slot_of_pair >= 0].unique().long()


def random_slots(slots: torch.Tensor, num_slots: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[num_slots, width], random where a pair is, NaN elsewhere."""
    tensor = torch.full((num_slots, width), torch.nan, dtype=dtype, device=DEVICE)
    values = torch.randn(slots.numel(), width, generator=torch.Generator().manual_seed(0)) * 4
    tensor[slots] = values.to(DEVICE, dtype)
    return tensor


def scale_buffer(rows: ContiguousRows | GroupedRows | MaskedRows, intermediate_size: int, ue8m0: bool) -> torch.Tensor:
    groups, dtype = cdiv(intermediate_size, GROUP_SIZE), torch.float32
    if ue8m0:
        groups, dtype = cdiv(groups, 4), torch.int32
    if isinstance(rows, MaskedRows):
        return canaries(rows.expert_num_tokens.numel(), groups, rows.rows_per_expert, dtype=dtype)
    return canaries(groups, slots_of(rows), dtype=dtype)


def scales_by_slot(scales: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """fp32 [slots, groups] of scales in either layout and either form."""
    by_slot = scales.mT.flatten(0, -2)
    if scales.dtype is torch.int32:
        by_slot = quantization.unpack_ue8m0(by_slot, cdiv(intermediate_size, GROUP_SIZE))
    return by_slot


def check_activated(out: torch.Tensor, gate_up: torch.Tensor, slots: torch.Tensor, *how) -> None:
    """Rounded once; canaries elsewhere. torch's own gelu is off by some 1e-6 where it is close to zero."""
    expected = definition(gate_up[slots].float(), *how)
    torch.testing.assert_close(out[slots].float(), expected, rtol=0.51 * torch.finfo(out.dtype).eps, atol=1e-5)
    others = torch.ones(out.shape[0], dtype=torch.bool, device=DEVICE)
    others[slots] = False
    assert (out[others] == CANARY).all()


def test_docstring_example() -> None:
    rows = ContiguousRows(int32([0, 2, -1]), int32([1, 2, 4]), 2)
    nan = [torch.nan, torch.nan]
    gate_up = torch.tensor([[2.0, 3.0], nan, [0.0, 9.0], [-1.0, 2.0], nan, nan], device=DEVICE)
    out = canaries(6, 1)
    gated_activation(gate_up, out, None, rows, SILU)
    assert out.flatten().tolist() == pytest.approx([5.2848, CANARY, 0, -0.5379, CANARY, CANARY], abs=1e-4)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_use_and_no_others(layout, routing: str) -> None:
    rows, slot_of_pair = layout(ROUTINGS[routing].to(DEVICE, torch.int32), 5)
    slots = filled(slot_of_pair)
    gate_up = random_slots(slots, slots_of(rows), 2 * 48)
    out = canaries(slots_of(rows), 48, dtype=torch.bfloat16)
    gated_activation(gate_up, out, None, rows, SILU)
    check_activated(out, gate_up, slots, SILU)


@pytest.mark.parametrize("intermediate_size", [16, 704, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", Activation, ids=lambda each: each.value)
def test_activations(activation: Activation, dtype: torch.dtype, intermediate_size: int) -> None:
    rows = MaskedRows(int32([2, 0, 3]), 3)
    slots = torch.tensor([0, 1, 6, 7, 8], device=DEVICE)
    gate_up = random_slots(slots, 9, 2 * intermediate_size, dtype)
    out = canaries(9, intermediate_size, dtype=dtype)
    gated_activation(gate_up, out, None, rows, activation.value, 1.5, 3.0)
    check_activated(out, gate_up, slots, activation, 1.5, 3.0)


@needs_fp8
@pytest.mark.parametrize("ue8m0", UE8M0)
@pytest.mark.parametrize("intermediate_size", [48, 704, 2048])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantized(layout, intermediate_size: int, ue8m0: bool) -> None:
    """As torch quantizes what the kernel gives in fp32, which is not rounded before."""
    rows, slot_of_pair = layout(ROUTINGS["random"][:5].to(DEVICE, torch.int32), 5)
    slots, num_slots = filled(slot_of_pair), slots_of(rows)
    gate_up = random_slots(slots, num_slots, 2 * intermediate_size)
    gate_up[slots[0]] = 0
    exact = torch.empty(num_slots, intermediate_size, device=DEVICE)
    gated_activation(gate_up, exact, None, rows, SILU)
    out = canaries(num_slots, intermediate_size, dtype=FP8_DTYPE)
    scales = scale_buffer(rows, intermediate_size, ue8m0)
    gated_activation(gate_up, out, scales, rows, SILU)
    expected, expected_scales = quantization.quantize_rows(exact[slots], GROUP_SIZE, ue8m0)
    assert torch.equal(scales_by_slot(scales, intermediate_size)[slots], expected_scales)
    assert torch.equal(out[slots].float(), expected.float())
    if ue8m0:
        assert torch.equal(scales.mT.flatten(0, -2)[slots], quantization.pack_ue8m0(expected_scales))
    others = [slot for slot in range(num_slots) if slot not in slots.tolist()]
    assert (out[others].float() == CANARY).all()
    assert (scales.mT.flatten(0, -2)[others] == CANARY).all()


@needs_fp8
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8_DTYPE], ids=str)
def test_all_layouts_give_the_same_bits(dtype: torch.dtype) -> None:
    ids = ROUTINGS["random"].to(DEVICE, torch.int32)
    source = torch.randn(*ids.shape, 2 * 160, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    # Duplicates share a slot in the masked layout, so pairs differ by row and expert alone.
    source[...] = source[:, :1] + ids[..., None].to(torch.bfloat16)
    results = []
    for layout in LAYOUTS:
        rows, slots = layout(ids, 5)
        kept = slots >= 0
        gate_up = torch.full((slots_of(rows), 320), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        gate_up[slots[kept].long()] = source[kept]
        out = canaries(slots_of(rows), 160, dtype=dtype)
        scales = scale_buffer(rows, 160, False) if dtype is FP8_DTYPE else None
        gated_activation(gate_up, out, scales, rows, SILU)
        results.append(out.float()[slots[kept].long()])
        if scales is not None:
            results[-1] = torch.cat([results[-1], scales_by_slot(scales, 160)[slots[kept].long()]], dim=1)
    assert all(torch.equal(each, results[0]) for each in results[1:])


@needs_fp8
@pytest.mark.parametrize("ue8m0", UE8M0)
def test_nan_stays_in_its_group(ue8m0: bool) -> None:
    rows = MaskedRows(int32([3]), 4)
    gate_up = random_slots(torch.arange(3, device=DEVICE), 4, 2 * 288)
    gate_up[1, 130] = torch.nan
    out, scales = canaries(4, 288, dtype=FP8_DTYPE), scale_buffer(rows, 288, ue8m0)
    gated_activation(gate_up, out, scales, rows, SILU)
    product = quantization.dequantize_rows(out[:3], scales_by_slot(scales, 288)[:3], GROUP_SIZE)
    bad = torch.zeros(3, 288, dtype=torch.bool, device=DEVICE)
    bad[1, 128:256] = True
    assert torch.equal(product.isnan(), bad)


@needs_fp8
def test_strided_tensors() -> None:
    """[E, M, .] slices of wider ones, scales row by row."""
    rows = MaskedRows(int32([1, 2]), 3)
    slots = torch.tensor([0, 3, 4], device=DEVICE)
    dense = random_slots(slots, 6, 2 * 144)
    expected, expected_scales = canaries(6, 144, dtype=FP8_DTYPE), canaries(2, 2, 3)
    gated_activation(dense, expected, expected_scales, rows, SILU)
    wide = torch.full((2, 5, 400), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[:, 1:4, 16:304] = dense.view(2, 3, 288)
    out, scales = canaries(2, 4, 160, dtype=FP8_DTYPE), canaries(2, 3, 2).mT
    gated_activation(wide[:, 1:4, 16:304], out[:, :3, :144], scales, rows, SILU)
    assert torch.equal(out[:, :3, :144].flatten(0, 1).float(), expected.float())
    assert torch.equal(scales, expected_scales)
    assert (out[:, 3].float() == CANARY).all()
    assert (out[:, :, 144:].float() == CANARY).all()


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_offsets_beyond_32_bits(layout: str) -> None:
    try:
        storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("not enough memory")
    out = storage.as_strided((4, 16), (2**29, 1))
    gate_up = storage[32:].as_strided((4, 32), (2**29, 1)) if layout == "contiguous" else out.new_zeros(4, 32)
    gate_up.copy_(random_slots(torch.arange(4, device=DEVICE), 4, 32))
    far = storage[16:].as_strided((5, 16), (2**29, 1))[1:]
    if layout == "contiguous":
        rows: ContiguousRows | MaskedRows = ContiguousRows(int32([-1, 0]), int32([4]), 2)
    else:
        rows = MaskedRows(int32([0, 0, 0, 1]), 1)
    gated_activation(gate_up, far, None, rows, SILU)
    torch.testing.assert_close(far[3].float(), definition(gate_up[3].float(), SILU), rtol=2**-8, atol=1e-5)


@pytest.mark.gpu
@needs_fp8
@pytest.mark.skipif(DEVICE == "cpu", reason="a large tensor takes too long in the interpreter")
@pytest.mark.parametrize("activation", Activation, ids=lambda each: each.value)
def test_quotients_of_many_values_are_exact(activation: Activation) -> None:
    """The kernel divides without a division for each value."""
    rows = MaskedRows(int32([8192]), 8192)
    gate_up = random_slots(torch.arange(8192, device=DEVICE), 8192, 8192)
    exact = torch.empty(8192, 4096, device=DEVICE)
    gated_activation(gate_up, exact, None, rows, activation)
    out, scales = canaries(8192, 4096, dtype=FP8_DTYPE), canaries(1, 32, 8192)
    gated_activation(gate_up, out, scales, rows, activation)
    expected, expected_scales = quantization.quantize_rows(exact, GROUP_SIZE)
    assert torch.equal(scales[0].T, expected_scales)
    assert torch.equal(out.float(), expected.float())


def test_no_slots() -> None:
    out = canaries(0, 32)
    gated_activation(canaries(0, 64), out, None, MaskedRows(int32([0, 0]), 0), SILU)
    gated_activation(canaries(0, 64), out, None, ContiguousRows(int32([]), int32([0]), 16), SILU)
    assert out.shape == (0, 32)


def test_shapes_that_do_not_fit_are_refused() -> None:
    rows, out, gate_up = MaskedRows(int32([0, 0]), 3), canaries(6, 32, dtype=torch.bfloat16), canaries(6, 64)
    fp8 = canaries(6, 32, dtype=FP8_DTYPE)
    with pytest.raises(ShapeError, match="2I"):
        gated_activation(canaries(6, 60), out, None, rows, SILU)
    with pytest.raises(ShapeError, match="none"):
        gated_activation(gate_up, out, canaries(2, 1, 3), rows, SILU)
    with pytest.raises(ShapeError, match="takes scales"):
        gated_activation(gate_up, fp8, None, rows, SILU)
    with pytest.raises(ShapeError, match=r"\[2, 1, 3\]"):
        gated_activation(gate_up, fp8, canaries(1, 6), rows, SILU)
    with pytest.raises(ShapeError, match="fill"):
        gated_activation(gate_up, out, None, MaskedRows(int32([0, 0]), 4), SILU)
    with pytest.raises(ShapeError, match="fit"):
        gated_activation(gate_up, out, None, ContiguousRows(int32([0, 0]), int32([0]), 4), SILU)
