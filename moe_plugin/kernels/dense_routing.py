"""Where every token goes, computed on every rank from the gathered ids of all ranks, in one launch.

Dense means that a token is its K ids, 2 * K bytes to gather, rather than a bool per expert. An id is physical: rank *
num_slots + slot of the expert that the pair goes to, -1 where it is dropped. Tokens are counted in global order, rank
by rank. Example, rank 0 of R = 2 ranks, C = 2 tokens each, K = 2, num_slots = 2, alignment = 4:

    ids               [[[0, 3], [1, 0]], [[1, -1], [3, 1]]]    rank 0 holds experts 0 and 1, rank 1 has 2 and 3
    rows_per_rank     [4, 2]                                   tokens that need each rank
    send_rows         [[0, 0], [1, -1]]                        token 1 needs rank 0 alone; it is the second to do so
    received_rows     [0, 1, 2, 3]                             the same for all tokens, on this rank
    expert_counts     [[2, 3], [0, 2]]                         tokens that name each expert
    positions         [[0, 0], [0, 1], [1, ?], [?, 2]]         earlier tokens that name the pair's expert
    segment_starts    [[0, 4], [0, 0]]                         of experts in their rank's grouped buffer
    group_ends        [2, 7]                                   where this rank's segments end

    places            [[0, -1], [4, 1], [5, -1], [-1, 6]]      segment start + position, on this rank
    send_places       [[0, 0], [4, 1]]                         the same for this rank's tokens, on the expert's rank

A token that names an expert twice counts once, and both pairs have one place. With `rows_per_expert`, segments start at
slot * rows_per_expert (the masked layout) instead of after the ones before.

The kernel: a program owns one or a few experts and walks over all ids, which the L2 holds, in large blocks. Where none
of its positions is wanted (others' tokens to others' experts) it only counts, each thread on its own; elsewhere a
prefix sum of the block adds up. Small counters share an integer. A program per rank does the same for rows. Segment
starts need all counts: the last program to finish computes them. The order of programs changes nothing in the results.
No host sync, nothing but shapes decides sizes: capturable in a CUDA graph. With a `RoutingGather`, the launch gathers
the ids as well: its first programs write this rank's to all ranks, and the others wait for everyone's.

A map bool [R * C, R * num_slots] with a column per expert, the sparse form, says the same as ids; `sparse_routing`
takes one, and is what the kernel is checked against.

Source of the idea: DeepEP's hybrid-ep branch, dense top-k routing (https://github.com/deepseek-ai/DeepEP/pull/673).
This module works without Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import torch

from moe_plugin.errors import ConfigError, DtypeError, ShapeError
from moe_plugin.kernels.dependent_launch import dependent_launch
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.routing_gather import MAX_WRITERS, RoutingGather, num_writers, writer_tiles
from moe_plugin.kernels.tiling import cdiv, next_power_of_2

try:
    import triton
    import triton.language as tl

    from moe_plugin.kernels.dependent_launch import wait_for_the_kernel_before
    from moe_plugin.kernels.interpreter import INTERPRETED
    from moe_plugin.kernels.routing_gather import await_rows, gather_share
except ImportError:
    triton = None

IDS_END = 32767
"""Physical experts that int16 ids can name, with -1 for none."""

_SLOTS_END = 1 << 31
_FP16_IDS_END = 0x7C00
"""Up to here, as bits of fp16, ids are finite numbers in the same order."""
_SHORT_FIELD, _LONG_FIELD = 16, 32
_PROGRAMS = 132
"""As many as a large GPU runs at once, one to a multiprocessor: each reads all ids, so more would only wait."""
_BLOCK_WORDS, _LEAST_BLOCK = 8192, 128
"""Words of ids, and tokens, in a block."""
_MAX_WARPS = 8
_MAX_PARTS = 4

if triton is not None:

    @triton.jit
    def _load_words(
        ids_ptr, first, num_tokens, STRIDE: tl.constexpr, TOP_K: tl.constexpr, IDS: tl.constexpr, LANES: tl.constexpr,
        BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    ):  # fmt: skip
        """int32 [BLOCK, LANES]: the ids of tokens from `first` on, IDS (1 or 2) in a word, -1 where there is none.

        WHOLE: num_tokens is a multiple of BLOCK; past them, the last block is loaded once more.
        """
        if WHOLE:
            first = tl.minimum(first, num_tokens - BLOCK)
        tokens, lanes = tl.arange(0, BLOCK), tl.arange(0, LANES)
        ids_ptr += tl.cast(first, tl.int64) * STRIDE
        if IDS == 2:
            ids_ptr = ids_ptr.to(tl.pointer_type(tl.int32))
        ptrs = ids_ptr + tokens[:, None] * (STRIDE // IDS) + lanes[None, :]
        if LANES * IDS != TOP_K:
            words = tl.load(
                ptrs, mask=(tokens < num_tokens - first)[:, None] & (lanes * IDS < TOP_K)[None, :], other=-1
            )
        elif WHOLE:
            words = tl.load(ptrs)
        else:
            words = tl.load(ptrs, mask=(tokens < num_tokens - first)[:, None], other=-1)
        return words if IDS == 2 else words.to(tl.int32) | -0x10000

    @triton.jit
    def _matches(words, first_id, end_id, FP16: tl.constexpr):
        """Which ids are in [first_id, end_id), or are first_id where end_id is None: uint32, 16 bits set for each.

        FP16: compare two ids at once, as finite fp16 numbers; -1 is a NaN there, which is in no range.
        """
        if FP16 and not INTERPRETED:
            first_ids = first_id | (first_id << 16)
            if end_id is None:
                return tl.inline_asm_elementwise(
                    "set.eq.u32.f16x2 $0, $1, $2;",
                    "=r,r,r", [words, first_ids], dtype=tl.uint32, is_pure=True, pack=1,
                )  # fmt: skip
            else:
                return tl.inline_asm_elementwise(
                    """
                    {
                        .reg .b32  %from, %before;
                        set.ge.u32.f16x2 %from, $1, $2;
                        set.lt.u32.f16x2 %before, $1, $3;
                        and.b32 $0, %from, %before;
                    }
                    """,
                    "=r,r,r,r", [words, first_ids, end_id | (end_id << 16)], dtype=tl.uint32, is_pure=True, pack=1,
                )  # fmt: skip
        else:
            end = first_id + 1 if end_id is None else end_id
            low, high = (words << 16) >> 16, words >> 16
            is_low, is_high = (low >= first_id) & (low < end), (high >= first_id) & (high < end)
            return tl.where(is_low, 0xFFFF, 0).to(tl.uint32) | (tl.where(is_high, 0xFFFF, 0).to(tl.uint32) << 16)

    @triton.jit
    def _any(matches):
        """Of each token's: int32 [BLOCK], 0 or 1."""
        return (tl.max(matches, 1) != 0).to(tl.int32)

    @triton.jit
    def _earlier(named, PARTS: tl.constexpr):
        """Exclusive prefix sum of named int32 [BLOCK], each 0 or 1, and the whole sum.

        PARTS: up to four parts of the block are counted at once in the 16-bit fields of an integer. Example, two:

            named [1, 0, 1 | 1, 1, 0]    packed [0x10001, 0x10000, 0x1]    prefix [0, 0x10001, 0x20001]    sum 0x20002
            second part's tokens come after the first part's 2: + 0x20000    fields [0, 1, 1 | 2, 3, 4]
        """
        if PARTS == 1:
            earlier = tl.cumsum(named, 0) - named
            count = tl.sum(named, 0)
        else:
            BLOCK: tl.constexpr = named.shape[0]
            PACKED: tl.constexpr = tl.int32 if PARTS == 2 else tl.int64
            shifts = (tl.arange(0, PARTS) * 16).to(PACKED)[:, None]
            packed = tl.sum(named.reshape([PARTS, BLOCK // PARTS]).to(PACKED) << shifts, 0)
            counts = tl.sum(packed, 0)
            of_parts_before = counts << 16
            for part in tl.static_range(2, PARTS):
                of_parts_before += counts << (16 * part)
            fields = tl.cumsum(packed, 0) - packed + of_parts_before
            earlier = ((fields[None, :] >> shifts) & 0xFFFF).to(tl.int32).reshape([BLOCK])
            count = (((of_parts_before + counts) >> (16 * PARTS - 16)) & 0xFFFF).to(tl.int32)
        return earlier, count

    @triton.jit
    def _field(packed, WHICH: tl.constexpr, FIELD: tl.constexpr):
        """One of several counters in an integer."""
        value = packed >> (WHICH * FIELD)
        if FIELD == 16:
            value &= 0xFFFF
        return value.to(tl.int32)

    @triton.jit
    def _nth_expert(index, rank, num_ranks, num_slots, OWN: tl.constexpr):
        """The physical id of expert `index` of this rank's, or of the others'; -2, which no id is, past the last."""
        if OWN:
            return tl.where(index < num_slots, rank * num_slots + index, -2)
        else:
            expert = tl.where(index < rank * num_slots, index, index + num_slots)
            return tl.where(expert < num_ranks * num_slots, expert, -2)

    @triton.jit
    def _store_positions(positions_ptr, position, matches, TOP_K: tl.constexpr, IDS: tl.constexpr):
        """position [BLOCK] to the pairs that match; others' are left alone."""
        BLOCK: tl.constexpr = matches.shape[0]
        LANES: tl.constexpr = matches.shape[1]
        at = tl.arange(0, BLOCK)[:, None] * TOP_K + (tl.arange(0, LANES) * IDS)[None, :]
        value = tl.broadcast_to(position[:, None], [BLOCK, LANES])
        tl.store(positions_ptr + at, value, mask=(matches & 0xFFFF) != 0)
        if IDS == 2:
            tl.store(positions_ptr + at + 1, value, mask=(matches >> 16) != 0)

    @triton.jit
    @no_type_check  # a tuple that grows in an unrolled loop has no type
    def _walk_experts(
        ids_ptr, expert_counts_ptr, positions_ptr, segment_starts_ptr, group_ends_ptr,
        first_index, rank, num_ranks, num_slots, capacity, num_tokens, rows_per_expert, is_lost,
        OWN: tl.constexpr, EXPERTS: tl.constexpr, FIELD: tl.constexpr, MASKED: tl.constexpr, FP16: tl.constexpr,
        STRIDE: tl.constexpr, TOP_K: tl.constexpr, IDS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
        WHOLE: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """Counts and positions of EXPERTS experts from `first_index` of this rank's (OWN) or the others' on.

        is_lost: some ids are not to be trusted, so nothing is found.
        """
        PACKED: tl.constexpr = tl.int32 if EXPERTS * FIELD <= 32 else tl.int64
        experts = ()
        wanted = ()
        for i in tl.static_range(EXPERTS):
            experts += (_nth_expert(first_index + i, rank, num_ranks, num_slots, OWN),)
            wanted += (tl.where(is_lost, -2, experts[i]),)
        own_first, own_end = rank * capacity, (rank + 1) * capacity
        # Tokens before a block are in `counted`, or still spread over `uncounted`.
        counted = tl.cast(0, PACKED)
        uncounted = tl.zeros([BLOCK], PACKED)
        # Two blocks are on their way while one is counted.
        words = _load_words(ids_ptr, 0, num_tokens, STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE)
        next_words = _load_words(ids_ptr, BLOCK, num_tokens, STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE)
        first = 0
        while first < num_tokens:
            later_words = _load_words(ids_ptr, first + 2 * BLOCK, num_tokens, STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE)
            has_own_tokens = (first < own_end) & (first + BLOCK > own_first)
            if has_own_tokens | OWN:
                if not OWN:
                    counted += tl.sum(uncounted, 0)
                    uncounted = tl.zeros([BLOCK], PACKED)
                counts = tl.cast(0, PACKED)
                for i in tl.static_range(EXPERTS):
                    matches = _matches(words, wanted[i], None, FP16)
                    earlier, count = _earlier(_any(matches), PARTS)
                    counts += count.to(PACKED) << (i * FIELD)
                    if not (OWN or ALIGNED):
                        tokens = first + tl.arange(0, BLOCK)
                        is_own_token = (tokens >= own_first) & (tokens < own_end)
                        matches = tl.where(is_own_token[:, None], matches, 0)
                    first_pair = tl.cast(first, tl.int64) * TOP_K
                    _store_positions(
                        positions_ptr + first_pair, _field(counted, i, FIELD) + earlier, matches, TOP_K, IDS
                    )
                counted += counts
            else:
                for i in tl.static_range(EXPERTS):
                    uncounted += _any(_matches(words, wanted[i], None, FP16)).to(PACKED) << (i * FIELD)
            words = next_words
            next_words = later_words
            first += BLOCK
        counted += tl.sum(uncounted, 0)
        for i in tl.static_range(EXPERTS):
            if experts[i] >= 0:
                count = _field(counted, i, FIELD)
                tl.store(expert_counts_ptr + experts[i], count)
                if MASKED:
                    start = experts[i] % num_slots * rows_per_expert
                    tl.store(segment_starts_ptr + experts[i], start)
                    if OWN:
                        tl.store(group_ends_ptr + first_index + i, start + count)

    @triton.jit
    def _walk_rank(
        ids_ptr, rows_per_rank_ptr, send_rows_ptr, received_rows_ptr,
        needed, rank, num_ranks, num_slots, capacity, num_tokens, is_lost, FP16: tl.constexpr,
        STRIDE: tl.constexpr, TOP_K: tl.constexpr, IDS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
        WHOLE: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """Rows of the tokens that need rank `needed`; none where is_lost."""
        first_id = tl.where(is_lost, -2, needed * num_slots)
        end_id = tl.where(is_lost, -2, (needed + 1) * num_slots)
        own_first, own_end = rank * capacity, (rank + 1) * capacity
        counted = 0
        uncounted = tl.zeros([BLOCK], tl.int32)
        words = _load_words(ids_ptr, 0, num_tokens, STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE)
        next_words = _load_words(ids_ptr, BLOCK, num_tokens, STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE)
        first = 0
        while first < num_tokens:
            later_words = _load_words(ids_ptr, first + 2 * BLOCK, num_tokens, STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE)
            named = _any(_matches(words, first_id, end_id, FP16))
            has_own_tokens = (first < own_end) & (first + BLOCK > own_first)
            if (needed == rank) | has_own_tokens:
                counted += tl.sum(uncounted, 0)
                uncounted = tl.zeros([BLOCK], tl.int32)
                earlier, count = _earlier(named, PARTS)
                rows = tl.where(named > 0, counted + earlier, -1)
                counted += count
                tokens = first + tl.arange(0, BLOCK)
                if needed == rank:
                    tl.store(received_rows_ptr + tokens, rows, mask=tokens < num_tokens)
                if has_own_tokens:
                    at = (tokens - own_first).to(tl.int64) * num_ranks + needed
                    tl.store(send_rows_ptr + at, rows, mask=(tokens >= own_first) & (tokens < own_end))
            else:
                uncounted += named
            words = next_words
            next_words = later_words
            first += BLOCK
        tl.store(rows_per_rank_ptr + needed, counted + tl.sum(uncounted, 0))

    @triton.jit
    def _store_segments(
        expert_counts_ptr, segment_starts_ptr, group_ends_ptr, rank, num_ranks, num_slots,
        ALIGNMENT: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr,
    ):  # fmt: skip
        """Segments one after the other, from the counts of all experts."""
        ranks, slots = tl.arange(0, RANKS)[:, None], tl.arange(0, SLOTS)[None, :]
        at, is_expert = ranks * num_slots + slots, (ranks < num_ranks) & (slots < num_slots)
        # Others have just written them, so they are not in this multiprocessor's own cache.
        counts = tl.load(expert_counts_ptr + at, mask=is_expert, other=0, cache_modifier=".cg")
        padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        starts = tl.cumsum(padded, 1) - padded
        tl.store(segment_starts_ptr + at, starts, mask=is_expert)
        own_ends = group_ends_ptr + tl.broadcast_to(slots, [RANKS, SLOTS])
        tl.store(own_ends, starts + counts, mask=is_expert & (ranks == rank))

    @triton.jit(
        do_not_specialize=[
            "rank",
            "num_slots",
            "capacity",
            "num_tokens",
            "rows_per_expert",
            "num_own_tokens",
            "errors",
            "limit_ns",
            "num_writers",
        ]
    )
    def _dense_routing_kernel(
        ids_ptr, rows_per_rank_ptr, send_rows_ptr, received_rows_ptr,
        expert_counts_ptr, positions_ptr, segment_starts_ptr, group_ends_ptr, finished_ptr,
        topk_ids_ptr, topk_weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, peer_offsets_ptr,
        weights_ptr, flags_ptr, epochs_ptr, gathered_ids_ptr, gathered_weights_ptr, reports_ptr, lost_ptr,
        rank, num_slots, capacity, num_tokens, rows_per_expert, num_own_tokens, errors, limit_ns, num_writers,
        stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
        NUM_RANKS: tl.constexpr, STRIDE: tl.constexpr, TOP_K: tl.constexpr, IDS: tl.constexpr, LANES: tl.constexpr,
        OTHER_EXPERTS: tl.constexpr, FIELD: tl.constexpr, FP16: tl.constexpr,
        ALIGNMENT: tl.constexpr, MASKED: tl.constexpr,
        RANKS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
        PARTS: tl.constexpr,
        TOP_K_BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr, MAX_REPLICAS: tl.constexpr, NUM_SETS: tl.constexpr,
        SET_STRIDE: tl.constexpr, ADVANCES: tl.constexpr, FLAGS_STRIDE: tl.constexpr, FLAGS: tl.constexpr,
        WRITER_BLOCK: tl.constexpr, SOURCES: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """First programs that gather, if any; then for this rank's experts, which have most to do, then one per rank,
        then the other experts'."""
        wait_for_the_kernel_before(PDL)
        own_programs = 0 if expert_counts_ptr is None else num_slots
        rank_programs = 0 if rows_per_rank_ptr is None else NUM_RANKS
        program = tl.program_id(0)
        is_lost = False
        if peer_offsets_ptr is not None:
            epoch = tl.load(epochs_ptr) + 1
            lost = tl.load(lost_ptr)
            set_start = epoch % NUM_SETS * SET_STRIDE
            ids_ptr += set_start
            if program < num_writers:
                gather_share(
                    topk_ids_ptr, topk_weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, peer_offsets_ptr,
                    ids_ptr, weights_ptr + set_start, flags_ptr, gathered_ids_ptr, gathered_weights_ptr, reports_ptr,
                    lost_ptr, epoch, lost, program, num_writers, num_own_tokens, capacity, errors, rank, num_slots,
                    limit_ns, stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k, FLAGS_STRIDE,
                    TOP_K, TOP_K_BLOCK, NUM_EXPERTS, MAX_REPLICAS, NUM_RANKS, SOURCES, WRITER_BLOCK,
                )  # fmt: skip
                is_lost = tl.full([], 0, tl.int1)
            else:
                is_lost = await_rows(
                    flags_ptr, reports_ptr, lost_ptr, epoch, lost, num_writers, limit_ns, FLAGS_STRIDE, NUM_RANKS, FLAGS
                )
            program -= num_writers
        is_of_own = (program >= 0) & (program < own_programs)
        is_of_rank = (program >= own_programs) & (program < own_programs + rank_programs)
        if rows_per_rank_ptr is not None:  # noqa: SIM102 - a constant, known when the kernel is compiled
            if is_of_rank:
                _walk_rank(
                    ids_ptr, rows_per_rank_ptr, send_rows_ptr, received_rows_ptr,
                    program - own_programs, rank, NUM_RANKS, num_slots, capacity, num_tokens, is_lost, FP16,
                    STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE, PARTS,
                )  # fmt: skip
        if expert_counts_ptr is not None:
            if is_of_own:
                _walk_experts(
                    ids_ptr, expert_counts_ptr, positions_ptr, segment_starts_ptr, group_ends_ptr,
                    program, rank, NUM_RANKS, num_slots, capacity, num_tokens, rows_per_expert, is_lost,
                    True, 1, FIELD, MASKED, FP16, STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE, ALIGNED, PARTS,
                )  # fmt: skip
            elif program >= own_programs + rank_programs:
                first_index = (program - own_programs - rank_programs) * OTHER_EXPERTS
                _walk_experts(
                    ids_ptr, expert_counts_ptr, positions_ptr, segment_starts_ptr, group_ends_ptr,
                    first_index, rank, NUM_RANKS, num_slots, capacity, num_tokens, rows_per_expert, is_lost,
                    False, OTHER_EXPERTS, FIELD, MASKED, FP16, STRIDE, TOP_K, IDS, LANES, BLOCK, WHOLE, ALIGNED, PARTS,
                )  # fmt: skip
        LAYS_OUT: tl.constexpr = expert_counts_ptr is not None and not MASKED
        if LAYS_OUT or ADVANCES:
            # Which program is the last to get here has all counts before it; the next launch starts from 0 again.
            tl.debug_barrier()
            if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                tl.store(finished_ptr, 0)
                if ADVANCES:
                    tl.store(epochs_ptr, epoch)
                if LAYS_OUT:
                    _store_segments(
                        expert_counts_ptr, segment_starts_ptr, group_ends_ptr, rank, NUM_RANKS, num_slots,
                        ALIGNMENT, RANKS, SLOTS,
                    )  # fmt: skip

    _launch_kernel = Launcher(_dense_routing_kernel)


@dataclass(slots=True, kw_only=True)
class DenseRouting:
    """What `dense_routing` finds, for `rank` of R ranks with C tokens each and S = num_slots experts each, K = top-k.

    rows_per_rank: int32 [R], tokens of all ranks that need each rank.
    send_rows: int32 [C, R], the row of each own token on each rank: earlier tokens that need it; -1 where not needed.
    received_rows: int32 [R * C], the row of each token on this rank; -1 where it is not needed.

    expert_counts: int32 [R, S], tokens that name each expert, once each.
    segment_starts: int32 [R, S], where each expert's segment starts in its rank's expert-grouped buffer.
    group_ends: int32 [S], where this rank's segments end: their start and the count.
    positions: int32 [R * C, K], earlier tokens that name the pair's expert; undefined for dropped pairs, and where
        neither the token nor the expert is this rank's.
    finished: int32 [1], the kernel's own; 0 between launches, of which only one may run at a time.

    Fields of a kind that was not asked for are None: the first three (rows), or the next four (places). A pair's place
    is segment_starts.flatten()[id] + position: see `send_places` and `places`.
    """

    rank: int
    num_slots: int
    rows_per_rank: torch.Tensor | None = None
    send_rows: torch.Tensor | None = None
    received_rows: torch.Tensor | None = None
    expert_counts: torch.Tensor | None = None
    segment_starts: torch.Tensor | None = None
    group_ends: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    finished: torch.Tensor | None = None

    @classmethod
    def empty(
        cls,
        num_ranks: int,
        capacity: int,
        top_k: int,
        rank: int,
        num_slots: int,
        device: torch.device,
        *,
        rows: bool = True,
        places: bool = True,
    ) -> DenseRouting:
        """Room for the results of `dense_routing` on ids [num_ranks, capacity, top_k]."""

        def room(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        found = cls(rank=rank, num_slots=num_slots)
        if rows:
            found.rows_per_rank = room(num_ranks)
            found.send_rows = room(capacity, num_ranks)
            found.received_rows = room(num_ranks * capacity)
        if places:
            found.expert_counts, found.segment_starts = room(num_ranks, num_slots), room(num_ranks, num_slots)
            found.group_ends = room(num_slots)
            found.positions = room(num_ranks * capacity, top_k)
        if rows or places:
            found.finished = torch.zeros(1, dtype=torch.int32, device=device)
        return found

    def send_places(self, gathered_ids: torch.Tensor) -> torch.Tensor:
        """int32 [C, K]: of each own pair, its place in the grouped buffer of its expert's rank; -1 where dropped."""
        assert self.segment_starts is not None and self.positions is not None
        ids = gathered_ids[self.rank].long()
        starts = self.segment_starts.flatten()[ids.clamp(min=0)]
        positions = self.positions.view(gathered_ids.shape)[self.rank]
        return torch.where(ids >= 0, starts + positions, -1)

    def places(self, gathered_ids: torch.Tensor) -> torch.Tensor:
        """int32 [R * C, K]: of each pair of all ranks, its place in this rank's grouped buffer; -1 where it is not."""
        assert self.segment_starts is not None and self.positions is not None
        slots = gathered_ids.flatten(0, 1).long() - self.rank * self.num_slots
        is_here = (slots >= 0) & (slots < self.num_slots)
        starts = self.segment_starts[self.rank][slots.clamp(0, self.num_slots - 1)]
        return torch.where(is_here, starts + self.positions, -1)


def check_num_experts(num_ranks: int, num_slots: int) -> None:
    """Raises ConfigError where int16 ids do not suffice for so many physical experts."""
    if num_ranks * num_slots > IDS_END:
        raise ConfigError(
            f"{num_ranks} ranks of {num_slots} experts are {num_ranks * num_slots} physical experts; dense routing "
            f"names them by int16 ids, which is enough for {IDS_END}"
        )


def to_dense_ids(rank: torch.Tensor, slot: torch.Tensor, num_slots: int) -> torch.Tensor:
    """int16 physical ids, rank * num_slots + slot, of pairs as `placement_lookup` places them; -1 where dropped.

    rank, slot: int [T, K]. There must be ids for all experts: see `check_num_experts`.
    """
    return torch.where((rank >= 0) & (slot >= 0), rank * num_slots + slot, -1).to(torch.int16)


def to_routing_map(gathered_ids: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The sparse form of dense ids [R, C, K]: bool [R * C, R * num_slots], token by expert."""
    num_ranks, capacity, _ = gathered_ids.shape
    ids = gathered_ids.flatten(0, 1).long()
    # Dropped pairs go to a column that is cut off.
    num_experts = num_ranks * num_slots
    routing_map = torch.zeros(num_ranks * capacity, num_experts + 1, dtype=torch.bool, device=ids.device)
    routing_map.scatter_(1, torch.where(ids >= 0, ids, num_experts), True)
    return routing_map[:, :num_experts]


def map_ids(routing_map: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """int16 [R, C, E], the dense ids with a column for each expert that say the same as a map bool [R * C, E]."""
    num_experts = routing_map.shape[1]
    ids = torch.arange(num_experts, dtype=torch.int16, device=routing_map.device)
    return torch.where(routing_map, ids, -1).view(num_ranks, -1, num_experts)


def sparse_routing(
    routing_map: torch.Tensor,
    num_ranks: int,
    rank: int,
    num_slots: int,
    *,
    alignment: int = 128,
    rows_per_expert: int | None = None,
    rows: bool = True,
    places: bool = True,
) -> DenseRouting:
    """Routing from the sparse form, in plain torch operations: no host sync, on any device.

    routing_map: bool [R * C, R * num_slots]. The result is that of dense ids with a column for each expert (K is R *
    num_slots) that hold its id or -1, positions of pairs that are not there being -1; `send_places` and `places` want
    such ids, which `map_ids` gives. The other arguments are those of `dense_routing`.
    """
    num_tokens = routing_map.shape[0]
    capacity = num_tokens // num_ranks
    own_tokens = slice(rank * capacity, (rank + 1) * capacity)
    found = DenseRouting(rank=rank, num_slots=num_slots)
    if rows:
        needed = routing_map.view(num_tokens, num_ranks, num_slots).any(2)
        found.rows_per_rank = needed.sum(0, dtype=torch.int32)
        row = torch.where(needed, needed.cumsum(0, dtype=torch.int32) - 1, -1)
        found.send_rows, found.received_rows = row[own_tokens], row[:, rank]
    if places:
        position = torch.where(routing_map, routing_map.cumsum(0, dtype=torch.int32) - 1, -1)
        counts = routing_map.sum(0, dtype=torch.int32).view(num_ranks, num_slots)
        if rows_per_expert is None:
            padded = (counts + (alignment - 1)) // alignment * alignment
            starts = padded.cumsum(1, dtype=torch.int32) - padded
        else:
            slots = torch.arange(num_slots, dtype=torch.int32, device=counts.device)
            starts = (slots * rows_per_expert).repeat(num_ranks, 1)
        found.expert_counts, found.segment_starts = counts, starts
        found.group_ends = starts[rank] + counts[rank]
        found.positions = position
    return found


def dense_routing_reference(
    gathered_ids: torch.Tensor,
    rank: int,
    num_slots: int,
    *,
    alignment: int = 128,
    rows_per_expert: int | None = None,
    rows: bool = True,
    places: bool = True,
) -> DenseRouting:
    """`dense_routing` in plain torch operations, by way of the sparse form; positions of dropped pairs are -1."""
    found = sparse_routing(
        to_routing_map(gathered_ids, num_slots),
        gathered_ids.shape[0],
        rank,
        num_slots,
        alignment=alignment,
        rows_per_expert=rows_per_expert,
        rows=rows,
        places=places,
    )
    if found.positions is not None:
        ids = gathered_ids.flatten(0, 1).long()
        found.positions = torch.where(ids >= 0, found.positions.gather(1, ids.clamp(min=0)), -1)
    return found


def dense_routing(
    gathered_ids: torch.Tensor,
    rank: int,
    num_slots: int,
    *,
    alignment: int = 128,
    rows_per_expert: int | None = None,
    rows: bool = True,
    places: bool = True,
    out: DenseRouting | None = None,
    use_triton: bool | None = None,
) -> DenseRouting:
    """Rows on ranks, and places in expert-grouped buffers, of the tokens of all ranks.

    gathered_ids: int16 [R, C, K], physical ids or -1; rows past a rank's tokens hold -1. See `dense_routing_launches`.
    alignment: multiples of which segments start at, one after the other; or rows_per_expert: they start at slot *
        rows_per_expert.
    rows, places: which kinds of results are wanted; `out`, if given, has exactly their fields.
    use_triton: None takes Triton for CUDA tensors where it is installed; True also under its interpreter.
    Raises ConfigError for more experts than int16 ids can name, DtypeError, ShapeError.
    """
    if use_triton is None:
        use_triton = gathered_ids.is_cuda and triton is not None
    _check(gathered_ids, num_slots, alignment, rows_per_expert)
    if out is not None and (out.rank, out.num_slots) != (rank, num_slots):
        raise ShapeError(f"`out` is for rank {out.rank} of {out.num_slots} slots, got {rank} of {num_slots}")
    if not use_triton:
        found = dense_routing_reference(
            gathered_ids,
            rank,
            num_slots,
            alignment=alignment,
            rows_per_expert=rows_per_expert,
            rows=rows,
            places=places,
        )
        if out is None:
            return found
        for name in _RESULTS:
            target, value = getattr(out, name), getattr(found, name)
            if target is not None and value is not None:
                target.copy_(value)
        return out
    if out is None:
        num_ranks, capacity, top_k = gathered_ids.shape
        out = DenseRouting.empty(
            num_ranks, capacity, top_k, rank, num_slots, gathered_ids.device, rows=rows, places=places
        )
    _run(gathered_ids, out, alignment=alignment, rows_per_expert=rows_per_expert)
    return out


_RESULTS = (
    "rows_per_rank",
    "send_rows",
    "received_rows",
    "expert_counts",
    "segment_starts",
    "group_ends",
    "positions",
)


def dense_routing_launches(
    gathered_ids: torch.Tensor,
    out: DenseRouting,
    *,
    alignment: int = 128,
    rows_per_expert: int | None = None,
    gather: RoutingGather | None = None,
) -> list[Launch]:
    """The one launch that fills `out`, made by `DenseRouting.empty`; what it lacks is not computed.

    gathered_ids: int16 [R, C, K], nothing but ids and -1, those of a token side by side and tokens a constant stride
        apart, over all ranks. Loads are widest where that stride and K are the same power of two.
    gather: fill gathered_ids, contiguous, and the weights too, before; all ranks do so together, with the same C. Where
        ids are wrong or a rank is lost, that is reported; in the latter case programs that noticed find no tokens.
    The other arguments are those of `dense_routing`.
    Raises as `dense_routing`.
    """
    _check(gathered_ids, out.num_slots, alignment, rows_per_expert)
    num_ranks, capacity, top_k = gathered_ids.shape
    num_tokens, stride = num_ranks * capacity, gathered_ids.stride(0 if capacity == 1 else 1)
    walked, writers = gathered_ids, 0
    if gather is not None:
        _check_gather(gather, gathered_ids, out)
        walked, stride, writers = gather.regions.ids, top_k, num_writers(capacity)
    # Two ids are one word, where words are whole.
    ids_per_word = 1 if (top_k | stride | int(walked.storage_offset())) & 1 else 2
    lanes = next_power_of_2(cdiv(top_k, ids_per_word))
    field = _SHORT_FIELD if num_tokens < 1 << _SHORT_FIELD else _LONG_FIELD
    num_programs, other_experts = 0 if out.rows_per_rank is None else num_ranks, 1
    if out.expert_counts is not None:
        num_others = (num_ranks - 1) * out.num_slots
        num_programs += out.num_slots
        most = _PROGRAMS - writers
        while other_experts < 64 // field and num_programs + cdiv(num_others, other_experts) > most:
            other_experts += 1
        num_programs += cdiv(num_others, other_experts)
    if num_programs + writers == 0:
        return []
    block = min(max(next_power_of_2(num_tokens), _LEAST_BLOCK), max(_BLOCK_WORDS // lanes, _LEAST_BLOCK))
    num_warps = min(block // 32, _MAX_WARPS)
    pdl = dependent_launch()
    gather_args, gather_constants = _gather_arguments(gather, gathered_ids, num_warps)
    launch = _launch_kernel.launch(
        (writers + num_programs,),
        (
            walked, out.rows_per_rank, out.send_rows, out.received_rows,
            out.expert_counts, out.positions, out.segment_starts, out.group_ends, out.finished,
            *gather_args[0],
            out.rank, out.num_slots, capacity, num_tokens, rows_per_expert or 0,
            *gather_args[1],
        ),
        (
            num_ranks, stride, top_k, ids_per_word, lanes, other_experts, field,
            num_ranks * out.num_slots < _FP16_IDS_END, alignment, rows_per_expert is not None,
            next_power_of_2(num_ranks), next_power_of_2(out.num_slots),
            block, num_tokens > 0 and num_tokens % block == 0, capacity % block == 0,
            min(block // (32 * num_warps), _MAX_PARTS), *gather_constants, pdl,
        ),
        num_warps=num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]


_run = running(dense_routing_launches)


def _gather_arguments(
    gather: RoutingGather | None, gathered_ids: torch.Tensor, num_warps: int
) -> tuple[tuple[tuple[object, ...], tuple[int, ...]], tuple[int, ...]]:
    """Pointers, numbers and constants of a launch that gathers, or does not."""
    if gather is None:
        return ((None,) * 13, (0,) * 8), (1, 0, 1, 1, 0, False, 0, 1, 1, 1)
    num_ranks, capacity, top_k = gathered_ids.shape
    regions, tables, weights = gather.regions, gather.tables, gather.topk_weights
    num_experts, max_replicas = tables.tables.slot.shape
    pointers = (
        gather.topk_ids, weights, tables.rank, tables.slot, tables.num_replicas, regions.peer_offsets,
        regions.weights, regions.flags, regions.epochs, gathered_ids, gather.gathered_weights,
        gather.reports, gather.lost,
    )  # fmt: skip
    strides = (*gather.topk_ids.stride(), *((0, 0) if weights is None else weights.stride()))
    numbers = (gather.topk_ids.shape[0], gather.errors, gather.limit_ns, num_writers(capacity), *strides)
    flags = max(next_power_of_2(num_ranks) * MAX_WRITERS, 32 * num_warps)
    constants = (
        next_power_of_2(top_k), num_experts, max_replicas, regions.ids.shape[0], regions.ids.stride(0),
        regions.owns_epochs, MAX_WRITERS, flags, *writer_tiles(num_ranks, capacity, top_k),
    )  # fmt: skip
    return (pointers, numbers), constants


def _check_gather(gather: RoutingGather, gathered_ids: torch.Tensor, out: DenseRouting) -> None:
    num_ranks, capacity, top_k = gathered_ids.shape
    regions, topk_ids, room = gather.regions, gather.topk_ids, gather.regions.ids.stride(0)
    if topk_ids.dim() != 2 or topk_ids.shape[1] != top_k or topk_ids.shape[0] > capacity:
        raise ShapeError(f"topk_ids are [{capacity} or fewer, {top_k}], got [{_shape(topk_ids.shape)}]")
    if gathered_ids.numel() > room or regions.flags.shape != (num_ranks, MAX_WRITERS):
        raise ShapeError(
            f"regions have room for {room} pairs of {regions.flags.shape[0]} ranks, got {gathered_ids.numel()} of "
            f"{num_ranks}"
        )
    if (gather.topk_weights is None) != (gather.gathered_weights is None):
        raise ShapeError("topk_weights and gathered_weights come both or not at all")
    if not gathered_ids.is_contiguous():
        raise ShapeError(f"ids are gathered into contiguous memory, got strides {_shape(gathered_ids.stride())}")
    if out.finished is None:
        raise ShapeError("nothing is asked for besides the gathered ids: `out` has neither rows nor places")


def _check(gathered_ids: torch.Tensor, num_slots: int, alignment: int, rows_per_expert: int | None) -> None:
    if gathered_ids.dtype is not torch.int16:
        raise DtypeError(f"gathered ids are int16, got {gathered_ids.dtype}")
    if gathered_ids.dim() != 3 or gathered_ids.shape[2] == 0:
        raise ShapeError(f"gathered ids are [ranks, tokens, top-k], got {_shape(gathered_ids.shape)}")
    num_ranks, capacity, top_k = gathered_ids.shape
    are_in_rows = top_k == 1 or gathered_ids.stride(2) == 1
    are_even = min(num_ranks, capacity) == 1 or gathered_ids.stride(0) == capacity * gathered_ids.stride(1)
    if gathered_ids.numel() and not (are_in_rows and are_even):
        raise ShapeError(
            "gathered ids lie side by side, and tokens a constant stride apart from the first rank's first to the last "
            f"rank's last; got strides {_shape(gathered_ids.stride())} for [{_shape(gathered_ids.shape)}]"
        )
    check_num_experts(num_ranks, num_slots)
    num_tokens = num_ranks * capacity
    if rows_per_expert is None:
        most_slots = num_tokens * min(top_k, num_slots) + num_slots * (alignment - 1)
    else:
        most_slots = num_slots * rows_per_expert
        if rows_per_expert < num_tokens:
            raise ShapeError(f"rows_per_expert is {rows_per_expert}; all {num_tokens} tokens may want one expert")
    if most_slots >= _SLOTS_END:
        raise ShapeError(f"{num_slots} experts may need {most_slots} places; there must be less than 2^31")


def _shape(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
