"""The sweep behind `moe-plugin bench experts`: whole layers on one device, cell by cell, contenders in turn.

A cell is one (layer, dtype, tokens). Every contender gets the same tensors. It is compared with the oracle first, once
called eagerly and once replayed from a graph; a wrong result has no times. An error of one contender in one cell stays
there. The caller sees every cell as it is finished, so that an interrupted sweep keeps what it has.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import moe_plugin
from moe_plugin.bench.batched import PREFIX, BatchedContender
from moe_plugin.bench.contenders import (
    Accuracy,
    Contender,
    Job,
    NotInstalledError,
    Prepared,
    StrategyContender,
    UnsupportedError,
    peer,
)
from moe_plugin.bench.layers import SKEWS, Inputs, Layer, compulsory_bytes, floor, flops
from moe_plugin.bench.results import (
    FAILED,
    NOT_INSTALLED,
    OK,
    UNSUPPORTED,
    WRONG,
    Ceilings,
    Cell,
    MachineFacts,
    Measurement,
    Run,
    Settings,
    Timing,
)
from moe_plugin.bench.timing import Stopwatch, summarize
from moe_plugin.config import Fp8Block, Fp8PerTensor, Fp8PerToken, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError
from moe_plugin.presets import preset_config

logger = logging.getLogger(__name__)

ALL_PRESETS = ("mixtral-8x7b", "qwen3-30b", "qwen3-235b", "deepseek-v3-ep8")
"""What `--preset all` stands for."""

DTYPES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "fp8_block": {"dtype": torch.bfloat16, "quantization": Fp8Block()},
    "fp8_per_tensor": {"dtype": torch.bfloat16, "quantization": Fp8PerTensor()},
    "fp8_per_token": {"dtype": torch.bfloat16, "quantization": Fp8PerToken()},
}
"""MoEConfig fields by the name of a dtype; `fp8` alone means fp8_block. fp8 layers compute in bf16."""

GRAPH_SHARE, EAGER_SHARE, HOST_SHARE = 0.5, 0.35, 0.15
"""How the time budget of a contender is spent."""

Report = Callable[[Run, Cell], None]


class DeviceLostError(Exception):
    """The device reports an error that ends every later call of this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to measure. layers: presets, `all`, or `E,K,H,I`; the other fields as in results.Settings."""

    layers: tuple[str, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bf16",)
    strategies: tuple[str, ...] = ("local+triton_fused_moe",)
    peers: tuple[str, ...] = ()
    skew: str = "uniform"
    seed: int = 0
    time_budget: float = 0.3
    device: str = "cuda"

    def __post_init__(self) -> None:
        spelled = [name for layer in self.layers for name in (ALL_PRESETS if layer == "all" else (layer,))]
        dtypes = ["fp8_block" if dtype == "fp8" else dtype for dtype in self.dtypes]
        for name, values in (("layers", spelled), ("dtypes", dtypes), ("peers", self.peers)):
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        for name in ("layers", "tokens", "dtypes", "strategies"):
            if not getattr(self, name):
                raise ConfigError(f"nothing to measure: {name} is empty")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ConfigError(f"unknown dtype {dtype!r}; known: fp8, {', '.join(DTYPES)}")
        if min(self.tokens) < 1:
            raise ConfigError(f"token counts must be positive, got {min(self.tokens)}")
        if self.skew not in SKEWS:
            raise ConfigError(f"unknown skew {self.skew!r}; known: {', '.join(SKEWS)}")
        if not self.time_budget > 0:
            raise ConfigError(f"the time budget must be positive, got {self.time_budget:g}")
        self.check_names()

    def check_names(self) -> None:
        """Before minutes are spent: raises for a layer, a peer or a strategy that there is not."""
        for layer in self.layers:
            layer_config(layer, "bf16")
        for name in self.peers:
            peer(name)
        for strategy in self.strategies:
            strategy_contender(strategy)

    @property
    def settings(self) -> Settings:
        names = [setting.name for setting in fields(Settings) if hasattr(self, setting.name)]
        return Settings(**{name: getattr(self, name) for name in names})

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        return self.spelled("experts")

    def spelled(self, subcommand: str, *more: str) -> str:
        """`moe-plugin bench SUBCOMMAND` with the options of this sweep, and `more` of them."""
        words = ["moe-plugin", "bench", subcommand]
        presets = [layer for layer in self.layers if "," not in layer]
        words += ["--preset", ",".join(presets)] if presets else []
        for layer in self.layers:
            words += ["--layer", layer] if "," in layer else []
        words += ["--tokens", ",".join(map(str, self.tokens)), "--dtype", ",".join(self.dtypes)]
        for strategy in self.strategies:
            words += ["--strategy", strategy]
        for name in self.peers:
            words += ["--peer", name]
        words += ["--skew", self.skew, "--seed", str(self.seed), "--time-budget", f"{self.time_budget:g}"]
        return shlex.join([*words, *more, "--device", self.device])

    @property
    def num_cells(self) -> int:
        return len(self.layers) * len(self.dtypes) * len(self.tokens)


def strategy_contender(name: str) -> Contender:
    """A strategy as users call it, or `batched+<experts>`. Raises UnknownStrategyError or ConfigError."""
    return BatchedContender(name) if name.startswith(PREFIX) else StrategyContender(name)


def layer_config(layer: str, dtype: str, **overrides: Any) -> MoEConfig:
    """The configuration of a preset or of `E,K,H,I` in a dtype of DTYPES; overrides: other MoEConfig arguments.

    Raises ConfigError.
    """
    fields = DTYPES[dtype] | overrides
    if "," not in layer:
        return preset_config(layer, **fields)
    try:
        experts, top_k, hidden, inner = map(int, layer.split(","))
    except ValueError as problem:
        raise ConfigError(f"a layer is four numbers E,K,H,I, got {layer!r}") from problem
    return MoEConfig(num_experts=experts, top_k=top_k, hidden_size=hidden, intermediate_size=inner, **fields)


@dataclass(slots=True)
class Entrant:
    """A contender in one cell, on its way from job to measurement."""

    contender: Contender
    prepared: Prepared | None = None
    job: Job | None = None
    replay: Callable[[], Any] | None = None
    status: str = OK
    detail: str = ""
    note: str = ""
    accuracy: Accuracy | None = None
    samples: dict[str, Timing] = field(default_factory=dict)

    def fail(self, problem: BaseException) -> None:
        """Take this contender out, with the reason; what was measured before is dropped."""
        if status_of(problem) == FAILED:
            logger.debug("%s failed", self.contender.name, exc_info=problem)
        self.status, self.detail = status_of(problem), describe(problem)
        self.samples.clear()

    def call(self, clock: str) -> Callable[[], Any] | None:
        """What runs on the `graph` clock or on the others; None for a contender that is out, or has no graph."""
        if self.status != OK or self.job is None:
            return None
        return self.replay if clock == "graph" else self.job.run

    def measurement(self) -> Measurement:
        return Measurement(
            contender=self.contender.name,
            role=self.contender.role,
            status=self.status,
            detail=self.detail,
            note=self.note,
            error=None if self.accuracy is None else finite(self.accuracy.error),
            row_error=None if self.accuracy is None else finite(self.accuracy.row_error),
            **self.samples,
        )


def status_of(problem: BaseException) -> str:
    """One of results.STATUSES for what a contender raised."""
    if isinstance(problem, NotInstalledError):
        return NOT_INSTALLED
    return UNSUPPORTED if isinstance(problem, UnsupportedError) else FAILED


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(f"{value:.3g}") if abs(value) < float("inf") else None


def describe(problem: BaseException, limit: int = 240) -> str:
    """An exception in one line without folders: results are committed and must not show where they were made."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    text = re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+", "", text)
    text = text if isinstance(problem, (NotInstalledError, UnsupportedError)) else f"{type(problem).__name__}: {text}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run_sweep(sweep: Sweep, report: Report) -> Run:
    """Measure every cell; `report` is called after each with the results so far.

    Raises DeviceLostError when the device has failed for good, after reporting the cell in which it did.
    """
    device = torch.device(sweep.device)
    stopwatch = Stopwatch(device)
    contenders: list[Contender] = [*map(strategy_contender, sweep.strategies), *map(peer, sweep.peers)]
    run = Run(
        command=sweep.command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine_facts(device, stopwatch.l2_bytes, contenders),
        ceilings=stopwatch.ceilings(sweep.seed),
        settings=sweep.settings,
    )
    for name in sweep.layers:
        for dtype in sweep.dtypes:
            config = layer_config(name, dtype)
            layer = Layer.random(name, config, device, sweep.seed)
            entrants = [_prepare(contender, layer, max(sweep.tokens)) for contender in contenders]
            for tokens in sweep.tokens:
                fresh = [replace(entrant, samples={}) for entrant in entrants]
                cell = _measure(sweep, stopwatch, run.ceilings, layer, dtype, tokens, fresh)
                run = run.with_cell(cell)
                report(run, cell)
                _check_device(stopwatch)
            del layer, entrants, fresh
            if stopwatch.is_cuda:
                torch.cuda.empty_cache()
    return run


