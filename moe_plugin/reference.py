"""The oracle: one mixture-of-experts layer in plain torch, fp32 throughout, no tricks."""

from __future__ import annotations

import torch

from moe_plugin.activation import gated_activation
from moe_plugin.config import Activation, QuantConfig
from moe_plugin.errors import ExpertIdError, ShapeError
from moe_plugin.quantization import (
    GROUP_SIZE,
    dequantize_weights,
    fake_quantize,
    has_static_activations,
    input_group_size,
)


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
    quantization: QuantConfig | None = None,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    a13_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    rounds_gate_up: bool = False,
    quantizes_by_reciprocal: bool = False,
) -> torch.Tensor:
    """What every strategy must compute, over all experts.

    hidden_states [T, H]; topk_ids int [T, K], -1 = dropped; topk_weights [T, K]; w13 [E, 2I, H], gate rows first;
    w2 [E, H, I]; biases [E, 2I] and [E, H].
    quantization: w13 and w2 are fp8 with scales in a shape of moe_plugin.quantization; then the oracle computes in fp32
    on dequantized weights, and rows and intermediate are rounded to fp8 and back. a13_scale and a2_scale: static
    activation scales, scalar, [1] or [E]; the largest a13_scale serves all experts.
    rounds_gate_up: round the first GEMM's result to the dtype of hidden_states, as experts do whose GEMMs come from a
    library. In fp8 the difference is a percent of the output: what was near a tie is quantized to the other side.
    quantizes_by_reciprocal: rows are quantized as `quantization.fake_quantize` does it so, for dispatchers that do.
    Returns fp32 [T, H], whatever the input dtypes. Raises ExpertIdError for an id outside [-1, E), ShapeError for
    scales that the scheme needs and were not given.
    """
    num_experts = w13.shape[0]
    if ((topk_ids < -1) | (topk_ids >= num_experts)).any():
        raise ExpertIdError(f"topk_ids must lie in [-1, {num_experts}), got {topk_ids.min()} to {topk_ids.max()}")
    x, weights = hidden_states.float(), topk_weights.float()
    out = torch.zeros_like(x)
    if quantization is not None:
        if w13_scale is None or w2_scale is None:
            raise ShapeError(f"{quantization.name} weights need w13_scale and w2_scale")
        if has_static_activations(quantization) and (a13_scale is None or a2_scale is None):
            raise ShapeError(f"{quantization.name} with static activations needs a13_scale and a2_scale")
        w13 = dequantize_weights(w13, w13_scale, quantization, halves=2)
        w2 = dequantize_weights(w2, w2_scale, quantization)
        a13_scale = None if a13_scale is None else a13_scale.float().max()
        a2_scale = None if a2_scale is None else a2_scale.float().expand(num_experts)
    for expert in range(num_experts):
        token, k = (topk_ids == expert).nonzero(as_tuple=True)
        weight = weights[token, k, None]
        rows = x[token] * weight if apply_router_weight_on_input else x[token]
        if quantization is not None:
            # Rows reach the quantization in the dtype in which they travel.
            group_size, by_reciprocal = input_group_size(quantization), quantizes_by_reciprocal
            rows = fake_quantize(rows.to(hidden_states.dtype), group_size, a13_scale, by_reciprocal=by_reciprocal)
        gate_up = rows @ w13[expert].float().T
        if rounds_gate_up:
            gate_up = gate_up.to(hidden_states.dtype).float()
        if w13_bias is not None:
            gate_up = gate_up + w13_bias[expert].float()
        rows = gated_activation(gate_up, Activation(activation), swiglu_alpha, swiglu_limit)
        if quantization is not None:
            rows = fake_quantize(rows, GROUP_SIZE, None if a2_scale is None else a2_scale[expert])
        rows = rows @ w2[expert].float().T
        if w2_bias is not None:
            rows = rows + w2_bias[expert].float()
        out.index_add_(0, token, rows if apply_router_weight_on_input else rows * weight)
    return out
