"""DeepEP, if it is installed: found when asked for.

Built with NVSHMEM it looks for network cards when it starts; on a machine without any it is told that there are none,
unless the environment says something else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from types import ModuleType

from moe_plugin.environment import Package

PACKAGE = "deep_ep"
INSTALL = "build it from https://github.com/deepseek-ai/DeepEP by its guide"
BUFFERS = ("Buffer", "ElasticBuffer", "HybridEPBuffer")
"""Its interfaces, by release: V1, V2 and HybridEP. Those that are there are features of the package."""

_NETWORK_CARDS = Path("/sys/class/infiniband")


def probe() -> Package:
    """What is there, by importing it; never raises."""
    return find()[1]


def find() -> tuple[ModuleType | None, Package]:
    """The module, None unless it is usable, and what is known of it; never raises."""
    try:
        if importlib.util.find_spec(PACKAGE) is None:
            return None, Package(PACKAGE, None, f"not installed: {INSTALL}")
        module = _import()
    except (Exception, SystemExit) as problem:  # whatever a foreign module does while it loads
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        return None, Package(PACKAGE, _version(), f"does not load ({text})")
    features = frozenset(name for name in BUFFERS if hasattr(module, name))
    if not features:
        return None, Package(PACKAGE, _version(), f"has none of {', '.join(BUFFERS)}: {INSTALL}")
    return module, Package(PACKAGE, _version(), None, features)


def _import() -> ModuleType:
    if not (_NETWORK_CARDS.is_dir() and any(_NETWORK_CARDS.iterdir())):
        os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
    return importlib.import_module(PACKAGE)


def _version() -> str:
    for distribution in ("deep-ep", "deep_ep"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
