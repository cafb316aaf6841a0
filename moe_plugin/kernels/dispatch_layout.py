"""From expert ids to what DeepEP's dispatch is given: which ranks a token goes to, how many tokens each rank, node and
expert gets, and ids in its own numbering. Checks the ids and brings router weights to fp32 on the way.

DeepEP numbers experts by rank, as many on each: `rank * slots + slot`. The counts of experts travel to all ranks in any
case. So an error is told by a number, `error_count`, that no count reaches, added to that of the first expert of every
rank: all of them hear of it, and no row travels for it.

Example, three tokens, two ranks, expert e in slot e % 2 of rank e // 2, flags = 0, E = error_count(2) = 2 ** 29:

    topk_ids      [[0, 2], [3, 2], [1, 7]]
    ids           [[0, 2], [3, 2], [1, -1]]
    is_in_rank    [[1, 1], [0, 1], [1, 0]]
    rank_counts   [2, 2]
    expert_counts [1 + E, 1, 2 + E, 1]    with the E because of the 7

Source: `get_dispatch_layout` of DeepEP, https://github.com/deepseek-ai/DeepEP, whose results these are. This module
works without Triton.
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

_ONE_PROGRAM_PAIRS, _BLOCK_PAIRS = 2048, 512
"""Pairs that one program takes on its own, and that each takes where there are more."""

if triton is not None:

    @triton.jit(do_not_specialize=["num_tokens", "flags", "wrong_id"])
    def _dispatch_layout_kernel(
        topk_ids_ptr, topk_weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr,
        ids_ptr, weights_ptr, is_in_rank_ptr, counts_ptr, flags_ptr,
        num_tokens, flags, wrong_id, stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
        NUM_RANKS: tl.constexpr, NODE_RANKS: tl.constexpr, SLOTS: tl.constexpr, BINS: tl.constexpr,
        NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, MAX_REPLICAS: tl.constexpr,
        ERROR_COUNT: tl.constexpr, BLOCK_T: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One block of tokens. counts: of ranks, then of nodes where there are several, then of experts."""
        wait_for_the_kernel_before(PDL)
        token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        k = tl.arange(0, TOP_K_BLOCK)
        is_pair = (token < num_tokens)[:, None] & (k < TOP_K)[None, :]
        ids_ptrs = topk_ids_ptr + token[:, None] * stride_ids_t + k[None, :] * stride_ids_k
        given = tl.load(ids_ptrs, mask=is_pair, other=-1).to(tl.int64)
        kept = (given >= 0) & (given < NUM_EXPERTS)
        entry = tl.where(kept, given, 0) * MAX_REPLICAS
        if num_replicas_ptr is not None:
            num_replicas = tl.load(num_replicas_ptr + tl.where(kept, given, 0), mask=kept, other=1)
            entry += token[:, None] % num_replicas
        rank = tl.load(rank_table_ptr + entry, mask=kept, other=-1)
        slot = tl.load(slot_table_ptr + entry, mask=kept, other=0)
        expert = tl.where(kept, rank * SLOTS + slot, -1)
        pair = token[:, None] * TOP_K + k[None, :]
        tl.store(ids_ptr + pair, expert.to(ids_ptr.dtype.element_ty), mask=is_pair)
        if weights_ptr is not None:
            weights_ptrs = topk_weights_ptr + token[:, None] * stride_weights_t + k[None, :] * stride_weights_k
            tl.store(weights_ptr + pair, tl.load(weights_ptrs, mask=is_pair, other=0.0).to(tl.float32), mask=is_pair)

        NUM_NODES: tl.constexpr = NUM_RANKS // NODE_RANKS
        COUNTED_NODES: tl.constexpr = NUM_NODES if NUM_NODES > 1 else 0
        for node in range(NUM_NODES):
            in_node = tl.zeros([BLOCK_T], tl.int32)
            for local in range(NODE_RANKS):
                peer = node * NODE_RANKS + local
                needed = tl.max((rank == peer).to(tl.int32), axis=1)
                in_node |= needed
                tl.store(is_in_rank_ptr + token * NUM_RANKS + peer, needed.to(tl.int8), mask=token < num_tokens)
                if ALONE:
                    tl.store(counts_ptr + peer, tl.sum(needed, axis=0))
                else:
                    tl.atomic_add(counts_ptr + peer, tl.sum(needed, axis=0), sem="relaxed")
            if NUM_NODES > 1:
                if ALONE:
                    tl.store(counts_ptr + NUM_RANKS + node, tl.sum(in_node, axis=0))
                else:
                    tl.atomic_add(counts_ptr + NUM_RANKS + node, tl.sum(in_node, axis=0), sem="relaxed")

        wrong = tl.max(((given < -1) | (given >= NUM_EXPERTS)).to(tl.int32)) * wrong_id
        # The flags of the call are counted by one program.
        wrong = tl.where(tl.program_id(0) == 0, wrong | flags, wrong)
        if wrong != 0:
            tl.store(flags_ptr, wrong)
        bin = tl.arange(0, BINS)
        lanes = tl.reshape(expert, [BLOCK_T * TOP_K_BLOCK])
        counts = tl.histogram(tl.where(lanes >= 0, lanes, 0).to(tl.int32), BINS, mask=lanes >= 0)
        target = counts_ptr + NUM_RANKS + COUNTED_NODES + bin
        tells = (bin % SLOTS == 0) & (bin < NUM_RANKS * SLOTS) & (wrong != 0)
        if ALONE:
            tl.store(target, counts + tl.where(tells, ERROR_COUNT, 0), mask=bin < NUM_RANKS * SLOTS)
        else:
            tl.atomic_add(target, counts, mask=(bin < NUM_RANKS * SLOTS) & (counts > 0), sem="relaxed")
            # A bit that sums do not reach, set once however many programs have something to tell.
            tl.atomic_or(target, tl.full([BINS], ERROR_COUNT, tl.int32), mask=tells, sem="relaxed")

    _launch = Launcher(_dispatch_layout_kernel)


