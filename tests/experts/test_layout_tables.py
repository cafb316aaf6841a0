"""Layout tables: which layout a call takes, whose table counts, what workspaces must reckon with, and broken files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.errors import ConfigError
from moe_plugin.experts import layout_tables
from moe_plugin.experts.layout_tables import (
    CONTIGUOUS,
    CONTIGUOUS_TRITON_DOWN,
    CONTIGUOUS_TRITON_GATE_UP,
    LAYOUTS,
    LAYOUTS_OF,
    MASKED,
    MASKED_ROWS,
    SHIPPED,
    TRITON_FUSED_MOE,
    FixedLayout,
    LayoutEntry,
    LayoutLookup,
    LayoutTable,
    describe_rule,
    measured_gain,
    reachable,
)
from moe_plugin.kernels import tile_tables
from moe_plugin.kernels.measured_tables import ENVIRONMENT_VARIABLE, LayerShape, device_folder, forget_tables
from moe_plugin.kernels.tile_tables import TileLookup, largest_calls
from moe_plugin.modular_kernel import ActivationFormat

CONFIG = MoEConfig(num_experts=16, top_k=2, hidden_size=512, intermediate_size=256)
DEVICE = "NVIDIA H200"
FILE = "NVIDIA_H200/E16-K2-H512-I256-bf16.json"
STANDARD, BATCHED = ActivationFormat.STANDARD, ActivationFormat.BATCHED_EXPERTS


def table(
    *entries: tuple[int, str],
    batched: tuple[tuple[int, str], ...] = (),
    config: MoEConfig = CONFIG,
    device: str = DEVICE,
) -> LayoutTable:
    made = LayoutTable(layer=LayerShape.of(config), device=device, deep_gemm="0.1.5", triton="3.6.0", date="2026-01-01")
    for activation_format, pairs in ((STANDARD, entries), (BATCHED, batched)):
        for rows, layout in pairs:
            times = {TRITON_FUSED_MOE: 9.0 + rows, layout: 8.0 + rows}
            entry = LayoutEntry(
                rows=rows,
                activation_format=activation_format,
                layout=layout,
                microseconds=times,
                deep_gemm="0.1.5",
                triton="3.6.0",
            )
            made = made.with_entry(entry, "2026-01-02")
    return made


def ship(saved: LayoutTable) -> Path:
    path = layout_tables.SHIPPED / device_folder(saved.device) / saved.layer.file_name
    saved.save(path)
    return path


def save(folder: Path, saved: LayoutTable) -> Path:
    path = LayoutTable.user_path(folder, saved.device, saved.layer)
    saved.save(path)
    return path


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's, and nothing shipped."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(folder))
    monkeypatch.setattr(layout_tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(layout_tables, "_told", set())
    forget_tables()
    yield folder
    forget_tables()


def lookup(config: MoEConfig = CONFIG, device: str = DEVICE) -> LayoutLookup:
    return LayoutLookup(config, device)


def test_without_a_table_the_number_of_rows_decides() -> None:
    found = lookup()
    assert [found.standard(rows) for rows in (1, 255, 256, 257, 100_000)] == [MASKED] * 3 + [CONTIGUOUS] * 2
    assert [found.batched(rows) for rows in (1, 256, 257, 100_000)] == [MASKED] * 4
    assert MASKED_ROWS == 256


def test_a_call_takes_the_nearest_entry_within_a_factor_of_two_or_the_rule(user: Path) -> None:
    save(user, table((64, TRITON_FUSED_MOE), (2048, CONTIGUOUS_TRITON_DOWN)))
    found = lookup()
    seen = {rows: found.standard(rows) for rows in (1, 31, 32, 128, 129, 256, 257, 1023, 1024, 4096, 1_000_000)}
    assert seen == {
        **dict.fromkeys((1, 31), MASKED),
        **dict.fromkeys((32, 128), TRITON_FUSED_MOE),
        **dict.fromkeys((129, 256), MASKED),
        **dict.fromkeys((257, 1023), CONTIGUOUS),
        **dict.fromkeys((1024, 4096, 1_000_000), CONTIGUOUS_TRITON_DOWN),
    }


def test_entries_are_of_one_device_layer_and_activation_format(user: Path) -> None:
    save(user, table((64, TRITON_FUSED_MOE)))
    assert lookup().standard(64) == TRITON_FUSED_MOE
    assert lookup().batched(64) == MASKED
    assert lookup(device="NVIDIA H100").standard(64) == MASKED
    for other in (replace(CONFIG, top_k=1), replace(CONFIG, quantization=Fp8Block())):
        assert lookup(other).standard(64) == MASKED
    forget_tables()
    save(user, table(batched=((64, TRITON_FUSED_MOE),)))
    assert lookup().standard(64) == MASKED
    assert lookup().batched(64) == TRITON_FUSED_MOE


def test_the_users_table_counts_first_and_the_shipped_one_fills_its_gaps(user: Path) -> None:
    ship(table((8, CONTIGUOUS), (64, CONTIGUOUS_TRITON_GATE_UP)))
    path = save(user, table((8, TRITON_FUSED_MOE), (512, TRITON_FUSED_MOE)))
    assert path == user / "layouts" / FILE
    mine, shipped, none = (lookup().choose(STANDARD, rows) for rows in (8, 64, 200))
    assert (mine.layout, mine.source) == (TRITON_FUSED_MOE, str(path))
    assert mine.origin == f"{path}, entry for 8 rows"
    assert (shipped.layout, shipped.source) == (CONTIGUOUS_TRITON_GATE_UP, FILE)
    # The last shipped entry holds on where the user's table has a gap.
    assert none.source == FILE


def test_tile_tables_and_layout_tables_do_not_meet(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds have files of the same names; neither reads the other's."""
    monkeypatch.setattr(tile_tables, "SHIPPED", user / "none")
    before = largest_calls(CONFIG, 100)
    save(user, table((64, TRITON_FUSED_MOE)))
    forget_tables()
    TileLookup(CONFIG, DEVICE, 1 << 16)
    assert largest_calls(CONFIG, 100) == before
    assert lookup().standard(64) == TRITON_FUSED_MOE


