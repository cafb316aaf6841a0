"""Triton kernels run in its interpreter where there is no GPU; markers decide what a machine can run."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, so it must stand before any test module.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose markers ask for what this machine lacks, with the reason."""
    for item in items:
        reason = missing(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def missing(item: pytest.Item) -> str | None:
    """What `item` needs and this machine does not have."""
    from moe_plugin.environment import probe_package

    devices = torch.cuda.device_count()
    wanted = max([1] * bool(item.get_closest_marker("gpu")) + [m.args[0] for m in item.iter_markers("multi_gpu")] + [0])
    if wanted > devices:
        return f"needs {wanted} CUDA device(s), this machine has {devices}"
    if item.get_closest_marker("sm90") and (devices == 0 or torch.cuda.get_device_capability() < (9, 0)):
        return "needs compute capability 9.0"
    for package in ("deep_ep", "deep_gemm", "vllm"):
        if item.get_closest_marker(package) and not probe_package(package).usable:
            return f"needs the package {package}"
    return None
