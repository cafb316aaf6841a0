"""From global expert ids to slots through the placement table: those of a rank that holds all experts, or of all ranks
in a row, as physical ids.
"""

from __future__ import annotations

from typing import Protocol

import torch

from moe_plugin.config import MoEConfig, PlacementTables
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


class KernelWord(Protocol):
    """Where a launch leaves its flag: `DeferredErrors`, or a tensor of the caller's."""

    def kernel_word(self) -> torch.Tensor:
        """int32 [1] that a kernel can write to."""


class PlacementLookup:
    """Looks up slots for one configuration; tables move to the device once.

    Ids outside [-1, E) are flagged and treated as dropped, so that no later step goes out of bounds.

    slots_per_rank: S, for `physical`: slot s of rank r has the id r * S + s. For `local` it stays None.
    """

    def __init__(
        self,
        config: MoEConfig,
        device: torch.device,
        use_triton: bool | None = None,
        slots_per_rank: int | None = None,
    ) -> None:
        tables = config.expert_placement.tables(device)
        if slots_per_rank is not None:
            ids = tables.rank * slots_per_rank + tables.slot
            tables = PlacementTables(torch.zeros_like(ids), ids, tables.num_replicas)
        self._tables = LookupTables.of(tables)
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
            self._launch(topk_ids, given, slot, weights, workspace, errors)
            errors.launched()
        else:
            flags = torch.zeros(1, dtype=torch.int32, device=topk_ids.device)
            placement_lookup(
                topk_ids, self._tables, slot, flags, _EXPERT_ID, topk_weights=given, weights=weights, use_triton=False
            )
            errors.record(flags)
        return slot, topk_weights if weights is None else weights

    def physical(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        dtype: torch.dtype,
        workspace: Workspace,
        errors: KernelWord,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Physical ids of `dtype` [T, K], each once in a token, and router weights fp32 [T, K], both contiguous.

        Weights of an expert that a token names several times are added up; see `kernels.placement_lookup`. Wrong ids
        are written to `errors` by a kernel, else returned as flags int32 [1], for the caller to tell the other ranks.
        """
        shape = topk_ids.shape
        ids, weights, flags = workspace.tensor("physical_ids", shape, dtype), None, None
        merges = topk_weights is not None and shape[1] > 1
        if topk_weights is not None and (
            merges or topk_weights.dtype is not torch.float32 or not topk_weights.is_contiguous()
        ):
            weights = workspace.tensor("topk_weights", shape, torch.float32)
        given = None if weights is None else topk_weights
        if self._use_triton:
            self._launch(topk_ids, given, ids, weights, workspace, errors, merges)
        else:
            flags = torch.zeros(1, dtype=torch.int32, device=topk_ids.device)
            placement_lookup(
                topk_ids,
                self._tables,
                ids,
                flags,
                _EXPERT_ID,
                topk_weights=given,
                weights=weights,
                merge_duplicates=merges,
                use_triton=False,
            )
        return ids, topk_weights if weights is None else weights, flags

    def _launch(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        slot: torch.Tensor,
        weights: torch.Tensor | None,
        workspace: Workspace,
        errors: KernelWord,
        merge_duplicates: bool = False,
    ) -> None:
        if topk_ids.shape[0] == 0:
            return
        word, tables = errors.kernel_word(), self._tables.tables

        def launches() -> list[Launch]:
            launch = placement_lookup_launch(
                topk_ids,
                self._tables,
                slot,
                word,
                _EXPERT_ID,
                topk_weights=topk_weights,
                weights=weights,
                merge_duplicates=merge_duplicates,
            )
            return [launch]

        moving = [topk_ids, word, tables.slot, tables.num_replicas]
        layout = None
        if topk_weights is not None:
            moving.append(topk_weights)
            layout = topk_weights.dtype, topk_weights.stride()
        kind = self._kind, slot.dtype, merge_duplicates
        key = ("placement_lookup", kind, topk_ids.dtype, topk_ids.shape, topk_ids.stride(), layout)
        workspace.cached(key, LaunchSequence)(moving, launches)


_EXPERT_ID = int(ErrorFlag.EXPERT_ID)
