"""What a mixture-of-experts layer is and how it is spread over ranks: frozen, validated once.

Letters used throughout: T tokens, E experts, K top-k, H hidden size, I intermediate size, R ranks.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from moe_plugin.errors import ConfigError

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DISPATCH_TRANSPORTS = ("nvlink", "collective", "hybrid_ep")
"""What can move the rows of hybrid_dense_routing inside a node."""


class Activation(str, enum.Enum):
    """Gated activation between the two expert GEMMs; w13 holds the gate rows first, then the up rows."""

    SILU_AND_MUL = "silu_and_mul"
    """silu(gate) * up: Mixtral, Qwen-MoE, DeepSeek."""
    GELU_AND_MUL = "gelu_and_mul"
    """gelu(gate, tanh approximation) * up."""
    SWIGLU_OAI = "swiglu_oai"
    """gpt-oss: gate <= limit, |up| <= limit, then (up + 1) * gate * sigmoid(alpha * gate)."""


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """Base of the quantization schemes; `None` in MoEConfig means unquantized."""

    @property
    def name(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, slots=True)
class Fp8PerTensor(QuantConfig):
    """e4m3, one fp32 scale per expert matrix; activation scale given (static) or measured per call (dynamic)."""

    static_activations: bool = False

    @property
    def name(self) -> str:
        return "fp8_per_tensor"


@dataclass(frozen=True, slots=True)
class Fp8PerToken(QuantConfig):
    """e4m3, one fp32 scale per activation row and one per weight output channel."""

    @property
    def name(self) -> str:
        return "fp8_per_token"


@dataclass(frozen=True, slots=True)
class Fp8Block(QuantConfig):
    """e4m3, activations in groups of 1 x block_k, weights in tiles of block_n x block_k (DeepSeek-V3's scheme)."""

    block_n: int = 128
    block_k: int = 128

    def __post_init__(self) -> None:
        if self.block_n < 1 or self.block_k < 1:
            raise ConfigError(f"fp8 blocks must be positive, got {self.block_n} x {self.block_k}")

    @property
    def name(self) -> str:
        return "fp8_block"


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Which rank holds which expert, and in which slot of its weights.

    `experts_of_rank[r][s]` is the logical expert in slot `s` of rank `r`. An expert may stand on several ranks
    (redundant replicas); tokens then take turns over the replicas by their index, so the choice is reproducible.
    """

    num_experts: int
    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for rank, experts in enumerate(self.experts_of_rank):
            wrong = [e for e in experts if not 0 <= e < self.num_experts]
            if wrong:
                raise ConfigError(
                    f"placement of rank {rank} names expert {wrong[0]}; valid are 0 to {self.num_experts - 1}"
                )
            if len(set(experts)) != len(experts):
                raise ConfigError(f"placement of rank {rank} names an expert twice: {experts}")
        missing = set(range(self.num_experts)) - {e for experts in self.experts_of_rank for e in experts}
        if missing:
            raise ConfigError(f"no rank holds expert {min(missing)} ({len(missing)} experts are placed nowhere)")

    @classmethod
    def linear(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Consecutive experts share a rank; the first `num_experts % num_ranks` ranks hold one more."""
        base, extra = divmod(num_experts, num_ranks)
        starts = [rank * base + min(rank, extra) for rank in range(num_ranks + 1)]
        return cls(num_experts, tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts)))

    @classmethod
    def round_robin(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Expert e lives on rank e % num_ranks."""
        return cls(num_experts, tuple(tuple(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)))

    @classmethod
    def from_table(cls, num_experts: int, experts_of_rank: Sequence[Sequence[int]]) -> ExpertPlacement:
        """An explicit table, replicas allowed."""
        return cls(num_experts, tuple(tuple(int(e) for e in experts) for experts in experts_of_rank))

    @property
    def num_ranks(self) -> int:
        return len(self.experts_of_rank)

    @property
    def max_replicas(self) -> int:
        return max(len(places) for places in self._places())

    @property
    def slots_per_rank(self) -> int:
        """Experts of the rank that holds most, replicas counted."""
        return max(map(len, self.experts_of_rank))

    def num_local_experts(self, rank: int) -> int:
        """Experts that `rank` holds, replicas counted."""
        return len(self.experts_of_rank[rank])

    def _places(self) -> list[list[tuple[int, int]]]:
        places: list[list[tuple[int, int]]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.experts_of_rank):
            for slot, expert in enumerate(experts):
                places[expert].append((rank, slot))
        return places

    def tables(self, device: torch.device | str) -> PlacementTables:
        """The placement as device tensors, for lookup by expert id."""
        places = self._places()
        width = max(len(p) for p in places)
        # Replicas repeat cyclically to fill the row: an index modulo the count never meets padding.
        rows = [[p[i % len(p)] for i in range(width)] for p in places]
        table = torch.tensor(rows, dtype=torch.int32)
        return PlacementTables(
            rank=table[..., 0].contiguous().to(device),
            slot=table[..., 1].contiguous().to(device),
            num_replicas=torch.tensor([len(p) for p in places], dtype=torch.int32).to(device),
        )


@dataclass(frozen=True, slots=True)
class PlacementTables:
    """ExpertPlacement on a device: rank and slot int32 [E, max_replicas], num_replicas int32 [E]."""

    rank: torch.Tensor
    slot: torch.Tensor
    num_replicas: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the layer is spread. Ranks of `ep_group` hold different experts and different tokens; ranks of `tp_group`
    hold the same tokens and a slice of every local expert's intermediate size.

    Give process groups to run, or sizes alone to ask about a deployment. Data parallelism is what `ep_group`
    already expresses (every EP rank brings its own tokens); `dp_size` describes the deployment in the report and is
    compared between ranks, as is `num_nodes`: ranks of a node are consecutive, and hybrid_dense_routing takes a token
    to a node once.
    """

    ep_group: Any = None
    tp_group: Any = None
    ep_size: int = 1
    ep_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    dp_size: int = 1
    num_nodes: int = 1
    timeout_seconds: float = 30.0

    def __post_init__(self) -> None:
        for axis in ("ep", "tp"):
            group = getattr(self, f"{axis}_group")
            if group is not None:
                import torch.distributed as dist

                object.__setattr__(self, f"{axis}_size", dist.get_world_size(group))
                object.__setattr__(self, f"{axis}_rank", dist.get_rank(group))
            size, rank = getattr(self, f"{axis}_size"), getattr(self, f"{axis}_rank")
            if size < 1 or not 0 <= rank < size:
                raise ConfigError(f"{axis}_rank {rank} does not lie in [0, {axis}_size={size})")
        if self.dp_size < 1:
            raise ConfigError(f"dp_size must be positive, got {self.dp_size}")
        if self.timeout_seconds <= 0:
            raise ConfigError(f"timeout_seconds must be positive, got {self.timeout_seconds}")
        if self.num_nodes < 1 or self.world_size % self.num_nodes:
            raise ConfigError(f"{self.world_size} ranks do not spread evenly over num_nodes={self.num_nodes}")

    @property
    def world_size(self) -> int:
        return self.ep_size * self.tp_size


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """One mixture-of-experts layer.

    num_experts: E, over all ranks.
    top_k: K, experts per token.
    hidden_size: H.
    intermediate_size: I of the whole layer; a TP rank holds I / tp_size of it.
    activation: the gated activation; `swiglu_alpha` and `swiglu_limit` belong to SWIGLU_OAI.
    dtype: of activations and outputs (bf16, fp16, fp32), and of the weights unless quantized.
    quantization: None, Fp8PerTensor(), Fp8PerToken() or Fp8Block().
    has_bias: w13 and w2 come with biases [E, 2I] and [E, H].
    placement: which rank holds which expert; linear when None.
    max_tokens_per_rank: the largest T of any call; buffers are sized by it.
    cuda_graph: calls will be captured in a CUDA graph: no host sync, shapes from T alone.
    dispatch_capacity: rows per (source, destination) rank pair in fixed-capacity dispatch; max_tokens_per_rank,
        which cannot overflow, when None.
    dispatch_num_sms: SMs that kernels which move rows between GPUs may take; the rest is free for what runs meanwhile.
    dispatch_permute: let dispatch bring rows into expert-grouped order where it can, over NVLink for experts that take
        the Contiguous format, at the price of buffers for every token wanting all its experts of one rank, and of as
        many SMs again, which copy rows while others arrive.
    dispatch_transport: what moves the rows of hybrid_dense_routing inside a node: "nvlink" for kernels that write into
        peers' memory, "collective" for torch.distributed, "hybrid_ep" for DeepEP's HybridEPBuffer; when None, the first
        where they can run, else the second.
    decode_max_tokens: a call announced with at most this many tokens per rank is in the decode phase.
    apply_router_weight_on_input: multiply a token by its router weight before the experts (top_k 1 only).
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype = torch.bfloat16
    activation: Activation = Activation.SILU_AND_MUL
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    quantization: QuantConfig | None = None
    has_bias: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    placement: ExpertPlacement | None = None
    max_tokens_per_rank: int = 4096
    cuda_graph: bool = False
    dispatch_capacity: int | None = None
    dispatch_num_sms: int = 24
    dispatch_permute: bool = False
    dispatch_transport: str | None = None
    decode_max_tokens: int = 256
    apply_router_weight_on_input: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "activation", Activation(self.activation))
        except ValueError as problem:
            names = ", ".join(activation.value for activation in Activation)
            raise ConfigError(f"activation must be one of {names}, got {self.activation!r}") from problem
        for name in (
            "num_experts",
            "top_k",
            "hidden_size",
            "intermediate_size",
            "max_tokens_per_rank",
            "decode_max_tokens",
            "dispatch_num_sms",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if self.dtype not in SUPPORTED_DTYPES:
            raise ConfigError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")
        if self.quantization is not None and not isinstance(self.quantization, QuantConfig):
            raise ConfigError(f"quantization must be None or a QuantConfig, got {self.quantization!r}")
        if self.intermediate_size % self.parallel.tp_size:
            raise ConfigError(
                f"intermediate_size {self.intermediate_size} is not divisible by tp_size {self.parallel.tp_size}"
            )
        if isinstance(self.quantization, Fp8Block) and self.parallel.tp_size > 1:
            for block in (self.quantization.block_n, self.quantization.block_k):
                if self.local_intermediate_size % block:
                    raise ConfigError(
                        f"intermediate_size {self.intermediate_size} over tp_size {self.parallel.tp_size} leaves "
                        f"{self.local_intermediate_size} columns to a rank; with {self.quantization.name} it must be "
                        f"a multiple of {block}, so that no tile is cut in two"
                    )
        if self.apply_router_weight_on_input and self.top_k != 1:
            raise ConfigError(f"apply_router_weight_on_input is defined for top_k 1 only, got top_k {self.top_k}")
        if self.dispatch_capacity is not None and self.dispatch_capacity < 1:
            raise ConfigError(f"dispatch_capacity must be positive, got {self.dispatch_capacity}")
        if self.dispatch_transport not in (None, *DISPATCH_TRANSPORTS):
            names = ", ".join(DISPATCH_TRANSPORTS)
            raise ConfigError(f"dispatch_transport must be one of {names}, or None, got {self.dispatch_transport!r}")
        if self.placement is None:
            object.__setattr__(self, "placement", ExpertPlacement.linear(self.num_experts, self.parallel.ep_size))
        elif (self.placement.num_experts, self.placement.num_ranks) != (self.num_experts, self.parallel.ep_size):
            raise ConfigError(
                f"placement is for {self.placement.num_experts} experts on {self.placement.num_ranks} ranks, "
                f"the layer has {self.num_experts} on {self.parallel.ep_size}"
            )

    @property
    def expert_placement(self) -> ExpertPlacement:
        """The placement, never None."""
        assert self.placement is not None
        return self.placement

    @property
    def num_local_experts(self) -> int:
        return self.expert_placement.num_local_experts(self.parallel.ep_rank)

    @property
    def local_intermediate_size(self) -> int:
        return self.intermediate_size // self.parallel.tp_size

    @property
    def max_received_rows(self) -> int:
        """Most rows that one call can send to one rank: every rank's tokens, or a fixed capacity from each."""
        capacity = self.dispatch_capacity if self.cuda_graph else None
        from_each = self.max_tokens_per_rank if capacity is None else capacity * self.parallel.tp_size
        return from_each * self.parallel.ep_size

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype if self.quantization is None else torch.float8_e4m3fn

    def shared_fields(self) -> dict[str, str]:
        """What all ranks of a group must agree on, as text."""
        own = {"ep_group", "tp_group", "ep_rank", "tp_rank"}
        shared = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "parallel"}
        parallel = {
            f"parallel.{f.name}": str(getattr(self.parallel, f.name))
            for f in fields(self.parallel)
            if f.name not in own
        }
        return shared | parallel
