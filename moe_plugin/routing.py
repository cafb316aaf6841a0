"""Routing: router logits [T, E] -> the experts and weights of every token, in plain torch on any device.

Every function returns `(topk_ids, topk_weights)`:

    topk_ids      int64 [T, K], distinct within a row, best first. int64 is what torch.topk gives and what one_hot,
                  gather and DeepEP take; layers accept it as it is.
    topk_weights  fp32 [T, K], in the order of topk_ids, whatever the dtype of the logits.

Nothing synchronizes with the host and shapes follow from the arguments alone, so all of it can be captured in a CUDA
graph. Which of several equal scores wins is torch.topk's choice.

    model                       function
    Qwen2-MoE, Qwen3-MoE        softmax_topk(renormalize=norm_topk_prob)
    Mixtral, gpt-oss            softmax_topk(renormalize=True)
    DeepSeek-V2                 softmax_grouped_topk
    DeepSeek-V3, Kimi K2        sigmoid_grouped_topk

gpt-oss takes the softmax over the selected logits alone. That is the renormalized softmax over all of them, since the
common denominator cancels: exp(x_i)/Z / sum_j(exp(x_j)/Z) = exp(x_i) / sum_j(exp(x_j)).
"""

from __future__ import annotations

import torch

from moe_plugin.errors import ConfigError, DtypeError, ShapeError
from moe_plugin.verdict import dtype_name

_SIGMOID_SUM_FLOOR = 1e-20
"""DeepSeek's guard in the renormalization: a row of scores that all underflow gives zeros, not NaN."""


def softmax_topk(logits: torch.Tensor, top_k: int, renormalize: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` most probable experts, weighted by their probability.

    logits: float [T, E].
    renormalize: scale each token's weights to sum to 1 (`norm_topk_prob`); otherwise they are probabilities over all E.

    Softmax keeps the order, so the choice is made on the logits: it stays right where probabilities underflow to 0.
    Raises ShapeError, DtypeError or ConfigError.

    >>> softmax_topk(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2, renormalize=True)
    (tensor([[1, 2]]), tensor([[0.7311, 0.2689]]))
    """
    _check_logits(logits, top_k)
    logits = logits.float()
    chosen, topk_ids = logits.topk(top_k, dim=-1)
    return topk_ids, _softmax_of_chosen(chosen, logits, renormalize)


def softmax_grouped_topk(
    logits: torch.Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool = False,
    scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V2's `group_limited_greedy`: the best experts of the best groups, weighted by their softmax probability.

    logits: float [T, E]; E splits into `num_groups` runs of consecutive experts. A group scores as its best expert,
    and only the `topk_groups` best groups are chosen from.
    renormalize: scale each token's weights to sum to 1; otherwise they are probabilities over all E.
    scaling_factor: multiplied into the weights last (`routed_scaling_factor`).

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1. Raises ShapeError, DtypeError or ConfigError.
    """
    _check_logits(logits, top_k)
    _check_groups(logits.shape[1], top_k, num_groups, topk_groups)
    logits = logits.float()
    group_scores = logits.unflatten(-1, (num_groups, -1)).amax(dim=-1)
    eligible = _keep_best_groups(logits, group_scores, topk_groups)
    chosen, topk_ids = eligible.topk(top_k, dim=-1)
    return topk_ids, _softmax_of_chosen(chosen, logits, renormalize) * scaling_factor


def sigmoid_grouped_topk(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3's routing: sigmoid scores, a bias that steers the choice but not the weights, and groups.

    logits: float [T, E]; E splits into `num_groups` runs of consecutive experts. A group scores as the sum of its two
    best biased scores, and only the `topk_groups` best groups are chosen from. One group means no grouping.
    bias: float [E], the load-balancing `e_score_correction_bias`, or None.
    renormalize: scale each token's weights to sum to 1 (`norm_topk_prob`).
    scaling_factor: multiplied into the weights last (`routed_scaling_factor`).

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2. Raises ShapeError, DtypeError or ConfigError.
    """
    _check_logits(logits, top_k)
    num_experts = logits.shape[1]
    _check_groups(num_experts, top_k, num_groups, topk_groups)
    if bias is not None and tuple(bias.shape) != (num_experts,):
        raise ShapeError(f"bias must be [{num_experts}], one entry per expert, got {list(bias.shape)}")
    scores = logits.float().sigmoid()
    biased = scores if bias is None else scores + bias.float()
    grouped = biased.unflatten(-1, (num_groups, -1))
    group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    topk_ids = _keep_best_groups(biased, group_scores, topk_groups).topk(top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if renormalize:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + _SIGMOID_SUM_FLOOR)
    return topk_ids, topk_weights * scaling_factor


def _softmax_of_chosen(chosen: torch.Tensor, logits: torch.Tensor, renormalize: bool) -> torch.Tensor:
    """Softmax weights of the `chosen` logits [T, K], over themselves or over all `logits` [T, E]."""
    if renormalize:
        return chosen.softmax(dim=-1)
    return (chosen - logits.logsumexp(dim=-1, keepdim=True)).exp()


def _keep_best_groups(scores: torch.Tensor, group_scores: torch.Tensor, topk_groups: int) -> torch.Tensor:
    """`scores` [T, E] with -inf outside the `topk_groups` groups that `group_scores` [T, G] rates best."""
    num_groups = group_scores.shape[-1]
    if topk_groups == num_groups:
        return scores
    best = group_scores.topk(topk_groups, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    return scores.masked_fill(dropped.repeat_interleave(scores.shape[-1] // num_groups, dim=-1), float("-inf"))


def _check_logits(logits: torch.Tensor, top_k: int) -> None:
    if logits.dim() != 2:
        raise ShapeError(f"logits must be [T, E], got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise DtypeError(f"logits must be floating point, got {dtype_name(logits.dtype)}")
    if not 1 <= top_k <= logits.shape[1]:
        raise ConfigError(f"top_k must lie between 1 and the {logits.shape[1]} experts of the logits, got {top_k}")


def _check_groups(num_experts: int, top_k: int, num_groups: int, topk_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(f"{num_experts} experts do not split into num_groups={num_groups} equal groups")
    if not 1 <= topk_groups <= num_groups:
        raise ConfigError(f"topk_groups must lie between 1 and num_groups={num_groups}, got {topk_groups}")
    reachable = topk_groups * (num_experts // num_groups)
    if top_k > reachable:
        raise ConfigError(f"top_k {top_k} exceeds the {reachable} experts of topk_groups={topk_groups} groups")
