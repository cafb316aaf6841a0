"""The sweep behind `moe-plugin bench comm`: dispatch and combine alone, on several ranks, next to what else there is.

A cell is a (layer, dtype, tokens per rank). In it contenders come one after the other, each in a run of its own on all
ranks: one that hangs or breaks the device ends its run, and the next one gets new processes. In such a run a result is
compared with the oracle on every rank, eagerly and replayed from a graph; then the contender is timed as `ranks`
describes it: dispatch and combine as two steps, each behind a flush and a barrier, and both as one step.
"""

from __future__ import annotations

import difflib
import functools
import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TypeVar, cast

import torch

from moe_plugin.bench.comm_exchange import CommContender, Exchange, rows_between_ranks, strategy_contenders, ways_of
from moe_plugin.bench.comm_peers import comm_peer, peer_version
from moe_plugin.bench.contenders import Accuracy
from moe_plugin.bench.experts import Sweep, describe, finite, layer_config, machine_facts, status_of
from moe_plugin.bench.layers import Inputs
from moe_plugin.bench.ranks import JointStopwatch, Ranks, Repetition, slowest
from moe_plugin.bench.results import (
    FAILED,
    OK,
    PHASES,
    WRONG,
    Ceilings,
    CommCell,
    CommMeasurement,
    CommTimes,
    LayerFacts,
    Run,
    Settings,
)
from moe_plugin.bench.timing import Call, summarize
from moe_plugin.config import MoEConfig, ParallelConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError
from moe_plugin.modular_kernel import PrepareAndFinalize
from moe_plugin.strategies.agreement import gather
from moe_plugin.strategies.registry import prepare_finalize_classes
from moe_plugin.testing.rank_pool import RankContext, RankError

logger = logging.getLogger(__name__)

T = TypeVar("T")

ALL = "all"
CLOCKS = ("graph", "eager")
PEER_WRITE_BYTES = 128 << 20
"""Written by each rank to its peers, all at once, for the ceiling."""
CEILING_SECONDS = 0.1
START_SECONDS = 150.0
"""Within which a contender has to compile, set up and be right, besides the time it is measured for."""

