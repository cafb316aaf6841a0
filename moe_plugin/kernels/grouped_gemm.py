"""Grouped GEMMs of the experts: rows of many experts, each against its own weight matrix, in one launch.

Two kernels make one expert layer; each exists for all activation formats:

    gate_up_activation   out = act(x @ w_gate^T + b_gate, x @ w_up^T + b_up)    w13 [E, 2I, H], gate rows first
    down                 out = x @ w2^T + b                                      w2 [E, H, I]

    rows of        SortedRows (Standard)                       BatchedRows (BatchedExperts)    ListedRows (Contiguous)
    x of gate_up   [N, H], row pair // K                       [E, M, H]                       [slots, H]
    intermediate   [slots, I], in the order of sorted_pairs    [E, M, I]                       [slots, I]
    out of down    [slots, H], in the order of sorted_pairs    [E, M, H]                       [slots, H]

Example, H = I = 1, one expert, w13 = [[2], [3]], w2 = [[10]], silu_and_mul, N = 2, K = 1, block_m = 2,
sorted_pairs [1, 2] (pair 1, then padding, since only row 1 wants this expert), x = [[nan], [1]]:

    gate = 2, up = 3, intermediate[0] = silu(2) * 3 = 5.2848, out[0] = 52.848; intermediate[1] and out[1] stay untouched

Products are accumulated in fp32 and rounded once, after bias and activation. fp32 operands are multiplied in full
precision. Rows that hold no pair are neither read nor written.

fp8 e4m3 operands come with fp32 scales, and an intermediate in fp8 is quantized in the epilogue of gate_up_activation:

    scales of x          [..., ceil(D/128)] per row and 128 columns, [..., 1] per row, [1] or [E] static
    scales of weights    w13 [E, 2], [E, 2I] or [E, 2 * ceil(I/128), ceil(H/128)]; w2 [E], [E, H] or
                         [E, ceil(H/128), ceil(I/128)]: per matrix, per output channel or per 128 x 128 tile

Scales that change along the depth are applied to the product of each 128 of depth, the others to the sum. In every
scheme these products are added up in fp32 registers, since the accumulators of fp8 tensor cores keep about 14 bits
(DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_plugin.config import Activation
from moe_plugin.kernels.gated_activation import activate
from moe_plugin.kernels.interpreter import dot, round_to
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.quantize_rows import dynamic_scale
from moe_plugin.kernels.tiling import BlockConfig, cdiv
from moe_plugin.quantization import GROUP_SIZE

_GROUP_SIZE = tl.constexpr(GROUP_SIZE)


@dataclass(frozen=True, slots=True)
class SortedRows:
    """Rows of the Standard format as `counting_sort` ordered them.

    sorted_pairs: int32 [blocks * block_m]. block_expert: int32 [blocks]. num_pairs: N * K. top_k: K.
    """

    sorted_pairs: torch.Tensor
    block_expert: torch.Tensor
    num_pairs: int
    top_k: int


@dataclass(frozen=True, slots=True)
class BatchedRows:
    """Rows of the BatchedExperts format: the first expert_num_tokens[e] (int32 [E]) of expert e's max_tokens."""

    expert_num_tokens: torch.Tensor
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ListedRows:
    """Rows of the Contiguous format, in the blocks that `contiguous_blocks` listed.

    block_expert, block_row: int32 [blocks], the expert and the first slot of each. group_ends: int32 [E], the slot past
    each expert's last row.
    """

    block_expert: torch.Tensor
    block_row: torch.Tensor
    group_ends: torch.Tensor


@triton.jit
def _tile_of_program(num_row_blocks, num_column_blocks, GROUP_M: tl.constexpr):
    """Programs next to each other share weights: GROUP_M row blocks walk through the columns together."""
    program = tl.program_id(0)
    programs_per_group = GROUP_M * num_column_blocks
    first_row_block = program // programs_per_group * GROUP_M
    group_rows = tl.minimum(num_row_blocks - first_row_block, GROUP_M)
    in_group = program % programs_per_group
    return first_row_block + in_group % group_rows, in_group // group_rows


