"""Pictures are written, in the format the name asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_plugin.bench.plot import draw
from moe_plugin.errors import ConfigError
from tests.bench.runs import MIXTRAL, OURS, QWEN, cell, failed, measured, run

pytest.importorskip("matplotlib")

CELLS = [
    cell(
        measured(OURS, t), measured("vllm", 1.2 * t), measured("deep_gemm", 0.9 * t), tokens=n, dtype=dtype, layer=layer
    )
    for dtype in ("bf16", "fp8_block")
    for layer in (QWEN, MIXTRAL)
    for n, t in ((1, 210.0), (8, 400.0), (512, 900.0))
]


def test_a_png_is_written(tmp_path: Path) -> None:
    file = tmp_path / "experts.png"
    draw([run(*CELLS)], file)
    assert file.read_bytes().startswith(b"\x89PNG")
    # A picture, not an empty frame.
    assert file.stat().st_size > 20_000


def test_an_svg_names_what_it_shows(tmp_path: Path) -> None:
    import matplotlib

    file = tmp_path / "experts.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw([run(*CELLS[:3]), run(*CELLS[3:])], file)
    text = file.read_text()
    for words in (OURS, "vllm", "deep_gemm (GEMMs only)", "qwen3-30b, bf16", "mixtral-8x7b, fp8_block", "NVIDIA H200"):
        assert words in text


def test_gaps_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "gaps.png"
    cells = [cell(measured(OURS, 5000.0), failed("vllm", "failed", "no")), cell(failed("vllm", "wrong", "x"), tokens=1)]
    draw([run(*cells)], file)
    assert file.stat().st_size > 5_000


def test_nothing_to_draw_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw([run(cell(failed("vllm", "failed", "no")))], tmp_path / "none.png")
    with pytest.raises(ConfigError, match=r"picture\.doc"):
        draw([run(*CELLS)], tmp_path / "picture.doc")
