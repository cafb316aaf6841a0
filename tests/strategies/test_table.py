"""What every built-in strategy answers on every kind of machine, written out.

A cell is "available", "explicit only", or the gates that refuse the strategy. A gate that suddenly refuses everything,
or nothing any more, changes a cell. A row has cells for `local` and for dispatched experts; those hold behind either
dispatcher, but that `auto` takes hybrid_dense_routing where its NVLink kernels run alone. None of these machines has
DeepEP; strategies over it are refused on all of them, and stand in a table of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_plugin.config import SUPPORTED_DTYPES, Fp8Block, Fp8PerTensor, Fp8PerToken
from moe_plugin.environment import Environment, Package
from moe_plugin.strategies.selector import explain, survey
from tests.strategies.machines import (
    CPU,
    DEEP_EP,
    DEEP_EP_STRATEGIES,
    DEEP_GEMM,
    INTERPRETER,
    MEASURED,
    TRITON,
    WITH_DEEP_EP,
    deep_gemm_with,
    gpu,
    layer_config,
)

STRATEGIES = (
    "local+deep_gemm_hybrid",
    "local+triton_fused_moe",
    "local+torch_native",
    "hybrid_dense_routing+deep_gemm_hybrid",
    "hybrid_dense_routing+triton_fused_moe",
    "hybrid_dense_routing+torch_native",
    "nccl_all_to_all+deep_gemm_hybrid",
    "nccl_all_to_all+triton_fused_moe",
    "nccl_all_to_all+torch_native",
)
YES, ASKED = "available", "explicit only"
BACKEND = "torch.distributed backend"
NO_DEEP_GEMM = "deep_gemm symbols sm jit compiler"
# DeepGEMM is for `auto` where a layout table says so, and most of these machines have none.
ALL = (ASKED, YES, YES, ASKED, YES, YES)
GRAPH_REFUSES_TORCH = (ASKED, YES, "cuda_graph", ASKED, YES, "cuda_graph")
NO_EP = ("ep_size", "ep_size", "ep_size", ASKED, YES, YES)


def no_deep_gemm(gates: str, others: tuple[str, ...] = ALL) -> tuple[str, ...]:
    """`others` where these gates refuse deep_gemm_hybrid, beside those that refuse its dispatch."""
    return tuple(
        (gates if each in (YES, ASKED) else f"{each} {gates}") if "deep_gemm" in strategy else each
        for strategy, each in zip((*STRATEGIES[:3], *STRATEGIES[6:]), others, strict=True)
    )


WITHOUT_TRITON = {"deep_gemm": DEEP_GEMM}
BROKEN_TRITON = {"triton": Package("triton", "3.1.0", "too old"), "deep_gemm": DEEP_GEMM}
NO_TRITON = ("triton", "triton", YES, "triton", "triton", YES)
WHOLE_GROUPS = {"quantization": Fp8Block(), "hidden_size": 128}
CPU_TORCH = (NO_DEEP_GEMM, "device", YES, NO_DEEP_GEMM, "device", YES)
INTERPRETED = (NO_DEEP_GEMM, ASKED, YES, NO_DEEP_GEMM, ASKED, YES)
DOUBLE = INTERPRETER.pretend(packages=deep_gemm_with("bf16", "fp8", "psum", "cpu"))

TABLE: dict[str, tuple[Environment, dict[str, Any], tuple[str, ...], str | None]] = {
    "sm80": (gpu(80), {}, no_deep_gemm("sm"), STRATEGIES[1]),
    "sm89": (gpu(89), {}, no_deep_gemm("sm"), STRATEGIES[1]),
    "sm90": (gpu(90), {}, ALL, STRATEGIES[1]),
    "sm100": (gpu(100), {}, ALL, STRATEGIES[1]),
    "sm75": (gpu(75), {}, ("sm", "sm", YES, "sm", "sm", YES), STRATEGIES[2]),
    "sm90 fp16": (gpu(90), {"dtype": torch.float16}, no_deep_gemm("dtype"), STRATEGIES[1]),
    "sm90 fp32": (gpu(90), {"dtype": torch.float32}, no_deep_gemm("dtype"), STRATEGIES[1]),
    "sm80 graph": (gpu(80), {"cuda_graph": True}, no_deep_gemm("sm", GRAPH_REFUSES_TORCH), STRATEGIES[1]),
    "sm89 graph": (gpu(89), {"cuda_graph": True}, no_deep_gemm("sm", GRAPH_REFUSES_TORCH), STRATEGIES[1]),
    "sm90 graph": (gpu(90), {"cuda_graph": True}, ALL, STRATEGIES[1]),
    "sm100 graph": (gpu(100), {"cuda_graph": True}, ALL, STRATEGIES[1]),
    "sm120 graph": (gpu(120), {"cuda_graph": True}, no_deep_gemm("sm", GRAPH_REFUSES_TORCH), STRATEGIES[1]),
    "sm90 graph fp16": (
        gpu(90),
        {"cuda_graph": True, "dtype": torch.float16},
        no_deep_gemm("dtype", GRAPH_REFUSES_TORCH),
        STRATEGIES[1],
    ),
    "sm90 graph fp32": (
        gpu(90),
        {"cuda_graph": True, "dtype": torch.float32},
        no_deep_gemm("dtype", GRAPH_REFUSES_TORCH),
        STRATEGIES[1],
    ),
    "sm90 graph odd H": (
        gpu(90),
        {"cuda_graph": True, "hidden_size": 100},
        no_deep_gemm("sizes", GRAPH_REFUSES_TORCH),
        STRATEGIES[1],
    ),
    "sm90 graph odd I of a TP rank": (
        gpu(90),
        {"cuda_graph": True, "intermediate_size": 24, "tp_size": 2},
        no_deep_gemm("sizes", GRAPH_REFUSES_TORCH),
        STRATEGIES[1],
    ),
    "sm90 EP 2": (gpu(90), {"ep_size": 2}, NO_EP, STRATEGIES[4]),
    "sm90 EP 8": (gpu(90), {"ep_size": 8}, NO_EP, STRATEGIES[4]),
    "sm90 EP 3, not a divisor of E": (gpu(90), {"ep_size": 3}, NO_EP, STRATEGIES[4]),
    "sm90 EP 8 without peer access": (gpu(90, peer_access=False), {"ep_size": 8}, NO_EP, STRATEGIES[7]),
    "sm90 TP 2": (gpu(90), {"tp_size": 2}, ALL, STRATEGIES[1]),
    "sm90 EP 4 TP 2": (gpu(90), {"ep_size": 4, "tp_size": 2}, NO_EP, STRATEGIES[4]),
    "sm80 EP 8 graph": (
        gpu(80),
        {"ep_size": 8, "cuda_graph": True},
        ("ep_size sm", "ep_size", "ep_size cuda_graph", "sm", YES, "cuda_graph"),
        STRATEGIES[4],
    ),
    "sm90 without NCCL": (gpu(90, backends=("gloo",)), {}, (ASKED, YES, YES, BACKEND, BACKEND, BACKEND), STRATEGIES[1]),
    "sm90 EP 8 without NCCL": (
        gpu(90, backends=()),
        {"ep_size": 8},
        ("ep_size", "ep_size", "ep_size", BACKEND, BACKEND, BACKEND),
        None,
    ),
    "sm90 without Triton": (gpu(90, packages=WITHOUT_TRITON), {}, NO_TRITON, STRATEGIES[2]),
    "sm90 with Triton too old": (gpu(90, packages=BROKEN_TRITON), {}, NO_TRITON, STRATEGIES[2]),
    "sm90 with torch too old": (
        gpu(90, torch_version="2.7.1"),
        {},
        (ASKED, YES, "torch", ASKED, YES, "torch"),
        STRATEGIES[1],
    ),
    "sm90 fp8 block": (gpu(90), WHOLE_GROUPS, ALL, STRATEGIES[1]),
    "sm90 fp8 block, H of half a group": (gpu(90), {"quantization": Fp8Block()}, no_deep_gemm("sizes"), STRATEGIES[1]),
    "sm90 fp8 per tensor": (
        gpu(90),
        {"quantization": Fp8PerTensor()},
        no_deep_gemm("quantization sizes"),
        STRATEGIES[1],
    ),
    "sm100 fp8 per token": (
        gpu(100),
        {"quantization": Fp8PerToken()},
        no_deep_gemm("quantization sizes"),
        STRATEGIES[1],
    ),
    "sm89 fp8 block": (gpu(89), WHOLE_GROUPS, no_deep_gemm("sm"), STRATEGIES[1]),
    "sm100 fp8 block": (gpu(100), WHOLE_GROUPS, ALL, STRATEGIES[1]),
    "sm80 fp8 block": (gpu(80), WHOLE_GROUPS, ("sm", "sm", YES, "sm", "sm", YES), STRATEGIES[2]),
    "sm90 fp8 in other tiles": (
        gpu(90),
        {"quantization": Fp8Block(64, 128), "hidden_size": 128},
        ("quantization",) * 6,
        None,
    ),
    "sm90 fp8 graph": (
        gpu(90),
        WHOLE_GROUPS | {"cuda_graph": True},
        GRAPH_REFUSES_TORCH,
        STRATEGIES[1],
    ),
    "sm90 fp8 block EP 8": (
        gpu(90),
        WHOLE_GROUPS | {"ep_size": 8},
        NO_EP,
        STRATEGIES[4],
    ),
    "cpu fp8 block": (
        CPU,
        WHOLE_GROUPS,
        CPU_TORCH,
        STRATEGIES[2],
    ),
    "cpu": (CPU, {}, CPU_TORCH, STRATEGIES[2]),
    "cpu fp32": (
        CPU,
        {"dtype": torch.float32},
        no_deep_gemm(f"dtype {NO_DEEP_GEMM}", (YES, *CPU_TORCH[1:3]) * 2),
        STRATEGIES[2],
    ),
    "cpu EP 2": (
        CPU,
        {"ep_size": 2},
        (f"ep_size {NO_DEEP_GEMM}", "ep_size device", "ep_size", *CPU_TORCH[3:]),
        STRATEGIES[8],
    ),
    "cpu EP 2 without gloo": (
        CPU.pretend(backends=("nccl",)),
        {"ep_size": 2},
        no_deep_gemm(NO_DEEP_GEMM, ("ep_size", "ep_size device", "ep_size", BACKEND, f"{BACKEND} device", BACKEND)),
        None,
    ),
    "cpu without Triton": (
        CPU.pretend(packages={}),
        {},
        (f"{NO_DEEP_GEMM} triton", "triton device", YES) * 2,
        STRATEGIES[2],
    ),
    "cpu graph": (CPU, {"cuda_graph": True}, (NO_DEEP_GEMM, "device", "cuda_graph") * 2, None),
    "interpreter": (INTERPRETER, {}, INTERPRETED, STRATEGIES[2]),
    "interpreter EP 2": (
        INTERPRETER,
        {"ep_size": 2},
        (f"ep_size {NO_DEEP_GEMM}", "ep_size", "ep_size", *INTERPRETED[3:]),
        STRATEGIES[8],
    ),
    "interpreter graph": (
        INTERPRETER,
        {"cuda_graph": True},
        (NO_DEEP_GEMM, ASKED, "cuda_graph") * 2,
        None,
    ),
    "measured": (gpu(90, device_name=MEASURED), {}, (YES,) * 6, STRATEGIES[0]),
    "measured graph": (
        gpu(90, device_name=MEASURED),
        {"cuda_graph": True},
        (YES,) * 6,
        STRATEGIES[0],
    ),
    "measured EP 2": (gpu(90, device_name=MEASURED), {"ep_size": 2}, ("ep_size",) * 3 + (YES,) * 3, STRATEGIES[3]),
    "measured, another layer": (gpu(90, device_name=MEASURED), {"top_k": 2}, ALL, STRATEGIES[1]),
    "measured, but DeepGEMM is gone": (
        gpu(90, device_name=MEASURED, packages=TRITON),
        {},
        no_deep_gemm("deep_gemm symbols"),
        STRATEGIES[1],
    ),
    "sm90 without nvcc": (gpu(90, nvcc=False), {}, no_deep_gemm("jit compiler"), STRATEGIES[1]),
    "sm90 with fp8 symbols only": (
        gpu(90, packages=deep_gemm_with("fp8", "psum")),
        {},
        no_deep_gemm("symbols"),
        STRATEGIES[1],
    ),
    "sm90 fp8 with bf16 symbols only": (
        gpu(90, packages=deep_gemm_with("bf16")),
        WHOLE_GROUPS,
        no_deep_gemm("symbols"),
        STRATEGIES[1],
    ),
    "sm90 biases": (gpu(90), {"has_bias": True}, no_deep_gemm("has_bias"), STRATEGIES[1]),
    "interpreter and DeepGEMM's double": (DOUBLE, {}, (ASKED, ASKED, YES) * 2, STRATEGIES[2]),
    "DeepGEMM's double without the interpreter": (
        DOUBLE.pretend(triton_interpret=False),
        {},
        ("sm jit compiler", "device", YES) * 2,
        STRATEGIES[2],
    ),
}


WITHOUT_NVLINK = {"sm75", "sm90 without Triton", "sm90 with Triton too old", "sm90 EP 8 without peer access"}
"""Of the rows with GPUs."""


def cells(name: str) -> tuple[str, ...]:
    """A row of the table, hybrid_dense_routing in the middle."""
    environment, _, expected, _ = TABLE[name]
    kernels = environment.device_type == "cuda" and name not in WITHOUT_NVLINK
    hybrid = (ASKED if each == YES and not kernels else each for each in expected[3:])
    return *expected[:3], *hybrid, *expected[3:]


@pytest.mark.parametrize("name", TABLE)
def test_standing(name: str) -> None:
    environment, layer, _, choice = TABLE[name]
    config = layer_config(**layer)
    seen = {
        entry.strategy: " ".join(gate.name for gate in entry.verdict.failed) or entry.standing()
        for entry in survey(config, environment)
    }
    over_deep_ep = [seen.pop(strategy) for strategy in DEEP_EP_STRATEGIES]
    assert all("deep_ep" in gates.split() for gates in over_deep_ep)
    assert seen == dict(zip(STRATEGIES, cells(name), strict=True))
    assert explain(config, "auto", environment).chosen["decode"] == choice


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
@pytest.mark.parametrize("ep_size", [1, 8])
def test_what_may_be_captured_does_not_wait_for_the_host(sm: int, dtype: torch.dtype, ep_size: int) -> None:
    entries = survey(layer_config(ep_size, dtype=dtype, cuda_graph=True), gpu(sm))
    captured = {entry.strategy: entry.host_syncs for entry in entries if entry.runs}
    assert captured
    assert set(captured.values()) == {0}


@pytest.mark.parametrize(
    ("sm", "expected"),
    [(80, (0, 0, 1, 0, 0, 1, 1, 1, 2)), (90, (0, 0, 0) * 2 + (1, 1, 1)), (100, (0, 0, 0) * 2 + (1, 1, 1))],
)
def test_host_synchronizations_of_an_eager_call(sm: int, expected: tuple[int, ...]) -> None:
    seen = {entry.strategy: entry.host_syncs for entry in survey(layer_config(), gpu(sm))}
    assert [seen[strategy] for strategy in STRATEGIES] == list(expected)


DEEP_EP_LAYER: dict[str, Any] = {"ep_size": 8, "hidden_size": 2048, "max_tokens_per_rank": 256}
DEEP_EP_TABLE: dict[str, tuple[Environment, dict[str, Any], tuple[str, ...]]] = {
    "sm90": (gpu(90, packages=WITH_DEEP_EP), {}, (ASKED,) * 6),
    "sm100 fp8 block": (gpu(100, packages=WITH_DEEP_EP), {"quantization": Fp8Block()}, (ASKED,) * 6),
    "sm80": (
        gpu(80, packages=WITH_DEEP_EP),
        {},
        ("sm", ASKED, ASKED, "sm sm", "sm", "sm"),
    ),
    "sm90 graph": (gpu(90, packages=WITH_DEEP_EP), {"cuda_graph": True}, (ASKED,) * 6),
    "sm90, H of no kernel": (
        gpu(90, packages=WITH_DEEP_EP),
        {"hidden_size": 1024},
        (ASKED,) * 3 + ("hidden_size",) * 3,
    ),
    "sm90 fp16": (
        gpu(90, packages=WITH_DEEP_EP),
        {"dtype": torch.float16},
        ("dtype dtype", "dtype", "dtype") * 2,
    ),
    "sm90 one rank": (gpu(90, packages=WITH_DEEP_EP), {"ep_size": 1}, ("ep_size",) * 6),
    "sm90 V2 alone": (
        gpu(90, packages=TRITON | {"deep_gemm": DEEP_GEMM, "deep_ep": replace(DEEP_EP, features=frozenset({"rdma"}))}),
        {},
        ("Buffer",) * 3 + ("low_latency",) * 3,
    ),
}


@pytest.mark.parametrize("name", DEEP_EP_TABLE)
def test_standing_with_deep_ep(name: str) -> None:
    environment, layer, expected = DEEP_EP_TABLE[name]
    seen = {
        entry.strategy: " ".join(gate.name for gate in entry.verdict.failed) or entry.standing()
        for entry in survey(layer_config(**DEEP_EP_LAYER | layer), environment)
    }
    assert [seen[strategy] for strategy in DEEP_EP_STRATEGIES] == list(expected)


def test_every_strategy_is_available_somewhere_and_refused_somewhere() -> None:
    for column in range(len(STRATEGIES)):
        standings = {cells(name)[column] for name in TABLE}
        assert YES in standings
        assert standings - {YES, ASKED}
