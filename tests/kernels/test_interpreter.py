"""Rounding and dot products as a GPU does them, wherever the tests run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from moe_plugin.kernels.interpreter import dot, round_to, widen
from moe_plugin.quantization import to_fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_fp8 = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="Triton has e4m3 from SM 89 on"
)


@triton.jit
def _round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(out_ptr + lanes, round_to(tl.load(x_ptr + lanes), out_ptr.dtype.element_ty))


@triton.jit
def _widen_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(out_ptr + lanes, widen(tl.load(x_ptr + lanes)))


@triton.jit
def _dot_kernel(x_ptr, w_ptr, out_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    offsets = lanes[:, None] * SIZE + lanes[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    tl.store(out_ptr + offsets, dot(tl.load(x_ptr + offsets), tl.load(w_ptr + offsets), total))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    ties = [1 + 1.5 * 2**-7, 1 + 0.5 * 2**-7, 2 - 2**-10, 0.0, -0.0, torch.inf, -torch.inf, torch.nan]
    x[: len(ties)] = torch.tensor(ties)
    x[100:200] = -x[100:200].abs()
    x = x.to(DEVICE)
    out = torch.empty(1024, dtype=dtype, device=DEVICE)
    _round_kernel[(1,)](x, out, SIZE=1024)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_fp8
def test_every_fp8_value_and_every_tie_between_two() -> None:
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = finite[finite.isfinite()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    above = torch.nextafter(ties, torch.full_like(ties, torch.inf))
    beyond = torch.tensor([448.1, 465.0, -480.0, 1e30, torch.inf, -torch.inf, torch.nan, -torch.nan])
    x = torch.cat([finite, ties, above, -above, beyond])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x) % 1024)).to(DEVICE)
    x = torch.cat([x, torch.randn(2 * 1024 - len(x), generator=torch.Generator().manual_seed(0)).to(DEVICE)])
    out = torch.empty(2048, dtype=torch.float8_e4m3fn, device=DEVICE)
    _round_kernel[(1,)](x, out, SIZE=2048)
    torch.testing.assert_close(out.float(), to_fp8(x).float(), rtol=0, atol=0, equal_nan=True)


@needs_fp8
def test_fp8_is_read_right() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(DEVICE)
    out = torch.empty(256, device=DEVICE)
    _widen_kernel[(1,)](x, out, SIZE=256)
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, pytest.param(torch.float8_e4m3fn, marks=needs_fp8)]
)
def test_dot(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(32, 32, generator=generator).to(DEVICE, dtype) for _ in range(2))
    out = torch.empty(32, 32, device=DEVICE)
    _dot_kernel[(1,)](x, w, out, SIZE=32)
    torch.testing.assert_close(out.double(), x.double() @ w.double(), rtol=1e-5, atol=1e-5)
