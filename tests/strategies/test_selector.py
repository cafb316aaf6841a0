"""Selection on machines that are described, not present."""

from __future__ import annotations

import json

import pytest

import moe_plugin
from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.errors import NoStrategyError, StrategyUnsupportedError, UnknownStrategyError
from moe_plugin.strategies import selector
from moe_plugin.strategies.ranking import RANKING, UNRANKED, RankedStrategy
from moe_plugin.strategies.report import SelectionReport
from moe_plugin.strategies.selector import explain, select, strategy_names
from moe_plugin.verdict import Gate
from tests.matrix.third_party import BatchedLocal, LoopExperts, OracleMonolith, register
from tests.strategies.machines import (
    CPU,
    DEEP_EP_STRATEGIES,
    INTERPRETER,
    MEASURED,
    TRITON,
    WITH_DEEP_EP,
    gpu,
    layer_config,
)

BUILT_IN = [row.strategy for row in RANKING]
# What `auto` takes on one rank: DeepGEMM where a table says so, then Triton, then torch.
HYBRID, TRITON_PAIR, TORCH_PAIR = BUILT_IN[:3]


WITH_ALL = gpu(90, packages=WITH_DEEP_EP)


def layer_for(strategy: str) -> MoEConfig:
    """One that the strategy can run: over ranks and with a hidden size of DeepEP's, where that is what it wants."""
    if strategy in DEEP_EP_STRATEGIES:
        return layer_config(ep_size=8, hidden_size=2048, max_tokens_per_rank=256)
    return layer_config()


def ranking(*rows: RankedStrategy) -> tuple[RankedStrategy, ...]:
    """The ranking table with `rows` before the built-in ones."""
    return (*rows, *RANKING)


def test_the_ranking_table_holds_every_built_in_strategy_once_with_a_reason() -> None:
    assert strategy_names() == BUILT_IN
    assert len(set(BUILT_IN)) == len(BUILT_IN)
    assert all(row.reason for row in RANKING)


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_an_explicit_choice_is_taken(strategy: str) -> None:
    report = select(layer_for(strategy), strategy, WITH_ALL)
    assert dict(report.chosen) == {"decode": strategy, "prefill": strategy}
    assert not report.is_phased


@pytest.mark.parametrize(
    ("strategy", "environment", "layer", "words"),
    [
        ("local+torch_native", gpu(90), {"ep_size": 8}, ["ep_size", "saw 8", "needs 1"]),
        ("local+triton_fused_moe", gpu(75), {}, ["sm", "saw SM 75", "needs SM 80 or newer"]),
        ("local+triton_fused_moe", gpu(90, packages={}), {}, ["triton", "saw not installed", "pip install triton"]),
        (
            "local+triton_fused_moe",
            gpu(90, packages={"triton": Package("triton", "2.0", "too old")}),
            {},
            ["triton", "saw 2.0, unusable: too old", "needs an importable installation"],
        ),
        ("local+triton_fused_moe", CPU, {}, ["device", "saw CPU", "TRITON_INTERPRET=1"]),
        (
            "local+torch_native",
            gpu(80),
            {"cuda_graph": True},
            ["cuda_graph", "saw requested", "needs cuda_graph=False", "SM 9x and 10x, not 80"],
        ),
        (
            "nccl_all_to_all+torch_native",
            gpu(90, backends=("gloo",)),
            {"ep_size": 2},
            ["torch.distributed backend", "saw gloo", "needs nccl"],
        ),
        (
            "nccl_all_to_all+torch_native",
            CPU.pretend(backends=()),
            {"ep_size": 2},
            ["torch.distributed backend", "saw none", "needs gloo"],
        ),
        (
            "local+torch_native",
            gpu(90),
            {"quantization": Fp8Block(64, 64)},
            ["quantization", "saw fp8_block 64 x 64", "needs fp8_block in tiles of 128 x 128"],
        ),
        ("local+torch_native", gpu(90, torch_version="2.6.0"), {}, ["torch", "saw 2.6.0", "needs torch 2.8 or newer"]),
    ],
)
def test_an_explicit_choice_that_fails_names_gate_value_and_need(
    strategy: str, environment: Environment, layer: dict, words: list[str]
) -> None:
    with pytest.raises(StrategyUnsupportedError) as caught:
        select(layer_config(**layer), strategy, environment)
    message = str(caught.value)
    assert repr(strategy) in message
    assert [word for word in words if word not in message] == []
    # It does not fall back: the report still says what was asked for, and other strategies would have run.
    assert set(caught.value.report.chosen.values()) == {strategy}


def test_an_explicit_choice_does_not_fall_back_when_another_would_run() -> None:
    config, environment = layer_config(), CPU
    assert select(config, "auto", environment).chosen["decode"] == "local+torch_native"
    with pytest.raises(StrategyUnsupportedError):
        select(config, "local+triton_fused_moe", environment)


