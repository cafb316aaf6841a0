"""The routing scan against loops over the tokens, and its forms against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.errors import ConfigError, DtypeError, ShapeError
from moe_plugin.kernels import dense_routing as module
from moe_plugin.kernels.dense_routing import (
    IDS_END,
    DenseRouting,
    check_num_experts,
    dense_routing,
    dense_routing_reference,
    map_ids,
    sparse_routing,
    to_dense_ids,
    to_routing_map,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNWRITTEN = -77
EVERYWHERE = (
    "rows_per_rank",
    "send_rows",
    "received_rows",
    "expert_counts",
    "segment_starts",
    "group_ends",
)
"""Results that are defined in every element."""


def by_hand(ids: list[list[list[int]]], rank: int, num_slots: int, alignment: int | None) -> dict[str, object]:
    """Everything that `dense_routing` finds; alignment None: the masked layout with 1000 rows per expert."""
    num_ranks, capacity = len(ids), len(ids[0])
    tokens = [row for of_rank in ids for row in of_rank]
    rows_per_rank, counts = [0] * num_ranks, [0] * (num_ranks * num_slots)
    rows, positions = [], []
    for row in tokens:
        named = {e for e in row if e >= 0}
        needed = {e // num_slots for e in named}
        rows.append([rows_per_rank[r] if r in needed else -1 for r in range(num_ranks)])
        positions.append([counts[e] if e >= 0 else -1 for e in row])
        for r in needed:
            rows_per_rank[r] += 1
        for e in named:
            counts[e] += 1
    starts = []
    for e, _ in enumerate(counts):
        slot = e % num_slots
        if alignment is None:
            starts.append(slot * 1000)
        else:
            before = counts[e - 1] if slot else 0
            starts.append(0 if not slot else starts[-1] + -(-before // alignment) * alignment)
    own = slice(rank * num_slots, (rank + 1) * num_slots)
    pairs = [zip(*token, strict=True) for token in zip(tokens, positions, strict=True)]
    places = [[starts[e] + position if e >= 0 else -1 for e, position in token] for token in pairs]
    pairs = [zip(*token, strict=True) for token in zip(tokens, places, strict=True)]
    own_places = [[place if e >= 0 and e // num_slots == rank else -1 for e, place in token] for token in pairs]
    return {
        "rows_per_rank": rows_per_rank,
        "send_rows": rows[rank * capacity : (rank + 1) * capacity],
        "received_rows": [row[rank] for row in rows],
        "expert_counts": [counts[r * num_slots : (r + 1) * num_slots] for r in range(num_ranks)],
        "segment_starts": [starts[r * num_slots : (r + 1) * num_slots] for r in range(num_ranks)],
        "group_ends": [s + c for s, c in zip(starts[own], counts[own], strict=True)],
        "send_places": places[rank * capacity : (rank + 1) * capacity],
        "places": own_places,
    }


def random_ids(
    num_ranks: int, capacity: int, top_k: int, num_slots: int, seed: int = 0, skew: str = "uniform"
) -> torch.Tensor:
    """int16 [R, C, K] with dropped pairs, experts twice in a token, and fewer tokens than room on some ranks."""
    generator = torch.Generator().manual_seed(seed)
    num_experts, shape = num_ranks * num_slots, (num_ranks, capacity, top_k)
    ids = torch.randint(-1, num_experts, shape, generator=generator)
    if skew == "one_expert":
        ids = torch.where(ids >= 0, num_experts - 1, -1)
    elif skew == "few":
        ids = torch.where(ids >= 0, ids % min(3, num_experts), -1)
    num_tokens = torch.randint(0, capacity + 1, (num_ranks, 1, 1), generator=generator)
    num_tokens[seed % num_ranks] = capacity
    return ids.where(torch.arange(capacity)[:, None] < num_tokens, -1).to(DEVICE, torch.int16)


def poisoned(ids: torch.Tensor, rank: int, num_slots: int, rows: bool = True, places: bool = True) -> DenseRouting:
    out = DenseRouting.empty(*ids.shape, rank, num_slots, ids.device, rows=rows, places=places)
    for name in module._RESULTS:
        if (tensor := getattr(out, name)) is not None:
            tensor.fill_(UNWRITTEN)
    return out


def scanned(ids: torch.Tensor, rank: int, num_slots: int, **options) -> DenseRouting:
    """What the kernel finds."""
    pytest.importorskip("triton")
    return dense_routing(ids, rank, num_slots, out=poisoned(ids, rank, num_slots), use_triton=True, **options)


def check_same(actual: DenseRouting, expected: DenseRouting, ids: torch.Tensor) -> None:
    for name in EVERYWHERE:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    # Positions are defined for pairs of this rank's tokens or experts, and left alone elsewhere.
    tokens = torch.arange(ids.shape[0] * ids.shape[1], device=ids.device).unsqueeze(1)
    flat = ids.flatten(0, 1)
    is_near = (flat >= 0) & ((tokens // ids.shape[1] == actual.rank) | (flat.int() // actual.num_slots == actual.rank))
    assert torch.equal(actual.positions[is_near], expected.positions[is_near])
    assert (actual.positions[~is_near] == UNWRITTEN).all()
    assert torch.equal(actual.places(ids), expected.places(ids))
    assert torch.equal(actual.send_places(ids), expected.send_places(ids))
    assert actual.finished.item() == 0


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
def test_docstring_example(use_triton: bool) -> None:
    if use_triton:
        pytest.importorskip("triton")
    ids = torch.tensor([[[0, 3], [1, 0]], [[1, -1], [3, 1]]], dtype=torch.int16, device=DEVICE)
    found = dense_routing(ids, 0, 2, alignment=4, use_triton=use_triton)
    assert found.rows_per_rank.tolist() == [4, 2]
    assert found.send_rows.tolist() == [[0, 0], [1, -1]]
    assert found.received_rows.tolist() == [0, 1, 2, 3]
    assert found.expert_counts.tolist() == [[2, 3], [0, 2]]
    assert found.segment_starts.tolist() == [[0, 4], [0, 0]]
    assert found.group_ends.tolist() == [2, 7]
    assert found.places(ids).tolist() == [[0, -1], [4, 1], [5, -1], [-1, 6]]
    assert found.send_places(ids).tolist() == [[0, 0], [4, 1]]
    assert found.positions.tolist()[:2] == [[0, 0], [0, 1]]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reference_against_loops(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 4), label="num_ranks")
    capacity = data.draw(st.integers(1, 6), label="capacity")
    top_k = data.draw(st.integers(1, 4), label="top_k")
    num_slots = data.draw(st.integers(1, 5), label="num_slots")
    rank = data.draw(st.integers(0, num_ranks - 1), label="rank")
    alignment = data.draw(st.sampled_from([None, 1, 3, 4, 128]), label="alignment")
    of_token = st.lists(st.integers(-1, num_ranks * num_slots - 1), min_size=top_k, max_size=top_k)
    of_rank = st.lists(of_token, min_size=capacity, max_size=capacity)
    ids = data.draw(st.lists(of_rank, min_size=num_ranks, max_size=num_ranks), label="ids")
    dense = torch.tensor(ids, dtype=torch.int16, device=DEVICE)
    layout = {"rows_per_expert": 1000} if alignment is None else {"alignment": alignment}
    found = dense_routing_reference(dense, rank, num_slots, **layout)
    expected = by_hand(ids, rank, num_slots, alignment)
    for name in EVERYWHERE:
        assert getattr(found, name).tolist() == expected[name], name
    assert found.places(dense).tolist() == expected["places"]
    assert found.send_places(dense).tolist() == expected["send_places"]


@settings(max_examples=20, deadline=None)
@given(
    num_ranks=st.integers(1, 4),
    capacity=st.sampled_from([1, 2, 5, 32, 43, 64, 128, 150]),
    top_k=st.integers(1, 9),
    num_slots=st.sampled_from([1, 2, 3, 5, 7]),
    skew=st.sampled_from(["uniform", "few", "one_expert"]),
    masked=st.booleans(),
    programs=st.sampled_from([1, 132]),
    seed=st.integers(0, 99),
)
def test_kernel_against_reference(
    num_ranks: int, capacity: int, top_k: int, num_slots: int, skew: str, masked: bool, programs: int, seed: int
) -> None:
    ids = random_ids(num_ranks, capacity, top_k, num_slots, seed, skew)
    rank = seed % num_ranks
    layout = {"rows_per_expert": num_ranks * capacity + 3} if masked else {"alignment": 4 + 124 * (seed % 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PROGRAMS", programs)
        actual = scanned(ids, rank, num_slots, **layout)
    check_same(actual, dense_routing_reference(ids, rank, num_slots, **layout), ids)


@pytest.mark.parametrize(
    ("capacity", "top_k", "block_words", "programs"),
    [(256, 8, 512, 1), (200, 8, 512, 132), (96, 4, 256, 1), (150, 3, 512, 8), (130, 6, 512, 1)],
)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_many_blocks(
    capacity: int, top_k: int, block_words: int, programs: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that begin with this rank's tokens, hold the end of them, or none, before and after; one to four parts."""
    monkeypatch.setattr(module, "_BLOCK_WORDS", block_words)
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    monkeypatch.setattr(module, "_MAX_WARPS", 1 << rank)
    ids = random_ids(3, capacity, top_k, 3, seed=rank)
    check_same(scanned(ids, rank, 3), dense_routing_reference(ids, rank, 3), ids)


