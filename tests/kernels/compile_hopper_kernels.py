"""Compiles Hopper kernels for SM 90, which need not be there, exactly as the package would launch them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import torch
import triton

import moe_plugin.kernels.hopper_gemm as hopper_gemm
from moe_plugin.config import MoEConfig
from moe_plugin.kernels.hopper_gemm import Fp8Scales, SlotBlocks, down_launches, gate_up_activation_launches
from moe_plugin.kernels.hopper_tiling import HopperTile
from moe_plugin.kernels.tiling import cdiv
from moe_plugin.quantization import FP8_DTYPE
from tests.kernels.compile_launch import compile_launch

# What the kernels ask of the current device, answered as on SM 90.
hopper_gemm.dependent_launch = lambda: True


def compile_hopper(
    gated: bool,
    tile: HopperTile,
    scheme: str | None,
    bias: bool = False,
    in_parts: bool = False,
    is_listed: bool = False,
) -> dict[str, Any]:
    """{"instructions": which of its kinds are there, "stack": bytes per thread, "shared": bytes per program}

    scheme: None for bf16, "block", "token" or "static". in_parts: it is known where rows end. is_listed: blocks say
    where they begin. H = 2880, I = 704.
    """
    hidden, inner, slots = 2880, 704, 2 * tile.block_x
    config = MoEConfig(num_experts=1, top_k=1, hidden_size=hidden, intermediate_size=inner)
    w_rows, depth, columns = (2 * inner, hidden, inner) if gated else (hidden, inner, hidden)
    dtype = torch.bfloat16 if scheme is None else FP8_DTYPE
    x, w = torch.empty(slots, depth, dtype=dtype), torch.empty(1, w_rows, depth, dtype=dtype)
    out = torch.empty(slots, columns, dtype=dtype if gated else torch.bfloat16)
    biases = torch.empty(1, w_rows, dtype=torch.bfloat16) if bias else None
    row_ends = torch.full((1,), slots, dtype=torch.int32) if in_parts else None
    block_row = torch.zeros(2, dtype=torch.int32) if is_listed else None
    blocks = SlotBlocks(torch.zeros(2, dtype=torch.int32), torch.full((1,), 2, dtype=torch.int32), block_row, row_ends)
    scales = None if scheme is None else _scales(gated, scheme, x, w_rows, columns)
    if gated:
        (launch,) = gate_up_activation_launches(x, w, biases, out, blocks, tile, config, 132, scales)
    else:
        (launch,) = down_launches(x, w, biases, out, blocks, tile, 132, scales)
    compiled = compile_launch(launch, 90)
    names = ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait", "griddepcontrol.wait")
    instructions = [name for name in names if name in compiled.asm["ptx"]]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return {"instructions": instructions, "stack": int(stack), "shared": compiled.metadata.shared}


def _scales(gated: bool, scheme: str, x: torch.Tensor, w_rows: int, columns: int) -> Fp8Scales:
    x_kind, w_kind = {
        "block": ("group", "block"),
        "token": ("row" if gated else "group", "channel"),
        "static": ("tensor" if gated else "expert", "tensor"),
    }[scheme]
    depth_groups, column_groups = cdiv(x.shape[1], 128), cdiv(columns, 128)
    of_x = {"group": (depth_groups, x.shape[0]), "row": (1, x.shape[0]), "tensor": (1,), "expert": (1,)}[x_kind]
    tiles = 2 * column_groups if gated else column_groups
    of_w = {"block": (1, tiles, depth_groups), "channel": (1, w_rows), "tensor": (1, 2) if gated else (1,)}[w_kind]
    out, out_kind = None, None
    if gated:
        out = torch.empty((1,) if scheme == "static" else (column_groups, x.shape[0]))
        out_kind = "static" if scheme == "static" else "group"
    return Fp8Scales(torch.empty(of_x), x_kind, torch.empty(of_w), w_kind, out, out_kind)  # type: ignore[arg-type]


WIDE_BF16, WIDE_FP8 = HopperTile(True, 128, 128), HopperTile(True, 128, 64)
CASES: dict[str, tuple[Any, ...]] = {
    "gate_up wide bf16": (True, WIDE_BF16, None, True),
    "gate_up wide fp8 block": (True, WIDE_FP8, "block"),
    "gate_up wide fp8 static": (True, WIDE_FP8, "static", True),
    "gate_up narrow bf16": (True, HopperTile(False, 16, 128), None),
    "gate_up narrow fp8 token": (True, HopperTile(False, 8, 64), "token"),
    "down narrow fp8 block": (False, HopperTile(False, 64, 128), "block"),
    "gate_up narrow bf16 in parts": (True, HopperTile(False, 64, 128), None, False, True),
    "gate_up narrow fp8 block in parts": (True, HopperTile(False, 64, 128), "block", False, True),
    "gate_up narrow fp8 block, listed": (True, HopperTile(False, 32, 128), "block", False, True, True),
}
