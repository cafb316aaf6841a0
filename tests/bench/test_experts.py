"""The sweep: wrong results have no times, errors stay in their cell, and what was measured is reported at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from moe_plugin.bench.experts import Sweep, describe, layer_config, run_sweep
from moe_plugin.bench.results import Cell, Run
from moe_plugin.config import Fp8Block
from moe_plugin.errors import ConfigError, UnknownStrategyError
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import Dispatched
from moe_plugin.strategies.registry import experts_classes, register_experts

TINY: dict[str, Any] = {"layers": ("6,2,64,32",), "tokens": (1, 5), "time_budget": 0.01, "device": "cpu"}


class OffByOnePercent(TorchNative):
    """Wrong in one token of many, by more than rounding."""

    name = "off_by_one_percent"

    def apply(self, dispatched: Dispatched, *arguments: Any, **options: Any) -> torch.Tensor:
        result = super().apply(dispatched, *arguments, **options)
        result[-1] *= 1.1
        return result


class BreaksAtFive(TorchNative):
    """Raises for five tokens."""

    name = "breaks_at_five"
    calls: ClassVar[int] = 0

    def apply(self, dispatched: Dispatched, *arguments: Any, **options: Any) -> torch.Tensor:
        if dispatched.activations.shape[0] == 5:
            raise RuntimeError("no kernel in /home/somebody/cache/kernels.so")
        return super().apply(dispatched, *arguments, **options)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    for cls in (OffByOnePercent, BreaksAtFive):
        register_experts(cls)
    yield
    for cls in (OffByOnePercent, BreaksAtFive):
        experts_classes.unregister(cls.name)


def swept(**options: Any) -> Run:
    return run_sweep(Sweep(**(TINY | options)), lambda run, cell: None)


def test_a_right_result_has_times_and_its_error() -> None:
    run = swept(strategies=("local+torch_native",))
    assert [cell.tokens for cell in run.cells] == [1, 5]
    for cell in run.cells:
        (m,) = cell.measurements
        assert (m.contender, m.role, m.status, m.graph) == ("local+torch_native", "strategy", "ok", None)
        assert m.eager is not None
        assert m.cpu is not None
        assert m.eager.p10 <= m.eager.median <= m.eager.p90
        assert m.error is not None
        assert 0 < m.error < 1e-2
        assert cell.flops == 2 * cell.tokens * 2 * 3 * 64 * 32
        assert cell.floor > 0
    assert run.machine.device_type == "cpu"
    assert Run.from_json(run.to_json()) == run


def test_a_wrong_result_has_no_time() -> None:
    run = swept(strategies=("local+off_by_one_percent",), peers=("torch",))
    for cell in run.cells:
        wrong, right = cell.measurements
        assert wrong.status == "wrong"
        assert (wrong.graph, wrong.eager, wrong.cpu) == (None, None, None)
        assert "relative error" in wrong.detail
        assert wrong.row_error is not None
        assert wrong.row_error > 2e-2
        assert right.status == "ok"


def test_an_error_stays_in_its_cell_and_names_no_folder() -> None:
    run = swept(strategies=("local+breaks_at_five", "local+torch_native"), tokens=(1, 5, 7))
    assert [cell.measurements[0].status for cell in run.cells] == ["ok", "failed", "ok"]
    assert [cell.measurements[1].status for cell in run.cells] == ["ok"] * 3
    assert run.cells[1].measurements[0].detail == "RuntimeError: no kernel in kernels.so"
    assert run.cells[1].measurements[0].best is None


def test_a_missing_peer_is_named_and_the_others_go_on() -> None:
    run = swept(strategies=("local+torch_native",), peers=("deep_gemm", "vllm"), tokens=(2,))
    ours, deep_gemm, vllm = run.cells[0].measurements
    assert ours.status == "ok"
    assert (deep_gemm.role, deep_gemm.status) == ("gemms_only", "unsupported")
    assert vllm.status in ("not installed", "failed")
    assert vllm.best is None
    assert run.machine.peers.keys() == {"deep_gemm", "vllm"}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_dtypes(dtype: str) -> None:
    (cell,) = swept(strategies=("local+torch_native",), dtypes=(dtype,), tokens=(3,), skew="zipf").cells
    assert (cell.dtype, cell.skew, cell.measurements[0].status) == (dtype, "zipf", "ok")


@pytest.mark.parametrize("dtype", ["fp8", "fp8_per_tensor", "fp8_per_token"])
def test_fp8(dtype: str) -> None:
    run = swept(strategies=("local+torch_native",), dtypes=(dtype,), tokens=(3,), layers=("4,2,128,128",))
    (cell,) = run.cells
    assert cell.dtype == ("fp8_block" if dtype == "fp8" else dtype)
    assert cell.measurements[0].status == "ok", cell.measurements[0].detail


def test_every_cell_is_reported_as_it_is_finished() -> None:
    seen: list[tuple[int, int]] = []

    def report(run: Run, cell: Cell) -> None:
        assert run.cells[-1] is cell
        seen.append((len(run.cells), cell.tokens))
        if len(seen) == 2:
            raise KeyboardInterrupt

    sweep = Sweep(**(TINY | {"strategies": ("local+torch_native",), "tokens": (1, 2, 3)}))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, report)
    assert seen == [(1, 1), (2, 2)]


def test_a_seed_repeats_the_work() -> None:
    facts = [
        [(cell.experts_hit, cell.measurements[0].error) for cell in swept(strategies=("local+torch_native",)).cells]
        for _ in range(2)
    ]
    assert facts[0] == facts[1]


def test_the_command_repeats_the_sweep() -> None:
    sweep = Sweep(
        layers=("all", "qwen3-30b", "8,2,64,48"),
        tokens=(1, 8),
        dtypes=("fp8", "bf16", "fp8_block"),
        peers=("vllm", "torch"),
        device="cpu",
    )
    assert sweep.layers == ("mixtral-8x7b", "qwen3-30b", "qwen3-235b", "deepseek-v3-ep8", "8,2,64,48")
    assert sweep.dtypes == ("fp8_block", "bf16")
    assert sweep.num_cells == 5 * 2 * 2
    assert sweep.command == (
        "moe-plugin bench experts --preset mixtral-8x7b,qwen3-30b,qwen3-235b,deepseek-v3-ep8 --layer 8,2,64,48 "
        "--tokens 1,8 --dtype fp8_block,bf16 --strategy local+triton_fused_moe --peer vllm --peer torch "
        "--skew uniform --seed 0 --time-budget 0.3 --device cpu"
    )


@pytest.mark.parametrize(
    ("wrong", "words", "error"),
    [
        ({"layers": ()}, "layers is empty", ConfigError),
        ({"tokens": ()}, "tokens is empty", ConfigError),
        ({"tokens": (0, 1)}, "positive, got 0", ConfigError),
        ({"layers": ("qwen3-30",)}, "Did you mean 'qwen3-30b'", ConfigError),
        ({"layers": ("8,2,64",)}, "four numbers E,K,H,I, got '8,2,64'", ConfigError),
        ({"layers": ("2,8,64,64",)}, "top_k 8 exceeds num_experts 2", ConfigError),
        ({"dtypes": ("int4",)}, "unknown dtype 'int4'; known: fp8, bf16", ConfigError),
        ({"skew": "normal"}, "unknown skew 'normal'", ConfigError),
        ({"peers": ("vlm",)}, "unknown peer 'vlm'", ConfigError),
        ({"time_budget": 0.0}, "must be positive", ConfigError),
        ({"strategies": ("local+trton_fused_moe",)}, "Did you mean 'local\\+triton_fused_moe'", UnknownStrategyError),
    ],
)
def test_mistakes_are_named_before_anything_runs(wrong: dict[str, Any], words: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=words):
        Sweep(**(TINY | wrong))


def test_layers_by_name_and_by_numbers() -> None:
    config = layer_config("8,2,64,48", "fp8_block")
    assert (config.num_experts, config.top_k, config.hidden_size, config.intermediate_size) == (8, 2, 64, 48)
    assert (config.dtype, config.quantization) == (torch.bfloat16, Fp8Block())
    assert layer_config("deepseek-v3-ep8", "bf16").num_experts == 32


def test_errors_in_one_line_without_folders() -> None:
    assert describe(ValueError("a\n  b /usr/lib/x.so and '/opt/y/z.py'")) == "ValueError: a b x.so and 'z.py'"
    assert describe(RuntimeError("2 / 3 and a/b stay")) == "RuntimeError: 2 / 3 and a/b stay"
    assert describe(KeyError()) == "KeyError: KeyError"
    long = describe(ValueError("x" * 999))
    assert len(long) == 240
    assert long.endswith("...")


def test_settings_are_those_of_the_sweep() -> None:
    sweep = Sweep(**TINY)
    assert dataclasses.asdict(sweep.settings).items() <= (dataclasses.asdict(sweep) | {"world": 1}).items()
