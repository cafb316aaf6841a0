"""Dispatch and combine alone: what a contender of `bench comm` is on a rank, and what its result must be.

Experts are replaced by a factor each, so that a result shows which expert saw which row with which weight:

    out[t] = sum_k topk_weights[t, k] * c(topk_ids[t, k]) * x[t]        c(e) = 1 + (37 * e mod 64) / 64

c is exact in bf16 and differs between any 64 consecutive experts. Where rows travel as fp8, x is what they dequantize
to. Example: K = 2, ids (0, 1), weights (0.5, 0.5): c = (1, 1.578125), out = 1.2890625 * x.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_plugin.bench.contenders import Accuracy, UnsupportedError
from moe_plugin.bench.layers import Inputs
from moe_plugin.bench.results import STRATEGY
from moe_plugin.bench.timing import Call
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.modular_kernel import ActivationFormat, Dispatched, Experts, PrepareAndFinalize
from moe_plugin.numerics import TOLERANCES
from moe_plugin.quantization import dequantize_rows, fake_quantize, input_group_size
from moe_plugin.verdict import Verdict
from moe_plugin.workspace import Workspace, WorkspaceArena


class Exchange(abc.ABC):
    """One call of one contender on this rank, to be repeated any number of times, a combine after each dispatch.

    config: of the layer; cuda_graph says whether calls will be captured. num_sms: SMs it takes, where that is known.
    note: what else to know of it. quantizes_by_reciprocal: see PrepareAndFinalize. row_bytes: of a row on its way to an
    expert, known once `reply` has seen one.
    """

    note: str = ""
    quantizes_by_reciprocal = False

    def __init__(self, config: MoEConfig, inputs: Inputs) -> None:
        self.config, self.inputs = config, inputs
        self.num_sms: int | None = None
        self.row_bytes = config.hidden_size * config.dtype.itemsize

    @abc.abstractmethod
    def dispatch(self) -> Any:
        """What has arrived here."""

    @abc.abstractmethod
    def reply(self, received: Any) -> torch.Tensor:
        """What the experts of this rank would return, where combine likes it best."""

    @abc.abstractmethod
    def combine(self, received: Any, reply: torch.Tensor) -> torch.Tensor:
        """The result of the call."""

    def untimed_reply(self, received: Any) -> torch.Tensor:
        """A tensor as `reply` gives it, at no cost; its numbers do not matter."""
        return self._kept_reply

    def expected(self) -> torch.Tensor:
        """What combine must return."""
        quantized = self.row_bytes < self.returned_row_bytes
        return expected_output(self.config, self.inputs, quantized, self.quantizes_by_reciprocal)

    def finish(self) -> None:  # noqa: B027
        """A host point after all calls: raises what they flagged on the device."""

    def close(self) -> None:  # noqa: B027
        """Give back what the garbage collector would not."""

    @property
    def returned_row_bytes(self) -> int:
        """Of a row on its way back."""
        return self.config.hidden_size * self.config.dtype.itemsize

    def call(self) -> torch.Tensor:
        """Dispatch, experts, combine."""
        received = self.dispatch()
        reply = self.reply(received)
        if not hasattr(self, "_kept_reply"):
            self._kept_reply = reply
        return self.combine(received, reply)

    def check(self, output: torch.Tensor) -> Accuracy:
        """How far a result of `call` is from what it must be."""
        return Accuracy.of(output, self.expected(), TOLERANCES[self.config.dtype])

    def halves(self) -> list[Call]:
        """Dispatch and combine as steps to time, one after the other."""
        received: list[Any] = []

        def dispatch() -> None:
            received[:] = [self.dispatch()]

        def combine() -> None:
            (arrived,) = received
            self.combine(arrived, self.untimed_reply(arrived))

        return [dispatch, combine]

    def pair(self) -> None:
        """Both in one step."""
        received = self.dispatch()
        self.combine(received, self.untimed_reply(received))


@dataclass(frozen=True, slots=True)
class CommContender:
    """One line of the table, in the process of the table. role: STRATEGY or PEER.

    make: what makes its Exchange on a rank, collectively, from (config, inputs); importable by name.
    """

    name: str
    role: str
    make: Callable[[MoEConfig, Inputs], Exchange]


@functools.cache
def _environment(device_type: str) -> Environment:
    return Environment.probe(device_type)


class StrategyExchange(Exchange):
    """A PrepareAndFinalize class of this package or another. Raises UnsupportedError with the gate that fails."""

    def __init__(self, cls: type[PrepareAndFinalize], variant: Variant, config: MoEConfig, inputs: Inputs) -> None:
        experts = variant.experts
        permute = ActivationFormat.CONTIGUOUS in experts.activation_formats
        config = replace(config, dispatch_permute=permute, dispatch_transport=variant.transport)
        super().__init__(config, inputs)
        device = inputs.hidden_states.device
        verdict = cls.supports(config, _environment(device.type))
        if not verdict.ok:
            raise UnsupportedError(verdict.reason)
        # What it keeps is written by every call, in inference mode or not.
        with torch.inference_mode(False), torch.no_grad():
            self._class = cls(config, WorkspaceArena(device))
            self._class.accommodate(experts)
        self.quantizes_by_reciprocal = cls.quantizes_by_reciprocal(config)
        sms = getattr(self._class, "num_sms", None)
        self.num_sms = sms if isinstance(sms, int) and device.type == "cuda" else None
        self._experts = experts(config, device)

    def dispatch(self) -> Dispatched:
        inputs = self.inputs
        return self._class.prepare(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights, inputs.tokens)

    def reply(self, received: Dispatched) -> torch.Tensor:
        rows = received.activations
        if received.scales is not None:
            self.row_bytes = rows.shape[-1] * rows.dtype.itemsize + received.scales.shape[-1] * 4
        handle = received.handle
        return self._experts.apply(received, handle.workspace, self._class.expert_output(handle))

    def untimed_reply(self, received: Dispatched) -> torch.Tensor:
        target = self._class.expert_output(received.handle)
        return super().untimed_reply(received) if target is None else target

    def combine(self, received: Dispatched, reply: torch.Tensor) -> torch.Tensor:
        return self._class.finalize(reply, received.handle)

    def finish(self) -> None:
        self._class.check_errors()

    def close(self) -> None:
        self._class.close()


class ScalingExperts(Experts):
    """The experts of this rank as factors on rows."""

    name = "scaling"
    activation_formats = frozenset({ActivationFormat.STANDARD, ActivationFormat.BATCHED_EXPERTS})
    takes_quantized = True

    def __init__(self, config: MoEConfig, device: torch.device) -> None:
        self.config = config
        own = config.expert_placement.experts_of_rank[config.parallel.ep_rank]
        self._factors = factors(config.num_experts, device)[torch.tensor(own, dtype=torch.int64, device=device)]

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        return Verdict()

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        if dispatched.activation_format not in self.activation_formats:
            raise UnsupportedError(f"rows come in the {dispatched.activation_format.value} format only")
        rows = self.dequantized(dispatched.activations, dispatched.scales)
        if dispatched.activation_format is ActivationFormat.BATCHED_EXPERTS:
            return self.batched(rows, output)
        if dispatched.activation_format is ActivationFormat.CONTIGUOUS:
            assert dispatched.group_ends is not None
            return self.contiguous(rows, dispatched.group_ends, output)
        assert dispatched.local_ids is not None
        return self.standard(rows, dispatched.local_ids, dispatched.topk_weights, output)

    def dequantized(self, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Rows [..., H] as they are, or fp32 when they came with scales [..., groups]."""
        scheme = self.config.quantization
        if scales is None or scheme is None:
            return rows
        return dequantize_rows(rows, scales, input_group_size(scheme))

    def standard(
        self,
        rows: torch.Tensor,
        local_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N, H], local_ids [N, K] (-1: none), topk_weights [N, K] or None -> [N, H], zeros for a row without any."""
        is_own = local_ids >= 0
        # A slot behind the last stands for none, and is there also where this rank has no experts.
        padded = torch.nn.functional.pad(self._factors, (0, 1))
        factor = padded[torch.where(is_own, local_ids, -1).long()]
        if topk_weights is not None:
            factor = torch.where(is_own, factor * topk_weights, 0)
        scaled = self._scaled(rows, factor.sum(dim=-1), out)
        return scaled.masked_fill_(~is_own.any(dim=-1, keepdim=True), 0)

    def batched(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[local_experts, max_tokens, H] -> the same."""
        return self._scaled(rows, self._factors[:, None].expand(rows.shape[:2]), out)

    def contiguous(self, rows: torch.Tensor, group_ends: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[slots, H], group_ends int32 [local_experts] -> [slots, H]."""
        row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        expert = torch.searchsorted(group_ends, row, right=True)
        # Rows behind the last segment are nobody's.
        return self._scaled(rows, torch.nn.functional.pad(self._factors, (0, 1))[expert], out)

    def _scaled(self, rows: torch.Tensor, factor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            out = torch.empty(rows.shape, dtype=self.config.dtype, device=rows.device)
        return torch.mul(rows, factor[..., None], out=out)


class PermutedScalingExperts(ScalingExperts):
    """The same for dispatchers that can bring rows into the order of experts."""

    name = "permuted_scaling"
    activation_formats = frozenset({ActivationFormat.CONTIGUOUS})


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a class works. experts: that ask for rows so. transport: `MoEConfig.dispatch_transport`."""

    experts: type[ScalingExperts] = ScalingExperts
    transport: str | None = None


PLAIN = "plain"
VARIANTS: Mapping[str, Mapping[str, Variant]] = {
    "hybrid_dense_routing": {
        PLAIN: Variant(),
        "permute": Variant(PermutedScalingExperts),
        "hybrid_ep": Variant(transport="hybrid_ep"),
        "hybrid_ep_permute": Variant(PermutedScalingExperts, "hybrid_ep"),
    }
}
"""Classes that work in several ways: {name of the class: {way: Variant}}, each a contender. The label is `name (way)`,
or the name alone where the way is `PLAIN`."""


def ways_of(name: str) -> list[str]:
    """Of the class of that name."""
    return list(VARIANTS.get(name, {PLAIN: Variant()}))


def strategy_contenders(cls: type[PrepareAndFinalize], ways: Sequence[str] | None = None) -> list[CommContender]:
    """A PrepareAndFinalize class in some ways that it works, or in all."""
    variants = VARIANTS.get(cls.name, {PLAIN: Variant()})
    return [
        CommContender(
            cls.name if way == PLAIN else f"{cls.name} ({way})",
            STRATEGY,
            functools.partial(StrategyExchange, cls, variants[way]),
        )
        for way in ways or variants
    ]


def factors(num_experts: int, device: torch.device) -> torch.Tensor:
    """c of every expert, fp32 [num_experts]."""
    return 1 + (37 * torch.arange(num_experts, device=device) % 64) / 64


def expected_output(
    config: MoEConfig, inputs: Inputs, quantized: bool, quantizes_by_reciprocal: bool = False
) -> torch.Tensor:
    """fp32 [T, H]: see the module. quantized: rows travel in fp8."""
    ids, x = inputs.topk_ids.long(), inputs.hidden_states.float()
    if quantized:
        assert config.quantization is not None
        group_size = input_group_size(config.quantization)
        x = fake_quantize(inputs.hidden_states, group_size, by_reciprocal=quantizes_by_reciprocal)
    chosen = torch.where(ids >= 0, factors(config.num_experts, ids.device)[ids], 0)
    return (inputs.topk_weights * chosen).sum(dim=-1, keepdim=True) * x


def rows_between_ranks(config: MoEConfig, inputs: Inputs) -> torch.Tensor:
    """int64 [R, R] on the host: tokens of each rank (first) that have an expert on each (second). No replicas."""
    assert inputs.routing is not None
    size = config.parallel.ep_size
    ids = inputs.routing.cpu().long()
    home = config.expert_placement.tables("cpu").rank[:, 0].long()
    wanted = torch.zeros(*ids.shape[:2], size, dtype=torch.int64)
    wanted.scatter_(2, home[ids], 1)
    return wanted.sum(dim=1)
