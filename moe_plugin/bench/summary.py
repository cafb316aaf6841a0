"""What the numbers say: ratios, geometric means, targets, and the tables that show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from moe_plugin.bench.results import (
    GEMMS_ONLY,
    OK,
    PEER,
    PHASES,
    STRATEGY,
    Cell,
    CommCell,
    CommMeasurement,
    CommTimes,
    Measurement,
    Run,
)

BEST_OF_VLLM = "best of vllm's"
VLLM = ("vllm", "vllm_deep_gemm")
MEGA = "deep_gemm_mega"


def ratio(cell: Cell, strategy: str, peer: str) -> float | None:
    """The peer's time over the strategy's: above 1 the strategy is faster. None where one of them has no time.

    Graph times where both have them, else eager times. `best of vllm's` is the faster of vLLM's two in the cell.
    """
    if peer == BEST_OF_VLLM:
        found = [value for name in VLLM if (value := ratio(cell, strategy, name)) is not None]
        return min(found, default=None)
    ours, theirs = cell.of(strategy), cell.of(peer)
    if ours is None or theirs is None:
        return None
    for mine, its in ((ours.graph, theirs.graph), (ours.eager, theirs.eager)):
        if mine is not None and its is not None:
            return its.median / mine.median
    return None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A strategy against one peer over the cells of a dtype in which both have times."""

    dtype: str
    strategy: str
    peer: str
    ratios: tuple[tuple[Cell, float], ...]

    @property
    def geometric_mean(self) -> float:
        return math.exp(sum(math.log(value) for _, value in self.ratios) / len(self.ratios))

    @property
    def worst(self) -> tuple[Cell, float]:
        return min(self.ratios, key=lambda pair: pair[1])


def compare(cells: Sequence[Cell]) -> list[Comparison]:
    """Every (dtype, strategy, peer) with at least one ratio, in the order of appearance."""
    comparisons = []
    for dtype in dict.fromkeys(cell.dtype for cell in cells):
        own = [cell for cell in cells if cell.dtype == dtype]
        peers = names(own, PEER) + names(own, GEMMS_ONLY)
        if set(VLLM) <= set(peers):
            peers.append(BEST_OF_VLLM)
        for strategy in names(own, STRATEGY):
            for peer in peers:
                found = [(cell, value) for cell in own if (value := ratio(cell, strategy, peer)) is not None]
                if found:
                    comparisons.append(Comparison(dtype, strategy, peer, tuple(found)))
    return comparisons


def names(cells: Iterable[Cell], *roles: str) -> list[str]:
    """Contenders of these roles, in the order of appearance."""
    return list(dict.fromkeys(m.contender for cell in cells for m in cell.measurements if m.role in roles))


@dataclass(frozen=True, slots=True)
class Target:
    """One goal of the project: what it asks for, and the cells (or means) that miss it."""

    name: str
    asked: int
    missed: tuple[str, ...]


def targets(run: Run) -> list[Target]:
    """The goals for the experts, each over the cells it speaks of; goals that no cell speaks of are left out.

    Against vLLM's `fused_experts` never below 0.97x and 1.25x in the geometric mean, 1.2x at one token in fp8; 90% of
    the copy bandwidth from 32 tokens up to the compute bound; 50 us of host time; at 8192 tokens on an H200 550 TFLOP/s
    in bf16 and 850 in fp8. Of layers over several ranks: within 25% of DeepGEMM's mega kernel in every cell.
    """
    found: list[Target] = []
    for strategy in names(run.cells, STRATEGY):
        found += _targets_of(run, strategy) if run.settings.world == 1 else [_layer_target(run, strategy)]
    return [target for target in found if target.asked]


