"""Other names of strategies, and what RTP-LLM's opt-in names ask for on top."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from moe_plugin.config import Fp8Block, Fp8PerTensor
from moe_plugin.environment import Environment
from moe_plugin.errors import StrategyUnsupportedError
from moe_plugin.strategies import aliases
from moe_plugin.strategies.aliases import ALIASES, Alias
from moe_plugin.strategies.report import Entry, SelectionReport
from moe_plugin.strategies.selector import explain, parse_strategy, select, strategy_names
from moe_plugin.verdict import Gate
from tests.strategies.machines import CPU, MEASURED, TRITON, WITH_DEEP_EP, deep_gemm_with, gpu, layer_config

BF16 = "no_quant_dp_normal_deepgemm"
FP8_EP = "fp8_per_block_ep_normal"
FP8_LOCAL = "fp8_per_block_no_dp"
LAYERS: dict[str, dict[str, Any]] = {
    BF16: {"ep_size": 8},
    FP8_EP: {"ep_size": 8, "hidden_size": 128, "quantization": Fp8Block()},
    FP8_LOCAL: {"hidden_size": 128, "quantization": Fp8Block()},
}
"""The names with gates of their own, and a layer that each can run."""
WITH_ALL = gpu(90, packages=WITH_DEEP_EP)
GATES = ["moe_strategy", "dtype", "quantization", "symbols", "sm", "cuda_graph"]


def entry_of(report: SelectionReport, phase: str = "decode") -> Entry:
    entry = report.entry(phase)
    assert entry is not None
    return entry


def test_every_name_has_a_strategy_and_is_none() -> None:
    for name, alias in ALIASES.items():
        assert alias.strategy in strategy_names()
        assert name not in strategy_names()
    assert {name for name, alias in ALIASES.items() if alias.gates} == LAYERS.keys()


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_stands_for_its_strategy_in_every_phase(name: str) -> None:
    request = parse_strategy(name)
    assert (request.decode, request.prefill) == (ALIASES[name].strategy,) * 2
    assert request.aliases == {"decode": name, "prefill": name}
    phased = parse_strategy(f"prefill={name}")
    assert (phased.prefill, phased.aliases) == (ALIASES[name].strategy, {"prefill": name})


@pytest.mark.parametrize("name", sorted(ALIASES.keys() - LAYERS.keys()))
def test_a_plain_name_changes_nothing_but_what_was_requested(name: str) -> None:
    config, environment = layer_config(), gpu(90)
    by_alias = explain(config, name, environment)
    assert by_alias.requested == name
    assert by_alias.entries == explain(config, ALIASES[name].strategy, environment).entries
    assert by_alias.chosen == explain(config, ALIASES[name].strategy, environment).chosen


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gates_of_a_name_come_first_in_order_and_pass(name: str, cuda_graph: bool) -> None:
    config = layer_config(**LAYERS[name], cuda_graph=cuda_graph)
    report = select(config, name, WITH_ALL)
    entry = entry_of(report)
    assert report.requested == name
    assert set(report.chosen.values()) == {ALIASES[name].strategy}
    first = entry.verdict.gates[: len(GATES)]
    assert [gate.name for gate in first] == GATES
    # The rule for graphs is that of the pair, of the dispatcher where it has one; the rest is asked by the name.
    asks = "deep_gemm_hybrid" if name == FP8_LOCAL else "deepep_high_throughput"
    assert [gate.part for gate in first] == [name] * 5 + [asks]
    assert str(first[0]) == f"{name}.moe_strategy: {name}"
    # What the pair asks is all there, after it.
    own = entry_of(explain(config, ALIASES[name].strategy, WITH_ALL)).verdict.gates
    assert set(entry.verdict.gates[len(GATES) - 1 :]) == set(own)
    assert f"pass {first[0]}" in report.text(width=400)
    gates = next(e for e in json.loads(report.json())["strategies"]["decode"] if e["strategy"] == entry.strategy)
    assert [gate["name"] for gate in gates["gates"][: len(GATES)]] == GATES


ONLY_BF16, ONLY_FP8 = deep_gemm_with("bf16", "psum"), deep_gemm_with("fp8", "psum")
REFUSED: dict[str, tuple[str, Environment, dict[str, Any], str, str]] = {
    "bf16: dtype": (BF16, gpu(90), {"dtype": torch.float16}, "dtype", "needs one of bfloat16, saw float16"),
    "bf16: fp8": (BF16, gpu(90), LAYERS[FP8_EP], "quantization", "needs one of none, saw fp8_block"),
    "bf16: no package": (BF16, gpu(90, packages=TRITON), {}, "symbols", "saw not installed"),
    "bf16: fp8 symbols": (BF16, gpu(90, packages=ONLY_FP8), {}, "symbols", "needs the grouped bf16 GEMMs of DeepGEMM"),
    "bf16: SM 89": (BF16, gpu(89), {}, "sm", "needs SM 90 or newer, saw SM 89"),
    "bf16: no GPU": (BF16, CPU.pretend(packages=ONLY_BF16), {}, "sm", "needs SM 90 or newer, saw no CUDA device"),
    "fp8: dtype": (FP8_EP, gpu(90), {"dtype": torch.float16}, "dtype", "needs one of bfloat16, saw float16"),
    "fp8: unquantized": (FP8_EP, gpu(90), {"quantization": None}, "quantization", "needs one of fp8_block, saw none"),
    "fp8: per tensor": (
        FP8_LOCAL,
        gpu(90),
        {"quantization": Fp8PerTensor()},
        "quantization",
        "needs one of fp8_block, saw fp8_per_tensor",
    ),
    "fp8: other tiles": (
        FP8_LOCAL,
        gpu(90),
        {"quantization": Fp8Block(64, 128)},
        "quantization",
        "needs fp8_block in tiles of 128 x 128",
    ),
    "fp8: bf16 symbols": (
        FP8_LOCAL,
        gpu(90, packages=ONLY_BF16),
        {},
        "symbols",
        "needs the grouped fp8 GEMMs of DeepGEMM",
    ),
    "fp8: SM 89": (FP8_LOCAL, gpu(89), {}, "sm", "needs SM 90 or newer, saw SM 89"),
    # The name's gates pass, and one of the pair's does not.
    "the pair: ep_size": (FP8_LOCAL, gpu(90), {"ep_size": 2}, "ep_size", "needs 1"),
    "the pair: nvcc": (BF16, gpu(90, nvcc=False, packages=WITH_DEEP_EP), {}, "jit compiler", "jit compiler: needs"),
}


@pytest.mark.parametrize(("name", "environment", "changes", "gate", "words"), REFUSED.values(), ids=REFUSED)
def test_the_first_gate_that_fails_is_the_reason_and_nothing_else_runs(
    name: str, environment: Environment, changes: dict[str, Any], gate: str, words: str
) -> None:
    config = layer_config(**(LAYERS[name] | changes))
    with pytest.raises(StrategyUnsupportedError) as caught:
        select(config, name, environment)
    report = caught.value.report
    failed = entry_of(report).verdict.failed
    assert failed[0].name == gate
    assert (failed[0].part == name) == (gate in GATES)
    assert words in str(failed[0])
    message = str(caught.value)
    assert f"moe_strategy {ALIASES[name].strategy!r} (asked for as {name!r}) cannot run here: {failed[0]}" in message
    assert report.requested == name
    assert set(report.chosen.values()) == {ALIASES[name].strategy}
    assert entry_of(report).details == {}


def test_the_rule_for_graphs_is_that_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    def sm(config: object, environment: Environment) -> Gate:
        return Gate("sm", True, str(environment.sm), "any")

    monkeypatch.setitem(aliases.ALIASES, "eager_only", Alias("local+torch_native", (sm,)))  # type: ignore[arg-type]
    for cuda_graph in (False, True):
        entry = entry_of(explain(layer_config(cuda_graph=cuda_graph), "eager_only", gpu(80)))
        assert [gate.name for gate in entry.verdict.gates[:3]] == ["moe_strategy", "sm", "cuda_graph"]
        assert entry.runs is not cuda_graph
        assert [gate.name for gate in entry.verdict.failed] == ["cuda_graph"] * cuda_graph


@pytest.mark.parametrize("strategy", ["auto", "nccl_all_to_all+deep_gemm_hybrid", "torch", "decode=torch"])
@pytest.mark.parametrize("device_name", [MEASURED, "NVIDIA H100"])
def test_no_other_request_meets_the_gates_of_a_name(strategy: str, device_name: str) -> None:
    report = explain(layer_config(), strategy, gpu(90, device_name=device_name))
    parts = {gate.part for entries in report.entries.values() for entry in entries for gate in entry.verdict.gates}
    assert parts.isdisjoint(ALIASES)
    assert not any(gate.name == "moe_strategy" for e in report.entries["decode"] for gate in e.verdict.gates)


def test_the_gates_of_a_name_are_on_its_strategy_alone() -> None:
    config = layer_config(**LAYERS[BF16])
    plain = explain(config, ALIASES[BF16].strategy, gpu(90)).entries["decode"]
    for entry, other in zip(explain(config, BF16, gpu(90)).entries["decode"], plain, strict=True):
        assert (entry == other) == (entry.strategy != ALIASES[BF16].strategy)


def test_each_phase_has_the_gates_of_its_own_name() -> None:
    config = layer_config(**LAYERS[BF16], cuda_graph=True)
    report = select(config, f"decode={BF16},prefill=nccl", WITH_ALL)
    assert report.requested == f"decode={BF16},prefill=nccl"
    assert report.chosen == {"decode": ALIASES[BF16].strategy, "prefill": ALIASES["nccl"].strategy}
    asked = {
        phase: [entry.strategy for entry in entries if entry.verdict.gates[0].name == "moe_strategy"]
        for phase, entries in report.entries.items()
    }
    assert asked == {"decode": [ALIASES[BF16].strategy], "prefill": []}
    both = select(config, f"decode={BF16},prefill={ALIASES[BF16].strategy}", WITH_ALL)
    graph_gates = [
        next(gate for gate in entry_of(both, phase).verdict.gates if gate.name == "cuda_graph")
        for phase in ("decode", "prefill")
    ]
    assert [gate.seen for gate in graph_gates] == ["requested", "not requested"]
