"""Measured tiles of the grouped GEMMs: JSON tables per device and layer shape, and the choice between them and the
heuristic. Works without Triton.

Files and the choice of an entry are those of measured_tables. Schema `moe_plugin.tiles/1`:

    schema, device       the device as its driver names it
    layer                num_experts, top_k, hidden_size, intermediate_size, dtype
    triton, date         of the last measurement, the date in UTC
    entries              one object per number of rows and kernels:
        rows             N, rows that the experts receive
        kernels          "hopper" (hopper_gemm) or "portable" (grouped_gemm)
        microseconds     of the whole layer, when this was measured
        triton           of that measurement, where it is not the table's
        partial          true where the search was interrupted
        tiles            hopper: wide, block_x, gate_up {half_w, group}, down {half_w, group}
                         portable: gate_up and down, each the fields of BlockConfig

The last entry holds on beyond twice its rows, unless the heuristic has larger blocks there. Where there is no entry the
heuristic decides.

Example, entries for 8 and 32 rows: 1 row -> heuristic, 4 and 15 -> entry 8, 17 and 64 -> entry 32, 65 -> entry 32 if
the heuristic for 65 rows has no larger blocks.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from moe_plugin.config import MoEConfig
from moe_plugin.errors import ConfigError
from moe_plugin.kernels.hopper_tiling import NARROW_ROWS, WIDE_ROWS, HopperTile, HopperTiles, hopper_tiles
from moe_plugin.kernels.measured_tables import (
    MOST_REMEMBERED,
    REACH,
    LayerShape,
    MeasuredTable,
    Told,
    ignore,
    read_field,
    read_record,
    read_time,
    tables_of_any_device,
    tables_of_device,
    tell_once,
)
from moe_plugin.kernels.tiling import (
    BlockConfig,
    block_config,
    cdiv,
    down_block_config,
    shared_memory_bytes,
)
from moe_plugin.quantization import FP8_DTYPE, GROUP_SIZE, has_static_activations, input_group_size
from moe_plugin.verdict import Gate, Verdict

logger = logging.getLogger(__name__)

SCHEMA = "moe_plugin.tiles/1"
SHIPPED = Path(__file__).with_name("tables")
HOPPER, PORTABLE = "hopper", "portable"


@dataclass(frozen=True, slots=True)
class PortableTiles:
    """Tiles of the two GEMMs of grouped_gemm. They share `block_m`, by which the rows are sorted."""

    gate_up: BlockConfig
    down: BlockConfig

    @property
    def block_m(self) -> int:
        return self.gate_up.block_m


Tiles: TypeAlias = HopperTiles | PortableTiles


def kernels_of(tiles: Tiles) -> str:
    """Which kernels take these tiles: "hopper" or "portable"."""
    return HOPPER if isinstance(tiles, HopperTiles) else PORTABLE


def block_rows(tiles: Tiles) -> int:
    """Rows of a block, by which rows are sorted and buffers are sized."""
    return tiles.block_x if isinstance(tiles, HopperTiles) else tiles.block_m


def heuristic_tiles(kernels: str, config: MoEConfig, num_rows: int, shared_memory: int) -> Tiles:
    """The untuned tiles for `num_rows` received rows, if routing were uniform."""
    rows_per_expert = cdiv(num_rows * config.top_k, config.num_experts)
    if kernels == HOPPER:
        return hopper_tiles(rows_per_expert, config.weight_dtype.itemsize)
    gate_up = block_config(rows_per_expert, config.weight_dtype, shared_memory)
    return PortableTiles(gate_up, down_block_config(gate_up, config.weight_dtype, shared_memory))


def legal(tiles: Tiles, config: MoEConfig, shared_memory: int) -> Verdict:
    """Whether the kernels can run a layer in these tiles.

    shared_memory: bytes that a thread block may use, for the portable kernels; the others are for SM 90 alone.
    """
    return (
        _legal_hopper(tiles, config)
        if isinstance(tiles, HopperTiles)
        else _legal_portable(tiles, config, shared_memory)
    )


def _legal_hopper(tiles: HopperTiles, config: MoEConfig) -> Verdict:
    scheme, gate_up, down = config.quantization, tiles.gate_up, tiles.down
    measured_scales = scheme is not None and not has_static_activations(scheme)
    wide, block_x = gate_up.wide, gate_up.block_x
    blocks = (WIDE_ROWS,) if wide else NARROW_ROWS
    both = f"{gate_up.half_w} and {down.half_w}"
    gates = [
        Gate("dtype", config.weight_dtype.itemsize in (1, 2), str(config.weight_dtype), "16-bit or fp8 operands"),
        Gate("wide", down.wide == wide, f"{wide} and {down.wide}", "the same for both GEMMs"),
        Gate("block_x", down.block_x == block_x, f"{block_x} and {down.block_x}", "the same for both GEMMs"),
        Gate("block_x", block_x in blocks, str(block_x), f"one of {blocks} when wide is {wide}"),
        Gate("half_w", {gate_up.half_w, down.half_w} <= {64, 128}, both, "64 or 128"),
        *_gates_of_sizes("group", (gate_up.group, down.group), range(1, 65)),
    ]
    if wide and scheme is not None:
        needs = "64 for fp8 rows of 128, whose products and sums fill the registers"
        gates.append(Gate("half_w", gate_up.half_w == down.half_w == 64, both, needs))
    elif measured_scales:
        needs = "128: the consumer of a narrow tile quantizes a whole group of columns"
        gates.append(Gate("half_w", gate_up.half_w == GROUP_SIZE, str(gate_up.half_w), needs))
    if all(gate.ok for gate in gates):
        x_groups = scheme is not None and input_group_size(scheme) is not None
        stages = (
            gate_up.stages(config.weight_dtype.itemsize, x_groups),
            down.stages(config.dtype.itemsize, measured_scales),
        )
        gates += _gates_of_sizes("stages", stages, range(2, 1 << 10))
    return Verdict.of(*gates)


def _legal_portable(tiles: PortableTiles, config: MoEConfig, shared_memory: int) -> Verdict:
    gate_up, down, dtype = tiles.gate_up, tiles.down, config.weight_dtype
    fp8 = dtype == FP8_DTYPE
    powers = (16, 32, 64, 128, 256)
    shared = f"{gate_up.block_m} and {down.block_m}"
    gates = [
        Gate("block_m", gate_up.block_m == down.block_m, shared, "the same for both GEMMs"),
        *_gates_of_sizes("block_m", (gate_up.block_m,), powers[:4]),
        # Half of them are gate rows, half are up rows.
        *_gates_of_sizes("gate_up.block_n", (gate_up.block_n,), powers[1:]),
        *_gates_of_sizes("down.block_n", (down.block_n,), powers),
        *_gates_of_sizes("block_k", (gate_up.block_k, down.block_k), (GROUP_SIZE,) if fp8 else powers),
        *_gates_of_sizes("group_m", (gate_up.group_m, down.group_m), range(1, 65)),
        *_gates_of_sizes("num_warps", (gate_up.num_warps, down.num_warps), (1, 2, 4, 8, 16)),
        *_gates_of_sizes("num_stages", (gate_up.num_stages, down.num_stages), range(1, 9)),
    ]
    if fp8 and config.quantization is not None and not has_static_activations(config.quantization):
        needs = f"{2 * GROUP_SIZE}: a program quantizes a whole group of columns"
        gates.append(Gate("gate_up.block_n", gate_up.block_n == 2 * GROUP_SIZE, str(gate_up.block_n), needs))
    for name, block in (("gate_up", gate_up), ("down", down)):
        used = block.shared_memory(dtype)
        gates.append(Gate(f"{name} memory", used <= shared_memory, f"{used} bytes", f"at most {shared_memory}"))
        sums = block.block_m * block.block_n // (32 * max(block.num_warps, 1))
        most = 64 if fp8 else 128
        gates.append(Gate(f"{name} registers", sums <= most, f"{sums} sums per thread", f"at most {most}"))
    return Verdict.of(*gates)


def _gates_of_sizes(name: str, sizes: Iterable[int], allowed: Any) -> list[Gate]:
    known = f"{allowed.start} to {allowed.stop - 1}" if isinstance(allowed, range) else f"one of {allowed}"
    return [Gate(name, size in allowed, str(size), known) for size in sizes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Tiles for a number of received rows. See the module's docstring."""

    rows: int
    tiles: Tiles
    microseconds: float
    triton: str
    partial: bool = False

    @property
    def kernels(self) -> str:
        return kernels_of(self.tiles)

    @property
    def group(self) -> str:
        return self.kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class TileTable(MeasuredTable[Entry]):
    """The entries of one layer on one device, by kernels, in the order of their rows."""

    schema: ClassVar[str] = SCHEMA
    kind: ClassVar[str] = "tile table"
    instead: ClassVar[str] = "the heuristic"

    def nearest(self, kernels: str, num_rows: int, least_block: int = 0) -> Entry | None:
        """The entry for `num_rows` >= 1 rows, if there is one.

        least_block: rows that a block of an entry must have to hold beyond its reach.
        """
        return self.nearest_entry(kernels, num_rows, lambda entry: block_rows(entry.tiles) >= least_block)

    @staticmethod
    def entry_to_data(entry: Entry) -> dict[str, Any]:
        data: dict[str, Any] = {"rows": entry.rows, "kernels": entry.kernels, "microseconds": entry.microseconds}
        data |= {"partial": True} if entry.partial else {}
        return data | {"tiles": _tiles_to_data(entry.tiles)}

    @staticmethod
    def entry_from_data(data: Mapping[str, Any], versions: Mapping[str, str]) -> Entry:
        where = f"entry {data['rows']}"
        kernels, tiles = read_field(data, "kernels", str, where), read_field(data, "tiles", dict, where)
        if kernels not in (HOPPER, PORTABLE):
            raise ConfigError(f"{where}: kernels must be {HOPPER!r} or {PORTABLE!r}, got {kernels!r}")
        return Entry(
            rows=data["rows"],
            tiles=_tiles_from_data(kernels, tiles, where),
            microseconds=read_time(data, "microseconds", where),
            partial=read_field(data, "partial", bool, where) if "partial" in data else False,
            **versions,
        )


