"""Pictures of results: times against the floor, and ratios to each peer, by layer and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_plugin.bench.results import GEMMS_ONLY, PEER, PHASES, STRATEGY, Cell, CommCell, Run
from moe_plugin.bench.summary import names, ratio
from moe_plugin.errors import ConfigError, MissingPackageError

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which people with any color vision can tell apart."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PARITY = "#444444"
LINEAR_UP_TO = 8
"""Multiples of the floor above which a panel of times is logarithmic."""


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write one figure over all cells of `runs`; the file's ending chooses the format (png, svg, pdf).

    A column per layer; per dtype a row of times as multiples of the floor (dashed) and a row of ratios of the first
    strategy to each peer: bars rise above 1 where it is faster and hang below where it is slower. GEMMs alone are in
    the row of times only. Of equal cells in several runs the last one counts.
    Raises MissingPackageError without matplotlib, ConfigError when there is nothing to draw or the format is unknown.
    """
    figure_class, canvas_class = _matplotlib()
    latest = {(c.layer.name, c.dtype, c.skew, c.tokens): c for run in runs for c in run.cells}
    cells = [cell for cell in latest.values() if any(m.best for m in cell.measurements)]
    if not cells:
        raise ConfigError("nothing to draw: no cell has a time")
    layers = list(dict.fromkeys((c.layer.name, c.skew) for c in cells))
    dtypes = list(dict.fromkeys(c.dtype for c in cells))
    contenders = names(cells, STRATEGY) + names(cells, PEER) + names(cells, GEMMS_ONLY)
    style = {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(contenders)}
    has_ratios = any(_ratios([cell], contenders) for cell in cells)
    kinds = 2 if has_ratios else 1
    figure = figure_class(figsize=(1.2 + 3.6 * len(layers), 1.2 + 2.6 * kinds * len(dtypes)), layout="constrained")
    canvas_class(figure)
    grid = figure.subplots(kinds * len(dtypes), len(layers), squeeze=False)
    for row, dtype in enumerate(dtypes):
        for column, (layer, skew) in enumerate(layers):
            own = sorted(
                (c for c in cells if (c.layer.name, c.skew, c.dtype) == (layer, skew, dtype)), key=lambda c: c.tokens
            )
            title = f"{layer}, {dtype}" + ("" if skew == "uniform" else f", {skew}")
            _times(grid[kinds * row][column], own, contenders, style, title)
            if has_ratios:
                _bars(grid[kinds * row + 1][column], own, contenders, style)
    for row in range(len(grid)):
        grid[row][0].set_ylabel("time / floor" if row % kinds == 0 else "peer's time / ours")
    _finish(figure, runs, "One MoE layer", path)


def draw_comm(runs: Sequence[Run], path: Path) -> None:
    """Write one figure over all dispatch and combine results of `runs`; the file's ending chooses the format.

    A column per layer and dtype, a row each for dispatch, combine and both: microseconds over tokens per rank, graph
    times as lines, eager ones dotted. Dashed: the bytes of the first contender at the ceiling of peer writes. Of equal
    cells in several runs the last one counts.
    Raises MissingPackageError without matplotlib, ConfigError when there is nothing to draw or the format is unknown.
    """
    figure_class, canvas_class = _matplotlib()
    latest = {
        (c.layer.name, c.dtype, c.skew, c.world, c.tokens): (c, run.ceilings.peer_write_bytes_per_second)
        for run in runs
        for c in run.comm
    }
    cells = [pair for pair in latest.values() if any(m.best for m in pair[0].measurements)]
    if not cells:
        raise ConfigError("nothing to draw: no cell has a time")
    columns = list(dict.fromkeys((c.layer.name, c.dtype, c.skew, c.world) for c, _ in cells))
    contenders = list(dict.fromkeys(m.contender for c, _ in cells for m in c.measurements if m.best))
    style = {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(contenders)}
    figure = figure_class(figsize=(1.4 + 3.8 * len(columns), 1.4 + 2.5 * len(PHASES)), layout="constrained")
    canvas_class(figure)
    grid = figure.subplots(len(PHASES), len(columns), squeeze=False)
    for column, (layer, dtype, skew, world) in enumerate(columns):
        own = [(c, top) for c, top in cells if (c.layer.name, c.dtype, c.skew, c.world) == (layer, dtype, skew, world)]
        own.sort(key=lambda pair: pair[0].tokens)
        for row, phase in enumerate(PHASES):
            _comm_times(grid[row][column], own, phase, style)
            grid[row][0].set_ylabel(f"{phase}, us")
        title = f"{layer}, {dtype}, {world} ranks" + ("" if skew == "uniform" else f", {skew}")
        grid[0][column].set_title(title, fontsize=10)
        grid[-1][column].set_xlabel("tokens per rank", fontsize=8)
    _finish(figure, runs, "Dispatch and combine", path)


