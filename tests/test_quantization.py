"""Every fp8 scheme against loops over single groups, and the promises of its definition on values that are hard."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.config import Fp8Block, Fp8PerTensor, Fp8PerToken, QuantConfig
from moe_plugin.errors import ConfigError, ShapeError
from moe_plugin.quantization import (
    FP8_DTYPE,
    FP8_MAX,
    GROUP_SIZE,
    LEAST_AMAX,
    canonical_scale,
    dequantize_rows,
    dequantize_weights,
    dispatched_groups,
    fake_quantize,
    gate_first,
    has_static_activations,
    input_group_size,
    pack_ue8m0,
    quantize_rows,
    quantize_static,
    quantize_weights,
    requantize_weights_ue8m0,
    to_fp8,
    unpack_ue8m0,
    weight_scale_shapes,
)

SCHEMES = {
    "block": Fp8Block(),
    "odd block": Fp8Block(16, 24),
    "per token": Fp8PerToken(),
    "per tensor": Fp8PerTensor(),
}
E4M3 = sorted({float(x) for x in torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float() if not math.isnan(x)})


def nearest_e4m3(x: float) -> float:
    """Round to nearest over the list of all values, saturating; a tie goes to the even mantissa."""
    distance = min(abs(x - value) for value in E4M3)
    ties = [value for value in E4M3 if abs(x - value) == distance]
    return min(ties, key=lambda value: int(torch.tensor(value).to(FP8_DTYPE).view(torch.uint8)) & 1)


def group_scale(values: torch.Tensor) -> float:
    return max(float(values.abs().max()), LEAST_AMAX) / FP8_MAX


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None)
@given(st.floats(-1e6, 1e6, width=32))
def test_conversion_rounds_to_nearest_and_saturates(x: float) -> None:
    assert float(to_fp8(torch.tensor(x))) == nearest_e4m3(x)


def test_conversion_of_special_values() -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, 448.0, 449.0, -1e30, 2.0**-9, 2.0**-11, -0.0])
    expected = torch.tensor([448.0, -448.0, math.nan, 448.0, 448.0, -448.0, 2.0**-9, 0.0, -0.0])
    torch.testing.assert_close(to_fp8(special).float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group_size", [None, 128, 7, 1])
@pytest.mark.parametrize("depth", [1, 7, 130, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_group_by_group(group_size: int | None, depth: int, dtype: torch.dtype) -> None:
    x = normal(3, depth, scale=5).to(dtype)
    quantized, scale = quantize_rows(x, group_size)
    size = group_size or depth
    assert quantized.dtype is FP8_DTYPE
    assert quantized.is_contiguous()
    assert scale.dtype is torch.float32
    assert scale.shape == (3, -(-depth // size))
    for row in range(3):
        for group in range(scale.shape[1]):
            columns = slice(group * size, (group + 1) * size)
            assert float(scale[row, group]) == pytest.approx(group_scale(x[row, columns].float()), rel=1e-6)
            expected = to_fp8(x[row, columns].float() / scale[row, group])
            assert torch.equal(quantized[row, columns].float(), expected.float())
    restored = dequantize_rows(quantized, scale, group_size)
    torch.testing.assert_close(restored, x.float(), rtol=0.07, atol=float(scale.max()) * 2**-9)
    assert torch.equal(fake_quantize(x, group_size), restored)


def test_the_example_of_the_module() -> None:
    quantized, scale = quantize_rows(torch.tensor([[896.0, 3.0]]))
    assert scale.tolist() == [[2.0]]
    assert quantized.float().tolist() == [[448.0, 1.5]]


@pytest.mark.parametrize("group_size", [None, GROUP_SIZE])
def test_hard_rows(group_size: int | None) -> None:
    x = torch.zeros(4, 130)
    x[1] = 1e30
    x[2] = 1e-40
    x[3, ::2] = 448.0
    quantized, scale = quantize_rows(x, group_size)
    assert scale.isfinite().all()
    least = torch.tensor(LEAST_AMAX) / FP8_MAX
    assert (scale >= least).all()
    assert (scale[[0, 2]] == least).all()
    assert (quantized[[0, 2]].float() == 0).all()
    assert (quantized[1].float() == 448).all()
    assert torch.equal(quantized[3].float(), x[3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_stay_in_their_group(bad: float) -> None:
    x = normal(3, 300)
    clean = fake_quantize(x, 128)
    x[1, 140] = bad
    dirty = fake_quantize(x, 128)
    assert dirty[1, 128:256].isnan().any()
    dirty[1, 128:256] = clean[1, 128:256]
    assert torch.equal(dirty, clean)


def test_static_scales_saturate() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0, 1e9, math.inf, math.nan]])
    scale = torch.tensor([0.5])
    assert quantize_static(x, scale).float()[0, :5].tolist() == [0, 2, -4, 448, 448]
    expected = torch.tensor([[0.0, 1.0, -2.0, 224.0, 224.0, math.nan]])
    torch.testing.assert_close(fake_quantize(x, 128, scale), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(("halves", "rows", "columns"), [(2, 2 * 130, 150), (2, 2 * 8, 5), (1, 150, 130), (1, 3, 200)])
def test_weights_tile_by_tile(scheme: QuantConfig, halves: int, rows: int, columns: int) -> None:
    w = normal(2, rows, columns)
    w[1] *= 100
    quantized, scale = quantize_weights(w, scheme, halves)
    inner, hidden = (rows // 2, columns) if halves == 2 else (columns, rows)
    name = "w13_scale" if halves == 2 else "w2_scale"
    assert scale.shape == weight_scale_shapes(scheme, 2, inner, hidden)[name][0]
    assert quantized.shape == w.shape
    assert quantized.dtype is FP8_DTYPE
    per_half = rows // halves
    if isinstance(scheme, Fp8Block):
        bn, bk = scheme.block_n, scheme.block_k
    else:
        bn, bk = (1, columns) if isinstance(scheme, Fp8PerToken) else (per_half, columns)
    flat_scale = scale.reshape(2, halves, -(-per_half // bn), -(-columns // bk))
    restored = dequantize_weights(quantized, scale, scheme, halves)
    for expert in range(2):
        for half in range(halves):
            for i in range(flat_scale.shape[2]):
                for j in range(flat_scale.shape[3]):
                    first = half * per_half + i * bn
                    tile_rows = slice(first, min(first + bn, (half + 1) * per_half))
                    tile = (expert, tile_rows, slice(j * bk, (j + 1) * bk))
                    seen = flat_scale[expert, half, i, j]
                    assert float(seen) == pytest.approx(group_scale(w[tile]), rel=1e-6)
                    assert torch.equal(quantized[tile].float(), to_fp8(w[tile] / seen).float())
                    assert torch.equal(restored[tile], quantized[tile].float() * seen)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_accepted_shape_means_the_same(scheme: QuantConfig) -> None:
    experts, inner, hidden = 3, 130, 140
    w13, w2 = normal(experts, 2 * inner, hidden), normal(experts, hidden, inner, seed=1)
    for w, name, halves in ((w13, "w13_scale", 2), (w2, "w2_scale", 1)):
        quantized, scale = quantize_weights(w, scheme, halves)
        canonical, *others = weight_scale_shapes(scheme, experts, inner, hidden)[name]
        assert torch.equal(canonical_scale(scale, canonical), scale)
        for shape in others:
            # [E] stands for equal scales of gate and up.
            given = scale[:, 0] if len(shape) == 1 else scale.reshape(shape)
            seen = canonical_scale(given, canonical)
            assert seen.shape == canonical
            assert seen.is_contiguous()
            assert torch.equal(seen, given.reshape(experts, -1).expand(canonical).reshape(canonical))
            restored = dequantize_weights(quantized, given, scheme, halves)
            assert torch.equal(restored, dequantize_weights(quantized, seen, scheme, halves))


def test_shapes_of_a_rank_without_experts() -> None:
    for scheme in SCHEMES.values():
        for shapes in weight_scale_shapes(scheme, 0, 130, 140).values():
            for shape in shapes:
                assert canonical_scale(torch.empty(shape), shapes[0]).shape == shapes[0]


def test_what_follows_from_a_scheme() -> None:
    assert input_group_size(Fp8Block()) == 128
    assert input_group_size(Fp8PerTensor()) is None
    assert input_group_size(Fp8PerToken()) is None
    static = [scheme for scheme in (None, *SCHEMES.values()) if has_static_activations(scheme)]
    assert static == []
    assert has_static_activations(Fp8PerTensor(static_activations=True))


def test_a_scheme_without_a_definition_is_refused() -> None:
    scheme = QuantConfig()
    w = normal(1, 4, 4)
    for attempt in (
        lambda: quantize_weights(w, scheme),
        lambda: dequantize_weights(w, w, scheme),
        lambda: weight_scale_shapes(scheme, 1, 4, 4),
    ):
        with pytest.raises(ConfigError, match="no fp8 definition for QuantConfig"):
            attempt()


@settings(deadline=None)
@given(st.floats(0, 2.0**127, width=32))
def test_ue8m0_scales_are_the_least_power_of_two_that_is_enough(amax: float) -> None:
    _, exact = quantize_rows(torch.tensor([[amax]]))
    quantized, scale = quantize_rows(torch.tensor([[amax]]), ue8m0=True)
    mantissa, _ = math.frexp(float(scale))
    assert mantissa == 0.5
    assert float(scale) / 2 < float(exact) <= float(scale)
    assert torch.equal(quantized.float(), to_fp8(torch.tensor([[amax]]) / scale).float())


def test_ue8m0_example_of_the_module() -> None:
    assert quantize_rows(torch.tensor([[896.0], [900.0]]), ue8m0=True)[1].tolist() == [[2], [4]]
    assert pack_ue8m0(torch.tensor([[2.0], [900 / 448]])).tolist() == [[128], [129]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ue8m0_of_nan_and_inf(bad: float) -> None:
    quantized, scale = quantize_rows(torch.tensor([[1.0, bad], [1.0, 2.0]]), ue8m0=True)
    assert dequantize_rows(quantized, scale).isnan().tolist() == [[True, True], [False, False]]
    assert pack_ue8m0(scale)[0].tolist() == [255]


@pytest.mark.parametrize("num_groups", [1, 3, 4, 5, 8])
def test_packed_exponents(num_groups: int) -> None:
    exponents = torch.randint(1, 256, (3, num_groups), generator=torch.Generator().manual_seed(0))
    scale = torch.ldexp(torch.ones(()), exponents.float() - 127)
    scale[exponents == 255] = math.inf
    for strided in (scale, scale.T.contiguous().T):
        packed = pack_ue8m0(strided)
        assert packed.dtype is torch.int32
        assert packed.shape == (3, -(-num_groups // 4))
        for row in range(3):
            for group in range(4 * packed.shape[1]):
                byte = int(packed[row, group // 4]) >> 8 * (group % 4) & 0xFF
                assert byte == (exponents[row, group] if group < num_groups else 0)
        assert torch.equal(unpack_ue8m0(packed, num_groups), scale)
        assert torch.equal(unpack_ue8m0(packed.T.contiguous().T, num_groups), scale)


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (200, 130), (64, 576)])
def test_weights_quantized_anew(rows: int, columns: int) -> None:
    """As if the weights that the fp8 ones stand for were quantized with such scales in the first place."""
    quantized, scale = quantize_weights(normal(3, rows, columns), Fp8Block())
    scale[1] *= 100
    exact = dequantize_weights(quantized, scale, Fp8Block())
    anew, new_scale = requantize_weights_ue8m0(quantized, scale)
    assert (anew.shape, anew.dtype) == (quantized.shape, FP8_DTYPE)
    assert new_scale.shape == scale.shape
    assert (torch.frexp(new_scale)[0] == 0.5).all()
    for expert in range(3):
        for i in range(scale.shape[1]):
            for j in range(scale.shape[2]):
                tile = (expert, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                ratio = float(new_scale[expert, i, j]) / group_scale(exact[tile])
                assert 1 <= ratio * (1 + 1e-6) < 2 * (1 + 1e-6)
                assert torch.equal(anew[tile].float(), to_fp8(exact[tile] / new_scale[expert, i, j]).float())
    restored = dequantize_weights(anew, new_scale, Fp8Block())
    assert float((restored - exact).norm() / exact.norm()) < 0.04


def test_power_of_two_scales_stay_as_they_are() -> None:
    quantized, _ = quantize_weights(normal(2, 128, 256), Fp8Block())
    scale = torch.tensor([[[0.5, 4.0]], [[2.0**-20, 1.0]]])
    anew, new_scale = requantize_weights_ue8m0(quantized, scale)
    assert torch.equal(new_scale, scale)
    assert torch.equal(anew.float(), quantized.float())
    none, no_scale = requantize_weights_ue8m0(quantized[:0], scale[:0])
    assert (none.shape, no_scale.shape) == ((0, 128, 256), (0, 1, 2))


def test_scales_of_other_tiles_are_refused() -> None:
    quantized, scale = quantize_weights(normal(2, 128, 256), Fp8Block())
    with pytest.raises(ShapeError, match=r"\[2, 1, 2\], not \[2, 2, 1\]"):
        requantize_weights_ue8m0(quantized, scale.mT)


@pytest.mark.parametrize("scheme", [None, *SCHEMES.values()], ids=["bf16", *SCHEMES])
def test_gate_first_makes_the_same_layer(scheme: QuantConfig | None) -> None:
    gate, up = normal(2, 130, 140), normal(2, 130, 140, seed=1)
    if scheme is None:
        assert torch.equal(gate_first(torch.cat([up, gate], dim=1)), torch.cat([gate, up], dim=1))
        assert torch.equal(gate_first(torch.cat([up, gate], dim=1)[..., 0]), torch.cat([gate, up], dim=1)[..., 0])
        return
    up_gate, up_gate_scale = quantize_weights(torch.cat([up, gate], dim=1), scheme, halves=2)
    expected, expected_scale = quantize_weights(torch.cat([gate, up], dim=1), scheme, halves=2)
    seen, seen_scale = gate_first(up_gate), gate_first(up_gate_scale)
    assert seen.is_contiguous()
    assert torch.equal(seen.float(), expected.float())
    assert torch.equal(seen_scale, expected_scale)


def test_gate_first_of_what_has_no_halves() -> None:
    per_expert = torch.ones(4)
    assert gate_first(per_expert) is per_expert
    with pytest.raises(ShapeError, match=r"\[4, 3, 2\]"):
        gate_first(torch.ones(4, 3, 2))


@pytest.mark.parametrize(
    ("scheme", "hidden_size", "groups"),
    [
        (None, 192, 0),
        (Fp8Block(), 192, 2),
        (Fp8Block(), 128, 1),
        (Fp8PerToken(), 192, 1),
        (Fp8PerTensor(), 192, 1),
        (Fp8PerTensor(static_activations=True), 192, 0),
        (Fp8Block(64, 64), 192, 0),
        (Fp8Block(64, 64), 64, 1),
    ],
)
def test_scales_that_travel_with_a_row(scheme: QuantConfig | None, hidden_size: int, groups: int) -> None:
    assert dispatched_groups(scheme, hidden_size) == groups
