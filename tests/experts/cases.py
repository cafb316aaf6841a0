"""What the Experts tests share: random layers, hand-made dispatches, and the oracle's answer to both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from moe_plugin.config import MoEConfig, QuantConfig
from moe_plugin.modular_kernel import (
    CONTIGUOUS_ALIGNMENT,
    ActivationFormat,
    Dispatched,
    DispatchHandle,
    Experts,
    ExpertWeights,
    RouterWeightStage,
)
from moe_plugin.numerics import FP8_TOLERANCE, TOLERANCES, Tolerance, assert_close_to_oracle
from moe_plugin.quantization import input_group_size, quantize_rows
from moe_plugin.reference import reference_moe
from moe_plugin.testing.cases import Weights
from moe_plugin.workspace import WorkspaceArena

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DEFAULTS: dict[str, Any] = {
    "num_experts": 5,
    "top_k": 2,
    "hidden_size": 40,
    "intermediate_size": 24,
    "max_tokens_per_rank": 64,
}


FORMATS = {
    "local_ids": ActivationFormat.STANDARD,
    "group_ends": ActivationFormat.CONTIGUOUS,
    "expert_num_tokens": ActivationFormat.BATCHED_EXPERTS,
}
"""The field of Dispatched that each format cannot do without."""


def make_config(**overrides: Any) -> MoEConfig:
    return MoEConfig(**(DEFAULTS | overrides))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def make_weights(config: MoEConfig) -> ExpertWeights:
    """This rank's experts, scaled so that outputs have about the size of inputs, as Experts get them."""
    if config.quantization is not None:
        weights = ExpertWeights(**Weights.random(config, torch.device(DEVICE)).of_rank(config))
        weights.check(config)
        return weights.canonical(config)
    experts, inner, hidden = config.num_local_experts, config.local_intermediate_size, config.hidden_size
    bias = config.has_bias
    return ExpertWeights(
        w13=normal(experts, 2 * inner, hidden, seed=1, dtype=config.dtype, scale=hidden**-0.5),
        w2=normal(experts, hidden, inner, seed=2, dtype=config.dtype, scale=2 * inner**-0.5),
        w13_bias=normal(experts, 2 * inner, seed=3, dtype=config.dtype) if bias else None,
        w2_bias=normal(experts, hidden, seed=4, dtype=config.dtype) if bias else None,
    )