def test_without_the_variable_the_shipped_tables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ship(table((8, CONTIGUOUS)))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert lookup().standard(8) == CONTIGUOUS


def test_each_entry_is_told_once(user: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(user, table((8, TRITON_FUSED_MOE), (9, CONTIGUOUS), batched=((8, TRITON_FUSED_MOE),)))
    with caplog.at_level(logging.INFO, logger="moe_plugin"):
        for found in (lookup(), lookup()):
            for rows in (8, 7, 8, 2, 1):
                found.standard(rows)
            for rows in (8, 16, 1):
                found.batched(rows)
    name = "layout of E16-K2-H512-I256-bf16 for"
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} 8 rows, Standard: triton_fused_moe ({path}, entry for 8 rows)",
        f"{name} 2 rows, Standard: masked (no entry)",
        f"{name} 1 rows, Standard: masked (no entry)",
        f"{name} 8 rows, BatchedExperts: triton_fused_moe ({path}, entry for 8 rows)",
        f"{name} 1 rows, BatchedExperts: masked (no entry)",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fixed_layout_is_taken_by_every_call_that_can(layout: str) -> None:
    fixed = FixedLayout(layout)
    assert {fixed.standard(rows) for rows in (1, 256, 257, 4096)} == {layout}
    assert fixed.batched(8) == (layout if layout in LAYOUTS_OF[BATCHED] else MASKED)
    assert fixed.choose(STANDARD, 8).layout == layout
    assert fixed.ranges(STANDARD, 5000) == [(layout, 5000)]


