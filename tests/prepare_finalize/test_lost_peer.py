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
from moe_plugin.testing.rank_pool import RankContext

RANKS = 3
LIMIT_SECONDS = 4.0


def _run(rank: int, port: int, device_type: str, dies: bool, queue: Any) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, RANKS + 1, is_master=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    context = RankContext(rank, device, RANKS)
    context.size = RANKS
    strategy = "nccl_all_to_all+torch_native"
    case = Case(context, strategy, torch.float32, timeout_seconds=LIMIT_SECONDS)
    case.layer(*case.inputs(4).as_tuple())
    if rank == RANKS - 1:
        if dies:
            os._exit(1)
        time.sleep(4 * LIMIT_SECONDS)
        os._exit(0)
    started = time.monotonic()
    try:
        case.layer(*case.inputs(4).as_tuple())
        queue.put((rank, None, None, time.monotonic() - started))
    except PeerLostError as problem:
        queue.put((rank, problem.ranks, problem.phase, time.monotonic() - started))
    queue.close()
    queue.join_thread()
    # Communicators that lost a peer cannot be torn down in order.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [True, False], ids=["dies", "comes_too_late"])
@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu(RANKS))])
def test_survivors_name_the_lost_rank(device_type: str, dies: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = dist.TCPStore("127.0.0.1", port, RANKS + 1, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_run, args=(r, port, device_type, dies, queue), daemon=True) for r in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        answers = [queue.get(timeout=120) for _ in range(RANKS - 1)]
    finally:
        for process in processes:
            process.kill()
            process.join()
        del server
    assert sorted(rank for rank, *_ in answers) == [0, 1]
    for _, lost, phase, seconds in answers:
        assert lost == (RANKS - 1,)
        assert phase in ("count exchange", "dispatch", "combine")
        assert seconds < 3 * LIMIT_SECONDS
