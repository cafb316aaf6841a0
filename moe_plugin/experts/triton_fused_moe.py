"""Triton grouped GEMMs with the activation, the biases and, for fp8, the quantization in their epilogues.

Standard: counting sort of the (row, k) pairs, gate-up GEMM gathering its rows, down GEMM, and per row the sum over k of
its slots, where router weights are applied. BatchedExperts and Contiguous: the same two GEMMs on the rows where they
lie, over a list of the blocks that hold any (but not in BatchedExperts off Hopper). For fp8 the rows are quantized
first, once each, unless the dispatcher already did. Nothing is read back by the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from moe_plugin.config import SUPPORTED_DTYPES, Fp8Block, Fp8PerToken, MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.kernels.hopper_tiling import (
    HopperTiles,
    batched_hopper_tiles,
    hopper_verdict,
    weights_take_tma,
)
from moe_plugin.kernels.launch_sequence import LaunchSequence, one_object
from moe_plugin.kernels.tile_tables import (
    HOPPER,
    PORTABLE,
    PortableTiles,
    TileLookup,
    Tiles,
    block_rows,
    heuristic_tiles,
    largest_calls,
)
from moe_plugin.kernels.tiling import (
    cdiv,
    counting_sort_shapes,
    shared_memory_bytes,
)
from moe_plugin.modular_kernel import CONTIGUOUS_ALIGNMENT, ActivationFormat, Dispatched, Experts, ExpertWeights
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
    from moe_plugin.kernels.grouped_gemm import BatchedRows, ListedRows, SortedRows
    from moe_plugin.kernels.hopper_gemm import Fp8Scales
    from moe_plugin.kernels.launcher import Launch

logger = logging.getLogger(__name__)

Buffers = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class TritonFusedMoE(Experts):
    """Runs on NVIDIA GPUs from SM 80, fp8 from SM 89, and on a CPU in Triton's interpreter. Any H and I."""

    name = "triton_fused_moe"
    description = "Triton grouped GEMMs, activation and quantization fused; no host sync"
    activation_formats = frozenset(ActivationFormat)
    takes_quantized = True
    writes_strided = True
    deterministic = True

    def __init__(self, config: MoEConfig, weights: ExpertWeights) -> None:
        super().__init__(config, weights)
        device = weights.w13.device
        self._shared_memory, self.num_sms = shared_memory_bytes(None), 0
        self._hopper = False
        device_name = device.type
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            self._shared_memory = shared_memory_bytes(10 * major + minor)
            properties = torch.cuda.get_device_properties(device)
            self.num_sms, device_name = properties.multi_processor_count, properties.name
            self._hopper = hopper_verdict(config, Environment.probe("cuda")).ok
            if self._hopper and not (weights_take_tma(weights.w13) and weights_take_tma(weights.w2)):
                logger.warning(
                    "%s: weights are strided or unaligned, so the portable kernels run, not Hopper's", self.name
                )
                self._hopper = False
        self.tiles = TileLookup(config, device_name, self._shared_memory)
        given = ((field.name, getattr(weights, field.name)) for field in fields(weights))
        present = [(name, tensor) for name, tensor in given if tensor is not None]
        self.weight_tensors = [tensor for _, tensor in present]
        # All that launches depend on besides tiles, the arguments of `apply` and where the weights lie.
        self._facts = (
            tuple(config.shared_fields().items()),
            (config.num_local_experts, self._hopper, self.num_sms),
            tuple((name, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in present),
        )
        self._plans: dict[tuple[TileLookup, str, int], tuple[Tiles, object]] = {}

    @property
    def kernels(self) -> str:
        """Which grouped GEMMs run in the Standard format: "hopper" or "portable"."""
        return HOPPER if self._hopper else PORTABLE

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
        """Standard or Contiguous format, with as many rows as the ranks of the EP group can send to this one."""
        return cls.memory_of_rows(config, config.max_received_rows)

    @staticmethod
    def memory_of_rows(config: MoEConfig, num_rows: int) -> Mapping[str, int]:
        """The same for calls of up to `num_rows` received rows."""
        buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        # Which kernels run, and in which tiles, depends on the machine: the largest need counts.
        for kernels, rows, rows_of_block in largest_calls(config, num_rows):
            needs = hopper_buffers if kernels == HOPPER else standard_buffers
            slots = contiguous_slots(config, rows)
            for name, spec in (
                *needs(config, rows, config.top_k, rows_of_block).items(),
                *segment_buffers(config, slots, rows_of_block).items(),
                ("slot_output", ((slots, config.hidden_size), config.dtype)),
            ):
                buffers[name] = max(buffers.get(name, spec), spec, key=lambda each: prod(each[0]))
        buffers["output"] = ((num_rows, config.hidden_size), config.dtype)
        return {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in buffers.items()}

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> Mapping[str, str]:
        verdict = hopper_verdict(config, environment)
        words = "hopper: TMA, wgmma, warp specialization" if verdict.ok else f"portable: {verdict.reason}"
        return {"kernels": words}

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        """See Experts.apply. Without `output` the result lies in `workspace`."""
        if dispatched.activation_format is ActivationFormat.BATCHED_EXPERTS:
            return self._apply_batched(dispatched, workspace, output)
        if dispatched.activation_format is ActivationFormat.CONTIGUOUS:
            return self._apply_contiguous(dispatched, workspace, output)
        return self._apply_standard(dispatched, workspace, output)

    def takes_scales(self, scales: torch.Tensor | None) -> bool:
        """Whether scales that came with the rows, if any, are those that the rows would be given here."""
        return scales is None or (scales.shape[-1] == input_groups(self.config) and scales.dtype is torch.float32)

    def _apply_standard(
        self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None
    ) -> torch.Tensor:
        config, local_ids = self.config, dispatched.local_ids
        assert local_ids is not None
        num_rows = local_ids.shape[0]
        if output is None:
            output = workspace.tensor("output", (num_rows, config.hidden_size), config.dtype)
        if num_rows == 0 or self.weights.w13.shape[0] == 0:
            return output.zero_()
        on_hopper = self._hopper and self.takes_scales(dispatched.scales)
        tiles, kind = self._plan(HOPPER if on_hopper else PORTABLE, num_rows)

        def launches() -> list[Launch]:
            describe: Any = self._hopper_launches if on_hopper else self._standard_launches
            return describe(dispatched, local_ids, workspace, output, tiles)

        tensors = (dispatched.activations, local_ids, dispatched.topk_weights, dispatched.scales, output)
        self._run(kind, local_ids.shape, tensors, workspace, launches)
        return output

    def _plan(self, kernels: str, num_rows: int) -> tuple[Tiles, object]:
        """The tiles for `num_rows` rows, and an object that stands for the tiles and all other facts of the layer."""
        plan = self._plans.get((self.tiles, kernels, num_rows))
        if plan is None:
            lookups: dict[str, Callable[[int], Tiles]]
            lookups = {
                HOPPER: self.tiles.hopper,
                PORTABLE: self.tiles.portable,
                _BATCHED: self.tiles.batched,
                _BATCHED_HOPPER: self._batched_tiles,
                _CONTIGUOUS: self.tiles.portable,
                _CONTIGUOUS_HOPPER: self.tiles.hopper,
            }
            tiles = lookups[kernels](num_rows)
            plan = tiles, one_object(kernels, tiles, self._facts)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[self.tiles, kernels, num_rows] = plan
        return plan

    def _run(
        self,
        kind: object,
        shape: Hashable,
        tensors: Sequence[torch.Tensor | None],
        workspace: Workspace,
        launches: Callable[[], Sequence[Launch]],
    ) -> None:
        """Launch; with what is known of a call of the same kind and layouts, whichever layer's, if there was one.

        shape: from which, with the configuration, those of all tensors follow.
        """
        layouts = [None if each is None else (each.dtype, each.stride()) for each in tensors]
        sequence = workspace.cached((kind, shape, *layouts), LaunchSequence)
        sequence([each for each in tensors if each is not None] + self.weight_tensors, launches)

    def _standard_launches(
        self,
        dispatched: Dispatched,
        local_ids: torch.Tensor,
        workspace: Workspace,
        output: torch.Tensor,
        tiles: PortableTiles,
    ) -> list[Launch]:
        from moe_plugin.kernels.counting_sort import counting_sort_launches
        from moe_plugin.kernels.grouped_gemm import SortedRows
        from moe_plugin.kernels.row_sum import row_sum_launches

        config = self.config
        num_rows, top_k = local_ids.shape
        buffers = _tensors(workspace, standard_buffers(config, num_rows, top_k, tiles.block_m))
        sort_buffers = {name: buffers[name] for name in counting_sort_shapes(0, 0, 0, 1)}
        rows = SortedRows(buffers["sorted_pairs"], buffers["block_expert"], num_rows * top_k, top_k)
        slot_output, slots = buffers["slot_output"], buffers["slot_of_pair"]
        return [
            *counting_sort_launches(local_ids, config.num_local_experts, tiles.block_m, **sort_buffers),
            *self._gemm_launches(dispatched, buffers, slot_output, rows, tiles),
            *row_sum_launches(slot_output, slots, dispatched.topk_weights, output),
        ]

    def _hopper_launches(
        self,
        dispatched: Dispatched,
        local_ids: torch.Tensor,
        workspace: Workspace,
        output: torch.Tensor,
        tiles: HopperTiles,
    ) -> list[Launch]:
        """Rows are copied to slot order first, so that TMA can load them in tiles; fp8: quantized on the way, or moved
        with the scales that they came with."""
        from moe_plugin.kernels import hopper_gemm
        from moe_plugin.kernels.counting_sort import counting_sort_launches
        from moe_plugin.kernels.quantize_rows import permute_rows_launches
        from moe_plugin.kernels.row_sum import row_sum_launches

        config, weights, num_sms = self.config, self.weights, self.num_sms
        num_rows, top_k = local_ids.shape
        buffers = _tensors(workspace, hopper_buffers(config, num_rows, top_k, tiles.block_x))
        sort_buffers = {name: buffers[name] for name in counting_sort_shapes(0, 0, 0, 1)}
        slots, x, x_scale = buffers["slot_of_pair"], buffers["activations"], buffers.get("activation_scale")
        row_ends = buffers["group_ends"]
        blocks = hopper_gemm.SlotBlocks(buffers["block_expert"], buffers["num_blocks"], row_ends=row_ends)
        inner, slot_output = buffers["intermediate"], buffers["slot_output"]
        gate_up, down = self.hopper_scales(x_scale, buffers.get("intermediate_scale"))
        return [
            *counting_sort_launches(
                local_ids, config.num_local_experts, tiles.block_x, **sort_buffers, group_ends=row_ends
            ),
            *permute_rows_launches(
                dispatched.activations,
                slots,
                x,
                x_scale,
                static_scale=weights.a13_scale,
                x_scales=dispatched.scales,
            ),
            *hopper_gemm.gate_up_activation_launches(
                x, weights.w13, weights.w13_bias, inner, blocks, tiles.gate_up, config, num_sms, gate_up
            ),
            *hopper_gemm.down_launches(
                inner, weights.w2, weights.w2_bias, slot_output, blocks, tiles.down, num_sms, down
            ),
            *row_sum_launches(slot_output, slots, dispatched.topk_weights, output),
        ]

    def hopper_scales(
        self, x_scale: torch.Tensor | None, intermediate_scale: torch.Tensor | None
    ) -> tuple[Fp8Scales | None, Fp8Scales | None]:
        """What both Hopper GEMMs take for fp8, given the scales of their rows in slot order; None in bf16."""
        from moe_plugin.kernels.hopper_gemm import Fp8Scales

        scheme, weights = self.config.quantization, self.weights
        if scheme is None:
            return None, None
        w_kind: Any = {Fp8Block: "block", Fp8PerToken: "channel"}.get(type(scheme), "tensor")
        assert weights.w13_scale is not None and weights.w2_scale is not None
        if x_scale is None or intermediate_scale is None:
            assert weights.a13_scale is not None and weights.a2_scale is not None
            return (
                Fp8Scales(weights.a13_scale, "tensor", weights.w13_scale, w_kind, weights.a2_scale, "static"),
                Fp8Scales(weights.a2_scale, "expert", weights.w2_scale, w_kind),
            )
        x_kind: Any = "group" if input_group_size(scheme) else "row"
        return (
            Fp8Scales(x_scale, x_kind, weights.w13_scale, w_kind, intermediate_scale, "group"),
            Fp8Scales(intermediate_scale, "group", weights.w2_scale, w_kind),
        )

    def _apply_batched(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None) -> torch.Tensor:
        config, expert_num_tokens = self.config, dispatched.expert_num_tokens
        assert expert_num_tokens is not None
        shape = tuple(dispatched.activations.shape)
        if output is None:
            output = workspace.tensor("output", shape, config.dtype)
        if output.numel() == 0:
            return output
        x, scales = dispatched.activations, dispatched.scales
        on_hopper = self._hopper and self.takes_scales(scales) and _takes_tma(x)
        on_hopper = on_hopper and (_takes_tma(output) or _is_pitched(output))
        tiles, kind = self._plan(_BATCHED_HOPPER if on_hopper else _BATCHED, shape[1])
        if isinstance(tiles, HopperTiles) and scales is not None:
            # Whichever way they lie, to where the rows would be given them here.
            by_group = workspace.tensor("activation_scale", (scales.shape[2], shape[0] * shape[1]), torch.float32)
            by_group.unflatten(1, shape[:2]).permute(1, 2, 0).copy_(scales)

        def launches() -> list[Launch]:
            from moe_plugin.kernels.grouped_gemm import BatchedRows

            if isinstance(tiles, HopperTiles):
                return self._batched_hopper_launches(dispatched, expert_num_tokens, workspace, output, tiles)
            buffers = _tensors(workspace, _gemm_buffers(config, shape[:2], shape[:2]))
            rows = BatchedRows(expert_num_tokens, shape[1])
            return self._gemm_launches(dispatched, buffers, output, rows, tiles)

        self._run(kind, shape, (x, expert_num_tokens, scales, output), workspace, launches)
        return output

    def _apply_contiguous(
        self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None
    ) -> torch.Tensor:
        config, x, scales, group_ends = self.config, dispatched.activations, dispatched.scales, dispatched.group_ends
        assert group_ends is not None
        shape = tuple(x.shape)
        if output is None:
            output = workspace.tensor("slot_output", shape, config.dtype)
        if output.numel() == 0 or self.weights.w13.shape[0] == 0:
            return output
        on_hopper = self._hopper and self.takes_scales(scales) and _takes_tma(x, output)
        on_hopper = on_hopper and (scales is None or _takes_tma(scales.T))
        tiles, kind = self._plan(_CONTIGUOUS_HOPPER if on_hopper else _CONTIGUOUS, contiguous_rows(config, dispatched))

        def launches() -> list[Launch]:
            return self._contiguous_launches(dispatched, group_ends, workspace, output, tiles)

        self._run(kind, shape, (x, group_ends, scales, output), workspace, launches)
        return output

    def _contiguous_launches(
        self,
        dispatched: Dispatched,
        group_ends: torch.Tensor,
        workspace: Workspace,
        output: torch.Tensor,
        tiles: Tiles,
    ) -> list[Launch]:
        from moe_plugin.kernels import hopper_gemm
        from moe_plugin.kernels.grouped_gemm import ListedRows
        from moe_plugin.kernels.row_blocks import contiguous_blocks_launches

        config, weights, num_sms, block_x = self.config, self.weights, self.num_sms, block_rows(tiles)
        quantizes = config.quantization is not None and dispatched.scales is None
        buffers = _tensors(workspace, segment_buffers(config, len(output), block_x, quantizes))
        block_expert, block_row, num_blocks = (buffers[name] for name in ("block_expert", "block_row", "num_blocks"))
        listing = contiguous_blocks_launches(
            group_ends,
            CONTIGUOUS_ALIGNMENT,
            block_x,
            block_expert=block_expert,
            block_row=block_row,
            num_blocks=num_blocks,
        )
        if isinstance(tiles, PortableTiles):
            rows = ListedRows(block_expert, block_row, group_ends)
            return [*listing, *self._gemm_launches(dispatched, buffers, output, rows, tiles)]
        x, x_scale, quantization = self._quantized(dispatched, buffers)
        by_group = None if x_scale is None or x_scale.dim() == 1 else x_scale.T
        gate_up, down = self.hopper_scales(by_group, buffers.get("intermediate_scale"))
        inner = buffers["intermediate"]
        # Blocks as large as the alignment of segments lie one after another.
        places = None if block_x == CONTIGUOUS_ALIGNMENT else block_row
        blocks = hopper_gemm.SlotBlocks(block_expert, num_blocks, places, group_ends)
        new_blocks = replace(blocks, is_new=not quantization)
        return [
            *listing,
            *quantization,
            *hopper_gemm.gate_up_activation_launches(
                x, weights.w13, weights.w13_bias, inner, new_blocks, tiles.gate_up, config, num_sms, gate_up
            ),
            *hopper_gemm.down_launches(inner, weights.w2, weights.w2_bias, output, blocks, tiles.down, num_sms, down),
        ]

    def _batched_tiles(self, max_tokens: int) -> Tiles:
        """For the Hopper kernels where a block of theirs fits, else for the portable ones."""
        config = self.config
        rows_per_expert = cdiv(max_tokens * config.top_k, config.num_experts)
        tiles = batched_hopper_tiles(rows_per_expert, max_tokens, config.weight_dtype.itemsize)
        return tiles or self.tiles.batched(max_tokens)

    def _batched_hopper_launches(
        self,
        dispatched: Dispatched,
        expert_num_tokens: torch.Tensor,
        workspace: Workspace,
        output: torch.Tensor,
        tiles: HopperTiles,
    ) -> list[Launch]:
        from moe_plugin.kernels import hopper_gemm
        from moe_plugin.kernels.quantize_rows import quantize_rows_launches
        from moe_plugin.kernels.row_blocks import batched_blocks_launches

        config, weights, num_sms = self.config, self.weights, self.num_sms
        experts, max_tokens, _ = dispatched.activations.shape
        needed = dict(batched_hopper_buffers(config, experts, max_tokens, tiles.block_x))
        quantizes = config.quantization is not None and dispatched.scales is None
        if not quantizes:
            needed.pop("activations", None)
        buffers = _tensors(workspace, needed)
        names = ("block_expert", "block_row", "row_ends", "num_blocks")
        launches = batched_blocks_launches(
            expert_num_tokens, max_tokens, tiles.block_x, **{name: buffers[name] for name in names}
        )
        x, x_scale = dispatched.activations, buffers.get("activation_scale")
        if quantizes:
            x = buffers["activations"]
            # Group by group, each expert's rows one after the other.
            scales = None if x_scale is None else x_scale.unflatten(1, (experts, max_tokens)).permute(1, 2, 0)
            launches += quantize_rows_launches(
                dispatched.activations,
                x,
                scales,
                static_scale=weights.a13_scale,
                expert_num_tokens=expert_num_tokens,
            )
        blocks = hopper_gemm.SlotBlocks(
            buffers["block_expert"], buffers["num_blocks"], buffers["block_row"], buffers["row_ends"]
        )
        gate_up, down = self.hopper_scales(x_scale, buffers.get("intermediate_scale"))
        inner = buffers["intermediate"]
        new_blocks = replace(blocks, is_new=len(launches) == 1)
        return [
            *launches,
            *hopper_gemm.gate_up_activation_launches(
                x.flatten(0, 1),
                weights.w13,
                weights.w13_bias,
                inner,
                new_blocks,
                tiles.gate_up,
                config,
                num_sms,
                gate_up,
            ),
            *hopper_gemm.down_launches(
                inner, weights.w2, weights.w2_bias, output.flatten(0, 1), blocks, tiles.down, num_sms, down
            ),
        ]

    def _gemm_launches(
        self,
        dispatched: Dispatched,
        buffers: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        rows: SortedRows | BatchedRows | ListedRows,
        tiles: PortableTiles,
    ) -> list[Launch]:
        """Quantization and both GEMMs, to one row of `out` per slot."""
        from moe_plugin.kernels.grouped_gemm import down_launches, gate_up_activation_launches

        config, weights = self.config, self.weights
        x, x_scale, quantization = self._quantized(dispatched, buffers)
        intermediate, intermediate_scale = buffers["intermediate"], weights.a2_scale
        if "intermediate_scale" in buffers:
            # Scales of a group lie next to each other, since a tile of rows reads one group at a time.
            intermediate_scale = buffers["intermediate_scale"].mT
        gate_up = gate_up_activation_launches(
            x,
            weights.w13,
            weights.w13_bias,
            intermediate,
            rows,
            tiles.gate_up,
            config.activation,
            config.swiglu_alpha,
            config.swiglu_limit,
            x_scale=x_scale,
            w13_scale=weights.w13_scale,
            out_scale=intermediate_scale,
        )
        down = down_launches(
            intermediate,
            weights.w2,
            weights.w2_bias,
            out,
            rows,
            tiles.down,
            x_scale=intermediate_scale,
            w2_scale=weights.w2_scale,
        )
        return [*quantization, *gate_up, *down]

    def _quantized(
        self, dispatched: Dispatched, buffers: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[Launch]]:
        """The rows in the dtype of the weights, with their scales for fp8, and the launches that make them."""
        from moe_plugin.kernels.quantize_rows import quantize_rows_launches

        activations, static_scale = dispatched.activations, self.weights.a13_scale
        if self.config.quantization is None or dispatched.scales is not None:
            return activations, dispatched.scales, []
        scales = None if static_scale is not None else buffers["activation_scale"]
        # In the Standard format all rows are some expert's, or not there.
        expert_num_tokens = group_ends = None
        if dispatched.activation_format is ActivationFormat.BATCHED_EXPERTS:
            expert_num_tokens = dispatched.expert_num_tokens
        elif dispatched.activation_format is ActivationFormat.CONTIGUOUS:
            group_ends, scales = dispatched.group_ends, None if scales is None else scales.T
        launches = quantize_rows_launches(
            activations,
            buffers["activations"],
            scales,
            static_scale=static_scale,
            expert_num_tokens=expert_num_tokens,
            group_ends=group_ends,
            alignment=1 if group_ends is None else CONTIGUOUS_ALIGNMENT,
        )
        return buffers["activations"], static_scale if scales is None else scales, launches


_BATCHED, _BATCHED_HOPPER = "batched", "batched_hopper"
_CONTIGUOUS, _CONTIGUOUS_HOPPER = "contiguous", "contiguous_hopper"
_MAX_PLANS = 4096


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


def hopper_tiles_of(config: MoEConfig, num_rows: int) -> HopperTiles:
    """The untuned Hopper tiles for `num_rows` received rows."""
    tiles = heuristic_tiles(HOPPER, config, num_rows, shared_memory_bytes(90))
    assert isinstance(tiles, HopperTiles)
    return tiles


def hopper_buffers(config: MoEConfig, num_rows: int, top_k: int, block_x: int) -> Buffers:
    """As `standard_buffers`, with activations in slot order and their scales group by group."""
    scheme, hidden, inner = config.quantization, config.hidden_size, config.local_intermediate_size
    sort_shapes = counting_sort_shapes(num_rows, top_k, config.num_local_experts, block_x)
    (slots,) = sort_shapes["sorted_pairs"]
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        **{name: (shape, torch.int32) for name, shape in sort_shapes.items()},
        "group_ends": ((config.num_local_experts,), torch.int32),
        "activations": ((slots, hidden), config.weight_dtype),
        "intermediate": ((slots, inner), config.weight_dtype),
        "slot_output": ((slots, hidden), config.dtype),
    }
    if scheme is not None and not has_static_activations(scheme):
        buffers["activation_scale"] = ((input_groups(config), slots), torch.float32)
        buffers["intermediate_scale"] = ((cdiv(inner, GROUP_SIZE), slots), torch.float32)
    return buffers


