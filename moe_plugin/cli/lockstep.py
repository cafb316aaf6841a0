"""Several ranks that run one replicated model through the same `generate` calls, step by step.

Rank 0 receives requests and hands every `generate` call to the other ranks, which have been waiting for it. Each call
starts from rank 0's random state. In each step the ranks take over rank 0's logits, so that rounding cannot lead them
to different tokens, and hear whether rank 0 wants to stop: a client left, or the server is shutting down.

Calls end in a roll call. An error that all ranks met is the request's; one that some met leaves the ranks in different
places and ends the server, at the latest when the others have waited for the time limit of a step.

On one rank all this shrinks to the order to stop, which a process has to give before it ends: a thread that is still
computing would abort it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from moe_plugin.cli.launch import IDLE_LIMIT, Ranks
from moe_plugin.errors import MoEPluginError, PeerLostError
from moe_plugin.prepare_finalize.communicator import Communicator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class RanksDivergedError(MoEPluginError, RuntimeError):
    """The ranks of one server are no longer at the same step; it cannot go on."""


class GenerationStopped(Exception):
    """Rank 0 ended a generation early."""


FATAL = (PeerLostError, RanksDivergedError)
"""Errors after which the ranks are in different places."""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One call of `generate` as it travels to the other ranks.

    arguments: all but the streamer and the tokenizer, tensors on the CPU.
    random_state: of rank 0, for the CPU and, if there is one, its GPU.
    """

    arguments: Mapping[str, Any]
    random_state: tuple[torch.Tensor, torch.Tensor | None]
    streams: bool
    takes_tokenizer: bool


class Lockstep:
    """Runs `generate` of one model on all ranks at once, one call at a time.

    on_failure: called on rank 0, from the thread that generates, when the ranks cannot go on; `failure` says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.failure: MoEPluginError | None = None
        self.on_failure = on_failure
        self._tokenizer, self._ranks = tokenizer, ranks
        self._requests = Communicator(ranks.requests, ranks.size, ranks.rank, IDLE_LIMIT.total_seconds())
        self._steps = Communicator(ranks.steps, ranks.size, ranks.rank, ranks.step_limit.total_seconds())
        self._generate = model.generate
        self._closing = threading.Event()
        self._one_at_a_time = threading.Lock()

    def generate(self, **arguments: Any) -> Any:
        """`model.generate` on all ranks; called on rank 0, whose result it is."""
        if self._ranks.size > 1 and getattr(arguments.get("generation_config"), "max_time", None) is not None:
            raise ValueError("max_time is not available on several ranks: clocks do not stop them at the same step")
        with self._one_at_a_time:
            if self._closing.is_set():
                raise GenerationStopped("the server is shutting down")
            if self.failure is not None:
                raise self.failure
            try:
                return self._lead(arguments)
            except FATAL as problem:
                self.failure = problem
                self.on_failure()
                raise

    def follow(self) -> None:
        """Join rank 0's calls until it closes; what the other ranks do.

        Raises PeerLostError and RanksDivergedError.
        """
        while (call := self._exchange(None)) is not None:
            _, problem = self._run(call, _SilentStreamer() if call.streams else None, lambda: None)
            if problem is not None:  # rank 0 tells the client
                logger.debug("a request failed on all ranks: %s", problem)

    def close(self) -> None:
        """Stop a running call and let the other ranks go; called on rank 0."""
        self._closing.set()
        with self._one_at_a_time:
            if self.failure is None:
                self._exchange(None)

    def _lead(self, arguments: dict[str, Any]) -> Any:
        streamer, tokenizer = arguments.pop("streamer", None), arguments.pop("tokenizer", None)
        call = GenerateCall(_to(arguments, "cpu"), _random_state(), streamer is not None, tokenizer is not None)
        guarded = None if streamer is None else _GuardedStreamer(streamer)

        def wants_to_stop() -> Exception | None:
            if self._closing.is_set():
                return GenerationStopped("the server is shutting down")
            return None if guarded is None else guarded.problem

        self._exchange(call)
        result, problem = self._run(call, guarded, wants_to_stop)
        if problem is not None:
            raise problem
        if guarded is not None and guarded.problem is not None:
            raise guarded.problem
        return result

    def _run(
        self, call: GenerateCall, streamer: BaseStreamer | None, wants_to_stop: Callable[[], Exception | None]
    ) -> tuple[Any, Exception | None]:
        """The result, or the error that all ranks met. Raises PeerLostError and RanksDivergedError."""
        logits = LogitsOfRankZero(self._steps, wants_to_stop)
        result, problem = None, None
        try:
            _set_random_state(call.random_state)
            arguments = _to(call.arguments, self._ranks.device)
            if call.takes_tokenizer:
                arguments["tokenizer"] = self._tokenizer
            result = self._generate(**arguments, streamer=streamer, logits_processor=LogitsProcessorList([logits]))
        except FATAL:
            raise
        except Exception as found:  # whatever it is, the ranks have to agree on it first
            problem = found
        self._roll_call(problem)
        return result, problem

    def _roll_call(self, problem: Exception | None) -> None:
        """Raises RanksDivergedError when the call succeeded on some ranks only; errors may differ in their words.

        Ranks that are still at a step do not come, which ends in the same way or in a PeerLostError.
        """
        end = None if problem is None else f"{type(problem).__name__}: {problem}"
        try:
            ends = _meet(lambda: self._steps.gather_objects(end, "roll call"))
        except FATAL as absence:
            if end is None:
                raise
            raise RanksDivergedError(f"rank {self._ranks.rank} failed ({end}), then: {absence}") from problem
        if None in ends and any(ends):
            by_rank = "; ".join(f"rank {rank}: {end or 'success'}" for rank, end in enumerate(ends))
            raise RanksDivergedError(f"the ranks ended a request differently ({by_rank})") from problem

    def _exchange(self, call: GenerateCall | None) -> GenerateCall | None:
        """Rank 0's call, or None to end."""
        if self._ranks.size == 1:
            return call
        slot = [call]
        group = self._requests.group
        _meet(lambda: self._requests.guard("request", lambda: dist.broadcast_object_list(slot, src=0, group=group)))
        return slot[0]


