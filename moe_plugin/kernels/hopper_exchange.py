"""Rows between ranks on Hopper, by TMA: few SMs keep the wire busy, since nothing of a row passes through registers.

What `nvlink_dispatch` and `nvlink_combine` do with loads and stores, for rows that are whole lines of 128 bytes, and
with the same tables, signals and results:

    send_rows       each row of x once to every rank that needs it: a ring of rows in shared memory, filled by TMA
                    loads and emptied by TMA stores into the peers' buffers
    send_quantized  the same, quantized to fp8 on the way: registers fill the ring
    combine         one warp of each program sends rows as above, the others sum what has come

A row is a box of lines, [1, lines, 128 bytes], so that one TMA operation moves all of it. `send_rows` and
`send_quantized` only write and signal: what is small goes before them, and who waits for the signals comes after them
(`launch_write_routing` and `launch_await_dispatch` of `nvlink_dispatch`, or the launches of `contiguous_rows`).

Example, 2 ranks, capacity 2, rank 0: needed_by [0b11, 0b10] (token 0 goes to both ranks, token 1 to rank 1)

    row 0 of x -> place 0 on rank 1, place 0 on rank 0;  row 1 of x -> place 1 on rank 1

Source of the ordering: PTX ISA, "Async proxy" (a bulk operation that was waited for is visible to the thread that
issued it, whose release then covers it).
"""

from __future__ import annotations

from typing import no_type_check

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_plugin.kernels.launcher import Descriptor, Launcher, descriptor_at
from moe_plugin.kernels.peer_memory import (
    ALL_DONE,
    ERROR_BITS,
    MAX_PEERS,
    POLL_ACQUIRE,
    PROGRESS_BITS,
    STORE_RELEASE,
)
from moe_plugin.kernels.tiling import next_power_of_2
from moe_plugin.quantization import FP8_MAX, LEAST_AMAX

LINE_BYTES = 128
MAX_RANKS = 8
"""Each has a descriptor among the arguments of a launch."""
LAG = 8
"""Groups of stores that may still read the ring when it is filled again. There is one at least for every row."""
LEAST_LINES, MAX_LINES = 8, 256
"""Lines of a row: a box of fewer is less than one period of the swizzle, of more it is not for TMA."""

# Of the threads of a program or partition; renamed in Triton 3.7.
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

_ALL_DONE, _LANES = gl.constexpr(ALL_DONE), gl.constexpr(MAX_PEERS)
_PROGRESS_BITS, _ERROR_BITS = gl.constexpr(PROGRESS_BITS), gl.constexpr(ERROR_BITS)
_POLL_ACQUIRE, _STORE_RELEASE = gl.constexpr(POLL_ACQUIRE), gl.constexpr(STORE_RELEASE)
_LAG = gl.constexpr(LAG)
_PEER_LOST = gl.constexpr(8)
# In a partition of one warp, whose threads have numbers past 31.
_LANES_STORE_RELEASE = gl.constexpr(STORE_RELEASE.replace("%tid.x", "%laneid"))
_FP8_MAX, _LEAST_AMAX = gl.constexpr(FP8_MAX), gl.constexpr(LEAST_AMAX)
_WAIT_FOR_STORES = gl.constexpr("""
{
    cp.async.bulk.wait_group 0;
    mov.u32 $0, 0;
}
""")
_END_GROUP = gl.constexpr("""
{
    cp.async.bulk.commit_group;
    mov.u32 $0, 0;
}
""")
_TOLD_LATER = gl.constexpr(8)
"""Rows after the end of a chunk when it is told of: by then its stores are through without a wait for later ones."""
_WAIT_FOR_OLDER_STORES = gl.constexpr("""
{
    cp.async.bulk.wait_group 8;
    mov.u32 $0, 0;
}
""")