def batched_hopper_buffers(config: MoEConfig, num_experts: int, max_tokens: int, block_x: int) -> Buffers:
    """For BatchedExperts on Hopper: the list of blocks, and what `_gemm_buffers` has, with scales group by group."""
    slots, blocks = num_experts * max_tokens, num_experts * cdiv(max_tokens, block_x)
    rows = (num_experts, max_tokens)
    buffers = _group_by_group(_gemm_buffers(config, rows, (slots,)), slots)
    blocks_buffers = dict.fromkeys(("block_expert", "block_row"), ((blocks,), torch.int32))
    return {**buffers, **blocks_buffers, "row_ends": ((num_experts,), torch.int32), "num_blocks": ((1,), torch.int32)}


def segment_buffers(config: MoEConfig, slots: int, block_x: int, quantizes: bool = True) -> Buffers:
    """For the Contiguous format, whichever kernels run: the list of blocks, and what `_gemm_buffers` has, with scales
    group by group. quantizes: rows do not come quantized."""
    buffers = _group_by_group(_gemm_buffers(config, (slots,), (slots,)), slots)
    if not quantizes:
        buffers = {name: spec for name, spec in buffers.items() if not name.startswith("activation")}
    blocks = dict.fromkeys(("block_expert", "block_row"), ((cdiv(slots, block_x),), torch.int32))
    return {**buffers, **blocks, "num_blocks": ((1,), torch.int32)}


