"""DeepGEMM is found where it is, under the names it has, and what is wrong is said; with modules on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moe_plugin.compat import deep_gemm as compat
from moe_plugin.compat.deep_gemm import JitSettings, jit_settings
from moe_plugin.environment import Environment, Package
from moe_plugin.errors import DeepGemmError, MissingPackageError
from tests.doubles import deep_gemm as double

BF16 = """
calls = []
def m_grouped_bf16_gemm_nt_contiguous(a, b, d, grouped_layout, compiled_dims="mnk", use_psum_layout=False):
    calls.append(("bf16 contiguous", grouped_layout, compiled_dims, use_psum_layout))
def m_grouped_bf16_gemm_nt_masked(a, b, d, masked_m, expected_m, compiled_dims="mnk"):
    calls.append(("bf16 masked", masked_m, compiled_dims, expected_m))
"""
FP8 = """
def m_grouped_fp8_fp4_gemm_nt_contiguous(a, b, d, m_indices, recipe=None, compiled_dims="mnk", use_psum_layout=False):
    calls.append(("fp8 contiguous", m_indices, compiled_dims, use_psum_layout))
def fp8_m_grouped_gemm_nt_masked(a, b, d, masked_m, expected_m, recipe=None, compiled_dims="mnk"):
    calls.append(("fp8 masked", masked_m, compiled_dims, expected_m))
"""
COMPLETE = f'__version__ = "9.9"\n{BF16}{FP8}'
MEGA = """
def get_symm_buffer_for_sm90_mega_moe(group, num_experts, num_max_tokens_per_rank, num_topk, hidden, inner):
    class Buffer:
        x, x_sf, topk_idx, topk_weights = "x", "x_sf", "topk_idx", "topk_weights"
    calls.append(("buffer", group, num_experts, num_max_tokens_per_rank, num_topk, hidden, inner))
    return Buffer()
def transform_weights_for_mega_moe_sm90(l1_weights, l2_weights):
    return ("interleaved", l1_weights[1]), l2_weights
def mega_moe_pre_dispatch_sm90(*arguments):
    calls.append(("quantize", *arguments))
def fp8_mega_moe(y, l1_weights, l2_weights, sym_buffer):
    calls.append(("layer", y, l1_weights, l2_weights, sym_buffer.x))
"""
OLD = """
calls = []
def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs, rhs, out, m_indices):
    calls.append(("contiguous", m_indices))
def m_grouped_gemm_fp8_fp8_bf16_nt_masked(lhs, rhs, out, masked_m, expected_m):
    calls.append(("masked", masked_m, expected_m))
def get_m_alignment_for_contiguous_layout():
    return 64