@gluon.jit
def _signal(
    flag_ptr, peer_offsets_ptr, epoch, progress, errors,
    NUM_RANKS: gl.constexpr, WAIT: gl.constexpr, STORE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`peer_memory.signal_peers`, after the bulk stores that WAIT waits for."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    peer = gl.arange(0, _LANES, layout=LAYOUT)
    gl.inline_asm_elementwise(WAIT, "=r,r", [peer], dtype=gl.int32, is_pure=False, pack=1)
    _barrier()
    is_peer = peer < NUM_RANKS
    flags = flag_ptr + gl.load(peer_offsets_ptr + peer, mask=is_peer, other=0) * 2
    value = (((epoch << _PROGRESS_BITS) + progress) << _ERROR_BITS) | errors
    values = gl.zeros([_LANES], gl.int64, layout=LAYOUT) + value
    gl.inline_asm_elementwise(
        STORE, "=r,l,l,r", [flags.to(gl.int64), values, is_peer.to(gl.int32)], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _or(a, b):
    return a | b


@gluon.jit
def _await(
    flags_ptr, stride_peer, epoch, progress, limit_ns, reports_ptr, lost_ptr,
    NUM_RANKS: gl.constexpr, PHASE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`peer_memory.await_peers`, `errors_of` and `report`; the limit for the next wait."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    peer = gl.arange(0, _LANES, layout=LAYOUT)
    is_peer = peer < NUM_RANKS
    target = (epoch << _PROGRESS_BITS) + progress
    flags = flags_ptr + gl.where(is_peer, peer, 0) * stride_peer
    wanted = gl.where(is_peer, target, -1)
    limits = gl.zeros([_LANES], gl.int64, layout=LAYOUT) + limit_ns
    seen = gl.inline_asm_elementwise(
        _POLL_ACQUIRE, "=l,l,l,l", [flags.to(gl.int64), wanted, limits], dtype=gl.int64, is_pure=False, pack=1
    )
    _barrier()
    is_missing = is_peer & ((seen >> _ERROR_BITS) < target)
    missing = gl.min(gl.where(is_missing, peer, _LANES), 0)
    bits = gl.where(is_peer & (is_missing == 0), seen & ((1 << _ERROR_BITS) - 1), 0).to(gl.int32)
    errors = gl.reduce(bits, 0, _or)
    for bit in gl.static_range(4):
        if (errors >> bit) & 1 != 0:
            gl.store(reports_ptr + bit, 1 << bit)
    if (missing < _LANES) & (limit_ns > 0):
        record = (epoch << 16) | (PHASE << 8) | (missing + 1)
        gl.store((reports_ptr + 6).cast(gl.pointer_type(gl.int64)), record)
        gl.store(lost_ptr, 1)
        limit_ns = limit_ns * 0
    return limit_ns


@gluon.jit
def _peer_after(rank, step, NUM_RANKS: gl.constexpr):
    peer = rank + step
    return gl.where(peer >= NUM_RANKS, peer - NUM_RANKS, peer)


@gluon.jit
def _load(x_desc, row, ready, ring, stage, pred):
    bar = ready.index(stage)
    mbarrier.expect(bar, x_desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(x_desc, [row, 0, 0], bar, ring.index(stage), pred=pred)


@gluon.jit
def _store_if(desc, is_needed, row, buffer):
    if is_needed != 0:
        tma.async_copy_shared_to_global(desc, [row, 0, 0], buffer)


@gluon.jit
def _store_for(desc, step: gl.constexpr, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS: gl.constexpr):
    peer = _peer_after(rank, step, NUM_RANKS)
    if (needed_by >> peer) & 1 != 0:
        if place_ptr is not None:
            row = gl.load(place_ptr + token * NUM_RANKS + peer)
        tma.async_copy_shared_to_global(desc, [row, 0, 0], buffer)


@gluon.jit
def _multicast(
    desc1, desc2, desc3, desc4, desc5, desc6, desc7, desc8, needed_by, place_ptr, token, rank, row, buffer,
    NUM_RANKS: gl.constexpr,
):  # fmt: skip
    """Store a row of the ring on all ranks whose bits are set; descK belongs to the K-th rank after this one.

    To the same row everywhere, or where place_ptr, int32 [tokens, NUM_RANKS], has one for each.
    """
    _store_for(desc1, 1, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS)
    if NUM_RANKS > 1:
        _store_for(desc2, 2, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS)
    if NUM_RANKS > 2:
        _store_for(desc3, 3, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS)
    if NUM_RANKS > 3:
        _store_for(desc4, 4, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS)
    if NUM_RANKS > 4:
        _store_for(desc5, 5, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS)
    if NUM_RANKS > 5:
        _store_for(desc6, 6, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS)
    if NUM_RANKS > 6:
        _store_for(desc7, 7, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS)
    if NUM_RANKS > 7:
        _store_for(desc8, 8, needed_by, place_ptr, token, rank, row, buffer, NUM_RANKS)


@gluon.jit
def _tell_of_chunk(
    told, tokens, chunk, is_last, flag_ptr, peer_offsets_ptr, epoch, errors,
    NUM_RANKS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Signal a chunk some rows after its end, when its stores are through without a wait for later ones."""
    if (tokens == (told + 1) * chunk + _TOLD_LATER) & (is_last == 0):
        told += 1
        _signal(
            flag_ptr, peer_offsets_ptr, epoch, told, errors,
            NUM_RANKS, _WAIT_FOR_OLDER_STORES, _STORE_RELEASE, num_warps,
        )  # fmt: skip
    return told


@gluon.jit(do_not_specialize=["num_tokens", "capacity", "errors", "rank"])
def _send_rows_kernel(
    x_desc, desc1, desc2, desc3, desc4, desc5, desc6, desc7, desc8,
    needed_by_ptr, place_ptr, peer_offsets_ptr, flags_ptr, errors_ptr, epochs_ptr, lost_ptr,
    num_tokens, capacity, errors, rank, stride_flags,
    NUM_RANKS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program, programs = gl.program_id(0), gl.num_programs(0)
    epoch = gl.load(epochs_ptr) + 1
    share = (capacity + programs - 1) // programs
    first = program * share
    last = gl.minimum(first + share, num_tokens)
    chunk = (share + CHUNKS - 1) // CHUNKS
    flag_ptr = flags_ptr + rank * stride_flags + program
    told = 0
    errors |= gl.load(errors_ptr)
    if gl.load(lost_ptr) != 0:
        errors |= _PEER_LOST
    for stage in gl.static_range(STAGES - _LAG):
        _load(x_desc, first + stage, ready, ring, stage, first + stage < last)
    needed_by = gl.load(needed_by_ptr + first, mask=first < last, other=0)
    stage = 0
    phase = 0
    refill = STAGES - _LAG
    for token in range(first, last):
        next_needed = gl.load(needed_by_ptr + token + 1, mask=token + 1 < last, other=0)
        mbarrier.wait(ready.index(stage), phase)
        buffer = ring.index(stage)
        row = rank * capacity + token
        _multicast(
            desc1, desc2, desc3, desc4, desc5, desc6, desc7, desc8, needed_by, place_ptr, token, rank, row, buffer,
            NUM_RANKS,
        )  # fmt: skip
        if needed_by == 0:
            _end_group(num_warps)
        tma.store_wait(_LAG)
        _load(x_desc, token + STAGES - _LAG, ready, ring, refill, token + STAGES - _LAG < last)
        told = _tell_of_chunk(
            told, token + 1 - first, chunk, token + 1 == last, flag_ptr, peer_offsets_ptr, epoch, errors,
            NUM_RANKS, num_warps,
        )  # fmt: skip
        needed_by = next_needed
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        refill += 1
        if refill == STAGES:
            refill = 0
    _signal(
        flag_ptr, peer_offsets_ptr, epoch, _ALL_DONE, errors, NUM_RANKS, _WAIT_FOR_STORES, _STORE_RELEASE, num_warps
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tokens", "capacity", "errors", "rank"])
@no_type_check
def _send_quantized_kernel(
    x_ptr, desc1, desc2, desc3, desc4, desc5, desc6, desc7, desc8, scales_ptr,
    needed_by_ptr, place_ptr, peer_offsets_ptr, flags_ptr, errors_ptr, epochs_ptr, lost_ptr,
    num_tokens, capacity, errors, rank, stride_x, stride_scales, stride_flags,
    HIDDEN_SIZE: gl.constexpr, GROUP: gl.constexpr, NUM_RANKS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    LINES: gl.constexpr = desc1.block_type.shape[1]
    # A line of fp8 is a group of 128 columns; half a warp has one.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    ring = gl.allocate_shared_memory(desc1.dtype, [STAGES] + desc1.block_type.shape, desc1.layout)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program, programs = gl.program_id(0), gl.num_programs(0)
    epoch = gl.load(epochs_ptr) + 1
    share = (capacity + programs - 1) // programs
    first = program * share
    last = gl.minimum(first + share, num_tokens)
    chunk = (share + CHUNKS - 1) // CHUNKS
    flag_ptr = flags_ptr + rank * stride_flags + program
    told = 0
    errors |= gl.load(errors_ptr)
    if gl.load(lost_ptr) != 0:
        errors |= _PEER_LOST
    line = gl.arange(0, LINES, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))
    at = line[:, None] * 128 + column[None, :]
    in_row = at < HIDDEN_SIZE
    # Neighbouring scales by neighbouring threads: single ones would each be a packet.
    SCALES: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    group = gl.arange(0, LINES, layout=SCALES)
    value = gl.load(x_ptr + first.to(gl.int64) * stride_x + at, mask=in_row & (first < last), other=0.0)
    needed_by = gl.load(needed_by_ptr + first, mask=first < last, other=0)
    stage = 0
    for token in range(first, last):
        # The next row is on its way while this one is quantized and sent.
        later = token + 1
        next_needed = gl.load(needed_by_ptr + later, mask=later < last, other=0)
        next_value = gl.load(x_ptr + later.to(gl.int64) * stride_x + at, mask=in_row & (later < last), other=0.0)
        quantized, scale = _quantized(value, GROUP, desc1.dtype)
        if GROUP == 128:
            scale = gl.convert_layout(scale, SCALES)
        row = rank * capacity + token
        for step in gl.static_range(1, NUM_RANKS + 1):
            peer = _peer_after(rank, step, NUM_RANKS)
            if (needed_by >> peer) & 1 != 0:
                to_ptr = scales_ptr + gl.load(peer_offsets_ptr + peer) * 4 + row.to(gl.int64) * stride_scales
                if GROUP == 128:
                    gl.store(to_ptr + group, scale, mask=group * 128 < HIDDEN_SIZE)
                else:
                    gl.store(to_ptr, scale)
        buffer = ring.index(stage)
        tma.store_wait(_LAG)
        # One thread issues the stores and waits for them, all may write.
        _barrier()
        buffer.store(quantized.reshape([1, LINES, 128]))
        fence_async_shared()
        _barrier()
        _multicast(
            desc1, desc2, desc3, desc4, desc5, desc6, desc7, desc8, needed_by, place_ptr, token, rank, row, buffer,
            NUM_RANKS,
        )  # fmt: skip
        if needed_by == 0:
            _end_group(num_warps)
        told = _tell_of_chunk(
            told, token + 1 - first, chunk, token + 1 == last, flag_ptr, peer_offsets_ptr, epoch, errors,
            NUM_RANKS, num_warps,
        )  # fmt: skip
        value, needed_by = next_value, next_needed
        stage += 1
        if stage == STAGES:
            stage = 0
    _signal(
        flag_ptr, peer_offsets_ptr, epoch, _ALL_DONE, errors, NUM_RANKS, _WAIT_FOR_STORES, _STORE_RELEASE, num_warps
    )  # fmt: skip


@gluon.jit
def _send_results(
    y_desc, desc1, desc2, desc3, desc4, desc5, desc6, desc7, ring, ready,
    present_ptr, peer_offsets_ptr, flags_ptr, epochs_ptr, lost_ptr, capacity, rank, stride_flags,
    NUM_RANKS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: rows of tokens of other ranks back to them, a token of each in turn."""
    STEPS: gl.constexpr = NUM_RANKS - 1
    AHEAD: gl.constexpr = STAGES - _LAG
    program, programs = gl.program_id(0), gl.num_programs(0)
    epoch = gl.load(epochs_ptr + 1)
    errors = gl.where(gl.load(lost_ptr) != 0, _PEER_LOST, 0)
    flag_ptr = flags_ptr + rank * stride_flags + program
    share = (capacity + programs - 1) // programs
    first = program * share
    units = gl.maximum(gl.minimum(first + share, capacity) - first, 0) * STEPS
    chunk = (share + CHUNKS - 1) // CHUNKS * STEPS
    for stage in gl.static_range(AHEAD):
        source, is_there = _unit(stage, units, first, capacity, rank, present_ptr, STEPS)
        if is_there != 0:
            _load(y_desc, source, ready, ring, stage, True)
    next_source, next_there = _unit(AHEAD, units, first, capacity, rank, present_ptr, STEPS)
    stage = 0
    refill = AHEAD
    phases = 0
    told = 0
    for unit in range(units):
        load_source, load_there = next_source, next_there
        next_source, next_there = _unit(unit + AHEAD + 1, units, first, capacity, rank, present_ptr, STEPS)
        _source, is_there = _unit(unit, units, first, capacity, rank, present_ptr, STEPS)
        if is_there != 0:
            mbarrier.wait(ready.index(stage), (phases >> stage) & 1)
            phases ^= 1 << stage
            step = 1 + unit % STEPS
            row = rank * capacity + first + unit // STEPS
            buffer = ring.index(stage)
            _store_if(desc1, step == 1, row, buffer)
            if STEPS > 1:
                _store_if(desc2, step == 2, row, buffer)
            if STEPS > 2:
                _store_if(desc3, step == 3, row, buffer)
            if STEPS > 3:
                _store_if(desc4, step == 4, row, buffer)
            if STEPS > 4:
                _store_if(desc5, step == 5, row, buffer)
            if STEPS > 5:
                _store_if(desc6, step == 6, row, buffer)
            if STEPS > 6:
                _store_if(desc7, step == 7, row, buffer)
        else:
            _end_group(1)
        tma.store_wait(_LAG)
        if load_there != 0:
            _load(y_desc, load_source, ready, ring, refill, True)
        if (unit + 1 - _TOLD_LATER == (told + 1) * chunk) & (unit + 1 < units):
            told += 1
            _signal(
                flag_ptr, peer_offsets_ptr, epoch, told, errors,
                NUM_RANKS, _WAIT_FOR_OLDER_STORES, _LANES_STORE_RELEASE, 1,
            )  # fmt: skip
        stage += 1
        if stage == STAGES:
            stage = 0
        refill += 1
        if refill == STAGES:
            refill = 0
    _signal(
        flag_ptr, peer_offsets_ptr, epoch, _ALL_DONE, errors,
        NUM_RANKS, _WAIT_FOR_STORES, _LANES_STORE_RELEASE, 1,
    )  # fmt: skip


@gluon.jit
def _unit(unit, units, first, capacity, rank, present_ptr, STEPS: gl.constexpr):
    """Row of the unit-th result to send, and whether it is there: a token of each of the other ranks in turn."""
    row = _peer_after(rank, 1 + unit % STEPS, STEPS + 1) * capacity + first + unit // STEPS
    return row, gl.load(present_ptr + row, mask=unit < units, other=0)


@gluon.jit
@no_type_check
def _sum_results(
    y_ptr, returned_ptr, out_ptr, needed_by_ptr, flags_ptr, epochs_ptr, lost_ptr, reports_ptr,
    num_tokens, capacity, rank, limit_ns, stride_y, stride_returned, stride_out, stride_flags,
    HIDDEN_SIZE: gl.constexpr, BLOCK_H: gl.constexpr, NUM_RANKS: gl.constexpr, CHUNKS: gl.constexpr,
    PHASE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The other warps: what has come, summed in fp32 over ranks in ascending order."""
    WIDTH: gl.constexpr = 128 // y_ptr.dtype.element_ty.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.BlockedLayout([WIDTH], [32], [num_warps], [0])
    program, programs = gl.program_id(0), gl.num_programs(0)
    epoch = gl.load(epochs_ptr + 1)
    if program == 0:
        gl.store(epochs_ptr, epoch)
    share = (capacity + programs - 1) // programs
    chunk = (share + CHUNKS - 1) // CHUNKS
    first = program * share
    last = gl.minimum(first + share, num_tokens)
    limit = gl.where(gl.load(lost_ptr) != 0, 0, limit_ns)
    column = gl.arange(0, BLOCK_H, layout=LAYOUT)
    in_row = column < HIDDEN_SIZE
    next_needed = gl.load(needed_by_ptr + first, mask=first < last, other=0)
    done = 0
    for token in range(first, last):
        if (token - first) % chunk == 0:
            done += 1
            limit = _await(
                flags_ptr + program, stride_flags, epoch, done, limit, reports_ptr, lost_ptr,
                NUM_RANKS, PHASE, num_warps,
            )  # fmt: skip
        needed_by = next_needed
        next_needed = gl.load(needed_by_ptr + token + 1, mask=token + 1 < last, other=0)
        own_row = (rank * capacity + token).to(gl.int64) * stride_y
        is_own = ((needed_by >> rank) & 1) > 0
        own = gl.load(y_ptr + own_row + column, mask=in_row & is_own, other=0.0)
        values = ()
        for peer in gl.static_range(NUM_RANKS):
            came = (((needed_by >> peer) & 1) > 0) & (rank != peer)
            row = (peer * capacity + token).to(gl.int64) * stride_returned
            values += (gl.load(returned_ptr + row + column, mask=in_row & came, other=0.0),)
        total = gl.zeros([BLOCK_H], gl.float32, layout=LAYOUT)
        for peer in gl.static_range(NUM_RANKS):
            total += gl.where(rank == peer, own, values[peer]).to(gl.float32)
        to_ptr = out_ptr + token.to(gl.int64) * stride_out + column
        gl.store(to_ptr, total.to(out_ptr.dtype.element_ty), mask=in_row)
    _await(
        flags_ptr + program, stride_flags, epoch, _ALL_DONE, limit, reports_ptr, lost_ptr, NUM_RANKS, PHASE, num_warps
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tokens", "capacity", "rank", "limit_ns"])
def _combine_kernel(
    y_desc, desc1, desc2, desc3, desc4, desc5, desc6, desc7,
    y_ptr, returned_ptr, out_ptr, present_ptr, needed_by_ptr,
    peer_offsets_ptr, flags_ptr, epochs_ptr, lost_ptr, reports_ptr,
    num_tokens, capacity, rank, limit_ns, stride_y, stride_returned, stride_out, stride_flags,
    HIDDEN_SIZE: gl.constexpr, BLOCK_H: gl.constexpr, NUM_RANKS: gl.constexpr, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr, PHASE: gl.constexpr, num_warps: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    ring = gl.allocate_shared_memory(y_desc.dtype, [STAGES] + y_desc.block_type.shape, y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_sum_results, (
                y_ptr, returned_ptr, out_ptr, needed_by_ptr, flags_ptr, epochs_ptr, lost_ptr, reports_ptr,
                num_tokens, capacity, rank, limit_ns, stride_y, stride_returned, stride_out, stride_flags,
                HIDDEN_SIZE, BLOCK_H, NUM_RANKS, CHUNKS, PHASE, num_warps,
            )),
            (_send_results, (
                y_desc, desc1, desc2, desc3, desc4, desc5, desc6, desc7, ring, ready,
                present_ptr, peer_offsets_ptr, flags_ptr, epochs_ptr, lost_ptr, capacity, rank, stride_flags,
                NUM_RANKS, CHUNKS, STAGES,
            )),
        ],
        [1],
        [64],
    )  # fmt: skip


@gluon.jit
def _end_group(num_warps: gl.constexpr):
    """A group of stores for every row, also for one without any, so that as many groups are as many rows at least."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    gl.inline_asm_elementwise(_END_GROUP, "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _quantized(value, GROUP: gl.constexpr, dtype: gl.constexpr):
    """`quantize_rows.dynamic_scale` and `quotient`, of [lines, 128]: a scale per line, or one for all."""
    wide = value.to(gl.float32)
    bits = gl.max(gl.abs(wide).to(gl.int32, bitcast=True), 1)
    if GROUP != 128:
        bits = gl.max(bits, 0)
    amax = bits.to(gl.float32, bitcast=True)
    amax = gl.where(amax < _LEAST_AMAX, _LEAST_AMAX, amax)
    scale = gl.div_rn(amax, _FP8_MAX)
    reciprocal = gl.div_rn(1.0, scale)
    if GROUP == 128:
        reciprocal = reciprocal[:, None]
        opposite = -scale[:, None]
    else:
        opposite = -scale
    opposite = opposite + gl.zeros_like(wide)
    reciprocal = reciprocal + gl.zeros_like(wide)
    quotient = wide * reciprocal
    quotient = gl.fma(gl.fma(quotient, opposite, wide), reciprocal, quotient)
    quotient = gl.fma(gl.fma(quotient, opposite, wide), reciprocal, quotient)
    # Conversion saturates, and keeps NaN.
    return quotient.to(dtype), scale


launch_send_rows = Launcher(_send_rows_kernel)
launch_send_quantized = Launcher(_send_quantized_kernel)
launch_combine = Launcher(_combine_kernel)


def row_descriptor(address: int, dtype: torch.dtype, rows: int, hidden_size: int, stride: int) -> Descriptor:
    """Of rows at `address`, as [rows, lines, columns of a line], in boxes of one row."""
    columns = LINE_BYTES // dtype.itemsize
    lines = hidden_size // columns
    layout = gl.NVMMASharedLayout(swizzle_byte_width=LINE_BYTES, element_bitwidth=8 * dtype.itemsize, rank=3)
    return descriptor_at(
        address, dtype, (rows, lines, columns), (stride, columns, 1), (1, next_power_of_2(lines), columns), layout
    )
