"""Masked slots against a Python loop over the rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.errors import ShapeError
from moe_plugin.kernels.masked_slots import masked_slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNWRITTEN = -7


def run(local_ids: torch.Tensor, num_experts: int, rows_per_expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots = torch.full(local_ids.shape, UNWRITTEN, dtype=torch.int32, device=DEVICE)
    # One count more than there are experts, to see that it is left alone.
    counts = torch.full((num_experts + 1,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    masked_slots(local_ids, rows_per_expert, slot_of_pair=slots, expert_num_tokens=counts[:num_experts])
    assert counts[num_experts].item() == UNWRITTEN
    return slots, counts[:num_experts]


def check(local_ids: torch.Tensor, num_experts: int, rows_per_expert: int) -> None:
    local_ids = local_ids.to(DEVICE, torch.int32)
    before = local_ids.clone()
    slots, counts = run(local_ids, num_experts, rows_per_expert)
    expected_counts = [0] * num_experts
    expected_slots = []
    for ids in local_ids.tolist():
        wanted = {expert for expert in ids if 0 <= expert < num_experts}
        slot_of = {expert: expert * rows_per_expert + expected_counts[expert] for expert in wanted}
        expected_slots.append([slot_of.get(expert, -1) for expert in ids])
        for expert in wanted:
            expected_counts[expert] += 1
    assert slots.tolist() == expected_slots
    assert counts.tolist() == expected_counts
    assert torch.equal(local_ids, before)


def random_ids(num_rows: int, top_k: int, num_experts: int) -> torch.Tensor:
    """In [-1, num_experts), duplicates included."""
    return torch.randint(-1, num_experts, (num_rows, top_k), generator=torch.Generator().manual_seed(0))


def test_docstring_example() -> None:
    ids = torch.tensor([[1, 0], [1, 1], [-1, 1]], dtype=torch.int32, device=DEVICE)
    slots, counts = run(ids, 2, 4)
    assert slots.tolist() == [[4, 0], [5, 5], [-1, 6]]
    assert counts.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_experts", "rows_per_expert"),
    [
        (1, 1, 1, 128),
        (7, 3, 5, 7),
        (31, 6, 4, 128),
        (32, 16, 9, 128),
        (33, 8, 64, 128),
        (255, 4, 3, 256),
        (256, 2, 7, 256),
        (257, 2, 7, 384),
        (700, 3, 2, 768),
    ],
)
def test_random_ids(num_rows: int, top_k: int, num_experts: int, rows_per_expert: int) -> None:
    check(random_ids(num_rows, top_k, num_experts), num_experts, rows_per_expert)


@pytest.mark.parametrize("expert", [0, 4])
def test_all_pairs_to_one_expert(expert: int) -> None:
    """The same expert in every k: as many rows as there are, and no slot past them."""
    check(torch.full((128, 3), expert), 5, 128)


def test_ids_out_of_range_are_skipped() -> None:
    check(torch.tensor([[-1, -5], [3, 2_000_000], [2**31 - 1, -(2**31)], [2, 1]]), 3, 4)


def test_strided_ids() -> None:
    wide = random_ids(50, 10, 4)
    check(wide[::2, 1:9:3], 4, 32)
    check(wide.T[:3], 4, 64)
    check(wide[:1, :1].expand(5, 3), 4, 8)


@pytest.mark.parametrize(("num_rows", "top_k"), [(0, 2), (3, 0), (0, 0)])
def test_no_pairs_zero_the_counts(num_rows: int, top_k: int) -> None:
    slots, counts = run(torch.empty(num_rows, top_k, dtype=torch.int32, device=DEVICE), 4, 128)
    assert counts.tolist() == [0, 0, 0, 0]
    assert slots.shape == (num_rows, top_k)


def test_without_experts_every_pair_is_skipped() -> None:
    slots, _ = run(torch.zeros(3, 2, dtype=torch.int32, device=DEVICE), 0, 128)
    assert (slots == -1).all()


def test_repeats_bitwise() -> None:
    ids = random_ids(300, 4, 6).to(DEVICE, torch.int32)
    first, second = run(ids, 6, 384), run(ids, 6, 384)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_slots_close_to_the_end_of_int32() -> None:
    slots = torch.full((2, 1), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    ids = torch.tensor([[2], [2]], dtype=torch.int32, device=DEVICE)
    rows_per_expert = (2**31 - 1) // 3
    counts = torch.empty(3, dtype=torch.int32, device=DEVICE)
    masked_slots(ids, rows_per_expert, slot_of_pair=slots, expert_num_tokens=counts)
    assert slots.tolist() == [[2 * rows_per_expert], [2 * rows_per_expert + 1]]
    with pytest.raises(ShapeError, match=r"2\^31"):
        run(ids, 4, 2**29)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ShapeError, match="rows_per_expert is 4; all 5 rows"):
        run(torch.zeros(5, 2, dtype=torch.int32, device=DEVICE), 3, 4)


def test_offsets_beyond_32_bits() -> None:
    try:
        storage = torch.empty(2**31 + 2, dtype=torch.int32, device=DEVICE)
    except RuntimeError:
        pytest.skip("not enough memory")
    ids = storage.as_strided((3, 2), (2**30, 1))
    ids[:, 0], ids[:, 1] = torch.tensor([0, 0, 1], dtype=torch.int32), -1
    slots, counts = run(ids, 2, 4)
    assert slots.tolist() == [[0, -1], [1, -1], [4, -1]]
    assert counts.tolist() == [2, 1]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="takes too long in the interpreter")
@pytest.mark.parametrize(("num_rows", "top_k", "num_experts"), [(256, 8, 256), (4096, 8, 256), (5000, 6, 160)])
def test_many_ids(num_rows: int, top_k: int, num_experts: int) -> None:
    check(random_ids(num_rows, top_k, num_experts), num_experts, num_rows)
