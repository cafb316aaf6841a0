"""The search behind `moe-plugin tune`: the fastest tiles of one layer on this device, number of rows by number of rows.

Whole layers are timed rather than single GEMMs: the second GEMM finds in L2 what the first has just written, and the
sort before them is the cheaper the larger the blocks. Each candidate is compared with the oracle before it is timed.
The GEMMs share their blocks of rows and little else, so for every size of blocks one is tuned and then the other, the
rest of both first at its untuned value; the two best sizes then get what matters least. The fastest few, the heuristic
and what the table had before are timed again, in turn, and the fastest of these is the entry.

Example, Hopper, bf16, 8 rows per expert that is hit: blocks of 8, 16 and 32 rows with 128 weight rows per half, then 64
in gate_up, then 64 in down; of the best size groups of 1, 4 and 16 blocks in gate_up, then in down: 15 candidates.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import torch

from moe_plugin.bench.experts import DeviceLostError, Sweep, layer_config
from moe_plugin.bench.layers import Inputs, Layer, right_answers
from moe_plugin.bench.timing import Stopwatch
from moe_plugin.bench.trials import Trials
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError
from moe_plugin.experts.triton_fused_moe import TritonFusedMoE
from moe_plugin.kernels.hopper_tiling import NARROW_ROWS, WIDE_ROWS, HopperTile, HopperTiles, hopper_verdict
from moe_plugin.kernels.measured_tables import LayerShape, device_folder, forget_tables
from moe_plugin.kernels.tile_tables import (
    HOPPER,
    PORTABLE,
    Entry,
    FixedTiles,
    PortableTiles,
    TileLookup,
    Tiles,
    TileTable,
    heuristic_tiles,
    legal,
)
from moe_plugin.kernels.tiling import block_config, cdiv, down_block_config, shared_memory_bytes
from moe_plugin.modular_kernel import ExpertWeights, ModularKernel
from moe_plugin.prepare_finalize.local import Local
from moe_plugin.workspace import WorkspaceArena

logger = logging.getLogger(__name__)

DEFAULT_BUDGET = 10.0
"""Seconds of measuring per number of rows."""
MOST_SECONDS, LEAST_CANDIDATES = 0.12, 50
"""A candidate is timed for this long, or for its share of the budget among so many."""
SEARCH_SHARE = 0.8
"""Of the budget; the rest is for the last comparison."""
CLOSE = 1.05
"""A size of blocks this much slower than the best may still win when all else is tuned."""
FINALISTS = 3
GROUPS = (8, 1, 4, 16)

Axis: TypeAlias = Callable[[Tiles], list[Tiles]]
"""The neighbours of some tiles in one respect."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to look. starts: one per size of blocks; coarse: tuned for each of them; fine: for the best ones."""

    starts: list[Tiles]
    coarse: list[Axis]
    fine: list[Axis]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one number of rows. Times are microseconds of the whole layer.

    entry: what the table has now; None if nothing gave a right result. kept: of an earlier run, not measured.
    heuristic: untuned. before: in the tiles that a table had, measured anew. tried: candidates, of which `failed` did
    not run and `wrong` gave a wrong result.
    """

    layer: str
    dtype: str
    rows: int
    path: Path
    entry: Entry | None
    kept: bool = False
    heuristic: float | None = None
    before: float | None = None
    tried: int = 0
    failed: int = 0
    wrong: int = 0


Report: TypeAlias = Callable[[Outcome], None]
Step: TypeAlias = Callable[["Search"], None]


def tune(sweep: Sweep, out: Path, again: bool, report: Report, step: Step = lambda search: None) -> None:
    """Tune every layer, dtype and token count of `sweep` and write each result to the tables under `out` at once.

    again: measure what is there, too; otherwise entries of this Triton version are kept.
    report: called after each token count. step: called after each candidate.
    An interrupt leaves all entries so far, that of the token count under way marked as partial.
    Raises ConfigError when triton_fused_moe cannot run a layer here, DeviceLostError when the device has failed.
    """
    device = torch.device(sweep.device)
    environment = Environment.probe(device.type)
    stopwatch: Stopwatch | None = None
    for name in sweep.layers:
        for dtype in sweep.dtypes:
            config = layer_config(name, dtype)
            config = replace(config, max_tokens_per_rank=max(sweep.tokens), cuda_graph=device.type == "cuda")
            place = Place.of(config, environment, out)
            layer: Layer | None = None
            for rows in sweep.tokens:
                table = place.table()
                entry = table.entry(place.kernels, rows)
                if entry is not None and not again and entry.triton == place.triton and not entry.partial:
                    report(Outcome(layer=name, dtype=dtype, rows=rows, path=place.path, entry=entry, kept=True))
                    continue
                stopwatch = stopwatch or Stopwatch(device)
                layer = layer or Layer.random(name, config, device, sweep.seed)
                before = (
                    entry or TileLookup(config, place.device, place.shared_memory).choose(place.kernels, rows).entry
                )
                with torch.inference_mode():
                    inputs = Inputs.random(config, rows, "uniform", device, sweep.seed + rows)
                    search = Search(stopwatch, place, layer, inputs, sweep.time_budget, step)
                    with _keeping_the_best(search, table):
                        best = search.run(before.tiles if before else None)
                if best is not None:
                    place.save(table, best)
                report(search.outcome(name, dtype, best))
            del layer
            if stopwatch is not None and stopwatch.is_cuda:
                torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Place:
    """A layer on a device: which kernels run it, with how much shared memory, and where its table is."""

    config: MoEConfig
    kernels: str
    device: str
    shared_memory: int
    triton: str
    path: Path

    @classmethod
    def of(cls, config: MoEConfig, environment: Environment, out: Path) -> Place:
        verdict = TritonFusedMoE.supports(config, environment)
        if not verdict.ok:
            raise ConfigError(f"triton_fused_moe cannot run {LayerShape.of(config)} here: {verdict.reason}")
        kernels = HOPPER if hopper_verdict(config, environment).ok else PORTABLE
        device = environment.device_name if environment.device_type == "cuda" else environment.device_type
        path = out / device_folder(device) / LayerShape.of(config).file_name
        triton = environment.package("triton").version or "unknown"
        return cls(config, kernels, device, shared_memory_bytes(environment.sm), triton, path)

    def table(self) -> TileTable:
        """The table as it is on disk; an empty one where there is none. Raises ConfigError for a broken one."""
        if self.path.exists():
            return TileTable.load(self.path)
        return TileTable(layer=LayerShape.of(self.config), device=self.device, triton=self.triton, date="")

    def save(self, table: TileTable, entry: Entry) -> None:
        table.with_entry(entry, datetime.now(timezone.utc).date().isoformat()).save(self.path)
        forget_tables()


@contextlib.contextmanager
def _keeping_the_best(search: Search, table: TileTable) -> Iterator[None]:
    """When interrupted, save the fastest tiles so far, to be searched for again by the next run."""
    try:
        yield
    except (KeyboardInterrupt, DeviceLostError):
        if (best := search.best()) is not None:
            search.place.save(table, replace(best, partial=True))
        raise


@dataclass(slots=True)
class Search:
    """The search for one number of rows. times: microseconds of the candidates so far, None for those that are out."""

    stopwatch: Stopwatch
    place: Place
    layer: Layer
    inputs: Inputs
    budget: float
    step: Step
    times: dict[Tiles, float | None] = field(default_factory=dict)
    heuristic: float | None = None
    before: float | None = None
    trials: Trials = field(init=False)

    def __post_init__(self) -> None:
        layer, inputs = self.layer, self.inputs
        self.trials = Trials(
            self.stopwatch,
            self.place.config,
            sample=lambda output: output[inputs.sample()],
            answers=lambda: right_answers(layer, inputs, rounds_gate_up=False),
        )

    def run(self, before: Tiles | None) -> Entry | None:
        """The entry for these rows; None when no candidate ran and was right. before: tiles that a table has now."""
        place, rows = self.place, self.inputs.tokens
        plan = plan_for(place.kernels, place.config, rows, place.shared_memory, self.stopwatch.is_cuda)
        untuned = heuristic_tiles(place.kernels, place.config, rows, place.shared_memory)
        self.trials.answers()  # computed once, and outside of the time for candidates
        known = [untuned, *([before] if before is not None and self._is_legal(before) else [])]
        for candidate in known:
            self._measure(candidate, always=True)
        found = [tiles for start in plan.starts if (tiles := self._descend(start, plan.coarse)) is not None]
        for candidate in self._close(found)[:2]:
            self._descend(candidate, plan.fine)
        finalists = [*self._close(self.times)[:FINALISTS], *known]
        times = self._compare(dict.fromkeys(tiles for tiles in finalists if self.times[tiles] is not None))
        self.heuristic = times.get(untuned)
        self.before = None if before is None else times.get(before)
        return self._entry(times)

    def best(self) -> Entry | None:
        """The fastest of the candidates so far."""
        return self._entry({tiles: time for tiles, time in self.times.items() if time is not None})

    def outcome(self, layer: str, dtype: str, entry: Entry | None) -> Outcome:
        return Outcome(
            layer=layer,
            dtype=dtype,
            rows=self.inputs.tokens,
            path=self.place.path,
            entry=entry,
            heuristic=self.heuristic,
            before=self.before,
            tried=len(self.times),
            failed=self.trials.failed,
            wrong=self.trials.wrong,
        )

    def _entry(self, times: dict[Tiles, float]) -> Entry | None:
        if not times:
            return None
        tiles = min(times, key=lambda each: times[each])
        return Entry(rows=self.inputs.tokens, tiles=tiles, microseconds=times[tiles], triton=self.place.triton)

    def _is_legal(self, tiles: Tiles) -> bool:
        return legal(tiles, self.place.config, self.place.shared_memory).ok

    def _close(self, candidates: Iterable[Tiles]) -> list[Tiles]:
        """Those that are not much slower than the fastest of them, the fastest first."""
        timed = {tiles: time for tiles in candidates if (time := self.times.get(tiles)) is not None}
        return sorted((t for t in timed if timed[t] <= CLOSE * min(timed.values())), key=lambda tiles: timed[tiles])

    def _descend(self, tiles: Tiles, axes: Sequence[Axis]) -> Tiles | None:
        """The best tiles found by going along one axis after the other; None if those given are out."""
        best, least = tiles, self._measure(tiles)
        if least is None:
            return None
        for axis in axes:
            for variant in axis(best):
                time = self._measure(variant) if self._is_legal(variant) else None
                if time is not None and time < least:
                    best, least = variant, time
        return best

    def _measure(self, tiles: Tiles, always: bool = False) -> float | None:
        """Microseconds; None for tiles that are out or, unless `always`, for which no time is left."""
        if tiles in self.times or (not always and self.trials.spent > SEARCH_SHARE * self.budget):
            return self.times.get(tiles)
        call = self.trials.right_call(tiles, lambda: self._bind(tiles))
        self.times[tiles] = None
        if call is not None:
            (self.times[tiles],) = self.trials.take_turns([call], min(MOST_SECONDS, self.budget / LEAST_CANDIDATES))
        self.step(self)
        return self.times[tiles]

    def _compare(self, candidates: Iterable[Tiles]) -> dict[Tiles, float]:
        """Candidates that have run, timed in turn, so that all see the same clock rates."""
        calls = {
            tiles: call
            for tiles in candidates
            if (call := self.trials.right_call(tiles, functools.partial(self._bind, tiles))) is not None
        }
        results = self.trials.take_turns(list(calls.values()), (1 - SEARCH_SHARE) * self.budget / max(len(calls), 1))
        return {tiles: result for tiles, result in zip(calls, results, strict=True) if result is not None}

    def _bind(self, tiles: Tiles) -> Callable[[], torch.Tensor]:
        """A call of a layer that has these tiles and an arena of its own, in which nothing is of another's size."""
        config, inputs = self.place.config, self.inputs
        weights = ExpertWeights(**self.layer.weights)  # type: ignore[arg-type]
        experts = TritonFusedMoE(config, weights.canonical(config))
        experts.tiles = FixedTiles(config, self.place.device, self.place.shared_memory, tiles)
        layer = ModularKernel(Local(config, WorkspaceArena(self.stopwatch.device)), experts)
        return lambda: layer(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)