def error_count(num_ranks: int) -> int:
    """What each rank adds to a count to tell of an error: large, and no overflow when all do. A power of two.

    Tokens of all ranks times top-k must be fewer. Example: 4 ranks -> 2 ** 28.
    """
    return 1 << (30 - (num_ranks - 1).bit_length())


@dataclass(frozen=True, slots=True)
class DispatchLayout:
    """What DeepEP's dispatch is given of the routing, besides the router weights.

    ids: int32 or int64 [T, K], rank * slots + slot; -1 where the pair is dropped, as ids out of range are.
    is_in_rank: bool [T, R]. counts: int32, of which `rank_counts` [R], `node_counts` [nodes], None on one node, and
    `expert_counts` [R * slots] are views.
    """

    ids: torch.Tensor
    is_in_rank: torch.Tensor
    counts: torch.Tensor
    rank_counts: torch.Tensor
    node_counts: torch.Tensor | None
    expert_counts: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, is_in_rank: torch.Tensor, counts: torch.Tensor, num_nodes: int) -> DispatchLayout:
        """counts: contiguous, of R + R * slots elements and, with several nodes, as many more as there are."""
        num_ranks = is_in_rank.shape[1]
        experts_at = num_ranks + (num_nodes if num_nodes > 1 else 0)
        node_counts = counts[num_ranks:experts_at] if num_nodes > 1 else None
        return cls(ids, is_in_rank, counts, counts[:num_ranks], node_counts, counts[experts_at:])


