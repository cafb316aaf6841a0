"""pack_rows by content: what each row must hold, read off the token it carries."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.kernels.pack_rows import PackedViews, pack_rows, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [
    pytest.param(True, id="triton", marks=pytest.mark.skipif(triton is None, reason="triton is not installed")),
    pytest.param(False, id="torch"),
]


def empty_views(num_rows: int, hidden_size: int, top_k: int, dtype: torch.dtype) -> PackedViews:
    words = torch.full((num_rows, 2 * top_k + 3), 0x7B7B7B7B, dtype=torch.int32, device=DEVICE)
    hidden = torch.full((num_rows, hidden_size + 8), float("nan"), dtype=dtype, device=DEVICE)[:, :hidden_size]
    weights = words[:, top_k : 2 * top_k].view(torch.float32)
    return PackedViews(hidden, words[:, :top_k], weights, words[:, 2 * top_k : 2 * top_k + 1])


@pytest.mark.parametrize("use_triton", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hidden_size", "top_k"), [(64, 2), (2049, 3), (7, 1), (4100, 8)])
def test_rows_hold_their_token(hidden_size: int, top_k: int, dtype: torch.dtype, use_triton: bool) -> None:
    generator = torch.Generator().manual_seed(hidden_size)
    num_tokens, num_ranks, num_rows = 9, 4, 21
    wide = torch.randn(num_tokens, 2 * hidden_size, generator=generator).to(DEVICE, dtype)
    activations = wide[:, ::2]
    weights = torch.rand(num_tokens, top_k, generator=generator).to(DEVICE)
    rank = torch.randint(-1, num_ranks, (num_tokens, top_k), generator=generator, dtype=torch.int32).to(DEVICE)
    slot = torch.where(rank < 0, -1, torch.arange(num_tokens * top_k, device=DEVICE).view_as(rank)).int()
    token_of_row = torch.randint(-1, num_tokens, (num_rows,), generator=generator).to(DEVICE)
    rank_of_row = torch.randint(0, num_ranks, (num_rows,), generator=generator).to(DEVICE)
    flags = torch.tensor([5], dtype=torch.int32, device=DEVICE)

    out = empty_views(num_rows, hidden_size, top_k, dtype)
    pack_rows(activations, weights, rank, slot, token_of_row, rank_of_row, flags, out, use_triton)

    assert (out.flags == 5).all()
    for row, (token, destination) in enumerate(zip(token_of_row.tolist(), rank_of_row.tolist(), strict=True)):
        if token < 0:
            assert (out.slots[row] == -1).all()
            continue
        assert torch.equal(out.hidden[row], activations[token])
        assert torch.equal(out.weights[row], weights[token])
        assert torch.equal(out.slots[row], torch.where(rank[token] == destination, slot[token], -1).int())


@pytest.mark.parametrize("use_triton", FORMS)
def test_no_tokens_and_no_rows(use_triton: bool) -> None:
    nothing = torch.empty(0, 16, device=DEVICE)
    ids = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for num_rows in (0, 3):
        unused = torch.full((num_rows,), -1, device=DEVICE)
        out = empty_views(num_rows, 16, 2, torch.float32)
        pack_rows(nothing, None, ids, ids, unused, unused, flags, out, use_triton)
        assert (out.slots == -1).all()
        assert (out.flags == 0).all()
