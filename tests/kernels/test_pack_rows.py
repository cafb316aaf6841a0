"""Packed rows by content: what each must hold, read off the token it carries, and what is read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_plugin.config import ExpertPlacement
from moe_plugin.kernels.pack_rows import PackedViews, pack_tokens, triton, unpack_rows
from moe_plugin.kernels.placement_lookup import LookupTables
from moe_plugin.kernels.send_plan import SendPlan, send_plan
from moe_plugin.quantization import FP8_DTYPE, quantize_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = [
    pytest.param(True, id="triton", marks=pytest.mark.skipif(triton is None, reason="triton is not installed")),
    pytest.param(False, id="torch"),
]
each_form = pytest.mark.parametrize("use_triton", FORMS)
UNTOUCHED = 0x7B7B7B7B


def empty_views(num_rows: int, hidden_size: int, top_k: int, dtype: torch.dtype, num_scales: int = 0) -> PackedViews:
    words = torch.full((num_rows, 2 * top_k + 2 + num_scales), UNTOUCHED, dtype=torch.int32, device=DEVICE)
    row_bytes = (hidden_size + 8) * dtype.itemsize
    hidden = torch.full((num_rows, row_bytes), 0xFF, dtype=torch.uint8, device=DEVICE).view(dtype)[:, :hidden_size]
    slots, weights, flags, scales = words.split([top_k, top_k, 1, num_scales + 1], dim=1)
    scales = scales[:, :num_scales].view(torch.float32) if num_scales else None
    return PackedViews(hidden, slots, weights.view(torch.float32), flags, scales)


def random_call(num_tokens: int, top_k: int, num_ranks: int) -> tuple[torch.Tensor, SendPlan]:
    """Weights fp32 [T, K], and a plan for ids of which some are dropped. Flags are 5."""
    generator = torch.Generator().manual_seed(num_tokens + top_k)
    placement = ExpertPlacement.linear(2 * num_ranks + 1, num_ranks)
    topk_ids = torch.randint(-1, placement.num_experts, (num_tokens, top_k), generator=generator).to(DEVICE)
    weights = torch.rand(num_tokens, top_k, generator=generator).to(DEVICE)
    sizes = ((num_tokens, top_k), (num_tokens, top_k), (num_tokens, num_ranks), (num_ranks + 1,))
    plan = SendPlan(*(torch.empty(size, dtype=torch.int32, device=DEVICE) for size in sizes))
    send_plan(topk_ids, LookupTables.of(placement.tables(DEVICE)), plan, 1, flags=5, use_triton=False)
    return weights, plan


def places(plan: SendPlan, ranks: list[int], capacity: int | None) -> dict[int, tuple[int, int]]:
    """{row: (token, rank)}"""
    found, first_row = {}, 0
    for rank in ranks:
        tokens = [token for token, row in enumerate(plan.position[:, rank].tolist()) if row >= 0][:capacity]
        found |= {first_row + index: (token, rank) for index, token in enumerate(tokens)}
        first_row += len(tokens) if capacity is None else capacity
    return found


def check_rows(
    out: PackedViews, plan: SendPlan, weights: torch.Tensor | None, found: dict[int, tuple[int, int]], flags: int
) -> None:
    """All but hidden states and scales."""
    for row, (token, rank) in found.items():
        slots = torch.where(plan.rank[token] == rank, plan.slot[token], -1)
        assert torch.equal(out.slots[row], slots.int())
        assert out.flags[row] == flags
        if weights is not None:
            assert torch.equal(out.weights[row], weights[token].float())


SENDS: dict[str, dict[str, Any]] = {
    "to_all": {},
    "to_peers": {"own_rank": 1},
    "to_self": {"own_rank": 1, "to_self": True},
}


@each_form
@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("capacity", [None, 9, 3], ids=["exact", "roomy", "too_small"])
@pytest.mark.parametrize(
    ("hidden_size", "top_k", "dtype"), [(64, 2, torch.float32), (2049, 3, torch.bfloat16), (7, 1, torch.float16)]
)
def test_rows_hold_their_tokens(
    hidden_size: int, top_k: int, dtype: torch.dtype, capacity: int | None, send: str, use_triton: bool
) -> None:
    num_tokens, num_ranks = 9, 3
    weights, plan = random_call(num_tokens, top_k, num_ranks)
    weights = weights.to(dtype).T.contiguous().T
    activations = torch.randn(num_tokens, 2 * hidden_size, device=DEVICE).to(dtype)[:, ::2]
    ranks = {"to_all": [0, 1, 2], "to_peers": [0, 2], "to_self": [1]}[send]
    found = places(plan, ranks, capacity)
    num_rows = len(found) if capacity is None else capacity * len(ranks)
    out = empty_views(num_rows, hidden_size, top_k, dtype)
    row_index = torch.full((num_tokens, num_ranks), 99, dtype=torch.int32, device=DEVICE)
    options = SENDS[send] | {"capacity": capacity, "overflow": 8}

    pack_tokens(activations, weights, plan, out, row_index, **options, use_triton=use_triton)

    overflows = capacity is not None and bool((plan.counts[:-1] > capacity).any())
    assert overflows == (capacity == 3)
    check_rows(out, plan, weights, found, 5 | 8 * overflows)
    for row, (token, _) in found.items():
        assert torch.equal(out.hidden[row], activations[token])
    unused = [row for row in range(num_rows) if row not in found]
    assert (out.slots[unused] == -1).all()
    assert (out.flags[unused] == (5 | 8 * overflows)).all()
    expected = torch.full_like(row_index, 99)
    expected[:, ranks] = -1
    for row, (token, rank) in found.items():
        expected[token, rank] = row
    assert torch.equal(row_index, expected)


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_rows_past_those_that_are_sent_keep_what_they_held() -> None:
    weights, plan = random_call(9, 2, 3)
    out = empty_views(30, 40, 2, torch.float32)
    row_index = torch.empty(9, 3, dtype=torch.int32, device=DEVICE)
    pack_tokens(torch.ones(9, 40, device=DEVICE), weights, plan, out, row_index, use_triton=True)
    num_rows = int(plan.counts[:-1].sum())
    assert not out.hidden[:num_rows].isnan().any()
    assert out.hidden[num_rows:].isnan().all()
    assert (out.slots[num_rows:] == UNTOUCHED).all()
    assert (out.flags[num_rows:] == UNTOUCHED).all()


@each_form
@pytest.mark.parametrize("group_size", [128, None], ids=["group", "row"])
@pytest.mark.parametrize(("hidden_size", "dtype"), [(64, torch.float32), (1200, torch.bfloat16)])
@pytest.mark.parametrize("quantized_before", [False, True])
def test_fp8_rows_are_those_of_quantization(
    hidden_size: int, dtype: torch.dtype, group_size: int | None, quantized_before: bool, use_triton: bool
) -> None:
    weights, plan = random_call(6, 2, 3)
    activations = torch.randn(6, hidden_size, device=DEVICE).to(dtype)
    activations[1], activations[2, 3], activations[3, 5] = 0, torch.nan, 5000
    values, scales = quantize_rows(activations, group_size)
    found = places(plan, [0, 1, 2], None)
    out = empty_views(len(found), hidden_size, 2, FP8_DTYPE, scales.shape[1])
    row_index = torch.empty(6, 3, dtype=torch.int32, device=DEVICE)
    given = (values, scales.T.contiguous().T) if quantized_before else (activations, None)
    pack_tokens(given[0], weights, plan, out, row_index, scales=given[1], use_triton=use_triton)
    check_rows(out, plan, weights, found, 5)
    tokens = [token for token, _ in found.values()]
    assert out.scales is not None
    for actual, expected in ((out.scales, scales), (out.hidden.float(), values.float())):
        torch.testing.assert_close(actual, expected[tokens], rtol=0, atol=0, equal_nan=True)


@each_form
def test_docstring_example(use_triton: bool) -> None:
    def of(*rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=DEVICE)

    plan = SendPlan(of([0, 2], [2, -1]), of([5, 3], [4, -1]), of([0, -1, 0], [-1, -1, 1]), of([1, 0, 2, 0])[0])
    hidden = torch.tensor([[7.0], [8.0]], device=DEVICE)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]], device=DEVICE)
    row_index = torch.empty(2, 3, dtype=torch.int32, device=DEVICE)
    out = empty_views(3, 1, 2, torch.float32)
    pack_tokens(hidden, weights, plan, out, row_index, use_triton=use_triton)
    assert out.hidden.tolist() == [[7], [7], [8]]
    assert out.slots.tolist() == [[5, -1], [-1, 3], [4, -1]]
    assert out.weights.tolist() == [[0.25, 0.75], [0.25, 0.75], [1, 0]]
    assert row_index.tolist() == [[0, -1, 1], [-1, -1, 2]]
    out = empty_views(6, 1, 2, torch.float32)
    pack_tokens(hidden, weights, plan, out, row_index, capacity=2, use_triton=use_triton)
    assert out.slots.tolist() == [[5, -1], *[[-1, -1]] * 3, [-1, 3], [4, -1]]
    assert row_index.tolist() == [[0, -1, 4], [-1, -1, 5]]


@each_form
def test_no_tokens_and_no_rows(use_triton: bool) -> None:
    _, plan = random_call(0, 2, 3)
    nothing = torch.empty(0, 16, device=DEVICE)
    for capacity, num_rows in ((None, 0), (2, 6)):
        out = empty_views(num_rows, 16, 2, torch.float32)
        pack_tokens(nothing, None, plan, out, plan.position, capacity=capacity, use_triton=use_triton)
        assert (out.slots == -1).all()
        assert (out.flags == 5).all()
    local_ids = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    unpack_rows(empty_views(0, 16, 2, torch.float32), 0, local_ids, None, use_triton=use_triton)


@each_form
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("num_rows", "top_k"), [(1, 1), (45, 3), (64, 8)])
def test_slots_and_weights_are_read_back(num_rows: int, top_k: int, weighted: bool, use_triton: bool) -> None:
    packed = empty_views(num_rows + 2, 16, top_k, torch.float32)
    packed.slots.copy_(torch.randint(-1, 9, packed.slots.shape, device=DEVICE))
    packed.weights.copy_(torch.rand(packed.weights.shape, device=DEVICE))
    local_ids = torch.full((num_rows + 1, top_k), 77, dtype=torch.int32, device=DEVICE)
    weights = torch.full(local_ids.shape, 77.0, device=DEVICE)
    unpack_rows(packed, num_rows, local_ids, weights if weighted else None, use_triton=use_triton)
    assert torch.equal(local_ids[:num_rows], packed.slots[:num_rows])
    assert torch.equal(weights[:num_rows], packed.weights[:num_rows]) == weighted
    assert (local_ids[num_rows] == 77).all()
    assert (weights[num_rows] == 77).all()


@each_form
def test_flags_of_all_sources_reach_their_words(use_triton: bool) -> None:
    packed = empty_views(12, 16, 2, torch.float32)
    packed.flags.copy_(torch.tensor([0, 9, 9, 4, 9, 9, 6, 9, 9, 0, 9, 9])[:, None])
    local_ids = torch.empty(12, 2, dtype=torch.int32, device=DEVICE)
    words = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    words[0] = 1
    unpack_rows(packed, 12, local_ids, None, words, sources=4, use_triton=use_triton)
    assert words.tolist() == [1, 2, 4, 0, 0, 0, 0, 0]
