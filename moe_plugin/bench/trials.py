"""Candidates for one call on one device: compared with the oracle first, then timed."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_plugin.bench.contenders import Accuracy
from moe_plugin.bench.experts import DeviceLostError, describe
from moe_plugin.bench.timing import Call, Stopwatch, summarize
from moe_plugin.config import MoEConfig
from moe_plugin.numerics import FP8_TOLERANCE, TOLERANCES

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Trials:
    """answers: what `sample` of a right output may be. failed, wrong: candidates that did not run, or were not right.

    spent: seconds of comparing and measuring, without compiling.
    """

    stopwatch: Stopwatch
    config: MoEConfig
    sample: Callable[[torch.Tensor], torch.Tensor]
    answers: Callable[[], Sequence[torch.Tensor]]
    failed: int = 0
    wrong: int = 0
    spent: float = 0.0

    def right_call(self, candidate: object, bind: Callable[[], Callable[[], torch.Tensor]]) -> Call | None:
        """What `bind` makes, on a GPU as a captured graph; None when it fails or its result is wrong."""
        try:
            eager = bind()
            output = self.stopwatch.warm_up(eager)
            begin = time.perf_counter()  # compiling, done by now, is not counted
            call: Call = eager
            problem = self._problem(output)
            if problem is None and self.stopwatch.is_cuda:
                replay, output = self.stopwatch.capture(eager)
                call = functools.partial(_replay, replay, eager)
                problem = self._problem(output)
            self.spent += time.perf_counter() - begin
        except Exception as error:  # whatever a candidate raises takes it out, and only it
            self.failed += 1
            logger.debug("%s: %s", candidate, describe(error), exc_info=error)
            self._check_device()
            return None
        if problem is not None:
            self.wrong += 1
            logger.debug("%s: wrong result, %s", candidate, problem)
            return None
        return call

    def take_turns(self, calls: Sequence[Call], seconds: float) -> list[float | None]:
        """Median microseconds of each call, about `seconds` for each; None for one that raised."""
        begin = time.perf_counter()
        try:
            found = self.stopwatch.take_turns(calls, seconds, from_idle=False)
        except RuntimeError:
            self._check_device()
            raise
        self.spent += time.perf_counter() - begin
        times = [summarize(samples.times).median if samples.problem is None else None for samples in found]
        self.failed += times.count(None)
        return times

    def _problem(self, output: torch.Tensor) -> Accuracy | None:
        """How wrong the result is, None if it is right."""
        tolerance = TOLERANCES[self.config.dtype] if self.config.quantization is None else FP8_TOLERANCE
        accuracy = Accuracy.of_any(self.sample(output), self.answers(), tolerance)
        return None if accuracy.ok else accuracy

    def _check_device(self) -> None:
        try:
            self.stopwatch.synchronize()
        except RuntimeError as problem:
            raise DeviceLostError(
                f"the device is lost to this process ({describe(problem)}); what was measured is kept, run the same "
                "command again for the rest"
            ) from problem


def _replay(replay: Callable[[], Any], eager: Callable[[], Any]) -> None:
    """Replay a graph. `eager` comes along because the graph holds addresses in its arena."""
    replay()
