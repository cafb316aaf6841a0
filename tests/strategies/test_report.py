"""The selection report as text, as one line and as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_plugin.environment import Environment
from moe_plugin.experts.triton_fused_moe import TritonFusedMoE
from moe_plugin.strategies.selector import explain, strategy_names
from tests.matrix.third_party import register
from tests.strategies.machines import CPU, gpu, layer_config

REPORT_KEYS = {
    "requested": str,
    "layer": str,
    "environment": str,
    "chosen": dict,
    "strategies": dict,
}
STRATEGY_KEYS = {
    "strategy": str,
    "rank": (int, type(None)),
    "standing": str,
    "why": str,
    "gates": list,
    "workspace_bytes": dict,
    "extra_weight_bytes": int,
    "host_syncs": int,
    "details": dict,
}
GATE_KEYS = {
    "part": str,
    "name": str,
    "ok": bool,
    "seen": str,
    "needs": str,
    "fix": (str, type(None)),
    "auto_only": bool,
}


def assert_has(value: dict[str, Any], keys: dict[str, Any]) -> None:
    assert value.keys() == keys.keys()
    assert {key: type(value[key]) for key in keys if not isinstance(value[key], keys[key])} == {}


def assert_follows_schema(report: dict[str, Any]) -> None:
    """Programs read this: a change here is a change of the interface."""
    assert_has(report, REPORT_KEYS)
    assert report["chosen"].keys() == report["strategies"].keys() == {"decode", "prefill"}
    for phase, entries in report["strategies"].items():
        assert report["chosen"][phase] in {None, *(entry["strategy"] for entry in entries)}
        for entry in entries:
            assert_has(entry, STRATEGY_KEYS)
            assert entry["standing"] in {"refused", "explicit only", "available"}
            assert all(isinstance(size, int) and size >= 0 for size in entry["workspace_bytes"].values())
            assert all(isinstance(words, str) for words in entry["details"].values())
            assert not (entry["details"] and entry["standing"] == "refused")
            for gate in entry["gates"]:
                assert_has(gate, GATE_KEYS)
            failed = [gate for gate in entry["gates"] if not gate["ok"] and not gate["auto_only"]]
            assert (entry["standing"] == "refused") == bool(failed)
            assert all(gate["name"] in entry["why"] for gate in failed)


REQUESTS = {
    "auto": ("auto", gpu(90), {}),
    "explicit": ("nccl", gpu(90), {"ep_size": 8}),
    "refused": ("local+torch_native", CPU, {"ep_size": 8}),
    "none": ("auto", CPU.pretend(backends=()), {"ep_size": 8}),
    "phased": ("decode=triton,prefill=torch", gpu(80), {"cuda_graph": True}),
}


@pytest.fixture(params=REQUESTS.values(), ids=REQUESTS)
def asked(request: pytest.FixtureRequest) -> tuple[str, Environment, dict[str, Any]]:
    return request.param


def test_json_schema(asked: tuple[str, Environment, dict[str, Any]]) -> None:
    register()
    strategy, environment, layer = asked
    report = json.loads(explain(layer_config(**layer), strategy, environment).json())
    assert_follows_schema(report)
    assert report["requested"] == strategy
    for entries in report["strategies"].values():
        assert [entry["strategy"] for entry in entries] == strategy_names()


def test_text_has_every_strategy_and_every_gate(asked: tuple[str, Environment, dict[str, Any]]) -> None:
    register()
    strategy, environment, layer = asked
    report = explain(layer_config(**layer), strategy, environment)
    text = report.text(width=400)
    assert report.line() in text
    for entries in report.entries.values():
        for entry in entries:
            assert entry.strategy in text
            for gate in entry.verdict.gates:
                assert f"{'pass' if gate.ok else 'FAIL'} {gate}" in text


def test_text_keeps_its_header_lines_whole_and_its_table_within_the_width() -> None:
    report = explain(layer_config(), "auto", gpu(90))
    for width in (80, 120, 200):
        header, table = report.text(width).splitlines()[:3], report.text(width).splitlines()[3:]
        assert header[0] == report.line()
        assert max(map(len, table)) <= width
    # At the usual width every name is in one piece.
    for name in strategy_names():
        assert name in report.text()


def test_text_marks_the_choice() -> None:
    text = explain(layer_config(), "torch", gpu(90)).text()
    assert "* local+torch_native" in text
    assert text.count("* ") == 1
    assert str(explain(layer_config(), "torch", gpu(90))) == text


def test_text_has_colours_only_on_request() -> None:
    report = explain(layer_config(), "auto", gpu(90))
    assert "\x1b[" not in report.text()
    assert "\x1b[" in report.text(color=True)


def test_phases_are_shown_apart_only_where_they_differ() -> None:
    assert "decode phase" not in explain(layer_config(), "auto", gpu(90)).text()
    phased = explain(layer_config(cuda_graph=True), "decode=triton,prefill=torch", gpu(80))
    assert "decode phase" in phased.text()
    assert "prefill phase" in phased.text()
    assert "decode: local+triton_fused_moe (" in phased.line()
    assert "prefill: local+torch_native (" in phased.line()


def test_the_line_says_what_why_and_how_much() -> None:
    report = explain(layer_config(), "auto", gpu(90))
    assert report.line().startswith("moe_strategy auto -> local+triton_fused_moe (every expert is on this rank")
    assert "MiB" in report.line()
    assert "\n" not in report.line()


HOPPER = "hopper: TMA, wgmma, warp specialization"
PORTABLE = "portable: sm: needs SM 90: wgmma exists nowhere else, saw SM 80"


@pytest.mark.parametrize(("sm", "words"), [(90, HOPPER), (80, PORTABLE)])
def test_what_a_class_does_inside_is_shown_everywhere(sm: int, words: str) -> None:
    report = explain(layer_config(), "auto", gpu(sm))
    assert f", kernels {words})" in report.line()
    assert f"triton_fused_moe.kernels: {words}" in report.text(width=400)
    by_name = {entry["strategy"]: entry["details"] for entry in report.to_dict()["strategies"]["decode"]}
    assert by_name["local+triton_fused_moe"] == {"triton_fused_moe.kernels": words}
    assert by_name["local+torch_native"] == {}


def test_long_details_are_whole_in_the_table_and_short_in_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "every one of " + "many, " * 30 + "words"
    monkeypatch.setattr(TritonFusedMoE, "details", classmethod(lambda cls, config, environment: {"kernels": words}))
    report = explain(layer_config(), "auto", gpu(90))
    shown = report.line().partition(", kernels ")[2]
    assert shown.startswith("every one of many, many")
    assert shown.endswith(" ...)")
    assert len(shown) <= 81
    assert words in report.text(width=400)


def test_the_layer_and_the_machine_are_described() -> None:
    report = explain(layer_config(ep_size=4, tp_size=2), "auto", gpu(90))
    for words in ("16 experts", "top-4", "hidden 64", "intermediate 128", "bfloat16", "EP 4 x TP 2"):
        assert words in report.layer
    assert "SM 90" in report.environment
    assert explain(layer_config(), "auto", CPU).environment == "CPU, torch 2.9.0+cpu"


def test_memory_grows_with_the_tokens_and_the_phase_sees_its_own() -> None:
    small, large = (explain(layer_config(max_tokens_per_rank=n), "torch", CPU).entry("decode") for n in (64, 4096))
    assert small is not None
    assert large is not None
    assert 0 < small.workspace_bytes < large.workspace_bytes
    phased = explain(layer_config(max_tokens_per_rank=4096), "decode=torch,prefill=gloo", CPU)
    decode, prefill = (
        {entry.strategy: entry.workspace_bytes for entry in phased.entries[phase]} for phase in ("decode", "prefill")
    )
    assert all(decode[name] < prefill[name] for name in decode)
