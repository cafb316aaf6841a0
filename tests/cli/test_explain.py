"""`moe-plugin explain`: any model, any machine, no GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import moe_plugin
from moe_plugin.cli import app
from moe_plugin.errors import ConfigError, UnknownStrategyError
from moe_plugin.presets import PRESETS


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "200"})


def asked(*arguments: str) -> dict[str, Any]:
    """The JSON answer."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def standing(report: dict[str, Any], phase: str = "decode") -> dict[str, str]:
    return {entry["strategy"]: entry["standing"] for entry in report["strategies"][phase]}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset: str) -> None:
    report = asked("--preset", preset, "--sm", "90", "--world", "8")
    layer = PRESETS[preset].layer
    assert report["layer"].startswith(f"{layer['num_experts']} experts, top-{layer['top_k']}, ")
    assert "EP 8 x TP 1" in report["layer"]
    assert report["chosen"] == dict.fromkeys(("decode", "prefill"), "hybrid_dense_routing+triton_fused_moe")


@pytest.mark.parametrize("preset", PRESETS)
def test_text_lists_every_strategy(preset: str) -> None:
    result = run("--preset", preset, "--sm", "90", "--world", "8")
    assert result.exit_code == 0, result.output
    for strategy in moe_plugin.strategy_names():
        assert strategy in result.stdout
    assert "FAIL local.ep_size: needs 1" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("fp32", "float32"),
        ("fp8_block", "bfloat16 fp8_block"),
        ("fp8_per_tensor", "bfloat16 fp8_per_tensor"),
        ("fp8_per_token", "bfloat16 fp8_per_token"),
    ],
)
def test_every_dtype(dtype: str, shown: str) -> None:
    report = asked("--dtype", dtype, "--sm", "90")
    assert f", {shown}, " in report["layer"]
    gates = {gate["name"]: gate for gate in report["strategies"]["decode"][0]["gates"]}
    assert gates["quantization"]["seen"] == (dtype if dtype.startswith("fp8") else "none")


@pytest.mark.parametrize("sm", ["80", "89", "90", "100", "120"])
@pytest.mark.parametrize("graph", [(), ("--cuda-graph",)], ids=["eager", "graph"])
def test_every_machine(sm: str, graph: tuple[str, ...]) -> None:
    report = asked("--sm", sm, *graph)
    assert f"SM {sm}" in report["environment"]
    assert report["chosen"]["decode"] == "local+triton_fused_moe"
    captured_torch = not graph or sm in ("90", "100")
    assert standing(report)["local+torch_native"] == ("available" if captured_torch else "refused")
    assert f"cuda_graph={bool(graph)}" in report["layer"]


@pytest.mark.parametrize("dtype", ["bf16", "fp8_block"])
@pytest.mark.parametrize("sm", ["89", "90", "100"])
def test_which_kernels_run_and_why(sm: str, dtype: str) -> None:
    entries = asked("--sm", sm, "--dtype", dtype)["strategies"]["decode"]
    entry = next(each for each in entries if each["strategy"] == "local+triton_fused_moe")
    words = entry["details"]["triton_fused_moe.kernels"]
    if sm == "90":
        assert words.startswith("hopper: ")
    else:
        assert words.startswith("portable: sm: needs SM 90")
        assert words.endswith(f"saw SM {sm}")
    assert f"kernels {words})" in run("--sm", sm, "--dtype", dtype).stdout.splitlines()[0]


@pytest.mark.parametrize("world", ["1", "2", "3", "8"])
def test_every_number_of_ranks(world: str) -> None:
    report = asked("--world", world, "--sm", "90")
    assert f"EP {world} x TP 1" in report["layer"]
    assert (standing(report)["local+torch_native"] == "refused") == (world != "1")


def test_several_nodes() -> None:
    one, two = (asked("--world", "8", "--sm", "90", "--nodes", nodes) for nodes in ("1", "2"))
    assert "EP 8 x TP 1, 2 nodes" in two["layer"]
    details, memory = (
        [
            entry[what]
            for report in (one, two)
            for entry in report["strategies"]["decode"]
            if entry["strategy"] == "hybrid_dense_routing+triton_fused_moe"
        ]
        for what in ("details", "workspace_bytes")
    )
    assert "hybrid_dense_routing.nodes" not in details[0]
    assert details[1]["hybrid_dense_routing.nodes"].startswith("2 of 4 ranks")
    assert details[1]["hybrid_dense_routing.transport"].startswith("NVLink kernels on at most 24 SMs")
    assert sum(memory[0].values()) < sum(memory[1].values())


def test_tensor_parallelism_and_tokens() -> None:
    report = asked("--tp", "2", "--max-tokens", "99", "--sm", "90")
    assert "EP 1 x TP 2, at most 99 tokens per rank" in report["layer"]


def test_this_machine_unless_told_another() -> None:
    assert asked()["environment"] == moe_plugin.Environment.probe().describe()


@pytest.mark.parametrize("flag", ["--moe_strategy", "--moe-strategy"])
def test_an_explicit_choice_that_is_refused_is_explained(flag: str) -> None:
    result = run(flag, "local+torch_native", "--world", "2", "--sm", "90")
    assert result.exit_code == 0
    line = result.stdout.splitlines()[0]
    assert line.startswith("moe_strategy local+torch_native -> local+torch_native (refused: local.ep_size: needs 1")


def test_phases() -> None:
    report = asked("--moe_strategy", "decode=triton,prefill=torch", "--sm", "80", "--cuda-graph")
    assert report["chosen"] == {"decode": "local+triton_fused_moe", "prefill": "local+torch_native"}
    assert standing(report, "decode")["local+torch_native"] == "refused"
    assert standing(report, "prefill")["local+torch_native"] == "available"


@pytest.mark.parametrize(
    ("arguments", "words", "error"),
    [
        (["--preset", "deepseekv3"], "unknown preset 'deepseekv3'. Did you mean 'deepseek-v3'?", ConfigError),
        (["--moe_strategy", "local+trton_fused_moe"], "Did you mean 'local+triton_fused_moe'?", UnknownStrategyError),
        (["--tp", "7"], "intermediate_size 768 is not divisible by tp_size 7", ConfigError),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], words: str, error: type[Exception]) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert result.stdout == ""
    with_traceback = run(*arguments, "--traceback")
    assert isinstance(with_traceback.exception, error)


@pytest.mark.parametrize(
    "arguments", [["--dtype", "int4"], ["--world", "0"], ["--max-tokens", "0"], ["--sm", "new"], ["--no-such-option"]]
)
def test_wrong_options_are_usage_errors(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.stderr