def test_explain_reports_what_select_refuses() -> None:
    report = explain(layer_config(ep_size=2), "local+torch_native", CPU)
    assert "refused: local.ep_size: needs 1" in report.line()
    entry = report.entry("decode")
    assert entry is not None
    assert entry.standing() == "refused"


def test_auto_takes_the_first_row_that_runs() -> None:
    config = layer_config()
    assert tuple(f"local+{experts}" for experts in ("deep_gemm_hybrid", "triton_fused_moe", "torch_native")) == (
        HYBRID,
        TRITON_PAIR,
        TORCH_PAIR,
    )
    machines = {
        HYBRID: gpu(90, device_name=MEASURED),
        TRITON_PAIR: gpu(90, device_name=MEASURED, packages=TRITON),
        TORCH_PAIR: gpu(90, device_name=MEASURED, packages={}),
    }
    assert {name: select(config, "auto", each).chosen["decode"] for name, each in machines.items()} == {
        name: name for name in machines
    }


def test_auto_takes_deep_gemm_only_where_it_was_measured_to_win() -> None:
    reports = (explain(layer_config(), "auto", gpu(90, device_name=name)) for name in (MEASURED, "NVIDIA H100"))
    measured, other = ({entry.strategy: entry for entry in report.entries["decode"]} for report in reports)
    for strategy in ("local+deep_gemm_hybrid", "nccl_all_to_all+deep_gemm_hybrid"):
        assert measured[strategy].standing() == "available"
        gate = measured[strategy].auto_gate
        assert gate is not None
        assert gate.name == "measured (auto only)"
        assert gate.seen.endswith("contiguous above; measured at 2 numbers of rows")
        assert other[strategy].standing() == "explicit only"
        assert "not measured on NVIDIA H100" in other[strategy].why()
        assert "needs a layout table of this device and layer" in other[strategy].why()
    report = select(layer_config(), "auto", gpu(90, device_name="NVIDIA H100"))
    assert report.chosen["decode"] == TRITON_PAIR
    assert "not measured on NVIDIA H100" in report.text(width=400)


def test_auto_follows_the_order_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for first in BUILT_IN:
        monkeypatch.setattr(
            selector, "RANKING", (RankedStrategy(first, "moved up"), *(r for r in RANKING if r.strategy != first))
        )
        report = select(layer_for(first), "auto", WITH_ALL)
        assert report.chosen["decode"] == first
        assert "moved up" in report.line()


def test_auto_never_takes_an_opt_in_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        selector, "RANKING", ranking(RankedStrategy("local+loop", "fastest of all", opt_in="changes numerics"))
    )
    moe_plugin.register_experts(LoopExperts)
    report = select(layer_config(), "auto", gpu(90))
    assert report.chosen["decode"] == TRITON_PAIR
    entry = report.entries["decode"][0]
    assert (entry.strategy, entry.rank) == ("local+loop", 1)
    assert (entry.standing(), entry.why()) == ("explicit only", "changes numerics")
    assert select(layer_config(), "local+loop", gpu(90)).chosen["decode"] == "local+loop"


def test_auto_never_takes_an_unranked_strategy() -> None:
    register()
    only_third_party = gpu(90, torch_version="2.0.0", packages={})
    with pytest.raises(NoStrategyError):
        select(layer_config(), "auto", only_third_party)
    entries = {entry.strategy: entry for entry in explain(layer_config(), "auto", only_third_party).entries["decode"]}
    for name in ("local+loop", "oracle"):
        assert entries[name].rank is None
        assert (entries[name].standing(), entries[name].why()) == ("explicit only", UNRANKED)
        assert select(layer_config(), name, only_third_party).chosen["decode"] == name


def test_auto_never_takes_interpreted_triton_but_a_request_may() -> None:
    without_torch = INTERPRETER.pretend(torch_version="2.0.0")
    with pytest.raises(NoStrategyError, match="interpreter is for tests"):
        select(layer_config(), "auto", without_torch)
    assert select(layer_config(), "local+triton_fused_moe", without_torch).chosen["decode"] == "local+triton_fused_moe"


def test_no_strategy_carries_the_report_and_every_reason() -> None:
    with pytest.raises(NoStrategyError) as caught:
        select(layer_config(ep_size=2), "auto", CPU.pretend(backends=()))
    report = caught.value.report
    assert isinstance(report, SelectionReport)
    assert set(report.chosen.values()) == {None}
    for entry in report.entries["decode"]:
        assert f"{entry.strategy}: {entry.why()}" in str(caught.value)
    assert "none: no strategy that may be chosen passes its gates" in report.line()


def test_unknown_name() -> None:
    with pytest.raises(UnknownStrategyError, match=r"Did you mean 'local\+torch_native'") as caught:
        explain(layer_config(), "local+torch_nativ", CPU)
    assert (caught.value.name, caught.value.nearest) == ("local+torch_nativ", "local+torch_native")


