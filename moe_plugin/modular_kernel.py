"""The two parts a layer is made of, what passes between them, and the kernel that runs them.

    hidden_states [T,H], topk_ids [T,K], topk_weights [T,K]
      -> PrepareAndFinalize.prepare  -> Dispatched
      -> Experts.apply               -> expert output
      -> PrepareAndFinalize.finalize -> [T,H]

Everything about one call travels in `Dispatched`; the objects keep none of it, so any number of micro-batches may
be between prepare and finalize at the same time.
"""

from __future__ import annotations

import abc
import enum
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import torch

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import DtypeError, HandleError, InputError, ShapeError, TooManyTokensError
from moe_plugin.quantization import canonical_scale, has_static_activations, weight_scale_shapes
from moe_plugin.verdict import Verdict, dtype_name
from moe_plugin.workspace import Workspace, WorkspaceArena

T = TypeVar("T")

ID_DTYPES = (torch.int16, torch.int32, torch.int64)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONTIGUOUS_ALIGNMENT = 128
"""Rows to which segments of the Contiguous format are padded: what DeepGEMM wants, and wide tiles of the others."""


class ActivationFormat(str, enum.Enum):
    """How dispatched activations lie in memory."""

    STANDARD = "Standard"
    """[N, H]: received rows in the dispatcher's order; `local_ids` says which experts want each."""
    BATCHED_EXPERTS = "BatchedExperts"
    """[local_experts, max_tokens, H]: the first `expert_num_tokens[e]` rows of slice e are expert e's."""
    CONTIGUOUS = "Contiguous"
    """[slots, H]: rows sorted by local expert, segments from multiples of `CONTIGUOUS_ALIGNMENT` to `group_ends`."""


class RouterWeightStage(str, enum.Enum):
    """The one place where router weights are applied."""

    BEFORE_DISPATCH = "before_dispatch"
    """Already multiplied into the activations (top-k 1 only)."""
    EXPERTS_GATHER = "experts_gather"
    """By Experts, when it sums a row's expert outputs."""
    COMBINE = "combine"
    """By PrepareAndFinalize.finalize; Experts returns unweighted rows."""


@dataclass(slots=True)
class DispatchHandle:
    """What finalize needs to know about its prepare. Classes extend it with their own fields.

    owner: the PrepareAndFinalize that made it.
    num_tokens: T of the call.
    workspace: scratch memory of the call, released by finalize.
    """

    owner: PrepareAndFinalize
    num_tokens: int
    workspace: Workspace
    finalized: bool = field(default=False, kw_only=True)

    def consume(self, owner: PrepareAndFinalize) -> None:
        """Claim the handle for one finalize.

        Raises HandleError when it was finalized before or comes from another object.
        """
        if self.owner is not owner:
            raise HandleError(
                f"this handle comes from another {self.owner.name} object; finalize with the one that prepared it"
            )
        if self.finalized:
            raise HandleError(
                f"{owner.name}: finalize was already called with this handle; every prepare has one finalize"
            )
        self.finalized = True


_NEEDED = {
    ActivationFormat.STANDARD: "local_ids",
    ActivationFormat.BATCHED_EXPERTS: "expert_num_tokens",
    ActivationFormat.CONTIGUOUS: "group_ends",
}


