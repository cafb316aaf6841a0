"""What this package relies on in DeepEP's `Buffer`, as functions of a rank: the same for the library and its double.

Inputs follow from a seed and a rank, so every rank knows what all others send and what must come back. Values are small
integers and weights are eighths: sums are exact in fp32, and results are compared for equality.
"""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from moe_plugin.compat import deep_ep as compat
from moe_plugin.compat.deep_ep import LowLatencyCall, LowLatencyShape, SharedBuffer
from moe_plugin.errors import ConfigError, HandleError
from moe_plugin.testing.rank_pool import RankContext
from tests.doubles import deep_ep as double

REFUSED = (AssertionError, RuntimeError)


@dataclass(frozen=True)
class Sizes:
    """tokens: of each rank, at most 256 (what bf16 counts exactly). max_tokens: M, R * M being a multiple of 128."""

    hidden: int
    num_experts: int
    top_k: int
    tokens: tuple[int, ...]
    num_sms: int
    low_latency_hidden: tuple[int, ...]
    max_tokens: int
    num_replays: int


SMALL = Sizes(128, 8, 3, (7, 12), 4, (512,), 64, 0)
REAL = Sizes(7168, 64, 8, (120, 64, 1, 97), 24, (7168, 2048), 128, 20)


@dataclass(frozen=True)
class Inputs:
    """Of one rank: x [T, H] bf16, its first columns naming rank and token; ids [T, K] int64; weights [T, K] fp32."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def first(self, count: int) -> Inputs:
        return Inputs(self.x[:count], self.ids[:count], self.weights[:count])


class Ranks:
    """One rank among the others: its inputs and theirs, and what must arrive."""

    def __init__(self, context: RankContext, sizes: Sizes) -> None:
        self.rank, self.size, self.device, self.sizes = context.rank, context.size, context.device, sizes
        self.group: Any = context.parallel().ep_group
        self.of_rank = sizes.num_experts // self.size
        self.is_real = self.device.type == "cuda"

    def resized(self, **changes: Any) -> Ranks:
        other = copy.copy(self)
        other.sizes = replace(self.sizes, **changes)
        other.of_rank = other.sizes.num_experts // self.size
        return other

    def inputs(self, seed: int, hidden: int, tokens: tuple[int, ...] | None = None) -> list[Inputs]:
        """Of all ranks. Some ids are -1, all those of each fifth token, and each third repeats an expert."""
        counts, sizes, every = tokens or self.sizes.tokens, self.sizes, []
        for rank in range(self.size):
            generator = torch.Generator().manual_seed(1000 * seed + rank)
            count = counts[rank]
            x = torch.randint(-8, 9, (count, hidden), generator=generator).bfloat16()
            x[:, 0], x[:, 1] = rank + 1, torch.arange(count)
            order = torch.rand(count, sizes.num_experts, generator=generator).argsort(1)
            ids = order[:, : sizes.top_k].contiguous()
            ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
            ids[2::3, -1] = ids[2::3, 0]
            ids[4::5] = -1
            weights = torch.randint(-8, 9, ids.shape, generator=generator) / 8
            every.append(Inputs(*(each.to(self.device) for each in (x, ids, weights))))
        return every

    def goes_to(self, ids: torch.Tensor, rank: int) -> torch.Tensor:
        return (ids >= rank * self.of_rank) & (ids < (rank + 1) * self.of_rank)

    def arriving(self, every: list[Inputs], rows: list[torch.Tensor]) -> torch.Tensor:
        """Those of `rows` (one tensor a rank) whose tokens have an expert here: by source rank, then by token."""
        chosen = [self.goes_to(each.ids, self.rank).any(1) for each in every]
        return torch.cat([of_rank.view(torch.uint8)[mask] for of_rank, mask in zip(rows, chosen, strict=True)]).view(
            rows[0].dtype
        )

    def local_ids_and_weights(self, every: list[Inputs]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.arriving(every, [each.ids for each in every])
        weights = self.arriving(every, [each.weights for each in every])
        here = self.goes_to(ids, self.rank)
        return torch.where(here, ids - self.rank * self.of_rank, -1), torch.where(here, weights, 0.0)

    def counts(self, every: list[Inputs]) -> torch.Tensor:
        """Of the experts here, over all ranks."""
        ids = torch.cat([each.ids.flatten() for each in every]) - self.rank * self.of_rank
        return torch.bincount(ids[(ids >= 0) & (ids < self.of_rank)], minlength=self.of_rank)

    def sum_of_ranks(self, mine: Inputs) -> torch.Tensor:
        """What combine gives where rank r returns (r + 1) times what it received."""
        total = torch.zeros_like(mine.x, dtype=torch.float32)
        for rank in range(self.size):
            total += torch.where(self.goes_to(mine.ids, rank).any(1, keepdim=True), (mine.x * (rank + 1)).float(), 0.0)
        return total.bfloat16()

    def barrier(self) -> None:
        dist.barrier(self.group, device_ids=[self.device.index] if self.is_real else None)


def equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype, f"{actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.dtype == torch.float8_e4m3fn:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {actual.numel()} values differ"


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """The call inside raises, and not for lack of a parameter."""
    try:
        yield
    except REFUSED:
        return
    raise AssertionError(f"{what} was accepted")


@contextlib.contextmanager
def in_graph(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        yield


@dataclass(frozen=True)
class Layout:
    per_rank: torch.Tensor
    per_expert: torch.Tensor
    in_rank: torch.Tensor

    def as_arguments(self) -> dict[str, torch.Tensor]:
        return {
            "num_tokens_per_rank": self.per_rank,
            "is_token_in_rank": self.in_rank,
            "num_tokens_per_expert": self.per_expert,
        }


def layout_of(raw: Any, ids: torch.Tensor, num_experts: int) -> Layout:
    per_rank, per_rdma_rank, per_expert, in_rank, event = raw.get_dispatch_layout(ids, num_experts)
    assert per_rdma_rank is None
    assert event.event is None
    return Layout(per_rank, per_expert, in_rank)


def dispatch(ranks: Ranks, raw: Any, mine: Inputs, x: Any = None, **options: Any) -> tuple[Any, ...]:
    layout = layout_of(raw, mine.ids, ranks.sizes.num_experts)
    return raw.dispatch(
        mine.x if x is None else x, topk_idx=mine.ids, topk_weights=mine.weights, **layout.as_arguments(), **options
    )


def returned(ranks: Ranks, rows: torch.Tensor) -> torch.Tensor:
    return rows * (ranks.rank + 1)


def check_round_trip(ranks: Ranks, raw: Any, every: list[Inputs], **options: Any) -> None:
    mine = every[ranks.rank]
    rows, ids, weights, counts, handle, event = dispatch(ranks, raw, mine, **options)
    assert event.event is None
    equal(rows, ranks.arriving(every, [each.x for each in every]))
    local_ids, local_weights = ranks.local_ids_and_weights(every)
    equal(ids, local_ids)
    equal(weights, local_weights)
    assert counts == ranks.counts(every).tolist()
    combined, combined_weights, event = raw.combine(returned(ranks, rows), handle)
    assert combined_weights is None
    assert event.event is None
    equal(combined, ranks.sum_of_ranks(mine))


def layout(ranks: Ranks, raw: Any) -> None:
    """Tokens are counted once a rank and as often as they name an expert; -1 counts nowhere."""
    for tokens in (None, (0,) * ranks.size):
        ids = ranks.inputs(1, 16, tokens)[ranks.rank].ids
        found = layout_of(raw, ids, ranks.sizes.num_experts)
        in_rank = torch.stack([ranks.goes_to(ids, rank).any(1) for rank in range(ranks.size)], 1)
        equal(found.in_rank, in_rank)
        equal(found.per_rank, in_rank.sum(0, dtype=torch.int32))
        equal(found.per_expert, torch.bincount(ids[ids >= 0], minlength=ranks.sizes.num_experts).int())


def rows_ids_and_weights(ranks: Ranks, raw: Any) -> None:
    """bf16 rows in the order of ranks and tokens; ids and weights of the experts here, -1 and 0 for others."""
    check_round_trip(ranks, raw, ranks.inputs(2, ranks.sizes.hidden))


def fp8_rows_with_scales(ranks: Ranks, raw: Any) -> None:
    """Scales of any number of groups travel with the rows."""
    every = ranks.inputs(3, ranks.sizes.hidden)
    rows = [each.x.to(torch.float8_e4m3fn) for each in every]
    for groups in (ranks.sizes.hidden // 128, 1):
        scales = [each.x[:, :groups].float() / 3 for each in every]
        (received, received_scales), ids, _, counts, _, _ = dispatch(
            ranks, raw, every[ranks.rank], x=(rows[ranks.rank], scales[ranks.rank])
        )
        equal(received, ranks.arriving(every, rows))
        equal(received_scales, ranks.arriving(every, scales))
        equal(ids, ranks.local_ids_and_weights(every)[0])
        assert counts == ranks.counts(every).tolist()


def counts_are_those_given(ranks: Ranks, raw: Any) -> None:
    """They are the sum of what ranks pass, rounded up if asked, and nothing else depends on them."""
    every = ranks.inputs(4, ranks.sizes.hidden)
    mine = every[ranks.rank]
    given = layout_of(raw, mine.ids, ranks.sizes.num_experts)
    given.per_expert.view(ranks.size, -1)[:, -1] += ranks.rank + 1
    rows, ids, _, counts, _, _ = raw.dispatch(
        mine.x, topk_idx=mine.ids, topk_weights=mine.weights, **given.as_arguments()
    )
    expected = ranks.counts(every)
    expected[-1] += sum(range(ranks.size + 1))
    assert counts == expected.tolist()
    equal(rows, ranks.arriving(every, [each.x for each in every]))
    equal(ids, ranks.local_ids_and_weights(every)[0])
    _, _, _, counts, _, _ = dispatch(ranks, raw, mine, expert_alignment=16)
    assert counts == [-(-count // 16) * 16 for count in ranks.counts(every).tolist()]


def ranks_without_tokens(ranks: Ranks, raw: Any) -> None:
    """No tokens on one rank or on all, tokens that go nowhere."""
    hidden, tokens = ranks.sizes.hidden, ranks.sizes.tokens
    check_round_trip(ranks, raw, ranks.inputs(5, hidden, (0, *tokens[1:])))
    check_round_trip(ranks, raw, ranks.inputs(5, hidden, (0,) * ranks.size))
    nowhere = [replace(each, ids=torch.full_like(each.ids, -1)) for each in ranks.inputs(5, hidden)]
    check_round_trip(ranks, raw, nowhere)


def handles(ranks: Ranks, raw: Any) -> None:
    """A handle repeats its dispatch with other rows; calls in flight are combined in any order, more than once."""
    first, second, other = (ranks.inputs(seed, ranks.sizes.hidden) for seed in (6, 7, 8))
    mine = first[ranks.rank], second[ranks.rank]
    rows_1, _, _, _, handle_1, _ = dispatch(ranks, raw, mine[0])
    rows_2, _, _, _, handle_2, _ = dispatch(ranks, raw, mine[1])
    equal(raw.combine(returned(ranks, rows_2), handle_2)[0], ranks.sum_of_ranks(mine[1]))
    again, ids, weights, counts, none, _ = raw.dispatch(other[ranks.rank].x, handle=handle_1)
    assert (ids, weights, counts, none) == (None, None, None, None)
    equal(again, ranks.arriving(first, [each.x for each in other]))
    for _ in range(2):
        equal(raw.combine(returned(ranks, rows_1), handle_1)[0], ranks.sum_of_ranks(mine[0]))


def events(ranks: Ranks, raw: Any) -> None:
    """Calls that are chained by events, with nothing waiting in between but the last reader."""
    every = ranks.inputs(9, ranks.sizes.hidden)
    mine = every[ranks.rank]
    chain = {"async_finish": True, "allocate_on_comm_stream": True}
    start = type(raw).capture()
    per_rank, _, per_expert, in_rank, event = raw.get_dispatch_layout(
        mine.ids, ranks.sizes.num_experts, previous_event=start, **chain
    )
    rows, ids, _, counts, handle, event = raw.dispatch(
        mine.x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=mine.ids,
        topk_weights=mine.weights,
        previous_event=event,
        **chain,
    )
    event.current_stream_wait()
    equal(rows, ranks.arriving(every, [each.x for each in every]))
    equal(ids, ranks.local_ids_and_weights(every)[0])
    assert counts == ranks.counts(every).tolist()
    returning = returned(ranks, rows)
    combined, _, event = raw.combine(returning, handle, previous_event=type(raw).capture(), **chain)
    with event:
        pass
    equal(combined, ranks.sum_of_ranks(mine))


def without_a_host_sync(ranks: Ranks, raw: Any) -> None:
    """num_worst_tokens: rows at the front, ids of -1 behind them, an empty list of counts; combine takes all of it."""
    every = ranks.inputs(10, ranks.sizes.hidden)
    room = sum(ranks.sizes.tokens[: ranks.size]) + 5
    _check_worst(ranks, every, _worst(ranks, raw, every[ranks.rank], room), room)
    if ranks.sizes.num_replays:
        still = Inputs(
            *(each.clone() for each in (every[ranks.rank].x, every[ranks.rank].ids, every[ranks.rank].weights))
        )
        graph = torch.cuda.CUDAGraph()
        ranks.barrier()
        with in_graph(graph):
            results = _worst(ranks, raw, still, room)
        for seed in range(100, 100 + ranks.sizes.num_replays):
            every = ranks.inputs(seed, ranks.sizes.hidden)
            for place, value in zip(_fields(still), _fields(every[ranks.rank]), strict=True):
                place.copy_(value)
            graph.replay()
            _check_worst(ranks, every, results, room)


def _fields(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return inputs.x, inputs.ids, inputs.weights


def _worst(ranks: Ranks, raw: Any, mine: Inputs, room: int) -> tuple[torch.Tensor, ...]:
    rows, ids, weights, counts, handle, _ = dispatch(ranks, raw, mine, num_worst_tokens=room)
    assert counts == []
    return rows, ids, weights, raw.combine(returned(ranks, rows), handle)[0]


def _check_worst(ranks: Ranks, every: list[Inputs], results: tuple[torch.Tensor, ...], room: int) -> None:
    rows, ids, weights, combined = results
    assert rows.shape[0] == ids.shape[0] == weights.shape[0] == room
    local_ids, local_weights = ranks.local_ids_and_weights(every)
    count = local_ids.shape[0]
    equal(rows[:count], ranks.arriving(every, [each.x for each in every]))
    equal(ids[:count], local_ids)
    equal(weights[:count], local_weights)
    assert bool((ids[count:] == -1).all())
    equal(combined, ranks.sum_of_ranks(every[ranks.rank]))


def refusals(ranks: Ranks, raw: Any) -> None:
    """Limits that the host checks, on all ranks alike; the buffer is usable afterwards."""
    mine = ranks.inputs(11, ranks.sizes.hidden)[ranks.rank]
    arguments = layout_of(raw, mine.ids, ranks.sizes.num_experts).as_arguments()
    routing = {"topk_idx": mine.ids, "topk_weights": mine.weights}
    with refused("ids of int32"):
        raw.get_dispatch_layout(mine.ids.int(), ranks.sizes.num_experts)
    with refused("sliced rows"):
        raw.dispatch(mine.x.repeat(1, 2)[:, : ranks.sizes.hidden], **arguments, **routing)
    with refused("rows of 24 bytes"):
        raw.dispatch(mine.x[:, :12].contiguous(), **arguments, **routing)
    with refused("bf16 weights"):
        raw.dispatch(mine.x, **arguments, **(routing | {"topk_weights": mine.weights.bfloat16()}))
    with refused("129 experts on a rank"):
        many = torch.zeros(129 * ranks.size, dtype=torch.int32, device=ranks.device)
        raw.dispatch(mine.x, **(arguments | {"num_tokens_per_expert": many}), **routing)
    rows, _, _, _, handle, _ = dispatch(ranks, raw, mine)
    with refused("fp16 rows to combine"):
        raw.combine(rows.half(), handle)
    with refused("a row too many to combine"):
        raw.combine(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), handle)
    with refused("an odd number of SMs"):
        type(raw).set_num_sms(3)
    check_round_trip(ranks, raw, ranks.inputs(11, ranks.sizes.hidden))


@dataclass(frozen=True)
class Sent:
    """A low-latency dispatch and what came of it. scales: [El, R * M, H / 128] fp32, None for bf16."""

    every: list[Inputs]
    rows: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    handle: tuple[Any, ...]
    hook: Callable[[], None] | None


def send(ranks: Ranks, raw: Any, every: list[Inputs], **options: Any) -> Sent:
    mine, sizes = every[ranks.rank], ranks.sizes
    options = {"use_fp8": False} | options
    x, counts, handle, event, hook = raw.low_latency_dispatch(
        mine.x, mine.ids, sizes.max_tokens, sizes.num_experts, **options
    )
    assert (event.event is None) == (not options.get("async_finish"))
    assert (hook is None) == (not options.get("return_recv_hook"))
    if event.event is not None:
        event.current_stream_wait()
    rows, scales = x if isinstance(x, tuple) else (x, None)
    hidden, slots = mine.x.shape[1], ranks.size * sizes.max_tokens
    assert rows.shape == (ranks.of_rank, slots, hidden)
    assert counts.dtype == torch.int32
    assert handle[2:] == (sizes.max_tokens, hidden, sizes.num_experts)
    if scales is not None:
        groups = hidden // (512 if options.get("use_ue8m0") else 128)
        assert scales.shape == (ranks.of_rank, slots, groups)
        assert scales.stride() == (slots * groups, 1, slots)
    return Sent(every, rows, scales, counts, handle, hook)


def check_received(ranks: Ranks, sent: Sent) -> None:
    """Every expert has the rows of its tokens, in whatever order, and as many as its count says."""
    expected = ranks.counts(sent.every).int()
    equal(sent.counts, expected)
    for expert, count in enumerate(expected.tolist()):
        wanted = torch.cat(
            [each.x[(each.ids == ranks.rank * ranks.of_rank + expert).nonzero()[:, 0]] for each in sent.every]
        )
        found = sent.rows[expert, :count]
        if sent.scales is None:
            equal(found[_order(found)], wanted[_order(wanted)])
            continue
        # Rounding hides the columns that name a row, so rows are put in order by what the handle says of them.
        token_of_row, ranges = sent.handle[0][expert], sent.handle[1][expert].tolist()
        sources = torch.empty(count, dtype=torch.int64, device=ranks.device)
        for source, packed in enumerate(ranges):
            begin = packed >> 32
            sources[begin : begin + (packed & 0xFFFFFFFF)] = source
        tokens = token_of_row[:count].long()
        order = (sources * 1000 + tokens).argsort()
        scales = sent.scales[expert, :count].repeat_interleave(128, 1)[order]
        wanted = wanted[_order(wanted)].float()
        error = (found.float()[order] * scales - wanted).abs()
        assert bool((error <= wanted.abs() / 16 + scales / 512).all())


def _order(rows: torch.Tensor) -> torch.Tensor:
    """By source rank, then by token, which the first columns name."""
    return (rows[:, 0].float() * 1000 + rows[:, 1].float()).argsort()


def experts_of(ranks: Ranks, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Expert e multiplies by e % 3 + 1; what lies behind the rows of an expert is NaN."""
    first = ranks.rank * ranks.of_rank
    factors = torch.arange(first, first + ranks.of_rank, device=rows.device) % 3 + 1
    valid = torch.arange(rows.shape[1], device=rows.device) < counts[:, None]
    return torch.where(valid[:, :, None], rows.float() * factors[:, None, None], torch.nan).bfloat16()


