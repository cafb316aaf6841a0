"""Routing against the routers of transformers' models, and properties that hold for any logits."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_plugin import routing
from moe_plugin.errors import ConfigError, DtypeError, ShapeError
from moe_plugin.routing import sigmoid_grouped_topk, softmax_grouped_topk, softmax_topk

TOKENS, HIDDEN, EXPERTS = 64, 32, 32
DTYPES = (torch.float32, torch.bfloat16)


def spread_logits(num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Logits [T, E] that are distinct within a row, also in bf16: multiples of 1/16 in random order."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=-1)
    return ((ranks - num_experts // 2) / 16).to(dtype)


def route_with_transformers(router: torch.nn.Module, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_ids, topk_weights) of a transformers router, given the logits it shall see: its weight becomes I."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(logits.shape[1]))
        _, weights, ids = router.to(logits.dtype)(logits)
    return ids, weights


def assert_same_routing(
    ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor], tolerance: float = 1e-6
) -> None:
    """Same experts with the same weights, whatever the order within a token."""
    (ids, weights), (their_ids, their_weights) = ours, theirs
    order, their_order = ids.argsort(dim=-1), their_ids.argsort(dim=-1)
    assert torch.equal(ids.gather(-1, order), their_ids.gather(-1, their_order))
    torch.testing.assert_close(
        weights.gather(-1, order), their_weights.gather(-1, their_order).float(), rtol=tolerance, atol=1e-7
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 4, EXPERTS])
@pytest.mark.parametrize(
    ("config_class", "router_class"), [(Qwen2MoeConfig, Qwen2MoeTopKRouter), (Qwen3MoeConfig, Qwen3MoeTopKRouter)]
)
def test_softmax_topk_is_qwens(config_class, router_class, top_k, renormalize, dtype):
    router = router_class(
        config_class(num_experts=EXPERTS, num_experts_per_tok=top_k, hidden_size=EXPERTS, norm_topk_prob=renormalize)
    )
    logits = spread_logits(TOKENS, EXPERTS, dtype)
    # These routers round their weights to the dtype of the logits.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    ours = softmax_topk(logits, top_k, renormalize=renormalize)
    assert_same_routing(ours, route_with_transformers(router, logits), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_renormalized_softmax_topk_is_mixtrals(top_k, dtype):
    router = MixtralTopKRouter(MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=top_k, hidden_size=EXPERTS))
    logits = spread_logits(TOKENS, EXPERTS, dtype)
    assert_same_routing(softmax_topk(logits, top_k, renormalize=True), route_with_transformers(router, logits))


@pytest.mark.parametrize("top_k", [1, 4, EXPERTS])
def test_renormalized_softmax_topk_is_the_softmax_over_the_chosen_of_gpt_oss(top_k):
    router = GptOssTopKRouter(GptOssConfig(num_local_experts=EXPERTS, num_experts_per_tok=top_k, hidden_size=EXPERTS))
    logits = spread_logits(TOKENS, EXPERTS)
    assert_same_routing(softmax_topk(logits, top_k, renormalize=True), route_with_transformers(router, logits))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_groups", "topk_groups", "top_k"), [(8, 4, 8), (8, 3, 6), (4, 1, 8), (1, 1, 8), (4, 4, 5)]
)
def test_sigmoid_grouped_topk_is_deepseek_v3s(num_groups, topk_groups, top_k, renormalize):
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            n_routed_experts=EXPERTS,
            num_experts_per_tok=top_k,
            hidden_size=EXPERTS,
            n_group=num_groups,
            topk_group=topk_groups,
            norm_topk_prob=renormalize,
            routed_scaling_factor=2.5,
        )
    )
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1))
    router.e_score_correction_bias.copy_(bias)
    logits = spread_logits(TOKENS, EXPERTS)
    ours = sigmoid_grouped_topk(logits, bias, top_k, num_groups, topk_groups, renormalize, scaling_factor=2.5)
    assert_same_routing(ours, route_with_transformers(router, logits))


@pytest.mark.parametrize(("num_groups", "topk_groups", "top_k"), [(8, 3, 6), (4, 1, 8), (1, 1, 6), (4, 4, 5)])
def test_softmax_grouped_topk_is_deepseek_v2s(num_groups, topk_groups, top_k):
    router = DeepseekV2TopkRouter(
        DeepseekV2Config(
            n_routed_experts=EXPERTS,
            num_experts_per_tok=top_k,
            hidden_size=EXPERTS,
            topk_method="group_limited_greedy",
            n_group=num_groups,
            topk_group=topk_groups,
            routed_scaling_factor=16.0,
        )
    )
    logits = spread_logits(TOKENS, EXPERTS)
    ours = softmax_grouped_topk(logits, top_k, num_groups, topk_groups, scaling_factor=16.0)
    assert_same_routing(ours, route_with_transformers(router, logits))


def route_all(logits: torch.Tensor, top_k: int, num_groups: int, topk_groups: int, renormalize: bool):
    """Every function on the same arguments, by name."""
    bias = torch.linspace(-1, 1, logits.shape[1])
    return {
        "softmax_topk": softmax_topk(logits, top_k, renormalize),
        "softmax_grouped_topk": softmax_grouped_topk(logits, top_k, num_groups, topk_groups, renormalize),
        "sigmoid_grouped_topk": sigmoid_grouped_topk(logits, bias, top_k, num_groups, topk_groups, renormalize),
    }


@st.composite
def problems(draw):
    num_groups, group_size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    topk_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, topk_groups * group_size))
    num_tokens, scale = draw(st.integers(0, 5)), draw(st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = (torch.randn(num_tokens, num_groups * group_size, generator=generator) * scale).to(dtype)
    return logits, top_k, num_groups, topk_groups


@settings(deadline=None)
@given(problems(), st.booleans())
def test_any_logits_give_distinct_valid_experts_with_finite_weights(problem, renormalize):
    logits, top_k, num_groups, topk_groups = problem
    num_tokens, num_experts = logits.shape
    before = logits.clone()
    for name, (ids, weights) in route_all(*problem, renormalize).items():
        assert ids.dtype == torch.int64, name
        assert weights.dtype == torch.float32, name
        assert ids.shape == weights.shape == (num_tokens, top_k), name
        assert ((ids >= 0) & (ids < num_experts)).all(), name
        assert all(len(set(row)) == top_k for row in ids.tolist()), name
        assert ((weights >= 0) & (weights <= 1 + 1e-6)).all(), name
        if name != "softmax_topk":
            group_size = num_experts // num_groups
            assert all(len({e // group_size for e in row}) <= topk_groups for row in ids.tolist()), name
        if name.startswith("softmax"):
            total = weights.sum(dim=-1)
            assert (
                torch.allclose(total, torch.ones(num_tokens), atol=1e-5) if renormalize else (total <= 1 + 1e-5).all()
            )
    assert torch.equal(logits, before)


@settings(deadline=None)
@given(problems(), st.booleans())
def test_one_group_of_all_is_no_grouping(problem, renormalize):
    logits, top_k, num_groups, _ = problem
    plain_ids, plain_weights = softmax_topk(logits, top_k, renormalize)
    for groups in (1, num_groups):
        ids, weights = softmax_grouped_topk(logits, top_k, groups, groups, renormalize)
        assert torch.equal(ids, plain_ids)
        assert torch.equal(weights, plain_weights)


@settings(deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_tokens_are_routed_independently(problem, random):
    logits, top_k, num_groups, topk_groups = problem
    order = list(range(logits.shape[0]))
    random.shuffle(order)
    for renormalize in (False, True):
        whole = route_all(*problem, renormalize)
        shuffled = route_all(logits[order], top_k, num_groups, topk_groups, renormalize)
        for name, (ids, weights) in whole.items():
            assert torch.equal(shuffled[name][0], ids[order]), name
            torch.testing.assert_close(shuffled[name][1], weights[order])


def test_the_choice_is_right_where_probabilities_underflow():
    ids, weights = softmax_topk(torch.tensor([[0.0, -300.0, -200.0, -400.0]]), top_k=3)
    assert ids.tolist() == [[0, 2, 1]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


def test_a_row_of_vanishing_sigmoids_gives_zeros_not_nan():
    _, weights = sigmoid_grouped_topk(torch.full((1, 4), -1000.0), None, top_k=2, num_groups=2, topk_groups=1)
    assert weights.tolist() == [[0.0, 0.0]]


def test_bias_steers_the_choice_and_leaves_the_weights():
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0.0, 0.0, 5.0])
    ids, weights = sigmoid_grouped_topk(logits, bias, 1, num_groups=1, topk_groups=1, renormalize=False)
    assert (ids.item(), weights.item()) == (3, 0.5)


def test_a_v3_group_scores_by_its_two_best_experts():
    logits = torch.tensor([[3.0, -9.0, -9.0, 2.0, 2.0, -9.0]])  # the best expert is alone in its group
    ids, _ = sigmoid_grouped_topk(logits, None, 2, num_groups=2, topk_groups=1)
    assert set(ids[0].tolist()) == {3, 4}
    ids, _ = softmax_grouped_topk(logits, 2, num_groups=2, topk_groups=1)
    assert 0 in ids[0].tolist()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: softmax_topk(torch.zeros(4), 1), ShapeError, r"\[T, E\], got \[4\]"),
        (lambda: softmax_topk(torch.zeros(2, 4, dtype=torch.int64), 1), DtypeError, "int64"),
        (lambda: softmax_topk(torch.zeros(2, 4), 0), ConfigError, "top_k .* got 0"),
        (lambda: softmax_topk(torch.zeros(2, 4), 5), ConfigError, "4 experts .* got 5"),
        (lambda: softmax_grouped_topk(torch.zeros(2, 4), 1, 3, 1), ConfigError, "4 experts .* num_groups=3"),
        (lambda: softmax_grouped_topk(torch.zeros(2, 4), 1, 0, 1), ConfigError, "num_groups=0"),
        (lambda: softmax_grouped_topk(torch.zeros(2, 4), 1, 2, 3), ConfigError, "topk_groups .* got 3"),
        (lambda: softmax_grouped_topk(torch.zeros(2, 4), 3, 2, 1), ConfigError, "top_k 3 exceeds the 2 experts"),
        (lambda: sigmoid_grouped_topk(torch.zeros(2, 4), None, 3, 2, 1), ConfigError, "top_k 3 exceeds"),
        (lambda: sigmoid_grouped_topk(torch.zeros(2, 4), torch.zeros(3), 1, 2, 1), ShapeError, r"bias .*\[4\].*\[3\]"),
    ],
)
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_torch_compile_keeps_one_graph():
    for route in (
        lambda x: softmax_topk(x, 2, renormalize=True),
        lambda x: softmax_grouped_topk(x, 2, 4, 2),
        lambda x: sigmoid_grouped_topk(x, torch.zeros(EXPERTS), 2, 4, 2),
    ):
        logits = spread_logits(8, EXPERTS)
        compiled = torch.compile(route, backend="eager", fullgraph=True)
        for ours, expected in zip(compiled(logits), route(logits), strict=True):
            torch.testing.assert_close(ours, expected)


def test_the_examples_in_the_docstrings():
    outcome = doctest.testmod(routing, extraglobs={"torch": torch})
    assert outcome.attempted > 0
    assert outcome.failed == 0
