"""The MoE layers of well-known models, by name: dimensions for `explain`, benchmarks and tests. No weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moe_plugin.config import Activation, MoEConfig
from moe_plugin.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One model's MoE layer.

    name: what `--preset` takes.
    layer: the MoEConfig arguments that follow from the model; read-only.
    source: the model on the Hugging Face hub whose config.json the numbers are from.
    router: how the model routes, in terms of moe_plugin.routing.
    note: what a user of the numbers should know besides.
    """

    name: str
    layer: Mapping[str, Any]
    source: str
    router: str
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", MappingProxyType(dict(self.layer)))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                name="deepseek-v3",
                layer={"num_experts": 256, "top_k": 8, "hidden_size": 7168, "intermediate_size": 2048},
                source="deepseek-ai/DeepSeek-V3",
                router="sigmoid_grouped_topk, 8 groups, best 4, renormalized, scaling 2.5",
                note="published in fp8 with 128x128 blocks; one shared expert beside the routed ones",
            ),
            Preset(
                name="qwen3-235b",
                layer={"num_experts": 128, "top_k": 8, "hidden_size": 4096, "intermediate_size": 1536},
                source="Qwen/Qwen3-235B-A22B",
                router="softmax_topk, renormalized",
            ),
            Preset(
                name="qwen3-30b",
                layer={"num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768},
                source="Qwen/Qwen3-30B-A3B",
                router="softmax_topk, renormalized",
            ),
            Preset(
                name="mixtral-8x7b",
                layer={"num_experts": 8, "top_k": 2, "hidden_size": 4096, "intermediate_size": 14336},
                source="mistralai/Mixtral-8x7B-v0.1",
                router="softmax_topk, renormalized",
            ),
            Preset(
                name="gpt-oss-120b",
                layer={
                    "num_experts": 128,
                    "top_k": 4,
                    "hidden_size": 2880,
                    "intermediate_size": 2880,
                    "activation": Activation.SWIGLU_OAI,
                    "swiglu_alpha": 1.702,
                    "swiglu_limit": 7.0,
                    "has_bias": True,
                },
                source="openai/gpt-oss-120b",
                router="softmax_topk over biased logits, renormalized",
                note="published in MXFP4 with gate and up rows interleaved; MoEConfig's w13 has all gate rows first",
            ),
            Preset(
                name="deepseek-v3-ep8",
                layer={"num_experts": 32, "top_k": 8, "hidden_size": 7168, "intermediate_size": 2048},
                source="deepseek-ai/DeepSeek-V3",
                router="sigmoid_grouped_topk, 8 groups, best 4, renormalized, scaling 2.5",
                note="one rank's share of 8-way expert parallelism, for measuring experts: every token is routed to 8 "
                "of these 32",
            ),
        )
    }
)
"""Every preset by name."""


def preset_config(name: str, **overrides: Any) -> MoEConfig:
    """The MoEConfig of a preset: bf16, unquantized, one rank, unless `overrides` (MoEConfig arguments) say otherwise.

    Raises ConfigError for an unknown name, with the nearest known one.
    """
    preset = PRESETS.get(name)
    if preset is None:
        nearest = difflib.get_close_matches(name.lower().replace("_", "-"), PRESETS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"unknown preset {name!r}.{hint} Known: {', '.join(PRESETS)}.")
    return MoEConfig(**{**preset.layer, **overrides})
