"""Dispatch and combine inside one NVLink domain, by kernels that write into the peers' memory.

Two sets of buffers, so that two micro-batches may be between dispatch and combine. A set is free for the next call once
its combine is over on this rank: every peer's experts have then read what was dispatched to them, since they have sent
their results. So nobody asks before writing, and no barrier is needed. A dispatch whose combine never came leaves its
set in doubt; `_settle` then has all ranks meet once before the set is used again.

Epochs are counted on the device, one per dispatch, so a graph replays without the host. The set that a call takes
follows from the order of calls, which is the same on all ranks.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from moe_plugin.config import MoEConfig
from moe_plugin.errors import HandleError, MemoryLimitError, MoEPluginError
from moe_plugin.kernels.dense_routing import DenseRouting
from moe_plugin.kernels.dependent_launch import dependent_launch
from moe_plugin.kernels.launch_sequence import LaunchSequence
from moe_plugin.kernels.launcher import Descriptor, Launch
from moe_plugin.kernels.placement_lookup import LookupTables
from moe_plugin.kernels.row_sum import row_sum, row_sum_launches
from moe_plugin.kernels.tiling import cdiv, next_power_of_2
from moe_plugin.modular_kernel import CONTIGUOUS_ALIGNMENT
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors, ErrorFlag
from moe_plugin.prepare_finalize.routing_exchange import RoutingExchange
from moe_plugin.prepare_finalize.symmetric_memory import UNIT, SymmetricMemory
from moe_plugin.quantization import GROUP_SIZE
from moe_plugin.workspace import Workspace

MAX_PROGRAMS = 256
"""Words for signals of one rank to another."""
NUM_SETS = 2
ROWS_AT_ONCE = 4
"""That a program loads before it stores them: bytes on the way keep the wire busy with few programs."""
COLUMNS_PER_WARP = 256
"""A 16-byte access per thread in 16-bit formats."""
ROUTING_TOKENS = 128
"""Whose ids a program reads at once."""
TMA_TOKENS = 64
"""Tokens of a rank from which on TMA moves rows faster than loads and stores do, its further launches included."""
RING_BYTES, MOST_RING_ROWS = 208 << 10, 13
RING_ROWS = 12
"""Of quantized rows, which are half as large, and wait for nothing once they are in the ring."""
QUANTIZING_WARPS, SUMMING_WARPS = 8, 8
TOKENS_PER_CHUNK, MOST_CHUNKS = 128, 16
"""Of a combine: after each chunk a program tells that its rows are written, so that summing begins."""
EVEN_PROGRAMS, FEW_TOKENS = 20, 256
"""Seen on an H200: 20 programs move more than 256 tokens in 9% less time than 23 or 24 do, and 16 or 32 do as well."""
_serials = itertools.count()
Regions = Mapping[str, tuple[int, tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class RowShape:
    """What rows are made of, and how many tokens of a rank there is room for.

    hidden_size, top_k; dtype of results; sent_dtype: of dispatched rows, fp8 when they are quantized on the way.
    groups: scales of a quantized row, 0 when it is not. capacity: tokens per rank of the largest call. num_slots: of
    experts on each rank when rows are dispatched in expert-grouped order, 0 when in the order of tokens.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    sent_dtype: torch.dtype
    groups: int
    capacity: int
    num_slots: int = 0

    def grouped_rows(self, num_ranks: int, capacity: int) -> int:
        """Rows of the expert-grouped buffer: each token may want `top_k` experts here, each segment is padded."""
        pairs = num_ranks * capacity * min(self.top_k, self.num_slots)
        unused = min(self.num_slots, pairs) * (CONTIGUOUS_ALIGNMENT - 1)
        return cdiv(pairs + unused, CONTIGUOUS_ALIGNMENT) * CONTIGUOUS_ALIGNMENT

    def regions(self, num_ranks: int) -> tuple[Regions, int]:
        """{region: (offset, shape, dtype)} of one set of buffers, and its bytes."""
        rows = num_ranks * self.capacity
        dispatched = self.grouped_rows(num_ranks, self.capacity) if self.num_slots else rows
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "rows": ((dispatched, _padded(self.hidden_size, self.sent_dtype)), self.sent_dtype),
            "local_ids": ((rows, self.top_k), torch.int32),
            "row_weights": ((rows, self.top_k), torch.float32),
            "present": ((rows,), torch.int32),
            "scales": ((rows, self.groups), torch.float32),
            "returned": ((rows, _padded(self.hidden_size, self.dtype)), self.dtype),
            "dispatch_flags": ((num_ranks, MAX_PROGRAMS), torch.int64),
            "combine_flags": ((num_ranks, MAX_PROGRAMS), torch.int64),
            "epochs": ((2,), torch.int64),
            "errors": ((1,), torch.int32),
        }
        regions, offset = {}, 0
        for name, (shape, dtype) in wanted.items():
            regions[name] = offset, shape, dtype
            offset += cdiv(prod(shape) * dtype.itemsize, 128) * 128
        return regions, offset

    def memory(self, num_ranks: int) -> dict[str, int]:
        """Bytes by region, of all sets."""
        regions, _ = self.regions(num_ranks)
        return {name: NUM_SETS * prod(shape) * dtype.itemsize for name, (_, shape, dtype) in regions.items()}


