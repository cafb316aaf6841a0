"""`moe-plugin doctor`: what is usable on this machine, what is missing, and the exact fix."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moe_plugin.cli.explain import MaxTokensOption, NodesOption, PresetOption, TpOption, WorldOption
from moe_plugin.cli.launch import TracebackOption, clear_errors
from moe_plugin.compat import deep_gemm
from moe_plugin.config import ParallelConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.presets import preset_config
from moe_plugin.strategies.selector import explain

PACKAGE_FIXES = {
    "triton": "pip install 'moe-plugin[triton]'",
    "deep_gemm": "pip install 'moe-plugin[deepgemm]' (Hopper or newer, CUDA 13)",
    "deep_ep": "build DeepEP from its repository following its own guide",
    "vllm": "pip install 'moe-plugin[vllm]'",
    "transformers": "pip install 'moe-plugin[serve]'",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination. fix is empty when nothing has to be done."""

    what: str
    ok: bool
    seen: str
    fix: str = ""


def examine(environment: Environment, jit: deep_gemm.JitSettings | None = None) -> list[Finding]:
    """Everything strategies depend on, as `environment` has it; jit: how DeepGEMM compiles, by default as it would."""
    jit = jit or deep_gemm.jit_settings()
    cuda = environment.device_type == "cuda"
    no_gpu = "" if cuda else "a machine with an NVIDIA GPU and a CUDA build of torch; CPU runs everything, slowly"
    no_peers = no_gpu or "GPUs joined by NVLink on one host; `nvidia-smi topo -m` shows how these are connected"
    links = {None: "unknown (pip install nvidia-ml-py to ask)", 0: "none"}.get(
        environment.nvlinks, f"{environment.nvlinks} links"
    )
    findings = [
        Finding("torch", environment.torch_at_least(2, 8), environment.torch_version, "pip install 'torch>=2.8'"),
        Finding("GPU", cuda, f"{environment.num_devices} x {environment.device_name}" if cuda else "none", no_gpu),
        Finding("compute capability", cuda, f"SM {environment.sm}" if cuda else "none", no_gpu),
        Finding(
            "peer access",
            environment.peer_access,
            "every pair" if environment.peer_access else "not every pair",
            no_peers,
        ),
        Finding("NVLink", bool(environment.nvlinks), links if cuda else "none", no_peers),
        Finding(
            "nccl", "nccl" in environment.backends, _having("nccl" in environment.backends), "a CUDA build of torch"
        ),
        Finding(
            "gloo", "gloo" in environment.backends, _having("gloo" in environment.backends), "a torch build with gloo"
        ),
        Finding("DeepGEMM compiler", jit.problem is None, jit.compiler or "not found", deep_gemm.COMPILER_FIX),
        Finding("DeepGEMM cache", True, str(jit.cache_folder)),
    ]
    findings += [_package(package) for package in environment.packages.values()]
    return [Finding(f.what, f.ok, f.seen, "" if f.ok else f.fix) for f in findings]


def _package(package: Package) -> Finding:
    if package.name == deep_gemm.PACKAGE and package.version and package.problem:
        # Its probe knows what would help.
        return Finding(package.name, False, f"{package.version}, unusable", package.problem)
    fix = PACKAGE_FIXES.get(package.name, f"pip install {package.name}")
    return Finding(package.name, package.usable, package.describe(), fix)


def _having(found: bool) -> str:
    return "found" if found else "not found"


def doctor(
    preset: PresetOption = "qwen3-30b",
    world: WorldOption = 1,
    tp: TpOption = 1,
    nodes: NodesOption = 1,
    max_tokens: MaxTokensOption = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    traceback: TracebackOption = False,
) -> None:
    """Examine this machine, and show the workspace each strategy would take for a layer."""
    with clear_errors(traceback):
        environment = Environment.probe()
        findings = examine(environment)
        parallel = ParallelConfig(ep_size=world, tp_size=tp, num_nodes=nodes)
        config = preset_config(preset, parallel=parallel, max_tokens_per_rank=max_tokens)
        report = explain(config, environment=environment)
        entries = report.entries["decode"]
        if as_json:
            machine = [{"what": f.what, "ok": f.ok, "seen": f.seen, "fix": f.fix} for f in findings]
            memory = {entry.strategy: entry.to_dict()["workspace_bytes"] for entry in entries}
            typer.echo(json.dumps({"machine": machine, "layer": report.layer, "workspace_bytes": memory}, indent=2))
            return
        console = Console(markup=False)  # moe-plugin[triton] is no markup
        machine_table = Table("", "what", "seen", "fix", title="This machine")
        for finding in findings:
            machine_table.add_row("ok" if finding.ok else "--", finding.what, finding.seen, finding.fix)
        console.print(machine_table)
        memory_table = Table("strategy", "standing", "workspace", "largest buffers", title=f"Memory for {report.layer}")
        for entry in entries:
            largest = sorted(entry.memory.items(), key=lambda item: -item[1])[:3]
            shown = ", ".join(f"{name} {_mib(size)}" for name, size in largest if size)
            memory_table.add_row(entry.strategy, entry.standing(), _mib(entry.workspace_bytes), shown)
        console.print(memory_table)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
