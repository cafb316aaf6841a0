"""Tiles of the Hopper kernels: what fits, what is chosen untuned, and which layers they take. Works without Triton.

Examples, bf16:
    hopper_tiles(rows_per_expert=4, element_size=2)    -> narrow, 16 rows x (64 + 64) weight rows, 10 stages
    hopper_tiles(rows_per_expert=512, element_size=2)  -> wide, 128 rows x (128 + 128) weight rows, 4 stages
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe_plugin.environment import ASSUMED_VERSION
from moe_plugin.verdict import Gate, Verdict, dtype_name

if TYPE_CHECKING:
    from moe_plugin.config import MoEConfig
    from moe_plugin.environment import Environment

SHARED_MEMORY = 227 * 1024
"""Bytes one thread block may use on SM 90."""
WIDE_ROWS = 128
NARROW_ROWS = (8, 16, 32, 64)
STAGE_DEPTH_BYTES = 128
"""Depth of one stage: 64 elements of 16 bits, or 128 of fp8, the width of the swizzle and of a scale group."""
_MAX_STAGES = 10
_RESERVE = 1024
LEAST_SCALES = 32
"""A box of fewer row scales would put the next stage's box on an address that TMA does not take."""


@dataclass(frozen=True, slots=True)
class HopperTile:
    """Tile of one program of one GEMM.

    wide: rows are the first operand of the tensor cores, else weights are.
    block_x: rows; 128 when wide, else 8 to 64.
    half_w: weight rows of each of the two halves, 64 or 128.
    group: row blocks that share a band of weights in L2.
    """

    wide: bool
    block_x: int
    half_w: int
    group: int = 8

    @property
    def num_warps(self) -> int:
        """Warps of one consumer."""
        return 4 if self.wide else self.half_w // 16

    @property
    def out_rows(self) -> int:
        """Rows of one box that is stored."""
        return 64 if self.wide else self.block_x

    @property
    def out_columns(self) -> int:
        """Columns of one box that is stored."""
        return 64 if self.wide else self.half_w

    @property
    def max_registers(self) -> int | None:
        """Per thread at launch, where three warp groups share the register file."""
        return 168 if self.wide or self.half_w == 128 else None

    def stages(self, out_element_size: int, has_group_scales: bool) -> int:
        """Depth of the ring of shared-memory stages: what fits beside the output boxes."""
        boxes = 4 if self.wide else 1
        out_bytes = boxes * self.out_rows * self.out_columns * out_element_size
        scale_bytes = 4 * max(self.block_x, LEAST_SCALES) if has_group_scales else 0
        stage_bytes = (self.block_x + 2 * self.half_w) * STAGE_DEPTH_BYTES + scale_bytes
        return min(_MAX_STAGES, (SHARED_MEMORY - _RESERVE - out_bytes) // stage_bytes)


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """Tiles of the two GEMMs of a call. They share `wide` and `block_x`, by which the rows are sorted."""

    gate_up: HopperTile
    down: HopperTile

    @property
    def block_x(self) -> int:
        return self.gate_up.block_x


def hopper_tiles(rows_per_expert: int, element_size: int) -> HopperTiles:
    """Tiles for an expected number of rows per expert and operands of `element_size` bytes, untuned.

    Few rows: weights stream through the tensor cores as first operand, and blocks of rows are about twice as large as
    the expectation, so that most experts need one; tiles of few weight rows spread over more SMs. Many rows: 128 x 256
    tiles, 128 x 128 for fp8, whose partial sums take as many registers again. Drawn from what `moe-plugin tune` found
    for four models on an H200.
    """
    if rows_per_expert >= 96:
        tile = HopperTile(wide=True, block_x=WIDE_ROWS, half_w=128 if element_size == 2 else 64)
        return HopperTiles(tile, tile)
    block_x = next((rows for limit, rows in ((2, 8), (8, 16), (16, 32)) if rows_per_expert <= limit), 64)
    # A scale group of fp8 is 128 columns, which one consumer finishes.
    gate_up = HopperTile(wide=False, block_x=block_x, half_w=64 if element_size == 2 and block_x <= 16 else 128)
    return HopperTiles(gate_up, replace(gate_up, half_w=64))


def batched_hopper_tiles(rows_per_expert: int, max_tokens: int, element_size: int) -> HopperTiles | None:
    """Tiles for [experts, max_tokens, ...] rows, of which an expert is expected to have `rows_per_expert`, untuned.

    Blocks divide `max_tokens`, since whole boxes are stored and one must not reach into the next expert's rows. None
    where no block does.
    """
    tiles = hopper_tiles(min(rows_per_expert, max_tokens), element_size)
    if max_tokens % tiles.block_x == 0:
        return tiles
    block_x = next((rows for rows in reversed(NARROW_ROWS) if max_tokens % rows == 0), None)
    if block_x is None:
        return None
    narrow = hopper_tiles(min(block_x // 2, rows_per_expert), element_size)
    return HopperTiles(replace(narrow.gate_up, block_x=block_x), replace(narrow.down, block_x=block_x))


def hopper_verdict(config: MoEConfig, environment: Environment) -> Verdict:
    """Whether the Hopper kernels can run this layer on this machine; where not, the portable ones do."""
    sm = environment.sm
    triton = environment.package("triton")
    element_size = config.weight_dtype.itemsize
    step = 16 // element_size
    sizes = (config.hidden_size, config.local_intermediate_size)
    return Verdict.of(
        Gate("sm", sm == 90, "no CUDA device" if sm is None else f"SM {sm}", "SM 90: wgmma exists nowhere else"),
        Gate(
            "triton",
            triton.usable and _is_recent(triton.version),
            triton.describe(),
            "Triton 3.6 or newer, whose Gluon has warp specialization for Hopper",
        ),
        Gate("dtype", element_size in (1, 2), dtype_name(config.dtype), "16-bit or fp8 operands"),
        Gate(
            "sizes",
            all(size % step == 0 for size in sizes),
            f"H {sizes[0]}, I {sizes[1]}",
            f"multiples of {step}: TMA moves rows of whole 16 bytes",
        ),
    )


def _is_recent(version: str | None) -> bool:
    """Whether a version of Triton is at least 3.6; one that cannot be read is not."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return version == ASSUMED_VERSION or (found is not None and (int(found[1]), int(found[2])) >= (3, 6))


def weights_take_tma(weights: torch.Tensor) -> bool:
    """Whether [E, N, D] weights are one matrix of E * N rows for TMA: 16-byte aligned, rows and experts dense."""
    experts, rows, depth = weights.shape
    dense = weights.stride(1) == depth and (experts <= 1 or weights.stride(0) == rows * depth)
    return dense and weights.stride(2) == 1 and weights.data_ptr() % 16 == 0
