"""The oracle: one mixture-of-experts layer in plain torch, fp32 throughout, no tricks."""

from __future__ import annotations

import torch

from moe_plugin.activation import gated_activation
from moe_plugin.config import Activation
from moe_plugin.errors import ExpertIdError


def reference_moe(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    activation: Activation | str = Activation.SILU_AND_MUL,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    apply_router_weight_on_input: bool = False,
) -> torch.Tensor:
    """What every strategy must compute, over all experts.

    hidden_states [T, H]; topk_ids int [T, K], -1 = dropped; topk_weights [T, K]; w13 [E, 2I, H], gate rows first;
    w2 [E, H, I]; biases [E, 2I] and [E, H].
    Returns fp32 [T, H], whatever the input dtypes. Raises ExpertIdError for an id outside [-1, E).
    """
    num_experts = w13.shape[0]
    if ((topk_ids < -1) | (topk_ids >= num_experts)).any():
        raise ExpertIdError(f"topk_ids must lie in [-1, {num_experts}), got {topk_ids.min()} to {topk_ids.max()}")
    x, weights = hidden_states.float(), topk_weights.float()
    out = torch.zeros_like(x)
    for expert in range(num_experts):
        token, k = (topk_ids == expert).nonzero(as_tuple=True)
        weight = weights[token, k, None]
        rows = x[token] * weight if apply_router_weight_on_input else x[token]
        gate_up = rows @ w13[expert].float().T
        if w13_bias is not None:
            gate_up = gate_up + w13_bias[expert].float()
        rows = gated_activation(gate_up, Activation(activation), swiglu_alpha, swiglu_limit) @ w2[expert].float().T
        if w2_bias is not None:
            rows = rows + w2_bias[expert].float()
        out.index_add_(0, token, rows if apply_router_weight_on_input else rows * weight)
    return out
