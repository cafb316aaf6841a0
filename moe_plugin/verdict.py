"""Answers to "can this class run this layer on this machine?", gate by gate.

`supports(config, environment)` of every PrepareAndFinalize, Experts and Monolithic class returns a Verdict. The
functions below are the gates most classes need; a class with a need of its own builds a Gate directly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe_plugin.config import Fp8Block

if TYPE_CHECKING:
    from moe_plugin.config import MoEConfig
    from moe_plugin.environment import Environment


QUANTIZATIONS = ("none", "fp8_per_tensor", "fp8_per_token", "fp8_block")
"""Every name that `gate_quantization` knows."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One checked condition: the value seen, what would satisfy it and, where known, the fix.

    part: the class that asks, filled in by selection.
    """

    name: str
    ok: bool
    seen: str
    needs: str
    fix: str | None = None
    part: str = ""

    def __str__(self) -> str:
        name = f"{self.part}.{self.name}" if self.part else self.name
        if self.ok:
            return f"{name}: {self.seen}"
        return f"{name}: needs {self.needs}, saw {self.seen}" + (f" ({self.fix})" if self.fix else "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """All gates of one class for one (config, environment)."""

    gates: tuple[Gate, ...] = ()

    @classmethod
    def of(cls, *gates: Gate) -> Verdict:
        return cls(tuple(gates))

    @property
    def ok(self) -> bool:
        return all(gate.ok for gate in self.gates)

    @property
    def failed(self) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.gates if not gate.ok)

    @property
    def reason(self) -> str:
        """The failing gates in words, or 'all gates pass'."""
        return "; ".join(map(str, self.failed)) or "all gates pass"

    def asked_by(self, part: str) -> Verdict:
        """The same gates, with the name of the class that asks."""
        return Verdict(tuple(replace(gate, part=part) for gate in self.gates))

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(self.gates + other.gates)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gate_dtype(config: MoEConfig, *allowed: torch.dtype) -> Gate:
    names = ", ".join(map(dtype_name, allowed))
    return Gate("dtype", config.dtype in allowed, dtype_name(config.dtype), f"one of {names}")


def gate_quantization(
    config: MoEConfig, allowed: Iterable[str] = ("none",), blocks: Collection[tuple[int, int]] = ((128, 128),)
) -> Gate:
    """allowed: names of QUANTIZATIONS. blocks: the (block_n, block_k) of fp8_block that the class computes."""
    scheme, allowed = config.quantization, tuple(allowed)
    name = "none" if scheme is None else scheme.name
    if name in allowed and isinstance(scheme, Fp8Block) and (scheme.block_n, scheme.block_k) not in blocks:
        seen = f"{name} {scheme.block_n} x {scheme.block_k}"
        sizes = " or ".join(f"{n} x {k}" for n, k in blocks)
        return Gate("quantization", False, seen, f"{name} in tiles of {sizes}")
    return Gate("quantization", name in allowed, name, f"one of {', '.join(allowed)}")


def gate_cuda_graph(config: MoEConfig, capturable: bool, why_not: str = "") -> Gate:
    seen = "requested" if config.cuda_graph else "not requested"
    return Gate("cuda_graph", capturable or not config.cuda_graph, seen, f"cuda_graph=False: {why_not}")


def gate_package(environment: Environment, package: str, fix: str) -> Gate:
    found = environment.package(package)
    return Gate(package, found.usable, found.describe(), "an importable installation", None if found.usable else fix)


def gate_sm(environment: Environment, minimum: int) -> Gate:
    seen = "no CUDA device" if environment.sm is None else f"SM {environment.sm}"
    return Gate("sm", environment.sm is not None and environment.sm >= minimum, seen, f"SM {minimum} or newer")
