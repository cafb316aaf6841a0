"""Rows that a rank writes to all ranks, what it reads of theirs, and what it says where something is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from moe_plugin.config import ExpertPlacement
from moe_plugin.errors import ShapeError
from moe_plugin.kernels import routing_gather
from moe_plugin.kernels.dense_routing import (
    DenseRouting,
    dense_routing_launches,
    dense_routing_reference,
    to_dense_ids,
)
from moe_plugin.kernels.launcher import running
from moe_plugin.kernels.placement_lookup import LookupTables, placement_lookup
from moe_plugin.kernels.routing_gather import MAX_WRITERS, RoutingGather, RoutingRegions, num_writers, writer_tiles

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
gather_and_scan = running(dense_routing_launches)
LATER = 1 << 30
"""An epoch that has not come yet."""


def signal(epoch: int, errors: int = 0) -> int:
    """Of a program that has nothing more to write."""
    return (epoch << 24 | (1 << 24) - 1) << 8 | errors


@dataclass
class Peers:
    """Rank `rank` of `size`, whose peers are memory in this process: all that they will write is there before."""

    size: int
    rank: int
    room: int
    placement: ExpertPlacement
    sets: int = 2
    limit_ns: int = 10**9
    memory: list[torch.Tensor] = field(init=False)
    regions: RoutingRegions = field(init=False)

    def __post_init__(self) -> None:
        shapes = {"ids": (self.sets, self.room), "weights": (self.sets, self.room), "flags": (self.size, MAX_WRITERS)}
        dtypes = {"ids": torch.int16, "weights": torch.float32, "flags": torch.int64}
        self._places, offset = {}, 0
        for name, shape in shapes.items():
            self._places[name] = offset, shape, dtypes[name]
            offset += shape[0] * shape[1] * dtypes[name].itemsize
        # One allocation: the distances between ranks are then multiples of 16 bytes.
        self.memory = list(torch.zeros(self.size, offset, dtype=torch.uint8, device=DEVICE))
        base = self.memory[self.rank].data_ptr()
        distances = [(memory.data_ptr() - base) // 16 for memory in self.memory]
        self.regions = RoutingRegions(
            peer_offsets=torch.tensor(distances, device=DEVICE),
            epochs=torch.zeros(1, dtype=torch.int64, device=DEVICE),
            **{name: self.view(name, self.rank) for name in shapes},
        )
        self.reports = torch.zeros(8, dtype=torch.int32, device=DEVICE)
        self.lost = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.tables = LookupTables.of(self.placement.tables(DEVICE))

    def view(self, name: str, rank: int) -> torch.Tensor:
        """A region of any rank."""
        offset, shape, dtype = self._places[name]
        return self.memory[rank][offset : offset + shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)

    def prepare(self, number: int, ids: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """What the peers write in call `number`."""
        for name, of_all in (("ids", ids), ("weights", weights)):
            if of_all is not None:
                region = self.view(name, self.rank)[number % self.sets, : of_all.numel()].view(of_all.shape)
                for peer in range(self.size):
                    if peer != self.rank:
                        region[peer] = of_all[peer]
        for peer in range(self.size):
            if peer != self.rank:
                self.view("flags", self.rank)[peer] = signal(LATER)

    def gather(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        capacity: int,
        num_slots: int,
        rows: bool = True,
        places: bool = True,
        **options: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None, DenseRouting]:
        shape = (self.size, capacity, topk_ids.shape[1])
        ids = torch.full(shape, -77, dtype=torch.int16, device=DEVICE)
        weights = None if topk_weights is None else torch.full(shape, torch.nan, device=DEVICE)
        out = DenseRouting.empty(*shape, self.rank, num_slots, DEVICE, rows=rows, places=places)
        gather = RoutingGather(
            topk_ids, topk_weights, self.tables, self.regions, weights, self.reports, self.lost, self.limit_ns
        )
        gather_and_scan(ids, out, gather=replace(gather, **options))
        return ids, weights, out


def expected_rows(
    topk_ids: torch.Tensor, tables: LookupTables, num_slots: int, capacity: int
) -> tuple[torch.Tensor, bool]:
    """Dense ids [C, K] by the torch lookup, and whether any id was wrong."""
    slot = torch.empty(topk_ids.shape, dtype=torch.int32, device=DEVICE)
    rank, flags = torch.empty_like(slot), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    placement_lookup(topk_ids, tables, slot, flags, 1, rank=rank, use_triton=False)
    dense = torch.full((capacity, topk_ids.shape[1]), -1, dtype=torch.int16, device=DEVICE)
    dense[: topk_ids.shape[0]] = to_dense_ids(rank, slot, num_slots)
    return dense, bool(flags.item())


def random_ids(num_tokens: int, top_k: int, num_experts: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator).to(DEVICE, dtype)


def check_routing(found: DenseRouting, ids: torch.Tensor) -> None:
    expected = dense_routing_reference(ids, found.rank, found.num_slots)
    for name in ("rows_per_rank", "send_rows", "received_rows", "expert_counts", "segment_starts", "group_ends"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.places(ids), expected.places(ids))
    assert torch.equal(found.send_places(ids), expected.send_places(ids))
    assert found.finished is not None
    assert found.finished.item() == 0


def test_docstring_example() -> None:
    peers = Peers(2, 0, 64, ExpertPlacement.linear(4, 2))
    theirs = torch.tensor([[[9, 9], [9, 9]], [[1, -1], [-1, -1]]], dtype=torch.int16, device=DEVICE)
    peers.prepare(1, theirs)
    ids, _, found = peers.gather(torch.tensor([[0, 3], [1, 0]], device=DEVICE), None, 2, 2)
    assert ids.tolist() == [[[0, 3], [1, 0]], [[1, -1], [-1, -1]]]
    check_routing(found, ids)
    # The peer has this rank's rows, and nothing else.
    assert peers.view("ids", 1)[1, :8].tolist() == [0, 3, 1, 0, 0, 0, 0, 0]
    assert not peers.view("ids", 1)[0].any()


@pytest.mark.parametrize(
    ("rank", "num_tokens", "capacity", "top_k", "dtype"),
    [(0, 70, 70, 8, torch.int32), (1, 0, 5, 2, torch.int64), (2, 31, 64, 6, torch.int64), (1, 33, 40, 1, torch.int16)],
)
def test_rows_of_all_ranks(rank: int, num_tokens: int, capacity: int, top_k: int, dtype: torch.dtype) -> None:
    """Three ranks, replicas, dropped pairs, room for larger calls, several programs; the peers are one call ahead."""
    placement = ExpertPlacement.from_table(7, [[0, 1, 2, 3], [3, 4, 5], [5, 6, 3]])
    peers = Peers(3, rank, 64 * 3 * capacity, placement)
    of_calls = [random_ids(3 * capacity, top_k, 12, 10 + n, torch.int16).view(3, capacity, top_k) for n in range(5)]
    weights_of_calls = [torch.rand(3, capacity, top_k, device=DEVICE) for _ in range(5)]
    peers.prepare(1, of_calls[1], weights_of_calls[1])
    for number in (1, 2, 3):
        topk_ids = random_ids(num_tokens, top_k, 7, number, dtype)
        topk_weights = torch.rand(num_tokens, top_k, device=DEVICE).bfloat16()
        peers.prepare(number + 1, of_calls[number + 1], weights_of_calls[number + 1])
        ids, weights, found = peers.gather(topk_ids, topk_weights, capacity, 4)
        of_all, weights_of_all = of_calls[number], weights_of_calls[number]
        of_all[rank], _ = expected_rows(topk_ids, peers.tables, 4, capacity)
        weights_of_all[rank] = 0
        weights_of_all[rank, :num_tokens] = topk_weights.float()
        assert torch.equal(ids, of_all)
        assert torch.equal(weights, weights_of_all)
        check_routing(found, ids)
        assert peers.regions.epochs.item() == number
        assert peers.reports.tolist() == [0] * 8
        for peer in range(3):
            written = peers.view("ids", peer)[number % 2, : of_all.numel()].view(of_all.shape)[rank]
            assert torch.equal(written, of_all[rank])
            signals = peers.view("flags", peer)[rank, : num_writers(capacity)]
            assert (signals == signal(number)).all()


@pytest.mark.parametrize(("rows", "places"), [(True, False), (False, True)])
def test_only_what_is_asked_for(rows: bool, places: bool) -> None:
    peers = Peers(1, 0, 640, ExpertPlacement.linear(5, 1))
    for number in (1, 2):
        topk_ids = random_ids(40, 4, 5, number, torch.int32)
        ids, _, found = peers.gather(topk_ids, None, 40, 5, rows, places)
        expected = dense_routing_reference(ids, 0, 5, rows=rows, places=places)
        assert torch.equal(ids[0], expected_rows(topk_ids, peers.tables, 5, 40)[0])
        if rows:
            assert torch.equal(found.received_rows, expected.received_rows)
        else:
            assert torch.equal(found.places(ids), expected.places(ids))
        assert peers.regions.epochs.item() == number


def test_strided_input() -> None:
    peers = Peers(1, 0, 640, ExpertPlacement.linear(9, 1))
    wide = random_ids(12, 40, 9, 1, torch.int64)
    weights = torch.rand(12, 40, device=DEVICE).T[1:31]
    for topk_ids in (wide.T[1:31], wide.view(-1)[:1].expand(30, 12)):
        ids, gathered, _ = peers.gather(topk_ids, weights, 33, 9)
        assert torch.equal(ids[0], expected_rows(topk_ids, peers.tables, 9, 33)[0])
        assert torch.equal(gathered[0, :30], weights)


@pytest.mark.parametrize("wrong", [5, -2])
def test_wrong_ids_are_told_to_all_ranks(wrong: int) -> None:
    peers = Peers(2, 1, 640, ExpertPlacement.linear(5, 2))
    topk_ids = random_ids(50, 3, 5, 1, torch.int64)
    topk_ids[49, 1] = wrong
    peers.prepare(1, torch.full((2, 50, 3), -1, dtype=torch.int16, device=DEVICE))
    ids, _, found = peers.gather(topk_ids, None, 50, 3, errors=2)
    expected, is_wrong = expected_rows(topk_ids, peers.tables, 3, 50)
    assert is_wrong
    assert torch.equal(ids[1], expected)
    check_routing(found, ids)
    assert peers.reports.tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert (peers.view("flags", 0)[1, :2] & 0xFF).tolist() == [2, 3]


def test_a_lost_rank_is_named_and_its_old_rows_are_not_used() -> None:
    peers = Peers(3, 0, 640, ExpertPlacement.linear(6, 3), limit_ns=10**5)
    peers.prepare(1, torch.full((3, 40, 2), 1, dtype=torch.int16, device=DEVICE))
    # Rank 1's second program has signalled an earlier call alone.
    peers.view("flags", 0)[1, 1] = 0
    ids, _, found = peers.gather(random_ids(40, 2, 6, 1, torch.int64), None, 40, 2)
    assert peers.lost.item() == 1
    assert peers.reports[:4].tolist() == [0, 0, 0, 0]
    assert peers.reports[6:].view(torch.int64).item() == 1 << 16 | 3 << 8 | 1 + 1
    assert (ids[:, 20:] == -1).all()
    assert (ids[1:, :20] == 1).all()
    for counts in (found.rows_per_rank, found.expert_counts, found.segment_starts, found.group_ends):
        assert not counts.any()
    assert (found.send_rows == -1).all()
    assert (found.received_rows == -1).all()
    # The next call waits no longer for it, and says to the others that its rows are void.
    ids, _, _ = peers.gather(random_ids(40, 2, 6, 1, torch.int64), None, 40, 2)
    assert peers.view("flags", 2)[0, 0].item() == signal(2, 8)
    assert peers.regions.epochs.item() == 2


def test_one_set_whose_epochs_others_count() -> None:
    """As part of a larger exchange: nothing moves on until that does."""
    peers = Peers(1, 0, 640, ExpertPlacement.linear(5, 1), sets=1)
    regions = replace(peers.regions, owns_epochs=False)
    for epoch in (0, 0, 6):
        peers.regions.epochs.fill_(epoch)
        topk_ids = random_ids(40, 4, 5, epoch, torch.int32)
        ids, _, found = peers.gather(topk_ids, None, 40, 5, regions=regions)
        assert torch.equal(ids[0], expected_rows(topk_ids, peers.tables, 5, 40)[0])
        check_routing(found, ids)
        assert peers.regions.epochs.item() == epoch
        assert peers.view("flags", 0)[0, 0].item() == signal(epoch + 1)


def test_few_programs_have_many_tokens() -> None:
    assert [num_writers(capacity) for capacity in (0, 1, 32, 128, 4096)] == [1, 1, 1, 4, MAX_WRITERS]
    assert writer_tiles(4, 4096, 8) == (256, 4)
    assert writer_tiles(4, 128, 8) == (32, 4)
    assert writer_tiles(32, 4096, 8) == (256, 4)
    assert writer_tiles(2, 0, 3) == (1, 2)


def test_tiles_smaller_than_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of tokens, and several of ranks, in a program."""
    monkeypatch.setattr(routing_gather, "_PAIRS_AT_ONCE", 16)
    assert writer_tiles(3, 40, 2) == (8, 4)
    monkeypatch.setattr(routing_gather, "_WRITER_TOKENS", 40)
    assert writer_tiles(7, 40, 3) == (4, 4)
    peers = Peers(7, 5, 7 * 40 * 64, ExpertPlacement.linear(7, 7))
    of_all = random_ids(7 * 40, 3, 7, 3, torch.int16).view(7, 40, 3)
    weights_of_all = torch.rand(of_all.shape, device=DEVICE)
    peers.prepare(1, of_all, weights_of_all)
    topk_ids = random_ids(38, 3, 7, 4, torch.int64)
    ids, weights, found = peers.gather(topk_ids, weights_of_all[5, :38], 40, 1)
    of_all[5], _ = expected_rows(topk_ids, peers.tables, 1, 40)
    weights_of_all[5, 38:] = 0
    assert torch.equal(ids, of_all)
    assert torch.equal(weights, weights_of_all)
    check_routing(found, ids)


@pytest.mark.parametrize(
    ("shape", "capacity", "weights", "words"),
    [
        ((5, 2), 4, None, r"\[4 or fewer, 2\], got \[5, 2\]"),
        ((5, 2), 200, None, "room for 640 pairs"),
        ((5, 2), 8, (8, 2), "both or not at all"),
    ],
)
def test_wrong_shapes_are_refused(
    shape: Sequence[int], capacity: int, weights: Sequence[int] | None, words: str
) -> None:
    peers = Peers(2, 0, 640, ExpertPlacement.linear(4, 2))
    topk_ids = torch.zeros(*shape, dtype=torch.int32, device=DEVICE)
    gathered = None if weights is None else torch.zeros(*weights, device=DEVICE)
    with pytest.raises(ShapeError, match=words):
        peers.gather(topk_ids, None, capacity, 2, gathered_weights=gathered)


def test_nothing_to_scan_is_refused() -> None:
    peers = Peers(2, 0, 640, ExpertPlacement.linear(4, 2))
    with pytest.raises(ShapeError, match="neither rows nor places"):
        peers.gather(torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), None, 1, 2, rows=False, places=False)
