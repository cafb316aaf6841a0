"""DeepGEMM's grouped GEMMs and its mega kernel, wherever and under whatever names they are installed.

The module is `deep_gemm` (distribution sgl-deep-gemm), else the copy in vLLM's wheel. Releases moved and renamed calls,
so each is looked for by itself, standard name first, and what was found is said in features:

    bf16, fp8    both the contiguous and the masked call are there for operands of that type
    psum         contiguous calls take group ends instead of one expert per row
    mega         the SM 90 kernel that is a whole expert-parallel fp8 layer, with all the calls that it needs
    nvrtc        kernels are compiled by NVRTC, so that no nvcc is needed
    cpu          a stand-in that computes on CPU tensors, as tests have

Nothing is imported before `probe` or `library` is called. What was found once is kept; what failed is tried again by
the next call, so a package installed or repaired meanwhile is found.

Layouts, for G experts, w [G, N, K] and groups of 3, 0 and 130 rows:

    contiguous    every group starts at a multiple of 128, here rows 0, 128 and 128; M is at least 384
      psum        layout int32 [G], the end of each group: [3, 128, 258]. An empty group holds its start.
      per row     layout int32 [M], the expert of each row, -1 where there is none; a block of 128 rows is computed with
                  the expert of its first
    masked        [G, M, .] with M a multiple of 128, num_rows int32 [G]: [3, 0, 130]

In all of them whole blocks are computed and stored, so rows of a block that belong to no group end up undefined.
fp8 operands come with their scales. Activations: fp32, one per row and 128 columns, [M, ceil(K / 128)] with the rows
next to each other in memory: the transposed view of [ceil(K / 128), M], M a multiple of 4. Any other order costs
another kernel. Weights: fp32, one per 128 x 128 tile, through `weight_scales`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import operator
import os
import re
import shutil
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch

from moe_plugin.environment import Package, register_package_probe
from moe_plugin.errors import DeepGemmError, InputError, MissingPackageError

PACKAGE = "deep_gemm"
MODULES = ("deep_gemm", "vllm.third_party.deep_gemm")
"""Where the library may be, in the order in which it is looked for."""

INSTALL = "pip install 'moe-plugin[deepgemm]'"

KINDS = ("bf16", "fp8")

CONTIGUOUS_NAMES = {
    "bf16": ("m_grouped_bf16_gemm_nt_contiguous", "m_grouped_gemm_bf16_bf16_bf16_nt_contiguous"),
    "fp8": (
        "m_grouped_fp8_gemm_nt_contiguous",
        "m_grouped_fp8_fp4_gemm_nt_contiguous",
        "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    ),
}
MASKED_NAMES = {
    "bf16": (
        "m_grouped_bf16_gemm_nt_masked",
        "bf16_m_grouped_gemm_nt_masked",
        "m_grouped_gemm_bf16_bf16_bf16_nt_masked",
    ),
    "fp8": (
        "m_grouped_fp8_gemm_nt_masked",
        "m_grouped_fp8_fp4_gemm_nt_masked",
        "fp8_m_grouped_gemm_nt_masked",
        "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    ),
}
MEGA_NAMES = {
    "buffer": "get_symm_buffer_for_sm90_mega_moe",
    "weights": "transform_weights_for_mega_moe_sm90",
    "quantize": "mega_moe_pre_dispatch_sm90",
    "layer": "fp8_mega_moe",
}
ALIGNMENT_NAMES = ("get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout")
COMPILED_DIMS = "nk"

Operand: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
"""A bf16 tensor, or a pair of an fp8 tensor and its scales."""

Call: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class DeepGemm:
    """The library, its calls resolved. A call that it lacks raises DeepGemmError when it is made, naming it.

    module: what was imported. version: its own. features: see the module docstring.
    """

    module: ModuleType
    version: str
    features: frozenset[str]
    _alignment: Callable[[], int] = field(repr=False)
    # Indexed by whether operands are fp8, then whether the layout holds group ends: a call decides nothing else.
    _contiguous: tuple[tuple[Call, Call], tuple[Call, Call]] = field(repr=False)
    _masked: tuple[Call, Call] = field(repr=False)
    _mega: Mapping[str, Call] = field(default_factory=dict, repr=False)

    @property
    def alignment(self) -> int:
        """Rows to a multiple of which groups of the contiguous layout start, as the library has it now."""
        return int(self._alignment())

    def grouped_gemm_contiguous(
        self,
        a: Operand,
        b: Operand,
        out: torch.Tensor,
        layout: torch.Tensor,
        *,
        psum: bool,
        compiled_dims: str = COMPILED_DIMS,
    ) -> None:
        """out[row] = a[row] @ b[expert of row].T, groups of rows following each other.

        a: bf16 [M, K], or fp8 with scales [M, ceil(K / 128)]. b: bf16 [G, N, K], or fp8 with the answer of
        `weight_scales`. out: bf16 [M, N]. layout: int32, group ends [G] with `psum`, else experts of rows [M]. All on
        the device; nothing waits for it.
        """
        if compiled_dims != COMPILED_DIMS:
            raise _wrong_dims(compiled_dims)
        self._contiguous[isinstance(a, tuple)][psum](a, b, out, layout)

    def grouped_gemm_masked(
        self,
        a: Operand,
        b: Operand,
        out: torch.Tensor,
        num_rows: torch.Tensor,
        expected_rows: int,
        *,
        compiled_dims: str = COMPILED_DIMS,
    ) -> None:
        """out[g, row] = a[g, row] @ b[g].T for the first num_rows[g] rows of every group.

        a: bf16 [G, M, K], or fp8 with scales [G, M, ceil(K / 128)]; M a multiple of 128. b: as for the contiguous
        layout. out: bf16 [G, M, N]. num_rows: int32 [G] on the device. expected_rows: a guess of their mean, at least
        1, by which the library chooses its tiles.
        """
        if compiled_dims != COMPILED_DIMS:
            raise _wrong_dims(compiled_dims)
        self._masked[isinstance(a, tuple)](a, b, out, num_rows, expected_rows)

    def weight_scales(self, scales: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """fp32 scales [G, ceil(n / 128), ceil(k / 128)] of fp8 weights, as calls take them on their device.

        Up to SM 90 as they are. From SM 100 on int32 [G, n, ceil(k / 512)], four exponents in each; scales then have to
        be powers of two, else InputError. To be called once, at load: it may wait for the device.
        """
        if scales.device.type != "cuda" or torch.cuda.get_device_capability(scales.device) < (10, 0):
            return scales
        if not bool((torch.frexp(scales).mantissa == 0.5).all()):
            raise InputError("weight scales for UE8M0 must be powers of two: quantize the weights anew by such scales")
        transform = _symbol(self.module, ("transform_sf_into_required_layout",))
        if transform is None:
            raise DeepGemmError(f"{self.module.__name__} {self.version} has no transform_sf_into_required_layout")
        return transform(sf=scales, mn=n, k=k, recipe=(1, 128, 128), num_groups=scales.shape[0], is_sfa=False)

    def mega_weights(
        self, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
    ) -> MegaWeights:
        """Weights of a rank's experts as the mega kernel takes them: a copy of w13, gate and up by turns of 8 rows.

        w13: fp8 [El, 2I, H], gate rows first. w2: fp8 [El, H, I]. Scales: fp32, one per 128 x 128 tile; they stay as
        they are. Raises DeepGemmError without the feature `mega`.
        """
        return MegaWeights(*self._mega_call("weights")((w13, w13_scale), (w2, w2_scale)))

    def mega_layer(self, group: Any, weights: MegaWeights, *, num_experts: int, top_k: int, max_tokens: int) -> MegaMoE:
        """The layer over the ranks of a process group. Collective: memory is allocated on all of them together.

        num_experts: of the whole layer; rank r holds the r-th part of them. max_tokens: the most that a rank brings to
        one call. Kernels are compiled for it, and for tokens and top-k, at the first call.
        """
        hidden, inner = weights.w2[0].shape[1:]
        buffer = self._mega_call("buffer")(group, num_experts, max_tokens, top_k, hidden, inner)
        return MegaMoE(weights, buffer, self._mega_call("quantize"), self._mega_call("layer"))

    def _mega_call(self, part: str) -> Call:
        call = self._mega.get(part)
        if call is None:
            raise DeepGemmError(f"{self.module.__name__} {self.version} lacks {MEGA_NAMES[part]}")
        return call


@dataclass(frozen=True, slots=True)
class MegaWeights:
    """The answer of `DeepGemm.mega_weights`: fp8 weights and fp32 scales of both GEMMs."""

    w13: tuple[torch.Tensor, torch.Tensor]
    w2: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class MegaMoE:
    """A whole expert-parallel fp8 layer in two launches: rows are quantized into memory that all ranks see, then one
    kernel dispatches, computes with silu(gate) * up between the two GEMMs, and combines.

    That kernel waits on the device for every rank of its group, up to 300 s, so all of them have to call. Of two calls
    in flight the later would overwrite the rows of the earlier: one stream at a time. A captured graph holds addresses
    of the shared memory, which lives as long as this object.
    """

    weights: MegaWeights
    _buffer: Any = field(repr=False)
    _quantize: Call = field(repr=False)
    _layer: Call = field(repr=False)

    def __call__(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states: bf16 [T, H]. topk_ids: int32 [T, K], -1 drops the pair. topk_weights: fp32 [T, K]. All
        contiguous. out: bf16 [T, H]. Returns `out`; nothing waits for the device.
        """
        buffer = self._buffer
        shared = (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)
        self._quantize(hidden_states, topk_ids, topk_weights, *shared, hidden_states.shape[0])
        self._layer(out, self.weights.w13, self.weights.w2, buffer)
        return out


