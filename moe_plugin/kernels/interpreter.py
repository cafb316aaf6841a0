"""Where Triton's CPU interpreter computes bf16 and fp8 wrongly, and device functions that are right there and on a GPU.

Seen in Triton 3.6 and 3.7: `tl.dot` of bf16 operands returns garbage; fp32 -> bf16 truncates, so that every rounding
shrinks a value by up to 2^-7 instead of moving it by up to 2^-8 either way; fp32 -> fp8 e4m3 truncates below 2^-6, and
NaN is a number on the way into fp8 and on the way out.

Example, fp32 1.01171875 = 1 + 1.5 * 2^-7 to bf16, whose neighbours are 1 + 2^-7 and 1 + 2 * 2^-7:

    truncated 1.0078125; to nearest even, as on a GPU and here, 1.015625
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def resident_warps(on_a_gpu: int) -> int:
    """Warps of a grid that shares out work of any size: `on_a_gpu` runs at once; interpreted programs run in turn."""
    return 8 if triton.knobs.runtime.interpret else on_a_gpu


@triton.jit
def dot(x, w, total):
    """total + x @ w in fp32. x [M, K], w [K, N] of one float dtype; fp32 operands keep full precision."""
    if INTERPRETED:
        return tl.dot(widen(x), widen(w), total, input_precision="ieee")
    else:
        return tl.dot(x, w, total, input_precision="ieee")


@triton.jit
def widen(x):
    """A tensor of any float dtype in fp32."""
    if INTERPRETED and x.dtype == tl.float8e4nv:
        magnitude = x.to(tl.uint8, bitcast=True) & 0x7F
        return tl.where(magnitude == 0x7F, float("nan"), x.to(tl.float32))
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """An fp32 tensor in `dtype`, rounded to nearest even. fp8 e4m3 saturates at 448; NaN stays NaN."""
    if dtype == tl.float8e4nv:
        value = tl.minimum(value, 448.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.maximum(value, -448.0, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED and dtype == tl.bfloat16:
        return tl.where(value == value, _drop_bits(value, 16), value).to(dtype)
    elif INTERPRETED and dtype == tl.float8e4nv:
        # Numbers below 2^-6 are multiples of 2^-9, and fp32 has no finer ones between 2^14 and 2^15.
        subnormal = (value + 24576.0) - 24576.0
        nearest = tl.where(tl.abs(value) < 0.015625, subnormal, _drop_bits(value, 20))
        bits = nearest.to(dtype).to(tl.uint8, bitcast=True)
        return tl.where(value == value, bits, tl.full(bits.shape, 0x7F, tl.uint8)).to(dtype, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def _drop_bits(value, COUNT: tl.constexpr):
    """An fp32 tensor rounded to nearest even at bit COUNT."""
    bits = value.to(tl.int32, bitcast=True)
    half: tl.constexpr = 1 << (COUNT - 1)
    nearest = (bits + (half - 1) + ((bits >> COUNT) & 1)) & -(1 << COUNT)
    return nearest.to(tl.float32, bitcast=True)
