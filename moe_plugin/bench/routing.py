"""What `moe-plugin bench routing` measures: finding where tokens go from everyone's routing, three ways.

    dense     the scan of gathered int16 ids, one launch: 2 * top-k bytes a token travel
    sparse    prefix sums over a gathered bool map of all experts: a byte per token and expert travels
    argsort   a stable sort of the gathered ids and a search for where experts begin in it

Each without permute (rows on ranks: how many earlier tokens need a rank) or with (places in expert-grouped buffers as
well; the argsort gives places alone, and no rows), and with permute also with probabilities: the router weights of all
tokens put in the order of this rank's places. Every result is compared with the plain construction before anything is
timed.

On one device, what is timed is the work of rank 0 of `world` ranks that have equally many tokens, and everything has
been gathered before. With the all-gather, `world` ranks do it together, and the time is that of the slowest:

    dense     over NVLink, from the router's int64 ids to the end of the scan in one launch; and over NCCL, where the
              ids of places are ready, as bytes
    sparse    over NCCL, where the map is ready, as bytes
    argsort   over NCCL, the router's int64 ids
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from rich.markup import escape
from rich.table import Table

from moe_plugin.bench.comm import START_SECONDS, StageError, WrongResultError, together
from moe_plugin.bench.contenders import UnsupportedError
from moe_plugin.bench.experts import EAGER_SHARE, GRAPH_SHARE, HOST_SHARE, describe, machine_facts
from moe_plugin.bench.ranks import JointStopwatch, Ranks, slowest
from moe_plugin.bench.results import FAILED, OK, WRONG, MachineFacts, Timing
from moe_plugin.bench.timing import Call, Stopwatch, summarize
from moe_plugin.config import MoEConfig, ParallelConfig, PlacementTables
from moe_plugin.errors import ConfigError
from moe_plugin.kernels.dense_routing import (
    DenseRouting,
    check_num_experts,
    dense_routing,
    dense_routing_reference,
    sparse_routing,
    to_routing_map,
)
from moe_plugin.kernels.placement_lookup import LookupTables
from moe_plugin.kernels.tiling import cdiv
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors
from moe_plugin.prepare_finalize.routing_exchange import RoutingExchange
from moe_plugin.prepare_finalize.symmetric_memory import reachable_peers
from moe_plugin.testing.rank_pool import RankContext, RankError
from moe_plugin.workspace import WorkspaceArena

logger = logging.getLogger(__name__)

SCHEMA = "moe_plugin.bench.routing/1"
ALIGNMENT = 128
NVLINK, COLLECTIVE = "NVLink", "collective"
"""How ranks gather: by a kernel that writes into the peers' memory, or by torch.distributed."""

