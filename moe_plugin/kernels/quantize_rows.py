"""Rows to fp8 e4m3 with fp32 scales, where they lie or copied to the slots of a counting sort.

    quantize_rows   row n -> row n                                          scales [N, groups]
    permute_rows    row n -> row slot_of_pair[n, k] for each k not skipped   scales [groups, slots], one read, K writes

A group is 128 columns or the whole row; its scale is max(amax, 1e-4) / 448, or a given one for everything (static). The
scales of permuted rows lie group by group, so that those of a tile of rows are next to each other. `permute_rows` also
copies without quantization. Conversion saturates; NaN makes its whole group NaN, as does Inf unless the scale is given.

Example, H = 2, one group per row:

    x [[896, 3], [0, 0]]    quantized [[448, 1.5], [0, 0]]    scales [[2], [1e-4 / 448]]
    slot_of_pair [[2, 0], [-1, 1]]    permuted [[448, 1.5], [0, 0], [448, 1.5]]    scales [[2, 1e-4 / 448, 2]]
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from moe_plugin.errors import ShapeError
from moe_plugin.kernels.dependent_launch import dependent_launch, wait_for_the_kernel_before
from moe_plugin.kernels.interpreter import round_to
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.tiling import cdiv, next_power_of_2
from moe_plugin.quantization import FP8_DTYPE, FP8_MAX, GROUP_SIZE, LEAST_AMAX

_FP8_MAX = tl.constexpr(FP8_MAX)
_LEAST_AMAX = tl.constexpr(LEAST_AMAX)
_COLUMNS_PER_WARP = 512
"""Two 16-byte loads and one 16-byte store of fp8 per thread."""
_MAX_ROW_WARPS = 16
_ENOUGH_PROGRAMS = 1024


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


@triton.jit(do_not_specialize=["rows_per_expert"])
@no_type_check  # a tuple that grows in an unrolled loop has no type
def _quantize_rows_kernel(
    x_ptr, out_ptr, scales_ptr, static_scale_ptr, expert_num_tokens_ptr, slot_of_pair_ptr,
    rows_per_expert, hidden_size,
    stride_x_expert, stride_x_row, stride_out_expert, stride_out_row,
    stride_scales_expert, stride_scales_row, stride_scales_group,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, block of GROUPS groups of GROUP columns). Without static_scale_ptr and scales_ptr: a plain copy."""
    wait_for_the_kernel_before(PDL)
    expert = (tl.program_id(0) // rows_per_expert).to(tl.int64)
    row = (tl.program_id(0) % rows_per_expert).to(tl.int64)
    if expert_num_tokens_ptr is not None:  # noqa: SIM102 - a constant, known when the kernel is compiled
        if row >= tl.load(expert_num_tokens_ptr + expert):
            return
    if slot_of_pair_ptr is not None:
        slots = ()
        for k in tl.static_range(TOP_K):
            slots += (tl.load(slot_of_pair_ptr + row * TOP_K + k).to(tl.int64),)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    in_row = columns < hidden_size
    x = tl.load(x_ptr + expert * stride_x_expert + row * stride_x_row + columns, mask=in_row, other=0.0)
    if static_scale_ptr is not None:
        out = round_to(tl.div_rn(x.to(tl.float32), tl.load(static_scale_ptr)), out_ptr.dtype.element_ty)
    elif scales_ptr is not None:
        scales = dynamic_scale(x.to(tl.float32), 1)
        out = round_to(tl.div_rn(x.to(tl.float32), scales[:, None]), out_ptr.dtype.element_ty)
    else:
        out = x
    out_ptrs = out_ptr + expert * stride_out_expert + columns
    if scales_ptr is not None:
        scales_ptrs = scales_ptr + expert * stride_scales_expert + groups * stride_scales_group
    if slot_of_pair_ptr is None:
        tl.store(out_ptrs + row * stride_out_row, out, mask=in_row)
        if scales_ptr is not None:
            tl.store(scales_ptrs + row * stride_scales_row, scales, mask=groups * GROUP < hidden_size)
    else:
        for k in tl.static_range(TOP_K):
            tl.store(out_ptrs + slots[k] * stride_out_row, out, mask=in_row & (slots[k] >= 0))
            if scales_ptr is not None:
                written = (groups * GROUP < hidden_size) & (slots[k] >= 0)
                tl.store(scales_ptrs + slots[k] * stride_scales_row, scales, mask=written)


_launch_kernel = Launcher(_quantize_rows_kernel)


def quantize_rows_launches(
    x: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    static_scale: torch.Tensor | None = None,
    expert_num_tokens: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches that quantize each row of `x` to the same row of `out`.

    x: float [N, H] or [E, M, H]. out: fp8 of the same shape. Both may be strided, contiguous in H.
    scales: fp32 [..., ceil(H / 128)] or [..., 1] in any strides, receives one scale per group or per row; or
    static_scale: fp32 [1], used for everything.
    expert_num_tokens: int32 [E], for x [E, M, H]; rows of expert e from expert_num_tokens[e] on are left alone.
    Raises ShapeError when neither or both kinds of scales are given, or `scales` has another number of groups.
    """
    if (scales is None) == (static_scale is None):
        raise ShapeError("rows are quantized with either scales to fill or a static_scale, got both or neither")
    num_groups = None if scales is None else scales.shape[-1]
    return _launches(x, out, _by_expert(scales), num_groups, static_scale, expert_num_tokens, None)


def permute_rows_launches(
    x: torch.Tensor,
    slot_of_pair: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    static_scale: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches that write row n of `x` to the rows slot_of_pair[n, k] of `out`, for every k where that is not -1.

    x: float [N, H], may be strided, contiguous in H. slot_of_pair: int32 [N, K], as `counting_sort` writes it.
    out: [slots, H] of x's dtype for a copy, or fp8 together with one of
    scales: fp32 [ceil(H / 128), slots] or [1, slots], receives one scale per group or per row;
    static_scale: fp32 [1], used for everything.
    Rows of `out` and columns of `scales` that hold no pair keep what they held. Raises ShapeError as `quantize_rows`.
    """
    if (out.dtype is FP8_DTYPE) != ((scales is None) != (static_scale is None)):
        raise ShapeError("permuting to fp8 takes either scales to fill or a static_scale, a plain copy takes neither")
    num_groups = None if scales is None else scales.shape[0]
    scales = None if scales is None else scales.T[None]
    return _launches(x, out, scales, num_groups, static_scale, None, slot_of_pair)


quantize_rows = running(quantize_rows_launches)
permute_rows = running(permute_rows_launches)


def _by_expert(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.dim() == 3 else tensor[None]


def _launches(
    x: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    num_groups: int | None,
    static_scale: torch.Tensor | None,
    expert_num_tokens: torch.Tensor | None,
    slot_of_pair: torch.Tensor | None,
) -> list[Launch]:
    hidden_size = x.shape[-1]
    if num_groups not in (None, 1, cdiv(hidden_size, GROUP_SIZE)):
        raise ShapeError(
            f"{num_groups} scales per row of {hidden_size} columns; "
            f"there must be 1 or one per {GROUP_SIZE} columns, {cdiv(hidden_size, GROUP_SIZE)}"
        )
    num_rows = x.numel() // max(hidden_size, 1)
    if num_rows == 0 or (slot_of_pair is not None and slot_of_pair.numel() == 0):
        return []
    if num_groups == 1:
        groups, group = 1, next_power_of_2(hidden_size)
        num_warps = min(max(group // (2 * _COLUMNS_PER_WARP), 1), _MAX_ROW_WARPS)
    else:
        num_warps = 2 if num_rows * cdiv(hidden_size, 2 * _COLUMNS_PER_WARP) >= _ENOUGH_PROGRAMS else 1
        groups, group = num_warps * _COLUMNS_PER_WARP // GROUP_SIZE, GROUP_SIZE
    x_strides, out_strides = ((t.stride(0), t.stride(1)) if t.dim() == 3 else (0, t.stride(0)) for t in (x, out))
    pdl = dependent_launch()
    launch = _launch_kernel.launch(
        (num_rows, cdiv(hidden_size, groups * group)),
        (
            x, out, scales, static_scale, expert_num_tokens, slot_of_pair, x.shape[-2], hidden_size,
            *x_strides, *out_strides, *((0, 0, 0) if scales is None else scales.stride()),
        ),
        (1 if slot_of_pair is None else slot_of_pair.shape[1], groups, group, pdl),
        num_warps=num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]
