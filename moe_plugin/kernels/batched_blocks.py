"""The row blocks of activations [experts, rows_per_expert, ...] that hold rows, listed one after another.

Example, rows_per_expert = 32, block_x = 16, counts of three experts [20, 0, 5]:

    block_expert [0, 0, 2, -1, -1, -1]    block_row [0, 16, 64, -1, -1, -1]    num_blocks [3]    row_ends [20, 32, 69]

A GEMM that walks over this list loads no weights of experts without rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_plugin.kernels.dependent_launch import dependent_launch, wait_for_the_kernel_before
from moe_plugin.kernels.launcher import Launch, Launcher, running
from moe_plugin.kernels.tiling import cdiv, next_power_of_2

_TILE = 64


@triton.jit(do_not_specialize=["rows_per_expert", "max_blocks"])
def _batched_blocks_kernel(
    expert_num_tokens_ptr, block_expert_ptr, block_row_ptr, row_ends_ptr, num_blocks_ptr, rows_per_expert, max_blocks,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_X: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every program adds up the blocks of all experts and lists TILE of them. EXPERTS: a power of two."""
    wait_for_the_kernel_before(PDL)
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(expert_num_tokens_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    counts = tl.minimum(counts, rows_per_expert)
    blocks_of = (counts + BLOCK_X - 1) // BLOCK_X
    ends = tl.cumsum(blocks_of, axis=0)
    total = tl.max(ends, axis=0)
    blocks = tl.program_id(0) * TILE + tl.arange(0, TILE)
    passed = (ends[None, :] <= blocks[:, None]) & (experts < NUM_EXPERTS)[None, :]
    expert = tl.sum(passed.to(tl.int32), axis=1)
    first = tl.max(tl.where(passed, ends[None, :], 0), axis=1)
    used = blocks < total
    row = expert * rows_per_expert + (blocks - first) * BLOCK_X
    in_range = blocks < max_blocks
    tl.store(block_expert_ptr + blocks, tl.where(used, expert, -1), mask=in_range)
    tl.store(block_row_ptr + blocks, tl.where(used, row, -1), mask=in_range)
    tl.store(num_blocks_ptr + blocks, tl.zeros_like(blocks) + total, mask=blocks == 0)
    if tl.program_id(0) == 0:
        tl.store(row_ends_ptr + experts, experts * rows_per_expert + counts, mask=experts < NUM_EXPERTS)


_launch = Launcher(_batched_blocks_kernel)


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
    num_experts, pdl = expert_num_tokens.numel(), dependent_launch()
    launch = _launch.launch(
        (cdiv(block_expert.numel(), _TILE),),
        (expert_num_tokens, block_expert, block_row, row_ends, num_blocks, rows_per_expert, block_expert.numel()),
        (num_experts, next_power_of_2(num_experts), block_x, _TILE, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )
    return [launch]


batched_blocks = running(batched_blocks_launches)