@triton.jit
def _rows_of_block(
    row_block, sorted_pairs_ptr, expert_ptr, block_row_ptr, group_ends_ptr, num_rows,
    BATCHED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The block's expert (-1: nothing to do) and, for each of its rows, slot and pair (int64) and whether it is used.

    expert_ptr: block_expert, or expert_num_tokens when BATCHED; num_rows: N * K, or max_tokens when BATCHED.
    In a batch, slot and pair are both the row within the expert; of listed rows, both the slot.
    """
    lanes = tl.arange(0, BLOCK_M)
    if BATCHED:
        blocks_per_expert = tl.cdiv(num_rows, BLOCK_M)
        first = row_block % blocks_per_expert * BLOCK_M
        expert = row_block // blocks_per_expert
        count = tl.minimum(tl.load(expert_ptr + expert), num_rows)
        slots = first + lanes
        pairs = slots
        used = slots < count
        expert = tl.where(first < count, expert, -1)
    elif block_row_ptr is not None:
        expert = tl.load(expert_ptr + row_block)
        slots = tl.load(block_row_ptr + row_block) + lanes
        pairs = slots
        used = slots < tl.load(group_ends_ptr + expert, mask=expert >= 0, other=0)
    else:
        expert = tl.load(expert_ptr + row_block)
        slots = row_block * BLOCK_M + lanes
        # The slots of an unused block are in bounds too, so there is no need to branch here.
        pairs = tl.load(sorted_pairs_ptr + slots)
        used = pairs < num_rows
    return expert, slots.to(tl.int64), pairs.to(tl.int64), used


@triton.jit
def _load_rows(row_ptrs, used, first, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of activations; zeros for unused rows and past the depth."""
    if DEPTH % BLOCK_K == 0:
        return tl.load(row_ptrs, mask=used[:, None], other=0.0)
    else:
        return tl.load(row_ptrs, mask=used[:, None] & (tl.arange(0, BLOCK_K) < DEPTH - first)[None, :], other=0.0)


@triton.jit
def _load_weights(weight_ptrs, first, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, columns] of weights; zeros past the depth."""
    if DEPTH % BLOCK_K == 0:
        return tl.load(weight_ptrs)
    else:
        return tl.load(weight_ptrs, mask=(tl.arange(0, BLOCK_K) < DEPTH - first)[:, None], other=0.0)


@triton.jit
def _weight_scale_ptrs(
    scale_ptr, weight_rows, column_block, stride_row, BLOCK_N: tl.constexpr, WEIGHT_SCALE: tl.constexpr
):  # fmt: skip
    """Where the scales of a tile's weight rows start: one pointer if all share a scale, else one per row."""
    if WEIGHT_SCALE == "block" and _GROUP_SIZE % BLOCK_N == 0:
        return scale_ptr + column_block * BLOCK_N // _GROUP_SIZE * stride_row
    elif WEIGHT_SCALE == "block":
        return scale_ptr + weight_rows // _GROUP_SIZE * stride_row
    elif WEIGHT_SCALE == "channel":
        return scale_ptr + weight_rows * stride_row
    else:
        return scale_ptr


@triton.jit
def _scale_rows(weight_rows: tl.constexpr, WEIGHT_SCALE: tl.constexpr):
    """Rows of scales that `weight_rows` rows of weights take."""
    if WEIGHT_SCALE == "block":
        return tl.cdiv(weight_rows, _GROUP_SIZE)
    elif WEIGHT_SCALE == "channel":
        return weight_rows
    else:
        return 1


@triton.jit
def _group_scales(row_scale_ptrs, used, ROW_SCALE: tl.constexpr):
    """The scales of the rows for one step of depth, if they change with it."""
    if ROW_SCALE == "group":
        return tl.load(row_scale_ptrs, mask=used, other=0.0)
    else:
        return 1.0


@triton.jit
def _multiply_add(
    x, w, total, row_scales, weight_scale_ptrs, FP8: tl.constexpr, ROW_SCALE: tl.constexpr, WEIGHT_SCALE: tl.constexpr
):  # fmt: skip
    """total + x @ w for one step of depth, with the scales that belong to this step."""
    if not FP8:
        return dot(x, w, total)
    product = dot(x, w, tl.zeros(total.shape, tl.float32))
    if WEIGHT_SCALE == "block":
        weight_scales = tl.load(weight_scale_ptrs)
        if ROW_SCALE == "group" and weight_scales.numel == 1:
            # One factor per row saves a multiplication per product.
            return total + product * (row_scales * weight_scales)[:, None]
        product *= weight_scales if weight_scales.numel == 1 else weight_scales[None, :]
    if ROW_SCALE == "group":
        product *= row_scales[:, None]
    return total + product


@triton.jit
def _scale_total(
    total, row_scale_ptrs, used, weight_scale_ptrs, ROW_SCALE: tl.constexpr, WEIGHT_SCALE: tl.constexpr
):  # fmt: skip
    """The scales that hold for the whole depth."""
    if ROW_SCALE == "row":
        total *= tl.load(row_scale_ptrs, mask=used, other=0.0)[:, None]
    elif ROW_SCALE == "static":
        total *= tl.load(row_scale_ptrs)
    if WEIGHT_SCALE == "channel":
        total *= tl.load(weight_scale_ptrs)[None, :]
    elif WEIGHT_SCALE == "tensor":
        total *= tl.load(weight_scale_ptrs)
    return total


@triton.jit
def _add_bias(total, bias_ptrs, in_range):
    return total + tl.load(bias_ptrs, mask=in_range, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows", "num_row_blocks"])
def _gate_up_activation_kernel(
    x_ptr, w13_ptr, bias_ptr, out_ptr, x_scale_ptr, w13_scale_ptr, out_scale_ptr, sorted_pairs_ptr, expert_ptr,
    block_row_ptr, group_ends_ptr, num_rows, num_row_blocks,
    stride_x_expert, stride_x_row, stride_w_expert, stride_w_row, stride_bias_expert, stride_out_expert, stride_out_row,
    stride_xs_expert, stride_xs_row, stride_xs_group, stride_ws_expert, stride_ws_row, stride_ws_group,
    stride_os_expert, stride_os_row, stride_os_group,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE_SIZE: tl.constexpr, BATCHED: tl.constexpr, TOP_K: tl.constexpr,
    ROW_SCALE: tl.constexpr, WEIGHT_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr, SWIGLU_ALPHA: tl.constexpr, SWIGLU_LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    FP8: tl.constexpr = ROW_SCALE != "none"
    tl.static_assert((not FP8) or BLOCK_K == _GROUP_SIZE, "fp8 products are added up in steps of 128")
    row_block, column_block = _tile_of_program(num_row_blocks, tl.cdiv(INTERMEDIATE_SIZE, BLOCK_N), GROUP_M)
    expert, slots, pairs, used = _rows_of_block(
        row_block, sorted_pairs_ptr, expert_ptr, block_row_ptr, group_ends_ptr, num_rows, BATCHED, BLOCK_M
    )
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = columns < INTERMEDIATE_SIZE
    # Columns past the edge compute column 0 and are dropped, which leaves the weight loads free of a mask.
    weight_rows = tl.where(in_range, columns, 0).to(tl.int64)

    rows = pairs // TOP_K
    x_ptrs = x_ptr + expert * stride_x_expert + rows[:, None] * stride_x_row + depth[None, :]
    gate_ptrs = w13_ptr + expert * stride_w_expert + weight_rows[None, :] * stride_w_row + depth[:, None]
    up_rows = weight_rows + INTERMEDIATE_SIZE
    up_ptrs = w13_ptr + expert * stride_w_expert + up_rows[None, :] * stride_w_row + depth[:, None]
    x_scale_ptrs = x_scale_ptr
    gate_scale_ptrs = w13_scale_ptr
    up_scale_ptrs = w13_scale_ptr
    if FP8:
        x_scale_ptrs += expert * stride_xs_expert
        if ROW_SCALE != "static":
            x_scale_ptrs += rows * stride_xs_row
        gate_scale_ptrs += expert * stride_ws_expert
        gate_scale_ptrs = _weight_scale_ptrs(
            gate_scale_ptrs, weight_rows, column_block, stride_ws_row, BLOCK_N, WEIGHT_SCALE
        )
        up_scale_ptrs = gate_scale_ptrs + _scale_rows(INTERMEDIATE_SIZE, WEIGHT_SCALE) * stride_ws_row
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, HIDDEN_SIZE, BLOCK_K):
        x = _load_rows(x_ptrs, used, first, HIDDEN_SIZE, BLOCK_K)
        row_scales = _group_scales(x_scale_ptrs, used, ROW_SCALE)
        w = _load_weights(gate_ptrs, first, HIDDEN_SIZE, BLOCK_K)
        gate = _multiply_add(x, w, gate, row_scales, gate_scale_ptrs, FP8, ROW_SCALE, WEIGHT_SCALE)
        w = _load_weights(up_ptrs, first, HIDDEN_SIZE, BLOCK_K)
        up = _multiply_add(x, w, up, row_scales, up_scale_ptrs, FP8, ROW_SCALE, WEIGHT_SCALE)
        x_ptrs += BLOCK_K
        if ROW_SCALE == "group":
            x_scale_ptrs += stride_xs_group
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        if WEIGHT_SCALE == "block":
            gate_scale_ptrs += stride_ws_group
            up_scale_ptrs += stride_ws_group

    gate = _scale_total(gate, x_scale_ptrs, used, gate_scale_ptrs, ROW_SCALE, WEIGHT_SCALE)
    up = _scale_total(up, x_scale_ptrs, used, up_scale_ptrs, ROW_SCALE, WEIGHT_SCALE)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * stride_bias_expert + columns
        gate = _add_bias(gate, bias_ptrs, in_range)
        up = _add_bias(up, bias_ptrs + INTERMEDIATE_SIZE, in_range)
    value = activate(gate, up, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT)
    if OUT_SCALE == "group":
        tl.static_assert(BLOCK_N == _GROUP_SIZE, "a program quantizes one whole group of each of its rows")
        scales = dynamic_scale(tl.where(in_range[None, :], value, 0.0), 1)
        value = tl.div_rn(value, scales[:, None])
        out_scale_ptrs = out_scale_ptr + expert * stride_os_expert + column_block * stride_os_group
        tl.store(out_scale_ptrs + slots * stride_os_row, scales, mask=used)
    elif OUT_SCALE == "static":
        value = tl.div_rn(value, tl.load(out_scale_ptr + expert * stride_os_expert))
    out_ptrs = out_ptr + expert * stride_out_expert + slots[:, None] * stride_out_row + columns[None, :]
    tl.store(out_ptrs, round_to(value, out_ptr.dtype.element_ty), mask=used[:, None] & in_range[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_row_blocks"])
def _down_kernel(
    x_ptr, w2_ptr, bias_ptr, out_ptr, x_scale_ptr, w2_scale_ptr, sorted_pairs_ptr, expert_ptr,
    block_row_ptr, group_ends_ptr, num_rows, num_row_blocks,
    stride_x_expert, stride_x_row, stride_w_expert, stride_w_row, stride_bias_expert, stride_out_expert, stride_out_row,
    stride_xs_expert, stride_xs_row, stride_xs_group, stride_ws_expert, stride_ws_row, stride_ws_group,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE_SIZE: tl.constexpr, BATCHED: tl.constexpr,
    ROW_SCALE: tl.constexpr, WEIGHT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    FP8: tl.constexpr = ROW_SCALE != "none"
    tl.static_assert((not FP8) or BLOCK_K == _GROUP_SIZE, "fp8 products are added up in steps of 128")
    row_block, column_block = _tile_of_program(num_row_blocks, tl.cdiv(HIDDEN_SIZE, BLOCK_N), GROUP_M)
    expert, slots, _, used = _rows_of_block(
        row_block, sorted_pairs_ptr, expert_ptr, block_row_ptr, group_ends_ptr, num_rows, BATCHED, BLOCK_M
    )
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = columns < HIDDEN_SIZE
    weight_rows = tl.where(in_range, columns, 0).to(tl.int64)

    x_ptrs = x_ptr + expert * stride_x_expert + slots[:, None] * stride_x_row + depth[None, :]
    w_ptrs = w2_ptr + expert * stride_w_expert + weight_rows[None, :] * stride_w_row + depth[:, None]
    x_scale_ptrs = x_scale_ptr
    w_scale_ptrs = w2_scale_ptr
    if FP8:
        x_scale_ptrs += expert * stride_xs_expert
        if ROW_SCALE != "static":
            x_scale_ptrs += slots * stride_xs_row
        w_scale_ptrs += expert * stride_ws_expert
        w_scale_ptrs = _weight_scale_ptrs(w_scale_ptrs, weight_rows, column_block, stride_ws_row, BLOCK_N, WEIGHT_SCALE)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, INTERMEDIATE_SIZE, BLOCK_K):
        x = _load_rows(x_ptrs, used, first, INTERMEDIATE_SIZE, BLOCK_K)
        row_scales = _group_scales(x_scale_ptrs, used, ROW_SCALE)
        w = _load_weights(w_ptrs, first, INTERMEDIATE_SIZE, BLOCK_K)
        total = _multiply_add(x, w, total, row_scales, w_scale_ptrs, FP8, ROW_SCALE, WEIGHT_SCALE)
        x_ptrs += BLOCK_K
        if ROW_SCALE == "group":
            x_scale_ptrs += stride_xs_group
        w_ptrs += BLOCK_K
        if WEIGHT_SCALE == "block":
            w_scale_ptrs += stride_ws_group

    total = _scale_total(total, x_scale_ptrs, used, w_scale_ptrs, ROW_SCALE, WEIGHT_SCALE)
    if bias_ptr is not None:
        total = _add_bias(total, bias_ptr + expert * stride_bias_expert + columns, in_range)
    out_ptrs = out_ptr + expert * stride_out_expert + slots[:, None] * stride_out_row + columns[None, :]
    tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=used[:, None] & in_range[None, :])


_launch_gate_up_activation = Launcher(_gate_up_activation_kernel)
_launch_down = Launcher(_down_kernel)


def gate_up_activation_launches(
    x: torch.Tensor,
    w13: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rows: SortedRows | BatchedRows | ListedRows,
    block: BlockConfig,
    activation: Activation,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    *,
    x_scale: torch.Tensor | None = None,
    w13_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches of the experts' first GEMM with bias, gated activation and, for fp8, quantization of the result.

    x: [N, H], [slots, H] with ListedRows, or [E, M, H] with BatchedRows. w13: [E, 2I, H]. bias: [E, 2I] or None.
    out: [slots, I], or [E, M, I].
    Rows may be strided, the last dimension is contiguous. Rows of `out` that hold no pair keep what they held.

    fp8 x and w13 need x_scale and w13_scale in a shape of this module's docstring. out_scale, when `out` is fp8 too:
    fp32 [slots, ceil(I/128)] or [E, M, ceil(I/128)] in any strides, receives scales of groups of 128 columns; or [E],
    the static scale of each expert. block_k is 128 then, and block_n 256 where out_scale is written.
    """
    num_experts, intermediate_size, hidden_size = w13.shape[0], w13.shape[1] // 2, w13.shape[2]
    num_row_blocks, num_rows, top_k, pointers = _row_arguments(rows, num_experts, block)
    block_n = block.block_n // 2
    grid = (num_row_blocks * cdiv(intermediate_size, block_n),)
    if grid[0] == 0:
        return []
    row_scale, x_scale_strides = _row_scale_arguments(x_scale)
    weight_scale, w13_scale_strides = _weight_scale_arguments(w13_scale, halves=2)
    out_scale_kind, out_scale_strides = _row_scale_arguments(out_scale)
    launch = _launch_gate_up_activation.launch(
        grid,
        (
            x, w13, bias, out, x_scale, w13_scale, out_scale, *pointers,
            num_rows, num_row_blocks,
            *_row_strides(x), *_row_strides(w13), 0 if bias is None else bias.stride(0), *_row_strides(out),
            *x_scale_strides, *w13_scale_strides, *out_scale_strides,
        ),
        (
            hidden_size, intermediate_size, isinstance(rows, BatchedRows), top_k,
            row_scale, weight_scale, "group" if out_scale_kind == "row" else out_scale_kind,
            activation.value, swiglu_alpha, swiglu_limit,
            block.block_m, block_n, block.block_k, block.group_m,
        ),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
    )  # fmt: skip
    return [launch]


def down_launches(
    x: torch.Tensor,
    w2: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rows: SortedRows | BatchedRows | ListedRows,
    block: BlockConfig,
    *,
    x_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches of the experts' second GEMM with bias.

    x: [slots, I], or [E, M, I] with BatchedRows. w2: [E, H, I]. bias: [E, H] or None. out: [slots, H], or [E, M, H].
    Rows may be strided, the last dimension is contiguous. Rows of `out` that hold no pair keep what they held.
    fp8 x and w2 need x_scale and w2_scale in a shape of this module's docstring; block_k is 128 then.
    """
    num_experts, hidden_size, intermediate_size = w2.shape
    num_row_blocks, num_rows, _, pointers = _row_arguments(rows, num_experts, block)
    grid = (num_row_blocks * cdiv(hidden_size, block.block_n),)
    if grid[0] == 0:
        return []
    row_scale, x_scale_strides = _row_scale_arguments(x_scale)
    weight_scale, w2_scale_strides = _weight_scale_arguments(w2_scale, halves=1)
    launch = _launch_down.launch(
        grid,
        (
            x, w2, bias, out, x_scale, w2_scale, *pointers,
            num_rows, num_row_blocks,
            *_row_strides(x), *_row_strides(w2), 0 if bias is None else bias.stride(0), *_row_strides(out),
            *x_scale_strides, *w2_scale_strides,
        ),
        (
            hidden_size, intermediate_size, isinstance(rows, BatchedRows), row_scale, weight_scale,
            block.block_m, block.block_n, block.block_k, block.group_m,
        ),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
    )  # fmt: skip
    return [launch]


gate_up_activation = running(gate_up_activation_launches)
down = running(down_launches)


def _row_arguments(
    rows: SortedRows | BatchedRows | ListedRows, num_experts: int, block: BlockConfig
) -> tuple[int, int, int, tuple[torch.Tensor | None, ...]]:
    """Row blocks, row bound, top-k and the tensors of rows and blocks, as the kernels take them."""
    if isinstance(rows, BatchedRows):
        num_blocks = num_experts * cdiv(rows.max_tokens, block.block_m)
        return num_blocks, rows.max_tokens, 1, (None, rows.expert_num_tokens, None, None)
    if isinstance(rows, ListedRows):
        return rows.block_expert.numel(), 0, 1, (None, rows.block_expert, rows.block_row, rows.group_ends)
    return rows.block_expert.numel(), rows.num_pairs, rows.top_k, (rows.sorted_pairs, rows.block_expert, None, None)


def _row_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """(stride between experts, stride between rows); 0 between experts for a tensor that has no such dimension."""
    return (tensor.stride(0), tensor.stride(1)) if tensor.dim() == 3 else (0, tensor.stride(0))


def _row_scale_arguments(scale: torch.Tensor | None) -> tuple[str, tuple[int, int, int]]:
    """What a scale of rows belongs to, and its strides between experts, rows and groups."""
    if scale is None:
        return "none", (0, 0, 0)
    if scale.dim() == 1:
        return "static", (0 if scale.numel() == 1 else scale.stride(0), 0, 0)
    return "row" if scale.shape[-1] == 1 else "group", (*_row_strides(scale), scale.stride(-1))


def _weight_scale_arguments(scale: torch.Tensor | None, halves: int) -> tuple[str, tuple[int, int, int]]:
    """What a scale of weights belongs to, and its strides between experts, rows of scales and groups."""
    if scale is None:
        return "none", (0, 0, 0)
    if scale.dim() == 3:
        return "block", (scale.stride(0), scale.stride(1), scale.stride(2))
    if scale.dim() == 1:
        return "tensor", (scale.stride(0), 0, 0)
    return "tensor" if scale.shape[1] == halves else "channel", (scale.stride(0), scale.stride(1), 0)
