"""The functions of DeepGEMM that this package uses, in plain torch on CPU tensors, with the traps of the real ones.

Names, parameters and layouts are those of sgl-deep-gemm 0.1.5 on SM 90; tests/compat/test_contract.py holds both to the
same answers. Where the library computes or leaves undefined values, NaN is stored here. What makes it wrong or slow in
silence raises here: a masked capacity that is no multiple of 128 rows (whole blocks are stored, over the next group), a
group that ends before its rounded-up start, scales in an order that costs another kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from moe_plugin.compat import deep_gemm as compat

COMPUTES_ON_CPU = True
__version__ = "0.1.5+double"

BLOCK_M = 128


def get_mk_alignment_for_contiguous_layout() -> int:
    return BLOCK_M


def m_grouped_bf16_gemm_nt_contiguous(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    _check_bf16(a, b, d)
    _contiguous((a, None), (b, None), d, grouped_layout, use_psum_layout)


def m_grouped_bf16_gemm_nt_masked(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    compiled_dims: str = "nk",
) -> None:
    _check_bf16(a, b, d)
    _masked((a, None), (b, None), d, masked_m, expected_m)


def m_grouped_fp8_fp4_gemm_nt_contiguous(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: tuple[int, ...] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    _check_fp8(a, b, d)
    _contiguous(a, b, d, grouped_layout, use_psum_layout)


def m_grouped_fp8_fp4_gemm_nt_masked(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: tuple[int, ...] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    _check_fp8(a, b, d)
    _masked(a, b, d, masked_m, expected_m)


m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked

EXPORTED = (
    "COMPUTES_ON_CPU",
    "__version__",
    "get_mk_alignment_for_contiguous_layout",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "bf16_m_grouped_gemm_nt_masked",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked",
    "fp8_m_grouped_gemm_nt_masked",
)
"""What the module `deep_gemm` has once the double is installed."""


def install() -> ModuleType:
    """Put the double in the place of `deep_gemm`, and have it found; for the rest of the process."""
    module = ModuleType("deep_gemm", __doc__)
    module.__spec__ = ModuleSpec("deep_gemm", loader=None, origin=__file__)
    for name in EXPORTED:
        setattr(module, name, globals()[name])
    sys.modules["deep_gemm"] = module
    compat.forget()
    return module


@contextmanager
def installed() -> Iterator[ModuleType]:
    """`install`, and afterwards what was there before."""
    before = sys.modules.get("deep_gemm")
    try:
        yield install()
    finally:
        del sys.modules["deep_gemm"]
        if before is not None:
            sys.modules["deep_gemm"] = before
        compat.forget()


Scaled = tuple[torch.Tensor, Any]
"""Values, and their scales or None."""


def _contiguous(a: Scaled, b: Scaled, d: torch.Tensor, layout: torch.Tensor, psum: bool) -> None:
    (m, k), (groups, n) = a[0].shape, b[0].shape[:2]
    assert b[0].shape[2] == k
    assert d.shape == (m, n)
    assert m % BLOCK_M == 0, f"{m} rows are not a multiple of {BLOCK_M}"
    assert layout.dtype == torch.int32
    assert layout.is_contiguous()
    assert layout.shape == (groups if psum else m,)
    if not psum:
        for start in range(0, m, BLOCK_M):
            block = slice(start, start + BLOCK_M)
            expert = int(layout[start])
            assert -1 <= expert < groups
            d[block] = torch.nan if expert < 0 else _product(a, block, b, expert, d.dtype)
            d[block][layout[block] < 0] = torch.nan
        return
    start = 0
    for group, end in enumerate(layout.tolist()):
        assert start <= end <= m, f"group {group} starts at row {start} of {m} and ends at {end}"
        d[start:end] = _product(a, slice(start, end), b, group, d.dtype)
        start = _rounded_up(end)
        d[end:start] = torch.nan


def _masked(a: Scaled, b: Scaled, d: torch.Tensor, num_rows: torch.Tensor, expected_rows: int) -> None:
    (groups, m, k), n = a[0].shape, b[0].shape[1]
    assert b[0].shape == (groups, n, k)
    assert d.shape == (groups, m, n)
    assert isinstance(expected_rows, int)
    assert min(expected_rows, m, n, k, groups) > 0
    assert m % BLOCK_M == 0, f"blocks of {BLOCK_M} rows run over the end of groups of {m}"
    assert num_rows.dtype == torch.int32
    assert num_rows.is_contiguous()
    assert num_rows.shape == (groups,)
    for group, count in enumerate(num_rows.tolist()):
        assert 0 <= count <= m, f"group {group} has {count} rows of {m}"
        of_group = (a[0][group], None if a[1] is None else a[1][group])
        d[group, :count] = _product(of_group, slice(0, count), b, group, d.dtype)
        d[group, count : _rounded_up(count)] = torch.nan


def _rounded_up(rows: int) -> int:
    return -(-rows // BLOCK_M) * BLOCK_M


def _product(a: Scaled, rows: slice, b: Scaled, group: int, dtype: torch.dtype) -> torch.Tensor:
    """a[rows] @ b[group].T in fp32, rounded once."""
    left, right = a[0][rows].float(), b[0][group].float()
    if a[1] is not None:
        left = left * a[1][rows].repeat_interleave(128, dim=-1)[:, : left.shape[1]]
        scale = b[1][group].repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
        right = right * scale[: right.shape[0], : right.shape[1]]
    return (left @ right.T).to(dtype)


def _check_bf16(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
    assert a.dtype == b.dtype == torch.bfloat16
    _check_matrices(a, b, d, unit=64)


def _check_fp8(a: Any, b: Any, d: torch.Tensor) -> None:
    (values, scales), (weights, weight_scales) = a, b
    assert values.dtype == weights.dtype == torch.float8_e4m3fn
    _check_matrices(values, weights, d, unit=16)
    rows, groups = values.shape[-2], -(-values.shape[-1] // 128)
    assert scales.dtype == weight_scales.dtype == torch.float32
    assert scales.shape == (*values.shape[:-1], groups)
    # Rows next to each other, columns of scales aligned to 16 bytes as TMA wants them.
    assert scales.stride(-2) == 1 or rows <= 1, f"scales have strides {scales.stride()}"
    assert scales.stride(-1) == -(-rows // 4) * 4, f"scales have strides {scales.stride()}"
    if scales.dim() == 3:
        assert scales.stride(0) == scales.stride(-1) * groups
    assert weight_scales.shape == (weights.shape[0], -(-weights.shape[1] // 128), groups)
    assert weight_scales.is_contiguous()


def _check_matrices(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, unit: int) -> None:
    assert {a.device.type, b.device.type, d.device.type} == {"cpu"}, "the double computes on CPU tensors"
    assert d.dtype == torch.bfloat16
    assert a.shape[-1] % unit == 0, f"K is {a.shape[-1]}, no multiple of {unit}"
    for matrix in (a, b, d):
        assert matrix.stride(-1) == 1
        # Groups follow each other: one TMA descriptor goes over all of them.
        assert matrix.dim() == 2 or matrix.stride(0) == matrix.shape[1] * matrix.stride(1)
