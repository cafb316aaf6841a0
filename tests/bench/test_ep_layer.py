"""Layers over several ranks: every expert follows from the seed, the slowest rank counts, lost ranks are replaced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from moe_plugin.bench import ep_layer, summary
from moe_plugin.bench.contenders import Accuracy, StrategyContender, UnsupportedError
from moe_plugin.bench.ep_layer import Entrant, LayerSweep, Outcome, Place, of_all_ranks, run_layer_sweep
from moe_plugin.bench.layers import Inputs, Layer
from moe_plugin.bench.mega_kernel import DeepGemmMega
from moe_plugin.bench.ranks import Ranks
from moe_plugin.bench.results import FAILED, OK, UNSUPPORTED, WRONG, Ceilings, Run
from moe_plugin.cli import app
from moe_plugin.config import Activation, Fp8Block, MoEConfig, ParallelConfig
from moe_plugin.errors import ConfigError, UnknownStrategyError
from moe_plugin.numerics import Tolerance
from moe_plugin.testing.rank_pool import RankContext
from tests.bench.runs import cell, failed, measured, run

CPU = torch.device("cpu")
OURS = "nccl_all_to_all+torch_native"
CEILINGS = Ceilings(copy_bytes_per_second=1e10, matmul_flops={"bf16": 1e11})
LIMIT = Tolerance(frobenius=1e-2, row=2e-2)
SWEEP: dict[str, Any] = {"layers": ("5,2,128,128",), "tokens": (3,), "strategies": (OURS,), "time_budget": 0.01}


def config_of(rank: int, **changes: Any) -> MoEConfig:
    parallel = ParallelConfig(ep_size=2, ep_rank=rank)
    fields: dict[str, Any] = {"num_experts": 5, "top_k": 2, "hidden_size": 128, "intermediate_size": 128}
    return MoEConfig(**(fields | {"parallel": parallel, "quantization": Fp8Block()} | changes))


def test_every_rank_can_make_the_experts_of_the_others() -> None:
    first, second = (Layer.random("x", config_of(rank), CPU, 7) for rank in range(2))
    assert (len(first.w13), len(second.w13)) == (3, 2)
    whole = Layer.random("x", replace(config_of(0), parallel=ParallelConfig(), placement=None), CPU, 7)
    for expert in range(5):
        for name, tensor in whole.expert(expert).items():
            assert torch.equal(tensor.float(), first.expert(expert)[name].float()), name
            assert torch.equal(tensor.float(), second.expert(expert)[name].float()), name
    assert not torch.equal(whole.w13[0].float(), whole.w13[1].float())
    other = Layer.random("x", config_of(0), CPU, 8)
    assert not torch.equal(other.w13.float(), first.w13.float())


def test_ranks_share_a_routing_and_have_tokens_of_their_own() -> None:
    first, second = (Inputs.random(config_of(rank), 4, "zipf", CPU, 3) for rank in range(2))
    assert first.routing is not None
    assert second.routing is not None
    assert torch.equal(first.routing, second.routing)
    assert torch.equal(torch.stack([first.topk_ids, second.topk_ids]), first.routing)
    assert not torch.equal(first.hidden_states, second.hidden_states)
    hit = set(first.routing.flatten().tolist())
    assert first.experts_hit(config_of(0)) == len(hit & {0, 1, 2})
    assert second.experts_hit(config_of(1)) == len(hit & {3, 4})


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks("cpu", 2) as started:
        yield started


def dies_on_rank_1(context: RankContext) -> None:
    if context.rank == 1:
        os._exit(1)


def test_a_contender_that_loses_ranks_is_out_and_the_others_go_on(ranks: Ranks) -> None:
    entrant, lost = Entrant(StrategyContender("nccl_all_to_all+triton_fused_moe")), {}
    assert ep_layer._step(ranks, entrant, "eager", lost, dies_on_rank_1) is None
    assert entrant.outcomes["eager"].status == FAILED
    assert "rank 1: died" in lost[entrant.contender.name].detail
    sweep = LayerSweep(**SWEEP | {"strategies": (entrant.contender.name, OURS)}, world=2, device="cpu")
    found = ep_layer._cell(ranks, Place(sweep, "5,2,128,128", "bf16", 3), CEILINGS, lost)
    out, right = found.measurements
    assert (out.status, out.best) == (FAILED, None)
    assert "rank 1: died" in out.detail
    assert right.status == OK
    assert right.eager is not None


def test_the_command_over_two_ranks(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Those that run already, for starting them takes longer than all that is measured here.
    monkeypatch.setattr(ep_layer, "Ranks", lambda *arguments: contextlib.nullcontext(ranks))
    file = tmp_path / "layer.json"
    arguments = ["bench", "layer", "--layer", "5,2,128,128", "--tokens", "1,3", "--world", "2", "--dtype", "fp8"]
    arguments += ["--strategy", OURS, "--peer", "deep_gemm_mega", "--time-budget", "0.01", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(file)], env={"COLUMNS": "220"})
    assert result.exit_code == 0, result.output
    results = Run.load(file)
    assert (results.settings.world, [c.tokens for c in results.cells]) == (2, [1, 3])
    for each in results.cells:
        ours, mega = each.measurements
        assert (ours.status, ours.graph, ours.cpu) == ("ok", None, None), ours.detail
        assert ours.eager is not None
        assert ours.eager.p95 is not None
        assert ours.eager.median <= ours.eager.p95
        assert ours.error is not None
        assert 0 < ours.error < 1e-2
        assert each.flops == 2 * each.tokens * 2 * 3 * 128 * 128
        assert 1 <= each.experts_hit <= 3
        assert (mega.role, mega.status, mega.best) == ("peer", "unsupported", None)
    assert "deep_gemm_mega unsupported: the mega kernel" in result.stdout
    assert "over 2 ranks, fp8_block" in result.stdout
    assert f"repeat with: {results.command}" in result.stdout
    assert f"--strategy {OURS} --peer deep_gemm_mega" in results.command
    assert "--world 2 --device cpu" in results.command


def accuracy(error: float) -> Accuracy:
    return Accuracy(error, error, LIMIT)


def test_the_worst_rank_speaks_for_all() -> None:
    right, wrong = Outcome.of(accuracy(1e-3)), Outcome.of(accuracy(0.5))
    assert of_all_ranks([right, Outcome.of(accuracy(2e-3))]) == Outcome(OK, "", accuracy(2e-3))
    found = of_all_ranks([right, wrong, right])
    assert (found.status, found.accuracy) == (WRONG, accuracy(0.5))
    assert found.detail == f"rank 1: {accuracy(0.5)}"
    refusal = Outcome.failure(UnsupportedError("needs a GPU"))
    assert of_all_ranks([refusal, refusal]) == Outcome(UNSUPPORTED, "needs a GPU")
    broken = of_all_ranks([refusal, Outcome.failure(RuntimeError("/a/b/x.so"))])
    assert (broken.status, broken.detail) == (FAILED, "rank 1: RuntimeError: x.so")


def test_a_contender_without_a_graph_has_its_eager_time() -> None:
    entrant = Entrant(StrategyContender(OURS), times={"eager": [3.0, 1.0, 2.0], "cpu": [1.0]})
    entrant.outcomes = {"graph": Outcome(UNSUPPORTED, "a host sync"), "eager": Outcome.of(accuracy(1e-3))}
    found = entrant.measurement()
    assert (found.status, found.detail, found.graph) == (OK, "no graph time: a host sync", None)
    assert found.eager is not None
    assert found.eager.median == 2.0
    entrant.outcomes["eager"] = Outcome.of(accuracy(0.5), "after many calls: ")
    found = entrant.measurement()
    assert (found.status, found.eager, found.cpu) == (WRONG, None, None)
    assert found.detail.startswith("after many calls: relative error 5")


def test_a_layer_within_a_quarter_of_the_mega_kernel_meets_the_target() -> None:
    within, beyond = measured(OURS, 124.0), measured(OURS, 126.0)
    mega, eager_only = measured("deep_gemm_mega", 100.0), measured("deep_gemm_mega", None, 100.0)
    cells = [cell(within, mega, tokens=8), cell(beyond, mega, tokens=64)]
    results = run(*cells)
    results = replace(results, settings=replace(results.settings, world=4))
    (line,) = summary.target_lines(results)
    assert line.startswith(f"missed 1/2  {OURS}: within 25% of deep_gemm_mega in every cell: ")
    assert line.endswith("bf16 64 0.794x")
    out = StringIO()
    others = [cell(measured(OURS, 50.0, 80.0), eager_only, tokens=9), cell(failed(OURS, "wrong", "by far"), tokens=10)]
    Console(file=out, width=220).print(summary.layer_table([*cells, *others], 4))
    text = out.getvalue()
    # Graph against graph, else eager against eager.
    for words in ("over 4 ranks", "x deep_gemm_mega", "0.81x", "0.79x", "1.25x", "wrong: by far"):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"world": 1}, ConfigError, "at least 2 ranks, got 1"),
        ({"world": 6}, ConfigError, "5 experts for 6 ranks"),
        ({"peers": ("vllm",)}, ConfigError, "unknown peer 'vllm'; known: deep_gemm_mega"),
        ({"strategies": ("nccl+torch_native",)}, UnknownStrategyError, "nccl_all_to_all"),
        ({"tokens": (0,)}, ConfigError, "positive"),
    ],
)
def test_mistakes_are_named_before_ranks_are_started(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        LayerSweep(**SWEEP | {"device": "cpu"} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": None}, "fp8 in 128 x 128 blocks"),
        ({"quantization": Fp8Block(64, 128)}, "fp8 in 128 x 128 blocks"),
        ({"dtype": torch.float16}, "on bf16 rows"),
        ({"activation": Activation.GELU_AND_MUL}, "silu_and_mul"),
        ({"has_bias": True}, "no biases"),
        ({"hidden_size": 192}, "H a multiple of 128 up to 8192, got 192"),
        ({"intermediate_size": 4224}, "I a multiple of 128 up to 4096, got 4224"),
        ({"num_experts": 40, "top_k": 33}, "top-k up to 32, got 33"),
        ({}, "a process group"),
    ],
)
def test_the_mega_kernel_says_what_it_does_not_compute(changes: dict[str, Any], words: str) -> None:
    layer = Layer("x", config_of(0, **changes), {"w13": torch.empty(0)}, 0)
    with pytest.raises(UnsupportedError, match=words):
        DeepGemmMega().prepare(layer, 8)


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.deep_gemm
@pytest.mark.multi_gpu(2)
def test_the_mega_kernel_computes_the_layer() -> None:
    sweep = LayerSweep(
        layers=("16,4,512,256",),
        tokens=(8, 200),
        dtypes=("fp8",),
        strategies=("nccl_all_to_all+triton_fused_moe",),
        peers=("deep_gemm_mega",),
        skew="zipf",
        time_budget=0.02,
        world=2,
    )
    for each in run_layer_sweep(sweep, lambda run, cell: None).cells:
        for m in each.measurements:
            assert m.status == OK, m.detail
            assert m.eager is not None
