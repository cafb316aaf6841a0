"""Weighted sums of rows in a fixed order, accumulated in fp32.

Example, H = 1:

    rows     [[10], [20], [30]]
    index    [[2, 0], [-1, 1], [-1, -1]]
    weights  [[0.5, 2], [9, 1], [9, 9]]
    out      [[0.5 * 30 + 2 * 10], [1 * 20], [0]] = [[35], [20], [0]]

An index below 0 skips its term: neither that row nor its weight is read. `pair_sum` is the case where term (t, j) has a
row of its own. This module works without Triton; the torch form then adds in the same order.
"""

import torch

try:
    import triton
    import triton.language as tl

    from moe_plugin.kernels.interpreter import round_to
except ImportError:
    triton = None

_BLOCK_H = 1024

if triton is not None:

    @triton.jit
    def _row_sum_kernel(
        rows_ptr, index_ptr, weights_ptr, out_ptr, hidden_size,
        stride_row, stride_index_t, stride_index_j, stride_weights_t, stride_weights_j, stride_out,
        TERMS: tl.constexpr, PAIRED: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        in_row = columns < hidden_size
        total = tl.zeros([BLOCK_H], tl.float32)
        for term in tl.static_range(TERMS):
            index = tl.load(index_ptr + token * stride_index_t + term * stride_index_j)
            used = index >= 0
            row = token * TERMS + term if PAIRED else index.to(tl.int64)
            value = tl.load(rows_ptr + row * stride_row + columns, mask=in_row & used, other=0.0).to(tl.float32)
            if weights_ptr is not None:
                weight_ptr = weights_ptr + token * stride_weights_t + term * stride_weights_j
                value *= tl.load(weight_ptr, mask=used, other=0.0).to(tl.float32)
            total += value
        tl.store(out_ptr + token * stride_out + columns, round_to(total, out_ptr.dtype.element_ty), mask=in_row)


def row_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """out[t] = sum over j of weights[t, j] * rows[index[t, j]], in the order of j.

    rows: float [R, H], rows may be strided. index: int32 [T, J], entries in [-1, R). weights: float [T, J], or None for
    a plain sum. out: float [T, H], rows may be strided; overwritten and returned.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    """
    if _takes_triton(rows, use_triton):
        return _launch(rows, index, weights, out, paired=False)
    if rows.shape[0] == 0:
        return out.zero_()
    return _torch_sum(lambda j: rows[index[:, j].clamp(min=0)], index, weights, out)


def pair_sum(
    rows: torch.Tensor,
    local_ids: torch.Tensor,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """out[t] = sum over j of weights[t, j] * rows[t * J + j] where local_ids[t, j] >= 0, in the order of j.

    rows: float [T * J, H], one row per pair. local_ids: int32 [T, J]. The rest as for `row_sum`.
    """
    if _takes_triton(rows, use_triton):
        return _launch(rows, local_ids, weights, out, paired=True)
    pair_rows = rows.unflatten(0, local_ids.shape)
    return _torch_sum(lambda j: pair_rows[:, j], local_ids, weights, out)


def _takes_triton(rows: torch.Tensor, use_triton: bool | None) -> bool:
    return rows.is_cuda and triton is not None if use_triton is None else use_triton


def _launch(
    rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None, out: torch.Tensor, paired: bool
) -> torch.Tensor:
    num_tokens, terms = index.shape
    hidden_size = out.shape[1]
    if out.numel() == 0:
        return out
    stride_weights_t, stride_weights_j = (0, 0) if weights is None else weights.stride()
    _row_sum_kernel[(num_tokens, triton.cdiv(hidden_size, _BLOCK_H))](
        rows, index, weights, out, hidden_size,
        rows.stride(0), index.stride(0), index.stride(1), stride_weights_t, stride_weights_j, out.stride(0),
        TERMS=terms, PAIRED=paired, BLOCK_H=_BLOCK_H, num_warps=4,
    )  # fmt: skip
    return out


def _torch_sum(row_of_term, index: torch.Tensor, weights: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for j in range(index.shape[1]):
        value = row_of_term(j).float()
        if weights is not None:
            value = value * weights[:, j, None].float()
        # A skipped row may hold NaN, so it is left out rather than multiplied by zero.
        total += torch.where(index[:, j, None] >= 0, value, 0.0)
    return out.copy_(total)
