"""Triton grouped GEMMs with the activation, the biases and, for fp8, the quantization in their epilogues.

Standard: counting sort of the (row, k) pairs, gate-up GEMM gathering its rows, down GEMM, and per row the sum over k of
its slots, where router weights are applied. BatchedExperts: the same two GEMMs on the rows where they lie. For fp8 the
rows are quantized first, once each, unless the dispatcher already did. Nothing is read back by the host.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch

from moe_plugin.config import SUPPORTED_DTYPES, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.kernels.tiling import (
    BlockConfig,
    block_config,
    cdiv,
    counting_sort_shapes,
    down_block_config,
    shared_memory_bytes,
)
from moe_plugin.modular_kernel import ActivationFormat, Dispatched, Experts, ExpertWeights
from moe_plugin.quantization import GROUP_SIZE, has_static_activations, input_group_size
from moe_plugin.verdict import (
    QUANTIZATIONS,
    Gate,
    Verdict,
    gate_cuda_graph,
    gate_dtype,
    gate_package,
    gate_quantization,
    gate_sm,
)
from moe_plugin.workspace import Workspace

if TYPE_CHECKING:
    from moe_plugin.kernels.grouped_gemm import BatchedRows, SortedRows

Buffers = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class TritonFusedMoE(Experts):
    """Runs on NVIDIA GPUs from SM 80, fp8 from SM 89, and on a CPU in Triton's interpreter. Any H and I."""

    name = "triton_fused_moe"
    description = "Triton grouped GEMMs, activation and quantization fused; no host sync"
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
            gate_quantization(config, QUANTIZATIONS),
            gate_package(environment, "triton", "pip install triton"),
            _gate_device(config, environment),
            gate_cuda_graph(config, capturable=True),
        )

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """Standard format, with as many rows as the ranks of the EP group can send to this one."""
        num_rows = config.max_received_rows
        buffers = dict(standard_buffers(config, num_rows, config.top_k))
        buffers["output"] = ((num_rows, config.hidden_size), config.dtype)
        return {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in buffers.items()}

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        """See Experts.apply. Without `output` the result lies in `workspace`."""
        if dispatched.activation_format is ActivationFormat.BATCHED_EXPERTS:
            return self._apply_batched(dispatched, workspace, output)
        return self._apply_standard(dispatched, workspace, output)

    def _apply_standard(
        self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None
    ) -> torch.Tensor:
        from moe_plugin.kernels.counting_sort import counting_sort
        from moe_plugin.kernels.grouped_gemm import SortedRows
        from moe_plugin.kernels.row_sum import row_sum

        config, local_ids = self.config, dispatched.local_ids
        assert local_ids is not None
        num_rows, top_k = local_ids.shape
        if output is None:
            output = workspace.tensor("output", (num_rows, config.hidden_size), config.dtype)
        if config.num_local_experts == 0 or num_rows == 0:
            return output.zero_()

        def make_buffers() -> dict[str, torch.Tensor]:
            return _tensors(workspace, standard_buffers(config, num_rows, top_k))

        buffers = workspace.cached(("standard", num_rows, top_k), make_buffers)
        block = block_of(config, num_rows, self._shared_memory)
        sort_buffers = {name: buffers[name] for name in counting_sort_shapes(0, 0, 0, 1)}
        counting_sort(local_ids, config.num_local_experts, block.block_m, **sort_buffers)
        rows = SortedRows(buffers["sorted_pairs"], buffers["block_expert"], num_rows * top_k, top_k)
        self._gemms(dispatched, buffers, buffers["slot_output"], rows, block)
        weights, slots = dispatched.topk_weights, buffers["slot_of_pair"]
        return row_sum(buffers["slot_output"], slots, weights, output, use_triton=True)

    def _apply_batched(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None) -> torch.Tensor:
        from moe_plugin.kernels.grouped_gemm import BatchedRows

        config, expert_num_tokens = self.config, dispatched.expert_num_tokens
        assert expert_num_tokens is not None
        shape = tuple(dispatched.activations.shape)
        max_tokens = shape[1]

        def make_buffers() -> dict[str, torch.Tensor]:
            return _tensors(workspace, _gemm_buffers(config, shape[:2], shape[:2]))

        buffers = workspace.cached(("batched", shape), make_buffers)
        if output is None:
            output = workspace.tensor("output", shape, config.dtype)
        block = block_of(config, max_tokens, self._shared_memory)
        self._gemms(dispatched, buffers, output, BatchedRows(expert_num_tokens, max_tokens), block)
        return output

    def _gemms(
        self,
        dispatched: Dispatched,
        buffers: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        rows: SortedRows | BatchedRows,
        block: BlockConfig,
    ) -> None:
        """Quantization and both GEMMs, to one row of `out` per slot."""
        from moe_plugin.kernels.grouped_gemm import down, gate_up_activation

        config, weights = self.config, self.weights
        x, x_scale = self._quantized(dispatched, buffers)
        intermediate, intermediate_scale = buffers["intermediate"], weights.a2_scale
        if "intermediate_scale" in buffers:
            # Scales of a group lie next to each other, since a tile of rows reads one group at a time.
            intermediate_scale = buffers["intermediate_scale"].mT
        gate_up_activation(
            x,
            weights.w13,
            weights.w13_bias,
            intermediate,
            rows,
            block,
            config.activation,
            config.swiglu_alpha,
            config.swiglu_limit,
            x_scale=x_scale,
            w13_scale=weights.w13_scale,
            out_scale=intermediate_scale,
        )
        down(
            intermediate,
            weights.w2,
            weights.w2_bias,
            out,
            rows,
            down_block_config(block, config.weight_dtype, self._shared_memory),
            x_scale=intermediate_scale,
            w2_scale=weights.w2_scale,
        )

    def _quantized(
        self, dispatched: Dispatched, buffers: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows in the dtype of the weights, with their scales for fp8."""
        from moe_plugin.kernels.quantize_rows import quantize_rows

        activations, static_scale = dispatched.activations, self.weights.a13_scale
        if self.config.quantization is None or dispatched.scales is not None:
            return activations, dispatched.scales
        scales = None if static_scale is not None else buffers["activation_scale"]
        # In the Standard format all rows are some expert's, or not there.
        expert_num_tokens = dispatched.expert_num_tokens if activations.dim() == 3 else None
        quantize_rows(
            activations,
            buffers["activations"],
            scales,
            static_scale=static_scale,
            expert_num_tokens=expert_num_tokens,
        )
        return buffers["activations"], static_scale if scales is None else scales


def _gate_device(config: MoEConfig, environment: Environment) -> Gate:
    if environment.device_type != "cuda":
        return _gate_interpreter(environment)
    if config.quantization is None:
        return gate_sm(environment, 80)
    return replace(gate_sm(environment, 89), needs="SM 89 or newer, since Triton has no fp8 e4m3 before it")


def _gate_interpreter(environment: Environment) -> Gate:
    seen = "interpreter on" if environment.triton_interpret else "CPU, interpreter off"
    needs = "a CUDA device, or Triton's interpreter"
    return Gate(
        "device", environment.triton_interpret, seen, needs, "set TRITON_INTERPRET=1 before moe_plugin is imported"
    )


def block_of(config: MoEConfig, num_rows: int, shared_memory: int) -> BlockConfig:
    """The tile for `num_rows` received rows (or BatchedExperts slots per expert), if routing were uniform."""
    return _block_config(cdiv(num_rows * config.top_k, config.num_experts), config.weight_dtype, shared_memory)


_block_config = functools.lru_cache(maxsize=1024)(block_config)


def standard_buffers(config: MoEConfig, num_rows: int, top_k: int) -> Buffers:
    """Shape and dtype of each workspace buffer of a call with `num_rows` rows of `top_k` local ids."""
    block_m = block_of(config, num_rows, shared_memory_bytes(None)).block_m
    sort_shapes = counting_sort_shapes(num_rows, top_k, config.num_local_experts, block_m)
    slots = sort_shapes["sorted_pairs"]
    return {
        **{name: (shape, torch.int32) for name, shape in sort_shapes.items()},
        **_gemm_buffers(config, (num_rows,), slots),
        "slot_output": ((*slots, config.hidden_size), config.dtype),
    }


def _gemm_buffers(config: MoEConfig, rows: tuple[int, ...], slots: tuple[int, ...]) -> Buffers:
    """What both formats need, for activations [*rows, H] and an intermediate [*slots, I]."""
    scheme, hidden, inner = config.quantization, config.hidden_size, config.local_intermediate_size
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"intermediate": ((*slots, inner), config.weight_dtype)}
    if scheme is not None:
        buffers["activations"] = ((*rows, hidden), config.weight_dtype)
        if not has_static_activations(scheme):
            groups = cdiv(hidden, input_group_size(scheme) or hidden)
            buffers["activation_scale"] = ((*rows, groups), torch.float32)
            buffers["intermediate_scale"] = ((*slots[:-1], cdiv(inner, GROUP_SIZE), slots[-1]), torch.float32)
    return buffers


def _tensors(workspace: Workspace, buffers: Buffers) -> dict[str, torch.Tensor]:
    return {name: workspace.tensor(name, *spec) for name, spec in buffers.items()}
