"""Tile tables: what is legal, which entry a call takes, whose table counts, and what broken files do."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_plugin.config import Fp8Block, Fp8PerTensor, Fp8PerToken, MoEConfig, ParallelConfig, QuantConfig
from moe_plugin.errors import ConfigError
from moe_plugin.kernels import tile_tables
from moe_plugin.kernels.hopper_tiling import HopperTile, HopperTiles
from moe_plugin.kernels.measured_tables import ENVIRONMENT_VARIABLE, LayerShape, device_folder, forget_tables
from moe_plugin.kernels.tile_tables import (
    HOPPER,
    PORTABLE,
    SHIPPED,
    Entry,
    FixedTiles,
    PortableTiles,
    TileLookup,
    Tiles,
    TileTable,
    heuristic_tiles,
    largest_calls,
    legal,
)
from moe_plugin.kernels.tiling import BlockConfig, shared_memory_bytes

CONFIG = MoEConfig(num_experts=16, top_k=2, hidden_size=512, intermediate_size=256)
DEVICE = "NVIDIA H200"
MEMORY = shared_memory_bytes(90)
STATIC = Fp8PerTensor(static_activations=True)
ALL_SCHEMES = (None, Fp8Block(), Fp8PerToken(), Fp8PerTensor(), STATIC)


def narrow(block_x: int = 16, gate_up: int = 128, down: int = 128, group: int = 8) -> HopperTiles:
    tiles = (HopperTile(wide=False, block_x=block_x, half_w=half_w, group=group) for half_w in (gate_up, down))
    return HopperTiles(*tiles)


def wide(half_w: int = 128) -> HopperTiles:
    tile = HopperTile(wide=True, block_x=128, half_w=half_w)
    return HopperTiles(tile, tile)


BLOCK = BlockConfig(block_m=16, block_n=128, block_k=64, group_m=8, num_warps=4, num_stages=3)
FP8_BLOCK = replace(BLOCK, block_n=256, block_k=128)


def table(*entries: tuple[int, Tiles], config: MoEConfig = CONFIG, device: str = DEVICE) -> TileTable:
    made = [Entry(rows=rows, tiles=tiles, microseconds=10.0 + rows, triton="3.6.0") for rows, tiles in entries]
    empty = TileTable(layer=LayerShape.of(config), device=device, triton="3.6.0", date="2026-01-01")
    for entry in made:
        empty = empty.with_entry(entry, "2026-01-02")
    return empty


def save(folder: Path, saved: TileTable) -> Path:
    path = folder / device_folder(saved.device) / saved.layer.file_name
    saved.save(path)
    return path


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's, and nothing shipped."""
    folder, shipped = tmp_path / "user", tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(folder))
    monkeypatch.setattr(tile_tables, "SHIPPED", shipped)
    monkeypatch.setattr(tile_tables, "_told", set())
    forget_tables()
    yield folder
    forget_tables()


def lookup(config: MoEConfig = CONFIG, device: str = DEVICE) -> TileLookup:
    return TileLookup(config, device, MEMORY)


def test_the_nearest_entry_within_a_factor_of_two() -> None:
    known = table((8, narrow(8)), (32, narrow(32)), (128, narrow(64)))

    def rows(num_rows: int) -> int | None:
        entry = known.nearest(HOPPER, num_rows, least_block=1000)
        return None if entry is None else entry.rows

    assert [rows(n) for n in (1, 3, 4, 8, 15, 17, 32, 63, 65, 128, 256, 257)] == [
        *(None, None, 8, 8, 8, 32, 32, 32, 128, 128, 128, None)
    ]
    assert known.nearest(PORTABLE, 8) is None
    gap = table((8, narrow(8)), (128, narrow(64)))
    assert gap.nearest(HOPPER, 30) is None


def test_beyond_the_last_entry_unless_the_heuristic_has_larger_blocks() -> None:
    known = table((8, narrow(8)), (32, narrow(64)))
    assert known.nearest(HOPPER, 10_000, least_block=64) == known.entry(HOPPER, 32)
    assert known.nearest(HOPPER, 10_000, least_block=128) is None


