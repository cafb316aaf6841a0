"""`moe-plugin tune`: measured tile and layout tables for this device."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_plugin.bench.experts import ALL_PRESETS, DTYPES, DeviceLostError, Sweep, layer_config
from moe_plugin.bench.tune import DEFAULT_BUDGET, Outcome, Search
from moe_plugin.bench.tune import tune as run_tuning
from moe_plugin.bench.tune_layouts import LayoutOutcome, layout_cells, layout_places, tune_layouts
from moe_plugin.cli.bench import chosen_device, listed, numbers, wide_console
from moe_plugin.cli.launch import TracebackOption, clear_errors
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError
from moe_plugin.experts.deep_gemm_hybrid import DeepGemmHybrid
from moe_plugin.experts.layout_tables import LAYOUTS, LayoutEntry
from moe_plugin.experts.triton_fused_moe import TritonFusedMoE
from moe_plugin.kernels.hopper_tiling import HopperTiles
from moe_plugin.kernels.measured_tables import ENVIRONMENT_VARIABLE, forget_tables, user_folder
from moe_plugin.kernels.tile_tables import Entry, Tiles, block_rows
from moe_plugin.presets import PRESETS

TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
DEFAULT_OUT = Path("tile_tables")


def tune(
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Whose layer: {', '.join(PRESETS)}; all: {', '.join(ALL_PRESETS)}. Repeat or list by commas."
        ),
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="A layer of your own: E,K,H,I, with the I of one rank. Repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"fp8 (that is fp8_block), {', '.join(DTYPES)}; bf16 if left out. Repeat or list by commas."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of rows, by commas; others use the nearest.")] = TOKENS,
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder of the tables; that of {ENVIRONMENT_VARIABLE}, else {DEFAULT_OUT}, if left out.",
            file_okay=False,
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{TritonFusedMoE.name}: its tiles; {DeepGemmHybrid.name}: its layout by number of rows. Both, if the "
            "second runs here, when left out. Repeat or list by commas."
        ),
    ] = None,
    time_budget: Annotated[
        float, typer.Option(help="Seconds of measuring per number of rows; compiling comes on top.")
    ] = DEFAULT_BUDGET,
    again: Annotated[bool, typer.Option("--again", help="Measure entries of these versions again, too.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, tokens and routing.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cuda or cpu.")] = "auto",
    traceback: TracebackOption = False,
) -> None:
    """Find the fastest tiles and layouts of the experts on this device and write them down.

    Tiles of the Triton kernels come first, then the layouts of DeepGEMM's, which are measured beside them. Weights are
    random, routing is uniform. A table is written after each number of rows, so that an interrupted run leaves what it
    found, and the same command goes on from there. Exit code 1 when nothing right was found for some rows or the device
    was lost, 128 plus the signal's number when interrupted.
    """
    with clear_errors(traceback):
        sweep = Sweep(
            layers=(*listed(preset), *(layer or ())),
            tokens=numbers(tokens),
            dtypes=listed(dtype) or ("bf16",),
            seed=seed,
            time_budget=time_budget,
            device=chosen_device(device),
        )
        classes = _chosen_experts(listed(experts), sweep)
        folder = out or user_folder() or DEFAULT_OUT
        if DeepGemmHybrid.name in classes:
            layout_places(sweep, folder)  # what cannot be is said before minutes go into tiles
        _make_writable(folder)
        if traceback:
            logging.basicConfig(format="%(message)s")
            logging.getLogger("moe_plugin.bench").setLevel(logging.DEBUG)
        outcomes, stopped = _run(sweep, classes, folder, again)
        _print_summary(wide_console(), outcomes, folder)
    if stopped is not None:
        raise typer.Exit(stopped)
    if any(outcome.entry is None for outcome in outcomes):
        raise typer.Exit(1)


AnyOutcome: TypeAlias = Outcome | LayoutOutcome


def _chosen_experts(names: tuple[str, ...], sweep: Sweep) -> tuple[str, ...]:
    known = (TritonFusedMoE.name, DeepGemmHybrid.name)
    for name in names:
        if name not in known:
            raise ConfigError(f"nothing of experts {name!r} is tuned; known: {', '.join(known)}")
    if names:
        return tuple(name for name in known if name in names)
    environment = Environment.probe(sweep.device)
    configs = [layer_config(layer, dtype) for layer in sweep.layers for dtype in sweep.dtypes]
    runs = all(DeepGemmHybrid.supports(config, environment).ok for config in configs)
    return known if runs else known[:1]


def _run(sweep: Sweep, classes: tuple[str, ...], folder: Path, again: bool) -> tuple[list[AnyOutcome], int | None]:
    """What was found, with progress on stderr, and the exit code where the run ended early."""
    outcomes: list[AnyOutcome] = []
    layouts = len(sweep.layers) * len(sweep.dtypes) * len(layout_cells(sweep))
    total = sweep.num_cells * (TritonFusedMoE.name in classes) + layouts * (DeepGemmHybrid.name in classes)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[candidate]}"),
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console) as progress, _signals() as received:
        task = progress.add_task("tuning", total=total, candidate="")

        def check_signals() -> None:
            # An exception raised in a finalizer, where signals may also arrive, is lost.
            if received:
                raise KeyboardInterrupt

        def report(outcome: AnyOutcome) -> None:
            outcomes.append(outcome)
            progress.update(task, advance=1, candidate="")
            console.print(f"[{len(outcomes)}/{total}] {_line(outcome)}", markup=False)
            check_signals()

        def step(search: Search) -> None:
            best = search.best()
            found = "none yet" if best is None else f"best {best.microseconds:.1f} us"
            rows = search.inputs.tokens
            progress.update(task, candidate=f"{rows} rows, {len(search.times)} candidates, {found}")
            check_signals()

        try:
            if TritonFusedMoE.name in classes:
                run_tuning(sweep, folder, again, report, step)
            if DeepGemmHybrid.name in classes:
                # Beside the layouts the Triton experts run in the tiles just found.
                with _environment(ENVIRONMENT_VARIABLE, str(folder)):
                    tune_layouts(sweep, folder, again, report)
        except KeyboardInterrupt:
            number = received[0] if received else signal.SIGINT
            console.print(f"stopped after {len(outcomes)} of {total}; the same command goes on from here")
            return outcomes, 128 + number
        except DeviceLostError as problem:
            console.print(f"stopped after {len(outcomes)} of {total}: {problem}", markup=False)
            return outcomes, 1
    return outcomes, None


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    forget_tables()
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        forget_tables()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Let SIGTERM interrupt as Ctrl-C does; the signals received."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(outcome: AnyOutcome) -> str:
    where = f"{outcome.layer} {outcome.dtype} {outcome.rows} rows"
    if isinstance(outcome, LayoutOutcome):
        where += f" {outcome.activation_format.value}"
    if outcome.entry is None:
        found = f"nothing ran and was right ({_out(outcome)}; --traceback says why)"
    elif isinstance(outcome, LayoutOutcome):
        found = _layout_line(outcome, outcome.entry)
    else:
        found = _tiles_line(outcome, outcome.entry)
    return f"{where}: {'kept, ' if outcome.kept else ''}{found}"


def _layout_line(outcome: LayoutOutcome, entry: LayoutEntry) -> str:
    times = sorted(entry.microseconds.items(), key=lambda item: item[1])
    words = f"{entry.layout}; {', '.join(f'{layout} {_time(time)} us' for layout, time in times)}"
    return words if outcome.kept else f"{words}; {_out(outcome)}"


def _tiles_line(outcome: Outcome, entry: Entry) -> str:
    if outcome.kept:
        return f"{entry.microseconds:.1f} us, {describe_tiles(entry.tiles)}"
    return (
        f"{entry.microseconds:.1f} us, before {_time(outcome.before)}, heuristic {_time(outcome.heuristic)}; "
        f"{describe_tiles(entry.tiles)}; {outcome.tried} candidates, {_out(outcome)}"
    )


def _out(outcome: AnyOutcome) -> str:
    return f"{outcome.failed} failed, {outcome.wrong} wrong"


def describe_tiles(tiles: Tiles) -> str:
    """Tiles in a few words: rows of a block, then the rest of each GEMM's tile."""
    if isinstance(tiles, HopperTiles):
        kind = "wide" if tiles.gate_up.wide else "narrow"
        parts = [
            f"{name} {tile.half_w}/{tile.group}" for name, tile in (("gate_up", tiles.gate_up), ("down", tiles.down))
        ]
    else:
        kind = "portable"
        parts = [
            f"{name} {block.block_n}x{block.block_k}/{block.group_m} w{block.num_warps} s{block.num_stages}"
            for name, block in (("gate_up", tiles.gate_up), ("down", tiles.down))
        ]
    return f"{kind} {block_rows(tiles)}, {', '.join(parts)}"


