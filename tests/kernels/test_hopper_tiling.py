"""Which tiles the Hopper kernels take, which layers and which weights; nothing here needs Triton or a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from moe_plugin.config import Fp8Block, Fp8PerTensor, Fp8PerToken, ParallelConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.kernels.hopper_tiling import (
    LEAST_SCALES,
    NARROW_ROWS,
    SHARED_MEMORY,
    STAGE_DEPTH_BYTES,
    WIDE_ROWS,
    HopperTile,
    hopper_tiles,
    hopper_verdict,
    weights_take_tma,
)
from tests.strategies.machines import CPU, TRITON, gpu, layer_config

TILES = [HopperTile(wide=True, block_x=WIDE_ROWS, half_w=half_w) for half_w in (64, 128)] + [
    HopperTile(wide=False, block_x=block_x, half_w=half_w) for block_x in NARROW_ROWS for half_w in (64, 128)
]
# (bytes of an element of the output, whether scales of groups are loaded): bf16, fp8 to fp8, fp8 to bf16 and to fp32.
OUTPUTS = [(2, False), (1, True), (1, False), (2, True), (4, True)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("out_element_size", "has_group_scales"), OUTPUTS)
def test_stages_fit_shared_memory_and_one_more_would_not(
    tile: HopperTile, out_element_size: int, has_group_scales: bool
) -> None:
    def needed(stages: int) -> int:
        operands = (tile.block_x + 2 * tile.half_w) * STAGE_DEPTH_BYTES
        scales = 4 * max(tile.block_x, LEAST_SCALES) if has_group_scales else 0
        barriers = 2 * 8
        out = (4 if tile.wide else 1) * tile.out_rows * tile.out_columns * out_element_size
        return stages * (operands + scales + barriers) + out

    stages = tile.stages(out_element_size, has_group_scales)
    assert 3 <= stages <= 10
    assert needed(stages) <= SHARED_MEMORY
    assert stages == 10 or needed(stages + 1) > SHARED_MEMORY - 1024


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_consumer_is_one_or_two_whole_warp_groups(tile: HopperTile) -> None:
    # 64 rows of the first operand of wgmma are one warp group's: of X when wide, else of both halves of the weights.
    first_operand_rows = tile.out_rows if tile.wide else 2 * tile.half_w
    assert tile.num_warps % 4 == 0
    assert first_operand_rows % (16 * tile.num_warps) == 0
    assert tile.block_x % tile.out_rows == 0
    assert tile.half_w % tile.out_columns == 0


@pytest.mark.parametrize("element_size", [1, 2])
def test_tiles_of_a_call_share_their_rows_and_grow_with_the_rows_per_expert(element_size: int) -> None:
    chosen = [hopper_tiles(rows, element_size) for rows in range(1, 700)]
    for tiles in chosen:
        assert tiles.gate_up.wide == tiles.down.wide
        assert tiles.gate_up.block_x == tiles.down.block_x == tiles.block_x
        assert tiles.block_x in ((WIDE_ROWS,) if tiles.gate_up.wide else NARROW_ROWS)
        for tile in (tiles.gate_up, tiles.down):
            assert HopperTile(tile.wide, tile.block_x, tile.half_w) in TILES
            # fp8 sums and products of 256 columns together are more than the registers of a consumer.
            assert not (element_size == 1 and tile.wide and tile.half_w == 128)
    assert all(earlier.block_x <= later.block_x for earlier, later in pairwise(chosen))
    assert not chosen[0].gate_up.wide
    assert chosen[-1].gate_up.wide


def test_docstring_examples() -> None:
    few, many = hopper_tiles(4, 2).gate_up, hopper_tiles(512, 2).gate_up
    assert (few.wide, few.block_x, few.half_w, few.stages(2, False)) == (False, 16, 64, 10)
    assert (many.wide, many.block_x, many.half_w, many.stages(2, False)) == (True, 128, 128, 4)


def failing(config_changes: dict[str, Any], environment: Environment) -> list[str]:
    return [gate.name for gate in hopper_verdict(layer_config(**config_changes), environment).failed]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16},
        {"quantization": Fp8Block()},
        {"quantization": Fp8PerToken(), "dtype": torch.float16},
        {"quantization": Fp8PerTensor(static_activations=True), "dtype": torch.float32},
        {"hidden_size": 2880, "intermediate_size": 704, "quantization": Fp8Block()},
        {"hidden_size": 72, "intermediate_size": 8},
    ],
    ids=str,
)
def test_layers_for_the_hopper_kernels(changes: dict[str, Any]) -> None:
    assert failing(changes, gpu(90)) == []


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 100, 103, 120])
def test_no_other_generation(sm: int) -> None:
    verdict = hopper_verdict(layer_config(), gpu(sm))
    assert verdict.reason == f"sm: needs SM 90: wgmma exists nowhere else, saw SM {sm}"


def test_no_gpu() -> None:
    assert hopper_verdict(layer_config(), CPU).reason.endswith("saw no CUDA device")


@pytest.mark.parametrize(
    "version", ["3.6.0", "3.6", "3.7.1", "3.10.0", "4.0", "3.6.0+git1a2b3c4", "3.6.0.post1", "3.6rc1"]
)
def test_recent_triton(version: str) -> None:
    assert failing({}, gpu(90, packages={"triton": Package("triton", version)})) == []


@pytest.mark.parametrize(
    ("package", "seen"),
    [
        (Package("triton", "3.5.1"), "saw 3.5.1"),
        (Package("triton", "2.3"), "saw 2.3"),
        (Package("triton", "unknown"), "saw unknown"),
        (Package("triton", "3.6.0", "no driver"), "saw 3.6.0, unusable: no driver"),
        (Package("triton"), "saw not installed"),
    ],
    ids=str,
)
def test_older_broken_or_missing_triton(package: Package, seen: str) -> None:
    (gate,) = hopper_verdict(layer_config(), gpu(90, packages={"triton": package})).failed
    assert gate.name == "triton"
    assert str(gate).startswith("triton: needs Triton 3.6 or newer")
    assert str(gate).endswith(seen)


def test_a_described_machine_has_a_recent_triton() -> None:
    assert failing({}, CPU.pretend(packages={}).pretend(sm=90)) == []


def test_32_bit_operands() -> None:
    assert failing({"dtype": torch.float32}, gpu(90)) == ["dtype"]


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"hidden_size": 100}, "H 100, I 128"),
        ({"intermediate_size": 36}, "H 64, I 36"),
        ({"hidden_size": 72, "quantization": Fp8Block()}, "H 72, I 128"),
        ({"intermediate_size": 40, "tp_size": 2}, "H 64, I 20"),
    ],
)
def test_rows_must_be_whole_16_bytes(changes: dict[str, Any], seen: str) -> None:
    (gate,) = hopper_verdict(layer_config(**changes), gpu(90)).failed
    assert gate.name == "sizes"
    assert f"multiples of {16 if 'quantization' in changes else 8}" in str(gate)
    assert str(gate).endswith(f"saw {seen}")


def test_every_failing_gate_is_named() -> None:
    environment = gpu(80, packages=TRITON | {"triton": Package("triton", "3.5.1")})
    assert failing({"dtype": torch.float32, "hidden_size": 33}, environment) == ["sm", "triton", "dtype", "sizes"]


def test_sizes_are_those_of_one_tp_rank() -> None:
    config = layer_config(intermediate_size=48)
    assert hopper_verdict(config, gpu(90)).ok
    assert config.parallel == ParallelConfig()
    assert not hopper_verdict(layer_config(intermediate_size=48, tp_size=4), gpu(90)).ok


def test_weights_that_are_one_matrix_take_tma() -> None:
    weights = torch.zeros(3, 8, 64, dtype=torch.bfloat16)
    assert weights_take_tma(weights)
    assert weights_take_tma(weights[1:])
    assert weights_take_tma(weights[:, ::2][:1]) is False
    assert weights_take_tma(weights[:0])
    # One expert's stride to the next is nobody's.
    assert weights_take_tma(torch.zeros(16, 64)[None, :8].as_strided((1, 8, 64), (7, 64, 1)))


@pytest.mark.parametrize(
    "weights",
    [
        torch.zeros(3, 8, 80)[:, :, :64],
        torch.zeros(3, 10, 64)[:, :8],
        torch.zeros(6, 8, 64)[::2],
        torch.zeros(3, 64, 8).mT,
        torch.zeros(3 * 8 * 64 + 1)[1:].view(3, 8, 64),
        torch.zeros(1, 8, 64).expand(3, 8, 64),
    ],
    ids=["padded rows", "padded experts", "every other expert", "transposed", "4 bytes off", "one expert expanded"],
)
def test_strided_or_unaligned_weights_do_not(weights: torch.Tensor) -> None:
    assert not weights_take_tma(weights)