def test_blocks_of_four_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WARPS", 4)
    ids = random_ids(2, 1024, 8, 4, skew="few")
    pytest.importorskip("triton")
    (launch,) = module.dense_routing_launches(ids, poisoned(ids, 1, 4))
    named = dict(zip(launch.launcher._constexpr_names, launch.constexprs, strict=True))
    assert (named["BLOCK"], named["PARTS"], named["WHOLE"], named["ALIGNED"]) == (2048, 4, True, False)
    check_same(scanned(ids, 1, 4), dense_routing_reference(ids, 1, 4), ids)


def test_more_tokens_than_16_bits_count() -> None:
    """One expert that all want, and 64-bit counters of two experts."""
    ids = torch.full((2, 40000, 2), 1, dtype=torch.int16, device=DEVICE)
    ids[:, ::3, 1] = 4
    ids[1, ::7, 0] = -1
    found = scanned(ids, 0, 3)
    check_same(found, dense_routing_reference(ids, 0, 3), ids)
    assert found.expert_counts[0, 1].item() > 1 << 16


def test_ids_that_are_no_finite_fp16_numbers() -> None:
    num_slots = IDS_END // 2
    ids = torch.tensor([[[0, 0x7BFF], [0x7C00, 0x7C01]], [[32765, -1], [32765, 0x7C01]]], dtype=torch.int16)
    ids = ids.to(DEVICE)
    pytest.importorskip("triton")
    expected = dense_routing_reference(ids, 1, num_slots)
    found = dense_routing(ids, 1, num_slots, places=False, use_triton=True)
    for name in EVERYWHERE[:3]:
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert expected.expert_counts[1, 32765 - num_slots].item() == 2


