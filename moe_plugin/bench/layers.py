"""What is measured: a layer with random weights, one call's random inputs, what they must give and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_plugin.bench.results import Ceilings, LayerFacts
from moe_plugin.config import MoEConfig
from moe_plugin.errors import ConfigError
from moe_plugin.quantization import dequantize_weights, quantize_weights
from moe_plugin.reference import reference_moe

SKEWS = ("uniform", "zipf", "one-expert", "balanced")
"""How tokens choose their K distinct experts: all alike; the expert of rank r (a random order) with probability
proportional to 1 / r; expert 0 first for every token and the others alike; or in turn, so that all get as many."""

SAMPLED_TOKENS = 32
"""Tokens of a call that are compared with the oracle, spread evenly from the first to the last."""


@dataclass(frozen=True)
class Layer:
    """One layer on a device: a name for reports, its configuration, and weights as `moe_plugin.build` takes them."""

    name: str
    config: MoEConfig
    weights: dict[str, torch.Tensor | None]

    @classmethod
    def random(cls, name: str, config: MoEConfig, device: torch.device, seed: int) -> Layer:
        """Weights are made and quantized expert by expert on the device, so that no second copy is ever held.

        Outputs have about the size of inputs. The same seed gives the same weights before quantization. Per-tensor fp8
        has one scale for gate and up, which is what all peers can take.
        """
        generator = torch.Generator(device).manual_seed(seed)
        experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size

        def matrices(rows: int, depth: int, scale: float, halves: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            out = torch.empty(experts, rows, depth, dtype=config.weight_dtype, device=device)
            scales = []
            for expert in range(experts):
                matrix = torch.randn(rows, depth, generator=generator, device=device).mul_(scale)
                if config.quantization is None:
                    out[expert] = matrix
                    continue
                quantized, expert_scale = quantize_weights(matrix[None], config.quantization, halves)
                out[expert] = quantized[0]
                scales.append(expert_scale)
            return out, torch.cat(scales) if scales else None

        block = config.quantization is not None and config.quantization.name == "fp8_block"
        w13, w13_scale = matrices(2 * inner, hidden, hidden**-0.5, 2 if block else 1)
        w2, w2_scale = matrices(hidden, inner, 2 * inner**-0.5, 1)
        weights: dict[str, torch.Tensor | None] = {"w13": w13, "w2": w2, "w13_scale": w13_scale, "w2_scale": w2_scale}
        if config.has_bias:
            for bias, width in (("w13_bias", 2 * inner), ("w2_bias", hidden)):
                values = torch.randn(experts, width, generator=generator, device=device).mul_(0.5)
                weights[bias] = values.to(config.dtype)
        return cls(name, config, weights)

    @property
    def w13(self) -> torch.Tensor:
        return self._tensor("w13")

    @property
    def w2(self) -> torch.Tensor:
        return self._tensor("w2")

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self.weights[name]
        assert tensor is not None
        return tensor

    @property
    def facts(self) -> LayerFacts:
        config = self.config
        return LayerFacts(
            name=self.name,
            num_experts=config.num_experts,
            top_k=config.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
        )

    def expert(self, expert: int) -> dict[str, torch.Tensor]:
        """The tensors of one expert, leading dimension 1."""
        return {name: tensor[expert : expert + 1] for name, tensor in self.weights.items() if tensor is not None}

    def dequantized(self, name: str, expert: int) -> torch.Tensor:
        """w13 [1, 2I, H] or w2 [1, H, I] of one expert as floats."""
        scheme, tensors = self.config.quantization, self.expert(expert)
        if scheme is None:
            return tensors[name]
        return dequantize_weights(tensors[name], tensors[f"{name}_scale"], scheme, halves=2 if name == "w13" else 1)


@dataclass(frozen=True)
class Inputs:
    """One call: hidden_states [T, H], topk_ids int32 [T, K], topk_weights fp32 [T, K], rows of which sum to one."""

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    expected: dict[tuple[bool, bool], torch.Tensor] = field(default_factory=dict, compare=False)
    """What the sampled tokens must give, by the last two arguments of `oracle_of_sample`, which fills it."""

    @classmethod
    def random(cls, config: MoEConfig, tokens: int, skew: str, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(tokens, config.hidden_size, generator=generator, device=device)
        ids = choose_experts(skew, tokens, config.num_experts, config.top_k, generator)
        weights = torch.rand(tokens, config.top_k, generator=generator, device=device) + 0.1
        return cls(hidden.to(config.dtype), ids, weights / weights.sum(dim=-1, keepdim=True))

    @property
    def tokens(self) -> int:
        return self.hidden_states.shape[0]

    def sample(self) -> torch.Tensor:
        """Indices of the tokens that are compared with the oracle, int64 on the device."""
        count = min(self.tokens, SAMPLED_TOKENS)
        return torch.linspace(0, self.tokens - 1, count, device=self.hidden_states.device).round().long()


def choose_experts(skew: str, tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """int32 [tokens, top_k], distinct in each row; see SKEWS. On the generator's device."""
    if skew not in SKEWS:
        raise ConfigError(f"unknown skew {skew!r}; known: {', '.join(SKEWS)}")
    device = generator.device
    if skew == "balanced":
        pairs = torch.arange(tokens * top_k, device=device).view(tokens, top_k)
        return (pairs % num_experts).to(torch.int32)
    # The largest of log-probability plus Gumbel noise are a sample without replacement.
    uniform = torch.rand(tokens, num_experts, generator=generator, device=device).clamp_(1e-9, 1 - 1e-7)
    scores = -torch.log(-torch.log(uniform))
    if skew == "zipf":
        rank = torch.randperm(num_experts, generator=generator, device=device) + 1
        scores = scores - rank.log()
    elif skew == "one-expert":
        scores[:, 0] = math.inf
    return scores.topk(top_k, dim=-1).indices.to(torch.int32)


