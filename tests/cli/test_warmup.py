"""`moe-plugin warmup`: what it makes, prints and refuses, with Triton's interpreter and DeepGEMM's double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from moe_plugin.cli import app
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.kernels.measured_tables import ENVIRONMENT_VARIABLE, forget_tables
from moe_plugin.strategies.registry import experts_classes, register_experts
from tests.doubles import deep_gemm as double

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")

TINY = ["--layer", "2,1,128,128", "--device", "cpu", "--max-tokens", "2"]


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


class OutOfMemory(TorchNative):
    """Needs more than there is."""

    name = "out_of_memory"

    def apply(self, *arguments: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")


@pytest.fixture
def out_of_memory() -> Iterator[None]:
    register_experts(OutOfMemory)
    yield
    experts_classes.unregister(OutOfMemory.name)


def warmup(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["warmup", *arguments], env={"COLUMNS": "220"})


def test_a_layer_of_one_s_own() -> None:
    result = warmup(*TINY, "--moe_strategy", "local+torch_native")
    assert result.exit_code == 0, result.output
    choice, summary = result.stdout.splitlines()
    assert choice.startswith("moe_strategy local+torch_native -> local+torch_native (")
    assert summary.startswith("2 calls made, everything compiled, in ")
    assert "warming up" in result.stderr
    assert "2/2" in result.stderr


@interpreter
@pytest.mark.usefixtures("deep_gemm")
@pytest.mark.parametrize("dtype", ["bf16", "fp8_block"])
def test_deep_gemm_says_what_compiles_and_where_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("DG_JIT_USE_NVRTC", "1")
    result = warmup(*TINY, "--moe_strategy", "local+deep_gemm_hybrid", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    choice, library, summary = result.stdout.splitlines()
    assert "layouts masked up to 256 rows, contiguous above" in choice
    assert library == f"DeepGEMM: compiler NVRTC, kernels kept in {tmp_path / 'kernels'}"
    assert summary.startswith("2 calls made")


@interpreter
@pytest.mark.usefixtures("deep_gemm")
def test_each_phase_is_warmed_up() -> None:
    strategy = "decode=local+deep_gemm_hybrid,prefill=local+torch_native"
    result = warmup(*TINY, "--moe_strategy", strategy, "--cuda-graph")
    assert result.exit_code == 0, result.output
    choice, library, summary = result.stdout.splitlines()
    assert "decode: local+deep_gemm_hybrid" in choice
    assert "prefill: local+torch_native" in choice
    assert library.startswith("DeepGEMM: compiler ")
    assert summary.startswith("4 calls made")


def test_ranks_of_which_this_process_is_none() -> None:
    result = warmup(*TINY, "--world", "2", "--tp", "2", "--moe_strategy", "nccl_all_to_all+torch_native")
    assert result.exit_code == 0, result.output
    # Two EP ranks send up to two tokens each.
    assert result.stdout.splitlines()[-1].startswith("4 calls made")


@pytest.mark.slow
def test_several_processes() -> None:
    result = warmup(*TINY, "--moe_strategy", "local+torch_native", "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("2 calls made")
    assert "2/2" in result.stderr


@pytest.mark.usefixtures("out_of_memory")
def test_what_does_not_fit_is_said_in_one_line() -> None:
    result = warmup(*TINY, "--moe_strategy", "local+out_of_memory")
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.endswith("do not fit this device: lower --max-tokens, or --jobs")
    assert "calls made" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--moe_strategy", "local+deep_gemm_hybrid", "--dtype", "fp16"], "deep_gemm_hybrid.dtype: needs one of bfl"),
        (["--moe_strategy", "local+deep_gemm"], "Did you mean 'local+deep_gemm_hybrid'?"),
        (["--moe_strategy", "local+torch_native", "--world", "2"], "local.ep_size: needs 1: this class does not disp"),
        (["--layer", "1,2,3"], "four numbers E,K,H,I, got '1,2,3'"),
        (["--layer", "2,4,128,128"], "top_k 4 exceeds num_experts 2"),
        (["--device", "tpu"], "auto, cuda or cpu"),
    ],
)
def test_what_cannot_run_is_one_clear_line(arguments: list[str], words: str) -> None:
    result = warmup(*TINY, *arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_an_unknown_preset_names_the_nearest() -> None:
    result = warmup("--preset", "qwen3-30", "--device", "cpu")
    assert result.exit_code == 1
    assert "Did you mean 'qwen3-30b'?" in result.stderr


def test_help_names_what_there_is() -> None:
    result = warmup("--help")
    assert result.exit_code == 0
    for words in ("--preset", "--layer", "deepseek-v3-ep8", "--moe_strategy", "--max-tokens", "--jobs", "--cuda-graph"):
        assert words in result.output
