"""Received rows in expert-grouped order: where each pair's row lies, and its copies for a token's further experts.

    token_places     from the dense scan: the place of every pair on this rank, and of this rank's tokens on all ranks
    duplicate_rows   a token arrives once per rank, at the first of its places there; copied to the others while more
                     rows are on the wire. Scales of quantized rows go from row order to group order

Example, 2 ranks with two experts each, segments 128 apart, rank 0 of:

    gathered ids  rank 0: [[0, 1], [3, 0]]    rank 1: [[1, -1], [-1, -1]]
    places on rank 0   [[0, 128], [-1, 1], [129, -1], [-1, -1]]        present [1, 1, 1, 0]
    first_place of rank 0's tokens on ranks 0 and 1   [[0, -1], [1, p]], p their place on rank 1; needed_by [1, 3]

    arrived: row 0 and row 1 of expert 0's segment, row 129; duplicated: row 0 to row 128
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from moe_plugin.kernels.dependent_launch import dependent_launch, wait_for_the_kernel_before
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.peer_memory import ALL_DONE, MAX_PEERS, await_peers, errors_of, report
from moe_plugin.kernels.tiling import cdiv, next_power_of_2

_ALL_DONE, _MAX_PEERS = tl.constexpr(ALL_DONE), tl.constexpr(MAX_PEERS)
_NOWHERE = tl.constexpr(2**31 - 1)
_BLOCK = 128
_ROWS, _SCALE_ROWS = 4, 16
"""Tokens whose rows, or scales, a program has on the way at a time."""


@triton.jit(do_not_specialize=["num_tokens", "capacity", "rank"])
def _token_places_kernel(
    ids_ptr, positions_ptr, segment_starts_ptr, places_ptr, present_ptr, first_place_ptr, needed_by_ptr,
    epochs_ptr, num_tokens, capacity, rank,
    TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_SLOTS: tl.constexpr, NUM_RANKS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(PDL)
    if tl.program_id(0) == 0:
        tl.store(epochs_ptr + 1, tl.load(epochs_ptr) + 1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    k = tl.arange(0, TOP_K_BLOCK)
    mask = is_token[:, None] & (k < TOP_K)[None, :]
    at = token[:, None].to(tl.int64) * TOP_K + k[None, :]
    expert = tl.load(ids_ptr + at, mask=mask, other=-1).to(tl.int32)
    to_rank = tl.where(expert >= 0, expert // NUM_SLOTS, -1)
    own_first = rank * capacity
    is_own = (token >= own_first) & (token < own_first + capacity)
    # The scan says nothing of pairs that are neither from here nor for here.
    is_known = (expert >= 0) & (is_own[:, None] | (to_rank == rank))
    place = tl.load(segment_starts_ptr + expert, mask=is_known, other=0)
    place += tl.load(positions_ptr + at, mask=is_known, other=0)
    is_mine = to_rank == rank
    tl.store(places_ptr + at, tl.where(is_mine, place, -1), mask=mask)
    tl.store(present_ptr + token, tl.max(is_mine.to(tl.int32), 1), mask=is_token)
    needed_by = tl.zeros([BLOCK], tl.int32)
    for peer in tl.static_range(NUM_RANKS):
        first = tl.min(tl.where(to_rank == peer, place, _NOWHERE), 1)
        is_needed = first < _NOWHERE
        needed_by |= is_needed.to(tl.int32) << peer
        first = tl.where(is_needed, first, -1)
        tl.store(first_place_ptr + (token - own_first) * NUM_RANKS + peer, first, mask=is_own & is_token)
    tl.store(needed_by_ptr + token - own_first, needed_by, mask=is_own & is_token)


@triton.jit
@no_type_check  # tuples that grow in unrolled loops have no type
def _copy_rows(
    rows_ptr, places_ptr, start, last, stride_row, columns, in_row, TOP_K: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """From the first place of each of ROWS tokens to its others; all loads before the first store."""
    places = ()
    arrived = ()
    values = ()
    for i in tl.static_range(ROWS):
        for k in tl.static_range(TOP_K):
            places += (tl.load(places_ptr + (start + i).to(tl.int64) * TOP_K + k, mask=start + i < last, other=-1),)
    for i in tl.static_range(ROWS):
        first = _NOWHERE
        count = 0
        for k in tl.static_range(TOP_K):
            place = places[i * TOP_K + k]
            first = tl.where(place >= 0, tl.minimum(first, place), first)
            count += (place >= 0).to(tl.int32)
        arrived += (first,)
        row_ptr = rows_ptr + first.to(tl.int64) * stride_row + columns
        values += (tl.load(row_ptr, mask=in_row & (count > 1), other=0.0),)
    for i in tl.static_range(ROWS):
        for k in tl.static_range(TOP_K):
            place = places[i * TOP_K + k]
            if (place >= 0) & (place != arrived[i]):
                tl.store(rows_ptr + place.to(tl.int64) * stride_row + columns, values[i], mask=in_row)


@triton.jit
def _spread_scales(
    row_scales_ptr, scales_ptr, places_ptr, start, last, stride_row_scales, stride_scales,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scales of ROWS tokens to all of their places."""
    token = start + tl.arange(0, ROWS)
    group = tl.arange(0, BLOCK_G)
    mask = (token < last)[:, None] & (group < GROUPS)[None, :]
    at = token.to(tl.int64)[:, None] * stride_row_scales + group[None, :]
    scale = tl.load(row_scales_ptr + at, mask=mask, other=0.0)
    for k in tl.static_range(TOP_K):
        place = tl.load(places_ptr + token.to(tl.int64) * TOP_K + k, mask=token < last, other=-1)
        to_ptr = scales_ptr + group.to(tl.int64)[None, :] * stride_scales + place[:, None]
        tl.store(to_ptr, scale, mask=mask & (place >= 0)[:, None])


