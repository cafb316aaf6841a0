"""How far a result is from the oracle: two numbers, shared by tests and benchmarks.

The Frobenius error sees the whole matrix and hides one bad row among many; the per-row error sees that row. A result is
right when both are small. All sums are in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from moe_plugin.errors import DtypeError, ShapeError
from moe_plugin.verdict import dtype_name


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest accepted relative_error (`frobenius`) and max_row_error (`row`)."""

    frobenius: float
    row: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = MappingProxyType(
    {
        torch.float32: Tolerance(frobenius=1e-5, row=5e-5),
        torch.float16: Tolerance(frobenius=1e-2, row=2e-2),
        torch.bfloat16: Tolerance(frobenius=1e-2, row=2e-2),
    }
)
"""By the dtype a layer computes in, against the fp32 oracle on the same inputs."""

FP8_TOLERANCE = Tolerance(frobenius=1e-2, row=5e-2)
"""An fp8 layer, whatever its dtype, against the oracle of its scheme.

Sums in another order change the intermediate in its last bits, and where it lies between two fp8 values that moves an
element by one step of e4m3, up to 1/8 of it. Such flips are rare, so the matrix keeps the bound of bf16; but one in the
element that carries a third of a short row's norm moves that row by 1/8 * 1/3, about 4e-2. Hopper's tensor cores, whose
fp8 sums keep about 14 bits, flip about 1% of the elements: 2e-3 to 5e-3 over many rows, and now and then over 1e-2 in
three of them: it takes 16 rows and more to judge the Frobenius error.
"""

FP8_NOISE = Tolerance(frobenius=6e-2, row=1.5e-1)
"""An fp8 layer against the oracle on its dequantized weights with unquantized activations.

Rounding to e4m3 has a relative error of about 2.6% (uniform in a step of 1/8 of the binade). The input meets it in gate
and in up, the product once more: sqrt(3) * 2.6% = 4.5%. (Weights rounded as well would add as much, 6.4% in all, which
is no property of a layer whose weights are given in fp8.) A row of few columns averages over few of these errors.
"""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`.

    0 when the two are equal, also when both are zero; inf when only `expected` is zero; NaN when either holds a NaN.
    Any shape and dtype; equal shapes, else ShapeError.
    """
    difference, reference = _difference(actual, expected)
    return _ratio(torch.linalg.vector_norm(difference), torch.linalg.vector_norm(reference)).item()


def row_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The relative error of each row, fp64 [rows]; a row runs over the last dimension, leading ones are flattened.

    Row r counts |actual_r - expected_r| / max(|expected_r|, rms), where rms is the root mean square of all row norms
    of `expected`. Zero and tiny rows are thus held to the scale of the matrix: against their own norm, rounding noise
    could count as any number. An all-zero `expected` gives 0 where `actual` is zero and inf elsewhere.
    """
    difference, reference = _difference(actual, expected)
    if reference.dim() == 0 or reference.shape[-1] == 0:
        raise ShapeError(f"row errors need rows of at least one element, got shape {list(reference.shape)}")
    norms = torch.linalg.vector_norm(reference, dim=-1).flatten()
    rms = norms.square().mean().sqrt()
    return _ratio(torch.linalg.vector_norm(difference, dim=-1).flatten(), norms.maximum(rms))


def max_row_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of `row_errors`; 0 without rows, NaN when any row has a NaN."""
    errors = row_errors(actual, expected)
    return errors.max().item() if errors.numel() else 0.0


def assert_close_to_oracle(actual: torch.Tensor, expected: torch.Tensor, tolerance: torch.dtype | Tolerance) -> None:
    """Assert that `actual` is `expected` up to the rounding of a layer.

    actual, expected: [..., H], equal shapes, any float dtypes.
    tolerance: a Tolerance, or the dtype an unquantized layer computes in, which picks the row of TOLERANCES; DtypeError
        when it has none.
    AssertionError shows both errors, both tolerances and the worst row. NaN never passes, nor does an infinite oracle.
    """
    kind = ""
    if isinstance(tolerance, torch.dtype):
        kind = f"{dtype_name(tolerance)}, "
        if tolerance not in TOLERANCES:
            known = ", ".join(map(dtype_name, TOLERANCES))
            raise DtypeError(f"no tolerance for {dtype_name(tolerance)}; known: {known}")
        tolerance = TOLERANCES[tolerance]
    frobenius, errors = relative_error(actual, expected), row_errors(actual, expected)
    if not errors.numel():
        return
    worst = int(errors.argmax())
    row = errors[worst].item()
    # Written so that a NaN, which compares false with everything, fails.
    if frobenius <= tolerance.frobenius and row <= tolerance.row:
        return
    raise AssertionError(
        f"result differs from the oracle ({kind}shape {list(actual.shape)}): "
        f"relative error {frobenius:.3e} (tolerance {tolerance.frobenius:g}), "
        f"row error {row:.3e} (tolerance {tolerance.row:g}) in row {worst} of {errors.numel()}; "
        f"{int((~(errors <= tolerance.row)).sum())} rows are over it.\n"
        f"  actual[{worst}]   = {_head(actual, worst)}\n"
        f"  expected[{worst}] = {_head(expected, worst)}"
    )


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(actual - expected, expected) in fp64 on the device of `expected`."""
    if actual.shape != expected.shape:
        raise ShapeError(
            f"actual is {list(actual.shape)}, expected is {list(expected.shape)}; they must have one shape"
        )
    reference = expected.detach().double()
    return actual.detach().to(reference.device).double() - reference, reference


def _ratio(error: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """error / scale, with 0 / 0 = 0."""
    return torch.where((error == 0) & (scale == 0), 0.0, error / scale)


def _head(tensor: torch.Tensor, row: int, count: int = 6) -> str:
    """The first numbers of one row, as text."""
    values = tensor.detach().reshape(-1, tensor.shape[-1])[row]
    shown = ", ".join(f"{value:.4g}" for value in values[:count].tolist())
    return f"[{shown}{', ...' if values.numel() > count else ''}]"
