"""Kernels compile for each generation of GPUs, with or without one at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from moe_plugin.kernels.hopper_tiling import SHARED_MEMORY


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program `compile_kernels` prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.compile_kernels"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(everything: dict[str, Any]) -> dict[str, str]:
    """{"kernel sm": the instructions it multiplies with, or an error}"""
    return everything["portable"]


@pytest.fixture(scope="module")
def hopper(everything: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"kernel": {"instructions", "stack", "shared"}}"""
    if not everything["hopper"]:
        pytest.skip("needs Triton 3.6")
    return everything["hopper"]


def test_every_portable_kernel_compiles(compiled: dict[str, str]) -> None:
    failed = {name: outcome for name, outcome in compiled.items() if outcome not in ("wgmma", "mma", "nothing")}
    assert list(failed) == ["down fp8 80"], failed


def test_fp8_is_refused_before_sm_89(compiled: dict[str, str]) -> None:
    """What the gate of triton_fused_moe says."""
    assert "fp8e4nv not supported in this architecture" in compiled["down fp8 80"]


def test_gemms_run_on_tensor_cores(compiled: dict[str, str]) -> None:
    gemms = {name: outcome for name, outcome in compiled.items() if "gate_up" in name or "down" in name}
    del gemms["down fp8 80"]
    wgmma = {"gate_up fp8 90", "gate_up fp8 listed 90", "down fp8 90"}
    assert gemms == {name: "wgmma" if name in wgmma else "mma" for name in gemms}


def test_hopper_kernels_are_fed_by_tma_and_multiply_with_wgmma(hopper: dict[str, dict[str, Any]]) -> None:
    assert len(hopper) == 9
    for name, found in hopper.items():
        expected = ["wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait"]
        # Wide tiles fill the grid and start after the kernel before, not with it.
        assert found["instructions"] == expected + ["griddepcontrol.wait"] * ("narrow" in name), name


def test_hopper_kernels_keep_their_sums_in_registers_and_their_stages_in_shared_memory(
    hopper: dict[str, dict[str, Any]],
) -> None:
    for name, found in hopper.items():
        # A tile that does not fit the registers spills hundreds of bytes per thread.
        assert found["stack"] <= 32, (name, found)
        assert SHARED_MEMORY // 2 < found["shared"] <= SHARED_MEMORY, (name, found)


def test_the_routing_scan_loads_and_compares_several_ids_at_once(everything: dict[str, Any]) -> None:
    found = everything["routing"]
    assert len(found) == 3
    for name, case in found.items():
        ids = "ld.global.b16" if "7 ids" in name else "ld.global.v4.b32"
        counts = [] if "rows" in name or "masked" in name else ["ld.global.cg.b32"]
        assert case["loads"] == sorted([ids, *counts]), name
        assert case["compares"] > 0, name


def test_gathered_rows_travel_in_wide_stores_and_programs_find_a_multiprocessor_each(
    everything: dict[str, Any],
) -> None:
    found = everything["routing_gather"]
    assert len(found) == 3
    for name, case in found.items():
        # A thread polls one word, in programs that write as in those that scan.
        assert (case["signals"], case["polls"]) == (1, 2), name
        assert case["grid"] <= 132, name
        assert case["stack"] <= 256, name
    assert found["4096 tokens"]["to_peers"] == ["st.global.v4.b32"]


def test_rows_between_ranks_move_in_wide_accesses(everything: dict[str, Any]) -> None:
    found = everything["exchange"]
    rows, ranks = 4, 4
    assert found["dispatch"]["wide"] == [rows, rows * ranks]
    assert found["quantized dispatch"]["wide"][0] == rows
    # Of each of the other ranks; then, of each token's ranks and its own.
    assert found["combine"]["wide"] == [rows * (ranks - 1) + rows * (ranks + 1), rows * (ranks - 1) + rows]
    assert all(case["narrow"] == 0 for case in found.values())
    assert all(found[name]["signals"] == 1 for name in ("dispatch", "quantized dispatch"))
    if "tma rows" in found:
        assert all(found[f"tma {kind}"]["bulk"] >= ranks for kind in ("rows", "quantized rows", "combine"))
        assert all(case["shared"] <= 227 << 10 for case in found.values())