def weighted_sum(mine: Inputs) -> torch.Tensor:
    total = torch.zeros_like(mine.x, dtype=torch.float32)
    for k in range(mine.ids.shape[1]):
        ids = mine.ids[:, k : k + 1]
        output = (mine.x.float() * (ids % 3 + 1)).bfloat16().float()
        total += torch.where(ids < 0, 0.0, output * mine.weights[:, k : k + 1])
    return total.bfloat16()


def collect(ranks: Ranks, raw: Any, sent: Sent, **options: Any) -> torch.Tensor:
    mine = sent.every[ranks.rank]
    outputs = experts_of(ranks, sent.rows, sent.counts)
    if options.get("zero_copy"):
        raw.get_next_low_latency_combine_buffer(sent.handle)[:] = outputs
        outputs = torch.full_like(outputs, torch.nan)
    combined, event, hook = raw.low_latency_combine(outputs, mine.ids, mine.weights, sent.handle, **options)
    if hook is not None:
        hook()
    if event.event is not None:
        event.current_stream_wait()
    return combined


def low_latency_inputs(ranks: Ranks, seed: int, hidden: int = 0) -> list[Inputs]:
    return ranks.inputs(seed, hidden or ranks.sizes.low_latency_hidden[0])


def bf16_pair(ranks: Ranks, raw: Any) -> None:
    """Rows per expert with counts, and the weighted sum of what experts return; any number of tokens."""
    empty = (0,) * ranks.size
    for hidden in ranks.sizes.low_latency_hidden:
        for tokens in (None, (0, *ranks.sizes.tokens[1:]), empty):
            every = ranks.inputs(20, hidden, tokens)
            sent = send(ranks, raw, every)
            check_received(ranks, sent)
            equal(collect(ranks, raw, sent), weighted_sum(every[ranks.rank]))
    nowhere = [replace(each, ids=torch.full_like(each.ids, -1)) for each in low_latency_inputs(ranks, 20)]
    sent = send(ranks, raw, nowhere)
    assert sent.counts.tolist() == [0] * ranks.of_rank
    assert not collect(ranks, raw, sent).any()