def _comm_times(
    axes: Any, cells: Sequence[tuple[CommCell, float | None]], phase: str, style: Mapping[str, tuple[str, str]]
) -> None:
    for name, (color, marker) in style.items():
        for clock, line in (("graph", "-"), ("eager", ":")):
            found = [
                (i, getattr(times, phase).median)
                for i, (c, _) in enumerate(cells)
                if (m := c.of(name)) is not None and (times := getattr(m, clock)) is not None
            ]
            if found:
                label = name if clock == "graph" else f"{name}, eager"
                places, medians = zip(*found, strict=True)
                axes.plot(
                    places, medians, color=color, marker=marker, markersize=4, linewidth=1.4, ls=line, label=label
                )
    floors = [
        (i, 1e6 * first.bytes_of(phase) / top)
        for i, (c, top) in enumerate(cells)
        if top and (first := next((m for m in c.measurements if m.best), None)) is not None
    ]
    if floors:
        places, times = zip(*floors, strict=True)
        axes.plot(places, times, color=PARITY, linestyle="--", linewidth=0.9, label="bytes at the peer-write ceiling")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(axis="y", alpha=0.25)
    _ticks(axes, range(len(cells)), [c for c, _ in cells])
    axes.tick_params(which="minor", labelsize=7)
    axes.set_xlabel("")


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise MissingPackageError("matplotlib", "bench", "a plot of results") from problem
    return Figure, FigureCanvasAgg


def _finish(figure: Any, runs: Sequence[Run], subject: str, path: Path) -> None:
    """One legend for all panels, the devices, and the file."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), frameon=False
    )
    devices = ", ".join(dict.fromkeys(run.machine.device for run in runs))
    figure.suptitle(f"{subject} on {devices}", fontsize=12)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as problem:
        raise ConfigError(f"cannot write {path.name}: {problem}") from problem


def _times(axes: Any, cells: Sequence[Cell], contenders: Sequence[str], style: dict[str, Any], title: str) -> None:
    axes.set_title(title, fontsize=10)
    positions = range(len(cells))
    for name in contenders:
        found = [(i, c.floor, m.best) for i, c in enumerate(cells) if (m := c.of(name)) is not None and m.best]
        if not found:
            continue
        color, marker = style[name]
        gemms_only = any(m.role == GEMMS_ONLY for c in cells if (m := c.of(name)) is not None)
        middle = [best.median / floor for _, floor, best in found]
        axes.plot(
            [i for i, _, _ in found],
            middle,
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            linestyle=":" if gemms_only else "-",
            label=f"{name} (GEMMs only)" if gemms_only else name,
        )
        axes.fill_between(
            [i for i, _, _ in found],
            [best.p10 / floor for _, floor, best in found],
            [best.p90 / floor for _, floor, best in found],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    axes.axhline(1, color=PARITY, linestyle="--", linewidth=0.9)
    if axes.get_ylim()[1] > LINEAR_UP_TO:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.8, axes.get_ylim()[0]))
    axes.grid(axis="y", alpha=0.25)
    _ticks(axes, positions, cells)


def _bars(axes: Any, cells: Sequence[Cell], contenders: Sequence[str], style: dict[str, Any]) -> None:
    ratios = _ratios(cells, contenders)
    width = 0.8 / max(1, len(ratios))
    for index, (peer, values) in enumerate(ratios.items()):
        offset = (index - (len(ratios) - 1) / 2) * width
        bars = [(i + offset, value) for i, value in enumerate(values) if value is not None]
        # From 1: up is faster, down is slower.
        axes.bar([x for x, _ in bars], [v - 1 for _, v in bars], width * 0.92, bottom=1, color=style[peer][0])
    axes.axhline(1, color=PARITY, linewidth=0.9)
    axes.grid(axis="y", alpha=0.25)
    _ticks(axes, range(len(cells)), cells)


def _ratios(cells: Sequence[Cell], contenders: Sequence[str]) -> dict[str, list[float | None]]:
    """Of the first strategy to each peer, cell by cell; peers without any ratio are left out."""
    own = names(cells, STRATEGY)
    if not own:
        return {}
    peers = names(cells, PEER)
    found = {peer: [ratio(cell, own[0], peer) for cell in cells] for peer in contenders if peer in peers}
    return {peer: values for peer, values in found.items() if any(value is not None for value in values)}


def _ticks(axes: Any, positions: range, cells: Sequence[Cell | CommCell]) -> None:
    axes.set_xticks(list(positions), [str(cell.tokens) for cell in cells], fontsize=8)
    axes.set_xlabel("tokens", fontsize=8)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
