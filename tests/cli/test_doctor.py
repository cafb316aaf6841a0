"""`moe-plugin doctor`: what is there, what is missing, and the exact fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import moe_plugin
from moe_plugin.cli import app
from moe_plugin.cli.doctor import Finding, examine
from moe_plugin.compat.deep_gemm import JitSettings
from moe_plugin.environment import OPTIONAL_PACKAGES, Environment, Package

PACKAGES = {name: Package(name, "1.0") for name in OPTIONAL_PACKAGES}
COMPLETE = Environment(
    device_type="cuda",
    device_name="H200",
    sm=90,
    memory_bytes=141 << 30,
    num_devices=8,
    peer_access=True,
    nvlinks=18,
    torch_version="2.9.0+cu130",
    backends=("nccl", "gloo"),
    packages=PACKAGES,
    nvcc=True,
)
JIT = JitSettings(cache_folder=Path("kernels"), nvrtc=False, nvcc=Path("cuda/bin/nvcc"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "500"})


def test_a_complete_machine_needs_no_fix() -> None:
    findings = {finding.what: finding for finding in examine(COMPLETE, JIT)}
    assert all(finding.ok and not finding.fix for finding in findings.values())
    assert findings["GPU"].seen == "8 x H200"
    assert findings["compute capability"].seen == "SM 90"
    assert findings["NVLink"].seen == "18 links"
    assert findings["DeepGEMM compiler"].seen == "cuda/bin/nvcc"
    assert findings["DeepGEMM cache"].seen == "kernels"
    assert {"torch", "nccl", "gloo", "peer access", *OPTIONAL_PACKAGES} <= findings.keys()


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"torch_version": "2.7.0"}, "torch", "pip install 'torch>=2.8'"),
        ({"backends": ("gloo",)}, "nccl", "CUDA build of torch"),
        ({"backends": ("nccl",)}, "gloo", "gloo"),
        ({"packages": PACKAGES | {"triton": Package("triton")}}, "triton", "pip install 'moe-plugin[triton]'"),
        ({"packages": PACKAGES | {"vllm": Package("vllm", "0.9", "too old")}}, "vllm", "moe-plugin[vllm]"),
        ({"packages": PACKAGES | {"transformers": Package("transformers")}}, "transformers", "moe-plugin[serve]"),
        ({"packages": PACKAGES | {"deep_gemm": Package("deep_gemm")}}, "deep_gemm", "moe-plugin[deepgemm]"),
        ({"packages": PACKAGES | {"deep_ep": Package("deep_ep")}}, "deep_ep", "DeepEP"),
    ],
)
def test_what_is_missing_has_its_fix(changes: dict[str, object], what: str, fix: str) -> None:
    wrong = [finding for finding in examine(COMPLETE.pretend(**changes), JIT) if not finding.ok]
    assert [finding.what for finding in wrong] == [what]
    assert fix in wrong[0].fix


def test_the_compiler_of_deep_gemm() -> None:
    def finding(nvrtc: bool) -> Finding:
        found = examine(COMPLETE, JitSettings(Path("kernels"), nvrtc, nvcc=None))
        return next(f for f in found if f.what == "DeepGEMM compiler")

    assert finding(nvrtc=True) == Finding("DeepGEMM compiler", True, "NVRTC")
    without = finding(nvrtc=False)
    assert (without.ok, without.seen) == (False, "not found")
    assert "CUDA_HOME" in without.fix
    assert "DG_JIT_USE_NVRTC=1" in without.fix


def test_what_of_deep_gemm_was_found() -> None:
    def finding(package: Package) -> Finding:
        found = examine(COMPLETE.pretend(packages=PACKAGES | {"deep_gemm": package}), JIT)
        return next(f for f in found if f.what == "deep_gemm")

    features = frozenset({"fp8", "psum", "bf16"})
    found = finding(Package("deep_gemm", "0.1.5", None, features, "deep_gemm"))
    assert found == Finding("deep_gemm", True, "0.1.5 (deep_gemm; bf16, fp8, psum)")
    broken = finding(Package("deep_gemm", "0.2.5", "built for another torch: get that one", features, "deep_gemm"))
    assert broken == Finding("deep_gemm", False, "0.2.5, unusable", "built for another torch: get that one")


def test_a_machine_without_a_gpu() -> None:
    cpu = Environment(device_name="x86_64", torch_version="2.9.0+cpu", backends=("gloo",), packages=PACKAGES)
    findings = {finding.what: finding for finding in examine(cpu)}
    for what in ("GPU", "compute capability", "peer access", "NVLink"):
        assert not findings[what].ok
        assert "NVIDIA GPU" in findings[what].fix
    assert findings["GPU"].seen == "none"
    assert findings["gloo"].ok


def test_links_that_cannot_be_counted_are_unknown() -> None:
    (finding,) = [f for f in examine(COMPLETE.pretend(nvlinks=None)) if f.what == "NVLink"]
    assert "unknown" in finding.seen
    assert "nvidia-ml-py" in finding.seen


def test_json() -> None:
    result = run("--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer.keys() == {"machine", "layer", "workspace_bytes"}
    assert all(finding.keys() == {"what", "ok", "seen", "fix"} for finding in answer["machine"])
    assert [finding["what"] for finding in answer["machine"]] == [f.what for f in examine(Environment.probe())]
    assert list(answer["workspace_bytes"]) == moe_plugin.strategy_names()
    assert all(sum(buffers.values()) > 0 for name, buffers in answer["workspace_bytes"].items() if "torch" in name)


def test_memory_follows_the_layer() -> None:
    def total(*arguments: str) -> int:
        memory = json.loads(run("--json", *arguments).stdout)["workspace_bytes"]
        return sum(memory["nccl_all_to_all+torch_native"].values())

    assert total() < total("--max-tokens", "8192") < total("--max-tokens", "8192", "--world", "4")
    assert total("--preset", "deepseek-v3") > total()


def test_memory_of_dispatch_over_nvlink_is_shown() -> None:
    arguments = "--preset", "deepseek-v3", "--world", "8"
    memory = json.loads(run("--json", *arguments).stdout)["workspace_bytes"]["hybrid_dense_routing+torch_native"]
    # Two sets of buffers for 8 x 4096 rows of 7168 bf16 numbers, on their way and back.
    for name in ("symmetric rows", "symmetric returned"):
        assert memory[f"hybrid_dense_routing: {name}"] == 2 * 8 * 4096 * 7168 * 2
    assert f"{sum(memory.values()) / 2**20:.1f} MiB" in run(*arguments).stdout
    several = json.loads(run("--json", *arguments, "--nodes", "2").stdout)["workspace_bytes"]
    assert "hybrid_dense_routing: rail sent rows" in several["hybrid_dense_routing+torch_native"]


def test_text() -> None:
    result = run("--preset", "deepseek-v3", "--world", "8")
    assert result.exit_code == 0, result.output
    assert "This machine" in result.stdout
    assert "256 experts" in result.stdout
    for finding in examine(Environment.probe()):
        assert finding.what in result.stdout
        assert finding.fix in result.stdout, "a fix must be shown to the letter, brackets included"
    for strategy in moe_plugin.strategy_names():
        assert strategy in result.stdout


def test_mistakes_are_one_clear_line() -> None:
    result = run("--preset", "nonsense")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: unknown preset 'nonsense'")
    assert isinstance(run("--preset", "nonsense", "--traceback").exception, moe_plugin.MoEPluginError)
