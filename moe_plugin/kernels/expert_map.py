"""Between rows of ids and maps with a column for each expert, as HybridEP takes routing and gives it back.

    expert_map    ids and router weights of this rank's tokens -> what dispatch takes: ids without repetitions or a map
                  of booleans, a row of weights with a column for each expert, rows without experts up to the capacity
    local_pairs   the map and the weights of a received row -> the experts that it asks for, ascending, with weights

Ids are physical: rank * num_slots + slot. Where a rank has more columns than slots, the last ones stay empty.

Example, T = 2 tokens, C = 3, num_slots = 3, 4 columns a rank, 2 ranks:

    ids [[4, 1, 4], [-1, 0, -1]]    weights [[0.5, 2, 1], [9, 3, 9]]

    ids_out  [[5, 1, -1], [-1, 0, -1], [-1, -1, -1]]          weights of an expert named twice add up
    map      [[0, 1, 0, 0, 0, 1, 0, 0], [1, 0, ...], [0, ...]]
    probs    [[0, 2, 0, 0, 0, 1.5, 0, 0], [3, 0, ...], [0, ...]]

    rank 0 gets map [[0, 1, 0, 0], [1, 0, 0, 0]] and probs in columns 0 to 3; K' = 2:
    local_ids [[1, -1], [0, -1]]    weights [[2, 0], [3, 0]]

This module works without Triton.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from moe_plugin.kernels.dependent_launch import dependent_launch
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.tiling import cdiv, next_power_of_2

try:
    import triton
    import triton.language as tl

    from moe_plugin.kernels.dependent_launch import wait_for_the_kernel_before
except ImportError:
    triton = None

_TOKENS, _COLUMNS = 8, 128
"""Of a tile of a map that a program makes."""
_ELEMENTS = 4096
"""Of a map that a program reads at once."""

if triton is not None:

    @triton.jit(do_not_specialize=["num_tokens", "capacity"])
    @no_type_check  # tuples that grow in unrolled loops have no type
    def _expert_map_kernel(
        ids_ptr, weights_ptr, ids_out_ptr, map_ptr, probs_ptr, num_tokens, capacity, num_columns,
        stride_weights_t, stride_weights_k,
        TOP_K: tl.constexpr, NUM_SLOTS: tl.constexpr, RANK_COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
        COLUMNS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        wait_for_the_kernel_before(PDL)
        token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_token = token < num_tokens
        ids = ()
        for k in tl.static_range(TOP_K):
            found = tl.load(ids_ptr + token * TOP_K + k, mask=is_token, other=-1).to(tl.int32)
            if RANK_COLUMNS != NUM_SLOTS:
                found = tl.where(found >= 0, found // NUM_SLOTS * RANK_COLUMNS + found % NUM_SLOTS, -1)
            ids += (found,)
        in_map = (token < capacity)[:, None] & (column < num_columns)[None, :]
        at = token[:, None] * num_columns + column[None, :]
        if probs_ptr is not None:
            probs = tl.zeros([TOKENS, COLUMNS], tl.float32)
            for k in tl.static_range(TOP_K):
                weight_ptr = weights_ptr + token * stride_weights_t + k * stride_weights_k
                weight = tl.load(weight_ptr, mask=ids[k] >= 0, other=0.0).to(tl.float32)
                probs += tl.where(ids[k][:, None] == column[None, :], weight[:, None], 0.0)
            tl.store(probs_ptr + at, probs, mask=in_map)
        if map_ptr is not None:
            named = tl.zeros([TOKENS, COLUMNS], tl.int32)
            for k in tl.static_range(TOP_K):
                named |= (ids[k][:, None] == column[None, :]).to(tl.int32)
            tl.store(map_ptr + at, named.to(tl.uint8), mask=in_map)
        if ids_out_ptr is not None:  # noqa: SIM102 - a constant, known when the kernel is compiled
            if tl.program_id(1) == 0:
                for k in tl.static_range(TOP_K):
                    kept = ids[k]
                    for earlier in tl.static_range(k):
                        kept = tl.where(ids[earlier] == ids[k], -1, kept)
                    tl.store(ids_out_ptr + token * TOP_K + k, kept.to(tl.int16), mask=token < capacity)

    @triton.jit(do_not_specialize=["num_rows"])
    def _local_pairs_kernel(
        map_ptr, probs_ptr, local_ids_ptr, weights_ptr, num_rows, stride_map, stride_probs,
        NUM_SLOTS: tl.constexpr, SLOTS: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        wait_for_the_kernel_before(PDL)
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        slot = tl.arange(0, SLOTS)
        mask = (row < num_rows)[:, None] & (slot < NUM_SLOTS)[None, :]
        wanted = (tl.load(map_ptr + row[:, None] * stride_map + slot[None, :], mask=mask, other=0) != 0).to(tl.int32)
        place = tl.cumsum(wanted, axis=1) - wanted
        kept = (wanted != 0) & (place < TOP_K)
        at = row[:, None] * TOP_K + place
        tl.store(local_ids_ptr + at, tl.broadcast_to(slot[None, :], [ROWS, SLOTS]), mask=kept)
        if probs_ptr is not None:
            weight = tl.load(probs_ptr + row[:, None] * stride_probs + slot[None, :], mask=kept, other=0.0)
            tl.store(weights_ptr + at, weight, mask=kept)
        lane = tl.arange(0, LANES)
        is_rest = (row < num_rows)[:, None] & (lane < TOP_K)[None, :] & (lane[None, :] >= tl.sum(wanted, 1)[:, None])
        at_rest = row[:, None] * TOP_K + lane[None, :]
        tl.store(local_ids_ptr + at_rest, tl.full([ROWS, LANES], -1, tl.int32), mask=is_rest)
        if weights_ptr is not None:
            tl.store(weights_ptr + at_rest, tl.zeros([ROWS, LANES], tl.float32), mask=is_rest)

    _launch_expert_map = Launcher(_expert_map_kernel)
    _launch_local_pairs = Launcher(_local_pairs_kernel)


def expert_map_launches(
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    num_slots: int,
    rank_columns: int,
    *,
    ids_out: torch.Tensor | None = None,
    map_out: torch.Tensor | None = None,
    probs: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches that fill whatever is given of ids_out, map_out and probs.

    ids: int16 [T, K] contiguous, physical with num_slots ids a rank, -1 where dropped. weights: float [T, K], any
    strides, with probs. rank_columns: of a rank, num_slots or more.
    ids_out: int16 [C, K], C >= T, contiguous: ids with rank_columns a rank; an expert's second id in a token is -1.
    map_out: bool [C, R * rank_columns] contiguous. probs: fp32 of that shape.
    """
    (num_tokens, top_k), capacity = ids.shape, _capacity_of(ids_out, map_out, probs)
    of_columns = probs if map_out is None else map_out
    num_columns = 1 if of_columns is None else of_columns.shape[1]
    pdl = dependent_launch()
    launch = _launch_expert_map.launch(
        (cdiv(capacity, _TOKENS), cdiv(num_columns, _COLUMNS)),
        (
            ids, weights, ids_out, None if map_out is None else map_out.view(torch.uint8), probs,
            num_tokens, capacity, num_columns, *((0, 0) if weights is None else weights.stride()),
        ),
        (top_k, num_slots, rank_columns, _TOKENS, _COLUMNS, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


_run_expert_map = running(expert_map_launches)


def expert_map(
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    num_slots: int,
    rank_columns: int,
    *,
    ids_out: torch.Tensor | None = None,
    map_out: torch.Tensor | None = None,
    probs: torch.Tensor | None = None,
    use_triton: bool | None = None,
) -> None:
    """`expert_map_launches`, run; in torch without Triton, or where use_triton is False, as on a CPU by default."""
    if use_triton is None:
        use_triton = ids.is_cuda and triton is not None
    if use_triton:
        _run_expert_map(ids, weights, num_slots, rank_columns, ids_out=ids_out, map_out=map_out, probs=probs)
        return
    (num_tokens, top_k), capacity = ids.shape, _capacity_of(ids_out, map_out, probs)
    columns = torch.full((capacity, top_k), -1, dtype=torch.int64, device=ids.device)
    columns[:num_tokens] = torch.where(ids >= 0, ids.long() // num_slots * rank_columns + ids % num_slots, -1)
    if probs is not None:
        assert weights is not None
        probs.zero_()
        kept = torch.where(ids >= 0, weights.float(), 0)
        probs[:num_tokens].scatter_add_(1, columns[:num_tokens].clamp(min=0), kept)
    if map_out is not None:
        counts = torch.zeros(map_out.shape, dtype=torch.int32, device=ids.device)
        map_out.copy_(counts.scatter_add_(1, columns.clamp(min=0), (columns >= 0).int()) > 0)
    if ids_out is not None:
        is_repeated = (columns[:, :, None] == columns[:, None, :]).tril(-1).any(2)
        ids_out.copy_(torch.where(is_repeated, -1, columns))


def local_pairs_launches(
    routing_map: torch.Tensor, probs: torch.Tensor | None, *, local_ids: torch.Tensor, weights: torch.Tensor | None
) -> list[Launch]:
    """The launches that fill local_ids and weights.

    routing_map: bool [N, S], which of this rank's experts each row asks for, at most K'. probs: fp32 [N, S], its
    weights; both contiguous in S.
    local_ids: int32 [N, K'] contiguous, ascending, then -1. weights: fp32 [N, K'], 0 where there is no expert.
    """
    (num_rows, num_slots), top_k = routing_map.shape, local_ids.shape[1]
    if num_rows == 0:
        return []
    slots = next_power_of_2(num_slots)
    rows = max(min(_ELEMENTS // slots, 32), 1)
    pdl = dependent_launch()
    launch = _launch_local_pairs.launch(
        (cdiv(num_rows, rows),),
        (
            routing_map.view(torch.uint8), probs, local_ids, weights, num_rows,
            routing_map.stride(0), 0 if probs is None else probs.stride(0),
        ),
        (num_slots, slots, top_k, next_power_of_2(top_k), rows, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


_run_local_pairs = running(local_pairs_launches)


def local_pairs(
    routing_map: torch.Tensor,
    probs: torch.Tensor | None,
    *,
    local_ids: torch.Tensor,
    weights: torch.Tensor | None,
    use_triton: bool | None = None,
) -> None:
    """`local_pairs_launches`, run; in torch without Triton, or where use_triton is False, as on a CPU by default."""
    if use_triton is None:
        use_triton = routing_map.is_cuda and triton is not None
    if use_triton:
        _run_local_pairs(routing_map, probs, local_ids=local_ids, weights=weights)
        return
    num_slots, top_k = routing_map.shape[1], local_ids.shape[1]
    slots = torch.arange(num_slots, device=routing_map.device).expand(routing_map.shape)
    first = torch.where(routing_map, slots, num_slots).sort(1).values[:, :top_k]
    local_ids.copy_(torch.where(first < num_slots, first, -1))
    if probs is not None and weights is not None:
        weights.copy_(torch.where(first < num_slots, probs.gather(1, first.clamp(max=num_slots - 1)), 0))


def _capacity_of(*outputs: torch.Tensor | None) -> int:
    return next(tensor.shape[0] for tensor in outputs if tensor is not None)
