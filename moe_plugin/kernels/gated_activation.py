"""The gated activation between two grouped GEMMs, on the rows in use; the result as it is, or quantized to fp8.

    out[slot] = act(gate_up[slot, :I], gate_up[slot, I:])    gate_up [slots, 2I], out [slots, I]

    rows of    ContiguousRows                       GroupedRows                MaskedRows
    in use     of expert e's blocks those before    from the end before it,    the first expert_num_tokens[e] of
               group_ends[e]                        rounded up, to             each expert's rows_per_expert
                                                    group_ends[e]
    scales     [groups, slots]                      [groups, slots]            [E, groups, rows_per_expert]

Activations are computed in fp32 and rounded once. fp8: groups of 128 columns, scaled and rounded as
`moe_plugin.quantization` defines it, scales fp32 or, in an int32 tensor, UE8M0 packed (see kernels/quantize_rows).
Rows not in use are neither read nor written. Which ones are is device data: no host sync, capturable in a CUDA graph.

Example, I = 1, silu_and_mul, block_rows = 2, block_expert [0, 2, -1], group_ends [1, 2, 4]:

    gate_up [[2, 3], [nan, nan], [0, 9], [-1, 2], [nan, nan], [nan, nan]]
    out     [[5.2848], -, [0], [-0.5379], -, -], where - keeps what it held

Contiguous rows are shared out in tiles of neighbours, one per program. A masked tensor is mostly empty, as are grouped
rows with room for the worst case, so programs for all rows would mostly start and exit: as many as a GPU runs at once
count the rows in use first and share those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_plugin.config import Activation
from moe_plugin.errors import ShapeError
from moe_plugin.kernels.dependent_launch import dependent_launch, wait_for_the_kernel_before
from moe_plugin.kernels.interpreter import INTERPRETED, resident_warps, round_to
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.masked_slots import ends_of_experts, nth_row
from moe_plugin.kernels.quantize_rows import group_scales, quotient, store_group_scales
from moe_plugin.kernels.row_blocks import nth_tile, tiles_of_groups
from moe_plugin.kernels.tiling import cdiv, next_power_of_2
from moe_plugin.quantization import FP8_DTYPE, GROUP_SIZE, UE8M0_PACKED

_GROUP = tl.constexpr(GROUP_SIZE)
_SHAPES = ((4, 2048), (2, 1024), (1, 512), (1, 256))
"""Warps of a program and columns of its tile: one or two 16-byte loads each of gate and up per thread."""
_TILE_ROWS, _NARROW_TILE_ROWS, _NARROW = 4, 8, 512
"""Rows of a contiguous tile, and of one of at most so many columns; measured on an H200."""
_RESIDENT_WARPS = resident_warps(4096)
"""About as many as a large GPU runs at once with this kernel's registers."""


@dataclass(frozen=True, slots=True)
class ContiguousRows:
    """Rows sorted by expert, as `counting_sort` places them in blocks.

    block_expert: int32 [blocks], -1 for unused blocks. group_ends: int32 [E], the slot past each expert's last row.
    block_rows: slots of a block, a power of two.
    """

    block_expert: torch.Tensor
    group_ends: torch.Tensor
    block_rows: int


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """Rows sorted by expert, which alone say where they are: the Contiguous activation format.

    group_ends: int32 [E], the slot past each expert's last row. Its first one is the end before it rounded up to
    `alignment`, a power of two; an expert without rows ends there.
    """

    group_ends: torch.Tensor
    alignment: int


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """Rows at e * rows_per_expert + place, of which the first expert_num_tokens[e] (int32 [E]) of expert e are used."""

    expert_num_tokens: torch.Tensor
    rows_per_expert: int


