"""Dispatch over NVLink in one launch: every token row is written once to each rank that needs it.

Token t of rank s has row s * capacity + t on every rank, so nobody needs to know about others' routing before the rows
travel. With it go the slots of its experts there and its router weights; the slots of a row that is not sent are -1.

Example, 2 ranks with two experts each, capacity 2, top-2, rank 0 of:

    rank 0: ids [[0, 3], [1, 0]]    rank 1: ids [[1, -1]]
    on rank 0: rows [x00, x01, x10, ?]    local_ids [[0, -1], [1, 0], [1, -1], [-1, -1]]    present [1, 1, 1, 0]

Contiguous: with `local_ids` None rows go to the places in an expert-grouped buffer that `contiguous_rows` has found,
the first of a token's on each rank, and nothing else is written; scales of quantized rows stay in the order of rows.

Rows may be quantized on the way to fp8 e4m3 as `quantize_rows` does, with the same bits.

On Hopper the rows of large calls are moved by `hopper_exchange`; what is small is then written by a launch before it,
and a launch after it waits: `launch_write_routing`, `launch_await_dispatch`.

Each program has an equal share of the tokens. It writes what is small for all of them first, then moves rows without
any synchronization between its warps: a warp has the same columns of every row, and while some of its loads are on the
way the wire is busy with others' stores. Then it signals, and waits for the programs of its number on all ranks: when
the launch is over, everything is there. See `peer_memory` for signals and time limits.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from moe_plugin.kernels.dependent_launch import wait_for_the_kernel_before
from moe_plugin.kernels.interpreter import round_to
from moe_plugin.kernels.launcher import Launcher
from moe_plugin.kernels.peer_memory import (
    ALL_DONE,
    MAX_PEERS,
    await_peers,
    errors_of,
    report,
    signal_peers,
    signal_value,
    store_in_place,
)
from moe_plugin.kernels.quantize_rows import dynamic_scale, quotient

_ALL_DONE, _MAX_PEERS = tl.constexpr(ALL_DONE), tl.constexpr(MAX_PEERS)
PHASE_DISPATCH, PHASE_COMBINE, PHASE_ROUTING = 1, 2, 3
"""How records of lost peers name what was waited for."""
EXPERT_ID_ERROR, PEER_LOST_ERROR = tl.constexpr(1), tl.constexpr(8)


@triton.jit
def peer_after(rank, step, num_ranks):
    """The rank `step` after this one: each rank begins with another, so that no link is crowded."""
    peer = rank + step
    return tl.where(peer >= num_ranks, peer - num_ranks, peer)


@triton.jit
def destinations(
    ids_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, token, num_tokens, stride_ids_t, stride_ids_k,
    TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr, MAX_REPLICAS: tl.constexpr,
):  # fmt: skip
    """rank and slot int32 [BLOCK_T, TOP_K_BLOCK] of tokens' experts, -1 where dropped, and whether any id is wrong."""
    k = tl.arange(0, TOP_K_BLOCK)
    given = (token < num_tokens)[:, None] & (k < TOP_K)[None, :]
    at = token.to(tl.int64)[:, None] * stride_ids_t + k[None, :] * stride_ids_k
    expert = tl.load(ids_ptr + at, mask=given, other=-1).to(tl.int64)
    kept = (expert >= 0) & (expert < NUM_EXPERTS)
    entry = expert * MAX_REPLICAS
    if MAX_REPLICAS > 1:
        entry += token[:, None] % tl.load(num_replicas_ptr + expert, mask=kept, other=1)
    rank = tl.load(rank_table_ptr + entry, mask=kept, other=-1)
    slot = tl.load(slot_table_ptr + entry, mask=kept, other=-1)
    wrong = (expert < -1) | (expert >= NUM_EXPERTS)
    return rank, slot, tl.max(tl.max(wrong.to(tl.int32), 1), 0)


