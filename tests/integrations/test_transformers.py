"""The experts of transformers models run by moe_plugin, against transformers' own eager implementation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from moe_plugin.config import Fp8Block, Fp8PerTensor, ParallelConfig, QuantConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError, MissingPackageError, StrategyUnsupportedError, UnknownStrategyError
from moe_plugin.integrations.transformers import (
    EXPERTS_IMPLEMENTATION,
    activate,
    experts_modules,
    register,
    selection_report,
)
from moe_plugin.modular_kernel import MoELayer
from moe_plugin.numerics import FP8_TOLERANCE, assert_close_to_oracle
from moe_plugin.reference import reference_moe

from .models import KINDS, build_fp8_model, build_model, eager_logits, logits
from .ranks import run_on_ranks

STRATEGIES = ("local+torch_native", "nccl_all_to_all+torch_native")
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_eager_experts(kind: str, strategy: str) -> None:
    model = build_model(kind)
    expected = eager_logits(model)
    activate(model, strategy)
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    assert set(selection_report(model).chosen.values()) == {strategy}


@pytest.mark.parametrize("max_tokens_per_rank", [1, 36, 37, 73, 74])
def test_calls_with_more_tokens_than_the_limit_are_split(max_tokens_per_rank: int) -> None:
    model = build_model("qwen3_moe")
    expected = eager_logits(model)
    activate(model, max_tokens_per_rank=max_tokens_per_rank)
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)


def test_prompt_longer_than_the_context() -> None:
    model = build_model("mixtral")
    expected = eager_logits(model, num_tokens=200)
    activate(model)
    torch.testing.assert_close(logits(model, num_tokens=200), expected, **TOLERANCE)


@pytest.mark.parametrize(("num_tokens", "phase"), [(1, "decode"), (150, "prefill")])
def test_each_phase_runs_its_layer(num_tokens: int, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("qwen3_moe")
    expected = eager_logits(model, num_tokens)
    strategy = "decode=local+torch_native,prefill=nccl_all_to_all+torch_native"
    activate(model, strategy, max_tokens_per_rank=512)
    logits(model, num_tokens)
    ran: list[str] = []

    def forward_of(name: str, layer: MoELayer) -> Callable[..., torch.Tensor]:
        forward = layer.forward

        def noted(*arguments: Any, **options: Any) -> torch.Tensor:
            ran.append(name)
            return forward(*arguments, **options)

        return noted

    for _, module in experts_modules(model):
        for name in ("decode", "prefill"):
            layer = getattr(module._moe_plugin.layer, name)
            monkeypatch.setattr(layer, "forward", forward_of(name, layer))
    torch.testing.assert_close(logits(model, num_tokens), expected, **TOLERANCE)
    assert set(ran) == {phase}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = build_model("qwen3_moe").to(dtype)
    _, module = next(experts_modules(model))
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(50, 64, generator=generator).to(dtype)
    # One module, since rounding may lead the next router to other experts.
    arguments = (hidden_states, torch.randint(16, (50, 4), generator=generator), torch.rand(50, 4, generator=generator))
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = module.float()(hidden_states.float(), *arguments[1:])
    module.to(dtype)
    activate(model)
    with torch.no_grad():
        result = module(*arguments)
    assert result.dtype == dtype
    assert (result - expected).norm() <= 1e-2 * expected.norm()


def test_empty_batch() -> None:
    model = build_model("qwen3_moe")
    activate(model)
    _, module = next(experts_modules(model))
    nothing = torch.empty(0, 64)
    result = module(nothing, torch.empty(0, 4, dtype=torch.int64), torch.empty(0, 4))
    assert result.shape == nothing.shape


def test_inference_mode_and_no_grad_may_alternate() -> None:
    model = build_model("qwen3_moe")
    expected = eager_logits(model)
    activate(model)
    with torch.inference_mode():
        inside = logits(model)
    torch.testing.assert_close(inside, expected, **TOLERANCE)
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_changed_weights_are_noticed(kind: str) -> None:
    model = build_model(kind)
    activate(model)
    before = logits(model)
    with torch.no_grad():
        for _, module in experts_modules(model):
            module.gate_up_proj.mul_(-1)
    changed = logits(model)
    assert not torch.allclose(before, changed, **TOLERANCE)
    torch.testing.assert_close(changed, eager_logits(model), **TOLERANCE)


def test_weights_are_shared_with_the_model_where_layouts_agree() -> None:
    model = build_model("qwen3_moe")
    activate(model, "local+torch_native")
    logits(model)
    for _, module in experts_modules(model):
        weights = module._moe_plugin.layer.experts.weights
        assert weights.w13.data_ptr() == module.gate_up_proj.data_ptr()
        assert weights.w2.data_ptr() == module.down_proj.data_ptr()


def test_another_strategy_may_follow() -> None:
    model = build_model("mixtral")
    expected = eager_logits(model)
    for strategy in (*STRATEGIES, "auto"):
        activate(model, strategy)
        torch.testing.assert_close(logits(model), expected, **TOLERANCE)


def test_transformers_own_way_to_choose_an_implementation_suffices() -> None:
    model = build_model("qwen3_moe")
    expected = eager_logits(model)
    register()
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)


def test_one_line_says_what_was_chosen_and_why(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("qwen3_moe")
    activate(model)
    with caplog.at_level(logging.INFO, logger="moe_plugin"):
        logits(model)
        logits(model)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert lines == [selection_report(model).line()]


def test_report_comes_with_the_first_call() -> None:
    model = build_model("qwen3_moe")
    activate(model)
    assert selection_report(model) is None


def test_unknown_strategy() -> None:
    with pytest.raises(UnknownStrategyError, match="local\\+torch_native"):
        activate(build_model("qwen3_moe"), "local+torch_natve")


def test_strategy_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "probe", lambda *_: Environment())
    model = build_model("qwen3_moe")
    activate(model, "local+triton_fused_moe")
    with pytest.raises(StrategyUnsupportedError, match="triton"):
        logits(model)


def test_unsupported_activation_is_refused_by_what_it_computes() -> None:
    with pytest.raises(ConfigError, match=r"Qwen3MoeExperts applies an activation that is none of silu_and_mul"):
        activate(build_model("qwen3_moe", hidden_act="relu"))


def test_unsupported_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="expert weights are float64"):
        activate(build_model("qwen3_moe").double())


FP8_SCHEMES = {
    "block": Fp8Block(),
    "per_tensor": Fp8PerTensor(),
    "per_tensor_static": Fp8PerTensor(static_activations=True),
}


def fp8_call(module: Any, scheme: QuantConfig, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The arguments of one call of an fp8 experts module, and the oracle's answer."""
    generator = torch.Generator().manual_seed(3)
    arguments = (
        torch.randn(40, module.hidden_dim, generator=generator).to(dtype),
        torch.randint(module.num_experts, (40, 4), generator=generator),
        torch.rand(40, 4, generator=generator),
    )
    per_matrix = module.block_size is None
    w13_scale, w2_scale = module.gate_up_proj_scale_inv.detach(), module.down_proj_scale_inv.detach()
    expected = reference_moe(
        *arguments,
        module.gate_up_proj.detach(),
        module.down_proj.detach(),
        quantization=scheme,
        w13_scale=w13_scale.squeeze(2) if per_matrix else w13_scale,
        w2_scale=w2_scale.flatten() if per_matrix else w2_scale,
        a13_scale=getattr(module, "gate_up_proj_activation_scale", None),
        a2_scale=getattr(module, "down_proj_activation_scale", None),
    )
    return arguments, expected.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", FP8_SCHEMES.values(), ids=FP8_SCHEMES)
