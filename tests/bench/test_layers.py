"""Random layers and inputs, what they cost (counted by hand) and what they must give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_plugin.bench.layers import (
    SKEWS,
    Inputs,
    Layer,
    choose_experts,
    compulsory_bytes,
    floor,
    flops,
    oracle,
    right_answers,
)
from moe_plugin.bench.results import Ceilings
from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken, MoEConfig
from moe_plugin.errors import ConfigError
from moe_plugin.numerics import relative_error
from moe_plugin.quantization import dequantize_weights
from moe_plugin.reference import reference_moe

CPU = torch.device("cpu")
CONFIG = MoEConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=128)
SCHEMES = [Fp8Block(), Fp8PerTensor(), Fp8PerToken()]


def test_flops_by_hand() -> None:
    # 5 tokens to 2 experts: 10 rows, each 256 -> 2 * 128 -> 256, so 3 * 256 * 128 multiply-adds a row.
    assert flops(CONFIG, 5) == 10 * 3 * 256 * 128 * 2


def test_bytes_by_hand() -> None:
    inputs = Inputs.random(CONFIG, 5, "uniform", CPU, 0)
    activations = 2 * 5 * 256 * 2 + 5 * 2 * (4 + 4)
    layer = Layer.random("x", CONFIG, CPU, 0)
    assert compulsory_bytes(layer, inputs, 3) == 3 * (3 * 128 * 256 * 2) + activations
    fp8 = Layer.random("x", replace(CONFIG, quantization=Fp8Block()), CPU, 0)
    # One byte a weight; 2 x 2 tiles of w13 and 2 x 1 of w2, four bytes a scale.
    assert compulsory_bytes(fp8, inputs, 3) == 3 * (3 * 128 * 256 + 4 * (4 + 2)) + activations


def test_the_floor_is_the_larger_bound() -> None:
    ceilings = Ceilings(copy_bytes_per_second=4e12, matmul_flops={"bf16": 8e14, "fp8": 1.6e15})
    assert floor(ceilings, 8 * 10**11, 10**9, is_fp8=False) == (1000.0, "compute")
    assert floor(ceilings, 8 * 10**11, 10**9, is_fp8=True) == (500.0, "compute")
    assert floor(ceilings, 10**9, 2 * 10**9, is_fp8=True) == (500.0, "memory")
    only_bf16 = Ceilings(copy_bytes_per_second=4e12, matmul_flops={"bf16": 8e14})
    assert floor(only_bf16, 8 * 10**11, 1, is_fp8=True) == (1000.0, "compute")


@pytest.mark.parametrize("skew", SKEWS)
def test_experts_are_distinct_and_reproducible(skew: str) -> None:
    first, second = (choose_experts(skew, 200, 16, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.int32
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 16 for row in first.tolist())


def test_skews_differ_as_they_say() -> None:
    def counts(skew: str) -> torch.Tensor:
        ids = choose_experts(skew, 4000, 16, 1, torch.Generator().manual_seed(0))
        return torch.bincount(ids.flatten(), minlength=16).sort(descending=True).values / 4000

    assert counts("uniform")[0] < 0.1
    # 1 / r over 16 ranks: the first has 1 / 3.38 of all, the second half of it.
    assert counts("zipf")[:2].tolist() == pytest.approx([0.296, 0.148], abs=0.03)
    assert counts("one-expert").tolist() == [1.0] + [0.0] * 15
    first = choose_experts("one-expert", 50, 16, 3, torch.Generator().manual_seed(0))
    assert (first == 0).sum(dim=-1).tolist() == [1] * 50
    with pytest.raises(ConfigError, match=r"normal.*uniform, zipf, one-expert, balanced"):
        choose_experts("normal", 1, 2, 1, torch.Generator())


def test_balanced_gives_every_expert_as_many() -> None:
    def counts(tokens: int, num_experts: int, top_k: int) -> list[int]:
        ids = choose_experts("balanced", tokens, num_experts, top_k, torch.Generator().manual_seed(0))
        return torch.bincount(ids.flatten(), minlength=num_experts).tolist()

    assert counts(64, 16, 4) == [16] * 16
    assert counts(12, 6, 3) == [6] * 6
    # 15 pairs over 6 experts cannot be even.
    assert counts(5, 6, 3) == [3, 3, 3, 2, 2, 2]
    ids = choose_experts("balanced", 3, 6, 4, torch.Generator())
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]


def test_inputs_are_never_zero_and_weights_sum_to_one() -> None:
    inputs = Inputs.random(CONFIG, 9, "uniform", CPU, 1)
    assert (inputs.hidden_states != 0).float().mean() > 0.99
    torch.testing.assert_close(inputs.topk_weights.sum(dim=-1), torch.ones(9))
    assert inputs.sample().tolist() == list(range(9))
    many = Inputs.random(CONFIG, 1000, "uniform", CPU, 1).sample().tolist()
    assert (len(many), many[0], many[-1]) == (32, 0, 999)


def test_the_oracle_on_a_sample_is_the_oracle() -> None:
    config = replace(CONFIG, has_bias=True, activation=Activation.SWIGLU_OAI)
    layer = Layer.random("x", config, CPU, 0)
    inputs = Inputs.random(config, 40, "zipf", CPU, 1)
    whole = reference_moe(
        inputs.hidden_states,
        inputs.topk_ids,
        inputs.topk_weights,
        layer.w13,
        layer.w2,
        w13_bias=layer.weights["w13_bias"],
        w2_bias=layer.weights["w2_bias"],
        activation=config.activation,
    )
    rows = torch.tensor([0, 7, 39])
    assert relative_error(oracle(layer, inputs, rows, quantized_activations=False), whole[rows]) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_fp8_weights_are_the_unquantized_ones_rounded(scheme) -> None:
    config = replace(CONFIG, quantization=scheme)
    plain, layer = Layer.random("x", CONFIG, CPU, 5), Layer.random("x", config, CPU, 5)
    assert layer.w13.dtype == layer.w2.dtype == torch.float8_e4m3fn
    for name, halves in (("w13", 2), ("w2", 1)):
        restored = dequantize_weights(layer.weights[name], layer.weights[f"{name}_scale"], scheme, halves)
        assert relative_error(restored, plain.weights[name]) < 4e-2
        assert torch.equal(layer.dequantized(name, 3)[0], restored[3])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_two_fp8_oracles_differ_by_the_rounding_of_activations(scheme) -> None:
    config = replace(CONFIG, quantization=scheme)
    layer = Layer.random("x", config, CPU, 0)
    inputs = Inputs.random(config, 16, "uniform", CPU, 1)
    quantized, plain = (oracle(layer, inputs, inputs.sample(), flag) for flag in (True, False))
    assert 1e-2 < relative_error(quantized, plain) < 6e-2


def test_where_the_first_product_may_be_rounded_there_are_two_right_answers() -> None:
    block = replace(CONFIG, quantization=Fp8Block())
    layer, inputs = Layer.random("x", block, CPU, 0), Inputs.random(block, 40, "uniform", CPU, 1)
    exact, rounded = right_answers(layer, inputs, rounds_gate_up=True)
    rows = inputs.sample()
    assert torch.equal(exact, oracle(layer, inputs, rows, quantized_activations=True))
    assert torch.equal(rounded, oracle(layer, inputs, rows, quantized_activations=True, rounds_gate_up=True))
    assert 0 < relative_error(exact, rounded) < 2e-2
    # Computed once for all contenders of a call.
    assert right_answers(layer, inputs, rounds_gate_up=False)[0] is exact
    assert right_answers(layer, inputs, rounds_gate_up=True)[1] is rounded


def test_without_quantization_one_answer_is_right() -> None:
    layer, inputs = Layer.random("x", CONFIG, CPU, 0), Inputs.random(CONFIG, 5, "uniform", CPU, 1)
    (answer,) = right_answers(layer, inputs, rounds_gate_up=True)
    assert torch.equal(answer, oracle(layer, inputs, inputs.sample(), quantized_activations=False))