def backwards(weights: ExpertWeights) -> ExpertWeights:
    """The same experts in the opposite order."""

    def reverse(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.float8_e4m3fn:  # flip has no fp8 kernel
            return tensor.view(torch.uint8).flip(0).view(tensor.dtype).contiguous()
        return tensor.flip(0).contiguous()

    given = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return replace(weights, **{name: None if tensor is None else reverse(tensor) for name, tensor in given.items()})


def random_ids(num_rows: int, top_k: int, num_experts: int) -> torch.Tensor:
    """int32 [num_rows, top_k] in [-1, num_experts), duplicates included."""
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randint(-1, num_experts, (num_rows, top_k), generator=generator, dtype=torch.int32).to(DEVICE)


@dataclass
class Layer:
    """An Experts object with its weights and an arena whose memory starts as NaN.

    rounds_gate_up: of the oracle, in fp8; as the class says unless a test knows which way a call goes.
    """

    config: MoEConfig
    weights: ExpertWeights
    experts: Experts
    arena: WorkspaceArena
    rounds_gate_up: bool = field(init=False)

    def __post_init__(self) -> None:
        self.rounds_gate_up = self.experts.rounds_gate_up

    @classmethod
    def of(cls, experts: type[Experts], **overrides: Any) -> Layer:
        config = make_config(**overrides)
        weights = make_weights(config)
        return cls(config, weights, experts(config, weights), WorkspaceArena(DEVICE, poison=True))

    def rows(self, num_rows: int) -> torch.Tensor:
        return normal(num_rows, self.config.hidden_size, seed=5, dtype=self.config.dtype)

    def apply(
        self,
        activations: torch.Tensor,
        *,
        handle: DispatchHandle | None = None,
        output: torch.Tensor | None = None,
        **fields: Any,
    ) -> torch.Tensor:
        """Run the experts on a dispatch made of `activations` and `fields`, which say in which format it is."""
        handle = handle or self.handle(activations.shape[0])
        activation_format = next(
            activation_format for name, activation_format in FORMATS.items() if fields.get(name) is not None
        )
        weighted = fields.get("topk_weights") is not None
        dispatched = Dispatched(
            activations=activations,
            activation_format=activation_format,
            router_weight_stage=RouterWeightStage.EXPERTS_GATHER if weighted else RouterWeightStage.COMBINE,
            handle=handle,
            **fields,
        )
        return self.experts.apply(dispatched, handle.workspace, output)

    def handle(self, num_rows: int) -> DispatchHandle:
        return DispatchHandle(owner=None, num_tokens=num_rows, workspace=self.arena.lease())  # type: ignore[arg-type]

    def expected(
        self, activations: torch.Tensor, local_ids: torch.Tensor, topk_weights: torch.Tensor | None
    ) -> torch.Tensor:
        config, weights = self.config, self.weights
        return reference_moe(
            activations,
            local_ids,
            torch.ones(local_ids.shape, device=DEVICE) if topk_weights is None else topk_weights,
            weights.w13,
            weights.w2,
            w13_bias=weights.w13_bias,
            w2_bias=weights.w2_bias,
            activation=config.activation,
            swiglu_alpha=config.swiglu_alpha,
            swiglu_limit=config.swiglu_limit,
            quantization=config.quantization,
            w13_scale=weights.w13_scale,
            w2_scale=weights.w2_scale,
            a13_scale=weights.a13_scale,
            a2_scale=weights.a2_scale,
            rounds_gate_up=self.rounds_gate_up and config.quantization is not None,
        )

    @property
    def tolerance(self) -> Tolerance:
        """How far a result may be from `expected`."""
        return TOLERANCES[self.config.dtype] if self.config.quantization is None else FP8_TOLERANCE

    def check_standard(
        self, activations: torch.Tensor, local_ids: torch.Tensor, topk_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        before = [tensor.clone() for tensor in (activations, local_ids)]
        out = self.apply(activations, local_ids=local_ids, topk_weights=topk_weights)
        assert out.shape == activations.shape
        assert out.dtype is self.config.dtype
        assert out.is_contiguous()
        expected = self.expected(activations, local_ids, topk_weights)
        assert_close_to_oracle(out, expected, self.tolerance)
        for tensor, copy in zip((activations, local_ids), before, strict=True):
            assert torch.equal(tensor, copy)
        return out

    def batch(self, counts: list[int], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [experts, max_tokens, H], NaN past the counts; the counts; and bool [experts, max_tokens], in use."""
        config = self.config
        expert_num_tokens = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
        used = torch.arange(max_tokens, device=DEVICE) < expert_num_tokens[:, None]
        activations = normal(
            config.num_local_experts, max_tokens, config.hidden_size, seed=6, dtype=config.dtype
        ).masked_fill_(~used[..., None], torch.nan)
        return activations, expert_num_tokens, used

    def check_batched(
        self, counts: list[int], max_tokens: int, quantize: Callable[[torch.Tensor], Any] | None = None
    ) -> torch.Tensor:
        """Rows past the counts are NaN on the way in and ignored on the way out.

        quantize: rows -> what a dispatcher sends in their place, the quantized rows and their scales.
        """
        config = self.config
        activations, expert_num_tokens, used = self.batch(counts, max_tokens)
        sent, scales = (activations, None) if quantize is None else quantize(activations)
        out = self.apply(sent, expert_num_tokens=expert_num_tokens, scales=scales)
        shape = activations.shape
        assert out.shape == shape
        assert out.dtype is config.dtype
        assert out.is_contiguous()
        local_ids = used.nonzero()[:, :1].int()
        expected = self.expected(activations[used], local_ids, None)
        assert_close_to_oracle(out[used], expected, self.tolerance)
        return out

    def segments(self, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [slots, H], NaN outside of the segments; group_ends; int64 [slots], each slot's expert, -1 without one.

        There are slots for one block of rows more than all segments have.
        """
        ends, experts = [], []
        for expert, count in enumerate(counts):
            ends.append(len(experts) + count)
            experts += [expert] * count + [-1] * (-count % CONTIGUOUS_ALIGNMENT)
        experts += [-1] * CONTIGUOUS_ALIGNMENT
        expert_of = torch.tensor(experts, device=DEVICE)
        activations = normal(len(experts), self.config.hidden_size, seed=8, dtype=self.config.dtype)
        group_ends = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        return activations.masked_fill_(expert_of[:, None] < 0, torch.nan), group_ends, expert_of

    def check_contiguous(
        self, counts: list[int], quantize: Callable[[torch.Tensor], Any] | None = None, **fields: Any
    ) -> torch.Tensor:
        """The rows in use. quantize: as of `check_batched`."""
        activations, group_ends, expert_of = self.segments(counts)
        sent, scales = (activations, None) if quantize is None else quantize(activations)
        before = [tensor.clone() for tensor in (sent.view(torch.uint8), group_ends)]
        out = self.apply(sent, group_ends=group_ends, scales=scales, **fields)
        assert out.shape == activations.shape
        assert out.dtype is self.config.dtype
        assert out.is_contiguous()
        used = expert_of >= 0
        expected = self.expected(activations[used], expert_of[used, None].int(), None)
        assert_close_to_oracle(out[used], expected, self.tolerance)
        assert all(map(torch.equal, (sent.view(torch.uint8), group_ends), before))
        return out[used]


def group_major(scales: torch.Tensor) -> torch.Tensor:
    """The same scales [..., rows, groups], those of a group next to each other."""
    *experts, rows, groups = scales.shape
    return scales.new_empty(*experts, groups, rows).copy_(scales.mT).mT


def quantizer(scheme: QuantConfig) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """What a dispatcher does to rows of the Contiguous format before they travel."""

    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized, scales = quantize_rows(rows, input_group_size(scheme))
        return quantized, group_major(scales)

    return quantize


def packed_with_scales(rows: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same fp8 rows and row-major scales as views of one buffer, in which each row's scales follow it."""
    (num_rows, hidden_size), groups = rows.shape, scales.shape[1]
    first = -(-hidden_size // 16) * 16
    buffer = torch.full((num_rows, first + 4 * groups), 0x7F, dtype=torch.uint8, device=rows.device)
    places = buffer[:, :hidden_size].view(rows.dtype), buffer[:, first:].view(torch.float32)
    return places[0].copy_(rows), places[1].copy_(scales)


def check_graph_replays(layer: Layer, num_rows: int, num_experts: int) -> None:
    """Many replays with other routings and without a pause: each kernel begins while the one before ends."""
    rows, ids, weights = layer.rows(num_rows), random_ids(num_rows, 2, num_experts), normal(num_rows, 2, seed=7)
    handle = layer.handle(num_rows)
    for _ in range(2):
        layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
    generator = torch.Generator(DEVICE).manual_seed(1)
    routings = torch.randint(-1, num_experts, (20, num_rows, 2), generator=generator, device=DEVICE, dtype=torch.int32)
    routings[1], routings[2] = -1, num_experts - 1
    outputs = []
    for routing in routings:
        ids.copy_(routing)
        graph.replay()
        outputs.append(out.clone())
    for routing, output in zip(routings, outputs, strict=True):
        assert torch.equal(output, layer.apply(rows, local_ids=routing, topk_weights=weights))
    for index in (0, 1, 2, 19):
        expected = layer.expected(rows, routings[index], weights)
        assert_close_to_oracle(outputs[index], expected, layer.tolerance)


def check_capture_between_calls(first: Layer, second: Layer, between: Callable[[int], object]) -> None:
    """A graph of calls of two layers gives what they give, whatever calls lie between its replays."""
    rows, ids, weights = first.rows(9), random_ids(9, 2, 5), normal(9, 2, seed=7)
    outputs = [torch.empty_like(rows) for _ in range(2)]

    def run() -> None:
        for layer, output in zip((first, second), outputs, strict=True):
            handle = layer.handle(9)
            layer.apply(rows, handle=handle, output=output, local_ids=ids, topk_weights=weights)
            handle.workspace.release()

    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in range(3):
        between(step)
        rows.normal_()
        run()
        expected = [output.clone() for output in outputs]
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        assert all(map(torch.equal, outputs, expected))
