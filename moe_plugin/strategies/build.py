"""From a configuration and this rank's weights to a layer that runs."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

import moe_plugin.strategies.registry as registry
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import MemoryLimitError, MoEPluginError
from moe_plugin.modular_kernel import Experts, ExpertWeights, ModularKernel, MoELayer, MonolithicKernel
from moe_plugin.strategies.agreement import agree
from moe_plugin.strategies.names import AUTO
from moe_plugin.strategies.phases import PhasedLayer
from moe_plugin.strategies.report import Entry, SelectionReport
from moe_plugin.strategies.selector import pair_classes, phase_config, select, survey
from moe_plugin.workspace import WorkspaceArena

logger = logging.getLogger(__name__)


def build(
    config: MoEConfig,
    w13: torch.Tensor,
    w2: torch.Tensor,
    strategy: str = AUTO,
    *,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    environment: Environment | None = None,
    arena: WorkspaceArena | None = None,
) -> MoELayer:
    """Choose a strategy and build the layer. Collective over the ranks of `config.parallel`.

    w13 [local_experts, 2I, H], gate rows first, and w2 [local_experts, H, I]: this rank's experts, in the order of its
    placement; w13_scale and w2_scale for fp8; w13_bias and w2_bias when config.has_bias.
    strategy: `auto`, a pair, an alias, or `decode=...,prefill=...`.
    environment: the machine, probed when None. arena: workspace memory, shared by all layers on a device when None.

    Raises, on all ranks alike: StrategyError subclasses, ShapeError or DtypeError for weights that do not fit,
    MemoryLimitError when the workspace cannot fit the device.
    """
    weights = ExpertWeights(w13=w13, w2=w2, w13_scale=w13_scale, w2_scale=w2_scale, w13_bias=w13_bias, w2_bias=w2_bias)
    environment = environment or Environment.probe(w13.device.type)
    report, problem = None, None
    try:
        weights.check(config)
        report = select(config, strategy, environment)
        _check_memory(config, report, environment)
    except MoEPluginError as found:
        problem = found
    fields = config.shared_fields() | {"strategy": str(dict(report.chosen)) if report else ""}
    agree(config.parallel, fields, problem)
    assert report is not None
    if w2_bias is not None and config.parallel.tp_rank > 0:
        # TP ranks add up their outputs, and the bias belongs into the sum once.
        weights = replace(weights, w2_bias=torch.zeros_like(w2_bias))
    # What a layer keeps is written by every call, in inference mode or not.
    with torch.inference_mode(False):
        layer = _assemble(config, report, weights, arena or WorkspaceArena.shared(w13.device))
    layer.report = report
    logger.debug("built %s", report.line())
    return layer


def _assemble(config: MoEConfig, report: SelectionReport, weights: ExpertWeights, arena: WorkspaceArena) -> MoELayer:
    decode, prefill = report.chosen["decode"], report.chosen["prefill"]
    assert decode is not None and prefill is not None
    if not report.is_phased:
        return _layer(config, decode, weights, arena, {})
    prepared: dict[type[Experts], ExpertWeights] = {}
    layers = [
        _layer(phase_config(config, phase), name, weights, arena, prepared)
        for phase, name in (("decode", decode), ("prefill", prefill))
    ]
    return PhasedLayer(*layers)


def _layer(
    config: MoEConfig,
    name: str,
    weights: ExpertWeights,
    arena: WorkspaceArena,
    prepared: dict[type[Experts], ExpertWeights],
) -> MoELayer:
    monolithic = registry.monolithic_classes.all().get(name)
    if monolithic is not None:
        return MonolithicKernel(monolithic(config, weights, arena))
    prepare_finalize, experts = pair_classes(name)
    # Phases with the same Experts class share one prepared copy of the weights.
    if experts not in prepared:
        prepared[experts] = experts.prepare_weights(config, weights)
    return ModularKernel(prepare_finalize(config, arena), experts(config, prepared[experts]))


def _check_memory(config: MoEConfig, report: SelectionReport, environment: Environment) -> None:
    for phase in report.chosen:
        entry = report.entry(phase)
        assert entry is not None
        if environment.memory_bytes and _needs(entry) > environment.memory_bytes:
            largest = _largest_max_tokens(config, entry.strategy, environment)
            raise MemoryLimitError(
                f"{entry.strategy} needs {_needs(entry) / 2**30:.1f} GiB of workspace for "
                f"max_tokens_per_rank={config.max_tokens_per_rank}, "
                f"the device has {environment.memory_bytes / 2**30:.1f} GiB; "
                f"the largest that fits is max_tokens_per_rank={largest}",
                largest,
            )


def _needs(entry: Entry) -> int:
    return entry.workspace_bytes + entry.extra_weight_bytes


def _largest_max_tokens(config: MoEConfig, strategy: str, environment: Environment) -> int:
    low, high = 0, config.max_tokens_per_rank
    while high - low > 1:
        middle = (low + high) // 2
        entries = survey(replace(config, max_tokens_per_rank=middle), environment)
        needed = next(_needs(entry) for entry in entries if entry.strategy == strategy)
        low, high = (middle, high) if needed <= environment.memory_bytes else (low, middle)
    return low
