"""Dispatch and combine by DeepEP's low-latency kernels: for few tokens, with shapes that never change.

Dispatch
 1. One launch looks ids up in the placement table, merges what names an expert of a token again, and brings router
    weights to fp32. Slot s of rank r is DeepEP's expert r * S + s, S slots on every rank, whatever the placement.
 2. DeepEP's dispatch: rows of every local expert in a slice of [local_experts, R * M, H], R ranks of M tokens. Rows are
    quantized on their way, in groups of 128 columns, where the experts compute on such and take them so.

Combine takes bf16 and returns the weighted sum of a token's rows: router weights are applied there. To peers that are
reached over RDMA it can send rows from where the experts have written them (`zero_copy`); to those behind NVLink it
copies them in any case.

Nothing waits for the host, and calls can be captured. DeepEP's buffer, one for all layers of a group, has two halves
that its kernels take in turn. A third `prepare` before a `finalize` raises HandleError, and a graph takes whole calls.
In the asynchronous forms the second half of a kernel, which receives, is launched by the receiver's `wait`, or by the
next kernel if that comes first; nothing runs on the device between the two. Calls over one group go to one stream, or
to streams that the caller has put in order.

On CUDA a rank keeps what it has found wrong, such as ids out of range, until `check_errors`, where the ranks tell each
other and all raise. Calls do not raise what an earlier one found: ranks would part. On a CPU all raise in the call.

With EP + TP every TP rank runs the exchange in its own EP group, and the partial sums are added over the TP group; TP
ranks must be called with the same arguments. DeepEP itself gives up on a rank that does not come after a time that it
was compiled with, 100 s as released; `check_errors` by `timeout_seconds`.

Example, 2 ranks with 3 and 2 experts, so S = 3; a token with experts 1 and 4:

    physical ids    1 -> rank 0, slot 1 -> 1        4 -> rank 1, slot 1 -> 1 * 3 + 1 = 4; rank 1 has no slot 2

Source: https://github.com/deepseek-ai/DeepEP, and vLLM's class over it, https://github.com/vllm-project/vllm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, NoReturn

import torch

from moe_plugin.compat import deep_ep
from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import HandleError, InputError
from moe_plugin.kernels.tiling import cdiv
from moe_plugin.modular_kernel import (
    ActivationFormat,
    Dispatched,
    DispatchHandle,
    Experts,
    PrepareAndFinalize,
    Receiver,
    RouterWeightStage,
)
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors, ErrorFlag, flags_of_all, raise_together
from moe_plugin.prepare_finalize.local import weigh_input
from moe_plugin.prepare_finalize.placement_lookup import PlacementLookup
from moe_plugin.quantization import GROUP_SIZE
from moe_plugin.verdict import Gate, Verdict, dtype_name, gate_cuda_graph, gate_package
from moe_plugin.workspace import WorkspaceArena

MIN_SM = 90
MAX_TOP_K = 11
"""Its dispatch gives each of a token's experts a warp, of which a block has 12 or more."""
MAX_EXPERTS_PER_SM = 14
"""Each expert has a group of warps, of which a block holds at most 14 with two warps in each."""
MAX_TOKENS = 1023
ROWS_UNIT = 128
"""R * M is a multiple: DeepGEMM computes in blocks of so many rows, and DeepEP's hybrid-ep misplaces scales else."""
FP8_UNIT = 512
"""Columns of which a row has a multiple, to be quantized on its way: four groups."""


@dataclass(slots=True)
class LowLatencyHandle(DispatchHandle):
    """ids: physical ones [T, K]. weights: fp32 [T, K]. raw: DeepEP's own handle. call: its place in the buffer."""

    ids: torch.Tensor
    weights: torch.Tensor
    raw: tuple[Any, ...]
    call: deep_ep.LowLatencyCall


