"""A peer that dies or comes too late ends in a typed error on the others, never in a hang."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_plugin.errors import PeerLostError
from moe_plugin.testing.cases import Case
from moe_plugin.testing.checks import check_call
from moe_plugin.testing.rank_pool import RankContext

RANKS = 3
LIMIT_SECONDS = 4.0


def _run(rank: int, port: int, device_type: str, strategy: str, how: str, queue: Any) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, RANKS + 1, is_master=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    context = RankContext(rank, device, RANKS)
    context.size = RANKS
    case = Case(context, strategy, torch.float32, timeout_seconds=LIMIT_SECONDS)
    check_call(case, case.inputs(4))
    last, comes_back = rank == RANKS - 1, how == "comes_back"
    if last:
        if how == "dies":
            os._exit(1)
        time.sleep((1.5 if comes_back else 4) * LIMIT_SECONDS)
        if not comes_back:
            os._exit(0)
    started = time.monotonic()
    answer: tuple[Any, ...] = (rank, None, None, "", 0.0)
    try:
        case.layer(*case.inputs(4).as_tuple())
        case.layer.check_errors()
    except PeerLostError as problem:
        answer = (rank, problem.ranks, problem.phase, str(problem), time.monotonic() - started)
    if comes_back:
        # Ranks call again when they have the error, without waiting for each other.
        for seed in range(3):
            check_call(case, case.inputs(4 + seed, seed))
    queue.put(answer)
    queue.close()
    queue.join_thread()
    # Communicators that lost a peer cannot be torn down in order.
    os._exit(0)


def answers_of_ranks(device_type: str, strategy: str, how: str, count: int) -> list[tuple[Any, ...]]:
    """What `count` ranks say: (rank, lost ranks, phase, message, seconds)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = dist.TCPStore("127.0.0.1", port, RANKS + 1, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_run, args=(r, port, device_type, strategy, how, queue), daemon=True)
        for r in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        return sorted(queue.get(timeout=120) for _ in range(count))
    finally:
        for process in processes:
            process.kill()
            process.join()
        del server


PHASES = {
    ("nccl_all_to_all", "cpu"): ("count exchange", "dispatch"),
    ("nccl_all_to_all", "cuda"): ("count exchange", "dispatch", "combine"),
    ("hybrid_dense_routing", "cpu"): ("routing exchange", "dispatch"),
    ("hybrid_dense_routing", "cuda"): ("dispatch",),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "comes_too_late"])
@pytest.mark.parametrize("dispatcher", ["nccl_all_to_all", "hybrid_dense_routing"])
@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu(RANKS))])
def test_survivors_name_the_lost_rank(device_type: str, dispatcher: str, how: str) -> None:
    answers = answers_of_ranks(device_type, f"{dispatcher}+torch_native", how, RANKS - 1)
    assert [rank for rank, *_ in answers] == [0, 1]
    for _, lost, phase, message, seconds in answers:
        assert lost == (RANKS - 1,)
        assert phase in PHASES[dispatcher, device_type]
        assert ("in epoch 2 of" in message) == (PHASES[dispatcher, device_type] == ("dispatch",))
        assert seconds < 3 * LIMIT_SECONDS


@pytest.mark.slow
@pytest.mark.multi_gpu(RANKS)
def test_a_rank_that_was_late_over_nvlink_takes_part_in_the_next_call() -> None:
    """It hears that the others have given its call up, and no flag of that call is taken for one of the next."""
    first, second, late = answers_of_ranks("cuda", "hybrid_dense_routing+torch_native", "comes_back", RANKS)
    for rank, lost, phase, message, seconds in (first, second):
        assert (lost, phase) == ((RANKS - 1,), "dispatch"), rank
        assert "in epoch 2 of" in message
        assert seconds < 3 * LIMIT_SECONDS
    assert late[1:3] == (None, "exchange")
