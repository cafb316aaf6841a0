"""From a configuration and weights to a layer: what is checked, and what the layer says about itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_plugin
from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken, MoEConfig, QuantConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import (
    ConfigError,
    DtypeError,
    InputError,
    MemoryLimitError,
    NoStrategyError,
    ShapeError,
    StrategyUnsupportedError,
    UnknownStrategyError,
    rebuild,
)
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import ExpertWeights, ModularKernel, MoELayer, MonolithicKernel
from moe_plugin.numerics import FP8_TOLERANCE, assert_close_to_oracle
from moe_plugin.strategies.registry import experts_classes
from moe_plugin.strategies.selector import explain
from moe_plugin.testing.cases import Inputs, Weights, oracle
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


STATIC = Fp8PerTensor(static_activations=True)
SCHEMES = {"block": Fp8Block(), "per_token": Fp8PerToken(), "per_tensor": Fp8PerTensor(), "static": STATIC}


def test_quantized_weights_need_their_dtype_and_scales() -> None:
    config = layer_config(quantization=Fp8Block())
    with pytest.raises(DtypeError, match="w13 must be float8_e4m3fn, got bfloat16"):
        build(config, **weights_of(layer_config()))
    for name in ("w13_scale", "w2_scale"):
        with pytest.raises(ShapeError, match="fp8_block weights need w13_scale and w2_scale"):
            build(config, **{name: None})


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_quantized_layer_matches_the_oracle(scheme: QuantConfig) -> None:
    config = layer_config(quantization=scheme, has_bias=True)
    weights, inputs = Weights.random(config, DEVICE), Inputs.random(config, 20, DEVICE, seed=0)
    layer = build(config)
    assert layer.strategy == "local+torch_native"
    assert_close_to_oracle(layer(*inputs.as_tuple()), oracle(config, weights, inputs), FP8_TOLERANCE)


def test_static_scales_go_with_static_activations() -> None:
    for name in ("a13_scale", "a2_scale"):
        with pytest.raises(ShapeError, match="static activations needs a13_scale and a2_scale"):
            build(layer_config(quantization=STATIC), **{name: None})
        for scheme in (Fp8PerTensor(), Fp8Block()):
            with pytest.raises(ShapeError, match="a13_scale and a2_scale are for Fp8PerTensor"):
                build(layer_config(quantization=scheme), **{name: torch.ones(1)})
        with pytest.raises(ShapeError, match=f"{name} given, but the configuration is unquantized"):
            build(layer_config(), **{name: torch.ones(1)})


@pytest.mark.parametrize(
    ("scheme", "changes", "words"),
    [
        (
            Fp8Block(),
            {"w13_scale": (16, 1, 1)},
            r"w13_scale of fp8_block must be \[16, 2, 1\] on this rank, got \[16, 1, 1\]",
        ),
        (Fp8Block(), {"w2_scale": (16,)}, r"w2_scale of fp8_block must be \[16, 1, 1\]"),
        (Fp8PerToken(), {"w13_scale": (16, 1, 256)}, r"must be \[16, 256\] or \[16, 256, 1\] on this rank"),
        (Fp8PerToken(), {"w2_scale": (16, 128)}, r"must be \[16, 64\] or \[16, 64, 1\]"),
        (Fp8PerTensor(), {"w13_scale": (2, 16)}, r"must be \[16, 2\] or \[16\]"),
        (Fp8PerTensor(), {"w2_scale": ()}, r"must be \[16\] on this rank, got \[\]"),
        (STATIC, {"a13_scale": (2,)}, r"a13_scale of fp8_per_tensor must be \[16\] or \[1\] or \[\]"),
        (STATIC, {"a2_scale": (16, 1)}, r"a2_scale of fp8_per_tensor must be"),
    ],
)
def test_scales_of_a_wrong_shape(scheme: QuantConfig, changes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        build(layer_config(quantization=scheme), **{name: torch.ones(shape) for name, shape in changes.items()})


@pytest.mark.parametrize("name", ["w13_scale", "w2_scale", "a13_scale", "a2_scale"])
def test_scales_of_a_wrong_dtype_or_device(name: str) -> None:
    config = layer_config(quantization=STATIC)
    scale = weights_of(config)[name]
    with pytest.raises(DtypeError, match=f"{name} must be float32, got bfloat16"):
        build(config, **{name: scale.bfloat16()})
    with pytest.raises(InputError, match=f"{name} is on meta, w13 on cpu"):
        build(config, **{name: scale.to("meta")})
    with pytest.raises(DtypeError, match=f"{name} must be a tensor, got float"):
        build(config, **{name: 0.5})


def experts_weights(config: MoEConfig, **changes: Any) -> ExpertWeights:
    """The weights that the Experts class gets to see."""
    layer = build(config, **changes)
    assert isinstance(layer, ModularKernel)
    return layer.experts.weights


def test_scales_of_other_accepted_shapes_become_canonical() -> None:
    config = layer_config(quantization=Fp8PerToken())
    given = weights_of(config)
    wide = {name: given[name].unsqueeze(2) for name in ("w13_scale", "w2_scale")}
    spread = {name: torch.stack((given[name], given[name]), -1)[..., 0] for name in wide}
    for changes in (wide, spread):
        weights = experts_weights(config, **changes)
        for name in wide:
            seen = getattr(weights, name)
            assert seen.is_contiguous()
            assert torch.equal(seen, given[name])

    config = layer_config(quantization=STATIC)
    one = torch.linspace(1, 2, 16)
    weights = experts_weights(config, w13_scale=one, a13_scale=one, a2_scale=torch.tensor(0.5))
    assert weights.w13_scale is not None
    assert torch.equal(weights.w13_scale, torch.stack((one, one), dim=1))
    assert weights.a13_scale is not None
    assert weights.a13_scale.tolist() == [2.0]
    assert weights.a2_scale is not None
    assert weights.a2_scale.tolist() == [0.5] * 16
    weights = experts_weights(config, a13_scale=torch.tensor([3.0]), a2_scale=torch.tensor([0.5]))
    assert weights.a13_scale is not None
    assert weights.a13_scale.tolist() == [3.0]


def test_blocks_that_no_class_computes_are_named() -> None:
    config = layer_config(quantization=Fp8Block(64, 64))
    with pytest.raises(NoStrategyError, match=r"needs fp8_block in tiles of 128 x 128, saw fp8_block 64 x 64"):
        build(config)


@pytest.mark.parametrize("name", ["w13_bias", "w2_bias"])
def test_biases_of_a_wrong_dtype(name: str) -> None:
    for config in (layer_config(has_bias=True), layer_config(has_bias=True, quantization=Fp8Block())):
        with pytest.raises(DtypeError, match=f"{name} must be bfloat16, got float32"):
            build(config, **{name: weights_of(config)[name].float()})


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
