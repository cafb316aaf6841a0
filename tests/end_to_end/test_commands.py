"""`moe-plugin serve` and `moe-plugin generate` as commands: their output, errors and exit codes."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("transformers")

from moe_plugin.cli import app
from moe_plugin.cli.launch import embedded_model
from moe_plugin.cli.serve import _listener
from moe_plugin.errors import ConfigError, UnknownStrategyError
from tests.integrations.models import build_model

FOLDER = embedded_model()
ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def main("
GENERATE = ["generate", "--prompt", PROMPT, "--max-new-tokens", "16"]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    ours = logging.getLogger("moe_plugin")
    before = ours.handlers, ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate = before[:2]
    ours.setLevel(before[2])


def run(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, arguments)


def launch(*arguments: str, num_ranks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in processes of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.run(
        [sys.executable, *(torchrun if num_ranks > 1 else []), "-m", "moe_plugin.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_clear_line(result: Result, text: str) -> None:
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert text in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["serve", "generate"])
@pytest.mark.parametrize("flag", ["--moe_strategy", "--moe-strategy"])
def test_unknown_strategy_names_the_nearest(command: str, flag: str) -> None:
    assert_one_clear_line(run(command, flag, "local+torch_natve"), "Did you mean 'local+torch_native'?")


def test_traceback_on_request() -> None:
    result = run("generate", "--moe_strategy", "nonsense", "--traceback")
    assert isinstance(result.exception, UnknownStrategyError)


def test_missing_folder() -> None:
    assert_one_clear_line(run("serve", "/no/such/folder", "--port", "0"), "there is no model folder '/no/such/folder'")


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert_one_clear_line(run("serve", str(tmp_path), "--port", "0"), f"cannot load the model '{tmp_path}'")


def test_model_without_experts(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    assert_one_clear_line(run("generate", str(tmp_path)), "LlamaForCausalLM has no experts")


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port))
    assert_one_clear_line(result, f"cannot listen on 127.0.0.1:{port}: Address already in use")


def test_port_is_taken_while_the_model_loads() -> None:
    with _listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match="Address already in use"), _listener("127.0.0.1", port):
            pass


def test_unresolvable_host() -> None:
    assert_one_clear_line(run("serve", "--host", "256.0.0.1"), "cannot listen on 256.0.0.1:8000")


@pytest.mark.parametrize(("option", "value"), [("--dtype", "int8"), ("--device", "tpu")])
def test_wrong_option(option: str, value: str) -> None:
    assert_one_clear_line(run("generate", option, value), f"{option} must be auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_no_gpu() -> None:
    assert_one_clear_line(run("generate", "--device", "cuda"), "no GPU for local rank 0")


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_missing_package_names_the_extra(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils.import_utils", None)
    assert_one_clear_line(run(command), "pip install 'moe-plugin[serve]'")


def test_generate() -> None:
    result = run(*GENERATE)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip()) > 4
    assert run(*GENERATE, "--moe_strategy", "nccl_all_to_all+torch_native").stdout == result.stdout
    assert "moe_strategy auto -> " in result.stderr


def test_generate_samples_with_a_seed() -> None:
    first, again, other = (run(*GENERATE, "--temperature", "1.5", "--seed", seed).stdout for seed in "112")
    assert first == again != other


@pytest.mark.slow
def test_generate_on_ranks() -> None:
    options = ("--temperature", "1.5")
    result = launch(*GENERATE, *options, num_ranks=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout == run(*GENERATE, *options).stdout
    assert result.stderr.count("moe_strategy auto -> nccl_all_to_all+") == 1


@pytest.mark.slow
def test_triton_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    arguments = ["generate", "--prompt", "a", "--max-new-tokens", "2", "--device", "cpu"]
    result = launch(*arguments, "--moe_strategy", "local+triton_fused_moe", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == run(*arguments).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "text"),
    [("nonsense", "unknown moe_strategy 'nonsense'"), ("local+torch_native", "needs 1: this class does not dispatch")],
)
def test_errors_end_all_ranks(strategy: str, text: str) -> None:
    result = launch("serve", "--port", "0", "--moe_strategy", strategy, num_ranks=2)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error (rank")]
    # torchrun may end a rank before it comes to print.
    assert 1 <= len(errors) <= 2
    assert all(text in line for line in errors)