Report = Callable[[Run, CommCell], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommSweep(Sweep):
    """As Sweep, with tokens of each of `world` ranks.

    strategies: PrepareAndFinalize classes by name, with all their ways, or one way as `name:way`; or `all`.
    """

    strategies: tuple[str, ...] = (ALL,)
    world: int = 2

    def check_names(self) -> None:
        for layer in self.layers:
            layer_config(layer, "bf16")
        for name in self.peers:
            comm_peer(name)
        known = prepare_finalize_classes.all()
        for strategy in self.strategies:
            name, _, way = strategy.partition(":")
            if name in known and way and way not in ways_of(name):
                raise ConfigError(f"{name} has no way {way!r}. Known: {', '.join(ways_of(name))}.")
            if name != ALL and name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise ConfigError(f"nothing dispatches by the name {name!r}.{hint} Known: all, {', '.join(known)}.")

    @property
    def settings(self) -> Settings:
        settings = super(CommSweep, self).settings  # slots make it another class than the one super() would look for
        return replace(settings, world=self.world)

    @property
    def command(self) -> str:
        return self.spelled("comm", "--world", str(self.world))

    def ways(self, name: str) -> list[str]:
        """Those asked for of a class, all where none is named."""
        named = [strategy.partition(":")[2] for strategy in self.strategies if strategy.partition(":")[0] == name]
        return ways_of(name) if not all(named) or not named else named

    def classes(self, environment: Environment) -> tuple[list[type[PrepareAndFinalize]], dict[str, str]]:
        """The classes to measure, and of those that `all` leaves out the gate that none of the layers passes."""
        known = prepare_finalize_classes.all()
        refusals: dict[str, str] = {}
        if ALL not in self.strategies:
            names = dict.fromkeys(strategy.partition(":")[0] for strategy in self.strategies)
            return [known[name] for name in names], refusals
        parallel = ParallelConfig(ep_size=self.world)
        for name, cls in known.items():
            configs = [
                layer_config(layer, dtype, parallel=parallel, cuda_graph=captured)
                for layer in self.layers
                for dtype in self.dtypes
                for captured in (True, False)
            ]
            verdicts = [cls.supports(config, environment) for config in configs]
            if not any(verdict.ok for verdict in verdicts):
                refusals[name] = verdicts[-1].reason
        return [cls for name, cls in known.items() if name not in refusals], refusals


@dataclass(frozen=True, slots=True)
class Job:
    """A cell as a rank sees it."""

    layer: str
    dtype: str
    tokens: int
    skew: str
    seed: int
    time_budget: float


@dataclass(slots=True)
class RankReport:
    """What one rank has to say of a contender in a cell.

    samples: microseconds {clock: a list for each of PHASES}. refusals: {clock: (status, detail)} where it has none.
    rows: what `rows_between_ranks` counts. row_bytes, returned_row_bytes: of a row on its way to an expert, and back.
    """

    status: str = OK
    detail: str = ""
    note: str = ""
    refusals: dict[str, tuple[str, str]] = field(default_factory=dict)
    accuracies: list[Accuracy] = field(default_factory=list)
    samples: dict[str, list[list[float]]] = field(default_factory=dict)
    rows: list[list[int]] = field(default_factory=list)
    row_bytes: int = 0
    returned_row_bytes: int = 0
    num_sms: int | None = None


class WrongResultError(Exception):
    """A result differs from the oracle; the message says by how much."""


class StageError(Exception):
    """A stage failed on some rank, and so it ended on all of them."""

    def __init__(self, status: str, detail: str) -> None:
        self.status, self.detail = status, detail
        super().__init__(status, detail)


def run_comm_sweep(sweep: CommSweep, report: Report) -> tuple[Run, dict[str, str]]:
    """Measure every cell; `report` is called after each with the results so far.

    Returns the run and the classes that `all` left out, with the reason. Raises ConfigError where there are fewer GPUs
    than ranks, RankError when ranks cannot be started.
    """
    environment = Environment.probe(sweep.device)
    classes, left_out = sweep.classes(environment)
    contenders = [contender for cls in classes for contender in strategy_contenders(cls, sweep.ways(cls.name))]
    contenders += [contender for name in sweep.peers for contender in comm_peer(name)]
    with Ranks(sweep.device, sweep.world) as ranks:
        ceilings, l2_bytes = _ceilings(ranks, sweep.seed)
        facts = machine_facts(torch.device(sweep.device), l2_bytes, ())
        run = Run(
            command=sweep.command,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=replace(facts, peers={name: peer_version(name, sweep.device) for name in sweep.peers}),
            ceilings=ceilings,
            settings=sweep.settings,
        )
        for layer in sweep.layers:
            for dtype in sweep.dtypes:
                config = layer_config(layer, dtype)
                for tokens in sweep.tokens:
                    job = Job(layer, dtype, tokens, sweep.skew, sweep.seed, sweep.time_budget)
                    cell = CommCell(
                        layer=LayerFacts(
                            name=layer,
                            num_experts=config.num_experts,
                            top_k=config.top_k,
                            hidden_size=config.hidden_size,
                            intermediate_size=config.intermediate_size,
                        ),
                        dtype=dtype,
                        tokens=tokens,
                        world=sweep.world,
                        skew=sweep.skew,
                        measurements=tuple(_measurement(ranks, contender, job) for contender in contenders),
                    )
                    run = run.with_comm_cell(cell)
                    report(run, cell)
    return run, left_out


def _measurement(ranks: Ranks, contender: CommContender, job: Job) -> CommMeasurement:
    """One contender in one cell, whatever becomes of it."""
    try:
        reports = ranks.run(measure_on_rank, contender, job, seconds=START_SECONDS + 10 * job.time_budget)
    except RankError as problem:
        logger.debug("%s failed", contender.name, exc_info=problem)
        # The last line of a traceback says what it was; a rank that did not answer has no other.
        detail = next(line for line in reversed(str(problem).splitlines()) if line.strip())
        return CommMeasurement(
            contender=contender.name, role=contender.role, status=FAILED, detail=describe(RankError(detail))
        )
    first = reports[0]
    times = {
        clock: CommTimes(**dict(zip(PHASES, map(summarize, slowest([r.samples[clock] for r in reports])), strict=True)))
        for clock in first.samples
    }
    accuracies = [accuracy for each in reports for accuracy in each.accuracies]
    sent, received = _rows_away(first.rows)
    return CommMeasurement(
        contender=contender.name,
        role=contender.role,
        status=first.status,
        detail=first.detail,
        note=first.note,
        error=_largest([each.error for each in accuracies]),
        row_error=_largest([each.row_error for each in accuracies]),
        dispatch_bytes=sent * first.row_bytes,
        combine_bytes=received * first.returned_row_bytes,
        num_sms=first.num_sms,
        **(times if first.status == OK else {}),
    )


def _largest(errors: Sequence[float]) -> float | None:
    """None without any, or where one is no number, which compares false with everything."""
    return finite(max(errors, key=lambda error: (math.isnan(error), error))) if errors else None


def _rows_away(rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The most rows that one rank sends to others, and that one rank receives from others and sends back."""
    size = range(len(rows))
    sent = max((sum(row) - row[rank] for rank, row in enumerate(rows)), default=0)
    return sent, max((sum(rows[source][rank] for source in size if source != rank) for rank in size), default=0)


def measure_on_rank(context: RankContext, contender: CommContender, job: Job) -> RankReport:
    """Every clock of a contender in a cell; all ranks call this together."""
    report = RankReport()
    stopwatch = JointStopwatch(context)
    parallel = context.parallel()
    config = layer_config(job.layer, job.dtype, parallel=parallel, max_tokens_per_rank=job.tokens)
    clocks = CLOCKS if stopwatch.is_cuda else ("eager",)
    with torch.inference_mode():
        inputs = Inputs.random(config, job.tokens, job.skew, context.device, job.seed + job.tokens)
        report.rows = rows_between_ranks(config, inputs).tolist()
        for clock in clocks:
            clocked = replace(config, cuda_graph=clock == "graph")
            try:
                _measure(stopwatch, contender, clocked, inputs, job.time_budget / len(clocks), report)
            except StageError as problem:
                # Not the exception, whose traceback holds what the next clock needs the memory of.
                report.refusals[clock] = problem.status, problem.detail
                if problem.status == WRONG:
                    break
            gc.collect()
            if stopwatch.is_cuda:
                torch.cuda.empty_cache()
    _conclude(report, clocks)
    return report


def _conclude(report: RankReport, clocks: Sequence[str]) -> None:
    """The status over all clocks: a wrong result on one is wrong, one clock that runs is enough to have times."""
    found = list(report.refusals.values())
    wrong = [refusal for refusal in found if refusal[0] == WRONG]
    if wrong or len(found) == len(clocks):
        report.status, report.detail = (wrong or found)[-1]
    else:
        report.detail = "; ".join(f"no {clock} times: {detail}" for clock, (_, detail) in report.refusals.items())


def _measure(
    stopwatch: JointStopwatch,
    contender: CommContender,
    config: MoEConfig,
    inputs: Inputs,
    seconds: float,
    report: RankReport,
) -> None:
    """One clock: set up, compare, capture and compare again where calls are captured, time. Raises StageError."""
    parallel = config.parallel
    exchange = together(parallel, lambda: contender.make(config, inputs))
    try:
        together(parallel, lambda: _compare(exchange, stopwatch.warm_up(exchange.call), "", report))
        report.note, report.num_sms = exchange.note, exchange.num_sms
        report.row_bytes, report.returned_row_bytes = exchange.row_bytes, exchange.returned_row_bytes
        time = stopwatch.eager
        if config.cuda_graph:
            time = stopwatch.captured
            replay, output = together(parallel, lambda: stopwatch.record(exchange.call))
            together(parallel, lambda: _replay(replay, stopwatch))
            together(parallel, lambda: _compare(exchange, output, "replayed from a graph: ", report))
            del replay, output
        samples = []
        for steps in (exchange.halves(), [exchange.pair]):
            repetition = together(parallel, functools.partial(time, steps))
            samples += together(parallel, functools.partial(stopwatch.repeat, repetition, seconds / 2))
            del repetition
        together(parallel, exchange.finish)
        report.samples["graph" if config.cuda_graph else "eager"] = samples
    finally:
        exchange.close()


def _replay(replay: Call, stopwatch: JointStopwatch) -> None:
    for _ in range(2):
        replay()
    stopwatch.synchronize()


def _compare(exchange: Exchange, output: torch.Tensor, where: str, report: RankReport) -> None:
    accuracy = exchange.check(output)
    report.accuracies.append(accuracy)
    if not accuracy.ok:
        raise WrongResultError(f"{where}{accuracy}")


def together(parallel: ParallelConfig, stage: Callable[[], T]) -> T:
    """Run a stage on all ranks. Raises StageError on all of them when it raises on one."""
    mine, result = None, None
    try:
        result = stage()
    except Exception as problem:  # whatever a contender raises belongs in its line of the table
        status = WRONG if isinstance(problem, WrongResultError) else status_of(problem)
        mine = (status, str(problem) if status == WRONG else describe(problem))
        if status == FAILED:
            logger.debug("a stage failed", exc_info=problem)
    found = gather(parallel, mine, "bench stage")
    failures = {rank: theirs for rank, theirs in found.items() if theirs is not None}
    if failures:
        rank, (status, detail) = next(iter(failures.items()))
        raise StageError(status, detail if set(found.values()) == {(status, detail)} else f"rank {rank}: {detail}")
    return cast(T, result)


def _ceilings(ranks: Ranks, seed: int) -> tuple[Ceilings, int]:
    """What the machine reaches on the simplest work, and the bytes of a device's L2."""
    answers = ranks.run(ceilings_on_rank, seed, seconds=START_SECONDS)
    ceilings, l2_bytes, overhead, _ = answers[0]
    fastest = None
    if all(writes for _, _, _, writes in answers):
        ways = slowest([writes for _, _, _, writes in answers])
        fastest = min(summarize(times).median for times in ways)
    written = None if fastest is None else round(1e6 * _peer_part(ranks.world) * (ranks.world - 1) / fastest)
    return replace(ceilings, graph_overhead=overhead, peer_write_bytes_per_second=written), l2_bytes


def ceilings_on_rank(context: RankContext, seed: int) -> tuple[Ceilings, int, float | None, list[list[float]]]:
    """Ceilings of one device, its L2, the cost of a step in a graph, and microseconds of each way to write to peers."""
    stopwatch = JointStopwatch(context)
    ceilings = stopwatch.ceilings(seed)
    if not stopwatch.is_cuda:
        return ceilings, 0, None, []
    one = torch.zeros(1, device=context.device)
    (tiny,) = stopwatch.repeat(_captured(stopwatch, lambda: one.add_(1)), CEILING_SECONDS)
    try:
        ways = together(stopwatch.parallel, lambda: _peer_writes(context))
    except StageError as problem:
        logger.debug("no ceiling: %s", problem.detail)
        ways = []
    writes: list[list[float]] = []
    for way in ways:
        try:
            repetition = together(stopwatch.parallel, functools.partial(_captured, stopwatch, way))
            writes += together(stopwatch.parallel, functools.partial(stopwatch.repeat, repetition, CEILING_SECONDS))
        except StageError as problem:  # on all ranks alike, and one way is enough
            logger.debug("no ceiling by %s: %s", way, problem.detail)
    return ceilings, stopwatch.l2_bytes, summarize(tiny).median, writes


def _captured(stopwatch: JointStopwatch, call: Call) -> Repetition:
    stopwatch.warm_up(call)
    return stopwatch.captured([call])


def _peer_part(world: int) -> int:
    """Bytes that a rank writes to each of its peers."""
    return PEER_WRITE_BYTES // (world - 1) // 16 * 16


def _peer_writes(context: RankContext) -> list[Call]:
    """Ways to write to all peers: by kernels or by copies, in turn or at once. Raises where there is no peer access."""
    import torch.distributed._symmetric_memory as symmetric_memory

    part = _peer_part(context.size) // 8
    memory = symmetric_memory.empty(part * context.size, dtype=torch.int64, device=context.device)
    handle = symmetric_memory.rendezvous(memory, context.parallel().ep_group)
    # The part that is nobody's target; as a view, it keeps the memory.
    mine = memory[context.rank * part : (context.rank + 1) * part].fill_(1)
    # In turn, so that every peer is written to by one rank at a time.
    peers = [(context.rank + distance) % context.size for distance in range(1, context.size)]
    targets = [handle.get_buffer(peer, (part,), torch.int64, context.rank * part) for peer in peers]
    streams = [torch.cuda.Stream(context.device) for _ in peers]

    def by_kernel(target: torch.Tensor) -> None:
        torch.bitwise_not(mine, out=target)

    def by_copy(target: torch.Tensor) -> None:
        target.copy_(mine)

    def in_turn(write: Callable[[torch.Tensor], None]) -> None:
        for target in targets:
            write(target)

    def at_once(write: Callable[[torch.Tensor], None]) -> None:
        caller = torch.cuda.current_stream()
        for stream, target in zip(streams, targets, strict=True):
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                write(target)
        for stream in streams:
            caller.wait_stream(stream)

    return [functools.partial(order, write) for order in (in_turn, at_once) for write in (by_kernel, by_copy)]
