"""The strategy table of the README, made from the registry.

    python -m moe_plugin.strategies.table README.md

writes it between the markers in that file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moe_plugin.config import MoEConfig, ParallelConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.strategies.names import PHASES
from moe_plugin.strategies.ranking import RANKING, UNRANKED
from moe_plugin.strategies.selector import explain, strategy_names

_HIDDEN_SIZE, _MAX_TOKENS = 2048, 256
START, END = "<!-- strategy-table:start -->", "<!-- strategy-table:end -->"


def strategy_table() -> str:
    """The registered strategies as a Markdown table, the same on every machine: what stands in the README."""
    deep_gemm = Package("deep_gemm", "0.1.5", features=frozenset({"bf16", "fp8", "psum"}))
    deep_ep = Package(
        "deep_ep",
        "2.1.0",
        features=frozenset({"Buffer", "num_worst_tokens", "low_latency", f"ll_hidden_{_HIDDEN_SIZE}", "rdma"}),
    )
    packages = {"triton": Package("triton", "3.6"), "deep_gemm": deep_gemm, "deep_ep": deep_ep}
    machines = {
        "CPU": Environment(torch_version="2.11", backends=("gloo",)),
        "GPU": Environment(torch_version="2.11", packages=packages, nvcc=True).pretend(sm=90),
    }

    def runs(strategy: str, machine: str, cuda_graph: bool = False) -> bool:
        def passes(ep_size: int) -> bool:
            layer = MoEConfig(
                num_experts=8,
                top_k=2,
                hidden_size=_HIDDEN_SIZE,
                max_tokens_per_rank=_MAX_TOKENS,
                intermediate_size=64,
                parallel=ParallelConfig(ep_size=ep_size),
                cuda_graph=cuda_graph,
            )
            entry = explain(layer, strategy, machines[machine]).entry(PHASES[0])
            return entry is not None and entry.runs

        return passes(1) or passes(8)

    ranks = {row.strategy: str(place) for place, row in enumerate(RANKING, start=1)}
    reasons = {row.strategy: row.opt_in or row.reason for row in RANKING}
    lines = [
        "| rank | strategy | CPU | GPU | CUDA graph | why it stands there |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in strategy_names():
        answers = [runs(name, "CPU"), runs(name, "GPU"), runs(name, "GPU", cuda_graph=True)]
        marks = " | ".join("yes" if answer else "no" for answer in answers)
        lines.append(f"| {ranks.get(name, '-')} | `{name}` | {marks} | {reasons.get(name, UNRANKED)} |")
    return "\n".join(lines)


def write_table(path: Path) -> None:
    """Replace what stands between the markers in the file at `path`."""
    before, rest = path.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    path.write_text(f"{before}{START}\n{strategy_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
