"""Tokens into the packed rows that travel, one to each rank that they need, and what came with received rows out again.

A packed row holds hidden states, slots, router weights, error flags and, in fp8, scales. Example, H = 1, K = 2, three
ranks, of which `send_plan` made this for two tokens:

    hidden [[7], [8]]       rank [[0, 2], [2, -1]]    slot [[5, 3], [4, -1]]    weights [[0.25, 0.75], [1, 0]]
    position [[0, -1, 0], [-1, -1, 1]]                counts [1, 0, 2, 0]

Row by row, those for rank 0 first, without gaps:

    hidden [[7], [7], [8]]    slots [[5, -1], [-1, 3], [4, -1]]    weights [[0.25, 0.75], [0.25, 0.75], [1, 0]]
    row_index [[0, -1, 1], [-1, -1, 2]]

For rank 2 alone they are the last two. With a capacity of 2 each rank has two rows, of which the second of rank 0 and
both of rank 1 are unused: their slots are -1, their flags are written too, and nothing else is.

A token is read once, and where it is quantized, that happens on the way. This module works without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch

from moe_plugin.kernels.dependent_launch import dependent_launch
from moe_plugin.kernels.launcher import Launch, Launcher
from moe_plugin.kernels.send_plan import SendPlan
from moe_plugin.kernels.tiling import cdiv, next_power_of_2
from moe_plugin.quantization import FP8_DTYPE, GROUP_SIZE, quantize_rows

try:
    import triton
    import triton.language as tl

    from moe_plugin.kernels.dependent_launch import wait_for_the_kernel_before
    from moe_plugin.kernels.interpreter import round_to
    from moe_plugin.kernels.quantize_rows import group_scales, quotient, store_group_scales
except ImportError:
    triton = None

_LOAD_BYTES = 32
"""Of one thread: two loads of 16 bytes on their way at a time."""
_MAX_WARPS = 4
_MAX_ROW_WARPS = 16
_ENOUGH_PROGRAMS = 1024
"""Several per SM of a large GPU, so that the loads of some hide the latency of others."""
_UNPACKED_ROWS = 32
_NUM_FLAGS = 4

if triton is not None:

    @triton.jit(do_not_specialize=["num_tokens", "own_rank", "capacity", "overflow"])
    @no_type_check  # a tuple that grows in an unrolled loop has no type
    def _pack_tokens_kernel(
        activations_ptr, scales_ptr, weights_ptr, rank_ptr, slot_ptr, position_ptr, counts_ptr,
        hidden_out_ptr, scales_out_ptr, slots_out_ptr, weights_out_ptr, flags_out_ptr, row_index_ptr,
        num_tokens, hidden_size, own_rank, capacity, overflow,
        stride_activations_t, stride_activations_h, stride_scales_t, stride_scales_g,
        stride_weights_t, stride_weights_k, stride_hidden_out, stride_out,
        NUM_RANKS: tl.constexpr, DESTINATIONS: tl.constexpr, TO_SELF: tl.constexpr, FIXED: tl.constexpr,
        TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Program (token, block of columns); with a fixed capacity also (row of each rank that may be unused, 0)."""
        wait_for_the_kernel_before(PDL)
        token = tl.program_id(0).to(tl.int64)
        is_token = token < num_tokens
        first_group = tl.program_id(1) * GROUPS
        groups = first_group + tl.arange(0, GROUPS)
        columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        in_row = (columns < hidden_size) & is_token
        # All loads stand before their first use, so that their latencies overlap.
        x_ptrs = activations_ptr + token * stride_activations_t + columns.to(tl.int64) * stride_activations_h
        x = tl.load(x_ptrs, mask=in_row, other=0.0)
        ranks = ()
        positions = ()
        counts = ()
        for i in tl.static_range(DESTINATIONS):
            rank = own_rank if TO_SELF else tl.where(own_rank <= i, i + 1, i)
            ranks += (rank,)
            positions += (tl.load(position_ptr + token * NUM_RANKS + rank, mask=is_token, other=-1),)
            counts += (tl.load(counts_ptr + rank),)

        if scales_ptr is not None:
            scales_ptrs = scales_ptr + token * stride_scales_t + groups.to(tl.int64) * stride_scales_g
            scales = tl.load(scales_ptrs, mask=(groups < tl.cdiv(hidden_size, GROUP)) & is_token, other=0.0)
            value = x
        elif scales_out_ptr is not None:
            scales = group_scales(x.to(tl.float32), scales_out_ptr.dtype.element_ty)
            value = round_to(quotient(x.to(tl.float32), scales), hidden_out_ptr.dtype.element_ty)
        else:
            value = x

        is_used = ()
        rows = ()
        first_rows = ()
        first_row = 0
        for i in tl.static_range(DESTINATIONS):
            used = positions[i] >= 0
            if FIXED:
                used &= positions[i] < capacity
            row = (first_row + positions[i]).to(tl.int64)
            tl.store(hidden_out_ptr + row * stride_hidden_out + columns, value, mask=in_row & used)
            if scales_out_ptr is not None:
                num_groups = tl.cdiv(hidden_size, GROUP)
                store_group_scales(scales_out_ptr + row * stride_out, scales, first_group, num_groups, 1, used)
            is_used += (used,)
            rows += (row,)
            first_rows += (first_row,)
            first_row += capacity if FIXED else counts[i]

        if tl.program_id(1) == 0:
            k = tl.arange(0, TOP_K_BLOCK)
            in_top_k = k < TOP_K
            pair_rank = tl.load(rank_ptr + token * TOP_K + k, mask=in_top_k & is_token, other=-1)
            pair_slot = tl.load(slot_ptr + token * TOP_K + k, mask=in_top_k & is_token, other=-1)
            if weights_ptr is not None:
                weight_ptrs = weights_ptr + token * stride_weights_t + k * stride_weights_k
                weight = tl.load(weight_ptrs, mask=in_top_k & is_token, other=0.0).to(tl.float32)
            flags = tl.load(counts_ptr + NUM_RANKS)
            if FIXED:
                for i in tl.static_range(NUM_RANKS):
                    flags |= tl.where(tl.load(counts_ptr + i) > capacity, overflow, 0)
            for i in tl.static_range(DESTINATIONS):
                used, row = is_used[i], rows[i]
                slots = tl.where(pair_rank == ranks[i], pair_slot, -1)
                tl.store(slots_out_ptr + row * stride_out + k, slots, mask=in_top_k & used)
                if weights_ptr is not None:
                    tl.store(weights_out_ptr + row * stride_out + k, weight, mask=in_top_k & used)
                tl.store(flags_out_ptr + row * stride_out, flags, mask=used)
                index = tl.where(used, row, -1).to(tl.int32)
                tl.store(row_index_ptr + token * NUM_RANKS + ranks[i], index, mask=is_token)
                if FIXED:
                    unused = (token >= counts[i]) & (token < capacity)
                    row = first_rows[i] + token
                    nowhere = tl.full([TOP_K_BLOCK], -1, tl.int32)
                    tl.store(slots_out_ptr + row * stride_out + k, nowhere, mask=in_top_k & unused)
                    tl.store(flags_out_ptr + row * stride_out, flags, mask=unused)

    @triton.jit(do_not_specialize=["num_rows", "rows_per_source"])
    def _unpack_rows_kernel(
        slots_ptr, weights_ptr, flags_ptr, local_ids_ptr, topk_weights_ptr, words_ptr,
        num_rows, rows_per_source, stride,
        TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
        SOURCES: tl.constexpr, SOURCES_BLOCK: tl.constexpr, NUM_FLAGS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        wait_for_the_kernel_before(PDL)
        row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        k = tl.arange(0, TOP_K_BLOCK)
        is_pair = (row < num_rows)[:, None] & (k < TOP_K)[None, :]
        packed = row[:, None] * stride + k[None, :]
        pair = row[:, None] * TOP_K + k[None, :]
        slots = tl.load(slots_ptr + packed, mask=is_pair)
        if topk_weights_ptr is not None:
            tl.store(topk_weights_ptr + pair, tl.load(weights_ptr + packed, mask=is_pair), mask=is_pair)
        tl.store(local_ids_ptr + pair, slots, mask=is_pair)
        if words_ptr is not None:  # noqa: SIM102 - a constant, known when the kernel is compiled
            if tl.program_id(0) == 0:
                source = tl.arange(0, SOURCES_BLOCK)
                first_row = source.to(tl.int64) * rows_per_source
                flags = tl.load(flags_ptr + first_row * stride, mask=source < SOURCES, other=0)
                bit = tl.arange(0, NUM_FLAGS)
                found = tl.max((flags[:, None] >> bit[None, :]) & 1, axis=0)
                tl.store(words_ptr + bit, found << bit, mask=found > 0)

    _launch_pack = Launcher(_pack_tokens_kernel)
    _launch_unpack = Launcher(_unpack_rows_kernel)


@dataclass(frozen=True, slots=True)
class PackedViews:
    """The parts of packed rows: hidden [N, H], slots int32 [N, K], weights fp32 [N, K], flags int32 [N, 1], scales.

    scales: fp32 [N, ceil(H / 128)] or [N, 1] of hidden states in fp8, else None. All but the hidden states share one
    row stride, in 4-byte words.
    """

    hidden: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    flags: torch.Tensor
    scales: torch.Tensor | None = None


def pack_tokens(
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    plan: SendPlan,
    out: PackedViews,
    row_index: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    own_rank: int | None = None,
    to_self: bool = False,
    capacity: int | None = None,
    overflow: int = 0,
    use_triton: bool | None = None,
) -> None:
    """Fill `out` with the rows for all ranks, in ascending order, and within a rank in the order of tokens.

    Rows of `out` past these keep what they held with Triton; without it they may be written too.

    activations: float [T, H] in any strides; quantized to fp8 on the way when `out` has scales, unless it comes with
    scales: fp32 [T, groups] of activations that were quantized before, which are then copied.
    weights: float [T, K] in any strides, or None. row_index: int32 [T, R] contiguous, receives the row of `out` that
    token t's row for rank r is, -1 where it is not sent; only of the ranks whose rows are written.
    own_rank: leave its rows out, or, with to_self, those of all others.
    capacity: every rank gets that many rows; slots of unused ones become -1. What does not fit is left out, and
    `overflow` or-ed into the flags. None: rows follow each other without gaps.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    """
    if use_triton is None:
        use_triton = activations.is_cuda and triton is not None
    pack = _run_pack if use_triton else _torch_pack
    pack(activations, weights, plan, out, row_index, scales, own_rank, to_self, capacity, overflow)


def pack_tokens_launches(
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    plan: SendPlan,
    out: PackedViews,
    row_index: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    own_rank: int | None = None,
    to_self: bool = False,
    capacity: int | None = None,
    overflow: int = 0,
) -> list[Launch]:
    """What `pack_tokens` launches with Triton."""
    num_tokens, num_ranks = plan.position.shape
    hidden_size, top_k = activations.shape[1], plan.slot.shape[1]
    destinations = 1 if to_self else num_ranks - (own_rank is not None)
    num_programs = max(num_tokens, capacity or 0)
    if num_programs == 0 or destinations == 0:
        return []
    groups, group, num_warps = _shape(num_programs, activations, out)
    pdl = dependent_launch()
    launch = _launch_pack.launch(
        (num_programs, cdiv(hidden_size, groups * group)),
        (
            activations, scales, weights, plan.rank, plan.slot, plan.position, plan.counts,
            out.hidden, out.scales, out.slots, out.weights, out.flags, row_index,
            num_tokens, hidden_size, num_ranks if own_rank is None else own_rank, capacity or 0, overflow,
            *activations.stride(), *((0, 0) if scales is None else scales.stride()),
            *((0, 0) if weights is None else weights.stride()), out.hidden.stride(0), out.slots.stride(0),
        ),
        (
            num_ranks, destinations, to_self, capacity is not None, top_k, next_power_of_2(top_k), groups, group, pdl,
        ),
        num_warps=num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


def _run_pack(
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    plan: SendPlan,
    out: PackedViews,
    row_index: torch.Tensor,
    scales: torch.Tensor | None,
    own_rank: int | None,
    to_self: bool,
    capacity: int | None,
    overflow: int,
) -> None:
    launches = pack_tokens_launches(
        activations,
        weights,
        plan,
        out,
        row_index,
        scales=scales,
        own_rank=own_rank,
        to_self=to_self,
        capacity=capacity,
        overflow=overflow,
    )
    for launch in launches:
        launch.run()


def _shape(num_rows: int, activations: torch.Tensor, out: PackedViews) -> tuple[int, int, int]:
    """Groups of columns, columns of a group, and warps of a program that has both."""
    hidden_size = activations.shape[1]
    columns_per_warp = 32 * _LOAD_BYTES // activations.element_size()
    if out.scales is not None and out.scales.shape[1] == 1:
        group = next_power_of_2(hidden_size)
        return 1, group, min(max(group // columns_per_warp, 1), _MAX_ROW_WARPS)
    num_warps = _MAX_WARPS
    while num_warps > 1 and num_rows * cdiv(hidden_size, columns_per_warp * num_warps) < _ENOUGH_PROGRAMS:
        num_warps //= 2
    columns = columns_per_warp * num_warps
    return (1, columns, num_warps) if out.scales is None else (columns // GROUP_SIZE, GROUP_SIZE, num_warps)


def _torch_pack(
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    plan: SendPlan,
    out: PackedViews,
    row_index: torch.Tensor,
    scales: torch.Tensor | None,
    own_rank: int | None,
    to_self: bool,
    capacity: int | None,
    overflow: int,
) -> None:
    """Gathers for every row of `out`, so that nothing depends on counts and the host need not know them."""
    (num_tokens, num_ranks), num_rows, device = plan.position.shape, out.slots.shape[0], out.slots.device
    first_rank, last_rank = (own_rank, own_rank + 1) if to_self and own_rank is not None else (0, num_ranks)
    ranks = torch.arange(first_rank, last_rank, dtype=torch.int32, device=device)
    position, counts = plan.position[:, first_rank:last_rank], plan.counts[first_rank:last_rank]
    is_written = ranks != own_rank if own_rank is not None and not to_self else torch.ones_like(ranks, dtype=torch.bool)
    counts, flags = torch.where(is_written, counts, 0), plan.counts[num_ranks:]
    used = (position >= 0) & is_written
    if capacity is None:
        first_row = counts.cumsum(0, dtype=torch.int32) - counts
    else:
        first_row = (is_written.cumsum(0, dtype=torch.int32) - 1) * capacity
        used &= position < capacity
        flags = flags | ((plan.counts[:num_ranks] > capacity).any() * overflow)
    row = torch.where(used, position + first_row, -1)
    indexed = row_index[:, first_rank:last_rank]
    indexed.copy_(torch.where(is_written, row, indexed))

    out.flags.copy_(flags.expand(out.flags.shape))
    if num_tokens == 0:
        out.slots.fill_(-1)
        return
    # Pairs of a token and a rank that are no row all write to one spare entry behind the table.
    spare = torch.where(used, row, num_rows).long().reshape(-1)
    pair_of_row = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=device)
    pair_of_row.scatter_(0, spare, torch.arange(spare.numel(), device=device))
    pair = pair_of_row[:num_rows]
    token, rank = pair.clamp(min=0) // ranks.numel(), ranks[pair.clamp(min=0) % ranks.numel()]
    here = (plan.rank[token] == rank[:, None]) & (pair >= 0)[:, None]
    out.slots.copy_(torch.where(here, plan.slot[token], -1))
    if weights is not None:
        out.weights.copy_(weights[token])
    if out.scales is not None:
        if scales is None:
            activations, scales = quantize_rows(activations, None if out.scales.shape[1] == 1 else GROUP_SIZE)
        out.scales.copy_(scales[token])
    if activations.dtype is FP8_DTYPE:
        # Rows only move, and not all of torch's operators know fp8.
        out.hidden.view(torch.uint8).copy_(activations.view(torch.uint8)[token])
    else:
        out.hidden.copy_(activations[token])


def unpack_rows(
    packed: PackedViews,
    num_rows: int,
    local_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    words: torch.Tensor | None = None,
    sources: int = 1,
    use_triton: bool | None = None,
) -> None:
    """Copy what came with the first `num_rows` rows.

    local_ids: int32 [at least num_rows, K], receives the slots; topk_weights: fp32 of the same shape, or None for none.
    Both contiguous.
    words: int32 [8], receives error flag 1 << i in word i, if any source has set it: the rows come from `sources` ranks
    in equal parts, and the first row of each part says. On the device or, with Triton, in the host's pinned memory.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    """
    if use_triton is None:
        use_triton = local_ids.is_cuda and triton is not None
    if use_triton:
        for launch in unpack_rows_launches(packed, num_rows, local_ids, topk_weights, words, sources):
            launch.run()
        return
    local_ids[:num_rows].copy_(packed.slots[:num_rows])
    if topk_weights is not None:
        topk_weights[:num_rows].copy_(packed.weights[:num_rows])
    if words is not None:
        bit = torch.arange(_NUM_FLAGS, dtype=torch.int32, device=words.device)
        found = ((packed.flags[: num_rows : num_rows // sources] >> bit) & 1).amax(0) << bit
        words[:_NUM_FLAGS].bitwise_or_(found)


def unpack_rows_launches(
    packed: PackedViews,
    num_rows: int,
    local_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    words: torch.Tensor | None = None,
    sources: int = 1,
) -> list[Launch]:
    """What `unpack_rows` launches with Triton."""
    if num_rows == 0:
        return []
    top_k = local_ids.shape[1]
    pdl = dependent_launch()
    launch = _launch_unpack.launch(
        (cdiv(num_rows, _UNPACKED_ROWS),),
        (
            packed.slots, packed.weights, packed.flags, local_ids, topk_weights, words,
            num_rows, num_rows // sources, packed.slots.stride(0),
        ),
        (
            top_k, next_power_of_2(top_k), _UNPACKED_ROWS, sources, next_power_of_2(sources), _NUM_FLAGS, pdl,
        ),
        num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]
