"""From expert ids to what a dispatch sends: rank and slot of each pair, each token's place among the rows of each rank,
and how many there are. One launch, which also checks the ids.

Example, three tokens, two ranks, expert e in slot e % 2 of rank e // 2, flags = 0, wrong_id = 1:

    topk_ids [[0, 2], [3, 2], [1, -1]]
    rank     [[0, 1], [1, 1], [0, -1]]    slot [[0, 0], [1, 0], [1, -1]]
    position [[0, 0], [-1, 1], [1, -1]]   counts [2, 2, 0]

Token 1 goes to rank 1 alone, once for both of its experts, as the second of the two rows that rank 1 gets. The last of
the counts are the flags: an id of 4 in the place of the 3 would have made them 1. This module works without Triton.

Each program finds the positions of a block of tokens on one rank. What comes before its block it counts itself: that
reads the ids again, a few hundred kilobytes of them from the cache, and needs no word from any other program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_plugin.kernels.dependent_launch import dependent_launch
from moe_plugin.kernels.launcher import Launch, Launcher
from moe_plugin.kernels.placement_lookup import LookupTables, placement_lookup
from moe_plugin.kernels.tiling import cdiv, next_power_of_2

try:
    import triton
    import triton.language as tl

    from moe_plugin.kernels.dependent_launch import wait_for_the_kernel_before
except ImportError:
    triton = None

_FEW_TOKENS, _FEW_WARPS = 128, 4
_PAIRS, _MAX_WARPS = 8192, 16
"""Pairs a program takes at a time where tokens are many."""

if triton is not None:

    @triton.jit
    def _look_up(
        topk_ids_ptr, rank_table_ptr, num_replicas_ptr, token, num_tokens, first_token, stride_ids_t, stride_ids_k,
        NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, MAX_REPLICAS: tl.constexpr,
    ):  # fmt: skip
        """Of the pairs of tokens [BLOCK_T] int64: rank, entry in the tables, whether it is kept or wrong."""
        k = tl.arange(0, TOP_K_BLOCK)
        in_range = (token < num_tokens)[:, None] & (k < TOP_K)[None, :]
        ids_ptrs = topk_ids_ptr + token[:, None] * stride_ids_t + k[None, :] * stride_ids_k
        given = tl.load(ids_ptrs, mask=in_range, other=-1)
        if given.dtype == tl.int16:  # which cannot be compared with any number of experts
            given = given.to(tl.int32)
        kept = (given >= 0) & (given < NUM_EXPERTS)
        wrong = (given < -1) | (given >= NUM_EXPERTS)
        entry = tl.where(kept, given, 0).to(tl.int32)
        if num_replicas_ptr is not None:
            num_replicas = tl.load(num_replicas_ptr + entry)
            entry = entry * MAX_REPLICAS + ((first_token + token)[:, None] % num_replicas).to(tl.int32)
        rank = tl.load(rank_table_ptr + entry, mask=kept, other=-1)
        return rank, entry, kept, wrong

    @triton.jit(do_not_specialize=["num_tokens", "first_token", "flags", "wrong_id"])
    def _send_plan_kernel(
        topk_ids_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, rank_ptr, slot_ptr, position_ptr, counts_ptr,
        num_tokens, first_token, flags, wrong_id, stride_ids_t, stride_ids_k,
        NUM_RANKS: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr,
        MAX_REPLICAS: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Program (block of tokens, destination rank)."""
        wait_for_the_kernel_before(PDL)
        block, destination = tl.program_id(0), tl.program_id(1)
        in_block = tl.arange(0, BLOCK_T).to(tl.int64)
        needed_before = tl.zeros([BLOCK_T], tl.int32)
        wrong_before = tl.zeros([BLOCK_T], tl.int32)
        earlier = 0
        while earlier < block:
            rank, _, _, wrong = _look_up(
                topk_ids_ptr, rank_table_ptr, num_replicas_ptr, earlier * BLOCK_T + in_block,
                num_tokens, first_token, stride_ids_t, stride_ids_k, NUM_EXPERTS, TOP_K, TOP_K_BLOCK, MAX_REPLICAS,
            )  # fmt: skip
            needed_before += tl.max((rank == destination).to(tl.int32), axis=1)
            wrong_before |= tl.max(wrong.to(tl.int32), axis=1)
            earlier += 1

        token = block.to(tl.int64) * BLOCK_T + in_block
        rank, entry, kept, wrong = _look_up(
            topk_ids_ptr, rank_table_ptr, num_replicas_ptr, token,
            num_tokens, first_token, stride_ids_t, stride_ids_k, NUM_EXPERTS, TOP_K, TOP_K_BLOCK, MAX_REPLICAS,
        )  # fmt: skip
        needed = tl.max((rank == destination).to(tl.int32), axis=1)
        first = tl.sum(needed_before, axis=0)
        position = tl.where(needed > 0, first + tl.cumsum(needed, axis=0) - 1, -1)
        tl.store(position_ptr + token * NUM_RANKS + destination, position, mask=token < num_tokens)
        if destination == 0:
            k = tl.arange(0, TOP_K_BLOCK)
            pair = token[:, None] * TOP_K + k[None, :]
            is_pair = (token < num_tokens)[:, None] & (k < TOP_K)[None, :]
            tl.store(rank_ptr + pair, rank, mask=is_pair)
            tl.store(slot_ptr + pair, tl.load(slot_table_ptr + entry, mask=kept, other=-1), mask=is_pair)
        if block == tl.num_programs(0) - 1:
            tl.store(counts_ptr + destination, first + tl.sum(needed, axis=0))
            if destination == 0:
                any_wrong = tl.max(wrong_before | tl.max(wrong.to(tl.int32), axis=1), axis=0)
                tl.store(counts_ptr + NUM_RANKS, flags | (any_wrong * wrong_id))

    _launch = Launcher(_send_plan_kernel)


