"""Looks up where each (token, expert) pair goes, checks the ids, and brings router weights to fp32, in one launch.

Example, E = 3, two replicas of expert 1, first_token = 0:

    rank table [[0, 0], [0, 1], [1, 1]]    slot table [[0, 0], [1, 0], [1, 1]]    num_replicas [1, 2, 1]
    topk_ids [[1, 2], [1, -1], [7, 0]]

    rank [[0, 1], [1, -1], [-1, 0]]    slot [[1, 1], [0, -1], [-1, 0]]    flag set, because of the 7

Token 0 takes replica 0 of expert 1, token 1 takes replica 1.

Where what follows has room for a token once per expert, `merge_duplicates` drops the pairs of a token that name an
expert again, and adds their weights to that of the first: ids [[2, 0, 2]] with weights [[0.5, 1, 0.25]] become
[[2, 0, -1]] and [[0.75, 1, 0]]. This module works without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_plugin.config import PlacementTables
from moe_plugin.kernels.dependent_launch import dependent_launch
from moe_plugin.kernels.launcher import Launch, Launcher, Pointer

try:
    import triton
    import triton.language as tl

    from moe_plugin.kernels.dependent_launch import wait_for_the_kernel_before
except ImportError:
    triton = None

_BLOCK = 512

if triton is not None:

    @triton.jit(do_not_specialize=["num_pairs", "first_token", "flag"])
    def _placement_lookup_kernel(
        topk_ids_ptr, topk_weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr,
        rank_ptr, slot_ptr, weights_ptr, flags_ptr,
        num_pairs, first_token, flag, stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
        NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, MAX_REPLICAS: tl.constexpr, MERGE_DUPLICATES: tl.constexpr,
        BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        wait_for_the_kernel_before(PDL)
        pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        in_range = pair < num_pairs
        token = (pair // TOP_K).to(tl.int64)
        k = (pair % TOP_K).to(tl.int64)
        expert = tl.load(topk_ids_ptr + token * stride_ids_t + k * stride_ids_k, mask=in_range, other=-1).to(tl.int64)
        kept = (expert >= 0) & (expert < NUM_EXPERTS)
        if slot_table_ptr is None:
            slot = tl.where(kept, expert, -1).to(tl.int32)
        else:
            entry = expert * MAX_REPLICAS
            if num_replicas_ptr is not None:
                entry += (first_token + token) % tl.load(num_replicas_ptr + expert, mask=kept, other=1)
            slot = tl.load(slot_table_ptr + entry, mask=kept, other=-1)
            if rank_ptr is not None:
                rank = tl.load(rank_table_ptr + entry, mask=kept, other=-1)
                tl.store(rank_ptr + pair, rank, mask=in_range)
        if MERGE_DUPLICATES:
            weight = tl.zeros((BLOCK,), tl.float32)
            is_first = kept
            for other in tl.static_range(TOP_K):
                other_ptr = topk_ids_ptr + token * stride_ids_t + other * stride_ids_k
                same = in_range & (tl.load(other_ptr, mask=in_range, other=-1).to(tl.int64) == expert)
                other_weight_ptr = topk_weights_ptr + token * stride_weights_t + other * stride_weights_k
                weight += tl.load(other_weight_ptr, mask=same, other=0.0).to(tl.float32)
                is_first = is_first & ((other >= k) | (same == 0))
            slot = tl.where(is_first, slot, -1)
            tl.store(weights_ptr + pair, tl.where(is_first, weight, 0.0), mask=in_range)
        tl.store(slot_ptr + pair, slot, mask=in_range)
        if weights_ptr is not None and not MERGE_DUPLICATES:
            weight_ptr = topk_weights_ptr + token * stride_weights_t + k * stride_weights_k
            weight = tl.load(weight_ptr, mask=in_range, other=0.0)
            tl.store(weights_ptr + pair, weight.to(tl.float32), mask=in_range)
        # A store, not an atomic: all programs write the same value, and flags_ptr may lie in the host's memory.
        wrong = tl.max(((expert < -1) | (expert >= NUM_EXPERTS)).to(tl.int32), 0)
        if wrong > 0:
            tl.store(flags_ptr, flag)

    _launch = Launcher(_placement_lookup_kernel)


@dataclass(frozen=True, slots=True)
class LookupTables:
    """A placement on a device, ready for launches.

    tables: rank and slot int32 [E, max_replicas], num_replicas int32 [E].
    is_identity: one rank holds every expert in its own slot.
    """

    tables: PlacementTables
    is_identity: bool
    rank: Pointer
    slot: Pointer
    num_replicas: Pointer

    @classmethod
    def of(cls, tables: PlacementTables) -> LookupTables:
        num_experts = tables.slot.shape[0]
        linear = torch.arange(num_experts, dtype=torch.int32).unsqueeze(1)
        is_identity = torch.equal(tables.slot.cpu(), linear) and not tables.rank.any().item()
        pointers = (Pointer(tensor) for tensor in (tables.rank, tables.slot, tables.num_replicas))
        return cls(tables, is_identity, *pointers)


def uses_triton(device: torch.device) -> bool:
    """What `placement_lookup` does on `device` unless told."""
    return device.type == "cuda" and triton is not None


def placement_lookup(
    topk_ids: torch.Tensor,
    lookup_tables: LookupTables,
    slot: torch.Tensor,
    flags: torch.Tensor,
    flag: int,
    *,
    rank: torch.Tensor | None = None,
    first_token: int = 0,
    topk_weights: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    merge_duplicates: bool = False,
    use_triton: bool | None = None,
) -> None:
    """Fill `slot` and, when given, `rank` and `weights`; write `flag` to `flags` when an id lies outside [-1, E).

    topk_ids int [T, K] of tokens first_token, first_token + 1, ..., any strides; replicas are taken in turn by token.
    slot, rank int32 [T, K] contiguous: -1 where the pair is dropped, as ids out of range are. slot may be int64.
    flags int32 [1], else left alone: on the device or, with Triton, in the host's pinned memory.
    topk_weights float [T, K], any strides, to `weights` fp32 [T, K] contiguous; both or none.
    merge_duplicates: see this module's docstring; needs weights, and leaves `rank` as it is without.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    """
    if topk_ids.shape[0] == 0:
        return
    if use_triton is None:
        use_triton = topk_ids.is_cuda and triton is not None
    if not use_triton:
        _torch_lookup(topk_ids, lookup_tables.tables, slot, flags, flag, rank, first_token)
        if weights is not None and topk_weights is not None:
            weights.copy_(topk_weights)
            if merge_duplicates:
                _torch_merge(topk_ids, slot, weights)
        return
    launch = placement_lookup_launch(
        topk_ids,
        lookup_tables,
        slot,
        flags,
        flag,
        rank=rank,
        first_token=first_token,
        topk_weights=topk_weights,
        weights=weights,
        merge_duplicates=merge_duplicates,
    )
    launch.run()


