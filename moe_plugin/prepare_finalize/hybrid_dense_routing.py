"""Hybrid dense-routing dispatch: NVLink inside a node, torch.distributed between nodes, nothing else to install.

    several nodes     a token goes once to each node that needs it, along the rail of its rank (`rail_exchange`)
    inside a node     once to each rank that needs it: by kernels that write into the peers' memory over NVLink
                      (`nvlink_transport`), or where that cannot be, over torch.distributed (`collective_transport`)

Either way a token's experts are named by dense int16 rows rather than maps of booleans, capacities are static on GPUs,
and nothing waits for the host. On request DeepEP's HybridEPBuffer moves the rows of a node (`hybrid_ep_transport`),
which does wait for the host, and which the NVLink kernels were measured to be faster than. Rows are quantized before
they travel where the experts compute on fp8 and take it so. The results of a rank come back as one row per token, and
are summed in fp32 in ascending rank order, node by node, so a result repeats bitwise.

With EP + TP every TP rank runs the exchange in its own EP group, and the partial sums are added over the TP group. As
with `local`, TP ranks must be called with the same arguments. On a CPU they tell each other of mistakes; on GPUs, where
that would cost a collective per call, one that is called wrongly alone is a lost peer to the others.

Example, 2 nodes of 2 ranks, one expert to a rank, expert e on rank e; a token of rank 0 with experts 2 and 3:

    rail        rank 0 -> rank 2, the rank of equal place in the other node; its ids there are [0, 1]
    node        rank 2 -> itself and rank 3, which compute y2 and y3
    back        rank 2 sums y2 + y3 and returns the one row to rank 0

Source: DeepEP's HybridEP, https://github.com/deepseek-ai/DeepEP (branch hybrid-ep, and pull request 673 for dense
routing). Its kernels are not needed; see `kernels/nvlink_dispatch` and `kernels/dense_routing` for ours.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from moe_plugin.compat import deep_ep
from moe_plugin.config import SUPPORTED_DTYPES, MoEConfig, PlacementTables
from moe_plugin.environment import Environment
from moe_plugin.errors import ConfigError, DtypeError, HandleError, InputError, ShapeError
from moe_plugin.kernels.dense_routing import IDS_END, to_dense_ids
from moe_plugin.kernels.placement_lookup import LookupTables, placement_lookup, uses_triton
from moe_plugin.modular_kernel import (
    ActivationFormat,
    Dispatched,
    DispatchHandle,
    Experts,
    PrepareAndFinalize,
    Receiver,
    RouterWeightStage,
)
from moe_plugin.prepare_finalize import hybrid_ep_transport
from moe_plugin.prepare_finalize.collective_transport import CollectiveHandle, CollectiveRouting, CollectiveTransport
from moe_plugin.prepare_finalize.collective_transport import Received as ReceivedByCollectives
from moe_plugin.prepare_finalize.communicator import Communicator, communication_stream, overlapped
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors, ErrorFlag, flags_of_all, or_rows, raise_together
from moe_plugin.prepare_finalize.hybrid_ep_transport import HybridEPCall, HybridEPRouting, HybridEPTransport
from moe_plugin.prepare_finalize.hybrid_ep_transport import Received as ReceivedByHybridEP
from moe_plugin.prepare_finalize.hybrid_ep_transport import ReceivedInGroups as ReceivedInGroupsByHybridEP
from moe_plugin.prepare_finalize.local import weigh_input
from moe_plugin.prepare_finalize.nccl_all_to_all import RowLayout
from moe_plugin.prepare_finalize.node_groups import node_groups
from moe_plugin.prepare_finalize.nvlink_transport import (
    MAX_PROGRAMS,
    NUM_SETS,
    NvlinkCall,
    NvlinkTransport,
    ReceivedInGroups,
    RowShape,
)
from moe_plugin.prepare_finalize.nvlink_transport import Received as ReceivedOverNvlink
from moe_plugin.prepare_finalize.rail_exchange import NodeTokens, RailExchange, RailHandle
from moe_plugin.prepare_finalize.symmetric_memory import UNIT, reachable_peers
from moe_plugin.quantization import FP8_DTYPE, dispatched_groups, input_group_size, quantize_rows
from moe_plugin.verdict import Gate, Verdict, dtype_name, gate_dtype
from moe_plugin.workspace import Workspace, WorkspaceArena

logger = logging.getLogger(__name__)

MAX_NODE_RANKS = 32
"""Ranks that one wait of the NVLink kernels covers."""
MIN_NVLINK_SM = 80
"""Compute capability from which Triton compiles the NVLink kernels."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of a dispatch, and where its rows go once that is known.

    capacity: tokens per rank that there is room for, the same on all ranks. ids: int16 [T, K], physical ids, and flags
    int32 [1], what their lookup found; both None where the NVLink kernels look ids up as they go. routing: of the
    collective transport or of HybridEP.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    capacity: int
    ids: torch.Tensor | None = None
    flags: torch.Tensor | None = None
    routing: CollectiveRouting | HybridEPRouting | None = None


