"""Every registered strategy x dtype x number of ranks x row of the behaviour matrix.

What a gate refuses is skipped with the gate's reason. Where there is no GPU, Triton's interpreter would make the whole
product take an hour: its strategies then run every row in bf16 on one rank without dispatch, the rows named below with
it, in bf16 on two and four ranks and in every dtype on two, and one row in every dtype on every number of ranks.
On GPUs everything runs. fp8 rows exist in bf16 alone.

Without a GPU hybrid_dense_routing moves rows over torch.distributed. What experts do with rows that were dispatched is
the same behind it as behind nccl_all_to_all, so with interpreted experts a few of its rows are enough.

deep_gemm_hybrid computes in bf16 alone, and DeepEP moves rows of bf16 layers alone, between 2, 4 or 8 ranks. Without a
GPU they run on contract doubles of the packages, which have to agree with these in tests/compat.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

import moe_plugin
from moe_plugin.testing import CHECKS
from moe_plugin.testing.pytest_tests import DTYPES, MAX_RANKS, device_type_for, run_check
from moe_plugin.verdict import dtype_name
from tests.doubles import deep_ep, deep_gemm

TOP_K_ROWS = [name for name in CHECKS if name.startswith("top_k_")]
INTERPRETED_ROWS = [*TOP_K_ROWS, "no_tokens", "dropped_ids", "all_to_one_rank"]
INTERPRETED_DISPATCHED = [
    *INTERPRETED_ROWS,
    "all_to_one_expert",
    "placements",
    "strided_inputs",
    "router_weight_on_input",
    "output_argument",
    "micro_batches_interleaved",
    "asynchronous_halves",
    "shared_experts",
    "tensor_parallel",
    "fixed_capacity",
    "capacity_overflow_raises",
    "fp8_block",
    "fp8_per_token",
    "fp8_per_tensor_static",
    "fp8_tensor_parallel",
]
"""Rows in which interpreted experts meet dispatched rows. What experts do however their rows came, `local` shows; what
dispatchers do whatever computes behind them, the rows with torch_native show, which are all of them."""
HYBRID = "hybrid_dense_routing+"
HYBRID_INTERPRETED = ["top_k_2", "no_tokens", "dropped_ids", "fp8_block"]
HYBRID_FIXED = ["fixed_capacity", "capacity_overflow_raises"]
"""Rows of torch experts under CUDA graphs are refused, so that others have to run them."""
DEEP_EP = "deepep_"
ROWS_WITHOUT_DISPATCH = ["tensor_parallel", "fp8_tensor_parallel", "top_k_2"]
"""On several ranks `local` is what tensor parallelism runs; one more row shows what its gate says otherwise."""


def rows(strategy: str, num_ranks: int, dtype: torch.dtype) -> list[str]:
    """The rows of the matrix that one cell runs."""
    names = [name for name in CHECKS if dtype == torch.bfloat16 or not name.startswith("fp8_")]
    if strategy.startswith(HYBRID) and device_type_for(num_ranks) == "cpu":
        return hybrid_rows(strategy, num_ranks, dtype, names)
    if strategy.startswith(DEEP_EP):
        return deep_ep_rows(strategy, num_ranks, dtype, names)
    if strategy.endswith("+deep_gemm_hybrid"):
        if dtype != torch.bfloat16:
            return ["top_k_2"]
        if device_type_for(num_ranks) == "cpu" and (num_ranks > 1 or not strategy.startswith("local+")):
            return INTERPRETED_ROWS if num_ranks == 2 and not strategy.startswith("local+") else ["top_k_2"]
    if strategy.startswith("local+") and num_ranks > 1:
        return [name for name in names if name in ROWS_WITHOUT_DISPATCH]
    interpreted = strategy.endswith("+triton_fused_moe") and device_type_for(num_ranks) == "cpu"
    if interpreted and (dtype != torch.bfloat16 or num_ranks > 2):
        few = num_ranks == 3 or (num_ranks == 1 and not strategy.startswith("local+"))
        return INTERPRETED_ROWS if not few and (dtype == torch.bfloat16 or num_ranks < 3) else ["top_k_2"]
    if interpreted and not strategy.startswith("local+"):
        # On one rank dispatch is a copy, and `local` has shown what experts do with the rows.
        return INTERPRETED_ROWS if num_ranks == 1 else INTERPRETED_DISPATCHED
    return names


def hybrid_rows(strategy: str, num_ranks: int, dtype: torch.dtype, names: list[str]) -> list[str]:
    """`rows` of hybrid_dense_routing without a GPU. names: all there are."""
    if strategy.endswith("+torch_native"):
        return INTERPRETED_ROWS if dtype == torch.float16 else names
    if num_ranks != 2 or dtype != torch.bfloat16:
        return []
    return HYBRID_INTERPRETED + HYBRID_FIXED * strategy.endswith("+triton_fused_moe")


def deep_ep_rows(strategy: str, num_ranks: int, dtype: torch.dtype, names: list[str]) -> list[str]:
    """`rows` of the classes that DeepEP moves rows for. names: all there are."""
    if dtype != torch.bfloat16 or num_ranks in (1, 3):
        return ["top_k_2"] if strategy.endswith("+torch_native") else []
    if device_type_for(num_ranks) == "cuda":
        return names
    if strategy.endswith("+torch_native"):
        return names if num_ranks == 2 else ["top_k_2", "no_tokens", "all_to_one_rank", "tensor_parallel"]
    if num_ranks > 2:
        return []
    return ["top_k_2", "fp8_block"] + HYBRID_FIXED[:1] * strategy.endswith("+triton_fused_moe")


def install_doubles(deep_ep_too: bool, deep_gemm_too: bool) -> None:
    if deep_ep_too:
        deep_ep.install()
    if deep_gemm_too:
        deep_gemm.install()


def cells() -> Iterator[object]:
    for strategy in moe_plugin.strategy_names():
        for num_ranks in range(1, MAX_RANKS + 1):
            for dtype in DTYPES:
                for row in rows(strategy, num_ranks, dtype):
                    yield pytest.param(
                        strategy, num_ranks, dtype, row, id=f"{strategy}-{num_ranks}_ranks-{dtype_name(dtype)}-{row}"
                    )


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "num_ranks", "dtype", "row"), list(cells()))
def test_matrix(strategy: str, num_ranks: int, dtype: torch.dtype, row: str) -> None:
    doubles = None
    if device_type_for(num_ranks) == "cpu":
        wanted = strategy.startswith(DEEP_EP), strategy.endswith("+deep_gemm_hybrid")
        doubles = functools.partial(install_doubles, *wanted) if any(wanted) else None
    run_check(row, strategy, dtype, num_ranks, setup=doubles)
