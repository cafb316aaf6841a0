"""Compiles the kernels that move rows between ranks for SM 90, which need not be there: 4 ranks of 4096 tokens."""

from __future__ import annotations

from typing import Any

import torch

from moe_plugin.kernels import contiguous_rows, nvlink_combine, nvlink_dispatch
from moe_plugin.kernels.launcher import Launch
from moe_plugin.quantization import FP8_DTYPE
from tests.kernels.compile_launch import compile_launch

LIMIT_NS = 30 * 10**9
HIDDEN, TOP_K, EXPERTS, RANKS = 7168, 8, 256, 4


def _empty(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(16, dtype=dtype)


X, X8, F32 = _empty(torch.bfloat16), _empty(FP8_DTYPE), _empty(torch.float32)
I32, I64 = _empty(torch.int32), _empty(torch.int64)


def _dispatch(rows: torch.Tensor, scales: torch.Tensor | None, group: int) -> Launch:
    return nvlink_dispatch.launch_dispatch.launch(
        (24,),
        (
            X, I64, F32, I32, I32, I32, None, None, I64, rows, scales, I32, F32, I32, I64, I32, None, I64, I32, I32,
            4096, 4096, 0, 2, LIMIT_NS, HIDDEN, 1, TOP_K, 1, TOP_K, 1, HIDDEN, 64, 256,
        ),
        (HIDDEN, TOP_K, 8, EXPERTS, 1, RANKS, 4, 8192, group, 128, 1, True),
        num_warps=32,
        launch_pdl=True,
    )  # fmt: skip


def _combine() -> Launch:
    return nvlink_combine.launch_combine.launch(
        (24,),
        (X, I32, I32, X, I64, X, I64, I64, I32, I32, 4096, 4096, 2, LIMIT_NS, HIDDEN, HIDDEN, HIDDEN, 256),
        (HIDDEN, RANKS, 4, 8192, 16, False, 2, True),
        num_warps=32,
        launch_pdl=True,
    )


def _duplicates() -> Launch:
    return contiguous_rows._launch_duplicate_rows.launch(
        (20,),
        (X, None, None, I32, I64, I32, I64, I32, I32, 4096, LIMIT_NS, HIDDEN, 0, 0, 256),
        (HIDDEN, 8192, 0, 1, TOP_K, RANKS, 20, 16, 4, 16, 1, True),
        num_warps=16,
        launch_pdl=True,
    )


CASES = {
    "dispatch": _dispatch(X, None, 8192),
    "quantized dispatch": _dispatch(X8, F32, 128),
    "combine": _combine(),
    "duplicates": _duplicates(),
}


def _hopper_cases() -> dict[str, Launch]:
    from moe_plugin.kernels import hopper_exchange

    row, row8 = (hopper_exchange.row_descriptor(1 << 16, t, 4096, HIDDEN, HIDDEN) for t in (torch.bfloat16, FP8_DTYPE))
    common = (I32, None, I64, I64, I32, I64, I32, 4096, 4096, 0, 2)
    send = hopper_exchange.launch_send_rows.launch(
        (20,), (row, *[row] * 8, *common, 256), (RANKS, 1, 13, 1, True), num_warps=1, launch_pdl=True
    )
    quantized = hopper_exchange.launch_send_quantized.launch(
        (24,),
        (X, *[row8] * 8, F32, *common, HIDDEN, 56, 256),
        (HIDDEN, 128, RANKS, 1, 12, 8, True),
        num_warps=8,
        launch_pdl=True,
    )
    combine = hopper_exchange.launch_combine.launch(
        (20,),
        (
            row, *[row] * 7, X, X, X, I32, I32, I64, I64, I64, I32, I32,
            4096, 4096, 2, LIMIT_NS, HIDDEN, HIDDEN, HIDDEN, 256,
        ),
        (HIDDEN, 8192, RANKS, 16, 13, 2, 8, True),
        num_warps=8,
        launch_pdl=True,
    )  # fmt: skip
    return {"tma rows": send, "tma quantized rows": quantized, "tma combine": combine}


def compile_exchange(with_hopper: bool) -> dict[str, dict[str, Any]]:
    """{"case": {"wide": 16-byte accesses of rows, "narrow": 2-byte ones, "bulk": TMA operations, "shared": bytes,
    "signals", "polls"}}."""
    found = {}
    for name, launch in (CASES | (_hopper_cases() if with_hopper else {})).items():
        compiled = compile_launch(launch, 90, specialize=True)
        ptx = compiled.asm["ptx"]
        found[name] = {
            "wide": [ptx.count(f"{kind}.global.v4.b32") for kind in ("ld", "st")],
            "narrow": ptx.count("ld.global.b16") + ptx.count("st.global.b16"),
            "bulk": ptx.count("cp.async.bulk.tensor"),
            "shared": compiled.metadata.shared,
            "signals": ptx.count("st.release.sys.global.s64"),
            "polls": ptx.count("ld.acquire.sys.global.s64"),
        }
    return found
