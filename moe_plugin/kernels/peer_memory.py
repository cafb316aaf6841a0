"""Device functions for kernels that write into the memory of other ranks: addresses, signals, bounded waits.

A buffer of one shape lies on every rank; a rank reaches rank r's at its own address plus `peer_offsets[r]`, counted in
units of 16 bytes. Data is written by ordinary stores, and what says that it is there is a signal: one int64 word,

    (epoch << 24 | progress) << 8 | error bits

stored after all of it with release order at system scope, and awaited with acquire order. A word only ever grows, so
that what an earlier call left is never taken for a later one's. Example, epoch 3, progress 1 of 2, no error:

    written (3 << 24 | 1) << 8;  a wait for (3, 1) or (2, 9) ends, one for (3, 2) or (4, 0) goes on

A wait ends at the latest after a time limit on the device's clock; what it returns then is below what was waited for.

Source of the ordering: PTX ISA, "Memory Consistency Model" (release and acquire patterns are cumulative, and a barrier
of the program extends them to its other threads). In Triton's interpreter, where ranks are processes that share memory
on one machine, the same functions use ordinary loads and stores, and count rounds instead of nanoseconds.
"""

import triton
import triton.language as tl

from moe_plugin.kernels.interpreter import INTERPRETED

MAX_PEERS = 32
"""Ranks that one wait or signal covers: a lane of a warp each."""
PROGRESS_BITS, ERROR_BITS = 24, 8
ALL_DONE = (1 << PROGRESS_BITS) - 1
"""Progress of a program that has nothing more to write."""

_LANES = tl.constexpr(MAX_PEERS)
_PROGRESS_BITS, _ERROR_BITS = tl.constexpr(PROGRESS_BITS), tl.constexpr(ERROR_BITS)
_ALL_DONE = tl.constexpr(ALL_DONE)
_ERROR_MASK = tl.constexpr((1 << ERROR_BITS) - 1)
_INTERPRETED_ROUND_NS = tl.constexpr(1_000_000)
"""What a round of waiting counts in the interpreter: about what it takes."""

STORE_RELEASE = """
{
    .reg .pred  %writes, %in_range;
    .reg .u32   %thread;
    mov.u32     %thread, %tid.x;
    setp.lt.u32 %writes, %thread, 32;
    setp.ne.and.s32 %in_range, $3, 0, %writes;
    @%in_range st.release.sys.global.s64 [$1], $2;
    mov.u32     $0, 0;
}
"""
"""By the first warp: $2 to $1 where $3 is set, after all that the program's threads wrote before a barrier."""

POLL_ACQUIRE = """
{
    .reg .pred  %again;
    .reg .u64   %now, %end;
    .reg .s64   %seen;
    mov.u64     %now, %globaltimer;
    add.u64     %end, %now, $3;
POLL:
    ld.acquire.sys.global.s64 $0, [$1];
    shr.s64     %seen, $0, 8;
    setp.ge.s64 %again, %seen, $2;
    @%again bra DONE;
    mov.u64     %now, %globaltimer;
    setp.lt.u64 %again, %now, %end;
    @%again bra POLL;
DONE:
}
"""
"""What is at $1 once its part above the error bits has come to $2, or what is there after $3 nanoseconds."""

_STORE_RELEASE, _POLL_ACQUIRE = tl.constexpr(STORE_RELEASE), tl.constexpr(POLL_ACQUIRE)


_STORE_FLOAT = tl.constexpr("""
{
    .reg .pred  %is_set;
    setp.ne.s32 %is_set, $3, 0;
    @%is_set st.global.f32 [$1], $2;
    mov.u32     $0, 0;
}
""")