def fp8_rows(ranks: Ranks, raw: Any) -> None:
    """Values and scales of groups of 128 stand for what was sent, the scales as they come, as powers of 2, as UE8M0."""
    for hidden in ranks.sizes.low_latency_hidden:
        every = low_latency_inputs(ranks, 21, hidden)
        for round_scale, use_ue8m0 in ((False, False), (True, False), (True, True)):
            sent = send(ranks, raw, every, use_fp8=True, round_scale=round_scale, use_ue8m0=use_ue8m0)
            if use_ue8m0:
                assert sent.scales is not None
                assert sent.scales.dtype == torch.int32
                exponents = torch.stack([sent.scales >> shift & 0xFF for shift in (0, 8, 16, 24)], -1).flatten(2)
                sent = replace(sent, scales=torch.exp2(exponents.float() - 127))
            assert sent.scales is not None
            assert sent.scales.dtype == torch.float32
            check_received(ranks, sent)
            valid = torch.arange(sent.scales.shape[1], device=ranks.device) < sent.counts[:, None]
            are_powers_of_2 = bool((torch.frexp(sent.scales[valid])[0] == 0.5).all())
            assert are_powers_of_2 == round_scale
            raw.low_latency_combine(
                torch.zeros_like(sent.rows, dtype=torch.bfloat16),
                every[ranks.rank].ids,
                every[ranks.rank].weights,
                sent.handle,
            )


