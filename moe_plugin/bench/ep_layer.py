"""The sweep behind `moe-plugin bench layer`: whole expert-parallel layers, one process a rank, contenders in turn.

A cell is one (layer, dtype, tokens per rank). Every rank has its experts, its tokens and its part of one routing. Each
clock of a contender goes through the same steps on all ranks together, and a step begins when the one before has ended
well on every rank:

    admit     build, compile, and compare a sample of each rank's rows with the oracle, which makes the experts of other
              ranks anew from the seed
    record    (graph clock) capture the call
    replay    (graph clock) the first replay, compared as well
    measure   a block of repetitions; the result of the last is compared again

The eager clock runs a layer built for eager calls, the graph clock one built with `cuda_graph=True`, as a server has
them. A repetition starts on all ranks together: behind a barrier on the device, which stands before the start event.
Its time is that of the slowest rank. What the host adds to a call counts from there on, as in a server whose ranks have
met in the layer before.

Every step has a time limit. Ranks that do not come back are ended and started anew, without the contender that lost
them.
"""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist

from moe_plugin.bench.contenders import Accuracy, Bind, Contender, Job, StrategyContender, UnsupportedError
from moe_plugin.bench.experts import Report, Sweep, describe, finite, layer_config, machine_facts, status_of
from moe_plugin.bench.layers import Inputs, Layer, compulsory_bytes, floor, flops
from moe_plugin.bench.mega_kernel import DeepGemmMega
from moe_plugin.bench.ranks import JointStopwatch, Ranks, slowest
from moe_plugin.bench.results import (
    FAILED,
    NOT_INSTALLED,
    OK,
    UNSUPPORTED,
    WRONG,
    Ceilings,
    Cell,
    LayerFacts,
    MachineFacts,
    Measurement,
    Run,
)
from moe_plugin.bench.timing import Call, no_collection, summarize
from moe_plugin.errors import ConfigError
from moe_plugin.testing.rank_pool import RankContext, RankError

logger = logging.getLogger(__name__)

PEERS: dict[str, Callable[[], Contender]] = {"deep_gemm_mega": DeepGemmMega}
"""What `bench layer --peer` takes."""

BLOCKS = 3
"""Turns that every contender gets on each clock, so that a drift of the machine meets them all."""

SHARES = {"graph": 0.5, "eager": 0.5}
"""How the time budget of a contender is spent."""

PILOT, FEWEST, MOST = 3, 4, 60
"""Repetitions of the block that tells how long one takes, and of the blocks that count."""

ADMIT_SECONDS, STEP_SECONDS, HEALTH_SECONDS = 240.0, 90.0, 30.0
"""Limits of a step in which kernels may be compiled, of another, and of the question whether ranks can go on."""

PEER_SECONDS = 100.0
"""How long a rank waits in a layer for one that still compiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSweep(Sweep):
    """What to measure; tokens are those of each rank. world: ranks, one process and one GPU each."""

    strategies: tuple[str, ...] = ("nccl_all_to_all+triton_fused_moe",)
    world: int = 4

    def check_names(self) -> None:
        if self.world < 2:
            raise ConfigError(f"expert parallelism takes at least 2 ranks, got {self.world}")
        for layer in self.layers:
            experts = layer_config(layer, "bf16").num_experts
            if experts < self.world:
                raise ConfigError(f"{layer} has {experts} experts for {self.world} ranks: a rank would have none")
        for name in self.peers:
            if name not in PEERS:
                raise ConfigError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
        for name in self.strategies:
            StrategyContender(name)

    @property
    def command(self) -> str:
        return self.spelled("layer", "--world", str(self.world))

    @property
    def clocks(self) -> tuple[str, ...]:
        return ("graph", "eager") if self.device == "cuda" else ("eager",)


def contender_of(name: str) -> Contender:
    """A peer, or else a strategy of this package. Raises UnknownStrategyError."""
    return PEERS[name]() if name in PEERS else StrategyContender(name)


@dataclass(frozen=True, slots=True)
class Place:
    """One cell, as every rank must know it."""

    sweep: LayerSweep
    layer: str
    dtype: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step on one rank, or on all of them."""

    status: str = OK
    detail: str = ""
    accuracy: Accuracy | None = None

    @classmethod
    def of(cls, accuracy: Accuracy, where: str = "") -> Outcome:
        return cls(OK, "", accuracy) if accuracy.ok else cls(WRONG, f"{where}{accuracy}", accuracy)

    @classmethod
    def failure(cls, problem: BaseException) -> Outcome:
        return cls(status_of(problem), describe(problem))


