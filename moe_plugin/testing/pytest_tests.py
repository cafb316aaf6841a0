"""Turns the checks into pytest tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from moe_plugin.compat import deep_ep
from moe_plugin.testing.checks import CHECKS, Refused
from moe_plugin.testing.rank_pool import RankContext, shared_pool
from moe_plugin.verdict import dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANKS = 4


def device_type_for(ranks: int) -> str:
    """Where a test of that many ranks runs: on GPUs if there are enough, else on CPU."""
    return "cuda" if torch.cuda.device_count() >= ranks else "cpu"


def run_check(
    name: str, strategy: str, dtype: torch.dtype, ranks: int, setup: Callable[[], object] | None = None
) -> None:
    """Run one check on `ranks` ranks of the shared pool; a refusal skips the test with its reason."""
    device_type = device_type_for(ranks)
    pool = shared_pool(device_type, MAX_RANKS if device_type == "cpu" else torch.cuda.device_count())
    refusals = pool.run(_run_on_rank, name, strategy, dtype, setup, ranks=ranks)
    if any(refusals):
        assert all(refusals), f"only some ranks refused: {refusals}"
        pytest.skip(f"refused: {refusals[0]}")


def _run_on_rank(
    context: RankContext, name: str, strategy: str, dtype: torch.dtype, setup: Callable[[], object] | None
) -> str | None:
    if setup is not None:
        setup()
    answer = None
    try:
        CHECKS[name](context, strategy, dtype)
    except Refused as refusal:
        answer = str(refusal)
    # While all ranks of the groups are here: a later run may be without some of them.
    deep_ep.release_buffers()
    return answer


def conformance_tests(
    strategy: str,
    setup: Callable[[], object] | None = None,
    ranks: Sequence[int] = (1, 2, 3, 4),
    dtypes: Sequence[torch.dtype] = DTYPES,
    checks: Sequence[str] | None = None,
) -> Callable[..., None]:
    """A pytest test function that runs every check on `strategy`; assign it to a name that starts with `test_`.

    setup: an importable function that registers your classes; called in every worker process.
    """

    @pytest.mark.parametrize("name", checks or list(CHECKS))
    @pytest.mark.parametrize("dtype", dtypes, ids=dtype_name)
    @pytest.mark.parametrize("num_ranks", ranks, ids=lambda n: f"{n}_ranks")
    def test_conformance(num_ranks: int, dtype: torch.dtype, name: str) -> None:
        run_check(name, strategy, dtype, num_ranks, setup)

    return test_conformance
