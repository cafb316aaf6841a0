"""The class that CONTRIBUTING.md shows is complete: it registers, is selected and matches the oracle."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import moe_plugin
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.strategies.registry import experts_classes
from moe_plugin.testing.cases import Inputs, Weights

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_example_experts_class_runs() -> None:
    example = re.search(r"<!-- example: experts -->\n```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert example is not None
    assert len(example[1].splitlines()) < 50
    try:
        exec(compile(example[1], CONTRIBUTING.name, "exec"), {})
        config = moe_plugin.MoEConfig(
            num_experts=4, top_k=2, hidden_size=32, intermediate_size=16, dtype=torch.float32, max_tokens_per_rank=8
        )
        device = torch.device("cpu")
        weights, inputs = Weights.random(config, device), Inputs.random(config, 6, device, seed=1)
        layer = moe_plugin.build(config, **weights.of_rank(config), strategy="local+dense_experts")
        expected = moe_plugin.reference_moe(*inputs.as_tuple(), weights.w13, weights.w2)
        assert_close_to_oracle(layer(*inputs.as_tuple()), expected, torch.float32)
    finally:
        experts_classes.unregister("dense_experts")