@dataclass(frozen=True, slots=True)
class JitSettings:
    """How the library compiles its kernels, as it reads it from the environment.

    cache_folder: where compiled kernels are kept (DG_JIT_CACHE_DIR). nvrtc: compiled in the process
    (DG_JIT_USE_NVRTC=1) instead of by nvcc. nvcc: the compiler it would start; None if there is none.
    """

    cache_folder: Path
    nvrtc: bool
    nvcc: Path | None

    @property
    def compiler(self) -> str | None:
        """In words; None where kernels cannot be compiled."""
        if self.nvrtc:
            return "NVRTC"
        return None if self.nvcc is None else str(self.nvcc)

    @property
    def problem(self) -> str | None:
        """Why kernels cannot be compiled, and what would help; None if they can."""
        if self.compiler is not None:
            return None
        return f"no nvcc to compile its kernels with: {COMPILER_FIX}"


COMPILER_FIX = "set CUDA_HOME to a CUDA toolkit with bin/nvcc, or DG_JIT_USE_NVRTC=1 to compile without it"


def jit_settings() -> JitSettings:
    """What the library would compile with now. The rules are those of sgl-deep-gemm 0.1.5 and of its origin."""
    environ = os.environ
    nvrtc = environ.get("DG_JIT_USE_NVRTC", "").strip() not in ("", "0")
    cache = environ.get("DG_JIT_CACHE_DIR") or Path.home() / ".deep_gemm"
    on_path = shutil.which("nvcc")
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH") or (on_path and Path(on_path).parent.parent)
    nvcc = Path(environ.get("DG_JIT_NVCC_COMPILER") or Path(home or "/usr/local/cuda", "bin", "nvcc"))
    return JitSettings(Path(cache), nvrtc, nvcc if nvcc.is_file() and os.access(nvcc, os.X_OK) else None)