@triton.jit
def _write_routing(
    ids_ptr, weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, row_of_token_ptr, rows_used_ptr,
    peer_offsets_ptr, local_ids_ptr, row_weights_ptr, present_ptr, needed_by_ptr,
    first, last, num_tokens, capacity, rank, stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
    TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr, MAX_REPLICAS: tl.constexpr,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots, weights and presence of tokens first to last on all ranks; whether an id was wrong."""
    wrong = 0
    k = tl.arange(0, TOP_K_BLOCK)
    in_top_k = (k < TOP_K)[None, :]
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        in_share = token < last
        is_token = in_share & (token < num_tokens)
        to_rank, slot, is_wrong = destinations(
            ids_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, token, tl.minimum(num_tokens, last),
            stride_ids_t, stride_ids_k, TOP_K, TOP_K_BLOCK, NUM_EXPERTS, MAX_REPLICAS,
        )  # fmt: skip
        wrong = tl.maximum(wrong, is_wrong)
        if weights_ptr is not None:
            at = token.to(tl.int64)[:, None] * stride_weights_t + k[None, :] * stride_weights_k
            weight = tl.load(weights_ptr + at, mask=is_token[:, None] & in_top_k, other=0.0).to(tl.float32)
        needed_by = tl.zeros([BLOCK], tl.int32)
        for step in tl.static_range(NUM_RANKS):
            peer = peer_after(rank, step + 1, NUM_RANKS)
            offset = tl.load(peer_offsets_ptr + peer) * 4
            is_theirs = to_rank == peer
            is_needed = tl.max(is_theirs.to(tl.int32), 1)
            if row_of_token_ptr is None:
                place = token
                has_row = in_share
            else:
                place = tl.load(row_of_token_ptr + token * NUM_RANKS + peer, mask=is_token, other=-1)
                has_row = is_token & (place >= 0)
                is_needed = tl.where(has_row, is_needed, 0)
            row = (rank * capacity + place).to(tl.int64)
            needed_by |= is_needed << peer
            tl.store(present_ptr + offset + row, is_needed, mask=has_row)
            at = offset + row[:, None] * TOP_K + k[None, :]
            mask = has_row[:, None] & in_top_k
            tl.store(local_ids_ptr + at, tl.where(is_theirs, slot, -1), mask=mask)
            if weights_ptr is not None:
                tl.store(row_weights_ptr + at, weight, mask=mask & is_token[:, None])
        tl.store(needed_by_ptr + token, needed_by, mask=is_token)
    return wrong


@triton.jit
def _clear_routing(
    rows_used_ptr, peer_offsets_ptr, local_ids_ptr, present_ptr, source, peer, first, last, capacity,
    TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """On rank `peer`, rows first to last of `source` that hold no token: all, or those past the ones used."""
    k = tl.arange(0, TOP_K_BLOCK)
    offset = tl.load(peer_offsets_ptr + peer) * 4
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        is_unused = place < last
        if rows_used_ptr is not None:
            is_unused &= place >= tl.load(rows_used_ptr + peer)
        row = (source * capacity + place).to(tl.int64)
        tl.store(present_ptr + offset + row, tl.zeros([BLOCK], tl.int32), mask=is_unused)
        tl.store(
            local_ids_ptr + offset + row[:, None] * TOP_K + k[None, :], tl.full([BLOCK, TOP_K_BLOCK], -1, tl.int32),
            mask=is_unused[:, None] & (k < TOP_K)[None, :],
        )  # fmt: skip


@triton.jit
def _quantized(value, dtype: tl.constexpr):
    """A row [groups, columns of a group] in fp8 and its scales [groups], as `quantize_rows` makes them."""
    wide = value.to(tl.float32)
    scale = dynamic_scale(wide, 1)
    return round_to(quotient(wide, scale), dtype), scale


@triton.jit(do_not_specialize=["num_tokens", "capacity", "errors", "rank", "limit_ns"])
@no_type_check
def _dispatch_kernel(
    x_ptr, ids_ptr, weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, row_of_token_ptr, rows_used_ptr,
    peer_offsets_ptr, rows_ptr, scales_ptr, local_ids_ptr, row_weights_ptr, present_ptr, flags_ptr,
    needed_by_ptr, errors_ptr, epochs_ptr, lost_ptr, reports_ptr,
    num_tokens, capacity, errors, rank, limit_ns,
    stride_x_t, stride_x_h, stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k, stride_row, stride_scales,
    stride_flags,
    HIDDEN_SIZE: tl.constexpr, TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    MAX_REPLICAS: tl.constexpr, NUM_RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, ROUTING_BLOCK: tl.constexpr, PHASE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(epochs_ptr) + 1
    lost = tl.load(lost_ptr)
    if program == 0:
        tl.store(epochs_ptr + 1, epoch)
    # Rows are [groups, columns of a group] from the start, so that no thread has to pass its columns on to another.
    columns = (tl.arange(0, BLOCK_H // GROUP) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    in_row = columns < HIDDEN_SIZE
    unit: tl.constexpr = 128 // rows_ptr.dtype.element_ty.primitive_bitwidth
    share = tl.cdiv(capacity, programs)
    first = program * share
    last = tl.minimum(first + share, capacity)
    wrong = 0
    if local_ids_ptr is not None:
        wrong = _write_routing(
            ids_ptr, weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, row_of_token_ptr, rows_used_ptr,
            peer_offsets_ptr, local_ids_ptr, row_weights_ptr, present_ptr, needed_by_ptr,
            first, last, num_tokens, capacity, rank, stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
            TOP_K, TOP_K_BLOCK, NUM_EXPERTS, MAX_REPLICAS, NUM_RANKS, ROUTING_BLOCK,
        )  # fmt: skip
        if row_of_token_ptr is not None:
            for peer in range(NUM_RANKS):
                _clear_routing(
                    rows_used_ptr, peer_offsets_ptr, local_ids_ptr, present_ptr, rank, peer, first, last, capacity,
                    TOP_K, TOP_K_BLOCK, ROUTING_BLOCK,
                )  # fmt: skip
    tl.debug_barrier()
    for start in range(first, tl.minimum(last, num_tokens), ROWS):
        values = ()
        masks = ()
        for i in tl.static_range(ROWS):
            token = start + i
            is_token = (token < last) & (token < num_tokens)
            masks += (tl.load(needed_by_ptr + token, mask=is_token, other=0),)
            at = token.to(tl.int64) * stride_x_t + columns.to(tl.int64) * stride_x_h
            values += (tl.load(x_ptr + at, mask=in_row & is_token, other=0.0),)
        for i in tl.static_range(ROWS):
            token = start + i
            if scales_ptr is None:
                value = values[i]
            else:
                value, scale = _quantized(values[i], rows_ptr.dtype.element_ty)
            for step in tl.static_range(NUM_RANKS):
                peer = peer_after(rank, step + 1, NUM_RANKS)
                if (masks[i] >> peer) & 1 != 0:
                    offset = tl.load(peer_offsets_ptr + peer)
                    place = token
                    if row_of_token_ptr is not None:
                        place = tl.load(row_of_token_ptr + token * NUM_RANKS + peer)
                    row = (rank * capacity + place).to(tl.int64)
                    scale_row = row
                    if local_ids_ptr is None:
                        scale_row = (rank * capacity + token).to(tl.int64)
                        row = place.to(tl.int64)
                    tl.store(rows_ptr + offset * unit + row * stride_row + columns, value, mask=in_row)
                    if scales_ptr is not None:
                        group = tl.arange(0, BLOCK_H // GROUP)[:, None]
                        scale_ptr = scales_ptr + offset * 4 + scale_row * stride_scales + group
                        store_in_place(scale_ptr, scale[:, None], group * GROUP < HIDDEN_SIZE)
    if errors_ptr is not None:
        errors |= tl.load(errors_ptr)
    errors |= tl.where(wrong > 0, EXPERT_ID_ERROR, 0) | tl.where(lost != 0, PEER_LOST_ERROR, 0)
    signal = signal_value(epoch, _ALL_DONE, errors)
    signal_peers(flags_ptr + rank * stride_flags + program, peer_offsets_ptr, signal, NUM_RANKS)
    _await_dispatch(
        peer_offsets_ptr, local_ids_ptr, present_ptr, flags_ptr, lost_ptr, reports_ptr, epoch, lost, program,
        first, last, capacity, rank, limit_ns, stride_flags, TOP_K, TOP_K_BLOCK, NUM_RANKS, ROUTING_BLOCK, PHASE,
    )  # fmt: skip


@triton.jit
def _await_dispatch(
    peer_offsets_ptr, local_ids_ptr, present_ptr, flags_ptr, lost_ptr, reports_ptr, epoch, lost, program,
    first, last, capacity, rank, limit_ns, stride_flags,
    TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Wait for all ranks' programs of this number; rows of those that do not come are nobody's."""
    limit = tl.where(lost != 0, 0, limit_ns)
    seen = await_peers(flags_ptr + program, stride_flags, epoch, _ALL_DONE, NUM_RANKS, limit)
    found, missing = errors_of(seen, epoch, _ALL_DONE)
    report(reports_ptr, lost_ptr, found, missing, limit, epoch, PHASE)
    if local_ids_ptr is not None and missing < _MAX_PEERS:
        # What a lost rank left there is of an earlier call.
        for source in range(NUM_RANKS):
            _clear_routing(
                None, peer_offsets_ptr, local_ids_ptr, present_ptr, source, rank, first, last, capacity,
                TOP_K, TOP_K_BLOCK, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "capacity", "rank"])
