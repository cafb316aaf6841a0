"""The conformance kit's own parts: which cases run, with which sizes, and what refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import StrategyUnsupportedError
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import Dispatched
from moe_plugin.quantization import QuantConfig, has_static_activations
from moe_plugin.strategies.registry import experts_classes, register_experts
from moe_plugin.testing import CHECKS, shared_pool
from moe_plugin.testing.cases import Case
from moe_plugin.testing.checks import FP8_SCHEMES, Refused, cases_that_run, check_call, fp8_case, fp8_cases
from moe_plugin.testing.pytest_tests import MAX_RANKS
from moe_plugin.testing.rank_pool import RankContext
from moe_plugin.verdict import Gate, Verdict, gate_quantization

BF16 = torch.bfloat16


class BlocksOf128(TorchNative):
    """Takes sizes that are multiples of 128, no biases, and of fp8 the blocks alone."""

    name = "blocks_of_128"
    description = "refuses much"
    size_multiple = 128

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        sizes = (config.hidden_size, config.local_intermediate_size)
        return Verdict.of(
            gate_quantization(config, ("none", "fp8_block")),
            Gate("sizes", all(size % 128 == 0 for size in sizes), f"H {sizes[0]}, I {sizes[1]}", "multiples of 128"),
            Gate("has_bias", not config.has_bias, str(config.has_bias), "has_bias=False"),
        )


class Unquantized(TorchNative):
    """Computes nothing in fp8."""

    name = "unquantized"
    description = "no fp8"

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        return Verdict.of(gate_quantization(config, ("none",)))


class WrongWithoutBias(BlocksOf128):
    """Wrong where its gates let a layer pass."""

    name = "wrong_without_bias"

    def apply(self, dispatched: Dispatched, *arguments: Any, **options: Any) -> torch.Tensor:
        return super().apply(dispatched, *arguments, **options).mul_(1.1)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    classes = (BlocksOf128, Unquantized, WrongWithoutBias)
    for cls in classes:
        register_experts(cls)
    yield
    for cls in classes:
        experts_classes.unregister(cls.name)


@pytest.fixture(scope="module")
def alone() -> RankContext:
    """One rank, in this process."""
    return RankContext(0, torch.device("cpu"), 1)


def sizes(case: Case) -> tuple[int, int]:
    return case.config.hidden_size, case.config.intermediate_size


def refuse(reason: str) -> Any:
    def make() -> Case:
        raise StrategyUnsupportedError(reason, None)  # type: ignore[arg-type]

    return make


def test_cases_that_gates_refuse_are_passed_over() -> None:
    cases = [object(), object()]
    made = [refuse("a"), lambda: cases[0], refuse("b"), lambda: cases[1], refuse("c")]
    assert list(cases_that_run(made)) == cases  # type: ignore[arg-type]


def test_cases_are_made_one_after_another() -> None:
    made: list[str] = []
    cases = cases_that_run([lambda: made.append("first"), lambda: made.append("second")])  # type: ignore[func-returns-value, list-item]
    next(cases)
    assert made == ["first"]


def test_where_no_case_runs_the_last_refusal_is_raised() -> None:
    with pytest.raises(StrategyUnsupportedError, match=r"^b$"):
        list(cases_that_run([refuse("a"), refuse("b")]))


def test_other_errors_are_no_refusals() -> None:
    def broken() -> Case:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(cases_that_run([broken, refuse("a")]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (128, 128)),  # the defaults are 64 and 48
        ({"hidden_size": 192, "intermediate_size": 160}, (256, 256)),
        ({"hidden_size": 256, "intermediate_size": 128}, (256, 128)),
    ],
)
def test_sizes_are_rounded_up_to_what_the_experts_take(
    alone: RankContext, given: dict[str, Any], expected: tuple[int, int]
) -> None:
    case = Case(alone, "local+blocks_of_128", BF16, given)
    assert sizes(case) == expected
    check_call(case, case.inputs(3))


def sizes_over_two_ranks(context: RankContext) -> tuple[int, int, int]:
    register_experts(BlocksOf128)
    try:
        case = Case(context, "local+blocks_of_128", BF16, {"intermediate_size": 272}, tp_size=2)
        check_call(case, case.inputs(3))
    finally:
        experts_classes.unregister(BlocksOf128.name)
    return *sizes(case), case.config.local_intermediate_size


@pytest.mark.slow
def test_each_tensor_parallel_rank_has_a_size_that_the_experts_take() -> None:
    assert shared_pool("cpu", MAX_RANKS).run(sizes_over_two_ranks, ranks=2) == [(128, 512, 256)] * 2


def test_sizes_are_as_given_where_experts_take_any(alone: RankContext) -> None:
    assert sizes(Case(alone, "local+torch_native", BF16)) == (64, 48)
    assert sizes(Case(alone, "auto", BF16, {"hidden_size": 80})) == (80, 48)


@pytest.mark.parametrize("odd", [{"hidden_size": 72}, {"intermediate_size": 24}])
def test_odd_sizes_stay_and_are_refused(alone: RankContext, odd: dict[str, int]) -> None:
    ((_, size),) = odd.items()
    with pytest.raises(StrategyUnsupportedError, match=str(size)):
        Case(alone, "local+blocks_of_128", BF16, odd)


def test_fp8_cases_are_those_of_the_schemes_that_run(alone: RankContext) -> None:
    def schemes(experts: str) -> list[QuantConfig | None]:
        return [case.config.quantization for case in fp8_cases(alone, f"local+{experts}", BF16)]

    assert schemes("torch_native") == list(FP8_SCHEMES.values())
    assert [has_static_activations(scheme) for scheme in FP8_SCHEMES.values()] == [False, False, False, True]
    assert schemes("blocks_of_128") == [Fp8Block()]
    with pytest.raises(StrategyUnsupportedError, match="quantization"):
        schemes("unquantized")


def test_fp8_biases_are_left_out_where_they_alone_are_refused(alone: RankContext) -> None:
    def case(experts: str, **overrides: Any) -> Case:
        return fp8_case(alone, f"local+{experts}", BF16, Fp8Block(), **overrides)

    assert case("torch_native", has_bias=True).config.has_bias
    assert not case("blocks_of_128", has_bias=True).config.has_bias
    with pytest.raises(StrategyUnsupportedError, match="sizes"):
        case("blocks_of_128", has_bias=True, hidden_size=72)
    with pytest.raises(StrategyUnsupportedError, match="quantization"):
        fp8_case(alone, "local+blocks_of_128", BF16, FP8_SCHEMES["fp8_per_token"], has_bias=True)


def test_fp8_runs_in_one_dtype(alone: RankContext) -> None:
    with pytest.raises(Refused, match="once, in bfloat16"):
        next(fp8_cases(alone, "local+torch_native", torch.float16))


@pytest.mark.parametrize("name", ["activations_and_biases", "fp8_block", "fp8_nan_and_inf_stay_in_their_token"])
def test_rows_run_on_what_is_left(alone: RankContext, name: str) -> None:
    CHECKS[name](alone, "local+blocks_of_128", BF16)


@pytest.mark.parametrize("name", ["activations_and_biases", "fp8_block"])
def test_rows_fail_where_what_is_left_is_wrong(alone: RankContext, name: str) -> None:
    with pytest.raises(AssertionError, match="relative"):
        CHECKS[name](alone, "local+wrong_without_bias", BF16)


@pytest.mark.parametrize("name", ["fp8_extreme_values", "fp8_odd_sizes", "fp8_router_weight_on_input", "fp8_block"])
def test_rows_of_which_nothing_runs_refuse(alone: RankContext, name: str) -> None:
    with pytest.raises(Refused, match=r"unquantized\.quantization: needs"):
        CHECKS[name](alone, "local+unquantized", BF16)


@pytest.mark.parametrize("name", ["odd_sizes", "fp8_odd_sizes"])
def test_odd_sizes_may_be_refused_by_their_number(alone: RankContext, name: str) -> None:
    CHECKS[name](alone, "local+blocks_of_128", BF16)
