"""The list of row blocks against a loop over experts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.kernels.batched_blocks import batched_blocks
from moe_plugin.kernels.tiling import cdiv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CANARY = 7


def listed(counts: list[int], rows_per_expert: int, block_x: int) -> tuple[list[int], list[int], int, list[int]]:
    """block_expert, block_row, num_blocks and row_ends as the kernel writes them; memory past them stays as it was."""
    blocks = len(counts) * cdiv(rows_per_expert, block_x)
    buffers = torch.full((3, blocks + 1), CANARY, dtype=torch.int32, device=DEVICE)
    row_ends = torch.full((len(counts) + 1,), CANARY, dtype=torch.int32, device=DEVICE)
    batched_blocks(
        torch.tensor(counts, dtype=torch.int32, device=DEVICE),
        rows_per_expert,
        block_x,
        block_expert=buffers[0, :blocks],
        block_row=buffers[1, :blocks],
        row_ends=row_ends[:-1],
        num_blocks=buffers[2, :1],
    )
    assert buffers[:2, blocks].tolist() == [CANARY, CANARY]
    assert set(buffers[2, 1:].tolist()) == {CANARY}
    assert row_ends[-1] == CANARY
    return buffers[0, :blocks].tolist(), buffers[1, :blocks].tolist(), int(buffers[2, 0]), row_ends[:-1].tolist()


def test_docstring_example() -> None:
    assert listed([20, 0, 5], 32, 16) == ([0, 0, 2, -1, -1, -1], [0, 16, 64, -1, -1, -1], 3, [20, 32, 69])


@pytest.mark.parametrize(
    ("counts", "rows_per_expert", "block_x"),
    [
        ([0, 0, 0], 16, 8),
        ([16], 16, 16),
        ([0, 1, 8, 9, 0, 64, 0], 64, 8),
        ([128] * 5, 128, 64),
        ([3, 0] * 100, 64, 8),
        ([1000, 2], 24, 8),
    ],
)
def test_against_a_loop(counts: list[int], rows_per_expert: int, block_x: int) -> None:
    expected = [
        (expert, expert * rows_per_expert + start)
        for expert, count in enumerate(counts)
        for start in range(0, min(count, rows_per_expert), block_x)
    ]
    block_expert, block_row, num_blocks, row_ends = listed(counts, rows_per_expert, block_x)
    assert row_ends == [e * rows_per_expert + min(count, rows_per_expert) for e, count in enumerate(counts)]
    assert num_blocks == len(expected)
    assert list(zip(block_expert, block_row, strict=True))[:num_blocks] == expected
    assert set(block_expert[num_blocks:]) | set(block_row[num_blocks:]) <= {-1}
