"""The counting sort against a Python loop over the pairs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import moe_plugin.kernels.counting_sort as counting_sort_module
from moe_plugin.kernels.counting_sort import ONE_LAUNCH_EXPERTS, ONE_LAUNCH_PAIRS, counting_sort
from moe_plugin.kernels.tiling import SORT_CHUNK, counting_sort_shapes, max_num_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNWRITTEN = -7


def run_sort(local_ids: torch.Tensor, num_experts: int, block_m: int) -> dict[str, torch.Tensor]:
    shapes = counting_sort_shapes(*local_ids.shape, num_experts, block_m)
    shapes["group_ends"] = (num_experts,)
    buffers = {name: torch.full(shape, UNWRITTEN, dtype=torch.int32, device=DEVICE) for name, shape in shapes.items()}
    counting_sort(local_ids, num_experts, block_m, **buffers)
    return buffers


def expected_sort(local_ids: torch.Tensor, num_experts: int, block_m: int) -> tuple[list[int], list[int], list[int]]:
    """sorted_pairs, block_expert and expert_num_tokens as lists."""
    flat = local_ids.flatten().tolist()
    num_blocks = max_num_blocks(len(flat), num_experts, block_m)
    sorted_pairs: list[int] = []
    block_expert: list[int] = []
    counts = []
    for expert in range(num_experts):
        segment = [pair for pair, wanted in enumerate(flat) if wanted == expert]
        counts.append(len(segment))
        segment += [len(flat)] * (-len(segment) % block_m)
        sorted_pairs += segment
        block_expert += [expert] * (len(segment) // block_m)
    assert len(block_expert) <= num_blocks
    sorted_pairs += [len(flat)] * (num_blocks * block_m - len(sorted_pairs))
    return sorted_pairs, block_expert + [-1] * (num_blocks - len(block_expert)), counts


def ends_of_groups(counts: list[int], block_m: int) -> list[int]:
    ends, start = [], 0
    for count in counts:
        ends.append(start + count)
        start += -(-count // block_m) * block_m
    return ends


def check_sort(local_ids: torch.Tensor, num_experts: int, block_m: int) -> None:
    local_ids = local_ids.to(DEVICE)
    before = local_ids.clone()
    buffers = run_sort(local_ids, num_experts, block_m)
    sorted_pairs, block_expert, counts = expected_sort(local_ids, num_experts, block_m)
    slot_of = {pair: slot for slot, pair in enumerate(sorted_pairs)}
    slot_of_pair = [slot_of.get(pair, -1) for pair in range(local_ids.numel())]
    assert buffers["sorted_pairs"].tolist() == sorted_pairs
    assert buffers["block_expert"].tolist() == block_expert
    assert buffers["expert_num_tokens"].tolist() == counts
    assert buffers["slot_of_pair"].flatten().tolist() == slot_of_pair
    assert buffers["num_blocks"].tolist() == [len(block_expert) - block_expert.count(-1)]
    assert buffers["group_ends"].tolist() == ends_of_groups(counts, block_m)
    assert torch.equal(local_ids, before)


def random_ids(num_rows: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """int32 [num_rows, top_k] in [-1, num_experts), duplicates included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_experts, (num_rows, top_k), generator=generator, dtype=torch.int32)


def test_docstring_example() -> None:
    buffers = run_sort(torch.tensor([[1, 0], [1, -1], [1, 0]], dtype=torch.int32, device=DEVICE), 2, 2)
    assert buffers["sorted_pairs"].tolist() == [1, 5, 0, 2, 4, 6, 6, 6]
    assert buffers["block_expert"].tolist() == [0, 1, 1, -1]
    assert buffers["slot_of_pair"].tolist() == [[2, 0], [3, -1], [4, 1]]
    assert buffers["expert_num_tokens"].tolist() == [2, 3]
    assert buffers["num_blocks"].tolist() == [3]
    assert buffers["group_ends"].tolist() == [2, 5]


