"""`moe-plugin bench`: measured on a CPU in Triton's interpreter, saved, drawn and shown again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from moe_plugin.bench.results import Run
from moe_plugin.cli import app
from tests.bench.runs import OURS, cell, measured, run

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "220"})


@interpreter
def test_experts_from_start_to_picture(tmp_path: Path) -> None:
    files = {name: tmp_path / f"tiny.{name}" for name in ("json", "csv", "png")}
    arguments = ["--layer", "4,2,64,32", "--tokens", "1,3", "--dtype", "bf16", "--peer", "torch,vllm"]
    arguments += ["--time-budget", "0.01", "--device", "cpu", "--seed", "7"]
    outputs = ["--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"])]
    result = bench("experts", *arguments, *outputs)
    assert result.exit_code == 0, result.output
    results = Run.load(files["json"])
    assert [c.tokens for c in results.cells] == [1, 3]
    assert [[m.status for m in c.measurements[:2]] for c in results.cells] == [["ok", "ok"]] * 2
    assert files["csv"].read_text().count("\n") == 1 + 2 * 3
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    # The command that repeats it is printed, and measures the same.
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("repeat with: moe-plugin bench experts ")]
    assert line.endswith(results.command)
    assert str(tmp_path) not in files["json"].read_text()
    again = bench(*results.command.split()[2:], "--json", str(files["json"]))
    assert again.exit_code == 0, again.output
    repeated = Run.load(files["json"])
    assert repeated.settings == results.settings
    assert [c.measurements[0].error for c in repeated.cells] == [c.measurements[0].error for c in results.cells]
    assert "[2/2] 4,2,64,32 bf16 3: local+triton_fused_moe" in result.stderr
    for words in ("measured ceilings: copy", "vllm not installed: pip install", "torch", "Ratios"):
        assert words in result.stdout


def test_a_wrong_strategy_exits_with_1_and_keeps_the_results(tmp_path: Path) -> None:
    from moe_plugin.experts.torch_native import TorchNative
    from moe_plugin.strategies.registry import experts_classes, register_experts

    class Doubles(TorchNative):
        name = "doubles"

        def apply(self, *arguments, **options):
            return super().apply(*arguments, **options) * 2

    register_experts(Doubles)
    file = tmp_path / "wrong.json"
    try:
        result = bench(
            *("experts", "--layer", "4,2,64,32", "--tokens", "2", "--strategy", "local+doubles"),
            *("--time-budget", "0.01", "--device", "cpu", "--json", str(file)),
        )
    finally:
        experts_classes.unregister("doubles")
    assert result.exit_code == 1
    assert "wrong: relative error 1.0" in result.stdout
    assert Run.load(file).cells[0].measurements[0].best is None


@interpreter
def test_experts_alone_beside_a_whole_layer(tmp_path: Path) -> None:
    file = tmp_path / "batched.json"
    strategies = ("local+torch_native", "batched+torch_native", "batched+deep_gemm_hybrid")
    arguments = [word for strategy in strategies for word in ("--strategy", strategy)]
    arguments += ["--layer", "2,1,64,64", "--tokens", "2", "--skew", "balanced", "--time-budget", "1e-6"]
    result = bench("experts", *arguments, "--device", "cpu", "--json", str(file))
    assert result.exit_code == 0, result.output
    (cell,) = Run.load(file).cells
    assert [(m.contender, m.role) for m in cell.measurements] == [(strategy, "strategy") for strategy in strategies]
    assert [m.status for m in cell.measurements] == ["ok", "ok", "unsupported"]
    assert cell.measurements[1].eager is not None
    assert "deep_gemm_hybrid: deep_gemm: needs an importable installation" in cell.measurements[2].detail
    assert (cell.skew, cell.experts_hit) == ("balanced", 2)


def test_routing_is_measured_printed_and_saved(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    arguments = ["--tokens", "2,5", "--num-experts", "6", "--top-k", "2", "--world", "3", "--time-budget", "1e-6"]
    result = bench("routing", *arguments, "--device", "cpu", "--json", str(file))
    assert result.exit_code == 0, result.output
    saved = json.loads(file.read_text())
    assert [len(cell["measurements"]) for cell in saved["cells"]] == [8, 8]
    assert {m["status"] for cell in saved["cells"] for m in cell["measurements"]} == {"ok"}
    assert str(tmp_path) not in file.read_text()
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("repeat with: moe-plugin bench routing ")]
    assert line.endswith(saved["command"])
    again = bench(*saved["command"].split()[2:], "--json", str(file))
    assert again.exit_code == 0, again.output
    assert json.loads(file.read_text())["settings"] == saved["settings"]
    for words in ("5 tokens on each of 3 ranks, 6 experts, top-2, without the all-gather", "argsort", "probabilities"):
        assert words in result.stdout


def test_a_wrong_routing_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_plugin.bench import routing
    from moe_plugin.kernels.dense_routing import dense_routing_reference

    def of_other_rank(ids, rank, num_slots, **options):
        return dense_routing_reference(ids.flip(0), rank, num_slots, **options)

    monkeypatch.setattr(routing, "dense_routing_reference", of_other_rank)
    result = bench("routing", "--tokens", "4", "--num-experts", "6", "--top-k", "2", "--device", "cpu")
    assert result.exit_code == 1
    assert "wrong: rows differ from the reference" in result.stdout


def test_plot_and_show_read_what_was_saved(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    run(cell(measured(OURS, 250.0), measured("vllm", 300.0))).save(files[0])
    run(cell(measured(OURS, 150.0), measured("vllm", 300.0), tokens=8)).save(files[1])
    picture, table = tmp_path / "out.svg", tmp_path / "out.csv"
    result = bench("plot", *map(str, files), "--out", str(picture), "--csv", str(table))
    assert result.exit_code == 0, result.output
    assert "<svg" in picture.read_text()
    assert table.read_text().count("\n") == 5
    result = bench("show", str(files[1]))
    assert result.exit_code == 0, result.output
    assert "repeat with: moe-plugin bench experts --preset qwen3-30b" in result.stdout
    assert "2.00x" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experts"], "layers is empty"),
        (["experts", "--preset", "qwen3-30"], "Did you mean 'qwen3-30b'?"),
        (["experts", "--preset", "all", "--tokens", "1,x"], "whole numbers by commas, got '1,x'"),
        (["experts", "--preset", "all", "--peer", "torch,vlm"], "unknown peer 'vlm'"),
        (["experts", "--preset", "all", "--device", "tpu"], "auto, cuda or cpu"),
        (["experts", "--preset", "all", "--strategy", "batched+torch"], "BatchedExperts is taken by batched+"),
        (["experts", "--preset", "all", "--skew", "even"], "uniform, zipf, one-expert, balanced"),
        (["experts", "--preset", "qwen3-30b", "--json", "absent/x.json"], "there is no folder absent"),
        (["plot", "absent.json", "--out", "x.png"], "absent.json"),
        (["show", "absent.json"], "absent.json"),
        (["routing", "--tokens", "0"], "token counts must be positive"),
        (["routing", "--num-experts", "40000"], "enough for 32767"),
        (["routing", "--device", "cpu", "--json", "absent/x.json"], "there is no folder absent"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], words: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_help_names_what_there_is() -> None:
    result = bench("experts", "--help")
    assert result.exit_code == 0
    for words in (
        "--preset",
        "deepseek-v3-ep8",
        "vllm_deep_gemm",
        "one-expert",
        "balanced",
        "batched+",
        "--time-budget",
    ):
        assert words in result.output
