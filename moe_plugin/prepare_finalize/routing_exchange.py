"""All ranks' routing on every rank: dense rows gathered over NVLink, and the scan of them, in one launch.

What a rank keeps in memory that the others write, and the order in which that is safe, is told in
`kernels/routing_gather`. What a call returns is this rank's own memory, so calls may follow each other at once. All of
a rank's calls are made on one stream, or on streams that wait for each other; all ranks make the same calls in the same
order. Epochs are counted on the device, so calls may be captured in a CUDA graph and replayed among others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import prod

import torch

from moe_plugin.errors import ShapeError
from moe_plugin.kernels.dense_routing import DenseRouting, check_num_experts, dense_routing_launches
from moe_plugin.kernels.launch_sequence import LaunchSequence
from moe_plugin.kernels.launcher import Launch
from moe_plugin.kernels.placement_lookup import LookupTables
from moe_plugin.kernels.routing_gather import MAX_WRITERS, RoutingGather, RoutingRegions
from moe_plugin.kernels.tiling import cdiv
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors
from moe_plugin.prepare_finalize.symmetric_memory import SymmetricMemory
from moe_plugin.workspace import Workspace

NUM_SETS = 2
_serials = itertools.count()


def _shapes(num_ranks: int, top_k: int, capacity: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Of the regions on each rank; all take multiples of 128 bytes."""
    room = cdiv(num_ranks * capacity * top_k, 64) * 64
    return {
        "ids": ((NUM_SETS, room), torch.int16),
        "weights": ((NUM_SETS, room), torch.float32),
        "flags": ((num_ranks, MAX_WRITERS), torch.int64),
    }


class RoutingExchange:
    """Gathers and scans routing between the ranks of one group that can write into each other's memory.

    Making one is a collective. num_slots: of experts on each rank, the most that one has. capacity: tokens of a rank in
    the largest call. tables: where experts are. errors: takes wrong ids and lost ranks, as `DeferredErrors` tells.
    Needs Triton; on a CPU its interpreter runs the kernel between processes of one machine.
    Raises ConfigError for more experts than int16 ids can name, PeerLostError when a rank does not take part in time.
    """

    def __init__(
        self,
        communicator: Communicator,
        num_slots: int,
        top_k: int,
        capacity: int,
        tables: LookupTables,
        errors: DeferredErrors,
        device: torch.device,
    ) -> None:
        check_num_experts(communicator.size, num_slots)
        self.num_slots, self.top_k, self.capacity = num_slots, top_k, capacity
        self.communicator, self._tables, self._errors = communicator, tables, errors
        shapes, sizes = _shapes(communicator.size, top_k, capacity), self.memory(communicator.size, top_k, capacity)
        memory = SymmetricMemory(communicator, sum(sizes.values()), device)
        starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        self._regions = RoutingRegions(
            peer_offsets=memory.peer_offsets,
            ids=memory.region(starts["ids"], *shapes["ids"]),
            weights=memory.region(starts["weights"], *shapes["weights"]),
            flags=memory.region(starts["flags"], *shapes["flags"]),
            epochs=torch.zeros(1, dtype=torch.int64, device=device),
        )
        self._memory = memory  # mapped as long as it is referred to
        self._finished = torch.zeros(1, dtype=torch.int32, device=device)
        # Unlike an address, never another object's.
        self._serial = next(_serials)

    @staticmethod
    def memory(num_ranks: int, top_k: int, capacity: int) -> Mapping[str, int]:
        """Bytes by region on each rank."""
        shapes = _shapes(num_ranks, top_k, capacity)
        return {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}

    def gather(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        capacity: int,
        workspace: Workspace,
        *,
        rows: bool = True,
        places: bool = True,
        alignment: int = 128,
        rows_per_expert: int | None = None,
        flags: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, DenseRouting]:
        """Physical ids int16 [R, C, K] of all ranks' tokens, router weights fp32 [R, C, K], and where everything goes.

        topk_ids: int16, int32 or int64 [T, K] as the lookup tables take them, topk_weights: float [T, K] or None, on
            all ranks alike; any strides, T <= capacity.
        capacity: C, the same on all ranks, at most that of this object. Ids of rows past a rank's T are -1, their
            weights 0.
        rows, places, alignment, rows_per_expert: as `dense_routing`. flags: of `ErrorFlag`, what this rank has to tell.
        Everything lies in `workspace`, where the next call with it overwrites it, and is void when an error is raised
        for this call.
        Raises ShapeError, and on a CPU what the call flagged.
        """
        if capacity > self.capacity:
            raise ShapeError(f"there is room for {self.capacity} tokens per rank, got a capacity of {capacity}")
        kinds = (capacity, rows, places)
        own = ("routing_exchange", self._serial, *kinds)
        ids, out = workspace.cached(own, lambda: self._results(workspace, *kinds))
        words = self._errors.kernel_words()
        moving, weights = [topk_ids, words], None
        if topk_weights is not None:
            moving.append(topk_weights)
            weights = workspace.tensor("routing_weights", tuple(ids.shape), torch.float32)

        def launches() -> list[Launch]:
            gather = RoutingGather(
                topk_ids=topk_ids,
                topk_weights=topk_weights,
                tables=self._tables,
                regions=self._regions,
                gathered_weights=weights,
                reports=words,
                lost=self._errors.lost,
                limit_ns=int(self.communicator.timeout_seconds * 1e9),
                errors=flags,
            )
            return dense_routing_launches(ids, out, alignment=alignment, rows_per_expert=rows_per_expert, gather=gather)

        layouts = tuple((tensor.dtype, tensor.shape, tensor.stride()) for tensor in moving)
        key = (*own, alignment, rows_per_expert, flags, layouts)
        workspace.cached(key, LaunchSequence)(moving, launches)
        self._errors.launched()
        return ids, weights, out

    def _results(
        self, workspace: Workspace, capacity: int, rows: bool, places: bool
    ) -> tuple[torch.Tensor, DenseRouting]:
        num_ranks, top_k = self.communicator.size, self.top_k

        def room(name: str, *shape: int) -> torch.Tensor:
            return workspace.tensor(f"routing_{name}", shape, torch.int32)

        out = DenseRouting(rank=self.communicator.rank, num_slots=self.num_slots, finished=self._finished)
        if rows:
            out.rows_per_rank = room("rows_per_rank", num_ranks)
            out.send_rows = room("send_rows", capacity, num_ranks)
            out.received_rows = room("received_rows", num_ranks * capacity)
        if places:
            out.expert_counts = room("expert_counts", num_ranks, self.num_slots)
            out.segment_starts = room("segment_starts", num_ranks, self.num_slots)
            out.group_ends = room("group_ends", self.num_slots)
            out.positions = room("positions", num_ranks * capacity, top_k)
        return workspace.tensor("routing_ids", (num_ranks, capacity, top_k), torch.int16), out
