"""The routing as DeepEP is given it: the kernel and plain torch agree, and both with a count by hand."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.config import ExpertPlacement
from moe_plugin.kernels.dispatch_layout import DispatchLayout, dispatch_layout, error_count
from moe_plugin.kernels.placement_lookup import LookupTables

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WRONG_ID = 1


def layout(num_tokens: int, top_k: int, placement: ExpertPlacement, num_nodes: int = 1) -> DispatchLayout:
    """Filled with what must be overwritten."""
    slots = max(map(len, placement.experts_of_rank))
    num_counts = placement.num_ranks * (1 + slots) + (num_nodes if num_nodes > 1 else 0)
    return DispatchLayout.of(
        torch.full((num_tokens, top_k), 77, device=DEVICE),
        torch.ones(num_tokens, placement.num_ranks, dtype=torch.bool, device=DEVICE),
        torch.full((num_counts,), 77, dtype=torch.int32, device=DEVICE),
        num_nodes,
    )


def run(
    ids: torch.Tensor, placement: ExpertPlacement, num_nodes: int = 1, flags: int = 0
) -> tuple[DispatchLayout, int]:
    """The kernel's layout and what it found, after comparing both, and weights, with plain torch."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(ids.shape[1], ids.shape[0], generator=generator).to(DEVICE, torch.bfloat16).T
    found = []
    for use_triton in (True, False):
        out, out_weights = layout(*ids.shape, placement, num_nodes), torch.full(ids.shape, 7.0, device=DEVICE)
        tables = LookupTables.of(placement.tables(DEVICE))
        seen = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        dispatch_layout(
            ids.to(DEVICE), weights, tables, out, out_weights, seen, WRONG_ID, flags=flags, use_triton=use_triton
        )
        found.append((out, out_weights, seen.item()))
    (kernel, kernel_weights, kernel_flags), (plain, plain_weights, plain_flags) = found
    assert kernel_flags == plain_flags
    for name in ("ids", "is_in_rank", "counts"):
        assert torch.equal(getattr(kernel, name), getattr(plain, name)), name
    torch.testing.assert_close(kernel_weights, plain_weights, rtol=0, atol=0)
    torch.testing.assert_close(kernel_weights, weights.float(), rtol=0, atol=0)
    return kernel, int(kernel_flags)


def test_the_example() -> None:
    ids = torch.tensor([[0, 2], [3, 2], [1, 7]], dtype=torch.int32)
    found, flags = run(ids, ExpertPlacement.linear(4, 2))
    assert found.ids.tolist() == [[0, 2], [3, 2], [1, -1]]
    assert found.is_in_rank.tolist() == [[True, True], [False, True], [True, False]]
    assert found.rank_counts.tolist() == [2, 2]
    error = error_count(2)
    assert found.expert_counts.tolist() == [1 + error, 1, 2 + error, 1]
    assert flags == WRONG_ID


@pytest.mark.parametrize("num_tokens", [0, 1, 37, 700])
@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_like_plain_torch(num_tokens: int, num_nodes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    linear = ExpertPlacement.linear(10, 4).experts_of_rank
    replicated = ExpertPlacement.from_table(10, [list(dict.fromkeys((*experts, 9, 0))) for experts in linear])
    ids = torch.randint(-1, 10, (num_tokens, 3), generator=generator).to(dtype)
    found, flags = run(ids, replicated, num_nodes)
    assert flags == 0
    assert int(found.expert_counts.sum()) == int((ids >= 0).sum())


@pytest.mark.parametrize("num_tokens", [0, 5, 900])
def test_errors_are_counted_on_every_rank(num_tokens: int) -> None:
    placement = ExpertPlacement.linear(4, 2)
    ids = torch.zeros(num_tokens, 3, dtype=torch.int64)
    found, flags = run(ids, placement, flags=4)
    assert flags == 4
    assert bool((found.expert_counts[::2] >= error_count(2)).all())
    assert bool((found.expert_counts[1::2] <= 3 * num_tokens).all())
    if num_tokens:
        ids[-1, 1] = 1 << 40
        found, flags = run(ids, placement)
        assert flags == WRONG_ID
        assert bool((found.expert_counts[::2] >= error_count(2)).all())
        assert found.ids[-1].tolist() == [0, -1, 0]
