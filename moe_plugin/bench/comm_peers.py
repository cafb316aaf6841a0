"""What dispatch and combine are compared with: bare NCCL, and DeepEP.

    nccl_raw                     all_to_all_single of exactly the payload rows, packed beforehand, splits known
    deep_ep (high throughput)    DeepEP's Buffer: layout, dispatch and combine
    deep_ep (low latency)        its low_latency_dispatch and low_latency_combine

Calls follow DeepEP V1.2 on a buffer made and sized as for our own classes. In fp8, nccl_raw and high throughput are
given rows that were quantized beforehand; low latency quantizes them itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from moe_plugin.bench.comm_exchange import CommContender, Exchange, ScalingExperts, rows_between_ranks
from moe_plugin.bench.contenders import NotInstalledError, UnsupportedError
from moe_plugin.bench.layers import Inputs
from moe_plugin.bench.results import PEER
from moe_plugin.compat import deep_ep
from moe_plugin.config import Fp8Block, MoEConfig
from moe_plugin.errors import ConfigError
from moe_plugin.quantization import GROUP_SIZE, dequantize_rows, input_group_size, quantize_rows

PREPARED_ROWS = "rows quantized beforehand"


class NcclRaw(Exchange):
    """The floor of an exchange by all-to-all: nothing is computed, packed or reduced. Rows that stay are among them.

    combine returns the rows that were sent, which is what it is checked for.
    """

    def __init__(self, config: MoEConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        rank, self._group = config.parallel.ep_rank, config.parallel.ep_group
        matrix = rows_between_ranks(config, inputs)
        self._sent, self._received = matrix[rank].tolist(), matrix[:, rank].tolist()
        home = config.expert_placement.tables(inputs.topk_ids.device).rank[:, 0][inputs.topk_ids.long()]
        ranks = torch.arange(config.parallel.ep_size, device=home.device)
        token = (home[None] == ranks[:, None, None]).any(dim=-1).nonzero()[:, 1]
        self._rows = inputs.hidden_states[token]
        self._payload = self._rows
        if config.quantization is not None:
            self.note = PREPARED_ROWS
            quantized, scales = quantize_rows(self._rows, input_group_size(config.quantization))
            self._payload = torch.cat((quantized.view(torch.uint8), scales.view(torch.uint8)), dim=1)
            self._rows = self._decoded(self._payload)
            self.row_bytes = self._payload.shape[1]
        self._arrived = self._payload.new_empty(sum(self._received), self._payload.shape[1])
        self._returned = torch.empty_like(self._rows)

    def dispatch(self) -> torch.Tensor:
        dist.all_to_all_single(self._arrived, self._payload, self._received, self._sent, group=self._group)
        return self._arrived

    def reply(self, received: torch.Tensor) -> torch.Tensor:
        return self._decoded(received)

    def combine(self, received: torch.Tensor, reply: torch.Tensor) -> torch.Tensor:
        dist.all_to_all_single(self._returned, reply, self._sent, self._received, group=self._group)
        return self._returned

    def expected(self) -> torch.Tensor:
        return self._rows

    def _decoded(self, payload: torch.Tensor) -> torch.Tensor:
        scheme, hidden = self.config.quantization, self.config.hidden_size
        if scheme is None:
            return payload
        values = payload[:, :hidden].view(torch.float8_e4m3fn)
        # A row's bytes of scales need not begin at a multiple of four.
        scales = payload[:, hidden:].contiguous().view(torch.float32)
        return dequantize_rows(values, scales, input_group_size(scheme)).to(self.config.dtype)


class DeepEpExchange(Exchange):
    """What both modes of DeepEP share."""

    def __init__(self, config: MoEConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        module, package = deep_ep.find()
        if module is None and package.version is None:
            raise NotInstalledError(deep_ep.INSTALL)
        if module is None or "Buffer" not in package.features:
            raise UnsupportedError(package.problem or f"{package.describe()} has no Buffer")
        if config.dtype != torch.bfloat16:
            raise UnsupportedError("DeepEP moves bf16 rows, or fp8 ones")
        if config.quantization not in (None, Fp8Block(GROUP_SIZE, GROUP_SIZE)):
            raise UnsupportedError(f"DeepEP's fp8 rows have a scale per {GROUP_SIZE} columns")
        if config.num_experts % config.parallel.ep_size:
            raise UnsupportedError("DeepEP needs as many experts on every rank")
        if config.quantization is not None:
            self.row_bytes = config.hidden_size + 4 * (config.hidden_size // GROUP_SIZE)
        self._experts = ScalingExperts(config, inputs.hidden_states.device)
        self._ids = inputs.topk_ids.to(getattr(module, "topk_idx_t", torch.int64))
        # Sized, made and given back as for our own classes; what is called on it is DeepEP's alone.
        self._shared = deep_ep.SharedBuffer(config.parallel.ep_group)
        self._features = package.features

    @property
    def _buffer(self) -> Any:
        return self._shared.raw

    def close(self) -> None:
        self._shared.release()


class DeepEpHighThroughput(DeepEpExchange):
    """dispatch includes get_dispatch_layout. For a graph the received rows are padded to the most there can be."""

    SMS = 24

    def __init__(self, config: MoEConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        size, hidden = config.parallel.ep_size, config.hidden_size
        if size not in (2, 4, 8):
            raise UnsupportedError(f"DeepEP runs on 2, 4 or 8 ranks of a node, not {size}")
        if hidden * 2 % 16 or (config.quantization is not None and hidden % GROUP_SIZE):
            raise UnsupportedError(f"DeepEP does not take rows of {hidden} columns")
        self.num_sms = self.SMS
        self._shared.reserve_high_throughput(2 * hidden, self.SMS)
        self._configs = deep_ep.high_throughput_configs(size, self.SMS)
        self._rows: Any = inputs.hidden_states
        if config.quantization is not None:
            self.note = PREPARED_ROWS
            self._rows = quantize_rows(inputs.hidden_states, GROUP_SIZE)
        self._worst = size * inputs.tokens if config.cuda_graph else 0

    def dispatch(self) -> Any:
        buffer = self._buffer
        per_rank, per_node, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(self._ids, self.config.num_experts)
        return buffer.dispatch(
            self._rows,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self._ids,
            topk_weights=self.inputs.topk_weights,
            num_worst_tokens=self._worst,
            config=self._configs[0],
        )

    def reply(self, received: Any) -> torch.Tensor:
        rows, local_ids, weights = received[:3]
        rows = self._experts.dequantized(*rows) if isinstance(rows, tuple) else rows
        return self._experts.standard(rows, local_ids, weights)

    def combine(self, received: Any, reply: torch.Tensor) -> torch.Tensor:
        return self._buffer.combine(reply, received[4], config=self._configs[1])[0]


class DeepEpLowLatency(DeepEpExchange):
    """Every expert's rows for themselves, combined with their router weights."""

    MOST_TOKENS, MOST_TOP_K = 1023, 11
    quantizes_by_reciprocal = True

    def __init__(self, config: MoEConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        size, hidden = config.parallel.ep_size, config.hidden_size
        # As many rows of an expert as its scales have to be a multiple of, in one of its releases.
        self._most = inputs.tokens
        while self._most * size % 128:
            self._most += 1
        runs = f"ll_hidden_{hidden}" in self._features and inputs.tokens <= self.MOST_TOKENS
        if not runs or config.top_k > self.MOST_TOP_K:
            raise UnsupportedError(
                f"its low latency is for at most {self.MOST_TOKENS} tokens, top-{self.MOST_TOP_K} and some hidden sizes"
            )
        if not self._features & {deep_ep.RDMA, deep_ep.NVLINK_ONLY, "cpu"}:
            raise UnsupportedError("its low latency needs a network card, or to be built without the check for one")
        if config.quantization is not None and hidden % 512:
            raise UnsupportedError("its low latency takes fp8 rows of a multiple of 512 columns")
        self._shared.reserve_low_latency(deep_ep.LowLatencyShape(self._most, hidden, config.num_experts))

    def dispatch(self) -> Any:
        return self._buffer.low_latency_dispatch(
            self.inputs.hidden_states,
            self._ids,
            self._most,
            self.config.num_experts,
            use_fp8=self.config.quantization is not None,
        )

    def reply(self, received: Any) -> torch.Tensor:
        rows = received[0]
        return self._experts.batched(self._experts.dequantized(*rows) if isinstance(rows, tuple) else rows)

    def combine(self, received: Any, reply: torch.Tensor) -> torch.Tensor:
        return self._buffer.low_latency_combine(reply, self._ids, self.inputs.topk_weights, received[2])[0]


PEERS: Mapping[str, tuple[CommContender, ...]] = {
    "nccl_raw": (CommContender("nccl_raw", PEER, NcclRaw),),
    "deep_ep": (
        CommContender("deep_ep (high throughput)", PEER, DeepEpHighThroughput),
        CommContender("deep_ep (low latency)", PEER, DeepEpLowLatency),
    ),
}
"""What `--peer` takes, and the lines of the table that come of it."""


def comm_peer(name: str) -> tuple[CommContender, ...]:
    """The contenders of a peer. Raises ConfigError for an unknown name."""
    if name not in PEERS:
        raise ConfigError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    return PEERS[name]


def peer_version(name: str, device_type: str) -> str:
    """Of what a peer brings with it, or "not installed"."""
    if name == "deep_ep":
        return deep_ep.probe().describe()
    if device_type == "cuda":
        return "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    return f"gloo of torch {torch.__version__}"
