"""Compiles kernels for GPUs that need not be there; prints what became of them as JSON.

    {"portable": {"kernel sm": see outcome}, "hopper": {"kernel": see compile_hopper},
     "routing": {"case": see compile_dense_routing}, "routing_gather": {"case": see compile_routing_gather},
     "exchange": see compile_exchange}

"hopper" is empty before Triton 3.6. Run as a program without TRITON_INTERPRET, which is a property of the process.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_plugin.config import Activation, ExpertPlacement, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.kernels import (
    counting_sort,
    grouped_gemm,
    masked_slots,
    pack_rows,
    quantize_rows,
    row_blocks,
    row_sum,
    send_plan,
)
from moe_plugin.kernels.gated_activation import ContiguousRows, GroupedRows, MaskedRows, gated_activation_launches
from moe_plugin.kernels.hopper_tiling import hopper_verdict
from moe_plugin.kernels.launcher import Launch
from moe_plugin.kernels.tiling import counting_sort_shapes
from moe_plugin.quantization import FP8_DTYPE
from tests.kernels.compile_dense_routing import CASES as ROUTING_CASES
from tests.kernels.compile_dense_routing import compile_dense_routing
from tests.kernels.compile_exchange import compile_exchange
from tests.kernels.compile_launch import compile_launch
from tests.kernels.compile_routing_gather import CASES as GATHER_CASES
from tests.kernels.compile_routing_gather import compile_routing_gather

FP8, BF16, FP32, INT = "*fp8e4nv", "*bf16", "*fp32", "*i32"
BLOCK_SCALES = {"ROW_SCALE": "group", "WEIGHT_SCALE": "block"}
NO_SCALES = {"ROW_SCALE": "none", "WEIGHT_SCALE": "none"}
SIZES = {"HIDDEN_SIZE": 2880, "INTERMEDIATE_SIZE": 704, "BATCHED": False}
ACTIVATION = {"ACTIVATION": "silu_and_mul", "SWIGLU_ALPHA": 1.702, "SWIGLU_LIMIT": 7.0, "TOP_K": 8}
FP8_TILE = {"BLOCK_M": 64, "BLOCK_K": 128, "GROUP_M": 8}
BF16_TILE = {"BLOCK_M": 16, "BLOCK_K": 64, "GROUP_M": 8}
SORTED = {"sorted_pairs_ptr": INT, "expert_ptr": INT}
LISTED = {"expert_ptr": INT, "block_row_ptr": INT, "group_ends_ptr": INT}


GEMMS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "gate_up fp8": (
        grouped_gemm._gate_up_activation_kernel,
        {"x_ptr": FP8, "w13_ptr": FP8, "out_ptr": FP8, "x_scale_ptr": FP32, "w13_scale_ptr": FP32}
        | {"out_scale_ptr": FP32, "OUT_SCALE": "group", "BLOCK_N": 128}
        | BLOCK_SCALES | SIZES | ACTIVATION | FP8_TILE | SORTED,
        8,
    ),
    "down fp8": (
        grouped_gemm._down_kernel,
        {"x_ptr": FP8, "w2_ptr": FP8, "out_ptr": BF16, "x_scale_ptr": FP32, "w2_scale_ptr": FP32, "BLOCK_N": 256}
        | BLOCK_SCALES | SIZES | FP8_TILE | SORTED,
        8,
    ),
    "gate_up bf16": (
        grouped_gemm._gate_up_activation_kernel,
        {"x_ptr": BF16, "w13_ptr": BF16, "out_ptr": BF16, "bias_ptr": BF16, "OUT_SCALE": "none", "BLOCK_N": 64}
        | NO_SCALES | SIZES | ACTIVATION | BF16_TILE | SORTED,
        4,
    ),
    "gate_up fp8 listed": (
        grouped_gemm._gate_up_activation_kernel,
        {"x_ptr": FP8, "w13_ptr": FP8, "out_ptr": FP8, "x_scale_ptr": FP32, "w13_scale_ptr": FP32}
        | {"out_scale_ptr": FP32, "OUT_SCALE": "group", "BLOCK_N": 128}
        | BLOCK_SCALES | SIZES | ACTIVATION | FP8_TILE | LISTED,
        8,
    ),
    "down bf16": (
        grouped_gemm._down_kernel,
        {"x_ptr": BF16, "w2_ptr": BF16, "out_ptr": BF16, "bias_ptr": BF16, "BLOCK_N": 128}
        | NO_SCALES | SIZES | BF16_TILE | SORTED,
        4,
    ),
}  # fmt: skip
ROUTING: dict[str, tuple[Any, dict[str, Any], int]] = {
    "row_sum": (
        row_sum._row_sum_kernel,
        {"rows_ptr": BF16, "index_ptr": INT, "weights_ptr": FP32, "out_ptr": BF16, "TERMS": 8, "BLOCK_H": 1024},
        4,
    ),
}
CASES = {
    80: ROUTING | {name: case for name, case in GEMMS.items() if "bf16" in name} | {"down fp8": GEMMS["down fp8"]},
    89: {name: case for name, case in GEMMS.items() if "fp8" in name},
    90: ROUTING | GEMMS,
}


def sort_launches() -> dict[str, Launch]:
    """{"sort of N rows, launch i": what the counting sort of N x 8 pairs launches}"""
    launches: dict[str, Launch] = {}
    for num_rows in (64, 512, 8192):
        shapes = counting_sort_shapes(num_rows, 8, 256, 64)
        buffers = {name: torch.empty(shape, dtype=torch.int32) for name, shape in shapes.items()}
        local_ids = torch.empty(num_rows, 8, dtype=torch.int32)
        group_ends = torch.empty(256, dtype=torch.int32)
        for words, ends in (("", None), (" and ends", group_ends)):
            sort = counting_sort.counting_sort_launches(local_ids, 256, 64, **buffers, group_ends=ends)
            launches |= {f"sort{words} of {num_rows} rows, launch {index}": each for index, each in enumerate(sort)}
    return launches


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor that has no memory, for launches that are compiled and not made."""
    return torch.empty(shape, dtype=dtype, device="meta")


