"""DeepEP is looked for without an error, whatever is found under its name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_plugin.compat import deep_ep

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package `deep_ep` with this text at the head of the path."""

    def write(text: str) -> None:
        folder = tmp_path / "deep_ep"
        folder.mkdir()
        (folder / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "deep_ep", raising=False)

    monkeypatch.delenv("NVSHMEM_REMOTE_TRANSPORT", raising=False)
    yield write
    sys.modules.pop("deep_ep", None)


def test_a_usable_one_is_found_with_its_interfaces(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep, "_NETWORK_CARDS", Path("/absent"))
    install("import os\nclass Buffer: pass\nTRANSPORT = os.environ['NVSHMEM_REMOTE_TRANSPORT']\n")
    module, package = deep_ep.find()
    assert package.usable
    assert package.features == {"Buffer"}
    assert module is not None
    assert module.TRANSPORT == "none"


def test_one_that_does_not_load_says_why(install: Install) -> None:
    install("raise OSError('libnvshmem_host.so.3: cannot open shared object file')")
    module, package = deep_ep.find()
    assert module is None
    assert package.version == "unknown"
    assert package.problem == "does not load (OSError: libnvshmem_host.so.3: cannot open shared object file)"


def test_one_without_buffers_is_not_usable(install: Install) -> None:
    install("")
    assert "has none of Buffer, ElasticBuffer, HybridEPBuffer" in (deep_ep.probe().problem or "")


def test_an_absent_one_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep, "PACKAGE", "deep_ep_of_nobody")
    module, package = deep_ep.find()
    assert module is None
    assert package.version is None
    assert package.problem is not None
    assert "build it from" in package.problem