def test_a_call_takes_the_entry_or_the_heuristic(user: Path) -> None:
    save(user, table((8, narrow(8, down=64)), (512, wide(64))))
    found = lookup()
    assert found.hopper(9) == narrow(8, down=64)
    assert found.hopper(1_000_000) == wide(64)
    assert found.hopper(64) == heuristic_tiles(HOPPER, CONFIG, 64, MEMORY)
    assert found.portable(9) == heuristic_tiles(PORTABLE, CONFIG, 9, MEMORY)
    assert found.batched(9) == heuristic_tiles(PORTABLE, CONFIG, 9, MEMORY)
    assert lookup(device="NVIDIA H100").hopper(9) == heuristic_tiles(HOPPER, CONFIG, 9, MEMORY)
    assert lookup(replace(CONFIG, top_k=1)).hopper(9) == heuristic_tiles(HOPPER, replace(CONFIG, top_k=1), 9, MEMORY)
    assert FixedTiles(CONFIG, DEVICE, MEMORY, wide()).hopper(9) == wide()


def test_portable_entries_serve_the_portable_kernels(user: Path) -> None:
    tiles = PortableTiles(replace(BLOCK, block_m=32), replace(BLOCK, block_m=32, block_n=64))
    save(user, table((8, tiles), (8, narrow(8))))
    assert lookup().portable(8) == tiles
    assert lookup().hopper(8) == narrow(8)


def test_the_users_table_counts_first_and_the_shipped_one_fills_its_gaps(user: Path) -> None:
    save(tile_tables.SHIPPED, table((8, narrow(16)), (64, narrow(64))))
    save(user, table((8, narrow(8))))
    choice = lookup().choose(HOPPER, 8)
    assert choice.tiles == narrow(8)
    assert choice.source == str(user / "NVIDIA_H200" / "E16-K2-H512-I256-bf16.json")
    choice = lookup().choose(HOPPER, 64)
    assert choice.tiles == narrow(64)
    assert choice.source == "NVIDIA_H200/E16-K2-H512-I256-bf16.json"


def test_without_the_variable_the_shipped_tables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    save(tile_tables.SHIPPED, table((8, narrow(64))))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert lookup().hopper(8) == narrow(64)


def test_each_entry_is_told_once(user: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(user, table((8, narrow(8))))
    with caplog.at_level(logging.INFO, logger="moe_plugin"):
        for found in (lookup(), lookup()):
            for num_rows in (8, 9, 7, 8, 33, 64, 65):
                found.hopper(num_rows)
    name = "tiles of E16-K2-H512-I256-bf16 for"
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} 8 rows, hopper kernels: {path}, entry for 8 rows",
        f"{name} 33 rows, hopper kernels: heuristic",
        f"{name} 65 rows, hopper kernels: heuristic",
    ]


def test_a_table_survives_the_file(tmp_path: Path) -> None:
    tiles = PortableTiles(BLOCK, replace(BLOCK, group_m=1))
    old = Entry(rows=4, tiles=tiles, microseconds=7.5, triton="3.5.1", partial=True)
    written = table((64, wide(64)), (8, narrow(8, group=16))).with_entry(old, "2026-01-01")
    written = written.with_entry(Entry(rows=1, tiles=narrow(), microseconds=1.25, triton="3.6.0"), "2026-01-03")
    path = save(tmp_path, written)
    assert TileTable.load(path) == written
    assert [(e.kernels, e.rows) for e in written.entries] == [(HOPPER, 1), (HOPPER, 8), (HOPPER, 64), (PORTABLE, 4)]
    data = json.loads(path.read_text())
    assert (data["triton"], data["date"], data["device"]) == ("3.6.0", "2026-01-03", DEVICE)
    assert data["entries"][2]["tiles"] == {
        "wide": True,
        "block_x": 128,
        "gate_up": {"half_w": 64, "group": 8},
        "down": {"half_w": 64, "group": 8},
    }
    assert [entry.get("triton") for entry in data["entries"]] == [None, None, None, "3.5.1"]
    assert list(path.parent.iterdir()) == [path]
    # One line per entry.
    assert sum('"rows"' in line for line in path.read_text().splitlines()) == 4