def _padded(columns: int, dtype: torch.dtype) -> int:
    unit = UNIT // dtype.itemsize
    return cdiv(columns, unit) * unit


class _Set:
    """One set of buffers; views of the symmetric memory."""

    def __init__(self, memory: SymmetricMemory, start: int, regions: Regions) -> None:
        self.memory = memory
        self.views = {
            name: memory.region(start + offset, shape, dtype) for name, (offset, shape, dtype) in regions.items()
        }
        # Unlike an address, never another object's.
        self.serial = next(_serials)
        self.is_leased = False
        self.in_doubt = False
        # Where its last combine runs, which may be another stream than the next dispatch's.
        self.stream: torch.cuda.Stream | None = None
        self._received: dict[int, tuple[torch.Tensor, ...]] = {}

    def received(self, rows: int, hidden_size: int) -> tuple[torch.Tensor, ...]:
        """The first `rows` of what a dispatch fills: rows, local ids, router weights, scales."""
        found = self._received.get(rows)
        if found is None:
            views = self.views
            found = self._received[rows] = (
                views["rows"][:rows, :hidden_size],
                views["local_ids"][:rows],
                views["row_weights"][:rows],
                views["scales"][:rows],
            )
        return found


class Buffers:
    """The sets of one group and row shape, shared by all layers that have both."""

    _shared: ClassVar[weakref.WeakValueDictionary[tuple[object, ...], Buffers]] = weakref.WeakValueDictionary()

    def __init__(self, communicator: Communicator, shape: RowShape, device: torch.device) -> None:
        regions, size = shape.regions(communicator.size)
        _check_memory(shape, communicator, device)
        memory = SymmetricMemory(communicator, NUM_SETS * size, device)
        self.peer_offsets = memory.peer_offsets
        self.sets = [_Set(memory, index * size, regions) for index in range(NUM_SETS)]

    @classmethod
    def shared(cls, communicator: Communicator, shape: RowShape, device: torch.device) -> Buffers:
        """A collective: all ranks make them anew unless all have them."""
        group = None if communicator.group is None else communicator.group.group_name
        key = (group, communicator.size, shape, device)
        found = cls._shared.get(key)
        # A rank may still hold what others have let go of.
        if not all(communicator.gather_objects(found is not None, "symmetric memory")):
            found = cls._shared[key] = cls(communicator, shape, device)
        assert found is not None
        return found

    def lease(self) -> _Set:
        """The first set that is free. Raises HandleError when there is none."""
        for each in self.sets:
            if not each.is_leased:
                each.is_leased = True
                if each.stream is not None and not torch.cuda.is_current_stream_capturing():
                    current = torch.cuda.current_stream(each.stream.device)
                    if current != each.stream:
                        current.wait_stream(each.stream)
                return each
        raise HandleError(
            f"hybrid_dense_routing: {NUM_SETS} micro-batches are between prepare and finalize on this group, and there "
            f"are buffers for no more; finalize one first"
        )


def _check_memory(shape: RowShape, communicator: Communicator, device: torch.device) -> None:
    if device.type != "cuda":
        return
    num_ranks = communicator.size
    mine = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # All ranks raise or none does: one alone would leave the others waiting.
    free = min(communicator.gather_objects(mine + torch.cuda.mem_get_info(device)[0], "symmetric memory"))
    needed = sum(shape.memory(num_ranks).values())
    if needed > free:
        fits = int(shape.capacity * free / needed)
        raise MemoryLimitError(
            f"hybrid_dense_routing needs {needed / 2**30:.2f} GiB of symmetric memory for {shape.capacity} tokens per "
            f"rank on {num_ranks} ranks, and {free / 2**30:.2f} GiB are free; max_tokens_per_rank={fits} would fit",
            fits,
        )


