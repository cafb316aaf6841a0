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

RANK_STRIDE = 1_000_003
"""Between the seeds of two ranks' tokens."""

SAMPLED_TOKENS = 32
"""Tokens of a call that are compared with the oracle, spread evenly from the first to the last."""


@dataclass(frozen=True)
class Layer:
    """One rank's part of a layer: a name for reports, its configuration, and weights as `moe_plugin.build` takes them.

    seed: what the weights were made from. Those of an expert follow from it and the expert alone, so that every rank
    can make those of another.
    """

    name: str
    config: MoEConfig
    weights: dict[str, torch.Tensor | None]
    seed: int

    @classmethod
    def random(cls, name: str, config: MoEConfig, device: torch.device, seed: int) -> Layer:
        """The experts of this rank, made and quantized one by one, so that no second copy is ever held.

        Outputs have about the size of inputs. The same seed gives the same weights before quantization. Per-tensor fp8
        has one scale for gate and up, which is what all peers can take.
        """
        experts = config.expert_placement.experts_of_rank[config.parallel.ep_rank]
        weights: dict[str, Any] = dict.fromkeys(("w13", "w2", "w13_scale", "w2_scale"))
        for slot, expert in enumerate(experts):
            for part, tensor in random_expert(config, expert, device, seed).items():
                if slot == 0:
                    weights[part] = tensor.new_empty(len(experts), *tensor.shape[1:])
                weights[part][slot] = tensor[0]
        return cls(name, config, weights, seed)

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
        """The tensors of one expert of the whole layer, leading dimension 1; made anew where another rank holds it."""
        experts = self.config.expert_placement.experts_of_rank[self.config.parallel.ep_rank]
        if expert not in experts:
            return random_expert(self.config, expert, self.w13.device, self.seed)
        slot = experts.index(expert)
        return {name: tensor[slot : slot + 1] for name, tensor in self.weights.items() if tensor is not None}

    def dequantized(self, name: str, expert: int) -> torch.Tensor:
        """w13 [1, 2I, H] or w2 [1, H, I] of one expert as floats."""
        return _dequantized(self.config, self.expert(expert), name)


def random_expert(config: MoEConfig, expert: int, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """The weights of one expert, leading dimension 1: w13, w2 and, where the configuration has them, scales, biases."""
    generator = torch.Generator(device).manual_seed(seed * config.num_experts + expert)
    inner, hidden = config.intermediate_size, config.hidden_size
    block = config.quantization is not None and config.quantization.name == "fp8_block"
    tensors: dict[str, torch.Tensor] = {}
    for name, rows, depth, scale, halves in (
        ("w13", 2 * inner, hidden, hidden**-0.5, 2 if block else 1),
        ("w2", hidden, inner, 2 * inner**-0.5, 1),
    ):
        matrix = torch.randn(1, rows, depth, generator=generator, device=device).mul_(scale)
        if config.quantization is None:
            tensors[name] = matrix.to(config.dtype)
        else:
            tensors[name], tensors[f"{name}_scale"] = quantize_weights(matrix, config.quantization, halves)
    if config.has_bias:
        for name, width in (("w13_bias", 2 * inner), ("w2_bias", hidden)):
            tensors[name] = torch.randn(1, width, generator=generator, device=device).mul_(0.5).to(config.dtype)
    return tensors


def _dequantized(config: MoEConfig, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if config.quantization is None:
        return tensors[name]
    halves = 2 if name == "w13" else 1
    return dequantize_weights(tensors[name], tensors[f"{name}_scale"], config.quantization, halves=halves)


@dataclass(frozen=True)
class Inputs:
    """One call on a rank: hidden_states [T, H], topk_ids int32 [T, K], topk_weights fp32 [T, K], rows summing to 1.

    routing: topk_ids of all ranks in the same call, int32 [R, T, K]; None where there is one.
    """

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    routing: torch.Tensor | None = None
    expected: dict[tuple[bool, bool], torch.Tensor] = field(default_factory=dict, compare=False)
    """What the sampled tokens must give, by the last two arguments of `oracle_of_sample`, which fills it."""

    @classmethod
    def random(cls, config: MoEConfig, tokens: int, skew: str, device: torch.device, seed: int) -> Inputs:
        """`tokens` on every rank. The ranks draw one routing of all their tokens, so that a skew is the same to all."""
        parallel = config.parallel
        generator = torch.Generator(device).manual_seed(seed)
        ids = choose_experts(skew, parallel.ep_size * tokens, config.num_experts, config.top_k, generator)
        routing = ids.view(parallel.ep_size, tokens, config.top_k)
        generator.manual_seed(seed + RANK_STRIDE * (parallel.ep_rank + 1))
        hidden = torch.randn(tokens, config.hidden_size, generator=generator, device=device)
        weights = torch.rand(tokens, config.top_k, generator=generator, device=device) + 0.1
        own = routing[parallel.ep_rank].clone()
        return cls(hidden.to(config.dtype), own, weights / weights.sum(dim=-1, keepdim=True), routing)

    @property
    def tokens(self) -> int:
        return self.hidden_states.shape[0]

    def sample(self) -> torch.Tensor:
        """Indices of the tokens that are compared with the oracle, int64 on the device."""
        count = min(self.tokens, SAMPLED_TOKENS)
        return torch.linspace(0, self.tokens - 1, count, device=self.hidden_states.device).round().long()

    def experts_hit(self, config: MoEConfig) -> int:
        """Experts of this rank that a token of any rank chose."""
        chosen = (self.topk_ids if self.routing is None else self.routing).unique().tolist()
        own = config.expert_placement.experts_of_rank[config.parallel.ep_rank]
        return len(set(chosen) & set(own))


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
            w13, w2 = (_dequantized(config, tensors, name) for name in ("w13", "w2"))
            extra = {}
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
