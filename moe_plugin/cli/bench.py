"""`moe-plugin bench`: how fast a layer is, next to other libraries, with everything needed to repeat it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from moe_plugin.bench import summary
from moe_plugin.bench.contenders import PEERS
from moe_plugin.bench.experts import ALL_PRESETS, DTYPES, DeviceLostError, Sweep, run_sweep
from moe_plugin.bench.layers import SKEWS
from moe_plugin.bench.plot import draw
from moe_plugin.bench.results import FAILED, STRATEGY, WRONG, Cell, MachineFacts, Run, to_csv
from moe_plugin.cli.launch import TracebackOption, clear_errors
from moe_plugin.errors import ConfigError
from moe_plugin.presets import PRESETS

app = typer.Typer(no_args_is_help=True, help="Measure layers next to other libraries, and draw the results.")

TABLE_WIDTH = 200
"""Columns of the tables where no terminal says otherwise."""


@app.command()
def experts(
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Whose layer: {', '.join(PRESETS)}; all: {', '.join(ALL_PRESETS)}. Repeat or list by commas."
        ),
    ] = None,
    layer: Annotated[list[str] | None, typer.Option(help="A layer of your own: E,K,H,I. Repeatable.")] = None,
    tokens: Annotated[str, typer.Option(help="Token counts, by commas.")] = "1,8,32,128,512,2048,8192",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"fp8 (that is fp8_block), {', '.join(DTYPES)}; bf16 if left out. Repeat or list by commas."),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"Compare with: {', '.join(PEERS)}. Repeat or list by commas.")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="What to measure; local+triton_fused_moe if left out. Repeatable; ratios refer to the first. "
            "batched+EXPERTS: the experts alone, on rows in the BatchedExperts format."
        ),
    ] = None,
    skew: Annotated[str, typer.Option(help=f"How tokens choose experts: {', '.join(SKEWS)}.")] = "uniform",
    time_budget: Annotated[float, typer.Option(help="Seconds of measuring per contender and cell.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of weights, tokens and routing.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cuda or cpu.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write results here, after every cell.", dir_okay=False)
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write one row per measurement here.", dir_okay=False)
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw the results here (png, svg or pdf).", dir_okay=False)
    ] = None,
    traceback: TracebackOption = False,
) -> None:
    """Time whole MoE layers on one device, tokens in to tokens out, beside other libraries.

    A result is compared with the oracle first, and a wrong one has no times. Exit code 1 when a strategy of this
    package was wrong or failed, or when the device was lost.
    """
    with clear_errors(traceback):
        sweep = Sweep(
            layers=(*listed(preset), *(layer or ())),
            tokens=numbers(tokens),
            dtypes=listed(dtype) or ("bf16",),
            strategies=tuple(strategy or ("local+triton_fused_moe",)),
            peers=listed(peer),
            skew=skew,
            seed=seed,
            time_budget=time_budget,
            device=chosen_device(device),
        )
        for file in (json_file, csv_file, plot_file):
            _check_writable(file)
        if traceback:
            logging.basicConfig(format="%(message)s")
            logging.getLogger("moe_plugin.bench").setLevel(logging.DEBUG)
        results = _run(sweep, json_file)
        # All that was measured is drawn and saved before the exit code tells of errors.
        console = wide_console()
        _print_summary(console, results)
        if csv_file is not None:
            csv_file.write_text(to_csv([results]), encoding="utf-8")
        if plot_file is not None and any(m.best for cell in results.cells for m in cell.measurements):
            draw([results], plot_file)
    finished = len(results.cells) == sweep.num_cells
    broken = any(
        m.role == STRATEGY and m.status in (WRONG, FAILED) for cell in results.cells for m in cell.measurements
    )
    if broken or not finished:
        raise typer.Exit(1)


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="Results that `--json` wrote; of equal cells the last counts.")],
    out: Annotated[Path, typer.Option(help="Where to draw (png, svg or pdf).", dir_okay=False)],
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write one row per measurement here, too.", dir_okay=False)
    ] = None,
    traceback: TracebackOption = False,
) -> None:
    """Draw committed results."""
    with clear_errors(traceback):
        for file in (out, csv_file):
            _check_writable(file)
        runs = [Run.load(file) for file in files]
        draw(runs, out)
        if csv_file is not None:
            csv_file.write_text(to_csv(runs), encoding="utf-8")


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="Results that `--json` wrote.")],
    traceback: TracebackOption = False,
) -> None:
    """Print the tables of committed results again."""
    with clear_errors(traceback):
        console = wide_console()
        for run in [Run.load(file) for file in files]:
            _print_head(console, run)
            blocks: dict[tuple[str, str], list[Cell]] = {}
            for cell in run.cells:
                blocks.setdefault((cell.layer.name, cell.dtype), []).append(cell)
            for cells in blocks.values():
                console.print(summary.block_table(cells, run.settings.strategies[0]))
            _print_summary(console, run)


def _run(sweep: Sweep, json_file: Path | None) -> Run:
    """The sweep with its progress on stderr and a table per (layer, dtype) on stdout."""
    console, progress = wide_console(), Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    latest: list[Run] = []
    block: list[Cell] = []

    def report(run: Run, cell: Cell) -> None:
        latest[:] = [run]
        if len(run.cells) == 1:
            _print_head(console, run)
        if json_file is not None:
            run.save(json_file)
        progress.print(f"[{len(run.cells)}/{sweep.num_cells}] {summary.line(cell, sweep.strategies[0])}")
        block.append(cell)
        if len(block) == len(sweep.tokens):
            console.print(summary.block_table(block, sweep.strategies[0]))
            block.clear()

    try:
        return run_sweep(sweep, report)
    except (DeviceLostError, KeyboardInterrupt) as problem:
        if not latest:
            raise
        progress.print(f"stopped after {len(latest[0].cells)} of {sweep.num_cells} cells: {problem or 'interrupted'}")
        if block:
            console.print(summary.block_table(block, sweep.strategies[0]))
        return latest[0]


def _print_head(console: Console, run: Run) -> None:
    console.print(f"repeat with: {escape(run.command)}", soft_wrap=True)
    console.print(escape(_machine_line(run.machine)), soft_wrap=True)
    ceilings = run.ceilings
    parts = [f"copy {ceilings.copy_bytes_per_second / 1e12:.3g} TB/s"]
    parts += [f"{name} matmul {rate / 1e12:.4g} TFLOP/s" for name, rate in ceilings.matmul_flops.items()]
    if ceilings.graph_overhead is not None:
        parts.append(f"an empty graph {ceilings.graph_overhead:.1f} us")
    console.print(f"measured ceilings: {', '.join(parts)}", soft_wrap=True)
    console.print(
        "TFLOP/s count 2*T*K*3*H*I; TB/s count weights and scales of the experts hit, inputs and output once; "
        "floor = the larger of both at the ceilings; ratio = the peer's time over ours",
        soft_wrap=True,
    )


def _print_summary(console: Console, run: Run) -> None:
    if summary.compare(run.cells):
        console.print(summary.comparison_table(run))
    for line in summary.target_lines(run):
        console.print(escape(line), soft_wrap=True)


def _machine_line(machine: MachineFacts) -> str:
    parts = [machine.device or machine.device_type, f"torch {machine.torch}", f"triton {machine.triton}"]
    if machine.device_type == "cuda":
        parts.insert(1, f"driver {machine.driver or 'unknown'}, CUDA {machine.cuda}")
    parts += [f"python {machine.python}", f"moe_plugin {machine.moe_plugin}"]
    return ", ".join(parts + [f"{name}: {version}" for name, version in machine.peers.items()])


def wide_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=TABLE_WIDTH)


def listed(values: list[str] | None) -> tuple[str, ...]:
    """Options that may be repeated and may hold several by commas."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError as problem:
        raise ConfigError(f"--tokens takes whole numbers by commas, got {text!r}") from problem


def chosen_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise ConfigError(f"--device must be auto, cuda or cpu, got {name!r} (CUDA_VISIBLE_DEVICES picks the GPU)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no GPU")
    return name


def _check_writable(file: Path | None) -> None:
    """Minutes of measuring must not end in a folder that is not there."""
    if file is not None and not file.resolve().parent.is_dir():
        raise ConfigError(f"cannot write {file}: there is no folder {file.parent}")
