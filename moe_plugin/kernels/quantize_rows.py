"""Rows to fp8 e4m3 with their scales, where they lie or copied to the slots of a sort.

    quantize_rows   row n -> row n                                          scales [N, groups]
    permute_rows    row n -> row slot_of_pair[n, k] for each k not skipped   scales [groups, slots], one read, K writes
                    in the masked layout                                    scales [E, groups, M], slot e * M + place

A group is 128 columns or the whole row; its scale is max(amax, 1e-4) / 448, or a given one for everything (static). The
scales of permuted rows lie group by group, so that those of a tile of rows are next to each other. `permute_rows` also
copies without quantization, and rows that are quantized already together with their scales. Conversion saturates; NaN
makes its whole group NaN, as does Inf unless the scale is given.

Scales in an int32 tensor are UE8M0 packed: rounded up to powers of two, the exponents of four groups of 128 columns in
one number, the first in its low byte; zeros stand for groups past the row. See `moe_plugin.quantization.pack_ue8m0`.

Example, H = 2, one group per row:

    x [[896, 3], [0, 0]]    quantized [[448, 1.5], [0, 0]]    scales [[2], [1e-4 / 448]]
    slot_of_pair [[2, 0], [-1, 1]]    permuted [[448, 1.5], [0, 0], [448, 1.5]]    scales [[2, 1e-4 / 448, 2]]
    UE8M0: scales 2^1 and 2^-22, so exponents 128 and 105; packed [[128], [105]]
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from moe_plugin.errors import ShapeError
from moe_plugin.kernels.dependent_launch import dependent_launch, wait_for_the_kernel_before
from moe_plugin.kernels.interpreter import INTERPRETED, resident_warps, round_to
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.masked_slots import ends_of_experts, nth_row
from moe_plugin.kernels.row_blocks import nth_tile, tiles_of_groups
from moe_plugin.kernels.tiling import cdiv, next_power_of_2
from moe_plugin.quantization import FP8_DTYPE, FP8_MAX, GROUP_SIZE, LEAST_AMAX, UE8M0_PACKED

_FP8_MAX = tl.constexpr(FP8_MAX)
_LEAST_AMAX = tl.constexpr(LEAST_AMAX)
_PACKED = tl.constexpr(UE8M0_PACKED)
_COLUMNS_PER_WARP = 512
"""Two 16-byte loads and one 16-byte store of fp8 per thread."""
_MAX_ROW_WARPS = 16
_TILE_ROWS = 4
"""Rows of groups that a program finds at once."""
_ENOUGH_PROGRAMS = 1024
_RESIDENT_WARPS = resident_warps(6144)
"""About as many as a large GPU runs at once; more of them, where a program takes several rows, would only wait."""


@triton.jit
def dynamic_scale(value, AXIS: tl.constexpr):
    """The scales that bring fp32 groups along AXIS into the range of fp8; divide by them exactly, with tl.div_rn.

    Rows of 16-bit numbers often fall halfway between two fp8 values, where any less exact quotient takes the other one.
    """
    # Among non-negative floats the order of the bits is that of the numbers, with NaN on top.
    bits = tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=AXIS)
    amax = bits.to(tl.float32, bitcast=True)
    amax = tl.where(amax < _LEAST_AMAX, _LEAST_AMAX, amax)
    return tl.div_rn(amax, _FP8_MAX)


@triton.jit
def quotient(value, divisor):
    """value [groups, columns] / divisor [groups], rounded as tl.div_rn does, with one reciprocal per group.

    With the reciprocal rounded to nearest, a correction by the exact remainder takes the quotient to within one unit in
    the last place, and another one rounds it to nearest (P. W. Markstein, "Computation of elementary functions on the
    IBM RISC System/6000 processor", IBM Journal of Research and Development 34, 1990).
    """
    if INTERPRETED:  # whose fma rounds twice
        return tl.div_rn(value, divisor[:, None])
    else:
        reciprocal = tl.div_rn(1.0, divisor)[:, None]
        opposite = -divisor[:, None]
        quotient = value * reciprocal
        quotient = tl.fma(tl.fma(quotient, opposite, value), reciprocal, quotient)
        return tl.fma(tl.fma(quotient, opposite, value), reciprocal, quotient)


@triton.jit
def _exponents(scales):
    """fp32 scales rounded up to powers of two, as exponents with a bias of 127; 255 for Inf and NaN."""
    bits = scales.to(tl.int32, bitcast=True)
    return tl.minimum(((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 255)


@triton.jit
def group_scales(value, scales_dtype: tl.constexpr):
    """fp32 scales of value [groups, columns of a group]: powers of two where they are to be stored as int32."""
    scales = dynamic_scale(value, 1)
    if scales_dtype == tl.int32:
        scales = (_exponents(scales) << 23).to(tl.float32, bitcast=True)
    return scales


@triton.jit
def store_group_scales(scales_ptr, scales, first_group, num_groups, stride_group, is_row):
    """Store scales [GROUPS] of one row from first_group on, packed where scales_ptr is one of int32.

    num_groups: of the row; those past it are dropped. is_row: False stores nothing.
    """
    if scales_ptr.dtype.element_ty == tl.int32:
        GROUPS: tl.constexpr = scales.shape[0]
        PACKS: tl.constexpr = GROUPS // _PACKED
        in_row = first_group + tl.arange(0, GROUPS) < num_groups
        exponents = tl.where(in_row, _exponents(scales), 0).reshape([PACKS, _PACKED])
        packed = tl.sum(exponents << (8 * tl.arange(0, _PACKED))[None, :], axis=1)
        packs = first_group // _PACKED + tl.arange(0, PACKS)
        mask = (packs * _PACKED < num_groups) & is_row
        tl.store(scales_ptr + packs.to(tl.int64) * stride_group, packed, mask=mask)
    else:
        groups = first_group + tl.arange(0, scales.shape[0])
        tl.store(scales_ptr + groups.to(tl.int64) * stride_group, scales, mask=(groups < num_groups) & is_row)


@triton.jit
@no_type_check  # a tuple that grows in an unrolled loop has no type
def _quantize_row(
    x_ptr, out_ptr, scales_ptr, static_scale_ptr, x_scales_ptr, slot_of_pair_ptr,
    expert, row, slots_per_expert, hidden_size,
    stride_x_expert, stride_x_row, stride_out_expert, stride_out_row,
    stride_scales_expert, stride_scales_row, stride_scales_group, stride_x_scales_row, stride_x_scales_group,
    TOP_K: tl.constexpr, MASKED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of GROUP columns of one row (int64). Without static_scale_ptr and scales_ptr: a plain copy.

    x_scales_ptr: of a row that is quantized; they are copied to scales_ptr.
    """
    if slot_of_pair_ptr is not None:
        slots = ()
        for k in tl.static_range(TOP_K):
            slots += (tl.load(slot_of_pair_ptr + row * TOP_K + k),)
    first_group = tl.program_id(1) * GROUPS
    groups = first_group + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    in_row = columns < hidden_size
    num_groups = tl.cdiv(hidden_size, GROUP)
    x = tl.load(x_ptr + expert * stride_x_expert + row * stride_x_row + columns, mask=in_row, other=0.0)
    if x_scales_ptr is not None:
        x_scales_ptrs = x_scales_ptr + row * stride_x_scales_row + groups.to(tl.int64) * stride_x_scales_group
        scales = tl.load(x_scales_ptrs, mask=groups < num_groups, other=0.0)
        out = x
    elif static_scale_ptr is not None:
        out = round_to(tl.div_rn(x.to(tl.float32), tl.load(static_scale_ptr)), out_ptr.dtype.element_ty)
    elif scales_ptr is not None:
        scales = group_scales(x.to(tl.float32), scales_ptr.dtype.element_ty)
        out = round_to(quotient(x.to(tl.float32), scales), out_ptr.dtype.element_ty)
    else:
        out = x
    out_ptrs = out_ptr + expert * stride_out_expert + columns
    if slot_of_pair_ptr is None:
        tl.store(out_ptrs + row * stride_out_row, out, mask=in_row)
        if scales_ptr is not None:
            row_ptr = scales_ptr + expert * stride_scales_expert + row * stride_scales_row
            store_group_scales(row_ptr, scales, first_group, num_groups, stride_scales_group, True)
    else:
        for k in tl.static_range(TOP_K):
            is_row = slots[k] >= 0
            tl.store(out_ptrs + slots[k].to(tl.int64) * stride_out_row, out, mask=in_row & is_row)
            if scales_ptr is not None:
                if MASKED:
                    row_ptr = scales_ptr + (slots[k] // slots_per_expert).to(tl.int64) * stride_scales_expert
                    row_ptr += (slots[k] % slots_per_expert).to(tl.int64) * stride_scales_row
                else:
                    row_ptr = scales_ptr + slots[k].to(tl.int64) * stride_scales_row
                store_group_scales(row_ptr, scales, first_group, num_groups, stride_scales_group, is_row)


@triton.jit(do_not_specialize=["rows_per_expert", "slots_per_expert"])
def _quantize_rows_kernel(
    x_ptr, out_ptr, scales_ptr, static_scale_ptr, x_scales_ptr, expert_num_tokens_ptr, group_ends_ptr,
    slot_of_pair_ptr, rows_per_expert, slots_per_expert, hidden_size,
    stride_x_expert, stride_x_row, stride_out_expert, stride_out_row,
    stride_scales_expert, stride_scales_row, stride_scales_group, stride_x_scales_row, stride_x_scales_group,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, ALIGNMENT: tl.constexpr, TILE_ROWS: tl.constexpr,
    TOP_K: tl.constexpr, MASKED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, block of groups); (first row in use, block) where expert_num_tokens counts them; (first tile of
    rows in use, block) where group_ends says which those are."""
    wait_for_the_kernel_before(PDL)
    if group_ends_ptr is not None:
        tile_ends = tiles_of_groups(group_ends_ptr, NUM_EXPERTS, EXPERTS, ALIGNMENT, TILE_ROWS)
        num_tiles = tl.max(tile_ends, axis=0)
        index = tl.program_id(0)
        while index < num_tiles:
            row, end = nth_tile(group_ends_ptr, tile_ends, index, ALIGNMENT, TILE_ROWS)
            while row < end:
                _quantize_row(
                    x_ptr, out_ptr, scales_ptr, static_scale_ptr, x_scales_ptr, slot_of_pair_ptr,
                    0, row.to(tl.int64), slots_per_expert, hidden_size,
                    stride_x_expert, stride_x_row, stride_out_expert, stride_out_row,
                    stride_scales_expert, stride_scales_row, stride_scales_group,
                    stride_x_scales_row, stride_x_scales_group, TOP_K, MASKED, GROUPS, GROUP,
                )  # fmt: skip
                row += 1
            index += tl.num_programs(0)
    elif expert_num_tokens_ptr is None:
        expert = (tl.program_id(0) // rows_per_expert).to(tl.int64)
        row = (tl.program_id(0) % rows_per_expert).to(tl.int64)
        _quantize_row(
            x_ptr, out_ptr, scales_ptr, static_scale_ptr, x_scales_ptr, slot_of_pair_ptr,
            expert, row, slots_per_expert, hidden_size,
            stride_x_expert, stride_x_row, stride_out_expert, stride_out_row,
            stride_scales_expert, stride_scales_row, stride_scales_group, stride_x_scales_row, stride_x_scales_group,
            TOP_K, MASKED, GROUPS, GROUP,
        )  # fmt: skip
    else:
        ends = ends_of_experts(expert_num_tokens_ptr, rows_per_expert, NUM_EXPERTS, EXPERTS)
        num_rows = tl.max(ends, axis=0)
        index = tl.program_id(0)
        while index < num_rows:
            expert, row = nth_row(ends, index)
            _quantize_row(
                x_ptr, out_ptr, scales_ptr, static_scale_ptr, x_scales_ptr, slot_of_pair_ptr,
                expert.to(tl.int64), row.to(tl.int64), slots_per_expert, hidden_size,
                stride_x_expert, stride_x_row, stride_out_expert, stride_out_row,
                stride_scales_expert, stride_scales_row, stride_scales_group,
                stride_x_scales_row, stride_x_scales_group, TOP_K, MASKED, GROUPS, GROUP,
            )  # fmt: skip
            index += tl.num_programs(0)


_launch_kernel = Launcher(_quantize_rows_kernel)


def quantize_rows_launches(
    x: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    static_scale: torch.Tensor | None = None,
    expert_num_tokens: torch.Tensor | None = None,
    group_ends: torch.Tensor | None = None,
    alignment: int = 1,
) -> list[Launch]:
    """The launches that quantize each row of `x` to the same row of `out`.

    x: float [N, H] or [E, M, H]. out: fp8 of the same shape, or with more rows per expert, of which the first M are
    written. Both may be strided, contiguous in H.
    scales: in any strides, fp32 [..., ceil(H / 128)] or [..., 1], receives one scale per group or per row, or int32
    [..., ceil(ceil(H / 128) / 4)], receives UE8M0 scales of the groups; or
    static_scale: fp32 [1], used for everything.
    expert_num_tokens: int32 [E], for x [E, M, H]; rows of expert e from expert_num_tokens[e] on are left alone.
    group_ends: int32 [E], E >= 1, for x [slots, H] that is sorted by expert: each expert's rows start at the end before
        it, rounded up to `alignment`, a power of two, and rows that are none's are left alone.
    Raises ShapeError when neither or both kinds of scales are given, or `scales` has another number of groups.
    """
    if (scales is None) == (static_scale is None):
        raise ShapeError("rows are quantized with either scales to fill or a static_scale, got both or neither")
    by_expert = scales if scales is None or scales.dim() == 3 else scales[None]
    return _launches(x, out, by_expert, static_scale, None, expert_num_tokens, group_ends, alignment, None)


def permute_rows_launches(
    x: torch.Tensor,
    slot_of_pair: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    static_scale: torch.Tensor | None = None,
    x_scales: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches that write row n of `x` to the rows slot_of_pair[n, k] of `out`, for every k where that is not -1.

    x: float [N, H], may be strided, contiguous in H. slot_of_pair: int32 [N, K], as `counting_sort` or `masked_slots`
    writes it. out: [slots, H] of x's dtype for a copy, or fp8 together with one of
    scales: fp32 [ceil(H / 128), slots] or [1, slots], receives one scale per group or per row, or int32
    [ceil(ceil(H / 128) / 4), slots], receives UE8M0 scales of the groups; in the masked layout each with a dimension
    more, [E, ..., M] for slots e * M + place;
    static_scale: fp32 [1], used for everything.
    x_scales: of x in fp8, quantized before, which then moves as it is: fp32 [N, ceil(H / 128)] or [N, 1], any strides,
        written to `scales`, which have as many groups and are fp32.
    Rows of `out` and columns of `scales` that hold no pair keep what they held. Raises ShapeError as `quantize_rows`,
    and where there are x_scales for rows that are not fp8, or none for rows that are.
    """
    if (out.dtype is FP8_DTYPE) != ((scales is None) != (static_scale is None)):
        raise ShapeError("permuting to fp8 takes either scales to fill or a static_scale, a plain copy takes neither")
    by_slot = None if scales is None else scales.mT if scales.dim() == 3 else scales.T[None]
    if (x_scales is not None) != (x.dtype is FP8_DTYPE):
        raise ShapeError("rows that are fp8 come with x_scales, others without")
    if x_scales is not None:
        rows, groups = x.shape[0], -1 if by_slot is None or by_slot.dtype is torch.int32 else by_slot.shape[2]
        if tuple(x_scales.shape) != (rows, groups):
            raise ShapeError(
                f"x_scales must be {rows} rows of as many fp32 scales as `scales`, got {[*x_scales.shape]}"
            )
    return _launches(x, out, by_slot, static_scale, x_scales, None, None, 1, slot_of_pair)


quantize_rows = running(quantize_rows_launches)
permute_rows = running(permute_rows_launches)


def _launches(
    x: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    expert_num_tokens: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    alignment: int,
    slot_of_pair: torch.Tensor | None,
) -> list[Launch]:
    """scales: [1 or E, rows or slots, groups]."""
    hidden_size = x.shape[-1]
    per_row = scales is not None and scales.shape[2] == 1 and scales.dtype is not torch.int32
    if scales is not None and not per_row:
        _check_groups(scales, hidden_size)
    num_rows = x.numel() // max(hidden_size, 1)
    if num_rows == 0 or (slot_of_pair is not None and slot_of_pair.numel() == 0):
        return []
    # In fp8 twice as many columns are as many loads.
    columns_per_warp = _COLUMNS_PER_WARP if x_scales is None else 2 * _COLUMNS_PER_WARP
    if per_row:
        groups, group = 1, next_power_of_2(hidden_size)
        num_warps = min(max(group // (2 * columns_per_warp), 1), _MAX_ROW_WARPS)
    else:
        num_warps = 2 if num_rows * cdiv(hidden_size, 2 * columns_per_warp) >= _ENOUGH_PROGRAMS else 1
        groups, group = num_warps * columns_per_warp // GROUP_SIZE, GROUP_SIZE
    column_blocks = cdiv(hidden_size, groups * group)
    num_programs, num_experts = num_rows, 1
    of_experts = group_ends if expert_num_tokens is None else expert_num_tokens
    tile_rows = 1 if group_ends is None else min(_TILE_ROWS, alignment)
    if of_experts is not None:
        num_programs = min(cdiv(num_rows, tile_rows), max(_RESIDENT_WARPS // (num_warps * column_blocks), 1))
        num_experts = of_experts.numel()
    slots_per_expert = 1 if scales is None else scales.shape[1]
    masked = slot_of_pair is not None and scales is not None and scales.shape[0] > 1
    x_strides, out_strides = ((t.stride(0), t.stride(1)) if t.dim() == 3 else (0, t.stride(0)) for t in (x, out))
    pdl = dependent_launch()
    launch = _launch_kernel.launch(
        (num_programs, column_blocks),
        (
            x, out, scales, static_scale, x_scales, expert_num_tokens, group_ends, slot_of_pair,
            x.shape[-2], slots_per_expert, hidden_size,
            *x_strides, *out_strides, *((0, 0, 0) if scales is None else scales.stride()),
            *((0, 0) if x_scales is None else x_scales.stride()),
        ),
        (
            num_experts, next_power_of_2(num_experts), alignment, tile_rows,
            1 if slot_of_pair is None else slot_of_pair.shape[1], masked, groups, group, pdl,
        ),
        num_warps=num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


def _check_groups(scales: torch.Tensor, hidden_size: int) -> None:
    given, groups = scales.shape[2], cdiv(hidden_size, GROUP_SIZE)
    if scales.dtype is torch.int32:
        if given != cdiv(groups, UE8M0_PACKED):
            raise ShapeError(
                f"{given} packed scales per row of {hidden_size} columns; "
                f"there must be one per {UE8M0_PACKED * GROUP_SIZE} columns, {cdiv(groups, UE8M0_PACKED)}"
            )
    elif given != groups:
        raise ShapeError(
            f"{given} scales per row of {hidden_size} columns; "
            f"there must be 1 or one per {GROUP_SIZE} columns, {groups}"
        )
