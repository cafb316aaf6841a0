"""Dispatch and combine by DeepEP's high-throughput kernels: NVLink inside a node of 8, RDMA between nodes.

Dispatch
 1. Rows whose experts compute on fp8 and take it so are quantized before they travel, with their scales; all others
    travel in bf16 and are quantized by the experts. Rows are padded with zeros to a multiple of 512 bytes.
 2. One launch looks ids up in the placement table and makes what DeepEP wants to know of the routing. Flags of errors
    travel ahead of the rows, or with the counts of them.
 3. DeepEP's dispatch. The host waits for the counts, which say how much memory to take and how many pairs each expert
    has got. Where some rank has raised a flag, all raise together.

Combine sums the ranks' rows of a token, without weights: the experts have applied them. It takes and gives bf16.

With `cuda_graph=True` there is memory for the most rows that can arrive, one from every token of every rank, and
nothing waits for the host. Rows that nobody has sent carry ids of -1. Flags then stay on the device, and the ranks tell
each other of them at the next host point, `check_errors`.

The asynchronous halves run on DeepEP's own stream between events: it waits for what the current stream has done so far,
and the receiver makes the current stream wait for it. Everything about a call travels in its handle, so that any number
of calls may be between the two.

DeepEP itself gives up on a rank that does not come. V1 does after a time that it was compiled with, 100 s as released;
V2 after the longest time limit of the layers of the group. What differs between the two is in `deepep_exchange`.

With EP + TP every TP rank runs the exchange in its own EP group, and the partial sums are added over the TP group; TP
ranks must be called with the same arguments.

Source: vLLM's DeepEP high-throughput class, https://github.com/vllm-project/vllm, for what it does in this order, and
https://github.com/deepseek-ai/DeepEP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from moe_plugin.compat import deep_ep
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError, HandleError, InputError
from moe_plugin.kernels.launch_sequence import LaunchSequence, one_object
from moe_plugin.kernels.placement_lookup import uses_triton
from moe_plugin.modular_kernel import (
    Dispatched,
    DispatchHandle,
    Experts,
    PrepareAndFinalize,
    Receiver,
    RouterWeightStage,
)
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deepep_exchange import Exchange, Rows, exchange_class, pair_bytes, row_width
from moe_plugin.prepare_finalize.deferred_errors import flags_of_all, raise_together
from moe_plugin.prepare_finalize.local import weigh_input
from moe_plugin.quantization import FP8_DTYPE, dispatched_groups, input_group_size, quantize_rows
from moe_plugin.verdict import Gate, Verdict, gate_dtype, gate_package
from moe_plugin.workspace import Workspace, WorkspaceArena


@dataclass(slots=True)
class DeepEPHandle(DispatchHandle):
    """raw: DeepEP's own handle. buffer: its buffer that made it."""

    raw: Any
    buffer: Any