def test_a_fixed_layout_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"a layout must be one of masked, contiguous, .* got 'diagonal'"):
        FixedLayout("diagonal")


def test_a_table_survives_the_file(user: Path) -> None:
    written = table((64, CONTIGUOUS), (8, MASKED), batched=((16, TRITON_FUSED_MOE),))
    newer = replace(written.entries[1], rows=9, deep_gemm="0.2.0", microseconds={MASKED: 1.5})
    written = written.with_entry(newer, "2026-01-03")
    path = save(user, written)
    assert LayoutTable.load(path) == written
    assert [(e.group, e.rows) for e in written.entries] == [
        ("BatchedExperts", 16),
        ("Standard", 8),
        ("Standard", 9),
        ("Standard", 64),
    ]
    data = json.loads(path.read_text())
    assert list(data) == ["schema", "device", "layer", "deep_gemm", "triton", "date", "entries"]
    assert (data["schema"], data["deep_gemm"], data["triton"]) == ("moe_plugin.layouts/1", "0.2.0", "3.6.0")
    assert data["entries"][2] == {
        "rows": 9,
        "activation_format": "Standard",
        "layout": "masked",
        "microseconds": {"masked": 1.5},
    }
    assert [entry.get("deep_gemm") for entry in data["entries"]] == ["0.1.5", "0.1.5", None, "0.1.5"]
    assert sum('"rows"' in line for line in path.read_text().splitlines()) == 4


def test_an_entry_replaces_the_one_for_its_rows_and_format() -> None:
    known = table((8, CONTIGUOUS), (8, MASKED), batched=((8, TRITON_FUSED_MOE),))
    assert [entry.layout for entry in known.entries] == [TRITON_FUSED_MOE, MASKED]
    found = known.entry("Standard", 8)
    assert found is not None
    assert found.layout == MASKED
    assert known.entry("Standard", 9) is None


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(table((8, MASKED), batched=((16, TRITON_FUSED_MOE),)).to_json())
    change(data)
    return json.dumps(data)