def hooks(ranks: Ranks, raw: Any) -> None:
    """Rows are there when the hook was called; the same for combine; events do for calls without hooks."""
    every = low_latency_inputs(ranks, 22)
    sent = send(ranks, raw, every, return_recv_hook=True)
    assert sent.hook is not None
    sent.hook()
    check_received(ranks, sent)
    equal(collect(ranks, raw, sent, return_recv_hook=True), weighted_sum(every[ranks.rank]))
    sent = send(ranks, raw, every, async_finish=True)
    check_received(ranks, sent)
    equal(collect(ranks, raw, sent, async_finish=True), weighted_sum(every[ranks.rank]))


def zero_copy_and_out(ranks: Ranks, raw: Any) -> None:
    """Combine takes rows from the buffer that the library lends, with a row pitch of its own, and fills `out`."""
    for seed in (23, 24, 25):
        every = low_latency_inputs(ranks, seed)
        mine = every[ranks.rank]
        sent = send(ranks, raw, every)
        lent = raw.get_next_low_latency_combine_buffer(sent.handle)
        assert lent.shape == sent.rows.shape
        assert lent.dtype == torch.bfloat16
        assert lent.stride(2) == 1
        assert lent.stride(1) > lent.shape[2]
        out = torch.full_like(mine.x, torch.nan)
        assert collect(ranks, raw, sent, zero_copy=True, out=out).data_ptr() == out.data_ptr()
        equal(out, weighted_sum(mine))