def dispatch_layout(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    lookup_tables: LookupTables,
    out: DispatchLayout,
    weights: torch.Tensor | None,
    found: torch.Tensor,
    wrong_id: int,
    *,
    flags: int = 0,
    use_triton: bool | None = None,
) -> None:
    """Fill `out` and, when given, `weights`.

    topk_ids: int [T, K], any strides; replicas are taken in turn by token. topk_weights: float [T, K], any strides,
    to `weights` fp32 [T, K] contiguous; both or none.
    wrong_id: flag of an id outside [-1, E). flags: those that are set from the start. Any flag is written to `found`
    int32 [1], else left alone, and told in the counts.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    """
    if use_triton is None:
        use_triton = topk_ids.is_cuda and triton is not None
    if not use_triton:
        _torch_layout(topk_ids, lookup_tables, out, found, wrong_id, flags)
        if weights is not None and topk_weights is not None:
            weights.copy_(topk_weights)
        return
    if not single_launch(topk_ids):
        out.counts.zero_()
    launches = dispatch_layout_launches(
        topk_ids, topk_weights, lookup_tables, out, weights, found, wrong_id, flags=flags
    )
    for launch in launches:
        launch.run()


def single_launch(topk_ids: torch.Tensor) -> bool:
    """Whether one program does it all, so that nothing has to be zeroed before."""
    return topk_ids.shape[0] * next_power_of_2(topk_ids.shape[1]) <= _ONE_PROGRAM_PAIRS


def dispatch_layout_launches(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    lookup_tables: LookupTables,
    out: DispatchLayout,
    weights: torch.Tensor | None,
    found: torch.Tensor,
    wrong_id: int,
    *,
    flags: int = 0,
) -> list[Launch]:
    """What `dispatch_layout` launches with Triton, on counts that are zero unless one program does it all."""
    num_tokens, top_k = topk_ids.shape
    num_ranks = out.is_in_rank.shape[1]
    num_nodes = 1 if out.node_counts is None else out.node_counts.numel()
    slots = out.expert_counts.numel() // num_ranks
    num_experts, max_replicas = lookup_tables.tables.slot.shape
    top_k_block = next_power_of_2(top_k)
    alone = single_launch(topk_ids)
    # A histogram needs as many lanes as threads.
    block_t = max(next_power_of_2(num_tokens) if alone else _BLOCK_PAIRS // top_k_block, 128 // top_k_block, 1)
    stride_weights_t, stride_weights_k = (0, 0) if topk_weights is None else topk_weights.stride()
    pdl = dependent_launch()
    launch = _launch.launch(
        (max(cdiv(num_tokens, block_t), 1),),
        (
            topk_ids, topk_weights, lookup_tables.rank, lookup_tables.slot,
            lookup_tables.num_replicas if max_replicas > 1 else None,
            out.ids, weights, out.is_in_rank.view(torch.int8), out.counts, found,
            num_tokens, flags, wrong_id, *topk_ids.stride(), stride_weights_t, stride_weights_k,
        ),
        (
            num_ranks, num_ranks // num_nodes, slots, next_power_of_2(num_ranks * slots), num_experts, top_k,
            top_k_block, max_replicas, error_count(num_ranks), block_t, alone, pdl,
        ),
        num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


def _torch_layout(
    topk_ids: torch.Tensor,
    lookup_tables: LookupTables,
    out: DispatchLayout,
    found: torch.Tensor,
    wrong_id: int,
    flags: int,
) -> None:
    num_ranks = out.is_in_rank.shape[1]
    slots = out.expert_counts.numel() // num_ranks
    rank, slot = (torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device) for _ in range(2))
    seen = torch.full_like(found, flags)
    placement_lookup(topk_ids, lookup_tables, slot, seen, wrong_id, rank=rank, use_triton=False)
    out.ids.copy_(torch.where(rank < 0, -1, rank * slots + slot))
    ranks = torch.arange(num_ranks, device=rank.device)
    out.is_in_rank.copy_((rank[:, :, None] == ranks).any(dim=1))
    out.rank_counts.copy_(out.is_in_rank.sum(dim=0))
    if out.node_counts is not None:
        in_node = out.is_in_rank.unflatten(1, (out.node_counts.numel(), -1)).any(dim=2)
        out.node_counts.copy_(in_node.sum(dim=0))
    out.expert_counts.copy_(torch.bincount(out.ids[out.ids >= 0].long(), minlength=num_ranks * slots))
    if seen.item():
        out.expert_counts[::slots] += error_count(num_ranks)
        found.copy_(seen)
