"""Trials: a candidate is right, wrong or failed, and only right ones are timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_plugin.bench.experts import DeviceLostError
from moe_plugin.bench.timing import Stopwatch
from moe_plugin.bench.trials import Trials
from moe_plugin.config import Fp8Block, MoEConfig

CPU = torch.device("cpu")
CONFIG = MoEConfig(num_experts=2, top_k=1, hidden_size=8, intermediate_size=8)
ROUNDED, EXACT = torch.full((32, 8), 1.25), torch.full((32, 8), 1.0)


def trials(stopwatch: Stopwatch | None = None, config: MoEConfig = CONFIG) -> Trials:
    """A call whose right answer is either of two; its output has two more rows, which nothing looks at."""
    return Trials(stopwatch or Stopwatch(CPU), config, lambda output: output[:32], lambda: [EXACT, ROUNDED])


def giving(value: torch.Tensor) -> Callable[[], Callable[[], torch.Tensor]]:
    return lambda: lambda: torch.cat([value, torch.full((2, 8), torch.nan)])


@pytest.mark.parametrize("answer", [EXACT, ROUNDED, EXACT * 1.005])
def test_any_right_answer_will_do(answer: torch.Tensor) -> None:
    found = trials()
    call = found.right_call("x", giving(answer))
    assert call is not None
    assert (found.failed, found.wrong) == (0, 0)
    (time,) = found.take_turns([call], 0.001)
    assert time is not None
    assert 0 < time / 1e6 < found.spent


def test_a_wrong_result_is_out_and_says_how_wrong(caplog: pytest.LogCaptureFixture) -> None:
    found = trials()
    with caplog.at_level("DEBUG", logger="moe_plugin.bench"):
        assert found.right_call("tiles of mine", giving(EXACT * 1.1)) is None
        assert found.right_call("NaN", giving(EXACT * torch.nan)) is None
    assert (found.failed, found.wrong) == (0, 2)
    assert "tiles of mine: wrong result, relative error 1.00e-01 (tolerance 0.01)" in caplog.text


def test_fp8_has_its_own_tolerance() -> None:
    slightly_off = EXACT.clone()
    slightly_off[0] *= 1.04
    assert trials().right_call("x", giving(slightly_off)) is None
    fp8 = MoEConfig(num_experts=2, top_k=1, hidden_size=8, intermediate_size=8, quantization=Fp8Block())
    assert trials(config=fp8).right_call("x", giving(slightly_off)) is not None


def test_a_failure_before_or_in_the_call_is_out_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def cannot_bind() -> Callable[[], torch.Tensor]:
        raise ValueError("no such layout")

    def cannot_run() -> Callable[[], torch.Tensor]:
        return lambda: EXACT[:, torch.tensor([99])]

    found = trials()
    with caplog.at_level("DEBUG", logger="moe_plugin.bench"):
        assert found.right_call("a", cannot_bind) is None
        assert found.right_call("b", cannot_run) is None
    assert (found.failed, found.wrong) == (2, 0)
    assert "a: ValueError: no such layout" in caplog.text
    assert "b: IndexError" in caplog.text


def test_one_that_breaks_while_it_is_timed_has_no_time() -> None:
    calls = 0

    def breaks() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")

    found = trials()
    times = found.take_turns([lambda: None, breaks], 0.001)
    assert times[0] is not None
    assert times[1] is None
    assert found.failed == 1


class LostDevice(Stopwatch):
    """A device that reports an error which ends every later call."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_lost_device_ends_the_search() -> None:
    with pytest.raises(DeviceLostError, match=r"illegal memory access.*run the same command again"):
        trials(LostDevice(CPU)).right_call("x", giving(EXACT))
    with pytest.raises(DeviceLostError):
        trials(LostDevice(CPU)).take_turns([lambda: None], 0.001)
