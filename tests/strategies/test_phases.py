"""One layer, two phases: which is taken when, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moe_plugin
from moe_plugin.config import MoEConfig
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import ExpertWeights, ModularKernel, MoELayer
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.strategies import selector
from moe_plugin.strategies.phases import PhasedLayer
from moe_plugin.strategies.ranking import RankedStrategy
from moe_plugin.strategies.selector import phase_config, select
from moe_plugin.testing.cases import Inputs, Weights
from tests.matrix.third_party import register
from tests.strategies.machines import gpu, layer_config

CPU_DEVICE = torch.device("cpu")
PHASED = "decode=local+loop,prefill=local+torch_native"


class Recorder(MoELayer):
    """Notes what it is called with."""

    def __init__(self, name: str, config: MoEConfig) -> None:
        self.strategy, self.config = name, config
        self.calls: list[tuple[Any, ...]] = []
        self.checks = 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
        shared_experts: Callable[[torch.Tensor], torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.calls.append((hidden_states, topk_ids, topk_weights, max_num_tokens, shared_experts, out))
        return hidden_states

    def check_errors(self) -> None:
        self.checks += 1


@pytest.fixture
def layer() -> PhasedLayer:
    config = layer_config(decode_max_tokens=32, max_tokens_per_rank=512)
    return PhasedLayer(Recorder("small", config), Recorder("large", config))


@pytest.mark.parametrize(
    ("max_num_tokens", "phase"), [(None, "large"), (1, "small"), (32, "small"), (33, "large"), (512, "large")]
)
def test_the_announced_size_decides(layer: PhasedLayer, max_num_tokens: int | None, phase: str) -> None:
    assert layer.layer_of(max_num_tokens).strategy == phase


@pytest.mark.parametrize("max_num_tokens", [None, 33, 512])
def test_a_captured_call_is_decode(
    layer: PhasedLayer, max_num_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert layer.layer_of(max_num_tokens) is layer.decode


def test_the_number_of_local_tokens_does_not_decide(layer: PhasedLayer) -> None:
    for num_tokens in (1, 400):
        layer(torch.zeros(num_tokens, 64), torch.zeros(num_tokens, 4), torch.zeros(num_tokens, 4))
    assert len(layer.prefill.calls) == 2
    assert layer.decode.calls == []


def test_a_call_passes_everything_on(layer: PhasedLayer) -> None:
    arguments = torch.zeros(3, 64), torch.zeros(3, 4), torch.zeros(3, 4)
    out, shared = torch.zeros(3, 64), torch.square
    layer(*arguments, max_num_tokens=8, shared_experts=shared, out=out)
    (call,) = layer.decode.calls
    assert all(seen is given for seen, given in zip(call, (*arguments, 8, shared, out), strict=True))


def test_errors_of_both_phases_are_checked(layer: PhasedLayer) -> None:
    layer.check_errors()
    assert (layer.decode.checks, layer.prefill.checks) == (1, 1)


def test_the_configuration_of_each_phase() -> None:
    config = layer_config(cuda_graph=True, decode_max_tokens=32, max_tokens_per_rank=512)
    decode, prefill = phase_config(config, "decode"), phase_config(config, "prefill")
    assert (decode.cuda_graph, decode.max_tokens_per_rank) == (True, 32)
    assert (prefill.cuda_graph, prefill.max_tokens_per_rank) == (False, 512)
    assert phase_config(layer_config(max_tokens_per_rank=8), "decode").max_tokens_per_rank == 8


def build(strategy: str, **changes: Any) -> tuple[MoEConfig, Weights, MoELayer]:
    config = layer_config(dtype=torch.float32, **changes)
    weights = Weights.random(config, CPU_DEVICE)
    return config, weights, moe_plugin.build(config, **weights.of_rank(config), strategy=strategy)


def test_a_phased_layer_computes_in_both_phases() -> None:
    register()
    config, weights, layer = build(PHASED)
    assert isinstance(layer, PhasedLayer)
    assert layer.strategy == PHASED
    assert (layer.decode.strategy, layer.prefill.strategy) == ("local+loop", "local+torch_native")
    assert layer.report.is_phased
    inputs = Inputs.random(config, 5, CPU_DEVICE, seed=0)
    expected = moe_plugin.reference_moe(*inputs.as_tuple(), weights.w13, weights.w2)
    for max_num_tokens in (5, 4096, None):
        assert_close_to_oracle(layer(*inputs.as_tuple(), max_num_tokens=max_num_tokens), expected, torch.float32)


def test_phases_with_one_experts_class_share_its_prepared_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[ExpertWeights] = []

    def prepare_weights(cls: type, config: MoEConfig, weights: ExpertWeights) -> ExpertWeights:
        prepared.append(weights)
        return weights

    monkeypatch.setattr(TorchNative, "prepare_weights", classmethod(prepare_weights))
    _, _, layer = build("decode=local+torch_native,prefill=nccl_all_to_all+torch_native")
    assert isinstance(layer, PhasedLayer)
    assert isinstance(layer.decode, ModularKernel)
    assert isinstance(layer.prefill, ModularKernel)
    assert len(prepared) == 1
    assert layer.decode.experts.weights is layer.prefill.experts.weights


def test_the_same_strategy_for_both_phases_has_a_configuration_for_each() -> None:
    _, _, layer = build("decode=local+torch_native,prefill=auto")
    assert isinstance(layer, PhasedLayer)
    assert layer.decode.config.max_tokens_per_rank <= layer.decode.config.decode_max_tokens
    assert layer.prefill.config.max_tokens_per_rank == layer.config.max_tokens_per_rank


@pytest.mark.parametrize(
    ("peer_access", "dispatcher", "host_syncs"), [(True, "hybrid_dense_routing", 0), (False, "nccl_all_to_all", 1)]
)
def test_auto_gives_the_same_classes_two_modes_where_a_captured_exchange_has_a_fixed_capacity(
    peer_access: bool, dispatcher: str, host_syncs: int
) -> None:
    config = layer_config(ep_size=8, cuda_graph=True, max_tokens_per_rank=4096)
    machine = gpu(90, peer_access=peer_access)
    report = select(config, "auto", machine)
    assert set(report.chosen.values()) == {f"{dispatcher}+triton_fused_moe"}
    assert report.is_phased
    decode, prefill = report.entry("decode"), report.entry("prefill")
    assert decode is not None
    assert prefill is not None
    assert (decode.host_syncs, prefill.host_syncs) == (0, host_syncs)
    assert decode.workspace_bytes < prefill.workspace_bytes
    assert not select(layer_config(ep_size=8), "auto", machine).is_phased


def test_one_mode_is_enough_where_every_call_is_small_or_nothing_is_exchanged() -> None:
    small = {"cuda_graph": True, "max_tokens_per_rank": 128}
    assert not select(layer_config(ep_size=8, **small), "auto", gpu(90)).is_phased
    assert select(layer_config(ep_size=8, dispatch_capacity=64, **small), "auto", gpu(90)).is_phased
    assert not select(layer_config(cuda_graph=True), "auto", gpu(90)).is_phased


def test_auto_chooses_two_when_a_captured_decode_needs_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # On SM 80 torch_native cannot be captured.
    rows = (
        RankedStrategy("local+torch_native", "best when eager"),
        RankedStrategy("local+triton_fused_moe", "best when captured"),
    )
    monkeypatch.setattr(selector, "RANKING", rows)
    report = select(layer_config(cuda_graph=True), "auto", gpu(80))
    assert dict(report.chosen) == {"decode": "local+triton_fused_moe", "prefill": "local+torch_native"}
    assert not select(layer_config(cuda_graph=False), "auto", gpu(80)).is_phased
    assert not select(layer_config(cuda_graph=True), "auto", gpu(90)).is_phased
