"""Every error that moe_plugin raises on purpose.

MoEPluginError
├── ConfigError                  a configuration that cannot be right, whatever the machine
├── InputError                   an argument of a call; raised before any collective, on all ranks alike
│   ├── DtypeError
│   ├── ShapeError
│   ├── TooManyTokensError       more tokens than max_tokens_per_rank
│   └── ExpertIdError            an expert id outside [-1, num_experts)
├── HandleError                  finalize without prepare, twice, or with a handle of another object
├── CapacityError                a fixed-capacity dispatch met more rows than it was sized for
├── StrategyError
│   ├── UnknownStrategyError     no such name; carries the nearest one
│   ├── StrategyUnsupportedError an explicit choice whose gate fails; carries the report
│   ├── NoStrategyError          `auto` found nothing that runs here; carries the report
│   └── StrategyMismatchError    the ranks of one group disagree; carries the differing fields
├── RegistrationError            a class that cannot be registered
├── MemoryLimitError             buffers larger than the device; carries the largest size that fits
├── MissingPackageError          an optional package is absent; carries the extra that brings it
├── DeepGemmError                DeepGEMM is there and cannot do what is asked
└── PeerLostError                a peer died or came too late; carries its rank and the phase

An error that another rank met first has its message; what else an error carries stays on the rank that met it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any


class MoEPluginError(Exception):
    """Base class of all errors of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Constructors take what a message is made of; a copy in another process has the message and the attributes.
        return _restore, (type(self), str(self), dict(vars(self)))


class ConfigError(MoEPluginError, ValueError):
    """A configuration that cannot be right on any machine."""


class InputError(MoEPluginError, ValueError):
    """An argument of a call is wrong."""


class DtypeError(InputError, TypeError):
    """An argument has a dtype that the call does not take."""


class ShapeError(InputError):
    """An argument has a shape that does not fit the others or the configuration."""


class TooManyTokensError(InputError):
    """A call brings more tokens than its buffers were sized for."""


class ExpertIdError(InputError):
    """An expert id lies outside [-1, num_experts)."""


class HandleError(MoEPluginError, RuntimeError):
    """A dispatch handle was used out of turn."""


class CapacityError(MoEPluginError, RuntimeError):
    """A fixed-capacity dispatch overflowed: its result lacks rows and must not be used."""


class StrategyError(MoEPluginError):
    """Base class of what can go wrong while a strategy is chosen."""


class UnknownStrategyError(StrategyError, ValueError):
    """No strategy has that name."""

    name: str = ""
    nearest: str | None = None

    def __init__(self, name: str, nearest: str | None, known: Sequence[str]) -> None:
        self.name, self.nearest = name, nearest
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        super().__init__(f"unknown moe_strategy {name!r}.{hint} Known: auto, {', '.join(known)}.")


class StrategyUnsupportedError(StrategyError, RuntimeError):
    """An explicitly chosen strategy fails a gate. It never falls back to another one."""

    report: Any = None

    def __init__(self, message: str, report: Any = None) -> None:
        self.report = report
        super().__init__(message)


class NoStrategyError(StrategyError, RuntimeError):
    """No strategy that `auto` may pick passes its gates."""

    report: Any = None

    def __init__(self, message: str, report: Any = None) -> None:
        self.report = report
        super().__init__(message)


class StrategyMismatchError(StrategyError, RuntimeError):
    """The ranks of one group were built with different configurations or choices."""

    fields: Mapping[str, Mapping[int, str]] = MappingProxyType({})

    def __init__(self, message: str, fields: Mapping[str, Mapping[int, str]] | None = None) -> None:
        self.fields = dict(fields or {})
        super().__init__(message)


class RegistrationError(MoEPluginError, ValueError):
    """A class cannot be registered as a strategy part."""


class MemoryLimitError(MoEPluginError, RuntimeError):
    """The buffers a configuration needs do not fit on the device."""

    largest_fit: int | None = None

    def __init__(self, message: str, largest_fit: int | None = None) -> None:
        self.largest_fit = largest_fit
        super().__init__(message)


class MissingPackageError(MoEPluginError, ImportError):
    """An optional package is needed for this call and is not installed."""

    package: str = ""
    extra: str = ""

    def __init__(self, package: str, extra: str, why: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{why} needs the package {package!r}: pip install 'moe-plugin[{extra}]'")


class DeepGemmError(MoEPluginError, RuntimeError):
    """DeepGEMM does not load, lacks a call, or was asked for what it cannot do."""


class PeerLostError(MoEPluginError, RuntimeError):
    """A peer died, or did not arrive within the time limit."""

    phase: str = ""
    ranks: tuple[int, ...] | None = None

    def __init__(self, phase: str, ranks: Sequence[int] | None, seconds: float, detail: str = "") -> None:
        self.phase, self.ranks = phase, None if ranks is None else tuple(ranks)
        who = (
            "a peer (which one is unknown)"
            if not ranks
            else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        )
        super().__init__(
            f"{who} lost or late in phase {phase!r} (time limit {seconds:g} s)" + (f": {detail}" if detail else "")
        )


def rebuild(kind: str, text: str) -> MoEPluginError:
    """The error of class `kind` that another rank raised with message `text`.

    A class that is not of this module comes back as MoEPluginError, with its name in the text.
    """
    cls = globals().get(kind)
    if isinstance(cls, type) and issubclass(cls, MoEPluginError):
        return _restore(cls, text, {})
    return MoEPluginError(f"{text} ({kind})")


def _restore(cls: type[MoEPluginError], text: str, attributes: Mapping[str, Any]) -> MoEPluginError:
    problem = cls.__new__(cls)
    Exception.__init__(problem, text)
    problem.__dict__.update(attributes)
    return problem