@dataclass(frozen=True, slots=True)
class SendPlan:
    """Where the tokens of this rank go.

    rank, slot: int32 [T, K], of each pair; -1 where it is dropped, as ids out of range are.
    position: int32 [T, R], a token's place among the rows for each rank, in the order of tokens; -1 where none is sent.
    counts: int32 [R + 1], rows for each rank, and then the error flags.
    """

    rank: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    counts: torch.Tensor


def send_plan(
    topk_ids: torch.Tensor,
    lookup_tables: LookupTables,
    out: SendPlan,
    wrong_id: int,
    *,
    flags: int = 0,
    first_token: int = 0,
    use_triton: bool | None = None,
) -> None:
    """Fill `out`, contiguous tensors.

    topk_ids: int [T, K] of tokens first_token, first_token + 1, ..., any strides; replicas are taken in turn by token.
    wrong_id: or-ed into the flags when an id lies outside [-1, E). flags: those that are set from the start.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    """
    if use_triton is None:
        use_triton = topk_ids.is_cuda and triton is not None
    if use_triton:
        for launch in send_plan_launches(topk_ids, lookup_tables, out, wrong_id, flags=flags, first_token=first_token):
            launch.run()
    else:
        _torch_plan(topk_ids, lookup_tables, out, wrong_id, flags, first_token)


def send_plan_launches(
    topk_ids: torch.Tensor,
    lookup_tables: LookupTables,
    out: SendPlan,
    wrong_id: int,
    *,
    flags: int = 0,
    first_token: int = 0,
) -> list[Launch]:
    """What `send_plan` launches with Triton."""
    num_tokens, top_k = topk_ids.shape
    num_ranks = out.position.shape[1]
    num_experts, max_replicas = lookup_tables.tables.slot.shape
    top_k_block = next_power_of_2(top_k)
    block_t, num_warps = _FEW_TOKENS, _FEW_WARPS
    if num_tokens > _FEW_TOKENS:
        block_t, num_warps = max(_PAIRS // max(top_k_block, 4), _FEW_TOKENS), _MAX_WARPS
    pdl = dependent_launch()
    launch = _launch.launch(
        (max(cdiv(num_tokens, block_t), 1), num_ranks),
        (
            topk_ids, lookup_tables.rank, lookup_tables.slot, lookup_tables.num_replicas if max_replicas > 1 else None,
            out.rank, out.slot, out.position, out.counts,
            num_tokens, first_token, flags, wrong_id, *topk_ids.stride(),
        ),
        (num_ranks, num_experts, top_k, top_k_block, max_replicas, block_t, pdl),
        num_warps=num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


def _torch_plan(
    topk_ids: torch.Tensor, lookup_tables: LookupTables, out: SendPlan, wrong_id: int, flags: int, first_token: int
) -> None:
    size, (num_tokens, num_ranks) = topk_ids.numel(), out.position.shape
    out.counts.fill_(flags)
    if size == 0:
        out.counts[:num_ranks] = 0
        return
    placement_lookup(
        topk_ids,
        lookup_tables,
        out.slot,
        out.counts[num_ranks:],
        wrong_id,
        rank=out.rank,
        first_token=first_token,
        use_triton=False,
    )
    # Dropped pairs all mark one spare column behind the table.
    needed = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.int32, device=topk_ids.device)
    needed.scatter_(1, torch.where(out.rank < 0, num_ranks, out.rank).long(), 1)
    needed = needed[:, :num_ranks]
    out.counts[:num_ranks] = needed.sum(0, dtype=torch.int32)
    out.position.copy_(torch.where(needed > 0, needed.cumsum(0, dtype=torch.int32) - 1, -1))
