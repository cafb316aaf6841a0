"""Which PrepareAndFinalize, Experts and Monolithic classes exist: built-in, from other packages, and yours.

Other packages add theirs through the entry-point groups `moe_plugin.prepare_finalize`, `moe_plugin.experts` and
`moe_plugin.monolithic` (name = class), programs through the `register_*` functions.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from typing import Generic, TypeVar

from moe_plugin.errors import RegistrationError
from moe_plugin.modular_kernel import Experts, Monolithic, PrepareAndFinalize, StrategyPart
from moe_plugin.strategies.aliases import ALIASES
from moe_plugin.strategies.names import AUTO, PHASES

logger = logging.getLogger(__name__)

Part = TypeVar("Part", bound=StrategyPart)


class Registry(Generic[Part]):
    """Classes of one kind by name."""

    def __init__(self, kind: type[Part], entry_point_group: str) -> None:
        self._kind = kind
        self._group = entry_point_group
        self._classes: dict[str, type[Part]] = {}
        self._entry_points_loaded = False

    def register(self, cls: type[Part]) -> type[Part]:
        """Add a class; usable as a decorator. The same class may be registered again.

        Raises RegistrationError for a wrong base, a malformed name or a name another class has.
        """
        if not (isinstance(cls, type) and issubclass(cls, self._kind)):
            raise RegistrationError(f"{cls!r} is not a subclass of {self._kind.__name__}")
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise RegistrationError(f"{cls.__name__}.name must be lower_snake_case, got {name!r}")
        if name in (AUTO, *PHASES, *ALIASES):
            raise RegistrationError(f"the name {name!r} has a meaning of its own in --moe_strategy")
        if self._classes.get(name, cls) is not cls:
            raise RegistrationError(f"the name {name!r} is taken by {self._classes[name].__name__}")
        if getattr(cls, "__abstractmethods__", None):
            raise RegistrationError(f"{cls.__name__} does not implement {', '.join(sorted(cls.__abstractmethods__))}")
        self._classes[name] = cls
        return cls

    def unregister(self, name: str) -> None:
        """Forget a class; for tests."""
        self._classes.pop(name, None)

    def all(self) -> dict[str, type[Part]]:
        """Every class by name, in order of registration."""
        self._load_entry_points()
        return dict(self._classes)

    def _load_entry_points(self) -> None:
        if self._entry_points_loaded:
            return
        self._entry_points_loaded = True
        for entry_point in importlib.metadata.entry_points(group=self._group):
            try:
                self.register(entry_point.load())
            # A broken third-party package must not take the server down with it; it is named instead.
            except Exception as problem:
                logger.warning(
                    "entry point %s of group %s cannot be loaded: %s", entry_point.name, self._group, problem
                )


prepare_finalize_classes: Registry[PrepareAndFinalize] = Registry(PrepareAndFinalize, "moe_plugin.prepare_finalize")  # type: ignore[type-abstract]
experts_classes: Registry[Experts] = Registry(Experts, "moe_plugin.experts")  # type: ignore[type-abstract]
monolithic_classes: Registry[Monolithic] = Registry(Monolithic, "moe_plugin.monolithic")  # type: ignore[type-abstract]

register_prepare_finalize = prepare_finalize_classes.register
register_experts = experts_classes.register
register_monolithic = monolithic_classes.register


def _register_builtin() -> None:
    from moe_plugin.experts.deep_gemm_hybrid import DeepGemmHybrid
    from moe_plugin.experts.torch_native import TorchNative
    from moe_plugin.experts.triton_fused_moe import TritonFusedMoE
    from moe_plugin.prepare_finalize.deepep_high_throughput import DeepEPHighThroughput
    from moe_plugin.prepare_finalize.deepep_low_latency import DeepEPLowLatency
    from moe_plugin.prepare_finalize.hybrid_dense_routing import HybridDenseRouting
    from moe_plugin.prepare_finalize.local import Local
    from moe_plugin.prepare_finalize.nccl_all_to_all import NcclAllToAll

    for prepare_finalize in (Local, HybridDenseRouting, NcclAllToAll, DeepEPHighThroughput, DeepEPLowLatency):
        register_prepare_finalize(prepare_finalize)
    for experts in (DeepGemmHybrid, TritonFusedMoE, TorchNative):
        register_experts(experts)


_register_builtin()
