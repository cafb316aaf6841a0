"""moe_plugin: a mixture-of-experts backend for any inference server.

>>> config = moe_plugin.MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=128)
>>> print(moe_plugin.explain(config).text())
>>> layer = moe_plugin.build(config, w13, w2, strategy="auto")
>>> output = layer(hidden_states, topk_ids, topk_weights)
"""

from moe_plugin.config import (
    Activation,
    ExpertPlacement,
    Fp8Block,
    Fp8PerTensor,
    Fp8PerToken,
    MoEConfig,
    ParallelConfig,
)
from moe_plugin.environment import Environment
from moe_plugin.errors import MoEPluginError
from moe_plugin.modular_kernel import MoELayer
from moe_plugin.reference import reference_moe
from moe_plugin.strategies.build import build
from moe_plugin.strategies.registry import register_experts, register_monolithic, register_prepare_finalize
from moe_plugin.strategies.selector import explain, parse_strategy, strategy_names

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Environment",
    "ExpertPlacement",
    "Fp8Block",
    "Fp8PerTensor",
    "Fp8PerToken",
    "MoEConfig",
    "MoELayer",
    "MoEPluginError",
    "ParallelConfig",
    "build",
    "explain",
    "parse_strategy",
    "reference_moe",
    "register_experts",
    "register_monolithic",
    "register_prepare_finalize",
    "strategy_names",
]