class Lease:
    """A set of buffers for one call; gone without `release`, it leaves the set in doubt."""

    __slots__ = ("buffers",)

    def __init__(self, buffers: _Set) -> None:
        self.buffers: _Set | None = buffers

    def release(self) -> None:
        if self.buffers is not None:
            self.buffers.is_leased = False
            self.buffers = None

    def abandon(self) -> None:
        """Give the set back without a combine."""
        if self.buffers is not None:
            self.buffers.in_doubt = True
            self.release()

    def __del__(self) -> None:
        self.abandon()


@dataclass(slots=True)
class NvlinkCall:
    """What combine needs to know of a dispatch. capacity: rows of each rank pair.

    present: int32 [R * C], which tokens have a row here. places, weights: [R * C, K], of tokens in an expert-grouped
    buffer; weights None when they are in the rows.
    """

    lease: Lease
    capacity: int
    num_tokens: int
    needed_by: torch.Tensor
    row_index: torch.Tensor | None
    present: torch.Tensor
    places: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ReceivedInGroups:
    """Rows in expert-grouped order: activations [slots, H], scales [slots, G] group by group, group_ends int32 [S]."""

    activations: torch.Tensor
    group_ends: torch.Tensor
    scales: torch.Tensor | None
    handle: NvlinkCall


@dataclass(frozen=True, slots=True)
class Received:
    """Rows in the order (source rank, its tokens): activations [N, H], scales [N, G], ids and weights [N, K]."""

    activations: torch.Tensor
    local_ids: torch.Tensor
    topk_weights: torch.Tensor | None
    scales: torch.Tensor | None
    handle: NvlinkCall


