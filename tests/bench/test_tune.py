"""The search for tiles: what it tries, what takes a candidate out, what it keeps and what it goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.bench.experts import Sweep
from moe_plugin.bench.layers import Inputs, Layer
from moe_plugin.bench.timing import Stopwatch
from moe_plugin.bench.tune import Outcome, Place, Search, plan_for, tune
from moe_plugin.config import Fp8Block, Fp8PerTensor, MoEConfig, QuantConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.errors import ConfigError
from moe_plugin.kernels.hopper_tiling import HopperTiles
from moe_plugin.kernels.measured_tables import forget_tables
from moe_plugin.kernels.tile_tables import (
    HOPPER,
    PORTABLE,
    Entry,
    PortableTiles,
    Tiles,
    TileTable,
    block_rows,
    heuristic_tiles,
    legal,
)
from moe_plugin.kernels.tiling import shared_memory_bytes

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")

LAYER = "2,1,32,32"
CPU = torch.device("cpu")
MEMORY = shared_memory_bytes(90)
QWEN = MoEConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)


@pytest.fixture(autouse=True)
def no_tables() -> Iterator[None]:
    forget_tables()
    yield
    forget_tables()


def place(out: Path, layer: str = LAYER) -> Place:
    experts, top_k, hidden, inner = map(int, layer.split(","))
    config = MoEConfig(num_experts=experts, top_k=top_k, hidden_size=hidden, intermediate_size=inner)
    return Place.of(config, Environment.probe("cpu"), out)


def search(out: Path, rows: int = 1, budget: float = 3.0) -> Search:
    where = place(out)
    layer = Layer.random(LAYER, where.config, CPU, 0)
    inputs = Inputs.random(where.config, rows, "uniform", CPU, 1)
    return Search(Stopwatch(CPU), where, layer, inputs, budget, lambda found: None)


def run(out: Path, tokens: tuple[int, ...] = (1,), again: bool = False, dtype: str = "bf16") -> list[Outcome]:
    outcomes: list[Outcome] = []
    sweep = Sweep(layers=(LAYER,), tokens=tokens, dtypes=(dtype,), device="cpu", time_budget=0.01)
    tune(sweep, out, again, outcomes.append)
    return outcomes


def neighbours(kernels: str, config: MoEConfig, num_rows: int) -> list[Tiles]:
    """All that a search would try if each start were the best, as far as it is legal."""
    plan = plan_for(kernels, config, num_rows, MEMORY, on_gpu=True)
    found = [tiles for start in plan.starts for axis in (*plan.coarse, *plan.fine) for tiles in axis(start)]
    return [tiles for tiles in dict.fromkeys([*plan.starts, *found]) if legal(tiles, config, MEMORY).ok]


@pytest.mark.parametrize("scheme", [None, Fp8Block(), Fp8PerTensor(static_activations=True)], ids=str)
@pytest.mark.parametrize("kernels", [HOPPER, PORTABLE])
@pytest.mark.parametrize("num_rows", [1, 4, 16, 64, 256, 1024, 8192])
def test_starts_are_legal_and_few_and_near_the_heuristic(
    num_rows: int, kernels: str, scheme: QuantConfig | None
) -> None:
    config = replace(QWEN, quantization=scheme)
    plan = plan_for(kernels, config, num_rows, MEMORY, on_gpu=True)
    assert 1 <= len(plan.starts) <= 4
    for tiles in plan.starts:
        assert legal(tiles, config, MEMORY).ok
    heuristic = heuristic_tiles(kernels, config, num_rows, MEMORY)
    assert block_rows(heuristic) in [block_rows(tiles) for tiles in plan.starts]
    # Each axis has what it starts from, too; the finest axes are for two starts only.
    coarse, fine = (sum(len(axis(plan.starts[0])) - 1 for axis in axes) for axes in (plan.coarse, plan.fine))
    assert len(plan.starts) * (1 + coarse) + 2 * fine <= (24 if kernels == HOPPER else 44)


def test_every_choice_of_the_hopper_kernels_is_reached() -> None:
    tried = [*neighbours(HOPPER, QWEN, 128), *neighbours(HOPPER, QWEN, 512)]
    found = [tiles for tiles in tried if isinstance(tiles, HopperTiles) and not tiles.gate_up.wide]
    assert {tiles.block_x for tiles in found} == {8, 16, 32, 64}
    for gemm in ("gate_up", "down"):
        assert {getattr(tiles, gemm).half_w for tiles in found} == {64, 128}
        assert {getattr(tiles, gemm).group for tiles in found} == {1, 4, 8, 16}
    fp8 = replace(QWEN, quantization=Fp8Block())
    many = [tiles for tiles in neighbours(HOPPER, fp8, 8192) if isinstance(tiles, HopperTiles)]
    assert {(tiles.gate_up.wide, tiles.gate_up.half_w, tiles.down.half_w) for tiles in many} == {
        *((True, 64, 64), (False, 128, 128), (False, 128, 64)),
    }


def test_portable_tiles_take_the_stages_that_fit() -> None:
    found = [tiles for tiles in neighbours(PORTABLE, QWEN, 8192) if isinstance(tiles, PortableTiles)]
    assert {tiles.gate_up.block_k for tiles in found} == {32, 64, 128}
    assert {tiles.gate_up.num_warps for tiles in found} == {4, 8}
    # 128 x 256 x 128 has room for two stages only.
    large = {t.down.num_stages for t in found if (t.down.block_m, t.down.block_n, t.down.block_k) == (128, 256, 128)}
    assert large == {2} or large == {1}


def test_the_interpreter_is_spared_what_means_nothing_to_it() -> None:
    for_gpu, for_cpu = (plan_for(PORTABLE, QWEN, 4, MEMORY, on_gpu) for on_gpu in (True, False))
    assert (len(for_gpu.fine), len(for_cpu.fine)) == (10, 4)


@interpreter
def test_the_fastest_right_candidate_wins(tmp_path: Path) -> None:
    found = search(tmp_path, budget=60.0)
    entry = found.run(None)
    assert entry is not None
    assert found.times[entry.tiles] is not None
    assert (found.trials.failed, found.trials.wrong, found.before) == (0, 0, None)
    assert found.heuristic is not None
    assert entry.microseconds <= found.heuristic
    # One size of blocks; two other values of block_n and of block_k for each GEMM.
    assert len(found.times) == 9


@interpreter
def test_a_candidate_that_fails_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = search(tmp_path)
    good = heuristic_tiles(PORTABLE, found.place.config, 1, MEMORY)
    assert isinstance(good, PortableTiles)
    bad = replace(good, gate_up=replace(good.gate_up, block_k=48))  # tl.arange wants a power of two
    with caplog.at_level("DEBUG", logger="moe_plugin.bench"):
        assert found._measure(bad) is None
    assert (found.trials.failed, found.trials.wrong) == (1, 0)
    assert "block_k=48" in caplog.text
    assert found._measure(good) is not None
    best = found.best()
    assert best is not None
    assert best.tiles == good


@interpreter
def test_wrong_results_are_skipped_and_counted(tmp_path: Path) -> None:
    found = search(tmp_path)
    found.inputs.expected[False, False] = torch.ones(1, 32)
    assert found.run(None) is None
    assert found.trials.wrong == len(found.times) >= 1
    outcome = found.outcome("x", "bf16", None)
    assert (outcome.entry, outcome.heuristic, outcome.wrong) == (None, None, found.trials.wrong)


@interpreter
def test_what_stood_in_the_table_is_measured_again_and_may_stay(tmp_path: Path) -> None:
    found = search(tmp_path, budget=1e-6)
    untuned = heuristic_tiles(PORTABLE, found.place.config, 1, found.place.shared_memory)
    assert isinstance(untuned, PortableTiles)
    before = replace(untuned, down=replace(untuned.down, block_n=32))
    entry = found.run(before)
    assert entry is not None
    assert set(found.times) == {untuned, before}
    assert found.before is not None
    assert found.heuristic is not None
    assert entry.microseconds == min(found.before, found.heuristic)


@interpreter
def test_tiles_that_cannot_run_here_do_not_count_as_before(tmp_path: Path) -> None:
    found = search(tmp_path, budget=1e-6)
    untuned = heuristic_tiles(PORTABLE, found.place.config, 1, found.place.shared_memory)
    assert isinstance(untuned, PortableTiles)
    entry = found.run(replace(untuned, down=replace(untuned.down, num_stages=8, block_k=256)))
    assert entry is not None
    assert entry.tiles == untuned
    assert list(found.times) == [untuned]


@interpreter
def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    (first,) = run(tmp_path, (1,))
    assert first.entry is not None
    assert first.path == tmp_path / "cpu" / "E2-K1-H32-I32-bf16.json"
    assert first.entry == TileTable.load(first.path).entry(PORTABLE, 1)
    kept, new = run(tmp_path, (1, 2))
    assert (kept.kept, kept.entry) == (True, first.entry)
    assert not new.kept
    assert [entry.rows for entry in TileTable.load(first.path).entries] == [1, 2]
    assert all(outcome.kept for outcome in run(tmp_path, (1, 2)))
    (again,) = run(tmp_path, (2,), again=True)
    assert not again.kept
    assert again.before is not None


@interpreter
def test_fp8(tmp_path: Path) -> None:
    (outcome,) = run(tmp_path, (3,), dtype="fp8")
    assert outcome.entry is not None
    assert outcome.path.name == "E2-K1-H32-I32-fp8_block.json"
    assert TileTable.load(outcome.path).layer.dtype == "fp8_block"


@interpreter
@pytest.mark.parametrize("changes", [{"triton": "3.0.0"}, {"partial": True}], ids=str)
def test_entries_of_another_triton_and_partial_ones_are_measured_again(tmp_path: Path, changes: dict[str, str]) -> None:
    where = place(tmp_path)
    tiles = heuristic_tiles(PORTABLE, where.config, 1, where.shared_memory)
    old = Entry(rows=1, tiles=tiles, microseconds=1.0, triton=where.triton)
    where.save(where.table(), replace(old, **changes))  # type: ignore[arg-type]
    (outcome,) = run(tmp_path)
    assert not outcome.kept
    assert outcome.before == outcome.heuristic
    entry = where.table().entry(PORTABLE, 1)
    assert entry == outcome.entry
    assert entry is not None
    assert (entry.triton, entry.partial) == (where.triton, False)


@interpreter
def test_an_interrupt_keeps_the_best_of_all_so_far(tmp_path: Path) -> None:
    def interrupt(found: Search) -> None:
        if found.inputs.tokens == 2 and len(found.times) == 2:
            raise KeyboardInterrupt

    outcomes: list[Outcome] = []
    sweep = Sweep(layers=(LAYER,), tokens=(1, 2, 3), device="cpu", time_budget=3.0)
    with pytest.raises(KeyboardInterrupt):
        tune(sweep, tmp_path, False, outcomes.append, interrupt)
    assert [outcome.rows for outcome in outcomes] == [1]
    left = place(tmp_path).table().entries
    assert [(entry.rows, entry.partial) for entry in left] == [(1, False), (2, True)]
    assert [outcome.kept for outcome in run(tmp_path, (1, 2))] == [True, False]
    assert not any(entry.partial for entry in place(tmp_path).table().entries)


@interpreter
def test_a_broken_table_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    path = place(tmp_path).path
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(ConfigError, match="not a tile table"):
        run(tmp_path)


def test_a_layer_that_the_machine_cannot_run_is_an_error(tmp_path: Path) -> None:
    machine = Environment(packages={"triton": Package("triton", "3.6.0")}).pretend(sm=80)
    with pytest.raises(ConfigError, match="cannot run E128-K8-H2048-I768-fp8_block here: sm: needs SM 89"):
        Place.of(replace(QWEN, quantization=Fp8Block()), machine, tmp_path)


def test_the_place_of_a_table(tmp_path: Path) -> None:
    machine = Environment(packages={"triton": Package("triton", "3.6.0")}).pretend(sm=90, device_name="NVIDIA H200")
    found = Place.of(QWEN, machine, tmp_path)
    assert (found.kernels, found.triton, found.shared_memory) == (HOPPER, "3.6.0", MEMORY)
    assert found.path == tmp_path / "NVIDIA_H200" / "E128-K8-H2048-I768-bf16.json"
    assert Place.of(QWEN, machine.pretend(sm=80), tmp_path).kernels == PORTABLE
