"""Presets carry the numbers of the models they are named after."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from moe_plugin.config import Activation, Fp8Block, MoEConfig, ParallelConfig
from moe_plugin.errors import ConfigError
from moe_plugin.presets import PRESETS, preset_config


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        ("deepseek-v3", (256, 8, 7168, 2048)),
        ("qwen3-235b", (128, 8, 4096, 1536)),
        ("qwen3-30b", (128, 8, 2048, 768)),
        ("mixtral-8x7b", (8, 2, 4096, 14336)),
        ("gpt-oss-120b", (128, 4, 2880, 2880)),
        ("deepseek-v3-ep8", (32, 8, 7168, 2048)),
    ],
)
def test_dimensions(name, dimensions):
    config = preset_config(name)
    assert (config.num_experts, config.top_k, config.hidden_size, config.intermediate_size) == dimensions


def test_the_table_is_complete_and_keyed_by_name():
    models = ["deepseek-v3", "qwen3-235b", "qwen3-30b", "mixtral-8x7b", "gpt-oss-120b"]
    assert list(PRESETS) == [*models, "deepseek-v3-ep8"]
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert preset.source.count("/") == 1
        assert preset.router.split(",")[0].split()[0] in {"softmax_topk", "sigmoid_grouped_topk"}


@pytest.mark.parametrize(
    ("name", "model", "intermediate"),
    [
        ("deepseek-v3", DeepseekV3Config(), "moe_intermediate_size"),
        ("qwen3-30b", Qwen3MoeConfig(), "moe_intermediate_size"),
        ("mixtral-8x7b", MixtralConfig(), "intermediate_size"),
        ("gpt-oss-120b", GptOssConfig(), "intermediate_size"),
    ],
)
def test_dimensions_are_the_defaults_of_transformers(name, model, intermediate):
    config = preset_config(name)
    experts = getattr(model, "n_routed_experts", None) or getattr(model, "num_local_experts", None) or model.num_experts
    assert config.num_experts == experts
    assert config.top_k == model.num_experts_per_tok
    assert config.intermediate_size == getattr(model, intermediate)
    assert config.hidden_size == model.hidden_size


def test_the_slice_is_one_rank_of_eight():
    whole = preset_config("deepseek-v3", parallel=ParallelConfig(ep_size=8))
    part = preset_config("deepseek-v3-ep8")
    assert part.num_experts == whole.num_local_experts
    assert (part.top_k, part.hidden_size, part.intermediate_size) == (whole.top_k, 7168, 2048)


def test_gpt_oss_brings_its_activation_and_biases():
    config = preset_config("gpt-oss-120b")
    assert config.activation is Activation.SWIGLU_OAI
    assert config.has_bias
    assert (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)


def test_defaults_and_overrides():
    assert preset_config("deepseek-v3") == MoEConfig(
        num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048, dtype=torch.bfloat16
    )
    config = preset_config(
        "deepseek-v3",
        top_k=4,
        dtype=torch.float16,
        quantization=Fp8Block(),
        parallel=ParallelConfig(ep_size=8),
        cuda_graph=True,
    )
    assert (config.top_k, config.dtype, config.cuda_graph) == (4, torch.float16, True)
    assert config.num_local_experts == 32


@pytest.mark.parametrize(
    ("typed", "meant"), [("deepseekv3", "deepseek-v3"), ("Mixtral_8x7B", "mixtral-8x7b"), ("gpt-oss", "gpt-oss-120b")]
)
def test_an_unknown_name_gets_the_nearest_one(typed, meant):
    with pytest.raises(ConfigError, match=f"{typed}.*Did you mean '{meant}'"):
        preset_config(typed)


def test_a_name_near_nothing_gets_the_list():
    with pytest.raises(ConfigError, match=r"unknown preset 'zzz'\. Known: deepseek-v3, qwen3-235b"):
        preset_config("zzz")


def test_presets_are_read_only():
    with pytest.raises(TypeError):
        PRESETS["deepseek-v3"].layer["top_k"] = 1