BATCHED_ENTRY, STANDARD_ENTRY = 0, 1
BROKEN = {
    "no JSON": ("{", "not a layout table"),
    "a tile table": (
        broken(lambda d: d.update(schema="moe_plugin.tiles/1")),
        "layout tables have schema 'moe_plugin.layouts/1', this file says 'moe_plugin.tiles/1'",
    ),
    "no version": (broken(lambda d: d.pop("deep_gemm")), "deep_gemm must be of type str, got None"),
    "another layer": (broken(lambda d: d["layer"].update(top_k=4)), "the layer inside is E16-K4-H512-I256-bf16"),
    "no rows": (broken(lambda d: d["entries"][1].update(rows=0)), "entry 0: rows must be positive, got 0"),
    "an unknown layout": (
        broken(lambda d: d["entries"][STANDARD_ENTRY].update(layout="diagonal")),
        "entry 8: layout must be one of masked, contiguous, contiguous_triton_gate_up, contiguous_triton_down, "
        "triton_fused_moe in Standard, got 'diagonal'",
    ),
    "a layout of the other format": (
        broken(lambda d: d["entries"][BATCHED_ENTRY].update(layout="contiguous")),
        "entry 16: layout must be one of masked, triton_fused_moe in BatchedExperts, got 'contiguous'",
    ),
    "a time of the other format": (
        broken(lambda d: d["entries"][BATCHED_ENTRY]["microseconds"].update(contiguous=1.0)),
        "in BatchedExperts, got 'contiguous'",
    ),
    "an unknown format": (
        broken(lambda d: d["entries"][STANDARD_ENTRY].update(activation_format="standard")),
        "activation_format must be one of Standard, BatchedExperts, got 'standard'",
    ),
    "no times": (broken(lambda d: d["entries"][0].update(microseconds=3.0)), "microseconds must be of type dict"),
    "no time of its layout": (
        broken(lambda d: d["entries"][STANDARD_ENTRY]["microseconds"].pop("masked")),
        "microseconds must have those of its layout, masked, got ['triton_fused_moe']",
    ),
    "a negative time": (
        broken(lambda d: d["entries"][STANDARD_ENTRY]["microseconds"].update(masked=-1)),
        "entry 8: microseconds: masked must be positive, got -1",
    ),
    "two for the same rows": (
        broken(lambda d: d["entries"].append(d["entries"][STANDARD_ENTRY])),
        "there are two Standard entries for 8 rows",
    ),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_of_the_users_is_an_error(user: Path, text: str, words: str) -> None:
    path = user / "layouts" / FILE
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for asked in (lookup, lambda: reachable(CONFIG, 8), lambda: measured_gain(CONFIG, DEVICE)):
        with pytest.raises(ConfigError) as caught:
            asked()
        assert str(path) in str(caught.value)
        assert words in str(caught.value)


def test_a_broken_shipped_file_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    path = layout_tables.SHIPPED / FILE
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert lookup().standard(257) == CONTIGUOUS
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "layout table ignored, the rule of 256 rows takes its place" in record.getMessage()
    assert path.name in record.getMessage()


def test_contiguous_rows_are_never_masked(user: Path) -> None:
    """They take the fastest other layout that was measured for Standard rows, and contiguous where none was."""
    made = table((64, MASKED))
    alone = replace(made.entries[0], rows=512, microseconds={MASKED: 5.0})
    save(user, made.with_entry(alone, "2026-01-02"))
    found = lookup()
    for _ in range(2):  # looked up, and remembered
        assert [found.standard(rows) for rows in (20, 64, 300, 600)] == [MASKED] * 4
        contiguous = [found.contiguous(rows) for rows in (20, 64, 300, 600)]
        assert contiguous == [CONTIGUOUS, TRITON_FUSED_MOE, CONTIGUOUS, CONTIGUOUS]
    ranges = found.ranges(ActivationFormat.CONTIGUOUS, 600)
    assert ranges == [(CONTIGUOUS, 31), (TRITON_FUSED_MOE, 128), (CONTIGUOUS, 600)]
    largest = reachable(CONFIG, 600, DEVICE, ActivationFormat.CONTIGUOUS)
    assert largest == {(CONTIGUOUS, 600), (TRITON_FUSED_MOE, 128)}
    assert FixedLayout(MASKED).contiguous(8) == CONTIGUOUS
    assert FixedLayout(TRITON_FUSED_MOE).contiguous(8) == TRITON_FUSED_MOE


def test_reachable_without_tables() -> None:
    assert reachable(CONFIG, 0) == set()
    assert reachable(CONFIG, 100) == {(MASKED, 100)}
    assert reachable(CONFIG, 256) == {(MASKED, 256)}
    assert reachable(CONFIG, 257) == {(MASKED, 256), (CONTIGUOUS, 257)}
    assert reachable(CONFIG, 4096, activation_format=BATCHED) == {(MASKED, 4096)}


def test_reachable_on_one_device_and_on_any(user: Path) -> None:
    save(user, table((64, TRITON_FUSED_MOE), batched=((32, TRITON_FUSED_MOE),)))
    ship(table((512, MASKED), (4096, CONTIGUOUS_TRITON_GATE_UP), device="NVIDIA H100"))
    assert reachable(CONFIG, 1000, DEVICE) == {(MASKED, 31), (TRITON_FUSED_MOE, 1000)}
    assert reachable(CONFIG, 1000, DEVICE, BATCHED) == {(MASKED, 15), (TRITON_FUSED_MOE, 1000)}
    # Between the reaches of two entries, from 1025 to 2047, the rule holds.
    assert reachable(CONFIG, 1024, "NVIDIA H100") == {(MASKED, 1024)}
    assert reachable(CONFIG, 2048, "NVIDIA H100") == {
        (MASKED, 1024),
        (CONTIGUOUS, 2047),
        (CONTIGUOUS_TRITON_GATE_UP, 2048),
    }
    # Any device, or one without a table.
    assert reachable(CONFIG, 1000) == {(MASKED, 1000), (CONTIGUOUS, 1000), (TRITON_FUSED_MOE, 1000)}


rows_of_entries = st.lists(st.tuples(st.integers(1, 600), st.sampled_from(LAYOUTS)), max_size=5)


@settings(max_examples=60, deadline=None)
@given(mine=rows_of_entries, shipped=rows_of_entries, most=st.integers(1, 1500))
def test_reachable_is_exact(
    tmp_path_factory: pytest.TempPathFactory,
    mine: list[tuple[int, str]],
    shipped: list[tuple[int, str]],
    most: int,
) -> None:
    """Against asking for every number of rows."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tables")
        patch.setenv(ENVIRONMENT_VARIABLE, str(folder))
        patch.setattr(layout_tables, "SHIPPED", folder / "shipped")
        forget_tables()
        save(folder, table(*mine))
        ship(table(*shipped))
        found = lookup()
        largest: dict[str, int] = {}
        for rows in range(1, most + 1):
            largest[found.choose(STANDARD, rows).layout] = rows
        assert reachable(CONFIG, most, DEVICE) == set(largest.items())
        on_any_device = dict(reachable(CONFIG, most))
        assert all(on_any_device[layout] >= rows for layout, rows in largest.items())
        taken = {id(found.choose(STANDARD, rows).entry) for rows in range(1, 1300)} - {id(None)}
        assert {id(entry) for entry in found.entries(STANDARD)} == taken


def test_a_gain_is_one_that_was_measured_on_this_device_and_layer(user: Path) -> None:
    assert not measured_gain(CONFIG, DEVICE)
    ship(table((8, TRITON_FUSED_MOE), (512, TRITON_FUSED_MOE), batched=((8, MASKED),)))
    forget_tables()
    assert not measured_gain(CONFIG, DEVICE)
    save(user, table((64, MASKED)))
    forget_tables()
    assert measured_gain(CONFIG, DEVICE)
    assert not measured_gain(CONFIG, "NVIDIA H100")
    assert not measured_gain(replace(CONFIG, top_k=1), DEVICE)


def test_a_gain_that_the_user_measured_away_is_none(user: Path) -> None:
    ship(table((64, CONTIGUOUS)))
    assert measured_gain(CONFIG, DEVICE)
    save(user, table((32, TRITON_FUSED_MOE), (64, TRITON_FUSED_MOE)))
    forget_tables()
    assert not measured_gain(CONFIG, DEVICE)


def test_the_rule_in_words(user: Path) -> None:
    assert describe_rule(CONFIG, DEVICE) == "masked up to 256 rows, contiguous above; not measured on NVIDIA H200"
    save(user, table((16, TRITON_FUSED_MOE), (2048, CONTIGUOUS_TRITON_DOWN)))
    forget_tables()
    assert describe_rule(CONFIG, DEVICE) == (
        "masked up to 7 rows, triton_fused_moe up to 32 rows, masked up to 256 rows, contiguous up to 1023 rows, "
        "contiguous_triton_down above; measured at 2 numbers of rows"
    )
    save(user, table((16, TRITON_FUSED_MOE), (1, TRITON_FUSED_MOE)))
    forget_tables()
    words = "triton_fused_moe up to 2 rows, masked up to 7 rows, triton_fused_moe above"
    assert describe_rule(CONFIG, DEVICE) == f"{words}; measured at 2 numbers of rows"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_tables_are_whole(path: Path) -> None:
    known = LayoutTable.load(path)
    assert path.parent.name == device_folder(known.device)
    assert known.entries
    for entry in known.entries:
        assert entry.microseconds[entry.layout] <= 1.03 * min(entry.microseconds.values()), entry.rows
