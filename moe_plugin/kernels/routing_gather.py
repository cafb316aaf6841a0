"""All-gather of dense routing rows over NVLink: the first programs of the launch that then scans them.

A program has the p-th equal share of this rank's tokens. It looks up where each pair goes, writes the id of that place
(rank * num_slots + slot, int16) to every rank, router weights with them, and signals; rows past a rank's tokens are -1.
Then it waits for the programs p of all ranks, and copies their shares out of the memory that peers write into. Programs
of the scan wait for all shares instead, and read the rows where the peers have written them: see `dense_routing`.

Example, 2 ranks with num_slots = 2, capacity 2, top-2, a program each, experts 0 to 3 in order:

    rank 0: topk_ids [[0, 3], [1, 0]]    rank 1: topk_ids [[1, -1]]
    on both: ids [[[0, 3], [1, 0]], [[1, -1], [-1, -1]]]

Nobody waits for a program with a higher number, so none has to run at the same time as another.

Peers' memory holds two sets of rows, which calls take in turn, so nobody asks before writing. When rank i writes call
n + 2 over what rank j was sent in call n, i is through with call n + 1 and has seen j's signals of it; j has sent those
after its launch of call n, and nothing else reads that set. A slow j is never more than that one call behind. Which set
it is follows from the epoch, on the device, so that a graph that is replayed goes on where the last call was. Where the
memory belongs to a larger exchange, whose own signals say that a call is over (dispatch and combine), one set is
enough, and that exchange counts the epochs.

See `peer_memory` for signals and time limits. This module works without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch

from moe_plugin.kernels.placement_lookup import LookupTables
from moe_plugin.kernels.tiling import cdiv, next_power_of_2

try:
    import triton
    import triton.language as tl

    from moe_plugin.kernels.nvlink_dispatch import (
        EXPERT_ID_ERROR,
        PEER_LOST_ERROR,
        PHASE_ROUTING,
        destinations,
        peer_after,
    )
    from moe_plugin.kernels.peer_memory import (
        ALL_DONE,
        MAX_PEERS,
        await_peers,
        await_programs,
        errors_of,
        report,
        signal_peers,
        signal_value,
    )
except ImportError:
    triton = None

MAX_WRITERS = 16
"""Programs that write rows, so that those of the scan wait for few signals and find multiprocessors of their own."""

_WRITER_TOKENS = 32
"""A writer has these at least, as far as there are so many."""
_PAIRS_AT_ONCE = 2048
"""That a writer reads at once. It copies up to four times as many."""

if triton is not None:
    _ALL_DONE, _MAX_PEERS = tl.constexpr(ALL_DONE), tl.constexpr(MAX_PEERS)
    _PHASE_ROUTING = tl.constexpr(PHASE_ROUTING)

    @triton.jit
    @no_type_check  # a tuple that grows in an unrolled loop has no type
    def _write_rows(
        topk_ids_ptr, topk_weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, peer_offsets_ptr,
        ids_ptr, weights_ptr, first, last, num_tokens, capacity, rank, num_slots,
        stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
        TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr, MAX_REPLICAS: tl.constexpr,
        NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Ids and weights of tokens first to last to all ranks; whether an id was wrong."""
        k = tl.arange(0, TOP_K_BLOCK)
        in_top_k = (k < TOP_K)[None, :]
        # Before anything is stored, so that it is on its way together with the tokens' ids.
        offsets = ()
        for step in tl.static_range(NUM_RANKS):
            offsets += (tl.load(peer_offsets_ptr + peer_after(rank, step + 1, NUM_RANKS)),)
        wrong = 0
        for start in range(first, last, BLOCK):
            token = start + tl.arange(0, BLOCK)
            to_rank, slot, is_wrong = destinations(
                topk_ids_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, token, tl.minimum(num_tokens, last),
                stride_ids_t, stride_ids_k, TOP_K, TOP_K_BLOCK, NUM_EXPERTS, MAX_REPLICAS,
            )  # fmt: skip
            wrong = tl.maximum(wrong, is_wrong)
            ids = tl.where((to_rank >= 0) & (slot >= 0), to_rank * num_slots + slot, -1).to(tl.int16)
            mask = (token < last)[:, None] & in_top_k
            if topk_weights_ptr is not None:
                at = token.to(tl.int64)[:, None] * stride_weights_t + k[None, :] * stride_weights_k
                is_given = (token < num_tokens)[:, None] & mask
                weights = tl.load(topk_weights_ptr + at, mask=is_given, other=0.0).to(tl.float32)
            at = (rank * capacity + token).to(tl.int64)[:, None] * TOP_K + k[None, :]
            for step in tl.static_range(NUM_RANKS):
                tl.store(ids_ptr + offsets[step] * 8 + at, ids, mask=mask)
                if topk_weights_ptr is not None:
                    tl.store(weights_ptr + offsets[step] * 4 + at, weights, mask=mask)
        return wrong

    @triton.jit
    def _copy_rows(
        ids_ptr, weights_ptr, gathered_ids_ptr, gathered_weights_ptr, first, last, capacity, is_lost,
        TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_RANKS: tl.constexpr, SOURCES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Tokens first to last of all ranks from where peers have written them; ids of -1 where a rank is lost."""
        index, k = tl.arange(0, SOURCES * BLOCK), tl.arange(0, TOP_K_BLOCK)
        for start in range(first, last, BLOCK):
            token = start + index % BLOCK
            for first_source in range(0, NUM_RANKS, SOURCES):
                source = first_source + index // BLOCK
                mask = ((token < last) & (source < NUM_RANKS))[:, None] & (k < TOP_K)[None, :]
                at = (source * capacity + token).to(tl.int64)[:, None] * TOP_K + k[None, :]
                ids = tl.load(ids_ptr + at, mask=mask, other=-1)
                if gathered_weights_ptr is not None:
                    weights = tl.load(weights_ptr + at, mask=mask, other=0.0)
                tl.store(gathered_ids_ptr + at, tl.where(is_lost, -1, ids).to(tl.int16), mask=mask)
                if gathered_weights_ptr is not None:
                    tl.store(gathered_weights_ptr + at, weights, mask=mask)

    @triton.jit
    def gather_share(
        topk_ids_ptr, topk_weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, peer_offsets_ptr,
        ids_ptr, weights_ptr, flags_ptr, gathered_ids_ptr, gathered_weights_ptr, reports_ptr, lost_ptr,
        epoch, lost, writer, num_writers, num_tokens, capacity, errors, rank, num_slots, limit_ns,
        stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k, stride_flags,
        TOP_K: tl.constexpr, TOP_K_BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr, MAX_REPLICAS: tl.constexpr,
        NUM_RANKS: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """All that program `writer` of num_writers has to do; ids_ptr and weights_ptr are of this call's set."""
        share = tl.cdiv(capacity, num_writers)
        first = writer * share
        last = tl.minimum(first + share, capacity)
        wrong = _write_rows(
            topk_ids_ptr, topk_weights_ptr, rank_table_ptr, slot_table_ptr, num_replicas_ptr, peer_offsets_ptr,
            ids_ptr, weights_ptr, first, last, num_tokens, capacity, rank, num_slots,
            stride_ids_t, stride_ids_k, stride_weights_t, stride_weights_k,
            TOP_K, TOP_K_BLOCK, NUM_EXPERTS, MAX_REPLICAS, NUM_RANKS, BLOCK,
        )  # fmt: skip
        errors |= tl.where(wrong > 0, EXPERT_ID_ERROR, 0) | tl.where(lost != 0, PEER_LOST_ERROR, 0)
        signal = signal_value(epoch, _ALL_DONE, errors)
        signal_peers(flags_ptr + rank * stride_flags + writer, peer_offsets_ptr, signal, NUM_RANKS)
        limit = tl.where(lost != 0, 0, limit_ns)
        seen = await_peers(flags_ptr + writer, stride_flags, epoch, _ALL_DONE, NUM_RANKS, limit)
        found, missing = errors_of(seen, epoch, _ALL_DONE)
        report(reports_ptr, lost_ptr, found, missing, limit, epoch, _PHASE_ROUTING)
        _copy_rows(
            ids_ptr, weights_ptr, gathered_ids_ptr, gathered_weights_ptr, first, last, capacity, missing < _MAX_PEERS,
            TOP_K, TOP_K_BLOCK, NUM_RANKS, SOURCES, BLOCK,
        )  # fmt: skip

    @triton.jit
    def await_rows(
        flags_ptr, reports_ptr, lost_ptr, epoch, lost, num_writers, limit_ns, stride_flags,
        NUM_RANKS: tl.constexpr, FLAGS: tl.constexpr,
    ):  # fmt: skip
        """Wait for the rows of all ranks; whether some did not come."""
        limit = tl.where(lost != 0, 0, limit_ns)
        missing = await_programs(flags_ptr, stride_flags, epoch, num_writers, NUM_RANKS, limit, FLAGS)
        report(reports_ptr, lost_ptr, 0, missing, limit, epoch, _PHASE_ROUTING)
        return missing < _MAX_PEERS


@dataclass(frozen=True, slots=True)
class RoutingRegions:
    """Memory of one rank that gathers take place in, at the same place on all ranks but for the epochs.

    peer_offsets: int64 [R], how far the other ranks' regions are away, in units of 16 bytes.
    ids, weights: int16 and fp32 [sets, room], room for R * C * K of the largest call, a multiple of 64.
    flags: int64 [R, MAX_WRITERS], zeros to begin with.
    epochs: int64 [1 or more], zeros to begin with: the number of the last call, on this rank alone.
    owns_epochs: a gather advances them; else whatever else takes part in a call does so later.
    """

    peer_offsets: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    flags: torch.Tensor
    epochs: torch.Tensor
    owns_epochs: bool = True


@dataclass(frozen=True, slots=True)
class RoutingGather:
    """What a rank brings to an all-gather of routing rows, where it takes place, and how it ends.

    topk_ids: int16, int32 or int64 [T, K], any strides; topk_weights: float [T, K], any strides, or None.
    tables: where experts are, by the ids of `topk_ids`; replicas are taken in turn by token.
    gathered_weights: fp32 [R, C, K] to be filled, contiguous; None where there are no topk_weights.
    reports, lost: see `DeferredErrors.kernel_words`, and its `lost`. errors: flags that this rank has to tell.
    limit_ns: after which a rank that has not come is lost.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor | None
    tables: LookupTables
    regions: RoutingRegions
    gathered_weights: torch.Tensor | None
    reports: torch.Tensor
    lost: torch.Tensor
    limit_ns: int
    errors: int = 0


def num_writers(capacity: int) -> int:
    """Programs that write the rows of `capacity` tokens; the same number on all ranks."""
    return max(min(cdiv(capacity, _WRITER_TOKENS), MAX_WRITERS), 1)


def writer_tiles(num_ranks: int, capacity: int, top_k: int) -> tuple[int, int]:
    """Tokens that a writer reads at once, and ranks whose rows it copies at once."""
    lanes = next_power_of_2(top_k)
    share = cdiv(max(capacity, 1), num_writers(capacity))
    block = min(next_power_of_2(share), max(_PAIRS_AT_ONCE // lanes, 1))
    return block, min(next_power_of_2(num_ranks), max(4 * _PAIRS_AT_ONCE // (block * lanes), 1))
