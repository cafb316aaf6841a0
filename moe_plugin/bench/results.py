"""What a benchmark leaves behind: dataclasses that are the JSON schema, and CSV for spreadsheets.

Schema `moe_plugin.bench/1`, one object per file:

    schema, command, date       the command repeats the run; the date is UTC, to the second
    machine                     MachineFacts: device, versions, versions of the peers; no host name, no path
    ceilings                    Ceilings, measured at the start of the run
    settings                    Settings of the sweep
    cells                       one Cell per (layer, dtype, tokens), with one Measurement per contender
    comm                        one CommCell per (layer, dtype, tokens), with one CommMeasurement per contender; not
                                there where it is empty

Times are microseconds. Fields are only ever added within version 1; a reader ignores those it does not know.
Derived numbers (TFLOP/s, TB/s, share of the floor, ratios) are not stored: they follow from these.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moe_plugin.errors import ConfigError

SCHEMA = "moe_plugin.bench/1"

OK = "ok"
NOT_INSTALLED = "not installed"
UNSUPPORTED = "unsupported"
WRONG = "wrong"
FAILED = "failed"
STATUSES = (OK, NOT_INSTALLED, UNSUPPORTED, WRONG, FAILED)
"""What became of a contender in a cell; only `ok` has times. `unsupported` is a refusal by design, `failed` no such."""

STRATEGY = "strategy"
PEER = "peer"
GEMMS_ONLY = "gemms_only"
ROLES = (STRATEGY, PEER, GEMMS_ONLY)
"""A strategy of this package, another library's whole layer, or the layer's grouped GEMMs alone."""

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Microseconds of `count` repetitions: median, 10th to 90th percentile, and the 95th where it was taken."""

    median: float
    p10: float
    p90: float
    count: int
    p95: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One contender in one cell.

    contender: a strategy's name or a peer's. role: one of ROLES. status: one of STATUSES.
    detail: why there is no time. note: what else to know, e.g. which tuned configuration a peer found.
    error, row_error: relative Frobenius error and largest row error against the oracle, where the result was compared.
    graph: replay of a captured CUDA graph with cold caches. eager: from an idle stream with cold caches, so that what
        the host adds shows. cpu: host time to enqueue one eager call.
    """

    contender: str
    role: str
    status: str
    detail: str = ""
    note: str = ""
    error: float | None = None
    row_error: float | None = None
    graph: Timing | None = None
    eager: Timing | None = None
    cpu: Timing | None = None

    @property
    def best(self) -> Timing | None:
        """The graph time where there is one, else the eager time."""
        return self.graph or self.eager


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """The layer of a cell: its preset (or given name) and dimensions."""

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One (layer, dtype, tokens).

    dtype: bf16, fp16, fp32 or an fp8 scheme. skew: how tokens choose experts. experts_hit: experts that a token chose.
    flops: 2 * T * K * 3 * H * I. bytes: weights and scales of the experts hit, hidden_states, ids and router weights
    read once, the output written once; nothing for intermediates. floor: max(bytes / bandwidth, flops / peak) by the
    measured ceilings, microseconds; bound: which of the two, `memory` or `compute`.
    """

    layer: LayerFacts
    dtype: str
    tokens: int
    skew: str
    experts_hit: int
    flops: int
    bytes: int
    floor: float
    bound: str
    measurements: tuple[Measurement, ...] = ()

    def of(self, contender: str) -> Measurement | None:
        """The measurement of a contender, if it took part."""
        return next((m for m in self.measurements if m.contender == contender), None)

    def tflops(self, time: float) -> float:
        """TFLOP/s of a call that takes `time` microseconds."""
        return self.flops / time / 1e6

    def terabytes_per_second(self, time: float) -> float:
        """TB/s of compulsory traffic of a call that takes `time` microseconds."""
        return self.bytes / time / 1e6


