"""The selection report: every strategy, every gate, the value seen; as objects, text and JSON."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_plugin.config import MoEConfig
from moe_plugin.verdict import Gate, Verdict, dtype_name

_DETAIL_WIDTH = 80
"""Characters of one detail in the one-line report; the table has all of them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What selection found about one strategy in one phase.

    rank: its place in the ranking table, from 1; None when it is not in it.
    reason: why it stands there. opt_in: why `auto` passes over it, if it does whatever the gates say.
    auto_gate: the condition that only `auto` makes.
    memory: bytes of workspace per buffer at max_tokens_per_rank. extra_weight_bytes: a second copy of the weights.
    host_syncs: how often an eager call makes the host wait for a CUDA device.
    details: what its classes do inside on that machine, by "class.topic"; empty for a refused strategy.
    """

    strategy: str
    rank: int | None
    reason: str
    opt_in: str | None
    verdict: Verdict
    auto_gate: Gate | None
    memory: Mapping[str, int]
    extra_weight_bytes: int
    host_syncs: int
    details: Mapping[str, str]

    @property
    def runs(self) -> bool:
        return self.verdict.ok

    @property
    def auto_may_pick(self) -> bool:
        return self.runs and self.opt_in is None and (self.auto_gate is None or self.auto_gate.ok)

    @property
    def workspace_bytes(self) -> int:
        return sum(self.memory.values())

    def standing(self) -> str:
        """One of: refused, explicit only, available."""
        if not self.runs:
            return "refused"
        return "available" if self.auto_may_pick else "explicit only"

    def why(self) -> str:
        """The reason for its standing."""
        if not self.runs:
            return self.verdict.reason
        if self.opt_in is not None:
            return self.opt_in
        if self.auto_gate is not None and not self.auto_gate.ok:
            return str(self.auto_gate)
        return self.reason

    def to_dict(self) -> dict[str, Any]:
        gates = [*self.verdict.gates, *([self.auto_gate] if self.auto_gate else [])]
        return {
            "strategy": self.strategy,
            "rank": self.rank,
            "standing": self.standing(),
            "why": self.why(),
            "gates": [
                {
                    "part": g.part,
                    "name": g.name,
                    "ok": g.ok,
                    "seen": g.seen,
                    "needs": g.needs,
                    "fix": g.fix,
                    "auto_only": g is self.auto_gate,
                }
                for g in gates
            ],
            "workspace_bytes": dict(self.memory),
            "extra_weight_bytes": self.extra_weight_bytes,
            "host_syncs": self.host_syncs,
            "details": dict(self.details),
        }


@dataclass(frozen=True, slots=True)
class SelectionReport:
    """Why a strategy was chosen, or why none was.

    requested: the `--moe_strategy` text. chosen: strategy per phase ("decode", "prefill"); None where nothing could be
    chosen. entries: per phase, in ranking order. is_phased: each phase has a layer and a configuration of its own.
    """

    requested: str
    layer: str
    environment: str
    chosen: Mapping[str, str | None]
    entries: Mapping[str, tuple[Entry, ...]]
    is_phased: bool

    def entry(self, phase: str) -> Entry | None:
        """The chosen entry of a phase."""
        return next((e for e in self.entries[phase] if e.strategy == self.chosen[phase]), None)

    def chosen_text(self) -> str:
        """The choice as a `--moe_strategy` value."""
        if self.is_phased:
            return ",".join(f"{phase}={strategy}" for phase, strategy in self.chosen.items())
        return str(next(iter(self.chosen.values())))

    def line(self) -> str:
        """The choice and its reason in one line."""
        phases = self.entries if self.is_phased else [next(iter(self.entries))]
        return f"moe_strategy {self.requested} -> " + "; ".join(self._phase_line(p) for p in phases)

    def _phase_line(self, phase: str) -> str:
        entry, prefix = self.entry(phase), f"{phase}: " if self.is_phased else ""
        if entry is None:
            return f"{prefix}none: no strategy that may be chosen passes its gates"
        why = entry.reason if entry.runs else f"refused: {entry.verdict.reason}"
        memory = f", workspace {entry.workspace_bytes / 2**20:.1f} MiB" if entry.memory else ""
        details = "".join(
            f", {topic.partition('.')[2]} {textwrap.shorten(words, _DETAIL_WIDTH, placeholder=' ...')}"
            for topic, words in entry.details.items()
        )
        return f"{prefix}{entry.strategy} ({why}{memory}{details})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "requested": self.requested,
            "layer": self.layer,
            "environment": self.environment,
            "chosen": dict(self.chosen),
            "strategies": {phase: [entry.to_dict() for entry in entries] for phase, entries in self.entries.items()},
        }

    def json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def text(self, width: int = 120, color: bool = False) -> str:
        """Tables of all strategies and all gates."""
        from rich.console import Console
        from rich.table import Table

        buffer = io.StringIO()
        console = Console(file=buffer, width=width, force_terminal=color, no_color=not color, markup=False)
        header = f"{self.line()}\nlayer: {self.layer}\nenvironment: {self.environment}"
        console.print(header, highlight=False, soft_wrap=True)
        phases = self.entries if self.entries_differ() else {"": next(iter(self.entries.values()))}
        for phase, entries in phases.items():
            table = Table(title=f"{phase} phase" if phase else None, show_lines=True)
            for column in ("#", "strategy", "standing", "gates: value seen", "workspace"):
                table.add_column(column, overflow="fold", justify="right" if column in "#workspace" else "left")
            chosen = self.chosen[phase or next(iter(self.entries))]
            for entry in entries:
                mark = "* " if entry.strategy == chosen else ""
                table.add_row(
                    str(entry.rank or "-"),
                    mark + entry.strategy,
                    entry.standing(),
                    _gates_text(entry),
                    f"{entry.workspace_bytes / 2**20:.1f} MiB",
                )
            console.print(table)
        return buffer.getvalue()

    def __str__(self) -> str:
        return self.text()

    def entries_differ(self) -> bool:
        """Whether the phases see different gates."""
        first, *others = self.entries.values()
        return self.is_phased or any(other != first for other in others)


def _gates_text(entry: Entry) -> str:
    gates = [*entry.verdict.gates, *([entry.auto_gate] if entry.auto_gate else [])]
    lines = [f"{'pass' if gate.ok else 'FAIL'} {gate}" for gate in gates]
    details = [f"{topic}: {words}" for topic, words in entry.details.items()]
    notes = [note for note in (entry.opt_in,) if note]
    return "\n".join(lines + details + notes)


def describe_layer(config: MoEConfig) -> str:
    """A MoEConfig in one line."""
    quantization = "" if config.quantization is None else f" {config.quantization.name}"
    parallel = config.parallel
    layout = [f"EP {parallel.ep_size} x TP {parallel.tp_size}"]
    if parallel.dp_size > 1:
        layout.append(f"DP {parallel.dp_size}")
    if parallel.num_nodes > 1:
        layout.append(f"{parallel.num_nodes} nodes")
    return (
        f"{config.num_experts} experts, top-{config.top_k}, "
        f"hidden {config.hidden_size}, intermediate {config.intermediate_size}, "
        f"{dtype_name(config.dtype)}{quantization}, {', '.join(layout)}, "
        f"at most {config.max_tokens_per_rank} tokens per rank, cuda_graph={config.cuda_graph}"
    )
