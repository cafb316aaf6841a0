"""Weighted sums of rows in a fixed order, accumulated in fp32.

Example, H = 1:

    rows     [[10], [20], [30]]
    index    [[2, 0], [-1, 1], [-1, -1]]
    weights  [[0.5, 2], [9, 1], [9, 9]]
    out      [[0.5 * 30 + 2 * 10], [1 * 20], [0]] = [[35], [20], [0]]

An index below 0 skips its term: neither that row nor its weight is read. One term may find its rows elsewhere: with
own_term = 1 and own_rows [[70], [80]] out is [[0.5 * 30 + 2 * 70], [1 * 80], [0]] = [[155], [80], [0]].

This module works without Triton; the torch form then adds in the same order.
"""

from typing import no_type_check

import torch

from moe_plugin.kernels.dependent_launch import dependent_launch
from moe_plugin.kernels.launcher import Launch, Launcher
from moe_plugin.kernels.tiling import cdiv

try:
    import triton
    import triton.language as tl

    from moe_plugin.kernels.dependent_launch import wait_for_the_kernel_before
    from moe_plugin.kernels.interpreter import round_to
except ImportError:
    triton = None

_COLUMNS_PER_WARP = 256
"""One 16-byte load per thread in 16-bit formats."""
_MAX_WARPS = 4
_ENOUGH_PROGRAMS = 1024
"""Several per SM of a large GPU, so that the loads of some hide the latency of others."""

if triton is not None:

    @triton.jit
    @no_type_check  # a tuple that grows in an unrolled loop has no type
    def _row_sum_kernel(
        rows_ptr, own_rows_ptr, index_ptr, weights_ptr, out_ptr, hidden_size,
        stride_row, stride_own_row, stride_index_t, stride_index_j, stride_weights_t, stride_weights_j, stride_out,
        TERMS: tl.constexpr, OWN_TERM: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        wait_for_the_kernel_before(PDL)
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        in_row = columns < hidden_size
        # All loads of one kind stand before their first use, so that their latencies overlap.
        indices = ()
        for term in tl.static_range(TERMS):
            indices += (tl.load(index_ptr + token * stride_index_t + term * stride_index_j),)
        values = ()
        for term in tl.static_range(TERMS):
            if term == OWN_TERM:
                row_ptr = own_rows_ptr + indices[term].to(tl.int64) * stride_own_row
            else:
                row_ptr = rows_ptr + indices[term].to(tl.int64) * stride_row
            values += (tl.load(row_ptr + columns, mask=in_row & (indices[term] >= 0), other=0.0),)
        if weights_ptr is not None:
            weights = ()
            for term in tl.static_range(TERMS):
                weight_ptr = weights_ptr + token * stride_weights_t + term * stride_weights_j
                weights += (tl.load(weight_ptr, mask=indices[term] >= 0, other=0.0),)
        total = tl.zeros([BLOCK_H], tl.float32)
        for term in tl.static_range(TERMS):
            value = values[term].to(tl.float32)
            if weights_ptr is not None:
                value *= weights[term].to(tl.float32)
            total += value
        tl.store(out_ptr + token * stride_out + columns, round_to(total, out_ptr.dtype.element_ty), mask=in_row)

    _launch = Launcher(_row_sum_kernel)


def row_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    use_triton: bool | None = None,
    *,
    own_term: int | None = None,
    own_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = sum over j of weights[t, j] * rows[index[t, j]], in the order of j.

    rows: float [R, H], rows may be strided. index: int32 [T, J], entries in [-1, R). weights: float [T, J], or None for
    a plain sum. out: float [T, H], rows may be strided; overwritten and returned.
    own_term, own_rows: the term j = own_term reads own_rows, float [R', H] of the same dtype, instead; both or none.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    """
    if use_triton is None:
        use_triton = rows.is_cuda and triton is not None
    if not use_triton:
        return _torch_sum(rows, index, weights, out, own_term, own_rows)
    for launch in row_sum_launches(rows, index, weights, out, own_term=own_term, own_rows=own_rows):
        launch.run()
    return out


def row_sum_launches(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    *,
    own_term: int | None = None,
    own_rows: torch.Tensor | None = None,
) -> list[Launch]:
    """What `row_sum` launches with Triton."""
    if out.numel() == 0:
        return []
    num_tokens, terms = index.shape
    hidden_size = out.shape[1]
    num_warps = _num_warps(num_tokens, hidden_size)
    block_h = _COLUMNS_PER_WARP * num_warps
    stride_weights_t, stride_weights_j = (0, 0) if weights is None else weights.stride()
    pdl = dependent_launch()
    launch = _launch.launch(
        (num_tokens, cdiv(hidden_size, block_h)),
        (
            rows, own_rows, index, weights, out, hidden_size,
            rows.stride(0), 0 if own_rows is None else own_rows.stride(0), *index.stride(),
            stride_weights_t, stride_weights_j, out.stride(0),
        ),
        (terms, -1 if own_term is None else own_term, block_h, pdl),
        num_warps=num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


def _num_warps(num_tokens: int, hidden_size: int) -> int:
    """As many warps a program as leave enough programs to fill the GPU."""
    num_warps = _MAX_WARPS
    while num_warps > 1 and num_tokens * cdiv(hidden_size, _COLUMNS_PER_WARP * num_warps) < _ENOUGH_PROGRAMS:
        num_warps //= 2
    return num_warps


def _torch_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    own_term: int | None,
    own_rows: torch.Tensor | None,
) -> torch.Tensor:
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for j in range(index.shape[1]):
        source = own_rows if j == own_term and own_rows is not None else rows
        if source.shape[0] == 0:
            continue
        value = source[index[:, j].clamp(min=0)].float()
        if weights is not None:
            value = value * weights[:, j, None].float()
        # A skipped row may hold NaN, so it is left out rather than multiplied by zero.
        total += torch.where(index[:, j, None] >= 0, value, 0.0)
    return out.copy_(total)
