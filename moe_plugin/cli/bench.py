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
from rich.table import Table

from moe_plugin.bench import summary
from moe_plugin.bench.comm import CommSweep, run_comm_sweep
from moe_plugin.bench.comm_peers import PEERS as COMM_PEERS
from moe_plugin.bench.contenders import PEERS
from moe_plugin.bench.ep_layer import PEERS as LAYER_PEERS
from moe_plugin.bench.ep_layer import LayerSweep, run_layer_sweep
from moe_plugin.bench.experts import ALL_PRESETS, DTYPES, DeviceLostError, Sweep, run_sweep
from moe_plugin.bench.layers import SKEWS
from moe_plugin.bench.plot import draw, draw_comm
from moe_plugin.bench.results import FAILED, STRATEGY, WRONG, Cell, CommCell, MachineFacts, Run, to_csv
from moe_plugin.bench.routing import RoutingCell, RoutingRun, RoutingSettings, routing_table, run_routing
from moe_plugin.cli.launch import TracebackOption, clear_errors
from moe_plugin.errors import ConfigError
from moe_plugin.presets import PRESETS
from moe_plugin.testing.rank_pool import RankError

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
    if _is_incomplete(sweep, results):
        raise typer.Exit(1)


@app.command()
def layer(
    preset: Annotated[
        list[str] | None, typer.Option(help=f"Whose layer: {', '.join(PRESETS)}. Repeat or list by commas.")
    ] = None,
    layer: Annotated[list[str] | None, typer.Option(help="A layer of your own: E,K,H,I. Repeatable.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens of each rank, by commas.")] = "8,64,128,512,2048,4096",
    world: Annotated[int, typer.Option(help="Ranks, one process and one GPU each.")] = 4,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"fp8 (that is fp8_block), {', '.join(DTYPES)}; bf16 if left out. Repeat or list by commas."),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"Compare with: {', '.join(LAYER_PEERS)}. Repeat or list by commas.")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="What to measure; nccl_all_to_all+triton_fused_moe if left out. Repeatable."),
    ] = None,
    skew: Annotated[str, typer.Option(help=f"How tokens choose experts: {', '.join(SKEWS)}.")] = "uniform",
    time_budget: Annotated[float, typer.Option(help="Seconds of measuring per contender and cell.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of weights, tokens and routing.")] = 0,
    device: Annotated[str, typer.Option(help="auto (GPUs if there are any), cuda or cpu.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write results here, after every cell.", dir_okay=False)
    ] = None,
    traceback: TracebackOption = False,
) -> None:
    """Time whole expert-parallel layers over several ranks: dispatch, experts and combine, beside other libraries.

    All ranks start together, and the time is that of the slowest. A sample of every rank's rows is compared with the
    oracle first, and a wrong result has no times. Exit code 1 when a strategy of this package was wrong or failed.
    """
    with clear_errors(traceback):
        sweep = LayerSweep(
            layers=(*listed(preset), *(layer or ())),
            tokens=numbers(tokens),
            dtypes=listed(dtype) or ("bf16",),
            strategies=tuple(strategy or ("nccl_all_to_all+triton_fused_moe",)),
            peers=listed(peer),
            skew=skew,
            seed=seed,
            time_budget=time_budget,
            device=chosen_device(device),
            world=world,
        )
        _check_writable(json_file)
        if traceback:
            logging.basicConfig(format="%(message)s")
            logging.getLogger("moe_plugin.bench").setLevel(logging.DEBUG)
        results = _run(sweep, json_file)
        _print_summary(wide_console(), results)
    if _is_incomplete(sweep, results):
        raise typer.Exit(1)


