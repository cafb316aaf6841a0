"""Triton grouped GEMMs with the activation, the biases and the router weights in their epilogues.

Standard: counting sort of the (row, k) pairs, gate-up GEMM gathering its rows, down GEMM writing one row per pair, sum
over k. BatchedExperts: the same two GEMMs on the rows where they lie. Nothing is read back by the host.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import torch

from moe_plugin.config import SUPPORTED_DTYPES, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.kernels.tiling import BlockConfig, block_config, cdiv, counting_sort_shapes, shared_memory_bytes
from moe_plugin.modular_kernel import ActivationFormat, Dispatched, Experts, ExpertWeights
from moe_plugin.verdict import Gate, Verdict, gate_cuda_graph, gate_dtype, gate_package, gate_quantization, gate_sm
from moe_plugin.workspace import Workspace

if TYPE_CHECKING:
    from moe_plugin.kernels.grouped_gemm import BatchedRows, SortedRows

Buffers = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class TritonFusedMoE(Experts):
    """Runs on NVIDIA GPUs from SM 80, and on a CPU in Triton's interpreter. Any H and I."""

    name = "triton_fused_moe"
    description = "Triton grouped GEMMs, activation and router weights fused; no host sync"
    activation_formats = frozenset({ActivationFormat.STANDARD, ActivationFormat.BATCHED_EXPERTS})
    deterministic = True

    def __init__(self, config: MoEConfig, weights: ExpertWeights) -> None:
        super().__init__(config, weights)
        device = weights.w13.device
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            self._shared_memory = shared_memory_bytes(10 * major + minor)
        else:
            self._shared_memory = shared_memory_bytes(None)

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        return Verdict.of(
            gate_dtype(config, *SUPPORTED_DTYPES),
            gate_quantization(config),
            gate_package(environment, "triton", "pip install triton"),
            gate_sm(environment, 80) if environment.device_type == "cuda" else _gate_interpreter(environment),
            gate_cuda_graph(config, capturable=True),
        )

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """Standard format, with as many rows as the ranks of the EP group can send to this one."""
        buffers = standard_buffers(config, config.max_received_rows, config.top_k)
        return {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in buffers.items()}

    def apply(self, dispatched: Dispatched, workspace: Workspace) -> torch.Tensor:
        """See Experts.apply. The result lies in `workspace`."""
        if dispatched.activation_format is ActivationFormat.BATCHED_EXPERTS:
            return self._apply_batched(dispatched, workspace)
        return self._apply_standard(dispatched, workspace)

    def _apply_standard(self, dispatched: Dispatched, workspace: Workspace) -> torch.Tensor:
        from moe_plugin.kernels.counting_sort import counting_sort
        from moe_plugin.kernels.grouped_gemm import SortedRows
        from moe_plugin.kernels.row_sum import pair_sum

        local_ids = dispatched.local_ids
        assert local_ids is not None
        num_rows, top_k = local_ids.shape
        specs = standard_buffers(self.config, num_rows, top_k)
        buffers = {name: workspace.tensor(name, *spec) for name, spec in specs.items()}
        output = buffers["output"]
        if self.config.num_local_experts == 0 or num_rows == 0:
            return output.zero_()

        block = block_of(self.config, num_rows, self._shared_memory)
        sort_buffers = {name: buffers[name] for name in counting_sort_shapes(0, 0, 1)}
        counting_sort(local_ids, self.config.num_local_experts, block.block_m, **sort_buffers)
        rows = SortedRows(buffers["sorted_pairs"], buffers["block_expert"], num_rows * top_k, top_k)
        pair_output = buffers["pair_output"]
        self._gemms(dispatched.activations, buffers["intermediate"], dispatched.topk_weights, pair_output, rows, block)
        return pair_sum(pair_output, local_ids, None, output, use_triton=True)

    def _apply_batched(self, dispatched: Dispatched, workspace: Workspace) -> torch.Tensor:
        from moe_plugin.kernels.grouped_gemm import BatchedRows

        activations, expert_num_tokens = dispatched.activations, dispatched.expert_num_tokens
        assert expert_num_tokens is not None
        num_experts, max_tokens, hidden_size = activations.shape
        inner = self.config.local_intermediate_size
        dtype = self.config.dtype
        intermediate = workspace.tensor("intermediate", (num_experts, max_tokens, inner), dtype)
        output = workspace.tensor("output", (num_experts, max_tokens, hidden_size), dtype)
        block = block_of(self.config, max_tokens, self._shared_memory)
        self._gemms(activations, intermediate, None, output, BatchedRows(expert_num_tokens, max_tokens), block)
        return output

    def _gemms(
        self,
        activations: torch.Tensor,
        intermediate: torch.Tensor,
        topk_weights: torch.Tensor | None,
        out: torch.Tensor,
        rows: SortedRows | BatchedRows,
        block: BlockConfig,
    ) -> None:
        from moe_plugin.kernels.grouped_gemm import down, gate_up_activation

        config, weights = self.config, self.weights
        gate_up_activation(
            activations,
            weights.w13,
            weights.w13_bias,
            intermediate,
            rows,
            block,
            config.activation,
            config.swiglu_alpha,
            config.swiglu_limit,
        )
        down(intermediate, weights.w2, weights.w2_bias, topk_weights, out, rows, block)


def _gate_interpreter(environment: Environment) -> Gate:
    seen = "interpreter on" if environment.triton_interpret else "CPU, interpreter off"
    needs = "a CUDA device, or Triton's interpreter"
    return Gate(
        "device", environment.triton_interpret, seen, needs, "set TRITON_INTERPRET=1 before moe_plugin is imported"
    )


def block_of(config: MoEConfig, num_rows: int, shared_memory: int) -> BlockConfig:
    """The tile for `num_rows` received rows (or BatchedExperts slots per expert), if routing were uniform."""
    return _block_config(cdiv(num_rows * config.top_k, config.num_experts), config.dtype, shared_memory)


_block_config = functools.lru_cache(maxsize=1024)(block_config)


def standard_buffers(config: MoEConfig, num_rows: int, top_k: int) -> Buffers:
    """Shape and dtype of each workspace buffer of a call with `num_rows` rows of `top_k` local ids."""
    num_pairs, dtype = num_rows * top_k, config.dtype
    block_m = block_of(config, num_rows, shared_memory_bytes(None)).block_m
    sort_shapes = counting_sort_shapes(num_pairs, config.num_local_experts, block_m)
    return {
        **{name: (shape, torch.int32) for name, shape in sort_shapes.items()},
        "intermediate": ((sort_shapes["sorted_pairs"][0], config.local_intermediate_size), dtype),
        "pair_output": ((num_pairs, config.hidden_size), dtype),
        "output": ((num_rows, config.hidden_size), dtype),
    }
