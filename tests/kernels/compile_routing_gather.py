"""Compiles the routing scan with its all-gather for SM 90, which need not be there, at the sizes it is tuned for."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import torch
import triton

from moe_plugin.config import ExpertPlacement
from moe_plugin.kernels.dense_routing import DenseRouting, dense_routing_launches
from moe_plugin.kernels.placement_lookup import LookupTables
from moe_plugin.kernels.routing_gather import MAX_WRITERS, RoutingGather, RoutingRegions
from tests.kernels.compile_launch import compile_launch

CASES: dict[str, dict[str, Any]] = {
    "128 tokens": {"shape": (4, 128, 8)},
    "4096 tokens": {"shape": (4, 4096, 8)},
    "128 tokens of 4 ids, weights, rows": {"shape": (4, 128, 4), "weights": True, "places": False},
}


def compile_routing_gather(
    shape: tuple[int, int, int], weights: bool = False, places: bool = True, dtype: torch.dtype = torch.int32
) -> dict[str, Any]:
    """{"grid": programs, "to_peers": kinds of stores of a tile of rows, "signals": of a thread, "polls": of a thread,
    "stack": bytes of a thread} for 256 experts."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    num_ranks, capacity, top_k = shape
    room = num_ranks * capacity * top_k
    gather = RoutingGather(
        topk_ids=empty(capacity, top_k, dtype=dtype),
        topk_weights=empty(capacity, top_k, dtype=torch.bfloat16) if weights else None,
        tables=LookupTables.of(ExpertPlacement.linear(256, num_ranks).tables("cpu")),
        regions=RoutingRegions(
            peer_offsets=empty(num_ranks, dtype=torch.int64),
            ids=empty(2, room, dtype=torch.int16),
            weights=empty(2, room, dtype=torch.float32),
            flags=empty(num_ranks, MAX_WRITERS, dtype=torch.int64),
            epochs=empty(1, dtype=torch.int64),
        ),
        gathered_weights=empty(*shape, dtype=torch.float32) if weights else None,
        reports=empty(8),
        lost=empty(1),
        limit_ns=30 * 10**9,
    )
    ids = empty(*shape, dtype=torch.int16)
    out = DenseRouting.empty(*shape, 1, 256 // num_ranks, ids.device, places=places)
    (launch,) = dense_routing_launches(ids, out, gather=gather)
    compiled = compile_launch(launch, 90)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    before_signal = re.findall(r"st\.global[\w.:]*", ptx[: ptx.index("st.release.sys")])
    return {
        "grid": launch.grid[0],
        "to_peers": sorted(set(before_signal[-num_ranks * (1 + weights) :])),
        "signals": ptx.count("st.release.sys.global.s64"),
        "polls": ptx.count("ld.acquire.sys.global.s64"),
        "stack": int(stack),
    }
