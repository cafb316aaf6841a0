"""The gated activations in torch: the definition that kernels are checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_plugin.config import Activation, MoEConfig


def gated_activation(
    gate_up: torch.Tensor, activation: Activation, swiglu_alpha: float = 1.702, swiglu_limit: float = 7.0
) -> torch.Tensor:
    """[..., 2I] with the gate half first -> [..., I], in the dtype of the input."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation is Activation.SILU_AND_MUL:
        return F.silu(gate) * up
    if activation is Activation.GELU_AND_MUL:
        return F.gelu(gate, approximate="tanh") * up
    gate = gate.clamp(max=swiglu_limit)
    up = up.clamp(min=-swiglu_limit, max=swiglu_limit)
    return (up + 1) * gate * torch.sigmoid(swiglu_alpha * gate)


def gated_activation_of(config: MoEConfig, gate_up: torch.Tensor) -> torch.Tensor:
    """`gated_activation` with the activation and constants of `config`."""
    return gated_activation(gate_up, config.activation, config.swiglu_alpha, config.swiglu_limit)
