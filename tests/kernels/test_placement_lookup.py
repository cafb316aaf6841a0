"""The lookup kernel against its torch form and against a table read by hand."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.config import ExpertPlacement
from moe_plugin.kernels.placement_lookup import LookupTables, placement_lookup, uses_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLAG = 4

PLACEMENTS = {
    "identity": ExpertPlacement.linear(6, 1),
    "permuted": ExpertPlacement.from_table(6, [[3, 1, 0, 5, 4, 2]]),
    "two_ranks": ExpertPlacement.linear(5, 2),
    "replicas": ExpertPlacement.from_table(4, [[0, 1, 3], [1, 2], [3, 1]]),
}


def by_hand(
    placement: ExpertPlacement, topk_ids: torch.Tensor, first_token: int
) -> tuple[list[list[int]], list[list[int]]]:
    """rank and slot of every pair."""
    places = [
        [(rank, held.index(e)) for rank, held in enumerate(placement.experts_of_rank) if e in held]
        for e in range(placement.num_experts)
    ]
    found = [
        [places[e][(first_token + token) % len(places[e])] if 0 <= e < placement.num_experts else (-1, -1) for e in row]
        for token, row in enumerate(topk_ids.tolist())
    ]
    return [[rank for rank, _ in row] for row in found], [[slot for _, slot in row] for row in found]


def run(
    placement: ExpertPlacement,
    topk_ids: torch.Tensor,
    use_triton: bool,
    first_token: int = 0,
    with_rank: bool = True,
    topk_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, int, torch.Tensor | None]:
    shape = topk_ids.shape
    slot = torch.full(shape, 77, dtype=torch.int32, device=DEVICE)
    rank = torch.full_like(slot, 77) if with_rank else None
    weights = None if topk_weights is None else torch.full(shape, torch.nan, device=DEVICE)
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    placement_lookup(
        topk_ids,
        LookupTables.of(placement.tables(DEVICE)),
        slot,
        flags,
        FLAG,
        rank=rank,
        first_token=first_token,
        topk_weights=topk_weights,
        weights=weights,
        use_triton=use_triton,
    )
    return rank, slot, int(flags), weights


def random_ids(placement: ExpertPlacement, num_tokens: int, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (num_tokens, top_k)
    return torch.randint(-1, placement.num_experts, shape, generator=generator, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_every_pair_goes_where_the_table_says(name: str, num_tokens: int, use_triton: bool) -> None:
    placement = PLACEMENTS[name]
    topk_ids = random_ids(placement, num_tokens, 3, torch.int32)
    expected_rank, expected_slot = by_hand(placement, topk_ids, 5)
    rank, slot, flags, _ = run(placement, topk_ids, use_triton, first_token=5)
    assert rank is not None
    assert rank.tolist() == expected_rank
    assert slot.tolist() == expected_slot
    assert flags == 0
    slot_alone = run(placement, topk_ids, use_triton, first_token=5, with_rank=False)[1]
    assert torch.equal(slot_alone, slot)


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_id_dtypes_and_strides(dtype: torch.dtype, use_triton: bool) -> None:
    placement = PLACEMENTS["permuted"]
    plain = random_ids(placement, 9, 2, dtype)
    _, expected = by_hand(placement, plain, 0)
    wide = torch.full((9, 6), 99, dtype=dtype, device=DEVICE)
    wide[:, 1:5:3] = plain
    for topk_ids in (plain, wide[:, 1:5:3], plain.T.contiguous().T):
        before = topk_ids.clone()
        assert run(placement, topk_ids, use_triton)[1].tolist() == expected
        assert torch.equal(topk_ids, before)
    expanded = plain[:1].expand(9, 2)
    assert run(placement, expanded, use_triton)[1].tolist() == [expected[0]] * 9


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("wrong", [-2, 6, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("at", [0, 599])
def test_an_id_out_of_range_is_flagged_and_dropped(wrong: int, at: int, use_triton: bool) -> None:
    placement = PLACEMENTS["identity"]
    topk_ids = random_ids(placement, 300, 2, torch.int64)
    topk_ids.view(-1)[at] = wrong
    rank, slot, flags, _ = run(placement, topk_ids, use_triton)
    assert rank is not None
    assert flags == FLAG
    assert slot.view(-1)[at] == rank.view(-1)[at] == -1
    assert slot.tolist() == by_hand(placement, topk_ids, 0)[1]


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_become_fp32_in_the_same_call(dtype: torch.dtype, use_triton: bool) -> None:
    placement = PLACEMENTS["identity"]
    topk_ids = random_ids(placement, 5, 2, torch.int32)
    weights = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).T
    converted = run(placement, topk_ids, use_triton, topk_weights=weights)[3]
    assert converted is not None
    assert torch.equal(converted, weights.float())


def merged_by_hand(ids: torch.Tensor, weights: torch.Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and weights of every token with each expert once."""
    rows_of_ids, rows_of_weights = [], []
    for row, of_row in zip(ids.tolist(), weights.tolist(), strict=True):
        first = [k for k, expert in enumerate(row) if expert >= 0 and expert not in row[:k]]
        rows_of_ids.append([expert if k in first else -1 for k, expert in enumerate(row)])
        total = [sum(w for other, w in zip(row, of_row, strict=True) if other == expert) for expert in row]
        rows_of_weights.append([total[k] if k in first else 0.0 for k in range(len(row))])
    return rows_of_ids, rows_of_weights


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
def test_an_expert_named_again_is_merged_with_the_first(use_triton: bool) -> None:
    topk_ids = random_ids(PLACEMENTS["identity"], 200, 4, torch.int64)
    topk_ids[:4] = torch.tensor([[2, 0, 2, 2], [-1, -1, 3, -1], [1, 1, 1, 1], [5, 9, 9, 5]])
    # Quarters add up without rounding.
    weights = torch.randint(-8, 8, (200, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE) / 4
    expected_ids, expected_weights = merged_by_hand(topk_ids, weights)
    expected_ids[3] = [5, -1, -1, -1]
    expected_weights[3][1] = 0.0
    slot = torch.full((200, 4), 77, dtype=torch.int64, device=DEVICE)
    out, flags = torch.full((200, 4), torch.nan, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    placement_lookup(
        topk_ids,
        LookupTables.of(PLACEMENTS["identity"].tables(DEVICE)),
        slot,
        flags,
        FLAG,
        topk_weights=weights.to(torch.bfloat16).T.contiguous().T,
        weights=out,
        merge_duplicates=True,
        use_triton=use_triton,
    )
    assert slot.tolist() == expected_ids
    assert out.tolist() == expected_weights
    assert int(flags) == FLAG


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
def test_no_tokens(use_triton: bool) -> None:
    topk_ids = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    _, slot, flags, _ = run(PLACEMENTS["identity"], topk_ids, use_triton)
    assert slot.shape == (0, 2)
    assert flags == 0


def test_only_the_linear_placement_of_one_rank_is_the_identity() -> None:
    found = {name: LookupTables.of(placement.tables(DEVICE)).is_identity for name, placement in PLACEMENTS.items()}
    assert found == {"identity": True, "permuted": False, "two_ranks": False, "replicas": False}


def test_triton_is_for_gpus() -> None:
    assert not uses_triton(torch.device("cpu"))


@pytest.mark.gpu
def test_the_flag_can_lie_in_pinned_memory_of_the_host() -> None:
    flags = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    tables = LookupTables.of(PLACEMENTS["identity"].tables(DEVICE))
    topk_ids = torch.zeros(4, 2, dtype=torch.int32, device=DEVICE)
    slot = torch.empty_like(topk_ids)
    for wrong, expected in ((0, 0), (9, FLAG)):
        topk_ids[3, 1] = wrong
        for _ in range(2):  # an ordinary launch, then a direct one
            flags.zero_()
            placement_lookup(topk_ids, tables, slot, flags, FLAG)
            torch.cuda.synchronize()
            assert int(flags) == expected
