"""Contenders of `bench routing` on a CPU: right results, wrong ones, errors, what is saved."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moe_plugin.bench import routing
from moe_plugin.bench.routing import (
    COLLECTIVE,
    CONTENDERS,
    GATHERING_CONTENDERS,
    NVLINK,
    Preparation,
    Routed,
    RoutingInput,
    RoutingJob,
    RoutingMeasurement,
    RoutingRun,
    RoutingSettings,
    expected_of,
    routing_table,
    run_routing,
)
from moe_plugin.errors import ConfigError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = RoutingSettings(tokens=(3, 20), num_experts=10, top_k=3, world=4, time_budget=1e-6, device=DEVICE.type)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda each: each.label)
def test_contenders_find_what_the_reference_finds(contender: Preparation, rank: int) -> None:
    inputs = RoutingInput.random(SETTINGS, 20, DEVICE, rank)
    job = contender.bind(inputs, contender.permute, contender.probabilities)
    found, expected = job.read(job.run()), expected_of(inputs)
    assert found.differs_from(expected) == ""
    assert (found.places is not None) == contender.permute
    assert (found.weights is not None) == contender.probabilities
    assert (found.rows is None) == (contender.name == "argsort")
    others = expected_of(RoutingInput.random(SETTINGS, 20, DEVICE, rank=1))
    assert found.differs_from(others) != ""


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda each: each.label)
def test_what_ranks_gather_is_what_is_used(contender: Preparation) -> None:
    """Everything but this rank's share is unknown before."""
    contender = dataclasses.replace(contender, all_gather=COLLECTIVE)
    complete = RoutingInput.random(SETTINGS, 20, DEVICE, rank=2)
    names = ("topk_ids", "ids", "routing_map", "router_weights", "weight_map")
    tensors = [getattr(complete, name) for name in names]
    of_all = {(tensor.dtype, tensor.shape[-1]): tensor.view(4, 20, -1) for tensor in tensors}
    gathered = []

    def all_gather(share: torch.Tensor) -> torch.Tensor:
        every = of_all[share.dtype, share.shape[-1]]
        assert torch.equal(share, every[2])
        gathered.append(share.shape[-1] * share.element_size())
        return every

    alone = {}
    for name, tensor in zip(names, tensors, strict=True):
        alone[name] = torch.zeros_like(tensor)
        alone[name].view(4, 20, -1)[2] = tensor.view(4, 20, -1)[2]
    job = contender.bind(
        dataclasses.replace(complete, **alone, all_gather=all_gather), contender.permute, contender.probabilities
    )
    whole = contender.bind(complete, contender.permute, contender.probabilities)
    assert whole.read(job.run()).differs_from(expected_of(complete)) == ""
    assert sum(gathered) == contender.wire_bytes(SETTINGS)


def test_a_run_is_timed_reported_and_saved(tmp_path: Path) -> None:
    seen = []
    run = run_routing(SETTINGS, lambda run, cell: seen.append((len(run.cells), cell.tokens)))
    assert seen == [(1, 3), (2, 20)]
    for cell in run.cells:
        assert [(m.contender, m.permute, m.probabilities) for m in cell.measurements] == [
            (each.name, each.permute, each.probabilities) for each in CONTENDERS
        ]
        for m in cell.measurements:
            assert m.status == "ok", m.detail
            assert m.eager.median > 0
            assert m.cpu.median > 0
            assert (m.graph is not None) == (DEVICE.type == "cuda")
    file = tmp_path / "routing.json"
    run.save(file)
    saved = json.loads(file.read_text())
    assert saved["schema"] == routing.SCHEMA
    assert saved["settings"]["tokens"] == [3, 20]
    assert saved["cells"][1]["measurements"][0]["eager"]["median"] == run.cells[1].measurements[0].eager.median
    assert [path.name for path in tmp_path.iterdir()] == ["routing.json"]


