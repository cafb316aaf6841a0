"""Ratios, means, targets and tables over results made up by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from moe_plugin.bench import summary
from tests.bench.runs import MIXTRAL, OURS, cell, failed, measured, run


def shown(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=220).print(table)
    return out.getvalue()


def test_a_ratio_above_one_is_faster() -> None:
    c = cell(measured(OURS, 100.0, 150.0), measured("vllm", 125.0, 120.0), measured("torch", None, 300.0))
    assert summary.ratio(c, OURS, "vllm") == 1.25
    # torch has no graph time, so both eager times count.
    assert summary.ratio(c, OURS, "torch") == 2.0
    assert summary.ratio(c, OURS, "deep_gemm") is None
    assert summary.ratio(cell(failed("vllm", "wrong", "far off"), measured(OURS, 1.0)), OURS, "vllm") is None


def test_the_best_of_vllm_is_the_faster_of_its_two() -> None:
    both = cell(measured(OURS, 100.0), measured("vllm", 150.0), measured("vllm_deep_gemm", 90.0))
    one = cell(measured(OURS, 100.0), measured("vllm", 150.0), failed("vllm_deep_gemm", "failed", "no"))
    assert summary.ratio(both, OURS, summary.BEST_OF_VLLM) == 0.9
    assert summary.ratio(one, OURS, summary.BEST_OF_VLLM) == 1.5
    peers = [comparison.peer for comparison in summary.compare([both, one])]
    assert peers == ["vllm", "vllm_deep_gemm", summary.BEST_OF_VLLM]


def test_the_geometric_mean_and_the_worst_cell() -> None:
    cells = [
        cell(measured(OURS, 100.0), measured("vllm", 200.0), tokens=1),
        cell(measured(OURS, 100.0), measured("vllm", 50.0), tokens=8),
        cell(measured(OURS, 100.0), failed("vllm", "failed", "no"), tokens=32),
        cell(measured(OURS, 100.0), measured("vllm", 400.0), dtype="fp8_block"),
    ]
    bf16, fp8 = summary.compare(cells)
    assert (bf16.dtype, len(bf16.ratios), bf16.geometric_mean) == ("bf16", 2, pytest.approx(1.0))
    worst, value = bf16.worst
    assert (worst.tokens, value) == (8, 0.5)
    assert (fp8.dtype, fp8.geometric_mean) == ("fp8_block", pytest.approx(4.0))
    text = shown(summary.comparison_table(run(*cells)))
    assert "qwen3-30b bf16 8" in text
    assert "4.00x" in text


def missed(*cells, device: str = "NVIDIA H200") -> dict[str, tuple[str, ...]]:
    found = summary.targets(run(*cells, device=device))
    return {target.name.removeprefix(f"{OURS}: "): target.missed for target in found}


def test_targets_against_vllm() -> None:
    met = cell(measured(OURS, 100.0), measured("vllm", 130.0), tokens=1, dtype="fp8_block", floor=1.0)
    assert missed(met) == {
        "at least 0.97x of vllm in every cell": (),
        "1.25x of vllm in the geometric mean": (),
        "1.2x of vllm at 1 token in fp8": (),
    }
    slow = cell(measured(OURS, 100.0), measured("vllm", 96.0), tokens=1, dtype="fp8_block")
    assert missed(slow) == {
        "at least 0.97x of vllm in every cell": ("qwen3-30b fp8_block 1 0.96x",),
        "1.25x of vllm in the geometric mean": ("fp8_block mean 0.96x",),
        "1.2x of vllm at 1 token in fp8": ("qwen3-30b fp8_block 1 0.96x",),
    }


def test_targets_of_the_machine() -> None:
    bandwidth = "90% of the copy bandwidth from 32 tokens to the compute bound"
    # 1e9 bytes at a ceiling of 4 TB/s: 250 us at 100%.
    assert missed(cell(measured(OURS, 270.0), tokens=32)) == {bandwidth: ()}
    assert missed(cell(measured(OURS, 300.0), tokens=32)) == {bandwidth: ("qwen3-30b bf16 32 0.833",)}
    assert missed(cell(measured(OURS, 300.0), tokens=31)) == {}
    assert missed(cell(measured(OURS, 300.0), bound="compute")) == {}
    host = missed(cell(measured(OURS, 1.0, 1.0, cpu=51.0), tokens=1), cell(measured(OURS, 1.0, 1.0, cpu=50.0)))
    assert host["at most 50 us of host time"] == ("qwen3-30b bf16 1 51 us",)
    large = {"tokens": 8192, "bound": "compute", "flops": 10**13}
    # 1e13 flops in 20 ms are 500 TFLOP/s.
    cells = [cell(measured(OURS, 20_000.0), layer=MIXTRAL, **large)]
    assert missed(*cells) == {"550 TFLOP/s at 8192 tokens in bf16": ("mixtral-8x7b bf16 8192 500 TFLOP/s",)}
    assert missed(*cells, device="NVIDIA A100") == {}
    fp8 = cell(measured(OURS, 11_000.0), dtype="fp8_block", **large)
    assert missed(fp8) == {"850 TFLOP/s at 8192 tokens in fp8": ()}


def test_target_lines_count() -> None:
    good, bad = cell(measured(OURS, 270.0), tokens=32), cell(measured(OURS, 300.0), tokens=64)
    (line,) = summary.target_lines(run(good, bad))
    assert line.startswith("missed 1/2")
    assert line.endswith("qwen3-30b bf16 64 0.833")
    (line,) = summary.target_lines(run(good))
    assert line.startswith("met 1/1")


def test_a_table_shows_times_and_reasons() -> None:
    wrong = failed("torch", "wrong", "relative error 5.00e-01")
    away = failed("vllm", "not installed", "pip install 'x[y]'")
    gemms = measured("deep_gemm", 80.0)
    ok = measured("torch", None, 500.0)
    text = shown(
        summary.block_table(
            [
                cell(measured(OURS, 250.0, 270.0, 45.0), wrong, away, gemms),
                cell(measured(OURS, 260.0), ok, away, gemms, tokens=8),
            ],
            OURS,
        )
    )
    assert "wrong: relative error 5.00e-01" in text
    assert "deep_gemm (GEMMs only)" in text
    assert "80% memory" in text
    # The same reason in every cell is said once, brackets and all.
    assert text.count("vllm not installed: pip install 'x[y]'") == 1


def test_progress_names_every_contender() -> None:
    c = cell(measured(OURS, 100.0), measured("vllm", 125.0), failed("torch", "failed", "no"), skew="zipf")
    assert summary.line(c, OURS) == (f"qwen3-30b bf16 128 zipf: {OURS} 100.0 us, vllm 125.0 us (1.25x), torch failed")