@triton.jit
def store_in_place(ptr, value, mask):
    """Store fp32 from the threads that have it: Triton would hand it to neighbours first, with barriers in between."""
    if INTERPRETED:
        tl.store(ptr, value, mask=mask)
    else:
        tl.inline_asm_elementwise(
            _STORE_FLOAT,
            "=r,l,f,r",
            [ptr.to(tl.int64), value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def signal_value(epoch, progress, errors):
    """The word of a signal."""
    return (((epoch << _PROGRESS_BITS) + progress) << _ERROR_BITS) | errors


@triton.jit
def signal_peers(flag_ptr, peer_offsets_ptr, value, num_peers):
    """Store `value` at flag_ptr's place on ranks 0 to num_peers - 1, after everything this program has written.

    flag_ptr: int64, this program's word in this rank's own buffer, 16-byte units apart from the peers' as all of it.
    """
    tl.debug_barrier()
    peer = tl.arange(0, _LANES)
    is_peer = peer < num_peers
    offset = tl.load(peer_offsets_ptr + peer, mask=is_peer, other=0)
    flags = flag_ptr + offset * 2
    values = value + tl.zeros([_LANES], tl.int64)
    if INTERPRETED:
        tl.store(flags, values, mask=is_peer)
    else:
        tl.inline_asm_elementwise(
            _STORE_RELEASE, "=r,l,l,r", [flags, values, is_peer.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def await_words(words_ptrs, is_awaited, target, limit_ns):
    """Wait until int64 words at words_ptrs come to `target` above their error bits, or for limit_ns; what was seen.

    words_ptrs, is_awaited: blocks of one shape; where a word is not awaited its pointer is still read. What their
    writers wrote before these words may be read after it by all threads of the program.
    """
    if INTERPRETED:
        rounds = limit_ns // _INTERPRETED_ROUND_NS
        seen = tl.load(words_ptrs, volatile=True)
        missing = tl.sum((is_awaited & ((seen >> _ERROR_BITS) < target)).to(tl.int32), 0)
        while (missing > 0) & (rounds > 0):
            seen = tl.load(words_ptrs, volatile=True)
            missing = tl.sum((is_awaited & ((seen >> _ERROR_BITS) < target)).to(tl.int32), 0)
            rounds -= 1
    else:
        wanted = tl.where(is_awaited, target, -1).to(tl.int64)
        limits = limit_ns + tl.zeros(wanted.shape, tl.int64)
        seen = tl.inline_asm_elementwise(
            _POLL_ACQUIRE, "=l,l,l,l", [words_ptrs, wanted, limits], dtype=tl.int64, is_pure=False, pack=1
        )
        tl.debug_barrier()
    return seen


@triton.jit
def await_peers(flags_ptr, stride_peer, epoch, progress, num_peers, limit_ns):
    """Wait until the words at flags_ptr + r * stride_peer of ranks 0 to num_peers - 1 have come to (epoch, progress).

    Returns int64 [MAX_PEERS], what was seen: of ranks that did not come within the limit something lower, for lanes
    past num_peers the word that was waited for, without errors. Everything that the ranks wrote before they signalled
    may be read after it.
    """
    peer = tl.arange(0, _LANES)
    is_peer = peer < num_peers
    target = (epoch << _PROGRESS_BITS) + progress
    flags = flags_ptr + tl.where(is_peer, peer, 0).to(tl.int64) * stride_peer
    seen = await_words(flags, is_peer, target, limit_ns)
    return tl.where(is_peer, seen, target << _ERROR_BITS)


@triton.jit
def await_programs(flags_ptr, stride_peer, epoch, num_programs, num_peers, limit_ns, FLAGS: tl.constexpr):
    """Wait until programs 0 to num_programs - 1 of ranks 0 to num_peers - 1 are done with `epoch`. The first rank that
    has one that is not done within the limit, MAX_PEERS where none has (int32).

    Program p of rank r signals at flags_ptr + r * stride_peer + p. FLAGS: a power of 2, num_peers * stride_peer or
    more; with as many as the program has threads, each flag is polled by one thread.
    """
    flag = tl.arange(0, FLAGS)
    peer = flag // stride_peer
    is_awaited = (peer < num_peers) & (flag % stride_peer < num_programs)
    target = (epoch << _PROGRESS_BITS) + _ALL_DONE
    seen = await_words(flags_ptr + tl.where(is_awaited, flag, 0), is_awaited, target, limit_ns)
    return tl.min(tl.where(is_awaited & ((seen >> _ERROR_BITS) < target), peer, _LANES), 0)


@triton.jit
def errors_of(seen, epoch, progress):
    """What `await_peers` has seen, for the epoch waited for: the or of all ranks' error bits, and the first rank that
    is missing, MAX_PEERS where none is. Both int32."""
    target = (epoch << _PROGRESS_BITS) + progress
    peer = tl.arange(0, _LANES)
    first = tl.min(tl.where((seen >> _ERROR_BITS) < target, peer, _LANES), 0)
    # Bits of a rank that did not come are of an earlier call.
    bits = tl.where((seen >> _ERROR_BITS) < target, 0, seen & _ERROR_MASK).to(tl.int32)
    return tl.reduce(bits, 0, _or), first


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def report(reports_ptr, lost_ptr, errors, missing, limit_ns, epoch, PHASE: tl.constexpr):
    """Leave what `errors_of` has found where the host will look: see `DeferredErrors.kernel_words`.

    reports_ptr: int32 [8], words 0 to 3 for the error bits, 6 and 7 for who was missing where and when, as an int64.
    lost_ptr: int32 [1]; set, it keeps later kernels from waiting again for who is lost.
    limit_ns: of the wait; without one it says nothing of who is lost, only that not all were there yet.
    """
    for bit in tl.static_range(4):
        if (errors >> bit) & 1 != 0:
            tl.store(reports_ptr + bit, 1 << bit)
    if (missing < _LANES) & (limit_ns > 0):
        record = (epoch << 16) | (PHASE << 8) | (missing + 1)
        tl.store((reports_ptr + 6).to(tl.pointer_type(tl.int64)), record)
        tl.store(lost_ptr, 1)
