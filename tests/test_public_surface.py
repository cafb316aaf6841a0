"""What a user sees and pays: exported names, their documentation, the cost of the import, who knows whom."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_plugin

PACKAGE = Path(moe_plugin.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_tiny_moe" not in path.parts)

PUBLIC = [
    "Activation",
    "Environment",
    "ExpertPlacement",
    "Fp8Block",
    "Fp8PerTensor",
    "Fp8PerToken",
    "MoEConfig",
    "MoELayer",
    "MoEPluginError",
    "ParallelConfig",
    "build",
    "explain",
    "parse_strategy",
    "reference_moe",
    "register_experts",
    "register_monolithic",
    "register_prepare_finalize",
    "strategy_names",
]


def room_of(path: Path) -> str:
    """Folder or module right under moe_plugin, "" for moe_plugin itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def run_python(code: str, **environment: str) -> str:
    """stdout of a fresh interpreter that sees no GPU."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_exported_names() -> None:
    assert sorted(moe_plugin.__all__) == PUBLIC
    assert [name for name in PUBLIC if not hasattr(moe_plugin, name)] == []


def test_the_version_is_that_of_the_package() -> None:
    assert f'version = "{moe_plugin.__version__}"' in (PACKAGE.parent / "pyproject.toml").read_text().splitlines()


def public_definitions(body: list[ast.stmt], outer: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield outer + node.name, node


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_public_classes_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    classes = [(name, node) for name, node in public_definitions(tree.body) if isinstance(node, ast.ClassDef)]
    assert [name for name, node in classes if not ast.get_docstring(node)] == []


def test_everything_exported_is_documented_to_its_methods() -> None:
    undocumented = []
    for name in PUBLIC:
        exported = getattr(moe_plugin, name)
        if not exported.__doc__:
            undocumented.append(name)
        if inspect.isclass(exported) and name != "Activation":
            own = {key: value for key, value in vars(exported).items() if not key.startswith("_")}
            callables = {key: value for key, value in own.items() if callable(getattr(value, "__func__", value))}
            undocumented += [f"{name}.{key}" for key, value in callables.items() if not inspect.getdoc(value)]
    assert undocumented == []


def test_functions_that_build_on_others_are_documented() -> None:
    from moe_plugin import modular_kernel
    from moe_plugin.strategies import agreement, build, registry, selector

    undocumented = []
    for module in (modular_kernel, selector, build, agreement, registry):
        for name, node in public_definitions(ast.parse(inspect.getsource(module)).body):
            members = public_definitions(node.body, f"{name}.") if isinstance(node, ast.ClassDef) else [(name, node)]
            undocumented += [
                f"{module.__name__}.{member}"
                for member, definition in members
                if isinstance(definition, ast.FunctionDef)
                and not ast.get_docstring(definition)
                and not is_override(module, member)
                and not is_property(definition)
            ]
    assert undocumented == []


def is_override(module: object, member: str) -> bool:
    """Whether a method's documentation is that of a base class."""
    owner, _, method = member.rpartition(".")
    bases = getattr(module, owner).__mro__[1:] if owner else ()
    return any(hasattr(base, method) for base in bases)


def is_property(definition: ast.FunctionDef) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "property" for each in definition.decorator_list)


TIERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("config",),
    ("quantization",),
    ("environment",),
    ("verdict",),
    ("kernels", "compat", "activation", "workspace", "presets"),
    ("reference",),
    ("routing", "numerics"),
    ("modular_kernel",),
    ("prepare_finalize", "experts"),
    ("strategies",),
    ("", "testing"),
    ("bench",),
    ("integrations",),
    ("cli",),
)
"""The rooms of the package from the bottom up. A room knows only those below it, and itself."""

TIER_OF = {room: height for height, rooms in enumerate(TIERS) for room in rooms}


def imports_of(path: Path) -> Iterator[str]:
    """Rooms of moe_plugin that a module imports anywhere in it, type checking included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "moe_plugin" else [module]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "moe_plugin":
                room = rest.partition(".")[0]
                yield room if room in TIER_OF else ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_dependency_arrow_points_down(path: Path) -> None:
    room = room_of(path)
    assert room in TIER_OF, f"{name_of(path)} has no place in TIERS"
    upward = {other for other in imports_of(path) if other != room and TIER_OF[other] >= TIER_OF[room]}
    assert upward == set()


OPTIONAL = {
    "deep_ep": ("compat",),
    "deep_gemm": ("compat",),
    "vllm": ("integrations",),
    "sglang": ("integrations",),
    "transformers": ("integrations", "cli"),
    "triton": ("kernels",),
}
"""Optional packages and the only rooms that may import them."""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_optional_packages_are_imported_where_they_belong(path: Path) -> None:
    seen = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            seen |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            seen.add((node.module or "").partition(".")[0])
    assert {name for name in seen & OPTIONAL.keys() if room_of(path) not in OPTIONAL[name]} == set()


WITHOUT_EXTRAS = """
import importlib.abc, sys

BLOCKED = {"triton", "deep_ep", "deep_gemm", "transformers", "vllm", "sglang", "pynvml"}

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked by the test")

sys.meta_path.insert(0, Missing())
import torch
BLOCKED.add("numpy")  # torch itself warns without it
import moe_plugin
from moe_plugin.testing.cases import Inputs, Weights

assert not torch.cuda.is_available()
config = moe_plugin.MoEConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=8, dtype=torch.float32)
report = moe_plugin.explain(config)
refused = {e.strategy: e.why() for e in report.entries["decode"] if not e.runs}
assert "triton" in refused["local+triton_fused_moe"], refused
device = torch.device("cpu")
weights, inputs = Weights.random(config, device), Inputs.random(config, 5, device, 0)
expected = moe_plugin.reference_moe(*inputs.as_tuple(), weights.w13, weights.w2)
for strategy in ("auto", "hybrid_dense_routing+torch_native", "nccl_all_to_all+torch_native"):
    layer = moe_plugin.build(config, **weights.of_rank(config), strategy=strategy)
    torch.testing.assert_close(layer(*inputs.as_tuple()), expected, rtol=1e-4, atol=1e-4)
print(layer.strategy)
"""


@pytest.mark.slow
def test_everything_but_triton_strategies_works_without_the_extras() -> None:
    assert run_python(WITHOUT_EXTRAS).strip() == "nccl_all_to_all+torch_native"


IMPORT = """
import sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
before = set(sys.modules)
import moe_plugin
end = time.perf_counter()
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(middle - start, end - middle, *sorted(added))
"""


@pytest.mark.slow
def test_the_import_is_cheap_and_starts_nothing() -> None:
    """Under a second beyond torch, on a machine that imports torch in two; in proportion elsewhere."""
    best = float("inf")
    for _ in range(3):
        torch_seconds, our_seconds, *added = run_python(IMPORT).split()
        assert not {"transformers", "vllm", "deep_ep", "deep_gemm", "sglang", "typer", "rich", "pytest"} & set(added)
        best = min(best, float(our_seconds) / float(torch_seconds))
        if best < 0.5:
            break
    assert best < 0.5


@pytest.mark.slow
def test_the_import_does_not_touch_logging_or_cuda() -> None:
    code = """
import logging, torch
handlers = list(logging.root.handlers)
import moe_plugin
assert logging.root.handlers == handlers
assert logging.getLogger("moe_plugin").handlers == []
assert not torch.cuda.is_initialized()
print("ok")
"""
    assert run_python(code).strip() == "ok"