PHASES = ("dispatch", "combine", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommTimes:
    """Dispatch and combine apart, each with a cold L2, and `both`, one right after the other.

    The time of a repetition is that of its slowest rank.
    """

    dispatch: Timing
    combine: Timing
    both: Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class CommMeasurement:
    """One contender's dispatch and combine in one cell.

    contender, role, status, detail, note: as in Measurement. error, row_error: the largest of any rank.
    dispatch_bytes, combine_bytes: payload that leaves the busiest GPU: a token's row once per other rank that needs it,
        in the dtype in which it travels, with its scales; nothing for ids, weights, padding or duplicates.
    num_sms: SMs that it says it takes.
    graph: CUDA graph. eager: from idle streams.
    """

    contender: str
    role: str
    status: str
    detail: str = ""
    note: str = ""
    error: float | None = None
    row_error: float | None = None
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    num_sms: int | None = None
    graph: CommTimes | None = None
    eager: CommTimes | None = None

    @property
    def best(self) -> CommTimes | None:
        """The graph times where there are any, else the eager ones."""
        return self.graph or self.eager

    def bytes_of(self, phase: str) -> int:
        """Of one of PHASES."""
        return (phase != "combine") * self.dispatch_bytes + (phase != "dispatch") * self.combine_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CommCell:
    """One (layer, dtype, tokens) over `world` ranks; tokens: of each rank. dtype, skew: as in Cell."""

    layer: LayerFacts
    dtype: str
    tokens: int
    world: int
    skew: str
    measurements: tuple[CommMeasurement, ...] = ()

    def of(self, contender: str) -> CommMeasurement | None:
        """The measurement of a contender, if it took part."""
        return next((m for m in self.measurements if m.contender == contender), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the machine reached on the simplest work at the start of the run.

    copy_bytes_per_second: device-to-device copy, bytes read plus bytes written.
    matmul_flops: FLOP/s of a large square product by dtype ("bf16", "fp8"), where torch has it.
    graph_overhead: microseconds between the events around a graph of one tiny kernel; every graph time contains it.
    peer_write_bytes_per_second: what leaves each GPU while all write to their peers at once.
    """

    copy_bytes_per_second: float
    matmul_flops: Mapping[str, float]
    graph_overhead: float | None = None
    peer_write_bytes_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """Where the run took place. peers: version of each peer asked for, or "not installed"."""

    device: str
    device_type: str
    sm: int | None = None
    num_sms: int = 0
    memory_bytes: int = 0
    l2_bytes: int = 0
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    moe_plugin: str = ""
    peers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What was asked for. time_budget: seconds of measuring per contender and cell. world: ranks of a layer.

    With several ranks, tokens, FLOPs, bytes and experts of a cell are those of one rank (the one with most), and a time
    is that of the slowest rank in each repetition.
    """

    layers: tuple[str, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    strategies: tuple[str, ...]
    peers: tuple[str, ...]
    skew: str
    seed: int
    time_budget: float
    world: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One file of results."""

    command: str
    date: str
    machine: MachineFacts
    ceilings: Ceilings
    settings: Settings
    cells: tuple[Cell, ...] = ()
    schema: str = SCHEMA
    comm: tuple[CommCell, ...] = ()

    def with_cell(self, cell: Cell) -> Run:
        return dataclasses.replace(self, cells=(*self.cells, cell))

    def with_comm_cell(self, cell: CommCell) -> Run:
        return dataclasses.replace(self, comm=(*self.comm, cell))

    def to_json(self) -> str:
        """The schema above; one line per cell, so that two files can be compared by eye."""
        head = dataclasses.asdict(self)
        lists = {name: head.pop(name) for name in ("cells", "comm")}
        head = {"schema": head.pop("schema"), **head}
        text = json.dumps(head, indent=2).removesuffix("\n}")
        for name, cells in lists.items():
            if cells or name == "cells":
                lines = ",\n".join(f"    {json.dumps(cell)}" for cell in cells)
                text += f',\n  "{name}": [\n{lines}\n  ]'
        return f"{text}\n}}\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The inverse of `to_json`. Raises ConfigError for what is not a result of this schema."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as problem:
            raise ConfigError(f"not a benchmark result: {problem}") from problem
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ConfigError(f"benchmark results have schema {SCHEMA!r}, this file says {schema!r}")
        return _record(cls, data)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, so that an interrupted run leaves its last complete state."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Raises ConfigError for a file that is missing or no benchmark result, naming it."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ConfigError) as problem:
            raise ConfigError(f"{path}: {problem}") from problem


def to_csv(runs: Sequence[Run]) -> str:
    """One row per measurement, derived numbers included; times in microseconds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    dimensions = [f.name for f in dataclasses.fields(LayerFacts) if f.name != "name"]
    numbers = ("experts_hit", "flops", "bytes", "floor", "bound")
    clocks = ("graph", "eager", "cpu")
    spread = [f"{clock}_{part}" for clock in clocks for part in ("median", "p10", "p90", "count")]
    head = ["device", "layer", *dimensions, "dtype", "tokens", "skew", *numbers, "contender", "role", "status"]
    head += ["detail", "note", "error", "row_error", *spread, "tflops", "terabytes_per_second", "share_of_floor"]
    writer.writerow(head)
    for run in runs:
        for cell in run.cells:
            where = [run.machine.device, cell.layer.name, *(getattr(cell.layer, name) for name in dimensions)]
            where += [cell.dtype, cell.tokens, cell.skew, *(getattr(cell, name) for name in numbers)]
            for m in cell.measurements:
                times: list[Any] = []
                for timing in (getattr(m, clock) for clock in clocks):
                    times += [""] * 4 if timing is None else [timing.median, timing.p10, timing.p90, timing.count]
                rates: list[Any] = ["", "", ""]
                if m.best is not None:
                    time = m.best.median
                    rates = [cell.tflops(time), cell.terabytes_per_second(time), cell.floor / time]
                    rates = [f"{rate:.4g}" for rate in rates]
                checked = ["" if value is None else f"{value:.3g}" for value in (m.error, m.row_error)]
                writer.writerow(
                    [*where, m.contender, m.role, m.status, m.detail, m.note, *checked, *times, *rates],
                )
    return out.getvalue()


def _record(cls: type[Record], data: Mapping[str, Any]) -> Record:
    """A dataclass of this module from its JSON object."""
    hints = typing.get_type_hints(cls)
    known = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}  # type: ignore[arg-type]
    try:
        return cls(**{name: _value(hints[name], value) for name, value in known.items()})
    except TypeError as problem:
        raise ConfigError(f"incomplete benchmark result: {problem}") from problem


def _value(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        return tuple(_value(typing.get_args(hint)[0], item) for item in value)
    return _record(hint, value) if dataclasses.is_dataclass(hint) and isinstance(hint, type) else value
