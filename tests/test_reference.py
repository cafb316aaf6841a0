"""The oracle against a construction that shares nothing with it, and the activations against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from moe_plugin.activation import gated_activation, gated_activation_of
from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken, MoEConfig, QuantConfig
from moe_plugin.errors import ExpertIdError, ShapeError
from moe_plugin.numerics import FP8_NOISE, assert_close_to_oracle, relative_error
from moe_plugin.quantization import dequantize_weights, quantize_weights, to_fp8
from moe_plugin.reference import reference_moe

E, K, H, INNER, T = 6, 3, 10, 7, 9
ALPHA, LIMIT = 1.5, 0.8


def scalar_activation(gate: float, up: float, activation: str) -> float:
    """One element, from the papers' formulas."""
    if activation == "silu_and_mul":
        return gate / (1 + math.exp(-gate)) * up
    if activation == "gelu_and_mul":
        return 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    gate, up = min(gate, LIMIT), max(-LIMIT, min(up, LIMIT))
    return (up + 1) * gate / (1 + math.exp(-ALPHA * gate))


@pytest.mark.parametrize("activation", list(Activation))
def test_activations_element_by_element(activation: Activation) -> None:
    gate_up = torch.linspace(-3, 3, 24).view(3, 8)
    out = gated_activation(gate_up, activation, ALPHA, LIMIT)
    expected = [[scalar_activation(row[i], row[4 + i], activation.value) for i in range(4)] for row in gate_up.tolist()]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_constants_come_from_the_configuration() -> None:
    config = MoEConfig(
        num_experts=1,
        top_k=1,
        hidden_size=4,
        intermediate_size=4,
        activation="swiglu_oai",
        swiglu_alpha=ALPHA,
        swiglu_limit=LIMIT,
    )
    gate_up = torch.linspace(-3, 3, 8)[None]
    expected = gated_activation(gate_up, Activation.SWIGLU_OAI, ALPHA, LIMIT)
    assert torch.equal(gated_activation_of(config, gate_up), expected)
    assert not torch.equal(gated_activation(gate_up, Activation.SWIGLU_OAI), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations_keep_the_dtype_and_leave_the_input(dtype: torch.dtype) -> None:
    gate_up = torch.randn(5, 8).to(dtype)
    before = gate_up.clone()
    for activation in Activation:
        assert gated_activation(gate_up, activation).dtype is dtype
    assert torch.equal(gate_up, before)


@pytest.fixture
def layer() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w13": (E, 2 * INNER, H), "w2": (E, H, INNER), "w13_bias": (E, 2 * INNER), "w2_bias": (E, H)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    return torch.randn(T, H, generator=generator), ids, torch.randn(T, K, generator=generator)


def dense(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    layer: dict[str, torch.Tensor],
    activation: str,
    on_input: bool = False,
) -> torch.Tensor:
    """Every expert on every token in fp64, then a [T, E] matrix of router weights."""
    layer = {name: tensor.double() for name, tensor in layer.items()}
    router = torch.zeros(x.shape[0], E + 1, dtype=torch.float64)
    router.scatter_add_(1, torch.where(ids < 0, E, ids).long(), weights.double())
    router = router[:, :E]
    rows = x.double()[:, None].expand(-1, E, -1)
    if on_input:
        rows = rows * router[..., None]
        router = (router != 0).double()
    gate_up = torch.einsum("teh,eih->tei", rows, layer["w13"])
    gate_up = gate_up + layer["w13_bias"] if "w13_bias" in layer else gate_up
    gate, up = gate_up[..., :INNER], gate_up[..., INNER:]
    flat = [scalar_activation(g, u, activation) for g, u in zip(gate.flatten(), up.flatten(), strict=True)]
    inner = torch.tensor(flat, dtype=torch.float64).view(gate.shape)
    out = torch.einsum("tei,ehi->teh", inner, layer["w2"])
    out = out + layer["w2_bias"] if "w2_bias" in layer else out
    return torch.einsum("teh,te->th", out, router).float()


@pytest.mark.parametrize("activation", [activation.value for activation in Activation])
@pytest.mark.parametrize("has_bias", [False, True])
def test_oracle_equals_the_dense_layer(layer, call, activation: str, has_bias: bool) -> None:
    if not has_bias:
        layer = {name: tensor for name, tensor in layer.items() if "bias" not in name}
    out = reference_moe(*call, **layer, activation=activation, swiglu_alpha=ALPHA, swiglu_limit=LIMIT)
    torch.testing.assert_close(out, dense(*call, layer, activation), rtol=1e-4, atol=1e-4)


def test_router_weight_on_input(layer, call) -> None:
    x, ids, weights = call[0], call[1][:, :1], call[2][:, :1]
    out = reference_moe(x, ids, weights, **layer, apply_router_weight_on_input=True)
    torch.testing.assert_close(out, dense(x, ids, weights, layer, "silu_and_mul", on_input=True), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, reference_moe(x, ids, weights, **layer))


def test_dropped_ids_and_the_same_expert_twice(layer, call) -> None:
    x, ids, weights = call
    ids = ids.clone()
    ids[0], ids[1, 1], ids[2] = -1, -1, 4
    out = reference_moe(x, ids, weights, **layer)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out, dense(x, ids, weights, layer, "silu_and_mul"), rtol=1e-4, atol=1e-4)
    once = reference_moe(x[2:3], torch.tensor([[4]]), weights[2:3].sum(1, keepdim=True), **layer)
    torch.testing.assert_close(out[2:3], once, rtol=1e-4, atol=1e-4)


