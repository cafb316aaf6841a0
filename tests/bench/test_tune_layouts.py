"""Layouts measured against each other on the contract double: what is tried, what is out, what a table gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import moe_plugin
from moe_plugin.bench import tune_layouts as module
from moe_plugin.bench.experts import Sweep
from moe_plugin.bench.layers import Inputs, Layer
from moe_plugin.bench.timing import Call, Samples, Stopwatch
from moe_plugin.bench.trials import Trials
from moe_plugin.bench.tune_layouts import (
    LayoutOutcome,
    LayoutPlace,
    MeasuredLayer,
    layout_cells,
    layout_places,
    tune_layouts,
)
from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.errors import ConfigError
from moe_plugin.experts.deep_gemm_hybrid import DeepGemmHybrid
from moe_plugin.experts.layout_tables import (
    CONTIGUOUS,
    CONTIGUOUS_TRITON_DOWN,
    CONTIGUOUS_TRITON_GATE_UP,
    LAYOUTS,
    MASKED,
    TRITON_FUSED_MOE,
    LayoutTable,
)
from moe_plugin.kernels.measured_tables import ENVIRONMENT_VARIABLE, forget_tables
from moe_plugin.modular_kernel import ActivationFormat
from tests.doubles import deep_gemm as double

STANDARD, BATCHED = ActivationFormat.STANDARD, ActivationFormat.BATCHED_EXPERTS
CPU = torch.device("cpu")
LAYER = "1,1,128,128"
CONFIG = MoEConfig(num_experts=1, top_k=1, hidden_size=128, intermediate_size=128, max_tokens_per_rank=4)
H200 = Environment(
    packages={
        "triton": Package("triton", "3.6.0"),
        "deep_gemm": Package("deep_gemm", "0.1.5", features=frozenset({"bf16", "fp8", "psum"})),
    }
).pretend(sm=90, device_name="NVIDIA H200", nvcc=True)

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")


@pytest.fixture(autouse=True)
def no_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    forget_tables()
    yield
    forget_tables()


class OneRound(Stopwatch):
    """Calls everything as rarely as it can be called: in the interpreter a call takes long."""

    def warm_up(self, call: Call) -> Any:
        return call()

    def take_turns(self, calls: Sequence[Call], seconds: float, from_idle: bool) -> list[Samples]:
        return [Samples(self.host_time(call, 0.0)) for call in calls]

    def host_time(self, call: Call, seconds: float) -> list[float]:
        begin = time.perf_counter()
        call()
        return [1e6 * (time.perf_counter() - begin)]


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "Stopwatch", OneRound)
    with double.installed():
        yield


def measured(rows: int, activation_format: ActivationFormat = STANDARD) -> tuple[Trials, set[str]]:
    """Trials of a layer, and the layouts that have a time."""
    layer = Layer.random(LAYER, CONFIG, CPU, 0)
    inputs = Inputs.random(CONFIG, rows, "uniform", CPU, 1)
    trials, times = MeasuredLayer.of(layer, OneRound(CPU)).times(inputs, activation_format, budget=1e-6)
    assert all(time > 0 for time in times.values())
    return trials, set(times)


def run(out: Path, tokens: tuple[int, ...] = (1,), again: bool = False, dtype: str = "bf16") -> list[LayoutOutcome]:
    outcomes: list[LayoutOutcome] = []
    sweep = Sweep(layers=(LAYER,), tokens=tokens, dtypes=(dtype,), device="cpu", time_budget=1e-6)
    tune_layouts(sweep, out, again, outcomes.append)
    return outcomes


def place(config: MoEConfig, out: Path, machine: Environment = H200) -> LayoutPlace:
    return LayoutPlace.of(config, machine, out)


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_every_layout_that_can_run_is_timed() -> None:
    trials, layouts = measured(3)
    assert layouts == {MASKED, CONTIGUOUS, TRITON_FUSED_MOE}
    assert (trials.failed, trials.wrong) == (0, 0)
    # Three rows of room are padded to a whole block.
    assert measured(3, BATCHED)[1] == {MASKED, TRITON_FUSED_MOE}


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_each_is_run_in_the_layout_that_it_is_timed_as(monkeypatch: pytest.MonkeyPatch) -> None:
    instances: list[DeepGemmHybrid] = []
    init = DeepGemmHybrid.__init__

    def remembered(self: DeepGemmHybrid, *arguments: Any) -> None:
        init(self, *arguments)
        instances.append(self)

    monkeypatch.setattr(DeepGemmHybrid, "__init__", remembered)
    measured(2)
    assert [list(each.counters()) for each in instances if each.counters()] == [
        [MASKED],
        [CONTIGUOUS],
        [TRITON_FUSED_MOE],
    ]


def test_layouts_that_cannot_win_or_run_are_left_out() -> None:
    def layouts(wide: bool, activation_format: ActivationFormat, rows: int) -> set[str]:
        layer = MeasuredLayer(layer=None, stopwatch=None, weights=None, has_wide_tiles=wide)  # type: ignore[arg-type]
        return set(layer._layouts(activation_format, rows))

    assert layouts(True, STANDARD, 512) == set(LAYOUTS)
    assert layouts(True, STANDARD, 513) == set(LAYOUTS) - {MASKED}
    assert layouts(False, STANDARD, 1) == set(LAYOUTS) - {CONTIGUOUS_TRITON_GATE_UP, CONTIGUOUS_TRITON_DOWN}
    assert layouts(True, BATCHED, 2048) == layouts(False, BATCHED, 128) == {MASKED, TRITON_FUSED_MOE}


def test_batched_rows_come_in_whole_blocks_and_not_too_many() -> None:
    sweep = Sweep(layers=(LAYER,), tokens=(1, 128, 192, 256, 4096), device="cpu")
    assert layout_cells(sweep) == [
        *((STANDARD, rows) for rows in (1, 128, 192, 256, 4096)),
        *((BATCHED, rows) for rows in (128, 256)),
    ]


@interpreter
@pytest.mark.usefixtures("deep_gemm")
@pytest.mark.parametrize("fault", ["failed", "wrong"])
def test_a_layout_that_fails_or_is_wrong_is_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    masked = DeepGemmHybrid._run_masked

    def faulty(self: DeepGemmHybrid, dispatched: Any, ids: Any, output: torch.Tensor, workspace: Any) -> None:
        if fault == "failed":
            raise RuntimeError("no such kernel")
        masked(self, dispatched, ids, output, workspace)
        output.mul_(1.1)

    monkeypatch.setattr(DeepGemmHybrid, "_run_masked", faulty)
    with caplog.at_level("DEBUG", logger="moe_plugin.bench"):
        trials, layouts = measured(2)
    assert layouts == {CONTIGUOUS, TRITON_FUSED_MOE}
    assert (trials.failed, trials.wrong) == ((1, 0) if fault == "failed" else (0, 1))
    assert ("masked: RuntimeError: no such kernel" in caplog.text) == (fault == "failed")
    assert ("masked: wrong result, relative error" in caplog.text) == (fault == "wrong")


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_where_nothing_is_right_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "right_answers", lambda layer, inputs, rounds_gate_up: [torch.ones(1, 128)])
    (outcome,) = run(tmp_path)
    assert (outcome.entry, outcome.default, outcome.failed, outcome.wrong) == (None, None, 0, 3)
    assert not outcome.path.exists()


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY_UNIT", 2)  # so that few rows are measured in BatchedExperts, too
    first, batched = run(tmp_path, (2,))
    assert first.path == tmp_path / "layouts" / "cpu" / "E1-K1-H128-I128-bf16.json"
    table = LayoutTable.load(first.path)
    assert (table.device, table.deep_gemm) == ("cpu", double.__version__)
    assert [(entry.activation_format, entry.rows) for entry in table.entries] == [(BATCHED, 2), (STANDARD, 2)]
    for outcome, activation_format in ((first, STANDARD), (batched, BATCHED)):
        entry = outcome.entry
        assert entry is not None
        assert entry == table.entry(activation_format.value, 2)
        assert entry.microseconds[entry.layout] <= 1.01 * min(entry.microseconds.values())
        # Two rows are masked where nothing was measured.
        assert outcome.default == entry.microseconds[MASKED]
        assert (outcome.kept, outcome.failed, outcome.wrong) == (False, 0, 0)
    new, *kept = run(tmp_path, (1, 2))
    assert (new.kept, new.rows) == (False, 1)
    assert [(outcome.kept, outcome.entry) for outcome in kept] == [(True, first.entry), (True, batched.entry)]
    assert not any(outcome.kept for outcome in run(tmp_path, (2,), again=True))
    assert [entry.rows for entry in LayoutTable.load(first.path).entries] == [2, 1, 2]


@interpreter
@pytest.mark.usefixtures("deep_gemm")
@pytest.mark.parametrize("old", [{"deep_gemm": "0.0.9"}, {"triton": "3.0.0"}], ids=str)
def test_entries_of_other_versions_are_measured_again(tmp_path: Path, old: dict[str, str]) -> None:
    where = place(CONFIG, tmp_path, Environment.probe("cpu"))
    entry = where.entry(STANDARD, 1, {MASKED: 1e-3})
    assert entry is not None
    where.save(replace(entry, **old))  # type: ignore[arg-type]
    (outcome,) = run(tmp_path)
    assert not outcome.kept
    assert outcome.entry is not None
    assert (outcome.entry.deep_gemm, outcome.entry.triton) == (where.deep_gemm, where.triton)
    assert LayoutTable.load(where.path).entries == (outcome.entry,)


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_fp8(tmp_path: Path) -> None:
    (outcome,) = run(tmp_path, (2,), dtype="fp8")
    assert outcome.entry is not None
    assert outcome.entry.microseconds.keys() == {MASKED, CONTIGUOUS, TRITON_FUSED_MOE}
    assert outcome.path.name == "E1-K1-H128-I128-fp8_block.json"
    assert LayoutTable.load(outcome.path).layer.dtype == "fp8_block"


@interpreter
@pytest.mark.usefixtures("deep_gemm")
@pytest.mark.parametrize("layout", [MASKED, CONTIGUOUS, TRITON_FUSED_MOE])
def test_a_layer_takes_the_layout_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    where = place(CONFIG, tmp_path, Environment.probe("cpu"))
    entry = where.entry(STANDARD, 2, {layout: 1.0})
    assert entry is not None
    where.save(entry)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    layer, inputs = Layer.random("x", CONFIG, CPU, 0), Inputs.random(CONFIG, 3, "uniform", CPU, 1)
    built = moe_plugin.build(CONFIG, layer.w13, layer.w2, strategy="local+deep_gemm_hybrid")
    built(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
    assert built.counters() == {f"deep_gemm_hybrid.{layout}": 1}


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({MASKED: 100.0, TRITON_FUSED_MOE: 101.0}, TRITON_FUSED_MOE),
        ({MASKED: 100.0, TRITON_FUSED_MOE: 101.5}, MASKED),
        ({MASKED: 100.0, CONTIGUOUS: 99.9}, CONTIGUOUS),
        ({MASKED: 100.0, CONTIGUOUS: 90.0, TRITON_FUSED_MOE: 95.0}, CONTIGUOUS),
        ({TRITON_FUSED_MOE: 50.0, MASKED: 100.0}, TRITON_FUSED_MOE),
    ],
    ids=str,
)
def test_the_fastest_is_taken_unless_triton_fused_moe_is_as_fast(
    tmp_path: Path, times: dict[str, float], taken: str
) -> None:
    entry = place(CONFIG, tmp_path).entry(STANDARD, 64, times)
    assert entry is not None
    assert (entry.layout, entry.rows, entry.microseconds) == (taken, 64, times)
    assert (entry.deep_gemm, entry.triton) == ("0.1.5", "3.6.0")


def test_without_times_there_is_no_entry(tmp_path: Path) -> None:
    assert place(CONFIG, tmp_path).entry(STANDARD, 64, {}) is None


def test_the_place_of_a_table(tmp_path: Path) -> None:
    found = place(replace(CONFIG, quantization=Fp8Block()), tmp_path)
    assert found.path == tmp_path / "layouts" / "NVIDIA_H200" / "E1-K1-H128-I128-fp8_block.json"
    assert found.table().entries == ()


Change = Callable[[MoEConfig], MoEConfig]


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (lambda config: replace(config, hidden_size=96), "E1-K1-H96-I128-bf16 here: sizes: needs multiples of 64"),
        (lambda config: replace(config, has_bias=True), "has_bias: needs has_bias=False"),
    ],
    ids=["sizes", "has_bias"],
)
def test_a_layer_that_cannot_run_is_an_error(tmp_path: Path, change: Change, gate: str) -> None:
    with pytest.raises(ConfigError, match=f"deep_gemm_hybrid cannot run .*{gate}"):
        place(change(CONFIG), tmp_path)


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_what_cannot_be_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    sweep = Sweep(layers=(LAYER, "1,1,96,128"), tokens=(1,), device="cpu")
    reports: list[LayoutOutcome] = []
    with pytest.raises(ConfigError, match="E1-K1-H96-I128-bf16"):
        tune_layouts(sweep, tmp_path, False, reports.append)
    good = replace(sweep, layers=(LAYER,))
    ((_, found),) = layout_places(good, tmp_path).items()
    found.path.parent.mkdir(parents=True)
    found.path.write_text("{")
    with pytest.raises(ConfigError, match="not a layout table"):
        tune_layouts(good, tmp_path, False, reports.append)
    assert reports == []