def _write_routing_kernel(
    ids_ptr, weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr,
    peer_offsets_ptr, local_ids_ptr, row_weights_ptr, present_ptr, needed_by_ptr, errors_ptr, epochs_ptr,
    num_tokens, capacity, rank, stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
    TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr, MAX_REPLICAS: tl.constexpr,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(PDL)
    if tl.program_id(0) == 0:
        tl.store(epochs_ptr + 1, tl.load(epochs_ptr) + 1)
    first = tl.program_id(0) * BLOCK
    wrong = _write_routing(
        ids_ptr, weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, None, None,
        peer_offsets_ptr, local_ids_ptr, row_weights_ptr, present_ptr, needed_by_ptr,
        first, tl.minimum(first + BLOCK, capacity), num_tokens, capacity, rank,
        stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
        TOP_K, TOP_K_BLOCK, NUM_EXPERTS, MAX_REPLICAS, NUM_RANKS, BLOCK,
    )  # fmt: skip
    if wrong > 0:
        tl.atomic_or(errors_ptr, EXPERT_ID_ERROR)


@triton.jit(do_not_specialize=["capacity", "rank", "limit_ns"])
def _await_dispatch_kernel(
    peer_offsets_ptr, local_ids_ptr, present_ptr, flags_ptr, errors_ptr, epochs_ptr, lost_ptr, reports_ptr,
    capacity, rank, limit_ns, stride_flags,
    TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, PHASE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(PDL)
    program = tl.program_id(0)
    share = tl.cdiv(capacity, tl.num_programs(0))
    first = program * share
    _await_dispatch(
        peer_offsets_ptr, local_ids_ptr, present_ptr, flags_ptr, lost_ptr, reports_ptr, tl.load(epochs_ptr + 1),
        tl.load(lost_ptr), program, first, tl.minimum(first + share, capacity), capacity, rank, limit_ns, stride_flags,
        TOP_K, TOP_K_BLOCK, NUM_RANKS, BLOCK, PHASE,
    )  # fmt: skip
    if program == 0:
        tl.store(errors_ptr, 0)


launch_write_routing = Launcher(_write_routing_kernel)
launch_await_dispatch = Launcher(_await_dispatch_kernel)
launch_dispatch = Launcher(_dispatch_kernel)