_lock = threading.RLock()
_found: tuple[DeepGemm, Package] | None = None


def probe() -> Package:
    """What is there, by importing it; never raises. Kept once it is usable, looked for again until then."""
    return _look()[1]


def library() -> DeepGemm:
    """The library. Raises MissingPackageError when it is absent, DeepGemmError with the reason when it is unusable."""
    found, package = _look()
    if found is not None:
        return found
    if package.version is None:
        raise MissingPackageError(PACKAGE, "deepgemm", "a grouped GEMM of DeepGEMM")
    raise DeepGemmError(f"{PACKAGE} {package.describe()}")


def forget() -> None:
    """Look for the library anew at the next call, as in a fresh process; modules stay imported."""
    global _found
    with _lock:
        _found = None


def _look() -> tuple[DeepGemm | None, Package]:
    global _found
    with _lock:
        if _found is not None:
            return _found
        found, package = _find()
        if found is not None:
            _found = found, package
        return found, package


def _find() -> tuple[DeepGemm | None, Package]:
    importlib.invalidate_caches()
    failures: dict[str, str] = {}
    for name in MODULES:
        try:
            if not _is_installed(name):
                continue
            found, missing = _read(_import(name))
        except (Exception, SystemExit) as problem:  # whatever a foreign module does while it loads
            failures[name] = _reason(problem)
            continue
        if found.features.isdisjoint(KINDS):
            failures[name] = f"lacks {' and '.join(missing)}: {INSTALL} brings a release that has them"
            continue
        jit = jit_settings()
        if jit.nvrtc:
            found = replace(found, features=found.features | {"nvrtc"})
        # One compiler serves every copy, so another copy would not help.
        problem_of_compiler = None if "cpu" in found.features else jit.problem
        package = Package(PACKAGE, found.version, problem_of_compiler, found.features, name)
        return (found if package.usable else None), package
    if not failures:
        return None, Package(PACKAGE, None, f"neither {' nor '.join(MODULES)} is installed: {INSTALL}")
    text = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    if list(failures) == [PACKAGE]:
        text = failures[PACKAGE]
    return None, Package(PACKAGE, _distribution_version(next(iter(failures))), text)


