"""The times by which `auto` ranks dispatchers are those of the committed measurements, and it follows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_plugin.config import Fp8Block, Fp8PerTensor, QuantConfig
from moe_plugin.environment import Environment
from moe_plugin.strategies.comm_times import (
    BF16,
    DEVICE,
    FP8,
    HIGH_THROUGHPUT,
    HYBRID,
    LOW_LATENCY,
    NCCL,
    measured_cell,
)
from moe_plugin.strategies.selector import explain
from tests.strategies.machines import WITH_DEEP_EP, gpu, layer_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
H200 = gpu(90, device_name=DEVICE, packages=WITH_DEEP_EP)
APART = H200.pretend(peer_access=False)
"""Where GPUs do not reach each other's memory, as far as this package can see."""


def layer(ep_size: int, tokens: int, quantization: QuantConfig | None = None, **changes: Any) -> Any:
    return layer_config(ep_size, hidden_size=2048, max_tokens_per_rank=tokens, quantization=quantization, **changes)


@pytest.mark.parametrize(
    ("file", "ranks"), [("4-gpus", 4), ("2-gpus-bf16", 2), ("2-gpus-fp8", 2)], ids=["4 GPUs", "2, bf16", "2, fp8"]
)
def test_they_are_the_medians_of_the_committed_run(file: str, ranks: int) -> None:
    run = json.loads((BENCHMARKS / f"comm-h200-2026-11-21-{file}.json").read_text())
    assert run["machine"]["device"] == DEVICE
    for cell in run["comm"]:
        quantization = None if cell["dtype"] == "bf16" else Fp8Block()
        found = measured_cell(layer(ranks, cell["tokens"], quantization), H200)
        assert found is not None
        assert (found.ranks, found.tokens) == (ranks, cell["tokens"])
        times = {each["contender"]: each["graph"] for each in cell["measurements"] if each["role"] == "strategy"}
        assert found.times == {
            name: pytest.approx(graph["both"]["median"], abs=0.06) for name, graph in times.items() if graph
        }


def test_the_nearest_measurement_speaks_for_a_layer() -> None:
    for tokens, nearest in ((1, 8), (31, 8), (33, 128), (255, 128), (257, 512), (2048, 4096), (100_000, 8192)):
        found = measured_cell(layer(4, tokens), H200)
        assert found is not None
        assert found.tokens == nearest
    for ranks, measured in ((2, 2), (3, 2), (4, 4), (8, 4)):
        found = measured_cell(layer(ranks, 8), H200)
        assert found is not None
        assert found.ranks == measured
    for scheme, rows in ((Fp8Block(), FP8), (Fp8PerTensor(), FP8), (Fp8PerTensor(static_activations=True), BF16)):
        found = measured_cell(layer(2, 8, scheme), H200)
        assert found is not None
        assert found.rows == rows
    assert measured_cell(layer(1, 8), H200) is None
    assert measured_cell(layer(16, 8), H200) is None
    assert measured_cell(layer(4, 8), gpu(90)) is None


@pytest.mark.parametrize(
    ("environment", "ranks", "tokens", "quantization", "dispatcher"),
    [
        (H200, 4, 8, None, HYBRID),
        (H200, 4, 8192, Fp8Block(), HYBRID),
        (H200, 2, 512, Fp8Block(), HYBRID),
        (H200, 2, 4096, Fp8Block(), NCCL),
        (H200, 2, 4096, None, HYBRID),
        (APART, 4, 8, None, LOW_LATENCY),
        (APART, 4, 128, None, NCCL),
        (APART, 4, 4096, None, HIGH_THROUGHPUT),
        (APART, 2, 4096, None, NCCL),
        (gpu(90, packages=WITH_DEEP_EP), 4, 8, None, HYBRID),
        (gpu(90, packages=WITH_DEEP_EP, peer_access=False), 4, 4096, None, NCCL),
    ],
    ids=lambda value: "" if isinstance(value, Environment) else str(value),
)
def test_auto_takes_the_fastest_that_runs(
    environment: Environment, ranks: int, tokens: int, quantization: QuantConfig | None, dispatcher: str
) -> None:
    chosen = explain(layer(ranks, tokens, quantization), "auto", environment).chosen
    assert chosen["prefill"] == f"{dispatcher}+triton_fused_moe"


def test_the_report_says_what_was_measured() -> None:
    report = explain(layer(2, 4096, Fp8Block()), "auto", H200)
    why = {entry.strategy: entry.why() for entry in report.entries["prefill"]}
    assert "528 us on 2 NVIDIA H200 with 4096 fp8 rows; nccl_all_to_all 488 us" in why[f"{HYBRID}+triton_fused_moe"]
    assert "nccl_all_to_all 488 us" in why[f"{HIGH_THROUGHPUT}+triton_fused_moe"]
    elsewhere = explain(layer(2, 4096), "auto", gpu(90, packages=WITH_DEEP_EP))
    entry = next(e for e in elsewhere.entries["prefill"] if e.strategy == f"{HIGH_THROUGHPUT}+torch_native")
    assert "no times for 2 ranks of assumed SM 90" in entry.why()
    assert entry.standing() == "explicit only"
