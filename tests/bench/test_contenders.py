"""Contenders compute the layer, or say why they do not; DeepGEMM's calls, with its double in the library's place."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_plugin.bench import contenders
from moe_plugin.bench.contenders import (
    PEERS,
    Accuracy,
    DeepGemmGroupedGemms,
    NotInstalledError,
    StrategyContender,
    UnsupportedError,
    VllmDeepGemmExperts,
    peer,
)
from moe_plugin.bench.layers import Inputs, Layer
from moe_plugin.compat import deep_gemm as compat
from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.environment import probe_package
from moe_plugin.errors import ConfigError, UnknownStrategyError
from moe_plugin.numerics import Tolerance
from tests.doubles import deep_gemm as double

CPU = torch.device("cpu")
CONFIG = MoEConfig(num_experts=6, top_k=2, hidden_size=256, intermediate_size=128)
BLOCK = replace(CONFIG, quantization=Fp8Block())


def layer_and_inputs(config: MoEConfig, tokens: int = 12) -> tuple[Layer, Inputs]:
    return Layer.random("x", config, CPU, 0), Inputs.random(config, tokens, "zipf", CPU, 1)


def test_nan_and_each_of_the_two_errors_fail() -> None:
    limit = Tolerance(frobenius=1e-2, row=2e-2)
    assert Accuracy(1e-2, 2e-2, limit).ok
    assert not Accuracy(1.1e-2, 0.0, limit).ok
    assert not Accuracy(0.0, 2.1e-2, limit).ok
    assert not Accuracy(float("nan"), 0.0, limit).ok
    assert not Accuracy(0.0, float("nan"), limit).ok
    assert "1.10e-02 (tolerance 0.01)" in str(Accuracy(1.1e-2, 0.0, limit))


def test_the_nearest_of_several_right_answers_counts() -> None:
    limit = Tolerance(frobenius=1e-2, row=2e-2)
    actual = torch.ones(4, 8)
    near, far, undefined = actual * 1.005, actual * 2, actual * torch.nan
    for answers in ([near, far], [far, near], [undefined, near]):
        assert Accuracy.of_any(actual, answers, limit) == Accuracy.of(actual, near, limit)
        assert Accuracy.of_any(actual, answers, limit).ok
    assert not Accuracy.of_any(actual, [far], limit).ok
    # One that is nearer over all, but wrong in a row, does not hide one that is right.
    one_row_off = actual.clone()
    one_row_off[0] *= 1.03
    wide = Tolerance(frobenius=1e-1, row=2e-2)
    everywhere = actual * 1.018
    assert Accuracy.of(actual, one_row_off, wide).error < Accuracy.of(actual, everywhere, wide).error
    assert Accuracy.of_any(actual, [one_row_off, everywhere], wide).ok


def test_a_strategy_computes_the_layer() -> None:
    layer, inputs = layer_and_inputs(CONFIG)
    job = peer("torch").prepare(layer, 12).bind(inputs)
    output = job.run()
    assert job.check(output).ok
    assert not job.check(output * 1.05).ok
    output[-1] = float("nan")
    assert not job.check(output).ok


def test_auto_says_what_it_chose() -> None:
    layer, _ = layer_and_inputs(CONFIG)
    prepared = StrategyContender("auto").prepare(layer, 12)
    assert prepared.note(12).startswith("chose local+")
    assert StrategyContender("local+torch_native").prepare(layer, 12).note(12) == ""


def test_a_gate_is_a_refusal_that_names_itself() -> None:
    layer, _ = layer_and_inputs(CONFIG)
    with pytest.raises(UnsupportedError, match=r"refuses_everything\.mood: needs a good one, saw bad"):
        StrategyContender("local+refuses_everything").prepare(layer, 12)


@pytest.fixture(autouse=True)
def _a_class_that_refuses() -> Iterator[None]:
    from moe_plugin.experts.torch_native import TorchNative
    from moe_plugin.strategies.registry import experts_classes, register_experts
    from moe_plugin.verdict import Gate, Verdict

    class RefusesEverything(TorchNative):
        name = "refuses_everything"

        @classmethod
        def supports(cls, config: MoEConfig, environment: Any) -> Verdict:
            return Verdict.of(Gate("mood", False, "bad", "a good one"))

    register_experts(RefusesEverything)
    yield
    experts_classes.unregister("refuses_everything")


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown peer 'vlm'; known: vllm, vllm_deep_gemm, deep_gemm, torch"):
        peer("vlm")
    with pytest.raises(UnknownStrategyError):
        StrategyContender("local+trton")


@pytest.mark.skipif(probe_package("vllm").usable, reason="vllm is installed")
@pytest.mark.parametrize("name", ["vllm", "vllm_deep_gemm"])
def test_an_absent_peer_says_how_to_get_it(name: str) -> None:
    layer, _ = layer_and_inputs(BLOCK)
    with pytest.raises(NotInstalledError, match="pip install vllm"):
        peer(name).prepare(layer, 12)
    assert peer(name).version() == "not installed"


def test_what_peers_cannot_compute_is_said_before_they_are_imported() -> None:
    for config in (CONFIG, replace(BLOCK, intermediate_size=192), replace(BLOCK, has_bias=True)):
        with pytest.raises(UnsupportedError, match="128 x 128 blocks"):
            VllmDeepGemmExperts().prepare(layer_and_inputs(config)[0], 12)
    with pytest.raises(UnsupportedError, match="SM 90"):
        DeepGemmGroupedGemms().prepare(layer_and_inputs(CONFIG)[0], 12)
    with pytest.raises(UnsupportedError, match="bf16 and for fp8 in 128 x 128"):
        DeepGemmGroupedGemms().prepare(layer_and_inputs(replace(CONFIG, dtype=torch.float16))[0], 12)


def test_every_peer_has_its_name() -> None:
    assert {name: peer(name).name for name in PEERS} == {name: name for name in PEERS}


@pytest.mark.parametrize("config", [CONFIG, BLOCK], ids=["bf16", "fp8_block"])
@pytest.mark.parametrize("tokens", [1, 150, 300], ids=["masked", "masked_over_a_block", "contiguous"])
def test_grouped_gemms_have_the_rows_where_the_library_expects_them(config: MoEConfig, tokens: int) -> None:
    layer, inputs = layer_and_inputs(config, tokens)
    with double.installed():
        job = contenders._grouped_gemms(compat.library(), layer, inputs)
    first, second = job.run()
    assert job.check([first, second]).ok
    # Another expert's weights in one block do not pass.
    assert not job.check([first.roll(128, dims=-2 if tokens == 300 else 0), second]).ok
    assert not job.check([first, second * 1.1]).ok


@pytest.mark.parametrize("masked", [True, False])
def test_every_pair_has_one_row(masked: bool) -> None:
    inputs = Inputs.random(CONFIG, 200, "zipf", CPU, 3)
    token, rows, layout, expected = contenders._layout(inputs, 6, masked)
    counts = Counter(inputs.topk_ids.flatten().tolist())
    assert rows == len(token)
    if masked:
        assert layout.tolist() == [counts[e] for e in range(6)]
        assert rows % (6 * 128) == 0
        assert expected == round(400 / 6)
        blocks = [(e, token[e * rows // 6 :][: counts[e]].tolist()) for e in range(6)]
    else:
        assert [int((layout == e).sum()) for e in range(6)] == [-(-counts[e] // 128) * 128 for e in range(6)]
        blocks = [(e, token[layout == e][: counts[e]].tolist()) for e in range(6)]
    pairs = [(t, e) for e, tokens in blocks for t in tokens]
    expected_pairs = [(t, e) for t, row in enumerate(inputs.topk_ids.tolist()) for e in row]
    assert sorted(pairs) == sorted(expected_pairs)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What of a layer is looked at before the library is, on a device of SM 90."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return SimpleNamespace(config=CONFIG, w13=SimpleNamespace(device=torch.device("cuda")))


def test_an_absent_deep_gemm_says_how_to_get_it(hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    compat.forget()
    with pytest.raises(NotInstalledError, match=r"pip install 'moe-plugin\[deepgemm\]'"):
        DeepGemmGroupedGemms().prepare(hopper, 12)
    assert DeepGemmGroupedGemms().version() == "not installed"


def test_deep_gemm_without_calls_for_a_type(hopper: Any) -> None:
    with double.installed() as module:
        del module.m_grouped_bf16_gemm_nt_contiguous
        compat.forget()
        with pytest.raises(UnsupportedError, match="lacks grouped GEMMs for bf16"):
            DeepGemmGroupedGemms().prepare(hopper, 12)
        hopper.config = BLOCK
        DeepGemmGroupedGemms().prepare(hopper, 12)
        assert DeepGemmGroupedGemms().version() == double.__version__