@triton.jit(do_not_specialize=["capacity", "limit_ns"])
def _duplicate_rows_kernel(
    rows_ptr, row_scales_ptr, scales_ptr, places_ptr, flags_ptr, errors_ptr, epochs_ptr, lost_ptr, reports_ptr,
    capacity, limit_ns, stride_row, stride_row_scales, stride_scales, stride_flags,
    HIDDEN_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
    TOP_K: tl.constexpr, NUM_RANKS: tl.constexpr, SENDERS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr, PHASE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Not after the kernel before: beside it. Signals say what has come, and tables are of the kernel before that one.
    program, programs = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(epochs_ptr + 1)
    lost = tl.load(lost_ptr)
    limit = tl.where(lost != 0, 0, limit_ns)
    columns = tl.arange(0, BLOCK_H)
    in_row = columns < HIDDEN_SIZE
    share = tl.cdiv(capacity, SENDERS)
    chunk = tl.cdiv(share, CHUNKS)
    for number in range(CHUNKS):
        for sender in range(program, SENDERS, programs):
            first = sender * share + number * chunk
            last = tl.minimum(tl.minimum(first + chunk, sender * share + share), capacity)
            if first < last:
                progress = tl.zeros([], tl.int64) + number + 1
                seen = await_peers(flags_ptr + sender, stride_flags, epoch, progress, NUM_RANKS, limit)
                found, missing = errors_of(seen, epoch, progress)
                report(reports_ptr, lost_ptr, found, missing, limit, epoch, PHASE)
                limit = tl.where(missing < _MAX_PEERS, 0, limit)
                for source in range(NUM_RANKS):
                    for start in range(first, last, ROWS):
                        _copy_rows(
                            rows_ptr, places_ptr, source * capacity + start, source * capacity + last,
                            stride_row, columns, in_row, TOP_K, ROWS,
                        )  # fmt: skip
                    if scales_ptr is not None:
                        for start in range(first, last, SCALE_ROWS):
                            _spread_scales(
                                row_scales_ptr, scales_ptr, places_ptr, source * capacity + start,
                                source * capacity + last, stride_row_scales, stride_scales,
                                TOP_K, GROUPS, BLOCK_G, SCALE_ROWS,
                            )  # fmt: skip
    for sender in range(program, SENDERS, programs):
        seen = await_peers(flags_ptr + sender, stride_flags, epoch, _ALL_DONE, NUM_RANKS, limit)
        found, missing = errors_of(seen, epoch, _ALL_DONE)
        report(reports_ptr, lost_ptr, found, missing, limit, epoch, PHASE)
        limit = tl.where(missing < _MAX_PEERS, 0, limit)
    wait_for_the_kernel_before(PDL)
    if program == 0:
        tl.store(errors_ptr, 0)


_launch_token_places = Launcher(_token_places_kernel)
_launch_duplicate_rows = Launcher(_duplicate_rows_kernel)


def token_places_launches(
    gathered_ids: torch.Tensor,
    positions: torch.Tensor,
    segment_starts: torch.Tensor,
    rank: int,
    *,
    places: torch.Tensor,
    present: torch.Tensor,
    first_place: torch.Tensor,
    needed_by: torch.Tensor,
    epochs: torch.Tensor,
) -> list[Launch]:
    """Fill `places`, `present`, `first_place` and `needed_by`, and begin the epoch of the dispatch.

    gathered_ids int16 [R, C, K] contiguous, positions int32 [R * C, K] and segment_starts int32 [R, S]: of the dense
    scan. places int32 [R * C, K]: of pairs on this rank, -1 elsewhere. present int32 [R * C]: whether a token has any.
    first_place int32 [C, R]: the least place of this rank's token on each rank, -1 for none. needed_by int32 [C]: a bit
    for each rank that has one. epochs int64 [2]: of the set of buffers that the dispatch goes to.
    """
    num_ranks, capacity, top_k = gathered_ids.shape
    pdl = dependent_launch()
    launch = _launch_token_places.launch(
        (cdiv(num_ranks * capacity, _BLOCK),),
        (
            gathered_ids, positions, segment_starts, places, present, first_place, needed_by, epochs,
            num_ranks * capacity, capacity, rank,
        ),
        (top_k, next_power_of_2(top_k), segment_starts.shape[1], num_ranks, _BLOCK, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


token_places = running(token_places_launches)


def duplicate_rows_launches(
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    scales: torch.Tensor | None,
    places: torch.Tensor,
    flags: torch.Tensor,
    errors: torch.Tensor,
    epochs: torch.Tensor,
    lost: torch.Tensor,
    reports: torch.Tensor,
    *,
    capacity: int,
    hidden_size: int,
    senders: int,
    chunks: int,
    programs: int,
    limit_ns: int,
    phase: int,
) -> list[Launch]:
    """Wait for what the `senders` programs of all ranks write, and copy it on; the signals are those of a dispatch.

    rows [slots, >= H]; row_scales fp32 [R * C, groups] to scales fp32 [slots, groups], stored group by group, or None
    for both. places int32 [R * C, K] of `token_places`. The rest: see `nvlink_transport`.
    """
    num_ranks, top_k = flags.shape[0], places.shape[1]
    groups = 0 if scales is None else scales.shape[1]
    pdl = dependent_launch()
    block_h = next_power_of_2(hidden_size)
    launch = _launch_duplicate_rows.launch(
        (min(programs, senders),),
        (
            rows, row_scales, scales, places, flags, errors, epochs, lost, reports, capacity, limit_ns,
            rows.stride(0), 0 if row_scales is None else row_scales.stride(0),
            0 if scales is None else scales.stride(1), flags.stride(0),
        ),
        (
            hidden_size, block_h, groups, next_power_of_2(max(groups, 1)), top_k, num_ranks, senders, chunks, _ROWS,
            _SCALE_ROWS, phase, pdl,
        ),
        num_warps=max(min(block_h * rows.dtype.itemsize // 512, 16), 4),
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


duplicate_rows = running(duplicate_rows_launches)