def _is_installed(name: str) -> bool:
    """Whether a module is there, found without importing anything: vLLM alone takes seconds."""
    top, *inner = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return False
    return not inner or any(Path(place, *inner).is_dir() for place in spec.submodule_search_locations or ())


def _import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # Where a caller made warnings errors, those of a library's import would leave it half imported.
        warnings.simplefilter("default")
        return importlib.import_module(name)


def _reason(problem: BaseException) -> str:
    """Why an import failed, and what would help."""
    text = " ".join(f"{type(problem).__name__}: {problem}".split()).removesuffix(":")
    if any("cuda_home" in frame.name for frame in traceback.extract_tb(problem.__traceback__)):
        return (
            f"finds no CUDA toolkit, which its import asks for ({text}): set CUDA_HOME to one with bin/nvcc; with "
            "DG_JIT_USE_NVRTC=1 its headers are enough"
        )
    if isinstance(problem, ModuleNotFoundError):
        return f"needs the module {problem.name!r}: {INSTALL}"
    library = re.search(r"(lib[\w.+-]+): cannot open shared object file", text)
    if "undefined symbol" in text or (library and library[1].startswith(("libtorch", "libc10"))):
        return (
            f"was built for another torch than {torch.__version__} ({text}): {INSTALL} with the torch that release was "
            "built for (sgl-deep-gemm 0.1.5: torch 2.11 for CUDA 13)"
        )
    if library:
        return (
            f"needs {library[1]}, which torch {torch.__version__} does not bring ({text}): install torch built for "
            "CUDA 13, or that library on LD_LIBRARY_PATH"
        )
    return f"does not load ({text}): {INSTALL}"


