"""Ranks that differ find out while building, all of them, and can build again afterwards."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

import moe_plugin
import moe_plugin.errors
from moe_plugin.config import ExpertPlacement, MoEConfig, ParallelConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import MoEPluginError, PeerLostError, StrategyMismatchError, UnknownStrategyError, rebuild
from moe_plugin.strategies.agreement import agree
from moe_plugin.testing import shared_pool
from moe_plugin.testing.cases import Inputs, Weights
from moe_plugin.testing.rank_pool import RankContext

LAYER = {"num_experts": 8, "top_k": 2, "hidden_size": 32, "intermediate_size": 16, "dtype": torch.float32}
ERRORS = [cls for _, cls in inspect.getmembers(moe_plugin.errors, inspect.isclass) if issubclass(cls, MoEPluginError)]

Answer = tuple[str, str, Any]


def build_on_rank(context: RankContext, of_rank: list[dict[str, Any]], tp_size: int = 1) -> Answer:
    """Build with this rank's options: class, message and fields of the error. Then build a layer that must work."""
    options = dict(of_rank[context.rank])
    strategy = options.pop("strategy", "nccl_all_to_all+torch_native")
    environment = Environment.probe("cpu").pretend(**options.pop("environment", {}))
    wrong_weight = options.pop("wrong_weight", False)
    good = MoEConfig(**LAYER, parallel=context.parallel(tp_size))
    config = replace(good, **options)
    weights = Weights.random(config, context.device).of_rank(config)
    if wrong_weight:
        weights["w2"] = weights["w2"][:, :-1]
    try:
        moe_plugin.build(config, **weights, strategy=strategy, environment=environment)
        answer = ("", "", None)
    except MoEPluginError as problem:
        answer = (type(problem).__name__, str(problem), getattr(problem, "fields", None))
    layer = moe_plugin.build(good, **Weights.random(good, context.device).of_rank(good))
    inputs = Inputs.random(good, 3, context.device, seed=0)
    assert layer(*inputs.as_tuple()).isfinite().all()
    return answer


def build_on_ranks(*of_rank: dict[str, Any], tp_size: int = 1) -> list[Answer]:
    return shared_pool("cpu", 4).run(build_on_rank, list(of_rank), tp_size, ranks=len(of_rank))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "options", "values"),
    [
        ("max_tokens_per_rank", {"max_tokens_per_rank": 32}, ["4096", "32"]),
        ("top_k", {"top_k": 3}, ["2", "3"]),
        ("decode_max_tokens", {"decode_max_tokens": 16}, ["256", "16"]),
        ("dispatch_capacity", {"dispatch_capacity": 7}, ["None", "7"]),
        ("swiglu_limit", {"swiglu_limit": 6.0}, ["7.0", "6.0"]),
    ],
)
def test_a_differing_field_is_shown_on_every_rank(field: str, options: dict[str, Any], values: list[str]) -> None:
    answers = build_on_ranks({}, options)
    assert [kind for kind, *_ in answers] == ["StrategyMismatchError"] * 2
    for _, message, fields in answers:
        assert fields[field] == dict(enumerate(values))
        assert f"{field}: {values[0]} on rank 0, {values[1]} on rank 1" in message


@pytest.mark.slow
def test_placements_that_differ() -> None:
    answers = build_on_ranks({}, {"placement": ExpertPlacement.round_robin(8, 2)})
    assert [kind for kind, *_ in answers] == ["StrategyMismatchError"] * 2
    assert all(list(fields) == ["placement"] for *_, fields in answers)


