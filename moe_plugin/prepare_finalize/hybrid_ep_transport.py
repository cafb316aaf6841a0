"""DeepEP's HybridEPBuffer as a way to move rows between the ranks of one NVLink domain.

Dispatch
 1. `kernels/expert_map` turns ids and router weights into what the library takes: dense int16 ids where the installed
    one does (pull request 673), a map of booleans before it; an expert named twice in a token is named once, with both
    weights; tokens are padded to the number that all ranks announce, with rows of -1.
 2. The library gathers the routing, scans it, and moves rows; the host waits for their number.
 3. In token order, the map of which experts each row wants becomes ids, and weights are picked from its columns. In
    expert-grouped order, rows come permuted with segments padded as the Contiguous format wants them.

Combine sums rows without weights. In token order the experts have applied them; permuted rows are multiplied by theirs
here first.

Its kernels wait for peers without a limit. So the caller exchanges error flags before it, bounded in time, which also
finds a rank that does not come; one that is lost later, between that and the end of a kernel, is not found.

What is not used: the form of dispatch without a host sync, the only one that can be captured. It takes room for a fixed
number of permuted rows in every call, and drops those that do not fit.

Source: branch hybrid-ep of https://github.com/deepseek-ai/DeepEP, and pull request 673 for dense routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_plugin.compat import deep_ep
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.errors import ConfigError
from moe_plugin.kernels.expert_map import expert_map, local_pairs
from moe_plugin.kernels.row_sum import row_sum
from moe_plugin.kernels.tiling import next_power_of_2
from moe_plugin.modular_kernel import CONTIGUOUS_ALIGNMENT
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.quantization import FP8_DTYPE, GROUP_SIZE
from moe_plugin.verdict import Gate, gate_cuda_graph, gate_dtype, gate_package, gate_sm
from moe_plugin.workspace import Workspace

INSTALL = f"{deep_ep.INSTALL}, from its branch hybrid-ep"
MAX_RANKS = 72
"""Of one NVLink domain."""
MAX_SLOTS = 512
"""Experts of a rank that dense routing takes."""
SHARED_BYTES = 227 << 10
"""Of a multiprocessor from SM 90 on, for the least number of stages: four rows and four rows of weights."""
TOKENS_UNIT = 4
"""The number of tokens is a multiple: tables of a token, R int32, are loaded in multiples of 16 bytes."""
LEAST_TOKENS = 512
"""That any buffer has room for."""
ADDRESS_UNIT = 16
"""Bytes; rows are loaded by TMA."""

# Where things stand in the library's handles.
_LOCAL_MAP, _TOKENS_PER_EXPERT = 4, 7


@dataclass(frozen=True, slots=True)
class HybridEPRouting:
    """Where the rows of a call go, for any rows with the same ids and weights. No part of it lies in a workspace.

    handle: the library's. probs: fp32 [C, columns], router weights by expert, or None. num_rows: that arrived, with
    padding where they are permuted.
    """

    handle: tuple[Any, ...]
    probs: torch.Tensor | None
    num_rows: int


@dataclass(frozen=True, slots=True)
class HybridEPCall:
    """What combine needs to know about its dispatch. row_weights: fp32 [num_rows], of permuted rows, or None."""

    routing: HybridEPRouting
    num_tokens: int
    workspace: Workspace
    row_weights: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """Rows in global token order, one for each token that asks for an expert of this rank.

    activations: [N, H]. local_ids: int32 [N, K'], K' = min(K, slots), ascending, then -1. topk_weights: fp32 [N, K'], 0
    where there is no id, or None. scales: fp32 [N, H / 128] or None.
    """

    activations: torch.Tensor
    local_ids: torch.Tensor
    topk_weights: torch.Tensor | None
    scales: torch.Tensor | None
    handle: HybridEPCall


@dataclass(frozen=True, slots=True)
class ReceivedInGroups:
    """Rows in expert-grouped order: activations [N, H], scales [N, groups] group by group, group_ends int32 [slots]."""

    activations: torch.Tensor
    group_ends: torch.Tensor
    scales: torch.Tensor | None
    handle: HybridEPCall


class HybridEPTransport:
    """Dispatch and combine over one process group. Making one is a collective.

    num_slots: S; the expert in slot s of rank r has the physical id r * S + s. groups: scales of a row that travels
    quantized, 0 where none does. in_groups: rows come in expert-grouped order.
    """

    def __init__(
        self,
        config: MoEConfig,
        communicator: Communicator,
        num_slots: int,
        groups: int,
        in_groups: bool,
    ) -> None:
        features = deep_ep.probe().features
        if communicator.group is None:
            raise ConfigError("dispatch_transport='hybrid_ep' needs the process group of at least 2 ranks")
        self._ranks, self._rank, self._top_k = communicator.size, communicator.rank, config.top_k
        self._num_slots = num_slots
        self._uses_fp8, self._in_groups = groups > 0, in_groups
        self._takes_ids = "hybrid_dense_ids" in features
        self._fuses = in_groups and fuses_permute(features, groups)
        self._can_fuse = "hybrid_fused_permute" in features
        shape = buffer_shape(config, communicator.size, num_slots, groups)
        self.num_sms = shape.num_sms
        self._rank_columns = shape.num_slots
        self._buffer = deep_ep.shared_hybrid_buffer(communicator.group, shape)
        self._buffer.join(self)
        self._numbers = torch.empty(0, 1, dtype=torch.int32)

    def dispatch(
        self,
        activations: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        capacity: int,
        workspace: Workspace,
        scales: torch.Tensor | None = None,
        routing: HybridEPRouting | None = None,
    ) -> Received | ReceivedInGroups:
        """Move rows; collective.

        activations: bf16 [T, H], or e4m3 with scales fp32 [T, H / 128]. ids: int16 [T, K], physical, -1 where dropped.
        weights: float [T, K] or None. capacity: the most tokens that any rank may bring, the same on all.
        routing: of an earlier call with the same ids and weights on all ranks.
        """
        workspace = workspace.scoped("hybrid_ep")
        num_tokens, tokens = activations.shape[0], padded_tokens(capacity)
        # The library knows 8-bit rows as bytes.
        rows = activations.view(torch.uint8) if self._uses_fp8 else activations
        rows = _padded("rows", rows, tokens, workspace)
        if scales is not None:
            scales = _padded("scales", scales, tokens, workspace)
        probs = self._new_probs(ids, weights, tokens) if routing is None else routing.probs
        arguments: dict[str, Any] = {"hidden": rows, "scaling_factor": scales, "probs": probs}
        if routing is None:
            arguments |= self._routing_arguments(ids, weights, probs, tokens, workspace)
        else:
            arguments["handle"] = routing.handle
        if self._in_groups:
            return self._dispatch_in_groups(arguments, num_tokens, workspace, routing)
        if routing is not None:
            arguments["num_dispatched_tokens"] = routing.num_rows  # known, and so not waited for
        with self._buffer.turn() as buffer:
            rows, row_probs, scales, handle = buffer.dispatch(**arguments)
        call = HybridEPCall(HybridEPRouting(handle, probs, rows.shape[0]), num_tokens, workspace)
        local_ids, topk_weights = self._local_pairs(handle[_LOCAL_MAP], row_probs, rows.shape[0], workspace)
        return Received(self._as_sent(rows), local_ids, topk_weights, scales, call)

    def _new_probs(self, ids: torch.Tensor, weights: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
        if weights is None:
            return None
        return torch.empty(tokens, self._ranks * self._rank_columns, dtype=torch.float32, device=ids.device)

    def _routing_arguments(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        probs: torch.Tensor | None,
        tokens: int,
        workspace: Workspace,
    ) -> dict[str, Any]:
        """What dispatch is told about routing; fills `probs`."""
        columns = self._ranks * self._rank_columns
        if self._takes_ids:
            ids_out = workspace.tensor("ids", (tokens, ids.shape[1]), torch.int16)
            expert_map(ids, weights, self._num_slots, self._rank_columns, ids_out=ids_out, probs=probs)
            return {"topk_idx": ids_out, "num_of_experts": columns}
        routing_map = workspace.tensor("map", (tokens, columns), torch.bool)
        expert_map(ids, weights, self._num_slots, self._rank_columns, map_out=routing_map, probs=probs)
        return {"routing_map": routing_map}

    def _local_pairs(
        self, local_map: torch.Tensor, probs: torch.Tensor | None, num_rows: int, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (num_rows, min(self._top_k, self._num_slots))
        local_ids, weights = workspace.tensor("local_ids", shape, torch.int32), None
        if probs is not None:
            weights = workspace.tensor("topk_weights", shape, torch.float32)
            # Of a row there are columns for the experts of all ranks, and only this rank's are defined.
            first = self._rank * self._rank_columns
            probs = probs[:, first : first + self._num_slots]
        local_pairs(local_map[:num_rows, : self._num_slots], probs, local_ids=local_ids, weights=weights)
        return local_ids, weights

    def _dispatch_in_groups(
        self, arguments: dict[str, Any], num_tokens: int, workspace: Workspace, routing: HybridEPRouting | None
    ) -> ReceivedInGroups:
        if routing is not None:
            arguments["num_permuted_tokens"] = routing.num_rows
        if self._can_fuse:
            arguments["fuse_permute_dispatch"] = self._fuses
        with self._buffer.turn() as buffer:
            rows, row_weights, scales, _, handle = buffer.dispatch_with_permute(
                num_of_experts_per_rank=self._rank_columns,
                use_fp8=self._uses_fp8,
                pad_multiple=CONTIGUOUS_ALIGNMENT,
                non_blocking=False,
                **arguments,
            )
        known = HybridEPRouting(handle, arguments["probs"], rows.shape[0])
        call = HybridEPCall(known, num_tokens, workspace, row_weights)
        if rows.shape[0] == 0:
            # Experts take one segment at least.
            rows = rows.new_empty(CONTIGUOUS_ALIGNMENT, rows.shape[1])
            scales = None if scales is None else scales.new_empty(CONTIGUOUS_ALIGNMENT, scales.shape[1])
        by_group = None if scales is None else scales.T.contiguous().T
        ends = group_ends(handle[_TOKENS_PER_EXPERT], CONTIGUOUS_ALIGNMENT)
        return ReceivedInGroups(self._as_sent(rows), ends, by_group, call)

    def _as_sent(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(FP8_DTYPE) if self._uses_fp8 else rows

    def combine(self, rows: torch.Tensor, call: HybridEPCall) -> torch.Tensor:
        """bf16 [T, H]: the sum, over the ranks that got token t, of what `rows` holds for it there; collective.

        rows: bf16 [N, H] in the order of `dispatch`. Zeros for a token that no rank got.
        """
        handle, num_rows = call.routing.handle, call.routing.num_rows
        rows = rows[:num_rows]
        if not self._in_groups:
            with self._buffer.turn() as buffer:
                combined, _ = buffer.combine(hidden=rows.contiguous(), handle=handle)
            return combined[: call.num_tokens]
        if call.row_weights is not None:
            weighed = call.workspace.tensor("weighed rows", tuple(rows.shape), rows.dtype)
            rows = row_sum(rows, self._row_numbers(num_rows, rows.device), call.row_weights[:, None], weighed)
        options = {"fuse_unpermute_combine": self._fuses} if self._can_fuse else {}
        with self._buffer.turn() as buffer:
            combined, _ = buffer.combine_with_unpermute(
                hidden=rows.contiguous(), handle=handle, pad_multiple=CONTIGUOUS_ALIGNMENT, **options
            )
        return combined[: call.num_tokens]

    def close(self) -> None:
        """Leave the buffer, which the last layer to do so gives back; collective."""
        self._buffer.leave(self)

    def _row_numbers(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """int32 [num_rows, 1]: 0, 1, 2, ..."""
        if len(self._numbers) < num_rows:
            self._numbers = torch.arange(next_power_of_2(num_rows), dtype=torch.int32, device=device)[:, None]
        return self._numbers[:num_rows]


def gates(config: MoEConfig, environment: Environment, num_slots: int) -> list[Gate]:
    """What this transport asks of a layer and a machine. num_slots: of a rank."""
    package, parallel = environment.package(deep_ep.PACKAGE), config.parallel
    columns = parallel.ep_size * rank_columns(parallel.ep_size, num_slots)
    shared = 8 * config.hidden_size + 16 * columns
    found = [
        gate_package(environment, deep_ep.PACKAGE, INSTALL),
        Gate(
            "HybridEPBuffer",
            "HybridEPBuffer" in package.features,
            package.describe(),
            "DeepEP's HybridEPBuffer",
            INSTALL,
        ),
        gate_dtype(config, torch.bfloat16),
        gate_cuda_graph(config, False, "HybridEPBuffer's dispatch waits on the host for the number of rows"),
        Gate("num_nodes", parallel.num_nodes == 1, str(parallel.num_nodes), "1: rows go over NVLink alone"),
        Gate("ep_size", 2 <= parallel.ep_size <= MAX_RANKS, str(parallel.ep_size), f"2 to {MAX_RANKS} ranks"),
        Gate("hidden_size", config.hidden_size % 16 == 0, str(config.hidden_size), "a multiple of 16"),
        Gate("experts per rank", num_slots <= MAX_SLOTS, str(num_slots), f"at most {MAX_SLOTS}"),
        Gate(
            "shared memory",
            shared <= SHARED_BYTES,
            f"{shared} bytes for hidden_size {config.hidden_size} and {columns} experts",
            f"at most {SHARED_BYTES}: 8 bytes for a column of a row, 16 for an expert",
        ),
    ]
    if "cpu" not in package.features:
        nvcc = "found" if environment.nvcc else "not found"
        found.append(gate_sm(environment, 90))
        found.append(Gate("nvcc", environment.nvcc, nvcc, "a CUDA compiler: HybridEP compiles its kernels at run time"))
    return found


def describe(package: Package, groups: int, in_groups: bool) -> str:
    """What will move rows, in words. groups, in_groups: as for HybridEPTransport."""
    features = package.features
    routing = "dense int16 ids" if "hybrid_dense_ids" in features else "a map of booleans"
    order = "in token order"
    if in_groups:
        fused = "permuted on their way" if fuses_permute(features, groups) else "permuted after it"
        order = f"in expert-grouped order, {fused},"
    return f"DeepEP's HybridEPBuffer: routing as {routing}, {'fp8' if groups else 'bf16'} rows {order} for experts"


def may_permute(package: Package) -> bool:
    """Whether that version can bring rows into expert-grouped order."""
    return "hybrid_permute" in package.features


def fuses_permute(features: frozenset[str], groups: int) -> bool:
    """Whether rows are permuted by the kernel that moves them.

    On 4 H200, 4096 tokens, dispatch takes 679 us fused and 745 us not in bf16, and 511 us and 407 us in fp8.
    """
    return groups == 0 and "hybrid_fused_permute" in features


def travelling_groups(config: MoEConfig, groups: int) -> int:
    """Of rows that could travel with `groups` scales each: as many where HybridEP takes them so, else 0.

    It knows scales of 128 columns, and loads those of a row in multiples of 16 bytes. Example: H = 7168, 56 -> 56;
    H = 2880, 23 -> 0; one scale per row -> 0.
    """
    return groups if groups * GROUP_SIZE == config.hidden_size and groups % 4 == 0 else 0


def buffer_shape(config: MoEConfig, num_ranks: int, num_slots: int, groups: int) -> deep_ep.HybridShape:
    """Of the buffer that a layer needs."""
    tokens = max(padded_tokens(config.max_tokens_per_rank), LEAST_TOKENS)
    columns = rank_columns(num_ranks, num_slots)
    return deep_ep.HybridShape(config.hidden_size, tokens, columns, groups > 0, config.dispatch_num_sms)


def memory(config: MoEConfig, num_slots: int, in_groups: bool) -> Mapping[str, int]:
    """Bytes that a call of `max_tokens_per_rank` tokens takes at most, per buffer, those that DeepEP allocates too."""
    ranks, tokens = config.parallel.ep_size, padded_tokens(config.max_tokens_per_rank)
    shape, row_bytes = buffer_shape(config, ranks, num_slots, 0), config.hidden_size * config.dtype.itemsize
    most, wanted = ranks * tokens, min(config.top_k, num_slots)
    slots = most * wanted + num_slots * (CONTIGUOUS_ALIGNMENT - 1) if in_groups else most
    columns = ranks * shape.num_slots
    return {
        "HybridEP buffer": shape.num_bytes(ranks),
        "padded rows": tokens * row_bytes,
        "routing": tokens * (5 * columns + 2 * config.top_k),
        "tables": most * 5 * shape.num_slots,
        "received rows": slots * row_bytes,
        "slots and weights": most * (8 * wanted + 4 * columns),
        "weighed rows": slots * row_bytes if in_groups else 0,
        "results": tokens * row_bytes,
    }


def rank_columns(num_ranks: int, num_slots: int) -> int:
    """Columns of a rank in maps: its slots, and more until those of all ranks are a multiple of 4."""
    return next(columns for columns in range(max(num_slots, 1), num_slots + 4) if columns * num_ranks % 4 == 0)


def padded_tokens(capacity: int) -> int:
    """Tokens that each rank brings where `capacity` were announced."""
    return -(-max(capacity, 1) // TOKENS_UNIT) * TOKENS_UNIT


def group_ends(counts: torch.Tensor, alignment: int) -> torch.Tensor:
    """int32 [S]: where rows of each expert end when segments begin at multiples of `alignment`.

    Example, alignment 4: counts [2, 0, 5, 1] -> [2, 4, 9, 13].
    """
    padded = (counts + (alignment - 1)) // alignment * alignment
    return (padded.cumsum(0) - padded + counts).to(torch.int32)


def _padded(name: str, rows: torch.Tensor, num_rows: int, workspace: Workspace) -> torch.Tensor:
    """rows [T, ...] as num_rows contiguous ones where TMA can read them; the last ones hold anything."""
    if rows.shape[0] == num_rows and rows.is_contiguous() and rows.data_ptr() % ADDRESS_UNIT == 0:
        return rows
    padded = workspace.tensor(f"padded {name}", (num_rows, *rows.shape[1:]), rows.dtype)
    padded[: rows.shape[0]].copy_(rows)
    return padded
