"""Measurements per device and layer shape, kept as JSON tables: files, reading, writing, and which entry a call takes.
Works without Triton.

A table is `<folder>/<device>/<layer>.json`, as in `NVIDIA_H200/E256-K8-H7168-I2048-fp8_block.json`: experts of the
whole layer, top-k, hidden size, intermediate size of a rank, and the dtype as LayerShape.of spells it. Folders: the one
named by the environment variable MOE_PLUGIN_TILE_TABLES, or the subfolder of it where a kind of tables has one, then
the package's own. A head says schema, device, layer, versions and date; then come the entries, one object each:

    rows             N, rows that the experts receive
    triton, ...      versions of that measurement, where they are not the table's

A call of N rows takes the entry whose rows are nearest on a logarithmic scale, if they are within a factor of 2. Beyond
twice the last entry that one holds on, if its kind of table lets it. Otherwise there is none.

Example, entries for 8 and 32 rows: 1 row -> none, 4 and 15 -> entry 8, 17 and 64 -> entry 32, 65 -> entry 32 holds on.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from moe_plugin.config import MoEConfig
from moe_plugin.errors import ConfigError
from moe_plugin.kernels.tiling import next_power_of_2
from moe_plugin.quantization import has_static_activations

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "MOE_PLUGIN_TILE_TABLES"
REACH = 2
"""An entry holds for calls of up to so many times more or fewer rows."""
MOST_REMEMBERED = 4096
"""Choices that a lookup keeps."""
_DTYPE_NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a table is for. dtype: bf16, fp16, fp32 or the fp8 scheme, with `_static` for given activation scales and
    the dtype of activations where that is not bf16."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: str

    @classmethod
    def of(cls, config: MoEConfig) -> LayerShape:
        scheme, dtype = config.quantization, _DTYPE_NAMES[str(config.dtype)]
        if scheme is not None:
            static = "_static" if has_static_activations(scheme) else ""
            dtype = scheme.name + static + ("" if dtype == "bf16" else f"_{dtype}")
        return cls(config.num_experts, config.top_k, config.hidden_size, config.local_intermediate_size, dtype)

    def __str__(self) -> str:
        sizes = f"E{self.num_experts}-K{self.top_k}-H{self.hidden_size}-I{self.intermediate_size}"
        return f"{sizes}-{self.dtype}"

    @property
    def file_name(self) -> str:
        return f"{self}.json"


def device_folder(device_name: str) -> str:
    """The folder of a device: its name with anything but letters, digits, dots and hyphens as underscores."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device_name)


class MeasuredEntry(Protocol):
    """What every entry has: the number of received rows, and of what it is an entry (its group)."""

    @property
    def rows(self) -> int: ...

    @property
    def group(self) -> str: ...


