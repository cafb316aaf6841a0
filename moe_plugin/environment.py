"""What the machine offers, probed once and frozen; injectable, so that selection is testable anywhere."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

OPTIONAL_PACKAGES: Mapping[str, str] = {
    "triton": "triton",
    "deep_gemm": "sgl-deep-gemm",
    "deep_ep": "deep-ep",
    "vllm": "vllm",
    "transformers": "transformers",
}
"""Importable module -> distribution that brings it."""


ASSUMED_VERSION = "assumed"
"""The version of a package that a described machine is taken to have: a recent one."""

# Triton reads this once, when kernels are defined, so what holds is what stood here then.
_TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Package:
    """One optional package.

    version: None when it is absent. problem: why it cannot be used, and what would help.
    features: what of it was found, where parts of it may be missing. module: where it was found, if not a matter of
    course. Both are known only of packages with a probe of their own (`register_package_probe`).
    """

    name: str
    version: str | None = None
    problem: str | None = None
    features: frozenset[str] = frozenset()
    module: str | None = None

    @property
    def usable(self) -> bool:
        return self.version is not None and self.problem is None

    def describe(self) -> str:
        if self.version is None:
            return "not installed"
        if self.problem:
            return f"{self.version}, unusable: {self.problem}"
        details = "; ".join(filter(None, (self.module, ", ".join(sorted(self.features)))))
        return f"{self.version} ({details})" if details else self.version


_probes: dict[str, Callable[[], Package]] = {}


def register_package_probe(name: str, probe: Callable[[], Package]) -> None:
    """Let `Environment.probe` ask `probe` about a package instead of looking whether it can be found.

    `probe` may import the package, and never raises. A second probe of the same name takes the place of the first.
    """
    _probes[name] = probe


def probe_package(name: str) -> Package:
    """Look for a module without importing it; never raises."""
    try:
        if importlib.util.find_spec(name) is None:
            return Package(name)
    except (ImportError, ValueError) as problem:
        return Package(name, "unknown", str(problem))
    for distribution in (OPTIONAL_PACKAGES.get(name, name), name):
        try:
            return Package(name, importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Package(name, "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One machine as the gates see it.

    device_type: "cuda" or "cpu".
    device_name, sm (90 for compute capability 9.0), num_sms, memory_bytes: of the current device; sm is None on CPU.
    num_devices: visible devices. peer_access: every pair of them can reach each other's memory.
    nvlinks: active NVLink links of the current device; None where nvidia-ml-py is not there to ask.
    backends: usable torch.distributed backends.
    packages: the optional packages, by module name.
    triton_interpret: Triton kernels run in its interpreter on the CPU.
    nvcc: a CUDA compiler is on the path or under CUDA_HOME.
    """

    device_type: str = "cpu"
    device_name: str = ""
    sm: int | None = None
    num_sms: int = 0
    memory_bytes: int = 0
    num_devices: int = 0
    peer_access: bool = False
    nvlinks: int | None = None
    torch_version: str = field(default_factory=lambda: torch.__version__)
    cuda_version: str | None = None
    backends: tuple[str, ...] = ()
    packages: Mapping[str, Package] = field(default_factory=dict)
    triton_interpret: bool = False
    nvcc: bool = False

    @classmethod
    def probe(cls, device_type: str | None = None) -> Environment:
        """Look at this machine. `device_type` restricts the answer to "cpu" on a machine with GPUs."""
        has_cuda = torch.cuda.is_available() and device_type != "cpu"
        common: dict[str, Any] = {
            "backends": _backends(),
            "packages": _probe_packages(),
            "triton_interpret": _TRITON_INTERPRET,
            "nvcc": shutil.which("nvcc", path=_nvcc_path()) is not None,
            "cuda_version": torch.version.cuda,
        }
        if not has_cuda:
            return cls(device_name=platform.processor() or platform.machine(), memory_bytes=_host_memory(), **common)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        count = torch.cuda.device_count()
        return cls(
            device_type="cuda",
            device_name=properties.name,
            sm=properties.major * 10 + properties.minor,
            num_sms=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
            num_devices=count,
            peer_access=all(
                torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b
            ),
            nvlinks=_active_nvlinks(torch.cuda.current_device()),
            **common,
        )

    def pretend(self, **changes: object) -> Environment:
        """This environment with some answers replaced, e.g. `pretend(sm=100)`.

        Giving an `sm` implies a CUDA device with peer access and NCCL, Triton compiled rather than interpreted.
        """
        if changes.get("sm") is not None:
            packages = dict(self.packages)
            if "triton" not in packages or not packages["triton"].usable:
                packages["triton"] = Package("triton", ASSUMED_VERSION)
            implied: dict[str, object] = {
                "device_type": "cuda",
                "device_name": f"assumed SM {changes['sm']}",
                "num_sms": self.num_sms or 132,
                "memory_bytes": self.memory_bytes if self.device_type == "cuda" else 80 << 30,
                "num_devices": self.num_devices or 8,
                "peer_access": True,
                "backends": tuple(dict.fromkeys((*self.backends, "nccl"))),
                "packages": packages,
                "triton_interpret": False,
            }
            changes = implied | changes
        return replace(self, **changes)  # type: ignore[arg-type]

    def package(self, name: str) -> Package:
        """What is known of an optional package, by module name; absent if nobody looked for it."""
        return self.packages.get(name, Package(name))

    def torch_at_least(self, major: int, minor: int) -> bool:
        """Whether torch is of that release or a later one."""
        seen = self.torch_version.split("+")[0].split(".")
        return (int(seen[0]), int(seen[1])) >= (major, minor)

    def describe(self) -> str:
        """The device and torch in one line."""
        device = f"{self.device_name} (SM {self.sm})" if self.sm is not None else "CPU"
        return f"{device}, torch {self.torch_version}"


def _probe_packages() -> dict[str, Package]:
    names = dict.fromkeys((*OPTIONAL_PACKAGES, *_probes))
    return {name: _probes[name]() if name in _probes else probe_package(name) for name in names}


def _active_nvlinks(device: int) -> int | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        # By UUID: NVML numbers all devices, CUDA the visible ones.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # whatever keeps NVML from answering, the answer is "unknown"
        return None
    active = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED
        except pynvml.NVMLError:
            break
    return active


def _backends() -> tuple[str, ...]:
    if not torch.distributed.is_available():
        return ()
    found = (("nccl", torch.distributed.is_nccl_available()), ("gloo", torch.distributed.is_gloo_available()))
    return tuple(name for name, usable in found if usable)


def _nvcc_path() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.pathsep.join((os.environ.get("PATH", ""), os.path.join(home, "bin")))


def _host_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
