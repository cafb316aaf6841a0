"""Contenders compute the layer, or say why they do not; DeepGEMM's calls, with torch in the library's place."""

from __future__ import annotations

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
from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.environment import probe_package
from moe_plugin.errors import ConfigError, UnknownStrategyError
from moe_plugin.numerics import Tolerance

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


def _dequantized(operand: Any) -> torch.Tensor:
    """DeepGEMM's operands: a tensor, or (fp8, scales of 1 x 128 or 128 x 128)."""
    if isinstance(operand, torch.Tensor):
        return operand.float()
    values, scale = operand
    scale = scale.repeat_interleave(128, dim=-1)[..., : values.shape[-1]]
    if scale.shape[-2] != values.shape[-2]:
        scale = scale.repeat_interleave(128, dim=-2)[..., : values.shape[-2], :]
    return values.float() * scale


def _contiguous(a: Any, b: Any, out: torch.Tensor, layout: torch.Tensor) -> None:
    """Every block of 128 rows is computed with the expert of its first row."""
    a, b = _dequantized(a), _dequantized(b)
    assert len(a) == len(layout) == len(out)
    assert len(a) % 128 == 0
    for start in range(0, len(a), 128):
        out[start : start + 128] = (a[start : start + 128] @ b[layout[start]].T).to(out.dtype)


def _masked(a: Any, b: Any, out: torch.Tensor, counts: torch.Tensor, expected: int) -> None:
    """Whole blocks of 128 rows are stored as far as a group has rows."""
    a, b = _dequantized(a), _dequantized(b)
    assert a.shape[1] % 128 == 0
    assert expected >= 1
    for group, count in enumerate(counts.tolist()):
        rows = -(-count // 128) * 128
        out[group, :rows] = (a[group, :rows] @ b[group].T).to(out.dtype)


LIBRARY = SimpleNamespace(
    __name__="deep_gemm",
    m_grouped_bf16_gemm_nt_contiguous=_contiguous,
    m_grouped_fp8_gemm_nt_contiguous=_contiguous,
    bf16_m_grouped_gemm_nt_masked=_masked,
    utils=SimpleNamespace(m_grouped_fp8_gemm_nt_masked=_masked, get_mn_major_tma_aligned_tensor=lambda scale: scale),
)


@pytest.mark.parametrize("config", [CONFIG, BLOCK], ids=["bf16", "fp8_block"])
@pytest.mark.parametrize("tokens", [1, 150, 300], ids=["masked", "masked_over_a_block", "contiguous"])
def test_grouped_gemms_have_the_rows_where_the_library_expects_them(config: MoEConfig, tokens: int) -> None:
    layer, inputs = layer_and_inputs(config, tokens)
    job = contenders._grouped_gemms(LIBRARY, layer, inputs)
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


def test_a_symbol_that_moved_is_found_and_a_missing_one_named() -> None:
    assert contenders._symbol(LIBRARY, "absent", "bf16_m_grouped_gemm_nt_masked") is _masked
    assert contenders._symbol(LIBRARY, "m_grouped_fp8_gemm_nt_masked") is _masked
    with pytest.raises(UnsupportedError, match="deep_gemm has no absent or lost"):
        contenders._symbol(LIBRARY, "absent", "lost")