X, SLOTS, COUNTS = empty(64, 2880, dtype=torch.bfloat16), empty(64, 8), empty(32)
GATE_UP = empty(4096, 1408, dtype=torch.bfloat16)
ROWS = {"contiguous": ContiguousRows(empty(32), COUNTS, 128), "masked": MaskedRows(COUNTS, 128)}


def row_launches() -> dict[str, Launch]:
    """{"name": what finds masked slots, copies rows and activates them}"""
    found: dict[str, list[Launch]] = {}
    for num_rows in (8, 64):
        ids = SLOTS[:num_rows]
        found[f"masked slots of {num_rows} rows"] = masked_slots.masked_slots_launches(
            ids, 128, slot_of_pair=ids, expert_num_tokens=COUNTS
        )
    lists = {"block_expert": empty(512), "block_row": empty(512), "num_blocks": empty(1)}
    found["contiguous blocks"] = row_blocks.contiguous_blocks_launches(COUNTS, 128, 8, **lists)
    out, inner = empty(4096, 2880, dtype=torch.bfloat16), empty(4096, 704, dtype=torch.bfloat16)
    found["permute_rows copy"] = quantize_rows.permute_rows_launches(X, SLOTS, out)
    for activation in Activation:
        for layout, rows in ROWS.items():
            found[f"{activation.value} {layout}"] = gated_activation_launches(GATE_UP, inner, None, rows, activation)
    return {name: launch for name, (launch,) in found.items()}


def dispatch_launches(dtype: torch.dtype = torch.bfloat16, num_scales: int = 0) -> dict[str, Launch]:
    """{"name": what plans, packs, unpacks and sums rows of `dtype` for four ranks}"""
    placements = {"": ExpertPlacement.linear(8, 4), " of replicas": ExpertPlacement.from_table(8, [range(8)] * 4)}
    tables = {name: send_plan.LookupTables.of(placement.tables("cpu")) for name, placement in placements.items()}
    plan = send_plan.SendPlan(SLOTS, SLOTS, empty(64, 4), empty(5))
    weights, words = empty(256, 8, dtype=torch.float32), empty(256, 20 + num_scales)
    scales = words[:, 20:].view(torch.float32) if num_scales else None
    rows = pack_rows.PackedViews(
        empty(256, 2880, dtype=dtype), words[:, :8], words[:, 8:16].view(torch.float32), words[:, 16:17], scales
    )
    found: dict[str, list[Launch]] = {}
    for name, each in tables.items():
        for num_tokens in (64, 4096):
            ids = empty(num_tokens, 8, dtype=torch.int64)
            found[f"plan of {num_tokens} tokens{name}"] = send_plan.send_plan_launches(ids, each, plan, 1)
    for name, how in {
        "to all": {},
        "to peers": {"own_rank": 1},
        "to self": {"own_rank": 1, "to_self": True},
        "to peers, fixed": {"own_rank": 1, "capacity": 64},
    }.items():
        found[f"pack {dtype} {num_scales} {name}"] = pack_rows.pack_tokens_launches(
            X, weights[:64], plan, rows, plan.position, **how
        )
    ids = empty(256, 8)
    found["unpack"] = pack_rows.unpack_rows_launches(rows, 256, ids, weights)
    found["unpack with flags"] = pack_rows.unpack_rows_launches(rows, 256, ids, weights, COUNTS, sources=4)
    found["row_sum with own rows"] = row_sum.row_sum_launches(X, plan.position, None, X, own_term=1, own_rows=X)
    return {name: launch for name, (launch,) in found.items()}


