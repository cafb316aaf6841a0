"""What the commands share: options, one-line errors, and bringing up a model on one or several ranks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
import typer

import moe_plugin
from moe_plugin.compat import deep_ep
from moe_plugin.config import ParallelConfig
from moe_plugin.errors import ConfigError, MissingPackageError, MoEPluginError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder or Hugging Face id of a model with experts; the embedded one if left out.")
]
StrategyOption = Annotated[
    str,
    typer.Option(
        "--moe_strategy",
        "--moe-strategy",
        help="auto, a pair <prepare_finalize>+<experts>, an alias, or decode=<pair>,prefill=<pair>.",
    ),
]
DtypeOption = Annotated[str, typer.Option(help="Of the weights: auto (as stored), bfloat16, float16 or float32.")]
DeviceOption = Annotated[str, typer.Option(help="auto (GPUs if there are any), cuda or cpu.")]
TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show the Python traceback of an error.")]

IDLE_LIMIT = timedelta(days=365)
"""How long the other ranks wait for rank 0's next request: a server may be idle for any time."""

STEP_LIMIT = timedelta(seconds=60)
"""How long the ranks wait for each other within a request. Longer than the MoE layers wait, whose errors say more."""


@contextlib.contextmanager
def clear_errors(traceback: bool = False) -> Iterator[None]:
    """Turn a MoEPluginError into one line on stderr and exit code 1; with `traceback`, let it pass."""
    try:
        yield
    except MoEPluginError as problem:
        if traceback:
            raise
        rank = f" (rank {os.environ.get('RANK', '?')})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        typer.echo(f"error{rank}: {' '.join(str(problem).split())}", err=True)
        raise typer.Exit(1) from problem


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that torchrun started; one of one without torchrun.

    device: where the model goes.
    requests, steps: gloo groups for what is not tensors on the device, None for one rank. `requests` is where the other
        ranks wait while rank 0 is idle; `steps`, whose waits end after `step_limit`, is for all within a request.
    """

    rank: int
    size: int
    device: torch.device
    requests: Any = None
    steps: Any = None
    step_limit: timedelta = STEP_LIMIT

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def parallel_config(self) -> ParallelConfig:
        """The experts spread over all ranks."""
        return ParallelConfig(ep_group=dist.group.WORLD) if self.size > 1 else ParallelConfig()


@contextlib.contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at a regular end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield Ranks(0, 1, place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        requests = dist.new_group(backend="gloo", timeout=IDLE_LIMIT)
        steps = dist.new_group(backend="gloo", timeout=STEP_LIMIT)
    except (RuntimeError, ValueError) as problem:
        raise ConfigError(f"WORLD_SIZE is {size}, but the ranks cannot meet: {problem}") from problem
    yield Ranks(dist.get_rank(), size, place, requests, steps)
    # Not after an error: the others may be gone, and there is nothing left to wait for.
    deep_ep.release_buffers()
    dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise ConfigError(f"--device must be auto, cuda or cpu, got {name!r} (CUDA_VISIBLE_DEVICES picks the GPU)")
    if name == "cpu":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        visible = torch.cuda.device_count()
        raise ConfigError(f"no GPU for local rank {local_rank}: {visible} visible (fewer ranks, or --device cpu)")
    return torch.device(name, local_rank)


def set_up_logging(ranks: Ranks) -> None:
    """Log to stderr, as other packages set themselves up to do: INFO on rank 0, warnings elsewhere."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s:     %(message)s"))
    ours = logging.getLogger("moe_plugin")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO if ranks.is_first else logging.WARNING)


def require_transformers(command: str) -> None:
    """Raise MissingPackageError unless everything that `moe-plugin serve` stands on is installed."""
    try:
        from transformers.utils.import_utils import is_serve_available
    except ImportError as problem:
        raise MissingPackageError("transformers", "serve", f"moe-plugin {command}") from problem
    if not is_serve_available():
        raise MissingPackageError("transformers[serving]", "serve", f"moe-plugin {command}")


def embedded_model() -> Path:
    """The tiny model of the repository, which installed packages carry inside."""
    package = Path(moe_plugin.__file__).resolve().parent
    for place in (package.parent / "examples" / "tiny_moe", package / "_tiny_moe"):
        if (place / "config.json").is_file():
            return place
    raise ConfigError("this installation has no embedded model; name a model")


def load_model(
    model: str | None, strategy: str, dtype: str, ranks: Ranks
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and build every layer of it with `strategy`. Collective over the ranks.

    Weights are read into host memory, cut to this rank's experts, and only then moved to the device.
    Raises ConfigError for a model that cannot be loaded or has no experts, and what `moe_plugin.build` raises.
    """
    from moe_plugin.integrations.transformers import activate

    # Checked before the wait for a large model.
    moe_plugin.parse_strategy(strategy)
    path = str(embedded_model()) if model is None else model
    loaded, tokenizer = _read_model(path, _dtype(dtype), quiet=not ranks.is_first)
    activate(loaded, strategy, ranks.parallel_config())
    loaded.to(ranks.device).eval()
    _run_once(loaded)
    return loaded, tokenizer


def _read_model(path: str, dtype: torch.dtype | str, quiet: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if quiet:
        transformers_logging.disable_progress_bar()
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise ConfigError(f"there is no model folder {path!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), tokenizer
    except (OSError, ValueError, SafetensorError) as problem:
        lines = str(problem).splitlines() or [type(problem).__name__]
        raise ConfigError(f"cannot load the model {path!r}: {lines[0]}") from problem


def _dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"--dtype must be auto, bfloat16, float16 or float32, got {name!r}")
    return dtype


def _run_once(model: PreTrainedModel) -> None:
    """Send one token through the model: layers are built now, and what cannot run says so before the first request."""
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