def test_the_answer_is_fp32_computed_in_fp32(layer, call) -> None:
    x, ids, weights = call
    halves = {name: tensor.bfloat16() for name, tensor in layer.items()}
    out = reference_moe(x.bfloat16(), ids.short(), weights.bfloat16(), **halves)
    floats = {name: tensor.float() for name, tensor in halves.items()}
    assert out.dtype is torch.float32
    assert torch.equal(out, reference_moe(x.bfloat16().float(), ids, weights.bfloat16().float(), **floats))


def test_no_tokens(layer) -> None:
    out = reference_moe(torch.empty(0, H), torch.empty(0, K, dtype=torch.int64), torch.empty(0, K), **layer)
    assert out.shape == (0, H)


@pytest.mark.parametrize("bad", [E, -2])
def test_ids_out_of_range(layer, call, bad: int) -> None:
    x, ids, weights = call
    ids = ids.clone()
    ids[3, 1] = bad
    with pytest.raises(ExpertIdError, match=rf"\[-1, {E}\), got"):
        reference_moe(x, ids, weights, **layer)


def test_inputs_are_left_alone(layer, call) -> None:
    before = [tensor.clone() for tensor in (*call, *layer.values())]
    reference_moe(*call, **layer, activation="swiglu_oai", swiglu_limit=LIMIT)
    assert all(torch.equal(*pair) for pair in zip(before, (*call, *layer.values()), strict=True))


FP8_SCHEMES = {
    "block": Fp8Block(),
    "small block": Fp8Block(16, 16),
    "per_token": Fp8PerToken(),
    "per_tensor": Fp8PerTensor(),
    "static": Fp8PerTensor(static_activations=True),
}


def rounded(x: torch.Tensor, group_size: int, scale: float | None) -> torch.Tensor:
    """One vector to fp8 and back, group by group."""
    groups = []
    for group in x.float().split(group_size):
        s = max(float(group.abs().max()), 1e-4) / 448 if scale is None else scale
        groups.append(to_fp8(group / s).float() * s)
    return torch.cat(groups)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rounds_gate_up"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)]
)
@pytest.mark.parametrize("scheme", FP8_SCHEMES.values(), ids=FP8_SCHEMES)
def test_fp8_pair_by_pair(scheme: QuantConfig, dtype: torch.dtype, rounds_gate_up: bool, on_input: bool) -> None:
    experts, top_k, tokens, hidden, inner = 3, 1 if on_input else 2, 4, 150, 140
    generator = torch.Generator().manual_seed(0)
    w13, w13_scale = quantize_weights(torch.randn(experts, 2 * inner, hidden, generator=generator) / 12, scheme, 2)
    w2, w2_scale = quantize_weights(torch.randn(experts, hidden, inner, generator=generator) / 12, scheme)
    bias = torch.randn(experts, 2 * inner, generator=generator).to(dtype)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.tensor([[0, 2], [1, 1], [-1, 0], [2, 1]])[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator) + 0.5
    static = scheme == Fp8PerTensor(static_activations=True)
    a13 = torch.tensor([0.002, 0.005, 0.004]) if static else None
    a2 = torch.tensor([0.01, 0.002, 0.005]) if static else None
    out = reference_moe(
        x,
        ids,
        weights,
        w13,
        w2,
        w13_bias=bias,
        apply_router_weight_on_input=on_input,
        quantization=scheme,
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        a13_scale=a13,
        a2_scale=a2,
        rounds_gate_up=rounds_gate_up,
    )

    real_w13 = dequantize_weights(w13, w13_scale, scheme, halves=2)
    real_w2 = dequantize_weights(w2, w2_scale, scheme)
    group_size = scheme.block_k if isinstance(scheme, Fp8Block) else hidden
    expected = torch.zeros(tokens, hidden)
    for token, row in enumerate(ids.tolist()):
        for k, expert in enumerate(row):
            if expert < 0:
                continue
            weight = float(weights[token, k])
            state = (x[token].float() * weight).to(dtype) if on_input else x[token]
            # The largest of the given scales serves all experts: the row is quantized before it meets them.
            state = rounded(state, group_size, 0.005 if static else None)
            gate_up = real_w13[expert] @ state
            if rounds_gate_up:
                gate_up = gate_up.to(dtype).float()
            gate, up = (gate_up + bias[expert].float()).chunk(2)
            middle = rounded(gate * torch.sigmoid(gate) * up, 128, float(a2[expert]) if a2 is not None else None)
            expected[token] += (real_w2[expert] @ middle) * (1 if on_input else weight)
    # Sums in another order may take an element of the intermediate to the next fp8 value.
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert relative_error(out, expected) < 2e-3