def fp8_row_launches() -> dict[str, Launch]:
    """{"name": what quantizes rows in any way}"""
    batch = empty(32, 128, 2880, dtype=torch.bfloat16)
    out, inner = empty(4096, 2880, dtype=FP8_DTYPE), empty(4096, 704, dtype=FP8_DTYPE)
    one_scale = empty(64, 1, dtype=torch.float32)
    found = {
        "quantize_rows whole": quantize_rows.quantize_rows_launches(X, out[:64], one_scale),
        "silu_and_mul grouped": gated_activation_launches(
            GATE_UP, inner, empty(6, 4096, dtype=torch.float32), GroupedRows(COUNTS, 128), Activation.SILU_AND_MUL
        ),
        "quantize_rows grouped": quantize_rows.quantize_rows_launches(
            GATE_UP,
            empty(4096, 1408, dtype=FP8_DTYPE),
            empty(11, 4096, dtype=torch.float32).T,
            group_ends=COUNTS,
            alignment=128,
        ),
        "permute_rows quantized": quantize_rows.permute_rows_launches(
            out[:64], SLOTS, out, empty(23, 4096, dtype=torch.float32), x_scales=empty(64, 23, dtype=torch.float32)
        ),
    }
    for form, dtype, groups, inner_groups in (("fp32", torch.float32, 23, 6), ("ue8m0", torch.int32, 6, 2)):
        scales, masked = empty(groups, 4096, dtype=dtype), empty(32, groups, 128, dtype=dtype)
        inner_scales = {
            "contiguous": empty(inner_groups, 4096, dtype=dtype),
            "masked": empty(32, inner_groups, 128, dtype=dtype),
        }
        found |= {
            f"quantize_rows {form}": quantize_rows.quantize_rows_launches(X, out[:64], scales[:, :64].T),
            f"quantize_rows {form} masked": quantize_rows.quantize_rows_launches(
                batch, out.view(batch.shape), masked.mT, expert_num_tokens=COUNTS
            ),
            f"permute_rows {form}": quantize_rows.permute_rows_launches(X, SLOTS, out, scales),
            f"permute_rows {form} masked": quantize_rows.permute_rows_launches(X, SLOTS, out, masked),
        }
        for layout, rows in ROWS.items():
            found[f"silu_and_mul {form} {layout}"] = gated_activation_launches(
                GATE_UP, inner, inner_scales[layout], rows, Activation.SILU_AND_MUL
            )
    return {name: launch for name, (launch,) in found.items()}


def outcome(compile_it: Callable[[], Any]) -> str:
    """What a kernel multiplies with ("wgmma", "mma" or "nothing"), or the error."""
    try:
        ptx = compile_it().asm["ptx"]
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return next((name for name in ("wgmma", "mma") if f"{name}." in ptx), "nothing")


def compile_for(sm: int, kernel: Any, parameters: dict[str, Any], num_warps: int) -> Any:
    """The compiled kernel.

    parameters: types of pointers and values of constants; pointers that are not named are None, the rest are integers.
    """
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        is_pointer = name.endswith("_ptr")
        if name.isupper() or (is_pointer and name not in parameters):
            signature[name] = "constexpr"
            constants[(position,)] = parameters.get(name)
            continue
        signature[name] = parameters[name] if is_pointer else "i32"
        if is_pointer or name.startswith("stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


if __name__ == "__main__":
    launches = sort_launches() | row_launches() | dispatch_launches()
    fp8_launches = fp8_row_launches() | dispatch_launches(FP8_DTYPE, 23) | dispatch_launches(FP8_DTYPE, 1)
    portable = {
        f"{name} {sm}": outcome(functools.partial(compile_for, sm, *case))
        for sm, cases in CASES.items()
        for name, case in cases.items()
    } | {
        f"{name} {sm}": outcome(functools.partial(compile_launch, launch, sm))
        for sm, named in {80: launches, 89: fp8_launches, 90: launches | fp8_launches}.items()
        for name, launch in named.items()
    }
    hopper = {}
    layer = MoEConfig(num_experts=1, top_k=1, hidden_size=64, intermediate_size=64)
    if hopper_verdict(layer, Environment.probe().pretend(sm=90)).ok:
        from tests.kernels.compile_hopper_kernels import CASES as HOPPER_CASES
        from tests.kernels.compile_hopper_kernels import compile_hopper

        hopper = {name: compile_hopper(*case) for name, case in HOPPER_CASES.items()}
    routing = {name: compile_dense_routing(**case) for name, case in ROUTING_CASES.items()}
    gather = {name: compile_routing_gather(**case) for name, case in GATHER_CASES.items()}
    exchange = compile_exchange(bool(hopper))
    found = {"portable": portable, "hopper": hopper, "routing": routing, "routing_gather": gather}
    print(json.dumps(found | {"exchange": exchange}))