@app.command()
def comm(
    preset: Annotated[
        list[str] | None, typer.Option(help=f"Whose layer: {', '.join(PRESETS)}. Repeat or list by commas.")
    ] = None,
    layer: Annotated[list[str] | None, typer.Option(help="A layer of your own: E,K,H,I. Repeatable.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens of each rank, by commas.")] = "8,128,4096",
    world: Annotated[
        int | None, typer.Option(help="Ranks, one process and one GPU each; all GPUs, on a CPU 2, if left out.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"fp8 (that is fp8_block), {', '.join(DTYPES)}; bf16 if left out. Repeat or list by commas."),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"Compare with: {', '.join(COMM_PEERS)}. Repeat or list by commas.")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="The dispatching half of strategies, e.g. nccl_all_to_all, or one way of it, "
            "hybrid_dense_routing:permute, or all. Repeat or list by commas."
        ),
    ] = None,
    skew: Annotated[str, typer.Option(help=f"How tokens choose experts: {', '.join(SKEWS)}.")] = "uniform",
    time_budget: Annotated[float, typer.Option(help="Seconds of measuring per contender and cell.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of tokens and routing.")] = 0,
    device: Annotated[str, typer.Option(help="auto (GPUs if there are any), cuda or cpu.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write results here, after every cell.", dir_okay=False)
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw the results here (png, svg or pdf).", dir_okay=False)
    ] = None,
    traceback: TracebackOption = False,
) -> None:
    """Time dispatch and combine alone over several ranks, experts left out, beside what else moves tokens.

    All ranks start together, and the time is that of the slowest. Results are compared with the oracle first, and a
    wrong one has no times. Exit code 1 when a strategy of this package was wrong or failed.
    """
    with clear_errors(traceback):
        where = chosen_device(device)
        sweep = CommSweep(
            layers=(*listed(preset), *(layer or ())),
            tokens=numbers(tokens),
            dtypes=listed(dtype) or ("bf16",),
            strategies=listed(strategy) or ("all",),
            peers=listed(peer),
            skew=skew,
            seed=seed,
            time_budget=time_budget,
            device=where,
            world=world or (torch.cuda.device_count() if where == "cuda" else 2),
        )
        for file in (json_file, plot_file):
            _check_writable(file)
        if traceback:
            logging.basicConfig(format="%(message)s")
            logging.getLogger("moe_plugin.bench").setLevel(logging.DEBUG)
        results = _run_comm(sweep, json_file)
        found = [m for cell in results.comm for m in cell.measurements]
        if plot_file is not None and any(m.best for m in found):
            draw_comm([results], plot_file)
    if len(results.comm) < sweep.num_cells or any(m.role == STRATEGY and m.status in (WRONG, FAILED) for m in found):
        raise typer.Exit(1)


