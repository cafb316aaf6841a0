"""The crossover tables of `deep_gemm_hybrid`: every layout timed for every number of rows, in turn.

Whole layers are timed, on uniform routing. Layouts that need too much memory for what they could win are left out:
masked calls beyond MOST_MASKED_ROWS rows. Example: 512 rows of Qwen3-30B-A3B in the masked layout need
128 x 512 slots, in the contiguous one at most 20352.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeAlias

import torch

from moe_plugin.bench.batched import CAPACITY_UNIT, BatchedRows
from moe_plugin.bench.experts import Sweep, layer_config
from moe_plugin.bench.layers import Inputs, Layer, right_answers
from moe_plugin.bench.timing import Stopwatch
from moe_plugin.bench.trials import Trials
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError
from moe_plugin.experts.deep_gemm_hybrid import DeepGemmHybrid
from moe_plugin.experts.layout_tables import (
    CONTIGUOUS_TRITON_DOWN,
    CONTIGUOUS_TRITON_GATE_UP,
    LAYOUTS_OF,
    MASKED,
    TRITON_FUSED_MOE,
    FixedLayout,
    LayoutEntry,
    LayoutTable,
    default_layout,
)
from moe_plugin.kernels.measured_tables import LayerShape, forget_tables
from moe_plugin.modular_kernel import ActivationFormat, ExpertWeights, ModularKernel
from moe_plugin.prepare_finalize.local import Local
from moe_plugin.workspace import WorkspaceArena

MOST_MASKED_ROWS = 512
MOST_BATCHED_ROWS = 2048
CLOSE = 1.01
"""A layout that is faster by less than this is not chosen over triton_fused_moe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutOutcome:
    """What became of one number of rows. entry: what the table has now; None if nothing ran and was right.

    kept: of an earlier run, not measured. default: microseconds of the layout that stands where nothing is measured.
    failed, wrong: layouts that did not run, or not right.
    """

    layer: str
    dtype: str
    rows: int
    activation_format: ActivationFormat
    path: Path
    entry: LayoutEntry | None
    kept: bool = False
    default: float | None = None
    failed: int = 0
    wrong: int = 0


Report: TypeAlias = Callable[[LayoutOutcome], None]


def layout_cells(sweep: Sweep) -> list[tuple[ActivationFormat, int]]:
    """What is measured of each layer and dtype: (activation format, rows)."""
    batched = [rows for rows in sweep.tokens if rows % CAPACITY_UNIT == 0 and rows <= MOST_BATCHED_ROWS]
    return [
        *((ActivationFormat.STANDARD, rows) for rows in sweep.tokens),
        *((ActivationFormat.BATCHED_EXPERTS, rows) for rows in batched),
    ]


def layout_places(sweep: Sweep, out: Path) -> dict[tuple[str, str], LayoutPlace]:
    """The place of every (layer, dtype) of `sweep`.

    Raises ConfigError when deep_gemm_hybrid cannot run one of them here, or its table under `out` is broken.
    """
    environment = Environment.probe(sweep.device)
    places = {}
    for name in sweep.layers:
        for dtype in sweep.dtypes:
            config = layer_config(name, dtype)
            config = replace(config, max_tokens_per_rank=max(sweep.tokens), cuda_graph=sweep.device == "cuda")
            place = LayoutPlace.of(config, environment, out)
            place.table()
            places[name, dtype] = place
    return places


