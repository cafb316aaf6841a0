"""`moe-plugin warmup`: compile all that a layer's experts can reach, before a server starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_plugin.bench.experts import layer_config
from moe_plugin.cli.bench import chosen_device
from moe_plugin.cli.explain import DtypeName, MaxTokensOption, PresetOption, TpOption, WorldOption
from moe_plugin.cli.launch import StrategyOption, TracebackOption, clear_errors
from moe_plugin.compat.deep_gemm import jit_settings
from moe_plugin.config import ParallelConfig
from moe_plugin.errors import MemoryLimitError
from moe_plugin.experts.deep_gemm_hybrid import DeepGemmHybrid
from moe_plugin.strategies.warmup import Step, steps_in_processes, warm_up_steps


def warmup(
    preset: PresetOption = "qwen3-30b",
    layer: Annotated[str | None, typer.Option(help="A layer of your own instead: E,K,H,I, over all ranks.")] = None,
    moe_strategy: StrategyOption = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="Activation dtype, or an fp8 scheme.")] = DtypeName.BF16,
    world: WorldOption = 1,
    tp: TpOption = 1,
    max_tokens: MaxTokensOption = 4096,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="The layer will be captured in a CUDA graph.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that compile at once, each with weights and workspaces of its own.")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cuda or cpu.")] = "auto",
    traceback: TracebackOption = False,
) -> None:
    """Compile every kernel that the experts of a layer can reach, so that no call and no collective waits for them.

    One rank's weights and workspaces have to fit the device. Run it once per machine and layer, with what the layer
    will be built with; processes that start later find all kernels on disk.
    """
    with clear_errors(traceback):
        where = chosen_device(device)
        config = layer_config(
            layer or preset,
            dtype.value,
            parallel=ParallelConfig(ep_size=world, tp_size=tp),
            max_tokens_per_rank=max_tokens,
            cuda_graph=cuda_graph,
        )
        report, steps = warm_up_steps(config, moe_strategy, device=where)
        typer.echo(report.line())
        if DeepGemmHybrid.name in report.chosen_text():
            settings = jit_settings()
            compiler = settings.compiler or "none"
            typer.echo(f"DeepGEMM: compiler {compiler}, kernels kept in {settings.cache_folder}")
        begin = time.perf_counter()
        with contextlib.ExitStack() as stack:
            try:
                if jobs > 1:
                    planned = stack.enter_context(steps_in_processes(config, moe_strategy, where, jobs))
                else:
                    stack.enter_context(torch.inference_mode())
                    planned = list(steps)
                _run(planned, where)
            except torch.OutOfMemoryError as problem:
                raise MemoryLimitError(
                    "the weights and workspaces of one rank do not fit this device: lower --max-tokens, or --jobs"
                ) from problem
        typer.echo(f"{len(planned)} calls made, everything compiled, in {time.perf_counter() - begin:.1f} s")


def _run(steps: Sequence[Step], device: str) -> None:
    """Make the calls, with progress on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("warming up", total=len(steps), what="")
        for what, call in steps:
            progress.update(task, what=what)
            call()
            progress.update(task, advance=1)
        if device == "cuda":
            torch.cuda.synchronize()
        progress.update(task, what="")