def _targets_of(run: Run, strategy: str) -> list[Target]:
    cells = [(cell, m) for cell in run.cells if (m := cell.of(strategy)) is not None and m.best is not None]
    against = [(cell, value) for cell, _ in cells if (value := ratio(cell, strategy, "vllm")) is not None]

    def target(name: str, asked: Iterable[tuple[str, float]], least: float, unit: str = "") -> Target:
        values = list(asked)
        missed = tuple(f"{where} {value:.3g}{unit}" for where, value in values if value < least)
        return Target(f"{strategy}: {name}", len(values), missed)

    bandwidth = run.ceilings.copy_bytes_per_second / 1e12
    streaming = [
        (where(cell), cell.terabytes_per_second(m.best.median) / bandwidth)
        for cell, m in cells
        if m.best is not None and cell.tokens >= 32 and cell.bound == "memory"
    ]
    means = [
        (f"{c.dtype} mean", c.geometric_mean) for c in compare(run.cells) if c.strategy == strategy and c.peer == "vllm"
    ]
    one_token = [(where(cell), value) for cell, value in against if cell.tokens == 1 and cell.dtype.startswith("fp8")]
    host = [(where(cell), m.cpu.median) for cell, m in cells if m.cpu is not None and run.machine.device_type == "cuda"]
    slow = tuple(f"{place} {value:.0f} us" for place, value in host if value > 50)
    result = [
        target("at least 0.97x of vllm in every cell", [(where(c), v) for c, v in against], 0.97, "x"),
        target("1.25x of vllm in the geometric mean", means, 1.25, "x"),
        target("1.2x of vllm at 1 token in fp8", one_token, 1.2, "x"),
        target("90% of the copy bandwidth from 32 tokens to the compute bound", streaming, 0.9),
        Target(f"{strategy}: at most 50 us of host time", len(host), slow),
    ]
    if "H200" in run.machine.device:
        for kind, least in (("bf16", 550), ("fp8", 850)):
            rates = [
                (where(cell), cell.tflops(m.best.median))
                for cell, m in cells
                if m.best is not None and cell.tokens == 8192 and cell.dtype.startswith(kind)
            ]
            result.append(target(f"{least} TFLOP/s at 8192 tokens in {kind}", rates, least, " TFLOP/s"))
    return result


def _layer_target(run: Run, strategy: str) -> Target:
    found = [(where(cell), value) for cell in run.cells if (value := ratio(cell, strategy, MEGA)) is not None]
    missed = tuple(f"{place} {value:.3g}x" for place, value in found if 1 / value > 1.25)
    return Target(f"{strategy}: within 25% of {MEGA} in every cell", len(found), missed)


def where(cell: Cell) -> str:
    """A cell in few words."""
    skew = "" if cell.skew == "uniform" else f" {cell.skew}"
    return f"{cell.layer.name} {cell.dtype} {cell.tokens}{skew}"