@dataclass(frozen=True, slots=True)
class Block:
    """Microseconds of each repetition on one rank: by the device's clock, and until the host had made the call."""

    outcome: Outcome
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    seconds: float = 0.0


class RankBench:
    """What one rank keeps between steps; everything is made where it is first asked for, on all ranks alike."""

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self.stopwatch = JointStopwatch(context)
        self._of: tuple[str, str] | None = None
        self._tokens: int | None = None
        self.layer: Layer
        self.inputs: Inputs
        self._binds: dict[tuple[str, str], Bind] = {}
        self._jobs: dict[tuple[str, str], Job] = {}
        self.replays: dict[str, tuple[Call, Any]] = {}

    def enter(self, place: Place) -> None:
        """Make the layer and the inputs of a cell, unless they are there. What belongs to another cell is dropped."""
        sweep = place.sweep
        if (place.layer, place.dtype) != self._of:
            self.leave()
            config = layer_config(
                place.layer, place.dtype, parallel=self.context.parallel(timeout_seconds=PEER_SECONDS)
            )
            self.layer = Layer.random(place.layer, config, self.stopwatch.device, sweep.seed)
            self._of = place.layer, place.dtype
        if place.tokens != self._tokens:
            self._leave_cell()
            seed = sweep.seed + place.tokens
            self.inputs = Inputs.random(self.layer.config, place.tokens, sweep.skew, self.stopwatch.device, seed)
            self._tokens = place.tokens

    def job(self, place: Place, name: str, clock: str) -> Job:
        """The call of a contender on a clock, warmed up. Raises whatever building and calling it raises."""
        contender = contender_of(name)
        # A strategy is built for each clock; a peer has one form.
        key = (name, clock if isinstance(contender, StrategyContender) else "")
        if key not in self._binds:
            self._binds[key] = self._bind(contender, max(place.sweep.tokens), clock)
        if key not in self._jobs:
            job = self._binds[key](self.inputs)
            self.stopwatch.warm_up(job.run)
            self._jobs[key] = job
        return self._jobs[key]

    def _bind(self, contender: Contender, max_tokens: int, clock: str) -> Bind:
        if isinstance(contender, StrategyContender):
            built = contender.build(self.layer, max_tokens, cuda_graph=clock == "graph")
            return functools.partial(contender.bind, built, self.layer)
        prepared = contender.prepare(self.layer, max_tokens)
        if clock == "graph" and not prepared.capturable:
            raise UnsupportedError("its calls cannot be captured")
        return prepared.bind

    def leave(self) -> None:
        """Drop everything made for a layer."""
        self._leave_cell()
        self._of = None
        self._binds.clear()
        for name in ("layer", "inputs"):
            if hasattr(self, name):
                delattr(self, name)
        self._free()

    def _leave_cell(self) -> None:
        self._tokens = None
        # Graphs first: they hold addresses that jobs and layers own.
        self.replays.clear()
        self._jobs.clear()
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self.stopwatch.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


_bench: RankBench | None = None
"""Of this process, which is one rank."""


def _rank_bench(context: RankContext) -> RankBench:
    global _bench
    if _bench is None:
        _bench = RankBench(context)
    return _bench


def begin(context: RankContext, sweep: LayerSweep) -> tuple[MachineFacts, Ceilings]:
    """The machine and its ceilings, as every rank sees them. What an earlier sweep has left is dropped."""
    global _bench
    _bench = None
    bench = _rank_bench(context)
    peers = [contender_of(name) for name in sweep.peers]
    facts = machine_facts(context.device, bench.stopwatch.l2_bytes, peers)
    return facts, bench.stopwatch.ceilings(sweep.seed)


