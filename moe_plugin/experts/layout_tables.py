"""Which layout `deep_gemm_hybrid` runs a call in: measured crossover tables per device and layer shape, and the rule
where there is none. Works without Triton.

Files and the choice of an entry are those of kernels/measured_tables. The user's tables lie in the subfolder `layouts`
of the folder that MOE_PLUGIN_TILE_TABLES names, since tile tables have the same names; the package's in
experts/tables. Schema `moe_plugin.layouts/1`:

    schema, device         the device as its driver names it
    layer                  num_experts, top_k, hidden_size, intermediate_size, dtype
    deep_gemm, triton      versions of the last measurement
    date                   of the last measurement, in UTC
    entries                one object per number of rows and activation format:
        rows               Standard: N, rows that the experts receive; BatchedExperts: max_tokens, rows per expert
        activation_format  "Standard" or "BatchedExperts"
        layout             the one to take
        microseconds       {layout: median of the whole layer}, of every layout that was measured
        deep_gemm, triton  of that measurement, where they are not the table's

Where there is no entry, Standard is masked up to 256 rows and contiguous above, the threshold of RTP-LLM's bf16
executor, and BatchedExperts is masked: there the rows lie so already. The last entry holds on for any more rows.

Contiguous rows lie in the slots of the contiguous layouts already, so they are never masked. They have no entries of
their own: where Standard rows would be masked they take the fastest other layout that was measured beside it, else
contiguous; elsewhere the same as Standard rows, of which they may be as many at most.

Example, Standard entries triton_fused_moe for 64 rows and contiguous for 2048: up to 31 rows -> masked (the rule), 32
to 128 -> triton_fused_moe, 129 to 256 -> masked (the rule), 257 and more -> contiguous (the rule, from 1024 the entry).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

from moe_plugin.config import MoEConfig
from moe_plugin.errors import ConfigError
from moe_plugin.kernels.measured_tables import (
    MOST_REMEMBERED,
    REACH,
    Found,
    LayerShape,
    MeasuredTable,
    Told,
    read_field,
    read_time,
    tables_of_any_device,
    tables_of_device,
    tell_once,
)
from moe_plugin.modular_kernel import ActivationFormat

logger = logging.getLogger(__name__)

MASKED = "masked"
CONTIGUOUS = "contiguous"
CONTIGUOUS_TRITON_GATE_UP = "contiguous_triton_gate_up"
CONTIGUOUS_TRITON_DOWN = "contiguous_triton_down"
TRITON_FUSED_MOE = "triton_fused_moe"
LAYOUTS = (MASKED, CONTIGUOUS, CONTIGUOUS_TRITON_GATE_UP, CONTIGUOUS_TRITON_DOWN, TRITON_FUSED_MOE)
LAYOUTS_OF: Mapping[ActivationFormat, tuple[str, ...]] = {
    ActivationFormat.STANDARD: LAYOUTS,
    ActivationFormat.BATCHED_EXPERTS: (MASKED, TRITON_FUSED_MOE),
}
"""The layouts that entries of tables can have, by the activation formats that they are for."""

SCHEMA = "moe_plugin.layouts/1"
SHIPPED = Path(__file__).with_name("tables")
MASKED_ROWS = 256
"""Received rows up to which calls without an entry are masked."""
_NO_DEVICE = "no device"


def default_layout(activation_format: ActivationFormat, rows: int) -> str:
    """The layout of a call for which nothing was measured. rows: as in LayoutEntry."""
    if activation_format is ActivationFormat.BATCHED_EXPERTS:
        return MASKED
    return MASKED if rows <= MASKED_ROWS and activation_format is ActivationFormat.STANDARD else CONTIGUOUS


def _table_format(activation_format: ActivationFormat) -> ActivationFormat:
    """The one whose entries calls in `activation_format` take."""
    return ActivationFormat.STANDARD if activation_format is ActivationFormat.CONTIGUOUS else activation_format


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutEntry:
    """The layout for a number of rows, and the microseconds of each that was measured. See the module's docstring."""

    rows: int
    activation_format: ActivationFormat
    layout: str
    microseconds: Mapping[str, float]
    deep_gemm: str
    triton: str

    @property
    def group(self) -> str:
        return self.activation_format.value


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutTable(MeasuredTable[LayoutEntry]):
    """The entries of one layer on one device, by activation format, in the order of their rows."""

    schema: ClassVar[str] = SCHEMA
    kind: ClassVar[str] = "layout table"
    instead: ClassVar[str] = f"the rule of {MASKED_ROWS} rows"
    versions: ClassVar[tuple[str, ...]] = ("deep_gemm", "triton")
    subfolder: ClassVar[str] = "layouts"

    deep_gemm: str

    @staticmethod
    def entry_to_data(entry: LayoutEntry) -> dict[str, Any]:
        return {
            "rows": entry.rows,
            "activation_format": entry.activation_format.value,
            "layout": entry.layout,
            "microseconds": dict(entry.microseconds),
        }

    @staticmethod
    def entry_from_data(data: Mapping[str, Any], versions: Mapping[str, str]) -> LayoutEntry:
        where = f"entry {data['rows']}"
        name, layout = (read_field(data, field, str, where) for field in ("activation_format", "layout"))
        known = {each.value: each for each in LAYOUTS_OF}
        if name not in known:
            raise ConfigError(f"{where}: activation_format must be one of {', '.join(known)}, got {name!r}")
        measured = read_field(data, "microseconds", dict, where)
        allowed = LAYOUTS_OF[known[name]]
        for seen in (layout, *measured):
            if seen not in allowed:
                raise ConfigError(f"{where}: layout must be one of {', '.join(allowed)} in {name}, got {seen!r}")
        if layout not in measured:
            raise ConfigError(f"{where}: microseconds must have those of its layout, {layout}, got {list(measured)}")
        return LayoutEntry(
            rows=data["rows"],
            activation_format=known[name],
            layout=layout,
            microseconds={seen: read_time(measured, seen, f"{where}: microseconds") for seen in measured},
            **versions,
        )


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A layout and where it is from: an entry of the table `source`, or the rule where `entry` is None."""

    layout: str
    entry: LayoutEntry | None = None
    source: str = ""

    @property
    def origin(self) -> str:
        """Where it is from, in words."""
        return "no entry" if self.entry is None else f"{self.source}, entry for {self.entry.rows} rows"


class LayoutLookup:
    """The layouts of one layer on one device, by number of rows.

    device_name: as the driver has it, or "cpu". Raises ConfigError when a table of the user's is broken.
    """

    def __init__(self, config: MoEConfig, device_name: str) -> None:
        self._layer = LayerShape.of(config)
        self._tables: list[Found[LayoutTable]] = tables_of_device(LayoutTable, SHIPPED, device_name, self._layer)
        self._known: dict[tuple[ActivationFormat, int], str] = {}

    def standard(self, num_rows: int) -> str:
        """For the Standard format and `num_rows` >= 1 received rows: one of LAYOUTS."""
        return self._known.get((ActivationFormat.STANDARD, num_rows)) or self._search(
            ActivationFormat.STANDARD, num_rows
        )

    def batched(self, max_tokens: int) -> str:
        """For BatchedExperts of `max_tokens` >= 1 rows per expert: masked or triton_fused_moe."""
        return self._known.get((ActivationFormat.BATCHED_EXPERTS, max_tokens)) or self._search(
            ActivationFormat.BATCHED_EXPERTS, max_tokens
        )

    def contiguous(self, num_rows: int) -> str:
        """For the Contiguous format of at most `num_rows` >= 1 received rows: one of LAYOUTS, but not masked."""
        return self._known.get((ActivationFormat.CONTIGUOUS, num_rows)) or self._search(
            ActivationFormat.CONTIGUOUS, num_rows
        )

    def choose(self, activation_format: ActivationFormat, rows: int) -> LayoutChoice:
        """What `standard`, `batched` or `contiguous` returns, with its origin."""
        for found in self._tables:
            entry = found.table.nearest_entry(_table_format(activation_format).value, rows)
            if entry is None:
                continue
            layout = entry.layout
            if activation_format is ActivationFormat.CONTIGUOUS and layout == MASKED:
                others = {other: time for other, time in entry.microseconds.items() if other != MASKED}
                layout = min(others, key=lambda other: others[other], default=CONTIGUOUS)
            return LayoutChoice(layout, entry, found.source)
        return LayoutChoice(default_layout(activation_format, rows))

    def ranges(self, activation_format: ActivationFormat, max_rows: int) -> list[tuple[str, int]]:
        """The layouts of calls from 1 to `max_rows` rows in order, each with the last number of rows it holds for."""
        found: list[tuple[str, int]] = []
        for rows, choice in self._choices(activation_format, max_rows):
            if found and found[-1][0] == choice.layout:
                found.pop()
            found.append((choice.layout, rows))
        return found

    def entries(self, activation_format: ActivationFormat) -> list[LayoutEntry]:
        """The entries that some call takes: those of the user's table may hide shipped ones beside them."""
        beyond = 1 + max(self._last_rows(activation_format))
        chosen = (choice.entry for _, choice in self._choices(activation_format, beyond))
        return list({id(entry): entry for entry in chosen if entry is not None}.values())

    def _choices(self, activation_format: ActivationFormat, max_rows: int) -> Iterator[tuple[int, LayoutChoice]]:
        """Numbers of rows up to `max_rows`, among them the last one of every choice, each with its choice."""
        inner = {rows for rows in self._last_rows(activation_format) if 1 <= rows < max_rows}
        for rows in sorted(inner | ({max_rows} if max_rows > 0 else set())):
            yield rows, self.choose(activation_format, rows)

    def _last_rows(self, activation_format: ActivationFormat) -> Iterator[int]:
        """Every number of rows that may be the last one of its choice."""
        yield MASKED_ROWS
        for found in self._tables:
            wanted = _table_format(activation_format)
            known = [e.rows for e in found.table.entries if e.activation_format is wanted]
            for rows in known:
                yield from (-(-rows // REACH) - 1, REACH * rows)
            for one, next_one in pairwise(known):
                # Halfway on a logarithmic scale; which side an exact middle falls on is up to rounding.
                middle = isqrt(one * next_one)
                yield from (middle - 1, middle, middle + 1)

    def _search(self, activation_format: ActivationFormat, rows: int) -> str:
        choice = self.choose(activation_format, rows)
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        self._known[activation_format, rows] = choice.layout
        _tell(self._layer, activation_format, rows, choice)
        return choice.layout


class FixedLayout(LayoutLookup):
    """The same layout for every call that can take it, for measuring it; for the others what is so without an entry.

    Raises ConfigError for a name that is not one of LAYOUTS.
    """

    def __init__(self, layout: str) -> None:
        if layout not in LAYOUTS:
            raise ConfigError(f"a layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        self._layout = layout
        self._tables = []

    def standard(self, num_rows: int) -> str:
        return self._layout

    def batched(self, max_tokens: int) -> str:
        return self.choose(ActivationFormat.BATCHED_EXPERTS, max_tokens).layout

    def contiguous(self, num_rows: int) -> str:
        return self.choose(ActivationFormat.CONTIGUOUS, num_rows).layout

    def choose(self, activation_format: ActivationFormat, rows: int) -> LayoutChoice:
        if activation_format is ActivationFormat.CONTIGUOUS:
            fits = self._layout != MASKED
        else:
            fits = self._layout in LAYOUTS_OF[activation_format]
        return LayoutChoice(self._layout if fits else default_layout(activation_format, rows))


def reachable(
    config: MoEConfig,
    max_rows: int,
    device_name: str | None = None,
    activation_format: ActivationFormat = ActivationFormat.STANDARD,
) -> set[tuple[str, int]]:
    """(layout, rows) for every layout that a call of at most `max_rows` rows can take, with its largest such call.

    For workspaces, whose size is asked for without a device, and for warming up. device_name: None for any device that
    has a table, and those that have none. Raises ConfigError when a table of the user's is broken.
    """
    names = {device_name} if device_name is not None else {_NO_DEVICE}
    if device_name is None:
        tables = tables_of_any_device(LayoutTable, SHIPPED, LayerShape.of(config))
        names |= {Path(found.source).parent.name for found in tables}
    largest: dict[str, int] = {}
    for name in names:
        for layout, rows in LayoutLookup(config, name).ranges(activation_format, max_rows):
            largest[layout] = max(rows, largest.get(layout, 0))
    return set(largest.items())


def measured_gain(config: MoEConfig, device_name: str) -> bool:
    """Whether, by the tables of this device and layer, some Standard call is faster with a GEMM of DeepGEMM's.

    Raises ConfigError when a table of the user's is broken.
    """
    entries = LayoutLookup(config, device_name).entries(ActivationFormat.STANDARD)
    return any(entry.layout != TRITON_FUSED_MOE for entry in entries)


def describe_rule(config: MoEConfig, device_name: str) -> str:
    """The layouts of Standard calls by received rows on a device, in a line.

    As in `masked up to 256 rows, contiguous above; not measured on NVIDIA H200`.
    """
    lookup = LayoutLookup(config, device_name)
    entries = lookup.entries(ActivationFormat.STANDARD)
    beyond = 1 + REACH * max([MASKED_ROWS, *(entry.rows for entry in entries)])
    *ranges, (last, _) = lookup.ranges(ActivationFormat.STANDARD, beyond)
    words = [*(f"{layout} up to {rows} rows" for layout, rows in ranges), f"{last} above" if ranges else last]
    measured = f"measured at {len(entries)} numbers of rows" if entries else f"not measured on {device_name}"
    return f"{', '.join(words)}; {measured}"


_told: Told = set()


def _tell(layer: LayerShape, activation_format: ActivationFormat, rows: int, choice: LayoutChoice) -> None:
    """One line per layer shape and entry, or power of two of rows where no entry decided."""
    name, entry = activation_format.value, choice.entry

    def say() -> None:
        logger.info("layout of %s for %d rows, %s: %s (%s)", layer, rows, name, choice.layout, choice.origin)

    tell_once(_told, say, layer, name, choice.source, rows if entry is None else entry.rows)
