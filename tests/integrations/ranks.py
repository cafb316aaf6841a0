"""Run a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_on_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any, seconds: float = 120) -> None:
    """Call `function(*arguments)` on every rank; what one of them raises is raised here.

    Raises TimeoutError, and ends all ranks, when they take longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        context = torch.multiprocessing.spawn(
            _run, (num_ranks, store, seconds, function, arguments), nprocs=num_ranks, join=False
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} took longer than {seconds} s on {num_ranks} ranks")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()


def _run(
    rank: int, num_ranks: int, store: Path, seconds: float, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=num_ranks, timeout=timedelta(seconds=seconds)
    )
    function(*arguments)
    dist.destroy_process_group()
