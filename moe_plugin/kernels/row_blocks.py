"""The row blocks that hold rows, listed one after another, of activations sorted by expert in either of two ways.

    batched_blocks      [experts, rows_per_expert, ...], the first expert_num_tokens[e] rows of each expert in use
    contiguous_blocks   [slots, ...], segments of experts that start at multiples of `alignment` and end at group_ends

Example, batched, rows_per_expert = 32, block_x = 16, counts of three experts [20, 0, 5]:

    block_expert [0, 0, 2, -1, -1, -1]    block_row [0, 16, 64, -1, -1, -1]    num_blocks [3]    row_ends [20, 32, 69]

The same rows contiguous, alignment = 32 and 64 slots; an expert without rows ends where it starts:

    group_ends [20, 32, 37]    block_expert [0, 0, 2, -1]    block_row [0, 16, 32, -1]    num_blocks [3]

A GEMM that walks over this list loads no weights of experts without rows, and its work follows the rows in use rather
than the size of a buffer made for the worst case. Kernels that need no list find such rows themselves, in tiles that
each belong to one expert: the device functions `tiles_of_groups` and `nth_tile`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_plugin.errors import ShapeError
from moe_plugin.kernels.dependent_launch import dependent_launch, wait_for_the_kernel_before
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.masked_slots import nth_row
from moe_plugin.kernels.tiling import cdiv, next_power_of_2

_TILE = 64


@triton.jit
def _start_of_group(group_ends_ptr, groups, has_one_before, ALIGNMENT: tl.constexpr):
    """First slot of a group's segment: where the group before ends, rounded up."""
    end_before = tl.load(group_ends_ptr + groups - 1, mask=has_one_before, other=0)
    return (end_before + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@triton.jit
def tiles_of_groups(
    group_ends_ptr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """For each of GROUPS, NUM_GROUPS or more: the tiles of TILE slots that hold rows up to its last one.

    The last number counts them all. TILE divides ALIGNMENT.
    """
    groups = tl.arange(0, GROUPS)
    in_range = groups < NUM_GROUPS
    ends = tl.load(group_ends_ptr + groups, mask=in_range, other=0)
    starts = _start_of_group(group_ends_ptr, groups, in_range & (groups > 0), ALIGNMENT)
    return tl.cumsum((ends - starts + TILE - 1) // TILE, axis=0)


@triton.jit
def nth_tile(group_ends_ptr, tile_ends, index, ALIGNMENT: tl.constexpr, TILE: tl.constexpr):
    """First slot of tile `index` of those in use, and the slot past its last row."""
    group, place = nth_row(tile_ends, index)
    first = _start_of_group(group_ends_ptr, group, group > 0, ALIGNMENT) + place * TILE
    return first, tl.minimum(tl.load(group_ends_ptr + group), first + TILE)


@triton.jit(do_not_specialize=["rows_per_expert", "max_blocks"])
def _row_blocks_kernel(
    expert_num_tokens_ptr, group_ends_ptr, block_expert_ptr, block_row_ptr, row_ends_ptr, num_blocks_ptr,
    rows_per_expert, max_blocks, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_X: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every program adds up the blocks of all experts and lists TILE of them. EXPERTS: a power of two."""
    wait_for_the_kernel_before(PDL)
    experts = tl.arange(0, EXPERTS)
    if group_ends_ptr is not None:
        ends = tiles_of_groups(group_ends_ptr, NUM_EXPERTS, EXPERTS, ALIGNMENT, BLOCK_X)
    else:
        counts = tl.load(expert_num_tokens_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
        counts = tl.minimum(counts, rows_per_expert)
        ends = tl.cumsum((counts + BLOCK_X - 1) // BLOCK_X, axis=0)
        if tl.program_id(0) == 0:
            tl.store(row_ends_ptr + experts, experts * rows_per_expert + counts, mask=experts < NUM_EXPERTS)
    total = tl.max(ends, axis=0)
    blocks = tl.program_id(0) * TILE + tl.arange(0, TILE)
    used = blocks < total
    passed = (ends[None, :] <= blocks[:, None]) & (experts < NUM_EXPERTS)[None, :]
    expert = tl.sum(passed.to(tl.int32), axis=1)
    in_range = blocks < max_blocks
    tl.store(block_expert_ptr + blocks, tl.where(used, expert, -1), mask=in_range)
    if block_row_ptr is not None:
        first = tl.max(tl.where(passed, ends[None, :], 0), axis=1)
        if group_ends_ptr is not None:
            start = _start_of_group(group_ends_ptr, expert, used & (expert > 0), ALIGNMENT)
        else:
            start = expert * rows_per_expert
        tl.store(block_row_ptr + blocks, tl.where(used, start + (blocks - first) * BLOCK_X, -1), mask=in_range)
    tl.store(num_blocks_ptr + blocks, tl.zeros_like(blocks) + tl.minimum(total, max_blocks), mask=blocks == 0)


_launch = Launcher(_row_blocks_kernel)


def batched_blocks_launches(
    expert_num_tokens: torch.Tensor,
    rows_per_expert: int,
    block_x: int,
    *,
    block_expert: torch.Tensor,
    block_row: torch.Tensor,
    row_ends: torch.Tensor,
    num_blocks: torch.Tensor,
) -> list[Launch]:
    """The launch that lists the blocks of `block_x` rows in use.

    expert_num_tokens: int32 [E], E >= 1; more than rows_per_expert count as that many.
    block_expert, block_row: int32 [E * ceil(rows_per_expert / block_x)], receive the expert and the first row, counted
    over all experts, of each block; -1 past the last one. row_ends: int32 [E], receives the row past each expert's last
    one. num_blocks: int32 [1], receives how many blocks there are.
    """
    return _launches(
        expert_num_tokens, None, block_expert, block_row, row_ends, num_blocks, rows_per_expert, 1, block_x
    )


def contiguous_blocks_launches(
    group_ends: torch.Tensor,
    alignment: int,
    block_x: int,
    *,
    block_expert: torch.Tensor,
    block_row: torch.Tensor | None,
    num_blocks: torch.Tensor,
) -> list[Launch]:
    """The launch that lists the blocks of `block_x` slots in use.

    group_ends: int32 [E], E >= 1: the slot past each expert's last row. A segment starts at the end before it, rounded
    up to `alignment`, and that is also the end of an expert without rows.
    block_expert, block_row: int32 [slots / block_x], receive the expert and the first slot of each block; -1 past the
    last one. block_row may be None where block_x is `alignment`: block b then starts at slot b * block_x.
    num_blocks: int32 [1], receives how many blocks there are.
    Raises ShapeError when blocks would cross segments.
    """
    if alignment % block_x:
        raise ShapeError(f"blocks of {block_x} slots cross segments that start at multiples of {alignment}")
    return _launches(None, group_ends, block_expert, block_row, None, num_blocks, 0, alignment, block_x)


batched_blocks = running(batched_blocks_launches)
contiguous_blocks = running(contiguous_blocks_launches)


def _launches(
    expert_num_tokens: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    block_expert: torch.Tensor,
    block_row: torch.Tensor | None,
    row_ends: torch.Tensor | None,
    num_blocks: torch.Tensor,
    rows_per_expert: int,
    alignment: int,
    block_x: int,
) -> list[Launch]:
    of_experts = group_ends if expert_num_tokens is None else expert_num_tokens
    assert of_experts is not None
    num_experts, max_blocks, pdl = of_experts.numel(), block_expert.numel(), dependent_launch()
    launch = _launch.launch(
        (max(cdiv(max_blocks, _TILE), 1),),
        (
            expert_num_tokens, group_ends, block_expert, block_row, row_ends, num_blocks,
            rows_per_expert, max_blocks,
        ),
        (num_experts, next_power_of_2(num_experts), alignment, block_x, _TILE, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip
    return [launch]
