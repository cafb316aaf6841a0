"""Compiling ahead: every kernel that the experts of a layer can reach, before the first call and collective."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.modular_kernel import Experts, ExpertWeights
from moe_plugin.quantization import has_static_activations, weight_scale_shapes
from moe_plugin.strategies.names import AUTO
from moe_plugin.strategies.registry import monolithic_classes
from moe_plugin.strategies.report import SelectionReport
from moe_plugin.strategies.selector import pair_classes, phase_config, select
from moe_plugin.workspace import WorkspaceArena

Step = tuple[str, Callable[[], object]]


def warm_up_steps(
    config: MoEConfig, strategy: str = AUTO, environment: Environment | None = None, device: str = "cuda"
) -> tuple[SelectionReport, Iterator[Step]]:
    """What would run, and the calls that compile it, in the order of their making: (what, call).

    Kernels end up in the caches of Triton and DeepGEMM on disk, from which every process of this machine takes them.
    The weights of this rank, all zero, are allocated with the first step, workspaces by the calls. No collective is
    among the steps, so that no rank waits for another that compiles; a configuration of many ranks needs no process
    groups. Raises StrategyError subclasses as `build` does.
    """
    report = select(config, strategy, environment or Environment.probe(device))
    return report, _steps(config, report, torch.device(device))


def _steps(config: MoEConfig, report: SelectionReport, device: torch.device) -> Iterator[Step]:
    arena, done = WorkspaceArena(device), set[tuple[type[Experts], int]]()
    weights: ExpertWeights | None = None
    for phase, name in report.chosen.items():
        assert name is not None
        if name in monolithic_classes.all():
            continue
        own = phase_config(config, phase) if report.is_phased else config
        _, experts = pair_classes(name)
        if (experts, own.max_received_rows) in done:
            continue
        done.add((experts, own.max_received_rows))
        weights = weights or zero_weights(config, device).canonical(config)
        yield from experts(own, experts.prepare_weights(own, weights)).warm_up_steps(arena)


def zero_weights(config: MoEConfig, device: torch.device) -> ExpertWeights:
    """This rank's weights of a layer, all zero, with scales of one."""
    experts, inner, hidden = config.num_local_experts, config.local_intermediate_size, config.hidden_size

    def zeros(*shape: int, dtype: torch.dtype = config.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    scales: dict[str, torch.Tensor] = {}
    if config.quantization is not None:
        shapes = weight_scale_shapes(config.quantization, experts, inner, hidden)
        scales = {name: torch.ones(forms[0], device=device) for name, forms in shapes.items()}
        if has_static_activations(config.quantization):
            scales |= {name: torch.ones(experts, device=device) for name in ("a13_scale", "a2_scale")}
    return ExpertWeights(
        w13=zeros(experts, 2 * inner, hidden, dtype=config.weight_dtype),
        w2=zeros(experts, hidden, inner, dtype=config.weight_dtype),
        w13_bias=zeros(experts, 2 * inner) if config.has_bias else None,
        w2_bias=zeros(experts, hidden) if config.has_bias else None,
        **scales,
    )


@contextmanager
def steps_in_processes(config: MoEConfig, strategy: str, device: str, jobs: int) -> Iterator[Sequence[Step]]:
    """The steps of `warm_up_steps`, made by `jobs` processes at once, each with weights and workspaces of its own.

    A call waits for its step and raises what that raised; steps that have not begun by the end of the context are
    dropped. Processes are spawned, since CUDA does not survive a fork; they choose the strategy anew.
    """
    arguments = (config, strategy, device)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        names = pool.submit(_names, *arguments).result()
        futures = [pool.submit(_make, *arguments, step) for step in range(len(names))]
        try:
            yield [(name, future.result) for name, future in zip(names, futures, strict=True)]
        finally:
            for future in futures:
                future.cancel()


@functools.lru_cache(maxsize=1)
def _planned(config: MoEConfig, strategy: str, device: str) -> list[Step]:
    """The steps in this process, with what its calls share."""
    with torch.inference_mode():
        return list(warm_up_steps(config, strategy, device=device)[1])


def _names(config: MoEConfig, strategy: str, device: str) -> list[str]:
    return [what for what, _ in _planned(config, strategy, device)]


def _make(config: MoEConfig, strategy: str, device: str, step: int) -> None:
    with torch.inference_mode():
        _planned(config, strategy, device)[step][1]()
        if device == "cuda":
            torch.cuda.synchronize()
