"""Combine over NVLink in one launch: one row per (token, rank) goes back, and the token's rank sums them in fp32.

Half of the programs write rows to where their tokens came from, the other half sum what has come. Program p of the
first half has the p-th share of each rank's tokens, program p of the second half the same share of this rank's: it
waits for the programs p of all ranks, a chunk after the other, while later chunks are on the wire. Ranks are summed in
ascending order, whatever comes first, so a result repeats bitwise.

Example, 2 ranks, capacity 2; rank 0 holds its experts' rows of tokens (source rank, token), each already summed over
the experts there:

    rank 0: y [y(0,0), y(0,1), y(1,0), -]    sends y(1,0) to rank 1
    rank 1: y [y(0,0), -, y(1,0), -]         sends y(0,0) to rank 0
    rank 0: out [y(0,0) of rank 0 + y(0,0) of rank 1, y(0,1) of rank 0]

See `peer_memory` for signals and time limits.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from moe_plugin.kernels.dependent_launch import wait_for_the_kernel_before
from moe_plugin.kernels.interpreter import round_to
from moe_plugin.kernels.launcher import Launcher
from moe_plugin.kernels.nvlink_dispatch import PEER_LOST_ERROR, peer_after
from moe_plugin.kernels.peer_memory import (
    ALL_DONE,
    MAX_PEERS,
    await_peers,
    errors_of,
    report,
    signal_peers,
    signal_value,
)

_ALL_DONE, _MAX_PEERS = tl.constexpr(ALL_DONE), tl.constexpr(MAX_PEERS)


@triton.jit(do_not_specialize=["num_tokens", "capacity", "rank", "limit_ns"])
@no_type_check
def _combine_kernel(
    y_ptr, present_ptr, needed_by_ptr, out_ptr,
    peer_offsets_ptr, returned_ptr, flags_ptr, epochs_ptr, lost_ptr, reports_ptr,
    num_tokens, capacity, rank, limit_ns, stride_y, stride_returned, stride_out, stride_flags,
    HIDDEN_SIZE: tl.constexpr, NUM_RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
    CHUNKS: tl.constexpr, TO_SELF: tl.constexpr, PHASE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(PDL)
    senders = tl.num_programs(0) // 2
    epoch = tl.load(epochs_ptr + 1)
    lost = tl.load(lost_ptr)
    columns = tl.arange(0, BLOCK_H)
    in_row = columns < HIDDEN_SIZE
    unit: tl.constexpr = 128 // returned_ptr.dtype.element_ty.primitive_bitwidth
    steps: tl.constexpr = NUM_RANKS if TO_SELF else NUM_RANKS - 1
    share = tl.cdiv(capacity, senders)
    chunk = tl.cdiv(tl.cdiv(share, CHUNKS), ROWS) * ROWS
    is_sender = tl.program_id(0) < senders
    program = tl.where(is_sender, tl.program_id(0), tl.program_id(0) - senders)
    first = program * share
    last = tl.minimum(first + share, capacity)
    if is_sender:
        errors = tl.where(lost != 0, PEER_LOST_ERROR, 0)
        my_flag_ptr = flags_ptr + rank * stride_flags + program
        done = 0
        for start in range(first, last, ROWS):
            # Nobody waits for what a chunk without rows would bring.
            if (start > first) & ((start - first) % chunk == 0):
                done += 1
                signal = signal_value(epoch, tl.zeros([], tl.int64) + done, errors)
                signal_peers(my_flag_ptr, peer_offsets_ptr, signal, NUM_RANKS)
            for step in tl.static_range(steps):
                peer = peer_after(rank, step + 1, NUM_RANKS)
                offset = tl.load(peer_offsets_ptr + peer)
                values = ()
                are_there = ()
                for i in tl.static_range(ROWS):
                    token = start + i
                    row = (peer * capacity + token).to(tl.int64)
                    is_there = tl.load(present_ptr + row, mask=token < last, other=0) > 0
                    are_there += (is_there,)
                    values += (tl.load(y_ptr + row * stride_y + columns, mask=in_row & is_there, other=0.0),)
                for i in tl.static_range(ROWS):
                    row = (rank * capacity + start + i).to(tl.int64)
                    to_ptr = returned_ptr + offset * unit + row * stride_returned + columns
                    tl.store(to_ptr, values[i], mask=in_row & are_there[i])
        signal_peers(my_flag_ptr, peer_offsets_ptr, signal_value(epoch, _ALL_DONE, errors), NUM_RANKS)
    else:
        if program == 0:
            tl.store(epochs_ptr, epoch)
        limit = tl.where(lost != 0, 0, limit_ns)
        last = tl.minimum(last, num_tokens)
        done = 0
        for start in range(first, last, ROWS):
            if (start - first) % chunk == 0:
                done += 1
                progress = tl.zeros([], tl.int64) + done
                seen = await_peers(flags_ptr + program, stride_flags, epoch, progress, NUM_RANKS, limit)
                found, missing = errors_of(seen, epoch, progress)
                report(reports_ptr, lost_ptr, found, missing, limit, epoch, PHASE)
                limit = tl.where(missing < _MAX_PEERS, 0, limit)
            for i in tl.static_range(ROWS):
                token = start + i
                is_token = token < last
                needed_by = tl.load(needed_by_ptr + token, mask=is_token, other=0)
                row = (rank * capacity + token).to(tl.int64)
                is_own = ((needed_by >> rank) & 1) > 0
                own = tl.load(y_ptr + row * stride_y + columns, mask=in_row & is_own, other=0.0)
                values = ()
                for peer in tl.static_range(NUM_RANKS):
                    came = (((needed_by >> peer) & 1) > 0) & (rank != peer)
                    row = (peer * capacity + token).to(tl.int64)
                    from_ptr = returned_ptr + row * stride_returned + columns
                    values += (tl.load(from_ptr, mask=in_row & came, other=0.0),)
                total = tl.zeros([BLOCK_H], tl.float32)
                for peer in tl.static_range(NUM_RANKS):
                    total += tl.where(rank == peer, own, values[peer]).to(tl.float32)
                to_ptr = out_ptr + token.to(tl.int64) * stride_out + columns
                tl.store(to_ptr, round_to(total, out_ptr.dtype.element_ty), mask=in_row & is_token)
        # Also of who has no tokens: the others' rows of an earlier call must not be waited for in a later one.
        seen = await_peers(flags_ptr + program, stride_flags, epoch, _ALL_DONE, NUM_RANKS, limit)
        found, missing = errors_of(seen, epoch, _ALL_DONE)
        report(reports_ptr, lost_ptr, found, missing, limit, epoch, PHASE)


launch_combine = Launcher(_combine_kernel)