@triton.jit
def _sigmoid(x):
    decay = tl.exp(-tl.abs(x))
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, SWIGLU_ALPHA: tl.constexpr, SWIGLU_LIMIT: tl.constexpr):
    """fp32 gate and up of one shape -> their gated activation, see `moe_plugin.activation`."""
    if ACTIVATION == "silu_and_mul":
        if INTERPRETED:  # where NumPy warns of the Inf below
            return gate * _sigmoid(gate) * up
        else:
            # For very negative gates the divisor is Inf, and the quotient the zero that it should be.
            return gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu_and_mul":
        # 0.5 * (1 + tanh(z)) is sigmoid(2z); 0.79788 is sqrt(2 / pi).
        return gate * _sigmoid(2.0 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_oai")
        gate = tl.minimum(gate, SWIGLU_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, SWIGLU_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -SWIGLU_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        return (up + 1.0) * gate * _sigmoid(SWIGLU_ALPHA * gate)


@triton.jit
def _activate_row(
    gate_ptr, out_ptr, scales_ptr, stride_scales_group,
    INTERMEDIATE_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr, SWIGLU_ALPHA: tl.constexpr, SWIGLU_LIMIT: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of one row, whose gate, output and scales begin at the pointers."""
    first_group = tl.program_id(1) * GROUPS
    columns = (first_group + tl.arange(0, GROUPS))[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    in_row = columns < INTERMEDIATE_SIZE
    gate = tl.load(gate_ptr + columns, mask=in_row, other=0.0)
    up = tl.load(gate_ptr + INTERMEDIATE_SIZE + columns, mask=in_row, other=0.0)
    value = activate(gate.to(tl.float32), up.to(tl.float32), ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT)
    if scales_ptr is not None:
        scales = group_scales(value, scales_ptr.dtype.element_ty)
        value = quotient(value, scales)
        num_groups = tl.cdiv(INTERMEDIATE_SIZE, _GROUP)
        store_group_scales(scales_ptr, scales, first_group, num_groups, stride_scales_group, True)
    tl.store(out_ptr + columns, round_to(value, out_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _activate_rows(
    gate_up_ptr, out_ptr, scales_ptr, row, end,
    stride_gate_up_row, stride_out_row, stride_scales_row, stride_scales_group,
    INTERMEDIATE_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr, SWIGLU_ALPHA: tl.constexpr, SWIGLU_LIMIT: tl.constexpr,
):  # fmt: skip
    """Rows from `row` to before `end`."""
    while row < end:
        slot = row.to(tl.int64)
        row_scales_ptr = scales_ptr
        if scales_ptr is not None:
            row_scales_ptr += slot * stride_scales_row
        _activate_row(
            gate_up_ptr + slot * stride_gate_up_row, out_ptr + slot * stride_out_row, row_scales_ptr,
            stride_scales_group, INTERMEDIATE_SIZE, GROUPS, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT,
        )  # fmt: skip
        row += 1


@triton.jit(do_not_specialize=["rows_per_expert"])
def _gated_activation_kernel(
    gate_up_ptr, out_ptr, scales_ptr, block_expert_ptr, group_ends_ptr, expert_num_tokens_ptr, rows_per_expert,
    stride_gate_up_expert, stride_gate_up_row, stride_out_expert, stride_out_row,
    stride_scales_expert, stride_scales_row, stride_scales_group,
    INTERMEDIATE_SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr, SWIGLU_ALPHA: tl.constexpr, SWIGLU_LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, block of groups) where block_expert_ptr is given, (first tile in use, block) where only
    group_ends_ptr is, else (first row in use, block)."""
    wait_for_the_kernel_before(PDL)
    if block_expert_ptr is not None:
        row = tl.program_id(0) * TILE_ROWS
        expert = tl.load(block_expert_ptr + row // BLOCK_ROWS)
        if expert < 0:
            return
        end = tl.minimum(tl.load(group_ends_ptr + expert), row + TILE_ROWS)
        _activate_rows(
            gate_up_ptr, out_ptr, scales_ptr, row, end,
            stride_gate_up_row, stride_out_row, stride_scales_row, stride_scales_group,
            INTERMEDIATE_SIZE, GROUPS, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT,
        )  # fmt: skip
    elif group_ends_ptr is not None:
        tile_ends = tiles_of_groups(group_ends_ptr, NUM_EXPERTS, EXPERTS, BLOCK_ROWS, TILE_ROWS)
        num_tiles = tl.max(tile_ends, axis=0)
        index = tl.program_id(0)
        while index < num_tiles:
            row, end = nth_tile(group_ends_ptr, tile_ends, index, BLOCK_ROWS, TILE_ROWS)
            _activate_rows(
                gate_up_ptr, out_ptr, scales_ptr, row, end,
                stride_gate_up_row, stride_out_row, stride_scales_row, stride_scales_group,
                INTERMEDIATE_SIZE, GROUPS, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT,
            )  # fmt: skip
            index += tl.num_programs(0)
    else:
        ends = ends_of_experts(expert_num_tokens_ptr, rows_per_expert, NUM_EXPERTS, EXPERTS)
        num_rows = tl.max(ends, axis=0)
        index = tl.program_id(0)
        while index < num_rows:
            found, place = nth_row(ends, index)
            e = found.to(tl.int64)
            slot = place.to(tl.int64)
            row_scales_ptr = scales_ptr
            if scales_ptr is not None:
                row_scales_ptr += e * stride_scales_expert + slot * stride_scales_row
            _activate_row(
                gate_up_ptr + e * stride_gate_up_expert + slot * stride_gate_up_row,
                out_ptr + e * stride_out_expert + slot * stride_out_row, row_scales_ptr,
                stride_scales_group, INTERMEDIATE_SIZE, GROUPS, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT,
            )  # fmt: skip
            index += tl.num_programs(0)


_launch_kernel = Launcher(_gated_activation_kernel)


def gated_activation_launches(
    gate_up: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    rows: ContiguousRows | GroupedRows | MaskedRows,
    activation: Activation | str,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
) -> list[Launch]:
    """The launches that activate the rows in use.

    gate_up: bf16, fp16 or fp32 [slots, 2I], gate columns first; with MaskedRows also [E, M, 2I].
    out: [slots, I], or [E, M, I], of a float dtype, or fp8 together with
    scales: fp32 [ceil(I / 128), slots], for MaskedRows [E, ceil(I / 128), M]; int32 with
    ceil(ceil(I / 128) / 4) in the place of ceil(I / 128) receives UE8M0 scales. None for other dtypes of `out`.
    Rows may be strided, the last dimension is contiguous (of scales: any strides). Fastest for I a multiple of 16.
    activation: of config.Activation, or its value; swiglu_alpha and swiglu_limit are swiglu_oai's.
    Raises ShapeError when the shapes do not fit each other.
    """
    intermediate_size = out.shape[-1]
    if gate_up.shape != (*out.shape[:-1], 2 * intermediate_size):
        raise ShapeError(f"gate_up must be [.., 2I] for out [.., I] {[*out.shape]}, got {[*gate_up.shape]}")
    num_slots = out.numel() // max(intermediate_size, 1)
    _check_scales(out, scales, rows, num_slots)
    if num_slots == 0 or intermediate_size == 0:
        return []
    num_warps, columns = _shape(intermediate_size, is_packed=scales is not None and scales.dtype is torch.int32)
    groups = columns // GROUP_SIZE
    column_blocks = cdiv(intermediate_size, groups * GROUP_SIZE)
    block_expert = group_ends = expert_num_tokens = None
    scale_strides: tuple[int, ...] = (0, 0, 0)
    if not isinstance(rows, MaskedRows):
        group_ends, rows_per_expert = rows.group_ends, 0
        block_rows = rows.block_rows if isinstance(rows, ContiguousRows) else rows.alignment
        tile_rows = min(_NARROW_TILE_ROWS if columns <= _NARROW else _TILE_ROWS, block_rows)
        if isinstance(rows, ContiguousRows):
            block_expert = rows.block_expert
            num_programs, num_experts = block_expert.numel() * block_rows // tile_rows, 1
        else:
            num_experts = group_ends.numel()
            resident = max(_RESIDENT_WARPS // (num_warps * column_blocks), 1)
            num_programs = min(cdiv(num_slots, tile_rows), resident) if num_experts else 0
        gate_up_strides, out_strides = (0, gate_up.stride(0)), (0, out.stride(0))
        if scales is not None:
            scale_strides = (0, scales.stride(1), scales.stride(0))
    else:
        expert_num_tokens, rows_per_expert = rows.expert_num_tokens, rows.rows_per_expert
        num_experts = expert_num_tokens.numel()
        num_programs = min(num_slots, max(_RESIDENT_WARPS // (num_warps * column_blocks), 1))
        block_rows, tile_rows = 1, 1
        gate_up_strides, out_strides = _expert_strides(gate_up, rows), _expert_strides(out, rows)
        if scales is not None:
            scale_strides = (scales.stride(0), scales.stride(2), scales.stride(1))
    if num_programs == 0:
        return []
    pdl = dependent_launch()
    launch = _launch_kernel.launch(
        (num_programs, column_blocks),
        (
            gate_up, out, scales, block_expert, group_ends, expert_num_tokens, rows_per_expert,
            *gate_up_strides, *out_strides, *scale_strides,
        ),
        (
            intermediate_size, groups, block_rows, tile_rows, num_experts, next_power_of_2(num_experts),
            Activation(activation).value, swiglu_alpha, swiglu_limit, pdl,
        ),
        num_warps=num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


gated_activation = running(gated_activation_launches)


def _check_scales(
    out: torch.Tensor,
    scales: torch.Tensor | None,
    rows: ContiguousRows | GroupedRows | MaskedRows,
    num_slots: int,
) -> None:
    if (scales is None) != (out.dtype is not FP8_DTYPE):
        raise ShapeError("an fp8 out takes scales to fill, others take none")
    if isinstance(rows, MaskedRows):
        num_experts = rows.expert_num_tokens.numel()
        if num_slots != num_experts * rows.rows_per_expert:
            raise ShapeError(f"{num_experts} experts of {rows.rows_per_expert} rows do not fill {num_slots} slots")
    elif isinstance(rows, ContiguousRows) and rows.block_expert.numel() * rows.block_rows > num_slots:
        blocks = f"{rows.block_expert.numel()} blocks of {rows.block_rows} rows"
        raise ShapeError(f"{blocks} do not fit into {num_slots} slots")
    if scales is None:
        return
    groups = cdiv(out.shape[-1], GROUP_SIZE)
    if scales.dtype is torch.int32:
        groups = cdiv(groups, UE8M0_PACKED)
    expected = [groups, num_slots]
    if isinstance(rows, MaskedRows):
        expected = [rows.expert_num_tokens.numel(), groups, rows.rows_per_expert]
    if [*scales.shape] != expected:
        raise ShapeError(f"scales of dtype {scales.dtype} must be {expected} here, got {[*scales.shape]}")


def _expert_strides(tensor: torch.Tensor, rows: MaskedRows) -> tuple[int, int]:
    """Strides between experts and between rows of [slots, .] or [E, M, .]."""
    if tensor.dim() == 3:
        return tensor.stride(0), tensor.stride(1)
    return rows.rows_per_expert * tensor.stride(0), tensor.stride(0)


def _shape(intermediate_size: int, is_packed: bool) -> tuple[int, int]:
    """The largest of _SHAPES that leaves the fewest columns past the row. is_packed: whole packs of scales fit it."""
    unit = UE8M0_PACKED * GROUP_SIZE if is_packed else 1
    shapes = [shape for shape in _SHAPES if shape[1] % unit == 0]
    return min(shapes, key=lambda shape: -intermediate_size % shape[1])