Entry = TypeVar("Entry", bound=MeasuredEntry)
Table = TypeVar("Table", bound="MeasuredTable[Any]")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTable(abc.ABC, Generic[Entry]):
    """The entries of one layer on one device, by group, in the order of their rows. See the module's docstring.

    A subclass says its `schema`, its `kind` in words, what decides `instead` of a table, the fields of table and entry
    that are `versions`, and its `subfolder` of the user's folder.
    """

    schema: ClassVar[str]
    kind: ClassVar[str]
    instead: ClassVar[str]
    versions: ClassVar[tuple[str, ...]] = ("triton",)
    subfolder: ClassVar[str] = ""

    layer: LayerShape
    device: str
    triton: str
    date: str
    entries: tuple[Entry, ...] = ()

    @staticmethod
    @abc.abstractmethod
    def entry_to_data(entry: Any) -> dict[str, Any]:
        """An entry without its versions, in JSON's types."""

    @staticmethod
    @abc.abstractmethod
    def entry_from_data(data: Mapping[str, Any], versions: Mapping[str, str]) -> Any:
        """The inverse. Raises ConfigError."""

    @classmethod
    def user_path(cls, folder: Path, device_name: str, layer: LayerShape) -> Path:
        """Where a table lies in a folder that MOE_PLUGIN_TILE_TABLES names."""
        return folder / cls.subfolder / device_folder(device_name) / layer.file_name

    def with_entry(self: Table, entry: Any, date: str) -> Table:
        """A table with `entry` in the place of one for the same rows and group, if there is any."""
        kept = [e for e in self.entries if _key(e) != _key(entry)]
        versions = {name: getattr(entry, name) for name in self.versions}
        return dataclasses.replace(self, date=date, entries=tuple(sorted([*kept, entry], key=_key)), **versions)

    def entry(self, group: str, rows: int) -> Entry | None:
        """The entry of exactly these rows."""
        return next((e for e in self.entries if _key(e) == (group, rows)), None)

    def nearest_entry(
        self, group: str, num_rows: int, holds_on: Callable[[Entry], bool] = lambda _: True
    ) -> Entry | None:
        """The entry for `num_rows` >= 1 rows, if there is one.

        holds_on: whether the last entry does so beyond its reach.
        """
        known = [e for e in self.entries if e.group == group]
        if not known:
            return None
        found = min(known, key=lambda e: abs(math.log(e.rows / num_rows)))
        if num_rows <= REACH * found.rows <= REACH * REACH * num_rows:
            return found
        is_last = found.rows == max(e.rows for e in known)
        return found if is_last and num_rows > found.rows and holds_on(found) else None

    def to_json(self) -> str:
        """The schema; one line per entry, so that two files can be compared by eye."""
        head = {"schema": self.schema, "device": self.device, "layer": dataclasses.asdict(self.layer)}
        head |= {name: getattr(self, name) for name in self.versions} | {"date": self.date}
        lines = []
        for entry in self.entries:
            versions = {name: getattr(entry, name) for name in self.versions}
            others = {name: seen for name, seen in versions.items() if seen != head[name]}
            lines.append("    " + json.dumps(self.entry_to_data(entry) | others))
        text = json.dumps(head, indent=2).removesuffix("\n}")
        entries = ",\n".join(lines)
        return f'{text},\n  "entries": [\n{entries}\n  ]\n}}\n'

    @classmethod
    def from_json(cls: type[Table], text: str) -> Table:
        """The inverse of `to_json`. Raises ConfigError for what is not a table of this schema."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as problem:
            raise ConfigError(f"not a {cls.kind}: {problem}") from problem
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != cls.schema:
            raise ConfigError(f"{cls.kind}s have schema {cls.schema!r}, this file says {schema!r}")
        head = {name: read_field(data, name, str, "the table") for name in (*cls.versions, "device", "date")}
        entries = []
        for item in read_field(data, "entries", list, "the table"):
            if not isinstance(item, dict):
                raise ConfigError(f"an entry is an object, got {item!r}")
            where = f"entry {read_field(item, 'rows', int, 'an entry')}"
            if item["rows"] < 1:
                raise ConfigError(f"{where}: rows must be positive, got {item['rows']}")
            versions = {n: read_field(item, n, str, where) if n in item else head[n] for n in cls.versions}
            entries.append(cls.entry_from_data(item, versions))
        names = [_key(entry) for entry in entries]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"there are two {twice[0]} entries for {twice[1]} rows")
        layer = read_record(LayerShape, read_field(data, "layer", dict, "the table"), "layer")
        return cls(layer=layer, entries=tuple(sorted(entries, key=_key)), **head)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, its folder if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls: type[Table], path: Path) -> Table:
        """Raises ConfigError, naming the file, for one that cannot be read or is not the table its name says."""
        try:
            table = cls.from_json(path.read_text(encoding="utf-8"))
            if table.layer.file_name != path.name:
                raise ConfigError(f"the layer inside is {table.layer}")
            return table
        except (OSError, UnicodeDecodeError, ConfigError) as problem:
            raise ConfigError(f"{path}: {problem}") from problem


def _key(entry: MeasuredEntry) -> tuple[str, int]:
    return entry.group, entry.rows


def read_field(data: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    """A member of a JSON object, of the type `kind`. Raises ConfigError that says `where`."""
    value = data.get(name)
    # A bool is an int to Python, and here it is not.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = kind.__name__ if isinstance(kind, type) else "number"
        raise ConfigError(f"{where}: {name} must be of type {expected}, got {value!r}")
    return value


def read_record(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """A flat dataclass from its JSON object: all fields, of their types, and no others."""
    kinds = {"int": int, "bool": bool, "str": str}
    fields = {field.name: kinds[str(field.type)] for field in dataclasses.fields(cls)}
    if unknown := data.keys() - fields.keys():
        raise ConfigError(f"{where}: unknown {sorted(unknown)[0]!r}; known: {', '.join(fields)}")
    return cls(**{name: read_field(data, name, kind, where) for name, kind in fields.items()})


def read_time(data: Mapping[str, Any], name: str, where: str) -> float:
    """A member of a JSON object that is a positive finite number of microseconds."""
    microseconds = read_field(data, name, (int, float), where)
    if not 0 < microseconds < math.inf:
        raise ConfigError(f"{where}: {name} must be positive, got {microseconds}")
    return float(microseconds)


def user_folder() -> Path | None:
    """The folder that MOE_PLUGIN_TILE_TABLES names. Raises ConfigError when there is none of that name."""
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{ENVIRONMENT_VARIABLE} must name a folder of tile tables, there is no folder {folder}")
    return folder


@dataclass(frozen=True, slots=True)
class Found(Generic[Table]):
    """A table that was looked for. source: its file, relative to the package's tables where it is shipped."""

    table: Table
    source: str
    shipped: bool