class DeepEPLowLatency(PrepareAndFinalize):
    """See this module's docstring."""

    name = "deepep_low_latency"
    description = (
        "DeepEP's low-latency kernels over NVLink and RDMA; fixed shapes, rows by expert, weighted sum in bf16"
    )
    activation_format = ActivationFormat.BATCHED_EXPERTS
    router_weight_stage = RouterWeightStage.COMBINE
    min_hidden_size = 2048
    zero_copy: ClassVar[bool | None] = None
    """Whether experts may write where combine sends from; None for where it saves a copy, which is over RDMA."""

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(config, arena)
        parallel, device = config.parallel, arena.device
        self._ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)
        self._tp = Communicator(parallel.tp_group, parallel.tp_size, parallel.tp_rank, parallel.timeout_seconds)
        self._errors = DeferredErrors(config, device)
        self._slots = config.expert_placement.slots_per_rank
        self._lookup = PlacementLookup(config, device, slots_per_rank=self._slots)
        self._ones = torch.ones(config.max_tokens_per_rank, config.top_k, device=device)
        self._id_dtype = getattr(deep_ep.library(), "topk_idx_t", torch.int64)
        self._features = deep_ep.probe().features
        self._buffer = deep_ep.shared_buffer(parallel.ep_group)
        self._shape: deep_ep.LowLatencyShape | None = None
        self._options: dict[str, bool] = {}
        self._lends = False
        self._calls: Counter[str] = Counter()

    def accommodate(self, experts: type[Experts]) -> None:
        config, device = self.config, self.arena.device
        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        packed = experts.ue8m0_from_sm is not None and 10 * major + minor >= experts.ue8m0_from_sm
        can_pack = not packed or "ue8m0" in self._features
        quantizes = experts.takes_quantized and _may_quantize(config) and can_pack
        self._options = {"use_fp8": quantizes}
        if quantizes and packed:
            self._options |= {"round_scale": True, "use_ue8m0": True}
        wanted = _has_rdma(config) if self.zero_copy is None else self.zero_copy
        self._lends = wanted and experts.writes_strided and "zero_copy" in self._features
        self._shape = _shape(config)
        self._buffer.join(self)
        self._buffer.reserve_low_latency(self._shape)

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        package, parallel = environment.package(deep_ep.PACKAGE), config.parallel
        experts = parallel.ep_size * config.expert_placement.slots_per_rank
        most_experts = MAX_EXPERTS_PER_SM * environment.num_sms
        sizes = deep_ep.low_latency_hidden_sizes(package)
        on_cpu = environment.device_type != "cuda" and "cpu" in package.features
        return Verdict.of(
            Gate(
                "dtype",
                config.dtype is torch.bfloat16,
                dtype_name(config.dtype),
                "bfloat16: DeepEP combines nothing else",
            ),
            gate_package(environment, deep_ep.PACKAGE, deep_ep.INSTALL),
            Gate(
                "low_latency",
                "low_latency" in package.features,
                ", ".join(sorted(package.features.intersection(deep_ep.BUFFERS))) or "none of its interfaces",
                "Buffer.low_latency_dispatch, which DeepEP has since V1, built with NVSHMEM",
                deep_ep.INSTALL,
            ),
            Gate(
                "network card",
                on_cpu or deep_ep.RDMA in package.features or deep_ep.NVLINK_ONLY in package.features,
                "none" if package.usable else package.describe(),
                "one: as released, its dispatch traps where NVSHMEM has no queue pairs, though NVLink needs none",
                f"build DeepEP without that check in internode_ll.cu, and set {deep_ep.NVLINK_ONLY_VARIABLE}=1",
            ),
            Gate(
                "sm",
                on_cpu or (environment.sm or 0) >= MIN_SM,
                "no CUDA device" if environment.sm is None else f"SM {environment.sm}",
                f"SM {MIN_SM} or newer",
            ),
            Gate("ep_size", parallel.ep_size > 1, str(parallel.ep_size), "2 or more: it is for dispatch between ranks"),
            Gate(
                "hidden_size",
                config.hidden_size in sizes,
                str(config.hidden_size),
                f"one of {', '.join(map(str, sizes))}, for which its kernels were compiled",
            ),
            Gate(
                "max_tokens_per_rank",
                config.max_tokens_per_rank <= MAX_TOKENS,
                str(config.max_tokens_per_rank),
                f"at most {MAX_TOKENS}: its counters tell the end of a transfer by larger numbers",
                "a phase of its own, decode=deepep_low_latency+...,prefill=..., is for few tokens",
            ),
            Gate("top_k", config.top_k <= MAX_TOP_K, str(config.top_k), f"at most {MAX_TOP_K}"),
            Gate(
                "num_experts",
                environment.device_type != "cuda" or experts <= most_experts,
                f"{config.num_experts} experts, {experts} with replicas and padding to equal ranks",
                f"at most {most_experts}, {MAX_EXPERTS_PER_SM} for each SM of the device",
            ),
            gate_cuda_graph(config, capturable=True),
        )

    @classmethod
    def quantizes_by_reciprocal(cls, config: MoEConfig) -> bool:
        return _may_quantize(config)

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> Mapping[str, str]:
        features = environment.package(deep_ep.PACKAGE).features
        shape, words, in_flight = _shape(config), "NVLink", deep_ep.MAX_LOW_LATENCY_IN_FLIGHT
        if _has_rdma(config):
            words = "NVLink inside a node, RDMA between nodes"
            if "zero_copy" in features:
                words += ", without a copy from experts that write where it sends from"
        rows = "fp8 to experts that take them quantized, else bf16" if _may_quantize(config) else "bf16"
        return {
            "transport": f"{words}, at most {shape.max_tokens} tokens of a rank, {in_flight} calls in flight",
            "rows": f"{rows}; combined in bf16",
            "time limit": "DeepEP's own, 100 s as released, for a rank that does not come",
        }

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """DeepEP's buffer, one for all layers of a group, and the rows of a call in bf16, the larger dtype."""
        shape, placement, ranks = _shape(config), config.expert_placement, config.parallel.ep_size
        slots, room = placement.slots_per_rank, ranks * shape.max_tokens
        received = slots * room * config.hidden_size * torch.bfloat16.itemsize
        pairs = config.max_tokens_per_rank * config.top_k
        needed = {
            "DeepEP buffer": buffer_bytes(shape),
            "received rows": received,
            "received places": slots * (4 * room + 8 * ranks + 4),
            "ids and weights": pairs * (torch.int64.itemsize + 2 * torch.float32.itemsize),
        }
        if any(len(held) < slots for held in placement.experts_of_rank):
            needed["padded rows"] = received
        return needed

    def counters(self) -> Mapping[str, int]:
        """Dispatches by the dtype of their rows, and how many combines sent rows from where the experts wrote them."""
        return dict(self._calls)

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        dispatched, _ = self._dispatch(hidden_states, topk_ids, topk_weights)
        return dispatched

    def prepare_async(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Receiver[Dispatched]:
        dispatched, receive = self._dispatch(hidden_states, topk_ids, topk_weights, in_halves=self._has_hooks)

        def complete() -> Dispatched:
            if receive is not None:
                receive()
            return dispatched

        return Receiver(complete)

    def abort(self, problem: InputError, max_num_tokens: int | None = None) -> NoReturn:
        """Take part with no tokens, so that nobody waits, and leave word for `check_errors`; on CPU all raise here."""
        config, device = self.config, self.arena.device
        nothing = torch.empty(0, config.hidden_size, dtype=config.dtype, device=device)
        ids = torch.empty(0, config.top_k, dtype=torch.int32, device=device)
        try:
            dispatched, _ = self._dispatch(nothing, ids, ids.float(), problem=problem)
        except HandleError:
            raise problem from None  # the peers raise it, and start nothing
        self._errors.refused(problem)
        handle = dispatched.handle
        handle.consume(self)
        assert isinstance(handle, LowLatencyHandle)
        shape = (self._slots, dispatched.activations.shape[1], config.hidden_size)
        rows = torch.zeros(shape, dtype=config.dtype, device=device)
        # Not over TP: how many tokens those ranks have is not known here.
        self._combine(rows, False, handle, None)
        handle.workspace.release()
        raise problem

    @property
    def _has_hooks(self) -> bool:
        return "recv_hook" in self._features

    def _dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        in_halves: bool = False,
        problem: InputError | None = None,
    ) -> tuple[Dispatched, Callable[[], None] | None]:
        """in_halves: rows are there once the second answer was called. problem: of this rank's arguments, or None."""
        config, shape = self.config, self._shape
        if shape is None:
            raise HandleError(f"{self.name}: accommodate(experts) comes before the first call")
        call = self._buffer.start_low_latency(shape)
        rows, stage = hidden_states, self.router_weight_stage
        router_weights: torch.Tensor | None = topk_weights
        if config.apply_router_weight_on_input:
            rows, router_weights, stage = weigh_input(config, hidden_states, topk_weights)
        workspace = self.arena.lease()
        ids, weights, flags = self._lookup.physical(topk_ids, router_weights, self._id_dtype, workspace, self._errors)
        if flags is not None and not flags.is_cuda:
            own = int(flags) | (0 if problem is None else int(ErrorFlag.ABORTED))
            everyone = flags_of_all(self._ep, self._tp, torch.tensor([own], dtype=torch.int32))
            if everyone:
                call.end()
                workspace.release()
                raise_together(config, self._ep, self._tp, problem, own, everyone)
        elif flags is not None:
            self._errors.record(flags)
        rows = rows.contiguous()
        if rows.data_ptr() % 16:
            rows = rows.clone()
        options = self._options
        if in_halves:
            options = options | {"return_recv_hook": True}
        received, counts, raw, _, hook = self._ep.guard(
            "dispatch",
            lambda: call.raw.low_latency_dispatch(rows, ids, shape.max_tokens, shape.num_experts, **options),
        )
        self._calls["fp8" if options["use_fp8"] else "bf16"] += 1
        activations, scales = received if isinstance(received, tuple) else (received, None)
        num_tokens, mine = hidden_states.shape[0], config.num_local_experts
        if weights is None:
            weights = self._ones[:num_tokens]
        if mine < self._slots:
            activations, counts = activations[:mine], counts[:mine]
            scales = None if scales is None else scales[:mine]
        dispatched = Dispatched(
            activations=activations,
            activation_format=self.activation_format,
            router_weight_stage=stage,
            handle=LowLatencyHandle(self, num_tokens, workspace, ids, weights, raw, call),
            expert_num_tokens=counts,
            scales=scales,
        )
        return dispatched, call.to_receive(hook) if in_halves else None

    def expert_output(self, handle: DispatchHandle, out: torch.Tensor | None = None) -> torch.Tensor | None:
        assert isinstance(handle, LowLatencyHandle)
        mine = self.config.num_local_experts
        if mine == 0:
            return None
        lent = handle.call.lend(handle.raw) if self._lends else None
        if lent is not None:
            return lent[:mine]
        return self._padded(handle)[:mine] if mine < self._slots else None

    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._start_combine(expert_output, handle, out, in_halves=False)()

    def finalize_async(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> Receiver[torch.Tensor]:
        complete = self._start_combine(expert_output, handle, out, in_halves=self._has_hooks)
        return Receiver(complete)

    def _start_combine(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None, *, in_halves: bool
    ) -> Callable[[], torch.Tensor]:
        handle.consume(self)
        assert isinstance(handle, LowLatencyHandle)
        rows, in_place = handle.call.returned(expert_output)
        if rows is expert_output:
            rows = self._with_all_slots(expert_output, handle)
        fits = out is not None and out.is_contiguous() and out.data_ptr() % 16 == 0 and handle.num_tokens > 0
        combined, receive = self._combine(rows, in_place, handle, out if fits else None, in_halves)

        def complete(inputs: torch.Tensor = rows) -> torch.Tensor:
            # `inputs` must live until the kernels that read them were launched.
            if receive is not None:
                receive()
            if self._tp.size > 1:
                self._tp.all_reduce(combined, "combine").wait()
            handle.workspace.release()
            if out is None or combined.data_ptr() == out.data_ptr():
                return combined if out is None else out
            return out.copy_(combined)

        return complete

    def _combine(
        self,
        rows: torch.Tensor,
        in_place: bool,
        handle: LowLatencyHandle,
        out: torch.Tensor | None,
        in_halves: bool = False,
    ) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """[T, H], in `out` where the library can, and what has to be called before it is there, if anything."""
        call, options = handle.call, dict[str, Any]()
        if in_place:
            options["zero_copy"] = True
            self._calls["zero_copy"] += 1
        if in_halves:
            options["return_recv_hook"] = True
        if out is not None and "combine_out" in self._features:
            options["out"] = out
        raw = call.start_combine()
        combined, _, hook = self._ep.guard(
            "combine", lambda: raw.low_latency_combine(rows, handle.ids, handle.weights, handle.raw, **options)
        )
        call.end()
        return combined, call.to_receive(hook) if in_halves else None

    def _with_all_slots(self, rows: torch.Tensor, handle: LowLatencyHandle) -> torch.Tensor:
        """rows [local_experts, R * M, H] as DeepEP takes them: dense, with slots that this rank does not use."""
        mine = self.config.num_local_experts
        if mine == self._slots:
            return rows.contiguous()
        padded = self._padded(handle)
        if mine and rows.data_ptr() != padded.data_ptr():
            padded[:mine].copy_(rows)
        return padded

    def _padded(self, handle: LowLatencyHandle) -> torch.Tensor:
        """Room for rows of all slots; those of slots without an expert are never sent."""
        assert self._shape is not None
        shape = (self._slots, self._ep.size * self._shape.max_tokens, self.config.hidden_size)
        return handle.workspace.tensor("padded rows", shape, self.config.dtype)

    def close(self) -> None:
        self._buffer.leave(self)

    def check_errors(self) -> None:
        """See PrepareAndFinalize.check_errors. On CUDA a collective over all ranks of the layer."""
        if self.arena.device.type == "cuda":
            self._errors.raise_gathered(self._ep, self._tp)


def buffer_bytes(shape: deep_ep.LowLatencyShape) -> int:
    """Device memory of DeepEP's buffer for calls of `shape`, without DeepEP at hand.

    Source: LowLatencyLayout in DeepEP's csrc/config.hpp. Both halves have room to send and to receive, for a message a
    token in dispatch and for one a slot in combine, and a counter for each expert.

    Example, M = 128, H = 7168, 256 experts: messages of 14352 and 14560 bytes, 4 * 256 * 128 * 14560 bytes and the
    counters, 1908 MB.
    """
    groups = shape.hidden_size // GROUP_SIZE
    dispatch_message = 16 + max(2 * shape.hidden_size, shape.hidden_size + 4 * groups)
    combine_message = 2 * shape.hidden_size + 4 * groups
    slots = shape.num_experts * shape.max_tokens
    send = max(shape.max_tokens * dispatch_message, slots * combine_message)
    receive = slots * max(dispatch_message, combine_message)
    counters = cdiv(4 * shape.num_experts, _ALIGNMENT) * _ALIGNMENT
    # It adds a unit also where there is no remainder.
    return (2 * (send + receive + counters) // _ALIGNMENT + 1) * _ALIGNMENT


_ALIGNMENT = 128


def _shape(config: MoEConfig) -> deep_ep.LowLatencyShape:
    """What the kernels are called with; the same on all ranks, since the configuration is."""
    ranks = config.parallel.ep_size
    unit = ROWS_UNIT // gcd(ranks, ROWS_UNIT)
    max_tokens = cdiv(config.max_tokens_per_rank, unit) * unit
    return deep_ep.LowLatencyShape(max_tokens, config.hidden_size, ranks * config.expert_placement.slots_per_rank)


def _may_quantize(config: MoEConfig) -> bool:
    """Whether DeepEP makes the groups of fp8 that the configuration asks for."""
    scheme = config.quantization
    return isinstance(scheme, Fp8Block) and scheme.block_k == GROUP_SIZE and config.hidden_size % FP8_UNIT == 0


def _has_rdma(config: MoEConfig) -> bool:
    return config.parallel.num_nodes > 1 or config.parallel.ep_size > deep_ep.NODE_RANKS