def tune_layouts(sweep: Sweep, out: Path, again: bool, report: Report) -> None:
    """Measure every layer, dtype and token count of `sweep` and write each result to the tables under `out` at once.

    again: measure what is there, too; otherwise entries of these versions of DeepGEMM and Triton are kept.
    report: called after each number of rows. Tiles of the Triton kernels are those of the tables there are by now.
    Raises ConfigError as `layout_places` does, before anything is measured, DeviceLostError when the device has failed.
    """
    device = torch.device(sweep.device)
    stopwatch: Stopwatch | None = None
    for (name, dtype), place in layout_places(sweep, out).items():
        measured: MeasuredLayer | None = None
        for activation_format, rows in layout_cells(sweep):
            outcome = functools.partial(
                LayoutOutcome,
                layer=name,
                dtype=dtype,
                rows=rows,
                activation_format=activation_format,
                path=place.path,
            )
            entry = place.table().entry(activation_format.value, rows)
            if entry is not None and not again and place.is_current(entry):
                report(outcome(entry=entry, kept=True))
                continue
            stopwatch = stopwatch or Stopwatch(device)
            measured = measured or MeasuredLayer.of(Layer.random(name, place.config, device, sweep.seed), stopwatch)
            with torch.inference_mode():
                inputs = Inputs.random(place.config, rows, "uniform", device, sweep.seed + rows)
                trials, times = measured.times(inputs, activation_format, sweep.time_budget)
            found = place.entry(activation_format, rows, times)
            if found is not None:
                place.save(found)
            report(
                outcome(
                    entry=found,
                    default=times.get(default_layout(activation_format, rows)),
                    failed=trials.failed,
                    wrong=trials.wrong,
                )
            )
        del measured
        if stopwatch is not None and stopwatch.is_cuda:
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """A layer whose layouts are measured. weights: of the layer, as DeepGemmHybrid takes them."""

    layer: Layer
    stopwatch: Stopwatch
    weights: ExpertWeights
    has_wide_tiles: bool

    @classmethod
    def of(cls, layer: Layer, stopwatch: Stopwatch) -> MeasuredLayer:
        given = ExpertWeights(**layer.weights).canonical(layer.config)  # type: ignore[arg-type]
        weights = DeepGemmHybrid.prepare_weights(layer.config, given)
        return cls(layer, stopwatch, weights, DeepGemmHybrid(layer.config, weights).has_wide_tiles)

    def times(
        self, inputs: Inputs, activation_format: ActivationFormat, budget: float
    ) -> tuple[Trials, dict[str, float]]:
        """Median microseconds of every layout that runs and is right, all timed in turn within `budget` seconds.

        BatchedExperts rows have as much room as the call has tokens.
        """
        layer, config, rows = self.layer, self.layer.config, None
        if activation_format is ActivationFormat.BATCHED_EXPERTS:
            rows = BatchedRows.of(inputs, config.num_experts, inputs.tokens)

        def sample(output: torch.Tensor) -> torch.Tensor:
            return output[inputs.sample()] if rows is None else rows.combined(output, inputs)

        trials = Trials(self.stopwatch, config, sample, lambda: right_answers(layer, inputs, rounds_gate_up=True))
        trials.answers()  # computed once, and outside of the time for candidates
        calls = {}
        for layout in self._layouts(activation_format, inputs.tokens):
            call = trials.right_call(layout, functools.partial(self._bind, layout, inputs, rows))
            if call is not None:
                calls[layout] = call
        times = trials.take_turns(list(calls.values()), budget / len(calls)) if calls else []
        return trials, {layout: time for layout, time in zip(calls, times, strict=True) if time is not None}

    def _layouts(self, activation_format: ActivationFormat, rows: int) -> Iterator[str]:
        """The layouts worth a try."""
        for layout in LAYOUTS_OF[activation_format]:
            needs_wide_tiles = layout in (CONTIGUOUS_TRITON_GATE_UP, CONTIGUOUS_TRITON_DOWN)
            scattered = activation_format is ActivationFormat.STANDARD
            too_large = layout == MASKED and scattered and rows > MOST_MASKED_ROWS
            if not too_large and (self.has_wide_tiles or not needs_wide_tiles):
                yield layout

    def _bind(self, layout: str, inputs: Inputs, rows: BatchedRows | None) -> Callable[[], torch.Tensor]:
        config, arena = self.layer.config, WorkspaceArena(self.stopwatch.device)
        experts = DeepGemmHybrid(config, self.weights)
        experts.layouts = FixedLayout(layout)
        if rows is not None:
            return rows.call(experts, arena)
        whole = ModularKernel(Local(config, arena), experts)
        return lambda: whole(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)


@dataclass(frozen=True, slots=True)
class LayoutPlace:
    """A layer on a device: where its crossover table is, and the versions that measure now."""

    config: MoEConfig
    device: str
    deep_gemm: str
    triton: str
    path: Path

    @classmethod
    def of(cls, config: MoEConfig, environment: Environment, out: Path) -> LayoutPlace:
        verdict = DeepGemmHybrid.supports(config, environment)
        shape = LayerShape.of(config)
        if not verdict.ok:
            raise ConfigError(f"{DeepGemmHybrid.name} cannot run {shape} here: {verdict.reason}")
        device = environment.device_name if environment.device_type == "cuda" else environment.device_type
        deep_gemm, triton = (environment.package(name).version or "unknown" for name in ("deep_gemm", "triton"))
        return cls(config, device, deep_gemm, triton, LayoutTable.user_path(out, device, shape))

    def table(self) -> LayoutTable:
        """The table as it is on disk; an empty one where there is none. Raises ConfigError for a broken one."""
        if self.path.exists():
            return LayoutTable.load(self.path)
        return LayoutTable(
            layer=LayerShape.of(self.config), device=self.device, deep_gemm=self.deep_gemm, triton=self.triton, date=""
        )

    def is_current(self, entry: LayoutEntry) -> bool:
        return (entry.deep_gemm, entry.triton) == (self.deep_gemm, self.triton)

    def entry(self, activation_format: ActivationFormat, rows: int, times: dict[str, float]) -> LayoutEntry | None:
        """The entry of the fastest layout, of triton_fused_moe if it is as fast; None if none ran and was right."""
        if not times:
            return None
        best = min(times, key=lambda layout: times[layout])
        if times.get(TRITON_FUSED_MOE, math.inf) <= CLOSE * times[best]:
            best = TRITON_FUSED_MOE  # fewer launches, and nothing to compile with nvcc
        return LayoutEntry(
            rows=rows,
            activation_format=activation_format,
            layout=best,
            microseconds=times,
            deep_gemm=self.deep_gemm,
            triton=self.triton,
        )

    def save(self, entry: LayoutEntry) -> None:
        self.table().with_entry(entry, datetime.now(timezone.utc).date().isoformat()).save(self.path)
        forget_tables()