def tables_of_device(cls: type[Table], shipped: Path, device_name: str, layer: LayerShape) -> list[Found[Table]]:
    """The tables of a layer on one device, the user's first. `shipped`: the package's own folder.

    Raises ConfigError when the user's is broken; a broken shipped one is a warning.
    """
    return _tables(cls, shipped, lambda _: [f"{device_folder(device_name)}/{layer.file_name}"])


def tables_of_any_device(cls: type[Table], shipped: Path, layer: LayerShape) -> list[Found[Table]]:
    """The tables of a layer on all devices, the user's first. Raises as `tables_of_device`."""
    return _tables(cls, shipped, lambda folder: _files(folder, layer.file_name))


def _tables(cls: type[Table], shipped: Path, files: Callable[[Path], Iterable[str]]) -> list[Found[Table]]:
    found = []
    user = user_folder()
    for folder in (shipped,) if user is None else (user / cls.subfolder, shipped):
        is_shipped = folder is shipped
        for file in files(folder):
            table = _load(cls, folder / file, is_shipped)
            if table is not None:
                found.append(Found(table, file if is_shipped else str(folder / file), is_shipped))
    return found


def forget_tables() -> None:
    """Read files again that have been read: `moe-plugin tune` writes what it later looks up."""
    _load.cache_clear()
    _files.cache_clear()


def ignore(table: type[MeasuredTable[Any]], problem: object) -> None:
    """Say that a shipped table is not used."""
    logger.warning("%s ignored, %s takes its place: %s", table.kind, table.instead, problem)


@functools.lru_cache(maxsize=1024)
def _load(cls: type[Any], path: Path, shipped: bool) -> Any:
    """A table, None if there is no such file. A broken one of the user's is an error, a shipped one a warning."""
    if not path.is_file():
        return None
    try:
        return cls.load(path)
    except ConfigError as problem:
        if not shipped:
            raise
        ignore(cls, problem)
        return None


@functools.lru_cache(maxsize=1024)
def _files(folder: Path, file_name: str) -> tuple[str, ...]:
    return tuple(f"{path.parent.name}/{path.name}" for path in sorted(folder.glob(f"*/{file_name}")))


Told = set[tuple[LayerShape, str, str, int]]
"""What was said already: (layer, group, source, rows)."""


def tell_once(told: Told, say: Callable[[], None], layer: LayerShape, group: str, source: str, rows: int) -> None:
    """Call `say` unless it was for this choice. rows: those of the entry; of a call where no entry decided, source is
    empty, and rows of one power of two are alike."""
    key = (layer, group, source, rows if source else next_power_of_2(rows))
    if key not in told:
        told.add(key)
        say()
