"""Slots of (row, k) pairs in the masked layout: every expert has rows_per_expert slots and fills them from the first.

    slot_of_pair[n, k] = e * rows_per_expert + rows before n that want e, where e = local_ids[n, k]

Two k of one row with the same expert share a slot, so that no expert gets more slots than there are rows: with
rows_per_expert at least that, nothing can overflow. The order is that of the rows, the same in every run.

Example, N = 3 rows, K = 2, two experts, rows_per_expert = 4:

    local_ids          [[1, 0], [1, 1], [-1, 1]]
    slot_of_pair       [[4, 0], [5, 5], [-1, 6]]
    expert_num_tokens  [1, 3]

One launch, with a program for each expert that walks over all ids: few rows take one step, and each step loads the ids
of the next one. All sizes follow from the shapes: no host sync, capturable in a CUDA graph.

`ends_of_experts` and `nth_row` are the way back for kernels that read such rows: the n-th row in use of all experts,
so that a grid of any size shares them evenly however they are routed.

    expert_num_tokens [1, 0, 3]    ends [1, 1, 4]    row 0: expert 0, place 0; rows 1 to 3: expert 2, places 0 to 2
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_plugin.errors import ShapeError
from moe_plugin.kernels.dependent_launch import dependent_launch, wait_for_the_kernel_before
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.tiling import next_power_of_2

_FEW_ROWS, _FEW_ROWS_WARPS = 32, 1
_CHUNK, _CHUNK_WARPS = 256, 4
_SLOTS_END = 1 << 31


@triton.jit
def _load_ids(
    local_ids_ptr, first_row, num_rows, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[CHUNK, LANES] ids from a row on; NUM_EXPERTS for those to be skipped, -1 where there is no pair."""
    rows = first_row + tl.arange(0, CHUNK)
    lanes = tl.arange(0, LANES)
    is_pair = (rows < num_rows)[:, None] & (lanes < TOP_K)[None, :]
    offsets = rows.to(tl.int64)[:, None] * STRIDE_N + lanes[None, :] * STRIDE_K
    ids = tl.load(local_ids_ptr + offsets, mask=is_pair, other=-1)
    ids = tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS)
    return tl.where(is_pair, ids, -1)


@triton.jit(do_not_specialize=["num_rows", "rows_per_expert"])
def _masked_slots_kernel(
    local_ids_ptr, slot_of_pair_ptr, expert_num_tokens_ptr, num_rows, rows_per_expert,
    STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    LANES: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e fills in the pairs of expert e, the last one those that are skipped. LANES: TOP_K or more."""
    wait_for_the_kernel_before(PDL)
    expert = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    count = 0
    first_row = 0
    ids = _load_ids(local_ids_ptr, 0, num_rows, STRIDE_N, STRIDE_K, NUM_EXPERTS, TOP_K, LANES, CHUNK)
    while first_row < num_rows:
        next_ids = _load_ids(
            local_ids_ptr, first_row + CHUNK, num_rows, STRIDE_N, STRIDE_K, NUM_EXPERTS, TOP_K, LANES, CHUNK
        )
        wanted = ids == expert
        is_wanted = tl.max(wanted.to(tl.int32), axis=1)
        slots = expert * rows_per_expert + count + tl.cumsum(is_wanted, axis=0) - is_wanted
        slots = tl.where(expert < NUM_EXPERTS, slots, -1)
        rows = (first_row + tl.arange(0, CHUNK)).to(tl.int64)
        slot_ptrs = slot_of_pair_ptr + rows[:, None] * TOP_K + lanes[None, :]
        tl.store(slot_ptrs, tl.broadcast_to(slots[:, None], [CHUNK, LANES]), mask=wanted)
        count += tl.sum(is_wanted, axis=0)
        ids = next_ids
        first_row += CHUNK
    if expert < NUM_EXPERTS:
        tl.store(expert_num_tokens_ptr + expert, count)


@triton.jit
def ends_of_experts(expert_num_tokens_ptr, rows_per_expert, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr):
    """For each of EXPERTS, NUM_EXPERTS or more: the rows in use up to its last one. The last end counts them all."""
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(expert_num_tokens_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    return tl.cumsum(tl.minimum(counts, rows_per_expert), axis=0)


@triton.jit
def nth_row(ends, index):
    """Expert and place of row `index` of those in use, from 0 to ends[-1] - 1."""
    passed = ends <= index
    return tl.sum(passed.to(tl.int32), axis=0), index - tl.max(tl.where(passed, ends, 0), axis=0)


_launch_kernel = Launcher(_masked_slots_kernel)


def masked_slots_launches(
    local_ids: torch.Tensor,
    rows_per_expert: int,
    *,
    slot_of_pair: torch.Tensor,
    expert_num_tokens: torch.Tensor,
) -> list[Launch]:
    """The launches that find each pair's slot in the masked layout.

    local_ids: int32 [N, K], any strides; entries outside [0, E) are skipped.
    slot_of_pair: int32 [N, K], contiguous, receives the slots; -1 for skipped pairs.
    expert_num_tokens: int32 [E], receives the rows that want each expert.
    Raises ShapeError when an expert may get more rows than rows_per_expert, or slots do not fit int32.
    """
    (num_rows, top_k), num_experts = local_ids.shape, expert_num_tokens.numel()
    if rows_per_expert < num_rows:
        raise ShapeError(f"rows_per_expert is {rows_per_expert}; all {num_rows} rows may want one expert")
    if num_experts * rows_per_expert >= _SLOTS_END:
        raise ShapeError(f"{num_experts} experts of {rows_per_expert} slots: there must be less than 2^31 slots")
    chunk, num_warps = (_FEW_ROWS, _FEW_ROWS_WARPS) if num_rows <= _FEW_ROWS else (_CHUNK, _CHUNK_WARPS)
    pdl = dependent_launch()
    launch = _launch_kernel.launch(
        (num_experts + 1,),
        (local_ids, slot_of_pair, expert_num_tokens, num_rows, rows_per_expert),
        # Strides as constants, of which Triton sees how many ids one load may take.
        (*local_ids.stride(), num_experts, top_k, next_power_of_2(top_k), chunk, pdl),
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    return [launch]


masked_slots = running(masked_slots_launches)
