"""From global expert ids to (rank, slot) through the placement table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_plugin.config import MoEConfig, PlacementTables
from moe_plugin.prepare_finalize.deferred_errors import expert_id_flag


@dataclass(frozen=True, slots=True)
class Destinations:
    """rank and slot, both int32 [T, K], contiguous; -1 where the pair is dropped. flags int32 [1], see ErrorFlag."""

    rank: torch.Tensor
    slot: torch.Tensor
    flags: torch.Tensor


class PlacementLookup:
    """Looks up destinations for one configuration; tables move to the device once."""

    def __init__(self, config: MoEConfig, device: torch.device) -> None:
        self._num_experts = config.num_experts
        self._has_replicas = config.expert_placement.max_replicas > 1
        self._tables: PlacementTables = config.expert_placement.tables(device)

    def __call__(self, topk_ids: torch.Tensor, first_token: int = 0) -> Destinations:
        """topk_ids int [T, K] of tokens first_token, first_token + 1, ...; replicas are taken in turn by token index.

        Ids outside [-1, E) raise the flag and are treated as dropped, so that no later step goes out of bounds.
        """
        topk_ids = topk_ids.contiguous()
        kept = (topk_ids >= 0) & (topk_ids < self._num_experts)
        safe = topk_ids.clamp(0, self._num_experts - 1).long()
        if self._has_replicas:
            token = torch.arange(first_token, first_token + topk_ids.shape[0], device=topk_ids.device).unsqueeze(1)
            replica = token % self._tables.num_replicas[safe]
            rank, slot = self._tables.rank[safe, replica], self._tables.slot[safe, replica]
        else:
            rank, slot = self._tables.rank[safe, 0], self._tables.slot[safe, 0]
        return Destinations(
            rank=torch.where(kept, rank, -1),
            slot=torch.where(kept, slot, -1),
            flags=expert_id_flag(topk_ids, self._num_experts),
        )