@pytest.mark.parametrize("stride", [5, 6, 8])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_rows_anywhere(stride: int, offset: int) -> None:
    """Five ids of a token in rows of `stride`, not aligned to anything; six where two share a word."""
    top_k = min(stride, 6)
    wide = random_ids(1, 2 + 2 * 40 * stride, 1, 8).flatten()
    ids = wide.as_strided((2, 40, top_k), (40 * stride, stride, 1), offset)
    check_same(scanned(ids, 0, 4), dense_routing_reference(ids, 0, 4), ids)


def test_strides_that_say_nothing() -> None:
    """Of dimensions of size 1."""
    wide = random_ids(3, 4, 8, 3)
    for ids in (wide[:, :1], wide[:1, :, ::3][..., :1], wide[:1, :1, ::8]):
        check_same(scanned(ids, 0, 9), dense_routing_reference(ids, 0, 9), ids)


def test_dense_and_sparse_agree() -> None:
    ids = random_ids(3, 20, 4, 5)
    routing_map = to_routing_map(ids, 5)
    sparse = sparse_routing(routing_map, 3, 2, 5)
    columns = map_ids(routing_map, 3)
    dense = dense_routing_reference(columns, 2, 5)
    for name in (*EVERYWHERE, "positions"):
        assert torch.equal(getattr(sparse, name), getattr(dense, name)), name
    by_pair = dense_routing_reference(ids, 2, 5)
    flat = ids.flatten(0, 1).long()
    gathered = sparse.places(columns).gather(1, flat.clamp(min=0))
    assert torch.equal(torch.where(flat >= 0, gathered, -1), by_pair.places(ids))
    assert torch.equal(map_ids(to_routing_map(columns, 5), 3), columns)


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize(("rows", "places"), [(True, True), (True, False), (False, True), (False, False)])
def test_only_what_is_asked_for(rows: bool, places: bool, use_triton: bool) -> None:
    if use_triton:
        pytest.importorskip("triton")
    ids = random_ids(2, 16, 2, 3)
    full = dense_routing_reference(ids, 1, 3)
    found = dense_routing(ids, 1, 3, rows=rows, places=places, use_triton=use_triton)
    into = poisoned(ids, 1, 3, rows, places)
    assert dense_routing(ids, 1, 3, rows=rows, places=places, out=into, use_triton=use_triton) is into
    for result in (found, into):
        for name in EVERYWHERE:
            is_wanted = rows if EVERYWHERE.index(name) < 3 else places
            value = getattr(result, name)
            assert torch.equal(value, getattr(full, name)) if is_wanted else value is None, name
        if places:
            assert torch.equal(result.places(ids), full.places(ids))