def _prepare(contender: Contender, layer: Layer, max_tokens: int) -> Entrant:
    entrant = Entrant(contender)
    try:
        entrant.prepared = contender.prepare(layer, max_tokens)
    except Exception as problem:  # whatever a library raises belongs in its line of the table
        entrant.fail(problem)
    return entrant


def _measure(
    sweep: Sweep,
    stopwatch: Stopwatch,
    ceilings: Ceilings,
    layer: Layer,
    dtype: str,
    tokens: int,
    entrants: Sequence[Entrant],
) -> Cell:
    """One cell: bind, compare, capture, compare again, time."""
    with torch.inference_mode():
        inputs = Inputs.random(layer.config, tokens, sweep.skew, stopwatch.device, sweep.seed + tokens)
        for entrant in entrants:
            if entrant.prepared is not None:
                try:
                    _admit(stopwatch, entrant, entrant.prepared, inputs)
                except Exception as problem:  # see _prepare
                    entrant.fail(problem)
        for clock, share in (("graph", GRAPH_SHARE), ("eager", EAGER_SHARE)):
            takers = [entrant for entrant in entrants if entrant.call(clock) is not None]
            _time(stopwatch, clock, takers, sweep.time_budget * share)
        for entrant in entrants:
            if (call := entrant.call("cpu")) is not None:
                try:
                    entrant.samples["cpu"] = summarize(stopwatch.host_time(call, sweep.time_budget * HOST_SHARE))
                except Exception as problem:  # see _prepare
                    entrant.fail(problem)
        experts_hit = inputs.experts_hit(layer.config) if _alive(stopwatch) else 0
    num_flops, num_bytes = flops(layer.config, tokens), compulsory_bytes(layer, inputs, experts_hit)
    least, bound = floor(ceilings, num_flops, num_bytes, layer.config.quantization is not None)
    return Cell(
        layer=layer.facts,
        dtype=dtype,
        tokens=tokens,
        skew=sweep.skew,
        experts_hit=experts_hit,
        flops=num_flops,
        bytes=num_bytes,
        floor=least,
        bound=bound,
        measurements=tuple(entrant.measurement() for entrant in entrants),
    )


