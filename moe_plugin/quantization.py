"""fp8 in torch: the definition of every scheme, which kernels and oracle follow.

e4m3 values, fp32 scales: value = fp8 * scale. A dynamic scale is max(amax, 1e-4) / 448, so that an all-zero row is
finite, and conversion saturates. NaN stays NaN and Inf makes its own group NaN: neither leaves its row.

    scheme             weights                          activations of w13             activations of w2
    fp8_per_tensor     one scale per expert matrix      dynamic: one per row;          dynamic: one per row and 128
                       (gate and up may differ)         static: one given              columns; static: one per expert
    fp8_per_token      one per output channel           one per row                    one per row and 128 columns
    fp8_block          one per 128 x 128 tile           one per row and 128 columns    one per row and 128 columns

The intermediate is quantized where it is produced, tile by tile, before the whole row is known: hence its groups of 128
columns in every dynamic scheme, which are never less accurate than one scale per row. For the same reason a dynamic
per-tensor scale is measured per row: a token's result does not depend on the tokens beside it.

Shapes of the weight scales, El local experts; the first of each pair is the canonical one, which experts see:

    scheme             w13_scale                                      w2_scale
    fp8_per_tensor     [El, 2] (gate, up) or [El]                     [El]
    fp8_per_token      [El, 2I] or [El, 2I, 1]                        [El, H] or [El, H, 1]
    fp8_block          [El, 2 * ceil(I/128), ceil(H/128)], gate       [El, ceil(H/128), ceil(I/128)]
                       tiles first; each half starts its own tile

Static activation scales: a13_scale canonically [1], the largest over all experts, since rows are quantized before they
meet their experts; a2_scale [El]. Either may be given as a scalar, as [1] or as [El].

UE8M0 scales, which DeepGEMM takes on SM 100, are the same rounded up to powers of two, and are stored as exponents with
a bias of 127; 255 stands for NaN.

Example, one row of amax 896 in a group: scale 2, so 896 becomes 448 and 3 becomes 1.5. Amax 900: scale 2.009, in UE8M0
4, stored as 129.
"""

from __future__ import annotations

from math import prod

import torch

from moe_plugin.config import Fp8Block, Fp8PerTensor, Fp8PerToken, QuantConfig
from moe_plugin.errors import ConfigError, ShapeError

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
LEAST_AMAX = 1e-4
GROUP_SIZE = 128
"""Columns of the intermediate that share a scale; also the tile of Fp8Block that kernels take."""
UE8M0_PACKED = 4
"""Exponents in one int32."""