def placement_lookup_launch(
    topk_ids: torch.Tensor,
    lookup_tables: LookupTables,
    slot: torch.Tensor,
    flags: torch.Tensor,
    flag: int,
    *,
    rank: torch.Tensor | None = None,
    first_token: int = 0,
    topk_weights: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    merge_duplicates: bool = False,
) -> Launch:
    """What `placement_lookup` launches with Triton for at least one token."""
    num_tokens, top_k = topk_ids.shape
    num_experts, max_replicas = lookup_tables.tables.slot.shape
    num_pairs = num_tokens * top_k
    stride_weights_t, stride_weights_k = (0, 0) if topk_weights is None else topk_weights.stride()
    pdl = dependent_launch()
    return _launch.launch(
        (-(-num_pairs // _BLOCK),),
        (
            topk_ids, topk_weights, None if rank is None else lookup_tables.rank,
            None if rank is None and lookup_tables.is_identity else lookup_tables.slot,
            lookup_tables.num_replicas if max_replicas > 1 else None,
            rank, slot, weights, flags,
            num_pairs, first_token, flag, *topk_ids.stride(), stride_weights_t, stride_weights_k,
        ),
        (num_experts, top_k, max_replicas, merge_duplicates, _BLOCK, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip


def _torch_lookup(
    topk_ids: torch.Tensor,
    tables: PlacementTables,
    slot: torch.Tensor,
    flags: torch.Tensor,
    flag: int,
    rank: torch.Tensor | None,
    first_token: int,
) -> None:
    num_experts, max_replicas = tables.slot.shape
    ids = topk_ids.long()
    kept = (ids >= 0) & (ids < num_experts)
    expert = ids.clamp(0, num_experts - 1)
    if max_replicas > 1:
        token = torch.arange(first_token, first_token + ids.shape[0], device=ids.device).unsqueeze(1)
        replica = token % tables.num_replicas[expert]
    else:
        replica = torch.zeros_like(expert)
    slot.copy_(torch.where(kept, tables.slot[expert, replica], -1))
    if rank is not None:
        rank.copy_(torch.where(kept, tables.rank[expert, replica], -1))
    outside = ((ids < -1) | (ids >= num_experts)).any().to(torch.int32)
    flags.bitwise_or_(outside * flag)


def _torch_merge(topk_ids: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor) -> None:
    """Drop in `slot` and `weights` [T, K] what names an expert of its token again, and add its weight to the first."""
    same = topk_ids[:, :, None] == topk_ids[:, None, :]
    again = same.tril(-1).any(dim=2)
    total = torch.where(same, weights[:, None, :], 0.0).sum(dim=2)
    slot.masked_fill_(again, -1)
    weights.copy_(torch.where(again | (slot < 0), 0.0, total))
