"""Grouped GEMMs of the experts: rows of many experts, each against its own weight matrix, in one launch.

Two kernels make one expert layer; each exists for both activation formats:

    gate_up_activation   out = act(x @ w_gate^T + b_gate, x @ w_up^T + b_up)    w13 [E, 2I, H], gate rows first
    down                 out = (x @ w2^T + b) * router_weight                    w2 [E, H, I]

    rows of        SortedRows (Standard)                       BatchedRows (BatchedExperts)
    x of gate_up   [N, H], row pair // K                       [E, M, H]
    intermediate   [slots, I], in the order of sorted_pairs    [E, M, I]
    out of down    [N * K, H], row pair                        [E, M, H]

Example, H = I = 1, one expert, w13 = [[2], [3]], w2 = [[10]], silu_and_mul, N = 2, K = 1, block_m = 2,
sorted_pairs [1, 2] (pair 1, then padding, since only row 1 wants this expert), x = [[nan], [1]]:

    gate = 2, up = 3, intermediate[0] = silu(2) * 3 = 5.2848, out[1] = 52.848; intermediate[1] and out[0] stay untouched

Products are accumulated in fp32 and rounded once, after bias and activation or router weight. fp32 operands are
multiplied in full precision. Rows that hold no pair are neither read nor written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_plugin.config import Activation
from moe_plugin.kernels.interpreter import dot, round_to
from moe_plugin.kernels.tiling import BlockConfig, cdiv


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
    row_block, sorted_pairs_ptr, expert_ptr, num_rows, BATCHED: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The block's expert (-1: nothing to do) and, for each of its rows, slot and pair (int64) and whether it is used.

    expert_ptr: block_expert, or expert_num_tokens when BATCHED; num_rows: N * K, or max_tokens when BATCHED.
    In a batch, slot and pair are both the row within the expert.
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
    else:
        expert = tl.load(expert_ptr + row_block)
        slots = row_block * BLOCK_M + lanes
        # The slots of an unused block are in bounds too, so there is no need to branch here.
        pairs = tl.load(sorted_pairs_ptr + slots)
        used = pairs < num_rows
    return expert, slots.to(tl.int64), pairs.to(tl.int64), used


@triton.jit
def _sigmoid(x):
    decay = tl.exp(-tl.abs(x))
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def _gated_activation(
    gate, up, ACTIVATION: tl.constexpr, SWIGLU_ALPHA: tl.constexpr, SWIGLU_LIMIT: tl.constexpr
):  # fmt: skip
    if ACTIVATION == "silu_and_mul":
        return gate * _sigmoid(gate) * up
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
def _add_bias(total, bias_ptrs, in_range):
    return total + tl.load(bias_ptrs, mask=in_range, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows", "num_row_blocks"])
def _gate_up_activation_kernel(
    x_ptr, w13_ptr, bias_ptr, out_ptr, sorted_pairs_ptr, expert_ptr,
    num_rows, num_row_blocks,
    stride_x_expert, stride_x_row, stride_w_expert, stride_w_row, stride_bias_expert, stride_out_expert, stride_out_row,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE_SIZE: tl.constexpr, BATCHED: tl.constexpr, TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr, SWIGLU_ALPHA: tl.constexpr, SWIGLU_LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row_block, column_block = _tile_of_program(num_row_blocks, tl.cdiv(INTERMEDIATE_SIZE, BLOCK_N), GROUP_M)
    expert, slots, pairs, used = _rows_of_block(row_block, sorted_pairs_ptr, expert_ptr, num_rows, BATCHED, BLOCK_M)
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = columns < INTERMEDIATE_SIZE
    # Columns past the edge compute column 0 and are dropped, which leaves the weight loads free of a mask.
    weight_rows = tl.where(in_range, columns, 0).to(tl.int64)

    x_ptrs = x_ptr + expert * stride_x_expert + (pairs // TOP_K)[:, None] * stride_x_row + depth[None, :]
    gate_ptrs = w13_ptr + expert * stride_w_expert + weight_rows[None, :] * stride_w_row + depth[:, None]
    up_rows = weight_rows + INTERMEDIATE_SIZE
    up_ptrs = w13_ptr + expert * stride_w_expert + up_rows[None, :] * stride_w_row + depth[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, HIDDEN_SIZE, BLOCK_K):
        x = _load_rows(x_ptrs, used, first, HIDDEN_SIZE, BLOCK_K)
        gate = dot(x, _load_weights(gate_ptrs, first, HIDDEN_SIZE, BLOCK_K), gate)
        up = dot(x, _load_weights(up_ptrs, first, HIDDEN_SIZE, BLOCK_K), up)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K

    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * stride_bias_expert + columns
        gate = _add_bias(gate, bias_ptrs, in_range)
        up = _add_bias(up, bias_ptrs + INTERMEDIATE_SIZE, in_range)
    value = _gated_activation(gate, up, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT)
    out_ptrs = out_ptr + expert * stride_out_expert + slots[:, None] * stride_out_row + columns[None, :]
    tl.store(out_ptrs, round_to(value, out_ptr.dtype.element_ty), mask=used[:, None] & in_range[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_row_blocks"])
def _down_kernel(
    x_ptr, w2_ptr, bias_ptr, topk_weights_ptr, out_ptr, sorted_pairs_ptr, expert_ptr,
    num_rows, num_row_blocks,
    stride_x_expert, stride_x_row, stride_w_expert, stride_w_row, stride_bias_expert,
    stride_topk_n, stride_topk_k, stride_out_expert, stride_out_row,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE_SIZE: tl.constexpr, BATCHED: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row_block, column_block = _tile_of_program(num_row_blocks, tl.cdiv(HIDDEN_SIZE, BLOCK_N), GROUP_M)
    expert, slots, pairs, used = _rows_of_block(row_block, sorted_pairs_ptr, expert_ptr, num_rows, BATCHED, BLOCK_M)
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = columns < HIDDEN_SIZE
    weight_rows = tl.where(in_range, columns, 0).to(tl.int64)

    x_ptrs = x_ptr + expert * stride_x_expert + slots[:, None] * stride_x_row + depth[None, :]
    w_ptrs = w2_ptr + expert * stride_w_expert + weight_rows[None, :] * stride_w_row + depth[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, INTERMEDIATE_SIZE, BLOCK_K):
        x = _load_rows(x_ptrs, used, first, INTERMEDIATE_SIZE, BLOCK_K)
        total = dot(x, _load_weights(w_ptrs, first, INTERMEDIATE_SIZE, BLOCK_K), total)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    if bias_ptr is not None:
        total = _add_bias(total, bias_ptr + expert * stride_bias_expert + columns, in_range)
    if topk_weights_ptr is not None:
        topk_ptrs = topk_weights_ptr + pairs // TOP_K * stride_topk_n + pairs % TOP_K * stride_topk_k
        total *= tl.load(topk_ptrs, mask=used, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + expert * stride_out_expert + pairs[:, None] * stride_out_row + columns[None, :]
    tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=used[:, None] & in_range[None, :])


def gate_up_activation(
    x: torch.Tensor,
    w13: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rows: SortedRows | BatchedRows,
    block: BlockConfig,
    activation: Activation,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
) -> None:
    """The first GEMM of the experts with bias and gated activation.

    x: [N, H], or [E, M, H] with BatchedRows. w13: [E, 2I, H]. bias: [E, 2I] or None. out: [slots, I], or [E, M, I].
    Rows may be strided, the last dimension is contiguous. Rows of `out` that hold no pair keep what they held.
    """
    num_experts, intermediate_size, hidden_size = w13.shape[0], w13.shape[1] // 2, w13.shape[2]
    num_row_blocks, num_rows, top_k, sorted_pairs, per_expert = _row_arguments(rows, num_experts, block)
    block_n = block.block_n // 2
    grid = (num_row_blocks * cdiv(intermediate_size, block_n),)
    if grid[0] == 0:
        return
    _gate_up_activation_kernel[grid](
        x, w13, bias, out, sorted_pairs, per_expert,
        num_rows, num_row_blocks,
        *_row_strides(x), *_row_strides(w13), 0 if bias is None else bias.stride(0), *_row_strides(out),
        HIDDEN_SIZE=hidden_size, INTERMEDIATE_SIZE=intermediate_size,
        BATCHED=isinstance(rows, BatchedRows), TOP_K=top_k,
        ACTIVATION=activation.value, SWIGLU_ALPHA=swiglu_alpha, SWIGLU_LIMIT=swiglu_limit,
        BLOCK_M=block.block_m, BLOCK_N=block_n, BLOCK_K=block.block_k, GROUP_M=block.group_m,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip


def down(
    x: torch.Tensor,
    w2: torch.Tensor,
    bias: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    out: torch.Tensor,
    rows: SortedRows | BatchedRows,
    block: BlockConfig,
) -> None:
    """The second GEMM of the experts with bias and router weights.

    x: [slots, I], or [E, M, I] with BatchedRows. w2: [E, H, I]. bias: [E, H] or None. topk_weights: float [N, K] or
    None; SortedRows only. out: [N * K, H], or [E, M, H]. Rows may be strided, the last dimension is contiguous. Rows of
    `out` that no pair owns keep what they held.
    """
    num_experts, hidden_size, intermediate_size = w2.shape
    num_row_blocks, num_rows, top_k, sorted_pairs, per_expert = _row_arguments(rows, num_experts, block)
    grid = (num_row_blocks * cdiv(hidden_size, block.block_n),)
    if grid[0] == 0:
        return
    _down_kernel[grid](
        x, w2, bias, topk_weights, out, sorted_pairs, per_expert,
        num_rows, num_row_blocks,
        *_row_strides(x), *_row_strides(w2), 0 if bias is None else bias.stride(0),
        *((0, 0) if topk_weights is None else topk_weights.stride()), *_row_strides(out),
        HIDDEN_SIZE=hidden_size, INTERMEDIATE_SIZE=intermediate_size,
        BATCHED=isinstance(rows, BatchedRows), TOP_K=top_k,
        BLOCK_M=block.block_m, BLOCK_N=block.block_n, BLOCK_K=block.block_k, GROUP_M=block.group_m,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip


def _row_arguments(
    rows: SortedRows | BatchedRows, num_experts: int, block: BlockConfig
) -> tuple[int, int, int, torch.Tensor | None, torch.Tensor]:
    """Row blocks, row bound, top-k, sorted pairs and per-block or per-expert tensor, as the kernels take them."""
    if isinstance(rows, BatchedRows):
        return num_experts * cdiv(rows.max_tokens, block.block_m), rows.max_tokens, 1, None, rows.expert_num_tokens
    return rows.block_expert.numel(), rows.num_pairs, rows.top_k, rows.sorted_pairs, rows.block_expert


def _row_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """(stride between experts, stride between rows); 0 between experts for a tensor that has no such dimension."""
    return (tensor.stride(0), tensor.stride(1)) if tensor.dim() == 3 else (0, tensor.stride(0))
