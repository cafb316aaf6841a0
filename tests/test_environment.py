"""The probe of a machine, with and without what it looks for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from moe_plugin.environment import OPTIONAL_PACKAGES, Environment, Package, probe_package, register_package_probe


@pytest.mark.parametrize(
    ("package", "usable", "words"),
    [
        (Package("x"), False, "not installed"),
        (Package("x", "1.2"), True, "1.2"),
        (Package("x", "1.2", "no nvcc"), False, "1.2, unusable: no nvcc"),
        (Package("x", "1.2", "no nvcc", frozenset({"a"}), "y.x"), False, "1.2, unusable: no nvcc"),
        (Package("x", "1.2", None, frozenset({"b", "a"}), "y.x"), True, "1.2 (y.x; a, b)"),
        (Package("x", "1.2", None, frozenset({"b"})), True, "1.2 (b)"),
        (Package("x", None, "get it"), False, "not installed"),
    ],
)
def test_package(package: Package, usable: bool, words: str) -> None:
    assert package.usable is usable
    assert package.describe() == words


def test_probe_of_an_installed_package() -> None:
    assert probe_package("pytest") == Package("pytest", importlib.metadata.version("pytest"))


def test_probe_of_an_absent_package() -> None:
    assert probe_package("no_such_package_at_all") == Package("no_such_package_at_all")


def test_probe_asks_for_the_distribution_that_brings_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", {"sgl-deep-gemm": "0.1.5"}.__getitem__)
    assert probe_package("deep_gemm") == Package("deep_gemm", "0.1.5")


def test_probe_of_a_module_without_a_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moe_plugin_test_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert probe_package("moe_plugin_test_module") == Package("moe_plugin_test_module", "unknown")


def test_probe_of_a_broken_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", types.ModuleType("deep_ep"))
    package = probe_package("deep_ep")
    assert package.version == "unknown"
    assert not package.usable
    assert "deep_ep.__spec__" in package.describe()


def test_probe_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moe_plugin_explosive.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert probe_package("moe_plugin_explosive").usable


def test_a_registered_probe_is_asked_and_the_last_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_plugin.environment._probes", {})
    register_package_probe("vllm", lambda: Package("vllm", "1"))
    register_package_probe("vllm", lambda: Package("vllm", "2", features=frozenset({"fast"})))
    register_package_probe("another_library", lambda: Package("another_library", "3"))
    environment = Environment.probe("cpu")
    assert environment.package("vllm") == Package("vllm", "2", features=frozenset({"fast"}))
    assert environment.package("another_library").version == "3"
    assert environment.package("triton") == probe_package("triton")
    assert set(environment.packages) == {*OPTIONAL_PACKAGES, "another_library"}


def test_cpu_probe() -> None:
    environment = Environment.probe("cpu")
    assert environment.device_type == "cpu"
    assert environment.sm is None
    assert environment.num_devices == 0
    assert environment.memory_bytes > 0
    assert environment.torch_version == torch.__version__
    assert set(environment.packages) == set(OPTIONAL_PACKAGES)
    assert ("gloo" in environment.backends) == torch.distributed.is_gloo_available()
    assert environment.describe() == f"CPU, torch {torch.__version__}"


@pytest.mark.gpu
def test_gpu_probe() -> None:
    environment = Environment.probe()
    major, minor = torch.cuda.get_device_capability()
    assert (environment.device_type, environment.sm) == ("cuda", 10 * major + minor)
    assert environment.num_devices == torch.cuda.device_count()
    assert environment.memory_bytes == torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    assert f"SM {environment.sm}" in environment.describe()
    assert Environment.probe("cpu").device_type == "cpu"


@pytest.mark.parametrize("reachable", [True, False])
def test_probe_of_gpus(reachable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30)
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "device_count": lambda: 3,
        "can_device_access_peer": lambda a, b: reachable or (a, b) != (2, 1),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    environment = Environment.probe()
    assert (environment.device_type, environment.device_name, environment.sm) == ("cuda", "H200", 90)
    assert (environment.num_devices, environment.num_sms, environment.memory_bytes) == (3, 132, 141 << 30)
    assert environment.peer_access is reachable
    assert environment.describe().startswith("H200 (SM 90)")


@pytest.mark.slow
@pytest.mark.parametrize(("value", "interpreted"), [("1", True), ("0", False), (None, False)])
def test_triton_s_interpreter_is_what_stood_there_at_import(value: str | None, interpreted: bool) -> None:
    code = """if True:
        import os
        from moe_plugin.environment import Environment

        os.environ["TRITON_INTERPRET"] = "0" if os.environ.get("TRITON_INTERPRET") == "1" else "1"
        print(Environment.probe("cpu").triton_interpret)
    """
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {} if value is None else {"TRITON_INTERPRET": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(interpreted)


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME"])
def test_nvcc_is_found_on_the_path_and_under_cuda_home(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert not Environment.probe("cpu").nvcc
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    monkeypatch.setenv(place, str(compiler.parent if place == "PATH" else tmp_path))
    assert Environment.probe("cpu").nvcc


def test_pretend_a_gpu() -> None:
    cpu = Environment(memory_bytes=8 << 30, backends=("gloo",), triton_interpret=True)
    gpu = cpu.pretend(sm=100)
    assert (gpu.device_type, gpu.sm, gpu.peer_access, gpu.triton_interpret) == ("cuda", 100, True, False)
    assert gpu.backends == ("gloo", "nccl")
    assert gpu.package("triton").usable
    assert gpu.memory_bytes == 80 << 30
    assert (gpu.num_devices, gpu.num_sms) == (8, 132)
    assert "SM 100" in gpu.describe()
    # What it was asked of is unchanged.
    assert (cpu.device_type, cpu.sm, dict(cpu.packages)) == ("cpu", None, {})


def test_pretend_keeps_what_is_known_of_a_gpu() -> None:
    gpu = Environment(device_type="cuda", sm=90, num_sms=78, memory_bytes=141 << 30, num_devices=4, backends=("nccl",))
    other = gpu.pretend(sm=80)
    assert (other.sm, other.num_sms, other.memory_bytes, other.num_devices) == (80, 78, 141 << 30, 4)
    assert other.backends == ("nccl",)


def test_pretend_explicit_answers_win() -> None:
    packages = {"triton": Package("triton")}
    gpu = Environment().pretend(sm=90, packages=packages, backends=(), memory_bytes=1, peer_access=False)
    assert not gpu.package("triton").usable
    assert (gpu.backends, gpu.memory_bytes, gpu.peer_access) == ((), 1, False)


def test_pretend_without_an_sm_changes_only_what_is_given() -> None:
    environment = Environment(backends=("gloo",))
    assert environment.pretend(nvcc=True) == dataclasses.replace(environment, nvcc=True)


def test_environments_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Environment().sm = 90


def test_a_package_nobody_looked_for_is_absent() -> None:
    assert Environment().package("deep_ep") == Package("deep_ep")


@pytest.mark.parametrize(
    ("version", "enough"),
    [
        ("2.8.0", True),
        ("2.10.0a0+git1234", True),
        ("2.9.0+cpu", True),
        ("3.0", True),
        ("2.7.1+cu128", False),
        ("1.13.1", False),
        ("2.8.0.dev20250801+cu129", True),
    ],
)
def test_torch_versions(version: str, enough: bool) -> None:
    assert Environment(torch_version=version).torch_at_least(2, 8) is enough


class FakeNvml(types.ModuleType):
    """Six links, of which the first four are up; then NVML has no more."""

    NVML_NVLINK_MAX_LINKS = 18
    NVML_FEATURE_ENABLED = 1

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-of-device-1": 1}[uuid]

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= 6:
            raise self.NVMLError
        return int(link < 4)


def test_nvlinks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_plugin.environment import _active_nvlinks

    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    properties = types.SimpleNamespace(uuid="of-device-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert _active_nvlinks(0) == 4
    monkeypatch.setattr(FakeNvml, "nvmlInit", lambda self: 1 / 0)
    assert _active_nvlinks(0) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert _active_nvlinks(0) is None