def test_an_entry_replaces_the_one_for_its_rows_and_kernels() -> None:
    known = table((8, narrow(8)), (8, narrow(16)))
    assert [entry.tiles for entry in known.entries] == [narrow(16)]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (CONFIG, "bf16"),
        (replace(CONFIG, dtype=torch.float16), "fp16"),
        (replace(CONFIG, quantization=Fp8Block()), "fp8_block"),
        (replace(CONFIG, quantization=Fp8PerToken()), "fp8_per_token"),
        (replace(CONFIG, quantization=Fp8PerTensor()), "fp8_per_tensor"),
        (replace(CONFIG, quantization=STATIC), "fp8_per_tensor_static"),
        (replace(CONFIG, quantization=Fp8Block(), dtype=torch.float16), "fp8_block_fp16"),
    ],
)
def test_file_names(config: MoEConfig, dtype: str) -> None:
    assert LayerShape.of(config).file_name == f"E16-K2-H512-I256-{dtype}.json"


def test_a_rank_is_named_by_all_experts_and_its_own_columns() -> None:
    spread = replace(CONFIG, parallel=ParallelConfig(ep_size=4, tp_size=2), placement=None)
    assert str(LayerShape.of(spread)) == "E16-K2-H512-I128-bf16"
    assert device_folder("NVIDIA H100 80GB HBM3 / MIG") == "NVIDIA_H100_80GB_HBM3_MIG"


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(table((8, narrow(8)), (16, PortableTiles(BLOCK, BLOCK))).to_json())
    change(data)
    return json.dumps(data)


BROKEN = {
    "no JSON": ("{", "not a tile table"),
    "another schema": (broken(lambda d: d.update(schema="x/1")), "this file says 'x/1'"),
    "no device": (broken(lambda d: d.pop("device")), "device must be of type str, got None"),
    "no layer": (broken(lambda d: d.update(layer=None)), "layer must be of type dict"),
    "another layer": (broken(lambda d: d["layer"].update(top_k=4)), "the layer inside is E16-K4-H512-I256-bf16"),
    "a missing size": (broken(lambda d: d["layer"].pop("top_k")), "layer: top_k must be of type int, got None"),
    "no entries": (broken(lambda d: d.pop("entries")), "entries must be of type list"),
    "no object": (broken(lambda d: d["entries"].append(3)), "an entry is an object, got 3"),
    "no rows": (broken(lambda d: d["entries"][0].update(rows=0)), "must be positive, got 0"),
    "rows that are no number": (
        broken(lambda d: d["entries"][0].update(rows="8")),
        "rows must be of type int, got '8'",
    ),
    "rows that are true": (broken(lambda d: d["entries"][0].update(rows=True)), "rows must be of type int, got True"),
    "no time": (broken(lambda d: d["entries"][0].update(microseconds=-1)), "microseconds must be positive, got -1"),
    "an infinite time": (broken(lambda d: d["entries"][0].update(microseconds=float("inf"))), "must be positive"),
    "other kernels": (broken(lambda d: d["entries"][0].update(kernels="x")), "'hopper' or 'portable', got 'x'"),
    "kernels of others": (
        broken(lambda d: d["entries"][0].update(kernels="portable")),
        "unknown 'group'; known: block_m",
    ),
    "no group": (
        broken(lambda d: d["entries"][0]["tiles"]["down"].pop("group")),
        "entry 8: group must be of type int, got None",
    ),
    "an unknown field": (broken(lambda d: d["entries"][1]["tiles"]["down"].update(x=1)), "entry 16: unknown 'x'"),
    "two for the same rows": (broken(lambda d: d["entries"].append(d["entries"][0])), "two hopper entries for 8 rows"),
    "an illegal tile": (
        broken(lambda d: d["entries"][0]["tiles"].update(block_x=24)),
        "entry 8 (hopper) cannot run this layer: block_x: needs one of (8, 16, 32, 64) when wide is False, saw 24",
    ),
    "too much shared memory": (
        broken(lambda d: d["entries"][1]["tiles"]["down"].update(num_stages=8, block_n=256)),
        "entry 16 (portable) cannot run this layer: down memory: needs at most",
    ),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_of_the_users_is_an_error(user: Path, text: str, words: str) -> None:
    path = user / "NVIDIA_H200" / "E16-K2-H512-I256-bf16.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        lookup()
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", [BROKEN["no JSON"][0], BROKEN["an illegal tile"][0]], ids=["no JSON", "illegal"])
def test_a_broken_shipped_file_is_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tile_tables.SHIPPED / "NVIDIA_H200" / "E16-K2-H512-I256-bf16.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert lookup().hopper(8) == heuristic_tiles(HOPPER, CONFIG, 8, MEMORY)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "tile table ignored, the heuristic takes its place" in record.getMessage()
    assert path.name in record.getMessage()


def test_a_folder_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "absent")
    with pytest.raises(ConfigError, match=r"MOE_PLUGIN_TILE_TABLES must name a folder .* no folder absent"):
        lookup()


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 7, 100, 1000, 100_000])
@pytest.mark.parametrize("kernels", [HOPPER, PORTABLE])
def test_the_heuristic_is_legal(kernels: str, num_rows: int, scheme: QuantConfig | None) -> None:
    config = replace(CONFIG, quantization=scheme)
    verdict = legal(heuristic_tiles(kernels, config, num_rows, MEMORY), config, MEMORY)
    assert verdict.ok, verdict.reason


