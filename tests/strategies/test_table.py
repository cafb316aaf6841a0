"""What every built-in strategy answers on every kind of machine, written out.

A cell is "available", "explicit only", or the gates that refuse the strategy. A gate that suddenly refuses everything,
or nothing any more, changes a cell.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_plugin.config import SUPPORTED_DTYPES, Fp8Block, Fp8PerTensor, Fp8PerToken
from moe_plugin.environment import Environment, Package
from moe_plugin.strategies.selector import explain, survey
from tests.strategies.machines import CPU, INTERPRETER, gpu, layer_config

STRATEGIES = (
    "local+triton_fused_moe",
    "local+torch_native",
    "nccl_all_to_all+triton_fused_moe",
    "nccl_all_to_all+torch_native",
)
YES, ASKED = "available", "explicit only"
BACKEND = "torch.distributed backend"
ALL = (YES, YES, YES, YES)
GRAPH_REFUSES_TORCH = (YES, "cuda_graph", YES, "cuda_graph")
NO_EP = ("ep_size", "ep_size", YES, YES)

BROKEN_TRITON = {"triton": Package("triton", "3.1.0", "too old")}

TABLE: dict[str, tuple[Environment, dict[str, Any], tuple[str, ...], str | None]] = {
    "sm80": (gpu(80), {}, ALL, STRATEGIES[0]),
    "sm89": (gpu(89), {}, ALL, STRATEGIES[0]),
    "sm90": (gpu(90), {}, ALL, STRATEGIES[0]),
    "sm100": (gpu(100), {}, ALL, STRATEGIES[0]),
    "sm75": (gpu(75), {}, ("sm", YES, "sm", YES), STRATEGIES[1]),
    "sm90 fp16": (gpu(90), {"dtype": torch.float16}, ALL, STRATEGIES[0]),
    "sm90 fp32": (gpu(90), {"dtype": torch.float32}, ALL, STRATEGIES[0]),
    "sm80 graph": (gpu(80), {"cuda_graph": True}, GRAPH_REFUSES_TORCH, STRATEGIES[0]),
    "sm89 graph": (gpu(89), {"cuda_graph": True}, GRAPH_REFUSES_TORCH, STRATEGIES[0]),
    "sm90 graph": (gpu(90), {"cuda_graph": True}, ALL, STRATEGIES[0]),
    "sm100 graph": (gpu(100), {"cuda_graph": True}, ALL, STRATEGIES[0]),
    "sm120 graph": (gpu(120), {"cuda_graph": True}, GRAPH_REFUSES_TORCH, STRATEGIES[0]),
    "sm90 graph fp16": (gpu(90), {"cuda_graph": True, "dtype": torch.float16}, GRAPH_REFUSES_TORCH, STRATEGIES[0]),
    "sm90 graph fp32": (gpu(90), {"cuda_graph": True, "dtype": torch.float32}, GRAPH_REFUSES_TORCH, STRATEGIES[0]),
    "sm90 graph odd H": (gpu(90), {"cuda_graph": True, "hidden_size": 100}, GRAPH_REFUSES_TORCH, STRATEGIES[0]),
    "sm90 graph odd I of a TP rank": (
        gpu(90),
        {"cuda_graph": True, "intermediate_size": 24, "tp_size": 2},
        GRAPH_REFUSES_TORCH,
        STRATEGIES[0],
    ),
    "sm90 EP 2": (gpu(90), {"ep_size": 2}, NO_EP, STRATEGIES[2]),
    "sm90 EP 8": (gpu(90), {"ep_size": 8}, NO_EP, STRATEGIES[2]),
    "sm90 EP 3, not a divisor of E": (gpu(90), {"ep_size": 3}, NO_EP, STRATEGIES[2]),
    "sm90 TP 2": (gpu(90), {"tp_size": 2}, ALL, STRATEGIES[0]),
    "sm90 EP 4 TP 2": (gpu(90), {"ep_size": 4, "tp_size": 2}, NO_EP, STRATEGIES[2]),
    "sm80 EP 8 graph": (
        gpu(80),
        {"ep_size": 8, "cuda_graph": True},
        ("ep_size", "ep_size cuda_graph", YES, "cuda_graph"),
        STRATEGIES[2],
    ),
    "sm90 without NCCL": (gpu(90, backends=("gloo",)), {}, (YES, YES, BACKEND, BACKEND), STRATEGIES[0]),
    "sm90 EP 8 without NCCL": (
        gpu(90, backends=()),
        {"ep_size": 8},
        ("ep_size", "ep_size", BACKEND, BACKEND),
        None,
    ),
    "sm90 without Triton": (gpu(90, packages={}), {}, ("triton", YES, "triton", YES), STRATEGIES[1]),
    "sm90 with Triton too old": (gpu(90, packages=BROKEN_TRITON), {}, ("triton", YES, "triton", YES), STRATEGIES[1]),
    "sm90 with torch too old": (gpu(90, torch_version="2.7.1"), {}, (YES, "torch", YES, "torch"), STRATEGIES[0]),
    "sm90 fp8 block": (gpu(90), {"quantization": Fp8Block()}, ALL, STRATEGIES[0]),
    "sm90 fp8 per tensor": (gpu(90), {"quantization": Fp8PerTensor()}, ALL, STRATEGIES[0]),
    "sm100 fp8 per token": (gpu(100), {"quantization": Fp8PerToken()}, ALL, STRATEGIES[0]),
    "sm89 fp8 block": (gpu(89), {"quantization": Fp8Block()}, ALL, STRATEGIES[0]),
    "sm80 fp8 block": (gpu(80), {"quantization": Fp8Block()}, ("sm", YES, "sm", YES), STRATEGIES[1]),
    "sm90 fp8 in other tiles": (gpu(90), {"quantization": Fp8Block(64, 128)}, ("quantization",) * 4, None),
    "sm90 fp8 graph": (
        gpu(90),
        {"quantization": Fp8Block(), "cuda_graph": True},
        GRAPH_REFUSES_TORCH,
        STRATEGIES[0],
    ),
    "sm90 fp8 block EP 8": (
        gpu(90),
        {"quantization": Fp8Block(), "ep_size": 8},
        NO_EP,
        STRATEGIES[2],
    ),
    "cpu fp8 block": (
        CPU,
        {"quantization": Fp8Block()},
        ("device", YES, "device", YES),
        STRATEGIES[1],
    ),
    "cpu": (CPU, {}, ("device", YES, "device", YES), STRATEGIES[1]),
    "cpu fp32": (CPU, {"dtype": torch.float32}, ("device", YES, "device", YES), STRATEGIES[1]),
    "cpu EP 2": (CPU, {"ep_size": 2}, ("ep_size device", "ep_size", "device", YES), STRATEGIES[3]),
    "cpu EP 2 without gloo": (
        CPU.pretend(backends=("nccl",)),
        {"ep_size": 2},
        ("ep_size device", "ep_size", f"{BACKEND} device", BACKEND),
        None,
    ),
    "cpu without Triton": (CPU.pretend(packages={}), {}, ("triton device", YES, "triton device", YES), STRATEGIES[1]),
    "cpu graph": (CPU, {"cuda_graph": True}, ("device", "cuda_graph", "device", "cuda_graph"), None),
    "interpreter": (INTERPRETER, {}, (ASKED, YES, ASKED, YES), STRATEGIES[1]),
    "interpreter EP 2": (INTERPRETER, {"ep_size": 2}, ("ep_size", "ep_size", ASKED, YES), STRATEGIES[3]),
    "interpreter graph": (INTERPRETER, {"cuda_graph": True}, (ASKED, "cuda_graph", ASKED, "cuda_graph"), None),
}


@pytest.mark.parametrize(("environment", "layer", "expected", "choice"), TABLE.values(), ids=TABLE)
def test_standing(
    environment: Environment, layer: dict[str, Any], expected: tuple[str, ...], choice: str | None
) -> None:
    config = layer_config(**layer)
    seen = {
        entry.strategy: " ".join(gate.name for gate in entry.verdict.failed) or entry.standing()
        for entry in survey(config, environment)
    }
    assert seen == dict(zip(STRATEGIES, expected, strict=True))
    assert explain(config, "auto", environment).chosen["decode"] == choice


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
@pytest.mark.parametrize("ep_size", [1, 8])
def test_what_may_be_captured_does_not_wait_for_the_host(sm: int, dtype: torch.dtype, ep_size: int) -> None:
    entries = survey(layer_config(ep_size, dtype=dtype, cuda_graph=True), gpu(sm))
    captured = {entry.strategy: entry.host_syncs for entry in entries if entry.runs}
    assert captured
    assert set(captured.values()) == {0}


@pytest.mark.parametrize(("sm", "expected"), [(80, (0, 1, 1, 2)), (90, (0, 0, 1, 1)), (100, (0, 0, 1, 1))])
def test_host_synchronizations_of_an_eager_call(sm: int, expected: tuple[int, ...]) -> None:
    seen = {entry.strategy: entry.host_syncs for entry in survey(layer_config(), gpu(sm))}
    assert seen == dict(zip(STRATEGIES, expected, strict=True))


def test_every_strategy_is_available_somewhere_and_refused_somewhere() -> None:
    for column in range(len(STRATEGIES)):
        standings = {row[2][column] for row in TABLE.values()}
        assert YES in standings
        assert standings - {YES, ASKED}
