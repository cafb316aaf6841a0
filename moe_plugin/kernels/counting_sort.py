"""Stable counting sort of (row, k) pairs by local expert, each expert's segment padded to whole blocks.

Example, N = 3 rows, K = 2, two experts, block_m = 2:

    local_ids          [[1, 0], [1, -1], [1, 0]]      pair p = n * K + k: 0 .. 5; -1 is skipped
    sorted_pairs       [1, 5 | 0, 2 | 4, 6 | ...]     expert 0: pairs 1, 5; expert 1: pairs 0, 2, 4 and one padding
    slot_of_pair       [[2, 0], [3, -1], [4, 1]]      the inverse: where each pair went
    block_expert       [0, 1, 1, -1]                  one entry per block of two slots; -1 is unused
    expert_num_tokens  [2, 3]
    num_blocks         [3]                            blocks in use
    group_ends         [2, 5]                         where the pairs of each segment end; an empty one: its start

Up to ONE_LAUNCH_PAIRS pairs and ONE_LAUNCH_EXPERTS experts take one launch: every program counts all ids and then
places its own share of pairs and blocks. More take two or, for very many, three launches:

    count   chunk_counts[c, e] = pairs of expert e in chunk c of SORT_CHUNK pairs
    scan    chunk_counts[c, e] = pairs of expert e in the chunks before c; expert_num_tokens[e] = all of them
    place   slot of a pair = segment start of its expert + its pairs in the chunks before + its rank within the chunk

All forms keep the order of the pairs within an expert and so give the same bits in every run. All sizes follow from
(N, K, experts, block_m), see `tiling.max_num_blocks`: no host sync, capturable in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from moe_plugin.kernels.dependent_launch import dependent_launch, wait_for_the_kernel_before
from moe_plugin.kernels.launcher import Launch, Launcher
from moe_plugin.kernels.tiling import SORT_CHUNK, cdiv, next_power_of_2

ONE_LAUNCH_PAIRS = 1024
"""Up to here recounting all ids in every program costs less than two more launches."""
ONE_LAUNCH_EXPERTS = 1024
"""Counts of so many experts fit the registers of one program."""

_SHARE = 32
_ONE_LAUNCH_WARPS = 4
_HISTOGRAM_LANES = 32 * _ONE_LAUNCH_WARPS
"""With fewer lanes than threads a histogram would count a pair once for each thread that holds it."""
_MAX_UNSCANNED_CHUNKS = 128
"""Up to here every program adds up the counts of all chunks itself; beyond, a launch of its own does it once."""
_EXPERT_TILE = 64
_SCAN_TILE = 64
_CHUNK_TILE = 32
_RANK_TILE = 32
_BLOCK_TILE = 64
_PLACE_WARPS = 4


@triton.jit
def _load_ids(
    local_ids_ptr, pairs, num_pairs, stride_n, stride_k, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr
):  # fmt: skip
    rows = pairs // TOP_K
    offsets = rows.to(tl.int64) * stride_n + (pairs - rows * TOP_K) * stride_k
    ids = tl.load(local_ids_ptr + offsets, mask=pairs < num_pairs, other=-1)
    return tl.where(ids < NUM_EXPERTS, ids, -1)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(
    local_ids_ptr, chunk_counts_ptr, num_pairs, stride_n, stride_k,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr, EXPERT_TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(PDL)
    chunk = tl.program_id(0)
    experts = tl.program_id(1) * EXPERT_TILE + tl.arange(0, EXPERT_TILE)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = _load_ids(local_ids_ptr, pairs, num_pairs, stride_n, stride_k, NUM_EXPERTS, TOP_K)
    counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(chunk_counts_ptr + chunk * NUM_EXPERTS + experts, counts, mask=experts < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_chunks"])
def _scan_kernel(
    chunk_counts_ptr, expert_num_tokens_ptr, num_chunks,
    NUM_EXPERTS: tl.constexpr, CHUNK_TILE: tl.constexpr, EXPERT_TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(PDL)
    experts = tl.program_id(0) * EXPERT_TILE + tl.arange(0, EXPERT_TILE)
    before = tl.zeros([EXPERT_TILE], tl.int32)
    first_chunk = 0
    # A runtime bound of range() is more than the interpreter can take under NumPy 2.4.
    while first_chunk < num_chunks:
        chunks = first_chunk + tl.arange(0, CHUNK_TILE)
        counts_ptrs = chunk_counts_ptr + chunks[:, None] * NUM_EXPERTS + experts[None, :]
        mask = (chunks < num_chunks)[:, None] & (experts < NUM_EXPERTS)[None, :]
        counts = tl.load(counts_ptrs, mask=mask, other=0)
        tl.store(counts_ptrs, before[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        before += tl.sum(counts, axis=0)
        first_chunk += CHUNK_TILE
    tl.store(expert_num_tokens_ptr + experts, before, mask=experts < NUM_EXPERTS)


@triton.jit
def _ends_of_segments(counts, BLOCK_M: tl.constexpr):
    """Ends of the segments that hold `counts` [experts] pairs, padded to whole blocks, and their padded lengths."""
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    return tl.cumsum(padded, axis=0), padded


@triton.jit
def _read_counts(
    chunk_counts_ptr, expert_num_tokens_ptr, chunk, num_chunks, experts,
    NUM_EXPERTS: tl.constexpr, SCANNED: tl.constexpr, CHUNK_TILE: tl.constexpr,
):  # fmt: skip
    """Pairs of each expert before `chunk`, and in all chunks."""
    in_range = experts < NUM_EXPERTS
    if SCANNED:
        before = tl.load(
            chunk_counts_ptr + chunk * NUM_EXPERTS + experts, mask=in_range & (chunk < num_chunks), other=0
        )
        total = tl.load(expert_num_tokens_ptr + experts, mask=in_range, other=0)
    else:
        before = tl.zeros_like(experts)
        total = tl.zeros_like(experts)
        first_chunk = 0
        while first_chunk < num_chunks:
            chunks = first_chunk + tl.arange(0, CHUNK_TILE)
            counts_ptrs = chunk_counts_ptr + chunks[:, None] * NUM_EXPERTS + experts[None, :]
            counts = tl.load(counts_ptrs, mask=(chunks < num_chunks)[:, None] & in_range[None, :], other=0)
            before += tl.sum(tl.where((chunks < chunk)[:, None], counts, 0), axis=0)
            total += tl.sum(counts, axis=0)
            first_chunk += CHUNK_TILE
    return before, total


@triton.jit
def _store_groups(expert_num_tokens_ptr, group_ends_ptr, experts, counts, ends, padded, NUM_EXPERTS: tl.constexpr):
    in_range = experts < NUM_EXPERTS
    tl.store(expert_num_tokens_ptr + experts, counts, mask=in_range)
    if group_ends_ptr is not None:
        tl.store(group_ends_ptr + experts, ends - padded + counts, mask=in_range)


@triton.jit
def _store_slots(sorted_pairs_ptr, slot_of_pair_ptr, pairs, ids, slots, num_pairs, num_slots):
    # Buffers of fewer slots than the ids need, made for wrong counts, lose pairs rather than be written past their end.
    has_slot = (ids >= 0) & (slots < num_slots)
    if sorted_pairs_ptr is not None:
        tl.store(sorted_pairs_ptr + slots, pairs, mask=has_slot)
    tl.store(slot_of_pair_ptr + pairs, tl.where(has_slot, slots, -1), mask=pairs < num_pairs)


@triton.jit
def _store_blocks(
    sorted_pairs_ptr, block_expert_ptr, num_blocks_ptr, blocks, experts, counts, ends, padded, num_pairs, max_blocks,
    NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TILE: tl.constexpr,
):  # fmt: skip
    """Write the experts of one tile of blocks, fill their slots that hold no pair, and count the blocks in use."""
    first_slots = blocks * BLOCK_M
    last_end = tl.max(ends, axis=0)
    in_range = blocks < max_blocks
    passed = (ends[None, :] <= first_slots[:, None]) & (experts < NUM_EXPERTS)[None, :]
    block_expert = tl.sum(passed.to(tl.int32), axis=1)
    tl.store(block_expert_ptr + blocks, tl.where(first_slots < last_end, block_expert, -1), mask=in_range)
    num_blocks = tl.minimum(last_end // BLOCK_M, max_blocks)
    tl.store(num_blocks_ptr + blocks, tl.zeros_like(blocks) + num_blocks, mask=blocks == 0)
    if sorted_pairs_ptr is not None:
        # Starts ascend, so of all segments begun by the block's first slot the last one ends furthest.
        starts = ends - padded
        begun = starts[None, :] <= first_slots[:, None]
        filled_end = tl.max(tl.where(begun, (starts + counts)[None, :], 0), axis=1)
        slots = first_slots[:, None] + tl.arange(0, BLOCK_M)[None, :]
        padding = in_range[:, None] & (slots >= filled_end[:, None])
        tl.store(sorted_pairs_ptr + slots, tl.zeros([BLOCK_TILE, BLOCK_M], tl.int32) + num_pairs, mask=padding)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks", "max_blocks"])
def _place_kernel(
    local_ids_ptr, chunk_counts_ptr, expert_num_tokens_ptr,
    sorted_pairs_ptr, slot_of_pair_ptr, block_expert_ptr, num_blocks_ptr, group_ends_ptr,
    num_pairs, num_chunks, max_blocks, stride_n, stride_k,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, SCANNED: tl.constexpr,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, CHUNK_TILE: tl.constexpr, RANK_TILE: tl.constexpr,
    BLOCK_TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs up to num_chunks place the pairs of one chunk, the others label one tile of blocks."""
    wait_for_the_kernel_before(PDL)
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    before, total = _read_counts(
        chunk_counts_ptr, expert_num_tokens_ptr, program, num_chunks, experts, NUM_EXPERTS, SCANNED, CHUNK_TILE
    )
    ends, padded = _ends_of_segments(total, BLOCK_M)
    if program < num_chunks:
        lanes = tl.arange(0, CHUNK)
        pairs = program * CHUNK + lanes
        ids = _load_ids(local_ids_ptr, pairs, num_pairs, stride_n, stride_k, NUM_EXPERTS, TOP_K)
        slots = tl.gather(ends - padded + before, tl.maximum(ids, 0), 0)
        for first_lane in range(0, CHUNK, RANK_TILE):
            other_lanes = first_lane + tl.arange(0, RANK_TILE)
            other_ids = _load_ids(
                local_ids_ptr, program * CHUNK + other_lanes, num_pairs, stride_n, stride_k, NUM_EXPERTS, TOP_K
            )
            earlier = (ids[:, None] == other_ids[None, :]) & (other_lanes[None, :] < lanes[:, None])
            slots += tl.sum(earlier.to(tl.int32), axis=1)
        _store_slots(sorted_pairs_ptr, slot_of_pair_ptr, pairs, ids, slots, num_pairs, max_blocks * BLOCK_M)
    else:
        tile = program - num_chunks
        if not SCANNED or group_ends_ptr is not None:  # noqa: SIM102 - a constant, known when the kernel is compiled
            if tile == 0:
                _store_groups(expert_num_tokens_ptr, group_ends_ptr, experts, total, ends, padded, NUM_EXPERTS)
        _store_blocks(
            sorted_pairs_ptr, block_expert_ptr, num_blocks_ptr, tile * BLOCK_TILE + tl.arange(0, BLOCK_TILE),
            experts, total, ends, padded, num_pairs, max_blocks, NUM_EXPERTS, BLOCK_M, BLOCK_TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs", "max_blocks"])
def _one_launch_kernel(
    local_ids_ptr, expert_num_tokens_ptr, sorted_pairs_ptr, slot_of_pair_ptr, block_expert_ptr, num_blocks_ptr,
    group_ends_ptr, num_pairs, max_blocks, stride_n, stride_k,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr, EXPERTS: tl.constexpr, SHARE: tl.constexpr, HISTOGRAM_LANES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """PAIRS and EXPERTS: num_pairs and NUM_EXPERTS rounded up to powers of two."""
    wait_for_the_kernel_before(PDL)
    program = tl.program_id(0)
    all_pairs = tl.arange(0, PAIRS)
    all_ids = _load_ids(local_ids_ptr, all_pairs, num_pairs, stride_n, stride_k, NUM_EXPERTS, TOP_K)
    experts = tl.arange(0, EXPERTS)
    if PAIRS < HISTOGRAM_LANES:
        counts = tl.sum((all_ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    else:
        counts = tl.histogram(all_ids, EXPERTS, mask=all_ids >= 0)
    ends, padded = _ends_of_segments(counts, BLOCK_M)
    if program == 0:
        _store_groups(expert_num_tokens_ptr, group_ends_ptr, experts, counts, ends, padded, NUM_EXPERTS)

    pairs = program * SHARE + tl.arange(0, SHARE)
    ids = _load_ids(local_ids_ptr, pairs, num_pairs, stride_n, stride_k, NUM_EXPERTS, TOP_K)
    earlier = (ids[:, None] == all_ids[None, :]) & (all_pairs[None, :] < pairs[:, None])
    slots = tl.gather(ends - padded, tl.maximum(ids, 0), 0) + tl.sum(earlier.to(tl.int32), axis=1)
    _store_slots(sorted_pairs_ptr, slot_of_pair_ptr, pairs, ids, slots, num_pairs, max_blocks * BLOCK_M)
    # There are at most as many blocks as pairs, so the programs' shares of pairs number all blocks as well.
    _store_blocks(
        sorted_pairs_ptr, block_expert_ptr, num_blocks_ptr, pairs, experts, counts, ends, padded, num_pairs, max_blocks,
        NUM_EXPERTS, BLOCK_M, SHARE,
    )  # fmt: skip


_launch_one = Launcher(_one_launch_kernel)
_launch_count = Launcher(_count_kernel)
_launch_scan = Launcher(_scan_kernel)
_launch_place = Launcher(_place_kernel)


def counting_sort(
    local_ids: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    sorted_pairs: torch.Tensor | None,
    slot_of_pair: torch.Tensor,
    block_expert: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    num_blocks: torch.Tensor,
    chunk_counts: torch.Tensor,
    group_ends: torch.Tensor | None = None,
) -> None:
    """Sort the pairs of `local_ids` by expert into buffers shaped by `tiling.counting_sort_shapes`.

    With block_expert and sorted_pairs of fewer blocks, pairs that find no room are skipped.

    local_ids: int32 [N, K], any strides; entries outside [0, num_experts) are skipped.
    block_m: power of two.
    sorted_pairs: int32 [blocks * block_m], receives pair indices n * K + k; padding is N * K. None: not wanted.
    slot_of_pair: int32 [N, K], receives each pair's place in sorted_pairs; -1 for skipped pairs.
    block_expert: int32 [blocks], receives each block's expert; -1 past the last segment.
    expert_num_tokens: int32 [num_experts], receives the pairs of each expert.
    num_blocks: int32 [1], receives the number of blocks in use.
    chunk_counts: int32 [chunks, num_experts], scratch.
    group_ends: int32 [num_experts], receives the slot past each expert's last pair; the start of its segment where it
        has none. None: not wanted.
    """
    if num_experts == 0 or local_ids.numel() == 0:
        slot_of_pair.fill_(-1)
        expert_num_tokens.zero_()
        num_blocks.zero_()
        if group_ends is not None:
            group_ends.zero_()
        return
    launches = counting_sort_launches(
        local_ids,
        num_experts,
        block_m,
        sorted_pairs=sorted_pairs,
        slot_of_pair=slot_of_pair,
        block_expert=block_expert,
        expert_num_tokens=expert_num_tokens,
        num_blocks=num_blocks,
        chunk_counts=chunk_counts,
        group_ends=group_ends,
    )
    for launch in launches:
        launch.run()


def counting_sort_launches(
    local_ids: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    sorted_pairs: torch.Tensor | None,
    slot_of_pair: torch.Tensor,
    block_expert: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    num_blocks: torch.Tensor,
    chunk_counts: torch.Tensor,
    group_ends: torch.Tensor | None = None,
) -> list[Launch]:
    """What `counting_sort` launches for at least one pair and one expert."""
    num_pairs, top_k = local_ids.numel(), local_ids.shape[1]
    max_blocks, pdl = block_expert.numel(), dependent_launch()
    stride_n, stride_k = local_ids.stride()
    if num_pairs <= ONE_LAUNCH_PAIRS and num_experts <= ONE_LAUNCH_EXPERTS:
        pairs_padded = max(next_power_of_2(num_pairs), 16)
        experts_padded = max(next_power_of_2(num_experts), 32 * _ONE_LAUNCH_WARPS)
        one = _launch_one.launch(
            (cdiv(num_pairs, _SHARE),),
            (
                local_ids, expert_num_tokens, sorted_pairs, slot_of_pair, block_expert, num_blocks,
                group_ends, num_pairs, max_blocks, stride_n, stride_k,
            ),
            (num_experts, top_k, block_m, pairs_padded, experts_padded, _SHARE, _HISTOGRAM_LANES, pdl),
            num_warps=_ONE_LAUNCH_WARPS,
            launch_pdl=pdl,
        )  # fmt: skip
        return [one]
    num_chunks = chunk_counts.shape[0]
    expert_tiles = cdiv(num_experts, _EXPERT_TILE)
    count = _launch_count.launch(
        (num_chunks, expert_tiles),
        (local_ids, chunk_counts, num_pairs, stride_n, stride_k),
        (num_experts, top_k, SORT_CHUNK, _EXPERT_TILE, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )
    scanned = num_chunks > _MAX_UNSCANNED_CHUNKS
    scan = _launch_scan.launch(
        (expert_tiles,),
        (chunk_counts, expert_num_tokens, num_chunks),
        (num_experts, _SCAN_TILE, _EXPERT_TILE, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )
    place = _launch_place.launch(
        (num_chunks + cdiv(max_blocks, _BLOCK_TILE),),
        (
            local_ids, chunk_counts, expert_num_tokens, sorted_pairs, slot_of_pair, block_expert, num_blocks,
            group_ends, num_pairs, num_chunks, max_blocks, stride_n, stride_k,
        ),
        (
            num_experts, top_k, block_m, scanned, next_power_of_2(num_experts), SORT_CHUNK, _CHUNK_TILE, _RANK_TILE,
            _BLOCK_TILE, pdl,
        ),
        num_warps=_PLACE_WARPS,
        launch_pdl=pdl,
    )  # fmt: skip
    return [count, scan, place] if scanned else [count, place]