@dataclass(slots=True)
class HybridHandle(DispatchHandle):
    """inside: what the transport of the node keeps. rail: what the exchange between nodes keeps; None on one node."""

    call: _Call
    inside: NvlinkCall | CollectiveHandle | HybridEPCall
    rail: RailHandle | None


class HybridDenseRouting(PrepareAndFinalize):
    """See this module's docstring."""

    name = "hybrid_dense_routing"
    description = "dense int16 routing; rows straight into peers' memory over NVLink, torch.distributed elsewhere"
    has_capacity = True

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(config, arena)
        parallel = config.parallel
        seconds = parallel.timeout_seconds
        self._ep = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, seconds)
        self._tp = Communicator(parallel.tp_group, parallel.tp_size, parallel.tp_rank, seconds)
        self._node, self._rail = self._ep, None
        if parallel.num_nodes > 1:
            groups = node_groups(self._ep, parallel.num_nodes)
            self._node = groups.node
            self._rail = RailExchange(groups.rail, groups.node.size * config.expert_placement.slots_per_rank)
        # Kernels end their waits by themselves, and say who is missing; the host is to hear that first.
        patient = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, 2 * seconds + 5)
        lost = _lost_word(self._node, arena.device)
        self._errors = DeferredErrors(config, arena.device, patient, peers=self._node, lost=lost)
        self._tables = LookupTables.of(config.expert_placement.tables(arena.device))
        self._stream = communication_stream(arena.device)
        self._groups = 0
        self._in_groups = False
        self._calls = 0
        self._nvlink: NvlinkTransport | None = None
        self._collective: CollectiveTransport | None = None
        self._hybrid_ep: HybridEPTransport | None = None

    def accommodate(self, experts: type[Experts]) -> None:
        config, device, slots = self.config, self.arena.device, self.config.expert_placement.slots_per_rank
        self._groups = dispatched_groups(config.quantization, config.hidden_size) if experts.takes_quantized else 0
        takes_groups = ActivationFormat.CONTIGUOUS in experts.activation_formats
        if config.dispatch_transport == "hybrid_ep":
            _say_once(self._node.size, "by DeepEP's HybridEPBuffer")
            self._groups = hybrid_ep_transport.travelling_groups(config, self._groups)
            self._in_groups = takes_groups and _may_permute(config) and hybrid_ep_transport.may_permute(deep_ep.probe())
            self._errors = DeferredErrors(config, device, self._ep)
            self._hybrid_ep = HybridEPTransport(config, self._ep, slots, self._groups, self._in_groups)
            return
        why_not = self._why_not_nvlink()
        _say_once(self._node.size, f"over torch.distributed: {why_not}" if why_not else "by NVLink kernels")
        if why_not:
            room = config.dispatch_capacity if config.cuda_graph else None
            self._errors = DeferredErrors(config, device, self._ep)
            self._collective = CollectiveTransport(self._node, slots, device, config.cuda_graph, room)
            return
        tables = self._tables
        if self._rail is not None:
            tables = LookupTables.of(_tables_of_node(self._node.size, slots, device))
        self._in_groups = takes_groups and _may_permute(config)
        shape = _row_shape(config, self._groups, slots if self._in_groups else 0)
        self._nvlink = NvlinkTransport(config, shape, self._node, tables, self._errors, device, config.dispatch_num_sms)

    def _why_not_nvlink(self) -> str:
        """Empty where the NVLink kernels run, the same on all ranks. Collective.

        Raises ConfigError where they are asked for and do not.
        """
        device, asked = self.arena.device, self.config.dispatch_transport
        if asked == "collective":
            return f"dispatch_transport = {asked!r}"
        if device.type != "cuda":
            return "" if asked == "nvlink" else "no CUDA device"
        major, minor = torch.cuda.get_device_capability(device)
        problem = _why_not(10 * major + minor, uses_triton(device), self._node.size)
        # Other nodes may be of another kind.
        problems = self._ep.gather_objects(problem, "symmetric memory")
        if not any(problems):
            problems = self._ep.gather_objects(reachable_peers(self._node, device), "symmetric memory")
        problem = next(filter(None, problems), "")
        if problem and asked == "nvlink":
            raise ConfigError(f"dispatch_transport = {asked!r} was asked for: {problem}")
        return problem

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        parallel = config.parallel
        backend = "nccl" if environment.device_type == "cuda" else "gloo"
        seen = ", ".join(environment.backends) or "none"
        ids = parallel.ep_size * config.expert_placement.slots_per_rank
        capacity = config.dispatch_capacity if config.cuda_graph else None
        most_sms = min(environment.num_sms or MAX_PROGRAMS, MAX_PROGRAMS)
        verdict = Verdict.of(
            gate_dtype(config, *SUPPORTED_DTYPES),
            Gate("torch.distributed backend", backend in environment.backends, seen, backend),
            Gate(
                "num_experts",
                ids <= IDS_END,
                f"{config.num_experts} experts, {ids} with replicas and padding to equal ranks",
                f"at most {IDS_END}: dense routing rows are int16",
            ),
            Gate(
                "num_nodes",
                parallel.ep_size % parallel.num_nodes == 0,
                f"{parallel.num_nodes} for ep_size {parallel.ep_size}",
                "a divisor of ep_size: every node has as many ranks",
            ),
            Gate(
                "dispatch_capacity",
                capacity is None or parallel.num_nodes == 1,
                f"{config.dispatch_capacity}, num_nodes {parallel.num_nodes}",
                "None where there are several nodes: a rail has room for every token",
            ),
            Gate(
                "dispatch_num_sms",
                config.dispatch_num_sms <= most_sms,
                str(config.dispatch_num_sms),
                f"at most {most_sms}",
            ),
        )
        if config.dispatch_transport == "hybrid_ep":
            return verdict + Verdict.of(
                *hybrid_ep_transport.gates(config, environment, config.expert_placement.slots_per_rank)
            )
        if config.dispatch_transport == "nvlink" and environment.device_type == "cuda":
            problem = cls.why_not_nvlink(config, environment)
            return verdict + Verdict.of(
                Gate("dispatch_transport", not problem, problem or "nvlink", "a machine where NVLink kernels run")
            )
        return verdict

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        """HybridEP waits for the number of rows, and before it for the error flags of all ranks."""
        return 2 if config.dispatch_transport == "hybrid_ep" else 0

    @classmethod
    def why_not_nvlink(cls, config: MoEConfig, environment: Environment) -> str:
        """Why the NVLink kernels would not run in `environment`; empty if they would. The ranks have the last word."""
        if config.dispatch_transport not in (None, "nvlink"):
            return f"dispatch_transport = {config.dispatch_transport!r}"
        if environment.device_type != "cuda":
            return "no CUDA device"
        has_triton = environment.package("triton").usable and not environment.triton_interpret
        problem = _why_not(environment.sm or 0, has_triton, _ranks_per_node(config))
        return problem or ("" if environment.peer_access else "GPUs of this host without peer access")

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> Mapping[str, str]:
        if config.dispatch_transport == "hybrid_ep":
            groups = dispatched_groups(config.quantization, config.hidden_size)
            groups = hybrid_ep_transport.travelling_groups(config, groups)
            package = environment.package(deep_ep.PACKAGE)
            in_groups = _may_permute(config) and hybrid_ep_transport.may_permute(package)
            return {"transport": hybrid_ep_transport.describe(package, groups, in_groups)}
        why_not = cls.why_not_nvlink(config, environment)
        words = f"NVLink kernels on at most {config.dispatch_num_sms} SMs, {NUM_SETS} micro-batches in flight"
        if why_not:
            words = f"torch.distributed: {why_not}"
        elif _may_permute(config):
            words += ", rows in expert-grouped order for experts that take the Contiguous format"
        nodes = config.parallel.num_nodes
        between = f"{nodes} of {_ranks_per_node(config)} ranks, rails of torch.distributed between them"
        return {"transport": words} | ({"nodes": between} if nodes > 1 else {})

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """What the transport that needs more takes, of rows in config.dtype, than which quantized ones are no larger.

        Of NVLink's it is symmetric memory, shared by all layers of one group and row shape.
        """
        parallel, ranks = config.parallel, _ranks_per_node(config)
        tokens = parallel.num_nodes * config.max_tokens_per_rank
        layout = RowLayout(config.hidden_size, config.top_k, config.dtype)
        if config.dispatch_transport == "hybrid_ep":
            return _with_quantized_rows(
                config, hybrid_ep_transport.memory(config, config.expert_placement.slots_per_rank, _may_permute(config))
            )
        room = config.dispatch_capacity if config.cuda_graph else None
        shape = _row_shape(config, 0, config.expert_placement.slots_per_rank if _may_permute(config) else 0)
        nvlink = {f"symmetric {name}": size for name, size in shape.memory(ranks).items()}
        nvlink["destinations"] = 4 * tokens
        row_bytes = config.hidden_size * config.dtype.itemsize
        if row_bytes % UNIT:
            nvlink["dense rows"] = ranks * tokens * row_bytes
        collective = CollectiveTransport.memory(layout, config.dtype, ranks, tokens, True, room)
        needed = max(nvlink, dict(collective), key=lambda sizes: sum(sizes.values()))
        if parallel.num_nodes > 1:
            needed |= RailExchange.memory(layout, config.dtype, parallel.num_nodes, config.max_tokens_per_rank)
            needed["node results"] = tokens * row_bytes
        return _with_quantized_rows(config, needed)

    def counters(self) -> Mapping[str, int]:
        """Dispatches, by the transport of the node."""
        if self._hybrid_ep is not None:
            return {"hybrid_ep": self._calls}
        return {"nvlink" if self._nvlink is not None else "collective": self._calls}

    @property
    def num_sms(self) -> int | None:
        """SMs that kernels which move rows take at most; None where torch.distributed moves them."""
        if self._hybrid_ep is not None:
            return self._hybrid_ep.num_sms
        if self._nvlink is None:
            return None
        return 2 * self._nvlink.num_sms if self._in_groups else self._nvlink.num_sms

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        return self._start_dispatch(hidden_states, self._call(topk_ids, topk_weights, max_num_tokens))()

    def prepare_async(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Receiver[Dispatched]:
        inputs = (hidden_states, topk_ids, topk_weights)
        call = self._call(topk_ids, topk_weights, max_num_tokens)
        return overlapped(self._stream, lambda: self._start_dispatch(hidden_states, call), inputs)

    def prepare_again(self, hidden_states: torch.Tensor, handle: DispatchHandle) -> Dispatched:
        """Dispatch other hidden states [T, H] along the routing of an earlier `prepare`; collective.

        No id is exchanged and nothing is scanned again, unless rows go in expert-grouped order. handle: of that call,
        finalized or not; its ids and router weights must not have been changed meanwhile. Every rank calls it, with the
        handle of the same call. Raises ShapeError or DtypeError for hidden states unlike that call's, as `prepare` does
        on all ranks, and HandleError, on this rank alone, for a handle of another object.
        """
        if not isinstance(handle, HybridHandle) or handle.owner is not self:
            raise HandleError(f"{self.name}: prepare_again takes a handle that this object's prepare returned")
        shape, dtype = (handle.num_tokens, self.config.hidden_size), self.config.dtype
        problem: InputError | None = None
        if tuple(hidden_states.shape) != shape:
            problem = ShapeError(f"hidden_states must be {list(shape)}, got {list(hidden_states.shape)}")
        elif hidden_states.dtype != dtype:
            problem = DtypeError(f"hidden_states must be {dtype_name(dtype)}, got {dtype_name(hidden_states.dtype)}")
        if problem is None:
            return self._start_dispatch(hidden_states, handle.call)()
        self._abort(torch.zeros(shape, dtype=dtype, device=self.arena.device), handle.call, problem)

    def abort(self, problem: InputError, max_num_tokens: int | None = None) -> NoReturn:
        """Join the exchange with no tokens and the abort flag, so that every rank raises."""
        config, device = self.config, self.arena.device
        nothing = torch.empty(0, config.hidden_size, dtype=config.dtype, device=device)
        ids = torch.empty(0, config.top_k, dtype=torch.int32, device=device)
        self._abort(nothing, self._call(ids, ids.float(), max_num_tokens), problem)

    def _abort(self, hidden_states: torch.Tensor, call: _Call, problem: InputError) -> NoReturn:
        """Dispatch what stands for the tokens of this rank, with the abort flag."""
        # On CPU all ranks see the flag at once; on CUDA the peers raise at their next host point and are on their way
        # to combine.
        try:
            dispatched = self._start_dispatch(hidden_states, call, problem)()
        except InputError:
            if self._nvlink is None:
                raise  # every rank raises the same
            raise problem from None
        handle = dispatched.handle
        handle.consume(self)
        assert isinstance(handle, HybridHandle)
        rows = torch.zeros(dispatched.activations.shape, dtype=self.config.dtype, device=self.arena.device)
        # Not over TP: how many tokens those ranks have is not known here.
        self._start_exchange_back(rows, handle, torch.empty_like(hidden_states))()
        handle.workspace.release()
        raise problem

    def _call(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor, max_num_tokens: int | None) -> _Call:
        return _Call(topk_ids, topk_weights, max_num_tokens or self.config.max_tokens_per_rank)

    def _start_dispatch(
        self, hidden_states: torch.Tensor, call: _Call, problem: InputError | None = None
    ) -> Callable[[], Dispatched]:
        """problem: what this rank was called with wrongly, or None."""
        if self._nvlink is None and self._collective is None and self._hybrid_ep is None:
            raise HandleError(f"{self.name}: accommodate(experts) comes before the first call")
        self._errors.raise_pending()
        self._calls += 1
        flags = 0 if problem is None else int(ErrorFlag.ABORTED)
        activations: torch.Tensor = hidden_states
        weights: torch.Tensor | None = call.topk_weights
        stage = RouterWeightStage.EXPERTS_GATHER
        if self.config.apply_router_weight_on_input:
            activations, weights, stage = weigh_input(self.config, hidden_states, call.topk_weights)
        workspace = self.arena.lease()
        if self._nvlink is not None and self._in_groups:
            grouped = self._nvlink.dispatch_in_groups(
                activations, call.topk_ids, weights, call.capacity, workspace, flags=flags
            )
            handle = HybridHandle(self, hidden_states.shape[0], workspace, call, grouped.handle, None)
            dispatched = self._dispatched_in_groups(grouped, stage, handle)
            return lambda: dispatched
        if self._nvlink is not None and self._rail is None:
            room = self.config.dispatch_capacity if self.config.cuda_graph else None
            received = self._nvlink.dispatch(
                activations, call.topk_ids, weights, call.capacity, workspace, room=room, flags=flags
            )
            handle = HybridHandle(self, hidden_states.shape[0], workspace, call, received.handle, None)
            dispatched = self._dispatched(received, stage, handle)
            return lambda: dispatched
        if self._hybrid_ep is not None:
            dispatched = self._dispatch_by_hybrid_ep(
                activations, weights, self._placed(call), workspace, stage, problem
            )
            return lambda: dispatched
        return self._start_exchange(activations, weights, self._placed(call), workspace, stage, problem)

    def _placed(self, call: _Call) -> _Call:
        """`call` with physical ids."""
        if call.ids is not None:
            return call
        shape, device = call.topk_ids.shape, self.arena.device
        rank, slot = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
        found = torch.zeros(1, dtype=torch.int32, device=device)
        placement_lookup(call.topk_ids, self._tables, slot, found, int(ErrorFlag.EXPERT_ID), rank=rank)
        ids = to_dense_ids(rank, slot, self.config.expert_placement.slots_per_rank)
        return replace(call, ids=ids, flags=found)

    def _dispatch_by_hybrid_ep(
        self,
        activations: torch.Tensor,
        weights: torch.Tensor | None,
        call: _Call,
        workspace: Workspace,
        stage: RouterWeightStage,
        problem: InputError | None,
    ) -> Dispatched:
        """Dispatch by physical ids; errors of any rank are raised on all of them before a row moves."""
        assert self._hybrid_ep is not None and call.ids is not None and call.flags is not None
        assert not isinstance(call.routing, CollectiveRouting)
        flags = call.flags if problem is None else call.flags | int(ErrorFlag.ABORTED)
        seen = flags_of_all(self._ep, self._tp, flags)
        if seen:
            workspace.release()
            raise_together(self.config, self._ep, self._tp, problem, int(flags), seen)
        num_tokens, scales = activations.shape[0], None
        if self._groups:
            activations, scales = self._quantized(activations, workspace)
        received = self._hybrid_ep.dispatch(
            activations, call.ids, weights, call.capacity, workspace, scales, call.routing
        )
        known = replace(call, routing=received.handle.routing)
        handle = HybridHandle(self, num_tokens, workspace, known, received.handle, None)
        if isinstance(received, ReceivedInGroupsByHybridEP):
            return self._dispatched_in_groups(received, stage, handle)
        return self._dispatched(received, stage, handle)

    def _start_exchange(
        self,
        activations: torch.Tensor,
        weights: torch.Tensor | None,
        call: _Call,
        workspace: Workspace,
        stage: RouterWeightStage,
        problem: InputError | None,
    ) -> Callable[[], Dispatched]:
        """Dispatch by physical ids, along rails where there are several nodes."""
        assert call.ids is not None and call.flags is not None
        num_tokens, ids, scales = activations.shape[0], call.ids, None
        flags = call.flags if problem is None else call.flags | int(ErrorFlag.ABORTED)
        weights = None if weights is None else weights.float()
        if self._groups and self._collective is not None:
            activations, scales = self._quantized(activations, workspace)

        def complete(
            finish: Callable[[], ReceivedByCollectives | ReceivedOverNvlink], rail: RailHandle | None
        ) -> Dispatched:
            received = finish()
            if isinstance(received, ReceivedByCollectives):
                self._look_at(received.flags, flags, problem, workspace)
                known = replace(call, routing=received.handle.routing)
            else:
                known = call
            handle = HybridHandle(self, num_tokens, workspace, known, received.handle, rail)
            return self._dispatched(received, stage, handle)

        if self._rail is None:
            assert self._collective is not None
            assert not isinstance(call.routing, HybridEPRouting)
            finish = self._collective.start_dispatch(
                activations, ids, weights, flags, call.capacity, workspace, scales, call.routing
            )
            return lambda: complete(finish, None)
        arrive = self._rail.start_dispatch(activations, ids, weights, flags, call.capacity, workspace, scales)

        def complete_rail() -> Dispatched:
            tokens = arrive()
            return complete(self._start_in_node(tokens, call, workspace), tokens.handle)

        return complete_rail

    def _start_in_node(
        self, tokens: NodeTokens, call: _Call, workspace: Workspace
    ) -> Callable[[], ReceivedByCollectives | ReceivedOverNvlink]:
        """Dispatch the tokens of the rail to the ranks of this node."""
        capacity, weights = tokens.ids.shape[0], tokens.topk_weights
        if self._nvlink is not None:
            received = self._nvlink.dispatch(
                tokens.activations, tokens.ids, weights, capacity, workspace, device_flags=tokens.flags
            )
            return lambda: received
        assert self._collective is not None
        assert not isinstance(call.routing, HybridEPRouting)
        return self._collective.start_dispatch(
            tokens.activations, tokens.ids, weights, tokens.flags, capacity, workspace, tokens.scales, call.routing
        )

    def _dispatched(
        self,
        received: ReceivedByCollectives | ReceivedOverNvlink | ReceivedByHybridEP,
        stage: RouterWeightStage,
        handle: HybridHandle,
    ) -> Dispatched:
        return Dispatched(
            activations=received.activations,
            activation_format=self.activation_format,
            router_weight_stage=stage,
            handle=handle,
            local_ids=received.local_ids,
            topk_weights=received.topk_weights,
            scales=received.scales,
        )

    def _dispatched_in_groups(
        self, received: ReceivedInGroups | ReceivedInGroupsByHybridEP, stage: RouterWeightStage, handle: HybridHandle
    ) -> Dispatched:
        return Dispatched(
            activations=received.activations,
            activation_format=ActivationFormat.CONTIGUOUS,
            router_weight_stage=RouterWeightStage.COMBINE if stage is RouterWeightStage.EXPERTS_GATHER else stage,
            handle=handle,
            group_ends=received.group_ends[: self.config.num_local_experts],
            scales=received.scales,
            num_rows=self._ep.size * handle.call.capacity,
        )

    def _quantized(self, x: torch.Tensor, workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] in fp8 and its scales fp32 [T, groups]."""
        scheme, device = self.config.quantization, self.arena.device
        assert scheme is not None
        if not uses_triton(device) or x.shape[0] == 0:
            return quantize_rows(x, input_group_size(scheme))
        from moe_plugin.kernels.quantize_rows import quantize_rows as launch_quantize_rows

        rows = workspace.tensor("quantized rows", tuple(x.shape), FP8_DTYPE)
        scales = workspace.tensor("quantized row scales", (x.shape[0], self._groups), torch.float32)
        launch_quantize_rows(x if x.stride(1) == 1 else x.contiguous(), rows, scales)
        return rows, scales

    def _look_at(self, seen: torch.Tensor, own: torch.Tensor, problem: InputError | None, workspace: Workspace) -> None:
        """Raise what the exchange's error flags say: on CPU now and on all ranks together, on CUDA at a host point."""
        if seen.is_cuda:
            self._errors.record(seen)
            return
        if self._tp.size > 1:
            everyone = torch.empty(self._tp.size, 1, dtype=torch.int32)
            self._tp.all_gather(everyone, seen, "dispatch").wait()
            seen = or_rows(everyone)
        if int(seen):
            workspace.release()
            raise_together(self.config, self._ep, self._tp, problem, int(own), int(seen))

    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._start_combine(expert_output, handle, out)()

    def finalize_async(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> Receiver[torch.Tensor]:
        # The result is the caller's: memory of the caller's stream.
        result = self._new_result(handle) if out is None else out
        return overlapped(self._stream, lambda: self._start_combine(expert_output, handle, result), (expert_output,))

    def _start_combine(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        handle.consume(self)
        assert isinstance(handle, HybridHandle)
        if out is None and self._tp.size == 1 and isinstance(handle.inside, HybridEPCall):
            # It makes a tensor of its own.
            assert self._hybrid_ep is not None
            combined = self._hybrid_ep.combine(expert_output, handle.inside)
            handle.workspace.release()
            return lambda: combined
        result = target = self._new_result(handle) if out is None else out
        if self._tp.size > 1 and not result.is_contiguous():
            target = handle.workspace.tensor("TP result", tuple(result.shape), result.dtype)
        finish = self._start_exchange_back(expert_output, handle, target)

        def complete() -> torch.Tensor:
            finish()
            if self._tp.size > 1:
                self._tp.all_reduce(target, "combine").wait()
            if target is not result:
                result.copy_(target)
            handle.workspace.release()
            return result

        return complete

    def _start_exchange_back(
        self, rows: torch.Tensor, handle: HybridHandle, out: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """out [T, H] = what the experts of all ranks made of this rank's tokens."""
        workspace, inside, rail, rails = handle.workspace, handle.inside, handle.rail, self._rail
        in_node = out
        if rail is not None:
            num_rows = self.config.parallel.num_nodes * handle.call.capacity
            in_node = workspace.tensor("node results", (num_rows, self.config.hidden_size), self.config.dtype)
        if isinstance(inside, NvlinkCall):
            assert self._nvlink is not None
            self._nvlink.combine(rows, inside, in_node, workspace)
            finish = None
        elif isinstance(inside, HybridEPCall):
            assert self._hybrid_ep is not None
            in_node.copy_(self._hybrid_ep.combine(rows, inside))
            finish = None
        else:
            assert self._collective is not None
            finish = self._collective.start_combine(rows, inside, in_node)

        def complete() -> torch.Tensor:
            if finish is not None:
                finish()
            if rail is not None:
                assert rails is not None
                rails.combine(in_node, rail, out)
            return out

        return complete

    def check_errors(self) -> None:
        self._errors.raise_pending(synchronize=True)

    def close(self) -> None:
        if self._hybrid_ep is not None:
            self._hybrid_ep.close()

    def _new_result(self, handle: DispatchHandle) -> torch.Tensor:
        shape = (handle.num_tokens, self.config.hidden_size)
        return torch.empty(shape, dtype=self.config.dtype, device=self.arena.device)


def _ranks_per_node(config: MoEConfig) -> int:
    return max(config.parallel.ep_size // config.parallel.num_nodes, 1)


def _lost_word(node: Communicator, device: torch.device) -> torch.Tensor:
    """One for all layers over the same ranks: a stack of them must not wait for a lost rank in each one's turn."""
    key = None if node.group is None else node.group.group_name, device
    found = _lost_words.get(key)
    if found is None:
        found = _lost_words[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return found


_lost_words: weakref.WeakValueDictionary[tuple[str | None, torch.device], torch.Tensor] = weakref.WeakValueDictionary()


def _with_quantized_rows(config: MoEConfig, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """`memory` with what any transport takes besides."""
    needed, rows_bytes = dict(sizes), config.max_tokens_per_rank * config.hidden_size * config.dtype.itemsize
    if dispatched_groups(config.quantization, config.hidden_size):
        needed["quantized rows"] = rows_bytes
    if config.parallel.tp_size > 1:
        needed["TP result"] = rows_bytes
    return needed


def _may_permute(config: MoEConfig) -> bool:
    """Whether rows go in expert-grouped order over NVLink, to experts that take them so."""
    has_room = config.dispatch_capacity is None or not config.cuda_graph
    return config.dispatch_permute and config.parallel.num_nodes == 1 and has_room


def _row_shape(config: MoEConfig, groups: int, num_slots: int = 0) -> RowShape:
    """groups: scales of a row that is quantized on its way, 0 where none is. num_slots: see `RowShape`."""
    sent = FP8_DTYPE if groups else config.dtype
    tokens = config.parallel.num_nodes * config.max_tokens_per_rank
    return RowShape(config.hidden_size, config.top_k, config.dtype, sent, groups, tokens, num_slots)


def _tables_of_node(num_ranks: int, slots: int, device: torch.device) -> PlacementTables:
    """The placement of a node's physical ids: id i stands for slot i % slots of rank i // slots."""
    ids = torch.arange(num_ranks * slots, dtype=torch.int32, device=device)
    rank = torch.div(ids, slots, rounding_mode="floor")
    return PlacementTables(rank=rank[:, None], slot=(ids - rank * slots)[:, None], num_replicas=torch.ones_like(ids))


def _why_not(sm: int, has_triton: bool, ranks_per_node: int) -> str:
    """Why the NVLink kernels do not run on such a device, whatever lies between the ranks; empty if they do."""
    if not has_triton:
        return "Triton is not there to compile kernels"
    if sm < MIN_NVLINK_SM:
        return f"the kernels need SM {MIN_NVLINK_SM}, saw SM {sm}"
    if ranks_per_node > MAX_NODE_RANKS:
        return f"the kernels reach {MAX_NODE_RANKS} ranks of a node, and there are {ranks_per_node}"
    return ""


@functools.cache
def _say_once(num_ranks: int, how: str) -> None:
    logger.info("hybrid_dense_routing moves rows between %d rank(s) of a node %s", num_ranks, how)