def cell_facts(context: RankContext, place: Place) -> tuple[LayerFacts, int, int, int]:
    """The layer, and of this rank: experts hit, FLOPs on average, bytes that have to be moved."""
    bench = _rank_bench(context)
    bench.enter(place)
    layer, inputs = bench.layer, bench.inputs
    hit = inputs.experts_hit(layer.config)
    return layer.facts, hit, flops(layer.config, place.tokens), compulsory_bytes(layer, inputs, hit)


def admit(context: RankContext, place: Place, name: str, clock: str) -> Outcome:
    """Build, compile, compare with the oracle."""
    try:
        bench = _rank_bench(context)
        bench.enter(place)
        with torch.inference_mode():
            job = bench.job(place, name, clock)
            return Outcome.of(job.check(job.run()))
    except Exception as problem:  # whatever a contender raises belongs in its line of the table
        return _failure(name, problem)


def record(context: RankContext, place: Place, name: str) -> Outcome:
    """Capture the call of the graph clock."""
    try:
        bench = _rank_bench(context)
        bench.enter(place)
        with torch.inference_mode():
            bench.replays[name] = bench.stopwatch.record(bench.job(place, name, "graph").run)
    except Exception as problem:  # see admit
        return _failure(name, problem)
    return Outcome()


def play(context: RankContext, place: Place, name: str) -> Outcome:
    """Replay what was captured, and compare it."""
    try:
        bench = _rank_bench(context)
        with torch.inference_mode():
            run, output = bench.replays[name]
            run()
            bench.stopwatch.synchronize()
            accuracy = bench.job(place, name, "graph").check(output)
    except Exception as problem:  # see admit
        return _failure(name, problem)
    return Outcome.of(accuracy, "replayed from a graph: ")


def measure(context: RankContext, place: Place, name: str, clock: str, repetitions: int) -> Block:
    """A block of repetitions, all ranks starting each of them together."""
    try:
        bench = _rank_bench(context)
        bench.enter(place)
        if clock == "graph" and name not in bench.replays:  # the ranks were started anew
            found = record(context, place, name)
            if found.status != OK:
                return Block(found)
        with torch.inference_mode(), no_collection():
            return _measure(bench, place, name, clock, repetitions)
    except Exception as problem:  # see admit
        return Block(_failure(name, problem))


def _measure(bench: RankBench, place: Place, name: str, clock: str, repetitions: int) -> Block:
    job = bench.job(place, name, clock)
    call, output = bench.replays[name] if clock == "graph" else (job.run, None)
    stopwatch = bench.stopwatch
    begin_of_all = time.perf_counter()
    marks, host = [], []
    for _ in range(repetitions):
        if stopwatch.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The first record of an event creates it, which must not lie between the two that count.
            start.record()
            end.record()
            marks.append((start, end))
            stopwatch.flush()
            if clock == "eager":
                # The hosts meet here, and below what their devices still are apart is made up for.
                stopwatch.meet()
                stopwatch.synchronize()
        stopwatch.meet()
        if stopwatch.is_cuda:
            start.record()
        begin_of_call = time.perf_counter()
        result = call()
        host.append(1e6 * (time.perf_counter() - begin_of_call))
        if stopwatch.is_cuda:
            end.record()
    stopwatch.synchronize()
    times = [1000 * start.elapsed_time(end) for start, end in marks] if stopwatch.is_cuda else host
    seconds = time.perf_counter() - begin_of_all
    accuracy = job.check(result if output is None else output)
    return Block(Outcome.of(accuracy, "after many calls: "), times, host, seconds)


def _failure(name: str, problem: Exception) -> Outcome:
    outcome = Outcome.failure(problem)
    if outcome.status == FAILED:
        logger.debug("%s failed", name, exc_info=problem)
    return outcome