def low_latency_calls_in_flight(ranks: Ranks, raw: Any) -> None:
    """Two at a time, combined in either order, any number of times."""
    for turn in range(3):
        first, second = (low_latency_inputs(ranks, 30 + 2 * turn + each) for each in range(2))
        sent = [send(ranks, raw, first), send(ranks, raw, second)]
        for each in sent:
            check_received(ranks, each)
        for each in sent[:: 1 if turn == 1 else -1]:
            equal(collect(ranks, raw, each), weighted_sum(each.every[ranks.rank]))


def other_shapes_after_cleaning(ranks: Ranks, raw: Any) -> None:
    """A shape with fewer experts after the buffer was cleaned for it; one with other sizes needs no cleaning."""
    few = ranks.resized(num_experts=2 * ranks.size, top_k=2)
    shorter = ranks.resized(max_tokens=ranks.sizes.max_tokens // 2, tokens=(5,) * ranks.size)
    hidden = ranks.sizes.low_latency_hidden[-1]
    for each, clean in ((ranks, False), (few, True), (ranks, True), (shorter, False), (ranks, False)):
        if clean:
            raw.clean_low_latency_buffer(each.sizes.max_tokens, hidden, each.sizes.num_experts)
        # An odd number of calls, so that both halves are used by both shapes.
        for seed in (40, 41, 42):
            every = each.inputs(seed, hidden)
            sent = send(each, raw, every)
            check_received(each, sent)
            if seed != 42:
                equal(collect(each, raw, sent), weighted_sum(every[each.rank]))


def captured_pairs(ranks: Ranks, raw: Any) -> None:
    """Dispatch and combine in a CUDA graph, replayed with other routing."""
    every = low_latency_inputs(ranks, 50)
    mine = every[ranks.rank]
    still = Inputs(*(each.clone() for each in _fields(mine)))
    everywhere = [still if rank == ranks.rank else each for rank, each in enumerate(every)]
    graph = torch.cuda.CUDAGraph()
    ranks.barrier()
    with in_graph(graph):
        sent = send(ranks, raw, everywhere)
        combined = collect(ranks, raw, sent)
    for seed in range(200, 200 + ranks.sizes.num_replays):
        every = low_latency_inputs(ranks, seed)
        for place, value in zip(_fields(still), _fields(every[ranks.rank]), strict=True):
            place.copy_(value)
        graph.replay()
        check_received(ranks, replace(sent, every=every))
        equal(combined, weighted_sum(every[ranks.rank]))


def low_latency_refusals(ranks: Ranks, raw: Any) -> None:
    """Limits that the host checks, on all ranks alike. A refused call may have taken a half of the buffer."""
    sizes = ranks.sizes
    mine = low_latency_inputs(ranks, 60)[ranks.rank]
    hidden = mine.x.shape[1]

    def call(x: torch.Tensor, ids: torch.Tensor, max_tokens: int = sizes.max_tokens, **options: Any) -> None:
        raw.low_latency_dispatch(x, ids, max_tokens, sizes.num_experts, **({"use_fp8": False} | options))

    with refused("fp32 rows"):
        call(mine.x.float(), mine.ids)
    with refused("sliced rows"):
        call(mine.x.repeat(1, 2)[:, :hidden], mine.ids)
    with refused("ids of int32"):
        call(mine.x, mine.ids.int())
    with refused("more tokens than the maximum"):
        call(mine.x.new_zeros(8, hidden), mine.ids.new_zeros(8, sizes.top_k), max_tokens=4)
    with refused("12 experts a token"):
        call(mine.x, mine.ids.new_full((mine.x.shape[0], 12), -1))
    if ranks.size == 2:
        with refused("a number of slots that is no multiple of 4"):
            call(mine.x[:1], mine.ids[:1], max_tokens=1)
    with refused("UE8M0 scales that are not rounded"):
        call(mine.x, mine.ids, use_fp8=True, use_ue8m0=True)
    with refused("a hook and an event"):
        call(mine.x, mine.ids, async_finish=True, return_recv_hook=True)
    ranks.barrier()
    raw.clean_low_latency_buffer(sizes.max_tokens, hidden, sizes.num_experts)
    every = low_latency_inputs(ranks, 61)
    sent = send(ranks, raw, every)
    with refused("rows of a lent buffer as if they were contiguous"):
        lent = raw.get_next_low_latency_combine_buffer(sent.handle)
        raw.low_latency_combine(lent, mine.ids, mine.weights, sent.handle, zero_copy=True)
    equal(collect(ranks, raw, sent), weighted_sum(every[ranks.rank]))


def shared_buffer(ranks: Ranks, _: Any) -> None:
    """It grows with what layers ask for, has both modes at once, counts calls in flight, and can be made again."""
    sizes = ranks.sizes
    row_bytes, shape = 2 * sizes.hidden, low_latency_shape(ranks)
    buffer = SharedBuffer(ranks.group)
    try:
        buffer.reserve_high_throughput(row_bytes // 2, sizes.num_sms)
        first, num_bytes = buffer.raw, buffer.num_bytes
        check_round_trip(ranks, first, ranks.inputs(70, sizes.hidden // 2))
        buffer.reserve_high_throughput(row_bytes // 2, sizes.num_sms)
        assert buffer.raw is first
        buffer.reserve_high_throughput(row_bytes, sizes.num_sms)
        assert buffer.raw is not first
        assert buffer.num_bytes > num_bytes
        check_round_trip(ranks, buffer.raw, ranks.inputs(71, sizes.hidden))

        buffer.reserve_low_latency(replace(shape, max_tokens=shape.max_tokens // 2))
        assert buffer.raw.low_latency_mode
        # The library asks for transfers that GPUs initiate, which fail without a network card.
        assert os.environ["NVSHMEM_IB_ENABLE_IBGDA"] == ("1" if compat._has_network_cards() else "0")
        check_round_trip(ranks, buffer.raw, ranks.inputs(72, sizes.hidden))
        num_bytes = buffer.num_bytes
        buffer.reserve_low_latency(shape)
        assert buffer.num_bytes > num_bytes
        for seed in (73, 74):
            call = buffer.start_low_latency(shape)
            every = low_latency_inputs(ranks, seed, shape.hidden_size)
            sent = send(ranks, buffer.raw, every)
            assert call.is_alone
            equal(collect(ranks, buffer.raw, sent), weighted_sum(every[ranks.rank]))
            call.end()
            check_round_trip(ranks, buffer.raw, ranks.inputs(seed, sizes.hidden))

        calls = [buffer.start_low_latency(shape) for _ in range(compat.MAX_LOW_LATENCY_IN_FLIGHT)]
        assert not calls[0].is_alone
        with _raises(HandleError, "in flight"):
            buffer.start_low_latency(shape)
        for call in calls:
            call.end()

        buffer.release()
        with _raises(HandleError, "released"):
            _ = buffer.raw
        buffer.reserve_low_latency(shape)
        every = low_latency_inputs(ranks, 75, shape.hidden_size)
        equal(collect(ranks, buffer.raw, send(ranks, buffer.raw, every)), weighted_sum(every[ranks.rank]))
        if ranks.is_real:
            layer = torch.nn.Module()  # whoever has captured it
            buffer.join(layer)
            with in_graph(torch.cuda.CUDAGraph()):
                collect(ranks, buffer.raw, send(ranks, buffer.raw, every))
            with _raises(ConfigError, "CUDA graph"):
                buffer.reserve_low_latency(replace(shape, max_tokens=2 * shape.max_tokens))
    finally:
        buffer.release()


def calls_that_share_the_buffer(ranks: Ranks, _: Any) -> None:
    """Two calls with hooks at a time, in every order; rows that were lent survive the call after them."""
    shape = replace(low_latency_shape(ranks), hidden_size=ranks.sizes.low_latency_hidden[0])
    buffer = SharedBuffer(ranks.group)
    buffer.reserve_low_latency(shape)
    inputs = [low_latency_inputs(ranks, seed) for seed in (90, 91)]

    def start(every: list[Inputs]) -> tuple[LowLatencyCall, Sent, Callable[[], None]]:
        call = buffer.start_low_latency(shape)
        sent = send(ranks, call.raw, every, return_recv_hook=True)
        assert sent.hook is not None
        return call, sent, call.to_receive(sent.hook)

    def finish(call: LowLatencyCall, sent: Sent, rows: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        mine = sent.every[ranks.rank]
        rows, zero_copy = call.returned(rows)
        combined, _, hook = call.start_combine().low_latency_combine(
            rows, mine.ids, mine.weights, sent.handle, zero_copy=zero_copy, return_recv_hook=True
        )
        receive = call.to_receive(hook)
        call.end()
        return combined, receive

    try:
        for swaps in (False, True):
            calls = [start(every) for every in inputs]
            for _, sent, receive in calls[:: -1 if swaps else 1]:
                receive()
                check_received(ranks, sent)
            results = [
                (*finish(call, sent, experts_of(ranks, sent.rows, sent.counts)), sent)
                for call, sent, _ in calls[:: -1 if swaps else 1]
            ]
            for combined, receive, sent in results:
                receive()
                equal(combined, weighted_sum(sent.every[ranks.rank]))
        for is_disturbed in (False, True):
            call, sent, receive = start(inputs[0])
            receive()
            lent = call.lend(sent.handle)
            assert lent is not None
            lent[:] = experts_of(ranks, sent.rows, sent.counts)
            other = start(inputs[1]) if is_disturbed else None
            assert call.returned(lent)[1] != is_disturbed
            combined, receive = finish(call, sent, lent)
            receive()
            equal(combined, weighted_sum(inputs[0][ranks.rank]))
        assert other is not None
        call, sent, receive = other
        receive()
        assert call.lend(sent.handle) is None
        combined, receive = finish(call, sent, experts_of(ranks, sent.rows, sent.counts))
        receive()
        equal(combined, weighted_sum(inputs[1][ranks.rank]))
    finally:
        buffer.release()


def undefined_until_waited_for(ranks: Ranks, _: Any) -> None:
    """Results of asynchronous calls are NaN before their event, and those of hooks before the hook."""
    buffer = _buffer(ranks)
    every = ranks.inputs(80, ranks.sizes.low_latency_hidden[0])
    mine = every[ranks.rank]
    rows, _, _, _, handle, event = dispatch(ranks, buffer.raw, mine, async_finish=True)
    assert bool(rows.isnan().all())
    combined, _, after = buffer.raw.combine(torch.zeros_like(rows), handle, async_finish=True)
    equal(rows, ranks.arriving(every, [each.x for each in every]))
    assert bool(combined.isnan().all())
    after.current_stream_wait()
    assert not combined.any()
    event.current_stream_wait()
    _, _, _, _, _, event = dispatch(ranks, buffer.raw, mine)
    with refused("waiting for a call that was not asynchronous"):
        event.current_stream_wait()
    rows, ids, weights, _, _, _ = dispatch(ranks, buffer.raw, mine, num_worst_tokens=100)
    count = ranks.local_ids_and_weights(every)[0].shape[0]
    assert bool(rows[count:].isnan().all())
    assert bool(weights[count:].isnan().all())
    assert bool((ids[count:] == -1).all())
    sent = send(ranks, buffer.raw, every, return_recv_hook=True)
    assert sent.hook is not None
    assert bool(sent.rows.isnan().all())
    assert sent.counts.tolist() == [double.CANARY] * ranks.of_rank
    with refused("a call before the hook of the last one"):
        send(ranks, buffer.raw, every)
    sent.hook()
    check_received(ranks, sent)
    with refused("the second call of a hook"):
        sent.hook()
    buffer.release()


def misuse_of_high_throughput(ranks: Ranks, _: Any) -> None:
    buffer, other = _buffer(ranks), _buffer(ranks)
    sizes, mine = ranks.sizes, ranks.inputs(81, ranks.sizes.hidden)[ranks.rank]
    rows, _, _, _, handle, _ = dispatch(ranks, buffer.raw, mine)
    with refused("a handle of another buffer"):
        other.raw.combine(rows, handle)
    with refused("another number of SMs than the dispatch had"):
        buffer.raw.combine(rows, handle, config=double.Config(2))
    with refused("rows of 16 bytes"):
        dispatch(ranks, buffer.raw, mine, x=mine.x[:, :8].contiguous())
    with refused("rows of 16384 bytes"):
        dispatch(ranks, buffer.raw, mine, x=mine.x.repeat(1, 64))
    with refused("rows that the buffer has no room for"):
        dispatch(ranks, buffer.raw, mine, x=mine.x.repeat(1, 60))
    with refused("more rows than the worst number"):
        dispatch(ranks, buffer.raw, mine, num_worst_tokens=1)
    found = layout_of(buffer.raw, mine.ids, sizes.num_experts)
    found.per_rank.add_(1)
    with refused("counts of rows that are not sent"):
        buffer.raw.dispatch(mine.x, topk_idx=mine.ids, topk_weights=mine.weights, **found.as_arguments())
    raw = other.raw
    other.release()
    with _raises(AttributeError, "destroyed"):
        dispatch(ranks, raw, mine)
    buffer.release()


def misuse_of_low_latency(ranks: Ranks, _: Any) -> None:
    buffer = _buffer(ranks)
    every = low_latency_inputs(ranks, 82)
    mine, sizes, raw = every[ranks.rank], ranks.sizes, buffer.raw
    many = ranks.resized(num_experts=64)
    rows = torch.zeros(ranks.of_rank, ranks.size * sizes.max_tokens, mine.x.shape[1], dtype=torch.bfloat16)

    live = [send(ranks, raw, every), send(ranks, raw, every)]
    with refused("a third live result"):
        send(ranks, raw, every)
    lent = raw.get_next_low_latency_combine_buffer(live[0].handle)
    lent.fill_(1)
    equal(collect(ranks, raw, live[1]), weighted_sum(mine))
    # That call took the half whose rows were lent.
    assert bool(lent.isnan().all())
    combined, _, _ = raw.low_latency_combine(rows, mine.ids, mine.weights, live[0].handle, zero_copy=True)
    assert bool(combined[(mine.ids >= 0).any(1)].isnan().all())
    del live

    last = send(ranks, raw, every)
    more = many.inputs(83, mine.x.shape[1])
    with refused("counters that calls for fewer experts left"):
        send(many, raw, more)
        send(many, raw, more)
    del last
    raw.clean_low_latency_buffer(sizes.max_tokens, mine.x.shape[1], many.sizes.num_experts)
    check_received(many, send(many, raw, more))
    raw.clean_low_latency_buffer(sizes.max_tokens, mine.x.shape[1], sizes.num_experts)

    crowded = Inputs(mine.x.new_zeros(40, mine.x.shape[1]), mine.ids.new_zeros(40, 3), mine.weights.new_ones(40, 3))
    with refused("more rows for one expert than a rank has room for"):
        send(ranks, raw, [crowded] * ranks.size)
    with refused("ids beyond the experts"):
        send(ranks, raw, [replace(each, ids=each.ids + sizes.num_experts) for each in every])
    with refused("fp8 rows of slots that are no multiple of 128"):
        send(ranks.resized(max_tokens=32), raw, every, use_fp8=True)
    with refused("more tokens than the depth of queues allows"):
        raw.low_latency_dispatch(mine.x, mine.ids, 512, sizes.num_experts, use_fp8=False)
    other = _buffer(ranks)
    sent = send(ranks, other.raw, every)
    with refused("a handle of another buffer"):
        raw.low_latency_combine(rows, mine.ids, mine.weights, sent.handle)
    raw = other.raw
    other.release()
    with _raises(AttributeError, "destroyed"):
        send(ranks, raw, every)
    buffer.release()


def _buffer(ranks: Ranks) -> SharedBuffer:
    """One with both modes, for 64 experts."""
    buffer, shape = SharedBuffer(ranks.group), low_latency_shape(ranks)
    buffer.reserve_high_throughput(2 * shape.hidden_size, ranks.sizes.num_sms)
    buffer.reserve_low_latency(replace(shape, num_experts=64))
    return buffer


@contextlib.contextmanager
def _raises(kind: type[Exception], words: str) -> Iterator[None]:
    try:
        yield
    except kind as problem:
        if words not in str(problem):
            raise
        return
    raise AssertionError(f"no {kind.__name__}")


HIGH_THROUGHPUT = {
    each.__name__: each
    for each in (
        layout,
        rows_ids_and_weights,
        fp8_rows_with_scales,
        counts_are_those_given,
        ranks_without_tokens,
        handles,
        events,
        without_a_host_sync,
        refusals,
    )
}
LOW_LATENCY = {
    each.__name__: each
    for each in (
        bf16_pair,
        fp8_rows,
        hooks,
        zero_copy_and_out,
        low_latency_calls_in_flight,
        other_shapes_after_cleaning,
        captured_pairs,
        low_latency_refusals,
    )
}
SHARED_BUFFER = {each.__name__: each for each in (shared_buffer, calls_that_share_the_buffer)}
TRAPS = {each.__name__: each for each in (undefined_until_waited_for, misuse_of_high_throughput, misuse_of_low_latency)}
"""Of the double alone."""
GRAPHS = ("captured_pairs",)
"""Of the library alone."""


def low_latency_shape(ranks: Ranks) -> LowLatencyShape:
    sizes = ranks.sizes
    return LowLatencyShape(sizes.max_tokens, max(sizes.low_latency_hidden), sizes.num_experts)


def run_all(context: RankContext, sizes: Sizes) -> dict[str, str | None]:
    """Every topic, on one buffer per mode: what went wrong in it on this rank, None where nothing did.

    After a topic that fails on any rank no other is run, since ranks may be in different calls.
    """
    with double.installed() if context.device.type == "cpu" else contextlib.nullcontext():
        ranks = Ranks(context, sizes)
        found: dict[str, str | None] = {}
        for topics, reserve in (
            (HIGH_THROUGHPUT, lambda buffer: buffer.reserve_high_throughput(2 * sizes.hidden, sizes.num_sms)),
            (LOW_LATENCY, lambda buffer: buffer.reserve_low_latency(low_latency_shape(ranks))),
            (SHARED_BUFFER if ranks.is_real else SHARED_BUFFER | TRAPS, None),
        ):
            buffer = SharedBuffer(ranks.group)
            if reserve is not None:
                reserve(buffer)
            for name, topic in topics.items():
                if name in GRAPHS and not ranks.is_real:
                    continue
                found[name] = _problem_of(topic, ranks, None if reserve is None else buffer.raw)
                failed: list[Any] = [None] * ranks.size
                dist.all_gather_object(failed, found[name] is not None, group=ranks.group)
                if any(failed):
                    return found
            buffer.release()
        return found


def _problem_of(topic: Callable[..., None], ranks: Ranks, raw: Any) -> str | None:
    try:
        topic(ranks, raw)
        if ranks.is_real:
            torch.cuda.synchronize()
    except Exception:
        return traceback.format_exc()
    return None