def plan_for(kernels: str, config: MoEConfig, num_rows: int, shared_memory: int, on_gpu: bool) -> Plan:
    """Candidates for `num_rows` rows, uniformly routed.

    on_gpu: otherwise what means nothing to Triton's interpreter is left as it is.
    """
    experts, top_k = config.num_experts, config.top_k
    experts_hit = experts * (1 - (1 - top_k / experts) ** num_rows)
    rows_per_expert = num_rows * top_k / experts_hit
    if kernels == HOPPER:
        return _hopper_plan(config, rows_per_expert, experts_hit)
    return _portable_plan(config, rows_per_expert, shared_memory, on_gpu)


def _hopper_plan(config: MoEConfig, rows_per_expert: float, experts_hit: float) -> Plan:
    fp8 = config.quantization is not None
    blocks = _sensible_blocks((*NARROW_ROWS, WIDE_ROWS), rows_per_expert)
    starts: list[Tiles] = []
    for block_x in blocks:
        wide = block_x == WIDE_ROWS
        tile = HopperTile(wide=wide, block_x=block_x, half_w=64 if wide and fp8 else 128)
        starts.append(HopperTiles(tile, tile))
    num_blocks = experts_hit * cdiv(round(rows_per_expert), max(blocks))
    # A group of more blocks than there are is one of all blocks.
    groups = [group for group in GROUPS if group < 4 * num_blocks or group == GROUPS[0]]
    return Plan(
        starts,
        coarse=[_along("gate_up", "half_w", (64, 128)), _along("down", "half_w", (64, 128))],
        fine=[_along("gate_up", "group", groups), _along("down", "group", groups)],
    )


