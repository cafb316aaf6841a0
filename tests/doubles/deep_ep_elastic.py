"""DeepEP's V2 `ElasticBuffer` for CPU tensors over a gloo group, inside one node, with the traps of the real one.

Names, parameters, shapes, dtypes and limits are those of release 2.1.0, for calls without expansion, bias or a cached
handle. Rows come by source rank, and in whatever order within those of a rank. What the library leaves undefined is
NaN, or `CANARY` in integers; what arrives with an event is undefined until that was waited for. What traps or hangs
there raises here: an expert that a token names twice, ranks with different sizes, more tokens than announced.

`install` puts it beside the V1 double's `Buffer`, which V2 keeps.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from tests.doubles import deep_ep as v1
from tests.doubles.deep_ep import CANARY, EventHandle, EventOverlap, topk_idx_t

BUFFER_UNIT = 2 << 20
TMA_BYTES = 32
MAX_EXPERTS, MAX_LOCAL_EXPERTS, MAX_TOP_K = 2048, 256, 32

_orders = itertools.count()


class EPHandle:
    """What of a dispatch its combine needs, and what a caller may read."""

    def __init__(self, **attributes: Any) -> None:
        self.do_expand: bool
        self.num_experts: int
        self.expert_alignment: int
        self.num_max_tokens_per_rank: int
        self.num_sms: int
        self.topk_idx: torch.Tensor
        self.num_recv_tokens: int
        self.num_recv_tokens_per_expert_list: list[int]
        self.psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
        self.recv_src_metadata: torch.Tensor
        self.made_by: ElasticBuffer
        self.__dict__.update(attributes)


class ElasticBuffer:
    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        assert num_bytes is None
        assert num_cpu_bytes == 0
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        assert not use_fp8_dispatch
        assert isinstance(num_cpu_timeout_secs, int)
        assert isinstance(num_gpu_timeout_secs, int)
        self.group, self.rank_idx, self.num_ranks = group, group.rank(), group.size()
        self.num_max_tokens_per_rank, self.explicitly_destroy = num_max_tokens_per_rank, explicitly_destroy
        self.timeouts = num_cpu_timeout_secs, num_gpu_timeout_secs
        num_topk = num_topk or MAX_TOP_K
        largest = max(
            self._dispatch_bytes(num_max_tokens_per_rank, 2 * hidden, 0, num_topk),
            self._combine_bytes(num_max_tokens_per_rank, hidden, num_topk),
        )
        self.num_bytes = _aligned(largest, BUFFER_UNIT)
        self._arrivals: list[v1._Arrival] = []
        self.runtime: object | None = object()
        self._exchange(("sync", self.num_bytes, allow_hybrid_mode), None)

    def destroy(self) -> None:
        assert self.explicitly_destroy
        self._exchange(("destroy",), None)
        self.runtime = None

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, torch.Tensor, torch.Tensor, EPHandle, EventOverlap]:
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_experts is not None
        assert handle is None
        assert not do_expand
        assert num_sms > 0, "its own number comes from nvidia-smi"
        self._start(previous_event, allocate_on_comm_stream)
        rows, scales = x if isinstance(x, tuple) else (x, None)
        most = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        of_rank, alignment = num_experts // self.num_ranks, expert_alignment or 1
        waits = True if do_cpu_sync is None else do_cpu_sync
        self._check_dispatch(rows, scales, topk_idx, topk_weights, num_experts, most)

        header = ("dispatch", most, num_experts, topk_idx.shape[1], rows.shape[1], str(rows.dtype), alignment, num_sms)
        sent = {"rows": v1._bytes(rows), "scales": scales, "ids": topk_idx, "weights": topk_weights}
        parts = self._exchange(header, sent)
        chosen, metadata, counts = [], [], torch.zeros(self.num_ranks, dtype=torch.int32)
        for rank, part in enumerate(parts):
            here = part["ids"] // of_rank == self.rank_idx
            order = torch.Generator().manual_seed(next(_orders))
            tokens = here.any(1).nonzero()[:, 0]
            tokens = tokens[torch.randperm(tokens.numel(), generator=order)]
            counts[rank] = tokens.numel()
            chosen.append(tokens)
            first = here[tokens].int().argmax(1) if tokens.numel() else tokens
            source = torch.full((tokens.numel(), 2 + topk_idx.shape[1]), CANARY, dtype=torch.int32)
            source[:, 0], source[:, 1] = rank * most + tokens, rank * topk_idx.shape[1] + first
            metadata.append(source)

        def gathered(name: str) -> torch.Tensor | None:
            if sent[name] is None:
                return None
            return torch.cat([part[name][tokens] for part, tokens in zip(parts, chosen, strict=True)])

        ids, arrived = gathered("ids"), gathered("rows")
        assert ids is not None
        assert arrived is not None
        ids = torch.where(ids // of_rank == self.rank_idx, ids - self.rank_idx * of_rank, -1)
        room = ids.shape[0] if waits else self.num_ranks * most
        lists = torch.bincount(ids[ids >= 0], minlength=of_rank).tolist() if waits else []
        outputs, event = self._finish(
            [
                v1._in_room(arrived.view(rows.dtype), room),
                v1._in_room(gathered("scales"), room),
                v1._in_room(ids, room),
                v1._in_room(gathered("weights"), room),
                counts.cumsum(0, dtype=torch.int32),
                v1._in_room(torch.cat(metadata), room),
            ],
            async_with_compute_stream,
        )
        out, out_scales, ids, weights, ends, source = outputs
        made = EPHandle(
            do_expand=False,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=most,
            num_sms=num_sms,
            topk_idx=topk_idx.clone() if do_handle_copy else topk_idx,
            num_recv_tokens=room,
            num_recv_tokens_per_expert_list=[_aligned(count, alignment) for count in lists],
            psum_num_recv_tokens_per_scaleup_rank=ends,
            recv_src_metadata=source,
            made_by=self,
        )
        return (out if scales is None else (out, out_scales)), ids, weights, made, event

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        assert topk_weights is None
        assert bias is None
        self._start(previous_event, allocate_on_comm_stream)
        assert handle.made_by is self, "the handle is of another buffer"
        v1._check(x, 2, torch.bfloat16)
        assert x.shape[1] % 256 == 0, f"{x.shape[1]} columns are not whole 16-byte words of 32 lanes"
        assert x.shape[0] == handle.recv_src_metadata.shape[0]
        most, (num_tokens, top_k) = handle.num_max_tokens_per_rank, handle.topk_idx.shape
        assert self._combine_bytes(most, x.shape[1], top_k) <= self.num_bytes
        assert num_tokens <= most

        ends = [0, *handle.psum_num_recv_tokens_per_scaleup_rank.tolist()]
        tokens = handle.recv_src_metadata[:, 0] % most
        sent = [(tokens[first:end], x[first:end]) for first, end in itertools.pairwise(ends)]
        parts = self._exchange(("combine", most, handle.num_experts, num_sms or handle.num_sms, x.shape[1]), sent)
        # Where a rank's row of a token is looked for follows from the ids.
        total = torch.zeros(num_tokens, x.shape[1])
        for rank, part in enumerate(parts):
            found = torch.full((num_tokens, x.shape[1]), torch.nan)
            places, rows = part[self.rank_idx]
            found[places.long()] = rows.float()
            is_there = (handle.topk_idx // (handle.num_experts // self.num_ranks) == rank).any(1)
            total[is_there] += found[is_there]
        (combined,), event = self._finish([total.bfloat16()], async_with_compute_stream)
        return combined, None, event

    def _dispatch_bytes(self, most: int, row_bytes: int, groups: int, top_k: int) -> int:
        metadata = _aligned(top_k * 8 + (1 + top_k) * 4, TMA_BYTES)
        return self.num_ranks * most * (_aligned(row_bytes, TMA_BYTES) + _aligned(4 * groups, TMA_BYTES) + metadata)

    def _combine_bytes(self, most: int, hidden: int, top_k: int) -> int:
        return min(self.num_ranks, top_k) * most * (_aligned(2 * hidden, TMA_BYTES) + _aligned(top_k * 8, TMA_BYTES))

    def _check_dispatch(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        ids: torch.Tensor,
        weights: torch.Tensor,
        num_experts: int,
        most: int,
    ) -> None:
        v1._check(rows, 2, rows.dtype)
        v1._check(ids, 2, topk_idx_t)
        v1._check(weights, 2, torch.float32)
        (num_tokens, top_k), row_bytes = ids.shape, rows.shape[1] * rows.element_size()
        assert rows.shape[0] == num_tokens <= most
        assert weights.shape == ids.shape
        assert row_bytes % TMA_BYTES == 0
        assert num_experts % self.num_ranks == 0
        assert num_experts <= MAX_EXPERTS
        assert num_experts // self.num_ranks <= MAX_LOCAL_EXPERTS
        assert top_k <= MAX_TOP_K
        assert bool(((ids >= -1) & (ids < num_experts)).all())
        again = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(2) & (ids >= 0)
        assert not again.any(), "a token names an expert twice: the kernel traps"
        groups = 0
        if scales is not None:
            assert scales.shape[0] == num_tokens
            assert scales.element_size() == 4
            groups = scales.shape[1]
        assert self._dispatch_bytes(most, row_bytes, groups, top_k) <= self.num_bytes

    def _start(self, previous_event: object, allocate_on_comm_stream: bool) -> None:
        if self.runtime is None:
            raise AttributeError("'NoneType' object has no attribute: the buffer was destroyed")
        assert previous_event is None or allocate_on_comm_stream
        for arrival in self._arrivals:  # what follows on the communication stream sees what came before
            arrival()
        self._arrivals = []

    def _finish(self, values: list[Any], is_asynchronous: bool) -> tuple[list[Any], EventOverlap]:
        if not is_asynchronous:
            return values, EventOverlap(None)
        outputs = [None if each is None else v1._undefined(each.shape, each.dtype) for each in values]
        pairs = [(output, each) for output, each in zip(outputs, values, strict=True) if output is not None]
        arrival = v1._Arrival(pairs)
        self._arrivals.append(arrival)
        return outputs, EventOverlap(EventHandle(arrival))

    def _exchange(self, header: tuple[Any, ...], sent: Any) -> list[Any]:
        """What every rank sent. Raises when they are not in the same call."""
        parts: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(parts, (header, sent), group=self.group)
        headers = [part[0] for part in parts]
        assert all(each == header for each in headers), f"ranks are in different calls: {headers}"
        return [part[1] for part in parts]


def _aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def install() -> ModuleType:
    """Put a V2 of both doubles in the place of `deep_ep`, for the rest of the process."""
    module = v1.install()
    module.ElasticBuffer, module.EPHandle = ElasticBuffer, EPHandle  # type: ignore[attr-defined]
    return module


@contextmanager
def installed() -> Iterator[ModuleType]:
    """`install`, and afterwards what was there before. Buffers are to be released inside."""
    before = sys.modules.get("deep_ep")
    try:
        yield install()
    finally:
        del sys.modules["deep_ep"]
        if before is not None:
            sys.modules["deep_ep"] = before
