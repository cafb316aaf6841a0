"""Classes as another package would bring them: small, slow and right."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import moe_plugin
from moe_plugin.activation import gated_activation_of
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.modular_kernel import (
    ActivationFormat,
    Dispatched,
    DispatchHandle,
    Experts,
    Monolithic,
    PrepareAndFinalize,
    RouterWeightStage,
)
from moe_plugin.verdict import QUANTIZATIONS, Gate, Verdict, gate_cuda_graph, gate_quantization
from moe_plugin.workspace import Workspace


def one_rank(config: MoEConfig) -> Gate:
    world = config.parallel.world_size
    return Gate("world_size", world == 1, str(world), "1")


class LoopExperts(Experts):
    """A Python loop over experts."""

    name = "loop"

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        return Verdict.of(
            gate_quantization(config), gate_cuda_graph(config, False, "the loop asks the host for row numbers")
        )

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        return config.num_local_experts

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        x, ids, weights = dispatched.activations, dispatched.local_ids, self.weights
        assert ids is not None
        out = torch.zeros(x.shape[0], self.config.hidden_size, device=x.device)
        for expert in range(weights.w13.shape[0]):
            row, k = (ids == expert).nonzero(as_tuple=True)
            gate_up = x[row].float() @ weights.w13[expert].float().T
            if weights.w13_bias is not None:
                gate_up += weights.w13_bias[expert].float()
            result = gated_activation_of(self.config, gate_up) @ weights.w2[expert].float().T
            if weights.w2_bias is not None:
                result += weights.w2_bias[expert].float()
            if dispatched.topk_weights is not None:
                result *= dispatched.topk_weights[row, k, None]
            out.index_add_(0, row, result)
        return out.to(self.config.dtype)


@dataclass(slots=True)
class BatchedHandle(DispatchHandle):
    place: torch.Tensor
    topk_weights: torch.Tensor | None


class BatchedLocal(PrepareAndFinalize):
    """Sorts the tokens of one rank into a slice per expert, and applies the router weights itself."""

    name = "batched_local"
    activation_format = ActivationFormat.BATCHED_EXPERTS
    router_weight_stage = RouterWeightStage.COMBINE

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        return Verdict.of(one_rank(config), gate_cuda_graph(config, False, "ids are checked on the host"))

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        return 1

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        config, experts = self.config, self.config.num_experts
        if ((topk_ids < -1) | (topk_ids >= experts)).any():
            raise moe_plugin.errors.ExpertIdError(f"topk_ids must lie in [-1, {experts})")
        wanted = torch.nn.functional.one_hot(topk_ids.reshape(-1).long() + 1, experts + 1)[:, 1:]
        slot = (wanted.cumsum(0) * wanted).sum(1) - 1
        width = max(1, topk_ids.numel())
        place = torch.where(topk_ids.reshape(-1) >= 0, topk_ids.reshape(-1) * width + slot, -1)
        weights: torch.Tensor | None = topk_weights.float()
        if config.apply_router_weight_on_input:
            hidden_states, weights = (hidden_states.float() * weights).to(config.dtype), None
        slices = torch.full(
            (experts * width, config.hidden_size), float("nan"), dtype=config.dtype, device=place.device
        )
        rows = hidden_states.repeat_interleave(config.top_k, dim=0)
        slices[place[place >= 0]] = rows[place >= 0]
        return Dispatched(
            activations=slices.view(experts, width, config.hidden_size),
            activation_format=self.activation_format,
            router_weight_stage=RouterWeightStage.BEFORE_DISPATCH if weights is None else self.router_weight_stage,
            expert_num_tokens=wanted.sum(0).int(),
            handle=BatchedHandle(self, hidden_states.shape[0], self.arena.lease(), place, weights),
        )

    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        handle.consume(self)
        assert isinstance(handle, BatchedHandle)
        shape = (handle.num_tokens, self.config.top_k, self.config.hidden_size)
        rows = torch.zeros(shape, device=expert_output.device).flatten(0, 1)
        kept = handle.place >= 0
        rows[kept] = expert_output.flatten(0, 1)[handle.place[kept]].float()
        weights = 1.0 if handle.topk_weights is None else handle.topk_weights.unsqueeze(2)
        result = (rows.view(shape) * weights).sum(1).to(self.config.dtype)
        handle.workspace.release()
        return result if out is None else out.copy_(result)


class OracleMonolith(Monolithic):
    """The oracle as a strategy."""

    name = "oracle"

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        return Verdict.of(
            one_rank(config),
            gate_quantization(config, QUANTIZATIONS),
            gate_cuda_graph(config, False, "the oracle loops"),
        )

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        return config.num_experts

    def apply(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        config, weights = self.config, self.weights
        result = moe_plugin.reference_moe(
            hidden_states,
            topk_ids,
            topk_weights,
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
        ).to(config.dtype)
        return result if out is None else out.copy_(result)


def register() -> None:
    moe_plugin.register_experts(LoopExperts)
    moe_plugin.register_prepare_finalize(BatchedLocal)
    moe_plugin.register_monolithic(OracleMonolith)