@pytest.mark.parametrize("scheme", FP8_SCHEMES.values(), ids=FP8_SCHEMES)
def test_fp8_is_near_the_layer_it_came_from(scheme: QuantConfig) -> None:
    generator = torch.Generator().manual_seed(1)
    w13, w2 = torch.randn(4, 512, 192, generator=generator) / 14, torch.randn(4, 192, 256, generator=generator) / 8
    call = torch.randn(64, 192, generator=generator), torch.arange(64)[:, None] % 4, torch.ones(64, 1)
    (q13, s13), (q2, s2) = quantize_weights(w13, scheme, 2), quantize_weights(w2, scheme)
    static = scheme == Fp8PerTensor(static_activations=True)
    a13, a2 = (torch.tensor(0.01), torch.tensor([0.03])) if static else (None, None)
    out = reference_moe(*call, q13, q2, quantization=scheme, w13_scale=s13, w2_scale=s2, a13_scale=a13, a2_scale=a2)
    assert_close_to_oracle(
        out,
        reference_moe(*call, dequantize_weights(q13, s13, scheme, 2), dequantize_weights(q2, s2, scheme)),
        FP8_NOISE,
    )
    # All six roundings of a layer, those of the weights included.
    assert relative_error(out, reference_moe(*call, w13, w2)) < 7e-2


def test_fp8_without_its_scales(layer, call) -> None:
    layer = {name: to_fp8(tensor) for name, tensor in layer.items() if "bias" not in name}
    one = torch.ones(E)
    with pytest.raises(ShapeError, match="fp8_per_tensor weights need w13_scale and w2_scale"):
        reference_moe(*call, **layer, quantization=Fp8PerTensor(), w13_scale=one)
    static = Fp8PerTensor(static_activations=True)
    with pytest.raises(ShapeError, match="static activations needs a13_scale and a2_scale"):
        reference_moe(*call, **layer, quantization=static, w13_scale=one, w2_scale=one, a13_scale=one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gate_up_rounded_to_the_dtype_of_the_rows(layer, dtype: torch.dtype) -> None:
    """Between the first GEMM and its bias, as a GEMM of a library rounds it; nothing else is rounded."""
    generator = torch.Generator().manual_seed(4)
    # Sums of 17 bits: fp32 holds them, in whatever order they are added up, and the others do not.
    x = (torch.randint(-128, 128, (T, H), generator=generator) / 32).to(dtype)
    layer["w13"] = torch.randint(-128, 128, layer["w13"].shape, generator=generator) / 64
    ids, weights = torch.randint(E, (T, 1), generator=generator), torch.rand(T, 1, generator=generator)
    out = reference_moe(x, ids, weights, **layer, rounds_gate_up=True)
    expected = []
    for row, expert, weight in zip(x.float(), ids[:, 0].tolist(), weights, strict=True):
        gate, up = ((layer["w13"][expert] @ row).to(dtype).float() + layer["w13_bias"][expert]).chunk(2)
        middle = gate * torch.sigmoid(gate) * up
        expected.append(weight * (layer["w2"][expert] @ middle + layer["w2_bias"][expert]))
    torch.testing.assert_close(out, torch.stack(expected))
    # What rounds to fp32 does not round.
    unrounded = reference_moe(x, ids, weights, **layer)
    assert torch.equal(unrounded, out) == (dtype is torch.float32)