def _portable_plan(config: MoEConfig, rows_per_expert: float, shared_memory: int, on_gpu: bool) -> Plan:
    dtype = config.weight_dtype
    starts: list[Tiles] = []
    for block_m in _sensible_blocks((16, 32, 64, 128), rows_per_expert):
        gate_up = block_config(block_m, dtype, shared_memory)
        tiles = PortableTiles(gate_up, down_block_config(gate_up, dtype, shared_memory))
        if tiles not in starts:
            starts.append(tiles)
    ranges: dict[str, Sequence[int]] = {"block_n": (64, 128, 256), "block_k": (32, 64, 128)}
    if on_gpu:
        ranges |= {"num_warps": (4, 8), "num_stages": (2, 3, 4, 5), "group_m": (1, 8, 16)}

    def fit(tiles: Tiles) -> Tiles:
        """With as many stages as there is room for, since larger blocks leave room for fewer."""
        assert isinstance(tiles, PortableTiles)
        parts = []
        for block in (tiles.gate_up, tiles.down):
            while block.num_stages > 1 and block.shared_memory(dtype) > shared_memory:
                block = replace(block, num_stages=block.num_stages - 1)
            parts.append(block)
        return PortableTiles(*parts)

    def axis(gemm: str, name: str) -> Axis:
        variants = _along(gemm, name, ranges[name])
        return lambda tiles: [fit(variant) for variant in variants(tiles)]

    return Plan(starts, coarse=[], fine=[axis(gemm, name) for gemm in ("gate_up", "down") for name in ranges])


def _sensible_blocks(sizes: Iterable[int], rows_per_expert: float) -> list[int]:
    """Sizes of blocks of which an expert fills at least a quarter of one and at most two; 16 rows cost no more than 8.

    Many rows: the two largest, since tall blocks are not fast in every dtype.
    """
    sizes = sorted(sizes)
    fitting = [size for size in sizes if rows_per_expert / 2 <= size <= max(4 * rows_per_expert, 16)]
    return sorted({*fitting, *sizes[-2:]}) if rows_per_expert >= sizes[-1] else fitting


def _along(gemm: str, name: str, values: Iterable[int]) -> Axis:
    """The tiles with each of `values` as field `name` of one GEMM."""
    values = tuple(values)

    def variants(tiles: Tiles) -> list[Tiles]:
        tile: Any = getattr(tiles, gemm)
        return [replace(tiles, **{gemm: replace(tile, **{name: value})}) for value in values]

    return variants
