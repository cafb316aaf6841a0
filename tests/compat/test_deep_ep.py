"""DeepEP is looked for without an error, whatever is found under its name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_plugin.compat import deep_ep
from moe_plugin.environment import Package
from moe_plugin.errors import ConfigError
from tests.doubles import deep_ep as double

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

    for name in ("NVSHMEM_REMOTE_TRANSPORT", "EP_DISABLE_GIN"):
        monkeypatch.delenv(name, raising=False)
    yield write
    for name in ("deep_ep", "deep_ep._C"):
        sys.modules.pop(name, None)


def test_a_usable_one_is_found_with_its_interfaces(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep, "_NETWORK_CARDS", Path("/absent"))
    install(
        "import os\nclass Buffer: pass\n"
        "TOLD = [os.environ[name] for name in ('NVSHMEM_REMOTE_TRANSPORT', 'EP_DISABLE_GIN')]\n"
    )
    module, package = deep_ep.find()
    assert package.usable
    assert package.features == {"Buffer"}
    assert module is not None
    assert module.TOLD == ["none", "1"]


LOW_LATENCY = """
class Buffer:
    def low_latency_dispatch(self, x, topk_idx, use_fp8=True, return_recv_hook=False): pass
    def low_latency_combine(self, x, topk_idx, topk_weights, handle, zero_copy=False, out=None): pass
"""


def test_hidden_sizes_are_read_off_the_names_of_kernels(install: Install, tmp_path: Path) -> None:
    install(LOW_LATENCY + "from deep_ep import _C")
    names = [
        f"_ZN7deep_ep12internode_ll7combineILb{fmt}ELi{size}ELi11ELi4EEEvPv" for fmt in (0, 1) for size in (7168, 3072)
    ]
    other = "_ZN7deep_ep9intranode7combineI13__nv_bfloat16Li4ELi1024ELi4096EEEvPT_"
    (tmp_path / "deep_ep" / "_C.py").write_text(f"NAMES = {[*names, other]}")
    package = deep_ep.probe()
    assert package.features == {
        "Buffer",
        "low_latency",
        "recv_hook",
        "zero_copy",
        "combine_out",
        "ll_hidden_3072",
        "ll_hidden_7168",
    }
    assert deep_ep.low_latency_hidden_sizes(package) == (3072, 7168)


def test_hidden_sizes_of_an_installation_that_does_not_tell(install: Install) -> None:
    install(LOW_LATENCY)
    assert deep_ep.low_latency_hidden_sizes(deep_ep.probe()) == deep_ep.LOW_LATENCY_HIDDEN_SIZES
    assert deep_ep.low_latency_hidden_sizes(Package("deep_ep")) == deep_ep.LOW_LATENCY_HIDDEN_SIZES


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


def test_numbers_of_ranks_without_a_tuned_configuration_take_that_of_fewer() -> None:
    with double.installed():
        sizes = [
            [each.get_nvl_buffer_size_hint(4096, 2) for each in deep_ep.high_throughput_configs(ranks, num_sms)]
            for ranks, num_sms in ((2, 8), (3, 8), (2, 16))
        ]
        with pytest.raises(ConfigError, match="no configuration for 1 ranks"):
            deep_ep.high_throughput_configs(1, 8)
    assert sizes[0] == sizes[1]
    assert all(many > few for many, few in zip(sizes[2], sizes[0], strict=True))