class DeepEPHighThroughput(PrepareAndFinalize):
    """See this module's docstring."""

    name = "deepep_high_throughput"
    description = "DeepEP's high-throughput kernels over NVLink and RDMA; rows once per rank, sums in bf16"

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(config, arena)
        parallel, device = config.parallel, arena.device
        self._ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)
        self._tp = Communicator(parallel.tp_group, parallel.tp_size, parallel.tp_rank, parallel.timeout_seconds)
        # TP ranks get the same arguments and so have the same errors: each EP group raises for itself.
        self._no_tp = Communicator(None, 1, 0, parallel.timeout_seconds)
        self._use_triton = uses_triton(device)
        self._flags = torch.zeros(1, dtype=torch.int32, device=device)
        self._exchange: Exchange = exchange_class(deep_ep.probe())(config, self._ep, device, self._flags)
        self._row_width = row_width(config.hidden_size, config.dtype)
        self._groups = 0
        self._calls = 0

    def accommodate(self, experts: type[Experts]) -> None:
        config, most = self.config, self._exchange.max_row_bytes
        self._groups = dispatched_groups(config.quantization, config.hidden_size) if experts.takes_quantized else 0
        sent = FP8_DTYPE if self._groups else config.dtype
        row_bytes = row_width(config.hidden_size, sent) * sent.itemsize
        if row_bytes > most:
            raise ConfigError(
                f"{self.name} sends rows of at most {most} bytes, and those of hidden_size {config.hidden_size} have "
                f"{row_bytes} on their way to {experts.name}"
            )
        self._exchange.join(self)
        self._exchange.reserve(self._row_width)

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        package = environment.package(deep_ep.PACKAGE)
        exchange = exchange_class(package)
        return Verdict.of(
            gate_dtype(config, torch.bfloat16),
            gate_package(environment, deep_ep.PACKAGE, deep_ep.INSTALL),
            Gate(
                exchange.interface,
                exchange.interface in package.features,
                package.describe(),
                f"DeepEP's {exchange.interface}",
                deep_ep.INSTALL,
            ),
            *exchange.gates(config, environment),
        )

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        return 0 if config.cuda_graph else 1

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> Mapping[str, str]:
        exchange = exchange_class(environment.package(deep_ep.PACKAGE))
        of_exchange, width = exchange.details(config), row_width(config.hidden_size, config.dtype)
        words = of_exchange["transport"]
        if width != config.hidden_size:
            words += f", rows padded to {width} columns"
        return {**of_exchange, "transport": words, "combine": "in bf16, the only dtype that DeepEP sums"}

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """The buffer of the DeepEP that is installed, one for all layers of a group, and what it takes for a call."""
        most, width = config.parallel.ep_size * config.max_tokens_per_rank, row_width(config.hidden_size, config.dtype)
        row_bytes = width * config.dtype.itemsize
        needed = {
            **exchange_class(deep_ep.probe()).memory(config, width),
            "received rows": most * (row_bytes + pair_bytes(config)),
            "result": config.max_tokens_per_rank * row_bytes,
        }
        if width != config.hidden_size:
            needed["padded rows"] = most * row_bytes
        return needed

    def counters(self) -> Mapping[str, int]:
        return {self._exchange.way: self._calls}

    @property
    def num_sms(self) -> int:
        """SMs that its kernels take."""
        return self.config.dispatch_num_sms

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        return self._start_dispatch(hidden_states, topk_ids, topk_weights, max_num_tokens, asynchronous=False)()

    def prepare_async(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Receiver[Dispatched]:
        return Receiver(self._start_dispatch(hidden_states, topk_ids, topk_weights, max_num_tokens, asynchronous=True))

    def abort(self, problem: InputError, max_num_tokens: int | None = None) -> NoReturn:
        """Join the exchange with no tokens and the abort flag, so that every rank raises."""
        config, device = self.config, self.arena.device
        nothing = torch.empty(0, config.hidden_size, dtype=config.dtype, device=device)
        ids = torch.empty(0, config.top_k, dtype=torch.int32, device=device)
        start = self._start_dispatch(nothing, ids, ids.float(), max_num_tokens, asynchronous=False, problem=problem)
        # Only where the peers did not hear of it with the counts: they are on their way to combine.
        dispatched = start()
        handle = dispatched.handle
        handle.consume(self)
        rows = torch.zeros(dispatched.activations.shape, dtype=config.dtype, device=device)
        assert isinstance(handle, DeepEPHandle)
        self._combine(rows, handle, asynchronous=False)
        handle.workspace.release()
        raise problem

    def _start_dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None,
        *,
        asynchronous: bool,
        problem: InputError | None = None,
    ) -> Callable[[], Dispatched]:
        """problem: what this rank was called with wrongly, or None."""
        self._calls += 1
        config, workspace = self.config, self.arena.lease()
        activations, stage = hidden_states, RouterWeightStage.EXPERTS_GATHER
        if config.apply_router_weight_on_input:
            activations, _, stage = weigh_input(config, hidden_states, topk_weights)
        rows = self._rows(activations, workspace)
        exchange = self._exchange
        routing = exchange.route(topk_ids, topk_weights, workspace, problem)
        buffer = exchange.start()
        arrival = exchange.dispatch(
            buffer, rows, routing, max_num_tokens or config.max_tokens_per_rank, asynchronous=asynchronous
        )
        if arrival.is_refused or (config.cuda_graph and self._tell_at_once()):
            self._raise_together(arrival.event if asynchronous else None, workspace, problem)
        handle = DeepEPHandle(self, hidden_states.shape[0], workspace, arrival.raw, buffer)
        received, scales = arrival.rows if isinstance(arrival.rows, tuple) else (arrival.rows, None)
        dispatched = Dispatched(
            activations=received[:, : config.hidden_size],
            activation_format=self.activation_format,
            router_weight_stage=stage,
            handle=handle,
            local_ids=_low_words(arrival.ids),
            topk_weights=arrival.weights if stage is RouterWeightStage.EXPERTS_GATHER else None,
            expert_num_tokens_host=arrival.counts[: config.num_local_experts] if arrival.counts else None,
            scales=scales,
        )

        def complete(inputs: tuple[Any, ...] = (rows, routing)) -> Dispatched:
            # Until the current stream waits, the memory of `inputs` must not go back to it.
            if asynchronous:
                arrival.event.current_stream_wait()
            if config.cuda_graph:
                exchange.mark_rest(arrival)
            return dispatched

        return complete

    def _tell_at_once(self) -> bool:
        """Whether a rank has a flag, where no counts tell: asked on CPU alone, since on CUDA it would be a wait."""
        return not self._flags.is_cuda and flags_of_all(self._ep, self._no_tp, self._flags) != 0

    def _raise_together(self, event: Any, workspace: Workspace, problem: InputError | None) -> NoReturn:
        if event is not None:
            event.current_stream_wait()
        workspace.release()
        flags = int(self._flags)
        self._flags.zero_()
        raise_together(self.config, self._ep, self._no_tp, problem, flags)

    def _rows(self, x: torch.Tensor, workspace: Workspace) -> Rows:
        """x [T, H] as it travels: contiguous rows of whole units, in fp8 with scales [T, groups] where they do."""
        num_tokens, hidden_size = x.shape
        dtype = FP8_DTYPE if self._groups else x.dtype
        width = row_width(hidden_size, dtype)
        if not self._groups:
            return x.contiguous() if width == hidden_size else _padded(x, width, "padded input", workspace)
        scheme = self.config.quantization
        assert scheme is not None
        if not self._use_triton or num_tokens == 0:
            values, scales = quantize_rows(x, input_group_size(scheme))
            if width != hidden_size:
                values = torch.nn.functional.pad(values.view(torch.uint8), (0, width - hidden_size)).view(FP8_DTYPE)
            return values, scales
        from moe_plugin.kernels.quantize_rows import quantize_rows_launches

        x = x if x.stride(1) == 1 else x.contiguous()
        room = workspace.tensor("quantized rows", (num_tokens, width), FP8_DTYPE)
        scales = workspace.tensor("quantized row scales", (num_tokens, self._groups), torch.float32)
        if width != hidden_size:
            room[:, hidden_size:].view(torch.uint8).zero_()
        key = ("quantize rows", one_object(x.dtype, x.shape, x.stride(), width, self._groups))
        workspace.cached(key, LaunchSequence)([x], lambda: quantize_rows_launches(x, room[:, :hidden_size], scales))
        return room, scales

    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._start_combine(expert_output, handle, out, asynchronous=False)()

    def finalize_async(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> Receiver[torch.Tensor]:
        return Receiver(self._start_combine(expert_output, handle, out, asynchronous=True))

    def _start_combine(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None, *, asynchronous: bool
    ) -> Callable[[], torch.Tensor]:
        handle.consume(self)
        assert isinstance(handle, DeepEPHandle)
        combined, event, rows = self._combine(expert_output, handle, asynchronous)
        hidden_size = self.config.hidden_size

        def complete(inputs: tuple[torch.Tensor, ...] = (rows, expert_output)) -> torch.Tensor:
            # As for dispatch, `inputs` must live until the current stream waits.
            if asynchronous:
                event.current_stream_wait()
            total = combined if combined.shape[1] == hidden_size else combined[:, :hidden_size].contiguous()
            if self._tp.size > 1:
                self._tp.all_reduce(total, "combine").wait()
            handle.workspace.release()
            return total if out is None else out.copy_(total)

        return complete

    def _combine(
        self, expert_output: torch.Tensor, handle: DeepEPHandle, asynchronous: bool
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """The sums [T, width] of this rank's tokens, when they are there, and the rows that were sent."""
        buffer = self._exchange.start()
        if buffer is not handle.buffer:
            raise HandleError(
                f"{self.name}: DeepEP's buffer was replaced while this call was between prepare and finalize; build "
                "layers while no call is in flight"
            )
        rows, width = expert_output, self._row_width
        if width != expert_output.shape[1]:
            rows = _padded(expert_output, width, "padded output", handle.workspace)
        combined, event = self._exchange.combine(buffer, rows, handle.raw, asynchronous)
        return combined, event, rows

    def close(self) -> None:
        self._exchange.leave(self)

    def check_errors(self) -> None:
        """Flags of captured calls; eager calls without CUDA graphs raise at once."""
        if not self.config.cuda_graph or not self._flags.is_cuda:
            return
        everyone = flags_of_all(self._ep, self._no_tp, self._flags)
        if everyone:
            own = int(self._flags)
            self._flags.zero_()
            raise_together(self.config, self._ep, self._no_tp, None, own, everyone)


def _padded(x: torch.Tensor, width: int, name: str, workspace: Workspace) -> torch.Tensor:
    rows = workspace.tensor(name, (x.shape[0], width), x.dtype)
    rows[:, : x.shape[1]].copy_(x)
    rows[:, x.shape[1] :].zero_()
    return rows


def _low_words(ids: torch.Tensor) -> torch.Tensor:
    """int64 [N, K] of small numbers -> int32 [N, K] on the same memory; numbers that are not negative, or -1."""
    if ids.dtype is not torch.int64:
        return ids
    # By way of one dimension, since a column alone may have any stride.
    return ids.reshape(-1).view(torch.int32).view(ids.shape[0], 2 * ids.shape[1])[:, ::2]