def check_health(context: RankContext) -> None:
    """Raises, or does not return, where devices or collectives are of no more use."""
    one = torch.ones(1, device=context.device)
    dist.all_reduce(one, group=context.parallel().ep_group)
    if one.item() != context.size:
        raise RuntimeError(f"the sum of {context.size} ones is {one.item()}")


@dataclass(slots=True)
class Entrant:
    """A contender in one cell. times: of the slowest rank in every repetition, by clock, `cpu` among them."""

    contender: Contender
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    def runs(self, clock: str) -> bool:
        return self.outcomes[clock].status == OK

    def measurement(self) -> Measurement:
        accuracies = [outcome.accuracy for outcome in self.outcomes.values() if outcome.accuracy is not None]
        worst = max(accuracies, key=_badness, default=None)
        broken = [outcome for outcome in self.outcomes.values() if outcome.status in (WRONG, FAILED)]
        refused = {
            clock: outcome for clock, outcome in self.outcomes.items() if outcome.status not in (OK, WRONG, FAILED)
        }
        status, detail = OK, "; ".join(f"no {clock} time: {outcome.detail}" for clock, outcome in refused.items())
        if broken:
            status, detail = broken[0].status, broken[0].detail
        elif len(refused) == len(self.outcomes):
            last = list(refused.values())[-1]
            status, detail = last.status, last.detail
        times: dict[str, Any] = {clock: summarize(samples) for clock, samples in self.times.items() if samples}
        return Measurement(
            contender=self.contender.name,
            role=self.contender.role,
            status=status,
            detail=detail,
            error=None if worst is None else finite(worst.error),
            row_error=None if worst is None else finite(worst.row_error),
            **(times if status == OK else {}),
        )


SEVERITY = (OK, NOT_INSTALLED, UNSUPPORTED, WRONG, FAILED)


def _badness(accuracy: Accuracy) -> tuple[bool, float]:
    return not accuracy.ok, accuracy.error


def of_all_ranks(outcomes: Sequence[Outcome]) -> Outcome:
    """The worst of the ranks, and which rank that is where not all agree."""
    rank, worst = max(enumerate(outcomes), key=lambda pair: SEVERITY.index(pair[1].status))
    accuracies = [outcome.accuracy for outcome in outcomes if outcome.accuracy is not None]
    accuracy = max(accuracies, key=_badness, default=None)
    alone = worst.status != OK and any(outcome.status != worst.status for outcome in outcomes)
    return Outcome(worst.status, f"rank {rank}: {worst.detail}" if alone else worst.detail, accuracy)


def run_layer_sweep(sweep: LayerSweep, report: Report) -> Run:
    """Measure every cell; `report` is called after each with the results so far.

    Raises ConfigError where there are fewer GPUs than ranks, RankError when ranks cannot be started or cannot make the
    weights of a layer.
    """
    with Ranks(sweep.device, sweep.world) as ranks:
        machine, ceilings = ranks.run(begin, sweep, seconds=STEP_SECONDS)[0]
        run = Run(
            command=sweep.command,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=machine,
            ceilings=ceilings,
            settings=sweep.settings,
        )
        for layer in sweep.layers:
            for dtype in sweep.dtypes:
                lost: dict[str, Outcome] = {}
                for tokens in sweep.tokens:
                    cell = _cell(ranks, Place(sweep, layer, dtype, tokens), run.ceilings, lost)
                    run = run.with_cell(cell)
                    report(run, cell)
    return run