AllGather: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""From this rank's [C, X] of any dtype to all ranks' [R, C, X]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSettings:
    """What to measure. tokens: of each of `world` ranks. time_budget: seconds per contender and token count.

    all_gather: by `world` ranks that gather routing first, a GPU each, or processes on a CPU; else on one device.
    """

    tokens: tuple[int, ...] = (128, 4096)
    num_experts: int = 256
    top_k: int = 8
    world: int = 4
    seed: int = 0
    time_budget: float = 0.3
    device: str = "cuda"
    all_gather: bool = False

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ConfigError(f"token counts must be positive, got {', '.join(map(str, self.tokens)) or 'none'}")
        if self.world < 1:
            raise ConfigError(f"the world must have a rank at least, got {self.world}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k must be from 1 to the {self.num_experts} experts, got {self.top_k}")
        if not self.time_budget > 0:
            raise ConfigError(f"the time budget must be positive, got {self.time_budget:g}")
        check_num_experts(self.world, self.num_slots)

    @property
    def num_slots(self) -> int:
        """Experts on a rank, the largest number where ranks differ."""
        return cdiv(self.num_experts, self.world)

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        words = ["moe-plugin", "bench", "routing", "--tokens", ",".join(map(str, self.tokens))]
        words += ["--num-experts", str(self.num_experts), "--top-k", str(self.top_k), "--world", str(self.world)]
        words += ["--seed", str(self.seed), "--time-budget", f"{self.time_budget:g}", "--device", self.device]
        words += ["--all-gather"] if self.all_gather else []
        return shlex.join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingMeasurement:
    """One contender at one token count; times as in results.Measurement, microseconds.

    permute: places are found, not only rows. probabilities: router weights are put in the order of the places.
    wire_bytes: what a token brings to each other rank before, ids or map, and router weights where they come along.
    all_gather: what brings it within the times: NVLink, or the backend of torch.distributed; "" for nothing.
    status: ok, wrong, failed or unsupported; detail says why. graph is None on a CPU. Times of several ranks are those
    of the slowest, and have no cpu.
    """

    contender: str
    permute: bool
    probabilities: bool
    wire_bytes: int
    all_gather: str = ""
    status: str
    detail: str = ""
    graph: Timing | None = None
    eager: Timing | None = None
    cpu: Timing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCell:
    """All contenders at one number of tokens per rank."""

    tokens: int
    measurements: tuple[RoutingMeasurement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRun:
    """One file of results."""

    schema: str = SCHEMA
    command: str
    date: str
    machine: MachineFacts
    settings: RoutingSettings
    cells: tuple[RoutingCell, ...] = ()

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all; no folder, host name or other trace of the machine but its hardware."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)


@dataclass(frozen=True, slots=True)
class RoutingInput:
    """Routing of all ranks, and how a rank's share of it gets to all of them.

    topk_ids: int64 [R, C, K] as routers give them, no expert twice in a token; ids: int16, of the places of experts.
    routing_map: bool [R * C, E]. router_weights: fp32 [R, C, K]; weight_map: fp32 [R * C, E], the same by expert.
    num_places: in this rank's expert-grouped buffer, at worst.
    all_gather: None where everything has been gathered before. parallel: the ranks, where there are several.
    """

    topk_ids: torch.Tensor
    ids: torch.Tensor
    routing_map: torch.Tensor
    router_weights: torch.Tensor
    weight_map: torch.Tensor
    num_slots: int
    num_places: int
    num_experts: int
    rank: int = 0
    all_gather: AllGather | None = None
    parallel: ParallelConfig | None = None

    @classmethod
    def random(
        cls,
        settings: RoutingSettings,
        tokens: int,
        device: torch.device,
        rank: int = 0,
        all_gather: AllGather | None = None,
        parallel: ParallelConfig | None = None,
    ) -> RoutingInput:
        """Every token chooses top_k different experts, all equally likely; the same on every rank."""
        generator = torch.Generator().manual_seed(settings.seed + tokens)
        num_slots = settings.num_slots
        # Experts are numbered as if all ranks had equally many; those that there are not are not chosen.
        scores = torch.rand(settings.world, tokens, settings.num_experts, generator=generator)
        router_weights, topk_ids = scores.topk(settings.top_k, dim=2)
        ids = topk_ids.to(torch.int16)
        weight_map = torch.zeros(settings.world * tokens, settings.world * num_slots)
        weight_map.scatter_(1, topk_ids.flatten(0, 1), router_weights.flatten(0, 1))
        return cls(
            topk_ids=topk_ids.to(device),
            ids=ids.to(device),
            routing_map=to_routing_map(ids, num_slots).contiguous().to(device),
            router_weights=router_weights.to(device),
            weight_map=weight_map.to(device),
            num_slots=num_slots,
            num_experts=settings.num_experts,
            num_places=settings.world * tokens * min(settings.top_k, num_slots) + num_slots * (ALIGNMENT - 1),
            rank=rank,
            all_gather=all_gather,
            parallel=parallel,
        )

    def gathered(self, of_all: torch.Tensor) -> torch.Tensor:
        """`of_all` [R, C, X] or [R * C, X], where ranks gather it from this one's share of it."""
        if self.all_gather is None:
            return of_all
        return self.all_gather(of_all.view(*self.ids.shape[:2], -1)[self.rank]).view(of_all.shape)

    def weights_by_place(self, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """fp32 [num_places + 1]: weights in the order of `places` (same shape); those without a place come last."""
        by_place = torch.zeros(self.num_places + 1, dtype=torch.float32, device=places.device)
        at = torch.where(places >= 0, places, self.num_places)
        return by_place.scatter_(0, at.flatten().long(), weights.flatten())


@dataclass(frozen=True, slots=True)
class Routed:
    """What a contender has found, in one form for all; None for what it was not asked for, or does not give.

    rows: rows_per_rank, send_rows and received_rows of DenseRouting. places: places and send_places, -1 where there is
    none, and group_ends. weights: fp32 [num_places], router weights in the order of this rank's places.
    """

    rows: tuple[torch.Tensor, ...] | None = None
    places: tuple[torch.Tensor, ...] | None = None
    weights: torch.Tensor | None = None

    def differs_from(self, expected: Routed) -> str:
        """What is not as expected; "" if everything is that was found."""
        for kind in ("rows", "places"):
            found, right = getattr(self, kind), getattr(expected, kind)
            if found is not None and not all(map(torch.equal, found, right)):
                return f"{kind} differ from the reference"
        if self.weights is not None and (expected.weights is None or not torch.equal(self.weights, expected.weights)):
            return "router weights differ from the reference"
        return ""


@dataclass(frozen=True, slots=True)
class RoutingJob:
    """`run` is what is timed; `read` brings what it returns into the common form; `finish` raises what runs flagged."""

    run: Call
    read: Callable[[Any], Routed]
    finish: Call = lambda: None


@dataclass(frozen=True, slots=True)
class Preparation:
    """One contender. bind(input, permute, probabilities) makes its job; on several ranks, all call it together.

    all_gather: NVLINK or COLLECTIVE where ranks gather within the job.
    """

    name: str
    bind: Callable[[RoutingInput, bool, bool], RoutingJob]
    permute: bool
    probabilities: bool = False
    all_gather: str = ""

    @property
    def label(self) -> str:
        words = [self.name, "with permute" if self.permute else "without permute"]
        words.append("with probabilities" if self.probabilities else "without probabilities")
        return ", ".join([*words, self.all_gather] if self.all_gather else words)

    def wire_bytes(self, settings: RoutingSettings) -> int:
        if self.name == "sparse":
            return settings.world * settings.num_slots * (1 + 4 * self.probabilities)
        id_bytes = 8 if self.name == "argsort" and self.all_gather else 2
        return settings.top_k * (id_bytes + 4 * self.probabilities)


def _routed(found: DenseRouting, ids: torch.Tensor) -> Routed:
    """ids: those of `found`, dense ones."""
    rows = (found.rows_per_rank, found.send_rows, found.received_rows)
    places = None
    if found.group_ends is not None:
        places = (found.places(ids), found.send_places(ids), found.group_ends)
    return Routed(cast(tuple[torch.Tensor, ...], rows), places)


def _dense(routing: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
    num_ranks, capacity, top_k = routing.ids.shape
    out = DenseRouting.empty(
        num_ranks, capacity, top_k, routing.rank, routing.num_slots, routing.ids.device, places=permute
    )

    def run() -> tuple[DenseRouting, torch.Tensor | None]:
        ids = routing.gathered(routing.ids)
        dense_routing(ids, routing.rank, routing.num_slots, alignment=ALIGNMENT, places=permute, out=out)
        if not probabilities:
            return out, None
        return out, routing.weights_by_place(out.places(ids), routing.gathered(routing.router_weights))

    def read(result: tuple[DenseRouting, torch.Tensor | None]) -> Routed:
        found, weights = result
        return dataclasses.replace(_routed(found, routing.ids), weights=_used(weights))

    return RoutingJob(run, read)


def _dense_nvlink(routing: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
    """Raises UnsupportedError where ranks cannot write into each other's memory."""
    parallel, device = routing.parallel, routing.ids.device
    assert parallel is not None
    num_ranks, capacity, top_k = routing.ids.shape
    communicators = [
        Communicator(parallel.ep_group, num_ranks, routing.rank, seconds)
        # The kernel ends its waits by itself, and says who is missing; the host is to hear that first.
        for seconds in (parallel.timeout_seconds, 2 * parallel.timeout_seconds + 5)
    ]
    problem = _unreachable(communicators[0], device)
    if problem:
        raise UnsupportedError(f"needs GPUs that write into each other's memory: {problem}")
    num_experts = routing.num_experts
    config = MoEConfig(num_experts=num_experts, top_k=top_k, hidden_size=128, intermediate_size=128, parallel=parallel)
    errors = DeferredErrors(config, device, communicators[1])
    experts = torch.arange(num_experts, dtype=torch.int32, device=device).unsqueeze(1)
    tables = PlacementTables(
        rank=experts // routing.num_slots, slot=experts % routing.num_slots, num_replicas=torch.ones_like(experts[:, 0])
    )
    exchange = RoutingExchange(
        communicators[0], routing.num_slots, top_k, capacity, LookupTables.of(tables), errors, device
    )
    workspace = WorkspaceArena(device).lease()
    # Of this rank alone; the rest has to come from the others.
    topk_ids = routing.topk_ids[routing.rank].clone()
    topk_weights = routing.router_weights[routing.rank].clone() if probabilities else None

    def run() -> tuple[torch.Tensor, DenseRouting, torch.Tensor | None]:
        ids, weights, found = exchange.gather(
            topk_ids, topk_weights, capacity, workspace, places=permute, alignment=ALIGNMENT
        )
        if weights is None:
            return ids, found, None
        return ids, found, routing.weights_by_place(found.places(ids), weights)

    def read(result: tuple[torch.Tensor, DenseRouting, torch.Tensor | None]) -> Routed:
        ids, found, weights = result
        return dataclasses.replace(_routed(found, ids), weights=_used(weights))

    return RoutingJob(run, read, lambda: errors.raise_pending(synchronize=True))


def _unreachable(communicator: Communicator, device: torch.device) -> str:
    """Why ranks cannot write into each other's memory, in a time that means something."""
    return reachable_peers(communicator, device) if device.type == "cuda" else f"the device is {device}"


def _sparse(routing: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
    num_ranks, rank, num_slots = routing.ids.shape[0], routing.rank, routing.num_slots
    own = slice(rank * num_slots, (rank + 1) * num_slots)

    def run() -> tuple[DenseRouting, torch.Tensor | None]:
        routing_map = routing.gathered(routing.routing_map)
        found = sparse_routing(routing_map, num_ranks, rank, num_slots, alignment=ALIGNMENT, places=permute)
        if not probabilities:
            return found, None
        assert found.positions is not None and found.segment_starts is not None
        positions = found.positions[:, own]
        places = torch.where(positions >= 0, positions + found.segment_starts[rank], -1)
        return found, routing.weights_by_place(places, routing.gathered(routing.weight_map)[:, own])

    def read(result: tuple[DenseRouting, torch.Tensor | None]) -> Routed:
        found, weights = result
        if found.positions is not None:
            # From a column for each expert to one for each choice.
            found = dataclasses.replace(found, positions=found.positions.gather(1, routing.ids.flatten(0, 1).long()))
        return dataclasses.replace(_routed(found, routing.ids), weights=_used(weights))

    return RoutingJob(run, read)


def _argsort(routing: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
    """Places of all pairs on all ranks, where no token names an expert twice."""
    num_ranks, num_slots = routing.ids.shape[0], routing.num_slots
    num_pairs, device = routing.ids.numel(), routing.ids.device
    of_all = routing.ids if routing.all_gather is None else routing.topk_ids
    experts = torch.arange(num_ranks * num_slots + 1, dtype=of_all.dtype, device=device)
    pairs = torch.arange(num_pairs, dtype=torch.int32, device=device)

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        ids = routing.gathered(of_all)
        in_order, order = torch.sort(ids.flatten(), stable=True)
        begins = torch.searchsorted(in_order, experts, out_int32=True)
        counts = begins.diff().view(num_ranks, num_slots)
        padded = (counts + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        starts = padded.cumsum(1, dtype=torch.int32) - padded
        place_in_order = pairs + (starts.flatten() - begins[:-1])[in_order.int()]
        places = torch.empty_like(pairs).scatter_(0, order, place_in_order)
        weights = None
        if probabilities:
            is_here = ids.flatten() // num_slots == routing.rank
            weights = routing.weights_by_place(
                torch.where(is_here, places, -1), routing.gathered(routing.router_weights)
            )
        return places, starts[routing.rank] + counts[routing.rank], weights

    def read(result: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> Routed:
        everywhere, group_ends, weights = result
        places = everywhere.view(routing.ids.shape)
        is_here = routing.ids // num_slots == routing.rank
        here = torch.where(is_here, places, -1).flatten(0, 1)
        return Routed(None, (here, places[routing.rank], group_ends), _used(weights))

    return RoutingJob(run, read)


def _used(weights: torch.Tensor | None) -> torch.Tensor | None:
    return None if weights is None else weights[:-1]


CONTENDERS = (
    Preparation("dense", _dense, permute=False),
    Preparation("dense", _dense, permute=True),
    Preparation("dense", _dense, permute=True, probabilities=True),
    Preparation("sparse", _sparse, permute=False),
    Preparation("sparse", _sparse, permute=True),
    Preparation("sparse", _sparse, permute=True, probabilities=True),
    Preparation("argsort", _argsort, permute=True),
    Preparation("argsort", _argsort, permute=True, probabilities=True),
)
GATHERING_CONTENDERS = (
    Preparation("dense", _dense_nvlink, permute=False, all_gather=NVLINK),
    Preparation("dense", _dense_nvlink, permute=True, all_gather=NVLINK),
    Preparation("dense", _dense_nvlink, permute=True, probabilities=True, all_gather=NVLINK),
    *(dataclasses.replace(each, all_gather=COLLECTIVE) for each in CONTENDERS),
)
"""Those of several ranks."""


def expected_of(routing: RoutingInput) -> Routed:
    """Everything, by the plain construction."""
    found = dense_routing_reference(routing.ids, routing.rank, routing.num_slots, alignment=ALIGNMENT)
    routed = _routed(found, routing.ids)
    assert routed.places is not None
    weights = routing.weights_by_place(routed.places[0], routing.router_weights)
    return dataclasses.replace(routed, weights=_used(weights))


def run_routing(
    settings: RoutingSettings,
    report: Callable[[RoutingRun, RoutingCell], None] | None = None,
    *,
    contenders: Sequence[Preparation] | None = None,
) -> RoutingRun:
    """Compare and time every contender at every token count; `report` is called after each count.

    contenders: CONTENDERS, or with the all-gather GATHERING_CONTENDERS, if left out.
    Raises ConfigError where there are fewer GPUs than ranks, RankError when ranks cannot be started.
    """
    device = torch.device(settings.device)
    if contenders is None:
        contenders = GATHERING_CONTENDERS if settings.all_gather else CONTENDERS
    with contextlib.ExitStack() as stack:
        if settings.all_gather:
            ranks = stack.enter_context(Ranks(settings.device, settings.world))
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
            measured = functools.partial(_measured_on_ranks, settings, ranks, contenders)
        else:
            stopwatch = Stopwatch(device)
            l2_bytes = stopwatch.l2_bytes
            measured = functools.partial(_measured_at, settings, stopwatch, contenders)
        run = RoutingRun(
            command=settings.command,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=machine_facts(device, l2_bytes, []),
            settings=settings,
        )
        for tokens in settings.tokens:
            cell = RoutingCell(tokens=tokens, measurements=measured(tokens))
            run = dataclasses.replace(run, cells=(*run.cells, cell))
            if report is not None:
                report(run, cell)
    return run


def _begun(settings: RoutingSettings, contender: Preparation) -> RoutingMeasurement:
    """Of a contender that nothing is known of yet."""
    backend = "NCCL" if settings.device == "cuda" else "gloo"
    return RoutingMeasurement(
        contender=contender.name,
        permute=contender.permute,
        probabilities=contender.probabilities,
        wire_bytes=contender.wire_bytes(settings),
        all_gather=backend if contender.all_gather == COLLECTIVE else contender.all_gather,
        status=OK,
    )


def _measured_on_ranks(
    settings: RoutingSettings, ranks: Ranks, contenders: Sequence[Preparation], tokens: int
) -> tuple[RoutingMeasurement, ...]:
    """Each contender in a run of its own, so that one that hangs or dies ends nothing else."""
    found = []
    for contender in contenders:
        measurement = _begun(settings, contender)
        seconds = START_SECONDS + 10 * settings.time_budget
        try:
            answers = ranks.run(measure_on_rank, contender, settings, tokens, seconds=seconds)
        except RankError as problem:
            logger.debug("%s failed", contender.label, exc_info=problem)
            # The last line of a traceback says what it was; a rank that did not answer has no other.
            detail = next(line for line in reversed(str(problem).splitlines()) if line.strip())
            found.append(dataclasses.replace(measurement, status=FAILED, detail=describe(RankError(detail))))
            continue
        status, detail, samples = answers[0]
        times: dict[str, Any] = {
            clock: summarize(slowest([of_rank[clock] for _, _, of_rank in answers])[0]) for clock in samples
        }
        found.append(dataclasses.replace(measurement, status=status, detail=detail, **times))
    return tuple(found)


def measure_on_rank(
    context: RankContext, contender: Preparation, settings: RoutingSettings, tokens: int
) -> tuple[str, str, dict[str, list[list[float]]]]:
    """Status, detail, and microseconds of this rank {clock: [samples]}; all ranks call this together."""
    stopwatch = JointStopwatch(context)
    parallel = stopwatch.parallel
    samples: dict[str, list[list[float]]] = {}
    seconds = settings.time_budget / (2 if stopwatch.is_cuda else 1)
    all_gather = collective_all_gather(parallel, context.device) if contender.all_gather == COLLECTIVE else None
    with torch.inference_mode():
        routing = RoutingInput.random(settings, tokens, context.device, context.rank, all_gather, parallel)
        expected = expected_of(routing)
        try:
            job = together(parallel, lambda: contender.bind(routing, contender.permute, contender.probabilities))
            together(parallel, lambda: _compare(job, stopwatch.warm_up(job.run), expected))
            if stopwatch.is_cuda:
                replay, result = together(parallel, lambda: stopwatch.record(job.run))
                together(parallel, lambda: _compare(job, _replayed(stopwatch, replay, result), expected))
                repetition = together(parallel, lambda: stopwatch.captured([job.run]))
                samples["graph"] = together(parallel, functools.partial(stopwatch.repeat, repetition, seconds))
            repetition = together(parallel, lambda: stopwatch.eager([job.run]))
            samples["eager"] = together(parallel, functools.partial(stopwatch.repeat, repetition, seconds))
            together(parallel, job.finish)
        except StageError as problem:
            return problem.status, problem.detail, {}
    return OK, "", samples


def collective_all_gather(parallel: ParallelConfig, device: torch.device) -> AllGather:
    """By torch.distributed, as bytes, which every backend knows, into memory that is kept."""
    communicator = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)
    kept: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    def all_gather(share: torch.Tensor) -> torch.Tensor:
        key = (share.shape, share.dtype)
        if key not in kept:
            kept[key] = torch.empty(parallel.ep_size, *share.shape, dtype=share.dtype, device=device)
        communicator.all_gather(kept[key].view(torch.uint8), share.view(torch.uint8), "all-gather").wait()
        return kept[key]

    return all_gather


def _replayed(stopwatch: Stopwatch, replay: Call, result: Any) -> Any:
    for _ in range(2):
        replay()
    stopwatch.synchronize()
    return result


def _compare(job: RoutingJob, result: Any, expected: Routed) -> None:
    problem = job.read(result).differs_from(expected)
    if problem:
        raise WrongResultError(problem)


def _measured_at(
    settings: RoutingSettings, stopwatch: Stopwatch, contenders: Sequence[Preparation], tokens: int
) -> tuple[RoutingMeasurement, ...]:
    with torch.inference_mode():
        routing = RoutingInput.random(settings, tokens, stopwatch.device)
        return _measured(settings, stopwatch, routing, contenders)


def _measured(
    settings: RoutingSettings, stopwatch: Stopwatch, routing: RoutingInput, contenders: Sequence[Preparation]
) -> tuple[RoutingMeasurement, ...]:
    expected = expected_of(routing)
    found = [_begun(settings, contender) for contender in contenders]
    eager: dict[int, Call] = {}
    replays: dict[int, Call] = {}
    for index, contender in enumerate(contenders):
        try:
            job = contender.bind(routing, contender.permute, contender.probabilities)
            problem = job.read(stopwatch.warm_up(job.run)).differs_from(expected)
            if stopwatch.is_cuda and not problem:
                replay, result = stopwatch.capture(job.run)
                replays[index] = replay
                problem = job.read(result).differs_from(expected)
        except Exception as error:  # one contender's error must not end the others' turns
            found[index] = dataclasses.replace(found[index], status=FAILED, detail=describe(error))
            continue
        if problem:
            found[index] = dataclasses.replace(found[index], status=WRONG, detail=problem)
        else:
            eager[index] = job.run
    graphs = {index: replay for index, replay in replays.items() if index in eager}
    for clock, calls, share in (("graph", graphs, GRAPH_SHARE), ("eager", eager, EAGER_SHARE)):
        turns = stopwatch.take_turns(list(calls.values()), settings.time_budget * share, from_idle=clock == "eager")
        for index, samples in zip(calls, turns, strict=True):
            if samples.problem is not None:
                found[index] = dataclasses.replace(found[index], status=FAILED, detail=describe(samples.problem))
            else:
                times: dict[str, Any] = {clock: summarize(samples.times)}
                found[index] = dataclasses.replace(found[index], **times)
    for index, call in eager.items():
        host = summarize(stopwatch.host_time(call, settings.time_budget * HOST_SHARE))
        found[index] = dataclasses.replace(found[index], cpu=host)
    return tuple(found)


def routing_table(run: RoutingRun, cell: RoutingCell) -> Table:
    """One line per contender; ratios are its time over that of the first dense scan that gives as much."""
    settings = run.settings
    where = "with the all-gather, times of the slowest rank" if settings.all_gather else "without the all-gather"
    table = Table(
        title=f"{cell.tokens} tokens on each of {settings.world} ranks, {settings.num_experts} experts, "
        f"top-{settings.top_k}, {where}",
        title_justify="left",
    )
    for column in ("contender", *(["all-gather"] if settings.all_gather else []), "permute", "probabilities"):
        table.add_column(column, no_wrap=True)
    for column in ("bytes/token", "graph us", "p10..p90", "p95", "eager us", "CPU us", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note")
    for m in cell.measurements:
        ours = next(
            (
                d
                for d in cell.measurements
                if d.contender == "dense"
                and (d.permute, d.probabilities) == (m.permute, m.probabilities)
                and _best(d) is not None
            ),
            None,
        )
        best, fastest = _best(m), None if ours is None or ours is m else _best(ours)
        table.add_row(
            m.contender,
            *([m.all_gather] if settings.all_gather else []),
            "with" if m.permute else "without",
            "with" if m.probabilities else "without",
            str(m.wire_bytes),
            f"{m.graph.median:.1f}" if m.graph else "-",
            f"{best.p10:.1f}..{best.p90:.1f}" if best else "",
            f"{best.p95:.1f}" if best and best.p95 is not None else "",
            f"{m.eager.median:.1f}" if m.eager else "",
            f"{m.cpu.median:.0f}" if m.cpu else "",
            f"{best.median / fastest.median:.2f}x" if best and fastest else "",
            "" if m.status == OK else escape(f"{m.status}: {m.detail}"),
        )
    return table


def _best(m: RoutingMeasurement) -> Timing | None:
    return m.graph or m.eager
