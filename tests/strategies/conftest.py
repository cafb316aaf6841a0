"""Every test here gets the registry as the package ships it, and leaves it so; and layout tables of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_plugin.experts.layout_tables import CONTIGUOUS, TRITON_FUSED_MOE, LayoutEntry, LayoutTable
from moe_plugin.kernels.measured_tables import ENVIRONMENT_VARIABLE, LayerShape
from moe_plugin.modular_kernel import ActivationFormat
from moe_plugin.strategies import registry
from tests.strategies.machines import MEASURED, layer_config


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    registries = (registry.prepare_finalize_classes, registry.experts_classes, registry.monolithic_classes)
    before = [each.all() for each in registries]
    yield
    for each, classes in zip(registries, before, strict=True):
        for name in each.all().keys() - classes.keys():
            each.unregister(name)


@pytest.fixture(scope="session")
def layout_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a table of the device MEASURED, by which DeepGEMM wins from 512 rows on."""
    folder = tmp_path_factory.mktemp("layout_tables")
    layer = LayerShape.of(layer_config())
    table = LayoutTable(layer=layer, device=MEASURED, deep_gemm="0.1.5", triton="3.6.0", date="2026-01-01")
    for rows, layout in ((1, TRITON_FUSED_MOE), (1024, CONTIGUOUS)):
        entry = LayoutEntry(
            rows=rows,
            activation_format=ActivationFormat.STANDARD,
            layout=layout,
            microseconds={layout: 1.0},
            deep_gemm="0.1.5",
            triton="3.6.0",
        )
        table = table.with_entry(entry, "2026-01-01")
    table.save(LayoutTable.user_path(folder, MEASURED, layer))
    return folder


@pytest.fixture(autouse=True)
def _layout_tables(layout_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(layout_tables))
