"""`moe-plugin tune`: measured tile tables for this device."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_plugin.bench.experts import ALL_PRESETS, DTYPES, DeviceLostError, Sweep
from moe_plugin.bench.tune import DEFAULT_BUDGET, Outcome, Search
from moe_plugin.bench.tune import tune as run_tuning
from moe_plugin.cli.bench import chosen_device, listed, numbers, wide_console
from moe_plugin.cli.launch import TracebackOption, clear_errors
from moe_plugin.errors import ConfigError
from moe_plugin.kernels.hopper_tiling import HopperTiles
from moe_plugin.kernels.tile_tables import ENVIRONMENT_VARIABLE, Tiles, block_rows, user_folder
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
    time_budget: Annotated[
        float, typer.Option(help="Seconds of measuring per number of rows; compiling comes on top.")
    ] = DEFAULT_BUDGET,
    again: Annotated[bool, typer.Option("--again", help="Measure entries of this Triton version again, too.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, tokens and routing.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cuda or cpu.")] = "auto",
    traceback: TracebackOption = False,
) -> None:
    """Find the fastest tiles of the Triton experts on this device and write them down.

    Weights are random, routing is uniform. A table is written after each number of rows, so that an interrupted run
    leaves what it found, and the same command goes on from there. Exit code 1 when nothing right was found for some
    rows or the device was lost, 128 plus the signal's number when interrupted.
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
        folder = out or user_folder() or DEFAULT_OUT
        _make_writable(folder)
        if traceback:
            logging.basicConfig(format="%(message)s")
            logging.getLogger("moe_plugin.bench").setLevel(logging.DEBUG)
        outcomes, stopped = _run(sweep, folder, again)
        _print_summary(wide_console(), outcomes, folder)
    if stopped is not None:
        raise typer.Exit(stopped)
    if any(outcome.entry is None for outcome in outcomes):
        raise typer.Exit(1)


def _run(sweep: Sweep, folder: Path, again: bool) -> tuple[list[Outcome], int | None]:
    """What was found, with progress on stderr, and the exit code where the run ended early."""
    outcomes: list[Outcome] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[candidate]}"),
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console) as progress, _signals() as received:
        task = progress.add_task("tuning", total=sweep.num_cells, candidate="")

        def check_signals() -> None:
            # An exception raised in a finalizer, where signals may also arrive, is lost.
            if received:
                raise KeyboardInterrupt

        def report(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.update(task, advance=1, candidate="")
            console.print(f"[{len(outcomes)}/{sweep.num_cells}] {_line(outcome)}", markup=False)
            check_signals()

        def step(search: Search) -> None:
            best = search.best()
            found = "none yet" if best is None else f"best {best.microseconds:.1f} us"
            rows = search.inputs.tokens
            progress.update(task, candidate=f"{rows} rows, {len(search.times)} candidates, {found}")
            check_signals()

        try:
            run_tuning(sweep, folder, again, report, step)
        except KeyboardInterrupt:
            number = received[0] if received else signal.SIGINT
            console.print(f"stopped after {len(outcomes)} of {sweep.num_cells}; the same command goes on from here")
            return outcomes, 128 + number
        except DeviceLostError as problem:
            console.print(f"stopped after {len(outcomes)} of {sweep.num_cells}: {problem}", markup=False)
            return outcomes, 1
    return outcomes, None


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


def _line(outcome: Outcome) -> str:
    where = f"{outcome.layer} {outcome.dtype} {outcome.rows} rows"
    entry = outcome.entry
    if entry is None:
        return (
            f"{where}: nothing ran and was right ({outcome.failed} failed, {outcome.wrong} wrong; --traceback says why)"
        )
    if outcome.kept:
        return f"{where}: kept, {entry.microseconds:.1f} us, {describe_tiles(entry.tiles)}"
    return (
        f"{where}: {entry.microseconds:.1f} us, before {_time(outcome.before)}, heuristic {_time(outcome.heuristic)}; "
        f"{describe_tiles(entry.tiles)}; {outcome.tried} candidates, {outcome.failed} failed, {outcome.wrong} wrong"
    )


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


def _print_summary(console: Console, outcomes: list[Outcome], folder: Path) -> None:
    if not outcomes:
        return
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
    console.print(table)
    for path in dict.fromkeys(outcome.path for outcome in outcomes if outcome.entry is not None):
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)
    if os.environ.get(ENVIRONMENT_VARIABLE) != str(folder):
        console.print(f"to use them: export {ENVIRONMENT_VARIABLE}={escape(str(folder.resolve()))}", soft_wrap=True)


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