def test_third_party_classes_stand_in_the_table() -> None:
    register()
    assert strategy_names()[: len(BUILT_IN)] == BUILT_IN
    assert set(strategy_names()[len(BUILT_IN) :]) == {
        "deepep_high_throughput+loop",
        "deepep_low_latency+loop",
        "local+loop",
        "hybrid_dense_routing+loop",
        "nccl_all_to_all+loop",
        "batched_local+loop",
        "batched_local+deep_gemm_hybrid",
        "batched_local+triton_fused_moe",
        "batched_local+torch_native",
        "oracle",
    }
    entries = {entry.strategy: entry for entry in explain(layer_config(), environment=gpu(90)).entries["decode"]}
    assert list(entries) == strategy_names()
    assert entries["oracle"].standing() == "explicit only"
    assert entries["batched_local+torch_native"].standing() == "explicit only"
    # LoopExperts takes the Standard format alone.
    assert "BatchedExperts" in entries["batched_local+loop"].why()
    assert [gate.name for gate in entries["batched_local+loop"].verdict.failed] == ["activation_format"]


def test_a_ranked_monolithic_strategy_is_chosen_like_any_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    moe_plugin.register_monolithic(OracleMonolith)
    monkeypatch.setattr(selector, "RANKING", ranking(RankedStrategy("oracle", "one kernel")))
    assert strategy_names()[0] == "oracle"
    assert select(layer_config(), "auto", gpu(90)).chosen["decode"] == "oracle"
    assert select(layer_config(ep_size=2), "auto", gpu(90)).chosen["decode"] == "hybrid_dense_routing+triton_fused_moe"


def test_router_weights_must_be_applied_where_the_format_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    moe_plugin.register_prepare_finalize(BatchedLocal)
    monkeypatch.setattr(BatchedLocal, "router_weight_stage", moe_plugin.modular_kernel.RouterWeightStage.EXPERTS_GATHER)
    with pytest.raises(StrategyUnsupportedError, match="router_weight_stage: needs combine"):
        select(layer_config(), "batched_local+torch_native", CPU)
    on_input = layer_config(top_k=1, apply_router_weight_on_input=True)
    assert select(on_input, "batched_local+torch_native", CPU).chosen["decode"] == "batched_local+torch_native"


def test_a_gate_of_auto_alone_shows_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate("moon (auto only)", False, "waning", "a full moon")
    rows = (RankedStrategy(TORCH_PAIR, "calm", auto_gate=lambda *_: gate), *RANKING[3:])
    monkeypatch.setattr(selector, "RANKING", rows)
    report = explain(layer_config(), "auto", CPU)
    assert report.chosen["decode"] == "nccl_all_to_all+torch_native"
    entry = report.entries["decode"][0]
    assert entry.why() == "moon (auto only): needs a full moon, saw waning"
    assert entry.to_dict()["gates"][-1]["auto_only"]
    assert "a full moon" in report.text(width=300)
    json.loads(report.json())


class TalkativeMonolith(OracleMonolith):
    name = "talkative"

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> dict[str, str]:
        return {"order": f"{config.num_experts} experts on SM {environment.sm}"}


class MumblingExperts(LoopExperts):
    name = "mumbling"

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> dict[str, str]:
        raise RuntimeError("lost for words")


def test_classes_say_what_they_do_inside() -> None:
    moe_plugin.register_monolithic(TalkativeMonolith)
    moe_plugin.register_experts(MumblingExperts)
    environment = gpu(90)
    entries = {entry.strategy: entry for entry in explain(layer_config(), "auto", environment).entries["decode"]}
    assert entries["talkative"].details == {"talkative.order": "16 experts on SM 90"}
    assert "order 16 experts on SM 90" in select(layer_config(), "talkative", environment).line()
    # A class that cannot say it is not kept from running.
    assert entries["local+mumbling"].runs
    assert entries["local+mumbling"].details == {"mumbling.details": "RuntimeError('lost for words')"}


def test_a_refused_strategy_has_no_details() -> None:
    entries = {entry.strategy: entry for entry in explain(layer_config(), "auto", gpu(75)).entries["decode"]}
    assert not entries["local+triton_fused_moe"].runs
    assert entries["local+triton_fused_moe"].details == {}


def test_explain_probes_this_machine_when_not_told_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "probe", classmethod(lambda cls: gpu(100)))
    assert "SM 100" in explain(layer_config()).environment


def test_explain_does_not_touch_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("explain started CUDA")

    monkeypatch.setattr("torch.cuda._lazy_init", refuse)
    for sm in (80, 90, 100):
        explain(layer_config(ep_size=4, cuda_graph=True), "auto", gpu(sm))
