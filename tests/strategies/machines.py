"""Machines and layers for tests that ask what would run where; nothing here looks at the real one."""

from __future__ import annotations

from typing import Any

import torch

from moe_plugin.config import MoEConfig, ParallelConfig
from moe_plugin.environment import Environment, Package

TRITON = {"triton": Package("triton", "3.6.0")}
DEEP_GEMM = Package("deep_gemm", "0.1.5", features=frozenset({"bf16", "fp8", "psum"}))
DEEP_EP = Package(
    "deep_ep",
    "2.1.0",
    features=frozenset(
        {
            "Buffer",
            "num_worst_tokens",
            "low_latency",
            "recv_hook",
            "ue8m0",
            "zero_copy",
            "combine_out",
            "ll_hidden_2048",
            "rdma",
        }
    ),
)
WITH_DEEP_EP = TRITON | {"deep_gemm": DEEP_GEMM, "deep_ep": DEEP_EP}
DEEP_EP_STRATEGIES = tuple(
    f"deepep_{mode}+{experts}"
    for mode in ("high_throughput", "low_latency")
    for experts in ("deep_gemm_hybrid", "triton_fused_moe", "torch_native")
)
"""Those that need DeepEP."""
MEASURED = "GPU with a layout table"
"""Name of a device; conftest.py keeps a table for it and `layer_config()`, by which DeepGEMM wins at some sizes."""

CPU = Environment(
    device_name="x86_64", memory_bytes=64 << 30, torch_version="2.9.0+cpu", backends=("gloo",), packages=TRITON
)
INTERPRETER = CPU.pretend(triton_interpret=True)


def gpu(sm: int, **changes: object) -> Environment:
    """A machine with GPUs of that compute capability, NCCL, Triton, DeepGEMM and nvcc, where `changes` say no other."""
    return CPU.pretend(**({"sm": sm, "packages": TRITON | {"deep_gemm": DEEP_GEMM}, "nvcc": True} | changes))


def deep_gemm_with(*features: str) -> dict[str, Package]:
    """Packages with a DeepGEMM of which only these features were found."""
    return TRITON | {"deep_gemm": Package("deep_gemm", "0.1.5", features=frozenset(features))}


def layer_config(ep_size: int = 1, tp_size: int = 1, **changes: Any) -> MoEConfig:
    """A small bf16 layer."""
    defaults = {"num_experts": 16, "top_k": 4, "hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    return MoEConfig(**(defaults | changes), parallel=ParallelConfig(ep_size=ep_size, tp_size=tp_size))
