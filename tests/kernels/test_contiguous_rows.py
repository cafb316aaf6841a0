"""Places of pairs in expert-grouped buffers, and copies of rows and scales to them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.kernels.contiguous_rows import duplicate_rows, token_places
from moe_plugin.kernels.dense_routing import dense_routing
from moe_plugin.kernels.peer_memory import ALL_DONE, ERROR_BITS, PROGRESS_BITS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANKS, CAPACITY, TOP_K, SLOTS, HIDDEN, GROUPS = 2, 7, 3, 4, 72, 3


def routing(seed: int) -> torch.Tensor:
    """Physical ids int16 [R, C, K] with dropped pairs, tokens without any, and an expert named twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, RANKS * SLOTS, (RANKS, CAPACITY, TOP_K), generator=generator)
    ids[1, 5:] = -1
    ids[0, 2] = torch.tensor([1, 1, 6])
    return ids.to(DEVICE, torch.int16)


def places_of(ids: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    scanned = dense_routing(ids, rank, SLOTS, rows=False)
    assert scanned.positions is not None
    assert scanned.segment_starts is not None
    total = RANKS * CAPACITY

    def room(*shape: int) -> torch.Tensor:
        return torch.full(shape, -7, dtype=torch.int32, device=DEVICE)

    found = {
        "places": room(total, TOP_K),
        "present": room(total),
        "first_place": room(CAPACITY, RANKS),
        "needed_by": room(CAPACITY),
    }
    epochs = torch.tensor([3, 0], device=DEVICE)
    token_places(ids, scanned.positions, scanned.segment_starts, rank, **found, epochs=epochs)
    assert epochs.tolist() == [3, 4]
    return found


def expected_places(ids: torch.Tensor, rank: int) -> list[list[int]]:
    """[R * C][K] on `rank`, one token after the other."""
    taken: dict[int, list[int]] = {expert: [] for expert in range(rank * SLOTS, (rank + 1) * SLOTS)}
    tokens = ids.flatten(0, 1).tolist()
    for token, experts in enumerate(tokens):
        for expert in set(experts) & taken.keys():
            taken[expert].append(token)
    starts, start = {}, 0
    for expert, theirs in taken.items():
        starts[expert] = start
        start += -(-len(theirs) // 128) * 128
    return [
        [starts[e] + taken[e].index(token) if e in taken else -1 for e in experts]
        for token, experts in enumerate(tokens)
    ]


@pytest.mark.parametrize("rank", range(RANKS))
def test_every_pair_has_its_place(rank: int) -> None:
    ids = routing(rank)
    found = places_of(ids, rank)
    expected = [expected_places(ids, each) for each in range(RANKS)]
    assert found["places"].tolist() == expected[rank]
    assert found["present"].tolist() == [int(max(row) >= 0) for row in expected[rank]]
    own = range(rank * CAPACITY, (rank + 1) * CAPACITY)
    firsts = [[min((p for p in on[token] if p >= 0), default=-1) for on in expected] for token in own]
    assert found["first_place"].tolist() == firsts
    assert found["needed_by"].tolist() == [sum((p >= 0) << r for r, p in enumerate(row)) for row in firsts]


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("scaled", [False, True], ids=["rows", "rows_and_scales"])
def test_rows_reach_all_their_places(programs: int, scaled: bool) -> None:
    rank, senders, epoch = 1, 3, 5
    found = places_of(routing(4), rank)
    places = found["places"]
    slots = SLOTS * 128
    rows = torch.full((slots, HIDDEN), float("nan"), device=DEVICE)
    tokens = torch.randn(RANKS * CAPACITY, HIDDEN, device=DEVICE)
    row_scales = torch.randn(RANKS * CAPACITY, GROUPS, device=DEVICE)
    scales = torch.full((GROUPS, slots), float("nan"), device=DEVICE).T
    for token, theirs in enumerate(places.tolist()):
        if max(theirs) >= 0:
            rows[min(place for place in theirs if place >= 0)] = tokens[token]
    done = ((epoch << PROGRESS_BITS) + ALL_DONE) << ERROR_BITS
    errors, lost, reports = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (1, 1, 8))
    duplicate_rows(
        rows,
        row_scales if scaled else None,
        scales if scaled else None,
        places,
        torch.full((RANKS, 16), done, dtype=torch.int64, device=DEVICE),
        errors.fill_(1),
        torch.tensor([epoch - 1, epoch], device=DEVICE),
        lost,
        reports,
        capacity=CAPACITY,
        hidden_size=HIDDEN,
        senders=senders,
        chunks=2,
        programs=programs,
        limit_ns=10**9,
        phase=1,
    )
    untouched = torch.ones(slots, dtype=torch.bool, device=DEVICE)
    for token, theirs in enumerate(places.tolist()):
        for place in theirs:
            if place >= 0:
                untouched[place] = False
                assert torch.equal(rows[place], tokens[token])
                assert not scaled or torch.equal(scales[place], row_scales[token])
    assert rows[untouched].isnan().all()
    assert scales[untouched].isnan().all()
    assert (int(errors), int(lost), reports.any().item()) == (0, 0, False)
