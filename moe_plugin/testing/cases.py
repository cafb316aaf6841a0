"""Layers and inputs that are the same on every rank that asks for the same seed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_plugin.config import Fp8Block, Fp8PerToken, MoEConfig
from moe_plugin.modular_kernel import MoELayer
from moe_plugin.numerics import FP8_TOLERANCE, TOLERANCES, Tolerance
from moe_plugin.quantization import FP8_MAX, dequantize_weights, has_static_activations, quantize_weights
from moe_plugin.reference import reference_moe
from moe_plugin.strategies.build import build
from moe_plugin.strategies.selector import pair_classes
from moe_plugin.testing.rank_pool import RankContext
from moe_plugin.workspace import WorkspaceArena

DEFAULTS: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "max_tokens_per_rank": 64,
}


@dataclass(frozen=True)
class Weights:
    """All experts of a layer: w13 [E, 2I, H], w2 [E, H, I], biases [E, 2I] and [E, H] or None; fp8 has its scales."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    a13_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None

    @classmethod
    def random(cls, config: MoEConfig, device: torch.device, seed: int = 0) -> Weights:
        """Scaled so that outputs have about the size of inputs."""
        generator = torch.Generator().manual_seed(seed)
        experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, config.dtype)

        weights = cls(
            w13=normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
            w2=normal(experts, hidden, inner, scale=2 * inner**-0.5),
            w13_bias=normal(experts, 2 * inner, scale=0.5) if config.has_bias else None,
            w2_bias=normal(experts, hidden, scale=0.5) if config.has_bias else None,
        )
        return weights if config.quantization is None else weights.quantized(config)

    def quantized(self, config: MoEConfig) -> Weights:
        """The same in fp8. Static activation scales differ between experts and fit `Inputs.random`."""
        scheme = config.quantization
        assert scheme is not None
        w13, w13_scale = quantize_weights(self.w13, scheme, halves=2)
        w2, w2_scale = quantize_weights(self.w2, scheme)
        a13_scale = a2_scale = None
        if has_static_activations(scheme):
            spread = torch.linspace(0.5, 1, config.num_experts, device=self.w13.device)
            a13_scale, a2_scale = 6 / FP8_MAX * spread, 24 / FP8_MAX * spread
        return Weights(w13, w2, self.w13_bias, self.w2_bias, w13_scale, w2_scale, a13_scale, a2_scale)

    def dequantized(self, config: MoEConfig) -> Weights:
        """What fp8 weights stand for, in fp32."""
        scheme = config.quantization
        assert scheme is not None and self.w13_scale is not None and self.w2_scale is not None
        return Weights(
            w13=dequantize_weights(self.w13, self.w13_scale, scheme, halves=2),
            w2=dequantize_weights(self.w2, self.w2_scale, scheme),
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
        )

    def of_rank(self, config: MoEConfig) -> dict[str, Any]:
        """What this rank passes to `build`: its experts, and its slice of the intermediate size."""
        parallel = config.parallel
        mine = list(config.expert_placement.experts_of_rank[parallel.ep_rank])
        inner = config.local_intermediate_size

        def columns(unit: int = 1) -> slice:
            return slice(parallel.tp_rank * inner // unit, -(-(parallel.tp_rank + 1) * inner // unit))

        def of_experts(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[mine].contiguous()

        def gate_and_up(tensor: torch.Tensor | None, unit: int = 1) -> torch.Tensor | None:
            return None if tensor is None else _of_halves(tensor[mine], columns(unit))

        w13_scale, w2_scale = of_experts(self.w13_scale), of_experts(self.w2_scale)
        if isinstance(config.quantization, Fp8Block):
            assert w2_scale is not None
            w13_scale = gate_and_up(self.w13_scale, config.quantization.block_n)
            w2_scale = w2_scale[..., columns(config.quantization.block_k)].contiguous()
        elif isinstance(config.quantization, Fp8PerToken):
            w13_scale = gate_and_up(self.w13_scale)
        return {
            "w13": gate_and_up(self.w13),
            "w2": self.w2[mine][..., columns()].contiguous(),
            "w13_bias": gate_and_up(self.w13_bias),
            "w2_bias": of_experts(self.w2_bias),
            "w13_scale": w13_scale,
            "w2_scale": w2_scale,
            "a13_scale": of_experts(self.a13_scale),
            "a2_scale": of_experts(self.a2_scale),
        }


def _of_halves(tensor: torch.Tensor, columns: slice) -> torch.Tensor:
    """[E, 2N, ...], gate then up -> `columns` of both."""
    return tensor.unflatten(1, (2, -1))[:, :, columns].flatten(1, 2).contiguous()


@dataclass(frozen=True)
class Inputs:
    """One call: hidden_states [T, H], topk_ids int64 [T, K], topk_weights fp32 [T, K]."""

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    @classmethod
    def random(cls, config: MoEConfig, num_tokens: int, device: torch.device, seed: int) -> Inputs:
        """Distinct uniform experts per token, weights that do not sum to one."""
        generator = torch.Generator().manual_seed(1000 + seed)
        hidden = torch.randn(num_tokens, config.hidden_size, generator=generator)
        scores = torch.rand(num_tokens, config.num_experts, generator=generator)
        ids = (
            scores.topk(config.top_k, dim=-1).indices if num_tokens else torch.empty(0, config.top_k, dtype=torch.int64)
        )
        weights = torch.rand(num_tokens, config.top_k, generator=generator) + 0.1
        return cls(hidden.to(device, config.dtype), ids.to(device), weights.to(device))

    def with_ids(self, topk_ids: torch.Tensor) -> Inputs:
        return replace(self, topk_ids=topk_ids.to(self.topk_ids.device))

    def as_tuple(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden_states, self.topk_ids, self.topk_weights


@dataclass
class Case:
    """A layer built with one strategy on the ranks of a context, and the oracle over all its experts.

    num_nodes: as many as the ranks are said to be spread over.
    """

    context: RankContext
    strategy: str
    dtype: torch.dtype
    overrides: dict[str, Any] = field(default_factory=dict)
    tp_size: int = 1
    timeout_seconds: float = 30.0
    num_nodes: int = 1

    def __post_init__(self) -> None:
        parallel = replace(self.context.parallel(self.tp_size, self.timeout_seconds), num_nodes=self.num_nodes)
        overrides = DEFAULTS | self.overrides
        dispatcher, experts = pair_classes(self.strategy) if "+" in self.strategy else (None, None)
        self._rounds_gate_up = experts is not None and experts.rounds_gate_up
        multiple = 1 if experts is None else experts.size_multiple
        for name, unit in (("hidden_size", multiple), ("intermediate_size", multiple * self.tp_size)):
            if multiple > 1 and overrides[name] % 16 == 0:  # odd sizes stay odd, and are refused or right
                overrides[name] = -(-overrides[name] // unit) * unit
        if dispatcher is not None and self.context.device.type == "cuda" and overrides["hidden_size"] % 16 == 0:
            overrides["hidden_size"] = max(overrides["hidden_size"], dispatcher.min_hidden_size)
        placement = overrides.pop("placement", None)
        self.config = MoEConfig(
            **overrides,
            dtype=self.dtype,
            parallel=parallel,
            placement=placement(parallel.ep_size) if callable(placement) else placement,
        )
        self.weights = Weights.random(self.config, self.context.device)
        takes_quantized = experts is not None and experts.takes_quantized
        self._by_reciprocal = (
            takes_quantized and dispatcher is not None and dispatcher.quantizes_by_reciprocal(self.config)
        )
        self.arena = WorkspaceArena(self.context.device, poison=True)
        self.layer: MoELayer = build(
            self.config,
            **self.weights.of_rank(self.config),
            strategy=self.strategy,
            arena=self.arena,
        )

    def inputs(self, num_tokens: int, seed: int = 0) -> Inputs:
        """Inputs of this rank: TP ranks get the same ones, EP ranks their own."""
        return Inputs.random(self.config, num_tokens, self.context.device, seed * 100 + self.config.parallel.ep_rank)

    @property
    def tolerance(self) -> Tolerance:
        """How far the layer may be from `expected`."""
        return TOLERANCES[self.config.dtype] if self.config.quantization is None else FP8_TOLERANCE

    def expected(self, inputs: Inputs) -> torch.Tensor:
        """The oracle's answer, fp32."""
        return oracle(self.config, self.weights, inputs, self._rounds_gate_up, self._by_reciprocal)

    def expected_unquantized(self, inputs: Inputs) -> torch.Tensor:
        """The oracle's answer on dequantized weights and activations as they are, fp32."""
        return oracle(replace(self.config, quantization=None), self.weights.dequantized(self.config), inputs)


def oracle(
    config: MoEConfig,
    weights: Weights,
    inputs: Inputs,
    rounds_gate_up: bool = False,
    quantizes_by_reciprocal: bool = False,
) -> torch.Tensor:
    """reference_moe of a whole layer. rounds_gate_up counts in fp8 alone, where rounding twice shows."""
    return reference_moe(
        *inputs.as_tuple(),
        weights.w13,
        weights.w2,
        w13_bias=weights.w13_bias,
        w2_bias=weights.w2_bias,
        activation=config.activation,
        swiglu_alpha=config.swiglu_alpha,
        swiglu_limit=config.swiglu_limit,
        apply_router_weight_on_input=config.apply_router_weight_on_input,
        quantization=config.quantization,
        w13_scale=weights.w13_scale,
        w2_scale=weights.w2_scale,
        a13_scale=weights.a13_scale,
        a2_scale=weights.a2_scale,
        rounds_gate_up=rounds_gate_up and config.quantization is not None,
        quantizes_by_reciprocal=quantizes_by_reciprocal,
    )


def tokens_of_rank(context: RankContext, tp_size: int, *counts: int) -> int:
    """A different number of tokens for each EP rank, cycling through `counts`; the same for its TP ranks."""
    return counts[(context.rank // tp_size) % len(counts)]
