"""What is written can be read again, and says nothing about whose machine it was."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from moe_plugin.bench.results import SCHEMA, Run, to_csv
from moe_plugin.errors import ConfigError
from tests.bench.runs import OURS, cell, failed, measured, run

FULL = run(
    cell(measured(OURS, 250.0, 270.0, 45.0), measured("vllm", 300.0), failed("torch", "failed", "TypeError: no")),
    cell(measured(OURS, None, 80.0), measured("deep_gemm", 60.0), tokens=8, dtype="fp8_block", skew="zipf"),
)


def test_json_round_trip() -> None:
    assert Run.from_json(FULL.to_json()) == FULL
    assert Run.from_json(run().to_json()) == run()


def test_the_schema_is_stable() -> None:
    data = json.loads(FULL.to_json())
    assert list(data) == ["schema", "command", "date", "machine", "ceilings", "settings", "cells"]
    assert data["schema"] == SCHEMA == "moe_plugin.bench/1"
    first = data["cells"][0]
    assert list(first) == [
        "layer",
        "dtype",
        "tokens",
        "skew",
        "experts_hit",
        "flops",
        "bytes",
        "floor",
        "bound",
        "measurements",
    ]
    ours = first["measurements"][0]
    assert list(ours) == [
        "contender",
        "role",
        "status",
        "detail",
        "note",
        "error",
        "row_error",
        "graph",
        "eager",
        "cpu",
    ]
    assert ours["graph"] == {"median": 250.0, "p10": 245.0, "p90": 262.5, "count": 20, "p95": None}


def test_one_line_per_cell() -> None:
    assert sum('"measurements"' in line for line in FULL.to_json().splitlines()) == len(FULL.cells)


def test_fields_of_later_versions_are_ignored_and_missing_ones_named() -> None:
    data = json.loads(FULL.to_json())
    data["cells"][0]["measurements"][0]["invented"] = 1
    assert Run.from_json(json.dumps(data)) == FULL
    del data["cells"][0]["floor"]
    with pytest.raises(ConfigError, match="floor"):
        Run.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "moe_plugin.bench/2"}'])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        Run.load(file)
    with pytest.raises(ConfigError, match=r"absent\.json"):
        Run.load(tmp_path / "absent.json")


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    run().save(file)
    FULL.save(file)
    assert Run.load(file) == FULL
    assert list(tmp_path.iterdir()) == [file]


def test_rates_follow_from_the_time() -> None:
    # 1e9 flops and 1e9 bytes in 250 us.
    assert FULL.cells[0].tflops(250.0) == pytest.approx(4.0)
    assert FULL.cells[0].terabytes_per_second(250.0) == pytest.approx(4.0)


def test_csv_has_a_row_per_measurement() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv([FULL]))))
    assert [(row["tokens"], row["contender"], row["status"]) for row in rows] == [
        ("128", OURS, "ok"),
        ("128", "vllm", "ok"),
        ("128", "torch", "failed"),
        ("8", OURS, "ok"),
        ("8", "deep_gemm", "ok"),
    ]
    assert (rows[0]["graph_median"], rows[0]["cpu_median"], rows[0]["tflops"]) == ("250.0", "45.0", "4")
    assert rows[0]["share_of_floor"] == "0.8"
    assert (rows[2]["graph_median"], rows[2]["tflops"], rows[2]["detail"]) == ("", "", "TypeError: no")
    # The eager time counts where there is no graph.
    assert rows[3]["tflops"] == "12.5"


def test_a_cell_is_added_without_touching_the_run() -> None:
    grown = run().with_cell(FULL.cells[0])
    assert grown.cells == FULL.cells[:1]
    assert dataclasses.replace(grown, cells=()) == run()