def _admit(stopwatch: Stopwatch, entrant: Entrant, prepared: Prepared, inputs: Inputs) -> None:
    """Compile, compare with the oracle, capture if possible, and compare what a replay gives."""
    entrant.note = prepared.note(inputs.tokens)
    job = prepared.bind(inputs)
    entrant.accuracy = job.check(stopwatch.warm_up(job.run))
    if not entrant.accuracy.ok:
        entrant.status, entrant.detail = WRONG, str(entrant.accuracy)
        return
    entrant.job = job
    if not (stopwatch.is_cuda and prepared.capturable):
        return
    try:
        entrant.replay, output = stopwatch.capture(job.run)
    except Exception as problem:  # it may still run eagerly
        entrant.detail = f"no graph: {describe(problem)}"
        return
    replayed = job.check(output)
    if not replayed.ok:
        entrant.accuracy, entrant.status, entrant.detail = replayed, WRONG, f"replayed from a graph: {replayed}"


def _time(stopwatch: Stopwatch, clock: str, entrants: Sequence[Entrant], seconds: float) -> None:
    """Let these entrants take turns on the graph or the eager clock."""
    calls = [call for entrant in entrants if (call := entrant.call(clock)) is not None]
    if not calls:
        return
    try:
        found = stopwatch.take_turns(calls, seconds, from_idle=clock == "eager")
    except RuntimeError as problem:  # the device reports late, so whose error it is cannot be known
        for entrant in entrants:
            entrant.fail(problem)
        return
    for entrant, samples in zip(entrants, found, strict=True):
        if samples.problem is not None:
            entrant.fail(samples.problem)
        else:
            entrant.samples[clock] = summarize(samples.times)


def _alive(stopwatch: Stopwatch) -> bool:
    try:
        stopwatch.synchronize()
    except RuntimeError:
        return False
    return True


def _check_device(stopwatch: Stopwatch) -> None:
    try:
        stopwatch.synchronize()
    except RuntimeError as problem:
        raise DeviceLostError(
            f"the device is lost to this process ({describe(problem)}); results up to here are kept, "
            "measure the remaining presets in another run"
        ) from problem


def machine_facts(device: torch.device, l2_bytes: int, contenders: Sequence[Contender]) -> MachineFacts:
    """Device and versions; nothing that says whose machine it is."""
    environment = Environment.probe(device.type)
    return MachineFacts(
        device=environment.device_name,
        device_type=environment.device_type,
        sm=environment.sm,
        num_sms=environment.num_sms,
        memory_bytes=environment.memory_bytes,
        l2_bytes=l2_bytes,
        driver=_driver() if device.type == "cuda" else "",
        cuda=environment.cuda_version or "",
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        moe_plugin=moe_plugin.__version__,
        peers={contender.name: contender.version() for contender in contenders if contender.role != "strategy"},
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The version of NVIDIA's driver as the kernel module states it; "" where it does not."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\b\d{3,}(?:\.\d+)+\b", text)
    return found.group() if found else ""
