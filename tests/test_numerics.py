"""The two error measures and the assertion built on them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.errors import DtypeError, ShapeError
from moe_plugin.numerics import (
    FP8_NOISE,
    FP8_TOLERANCE,
    TOLERANCES,
    Tolerance,
    assert_close_to_oracle,
    max_row_error,
    relative_error,
    row_errors,
)
from moe_plugin.quantization import fake_quantize

DTYPES = tuple(TOLERANCES)
ALL = (*DTYPES, FP8_TOLERANCE, FP8_NOISE)


def bounds(tolerance: torch.dtype | Tolerance) -> Tolerance:
    return tolerance if isinstance(tolerance, Tolerance) else TOLERANCES[tolerance]


def matrix(rows: int = 64, columns: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_relative_error_by_hand():
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    actual = expected + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    assert relative_error(actual, expected) == pytest.approx(0.1)


def test_row_errors_by_hand():
    # Row norms 5, 1, 0; their RMS is sqrt(26 / 3) = 2.944, which floors the last two.
    expected = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    actual = expected + torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.5, 0.0]])
    floor = math.sqrt(26 / 3)
    assert row_errors(actual, expected).tolist() == pytest.approx([0.1, 0.5 / floor, 0.5 / floor])
    assert max_row_error(actual, expected) == pytest.approx(0.5 / floor)


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**32), st.sampled_from([1e-30, 1.0, 1e30]))
def test_errors_ignore_scale_and_vanish_for_equal_tensors(rows, columns, seed, scale):
    expected, noise = matrix(rows, columns, seed).double(), matrix(rows, columns, seed + 1).double()
    assert relative_error(expected, expected) == max_row_error(expected, expected) == 0.0
    for error in (relative_error, max_row_error):
        unscaled = error(expected + 0.1 * noise, expected)
        assert error(scale * (expected + 0.1 * noise), scale * expected) == pytest.approx(unscaled)


def test_zero_oracle():
    zero, one = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert relative_error(zero, zero) == max_row_error(zero, zero) == 0.0
    assert relative_error(one, zero) == max_row_error(one, zero) == math.inf
    assert row_errors(one, zero).tolist() == [0.0, math.inf]


def test_leading_dimensions_are_flattened():
    expected = matrix(6, 4)
    actual = expected.clone()
    actual[5] += 1
    assert row_errors(actual.view(2, 3, 4), expected.view(2, 3, 4)).tolist() == row_errors(actual, expected).tolist()
    assert row_errors(actual[5], expected[5]).shape == (1,)


def test_sums_are_in_fp64():
    """fp16 values whose squares overflow fp16 and whose error is below fp32's resolution of the sum."""
    expected = torch.full((1, 4096), 300.0, dtype=torch.float16)
    assert relative_error(expected, expected.double() + 1e-7) == pytest.approx(1e-7 / 300, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_the_dtype_passes(dtype):
    expected = matrix()
    assert_close_to_oracle(expected.to(dtype), expected, dtype)
    assert_close_to_oracle(torch.zeros(3, 4), torch.zeros(3, 4), dtype)
    assert_close_to_oracle(torch.zeros(0, 4), torch.zeros(0, 4), dtype)


@pytest.mark.parametrize("tolerance", ALL, ids=str)
def test_an_error_over_the_frobenius_tolerance_fails(tolerance):
    expected, limit = matrix(), bounds(tolerance).frobenius
    assert_close_to_oracle(expected * (1 + 0.9 * limit), expected, tolerance)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close_to_oracle(expected * (1 + 1.1 * limit), expected, tolerance)


@pytest.mark.parametrize("tolerance", ALL, ids=str)
def test_one_bad_row_among_many_fails_and_is_named(tolerance):
    expected = torch.nn.functional.normalize(matrix(4096, 16), dim=-1)
    actual = expected.clone()
    actual[1234] *= 1 + 10 * bounds(tolerance).row
    assert relative_error(actual, expected) < bounds(tolerance).frobenius
    with pytest.raises(AssertionError, match=r"in row 1234 of 4096; 1 rows are over it") as failure:
        assert_close_to_oracle(actual, expected, tolerance)
    message = str(failure.value)
    assert f"{relative_error(actual, expected):.3e}" in message
    assert f"{max_row_error(actual, expected):.3e}" in message


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("in_actual", "in_expected"), [(True, False), (False, True), (True, True)])
def test_nan_and_inf_never_pass(dtype, value, in_actual, in_expected):
    actual, expected = matrix(), matrix()
    if in_actual:
        actual[7, 3] = value
    if in_expected:
        expected[7, 3] = value
    with pytest.raises(AssertionError):
        assert_close_to_oracle(actual, expected, dtype)


def test_a_nan_row_is_the_worst_row():
    actual, expected = matrix(), matrix()
    actual[0] += 100
    actual[9, 0] = math.nan
    assert math.isnan(max_row_error(actual, expected))
    with pytest.raises(AssertionError, match="in row 9 of 64; 2 rows"):
        assert_close_to_oracle(actual, expected, torch.float32)


def test_what_fp8_noise_allows_for():
    """One rounding to e4m3 is 2.6%; three of them, as in a layer, stay inside, and six do not."""
    x = matrix(256, 256)
    one = relative_error(fake_quantize(x), x)
    assert one == pytest.approx(0.026, rel=0.05)
    assert math.sqrt(3) * one < FP8_NOISE.frobenius < math.sqrt(6) * one


def test_gradients_are_no_obstacle():
    expected = matrix().requires_grad_()
    assert_close_to_oracle(expected * 1, expected, torch.float32)


def test_wrong_arguments_are_named():
    with pytest.raises(ShapeError, match=r"actual is \[2, 3\], expected is \[3, 2\]"):
        relative_error(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="at least one element"):
        row_errors(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(DtypeError, match="float64"):
        assert_close_to_oracle(matrix(), matrix(), torch.float64)
