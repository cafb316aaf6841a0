"""Experts alone on rows in the BatchedExperts format, as a dispatcher would have brought them.

`batched+<experts>` among the strategies of `bench experts` stands for this: what is timed begins and ends with rows
[E, M, H], and what comes back is combined outside of it to be compared with the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_plugin.bench.contenders import Accuracy, Contender, Job, Prepared, UnsupportedError
from moe_plugin.bench.layers import Inputs, Layer, right_answers
from moe_plugin.bench.results import STRATEGY
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError
from moe_plugin.kernels.tiling import cdiv
from moe_plugin.modular_kernel import (
    ActivationFormat,
    Dispatched,
    DispatchHandle,
    Experts,
    ExpertWeights,
    RouterWeightStage,
)
from moe_plugin.numerics import FP8_TOLERANCE, TOLERANCES
from moe_plugin.strategies.registry import experts_classes
from moe_plugin.workspace import WorkspaceArena

PREFIX = "batched+"

CAPACITY_UNIT = 128
"""Rows of an expert's slice come in multiples of this, as dispatchers for DeepGEMM make them."""


@dataclass(frozen=True, slots=True)
class BatchedRows:
    """activations [E, M, H], NaN past the counts; counts int32 [E]; slot_of_pair int64 [T, K], e * M + row."""

    activations: torch.Tensor
    counts: torch.Tensor
    slot_of_pair: torch.Tensor

    @classmethod
    def of(cls, inputs: Inputs, num_experts: int, max_tokens: int | None = None) -> BatchedRows:
        """The rows of one call, each expert's in the order of the tokens. max_tokens: M; what is needed when None."""
        pairs = inputs.topk_ids.flatten().long()
        order = pairs.argsort(stable=True)
        counts = torch.bincount(pairs, minlength=num_experts)
        if max_tokens is None:
            max_tokens = cdiv(int(counts.max()), CAPACITY_UNIT) * CAPACITY_UNIT
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(pairs), device=pairs.device) - starts[pairs[order]]
        slots = torch.empty_like(pairs)
        slots[order] = pairs[order] * max_tokens + place
        x = inputs.hidden_states
        activations = x.new_full((num_experts * max_tokens, x.shape[1]), torch.nan)
        activations[slots] = x.repeat_interleave(inputs.topk_ids.shape[1], dim=0)
        return cls(activations.unflatten(0, (num_experts, -1)), counts.int(), slots.view(inputs.topk_ids.shape))

    def call(self, experts: Experts, arena: WorkspaceArena) -> Callable[[], torch.Tensor]:
        """A call of `experts` on these rows: [E, M, H], which may lie in the workspace and then hold until the next."""

        def call() -> torch.Tensor:
            workspace = arena.lease()
            dispatched = Dispatched(
                activations=self.activations,
                activation_format=ActivationFormat.BATCHED_EXPERTS,
                router_weight_stage=RouterWeightStage.COMBINE,
                handle=DispatchHandle(owner=None, num_tokens=0, workspace=workspace),  # type: ignore[arg-type]
                expert_num_tokens=self.counts,
            )
            output = experts.apply(dispatched, workspace)
            workspace.release()
            return output

        return call

    def combined(self, output: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """fp32 [S, H]: what the sampled tokens get of the experts' output."""
        sample = inputs.sample()
        rows = output.flatten(0, 1)[self.slot_of_pair[sample]].float()
        return (rows * inputs.topk_weights[sample, :, None]).sum(dim=1)


class BatchedContender(Contender):
    """`batched+<experts>`: an Experts class on BatchedExperts rows. Raises ConfigError for one that takes none."""

    role = STRATEGY

    def __init__(self, name: str) -> None:
        known = experts_classes.all()
        takers = [each for each, cls in known.items() if ActivationFormat.BATCHED_EXPERTS in cls.activation_formats]
        experts = name.removeprefix(PREFIX)
        if experts not in takers:
            raise ConfigError(f"{name!r}: BatchedExperts is taken by {', '.join(PREFIX + each for each in takers)}")
        self.name, self._experts = name, known[experts]

    def version(self) -> str:
        return torch.__version__

    def prepare(self, layer: Layer, max_tokens: int) -> Prepared:
        device = layer.w13.device
        config = replace(layer.config, max_tokens_per_rank=max_tokens, cuda_graph=device.type == "cuda")
        verdict = self._experts.supports(config, Environment.probe(device.type))
        if not verdict.ok:
            raise UnsupportedError(f"{self._experts.name}: {verdict.reason}")
        weights = ExpertWeights(**layer.weights).canonical(config)  # type: ignore[arg-type]
        experts = self._experts(config, self._experts.prepare_weights(config, weights))
        arena = WorkspaceArena(device)
        tolerance = TOLERANCES[config.dtype] if config.quantization is None else FP8_TOLERANCE

        def bind(inputs: Inputs) -> Job:
            rows = BatchedRows.of(inputs, config.num_experts)

            def check(output: torch.Tensor) -> Accuracy:
                answers = right_answers(layer, inputs, self._experts.rounds_gate_up)
                return Accuracy.of_any(rows.combined(output, inputs), answers, tolerance)

            return Job(rows.call(experts, arena), check)

        return Prepared(bind, config.cuda_graph)