HALF_WIDE = HopperTiles(HopperTile(True, 128, 64), HopperTile(False, 64, 64))


@pytest.mark.parametrize(
    ("tiles", "scheme", "gate"),
    [
        (narrow(64, gate_up=64, down=64), None, None),
        (narrow(8, down=64), Fp8Block(), None),
        (narrow(8, gate_up=64), Fp8Block(), "half_w"),
        (narrow(8, gate_up=64), Fp8PerToken(), "half_w"),
        (narrow(8, gate_up=64), Fp8PerTensor(), "half_w"),
        (narrow(8, gate_up=64), STATIC, None),
        (wide(128), None, None),
        (wide(64), None, None),
        (wide(64), Fp8Block(), None),
        (wide(128), Fp8Block(), "half_w"),
        (wide(128), STATIC, "half_w"),
        (narrow(128), None, "block_x"),
        (narrow(gate_up=32), None, "half_w"),
        (narrow(group=0), None, "group"),
        (HopperTiles(HopperTile(True, 64, 128), HopperTile(True, 64, 128)), None, "block_x"),
        (HopperTiles(HopperTile(False, 16, 128), HopperTile(False, 32, 128)), None, "block_x"),
        (HALF_WIDE, None, "wide"),
        (PortableTiles(BLOCK, BLOCK), None, None),
        (PortableTiles(FP8_BLOCK, replace(FP8_BLOCK, block_n=64)), Fp8Block(), None),
        (PortableTiles(replace(FP8_BLOCK, block_n=128), FP8_BLOCK), Fp8Block(), "gate_up.block_n"),
        (PortableTiles(replace(FP8_BLOCK, block_n=128), FP8_BLOCK), STATIC, None),
        (PortableTiles(BLOCK, BLOCK), STATIC, "block_k"),
        (PortableTiles(BLOCK, replace(BLOCK, block_m=32)), None, "block_m"),
        (PortableTiles(replace(BLOCK, block_n=48), BLOCK), None, "gate_up.block_n"),
        (PortableTiles(BLOCK, replace(BLOCK, num_warps=3)), None, "num_warps"),
        (PortableTiles(BLOCK, replace(BLOCK, num_stages=0)), None, "num_stages"),
        (PortableTiles(BLOCK, replace(BLOCK, group_m=100)), None, "group_m"),
        (PortableTiles(*[replace(BLOCK, block_m=128, block_n=256, num_stages=2)] * 2), None, "gate_up registers"),
        (PortableTiles(BLOCK, replace(BLOCK, num_stages=8, block_k=256)), None, "down memory"),
    ],
)
def test_legality(tiles: Tiles, scheme: QuantConfig | None, gate: str | None) -> None:
    verdict = legal(tiles, replace(CONFIG, quantization=scheme), MEMORY)
    assert verdict.ok == (gate is None), verdict.reason
    assert gate is None or gate in [failed.name for failed in verdict.failed]


