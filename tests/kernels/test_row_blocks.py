"""The lists of row blocks against loops over experts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.errors import ShapeError
from moe_plugin.kernels.row_blocks import batched_blocks, contiguous_blocks
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


def listed_segments(
    group_ends: list[int], slots: int, alignment: int, block_x: int, with_rows: bool = True
) -> tuple[list[int], list[int], int]:
    """block_expert, block_row and num_blocks as the kernel writes them; memory past them stays as it was."""
    blocks = slots // block_x
    buffers = torch.full((3, blocks + 1), CANARY, dtype=torch.int32, device=DEVICE)
    contiguous_blocks(
        torch.tensor(group_ends, dtype=torch.int32, device=DEVICE),
        alignment,
        block_x,
        block_expert=buffers[0, :blocks],
        block_row=buffers[1, :blocks] if with_rows else None,
        num_blocks=buffers[2, :1],
    )
    assert buffers[:2, blocks].tolist() == [CANARY, CANARY]
    assert set(buffers[2, 1:].tolist()) == {CANARY}
    return buffers[0, :blocks].tolist(), buffers[1, :blocks].tolist(), int(buffers[2, 0])


def test_docstring_example_of_segments() -> None:
    assert listed_segments([20, 32, 37], 64, 32, 16) == ([0, 0, 2, -1], [0, 16, 32, -1], 3)


@pytest.mark.parametrize("block_x", [8, 64, 128])
@pytest.mark.parametrize(
    "counts", [[0, 0, 0], [128], [0, 1, 129, 0, 64, 0], [127, 128, 129] * 3, [3, 0] * 100], ids=lambda c: str(c[:6])
)
def test_segments_against_a_loop(counts: list[int], block_x: int) -> None:
    start, group_ends, expected = 0, [], []
    for expert, count in enumerate(counts):
        group_ends.append(start + count)
        expected += [(expert, row) for row in range(start, start + count, block_x)]
        start = cdiv(start + count, 128) * 128
    # Room for the worst case is larger than what any routing takes.
    slots = start + 3 * 128
    block_expert, block_row, num_blocks = listed_segments(group_ends, slots, 128, block_x)
    assert num_blocks == len(expected)
    assert list(zip(block_expert, block_row, strict=True))[:num_blocks] == expected
    assert set(block_expert[num_blocks:]) | set(block_row[num_blocks:]) <= {-1}
    # Blocks as large as the alignment lie one after another, so their rows need no list.
    assert block_x < 128 or block_row[:num_blocks] == list(range(0, 128 * num_blocks, 128))
    without = listed_segments(group_ends, slots, 128, block_x, with_rows=False)
    assert without == (block_expert, [CANARY] * len(block_row), num_blocks)


def test_blocks_that_cross_segments_are_refused() -> None:
    with pytest.raises(ShapeError, match="64"):
        listed_segments([3], 32, 32, 64)
