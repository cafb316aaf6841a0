"""Where Triton's CPU interpreter computes bf16 wrongly, and device functions that are right there and on a GPU.

Seen in Triton 3.6: `tl.dot` of bf16 operands returns garbage, and fp32 -> bf16 truncates, so that every rounding
shrinks a value by up to 2^-7 instead of moving it by up to 2^-8 either way.

Example, fp32 1.01171875 = 1 + 1.5 * 2^-7 to bf16, whose neighbours are 1 + 2^-7 and 1 + 2 * 2^-7:

    truncated 1.0078125; to nearest even, as on a GPU and here, 1.015625
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(x, w, total):
    """total + x @ w in fp32. x [M, K], w [K, N] of one float dtype; fp32 operands keep full precision."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(x, w, total, input_precision="ieee")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """An fp32 tensor in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(value == value, nearest.to(tl.float32, bitcast=True), value).to(dtype)
    else:
        return value.to(dtype)