def block_table(cells: Sequence[Cell], strategy: str) -> Table:
    """The cells of one (layer, dtype): one line per contender, ratios against `strategy`."""
    first = cells[0]
    facts = first.layer
    size = f"{facts.num_experts} experts, top-{facts.top_k}, H {facts.hidden_size}, I {facts.intermediate_size}"
    table = Table(title=f"{facts.name} ({size}), {first.dtype}, {first.skew} routing", title_justify="left")
    for column in ("tokens", "hit", "floor us"):
        table.add_column(column, justify="right")
    table.add_column("contender", no_wrap=True)
    for column in ("graph us", "p10..p90", "eager us", "CPU us", "TFLOP/s", "TB/s", "of floor", "ratio", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note")
    absent = _absent(cells)
    for cell in cells:
        shown = [m for m in cell.measurements if m.contender not in absent]
        for index, m in enumerate(shown):
            head = ["", "", ""] if index else [str(cell.tokens), str(cell.experts_hit), f"{cell.floor:.1f}"]
            table.add_row(*head, *_line(cell, m, strategy), end_section=index == len(shown) - 1)
    table.caption = escape("\n".join(f"{name} {reason}" for name, reason in absent.items()))
    table.caption_justify = "left"
    return table


def layer_table(cells: Sequence[Cell], world: int) -> Table:
    """The cells of one (layer, dtype) over several ranks: one line per contender, ratios against every peer."""
    first = cells[0]
    facts = first.layer
    size = f"{facts.num_experts} experts, top-{facts.top_k}, H {facts.hidden_size}, I {facts.intermediate_size}"
    title = f"{facts.name} ({size}) over {world} ranks, {first.dtype}, {first.skew} routing; tokens and rates per rank"
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "hit", "floor us"):
        table.add_column(column, justify="right")
    table.add_column("contender", no_wrap=True)
    absent = _absent(cells)
    peers = [name for name in names(cells, PEER) if name not in absent]
    for column in (
        "graph us",
        "p95",
        "eager us",
        "p95",
        "CPU us",
        "TFLOP/s",
        *(f"x {name}" for name in peers),
        "error",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note")
    for cell in cells:
        shown = [m for m in cell.measurements if m.contender not in absent]
        for index, m in enumerate(shown):
            head = ["", "", ""] if index else [str(cell.tokens), str(cell.experts_hit), f"{cell.floor:.1f}"]
            table.add_row(*head, *_layer_line(cell, m, peers), end_section=index == len(shown) - 1)
    table.caption = escape("\n".join(f"{name} {reason}" for name, reason in absent.items()))
    table.caption_justify = "left"
    return table


def _layer_line(cell: Cell, m: Measurement, peers: Sequence[str]) -> list[str]:
    error = "" if m.error is None else f"{m.error:.1e}"
    if m.status != OK or m.best is None:
        return [m.contender, *[""] * (6 + len(peers)), error, escape(f"{m.status}: {m.detail}")]
    times: list[str] = []
    for timing in (m.graph, m.eager):
        times += (
            ["-", ""] if timing is None else [f"{timing.median:.1f}", "" if timing.p95 is None else f"{timing.p95:.1f}"]
        )
    ratios = [None if m.contender == name else ratio(cell, m.contender, name) for name in peers]
    return [
        m.contender,
        *times,
        f"{m.cpu.median:.0f}" if m.cpu else "-",
        f"{cell.tflops(m.best.median):.3g}",
        *("" if value is None else f"{value:.2f}x" for value in ratios),
        error,
        escape("; ".join(filter(None, (m.note, m.detail)))),
    ]


def _absent(cells: Sequence[Cell]) -> dict[str, str]:
    """Contenders that have the same reason for no time in every cell: said once, below the table."""
    reasons: dict[str, set[str]] = {}
    for m in (m for cell in cells for m in cell.measurements):
        reasons.setdefault(m.contender, set()).add("" if m.status == OK else f"{m.status}: {m.detail}")
    return {name: next(iter(found)) for name, found in reasons.items() if len(found) == 1 and "" not in found}


def _line(cell: Cell, m: Measurement, strategy: str) -> list[str]:
    label = f"{m.contender} (GEMMs only)" if m.role == GEMMS_ONLY else m.contender
    error = "" if m.error is None else f"{m.error:.1e}"
    if m.status != OK or m.best is None:
        return [label, *[""] * 8, error, escape(f"{m.status}: {m.detail}")]
    time = m.best.median
    value = None if m.contender == strategy else ratio(cell, strategy, m.contender)
    return [
        label,
        f"{m.graph.median:.1f}" if m.graph else "-",
        f"{m.best.p10:.1f}..{m.best.p90:.1f}",
        f"{m.eager.median:.1f}" if m.eager else "-",
        f"{m.cpu.median:.0f}" if m.cpu else "-",
        f"{cell.tflops(time):.3g}",
        f"{cell.terabytes_per_second(time):.3g}",
        f"{cell.floor / time:.0%} {cell.bound}",
        "" if value is None else f"{value:.2f}x",
        error,
        escape("; ".join(filter(None, (m.note, m.detail)))),
    ]


def line(cell: Cell, strategy: str) -> str:
    """One cell in one line, for progress."""
    parts = []
    for m in cell.measurements:
        if m.best is None:
            parts.append(f"{m.contender} {m.status}")
            continue
        value = None if m.contender == strategy else ratio(cell, strategy, m.contender)
        parts.append(f"{m.contender} {m.best.median:.1f} us" + ("" if value is None else f" ({value:.2f}x)"))
    return f"{where(cell)}: {', '.join(parts)}"


def comparison_table(run: Run) -> Table:
    """The geometric mean of the ratios by dtype and peer, and the worst cell."""
    table = Table(title="Ratios: the peer's time over ours", title_justify="left")
    table.add_column("dtype")
    table.add_column("strategy", no_wrap=True)
    table.add_column("peer", no_wrap=True)
    for column in ("geometric mean", "worst", "cells"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("worst cell")
    gemms_only = set(names(run.cells, GEMMS_ONLY))
    for c in compare(run.cells):
        label = f"{c.peer} (GEMMs only)" if c.peer in gemms_only else c.peer
        cell, value = c.worst
        table.add_row(
            c.dtype, c.strategy, label, f"{c.geometric_mean:.2f}x", f"{value:.2f}x", str(len(c.ratios)), where(cell)
        )
    return table


def target_lines(run: Run) -> list[str]:
    """One line per target: met, or by how many cells and which it is missed."""
    lines = []
    for target in targets(run):
        if target.missed:
            lines.append(f"missed {len(target.missed)}/{target.asked}  {target.name}: {'; '.join(target.missed)}")
        else:
            lines.append(f"met {target.asked}/{target.asked}  {target.name}")
    return lines


def comm_ratio(cell: CommCell, contender: str, clock: str, phase: str) -> float | None:
    """The fastest peer's time over the contender's on a clock ("graph" or "eager"): above 1 the contender is faster.

    None where there is no such time, or no other peer has one.
    """

    def median(m: CommMeasurement | None) -> float | None:
        times = None if m is None else getattr(m, clock)
        return None if times is None else getattr(times, phase).median

    ours = median(cell.of(contender))
    peers = [median(m) for m in cell.measurements if m.role == PEER and m.contender != contender]
    fastest = min((time for time in peers if time is not None), default=None)
    return None if ours is None or fastest is None else fastest / ours


def comm_table(cell: CommCell, ceiling: float | None) -> Table:
    """One line per contender and clock. ceiling: bytes per second that a GPU can write to its peers."""
    facts = cell.layer
    size = f"{facts.num_experts} experts, top-{facts.top_k}, H {facts.hidden_size}"
    where = f"{cell.tokens} tokens on each of {cell.world} ranks, {cell.skew} routing"
    table = Table(title=f"{facts.name} ({size}), {cell.dtype}, {where}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    table.add_column("clock")
    for phase in PHASES:
        table.add_column(f"{phase} us", justify="right", no_wrap=True)
        table.add_column("p95", justify="right", no_wrap=True)
    for phase in PHASES[:2]:
        table.add_column(f"{phase}\nGB/s", justify="right", no_wrap=True)
        table.add_column("of\nceiling", justify="right", no_wrap=True)
    table.add_column("SMs", justify="right")
    table.add_column("best peer / this\ndispatch, combine, both", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    absent = []
    for m in cell.measurements:
        remarks = "; ".join(filter(None, (m.note, m.detail)))
        if m.status != OK or m.best is None:
            absent.append(f"{m.contender} {m.status}: {m.detail}")
        elif remarks:
            absent.append(f"{m.contender}: {remarks}")
        clocks = [clock for clock in ("graph", "eager") if getattr(m, clock) is not None]
        for clock in clocks:
            name = m.contender if clock == clocks[0] else ""
            table.add_row(name, clock, *_comm_line(cell, m, clock, ceiling), end_section=clock == clocks[-1])
    table.caption = escape("\n".join(absent))
    table.caption_justify = "left"
    return table


def _comm_line(cell: CommCell, m: CommMeasurement, clock: str, ceiling: float | None) -> list[str]:
    times: CommTimes = getattr(m, clock)
    columns: list[str] = []
    for timing in (times.dispatch, times.combine, times.both):
        columns += [f"{timing.median:.1f}", "" if timing.p95 is None else f"{timing.p95:.1f}"]
    for phase in PHASES[:2]:
        rate = 1e6 * m.bytes_of(phase) / getattr(times, phase).median
        columns += [f"{rate / 1e9:.3g}", "" if ceiling is None else f"{rate / ceiling:.0%}"]
    ratios = [value for phase in PHASES if (value := comm_ratio(cell, m.contender, clock, phase)) is not None]
    return [
        *columns,
        "" if m.num_sms is None else str(m.num_sms),
        ", ".join(f"{value:.2f}x" for value in ratios),
        "" if m.error is None else f"{m.error:.1e}",
    ]


def comm_line(cell: CommCell) -> str:
    """One cell in one line, for progress."""
    parts = []
    for m in cell.measurements:
        times = m.best and [f"{getattr(m.best, phase).median:.1f}" for phase in PHASES[:2]]
        parts.append(f"{m.contender} {m.status}" if not times else f"{m.contender} {' + '.join(times)} us")
    return f"{cell.layer.name} {cell.dtype} {cell.tokens}: {', '.join(parts)}"
