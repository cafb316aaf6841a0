"""Machines and layers for tests that ask what would run where; nothing here looks at the real one."""

from __future__ import annotations

from typing import Any

import torch

from moe_plugin.config import MoEConfig, ParallelConfig
from moe_plugin.environment import Environment, Package

TRITON = {"triton": Package("triton", "3.6.0")}
CPU = Environment(
    device_name="x86_64", memory_bytes=64 << 30, torch_version="2.9.0+cpu", backends=("gloo",), packages=TRITON
)
INTERPRETER = CPU.pretend(triton_interpret=True)


def gpu(sm: int, **changes: object) -> Environment:
    """A machine with GPUs of that compute capability, NCCL and Triton, unless `changes` say otherwise."""
    return CPU.pretend(sm=sm, **changes)


def layer_config(ep_size: int = 1, tp_size: int = 1, **changes: Any) -> MoEConfig:
    """A small bf16 layer."""
    defaults = {"num_experts": 16, "top_k": 4, "hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    return MoEConfig(**(defaults | changes), parallel=ParallelConfig(ep_size=ep_size, tp_size=tp_size))
