"""Every test here gets the registry as the package ships it, and leaves it so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_plugin.strategies import registry


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    registries = (registry.prepare_finalize_classes, registry.experts_classes, registry.monolithic_classes)
    before = [each.all() for each in registries]
    yield
    for each, classes in zip(registries, before, strict=True):
        for name in each.all().keys() - classes.keys():
            each.unregister(name)
