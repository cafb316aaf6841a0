"""Compiles kernels for GPUs that need not be there; prints what became of them as JSON.

    {"portable": {"kernel sm": see outcome}, "hopper": {"kernel": see compile_hopper}}

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

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.kernels import counting_sort, grouped_gemm, quantize_rows, row_sum
from moe_plugin.kernels.hopper_tiling import hopper_verdict
from moe_plugin.kernels.launcher import Launch
from moe_plugin.kernels.tiling import counting_sort_shapes
from tests.kernels.compile_launch import compile_launch

FP8, BF16, FP32, INT = "*fp8e4nv", "*bf16", "*fp32", "*i32"
BLOCK_SCALES = {"ROW_SCALE": "group", "WEIGHT_SCALE": "block"}
NO_SCALES = {"ROW_SCALE": "none", "WEIGHT_SCALE": "none"}
SIZES = {"HIDDEN_SIZE": 2880, "INTERMEDIATE_SIZE": 704, "BATCHED": False}
ACTIVATION = {"ACTIVATION": "silu_and_mul", "SWIGLU_ALPHA": 1.702, "SWIGLU_LIMIT": 7.0, "TOP_K": 8}
FP8_TILE = {"BLOCK_M": 64, "BLOCK_K": 128, "GROUP_M": 8}
BF16_TILE = {"BLOCK_M": 16, "BLOCK_K": 64, "GROUP_M": 8}
SORTED = {"sorted_pairs_ptr": INT, "expert_ptr": INT}


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
    "down bf16": (
        grouped_gemm._down_kernel,
        {"x_ptr": BF16, "w2_ptr": BF16, "out_ptr": BF16, "bias_ptr": BF16, "BLOCK_N": 128}
        | NO_SCALES | SIZES | BF16_TILE | SORTED,
        4,
    ),
}  # fmt: skip
QUANTIZATION: dict[str, tuple[Any, dict[str, Any], int]] = {
    "quantize_rows": (
        quantize_rows._quantize_rows_kernel,
        {"x_ptr": BF16, "out_ptr": FP8, "scales_ptr": FP32, "TOP_K": 1, "GROUPS": 1, "GROUP": 8192},
        8,
    ),
    "permute_rows": (
        quantize_rows._quantize_rows_kernel,
        {"x_ptr": BF16, "out_ptr": FP8, "scales_ptr": FP32, "slot_of_pair_ptr": INT}
        | {"TOP_K": 8, "GROUPS": 8, "GROUP": 128},
        2,
    ),
}
ROUTING: dict[str, tuple[Any, dict[str, Any], int]] = {
    "permute_rows copy": (
        quantize_rows._quantize_rows_kernel,
        {"x_ptr": BF16, "out_ptr": BF16, "slot_of_pair_ptr": INT, "TOP_K": 8, "GROUPS": 8, "GROUP": 128},
        2,
    ),
    "row_sum": (
        row_sum._row_sum_kernel,
        {"rows_ptr": BF16, "index_ptr": INT, "weights_ptr": FP32, "out_ptr": BF16, "TERMS": 8, "BLOCK_H": 1024},
        4,
    ),
}
CASES = {
    80: ROUTING | {name: case for name, case in GEMMS.items() if "bf16" in name} | {"down fp8": GEMMS["down fp8"]},
    89: QUANTIZATION | {name: case for name, case in GEMMS.items() if "fp8" in name},
    90: QUANTIZATION | ROUTING | GEMMS,
}


def sort_launches() -> dict[str, Launch]:
    """{"sort of N rows, launch i": what the counting sort of N x 8 pairs launches}"""
    launches: dict[str, Launch] = {}
    for num_rows in (64, 512, 8192):
        shapes = counting_sort_shapes(num_rows, 8, 256, 64)
        buffers = {name: torch.empty(shape, dtype=torch.int32) for name, shape in shapes.items()}
        local_ids = torch.empty(num_rows, 8, dtype=torch.int32)
        for index, launch in enumerate(counting_sort.counting_sort_launches(local_ids, 256, 64, **buffers)):
            launches[f"sort of {num_rows} rows, launch {index}"] = launch
    return launches


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
    portable = {
        f"{name} {sm}": outcome(functools.partial(compile_for, sm, *case))
        for sm, cases in CASES.items()
        for name, case in cases.items()
    } | {
        f"{name} {sm}": outcome(functools.partial(compile_launch, launch, sm))
        for sm in (80, 90)
        for name, launch in sort_launches().items()
    }
    hopper = {}
    layer = MoEConfig(num_experts=1, top_k=1, hidden_size=64, intermediate_size=64)
    if hopper_verdict(layer, Environment.probe().pretend(sm=90)).ok:
        from tests.kernels.compile_hopper_kernels import CASES as HOPPER_CASES
        from tests.kernels.compile_hopper_kernels import compile_hopper

        hopper = {name: compile_hopper(*case) for name, case in HOPPER_CASES.items()}
    print(json.dumps({"portable": portable, "hopper": hopper}))