@dataclass(slots=True, kw_only=True)
class Dispatched:
    """What Experts computes on.

    activations: [N, H] (rows may be strided) or [local_experts, max_tokens, H], contiguous in H.
    activation_format: which of the two.
    router_weight_stage: who applies router weights in this call.
    local_ids: int32 [N, K], slot of the expert on this rank, -1 where the row wants none of its own. Standard only.
    topk_weights: fp32 [N, K]; present exactly when Experts applies them.
    expert_num_tokens: int32 [local_experts] on the device; required for BatchedExperts, optional for Standard.
    expert_num_tokens_host: the pairs of each local expert as numbers on the host, where the dispatcher has them anyway.
    group_ends: int32 [local_experts] on the device, for Contiguous: where each expert's rows end. Its segment starts at
        the previous end rounded up to `CONTIGUOUS_ALIGNMENT`; that is also the end of an expert without rows.
    scales: activation scales when the dispatcher quantized, else None; fp32 [N, groups], in Contiguous stored group by
        group, strides (1, slots); in BatchedExperts [local_experts, max_tokens, groups] of any strides. Packed ones are
        int32, see `Experts.ue8m0_from_sm`.
    num_rows: Contiguous only: tokens that can have arrived at most, for choosing tiles.
    handle: for finalize.
    """

    activations: torch.Tensor
    activation_format: ActivationFormat
    router_weight_stage: RouterWeightStage
    handle: DispatchHandle
    local_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    expert_num_tokens: torch.Tensor | None = None
    expert_num_tokens_host: Sequence[int] | None = None
    group_ends: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    num_rows: int | None = None

    def __post_init__(self) -> None:
        at_gather = self.router_weight_stage is RouterWeightStage.EXPERTS_GATHER
        if at_gather != (self.topk_weights is not None):
            raise HandleError(
                f"topk_weights must travel exactly when experts apply them; stage is {self.router_weight_stage.value}"
            )
        needed = _NEEDED[self.activation_format]
        if getattr(self, needed) is None:
            raise HandleError(f"activation format {self.activation_format.value} needs {needed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """This rank's experts: w13 [El, 2I, H], gate rows first; w2 [El, H, I]; biases [El, 2I] and [El, H].

    w13_scale, w2_scale: fp32 scales of fp8 weights, in a shape of moe_plugin.quantization. a13_scale, a2_scale: static
    scales of the activations of w13 and w2, for Fp8PerTensor(static_activations=True) alone; scalar, [1] or [El].
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    a13_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None

    def check(self, config: MoEConfig) -> None:
        """Raises ShapeError, DtypeError or, for tensors on two devices, InputError when `config` wants others."""
        experts, inner, hidden = config.num_local_experts, config.local_intermediate_size, config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"w13": (experts, 2 * inner, hidden), "w2": (experts, hidden, inner)}
        if config.has_bias:
            shapes |= {"w13_bias": (experts, 2 * inner), "w2_bias": (experts, hidden)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None:
                raise ShapeError(f"{name} {list(shape)} is required by has_bias=True and was not given")
            if tuple(tensor.shape) != shape:
                raise ShapeError(f"{name} must be {list(shape)} on this rank, got {list(tensor.shape)}")
        for name in shapes:
            tensor = getattr(self, name)
            if tensor.device != self.w13.device:
                raise InputError(f"{name} is on {tensor.device}, w13 on {self.w13.device}, another device")
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ShapeError(
                    f"{name} must be contiguous in its last dimension, got strides {list(tensor.stride())}"
                )
        for name in ("w13", "w2"):
            if getattr(self, name).dtype != config.weight_dtype:
                raise DtypeError(
                    f"{name} must be {dtype_name(config.weight_dtype)}, got {dtype_name(getattr(self, name).dtype)}"
                )
        if not config.has_bias and (self.w13_bias is not None or self.w2_bias is not None):
            raise ShapeError("biases were given, but the configuration says has_bias=False")
        for name in ("w13_bias", "w2_bias"):
            bias = getattr(self, name)
            if bias is not None and bias.dtype != config.dtype:
                raise DtypeError(f"{name} must be {dtype_name(config.dtype)}, got {dtype_name(bias.dtype)}")
        self._check_scales(config)

    def _check_scales(self, config: MoEConfig) -> None:
        scheme = config.quantization
        given = {name: getattr(self, name) for name in ("w13_scale", "w2_scale", "a13_scale", "a2_scale")}
        present = {name: scale for name, scale in given.items() if scale is not None}
        if scheme is None:
            if present:
                raise ShapeError(f"{', '.join(present)} given, but the configuration is unquantized")
            return
        if not {"w13_scale", "w2_scale"} <= present.keys():
            raise ShapeError(f"{scheme.name} weights need w13_scale and w2_scale")
        static = {"a13_scale", "a2_scale"}
        if has_static_activations(scheme):
            if not static <= present.keys():
                raise ShapeError(f"{scheme.name} with static activations needs a13_scale and a2_scale")
        elif static & present.keys():
            raise ShapeError(
                f"a13_scale and a2_scale are for Fp8PerTensor(static_activations=True); {scheme} measures its own"
            )
        experts = config.num_local_experts
        shapes = weight_scale_shapes(scheme, experts, config.local_intermediate_size, config.hidden_size)
        shapes |= dict.fromkeys(static, ((experts,), (1,), ()))
        for name, scale in present.items():
            if scale.dtype != torch.float32:
                raise DtypeError(f"{name} must be float32, got {dtype_name(scale.dtype)}")
            if scale.device != self.w13.device:
                raise InputError(f"{name} is on {scale.device}, w13 on {self.w13.device}, another device")
            if tuple(scale.shape) not in shapes[name]:
                allowed = " or ".join(str(list(shape)) for shape in shapes[name])
                raise ShapeError(f"{name} of {scheme.name} must be {allowed} on this rank, got {list(scale.shape)}")

    def canonical(self, config: MoEConfig) -> ExpertWeights:
        """Checked weights with their scales in the one form that Experts see: contiguous fp32, and

        fp8_per_tensor: w13_scale [El, 2] (gate, up), w2_scale [El];
        fp8_per_token: w13_scale [El, 2I], w2_scale [El, H];
        fp8_block: w13_scale [El, 2 * ceil(I/128), ceil(H/128)], w2_scale [El, ceil(H/128), ceil(I/128)];
        static activations: a13_scale [1], the largest of the rank's, a2_scale [El].
        """
        if config.quantization is None:
            return self
        assert self.w13_scale is not None and self.w2_scale is not None
        experts = config.num_local_experts
        shapes = weight_scale_shapes(config.quantization, experts, config.local_intermediate_size, config.hidden_size)
        a13_scale, a2_scale = self.a13_scale, self.a2_scale
        if a13_scale is not None and a2_scale is not None:
            # A rank without experts has no scale of its own to give.
            a13_scale = a13_scale.max().reshape(1) if a13_scale.numel() else a13_scale.new_zeros(1)
            a2_scale = a2_scale.expand(experts).contiguous()
        return replace(
            self,
            w13_scale=canonical_scale(self.w13_scale, shapes["w13_scale"][0]),
            w2_scale=canonical_scale(self.w2_scale, shapes["w2_scale"][0]),
            a13_scale=a13_scale,
            a2_scale=a2_scale,
        )


class Receiver(Generic[T]):
    """The second half of an asynchronous prepare or finalize: `wait()` once, get the result."""

    def __init__(self, complete: Callable[[], T]) -> None:
        self._complete: Callable[[], T] | None = complete

    def wait(self) -> T:
        """Complete the operation. On CUDA the current stream waits, not the host."""
        if self._complete is None:
            raise HandleError("this receiver was already waited for")
        complete, self._complete = self._complete, None
        return complete()


class StrategyPart(abc.ABC):
    """What PrepareAndFinalize, Experts and Monolithic classes have in common.

    name: the registry key, also flag value, file name, test id and bench label.
    description: one line for the strategy table.
    deterministic: the same input gives bitwise the same output.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    deterministic: ClassVar[bool] = True

    @classmethod
    @abc.abstractmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        """Whether this class can run `config` in `environment`: pure, touches no device."""

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        """How often one eager call makes the host wait for a CUDA device; must be 0 where config.cuda_graph is."""
        return 0

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> Mapping[str, str]:
        """What the class will do inside, where `supports` says it runs, for the selection report: {topic: words}.

        Pure, as `supports` is. For choices that change speed and not results, such as which of its kernels fit.
        """
        return {}

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """Bytes of workspace per buffer that a call of `max_tokens_per_rank` tokens takes, computed, not allocated."""
        return {}

    def counters(self) -> Mapping[str, int]:
        """How often calls have gone each way that the class has inside; a captured call counts once."""
        return {}


class PrepareAndFinalize(StrategyPart):
    """Takes tokens to the ranks that own their experts and brings the results back.

    activation_format: what prepare returns.
    router_weight_stage: who applies router weights, unless the configuration applies them on input.
    has_capacity: with cuda_graph=True the exchange has a fixed capacity, `dispatch_capacity`, and can overflow.
    min_hidden_size: on GPUs H of all that it runs is this or more; the conformance kit makes its layers so.
    """

    activation_format: ClassVar[ActivationFormat] = ActivationFormat.STANDARD
    router_weight_stage: ClassVar[RouterWeightStage] = RouterWeightStage.EXPERTS_GATHER
    has_capacity: ClassVar[bool] = False
    min_hidden_size: ClassVar[int] = 1

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        self.config = config
        self.arena = arena

    @classmethod
    def quantizes_by_reciprocal(cls, config: MoEConfig) -> bool:
        """Whether rows for experts that take them quantized are multiplied by the reciprocal of their scale.

        See `quantization.fake_quantize`; the conformance kit's oracle follows.
        """
        return False

    def accommodate(self, experts: type[Experts]) -> None:
        """Told once, before the first call, which Experts class the rows are for.

        A class may then hand over what that one computes on fastest: `experts.activation_formats`,
        `experts.takes_quantized`. A collective where the class communicates.
        """

    @abc.abstractmethod
    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        """Dispatch. Inputs are validated for shape and dtype, ids are not; none of them is changed.

        hidden_states [T, H]; topk_ids int [T, K], global, -1 = dropped; topk_weights float [T, K].
        max_num_tokens: a bound on T that every rank gives alike (a server's padded batch), or None.
        """

    @abc.abstractmethod
    def finalize(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Combine the experts' rows into [T, H] (written to `out` when given) and release the workspace."""

    def expert_output(self, handle: DispatchHandle, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """Where the experts may write so that finalize, called with the same `out`, has nothing left to move.

        Called between prepare and finalize. A tensor as Experts.apply takes it, or None.
        """
        return None

    def prepare_async(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Receiver[Dispatched]:
        """Start a dispatch; a class that cannot overlap does it all here."""
        dispatched = self.prepare(hidden_states, topk_ids, topk_weights, max_num_tokens)
        return Receiver(lambda: dispatched)

    def finalize_async(
        self, expert_output: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> Receiver[torch.Tensor]:
        """Start a combine; a class that cannot overlap does it all here."""
        result = self.finalize(expert_output, handle, out)
        return Receiver(lambda: result)

    def abort(self, problem: InputError, max_num_tokens: int | None = None) -> NoReturn:
        """Called instead of prepare when this rank's arguments are wrong.

        A class that communicates takes its place in the exchange its peers are in, tells them, and raises on all.
        """
        raise problem

    def check_errors(self) -> None:
        """A host point for errors found on the device: raise what earlier calls flagged. Synchronizes."""

    def close(self) -> None:
        """Give back what would outlive the object, such as buffers of a library; the last call to it.

        A collective where the class communicates, made in the same order on all ranks.
        """


class Experts(StrategyPart):
    """The grouped GEMMs and the activation on whatever was dispatched.

    activation_formats: what `apply` takes.
    takes_quantized: `apply` is as fast, or faster, on rows that the dispatcher has quantized as on others.
    ue8m0_from_sm: with `takes_quantized`, the compute capability from which scales of Fp8Block are to come rounded up
        to powers of two and packed, int32 [..., ceil(groups / 4)]; None: nowhere. A CPU has 0.
    writes_strided: `apply` writes BatchedExperts to an `output` with room between its rows as fast as without.
    rounds_gate_up: the first GEMM's result may be rounded to config.dtype before the activation; see `reference_moe`.
    size_multiple: H and I of all that it runs are multiples of this; the conformance kit makes its layers so.
    """

    activation_formats: ClassVar[frozenset[ActivationFormat]] = frozenset({ActivationFormat.STANDARD})
    takes_quantized: ClassVar[bool] = False
    ue8m0_from_sm: ClassVar[int | None] = None
    writes_strided: ClassVar[bool] = False
    rounds_gate_up: ClassVar[bool] = False
    size_multiple: ClassVar[int] = 1

    def __init__(self, config: MoEConfig, weights: ExpertWeights) -> None:
        self.config = config
        self.weights = weights

    @classmethod
    def extra_weight_bytes(cls, config: MoEConfig) -> int:
        """Bytes of a second copy of the weights, where `prepare_weights` has to make one."""
        return 0

    @classmethod
    def prepare_weights(cls, config: MoEConfig, weights: ExpertWeights) -> ExpertWeights:
        """Bring the weights into the layout this class computes on; as they are, unless overridden."""
        return weights

    @abc.abstractmethod
    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        """Compute this rank's experts.

        Standard -> [N, H]: for each row the sum over its local experts, weighted when the stage is EXPERTS_GATHER;
        zeros for a row that hits none. BatchedExperts -> [local_experts, max_tokens, H], unweighted; rows past the
        count are undefined. Contiguous -> [slots, H], unweighted; rows outside of segments are undefined. In
        `config.dtype`, contiguous.
        output: memory of that shape and dtype, contiguous, where finalize would like the result, or None. A class that
            writes there returns `output` itself; one that ignores it returns memory of its own, which costs a copy.
            Where `writes_strided` says so, rows of BatchedExperts may have a stride of their own.
        """

    def warm_up_steps(self, arena: WorkspaceArena) -> Iterator[tuple[str, Callable[[], object]]]:
        """Calls that together compile the kernels of all calls up to `max_received_rows` rows: (what, call).

        Standard format, with rows that are all zero: every number of rows up to 64, then in steps of 5%. No collective
        is among them. Classes that compile more add to them.
        """
        if ActivationFormat.STANDARD not in self.activation_formats:
            return
        config, device = self.config, arena.device
        most = config.max_received_rows
        rows = torch.zeros(most, config.hidden_size, dtype=config.dtype, device=device)
        pairs = torch.arange(most * config.top_k, dtype=torch.int32, device=device).view(most, config.top_k)
        local_ids = pairs % max(config.num_local_experts, 1)
        router_weights = None
        if not config.apply_router_weight_on_input:
            router_weights = torch.ones(most, config.top_k, device=device)

        def call(num_rows: int) -> None:
            workspace = arena.lease()
            stage = RouterWeightStage.BEFORE_DISPATCH if router_weights is None else RouterWeightStage.EXPERTS_GATHER
            dispatched = Dispatched(
                activations=rows[:num_rows],
                activation_format=ActivationFormat.STANDARD,
                router_weight_stage=stage,
                handle=DispatchHandle(None, num_rows, workspace),  # type: ignore[arg-type]
                local_ids=local_ids[:num_rows],
                topk_weights=None if router_weights is None else router_weights[:num_rows],
            )
            self.apply(dispatched, workspace.scoped(self.name))
            workspace.release()

        for num_rows in warm_up_rows(most):
            yield f"{self.name}, {num_rows} rows", functools.partial(call, num_rows)


def warm_up_rows(most: int) -> list[int]:
    """1 to 64, then every 5%, and `most`, the largest first: workspaces are then made once, in their final size."""
    found = set(range(1, min(most, 64) + 1)) | {most}
    rows = 64.0
    while rows < most:
        found.add(int(rows))
        rows *= 1.05
    return sorted(found - {0}, reverse=True)


class Monolithic(StrategyPart):
    """Dispatch, experts and combine as one kernel."""

    def __init__(self, config: MoEConfig, weights: ExpertWeights, arena: WorkspaceArena) -> None:
        self.config = config
        self.weights = weights
        self.arena = arena

    @abc.abstractmethod
    def apply(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The whole layer on validated inputs: [T, H]."""

    def abort(self, problem: InputError, max_num_tokens: int | None = None) -> NoReturn:
        """See PrepareAndFinalize.abort."""
        raise problem

    def check_errors(self) -> None:
        """See PrepareAndFinalize.check_errors."""


def validate_inputs(
    config: MoEConfig,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    max_num_tokens: int | None,
    out: torch.Tensor | None,
    device: torch.device | None = None,
) -> None:
    """Raises the InputError that names what is wrong with a call's arguments; looks at no values.

    device: where the layer is, when it is to be compared.
    """
    if not _are_right(config, hidden_states, topk_ids, topk_weights, max_num_tokens, device):
        _raise_what_is_wrong(config, hidden_states, topk_ids, topk_weights, max_num_tokens, device)
    if out is not None:
        shape = (hidden_states.shape[0], config.hidden_size)
        _validate_output("out", out, shape, config.dtype, hidden_states.device)


def _are_right(
    config: MoEConfig,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    max_num_tokens: int | None,
    device: torch.device | None,
) -> bool:
    """The same as `_raise_what_is_wrong` finds out, in the few steps that a call can afford."""
    try:
        num_tokens, hidden_size = hidden_states.shape
        where = hidden_states.device
        return (
            hidden_size == config.hidden_size
            and topk_ids.shape == topk_weights.shape == (num_tokens, config.top_k)
            and num_tokens <= config.max_tokens_per_rank
            and (max_num_tokens is None or num_tokens <= max_num_tokens <= config.max_tokens_per_rank)
            and hidden_states.dtype is config.dtype
            and topk_ids.dtype in ID_DTYPES
            and topk_weights.dtype in WEIGHT_DTYPES
            and topk_ids.device == topk_weights.device == where
            and (device is None or where == device)
        )
    except (AttributeError, ValueError):  # no tensor, or another number of dimensions
        return False


def _raise_what_is_wrong(
    config: MoEConfig,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    max_num_tokens: int | None,
    device: torch.device | None,
) -> None:
    for name, value in (("hidden_states", hidden_states), ("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        if not isinstance(value, torch.Tensor):
            raise DtypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if hidden_states.dim() != 2 or hidden_states.shape[1] != config.hidden_size:
        raise ShapeError(f"hidden_states must be [T, {config.hidden_size}], got {list(hidden_states.shape)}")
    num_tokens = hidden_states.shape[0]
    if hidden_states.dtype != config.dtype:
        raise DtypeError(f"hidden_states must be {dtype_name(config.dtype)}, got {dtype_name(hidden_states.dtype)}")
    for name, tensor, dtypes in (("topk_ids", topk_ids, ID_DTYPES), ("topk_weights", topk_weights, WEIGHT_DTYPES)):
        if tuple(tensor.shape) != (num_tokens, config.top_k):
            raise ShapeError(f"{name} must be {[num_tokens, config.top_k]}, got {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise DtypeError(
                f"{name} must be one of {', '.join(map(dtype_name, dtypes))}, got {dtype_name(tensor.dtype)}"
            )
        if tensor.device != hidden_states.device:
            raise InputError(
                f"{name} is on {tensor.device}, hidden_states on {hidden_states.device}; they must be together"
            )
    if device is not None and hidden_states.device != device:
        raise InputError(f"hidden_states is on {hidden_states.device}, the layer on {device}; they must be together")
    if num_tokens > config.max_tokens_per_rank:
        raise TooManyTokensError(f"{num_tokens} tokens exceed max_tokens_per_rank={config.max_tokens_per_rank}")
    if max_num_tokens is not None and not num_tokens <= max_num_tokens <= config.max_tokens_per_rank:
        raise TooManyTokensError(
            f"max_num_tokens={max_num_tokens} must lie between T={num_tokens} "
            f"and max_tokens_per_rank={config.max_tokens_per_rank}"
        )


def _validate_output(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise DtypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}, the other tensors on {device}; they must be together")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        got = f"{list(tensor.shape)} {dtype_name(tensor.dtype)}"
        raise ShapeError(f"{name} must be {list(shape)} {dtype_name(dtype)}, got {got}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise InputError(f"{name} must be contiguous in its last dimension, got strides {list(tensor.stride())}")


class MoELayer(abc.ABC):
    """A built layer, ready to call. `strategy` is its name, `report` says why it was chosen."""

    config: MoEConfig
    strategy: str
    report: Any = None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        max_num_tokens: int | None = None,
        shared_experts: Callable[[torch.Tensor], torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer.

        hidden_states: [T, H] in config.dtype; never changed.
        topk_ids: int16/32/64 [T, K], global expert ids; -1 drops the pair.
        topk_weights: fp32/bf16/fp16 [T, K], applied literally.
        max_num_tokens: the padded batch size every rank announces alike; it decides the phase and, in fixed-capacity
            dispatch, how many rows travel.
        shared_experts: called on hidden_states while tokens travel; its [T, H] result is added.
        out: where to write.
        Returns [T, H] in config.dtype. Raises InputError subclasses, CapacityError, PeerLostError.
        """
        if torch.compiler.is_compiling():
            if shared_experts is None and out is None:
                key = self.op_key
                return torch.ops.moe_plugin.moe_layer(hidden_states, topk_ids, topk_weights, key, max_num_tokens)
            with torch.no_grad():
                return self.forward(hidden_states, topk_ids, topk_weights, max_num_tokens, shared_experts, out)
        if not torch.is_grad_enabled():
            return self.forward(hidden_states, topk_ids, topk_weights, max_num_tokens, shared_experts, out)
        # What torch.no_grad() does, without the microseconds that its object costs.
        torch._C._set_grad_enabled(False)
        try:
            return self.forward(hidden_states, topk_ids, topk_weights, max_num_tokens, shared_experts, out)
        finally:
            torch._C._set_grad_enabled(True)

    def close(self) -> None:  # noqa: B027
        """Give back what would outlive the layer, such as the buffers of a communication library; its last call.

        A collective over the layer's ranks, before their process groups are destroyed.
        """

    op_key: int
    """This layer's number in the custom op `torch.ops.moe_plugin.moe_layer`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Here, since torch.compile cannot trace the making of a weak reference in the first compiled call.
        layer = super().__new__(cls)
        layer.op_key = next(_op_keys)
        _layers[layer.op_key] = layer
        return layer

    @abc.abstractmethod
    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
        shared_experts: Callable[[torch.Tensor], torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The computation behind `__call__`."""

    def counters(self) -> dict[str, int]:
        """How often calls have gone each way that a class has inside, as "class.way"; a captured call counts once."""
        return {}

    @abc.abstractmethod
    def check_errors(self) -> None:
        """Raise what calls since the last check flagged on the device (ids out of range, capacity overflow).

        A host point: synchronizes, and every rank of a group must come to it. Needed after graph replays and after
        asynchronous CUDA calls; eager calls look at the flags of the call before them.
        """


class ModularKernel(MoELayer):
    """Runs one (PrepareAndFinalize, Experts) pair."""

    def __init__(self, prepare_finalize: PrepareAndFinalize, experts: Experts) -> None:
        self.prepare_finalize = prepare_finalize
        self.experts = experts
        self.config = prepare_finalize.config
        self.strategy = f"{prepare_finalize.name}+{experts.name}"
        prepare_finalize.accommodate(type(experts))

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
        shared_experts: Callable[[torch.Tensor], torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._validate(hidden_states, topk_ids, topk_weights, max_num_tokens, out)
        if shared_experts is None:
            dispatched = self.prepare_finalize.prepare(hidden_states, topk_ids, topk_weights, max_num_tokens)
            rows = self.apply_experts(dispatched, out)
            return self.prepare_finalize.finalize(rows, dispatched.handle, out)
        receiver = self.prepare_finalize.prepare_async(hidden_states, topk_ids, topk_weights, max_num_tokens)
        shared = shared_experts(hidden_states)
        dispatched = receiver.wait()
        rows = self.apply_experts(dispatched, out)
        return self.prepare_finalize.finalize(rows, dispatched.handle, out).add_(shared)

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Dispatched:
        """Validate and dispatch."""
        self._validate(hidden_states, topk_ids, topk_weights, max_num_tokens)
        return self.prepare_finalize.prepare(hidden_states, topk_ids, topk_weights, max_num_tokens)

    def prepare_async(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
    ) -> Receiver[Dispatched]:
        """Validate and start to dispatch."""
        self._validate(hidden_states, topk_ids, topk_weights, max_num_tokens)
        return self.prepare_finalize.prepare_async(hidden_states, topk_ids, topk_weights, max_num_tokens)

    def apply_experts(self, dispatched: Dispatched, out: torch.Tensor | None = None) -> torch.Tensor:
        """The expert computation on what prepare returned. out: what finalize will be given, if known by now."""
        handle = dispatched.handle
        output = self.prepare_finalize.expert_output(handle, out)
        return self.experts.apply(dispatched, handle.workspace.scoped(self.experts.name), output)

    def finalize(
        self, expert_output: torch.Tensor, dispatched: Dispatched, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Combine into [T, H]."""
        self._validate_combine(dispatched, out)
        return self.prepare_finalize.finalize(expert_output, dispatched.handle, out)

    def finalize_async(
        self, expert_output: torch.Tensor, dispatched: Dispatched, out: torch.Tensor | None = None
    ) -> Receiver[torch.Tensor]:
        """Start to combine."""
        self._validate_combine(dispatched, out)
        return self.prepare_finalize.finalize_async(expert_output, dispatched.handle, out)

    def counters(self) -> dict[str, int]:
        return _counters_of(self.prepare_finalize, self.experts)

    def check_errors(self) -> None:
        self.prepare_finalize.check_errors()

    def close(self) -> None:
        self.prepare_finalize.close()

    def _validate_combine(self, dispatched: Dispatched, out: torch.Tensor | None) -> None:
        if not isinstance(dispatched, Dispatched):
            raise HandleError(f"finalize takes the Dispatched that prepare returned, got {type(dispatched).__name__}")
        if out is not None:
            shape = (dispatched.handle.num_tokens, self.config.hidden_size)
            _validate_output("out", out, shape, self.config.dtype, dispatched.activations.device)

    def _validate(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None,
        out: torch.Tensor | None = None,
    ) -> None:
        try:
            device = self.prepare_finalize.arena.device
            validate_inputs(self.config, hidden_states, topk_ids, topk_weights, max_num_tokens, out, device)
        except InputError as problem:
            self.prepare_finalize.abort(problem, max_num_tokens)


class MonolithicKernel(MoELayer):
    """Runs a Monolithic strategy."""

    def __init__(self, monolithic: Monolithic) -> None:
        self.monolithic = monolithic
        self.config = monolithic.config
        self.strategy = monolithic.name

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
        shared_experts: Callable[[torch.Tensor], torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        try:
            device = self.monolithic.arena.device
            validate_inputs(self.config, hidden_states, topk_ids, topk_weights, max_num_tokens, out, device)
        except InputError as problem:
            self.monolithic.abort(problem, max_num_tokens)
        result = self.monolithic.apply(hidden_states, topk_ids, topk_weights, max_num_tokens, out)
        return result if shared_experts is None else result.add_(shared_experts(hidden_states))

    def counters(self) -> dict[str, int]:
        return _counters_of(self.monolithic)

    def check_errors(self) -> None:
        self.monolithic.check_errors()


def _counters_of(*parts: StrategyPart) -> dict[str, int]:
    return {f"{part.name}.{way}": calls for part in parts for way, calls in part.counters().items()}


_layers: weakref.WeakValueDictionary[int, MoELayer] = weakref.WeakValueDictionary()
_op_keys = itertools.count()


@torch.library.custom_op("moe_plugin::moe_layer", mutates_args=())
def _moe_layer(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer: int,
    max_num_tokens: int | None,
) -> torch.Tensor:
    return _layers[layer].forward(hidden_states, topk_ids, topk_weights, max_num_tokens).contiguous()


@_moe_layer.register_fake
def _moe_layer_fake(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer: int,
    max_num_tokens: int | None,
) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