class LogitsOfRankZero(LogitsProcessor):
    """Where the ranks meet in every step: they take over rank 0's logits, or all stop.

    wants_to_stop: what ends the generation on rank 0, None to go on.
    """

    def __init__(self, steps: Communicator, wants_to_stop: Callable[[], Exception | None]) -> None:
        self._steps = steps
        self._wants_to_stop = wants_to_stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        stop = self._wants_to_stop()
        if self._steps.size == 1:
            if stop is not None:
                raise stop
            return scores
        last_tokens = input_ids[:, -1].cpu()
        announced = torch.cat((torch.tensor([stop is not None]), last_tokens))
        self._broadcast(announced, self._steps.group)
        if announced[0]:
            raise stop or GenerationStopped("rank 0 stopped")
        if not torch.equal(announced[1:], last_tokens):
            raise RanksDivergedError(f"rank {self._steps.rank} chose other tokens than rank 0")
        shared = scores.contiguous()
        self._broadcast(shared, dist.group.WORLD)
        return cast(torch.FloatTensor, shared)

    def _broadcast(self, tensor: torch.Tensor, group: Any) -> None:
        _meet(lambda: self._steps.guard("generation step", lambda: dist.broadcast(tensor, src=0, group=group)))


class _GuardedStreamer(BaseStreamer):
    """Keeps what the streamer raises until the ranks meet, where they can stop together."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.problem: Exception | None = None
        self._streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        self._pass_on(lambda: self._streamer.put(value))

    def end(self) -> None:
        self._pass_on(self._streamer.end)

    def _pass_on(self, action: Callable[[], None]) -> None:
        if self.problem is None:
            try:
                action()
            except Exception as problem:  # a streamer may raise anything to cancel
                self.problem = problem


class _SilentStreamer(BaseStreamer):
    """Stands in on the other ranks, since `generate` takes other paths and checks without a streamer."""

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def _meet(collective: Callable[[], Any]) -> Any:
    """Run a guarded collective of the lockstep; whatever goes wrong in it is fatal."""
    try:
        return collective()
    except FATAL:
        raise
    except RuntimeError as problem:  # a rank whose time is over closes its connections, which the others see first
        raise RanksDivergedError(f"the ranks did not meet: {problem}") from problem


def _to(arguments: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
