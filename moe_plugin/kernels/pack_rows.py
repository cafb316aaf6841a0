"""Gathers the tokens of a dispatch into packed rows: hidden states, slots, router weights, error flags.

Example, H = 1, K = 2; row 0 takes token 1 to rank 0, row 1 takes token 1 to rank 2, row 2 is unused:

    token_of_row [1, 1, -1]    rank_of_row [0, 2, 2]
    token 1: hidden [7], rank [0, 2], slot [5, 3], weights [0.25, 0.75]

    hidden [[7], [7], [?]]    slots [[5, -1], [-1, 3], [-1, -1]]    weights [[0.25, 0.75], [0.25, 0.75], [?, ?]]

Entries marked ? are not written. This module works without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BLOCK_H = 2048

if triton is not None:

    @triton.jit
    def _pack_rows_kernel(
        activations_ptr, weights_ptr, rank_ptr, slot_ptr, token_of_row_ptr, rank_of_row_ptr, flags_ptr,
        hidden_out_ptr, slots_out_ptr, weights_out_ptr, flags_out_ptr, hidden_size,
        stride_activations_t, stride_activations_h, stride_weights_t, stride_weights_k, stride_hidden_out, stride_out,
        TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        token = tl.load(token_of_row_ptr + row)
        used = token >= 0
        columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        copied = (columns < hidden_size) & used
        value = tl.load(
            activations_ptr + token * stride_activations_t + columns.to(tl.int64) * stride_activations_h, mask=copied
        )
        tl.store(hidden_out_ptr + row * stride_hidden_out + columns, value, mask=copied)
        if tl.program_id(1) == 0:
            k = tl.arange(0, TOP_K_BLOCK)
            in_row = k < TOP_K
            rank = tl.load(rank_ptr + token * TOP_K + k, mask=in_row & used, other=-1)
            slot = tl.load(slot_ptr + token * TOP_K + k, mask=in_row & used, other=-1)
            here = used & (rank == tl.load(rank_of_row_ptr + row))
            tl.store(slots_out_ptr + row * stride_out + k, tl.where(here, slot, -1), mask=in_row)
            if weights_ptr is not None:
                weight_ptr = weights_ptr + token * stride_weights_t + k * stride_weights_k
                weight = tl.load(weight_ptr, mask=in_row & used)
                tl.store(weights_out_ptr + row * stride_out + k, weight, mask=in_row & used)
            tl.store(flags_out_ptr + row * stride_out, tl.load(flags_ptr))


@dataclass(frozen=True, slots=True)
class PackedViews:
    """The parts of packed rows: hidden [N, H], slots int32 [N, K], weights fp32 [N, K], flags int32 [N, 1].

    The last three share one row stride, in 4-byte words.
    """

    hidden: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    flags: torch.Tensor


def pack_rows(
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    rank: torch.Tensor,
    slot: torch.Tensor,
    token_of_row: torch.Tensor,
    rank_of_row: torch.Tensor,
    flags: torch.Tensor,
    out: PackedViews,
    use_triton: bool | None = None,
) -> None:
    """Fill `out`.

    activations [t, H] in any strides, weights fp32 [t, K] or None; rank and slot int32 [t, K] contiguous, -1 = dropped;
    token_of_row int64 [N], -1 = unused; rank_of_row int [N]; flags int32 [1], written to every row.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    """
    num_rows, hidden_size = out.hidden.shape
    if num_rows == 0:
        return
    if use_triton is None:
        use_triton = activations.is_cuda and triton is not None
    if not use_triton:
        _torch_pack(activations, weights, rank, slot, token_of_row, rank_of_row, flags, out)
        return
    top_k = slot.shape[1]
    stride_weights_t, stride_weights_k = (0, 0) if weights is None else weights.stride()
    _pack_rows_kernel[(num_rows, triton.cdiv(hidden_size, _BLOCK_H))](
        activations, weights, rank, slot, token_of_row, rank_of_row, flags,
        out.hidden, out.slots, out.weights, out.flags, hidden_size,
        activations.stride(0), activations.stride(1), stride_weights_t, stride_weights_k,
        out.hidden.stride(0), out.slots.stride(0),
        TOP_K=top_k, TOP_K_BLOCK=triton.next_power_of_2(top_k), BLOCK_H=_BLOCK_H, num_warps=8,
    )  # fmt: skip


def _torch_pack(
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    rank: torch.Tensor,
    slot: torch.Tensor,
    token_of_row: torch.Tensor,
    rank_of_row: torch.Tensor,
    flags: torch.Tensor,
    out: PackedViews,
) -> None:
    out.flags.copy_(flags.expand(out.flags.shape))
    if activations.shape[0] == 0:
        out.slots.fill_(-1)
        return
    token = token_of_row.clamp(min=0)
    here = (rank[token] == rank_of_row.unsqueeze(1)) & (token_of_row >= 0).unsqueeze(1)
    out.hidden.copy_(activations[token])
    out.slots.copy_(torch.where(here, slot[token], -1))
    if weights is not None:
        out.weights.copy_(weights[token])