@pytest.mark.slow
def test_choices_that_differ() -> None:
    both_phases = "decode=nccl_all_to_all+torch_native,prefill=nccl_all_to_all+torch_native"
    assert [kind for kind, *_ in build_on_ranks({"strategy": both_phases}, {"strategy": both_phases})] == ["", ""]
    assert [kind for kind, *_ in build_on_ranks({}, {"strategy": both_phases})] == ["StrategyMismatchError"] * 2
    answers = build_on_ranks({}, {"strategy": "nccl", "environment": {"triton_interpret": True}})
    assert [kind for kind, *_ in answers] == ["StrategyMismatchError"] * 2
    for _, message, fields in answers:
        assert list(fields) == ["strategy"]
        assert "nccl_all_to_all+triton_fused_moe" in message


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"strategy": "nccl+torch"}, "UnknownStrategyError", "unknown moe_strategy 'nccl+torch'"),
        ({"wrong_weight": True}, "ShapeError", "w2 must be [4, 32, 16] on this rank, got [4, 31, 16]"),
        (
            {"environment": {"backends": ()}},
            "StrategyUnsupportedError",
            "torch.distributed backend: needs gloo, saw none",
        ),
        ({"strategy": "auto", "environment": {"backends": ()}}, "NoStrategyError", "no strategy can run this layer"),
        ({"environment": {"memory_bytes": 1}}, "MemoryLimitError", "not even one token fits"),
    ],
)
def test_the_problem_of_one_rank_is_raised_on_all(guilty: int, options: dict[str, Any], kind: str, words: str) -> None:
    of_rank: list[dict[str, Any]] = [{}, {}]
    of_rank[guilty] = options
    answers = build_on_ranks(*of_rank)
    assert [seen for seen, *_ in answers] == [kind] * 2
    for _, message, _ in answers:
        assert message.startswith(f"rank {guilty}: ")
        assert words in message


@pytest.mark.slow
def test_of_two_problems_the_first_rank_s_is_raised_on_all() -> None:
    answers = build_on_ranks({"wrong_weight": True}, {"strategy": "nonsense"})
    assert [kind for kind, *_ in answers] == ["ShapeError"] * 2


@pytest.mark.slow
def test_tensor_parallel_ranks_agree_too() -> None:
    answers = build_on_ranks({}, {}, {}, {"max_tokens_per_rank": 32}, tp_size=2)
    assert [kind for kind, *_ in answers] == ["StrategyMismatchError"] * 4
    for _, message, fields in answers:
        assert fields["max_tokens_per_rank"] == {0: "4096", 1: "4096", 2: "4096", 3: "32"}
        assert "4096 on rank 0/1/2, 32 on rank 3" in message


def test_one_rank_raises_its_own_problem() -> None:
    problem = UnknownStrategyError("x", "y", ["z"])
    with pytest.raises(UnknownStrategyError) as caught:
        agree(ParallelConfig(), {}, problem)
    assert caught.value is problem
    agree(ParallelConfig(), {"top_k": "2"}, None)


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_rebuilt_on_another_rank_has_what_its_class_promises(cls: type[MoEPluginError]) -> None:
    copy = rebuild(cls.__name__, "rank 1: it broke")
    assert type(copy) is cls
    assert str(copy) == "rank 1: it broke"
    promised = {
        "UnknownStrategyError": ["name", "nearest"],
        "StrategyUnsupportedError": ["report"],
        "NoStrategyError": ["report"],
        "StrategyMismatchError": ["fields"],
        "MemoryLimitError": ["largest_fit"],
        "MissingPackageError": ["package", "extra"],
        "PeerLostError": ["phase", "ranks"],
    }
    assert [name for name in promised.get(cls.__name__, []) if not hasattr(copy, name)] == []


@pytest.mark.parametrize(
    "problem",
    [
        UnknownStrategyError("x", "y", ["z"]),
        PeerLostError("dispatch", [3], 30.0, "closed"),
        moe_plugin.errors.MissingPackageError("vllm", "vllm", "serving"),
        moe_plugin.errors.MemoryLimitError("too large", 12),
        StrategyMismatchError("differ", {"top_k": {0: "1", 1: "2"}}),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_errors_travel_between_processes(problem: MoEPluginError) -> None:
    copy = pickle.loads(pickle.dumps(problem))
    assert type(copy) is type(problem)
    assert str(copy) == str(problem)
    assert vars(copy) == vars(problem)
