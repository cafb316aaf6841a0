"""From a configuration and this rank's weights to a layer that runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

import moe_plugin.strategies.registry as registry
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import DtypeError, MemoryLimitError
from moe_plugin.modular_kernel import Experts, ExpertWeights, ModularKernel, MoELayer, MonolithicKernel
from moe_plugin.strategies.agreement import agree, gather
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
    a13_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    environment: Environment | None = None,
    arena: WorkspaceArena | None = None,
) -> MoELayer:
    """Choose a strategy and build the layer. Collective over the ranks of `config.parallel`.

    w13 [local_experts, 2I, H], gate rows first, and w2 [local_experts, H, I]: this rank's experts, in the order of its
    placement; w13_bias and w2_bias, in config.dtype, when config.has_bias.
    w13_scale, w2_scale: fp32, for fp8 weights, in a shape that moe_plugin.quantization lists; with static activations
    also a13_scale and a2_scale, each a scalar, [1] or [local_experts]. Ranks use the largest a13_scale of them all.
    strategy: `auto`, a pair, an alias, or `decode=...,prefill=...`.
    environment: the machine, probed when None. arena: workspace memory, shared by all layers on a device when None.

    Raises, on all ranks alike: StrategyError subclasses, ShapeError or DtypeError for weights that do not fit,
    MemoryLimitError when the workspace cannot fit the device.
    """
    given = {"w13": w13, "w2": w2, "w13_bias": w13_bias, "w2_bias": w2_bias}
    given |= {"w13_scale": w13_scale, "w2_scale": w2_scale, "a13_scale": a13_scale, "a2_scale": a2_scale}
    report, weights, layer = None, None, None
    problem: Exception | None = None
    try:
        weights = _checked_weights(config, given)
        environment = environment or Environment.probe(w13.device.type)
        report = select(config, strategy, environment)
        _check_memory(config, report, environment)
    except Exception as found:  # whatever it is, the other ranks must hear of it
        problem = found
    fields = config.shared_fields() | {"strategy": report.chosen_text() if report else ""}
    agree(config.parallel, fields, problem)
    assert report is not None and weights is not None
    if weights.a13_scale is not None:
        # A row is quantized once for all its experts, on whichever ranks they are.
        largest = max(gather(config.parallel, weights.a13_scale.item(), "static scales").values())
        weights = replace(weights, a13_scale=torch.full_like(weights.a13_scale, largest))
    # What a layer keeps is written by every call, in inference mode or not.
    try:
        with torch.inference_mode(False), torch.no_grad():
            layer = _assemble(config, report, weights, arena or WorkspaceArena.shared(w13.device))
    except Exception as found:  # out of memory on one rank, say
        problem = found
    agree(config.parallel, {}, problem)
    assert layer is not None
    layer.report = report
    logger.debug("built %s", report.line())
    return layer


def _checked_weights(config: MoEConfig, given: Mapping[str, torch.Tensor | None]) -> ExpertWeights:
    for name, tensor in given.items():
        optional = name not in ("w13", "w2")
        if not (isinstance(tensor, torch.Tensor) or (optional and tensor is None)):
            raise DtypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    # A layer is for inference: parameters are taken without their gradients.
    detached: dict[str, Any] = {name: None if tensor is None else tensor.detach() for name, tensor in given.items()}
    weights = ExpertWeights(**detached)
    weights.check(config)
    weights = weights.canonical(config)
    if weights.w2_bias is not None and config.parallel.tp_rank > 0:
        # TP ranks add up their outputs, and the bias belongs into the sum once.
        weights = replace(weights, w2_bias=torch.zeros_like(weights.w2_bias))
    return weights


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
            built = phase_config(config, phase) if report.is_phased else config
            largest = _largest_max_tokens(built, entry, environment)
            fits = f"the largest that fits is max_tokens_per_rank={largest}" if largest else "not even one token fits"
            raise MemoryLimitError(
                f"{entry.strategy} needs {_needs(entry) / 2**30:.1f} GiB of workspace for "
                f"max_tokens_per_rank={built.max_tokens_per_rank}, "
                f"the device has {environment.memory_bytes / 2**30:.1f} GiB; {fits}",
                largest or None,
            )


def _needs(entry: Entry) -> int:
    return entry.workspace_bytes + entry.extra_weight_bytes


def _largest_max_tokens(config: MoEConfig, entry: Entry, environment: Environment) -> int:
    """The largest max_tokens_per_rank that fits; 0 if none does."""
    low, high = 0, config.max_tokens_per_rank
    while high - low > 1:
        middle = (low + high) // 2
        entries = survey(replace(config, max_tokens_per_rank=middle), environment)
        needed = next(_needs(candidate) for candidate in entries if candidate.strategy == entry.strategy)
        low, high = (middle, high) if needed <= environment.memory_bytes else (low, middle)
    return low
