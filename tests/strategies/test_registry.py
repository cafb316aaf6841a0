"""Registration of classes, by call and by entry point."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest

import moe_plugin
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import RegistrationError
from moe_plugin.modular_kernel import Experts, Monolithic, PrepareAndFinalize
from moe_plugin.strategies.registry import Registry
from moe_plugin.strategies.selector import strategy_names
from moe_plugin.verdict import Verdict
from tests.matrix.third_party import BatchedLocal, LoopExperts, OracleMonolith

GROUP = "moe_plugin.test"


@pytest.fixture
def experts() -> Registry[Experts]:
    """A registry of its own."""
    return Registry(Experts, GROUP)


def entry_point(value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint("theirs", value, GROUP)


def install(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """Pretend that packages with these entry points are installed."""
    found = [entry_point(value) for value in values]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == GROUP else [])


def test_register_returns_the_class_and_takes_it_again(experts: Registry[Experts]) -> None:
    assert experts.register(LoopExperts) is LoopExperts
    assert experts.register(LoopExperts) is LoopExperts
    assert experts.all() == {"loop": LoopExperts}


def test_unregister(experts: Registry[Experts]) -> None:
    experts.register(LoopExperts)
    experts.unregister("loop")
    experts.unregister("never there")
    assert experts.all() == {}


def test_the_answer_is_a_copy(experts: Registry[Experts]) -> None:
    experts.all()["loop"] = LoopExperts
    assert experts.all() == {}


@pytest.mark.parametrize("wrong", [BatchedLocal, OracleMonolith, int, LoopExperts.name, None])
def test_wrong_base(experts: Registry[Experts], wrong: type) -> None:
    with pytest.raises(RegistrationError, match="not a subclass of Experts"):
        experts.register(wrong)


@pytest.mark.parametrize("name", ["Loop", "my-loop", "a+b", "9lives", "", "two words", 3, None])
def test_bad_name(experts: Registry[Experts], name: object) -> None:
    named = type("Named", (LoopExperts,), {"name": name})
    with pytest.raises(RegistrationError, match=r"Named\.name must be lower_snake_case"):
        experts.register(named)


def test_no_name(experts: Registry[Experts]) -> None:
    class Nameless(Experts):
        pass

    with pytest.raises(RegistrationError, match=r"Nameless\.name must be lower_snake_case, got None"):
        experts.register(Nameless)


def test_taken_name(experts: Registry[Experts]) -> None:
    experts.register(LoopExperts)
    with pytest.raises(RegistrationError, match="'loop' is taken by LoopExperts"):
        experts.register(type("Impostor", (LoopExperts,), {}))
    assert experts.all() == {"loop": LoopExperts}


def test_missing_methods_are_named(experts: Registry[Experts]) -> None:
    class Half(Experts):
        name = "half"

        @classmethod
        def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
            return Verdict()

    with pytest.raises(RegistrationError, match="Half does not implement apply"):
        experts.register(Half)
    with pytest.raises(RegistrationError, match="Part does not implement finalize, prepare, supports"):
        Registry(PrepareAndFinalize, GROUP).register(type("Part", (PrepareAndFinalize,), {"name": "part"}))
    with pytest.raises(RegistrationError, match="Whole does not implement apply, supports"):
        Registry(Monolithic, GROUP).register(type("Whole", (Monolithic,), {"name": "whole"}))


def test_the_public_functions_fill_the_table() -> None:
    assert moe_plugin.register_prepare_finalize(BatchedLocal) is BatchedLocal
    assert moe_plugin.register_experts(LoopExperts) is LoopExperts
    assert moe_plugin.register_monolithic(OracleMonolith) is OracleMonolith
    assert {"batched_local+loop", "local+loop", "oracle"} <= set(strategy_names())


def test_entry_points_are_loaded_once(experts: Registry[Experts], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tests.matrix.third_party:LoopExperts")
    assert experts.all() == {"loop": LoopExperts}
    install(monkeypatch, "no_such_module:Experts")
    assert experts.all() == {"loop": LoopExperts}


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("no_such_module:Experts", "no_such_module"),
        ("tests.matrix.third_party:NoSuchClass", "NoSuchClass"),
        ("tests.matrix.third_party:BatchedLocal", "not a subclass of Experts"),
    ],
)
def test_a_broken_entry_point_is_named_and_the_others_work(
    experts: Registry[Experts],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
    text: str,
) -> None:
    install(monkeypatch, broken, "tests.matrix.third_party:LoopExperts")
    ours = logging.getLogger("moe_plugin")
    monkeypatch.setattr(ours, "propagate", True)
    with caplog.at_level(logging.WARNING, ours.name):
        assert experts.all() == {"loop": LoopExperts}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "theirs" in record.getMessage()
    assert GROUP in record.getMessage()
    assert text in record.getMessage()