class NvlinkTransport:
    """Dispatch and combine between the ranks of one group. Making one is a collective."""

    def __init__(
        self,
        config: MoEConfig,
        shape: RowShape,
        communicator: Communicator,
        tables: LookupTables,
        errors: DeferredErrors,
        device: torch.device,
        num_sms: int,
    ) -> None:
        self.shape, self.num_sms = shape, num_sms
        self._serial = next(_serials)
        self._communicator, self._tables, self._errors, self._device = communicator, tables, errors, device
        self._limit_ns = int(config.parallel.timeout_seconds * 1e9)
        self._buffers = Buffers.shared(communicator, shape, device)
        self._routing: RoutingExchange | None = None
        if shape.num_slots:
            slots, top_k = shape.num_slots, shape.top_k
            self._routing = RoutingExchange(communicator, slots, top_k, shape.capacity, tables, errors, device)
        self._num_experts, self._max_replicas = tables.tables.slot.shape
        self._top_k_block = next_power_of_2(shape.top_k)
        self._block_h = next_power_of_2(shape.hidden_size)

    def dispatch(
        self,
        activations: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        capacity: int,
        workspace: Workspace,
        *,
        room: int | None = None,
        flags: int = 0,
        device_flags: torch.Tensor | None = None,
    ) -> Received:
        """Write every row to each rank that needs it and wait for the others'.

        activations [T, H], T <= capacity; ids int [T, K] as the lookup tables take them; weights float [T, K] or None.
        capacity: tokens of a rank, the same number on all of them. room: rows of a rank pair where there are fewer.
        flags: of `ErrorFlag`, what this rank has to tell. device_flags: more of them, int32 [1], where room is None.
        """
        rows = capacity if room is None else min(room, capacity)
        lease = Lease(self._buffers.lease())
        buffers = lease.buffers
        assert buffers is not None
        if buffers.in_doubt:
            self._settle(buffers)
        num_tokens = activations.shape[0]
        needed_by = workspace.tensor("needed_by", (capacity,), torch.int32)
        if device_flags is not None:
            buffers.views["errors"].copy_(device_flags)
        limits = None if rows == capacity else _limited_rows(ids, self._tables, self._communicator.size, rows)
        words = self._errors.kernel_words()
        moving = [activations, ids, words]
        if weights is not None:
            moving.append(weights)

        def launches() -> list[Launch]:
            arguments = buffers, activations, ids, weights, words, needed_by, rows, flags
            if limits is None and self._takes_tma(activations, rows):
                return self._hopper_dispatch_launches(*arguments)
            return [
                self._dispatch_launch(*arguments, limits, None if device_flags is None else buffers.views["errors"])
            ]

        if limits is None:
            layouts = tuple((tensor.dtype, tensor.shape, tensor.stride()) for tensor in moving)
            key = ("nvlink_dispatch", self._serial, buffers.serial, rows, flags, device_flags is None, layouts)
            workspace.cached(key, LaunchSequence)(moving, launches)
        else:
            for launch in launches():
                launch.run()
        if device_flags is not None:
            # Kernels that add flags of their own begin with none.
            buffers.views["errors"].zero_()
        try:
            self._errors.launched()
        except MoEPluginError:
            # Now, on all ranks alike, and not when the last frame that knows of this call is gone.
            lease.abandon()
            raise
        total = self._communicator.size * rows
        received, local_ids, row_weights, scales = buffers.received(total, self.shape.hidden_size)
        row_index = None if limits is None else limits.row_index
        return Received(
            activations=received,
            local_ids=local_ids,
            topk_weights=None if weights is None else row_weights,
            scales=scales if self.shape.groups else None,
            handle=NvlinkCall(lease, rows, num_tokens, needed_by, row_index, buffers.views["present"]),
        )

    def _dispatch_launch(
        self,
        buffers: _Set,
        activations: torch.Tensor,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        words: torch.Tensor,
        needed_by: torch.Tensor,
        capacity: int,
        flags: int,
        limits: _LimitedRows | None,
        more_flags: torch.Tensor | None = None,
    ) -> Launch:
        """ids: None where `limits` says where rows go, in expert-grouped order."""
        from moe_plugin.kernels import nvlink_dispatch

        shape, views, tables = self.shape, buffers.views, self._tables
        programs = self._dispatch_programs(capacity)
        rows_at_once, num_warps = self._tile(capacity, programs)
        group = self._block_h
        if shape.groups > 1 or (shape.groups == 1 and shape.hidden_size <= GROUP_SIZE):
            group = min(GROUP_SIZE, self._block_h)
        if limits is not None and limits.flags is not None:
            more_flags = limits.flags
        pdl = dependent_launch()
        stride_weights = (0, 0) if weights is None else weights.stride()
        return nvlink_dispatch.launch_dispatch.launch(
            (programs,),
            (
                activations, ids, weights, tables.rank, tables.slot, tables.num_replicas,
                None if limits is None else limits.row_of_token, None if limits is None else limits.rows_used,
                self._buffers.peer_offsets, views["rows"], views["scales"] if shape.groups else None,
                None if ids is None else views["local_ids"], views["row_weights"], views["present"],
                views["dispatch_flags"], needed_by, more_flags, views["epochs"], self._errors.lost, words,
                activations.shape[0], capacity, flags, self._communicator.rank, self._limit_ns,
                *activations.stride(), *((0, 0) if ids is None else ids.stride()), *stride_weights,
                views["rows"].stride(0), views["scales"].stride(0), MAX_PROGRAMS,
            ),
            (
                shape.hidden_size, shape.top_k, self._top_k_block, self._num_experts, self._max_replicas,
                self._communicator.size, rows_at_once, self._block_h, group,
                next_power_of_2(min(cdiv(capacity, programs), ROUTING_TOKENS)), nvlink_dispatch.PHASE_DISPATCH, pdl,
            ),
            num_warps=num_warps,
            launch_pdl=pdl,
        )  # fmt: skip

    def _hopper_dispatch_launches(
        self,
        buffers: _Set,
        activations: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        words: torch.Tensor,
        needed_by: torch.Tensor,
        capacity: int,
        flags: int,
    ) -> list[Launch]:
        """What is small, the rows, and the wait for the others."""
        from moe_plugin.kernels import nvlink_dispatch

        shape, views, tables, communicator = self.shape, buffers.views, self._tables, self._communicator
        programs, num_tokens = self._dispatch_programs(capacity), activations.shape[0]
        peer_offsets, lost, errors = self._buffers.peer_offsets, self._errors.lost, views["errors"]
        pdl = dependent_launch()
        stride_weights = (0, 0) if weights is None else weights.stride()
        routing = nvlink_dispatch.launch_write_routing.launch(
            (cdiv(capacity, ROUTING_TOKENS),),
            (
                ids, weights, tables.rank, tables.slot, tables.num_replicas,
                peer_offsets, views["local_ids"], views["row_weights"], views["present"], needed_by, errors,
                views["epochs"], num_tokens, capacity, communicator.rank, *ids.stride(), *stride_weights,
            ),
            (
                shape.top_k, self._top_k_block, self._num_experts, self._max_replicas, communicator.size,
                ROUTING_TOKENS, pdl,
            ),
            num_warps=4,
            launch_pdl=pdl,
        )  # fmt: skip
        move = self._move_launch(buffers, activations, needed_by, None, capacity, flags, 1)
        wait = nvlink_dispatch.launch_await_dispatch.launch(
            (programs,),
            (
                peer_offsets, views["local_ids"], views["present"], views["dispatch_flags"], errors, views["epochs"],
                lost, words, capacity, communicator.rank, self._limit_ns, MAX_PROGRAMS,
            ),
            (
                shape.top_k, self._top_k_block, communicator.size, ROUTING_TOKENS, nvlink_dispatch.PHASE_DISPATCH, pdl,
            ),
            num_warps=1,
            launch_pdl=pdl,
        )  # fmt: skip
        return [routing, move, wait]

    def _move_launch(
        self,
        buffers: _Set,
        activations: torch.Tensor,
        needed_by: torch.Tensor,
        first_place: torch.Tensor | None,
        capacity: int,
        flags: int,
        chunks: int,
    ) -> Launch:
        """The rows alone, by TMA, to `first_place` [T, R] on each rank, or to the token's own row."""
        from moe_plugin.kernels import hopper_exchange

        shape, views, size = self.shape, buffers.views, self._communicator.size
        pdl = dependent_launch()
        common = (
            needed_by, first_place, self._buffers.peer_offsets, views["dispatch_flags"], views["errors"],
            views["epochs"], self._errors.lost, activations.shape[0], capacity, flags, self._communicator.rank,
        )  # fmt: skip
        to_peers = self._peer_descriptors(buffers, "rows")
        programs = (self._dispatch_programs(capacity),)
        if shape.groups == 0:
            return hopper_exchange.launch_send_rows.launch(
                programs,
                (self._rows_descriptor(activations), *to_peers, *common, MAX_PROGRAMS),
                (size, chunks, self._ring_rows(), 1, pdl),
                num_warps=1,
                launch_pdl=pdl,
            )
        group = GROUP_SIZE if shape.groups > 1 or shape.hidden_size <= GROUP_SIZE else shape.hidden_size
        strides = activations.stride(0), views["scales"].stride(0)
        return hopper_exchange.launch_send_quantized.launch(
            programs,
            (activations, *to_peers, views["scales"], *common, *strides, MAX_PROGRAMS),
            (shape.hidden_size, group, size, chunks, RING_ROWS, QUANTIZING_WARPS, pdl),
            num_warps=QUANTIZING_WARPS,
            launch_pdl=pdl,
        )

    def dispatch_in_groups(
        self,
        activations: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        capacity: int,
        workspace: Workspace,
        *,
        flags: int = 0,
    ) -> ReceivedInGroups:
        """`dispatch` into expert-grouped order, for a transport whose shape has `num_slots`.

        Routing is gathered and scanned first, so that every rank knows the place of every row.
        """
        assert self._routing is not None
        workspace = workspace.scoped("in groups")
        gathered, row_weights, routing = self._routing.gather(
            ids, weights, capacity, workspace, rows=False, flags=flags
        )
        lease = Lease(self._buffers.lease())
        buffers = lease.buffers
        assert buffers is not None
        if buffers.in_doubt:
            self._settle(buffers)
        shape, size, num_tokens = self.shape, self._communicator.size, activations.shape[0]
        total, slots = size * capacity, shape.grouped_rows(size, capacity)
        tables = {
            "places": workspace.tensor("places", (total, shape.top_k), torch.int32),
            "present": workspace.tensor("present", (total,), torch.int32),
            "first_place": workspace.tensor("first_place", (capacity, size), torch.int32),
            "needed_by": workspace.tensor("needed_by", (capacity,), torch.int32),
        }
        scales = workspace.tensor("scales", (shape.groups, slots), torch.float32).T if shape.groups else None
        rows = buffers.views["rows"][:slots, : shape.hidden_size]
        words = self._errors.kernel_words()
        moving = [activations, words]

        def launches() -> list[Launch]:
            return self._launches_in_groups(buffers, activations, gathered, routing, tables, rows, scales, words, flags)

        layouts = tuple((tensor.shape, tensor.stride()) for tensor in moving)
        key = ("nvlink_dispatch_in_groups", self._serial, buffers.serial, capacity, flags, layouts)
        workspace.cached(key, LaunchSequence)(moving, launches)
        try:
            self._errors.launched()
        except MoEPluginError:
            lease.abandon()
            raise
        assert routing.group_ends is not None
        flat_weights = None if row_weights is None else row_weights.view(total, shape.top_k)
        call = NvlinkCall(
            lease, capacity, num_tokens, tables["needed_by"], None, tables["present"], tables["places"], flat_weights
        )
        return ReceivedInGroups(rows, routing.group_ends, scales, call)

    def _launches_in_groups(
        self,
        buffers: _Set,
        activations: torch.Tensor,
        gathered: torch.Tensor,
        routing: DenseRouting,
        tables: Mapping[str, torch.Tensor],
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        words: torch.Tensor,
        flags: int,
    ) -> list[Launch]:
        from moe_plugin.kernels.contiguous_rows import duplicate_rows_launches, token_places_launches
        from moe_plugin.kernels.nvlink_dispatch import PHASE_DISPATCH

        shape, views, capacity = self.shape, buffers.views, gathered.shape[1]
        assert routing.positions is not None and routing.segment_starts is not None
        places = token_places_launches(
            gathered,
            routing.positions,
            routing.segment_starts,
            self._communicator.rank,
            **tables,
            epochs=views["epochs"],
        )
        first_place, needed_by = tables["first_place"], tables["needed_by"]
        if self._takes_tma(activations, capacity):
            chunks = _chunks(capacity)
            move = self._move_launch(buffers, activations, needed_by, first_place, capacity, flags, chunks)
        else:
            chunks = 1
            to_places = _LimitedRows(first_place, None, None, None)
            move = self._dispatch_launch(buffers, activations, None, None, words, needed_by, capacity, flags, to_places)
        duplicates = duplicate_rows_launches(
            rows, views["scales"] if shape.groups else None, scales, tables["places"],
            views["dispatch_flags"], views["errors"], views["epochs"], self._errors.lost, words,
            capacity=capacity, hidden_size=shape.hidden_size, senders=self._dispatch_programs(capacity), chunks=chunks,
            programs=self._dispatch_programs(capacity), limit_ns=self._limit_ns, phase=PHASE_DISPATCH,
        )  # fmt: skip
        return [*places, move, *duplicates]

    def _takes_tma(self, rows: torch.Tensor, capacity: int) -> bool:
        """Whether `hopper_exchange` moves these rows: such that TMA can, and so many that it pays."""
        return capacity >= TMA_TOKENS and self._fits_tma and _are_dense_rows(rows)

    @functools.cached_property
    def _fits_tma(self) -> bool:
        """Whether rows of this shape are whole lines, as many as a box of TMA may have, on a device that has it."""
        if self._device.type != "cuda" or torch.cuda.get_device_capability(self._device) < (9, 0) or not _has_gluon():
            return False
        from moe_plugin.kernels.hopper_exchange import LAG, LEAST_LINES, LINE_BYTES, MAX_LINES, MAX_RANKS

        if self._communicator.size > MAX_RANKS or self._ring_rows() <= LAG + 1:
            return False
        kinds = {self.shape.dtype, self.shape.sent_dtype}
        lines = [divmod(self.shape.hidden_size * dtype.itemsize, LINE_BYTES) for dtype in kinds]
        return all(rest == 0 and LEAST_LINES <= count <= MAX_LINES for count, rest in lines)

    def _ring_rows(self) -> int:
        return min(RING_BYTES // next_power_of_2(self.shape.hidden_size * self.shape.dtype.itemsize), MOST_RING_ROWS)

    def _rows_descriptor(self, rows: torch.Tensor) -> Descriptor:
        from moe_plugin.kernels.hopper_exchange import row_descriptor

        return row_descriptor(rows.data_ptr(), rows.dtype, rows.shape[0], self.shape.hidden_size, rows.stride(0))

    def _peer_descriptors(self, buffers: _Set, name: str) -> list[Descriptor]:
        """Of region `name` on the ranks after this one, in turn; as many as kernels take."""
        from moe_plugin.kernels.hopper_exchange import MAX_RANKS, row_descriptor

        view, memory, size, rank = buffers.views[name], buffers.memory, self._communicator.size, self._communicator.rank
        offset = view.data_ptr() - memory.memory.data_ptr()
        return [
            row_descriptor(
                memory.addresses[(rank + step) % size] + offset, view.dtype, view.shape[0], self.shape.hidden_size,
                view.stride(0),
            )
            for step in range(1, MAX_RANKS + 1)
        ]  # fmt: skip

    def combine(self, rows: torch.Tensor, call: NvlinkCall, out: torch.Tensor, workspace: Workspace) -> None:
        """out [T, H] = over ranks, ascending, the sum in fp32 of each one's row for the token.

        rows [N, H] in the order of `Received`, contiguous in H.
        """
        buffers = call.lease.buffers
        assert buffers is not None
        reduction: list[Launch] = []
        grouped = rows
        if call.places is not None:
            rows = workspace.tensor("reduced", (call.places.shape[0], self.shape.hidden_size), rows.dtype)
            reduction = row_sum_launches(grouped, call.places, call.weights, rows)
        elif not _are_dense_rows(rows):
            rows = workspace.tensor("dense rows", tuple(rows.shape), rows.dtype).copy_(rows)
        words = self._errors.kernel_words()

        # All ranks must share out tokens alike, so this follows from what they have in common.
        on_hopper = call.row_index is None and self._communicator.size > 1 and self._takes_tma(rows, call.capacity)

        def launches() -> list[Launch]:
            combine_launch = self._hopper_combine_launch if on_hopper else self._combine_launch
            return [*reduction, combine_launch(buffers, rows, call, out, words)]

        moving = [grouped if reduction else rows, out, words]
        if call.row_index is None and out.shape[0] > 0:
            layouts = tuple((tensor.shape, tensor.stride()) for tensor in moving)
            key = ("nvlink_combine", self._serial, buffers.serial, call.capacity, bool(reduction), layouts)
            workspace.cached(key, LaunchSequence)(moving, launches)
        else:
            for launch in launches():
                launch.run()
        if call.row_index is not None:
            row_sum(buffers.views["returned"], call.row_index, None, out, use_triton=True)
        try:
            self._errors.launched()
        except MoEPluginError:
            call.lease.abandon()  # see dispatch
            raise
        if self._device.type == "cuda":
            buffers.stream = torch.cuda.current_stream(self._device)
        call.lease.release()

    def _combine_launch(
        self, buffers: _Set, rows: torch.Tensor, call: NvlinkCall, out: torch.Tensor, words: torch.Tensor
    ) -> Launch:
        from moe_plugin.kernels import nvlink_combine, nvlink_dispatch

        shape, views = self.shape, buffers.views
        # One half of the programs sends, the other sums.
        senders = max(min(self.num_sms // 2, call.capacity), 1)
        rows_at_once, num_warps = self._tile(call.capacity, senders)
        is_limited = call.row_index is not None
        pdl = dependent_launch()
        return nvlink_combine.launch_combine.launch(
            (2 * senders,),
            (
                rows, call.present, call.needed_by, out, self._buffers.peer_offsets, views["returned"],
                views["combine_flags"], views["epochs"], self._errors.lost, words,
                # With fewer rows than tokens, a second kernel finds and sums them.
                0 if is_limited else call.num_tokens, call.capacity, self._communicator.rank, self._limit_ns,
                rows.stride(0), views["returned"].stride(0), out.stride(0), MAX_PROGRAMS,
            ),
            (
                shape.hidden_size, self._communicator.size, rows_at_once, self._block_h, _chunks(call.capacity),
                is_limited, nvlink_dispatch.PHASE_COMBINE, pdl,
            ),
            num_warps=num_warps,
            launch_pdl=pdl,
        )  # fmt: skip

    def _hopper_combine_launch(
        self, buffers: _Set, rows: torch.Tensor, call: NvlinkCall, out: torch.Tensor, words: torch.Tensor
    ) -> Launch:
        from moe_plugin.kernels import hopper_exchange, nvlink_dispatch

        shape, views = self.shape, buffers.views
        pdl = dependent_launch()
        return hopper_exchange.launch_combine.launch(
            (self._programs(call.capacity),),
            (
                self._rows_descriptor(rows), *self._peer_descriptors(buffers, "returned")[:-1],
                rows, views["returned"], out, call.present, call.needed_by,
                self._buffers.peer_offsets, views["combine_flags"], views["epochs"], self._errors.lost, words,
                call.num_tokens, call.capacity, self._communicator.rank, self._limit_ns,
                rows.stride(0), views["returned"].stride(0), out.stride(0), MAX_PROGRAMS,
            ),
            (
                shape.hidden_size, self._block_h, self._communicator.size, _chunks(call.capacity), self._ring_rows(),
                nvlink_dispatch.PHASE_COMBINE, SUMMING_WARPS, pdl,
            ),
            num_warps=SUMMING_WARPS,
            launch_pdl=pdl,
        )  # fmt: skip

    def _dispatch_programs(self, capacity: int) -> int:
        # Programs that quantize have more to do than to fill a port.
        return min(self.num_sms, capacity) if self.shape.groups else self._programs(capacity)

    def _programs(self, capacity: int) -> int:
        """The same on all ranks, since their programs of one number wait for each other."""
        if capacity > FEW_TOKENS and EVEN_PROGRAMS < self.num_sms < 32:
            return EVEN_PROGRAMS
        return min(self.num_sms, capacity)

    def _tile(self, capacity: int, programs: int) -> tuple[int, int]:
        """Rows that a program loads before it stores them, and its warps."""
        num_warps = max(min(self._block_h // COLUMNS_PER_WARP, 32), 4)
        return min(ROWS_AT_ONCE, next_power_of_2(cdiv(capacity, programs))), num_warps

    def _settle(self, buffers: _Set) -> None:
        """After a dispatch without its combine: all ranks are through with what it left."""
        if self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise HandleError(
                    "hybrid_dense_routing: a prepare without its finalize came before this capture; finalize every one"
                )
            torch.cuda.current_stream(self._device).synchronize()
        epochs = buffers.views["epochs"]
        epochs[0].copy_(epochs[1])
        self._communicator.gather_objects(None, "dispatch")
        buffers.in_doubt = False


@functools.cache
def _has_gluon() -> bool:
    """Whether this Triton has what `hopper_exchange` is written in: from 3.6 on."""
    try:
        importlib.import_module("moe_plugin.kernels.hopper_exchange")
    except (ImportError, AttributeError):
        return False
    return True


def _chunks(capacity: int) -> int:
    # A power of two, since each number has kernels of its own.
    return min(next_power_of_2(cdiv(capacity, TOKENS_PER_CHUNK)), MOST_CHUNKS)


def _are_dense_rows(rows: torch.Tensor) -> bool:
    """Whether TMA can address them."""
    aligned = (rows.data_ptr() | rows.stride(0) * rows.dtype.itemsize) % UNIT == 0
    return rows.stride(1) == 1 and aligned


@dataclass(frozen=True, slots=True)
class _LimitedRows:
    """Which tokens have a row where a rank pair has fewer than tokens.

    row_of_token int32 [T, R], -1 for those without; rows_used int32 [R]; flags int32 [1], CAPACITY where some lack one;
    row_index int32 [T, R], where the results of each rank will lie.
    """

    row_of_token: torch.Tensor
    rows_used: torch.Tensor | None
    flags: torch.Tensor | None
    row_index: torch.Tensor | None


def _limited_rows(ids: torch.Tensor, lookup: LookupTables, num_ranks: int, room: int) -> _LimitedRows:
    """By torch, since a limit below the number of tokens is rare and never the fastest way."""
    tables = lookup.tables
    num_experts, max_replicas = tables.rank.shape
    expert = ids.long()
    kept = (expert >= 0) & (expert < num_experts)
    expert = expert.clamp(0, num_experts - 1)
    token = torch.arange(ids.shape[0], device=ids.device)
    replica = token.unsqueeze(1) % tables.num_replicas[expert] if max_replicas > 1 else torch.zeros_like(expert)
    rank = torch.where(kept, tables.rank[expert, replica], num_ranks).long()
    needed = torch.zeros(ids.shape[0], num_ranks + 1, dtype=torch.int32, device=ids.device).scatter_(1, rank, 1)
    needed = needed[:, :num_ranks]
    row = needed.cumsum(0, dtype=torch.int32) - needed
    counts = needed.sum(0, dtype=torch.int32)
    has_row = (needed > 0) & (row < room)
    row_of_token = torch.where(has_row, row, -1)
    first = torch.arange(num_ranks, dtype=torch.int32, device=ids.device) * room
    overflow = (counts > room).any().to(torch.int32).view(1) * int(ErrorFlag.CAPACITY)
    return _LimitedRows(
        row_of_token.contiguous(), counts.clamp(max=room), overflow, torch.where(has_row, row + first, -1).contiguous()
    )
