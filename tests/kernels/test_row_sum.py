"""row_sum, Triton and torch form, against fp64 sums of the rows that count."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moe_plugin.kernels.row_sum import row_sum, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [
    pytest.param(True, id="triton", marks=pytest.mark.skipif(triton is None, reason="triton is not installed")),
    pytest.param(False, id="torch"),
]
each_form = pytest.mark.parametrize("use_triton", FORMS)


def expected_sum(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """fp64 [T, H]."""
    total = torch.zeros(index.shape[0], rows.shape[1], dtype=torch.float64, device=rows.device)
    for token, term in (index >= 0).nonzero().tolist():
        weight = 1.0 if weights is None else weights[token, term].double()
        total[token] += rows[index[token, term]].double() * weight
    return total


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Terms are added in fp32, so only the last rounding depends on the dtype.
    relative = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=1e-5)


def random_case(
    num_tokens: int, terms: int, num_rows: int, hidden_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows [R, H], index [T, J] with some -1, weights [T, J] with zeros and negative ones."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + terms)
    rows = torch.randn(num_rows, hidden_size, generator=generator).to(DEVICE, dtype)
    index = torch.randint(-1, num_rows, (num_tokens, terms), generator=generator, dtype=torch.int32).to(DEVICE)
    weights = torch.randn(num_tokens, terms, generator=generator).to(DEVICE)
    weights[::3] = 0
    return rows, index, weights


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 11, 100), (5, 8, 3, 1030)])
@pytest.mark.parametrize("weighted", [True, False])
def test_random_rows(use_triton: bool, dtype: torch.dtype, shape: tuple[int, int, int, int], weighted: bool) -> None:
    rows, index, weights = random_case(*shape, dtype)
    out = torch.full((shape[0], shape[3]), torch.nan, dtype=dtype, device=DEVICE)
    result = row_sum(rows, index, weights if weighted else None, out, use_triton)
    assert result is out
    check(out, expected_sum(rows, index, weights if weighted else None))


@each_form
def test_docstring_example(use_triton: bool) -> None:
    rows = torch.tensor([[10.0], [20.0], [30.0]], device=DEVICE)
    index = torch.tensor([[2, 0], [-1, 1], [-1, -1]], dtype=torch.int32, device=DEVICE)
    weights = torch.tensor([[0.5, 2.0], [9.0, 1.0], [9.0, 9.0]], device=DEVICE)
    assert row_sum(rows, index, weights, torch.empty(3, 1, device=DEVICE), use_triton).tolist() == [[35], [20], [0]]


@each_form
@pytest.mark.parametrize("num_rows", [3, 0])
def test_one_term_may_find_its_rows_elsewhere(use_triton: bool, num_rows: int) -> None:
    rows = torch.tensor([[10.0], [20.0], [30.0]], device=DEVICE)[:num_rows]
    own_rows = torch.tensor([[70.0, 0.0], [80.0, 0.0]], device=DEVICE)[:, :1]
    index = torch.tensor([[2, 0], [-1, 1], [-1, -1]], dtype=torch.int32, device=DEVICE)
    if num_rows == 0:
        index[:, 0] = -1
    weights = torch.tensor([[0.5, 2.0], [9.0, 1.0], [9.0, 9.0]], device=DEVICE)
    out = torch.empty(3, 1, device=DEVICE)
    row_sum(rows, index, weights, out, use_triton, own_term=1, own_rows=own_rows)
    assert out.tolist() == [[155 if num_rows else 140], [80], [0]]


@each_form
def test_nan_in_skipped_rows_and_weights_does_not_leak(use_triton: bool) -> None:
    rows, index, weights = random_case(6, 4, 9, 70, torch.float32)
    index[index == 0] = -1
    rows[0] = torch.nan
    weights[index < 0] = torch.nan
    out = row_sum(rows, index, weights, torch.empty(6, 70, device=DEVICE), use_triton)
    check(out, expected_sum(rows, index, weights))


@each_form
def test_nan_stays_in_its_token(use_triton: bool) -> None:
    rows = torch.ones(4, 5, device=DEVICE)
    rows[2] = torch.nan
    index = torch.tensor([[0, 1], [2, 3], [3, -1]], dtype=torch.int32, device=DEVICE)
    out = row_sum(rows, index, None, torch.empty(3, 5, device=DEVICE), use_triton)
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert out[[0, 2], 0].tolist() == [2, 1]


@each_form
def test_strided_operands(use_triton: bool) -> None:
    rows, index, weights = random_case(5, 6, 8, 40, torch.bfloat16)
    wide = torch.full((5, 64), 3.0, dtype=torch.bfloat16, device=DEVICE)
    row_sum(rows[:, 4:37], index[:, ::2], weights[:, ::2], wide[:, 8:41], use_triton)
    check(wide[:, 8:41], expected_sum(rows[:, 4:37], index[:, ::2], weights[:, ::2]))
    assert (wide[:, :8] == 3).all()
    assert (wide[:, 41:] == 3).all()


@each_form
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes(use_triton: bool, weight_dtype: torch.dtype) -> None:
    rows, index, weights = random_case(4, 3, 5, 33, torch.float32)
    weights = weights.to(weight_dtype)
    check(
        row_sum(rows, index, weights, torch.empty(4, 33, device=DEVICE), use_triton), expected_sum(rows, index, weights)
    )


@each_form
@pytest.mark.parametrize(("num_tokens", "terms", "num_rows"), [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
def test_nothing_to_add(use_triton: bool, num_tokens: int, terms: int, num_rows: int) -> None:
    index = torch.full((num_tokens, terms), -1, dtype=torch.int32, device=DEVICE)
    out = torch.full((num_tokens, 5), torch.nan, device=DEVICE)
    row_sum(torch.empty(num_rows, 5, device=DEVICE), index, None, out, use_triton)
    assert torch.equal(out, torch.zeros(num_tokens, 5, device=DEVICE))


@each_form
@pytest.mark.parametrize("shape", [(1, 8, 9, 7168), (40, 2, 50, 2880), (1030, 1, 20, 40)], ids=str)
def test_every_block_size(use_triton: bool, shape: tuple[int, int, int, int]) -> None:
    rows, index, weights = random_case(*shape, torch.bfloat16)
    out = torch.full((shape[0], shape[3]), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    check(row_sum(rows, index, weights, out, use_triton), expected_sum(rows, index, weights))


@each_form
def test_repeats_bitwise(use_triton: bool) -> None:
    rows, index, weights = random_case(9, 8, 30, 300, torch.float32)
    first = row_sum(rows, index, weights, torch.empty(9, 300, device=DEVICE), use_triton)
    assert torch.equal(first, row_sum(rows, index, weights, torch.empty(9, 300, device=DEVICE), use_triton))


@each_form
def test_order_of_terms_is_fixed(use_triton: bool) -> None:
    """1 + 2^24 - 2^24 is 0 in fp32 when added from the left, 1 from the right."""
    rows = torch.tensor([[1.0], [2.0**24], [-(2.0**24)]], device=DEVICE)
    index = torch.tensor([[0, 1, 2], [1, 2, 0]], dtype=torch.int32, device=DEVICE)
    out = row_sum(rows, index, None, torch.empty(2, 1, device=DEVICE), use_triton)
    assert out.flatten().tolist() == [0, 1]


@each_form
def test_offsets_beyond_32_bits(use_triton: bool) -> None:
    try:
        storage = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("not enough memory")
    rows = storage.as_strided((5, 4), (2**29, 1))
    rows[4] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16, device=DEVICE)
    index = torch.tensor([[4, -1]], dtype=torch.int32, device=DEVICE)
    out = row_sum(rows, index, None, torch.empty(1, 4, dtype=torch.bfloat16, device=DEVICE), use_triton)
    assert out.tolist() == [[1, 2, 3, 4]]


def test_works_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from moe_plugin.kernels.row_sum import row_sum\n"
        "out = row_sum(torch.ones(2, 3), torch.tensor([[0, 1]], dtype=torch.int32), None, torch.empty(1, 3))\n"
        "assert out.tolist() == [[2, 2, 2]]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
