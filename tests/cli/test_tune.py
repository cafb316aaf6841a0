"""`moe-plugin tune`: tuned in Triton's interpreter, interrupted, gone on with, and used by a layer."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import moe_plugin
from moe_plugin.bench.experts import Sweep
from moe_plugin.bench.layers import Inputs, Layer
from moe_plugin.cli import app
from moe_plugin.cli.tune import _chosen_experts
from moe_plugin.experts.deep_gemm_hybrid import DeepGemmHybrid
from moe_plugin.experts.layout_tables import LayoutTable
from moe_plugin.kernels.measured_tables import ENVIRONMENT_VARIABLE, forget_tables
from moe_plugin.kernels.tile_tables import TileTable
from tests.doubles import deep_gemm as double

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")

TINY = ["--layer", "2,1,32,32", "--device", "cpu", "--time-budget", "0.05"]
LAYERS = ["--layer", "1,1,128,128", "--device", "cpu"]
LAYOUTS_ONLY = [*LAYERS, "--experts", "deep_gemm_hybrid", "--time-budget", "1e-6"]


@pytest.fixture(autouse=True)
def no_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    forget_tables()
    yield
    forget_tables()


@pytest.fixture
def deep_gemm() -> Iterator[None]:
    with double.installed():
        yield


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "220"})


@interpreter
def test_from_the_search_to_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [*TINY, "--out", str(tmp_path / "new")]
    result = tune(*arguments, "--tokens", "1,4")
    assert result.exit_code == 0, result.output
    path = tmp_path / "new" / "cpu" / "E2-K1-H32-I32-bf16.json"
    assert [entry.rows for entry in TileTable.load(path).entries] == [1, 4]
    assert "[2/2] 2,1,32,32 bf16 4 rows: " in result.stderr
    assert "0 failed, 0 wrong" in result.stderr
    for words in ("heuristic", "portable 16", f"wrote {path}", f"export {ENVIRONMENT_VARIABLE}={tmp_path / 'new'}"):
        assert words in result.stdout
    # The same command goes on; what is there is kept.
    again = tune(*arguments, "--tokens", "1,4,9")
    assert again.exit_code == 0, again.output
    assert again.stderr.count("rows: kept, ") == 2
    assert [entry.rows for entry in TileTable.load(path).entries] == [1, 4, 9]

    # And a layer takes it.
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "new"))
    config = moe_plugin.MoEConfig(num_experts=2, top_k=1, hidden_size=32, intermediate_size=32)
    layer = Layer.random("tiny", config, torch.device("cpu"), 0)
    inputs = Inputs.random(config, 5, "uniform", torch.device("cpu"), 1)
    with caplog.at_level(logging.INFO, logger="moe_plugin.kernels.tile_tables"):
        built = moe_plugin.build(config, layer.w13, layer.w2, strategy="local+triton_fused_moe")
        built(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
    assert f"portable kernels: {path}, entry for 4 rows" in caplog.text
    # DeepGEMM cannot run here, so nothing of it was measured.
    assert not (tmp_path / "new" / "layouts").exists()


@interpreter
def test_the_folder_of_the_variable_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    result = tune(*TINY, "--tokens", "1")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "cpu" / "E2-K1-H32-I32-bf16.json").is_file()
    assert "export" not in result.stdout


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_layouts_from_the_measurement_to_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*LAYOUTS_ONLY, "--out", str(tmp_path / "new"), "--tokens", "1"]
    result = tune(*arguments)
    assert result.exit_code == 0, result.output
    path = tmp_path / "new" / "layouts" / "cpu" / "E1-K1-H128-I128-bf16.json"
    (entry,) = LayoutTable.load(path).entries
    assert entry.microseconds.keys() == {"masked", "contiguous", "triton_fused_moe"}
    assert not (tmp_path / "new" / "cpu").exists()
    (line,) = result.stderr.splitlines()[:1]
    assert line.startswith(f"[1/1] 1,1,128,128 bf16 1 rows Standard: {entry.layout}; ")
    assert line.endswith("us; 0 failed, 0 wrong")
    gain = entry.microseconds["masked"] / entry.microseconds[entry.layout]
    for words in ("by layout", f"{gain:.2f}x", f"wrote {path}", f"export {ENVIRONMENT_VARIABLE}={tmp_path / 'new'}"):
        assert words in result.stdout
    # The same command keeps what is there, and --again does not.
    kept = tune(*arguments)
    assert kept.exit_code == 0, kept.output
    assert f"rows Standard: kept, {entry.layout}; " in kept.stderr
    assert LayoutTable.load(path).entries == (entry,)
    again = tune(*arguments, "--again")
    assert again.exit_code == 0, again.output
    assert "kept" not in again.stderr
    (measured,) = LayoutTable.load(path).entries
    assert measured.microseconds != entry.microseconds

    # And a layer takes it.
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "new"))
    forget_tables()
    config = moe_plugin.MoEConfig(num_experts=1, top_k=1, hidden_size=128, intermediate_size=128)
    layer = Layer.random("tiny", config, torch.device("cpu"), 0)
    inputs = Inputs.random(config, 2, "uniform", torch.device("cpu"), 1)
    built = moe_plugin.build(config, layer.w13, layer.w2, strategy="local+deep_gemm_hybrid")
    built(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
    assert built.counters() == {f"deep_gemm_hybrid.{measured.layout}": 1}


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_where_deep_gemm_runs_tiles_and_then_layouts_are_tuned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="moe_plugin.kernels.tile_tables"):
        result = tune(*LAYERS, "--time-budget", "1e-6", "--tokens", "1", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert [line.partition(" ")[0] for line in result.stderr.splitlines()[:2]] == ["[1/2]", "[2/2]"]
    tiles, layouts = (line for line in result.stdout.splitlines() if line.startswith("wrote "))
    assert tiles == f"wrote {tmp_path / 'cpu' / 'E1-K1-H128-I128-bf16.json'}"
    assert layouts == f"wrote {tmp_path / 'layouts' / 'cpu' / 'E1-K1-H128-I128-bf16.json'}"
    # Layouts were measured beside the tiles just found, and the variable is as it was.
    assert f"{tmp_path / 'cpu' / 'E1-K1-H128-I128-bf16.json'}, entry for 1 rows" in caplog.text
    assert ENVIRONMENT_VARIABLE not in os.environ


@pytest.mark.usefixtures("deep_gemm")
@pytest.mark.parametrize(
    ("layer", "dtype", "chosen"),
    [
        ("2,1,128,128", "bf16,fp8", ("triton_fused_moe", "deep_gemm_hybrid")),
        ("2,1,128,96", "bf16", ("triton_fused_moe",)),
        ("2,1,128,128", "bf16,fp16", ("triton_fused_moe",)),
    ],
)
@interpreter
def test_the_default_is_what_runs_every_layer(layer: str, dtype: str, chosen: tuple[str, ...]) -> None:
    sweep = Sweep(layers=(layer,), tokens=(1,), dtypes=tuple(dtype.split(",")), device="cpu")
    assert _chosen_experts((), sweep) == chosen
    # By name they are taken as they are, in the order in which they are tuned.
    assert _chosen_experts(("deep_gemm_hybrid", "triton_fused_moe"), sweep) == ("triton_fused_moe", "deep_gemm_hybrid")
    assert _chosen_experts(("deep_gemm_hybrid",), sweep) == ("deep_gemm_hybrid",)


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_layouts_of_which_none_is_right_are_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: DeepGemmHybrid, *arguments: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(DeepGemmHybrid, "apply", fails)
    result = tune(*LAYOUTS_ONLY, "--tokens", "1", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "1 rows Standard: nothing ran and was right (3 failed, 0 wrong; --traceback says why)" in result.stderr
    assert "wrote" not in result.stdout


def test_layouts_that_cannot_run_are_an_error_before_tiles_are_tuned(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    experts = ["--experts", "triton_fused_moe,deep_gemm_hybrid"]
    result = tune("--layer", "2,1,128,96", "--device", "cpu", "--tokens", "1", *experts, "--out", str(folder))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: deep_gemm_hybrid cannot run E2-K1-H128-I96-bf16 here: ")
    assert not folder.exists()


@interpreter
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_was_found(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "moe_plugin.cli", "tune", *TINY, "--time-budget", "3", "--tokens", "1,2,3,4,5,6"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    path = tmp_path / "cpu" / "E2-K1-H32-I32-bf16.json"
    limit = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert "the same command goes on from here" in stderr
    assert "Traceback" not in stderr
    assert f"wrote {path}" in stdout
    entries = TileTable.load(path).entries
    assert 1 <= len(entries) < 6
    assert not entries[0].partial


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "layers is empty"),
        (["--preset", "qwen3-30"], "Did you mean 'qwen3-30b'?"),
        (["--preset", "qwen3-30b", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["--preset", "qwen3-30b", "--tokens", "1,x"], "whole numbers by commas, got '1,x'"),
        (["--preset", "qwen3-30b", "--tokens", "0"], "must be positive, got 0"),
        (["--preset", "qwen3-30b", "--time-budget", "0"], "the time budget must be positive"),
        (["--layer", "1,2,3"], "four numbers E,K,H,I"),
        (["--preset", "qwen3-30b", "--experts", "deep_gemm"], "known: triton_fused_moe, deep_gemm_hybrid"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = tune(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = tune(*TINY, "--out", str(tmp_path / "file" / "tables"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot write to ")


def test_help_names_what_there_is() -> None:
    result = tune("--help")
    assert result.exit_code == 0
    for words in ("--preset", "deepseek-v3-ep8", "--again", "--experts", "--time-budget", ENVIRONMENT_VARIABLE):
        assert words in result.output
