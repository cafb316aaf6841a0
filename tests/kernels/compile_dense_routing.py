"""Compiles the routing scan for SM 90, which need not be there, at the sizes that it is tuned for."""

from __future__ import annotations

import re
from typing import Any

import torch

from moe_plugin.kernels.dense_routing import DenseRouting, dense_routing_launches
from tests.kernels.compile_launch import compile_launch

CASES: dict[str, dict[str, Any]] = {
    "128 tokens": {"shape": (4, 128, 8)},
    "4096 tokens, rows": {"shape": (4, 4096, 8), "places": False},
    "33 tokens of 7 ids, masked": {"shape": (2, 33, 7), "rows_per_expert": 128},
}


def compile_dense_routing(
    shape: tuple[int, int, int], places: bool = True, rows_per_expert: int | None = None
) -> dict[str, Any]:
    """{"loads": kinds of loads from global memory, "compares": of two ids at once}, for 256 experts."""
    ids = torch.empty(shape, dtype=torch.int16, device="meta")
    out = DenseRouting.empty(*shape, 1, 256 // shape[0], ids.device, places=places)
    (launch,) = dense_routing_launches(ids, out, rows_per_expert=rows_per_expert)
    ptx = compile_launch(launch, 90).asm["ptx"]
    loads = sorted(set(re.findall(r"ld\.global[\w.:]*", ptx)))
    return {"loads": loads, "compares": ptx.count("set.eq.u32.f16x2") + ptx.count("set.ge.u32.f16x2")}