"""
OF_VLLM = "vllm.third_party.deep_gemm"
FEATURES = frozenset({"bf16", "fp8", "psum"})

X = torch.empty(0)
LAYOUT = torch.empty(1)

Write = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def _no_library_but_what_tests_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty path entry in front, a compiler, and no trace of what this process or this machine has."""
    before = {name: module for name, module in sys.modules.items() if is_of_library(name)}
    for name in before:
        del sys.modules[name]
    # An entry of None hides what is installed here; writing a module of that name takes it away.
    sys.modules.update({"deep_gemm": None, "vllm": None})  # type: ignore[dict-item]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("CUDA_PATH", "DG_JIT_USE_NVRTC", "DG_JIT_NVCC_COMPILER", "DG_JIT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(compiler_in(tmp_path / "cuda").parent.parent))
    compat.forget()
    yield
    for name in filter(is_of_library, list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(before)
    compat.forget()


def is_of_library(name: str) -> bool:
    return name.partition(".")[0] in ("deep_gemm", "vllm")


def compiler_in(home: Path) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    return nvcc


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Make a module importable, packages around it included."""

    def write_module(name: str, source: str) -> None:
        folder = tmp_path
        for part in name.split("."):
            folder /= part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / "__init__.py").write_text(source)
        top = name.partition(".")[0]
        if top in sys.modules and sys.modules[top] is None:
            del sys.modules[top]

    return write_module


def test_the_module_itself_comes_first(write: Write) -> None:
    write("deep_gemm", COMPLETE)
    write(OF_VLLM, COMPLETE)
    assert compat.probe() == Package("deep_gemm", "9.9", None, FEATURES, "deep_gemm")
    library = compat.library()
    assert (library.module.__name__, library.version, library.features) == ("deep_gemm", "9.9", FEATURES)
    assert "vllm" not in sys.modules


def test_the_copy_of_vllm_is_found(write: Write) -> None:
    write(OF_VLLM, COMPLETE)
    assert compat.probe().module == OF_VLLM
    assert compat.probe().describe() == "9.9 (vllm.third_party.deep_gemm; bf16, fp8, psum)"
    assert compat.library().module.__name__ == OF_VLLM


def test_a_vllm_without_the_copy_is_not_imported(write: Write) -> None:
    write("vllm", "raise RuntimeError('imported')")
    assert compat.probe().version is None


def test_absent() -> None:
    package = compat.probe()
    assert (package.version, package.usable, package.describe()) == (None, False, "not installed")
    assert package.problem == (
        "neither deep_gemm nor vllm.third_party.deep_gemm is installed: pip install 'moe-plugin[deepgemm]'"
    )
    with pytest.raises(MissingPackageError, match=r"pip install 'moe-plugin\[deepgemm\]'") as raised:
        compat.library()
    assert raised.value.package == "deep_gemm"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "def find_cuda_home():\n    cuda_home = None\n    assert cuda_home is not None\nfind_cuda_home()",
            ["finds no CUDA toolkit", "set CUDA_HOME", "DG_JIT_USE_NVRTC=1"],
        ),
        ("import tvm_ffi_that_is_not_there", ["needs the module 'tvm_ffi_that_is_not_there'", "moe-plugin[deepgemm]"]),
        ("import ctypes; ctypes.CDLL('libcudart.so.99')", ["needs libcudart.so.99", "CUDA 13"]),
        (
            "import ctypes; ctypes.CDLL('libtorch_cuda.so.0')",
            [f"built for another torch than {torch.__version__}", "libtorch_cuda.so.0", "moe-plugin[deepgemm]"],
        ),
        (
            "raise RuntimeError('/x/_C.so: undefined symbol: _ZN3c105ErrorC2E')",
            [f"built for another torch than {torch.__version__}", "_ZN3c105ErrorC2E", "moe-plugin[deepgemm]"],
        ),
        ("raise ValueError('out of\\nmind')", ["does not load (ValueError: out of mind)", "moe-plugin[deepgemm]"]),
        ("raise SystemExit", ["does not load (SystemExit)"]),
        (
            "m_grouped_bf16_gemm_nt_masked = print",
            ["lacks the contiguous call for bf16", "fp8", "moe-plugin[deepgemm]"],
        ),
    ],
    ids=["no_cuda_home", "no_dependency", "no_libcudart", "no_libtorch", "torch_mismatch", "other", "exit", "no_calls"],
)
def test_what_is_wrong_and_what_helps(write: Write, source: str, words: list[str]) -> None:
    write("deep_gemm", source)
    package = compat.probe()
    assert package.version is not None
    assert not package.usable
    for word in words:
        assert word in package.describe()
    with pytest.raises(DeepGemmError) as raised:
        compat.library()
    assert package.problem is not None
    assert package.problem in str(raised.value)
    assert OF_VLLM not in str(raised.value), "what is not there is no part of the trouble"


def test_missing_calls_are_named_per_kind(write: Write) -> None:
    write("deep_gemm", "def m_grouped_bf16_gemm_nt_masked(*arguments): ...")
    problem = compat.probe().problem
    assert problem is not None
    for words in (
        "the contiguous call for bf16 (m_grouped_bf16_gemm_nt_contiguous)",
        "the contiguous call for fp8 (m_grouped_fp8_gemm_nt_contiguous)",
        "the masked call for fp8 (m_grouped_fp8_gemm_nt_masked)",
    ):
        assert words in problem
    assert "masked call for bf16" not in problem


@pytest.mark.parametrize("broken", ["raise RuntimeError('broken')", "nothing = 0"])
def test_a_broken_module_gives_way_to_the_copy_of_vllm(write: Write, broken: str) -> None:
    write("deep_gemm", broken)
    write(OF_VLLM, COMPLETE)
    assert compat.probe() == Package("deep_gemm", "9.9", None, FEATURES, OF_VLLM)


def test_when_both_are_broken_both_are_named(write: Write) -> None:
    write("deep_gemm", "raise RuntimeError('first')")
    write(OF_VLLM, "raise RuntimeError('second')")
    problem = compat.probe().problem
    assert problem is not None
    assert "deep_gemm: does not load (RuntimeError: first)" in problem
    assert "; vllm.third_party.deep_gemm: does not load (RuntimeError: second)" in problem


def test_warnings_of_the_import_do_not_break_it(write: Write) -> None:
    write("deep_gemm", f"import warnings; warnings.warn('as libraries do', DeprecationWarning)\n{COMPLETE}")
    with pytest.warns(DeprecationWarning, match="as libraries do"):
        assert compat.probe().usable


def test_probing_goes_on_until_it_succeeds(write: Write) -> None:
    assert compat.probe().version is None
    write("deep_gemm", "raise RuntimeError('half installed')")
    assert "half installed" in compat.probe().describe()
    write("deep_gemm", COMPLETE)
    assert compat.probe().usable


def test_what_was_found_is_kept_until_it_is_forgotten(write: Write) -> None:
    write("deep_gemm", COMPLETE)
    library = compat.library()
    write("deep_gemm", "raise RuntimeError('gone')")
    del sys.modules["deep_gemm"]
    assert compat.library() is library
    assert compat.probe().usable
    compat.forget()
    assert "gone" in compat.probe().describe()


def test_the_environment_asks_this_probe(write: Write) -> None:
    write("deep_gemm", COMPLETE)
    assert Environment.probe("cpu").package("deep_gemm") == compat.probe()


def test_bf16_does_without_fp8(write: Write) -> None:
    write("deep_gemm", BF16)
    library = compat.library()
    assert library.features == {"bf16", "psum"}
    library.grouped_gemm_contiguous(X, X, X, LAYOUT, psum=True)
    fp8 = (X, X)
    with pytest.raises(DeepGemmError, match=r"lacks the contiguous call for fp8 \(m_grouped_fp8_gemm_nt_contiguous\)"):
        library.grouped_gemm_contiguous(fp8, fp8, X, LAYOUT, psum=True)
    with pytest.raises(DeepGemmError, match=r"lacks the masked call for fp8 \(m_grouped_fp8_gemm_nt_masked\)"):
        library.grouped_gemm_masked(fp8, fp8, X, LAYOUT, 1)


def test_one_layout_is_not_enough_for_the_feature(write: Write) -> None:
    write("deep_gemm", BF16 + FP8.partition("def fp8_m_grouped")[0])
    library = compat.library()
    assert library.features == {"bf16", "psum"}
    library.grouped_gemm_contiguous((X, X), (X, X), X, LAYOUT, psum=True)


def test_a_name_whose_lookup_breaks_is_one_that_is_missing(write: Write) -> None:
    lazy = "def __getattr__(name):\n    raise (ImportError if 'fp8' in name else AttributeError)(name)"
    write("deep_gemm", f"{BF16}{lazy}")
    assert compat.library().features == {"bf16", "psum"}


def test_what_calls_are_given(write: Write) -> None:
    write("deep_gemm", COMPLETE)
    library = compat.library()
    fp8 = (X, X)
    library.grouped_gemm_contiguous(X, X, X, LAYOUT, psum=True)
    library.grouped_gemm_contiguous(X, X, X, LAYOUT, psum=False)
    library.grouped_gemm_contiguous(fp8, fp8, X, LAYOUT, psum=True)
    library.grouped_gemm_masked(X, X, X, LAYOUT, 5)
    library.grouped_gemm_masked(fp8, fp8, X, LAYOUT, 6, compiled_dims="nk")
    assert library.module.calls == [
        ("bf16 contiguous", LAYOUT, "nk", True),
        ("bf16 contiguous", LAYOUT, "nk", False),
        ("fp8 contiguous", LAYOUT, "nk", True),
        ("bf16 masked", LAYOUT, "nk", 5),
        ("fp8 masked", LAYOUT, "nk", 6),
    ]


def test_what_the_mega_kernel_is_given(write: Write) -> None:
    write("deep_gemm", COMPLETE + MEGA)
    library = compat.library()
    assert library.features == FEATURES | {"mega"}
    w2, rows, ids, router_weights, out = torch.empty(2, 512, 256), torch.empty(3, 512), X, LAYOUT, torch.empty(3, 512)
    weights = library.mega_weights(X, LAYOUT, w2, X)
    layer = library.mega_layer("group", weights, num_experts=8, top_k=4, max_tokens=16)
    assert layer(rows, ids, router_weights, out) is out
    assert library.module.calls == [
        ("buffer", "group", 8, 16, 4, 512, 256),
        ("quantize", rows, ids, router_weights, "x", "x_sf", "topk_idx", "topk_weights", 3),
        ("layer", out, ("interleaved", LAYOUT), (w2, X), "x"),
    ]


def test_part_of_the_mega_kernel_is_none_of_it(write: Write) -> None:
    write("deep_gemm", COMPLETE + MEGA.partition("def fp8_mega_moe")[0])
    library = compat.library()
    assert library.features == FEATURES
    weights = library.mega_weights(X, LAYOUT, torch.empty(2, 512, 256), X)
    with pytest.raises(DeepGemmError, match=r"deep_gemm 9\.9 lacks fp8_mega_moe"):
        library.mega_layer("group", weights, num_experts=8, top_k=4, max_tokens=16)


@pytest.mark.parametrize("dims", ["", "mnk", "n"])
def test_other_compiled_dims_are_refused(write: Write, dims: str) -> None:
    write("deep_gemm", COMPLETE)
    library = compat.library()
    with pytest.raises(DeepGemmError, match=f"compiled_dims '{dims}': .* 'nk'"):
        library.grouped_gemm_contiguous(X, X, X, LAYOUT, psum=False, compiled_dims=dims)
    with pytest.raises(DeepGemmError, match=f"compiled_dims '{dims}'"):
        library.grouped_gemm_masked(X, X, X, LAYOUT, 1, compiled_dims=dims)
    assert library.module.calls == []


def test_older_names_without_group_ends(write: Write) -> None:
    write("deep_gemm", OLD)
    library = compat.library()
    assert library.features == {"fp8"}
    assert library.alignment == 64
    library.grouped_gemm_contiguous((X, X), (X, X), X, LAYOUT, psum=False)
    library.grouped_gemm_masked((X, X), (X, X), X, LAYOUT, 3)
    assert library.module.calls == [("contiguous", LAYOUT), ("masked", LAYOUT, 3)]
    with pytest.raises(DeepGemmError, match="takes one expert per row, no group ends"):
        library.grouped_gemm_contiguous((X, X), (X, X), X, LAYOUT, psum=True)


def test_the_standard_name_wins_over_an_older_one(write: Write) -> None:
    write("deep_gemm", f"{COMPLETE}def m_grouped_fp8_gemm_nt_masked(*arguments):\n    calls.append('standard')\n")
    compat.library().grouped_gemm_masked((X, X), (X, X), X, LAYOUT, 1)
    assert compat.library().module.calls == ["standard"]


def test_names_in_utils_are_found(write: Write) -> None:
    write("deep_gemm", "from . import utils")
    write("deep_gemm.utils", COMPLETE)
    write("deep_gemm", "from . import utils")
    assert compat.library().features == FEATURES


def test_compiled_functions_have_their_parameters_in_their_documentation(write: Write) -> None:
    compiled = """
    class Compiled:
        __signature__ = "none, as of functions that pybind11 makes"
        def __init__(self, doc):
            self.__doc__ = doc
        def __call__(self, *arguments, **named):
            calls.append(named)
    m_grouped_bf16_gemm_nt_contiguous = Compiled("f(a: Tensor, compiled_dims: str, use_psum_layout: bool) -> None")
    m_grouped_bf16_gemm_nt_masked = Compiled("f(a: Tensor) -> None")
    """
    write("deep_gemm", "calls = []\n" + "\n".join(line[4:] for line in compiled.splitlines()))
    library = compat.library()
    assert library.features == {"bf16", "psum"}
    library.grouped_gemm_contiguous(X, X, X, LAYOUT, psum=True)
    library.grouped_gemm_masked(X, X, X, LAYOUT, 1)
    assert library.module.calls == [{"compiled_dims": "nk", "use_psum_layout": True}, {}]


def test_the_alignment_is_what_the_library_says_now(write: Write) -> None:
    function = "def get_mk_alignment_for_contiguous_layout():\n    return alignment\n"
    write("deep_gemm", f"{COMPLETE}alignment = 128\n{function}")
    library = compat.library()
    assert library.alignment == 128
    library.module.alignment = 224
    assert library.alignment == 224


def test_without_an_answer_the_alignment_is_128(write: Write) -> None:
    write("deep_gemm", BF16)
    assert compat.library().alignment == 128


def test_weight_scales_stay_as_they_are_where_no_device_wants_others(write: Write) -> None:
    write("deep_gemm", COMPLETE)
    scales = torch.rand(2, 3, 4)
    assert compat.library().weight_scales(scales, 384, 512) is scales


def test_without_a_compiler_the_library_is_unusable(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("deep_gemm", COMPLETE)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "runtime_only"))
    package = compat.probe()
    assert not package.usable
    assert package.features == FEATURES
    assert "no nvcc" in package.describe()
    assert "CUDA_HOME" in package.describe()
    with pytest.raises(DeepGemmError, match="no nvcc"):
        compat.library()
    monkeypatch.setenv("DG_JIT_USE_NVRTC", "1")
    assert compat.probe().usable
    assert compat.library().features == FEATURES | {"nvrtc"}


def test_the_double_needs_no_compiler_and_says_that_it_computes_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with double.installed() as module:
        assert compat.probe() == Package("deep_gemm", double.__version__, None, FEATURES | {"cpu"}, "deep_gemm")
        assert compat.library().module is module
    assert "cpu" not in compat.probe().features


def settings(monkeypatch: pytest.MonkeyPatch, **environ: Path | str | None) -> JitSettings:
    for name, value in environ.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    return jit_settings()


def test_the_compiler_is_the_one_that_the_library_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = {name: compiler_in(tmp_path / name) for name in ("home", "of_path", "own")}
    monkeypatch.setenv("PATH", str(homes["of_path"].parent))
    assert settings(monkeypatch, CUDA_HOME=tmp_path / "home").nvcc == homes["home"]
    assert settings(monkeypatch, CUDA_HOME="", CUDA_PATH=tmp_path / "home").nvcc == homes["home"]
    assert settings(monkeypatch, CUDA_HOME=None, CUDA_PATH=None).nvcc == homes["of_path"]
    assert settings(monkeypatch, DG_JIT_NVCC_COMPILER=homes["own"]).nvcc == homes["own"]
    assert settings(monkeypatch, DG_JIT_NVCC_COMPILER=None).problem is None
    # The library does not look on the path when CUDA_HOME says something else.
    elsewhere = settings(monkeypatch, CUDA_HOME=tmp_path / "nothing_here")
    assert elsewhere.nvcc is None
    assert elsewhere.problem is not None
    assert "CUDA_HOME" in elsewhere.problem


@pytest.mark.parametrize(("value", "nvrtc"), [("1", True), ("0", False), ("", False), (None, False)])
def test_nvrtc(value: str | None, nvrtc: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings(monkeypatch, DG_JIT_USE_NVRTC=value, CUDA_HOME=tmp_path / "nothing_here")
    assert found.nvrtc is nvrtc
    assert found.compiler == ("NVRTC" if nvrtc else None)
    assert (found.problem is None) is nvrtc


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, HOME=tmp_path).cache_folder == tmp_path / ".deep_gemm"
    assert settings(monkeypatch, DG_JIT_CACHE_DIR=tmp_path / "kernels").cache_folder == tmp_path / "kernels"


@pytest.mark.slow
def test_importing_the_module_imports_no_library(write: Write, tmp_path: Path) -> None:
    write("deep_gemm", "raise SystemExit('imported')")
    code = """if True:
        import sys
        from moe_plugin.compat import deep_gemm

        assert "deep_gemm" not in sys.modules
        print(deep_gemm.probe().problem)
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "SystemExit: imported" in result.stdout