def _cell(ranks: Ranks, place: Place, ceilings: Ceilings, lost: dict[str, Outcome]) -> Cell:
    """One cell. lost: contenders that ranks were lost with, which stay out for the rest of the layer; added to here."""
    facts = ranks.run(cell_facts, place, seconds=STEP_SECONDS)
    sweep = place.sweep
    entrants = [Entrant(contender_of(name)) for name in (*sweep.strategies, *sweep.peers)]
    for entrant in entrants:
        name = entrant.contender.name
        for clock in sweep.clocks:
            if name in lost:
                entrant.outcomes[clock] = lost[name]
                continue
            steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(admit, (name, clock))]
            steps += [(record, (name,)), (play, (name,))] if clock == "graph" else []
            for function, arguments in steps:
                outcomes = _step(ranks, entrant, clock, lost, function, place, *arguments)
                if outcomes is None or not _take(ranks, entrant, clock, outcomes):
                    break
    for clock in sweep.clocks:
        _time(ranks, place, clock, [entrant for entrant in entrants if entrant.runs(clock)], lost)
    layer, _, num_flops, _ = facts[0]
    hit, num_bytes = max(fact[1] for fact in facts), max(fact[3] for fact in facts)
    least, bound = floor(ceilings, num_flops, num_bytes, place.dtype.startswith("fp8"))
    return Cell(
        layer=layer,
        dtype=place.dtype,
        tokens=place.tokens,
        skew=sweep.skew,
        experts_hit=hit,
        flops=num_flops,
        bytes=num_bytes,
        floor=least,
        bound=bound,
        measurements=tuple(entrant.measurement() for entrant in entrants),
    )


def _step(
    ranks: Ranks,
    entrant: Entrant,
    clock: str,
    lost: dict[str, Outcome],
    function: Callable[..., Any],
    *arguments: Any,
) -> list[Any] | None:
    """A step of a contender on all ranks; None when ranks were lost with it, which ends all its clocks."""
    try:
        return ranks.run(function, *arguments, seconds=ADMIT_SECONDS if function is admit else STEP_SECONDS)
    except RankError as problem:
        outcome = Outcome(FAILED, f"{function.__name__} on the {clock} clock: {describe(problem)}")
        lost[entrant.contender.name] = outcome
        entrant.outcomes[clock] = outcome
        return None


def _take(ranks: Ranks, entrant: Entrant, clock: str, outcomes: Sequence[Outcome]) -> bool:
    """Keep the outcome of a step; whether the contender goes on."""
    found = of_all_ranks(outcomes)
    before = entrant.outcomes.get(clock, found)
    accuracies = [outcome.accuracy for outcome in (before, found) if outcome.accuracy is not None]
    entrant.outcomes[clock] = replace(found, accuracy=max(accuracies, key=_badness, default=None))
    if found.status == FAILED:
        _check_health(ranks)
    return found.status == OK


def _check_health(ranks: Ranks) -> None:
    """End ranks that cannot go on; the next step starts new ones."""
    try:
        ranks.run(check_health, seconds=HEALTH_SECONDS)
    except RankError as problem:
        logger.debug("the ranks are started anew: %s", problem)


def _time(ranks: Ranks, place: Place, clock: str, entrants: Sequence[Entrant], lost: dict[str, Outcome]) -> None:
    """Let these entrants take turns on a clock, one block of repetitions at a time."""
    repetitions = dict.fromkeys(
        (entrant.contender.name for entrant in entrants), 1 if len(place.sweep.clocks) == 1 else PILOT
    )
    budget = place.sweep.time_budget * SHARES[clock] / BLOCKS
    for turn in range(BLOCKS + 1):
        for entrant in entrants:
            name = entrant.contender.name
            if not entrant.runs(clock) or name in lost:
                continue
            blocks = _step(ranks, entrant, clock, lost, measure, place, name, clock, repetitions[name])
            if blocks is None or not _take(ranks, entrant, clock, [block.outcome for block in blocks]):
                continue
            if turn == 0:
                # The first block is a warm-up that tells how many repetitions the budget has room for.
                fewest = FEWEST if place.sweep.device == "cuda" else 1
                each = max(block.seconds for block in blocks) / repetitions[name]
                repetitions[name] = max(fewest, min(MOST, int(budget / max(each, 1e-9))))
                continue
            times, host = slowest([(block.times, block.host) for block in blocks])
            entrant.times.setdefault(clock, []).extend(times)
            if clock == "eager" and place.sweep.device == "cuda":
                entrant.times.setdefault("cpu", []).extend(host)