def test_fp8_experts(scheme: QuantConfig, dtype: torch.dtype) -> None:
    model = build_fp8_model("qwen3_moe", scheme, hidden_size=192, moe_intermediate_size=128)
    activate(model, "local+torch_native")
    for _, module in experts_modules(model):
        arguments, expected = fp8_call(module, scheme, dtype)
        with torch.no_grad():
            out = module(*arguments)
        assert out.dtype == dtype
        assert_close_to_oracle(out, expected, FP8_TOLERANCE)
    assert logits(model).isfinite().all()


def test_fp8_scales_in_powers_of_two() -> None:
    scheme = Fp8Block()
    model = build_fp8_model("qwen3_moe", scheme, hidden_size=128, moe_intermediate_size=128)
    _, module = next(experts_modules(model))
    for name in ("gate_up_proj_scale_inv", "down_proj_scale_inv"):
        exact = torch.exp2(getattr(module, name).detach().log2().ceil())
        setattr(module, name, torch.nn.Parameter(exact, requires_grad=False))
    arguments, expected = fp8_call(module, scheme, torch.float32)
    for name in ("gate_up_proj_scale_inv", "down_proj_scale_inv"):
        stored = getattr(module, name).detach().to(torch.float8_e8m0fnu)
        setattr(module, name, torch.nn.Parameter(stored, requires_grad=False))
    activate(model, "local+torch_native")
    assert_close_to_oracle(module(*arguments), expected, FP8_TOLERANCE)


def test_fp8_tiles_that_gate_and_up_share_are_refused() -> None:
    model = build_fp8_model("qwen3_moe", Fp8Block(), moe_intermediate_size=96)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts .*intermediate size 96 is no multiple of 128"):
        activate(model)