@app.command()
def routing(
    tokens: Annotated[str, typer.Option(help="Tokens of each rank, by commas.")] = "128,4096",
    num_experts: Annotated[int, typer.Option(help="Experts of all ranks together.")] = 256,
    top_k: Annotated[int, typer.Option(help="Experts that a token chooses.")] = 8,
    world: Annotated[int, typer.Option(help="Ranks whose routing is prepared, on one device, as rank 0 does it.")] = 4,
    all_gather: Annotated[
        bool,
        typer.Option("--all-gather", help="On that many ranks, one process and one GPU each, which gather it first."),
    ] = False,
    time_budget: Annotated[float, typer.Option(help="Seconds of measuring per contender and token count.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of the routing.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cuda or cpu.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write results here, after every token count.", dir_okay=False)
    ] = None,
    traceback: TracebackOption = False,
) -> None:
    """Time how ranks find out where tokens go: the dense scan, a sparse map, and sorting.

    With and without permute (places in expert-grouped buffers) and probabilities (router weights in that order); with
    the all-gather, over NVLink and NCCL, times are those of the slowest rank. A result is compared with a plain
    construction first, and a wrong one has no times. Exit code 1 when one was wrong or failed.
    """
    with clear_errors(traceback):
        settings = RoutingSettings(
            tokens=numbers(tokens),
            num_experts=num_experts,
            top_k=top_k,
            world=world,
            seed=seed,
            time_budget=time_budget,
            device=chosen_device(device),
            all_gather=all_gather,
        )
        _check_writable(json_file)
        console = wide_console()
        console.print(f"repeat with: {escape(settings.command)}", soft_wrap=True)

        def report(run: RoutingRun, cell: RoutingCell) -> None:
            if len(run.cells) == 1:
                console.print(escape(_machine_line(run.machine)), soft_wrap=True)
            if json_file is not None:
                run.save(json_file)
            console.print(routing_table(run, cell))

        results = run_routing(settings, report)
    if any(m.status in (WRONG, FAILED) for cell in results.cells for m in cell.measurements):
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
        if any(run.comm for run in runs):
            if any(run.cells for run in runs):
                raise ConfigError("results of `bench comm` make a picture of their own: draw them apart from others")
            draw_comm(runs, out)
        else:
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
            if run.comm:
                _print_comm_head(console, run)
                for comm_cell in run.comm:
                    console.print(summary.comm_table(comm_cell, run.ceilings.peer_write_bytes_per_second))
                continue
            _print_head(console, run)
            blocks: dict[tuple[str, str], list[Cell]] = {}
            for cell in run.cells:
                blocks.setdefault((cell.layer.name, cell.dtype), []).append(cell)
            for cells in blocks.values():
                console.print(_table(run, cells))
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
            console.print(_table(run, block))
            block.clear()

    try:
        return run_layer_sweep(sweep, report) if isinstance(sweep, LayerSweep) else run_sweep(sweep, report)
    except (DeviceLostError, RankError, KeyboardInterrupt) as problem:
        if not latest:
            raise
        progress.print(f"stopped after {len(latest[0].cells)} of {sweep.num_cells} cells: {problem or 'interrupted'}")
        if block:
            console.print(_table(latest[0], block))
        return latest[0]


def _run_comm(sweep: CommSweep, json_file: Path | None) -> Run:
    """The sweep with its progress on stderr and a table per cell on stdout."""
    console, progress = wide_console(), Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    latest: list[Run] = []

    def report(run: Run, cell: CommCell) -> None:
        latest[:] = [run]
        if len(run.comm) == 1:
            _print_comm_head(console, run)
        if json_file is not None:
            run.save(json_file)
        progress.print(f"[{len(run.comm)}/{sweep.num_cells}] {summary.comm_line(cell)}")
        console.print(summary.comm_table(cell, run.ceilings.peer_write_bytes_per_second))

    try:
        run, left_out = run_comm_sweep(sweep, report)
    except KeyboardInterrupt:
        if not latest:
            raise
        progress.print(f"interrupted after {len(latest[0].comm)} of {sweep.num_cells} cells")
        return latest[0]
    for name, reason in left_out.items():
        progress.print(f"left out: {name} ({reason})")
    return run


def _print_comm_head(console: Console, run: Run) -> None:
    console.print(f"repeat with: {escape(run.command)}", soft_wrap=True)
    console.print(escape(_machine_line(run.machine)), soft_wrap=True)
    ceilings = run.ceilings
    if ceilings.peer_write_bytes_per_second is not None:
        console.print(f"measured ceiling: {ceilings.peer_write_bytes_per_second / 1e9:.0f} GB/s written to peers")
    if ceilings.graph_overhead is not None:
        console.print(f"a step of one tiny kernel in a graph: {ceilings.graph_overhead:.1f} us")
    console.print(
        "microseconds of the slowest rank; GB/s count the payload rows that leave the busiest GPU, once for each other "
        "rank that needs them; ratio = the fastest peer's time over this contender's",
        soft_wrap=True,
    )


def _table(run: Run, cells: list[Cell]) -> Table:
    """The cells of one (layer, dtype)."""
    if run.settings.world > 1:
        return summary.layer_table(cells, run.settings.world)
    return summary.block_table(cells, run.settings.strategies[0])


def _is_incomplete(sweep: Sweep, results: Run) -> bool:
    """Whether a strategy of this package was wrong or failed, or cells are missing."""
    found = [m for cell in results.cells for m in cell.measurements if m.role == STRATEGY]
    return len(results.cells) < sweep.num_cells or any(m.status in (WRONG, FAILED) for m in found)


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