def oracle(
    layer: Layer, inputs: Inputs, rows: torch.Tensor, quantized_activations: bool, rounds_gate_up: bool = False
) -> torch.Tensor:
    """fp32 [len(rows), H]: what these tokens must give, expert by expert hit, on the device of the inputs.

    quantized_activations: with fp8 weights, quantize activations as moe_plugin.quantization defines it; else the
    weights count as what they dequantize to and activations stay as they are. rounds_gate_up: see `reference_moe`.
    """
    config = layer.config
    x, ids, router_weights = inputs.hidden_states[rows], inputs.topk_ids[rows], inputs.topk_weights[rows]
    out = torch.zeros(len(rows), config.hidden_size, device=x.device)
    arguments: dict[str, Any] = {
        "activation": config.activation,
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
        "rounds_gate_up": rounds_gate_up,
    }
    for expert in ids.unique().tolist():
        tensors = layer.expert(expert)
        biases: dict[str, Any] = {name: tensors[name] for name in ("w13_bias", "w2_bias") if name in tensors}
        own = torch.where(ids == expert, 0, -1)
        if quantized_activations and config.quantization is not None:
            scales = {name: tensors[name] for name in ("w13_scale", "w2_scale")}
            w13, w2 = tensors["w13"], tensors["w2"]
            extra: dict[str, Any] = {"quantization": config.quantization, **scales}
        else:
            w13, w2, extra = layer.dequantized("w13", expert), layer.dequantized("w2", expert), {}
        out += reference_moe(x, own, router_weights, w13, w2, **arguments, **biases, **extra)
    return out


def oracle_of_sample(
    layer: Layer, inputs: Inputs, quantized_activations: bool, rounds_gate_up: bool = False
) -> torch.Tensor:
    """The oracle on `inputs.sample()`, computed once per call and kind: contenders share it."""
    kind = quantized_activations, rounds_gate_up
    if kind not in inputs.expected:
        inputs.expected[kind] = oracle(layer, inputs, inputs.sample(), *kind)
    return inputs.expected[kind]


def right_answers(layer: Layer, inputs: Inputs, rounds_gate_up: bool) -> list[torch.Tensor]:
    """What experts of this package may give for the sample.

    rounds_gate_up: they may round the first GEMM's result, or not, as they choose by the number of rows.
    """
    fp8 = layer.config.quantization is not None
    kinds = (False, True) if fp8 and rounds_gate_up else (False,)
    return [oracle_of_sample(layer, inputs, fp8, rounds) for rounds in kinds]


def flops(config: MoEConfig, tokens: int) -> int:
    """Multiply-adds of the two grouped GEMMs, counted as two: 2 * T * K * 3 * H * I."""
    return 2 * tokens * config.top_k * 3 * config.hidden_size * config.intermediate_size


def compulsory_bytes(layer: Layer, inputs: Inputs, experts_hit: int) -> int:
    """Bytes that any implementation must move: weights, scales and biases of the experts hit, inputs in, output out."""
    per_expert = sum(tensor[0].nbytes for tensor in layer.weights.values() if tensor is not None)
    given = inputs.hidden_states.nbytes + inputs.topk_ids.nbytes + inputs.topk_weights.nbytes
    return experts_hit * per_expert + given + inputs.hidden_states.nbytes


def floor(ceilings: Ceilings, num_flops: int, num_bytes: int, is_fp8: bool) -> tuple[float, str]:
    """(microseconds, "memory" or "compute") below which no call can be, by the measured ceilings."""
    rates = ceilings.matmul_flops
    memory = num_bytes / ceilings.copy_bytes_per_second
    compute = num_flops / (rates.get("fp8", rates["bf16"]) if is_fp8 else rates["bf16"])
    return round(1e6 * max(memory, compute), 3), "memory" if memory >= compute else "compute"
