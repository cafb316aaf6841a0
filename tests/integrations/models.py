"""Small random models, one of each kind of experts module that the integration has to read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from moe_plugin.config import Fp8Block, QuantConfig
from moe_plugin.quantization import has_static_activations, quantize_weights

VOCABULARY = 97

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 5},
    # A dense first layer, a shared expert, grouped routing.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    # Transposed, interleaved and biased experts with a clamped activation.
    "gpt_oss": {"num_local_experts": 6},
}


def build_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A model with the same random weights on every call, large enough to tell experts apart, in evaluation mode."""
    config = AutoConfig.for_model(kind, **{**SHAPE, **KINDS.get(kind, {}), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "bias" in name:
                parameter.normal_(std=0.3)
    return model


def build_fp8_model(kind: str, scheme: QuantConfig, **changes: Any) -> PreTrainedModel:
    """`build_model` with FP8Experts of transformers; its linear layers stay as they are, as in fp8 they need a GPU."""
    model = build_model(kind, **changes)
    weights = {
        name: (module.gate_up_proj.detach(), module.down_proj.detach())
        for name, module in model.named_modules()
        if name.endswith(".experts")
    }
    static = has_static_activations(scheme)
    is_block = isinstance(scheme, Fp8Block)
    quantization = FineGrainedFP8Config(weight_block_size=[scheme.block_n, scheme.block_k] if is_block else None)
    quantization.activation_scheme = "static" if static else "dynamic"
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    replace_with_fp8_linear(model, linear, quantization)
    for name, (gate_up, down) in weights.items():
        module = model.get_submodule(name).to_empty(device="cpu").eval()
        w13, w13_scale = quantize_weights(gate_up, scheme, halves=2)
        w2, w2_scale = quantize_weights(down, scheme)
        values = {
            "gate_up_proj": w13,
            "gate_up_proj_scale_inv": w13_scale,
            "down_proj": w2,
            "down_proj_scale_inv": w2_scale,
        }
        if static:
            values["gate_up_proj_activation_scale"] = torch.linspace(0.005, 0.01, len(gate_up))
            values["down_proj_activation_scale"] = torch.linspace(0.02, 0.05, len(gate_up))
        with torch.no_grad():
            for parameter, value in values.items():
                getattr(module, parameter).copy_(value.reshape(getattr(module, parameter).shape))
    return model


def logits(model: PreTrainedModel, num_tokens: int = 37) -> torch.Tensor:
    """[2, num_tokens, vocabulary] for fixed tokens."""
    tokens = torch.randint(VOCABULARY, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def eager_logits(model: PreTrainedModel, num_tokens: int = 37) -> torch.Tensor:
    """What transformers itself computes."""
    model.set_experts_implementation("eager")
    return logits(model, num_tokens)