def test_hopper_tiles_are_for_16_bits_and_fp8() -> None:
    verdict = legal(narrow(), replace(CONFIG, dtype=torch.float32), MEMORY)
    assert [gate.name for gate in verdict.failed] == ["dtype"]


def test_largest_calls_follow_the_tables_of_every_device(user: Path) -> None:
    untuned = {
        (HOPPER, 100, heuristic_tiles(HOPPER, CONFIG, 100, MEMORY).block_x),  # type: ignore[union-attr]
        (PORTABLE, 100, heuristic_tiles(PORTABLE, CONFIG, 100, MEMORY).block_m),  # type: ignore[union-attr]
    }
    assert largest_calls(CONFIG, 100) == untuned
    save(user, table((8, narrow(8)), (200, wide()), (201, narrow(64)), (4, PortableTiles(BLOCK, BLOCK))))
    save(tile_tables.SHIPPED, table((16, narrow(64)), (32, narrow(32)), device="NVIDIA H100"))
    forget_tables()
    # 8 rows serve up to 16 and 16 up to 32; the last ones of each kind serve all; 201 begins to serve at 101.
    assert largest_calls(CONFIG, 100) == untuned | {
        *((HOPPER, 16, 8), (HOPPER, 100, 128), (PORTABLE, 100, 16)),
        *((HOPPER, 32, 64), (HOPPER, 100, 32)),
    }


@pytest.mark.parametrize("kernels", [HOPPER, PORTABLE])
def test_no_call_needs_more_than_the_largest_ones(user: Path, kernels: str) -> None:
    from moe_plugin.kernels.tiling import counting_sort_shapes

    large = PortableTiles(*[replace(BLOCK, block_m=64)] * 2)
    save(user, table((4, narrow(64)), (8, narrow(8)), (40, wide()), (4, large), (32, PortableTiles(BLOCK, BLOCK))))

    def slots(rows: int, rows_of_block: int) -> int:
        return counting_sort_shapes(rows, CONFIG.top_k, CONFIG.num_experts, rows_of_block)["sorted_pairs"][0]

    found = lookup()
    for most in (1, 2, 3, 5, 9, 16, 19, 20, 60, 100):
        declared = max(slots(rows, size) for kind, rows, size in largest_calls(CONFIG, most) if kind == kernels)
        for rows in range(1, most + 1):
            size = found.hopper(rows).block_x if kernels == HOPPER else found.portable(rows).block_m
            assert slots(rows, size) <= declared, (rows, most)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_tables_are_whole_and_legal(path: Path) -> None:
    known = TileTable.load(path)
    assert path.parent.name == device_folder(known.device)
    assert known.entries
    scheme_of = {
        "fp8_block": Fp8Block(),
        "fp8_per_token": Fp8PerToken(),
        "fp8_per_tensor": Fp8PerTensor(),
        "fp8_per_tensor_static": STATIC,
    }
    layer = known.layer
    config = MoEConfig(
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        dtype=torch.float16 if layer.dtype == "fp16" else torch.bfloat16,
        quantization=scheme_of.get(layer.dtype),
    )
    assert LayerShape.of(config) == layer
    for entry in known.entries:
        assert not entry.partial, entry.rows
        assert legal(entry.tiles, config, MEMORY).ok, legal(entry.tiles, config, MEMORY).reason