def _distribution_version(module: str) -> str:
    names = ("vllm",) if module.startswith("vllm.") else ("sgl-deep-gemm", "deep-gemm")
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def _read(module: ModuleType) -> tuple[DeepGemm, list[str]]:
    """The calls of an imported library, and those that it lacks, in words."""
    contiguous = {kind: _symbol(module, names) for kind, names in CONTIGUOUS_NAMES.items()}
    masked = {kind: _symbol(module, names) for kind, names in MASKED_NAMES.items()}
    version = str(getattr(module, "__version__", None) or _distribution_version(module.__name__))

    def absent(kind: str, layout: str, name: str) -> str:
        return f"the {layout} call for {kind} ({name})"

    missing = []
    features = {kind for kind in KINDS if contiguous[kind] and masked[kind]}
    for kind in KINDS:
        missing += [] if contiguous[kind] else [absent(kind, "contiguous", CONTIGUOUS_NAMES[kind][0])]
        missing += [] if masked[kind] else [absent(kind, "masked", MASKED_NAMES[kind][0])]
    found = [call for call in contiguous.values() if call is not None]
    if found and all(_takes(call, "use_psum_layout") for call in found):
        features.add("psum")
    mega = {part: call for part, name in MEGA_NAMES.items() if (call := _symbol(module, (name,))) is not None}
    if len(mega) == len(MEGA_NAMES):
        features.add("mega")
    if getattr(module, "COMPUTES_ON_CPU", False):
        features.add("cpu")

    where = f"{module.__name__} {version}"

    def contiguous_calls(kind: str) -> tuple[Call, Call]:
        call = contiguous[kind]
        if call is None:
            refuse = _refusing(f"{where} lacks {absent(kind, 'contiguous', CONTIGUOUS_NAMES[kind][0])}")
            return refuse, refuse
        per_row = _with_dims(call)
        if not _takes(call, "use_psum_layout"):
            return per_row, _refusing(
                f"{where}: the contiguous call for {kind} takes one expert per row, no group ends"
            )
        return per_row, functools.partial(per_row, use_psum_layout=True)

    def masked_call(kind: str) -> Call:
        call = masked[kind]
        if call is None:
            return _refusing(f"{where} lacks {absent(kind, 'masked', MASKED_NAMES[kind][0])}")
        return _with_dims(call)

    library = DeepGemm(
        module,
        version,
        frozenset(features),
        _symbol(module, ALIGNMENT_NAMES) or (lambda: 128),
        (contiguous_calls("bf16"), contiguous_calls("fp8")),
        (masked_call("bf16"), masked_call("fp8")),
        mega,
    )
    return library, missing


def _symbol(module: ModuleType, names: tuple[str, ...]) -> Call | None:
    """The first of `names` that the library or its `utils` has; one whose look-up breaks counts as absent."""
    for name in names:
        for inner in ("", "utils."):
            with contextlib.suppress(Exception):
                found = operator.attrgetter(inner + name)(module)
                if callable(found):
                    return found
    return None


def _takes(call: Call, parameter: str) -> bool:
    try:
        return parameter in inspect.signature(call).parameters
    except (TypeError, ValueError):  # compiled functions have their signature in their documentation
        return re.search(rf"\b{parameter}\b", call.__doc__ or "") is not None


def _with_dims(call: Call) -> Call:
    return functools.partial(call, compiled_dims=COMPILED_DIMS) if _takes(call, "compiled_dims") else call


def _refusing(message: str) -> Call:
    def refuse(*arguments: object) -> None:
        raise DeepGemmError(message)

    return refuse


def _wrong_dims(compiled_dims: str) -> DeepGemmError:
    return DeepGemmError(
        f"compiled_dims {compiled_dims!r}: kernels are compiled per N and K, which is {COMPILED_DIMS!r}; M varies"
    )


register_package_probe(PACKAGE, probe)
