"""DeepEP's HybridEPBuffer in plain torch on CPU tensors over gloo, with the traps of the real one.

Names, parameters, layouts and the order of rows are those of branch hybrid-ep of DeepEP, and of pull request 673 where
`install` is told that it takes dense ids; tests/prepare_finalize/test_hybrid_ep_transport.py holds both to the same
answers. What the library leaves undefined is NaN here, or True in a map. What makes it hang, overrun or go wrong in
silence raises here: another number of tokens on some rank, an expert that a token names twice, a number of tokens that
tables cannot be loaded for, more tokens than the buffer is for, rows that TMA cannot read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

__version__ = "0+double"

Handle = tuple[Any, ...]


class HybridEPBuffer:
    """takes_ids: whether dense int16 ids are understood; before that, ids became a map, by an index that -1 breaks."""

    takes_ids = False

    def __init__(
        self,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
    ) -> None:
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        assert hidden_dim % (512 if use_fp8 else 16) == 0
        assert num_local_experts * self.group_size % 4 == 0
        self.num_of_nodes = 1
        self._hidden_dim, self._max_tokens = hidden_dim, max_num_of_tokens_per_rank
        self._experts, self._use_fp8 = num_local_experts, use_fp8
        self.calls: list[str] = []

    def dispatch(
        self,
        hidden: torch.Tensor,
        scaling_factor: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_of_experts: int | None = None,
        probs: torch.Tensor | None = None,
        routing_map: torch.Tensor | None = None,
        num_dispatched_tokens_tensor: torch.Tensor | None = None,
        num_dispatched_tokens: int | None = None,
        handle: Handle | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Handle]:
        self.calls.append("dispatch" if handle is None else "dispatch again")
        everyone = self._everyone(hidden, routing_map, topk_idx, num_of_experts, handle)
        local = self._local(everyone)
        rows, row_probs, scales = self._received(hidden, probs, scaling_factor, local)
        local_map = torch.ones(len(everyone), self._experts, dtype=torch.bool)
        local_map[: len(rows)] = local[local.any(1)]
        if handle is None:
            count = torch.tensor([len(rows)], dtype=torch.int32)
            handle = (everyone, None, None, count, local_map, len(hidden), None)
        else:
            assert num_dispatched_tokens is None or num_dispatched_tokens == len(rows)
        return rows, row_probs, scales, handle

    def combine(
        self, hidden: torch.Tensor, probs: torch.Tensor | None = None, handle: Handle | None = None
    ) -> tuple[torch.Tensor, None]:
        assert handle is not None
        assert len(handle) == 7, "the handle of a permuted dispatch has combine_with_unpermute"
        self.calls.append("combine")
        return self._combined(hidden, handle[0], handle[5]), None

    def _combined(self, hidden: torch.Tensor, everyone: torch.Tensor, num_tokens: int) -> torch.Tensor:
        assert hidden.dtype == torch.bfloat16
        assert hidden.is_contiguous()
        needed = everyone.view(len(everyone), self.group_size, self._experts).any(2)
        counts = needed.sum(0).tolist()
        assert hidden.shape == (counts[self.rank], self._hidden_dim)
        padded = torch.full((max(counts), self._hidden_dim), torch.nan, dtype=hidden.dtype)
        padded[: len(hidden)] = hidden
        rows = self._gather(padded)
        own = slice(self.rank * num_tokens, (self.rank + 1) * num_tokens)
        place = needed.cumsum(0) - 1
        total = torch.zeros(num_tokens, self._hidden_dim)
        for rank in range(self.group_size):
            wanted = needed[own, rank]
            total[wanted] += rows[rank][place[own, rank][wanted]].float()
        return total.bfloat16()

    def dispatch_with_permute(
        self,
        *,
        hidden: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_of_experts: int | None = None,
        use_fp8: bool | None = None,
        routing_map: torch.Tensor | None = None,
        probs: torch.Tensor | None = None,
        scaling_factor: torch.Tensor | None = None,
        num_permuted_tokens: int | None = None,
        pad_multiple: int | None = None,
        handle: Handle | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Handle]:
        assert not non_blocking, "not in this double"
        assert num_of_experts_per_rank in (None, self._experts)
        assert use_fp8 in (None, self._use_fp8)
        self.calls.append(f"permuted dispatch{', fused' * fuse_permute_dispatch}{' again' * (handle is not None)}")
        everyone = self._everyone(hidden, routing_map, topk_idx, num_of_experts, handle)
        local = self._local(everyone)
        rows, row_probs, row_scales = self._received(hidden, probs, scaling_factor, local)
        places, counts, slots = self._places(local, pad_multiple or 1)
        assert num_permuted_tokens in (None, slots)
        assert (num_permuted_tokens is None) == (handle is None)
        permuted = torch.zeros(slots, *rows.shape[1:], dtype=rows.dtype)
        permuted_probs = None if row_probs is None else torch.zeros(slots)
        scales = None if row_scales is None else torch.zeros(slots, row_scales.shape[1])
        for row, expert in (places >= 0).nonzero().tolist():
            place = places[row, expert]
            permuted[place] = rows[row]
            if permuted_probs is not None and row_probs is not None:
                permuted_probs[place] = row_probs[row, self.rank * self._experts + expert]
            if scales is not None and row_scales is not None:
                scales[place] = row_scales[row]
        padded_counts = None
        if handle is None:
            padded_counts = -(-counts // (pad_multiple or 1)) * (pad_multiple or 1)
            fused = fuse_permute_dispatch
            handle = (everyone, None, None, None, local, None, places, counts, len(hidden), fused, torch.zeros(1))
        return permuted, permuted_probs, scales, padded_counts, handle

    def combine_with_unpermute(
        self,
        *,
        hidden: torch.Tensor,
        probs: torch.Tensor | None = None,
        handle: Handle | None = None,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[torch.Tensor, None]:
        assert handle is not None
        assert len(handle) == 11, "the handle of a dispatch in token order has combine"
        everyone, places, num_tokens = handle[0], handle[6], handle[8]
        assert handle[9] == fuse_unpermute_combine
        self.calls.append("permuted combine")
        # Summed in fp32 over the experts of this rank, and rounded on the way to the others.
        rows = torch.zeros(len(places), self._hidden_dim)
        for row, expert in (places >= 0).nonzero().tolist():
            rows[row] += hidden[places[row, expert]].float()
        return self._combined(rows.bfloat16(), everyone, num_tokens), None

    def _everyone(
        self,
        hidden: torch.Tensor,
        routing_map: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        num_of_experts: int | None,
        handle: Handle | None,
    ) -> torch.Tensor:
        """bool [R * T, E]: what all ranks' tokens ask for."""
        sizes: list[Any] = [None] * self.group_size
        dist.all_gather_object(sizes, len(hidden), group=self.group)
        assert len(set(sizes)) == 1, f"ranks bring {sizes} tokens; the library hangs or overruns"
        assert hidden.shape[1] == self._hidden_dim
        assert hidden.is_contiguous()
        assert hidden.data_ptr() % 16 == 0, "TMA cannot read these rows"
        assert hidden.dtype == (torch.uint8 if self._use_fp8 else torch.bfloat16)
        assert 0 < len(hidden) <= -(-max(self._max_tokens, 512) // 64) * 64
        assert len(hidden) % 64 * self.group_size % 4 == 0, "tables of the last chunk are no multiple of 16 bytes"
        if handle is not None:
            assert routing_map is None
            assert topk_idx is None
            known: torch.Tensor = handle[0]
            return known
        columns = self._experts * self.group_size
        if routing_map is None:
            assert topk_idx is not None
            assert num_of_experts == columns
            assert self.takes_ids, "ids of -1 are an index out of range"
            assert topk_idx.dtype == torch.int16
            kept = (topk_idx >= 0) & (topk_idx < columns)
            counts = torch.zeros(len(hidden), columns, dtype=torch.int32)
            counts.scatter_add_(1, topk_idx.clamp(0, columns - 1).long(), kept.int())
            assert counts.max() <= 1, "an expert twice in a token is malformed"
            routing_map = counts > 0
        assert routing_map.dtype == torch.bool
        assert routing_map.shape == (len(hidden), columns)
        assert routing_map.is_contiguous()
        return self._gather(routing_map).flatten(0, 1)

    def _local(self, everyone: torch.Tensor) -> torch.Tensor:
        """bool [R * T, local experts]: the columns of this rank."""
        return everyone[:, self.rank * self._experts : (self.rank + 1) * self._experts]

    def _received(
        self, hidden: torch.Tensor, probs: torch.Tensor | None, scales: torch.Tensor | None, local: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Rows that ask for this rank, in global token order, with their weights and scales."""
        assert (scales is not None) == self._use_fp8
        wanted = local.any(1)
        rows = self._gather(hidden).flatten(0, 1)[wanted]
        row_probs = row_scales = None
        if probs is not None:
            assert probs.dtype == torch.float32
            assert probs.is_contiguous()
            assert probs.shape == (len(hidden), self._experts * self.group_size)
            own = slice(self.rank * self._experts, (self.rank + 1) * self._experts)
            row_probs = torch.full((len(rows), probs.shape[1]), torch.nan)
            row_probs[:, own] = self._gather(probs).flatten(0, 1)[wanted][:, own]
        if scales is not None:
            assert scales.dtype == torch.float32
            assert scales.shape == (len(hidden), self._hidden_dim // 128)
            assert scales.is_contiguous()
            row_scales = self._gather(scales).flatten(0, 1)[wanted]
        return rows, row_probs, row_scales

    def _places(self, local: torch.Tensor, multiple: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Where each (row, expert) goes, -1 where nowhere; rows of each expert; all with padding."""
        wanted = local[local.any(1)].int()
        counts = wanted.sum(0, dtype=torch.int32)
        padded = -(-counts // multiple) * multiple
        starts = padded.cumsum(0) - padded
        places = torch.where(wanted > 0, starts + wanted.cumsum(0) - 1, -1)
        return places, counts, int(padded.sum())

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """[R, ...] of every rank's tensor, all of one shape."""
        parts = [torch.empty_like(mine.view(torch.uint8)) for _ in range(self.group_size)]
        if mine.numel():
            dist.all_gather(parts, mine.contiguous().view(torch.uint8), group=self.group)
        return torch.stack(parts).view(mine.dtype)


def install(dense: bool) -> ModuleType:
    """Give the module `deep_ep` of this process a HybridEPBuffer, and make that module where there is no double of it.

    dense: that of pull request 673.
    """
    HybridEPBuffer.takes_ids = dense
    if dense:
        sys.modules[__name__].INT16_EXPERT_LIMIT = 1 << 15  # type: ignore[attr-defined]
    else:
        sys.modules[__name__].__dict__.pop("INT16_EXPERT_LIMIT", None)
    module = sys.modules.get("deep_ep")
    if not getattr(module, "COMPUTES_ON_CPU", False):
        module = ModuleType("deep_ep")
        module.__spec__ = ModuleSpec("deep_ep", None)
        module.__version__ = __version__  # type: ignore[attr-defined]
        module.COMPUTES_ON_CPU = True  # type: ignore[attr-defined]
        sys.modules["deep_ep"] = module
    assert module is not None
    module.HybridEPBuffer = HybridEPBuffer  # type: ignore[attr-defined]
    return module


@contextmanager
def installed(dense: bool) -> Iterator[ModuleType]:
    """`install`, and afterwards what was there before."""
    before = sys.modules.get("deep_ep")
    module = install(dense)
    try:
        yield module
    finally:
        del module.HybridEPBuffer
        if before is None:
            del sys.modules["deep_ep"]
        else:
            sys.modules["deep_ep"] = before