def _group_by_group(buffers: Buffers, slots: int) -> Buffers:
    """What `_gemm_buffers` has, with scales as [groups, slots]."""
    found = dict(buffers)
    for name, groups in (("activation_scale", -1), ("intermediate_scale", -2)):
        if name in found:
            found[name] = (found[name][0][groups], slots), torch.float32
    return found


def contiguous_slots(config: MoEConfig, num_rows: int) -> int:
    """Slots that `num_rows` received rows take in the Contiguous format at most."""
    experts = config.num_local_experts
    if experts == 0:
        return 0
    most = num_rows * config.top_k + experts * (CONTIGUOUS_ALIGNMENT - 1)
    return cdiv(most, CONTIGUOUS_ALIGNMENT) * CONTIGUOUS_ALIGNMENT


def contiguous_rows(config: MoEConfig, dispatched: Dispatched) -> int:
    """The number of received rows by which a Contiguous call chooses its kernels and tiles."""
    return dispatched.num_rows or max(dispatched.activations.shape[0] // config.top_k, 1)


def input_groups(config: MoEConfig) -> int:
    """Scales of a row of activations that is quantized by its own values; 0 where none is."""
    scheme, hidden = config.quantization, config.hidden_size
    if scheme is None or has_static_activations(scheme):
        return 0
    return cdiv(hidden, input_group_size(scheme) or hidden)


def _takes_tma(*tensors: torch.Tensor) -> bool:
    """Whether [E, M, H] rows are one dense matrix whose boxes TMA can load and store."""
    return all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _is_pitched(tensor: torch.Tensor) -> bool:
    """The same of one matrix with room between its rows."""
    experts, rows, columns = tensor.stride()
    in_line = experts == tensor.shape[1] * rows and columns == 1
    return in_line and rows * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0


def standard_buffers(config: MoEConfig, num_rows: int, top_k: int, block_m: int | None = None) -> Buffers:
    """Shape and dtype of each workspace buffer of a call with `num_rows` rows of `top_k` local ids.

    block_m: rows of a block; as untuned when None.
    """
    if block_m is None:
        block_m = block_rows(heuristic_tiles(PORTABLE, config, num_rows, shared_memory_bytes(None)))
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
            buffers["activation_scale"] = ((*rows, input_groups(config)), torch.float32)
            buffers["intermediate_scale"] = ((*slots[:-1], cdiv(inner, GROUP_SIZE), slots[-1]), torch.float32)
    return buffers


def _tensors(workspace: Workspace, buffers: Buffers) -> dict[str, torch.Tensor]:
    return {name: workspace.tensor(name, *spec) for name, spec in buffers.items()}