def quantize_rows(
    x: torch.Tensor, group_size: int | None = None, ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x float [..., D] -> (fp8 [..., D], fp32 scales [..., ceil(D / group_size)]); one group per row when None.

    ue8m0: scales are powers of two.
    """
    depth = x.shape[-1]
    group_size = group_size or max(depth, 1)
    grouped = torch.nn.functional.pad(x.float(), (0, -depth % group_size)).unflatten(-1, (-1, group_size))
    scale = _scale(grouped.abs().amax(dim=-1), ue8m0)
    return to_fp8(grouped / scale[..., None]).flatten(-2)[..., :depth].contiguous(), scale


def _scale(amax: torch.Tensor, ue8m0: bool = False) -> torch.Tensor:
    # Divided by a tensor: on CUDA torch multiplies by the reciprocal of a number, and a scale that is off by its last
    # bit takes the other side of every tie, of which rows of 16-bit numbers have many.
    scale = amax.clamp(min=LEAST_AMAX) / torch.full((), FP8_MAX, device=amax.device)
    return (_exponents(scale) << 23).view(torch.float32) if ue8m0 else scale


def _exponents(scale: torch.Tensor) -> torch.Tensor:
    """int32 biased exponents of fp32 scales rounded up to powers of two, by the bits: a logarithm would be inexact."""
    bits = scale.view(torch.int32)
    return (((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()).clamp(max=255)


def pack_ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """fp32 scales [..., groups], rounded up to powers of two -> int32 [..., ceil(groups / 4)].

    The exponent of the first group of four is the low byte; groups past the last one are zeros.
    """
    padded = torch.nn.functional.pad(_exponents(scale.float()), (0, -scale.shape[-1] % UE8M0_PACKED))
    return padded.to(torch.uint8).contiguous().view(torch.int32)


def unpack_ue8m0(packed: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The inverse of `pack_ue8m0`: fp32 [..., num_groups]."""
    shifts = torch.arange(0, 8 * UE8M0_PACKED, 8, device=packed.device)
    exponents = ((packed[..., None] >> shifts) & 0xFF).flatten(-2)[..., :num_groups]
    return (exponents.int() << 23).view(torch.float32)


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x float -> fp8 by a given fp32 scale (broadcast against x), saturating."""
    return to_fp8(x.float() / scale)


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Saturating conversion; NaN stays NaN."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


def dequantize_rows(x: torch.Tensor, scale: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """The inverse of `quantize_rows`: fp32 [..., D]."""
    depth = x.shape[-1]
    return x.float() * scale.repeat_interleave(group_size or max(depth, 1), dim=-1)[..., :depth]


def fake_quantize(
    x: torch.Tensor,
    group_size: int | None = None,
    static_scale: torch.Tensor | None = None,
    by_reciprocal: bool = False,
) -> torch.Tensor:
    """Quantized and back: the fp32 values that a GEMM on fp8 operands sees. With `static_scale` there are no groups.

    by_reciprocal: values are multiplied by 448 / amax rather than divided by the scale, as DeepEP's kernels do it. That
    takes the other side of some ties, of which rows of 16-bit numbers have many.
    """
    if by_reciprocal:
        depth = x.shape[-1]
        group_size = group_size or max(depth, 1)
        grouped = torch.nn.functional.pad(x.float(), (0, -depth % group_size)).unflatten(-1, (-1, group_size))
        amax = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_AMAX)
        # A tensor over a tensor: torch divides a number by multiplying it with the reciprocal.
        values = to_fp8(grouped * (torch.full_like(amax, FP8_MAX) / amax)).float() * (amax * (1 / FP8_MAX))
        return values.flatten(-2)[..., :depth]
    if static_scale is not None:
        return quantize_static(x, static_scale).float() * static_scale
    return dequantize_rows(*quantize_rows(x, group_size), group_size)


def input_group_size(scheme: QuantConfig) -> int | None:
    """Columns of the activations of w13 that share a dynamic scale; None: the whole row."""
    return scheme.block_k if isinstance(scheme, Fp8Block) else None


def has_static_activations(scheme: QuantConfig | None) -> bool:
    """Whether activation scales are given with the weights instead of measured."""
    return isinstance(scheme, Fp8PerTensor) and scheme.static_activations


def dispatched_groups(scheme: QuantConfig | None, hidden_size: int) -> int:
    """Scales of a row of activations that is quantized before it travels.

    0 where that is left to the experts: without a scheme, with static scales, or in groups that no kernel makes.
    Example, H = 192: Fp8Block() -> 2, Fp8PerToken() -> 1, Fp8Block(64, 64) -> 0.
    """
    if scheme is None or has_static_activations(scheme):
        return 0
    group_size = input_group_size(scheme) or hidden_size
    return -(-hidden_size // group_size) if group_size in (GROUP_SIZE, hidden_size) else 0


Shapes = tuple[tuple[int, ...], ...]


def weight_scale_shapes(
    scheme: QuantConfig, num_experts: int, intermediate_size: int, hidden_size: int
) -> dict[str, Shapes]:
    """The shapes that w13_scale and w2_scale may have, the canonical one first."""
    experts, inner, hidden = num_experts, intermediate_size, hidden_size
    if isinstance(scheme, Fp8PerTensor):
        return {"w13_scale": ((experts, 2), (experts,)), "w2_scale": ((experts,),)}
    if isinstance(scheme, Fp8PerToken):
        return {
            "w13_scale": ((experts, 2 * inner), (experts, 2 * inner, 1)),
            "w2_scale": ((experts, hidden), (experts, hidden, 1)),
        }
    if isinstance(scheme, Fp8Block):
        bn, bk = scheme.block_n, scheme.block_k
        return {
            "w13_scale": ((experts, 2 * -(-inner // bn), -(-hidden // bk)),),
            "w2_scale": ((experts, -(-hidden // bn), -(-inner // bk)),),
        }
    raise ConfigError(f"no fp8 definition for {scheme.name}")


def canonical_scale(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A scale in any shape that may stand for `shape`, as contiguous fp32 of `shape`."""
    per_expert = scale.flatten(1) if scale.dim() > 1 else scale.reshape(-1, 1)
    return per_expert.expand(shape[0], prod(shape[1:])).reshape(shape).float().contiguous()


def quantize_weights(w: torch.Tensor, scheme: QuantConfig, halves: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """w float [E, N, D] -> (fp8 [E, N, D], fp32 scales in the shape that `scheme` has for it).

    halves: 2 for w13, whose gate and up halves are quantized apart: per-tensor scales are then [E, 2].
    """
    parts = [_quantize_matrix(part, scheme) for part in w.float().chunk(halves, dim=1)]
    quantized = torch.cat([part for part, _ in parts], dim=1)
    if isinstance(scheme, Fp8PerTensor):
        scales = torch.stack([scale for _, scale in parts], dim=1)
        return quantized, scales[:, 0] if halves == 1 else scales
    return quantized, torch.cat([scale for _, scale in parts], dim=1)


def _quantize_matrix(w: torch.Tensor, scheme: QuantConfig, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [E, N, D] -> (fp8, scales [E], [E, N] or [E, ceil(N/bn), ceil(D/bk)]). ue8m0: for Fp8Block."""
    if isinstance(scheme, Fp8PerTensor):
        scale = _scale(w.abs().amax(dim=(1, 2)))
        return to_fp8(w / scale[:, None, None]), scale
    if isinstance(scheme, Fp8PerToken):
        quantized, scale = quantize_rows(w)
        return quantized, scale[..., 0]
    if isinstance(scheme, Fp8Block):
        n, d, bn, bk = w.shape[1], w.shape[2], scheme.block_n, scheme.block_k
        padded = torch.nn.functional.pad(w, (0, -d % bk, 0, -n % bn))
        tiles = padded.unflatten(2, (-1, bk)).unflatten(1, (-1, bn))
        scale = _scale(tiles.abs().amax(dim=(2, 4)), ue8m0)
        quantized = to_fp8(tiles / scale[:, :, None, :, None]).flatten(3).flatten(1, 2)
        return quantized[:, :n, :d].contiguous(), scale
    raise ConfigError(f"no fp8 definition for {scheme.name}")


def dequantize_weights(w: torch.Tensor, scale: torch.Tensor, scheme: QuantConfig, halves: int = 1) -> torch.Tensor:
    """The inverse of `quantize_weights`: fp32 [E, N, D]; scales in any of the shapes listed above."""
    num_experts, n, d = w.shape
    if isinstance(scheme, Fp8PerTensor):
        per_half = scale.reshape(num_experts, -1, 1).expand(num_experts, halves, 1)
        return w.float() * per_half.repeat_interleave(n // halves, dim=1)
    if isinstance(scheme, Fp8PerToken):
        return w.float() * scale.reshape(num_experts, n, 1)
    if isinstance(scheme, Fp8Block):
        columns = scale.repeat_interleave(scheme.block_k, dim=2)[:, :, :d]
        rows = [
            half.repeat_interleave(scheme.block_n, dim=1)[:, : n // halves] for half in columns.chunk(halves, dim=1)
        ]
        return w.float() * torch.cat(rows, dim=1)
    raise ConfigError(f"no fp8 definition for {scheme.name}")


def requantize_weights_ue8m0(w: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of Fp8Block(128, 128) with any scales -> the same with scales that are powers of two.

    w: fp8 [E, N, D]. scale: fp32 [E, ceil(N / 128), ceil(D / 128)]. Returns new tensors of the same shapes and dtypes.
    Takes one expert at a time, so that there is never an fp32 copy of more than one.
    Raises ShapeError when scale has another shape.
    """
    num_experts, n, d = w.shape
    tiles = (num_experts, -(-n // GROUP_SIZE), -(-d // GROUP_SIZE))
    if scale.shape != tiles:
        raise ShapeError(
            f"scales of 128 x 128 tiles of weights {list(w.shape)} are {list(tiles)}, not {[*scale.shape]}"
        )
    scheme = Fp8Block(GROUP_SIZE, GROUP_SIZE)
    out, out_scale = torch.empty_like(w), torch.empty(tiles, dtype=torch.float32, device=w.device)
    for expert in range(num_experts):
        one = slice(expert, expert + 1)
        exact = dequantize_weights(w[one], scale[one], scheme)
        out[one], out_scale[one] = _quantize_matrix(exact, scheme, ue8m0=True)
    return out, out_scale


def gate_first(up_gate: torch.Tensor) -> torch.Tensor:
    """A tensor of a checkpoint that stores w13 as [up | gate] -> a new one in the order of this package, [gate | up].

    up_gate: w13 [E, 2I, H], w13_bias [E, 2I] or w13_scale in any shape of this module's docstring, of any dtype; each
    of them is to be reordered. One scale per expert, [E], belongs to both halves and is returned as it is.
    Tiles of w13_scale [E, 2 * ceil(I / 128), ...] must not hold rows of both halves, as they would where I is no
    multiple of 128 and tiles are counted through.
    Raises ShapeError when there are no two halves.
    """
    if up_gate.dim() < 2:
        return up_gate
    if up_gate.shape[1] % 2:
        raise ShapeError(f"up and gate halves along dimension 1 make it even, got {list(up_gate.shape)}")
    up, gate = up_gate.chunk(2, dim=1)
    return torch.cat([gate, up], dim=1)
