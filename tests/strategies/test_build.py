"""From a configuration and weights to a layer: what is checked, and what the layer says about itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_plugin
from moe_plugin.config import Activation, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import (
    ConfigError,
    DtypeError,
    InputError,
    MemoryLimitError,
    ShapeError,
    StrategyUnsupportedError,
    UnknownStrategyError,
    rebuild,
)
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import ExpertWeights, MoELayer, MonolithicKernel
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.strategies.registry import experts_classes
from moe_plugin.strategies.selector import explain
from moe_plugin.testing.cases import Inputs, Weights
from moe_plugin.verdict import Verdict
from moe_plugin.workspace import WorkspaceArena
from tests.matrix.third_party import register
from tests.strategies.machines import CPU, layer_config

DEVICE = torch.device("cpu")


def weights_of(config: MoEConfig) -> dict[str, Any]:
    return Weights.random(config, DEVICE).of_rank(config)


def build(config: MoEConfig, strategy: str = "auto", environment: Environment = CPU, **changes: Any) -> MoELayer:
    return moe_plugin.build(config, **(weights_of(config) | changes), strategy=strategy, environment=environment)


def test_the_layer_says_what_it_is() -> None:
    layer = build(layer_config())
    assert layer.strategy == "local+torch_native"
    assert layer.report.chosen == {"decode": layer.strategy, "prefill": layer.strategy}
    assert layer.config == layer_config()


def test_layers_share_the_arena_of_their_device_unless_given_one() -> None:
    first, second = build(layer_config()), build(layer_config())
    assert first.prepare_finalize.arena is second.prepare_finalize.arena is WorkspaceArena.shared(DEVICE)
    mine = WorkspaceArena(DEVICE)
    assert build(layer_config(), arena=mine).prepare_finalize.arena is mine


def test_a_monolithic_strategy_is_built_and_runs() -> None:
    register()
    config = layer_config(dtype=torch.float32, has_bias=True, activation=Activation.SWIGLU_OAI)
    weights = Weights.random(config, DEVICE)
    layer = moe_plugin.build(config, **weights.of_rank(config), strategy="oracle")
    assert isinstance(layer, MonolithicKernel)
    assert layer.strategy == "oracle"
    inputs = Inputs.random(config, 6, DEVICE, seed=0)
    expected = moe_plugin.reference_moe(
        *inputs.as_tuple(),
        weights.w13,
        weights.w2,
        w13_bias=weights.w13_bias,
        w2_bias=weights.w2_bias,
        activation="swiglu_oai",
    )
    assert_close_to_oracle(layer(*inputs.as_tuple()), expected, torch.float32)


def test_a_strategy_that_cannot_run_is_not_built() -> None:
    with pytest.raises(StrategyUnsupportedError, match="device: needs a CUDA device") as caught:
        build(layer_config(), "triton")
    assert caught.value.report.entry("decode").strategy == "local+triton_fused_moe"
    with pytest.raises(UnknownStrategyError, match="Did you mean 'torch'") as unknown:
        build(layer_config(), "toch")
    assert unknown.value.nearest == "torch"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"w13": (15, 256, 64)}, ShapeError, r"w13 must be \[16, 256, 64\] on this rank, got \[15, 256, 64\]"),
        ({"w13": (16, 128, 64)}, ShapeError, "w13 must be"),
        ({"w2": (16, 128, 64)}, ShapeError, r"w2 must be \[16, 64, 128\]"),
        ({"w13_bias": (16, 256)}, ShapeError, "has_bias=False"),
        ({"w2_bias": (16, 64)}, ShapeError, "has_bias=False"),
        ({"w13_scale": (16,)}, ShapeError, "the configuration is unquantized"),
        ({"w2_scale": (16,)}, ShapeError, "the configuration is unquantized"),
    ],
)
def test_weights_of_a_wrong_shape(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in changes.items()}
    with pytest.raises(error, match=words):
        build(layer_config(), **tensors)


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_weights_of_a_wrong_dtype(name: str) -> None:
    config = layer_config()
    with pytest.raises(DtypeError, match=f"{name} must be bfloat16, got float32"):
        build(config, **{name: weights_of(config)[name].float()})


@pytest.mark.parametrize("name", ["w13_bias", "w2_bias"])
def test_biases_that_are_missing_or_misshapen(name: str) -> None:
    config = layer_config(has_bias=True)
    with pytest.raises(ShapeError, match=f"{name} .* is required by has_bias=True"):
        build(config, **{name: None})
    with pytest.raises(ShapeError, match=f"{name} must be"):
        build(config, **{name: weights_of(config)[name][:-1]})


def test_quantized_weights_need_their_dtype_and_scales() -> None:
    config = layer_config(quantization=moe_plugin.Fp8Block())
    tensors = {name: tensor for name, tensor in weights_of(layer_config()).items() if tensor is not None}
    with pytest.raises(DtypeError, match="w13 must be float8_e4m3fn"):
        ExpertWeights(**tensors).check(config)
    quantized = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    with pytest.raises(ShapeError, match="fp8_block weights need w13_scale and w2_scale"):
        ExpertWeights(**quantized).check(config)
    ExpertWeights(**quantized, w13_scale=torch.ones(16), w2_scale=torch.ones(16)).check(config)


@pytest.mark.parametrize("name", ["w13", "w2", "w13_bias", "w2_bias"])
def test_weights_must_be_on_one_device(name: str) -> None:
    config = layer_config(has_bias=True)
    with pytest.raises(InputError, match=r"device|meta"):
        build(config, **{name: weights_of(config)[name].to("meta")})


def test_several_ranks_need_their_process_group() -> None:
    with pytest.raises(ConfigError, match="a layer over 2 ranks needs its process group"):
        build(layer_config(ep_size=2), "gloo")


@pytest.mark.parametrize("strategy", ["local+torch_native", "nccl_all_to_all+torch_native"])
def test_too_large_a_workspace_names_the_largest_that_fits(strategy: str) -> None:
    config = layer_config(max_tokens_per_rank=1 << 14)
    entry = explain(config, strategy, CPU).entry("decode")
    assert entry is not None
    tight = CPU.pretend(memory_bytes=entry.workspace_bytes // 3)
    with pytest.raises(MemoryLimitError, match=f"{entry.strategy.split('+')[0]}.*max_tokens_per_rank=16384") as caught:
        build(config, strategy, tight)
    largest = caught.value.largest_fit
    assert largest is not None
    assert f"max_tokens_per_rank={largest}" in str(caught.value)
    assert build(layer_config(max_tokens_per_rank=largest), strategy, tight).strategy == strategy
    with pytest.raises(MemoryLimitError):
        build(layer_config(max_tokens_per_rank=largest + 1), strategy, tight)


def test_no_room_for_a_single_token() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        build(layer_config(), "torch", CPU.pretend(memory_bytes=1))
    assert caught.value.largest_fit is None
    assert "not even one token fits" in str(caught.value)


def test_a_machine_that_does_not_know_its_memory_sets_no_limit() -> None:
    assert build(layer_config(), "torch", CPU.pretend(memory_bytes=0)).strategy == "local+torch_native"


def test_the_memory_of_each_phase_is_checked() -> None:
    config = layer_config(max_tokens_per_rank=1 << 14)
    strategy = "decode=local+torch_native,prefill=nccl_all_to_all+torch_native"
    prefill = explain(config, strategy, CPU).entry("prefill")
    assert prefill is not None
    with pytest.raises(MemoryLimitError, match="nccl_all_to_all"):
        build(config, strategy, CPU.pretend(memory_bytes=prefill.workspace_bytes - 1))


def test_parameters_are_taken_without_their_gradients() -> None:
    config = layer_config(dtype=torch.float32)
    weights = {
        name: None if tensor is None else torch.nn.Parameter(tensor)
        for name, tensor in Weights.random(config, torch.device("cpu")).of_rank(config).items()
    }
    layer = moe_plugin.build(config, **weights, strategy="torch", environment=CPU)
    out = layer(*Inputs.random(config, 3, torch.device("cpu"), seed=0).as_tuple())
    assert not out.requires_grad


def test_one_broken_class_does_not_keep_others_from_being_chosen() -> None:
    class Broken(TorchNative):
        name = "broken"

        @classmethod
        def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
            raise ZeroDivisionError("in a gate")

    moe_plugin.register_experts(Broken)
    try:
        report = moe_plugin.explain(layer_config(), environment=CPU)
        assert report.chosen["prefill"] == "local+torch_native"
        (entry,) = (e for e in report.entries["prefill"] if e.strategy == "local+broken")
        assert not entry.runs
        assert "ZeroDivisionError('in a gate')" in entry.why()
    finally:
        experts_classes.unregister("broken")


def test_an_error_of_another_package_comes_back_from_another_rank() -> None:
    problem = rebuild("TheirError", "rank 1: it broke")
    assert type(problem) is moe_plugin.MoEPluginError
    assert str(problem) == "rank 1: it broke (TheirError)"
