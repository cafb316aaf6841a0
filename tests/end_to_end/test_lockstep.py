"""What keeps the ranks of a server together, on two gloo ranks with a model that misbehaves to order."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from moe_plugin.cli.launch import Ranks
from moe_plugin.cli.lockstep import GenerationStopped, Lockstep, RanksDivergedError
from moe_plugin.errors import MoEPluginError, PeerLostError
from tests.integrations.ranks import run_on_ranks

VOCABULARY = 5
NUM_STEPS = 3
IDLE_LIMIT = timedelta(seconds=50)


class Model:
    """Samples NUM_STEPS tokens from logits that differ from rank to rank, and fails where it is told to."""

    def generate(
        self,
        streamer: Any,
        logits_processor: Any,
        fail_on: tuple[int, ...] = (),
        fail_before_step: int = NUM_STEPS,
        diverge: bool = False,
    ) -> Any:
        rank = dist.get_rank()
        tokens = torch.zeros(1, 1, dtype=torch.long)
        for step in range(NUM_STEPS):
            if rank in fail_on and step == fail_before_step:
                raise RuntimeError(f"as told, on rank {rank}")
            scores = logits_processor(tokens, torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(rank)))
            chosen = torch.multinomial(scores.softmax(-1), 1) + (rank if diverge else 0)
            tokens = torch.cat((tokens, chosen), 1)
            if streamer is not None:
                streamer.put(chosen)
        if rank in fail_on:
            raise RuntimeError(f"as told, on rank {rank}")
        return tokens


class Streamer:
    """Raises at its second token, as a streamer does whose client has left."""

    def __init__(self) -> None:
        self.received = 0

    def put(self, value: torch.Tensor) -> None:
        self.received += 1
        if self.received == 2:
            raise ConnectionError("the client left")

    def end(self) -> None:
        raise AssertionError("the generation was to stop")


def new_lockstep(step_seconds: float = 20) -> tuple[Lockstep, list[str]]:
    """With groups of its own, since a failed one cannot be used again; and what its on_failure has noted."""
    step_limit = timedelta(seconds=step_seconds)
    requests = dist.new_group(backend="gloo", timeout=IDLE_LIMIT)
    steps = dist.new_group(backend="gloo", timeout=step_limit)
    failures: list[str] = []
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), requests, steps, step_limit)
    return Lockstep(Model(), None, ranks, lambda: failures.append("failed")), failures  # type: ignore[arg-type]


def check_requests_survive_their_errors() -> None:
    lockstep, failures = new_lockstep()
    if dist.get_rank() != 0:
        lockstep.follow()
        return
    torch.manual_seed(3)
    first = lockstep.generate()
    torch.manual_seed(3)
    assert torch.equal(lockstep.generate(), first)
    with pytest.raises(RuntimeError, match="as told, on rank 0"):
        lockstep.generate(fail_on=(0, 1))
    streamer = Streamer()
    with pytest.raises(ConnectionError):
        lockstep.generate(streamer=streamer)
    assert streamer.received == 2
    assert lockstep.generate().shape == first.shape
    lockstep.close()
    with pytest.raises(GenerationStopped):
        lockstep.generate()
    assert not failures


def check_failure_of_one_rank_ends_all() -> None:
    lockstep, failures = new_lockstep()
    first = dist.get_rank() == 0
    with pytest.raises(RanksDivergedError, match="rank 0: success; rank 1: RuntimeError: as told"):
        lockstep.generate(fail_on=(1,)) if first else lockstep.follow()
    if first:
        assert failures
        with pytest.raises(RanksDivergedError):
            lockstep.generate()


def check_rank_zero_alone_fails_between_steps(fail_before_step: int) -> None:
    """It comes to the roll call while the other rank still waits for its step."""
    lockstep, failures = new_lockstep(step_seconds=2)
    started = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RanksDivergedError, match=r"rank 0 failed \(RuntimeError: as told"):
            lockstep.generate(fail_on=(0,), fail_before_step=fail_before_step)
        assert failures
        lockstep.close()
    else:
        with pytest.raises((PeerLostError, RanksDivergedError)):
            lockstep.follow()
    assert time.monotonic() - started < IDLE_LIMIT.total_seconds() / 2


def check_requests_may_be_further_apart_than_steps() -> None:
    lockstep, failures = new_lockstep(step_seconds=1)
    if dist.get_rank() != 0:
        lockstep.follow()
        return
    lockstep.generate()
    time.sleep(2)
    lockstep.generate()
    lockstep.close()
    assert not failures


def check_failure_before_generate_ends_all() -> None:
    """The other rank cannot take over rank 0's random state."""
    lockstep, failures = new_lockstep(step_seconds=2)
    if dist.get_rank() == 0:
        with pytest.raises(MoEPluginError):
            lockstep.generate()
        assert failures
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_rng_state", fail)
        with pytest.raises(RanksDivergedError, match="no random state"):
            lockstep.follow()


def fail(_: torch.Tensor) -> None:
    raise RuntimeError("no random state")


def check_other_tokens_are_noticed() -> None:
    lockstep, failures = new_lockstep()
    if dist.get_rank() == 0:
        with pytest.raises(MoEPluginError):
            lockstep.generate(diverge=True)
        assert failures
    else:
        with pytest.raises(RanksDivergedError, match="rank 1 chose other tokens"):
            lockstep.follow()


def check_lockstep() -> None:
    check_requests_survive_their_errors()
    check_requests_may_be_further_apart_than_steps()
    check_failure_of_one_rank_ends_all()
    for step in range(NUM_STEPS):
        check_rank_zero_alone_fails_between_steps(step)
    # Last: rank 1 leaves rank 0 waiting, which notices when the process is gone.
    check_other_tokens_are_noticed()


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_lockstep, check_failure_before_generate_ends_all])
def test_lockstep(check: Callable[[], None]) -> None:
    run_on_ranks(check, 2)
