"""How rows are cut into blocks: everything about the kernels' shapes that is known on the host, without Triton.

Examples:
    block_config(rows_per_expert=5, dtype=bf16, shared_memory=232448)  -> 16 x 128 x 64 tiles, 4 warps, 4 stages
    max_num_blocks(num_pairs=10, num_experts=4, block_m=16)            -> 4: at worst each expert opens a block
    max_num_blocks(num_pairs=10, num_experts=64, block_m=16)           -> 10: no more blocks than pairs
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moe_plugin.quantization import FP8_DTYPE, GROUP_SIZE

SORT_CHUNK = 256
"""Pairs that one program of the counting sort handles."""

_SHARED_MEMORY_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_LEAST_SHARED_MEMORY_KIB = 99
_WIDE_TILE_SHARED_MEMORY = 192 * 1024


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`; 1 for anything below."""
    return 1 << max(value - 1, 0).bit_length()


def shared_memory_bytes(sm: int | None) -> int:
    """Shared memory one thread block may use on compute capability `sm` (90 for 9.0); None, no GPU: the most."""
    if sm is None:
        return max(_SHARED_MEMORY_KIB.values()) * 1024
    return _SHARED_MEMORY_KIB.get(sm, _LEAST_SHARED_MEMORY_KIB) * 1024


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """Tile of one grouped-GEMM program.

    block_m: rows. block_n: weight rows read per tile; the first GEMM splits them into block_n / 2 gate and as many up
    rows. block_k: depth of one step. group_m: row blocks that share a band of weight tiles in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def shared_memory(self, dtype: torch.dtype) -> int:
        """Bytes of the operand tiles of all pipeline stages, an upper bound on what Triton takes."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * dtype.itemsize


def block_config(rows_per_expert: int, dtype: torch.dtype, shared_memory: int) -> BlockConfig:
    """Tile sizes of the first GEMM for an expected number of rows per expert and the dtype of its weights.

    Few rows: the GEMM reads weights and little else, so tiles are flat and several thread blocks share an SM. Many
    rows: tiles of 128 x 256 (128 x 128 before SM 90) reuse both operands. fp32 runs on the FMA units in full precision,
    with small tiles. fp8: a program quantizes groups of 128 columns, so there are 128 gate and 128 up rows of weights;
    products live beside the sums they are added to, which leaves registers for 64 rows.
    block_m depends on the first two arguments only, since it also sizes workspaces; stages are what fits.
    """
    if dtype is torch.float32:
        block_m, block_n, block_k, num_warps = min(max(next_power_of_2(rows_per_expert), 16), 64), 64, 32, 4
    elif dtype is FP8_DTYPE:
        block_m, block_n, block_k = min(max(next_power_of_2(rows_per_expert), 16), 64), 2 * GROUP_SIZE, GROUP_SIZE
        num_warps = 8 if block_m == 64 else 4
    else:
        block_m, block_n, block_k, num_warps = min(max(next_power_of_2(rows_per_expert), 16), 128), 128, 64, 4
        if block_m == 128:
            # Before wgmma the operands pass through registers, and accumulators of 256 columns leave none for them.
            block_n, num_warps = 256 if shared_memory >= _WIDE_TILE_SHARED_MEMORY else 128, 8
    num_stages = _num_stages(block_m, block_n, block_k, dtype, shared_memory)
    return BlockConfig(block_m, block_n, block_k, group_m=8, num_warps=num_warps, num_stages=num_stages)


def down_block_config(block: BlockConfig, dtype: torch.dtype, shared_memory: int) -> BlockConfig:
    """Tile sizes of the second GEMM beside a first one in tiles of `block`, with which it shares the sorted rows.

    The same, except that fp8 tiles of few rows need not be as wide as a gate tile and an up tile together.
    """
    if dtype is not FP8_DTYPE or block.block_m == 64:
        return block
    num_stages = _num_stages(block.block_m, GROUP_SIZE, block.block_k, dtype, shared_memory)
    return replace(block, block_n=GROUP_SIZE, num_stages=num_stages)


def _num_stages(block_m: int, block_n: int, block_k: int, dtype: torch.dtype, shared_memory: int) -> int:
    stage_bytes = (block_m + block_n) * block_k * dtype.itemsize
    return max(1, min(4, shared_memory // stage_bytes))


def max_num_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Blocks of `block_m` rows that hold `num_pairs` pairs sorted by expert, however they are routed."""
    if num_experts == 0:
        return 0
    padding = min(num_experts, num_pairs) * (block_m - 1)
    return min(num_pairs, cdiv(num_pairs + padding, block_m))


def counting_sort_shapes(num_rows: int, top_k: int, num_experts: int, block_m: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the int32 tensors that `counting_sort` writes, by the name of its argument."""
    num_pairs = num_rows * top_k
    max_blocks = max_num_blocks(num_pairs, num_experts, block_m)
    return {
        "sorted_pairs": (max_blocks * block_m,),
        "slot_of_pair": (num_rows, top_k),
        "block_expert": (max_blocks,),
        "expert_num_tokens": (num_experts,),
        "num_blocks": (1,),
        "chunk_counts": (cdiv(num_pairs, SORT_CHUNK), num_experts),
    }