def _tiles_to_data(tiles: Tiles) -> dict[str, Any]:
    if isinstance(tiles, PortableTiles):
        return dataclasses.asdict(tiles)
    parts = {"gate_up": tiles.gate_up, "down": tiles.down}
    return {
        "wide": tiles.gate_up.wide,
        "block_x": tiles.block_x,
        **{name: {"half_w": tile.half_w, "group": tile.group} for name, tile in parts.items()},
    }


def _tiles_from_data(kernels: str, data: Mapping[str, Any], where: str) -> Tiles:
    parts = [read_field(data, name, dict, where) for name in ("gate_up", "down")]
    if kernels == PORTABLE:
        return PortableTiles(*(read_record(BlockConfig, part, where) for part in parts))
    common = {"wide": read_field(data, "wide", bool, where), "block_x": read_field(data, "block_x", int, where)}
    return HopperTiles(*(read_record(HopperTile, common | part, where) for part in parts))


def largest_calls(config: MoEConfig, num_rows: int) -> set[tuple[str, int, int]]:
    """(kernels, rows, rows of a block) of the largest calls of at most `num_rows` rows, on any device.

    For workspaces, whose size is asked for without a device. More rows in the same blocks need larger buffers, so the
    heuristic stands there for `num_rows`, and each entry of a table for the largest call that it may serve.
    """
    layer = LayerShape.of(config)
    found = {
        (kernels, num_rows, block_rows(heuristic_tiles(kernels, config, num_rows, shared_memory_bytes(None))))
        for kernels in (HOPPER, PORTABLE)
    }
    for each in tables_of_any_device(TileTable, SHIPPED, layer):
        entries = each.table.entries
        last = {kernels: max((e.rows for e in entries if e.kernels == kernels), default=0)
                for kernels in (HOPPER, PORTABLE)}  # fmt: skip
        for entry in entries:
            if entry.rows <= REACH * num_rows:
                ends = entry.rows < last[entry.kernels]
                largest = min(num_rows, REACH * entry.rows) if ends else num_rows
                found.add((entry.kernels, largest, block_rows(entry.tiles)))
    return found