def test_fp8_tiles_with_static_activation_scales_are_refused() -> None:
    model = build_fp8_model("qwen3_moe", Fp8Block(), moe_intermediate_size=128)
    _, module = next(experts_modules(model))
    module.activation_scheme = "static"
    with pytest.raises(ConfigError, match="need dynamic activation scales"):
        activate(model)


def test_fp8_tiles_of_another_size_are_refused_by_the_strategies() -> None:
    model = build_fp8_model("qwen3_moe", Fp8Block(64, 64), moe_intermediate_size=128)
    activate(model, "local+torch_native")
    with pytest.raises(StrategyUnsupportedError, match="fp8_block 64 x 64"):
        logits(model)


def test_fp8_weights_without_scales_are_refused() -> None:
    model = build_model("qwen3_moe")
    for _, module in experts_modules(model):
        for name in ("gate_up_proj", "down_proj"):
            fp8 = getattr(module, name).detach().to(torch.float8_e4m3fn)
            setattr(module, name, torch.nn.Parameter(fp8, requires_grad=False))
    with pytest.raises(ConfigError, match="without the scales"):
        activate(model)


def test_experts_without_a_gate_are_refused() -> None:
    model = build_model("qwen3_moe")
    _, module = next(experts_modules(model))
    module.has_gate = False
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts .*without a gate"):
        activate(model)


def test_model_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts"):
        activate(build_model("llama"))


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="tp_size must be 1"):
        activate(build_model("qwen3_moe"), parallel=ParallelConfig(tp_size=2))


def test_ranks_without_a_process_group_are_refused_before_experts_are_freed() -> None:
    model = build_model("qwen3_moe")
    with pytest.raises(ConfigError, match="process group"):
        activate(model, parallel=ParallelConfig(ep_size=2))
    assert all(module.gate_up_proj.shape[0] == 16 for _, module in experts_modules(model))


def test_training_is_refused() -> None:
    model = build_model("qwen3_moe").train()
    activate(model)
    with pytest.raises(ConfigError, match="inference only"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(MissingPackageError, match=r"moe-plugin\[serve\]"):
        register()


def check_expert_parallelism() -> None:
    """Every rank: logits as on one rank and bitwise as on the others; only its own experts are kept, for good."""
    num_ranks = dist.get_world_size()
    for kind in KINDS:
        model = build_model(kind)
        many, one = (2, 37), (1, 1)
        expected = {shape: eager_logits(model, shape[1])[: shape[0]] for shape in (many, one)}
        total = sum(module.gate_up_proj.shape[0] for _, module in experts_modules(model))
        # 74 tokens in calls of at most 16 per rank: several calls, the last one short.
        activate(model, parallel=ParallelConfig(ep_group=dist.group.WORLD), max_tokens_per_rank=16)
        for shape, wanted in expected.items():
            result = logits(model, shape[1])[: shape[0]]
            torch.testing.assert_close(result, wanted, **TOLERANCE)
            everyone = [torch.empty_like(result) for _ in range(num_ranks)]
            dist.all_gather(everyone, result.contiguous())
            assert all(torch.equal(other, result) for other in everyone), f"{kind}: ranks differ"
        held = torch.tensor(sum(module.gate_up_proj.shape[0] for _, module in experts_modules(model)))
        assert held < total
        dist.all_reduce(held)
        assert held == total
        activate(model, "nccl_all_to_all+torch_native", ParallelConfig(ep_group=dist.group.WORLD))
        torch.testing.assert_close(logits(model), expected[many], **TOLERANCE)
        with pytest.raises(ConfigError, match="load the model again"):
            activate(model)


def check_fp8_expert_parallelism() -> None:
    """Every rank: the answer of one rank. Static input scales differ between the ranks' experts."""
    for scheme in FP8_SCHEMES.values():
        model = build_fp8_model("qwen3_moe", scheme, hidden_size=192, moe_intermediate_size=128)
        _, module = next(experts_modules(model))
        arguments, expected = fp8_call(module, scheme, torch.bfloat16)
        activate(model, "nccl_all_to_all+torch_native", ParallelConfig(ep_group=dist.group.WORLD))
        assert module.gate_up_proj_scale_inv.shape[0] < 16
        with torch.no_grad():
            assert_close_to_oracle(module(*arguments), expected, FP8_TOLERANCE)


@pytest.mark.slow
def test_fp8_expert_parallelism() -> None:
    run_on_ranks(check_fp8_expert_parallelism, 2)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_expert_parallelism(num_ranks: int) -> None:
    run_on_ranks(check_expert_parallelism, num_ranks)