def _print_summary(console: Console, outcomes: list[AnyOutcome], folder: Path) -> None:
    if not outcomes:
        return
    tiles = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
    layouts = [outcome for outcome in outcomes if isinstance(outcome, LayoutOutcome)]
    if tiles:
        console.print(_tiles_table(tiles))
    if layouts:
        console.print(_layouts_table(layouts))
    for path in dict.fromkeys(outcome.path for outcome in outcomes if outcome.entry is not None):
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)
    if os.environ.get(ENVIRONMENT_VARIABLE) != str(folder):
        console.print(f"to use them: export {ENVIRONMENT_VARIABLE}={escape(str(folder.resolve()))}", soft_wrap=True)


def _layouts_table(outcomes: list[LayoutOutcome]) -> Table:
    table = Table(title="Microseconds of the whole layer by layout; gain over the untuned one")
    for name in ("layer", "dtype", "format", "rows", *LAYOUTS, "taken", "gain", "failed", "wrong"):
        text = name in ("layer", "dtype", "format", "taken")
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    for outcome in outcomes:
        entry, untuned = outcome.entry, outcome.default
        times = entry.microseconds if entry is not None else {}
        gain = f"{untuned / times[entry.layout]:.2f}x" if entry is not None and untuned is not None else ""
        table.add_row(
            *(outcome.layer, outcome.dtype, outcome.activation_format.value, str(outcome.rows)),
            *(_time(times.get(layout)) for layout in LAYOUTS),
            *(entry.layout if entry is not None else "", gain),
            *(("kept", "") if outcome.kept else (str(outcome.failed), str(outcome.wrong))),
        )
    return table


def _tiles_table(outcomes: list[Outcome]) -> Table:
    table = Table(title="Microseconds of the whole layer")
    for name in ("layer", "dtype", "rows", "before", "heuristic", "now", "gain", "tried", "failed", "wrong", "tiles"):
        table.add_column(name, justify="left" if name in ("layer", "dtype", "tiles") else "right", no_wrap=True)
    for outcome in outcomes:
        entry, untuned = outcome.entry, outcome.heuristic
        gain = f"{untuned / entry.microseconds:.2f}x" if entry is not None and untuned is not None else ""
        counts = ("kept", "", "") if outcome.kept else (str(outcome.tried), str(outcome.failed), str(outcome.wrong))
        table.add_row(
            *(outcome.layer, outcome.dtype, str(outcome.rows), _time(outcome.before), _time(untuned)),
            *(_time(entry.microseconds if entry else None), gain, *counts),
            describe_tiles(entry.tiles) if entry else "",
        )
    return table


def _time(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:.1f}"


def _make_writable(folder: Path) -> None:
    """Minutes of measuring must not end in a folder that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"cannot write to {folder}: {problem.strerror}") from problem
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write to {folder}: no permission")
