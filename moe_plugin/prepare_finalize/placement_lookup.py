"""From global expert ids to the slots of a rank that holds them all, through the placement table."""

from __future__ import annotations

import torch

from moe_plugin.config import MoEConfig
from moe_plugin.kernels.launch_sequence import LaunchSequence
from moe_plugin.kernels.launcher import Launch
from moe_plugin.kernels.placement_lookup import (
    LookupTables,
    placement_lookup,
    placement_lookup_launch,
    uses_triton,
)
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors, ErrorFlag
from moe_plugin.workspace import Workspace


class PlacementLookup:
    """Looks up slots for one configuration; tables move to the device once.

    Ids outside [-1, E) are flagged and treated as dropped, so that no later step goes out of bounds.
    """

    def __init__(self, config: MoEConfig, device: torch.device, use_triton: bool | None = None) -> None:
        self._tables = LookupTables.of(config.expert_placement.tables(device))
        self._use_triton = uses_triton(device) if use_triton is None else use_triton
        # What a launch depends on besides its arguments.
        self._kind = (*self._tables.tables.slot.shape, self._tables.is_identity)

    def local(
        self, topk_ids: torch.Tensor, topk_weights: torch.Tensor | None, workspace: Workspace, errors: DeferredErrors
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Slots of a placement on one rank, int32 [T, K], and `topk_weights` as fp32, in `workspace` where new.

        Wrong ids go to `errors`, which raises at once on CPU.
        """
        shape = topk_ids.shape
        slot = workspace.tensor("local_ids", shape, torch.int32)
        weights = None
        if topk_weights is not None and topk_weights.dtype is not torch.float32:
            weights = workspace.tensor("topk_weights", shape, torch.float32)
        given = None if weights is None else topk_weights
        if self._use_triton:
            self._launch_local(topk_ids, given, slot, weights, workspace, errors)
        else:
            flags = torch.zeros(1, dtype=torch.int32, device=topk_ids.device)
            placement_lookup(
                topk_ids, self._tables, slot, flags, _EXPERT_ID, topk_weights=given, weights=weights, use_triton=False
            )
            errors.record(flags)
        return slot, topk_weights if weights is None else weights

    def _launch_local(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        slot: torch.Tensor,
        weights: torch.Tensor | None,
        workspace: Workspace,
        errors: DeferredErrors,
    ) -> None:
        if topk_ids.shape[0] > 0:
            word, tables = errors.kernel_word(), self._tables.tables

            def launches() -> list[Launch]:
                launch = placement_lookup_launch(
                    topk_ids, self._tables, slot, word, _EXPERT_ID, topk_weights=topk_weights, weights=weights
                )
                return [launch]

            moving = [topk_ids, word, tables.slot, tables.num_replicas]
            layout = None
            if topk_weights is not None:
                moving.append(topk_weights)
                layout = topk_weights.dtype, topk_weights.stride()
            key = ("placement_lookup", self._kind, topk_ids.dtype, topk_ids.shape, topk_ids.stride(), layout)
            workspace.cached(key, LaunchSequence)(moving, launches)
        errors.launched()


_EXPERT_ID = int(ErrorFlag.EXPERT_ID)
