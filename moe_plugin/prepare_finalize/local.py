"""No expert parallelism: every expert is on this rank, nothing is dispatched.

With tensor parallelism each rank computes its slice of the intermediate size, and finalize adds the slices up. The TP
ranks must be called with the same arguments: comparing them would cost a collective per call, so a mistake on one rank
alone is an error there and a lost peer on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_plugin.config import SUPPORTED_DTYPES, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import InputError
from moe_plugin.modular_kernel import Dispatched, DispatchHandle, PrepareAndFinalize, RouterWeightStage
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors
from moe_plugin.prepare_finalize.placement_lookup import PlacementLookup
from moe_plugin.verdict import Gate, Verdict, gate_dtype
from moe_plugin.workspace import WorkspaceArena


@dataclass(slots=True)
class LocalHandle(DispatchHandle):
    """inputs: hidden_states of the call. result: the caller's memory that the experts were to write into, or None."""

    inputs: torch.Tensor
    result: torch.Tensor | None = None


class Local(PrepareAndFinalize):
    """Hands the tokens to the experts as they are."""

    name = "local"
    description = "no dispatch: all experts on this rank (tensor parallelism allowed)"

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(config, arena)
        parallel = config.parallel
        self._tp = Communicator(parallel.tp_group, parallel.tp_size, parallel.tp_rank, parallel.timeout_seconds)
        self._lookup = PlacementLookup(config, arena.device)
        self._errors = DeferredErrors(config, arena.device, self._tp if parallel.tp_size > 1 else None)

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        ep_size = config.parallel.ep_size
        return Verdict.of(
            gate_dtype(config, *SUPPORTED_DTYPES),
            Gate("ep_size", ep_size == 1, str(ep_size), "1: this class does not dispatch"),
        )

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        self._errors.raise_pending()
        workspace = self.arena.lease()
        try:
            if self.config.apply_router_weight_on_input:
                local_ids, _ = self._lookup.local(topk_ids, None, workspace, self._errors)
                activations, weights, stage = weigh_input(self.config, hidden_states, topk_weights)
            else:
                local_ids, weights = self._lookup.local(topk_ids, topk_weights, workspace, self._errors)
                activations, stage = hidden_states, RouterWeightStage.EXPERTS_GATHER
        except InputError:
            workspace.release()
            raise
        return Dispatched(
            activations=activations if activations.stride(1) == 1 else activations.contiguous(),
            activation_format=self.activation_format,
            router_weight_stage=stage,
            handle=LocalHandle(self, hidden_states.shape[0], workspace, hidden_states),
            local_ids=local_ids,
            topk_weights=weights,
        )

    def expert_output(self, handle: DispatchHandle, out: torch.Tensor | None = None) -> torch.Tensor | None:
        assert isinstance(handle, LocalHandle)
        if out is None or not out.is_contiguous() or _share_memory(out, handle.inputs):
            # Not the workspace, which the next call reuses, nor what the experts are still reading.
            inputs = handle.inputs
            if inputs.is_contiguous():
                out = torch.empty_like(inputs)
            else:
                out = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        handle.result = out
        return out

    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        handle.consume(self)
        assert isinstance(handle, LocalHandle)
        if expert_output is handle.result:
            total = expert_output
        else:
            total = out if out is not None and out.is_contiguous() else torch.empty_like(expert_output)
            total.copy_(expert_output)
        if self._tp.size > 1:
            self._tp.all_reduce(total, "combine").wait()
        handle.workspace.release()
        return total if out is None or out is total else out.copy_(total)

    def check_errors(self) -> None:
        self._errors.raise_pending(synchronize=True)


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def weigh_input(
    config: MoEConfig, hidden_states: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, RouterWeightStage]:
    """Apply the router weight to the input when the configuration asks for it.

    Returns the activations, the weights that still have to be applied (fp32) and who applies them.
    """
    if not config.apply_router_weight_on_input:
        return hidden_states, topk_weights.float(), RouterWeightStage.EXPERTS_GATHER
    weighed = (hidden_states.float() * topk_weights.float()).to(hidden_states.dtype)
    return weighed, None, RouterWeightStage.BEFORE_DISPATCH
