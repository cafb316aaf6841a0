"""Rows in the BatchedExperts format, as made for experts that are measured alone, and `batched+<experts>`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_plugin.bench.batched import BatchedContender, BatchedRows
from moe_plugin.bench.contenders import UnsupportedError
from moe_plugin.bench.experts import Sweep, strategy_contender
from moe_plugin.bench.layers import Inputs, Layer
from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.errors import ConfigError
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import ExpertWeights
from moe_plugin.workspace import WorkspaceArena
from tests.doubles import deep_gemm as double

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")

CPU = torch.device("cpu")
CONFIG = MoEConfig(num_experts=3, top_k=2, hidden_size=128, intermediate_size=128)


def inputs_of(ids: list[list[int]]) -> Inputs:
    """Token t is filled with the number t."""
    rows = torch.arange(float(len(ids))).bfloat16()[:, None].expand(len(ids), 128).contiguous()
    weights = torch.tensor([[0.25, 0.75]]).expand(len(ids), 2)
    return Inputs(rows, torch.tensor(ids, dtype=torch.int32), weights)


def test_rows_of_an_expert_lie_in_the_order_of_tokens() -> None:
    rows = BatchedRows.of(inputs_of([[0, 2], [2, 0], [2, 0]]), num_experts=3, max_tokens=4)
    assert rows.activations.shape == (3, 4, 128)
    assert rows.activations.dtype == torch.bfloat16
    assert (rows.counts.tolist(), rows.counts.dtype) == ([3, 0, 3], torch.int32)
    assert rows.activations[0, :, 0].tolist()[:3] == rows.activations[2, :, 0].tolist()[:3] == [0, 1, 2]
    assert rows.activations[1].isnan().all()
    assert rows.activations[[0, 2], 3].isnan().all()
    assert rows.slot_of_pair.tolist() == [[0, 8], [9, 1], [10, 2]]


def test_room_is_what_the_largest_expert_needs_in_whole_blocks() -> None:
    ids = [[0, 1]] * 129
    assert BatchedRows.of(inputs_of(ids), num_experts=3).activations.shape == (3, 256, 128)
    assert BatchedRows.of(inputs_of(ids[:128]), num_experts=3).activations.shape == (3, 128, 128)


def test_what_comes_back_is_weighted_and_summed_in_fp32() -> None:
    inputs = inputs_of([[0, 2], [2, 0]])
    rows = BatchedRows.of(inputs, num_experts=3, max_tokens=2)
    output = torch.full((3, 2, 128), torch.nan, dtype=torch.bfloat16)
    output[0], output[2] = 4.0, 8.0
    combined = rows.combined(output, inputs)
    assert combined.dtype == torch.float32
    assert combined[:, 0].tolist() == [0.25 * 4 + 0.75 * 8, 0.25 * 8 + 0.75 * 4]


def test_calls_reuse_one_workspace() -> None:
    layer = Layer.random("x", CONFIG, CPU, 0)
    arena = WorkspaceArena(CPU)
    experts = TorchNative(CONFIG, ExpertWeights(**layer.weights))
    rows = BatchedRows.of(inputs_of([[0, 2], [2, 0]]), num_experts=3)
    for _ in range(2):
        rows.call(experts, arena)()
    assert len(arena._free) == 1


@pytest.mark.parametrize(
    ("experts", "config"),
    [
        ("torch_native", CONFIG),
        ("torch_native", replace(CONFIG, quantization=Fp8Block())),
        pytest.param("triton_fused_moe", CONFIG, marks=interpreter),
        pytest.param("deep_gemm_hybrid", CONFIG, marks=interpreter),
        pytest.param("deep_gemm_hybrid", replace(CONFIG, quantization=Fp8Block()), marks=interpreter),
    ],
    ids=lambda value: value if isinstance(value, str) else value.quantization.name if value.quantization else "bf16",
)
def test_the_experts_alone_compute_the_layer(experts: str, config: MoEConfig) -> None:
    layer, inputs = Layer.random("x", config, CPU, 0), Inputs.random(config, 4, "zipf", CPU, 1)
    with double.installed() if experts == "deep_gemm_hybrid" else nullcontext():
        contender = strategy_contender(f"batched+{experts}")
        assert (contender.name, contender.role) == (f"batched+{experts}", "strategy")
        job = contender.prepare(layer, 4).bind(inputs)
        output = job.run()
    assert output.shape == (3, 128, 128)
    assert job.check(output).ok
    assert not job.check(output * 1.05).ok
    first = int(inputs.topk_ids[0, 0])
    output[first, 0] = torch.nan
    assert not job.check(output).ok


@pytest.mark.parametrize("name", ["batched+", "batched+trition_fused_moe", "batched+standard_only"])
def test_a_name_that_takes_no_such_rows_is_an_error_that_lists_those_that_do(name: str) -> None:
    from moe_plugin.modular_kernel import ActivationFormat
    from moe_plugin.strategies.registry import experts_classes, register_experts

    class StandardOnly(TorchNative):
        name = "standard_only"
        activation_formats = frozenset({ActivationFormat.STANDARD})

    register_experts(StandardOnly)
    try:
        with pytest.raises(ConfigError) as caught:
            BatchedContender(name)
        with pytest.raises(ConfigError):
            Sweep(layers=("2,1,128,128",), tokens=(1,), strategies=(name,), device="cpu")
    finally:
        experts_classes.unregister("standard_only")
    message = str(caught.value)
    assert message.startswith(f"{name!r}: BatchedExperts is taken by ")
    for known in ("batched+torch_native", "batched+triton_fused_moe", "batched+deep_gemm_hybrid"):
        assert known in message
    assert "standard_only" not in message.partition(":")[2]


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({"dtype": torch.float16}, "dtype: needs one of bfloat16, saw float16"),
        ({"hidden_size": 96}, "sizes: needs multiples of 64, .*, saw H 96"),
    ],
)
def test_a_gate_is_a_refusal_that_names_itself(changes: dict[str, Any], gate: str) -> None:
    layer = Layer.random("x", replace(CONFIG, **changes), CPU, 0)
    with double.installed(), pytest.raises(UnsupportedError, match=f"^deep_gemm_hybrid: .*{gate}"):
        BatchedContender("batched+deep_gemm_hybrid").prepare(layer, 4)