class Interpreted:
    """Contenders of two ranks on a CPU, which are sent to other processes."""

    @staticmethod
    def nvlink(inputs: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
        pytest.importorskip("triton")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routing, "_unreachable", lambda communicator, device: "")
            return routing._dense_nvlink(inputs, permute, probabilities)

    @staticmethod
    def wrong_on_rank_1(inputs: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
        rows = expected_of(inputs).rows
        return RoutingJob(lambda: None, lambda _: Routed((rows[0] + inputs.rank, *rows[1:])))

    @staticmethod
    def dies(inputs: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
        os._exit(3)


@pytest.mark.slow
def test_ranks_gather_and_are_timed_together() -> None:
    """On a CPU, where torch gathers and the kernel is interpreted; what breaks ends nothing but itself."""
    contenders = [
        *(each for each in GATHERING_CONTENDERS if each.probabilities),
        Preparation("dense", Interpreted.nvlink, True, True, NVLINK),
        Preparation("wrong", Interpreted.wrong_on_rank_1, False),
        Preparation("died", Interpreted.dies, False),
    ]
    changes = {"tokens": (3,), "num_experts": 5, "world": 2, "device": "cpu", "all_gather": True}
    settings = dataclasses.replace(SETTINGS, **changes)
    (cell,) = run_routing(settings, contenders=contenders).cells
    nvlink, *found, interpreted, wrong, died = cell.measurements
    assert (nvlink.status, nvlink.all_gather, nvlink.eager) == ("unsupported", "NVLink", None)
    assert nvlink.detail.endswith("memory: the device is cpu")
    assert [(m.contender, m.all_gather) for m in found] == [(name, "gloo") for name in ("dense", "sparse", "argsort")]
    assert (interpreted.contender, interpreted.all_gather) == ("dense", "NVLink")
    for m in (*found, interpreted):
        assert m.status == "ok", m.detail
        assert 0 < m.eager.median <= m.eager.p95
        assert m.graph is m.cpu is None
    assert (wrong.status, wrong.detail, wrong.eager) == ("wrong", "rank 1: rows differ from the reference", None)
    assert (died.status, died.detail, died.eager) == ("failed", "RankError: rank 1: died", None)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(routing_table(RoutingRun(command="", date="", machine=None, settings=settings), cell))
    assert "with the all-gather, times of the slowest rank" in capture.get()
    assert "gloo" in capture.get()


@pytest.mark.multi_gpu(2)
def test_ranks_on_gpus_gather_over_nvlink_and_nccl() -> None:
    settings = RoutingSettings(tokens=(5, 300), num_experts=10, top_k=3, world=2, time_budget=0.01, all_gather=True)
    for cell in run_routing(settings).cells:
        for m in cell.measurements:
            assert m.status == "ok", m.detail
            assert m.graph.p95 >= m.graph.median > 0
            assert m.eager.median > 0


def test_wrong_results_and_errors_have_no_times() -> None:
    def wrong(inputs: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
        rows = expected_of(inputs).rows
        return RoutingJob(lambda: None, lambda _: Routed((rows[0] + 1, *rows[1:])))

    def breaks(inputs: RoutingInput, permute: bool, probabilities: bool) -> RoutingJob:
        raise ValueError("of this contender")

    contenders = [CONTENDERS[0], Preparation("wrong", wrong, True), Preparation("breaks", breaks, True)]
    run = run_routing(dataclasses.replace(SETTINGS, tokens=(5,)), contenders=contenders)
    dense, wrong_one, broken = run.cells[0].measurements
    assert dense.status == "ok"
    assert (wrong_one.status, wrong_one.detail) == ("wrong", "rows differ from the reference")
    assert (broken.status, broken.detail) == ("failed", "ValueError: of this contender")
    assert wrong_one.eager is wrong_one.cpu is broken.eager is None


def test_differences_are_named() -> None:
    expected = expected_of(RoutingInput.random(SETTINGS, 8, DEVICE))
    places = expected.places
    assert Routed(None, (places[0] + 1, *places[1:])).differs_from(expected) == "places differ from the reference"
    assert Routed(weights=expected.weights * 2).differs_from(expected) == "router weights differ from the reference"
    assert Routed(weights=expected.weights).differs_from(Routed()) == "router weights differ from the reference"


def test_bytes_that_travel() -> None:
    settings = RoutingSettings(num_experts=256, top_k=8, world=4)
    assert [each.wire_bytes(settings) for each in CONTENDERS] == [16, 16, 48, 256, 256, 1280, 16, 48]
    gathering = [each.wire_bytes(settings) for each in GATHERING_CONTENDERS]
    assert gathering == [16, 16, 48, 16, 16, 48, 256, 256, 1280, 64, 96]
    assert len({each.label for each in GATHERING_CONTENDERS}) == len(gathering)


def test_the_table_compares_like_with_like() -> None:
    run = run_routing(dataclasses.replace(SETTINGS, tokens=(4,)))
    timing = run.cells[0].measurements[0].eager
    double = dataclasses.replace(timing, median=2 * timing.median)
    common = {"probabilities": False, "wire_bytes": 6, "status": "ok", "graph": None}
    measurements = (
        RoutingMeasurement(contender="dense", permute=False, eager=timing, **common),
        RoutingMeasurement(contender="dense", permute=True, eager=double, **common),
        RoutingMeasurement(contender="sparse", permute=False, eager=double, **common),
        RoutingMeasurement(contender="argsort", permute=True, eager=timing, **common),
        RoutingMeasurement(contender="absent", permute=True, **common | {"status": "failed"}, detail="[x] broke"),
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(routing_table(run, dataclasses.replace(run.cells[0], measurements=measurements)))
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    assert ["x │" in line for line in lines] == [False, False, True, True, False]
    assert "2.00x" in lines[2]
    assert "0.50x" in lines[3]
    assert "failed: [x] broke" in lines[4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": ()}, "none"),
        ({"tokens": (4, 0)}, "positive"),
        ({"world": 0}, "a rank at least"),
        ({"top_k": 257}, "1 to the 256 experts"),
        ({"time_budget": 0.0}, "time budget"),
        ({"num_experts": 40_000}, "40000 physical experts"),
    ],
)
def test_settings_that_cannot_be_measured(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RoutingSettings(**changes)