@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_experts", "block_m"),
    [
        (1, 1, 1, 16),
        (5, 2, 3, 16),
        (37, 3, 7, 16),
        (64, 8, 64, 16),
        (129, 6, 65, 32),
        (SORT_CHUNK, 1, 4, 128),
        (SORT_CHUNK + 1, 2, 5, 64),
        (40, 8, 1024, 16),
    ],
)
def test_random_ids(num_rows: int, top_k: int, num_experts: int, block_m: int) -> None:
    check_sort(random_ids(num_rows, top_k, num_experts), num_experts, block_m)


@pytest.mark.parametrize("most_unscanned", [128, 34, 33])
def test_many_chunks(most_unscanned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting_sort_module, "_MAX_UNSCANNED_CHUNKS", most_unscanned)
    check_sort(random_ids(34 * SORT_CHUNK // 2, 2, 3), 3, 128)


@pytest.mark.parametrize("num_rows", [20, 600])
def test_slots_without_what_is_optional(num_rows: int) -> None:
    ids = random_ids(num_rows, 3, 5).to(DEVICE)
    buffers = run_sort(ids, 5, 16)
    left_out = ("sorted_pairs", "group_ends")
    outputs = {name: torch.full_like(buffer, -7) for name, buffer in buffers.items() if name not in left_out}
    counting_sort(ids, 5, 16, sorted_pairs=None, **outputs)
    for name in ("slot_of_pair", "block_expert", "expert_num_tokens", "num_blocks"):
        assert torch.equal(outputs[name], buffers[name]), name


@pytest.mark.parametrize("num_rows", [20, 600])
def test_pairs_without_room_are_skipped(num_rows: int) -> None:
    """Buffers made for counts that were wrong: nothing is written past their end."""
    ids = random_ids(num_rows, 3, 5).to(DEVICE)
    whole = run_sort(ids, 5, 16)
    blocks = int(whole["num_blocks"]) - 1
    outputs = {name: torch.full_like(buffer, -7) for name, buffer in whole.items()}
    short = {"sorted_pairs": outputs["sorted_pairs"][: 16 * blocks], "block_expert": outputs["block_expert"][:blocks]}
    counting_sort(ids, 5, 16, **(outputs | short))
    slots = whole["slot_of_pair"]
    assert torch.equal(outputs["slot_of_pair"], torch.where(slots < 16 * blocks, slots, -1))
    assert int(outputs["num_blocks"]) == blocks
    for name, kept in short.items():
        assert torch.equal(kept, whole[name][: len(kept)])
        assert set(outputs[name][len(kept) :].tolist()) == {-7}


@pytest.mark.parametrize("expert", [0, 3, 6])
@pytest.mark.parametrize("num_rows", [127, 128, 129])
def test_all_pairs_to_one_expert(expert: int, num_rows: int) -> None:
    check_sort(torch.full((num_rows, 2), expert, dtype=torch.int32), 7, 64)


def test_counts_0_1_128_129_with_empty_experts_at_both_ends() -> None:
    ids = [1] * 128 + [3] + [4] * 129 + [-1] * 5
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    check_sort(torch.tensor(ids, dtype=torch.int32)[order, None], 6, 128)


def test_every_pair_skipped() -> None:
    check_sort(torch.full((9, 3), -1, dtype=torch.int32), 4, 16)


def test_ids_beyond_the_last_expert_are_skipped() -> None:
    ids = random_ids(20, 2, 4)
    buffers = run_sort(torch.where(ids == 2, 2_000_000, ids).to(DEVICE), 4, 16)
    expected = run_sort(torch.where(ids == 2, -1, ids).to(DEVICE), 4, 16)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


def test_strided_ids() -> None:
    wide = random_ids(23, 7, 5)
    check_sort(wide[:, 1:4], 5, 16)
    check_sort(wide.T, 5, 16)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_no_pairs(shape: tuple[int, int]) -> None:
    buffers = run_sort(torch.empty(shape, dtype=torch.int32, device=DEVICE), 5, 16)
    assert buffers["expert_num_tokens"].tolist() == [0] * 5
    assert buffers["num_blocks"].tolist() == [0]
    assert buffers["sorted_pairs"].numel() == buffers["block_expert"].numel() == 0


def test_no_experts() -> None:
    buffers = run_sort(torch.full((4, 2), -1, dtype=torch.int32, device=DEVICE), 0, 16)
    assert (buffers.pop("slot_of_pair") == -1).all()
    assert buffers.pop("num_blocks").tolist() == [0]
    assert all(buffer.numel() == 0 for buffer in buffers.values())


@pytest.mark.parametrize("num_pairs", [ONE_LAUNCH_PAIRS - 1, ONE_LAUNCH_PAIRS, ONE_LAUNCH_PAIRS + 1])
def test_pairs_around_the_one_launch_limit(num_pairs: int) -> None:
    check_sort(random_ids(num_pairs, 1, 9), 9, 16)


@pytest.mark.parametrize("num_experts", [ONE_LAUNCH_EXPERTS - 1, ONE_LAUNCH_EXPERTS, ONE_LAUNCH_EXPERTS + 1])
def test_experts_around_the_one_launch_limit(num_experts: int) -> None:
    check_sort(random_ids(11, 2, num_experts), num_experts, 16)


@pytest.mark.parametrize("num_rows", [1, 33, 140])
def test_both_forms_give_the_same_bits(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(num_rows, 6, 21).to(DEVICE)
    one_launch = run_sort(ids, 21, 16)
    monkeypatch.setattr(counting_sort_module, "ONE_LAUNCH_PAIRS", 0)
    three_launches = run_sort(ids, 21, 16)
    assert (one_launch.pop("chunk_counts") == UNWRITTEN).all()
    assert (three_launches.pop("chunk_counts") != UNWRITTEN).all()
    for name, buffer in one_launch.items():
        assert torch.equal(buffer, three_launches[name]), name


@pytest.mark.parametrize("num_rows", [40, 300])
def test_repeats_bitwise(num_rows: int) -> None:
    ids = random_ids(num_rows, 4, 33).to(DEVICE)
    first, second = run_sort(ids, 33, 16), run_sort(ids, 33, 16)
    for name, buffer in first.items():
        assert torch.equal(buffer, second[name]), name


@pytest.mark.parametrize("block_m", [1, 2, 16])
@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("num_pairs", [0, 1, 2, 7, 33])
def test_block_bound_holds_for_the_worst_routing(num_pairs: int, num_experts: int, block_m: int) -> None:
    spread = [max(0, min(1, num_pairs - expert)) for expert in range(num_experts)]
    spread[0] += num_pairs - sum(spread)
    blocks = sum(-(-count // block_m) for count in spread)
    assert blocks <= max_num_blocks(num_pairs, num_experts, block_m) <= num_pairs


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a million pairs take too long in the interpreter")
@pytest.mark.parametrize("num_experts", [8, 256, 1024])
def test_a_million_pairs(num_experts: int) -> None:
    ids = random_ids(131_072, 8, num_experts).to(DEVICE)
    buffers = run_sort(ids, num_experts, 128)
    flat = ids.flatten()
    keys = torch.where(flat < 0, num_experts, flat)
    order = torch.sort(keys, stable=True).indices[: int((flat >= 0).sum())].int()
    kept = buffers["sorted_pairs"][buffers["sorted_pairs"] < flat.numel()]
    assert torch.equal(kept, order)
    slots = buffers["slot_of_pair"].flatten()
    assert torch.equal(slots >= 0, flat >= 0)
    assert torch.equal(buffers["sorted_pairs"][slots[slots >= 0].long()], (flat >= 0).nonzero().flatten().int())
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts].int()
    assert torch.equal(buffers["expert_num_tokens"], counts)
    blocks = (counts + 127) // 128
    experts = torch.arange(num_experts, device=DEVICE, dtype=torch.int32).repeat_interleave(blocks)
    assert torch.equal(buffers["block_expert"][: experts.numel()], experts)
    assert buffers["num_blocks"].tolist() == [experts.numel()]
    assert (buffers["block_expert"][experts.numel() :] == -1).all()
