"""Experts in plain torch: no Triton needed, any device.

Standard: stable argsort of the (row, k) pairs by expert, two grouped GEMMs, sum over k. On a GPU with bf16 kernels for
`torch.nn.functional.grouped_mm` the segment ends never leave the device; elsewhere the host reads them once and loops
over the experts (on a CPU grouped_mm is such a loop itself, with more restrictions). Contiguous: the same without
sorting; grouped_mm then takes the rows between two segments as if they were the first one's. BatchedExperts: batched
GEMMs on the GPU, the same loop on a CPU.

fp8: the oracle's arithmetic. The loop dequantizes one expert at a time and computes in fp32, on rows that it quantizes
or that came so. bf16 GEMMs would not do: their rounding moves the intermediate by about 0.2%, which takes one in fifty
of its elements to the next e4m3 value and the result 1.7% away from the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from moe_plugin.activation import gated_activation_of
from moe_plugin.config import SUPPORTED_DTYPES, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.kernels.row_sum import row_sum
from moe_plugin.modular_kernel import CONTIGUOUS_ALIGNMENT, ActivationFormat, Dispatched, Experts, ExpertWeights
from moe_plugin.quantization import (
    FP8_DTYPE,
    GROUP_SIZE,
    dequantize_rows,
    dequantize_weights,
    fake_quantize,
    input_group_size,
)
from moe_plugin.verdict import (
    QUANTIZATIONS,
    Gate,
    Verdict,
    dtype_name,
    gate_cuda_graph,
    gate_dtype,
    gate_quantization,
)
from moe_plugin.workspace import Workspace

_grouped_mm: Callable[..., torch.Tensor] = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm


class TorchNative(Experts):
    """The portable fallback. Standard on CUDA costs one host sync a call, or none where grouped_mm has kernels."""

    name = "torch_native"
    description = "torch.nn.functional.grouped_mm where it has kernels, else one GEMM per expert"
    activation_formats = frozenset(ActivationFormat)
    takes_quantized = True
    deterministic = True

    def __init__(self, config: MoEConfig, weights: ExpertWeights) -> None:
        super().__init__(config, weights)
        device = weights.w13.device
        sm = None
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            sm = 10 * major + minor
        self._ends_stay_on_device = _why_host_sync(config, sm) is None

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        why_host_sync = _why_host_sync(config, environment.sm)
        return Verdict.of(
            gate_dtype(config, *SUPPORTED_DTYPES),
            gate_quantization(config, QUANTIZATIONS),
            Gate("torch", environment.torch_at_least(2, 8), environment.torch_version, "torch 2.8 or newer"),
            gate_cuda_graph(config, why_host_sync is None, f"the host reads the expert counts, since {why_host_sync}"),
        )

    @classmethod
    def host_syncs(cls, config: MoEConfig, environment: Environment) -> int:
        return 0 if _why_host_sync(config, environment.sm) is None else 1

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """Peak temporaries in the Standard format, with as many rows as the EP group can send to this rank."""
        num_rows = config.max_received_rows
        experts, inner, width = config.num_local_experts, config.local_intermediate_size, config.dtype.itemsize
        num_pairs = num_rows * config.top_k
        num_slots = num_pairs + experts * (CONTIGUOUS_ALIGNMENT - 1)  # as many as the Contiguous format may have
        num_slots = -(-num_slots // CONTIGUOUS_ALIGNMENT) * CONTIGUOUS_ALIGNMENT
        quantized = {
            # fp32 rows, their fp8 groups before and after; one expert's w13, as converted and as scaled.
            "quantized_rows": 3 * num_pairs * max(config.hidden_size, inner) * torch.float32.itemsize,
            "dequantized_weights": 2 * 2 * inner * config.hidden_size * torch.float32.itemsize,
        }
        return {
            **({} if config.quantization is None else quantized),
            "sorted_activations": num_pairs * config.hidden_size * width,
            "gate_up": num_slots * 2 * inner * (width + torch.float32.itemsize),
            "intermediate": num_slots * inner * (width + torch.float32.itemsize),
            "pair_output": num_slots * config.hidden_size * width,
            "output": num_rows * config.hidden_size * width,
        }

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        """See Experts.apply."""
        if dispatched.activation_format is ActivationFormat.BATCHED_EXPERTS:
            return self._apply_batched(dispatched)
        if dispatched.activation_format is ActivationFormat.CONTIGUOUS:
            return self._apply_contiguous(dispatched, output)
        return self._apply_standard(dispatched)

    def _apply_standard(self, dispatched: Dispatched) -> torch.Tensor:
        x, local_ids = dispatched.activations, dispatched.local_ids
        assert local_ids is not None
        num_experts, (num_rows, top_k) = self.config.num_local_experts, local_ids.shape
        output = x.new_empty(num_rows, self.config.hidden_size, dtype=self.config.dtype)
        if num_experts == 0 or num_rows == 0:
            return output.zero_()

        ids = local_ids.flatten()
        sorted_ids, order = torch.sort(torch.where(ids < 0, num_experts, ids), stable=True)
        experts = torch.arange(num_experts, dtype=sorted_ids.dtype, device=x.device)
        ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
        if self._ends_stay_on_device:
            pair_output = self._grouped(x[order // top_k], sorted_ids.clamp(max=num_experts - 1), ends)
        else:
            host_ends = ends.tolist()
            rows = order[: host_ends[-1]] // top_k
            scales = None if dispatched.scales is None else dispatched.scales[rows]
            pair_output = x.new_empty(len(rows), self.config.hidden_size, dtype=self.config.dtype)
            self._looped(_taken(x, rows), scales, host_ends, 1, pair_output)

        slots = torch.empty_like(order, dtype=torch.int32)
        slots[order] = torch.arange(order.numel(), dtype=torch.int32, device=x.device)
        index = torch.where(ids < 0, -1, slots).view(num_rows, top_k)
        return row_sum(pair_output, index, dispatched.topk_weights, output)

    def _grouped(self, rows: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """rows [P, H] sorted by expert, experts int [P], ends int32 [E] -> [P, H]; undefined past the last end."""
        weights = self.weights
        gate_up = _grouped_mm(rows, weights.w13.mT, offs=ends).float()
        if weights.w13_bias is not None:
            gate_up += weights.w13_bias[experts]
        output = _grouped_mm(self._activate(gate_up), weights.w2.mT, offs=ends)
        if weights.w2_bias is not None:
            output = (output.float() + weights.w2_bias[experts]).to(output.dtype)
        return output

    def _looped(
        self, rows: torch.Tensor, scales: torch.Tensor | None, ends: list[int], alignment: int, output: torch.Tensor
    ) -> None:
        """rows [P, H] sorted by expert, each one's from the end before it, rounded up to `alignment` -> output [P, H].

        scales [P, groups]: of rows that are quantized. What lies between two segments is left alone.
        """
        start = 0
        for expert, end in enumerate(ends):
            if end > start:
                of_rows = None if scales is None else scales[start:end]
                output[start:end] = self._one_expert(rows[start:end], of_rows, expert)
            start = -(-end // alignment) * alignment

    def _apply_contiguous(self, dispatched: Dispatched, output: torch.Tensor | None) -> torch.Tensor:
        x, group_ends = dispatched.activations, dispatched.group_ends
        assert group_ends is not None
        num_experts, num_slots = group_ends.numel(), x.shape[0]
        if output is None:
            output = x.new_empty(num_slots, self.config.hidden_size, dtype=self.config.dtype)
        if num_experts == 0 or num_slots == 0:
            return output
        if not self._ends_stay_on_device:
            self._looped(x, dispatched.scales, group_ends.tolist(), CONTIGUOUS_ALIGNMENT, output)
            return output
        last = CONTIGUOUS_ALIGNMENT - 1
        ends = (group_ends + last).div_(CONTIGUOUS_ALIGNMENT, rounding_mode="floor").mul_(CONTIGUOUS_ALIGNMENT)
        slots = torch.arange(num_slots, dtype=torch.int32, device=x.device)
        experts = torch.searchsorted(ends, slots, right=True).clamp_(max=num_experts - 1)
        return output.copy_(self._grouped(x, experts, ends))

    def _apply_batched(self, dispatched: Dispatched) -> torch.Tensor:
        x, expert_num_tokens, scales = dispatched.activations, dispatched.expert_num_tokens, dispatched.scales
        assert expert_num_tokens is not None
        if not x.is_cuda or self.config.quantization is not None:
            output = torch.empty(x.shape, dtype=self.config.dtype, device=x.device)
            # On CUDA all slots are computed rather than the counts read by the host.
            counts = [x.shape[1]] * x.shape[0] if x.is_cuda else expert_num_tokens.tolist()
            for expert, count in enumerate(counts):
                if count:
                    of_rows = None if scales is None else scales[expert, :count]
                    output[expert, :count] = self._one_expert(x[expert, :count], of_rows, expert)
            return output
        weights = self.weights
        gate_up = torch.bmm(x, weights.w13.mT).float()
        if weights.w13_bias is not None:
            gate_up += weights.w13_bias[:, None]
        output = torch.bmm(self._activate(gate_up), weights.w2.mT)
        if weights.w2_bias is not None:
            output = (output.float() + weights.w2_bias[:, None]).to(output.dtype)
        return output

    def _one_expert(self, rows: torch.Tensor, scales: torch.Tensor | None, expert: int) -> torch.Tensor:
        """rows [P, H] of one expert, with scales [P, groups] if they are quantized -> [P, H]."""
        weights = self.weights
        if self.config.quantization is not None:
            return self._one_quantized_expert(rows, scales, expert)
        gate_up = (rows @ weights.w13[expert].T).float()
        if weights.w13_bias is not None:
            gate_up += weights.w13_bias[expert]
        output = self._activate(gate_up) @ weights.w2[expert].T
        if weights.w2_bias is not None:
            output = (output.float() + weights.w2_bias[expert]).to(output.dtype)
        return output

    def _one_quantized_expert(self, rows: torch.Tensor, scales: torch.Tensor | None, expert: int) -> torch.Tensor:
        """`_one_expert` as the oracle computes it."""
        config, weights, scheme = self.config, self.weights, self.config.quantization
        assert scheme is not None and weights.w13_scale is not None and weights.w2_scale is not None
        one = slice(expert, expert + 1)
        if scales is None:
            quantized = fake_quantize(rows, input_group_size(scheme), weights.a13_scale)
        else:
            quantized = dequantize_rows(rows, scales, GROUP_SIZE if scales.shape[1] > 1 else None)
        gate_up = quantized @ dequantize_weights(weights.w13[one], weights.w13_scale[one], scheme, halves=2)[0].T
        if weights.w13_bias is not None:
            gate_up += weights.w13_bias[expert]
        static_scale = None if weights.a2_scale is None else weights.a2_scale[expert]
        intermediate = fake_quantize(gated_activation_of(config, gate_up), GROUP_SIZE, static_scale)
        output = intermediate @ dequantize_weights(weights.w2[one], weights.w2_scale[one], scheme)[0].T
        if weights.w2_bias is not None:
            output += weights.w2_bias[expert]
        return output.to(config.dtype)

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """fp32 [..., 2I] -> [..., I] in the layer's dtype."""
        return gated_activation_of(self.config, gate_up).to(self.config.dtype)


def _taken(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows]; as bytes in fp8, for which torch has no indexing on every device."""
    return x.view(torch.uint8)[rows].view(FP8_DTYPE) if x.dtype is FP8_DTYPE else x[rows]


def _why_host_sync(config: MoEConfig, sm: int | None) -> str | None:
    """Why grouped_mm cannot take the segment ends from the device, or None where it can."""
    if sm is None:
        return "there is no CUDA device"
    if sm // 10 not in (9, 10):
        return f"grouped_mm has kernels for SM 9x and 10x, not {sm}"
    if config.quantization is not None:
        return f"grouped_mm rounds to bf16 what {config.quantization.name} needs in fp32"
    if config.dtype is not torch.bfloat16:
        return f"grouped_mm has bf16 kernels, not {dtype_name(config.dtype)}"
    for size in (config.hidden_size, config.local_intermediate_size):
        if size % 8:
            return f"grouped_mm needs sizes in multiples of 8, not {size}"
    return None
