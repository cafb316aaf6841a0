"""send_plan, Triton and torch form, against a plan made token by token."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.config import ExpertPlacement
from moe_plugin.kernels.placement_lookup import LookupTables
from moe_plugin.kernels.send_plan import SendPlan, send_plan, triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = [
    pytest.param(True, id="triton", marks=pytest.mark.skipif(triton is None, reason="triton is not installed")),
    pytest.param(False, id="torch"),
]
each_form = pytest.mark.parametrize("use_triton", FORMS)
WRONG_ID = 1
PLACEMENTS = {
    "one_rank": ExpertPlacement.linear(6, 1),
    "uneven": ExpertPlacement.linear(11, 3),
    "replicas": ExpertPlacement.from_table(4, [[0, 1, 3], [1, 2], [3, 1]]),
}


def run(
    placement: ExpertPlacement, topk_ids: torch.Tensor, use_triton: bool, flags: int = 0, first_token: int = 0
) -> SendPlan:
    shape, num_ranks = topk_ids.shape, placement.num_ranks
    sizes = (shape, shape, (shape[0], num_ranks), (num_ranks + 1,))
    plan = SendPlan(*(torch.full(size, 77, dtype=torch.int32, device=DEVICE) for size in sizes))
    tables = LookupTables.of(placement.tables(DEVICE))
    send_plan(topk_ids, tables, plan, WRONG_ID, flags=flags, first_token=first_token, use_triton=use_triton)
    return plan


def by_hand(placement: ExpertPlacement, topk_ids: torch.Tensor, flags: int = 0, first_token: int = 0) -> list[list]:
    """The four tensors of a plan as lists."""
    ranks, slots, positions, counts = [], [], [], [0] * placement.num_ranks
    for token, ids in enumerate(topk_ids.tolist(), start=first_token):
        pairs = []
        for expert in ids:
            places = [(r, held.index(expert)) for r, held in enumerate(placement.experts_of_rank) if expert in held]
            pairs.append(places[token % len(places)] if places else (-1, -1))
            if not places and expert != -1:
                flags |= WRONG_ID
        ranks.append([rank for rank, _ in pairs])
        slots.append([slot for _, slot in pairs])
        needed = [rank in ranks[-1] for rank in range(placement.num_ranks)]
        positions.append([count if need else -1 for count, need in zip(counts, needed, strict=True)])
        counts = [count + need for count, need in zip(counts, needed, strict=True)]
    return [ranks, slots, positions, [*counts, flags]]


def as_lists(plan: SendPlan) -> list[list]:
    return [plan.rank.tolist(), plan.slot.tolist(), plan.position.tolist(), plan.counts.tolist()]


@each_form
def test_docstring_example(use_triton: bool) -> None:
    topk_ids = torch.tensor([[0, 2], [3, 2], [1, -1]], device=DEVICE)
    plan = run(ExpertPlacement.linear(4, 2), topk_ids, use_triton)
    assert plan.rank.tolist() == [[0, 1], [1, 1], [0, -1]]
    assert plan.slot.tolist() == [[0, 0], [1, 0], [1, -1]]
    assert plan.position.tolist() == [[0, 0], [-1, 1], [1, -1]]
    assert plan.counts.tolist() == [2, 2, 0]
    topk_ids[1, 0] = 4
    assert run(ExpertPlacement.linear(4, 2), topk_ids, use_triton).counts.tolist() == [2, 2, 1]


@each_form
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (7, 3), (128, 6), (129, 2), (5000, 2), (2100, 9)])
def test_random_ids(use_triton: bool, name: str, num_tokens: int, top_k: int) -> None:
    placement = PLACEMENTS[name]
    generator = torch.Generator().manual_seed(num_tokens)
    topk_ids = torch.randint(-1, placement.num_experts, (num_tokens, top_k), generator=generator).to(DEVICE)
    topk_ids[::5] = -1
    assert as_lists(run(placement, topk_ids, use_triton, 4, 3)) == by_hand(placement, topk_ids, 4, 3)


@each_form
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_id_dtypes_and_strides(use_triton: bool, dtype: torch.dtype) -> None:
    placement = PLACEMENTS["uneven"]
    wide = torch.full((9, 6), 99, dtype=dtype, device=DEVICE)
    topk_ids = wide[:, 1:5:3]
    topk_ids.copy_(torch.arange(18, device=DEVICE).view(9, 2) % 11)
    assert as_lists(run(placement, topk_ids, use_triton)) == by_hand(placement, topk_ids)
    expanded = topk_ids[:1].expand(9, 2)
    assert as_lists(run(placement, expanded, use_triton)) == by_hand(placement, expanded)


@each_form
@pytest.mark.parametrize("wrong", [-2, 11, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("at", [0, 5999])
def test_an_id_out_of_range_is_flagged_and_dropped(use_triton: bool, wrong: int, at: int) -> None:
    placement = PLACEMENTS["uneven"]
    topk_ids = torch.arange(6000, device=DEVICE).view(3000, 2) % 11
    topk_ids.view(-1)[at] = wrong
    plan = run(placement, topk_ids, use_triton)
    assert plan.counts[-1] == WRONG_ID
    topk_ids.view(-1)[at] = -1
    assert as_lists(plan)[:3] == by_hand(placement, topk_ids)[:3]


@each_form
def test_int16_ids_of_more_experts_than_they_can_name(use_triton: bool) -> None:
    topk_ids = torch.tensor([[32767, -1], [0, -2]], dtype=torch.int16, device=DEVICE)
    plan = run(ExpertPlacement.linear(40000, 2), topk_ids, use_triton)
    assert plan.rank.tolist() == [[1, -1], [0, -1]]
    assert plan.slot.tolist() == [[12767, -1], [0, -1]]
    assert plan.counts.tolist() == [1, 1, WRONG_ID]


@each_form
def test_no_tokens(use_triton: bool) -> None:
    topk_ids = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    assert run(PLACEMENTS["uneven"], topk_ids, use_triton, flags=4).counts.tolist() == [0, 0, 0, 4]