@dataclass(frozen=True, slots=True)
class Choice:
    """Tiles and where they are from: an entry of the table `source`, or the heuristic where `entry` is None."""

    tiles: Tiles
    entry: Entry | None = None
    source: str = ""


class TileLookup:
    """The tiles of one layer on one device, by number of received rows.

    device_name: as the driver has it, or "cpu". shared_memory: bytes that a thread block may use there.
    Raises ConfigError when a table of the user's is broken or has tiles that the layer cannot run in.
    """

    def __init__(self, config: MoEConfig, device_name: str, shared_memory: int) -> None:
        self._config, self._shared_memory = config, shared_memory
        self._layer = LayerShape.of(config)
        self._tables = [
            (found.source, found.table)
            for found in tables_of_device(TileTable, SHIPPED, device_name, self._layer)
            if self._is_legal(found.table, found.source, found.shipped)
        ]
        self._found: dict[tuple[str, int], Tiles] = {}

    def hopper(self, num_rows: int) -> HopperTiles:
        """For the Hopper kernels and `num_rows` >= 1 received rows."""
        tiles = self._found.get((HOPPER, num_rows)) or self._search(HOPPER, num_rows)
        assert isinstance(tiles, HopperTiles)
        return tiles

    def portable(self, num_rows: int) -> PortableTiles:
        """For the portable kernels and `num_rows` >= 1 received rows."""
        tiles = self._found.get((PORTABLE, num_rows)) or self._search(PORTABLE, num_rows)
        assert isinstance(tiles, PortableTiles)
        return tiles

    def batched(self, max_tokens: int) -> PortableTiles:
        """For BatchedExperts of `max_tokens` slots per expert: untuned, since tables are of the Standard format."""
        tiles = self._found.get(("batched", max_tokens))
        if tiles is None:
            tiles = heuristic_tiles(PORTABLE, self._config, max_tokens, self._shared_memory)
            self._remember("batched", max_tokens, tiles)
        assert isinstance(tiles, PortableTiles)
        return tiles

    def choose(self, kernels: str, num_rows: int) -> Choice:
        """What `hopper` or `portable` returns, with its origin."""
        heuristic = heuristic_tiles(kernels, self._config, num_rows, self._shared_memory)
        for source, table in self._tables:
            entry = table.nearest(kernels, num_rows, least_block=block_rows(heuristic))
            if entry is not None:
                return Choice(entry.tiles, entry, source)
        return Choice(heuristic)

    def _search(self, kernels: str, num_rows: int) -> Tiles:
        choice = self.choose(kernels, num_rows)
        self._remember(kernels, num_rows, choice.tiles)
        _tell(self._layer, kernels, num_rows, choice)
        return choice.tiles

    def _remember(self, kernels: str, num_rows: int, tiles: Tiles) -> None:
        if len(self._found) >= MOST_REMEMBERED:
            self._found.clear()
        self._found[kernels, num_rows] = tiles

    def _is_legal(self, table: TileTable, source: str, shipped: bool) -> bool:
        for entry in table.entries:
            verdict = legal(entry.tiles, self._config, self._shared_memory)
            if not verdict.ok:
                problem = f"{source}: entry {entry.rows} ({entry.kernels}) cannot run this layer: {verdict.reason}"
                if not shipped:
                    raise ConfigError(problem)
                ignore(TileTable, problem)
                return False
        return True


class FixedTiles(TileLookup):
    """The same tiles for every call in the Standard format, for measuring them."""

    def __init__(self, config: MoEConfig, device_name: str, shared_memory: int, tiles: Tiles) -> None:
        super().__init__(config, device_name, shared_memory)
        self._tiles = tiles

    def choose(self, kernels: str, num_rows: int) -> Choice:
        return Choice(self._tiles)

    def _search(self, kernels: str, num_rows: int) -> Tiles:
        return self._tiles


_told: Told = set()


def _tell(layer: LayerShape, kernels: str, num_rows: int, choice: Choice) -> None:
    """One line per layer shape and entry, or power of two of rows where the heuristic decided."""
    entry = choice.entry
    origin = "heuristic" if entry is None else f"{choice.source}, entry for {entry.rows} rows"

    def say() -> None:
        logger.info("tiles of %s for %d rows, %s kernels: %s", layer, num_rows, kernels, origin)

    tell_once(_told, say, layer, kernels, choice.source, num_rows if entry is None else entry.rows)
