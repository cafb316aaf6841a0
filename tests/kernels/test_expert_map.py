"""Ids to maps and back, against Python loops; in torch, and by Triton where it is there."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.kernels import expert_map as module
from moe_plugin.kernels.expert_map import expert_map, local_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="triton is not installed")
each_way = pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_triton)])


def outputs(capacity: int, top_k: int, columns: int) -> dict[str, torch.Tensor]:
    return {
        "ids_out": torch.full((capacity, top_k), 99, dtype=torch.int16, device=DEVICE),
        "map_out": torch.ones(capacity, columns, dtype=torch.bool, device=DEVICE),
        "probs": torch.full((capacity, columns), torch.nan, device=DEVICE),
    }


@each_way
def test_docstring_example(use_triton: bool) -> None:
    ids = torch.tensor([[4, 1, 4], [-1, 0, -1]], dtype=torch.int16, device=DEVICE)
    weights = torch.tensor([[0.5, 2, 1], [9, 3, 9]], device=DEVICE)
    out = outputs(3, 3, 8)
    expert_map(ids, weights, 3, 4, **out, use_triton=use_triton)
    assert out["ids_out"].tolist() == [[5, 1, -1], [-1, 0, -1], [-1, -1, -1]]
    assert out["map_out"].nonzero().tolist() == [[0, 1], [0, 5], [1, 0]]
    assert out["probs"].tolist() == [[0, 2, 0, 0, 0, 1.5, 0, 0], [3] + [0] * 7, [0] * 8]
    local_ids = torch.full((2, 2), 99, dtype=torch.int32, device=DEVICE)
    picked = torch.full((2, 2), torch.nan, device=DEVICE)
    local_pairs(
        out["map_out"][:2, :4], out["probs"][:2, :4], local_ids=local_ids, weights=picked, use_triton=use_triton
    )
    assert local_ids.tolist() == [[1, -1], [0, -1]]
    assert picked.tolist() == [[2, 0], [3, 0]]


@each_way
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_slots", "rank_columns", "capacity"),
    [(0, 2, 3, 4, 4), (9, 5, 33, 33, 9), (17, 3, 70, 72, 20)],
)
def test_against_loops(
    use_triton: bool, num_tokens: int, top_k: int, num_slots: int, rank_columns: int, capacity: int
) -> None:
    """Ids with repetitions and gaps, weights of another dtype in other strides; what a rank gets of the map."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(-1, 2 * num_slots, (num_tokens, top_k), generator=generator, dtype=torch.int16)
    if num_tokens:
        ids[0] = ids[0, 0]
    weights = torch.rand(top_k, num_tokens, generator=generator).bfloat16().T
    out = outputs(capacity, top_k, 2 * rank_columns)
    expert_map(ids.to(DEVICE), weights.to(DEVICE), num_slots, rank_columns, **out, use_triton=use_triton)
    probs = torch.zeros(capacity, 2 * rank_columns)
    named = torch.zeros(capacity, 2 * rank_columns, dtype=torch.bool)
    kept = torch.full((capacity, top_k), -1, dtype=torch.int16)
    for token in range(num_tokens):
        for k, physical in enumerate(ids[token].tolist()):
            if physical >= 0:
                rank, slot = divmod(physical, num_slots)
                column = rank * rank_columns + slot
                if not named[token, column]:
                    kept[token, k] = column
                named[token, column] = True
                probs[token, column] += weights[token, k].float()
    assert torch.equal(out["ids_out"].cpu(), kept)
    assert torch.equal(out["map_out"].cpu(), named)
    torch.testing.assert_close(out["probs"].cpu(), probs)
    for rank in range(2):
        columns = slice(rank * rank_columns, rank * rank_columns + num_slots)
        local_ids = torch.full((capacity, top_k), 99, dtype=torch.int32, device=DEVICE)
        picked = torch.full((capacity, top_k), torch.nan, device=DEVICE)
        own_map, own_probs = out["map_out"][:, columns], out["probs"][:, columns]
        local_pairs(own_map, own_probs, local_ids=local_ids, weights=picked, use_triton=use_triton)
        for row, found, row_weights in zip(own_map.tolist(), local_ids.tolist(), picked.cpu(), strict=True):
            wanted = [slot for slot, is_wanted in enumerate(row) if is_wanted]
            assert found == wanted + [-1] * (top_k - len(wanted))
            assert not row_weights[len(wanted) :].any()
        expected = own_probs.gather(1, local_ids.clamp(min=0).long()) * (local_ids >= 0)
        assert torch.equal(picked, expected)


@each_way
def test_rows_without_weights_and_no_rows(use_triton: bool) -> None:
    routing_map = torch.tensor([[True, False, True]], device=DEVICE)
    local_ids = torch.full((1, 2), 99, dtype=torch.int32, device=DEVICE)
    local_pairs(routing_map, None, local_ids=local_ids, weights=None, use_triton=use_triton)
    assert local_ids.tolist() == [[0, 2]]
    local_pairs(routing_map[:0], None, local_ids=local_ids[:0], weights=None, use_triton=use_triton)