def test_one_launch_whose_results_repeat() -> None:
    pytest.importorskip("triton")
    ids = random_ids(4, 30, 6, 4)
    out = poisoned(ids, 3, 4)
    assert len(module.dense_routing_launches(ids, out)) == 1
    before = ids.clone()
    first = scanned(ids, 3, 4)
    for _ in range(2):
        dense_routing(ids, 3, 4, out=out, use_triton=True)
        check_same(out, first, ids)
    assert torch.equal(ids, before)


def test_no_tokens() -> None:
    ids = torch.empty(2, 0, 4, dtype=torch.int16, device=DEVICE)
    found = scanned(ids, 0, 3)
    assert found.rows_per_rank.tolist() == [0, 0]
    assert found.expert_counts.tolist() == found.segment_starts.tolist() == [[0] * 3] * 2
    assert found.group_ends.tolist() == [0] * 3


def test_dense_ids_of_a_placement() -> None:
    rank = torch.tensor([[0, 1], [-1, 2]], dtype=torch.int32)
    slot = torch.tensor([[3, 0], [-1, 1]], dtype=torch.int32)
    ids = to_dense_ids(rank, slot, 5)
    assert ids.dtype is torch.int16
    assert ids.tolist() == [[3, 5], [-1, 11]]


def test_more_experts_than_ids_are_refused() -> None:
    check_num_experts(7, IDS_END // 7)
    with pytest.raises(ConfigError, match=r"32768 physical experts.* 32767"):
        check_num_experts(4, 8192)
    with pytest.raises(ConfigError, match="32768"):
        dense_routing(torch.zeros(4, 1, 1, dtype=torch.int16), 0, 8192)


def test_wrong_ids_are_refused() -> None:
    ids = torch.zeros(2, 4, 2, dtype=torch.int16)
    with pytest.raises(DtypeError, match="int64"):
        dense_routing(ids.long(), 0, 2)
    with pytest.raises(ShapeError, match=r"\[ranks, tokens, top-k\]"):
        dense_routing(ids[0], 0, 2)
    with pytest.raises(ShapeError, match="constant stride"):
        dense_routing(torch.zeros(2, 8, 2, dtype=torch.int16)[:, :4], 0, 2)
    with pytest.raises(ShapeError, match="constant stride"):
        dense_routing(ids.transpose(1, 2), 0, 2)
    with pytest.raises(ShapeError, match="all 8 tokens"):
        dense_routing(ids, 0, 2, rows_per_expert=7)
    with pytest.raises(ShapeError, match=r"2\^31"):
        dense_routing(ids, 0, 2, rows_per_expert=1 << 30)
    with pytest.raises(ShapeError, match="for rank 1 of 2 slots, got 0 of 2"):
        dense_routing(ids, 0, 2, out=DenseRouting.empty(2, 4, 2, 1, 2, ids.device))
