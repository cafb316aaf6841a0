"""DeepGEMM's grouped GEMMs in the layout that suits the number of rows, and the Triton experts where they are faster.

Every call goes one of these ways (`layout_tables.LAYOUTS`):

    masked                     rows scattered to [experts, M, H], M rows of room each; few rows. What BatchedExperts is
    contiguous                 rows scattered to slots sorted by expert, each segment padded to 128 rows; many rows
    contiguous_triton_gate_up  the same slots, first GEMM and activation in one kernel of kernels/hopper_gemm
    contiguous_triton_down     the same slots, second GEMM from kernels/hopper_gemm
    triton_fused_moe           experts/triton_fused_moe, on the same weights

Which one is data: a crossover table of the device and layer, made by `moe-plugin tune`, else masked up to 256 received
rows and contiguous above, the rule of RTP-LLM's bf16 executor, out of which this class grew.

    scatter (fp8: quantize) -> GEMM -> activation (fp8: quantize) -> GEMM -> per row, weighted fp32 sum of its slots

In the contiguous layout the GEMMs read where each group ends from the device, so that nothing waits for the host and a
graph replays with any routing. Where the dispatcher has the counts on the host, buffers have the size that these rows
need and each row names its expert instead; so it does in a DeepGEMM without group ends on the device. Slots come from
prefix sums; a masked slice has room for every received row, and a token that names an expert twice has one slot for
both: nothing can overflow. Rows of slots that hold no pair are computed from whatever lies there and never read.

Rows in the Contiguous format lie in such slots already: no scatter and no sum. For fp8 they are quantized row by row,
unless the dispatcher did it; rows that it quantized are scattered with their scales in the Standard format.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import torch

from moe_plugin.compat import deep_gemm
from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import InputError
from moe_plugin.experts.layout_tables import (
    CONTIGUOUS,
    CONTIGUOUS_TRITON_DOWN,
    CONTIGUOUS_TRITON_GATE_UP,
    MASKED,
    TRITON_FUSED_MOE,
    LayoutLookup,
    describe_rule,
    reachable,
)
from moe_plugin.experts.triton_fused_moe import TritonFusedMoE, contiguous_rows
from moe_plugin.kernels.hopper_tiling import WIDE_ROWS, HopperTile, HopperTiles, hopper_tiles, weights_take_tma
from moe_plugin.kernels.launch_sequence import LaunchSequence, one_object
from moe_plugin.kernels.tile_tables import HOPPER
from moe_plugin.kernels.tiling import cdiv, counting_sort_shapes, next_power_of_2
from moe_plugin.modular_kernel import CONTIGUOUS_ALIGNMENT, ActivationFormat, Dispatched, Experts, ExpertWeights
from moe_plugin.quantization import GROUP_SIZE, UE8M0_PACKED, requantize_weights_ue8m0
from moe_plugin.verdict import (
    Gate,
    Verdict,
    gate_cuda_graph,
    gate_dtype,
    gate_package,
    gate_quantization,
)
from moe_plugin.workspace import Workspace, WorkspaceArena

if TYPE_CHECKING:
    from moe_plugin.kernels.launcher import Launch

logger = logging.getLogger(__name__)

Operand: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
"""A matrix of a GEMM, for fp8 with its scales."""
Buffers: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]

ALIGNMENT = CONTIGUOUS_ALIGNMENT
"""Rows to which DeepGEMM pads groups, in both layouts; also the row block of wide Hopper tiles."""
SUPPORTED_SM = (90, 100, 103)
_UE8M0_SM = 100
_SIZES_PER_STEP = 16


class DeepGemmHybrid(Experts):
    """bf16, and fp8 in 128 x 128 blocks, on Hopper; packed UE8M0 scales on SM 100, where this has never run."""

    name = "deep_gemm_hybrid"
    description = "DeepGEMM grouped GEMMs, masked or contiguous by number of rows, Triton where faster; no host sync"
    activation_formats = frozenset(ActivationFormat)
    takes_quantized = True
    ue8m0_from_sm = _UE8M0_SM
    deterministic = True
    rounds_gate_up = True
    size_multiple = GROUP_SIZE

    def __init__(self, config: MoEConfig, weights: ExpertWeights) -> None:
        super().__init__(config, weights)
        device = weights.w13.device
        self._library = deep_gemm.library()
        self._triton = TritonFusedMoE(config, weights)
        self.has_wide_tiles = self._triton.kernels == HOPPER
        self._is_fp8 = config.quantization is not None
        self._ue8m0 = self._is_fp8 and _sm(device) >= _UE8M0_SM
        name = torch.cuda.get_device_properties(device).name if device.type == "cuda" else device.type
        self.layouts = LayoutLookup(config, name)
        self._w13: Operand = weights.w13
        self._w2: Operand = weights.w2
        if weights.w13_scale is not None and weights.w2_scale is not None:
            _, rows, hidden = weights.w13.shape
            scales = self._library.weight_scales
            self._w13 = weights.w13, scales(weights.w13_scale, rows, hidden)
            self._w2 = weights.w2, scales(weights.w2_scale, hidden, weights.w2.shape[2])
        # All that launches depend on besides the arguments of `apply` and where the weights lie.
        self._facts = one_object(
            self.name, tuple(config.shared_fields().items()), config.num_local_experts, self._ue8m0
        )
        self._activation = config.activation.value, config.swiglu_alpha, config.swiglu_limit
        self._calls: Counter[str] = Counter()

    @classmethod
    def supports(cls, config: MoEConfig, environment: Environment) -> Verdict:
        package = environment.package("deep_gemm")
        kind = "bf16" if config.quantization is None else "fp8"
        unit = 64 if config.quantization is None else GROUP_SIZE
        sizes = (config.hidden_size, config.local_intermediate_size)
        on_cpu = environment.device_type != "cuda" and environment.triton_interpret and "cpu" in package.features
        # Of a library that was found the probe has looked for the compiler, in all places where it may be.
        found = environment.nvcc or "nvrtc" in package.features or package.module is not None
        compiler = "found" if found else "none"
        return Verdict.of(
            gate_dtype(config, torch.bfloat16),
            gate_quantization(config, ("none", "fp8_block")),
            gate_package(environment, "deep_gemm", "pip install 'moe-plugin[deepgemm]'"),
            Gate(
                "symbols",
                kind in package.features,
                ", ".join(sorted(package.features)) or "none",
                f"the grouped {kind} GEMMs of DeepGEMM, contiguous and masked",
                "pip install 'moe-plugin[deepgemm]'",
            ),
            Gate(
                "sm",
                environment.sm in SUPPORTED_SM or on_cpu,
                "no CUDA device" if environment.sm is None else f"SM {environment.sm}",
                f"SM {' or '.join(map(str, SUPPORTED_SM))}",
            ),
            Gate(
                "jit compiler",
                found or on_cpu,
                compiler,
                "nvcc or NVRTC, with which DeepGEMM compiles its kernels",
                "install the CUDA toolkit, or set DG_JIT_USE_NVRTC=1",
            ),
            gate_package(environment, "triton", "pip install triton"),
            Gate(
                "sizes",
                all(size % unit == 0 for size in sizes),
                f"H {sizes[0]}, I {sizes[1]} of a rank",
                f"multiples of {unit}, the depth of a step of DeepGEMM's {kind} kernels",
            ),
            Gate("has_bias", not config.has_bias, str(config.has_bias), "has_bias=False: DeepGEMM adds none"),
            gate_cuda_graph(config, capturable=True),
        )

    @classmethod
    def details(cls, config: MoEConfig, environment: Environment) -> Mapping[str, str]:
        package = environment.package("deep_gemm")
        ends = "group ends on the device" if "psum" in package.features else "one expert per row, full capacity"
        untested = "; SM 100 has never been run" if (environment.sm or 0) >= _UE8M0_SM else ""
        device_name = environment.device_name if environment.device_type == "cuda" else "cpu"
        found = {
            "layouts": describe_rule(config, device_name),
            "gemms": f"deep_gemm {package.version}, contiguous: {ends}{untested}",
        }
        return found | {
            f"triton {topic}": words for topic, words in TritonFusedMoE.details(config, environment).items()
        }

    @classmethod
    def memory(cls, config: MoEConfig) -> Mapping[str, int]:
        """Standard or Contiguous format, with as many rows as the ranks of the EP group can send to this one."""
        most = config.max_received_rows
        largest: dict[str, int] = {"output": most * config.hidden_size * config.dtype.itemsize}
        for layout, rows in {*reachable(config, most), *reachable(config, most, None, ActivationFormat.CONTIGUOUS)}:
            if layout == TRITON_FUSED_MOE:
                needs = dict(TritonFusedMoE.memory_of_rows(config, rows))
            else:
                # Without psum, as calls with counts on the host are: that takes one buffer more.
                masked = layout == MASKED
                buffers = masked_buffers(config, rows) if masked else contiguous_buffers(config, rows, psum=False)
                needs = {name: prod(size) * dtype.itemsize for name, (size, dtype) in buffers.items()}
            largest = {name: max(largest.get(name, 0), needs.get(name, 0)) for name in (*largest, *needs)}
        return largest

    @classmethod
    def prepare_weights(cls, config: MoEConfig, weights: ExpertWeights) -> ExpertWeights:
        """Dense, and for SM 100, whose scales are powers of two, fp8 weights quantized anew; else as they are."""
        strided = [name for name in ("w13", "w2") if not weights_take_tma(getattr(weights, name))]
        if strided:
            logger.warning("%s: %s copied, since DeepGEMM takes dense weights alone", cls.name, " and ".join(strided))
            weights = replace(
                weights,
                **{name: getattr(weights, name).clone(memory_format=torch.contiguous_format) for name in strided},
            )
        if config.quantization is None or _sm(weights.w13.device) < _UE8M0_SM:
            return weights
        assert weights.w13_scale is not None and weights.w2_scale is not None
        w13, w13_scale = requantize_weights_ue8m0(weights.w13, weights.w13_scale)
        w2, w2_scale = requantize_weights_ue8m0(weights.w2, weights.w2_scale)
        return replace(weights, w13=w13, w13_scale=w13_scale, w2=w2, w2_scale=w2_scale)

    def counters(self) -> Mapping[str, int]:
        """Calls by layout. A captured call counts once, however often its graph is replayed."""
        return dict(self._calls)

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        """See Experts.apply. Without `output` the result lies in `workspace`."""
        if dispatched.activation_format is ActivationFormat.BATCHED_EXPERTS:
            return self._apply_batched(dispatched, workspace, output)
        if dispatched.activation_format is ActivationFormat.CONTIGUOUS:
            return self._apply_contiguous(dispatched, workspace, output)
        return self._apply_standard(dispatched, workspace, output)

    def warm_up_steps(self, arena: WorkspaceArena) -> Iterator[tuple[str, Callable[[], object]]]:
        """With every size of buffers that DeepGEMM can be handed: its tiles, which it compiles, follow from sizes."""
        yield from super().warm_up_steps(arena)
        config = self.config
        experts, most = config.num_local_experts, config.max_received_rows
        if experts == 0:
            return
        name = torch.cuda.get_device_name(arena.device) if arena.device.type == "cuda" else "cpu"
        largest = dict(reachable(config, most, name))
        contiguous = [rows for layout, rows in largest.items() if layout not in (MASKED, TRITON_FUSED_MOE)]
        if contiguous:
            (slots, _), _ = contiguous_buffers(config, max(contiguous))["slot_output"]
            for first in range(ALIGNMENT, slots + 1, _SIZES_PER_STEP * ALIGNMENT):
                last = min(first + (_SIZES_PER_STEP - 1) * ALIGNMENT, slots)
                sizes = range(first, last + 1, ALIGNMENT)
                yield f"deep_gemm, contiguous, {first} to {last} slots", functools.partial(self._compile, arena, sizes)

    def _compile(self, arena: WorkspaceArena, sizes: range) -> None:
        """Call DeepGEMM with contiguous buffers of these sizes and no rows in them."""
        config, psum = self.config, "psum" in self._library.features
        workspace = arena.lease()
        for slots in sizes:
            # A number of rows changes nothing in the buffers that GEMMs see.
            b = _Buffers(workspace.scoped(self.name), contiguous_buffers(config, 1, 1, slots, self._ue8m0, psum))
            groups = b["group_ends"].zero_() if psum else b["row_expert"].fill_(-1)
            multiply = self._library.grouped_gemm_contiguous
            multiply(b.operand("activations"), self._w13, b["gate_up"], groups, psum=psum)
            multiply(b.operand("intermediate"), self._w2, b["slot_output"], groups, psum=psum)
        workspace.release()

    def _apply_standard(
        self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None
    ) -> torch.Tensor:
        config, local_ids, host_counts = self.config, dispatched.local_ids, dispatched.expert_num_tokens_host
        assert local_ids is not None
        num_rows = local_ids.shape[0]
        if output is None:
            output = workspace.tensor("output", (num_rows, config.hidden_size), config.dtype)
        if host_counts is not None:
            self._check(host_counts, local_ids.numel())
        if num_rows == 0 or config.num_local_experts == 0 or (host_counts is not None and not any(host_counts)):
            return output.zero_()
        layout = self._standard_layout(num_rows, dispatched)
        self._calls[layout] += 1
        if layout == TRITON_FUSED_MOE:
            return self._triton.apply(dispatched, workspace, output)
        if layout == MASKED:
            self._run_masked(dispatched, local_ids, output, workspace)
        else:
            self._run_contiguous(layout, dispatched, local_ids, output, workspace)
        return output

    def _standard_layout(self, num_rows: int, dispatched: Dispatched) -> str:
        """What the rule says, or what comes nearest to it of the things that this machine and call can do."""
        return self._possible(self.layouts.standard(num_rows), dispatched.scales)

    def _possible(self, layout: str, scales: torch.Tensor | None) -> str:
        if scales is not None and (self._ue8m0 or not self._triton.takes_scales(scales)):
            return TRITON_FUSED_MOE  # scales that are no powers of two, or of other groups than 128 columns
        if layout in (CONTIGUOUS_TRITON_GATE_UP, CONTIGUOUS_TRITON_DOWN) and not self.has_wide_tiles:
            return CONTIGUOUS
        return layout

    def _check(self, host_counts: Sequence[int], num_pairs: int) -> None:
        experts = self.config.num_local_experts
        if len(host_counts) != experts or min(host_counts, default=0) < 0 or sum(host_counts) > num_pairs:
            raise InputError(
                f"expert_num_tokens_host must be {experts} counts that add up to at most {num_pairs} pairs, "
                f"got {len(host_counts)} that add up to {sum(host_counts)}"
            )

    def _run_contiguous(
        self,
        layout: str,
        dispatched: Dispatched,
        local_ids: torch.Tensor,
        output: torch.Tensor,
        workspace: Workspace,
    ) -> None:
        config = self.config
        x, scales, router_weights = dispatched.activations, dispatched.scales, dispatched.topk_weights
        num_rows, top_k = local_ids.shape
        host_counts = dispatched.expert_num_tokens_host
        psum = host_counts is None and "psum" in self._library.features
        slots = None if host_counts is None else sum(cdiv(count, ALIGNMENT) for count in host_counts) * ALIGNMENT
        kind = (self._facts, layout, num_rows, top_k, slots)
        triton_gate_up, triton_down = layout == CONTIGUOUS_TRITON_GATE_UP, layout == CONTIGUOUS_TRITON_DOWN

        def make() -> _Buffers:
            return _Buffers(workspace, contiguous_buffers(config, num_rows, top_k, slots, self._ue8m0, psum))

        b = workspace.cached(kind, make)

        def scatter() -> list[Launch]:
            from moe_plugin.kernels.counting_sort import counting_sort_launches
            from moe_plugin.kernels.quantize_rows import permute_rows_launches

            names = ("slot_of_pair", "block_expert", "expert_num_tokens", "num_blocks", "chunk_counts", "group_ends")
            sort = {name: b[name] for name in names}
            launches = [
                *counting_sort_launches(local_ids, config.num_local_experts, ALIGNMENT, sorted_pairs=None, **sort),
                *permute_rows_launches(
                    x, b["slot_of_pair"], b["activations"], b.get("activation_scale"), x_scales=scales
                ),
            ]
            return launches + gate_up() if triton_gate_up else launches

        def gate_up() -> list[Launch]:
            tile = self._wide_tiles(num_rows).gate_up
            return self._gate_up(b["activations"], b.get("activation_scale"), b, tile)

        def activate() -> list[Launch]:
            from moe_plugin.kernels.gated_activation import ContiguousRows, gated_activation_launches

            rows = ContiguousRows(b["block_expert"], b["group_ends"], ALIGNMENT)
            launches = gated_activation_launches(
                b["gate_up"], b["intermediate"], b.get("intermediate_scale"), rows, *self._activation
            )
            return launches + down() if triton_down else launches

        def down() -> list[Launch]:
            return self._down(b, b["slot_output"], self._wide_tiles(num_rows).down)

        def add_up() -> list[Launch]:
            return _row_sum(b["slot_output"], b["slot_of_pair"], router_weights, output)

        moving = self._triton.weight_tensors if triton_gate_up or triton_down else []
        self._launch((kind, "scatter"), [x, scales, local_ids, *(moving if triton_gate_up else [])], workspace, scatter)
        groups = b["group_ends"] if psum else b["row_expert"]
        if not psum:
            groups.view(-1, ALIGNMENT).copy_(b["block_expert"][:, None])
        multiply = self._library.grouped_gemm_contiguous
        if not triton_gate_up:
            multiply(b.operand("activations"), self._w13, b["gate_up"], groups, psum=psum)
            self._launch((kind, "activate"), moving if triton_down else [], workspace, activate)
        if not triton_down:
            multiply(b.operand("intermediate"), self._w2, b["slot_output"], groups, psum=psum)
        self._launch((kind, "add up"), [router_weights, output], workspace, add_up)

    def _gate_up(self, x: torch.Tensor, x_scale: torch.Tensor | None, b: _Buffers, tile: HopperTile) -> list[Launch]:
        """The first GEMM and the activation of rows in the blocks of `b`. x_scale: group by group."""
        from moe_plugin.kernels.hopper_gemm import SlotBlocks, gate_up_activation_launches

        triton, blocks = self._triton, SlotBlocks(b["block_expert"], b["num_blocks"])
        scales, _ = triton.hopper_scales(x_scale, b.get("intermediate_scale"))
        return gate_up_activation_launches(
            x, self.weights.w13, None, b["intermediate"], blocks, tile, self.config, triton.num_sms, scales
        )

    def _down(self, b: _Buffers, out: torch.Tensor, tile: HopperTile) -> list[Launch]:
        """The second GEMM, likewise."""
        from moe_plugin.kernels.hopper_gemm import SlotBlocks, down_launches

        triton, blocks = self._triton, SlotBlocks(b["block_expert"], b["num_blocks"])
        intermediate_scale = b.get("intermediate_scale")
        _, scales = triton.hopper_scales(intermediate_scale, intermediate_scale)
        return down_launches(b["intermediate"], self.weights.w2, None, out, blocks, tile, triton.num_sms, scales)

    def _apply_contiguous(
        self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None
    ) -> torch.Tensor:
        config, x, scales, group_ends = self.config, dispatched.activations, dispatched.scales, dispatched.group_ends
        assert group_ends is not None
        slots, hidden = x.shape
        if output is None:
            output = workspace.tensor("slot_output", (slots, hidden), config.dtype)
        if slots == 0 or config.num_local_experts == 0:
            return output
        num_rows = contiguous_rows(config, dispatched)
        layout = self._possible(self.layouts.contiguous(num_rows), scales)
        if not _lie_right(x, None if scales is None else scales.T, output):
            layout = TRITON_FUSED_MOE
        self._calls[layout] += 1
        if layout == TRITON_FUSED_MOE:
            return self._triton.apply(dispatched, workspace, output)
        self._run_segments(layout, dispatched, group_ends, num_rows, output, workspace)
        return output

    def _run_segments(
        self,
        layout: str,
        dispatched: Dispatched,
        group_ends: torch.Tensor,
        num_rows: int,
        output: torch.Tensor,
        workspace: Workspace,
    ) -> None:
        """A contiguous layout on rows that lie in it."""
        x, scales, slots = dispatched.activations, dispatched.scales, len(output)
        psum = "psum" in self._library.features
        quantizes = self._is_fp8 and scales is None
        kind = (self._facts, "segments", layout, num_rows, slots, quantizes)
        triton_gate_up, triton_down = layout == CONTIGUOUS_TRITON_GATE_UP, layout == CONTIGUOUS_TRITON_DOWN
        lists_first = triton_gate_up or not psum

        def make() -> _Buffers:
            return _Buffers(workspace, segment_buffers(self.config, slots, self._ue8m0, psum, quantizes))

        b = workspace.cached(kind, make)
        rows = b["activations"] if quantizes else x
        x_scale = b["activation_scale"] if quantizes else None if scales is None else scales.T

        def list_blocks() -> list[Launch]:
            from moe_plugin.kernels.row_blocks import contiguous_blocks_launches

            return contiguous_blocks_launches(
                group_ends,
                ALIGNMENT,
                ALIGNMENT,
                block_expert=b["block_expert"],
                block_row=None,
                num_blocks=b["num_blocks"],
            )

        def begin() -> list[Launch]:
            from moe_plugin.kernels.quantize_rows import quantize_rows_launches

            launches = list_blocks() if lists_first else []
            if quantizes:
                assert x_scale is not None
                launches += quantize_rows_launches(x, rows, x_scale.T, group_ends=group_ends, alignment=ALIGNMENT)
            if triton_gate_up:
                launches += self._gate_up(rows, x_scale, b, self._wide_tiles(num_rows).gate_up)
            return launches

        def activate() -> list[Launch]:
            from moe_plugin.kernels.gated_activation import GroupedRows, gated_activation_launches

            launches = gated_activation_launches(
                b["gate_up"],
                b["intermediate"],
                b.get("intermediate_scale"),
                GroupedRows(group_ends, ALIGNMENT),
                *self._activation,
            )
            if triton_down:
                listing = [] if lists_first else list_blocks()
                launches = [*listing, *launches, *self._down(b, output, self._wide_tiles(num_rows).down)]
            return launches

        moving = self._triton.weight_tensors
        if lists_first or quantizes:
            given = [x, scales, group_ends, *(moving if triton_gate_up else [])]
            self._launch((kind, "begin"), given, workspace, begin)
        groups = group_ends
        if not psum:
            groups = b["row_expert"]
            groups.view(-1, ALIGNMENT).copy_(b["block_expert"][:, None])
        multiply = self._library.grouped_gemm_contiguous
        if not triton_gate_up:
            operand: Operand = rows if x_scale is None else (rows, x_scale.T)
            multiply(operand, self._w13, b["gate_up"], groups, psum=psum)
            given = [group_ends, *([output, *moving] if triton_down else [])]
            self._launch((kind, "activate"), given, workspace, activate)
        if not triton_down:
            multiply(b.operand("intermediate"), self._w2, output, groups, psum=psum)

    def _run_masked(
        self, dispatched: Dispatched, local_ids: torch.Tensor, output: torch.Tensor, workspace: Workspace
    ) -> None:
        x, scales, router_weights = dispatched.activations, dispatched.scales, dispatched.topk_weights
        config = self.config
        num_rows, top_k = local_ids.shape
        kind = (self._facts, MASKED, num_rows, top_k)

        def make() -> _Buffers:
            return _Buffers(workspace, masked_buffers(config, num_rows, top_k, self._ue8m0))

        b = workspace.cached(kind, make)
        slots = b["slot_of_pair"]

        def scatter() -> list[Launch]:
            from moe_plugin.kernels.masked_slots import masked_slots_launches
            from moe_plugin.kernels.quantize_rows import permute_rows_launches

            rows = b["activations"].shape[1]
            counts = b["expert_num_tokens"]
            return [
                *masked_slots_launches(local_ids, rows, slot_of_pair=slots, expert_num_tokens=counts),
                *permute_rows_launches(
                    x, slots, b["activations"].flatten(0, 1), b.get("activation_scale"), x_scales=scales
                ),
            ]

        def add_up() -> list[Launch]:
            return _row_sum(b["slot_output"].flatten(0, 1), slots, router_weights, output)

        self._launch((kind, "scatter"), [x, scales, local_ids], workspace, scatter)
        self._multiply_masked(
            kind, b, b.operand("activations"), b["expert_num_tokens"], self._expected_rows(num_rows), workspace
        )
        self._launch((kind, "add up"), [router_weights, output], workspace, add_up)

    def _multiply_masked(
        self,
        kind: Hashable,
        b: _Buffers,
        x: Operand,
        num_rows: torch.Tensor,
        expected_rows: int,
        workspace: Workspace,
        output: torch.Tensor | None = None,
    ) -> None:
        """Both GEMMs and the activation on the first num_rows[e] rows of each slice, to `output` or slot_output."""

        def activate() -> list[Launch]:
            from moe_plugin.kernels.gated_activation import MaskedRows, gated_activation_launches

            return gated_activation_launches(
                b["gate_up"].flatten(0, 1),
                b["intermediate"].flatten(0, 1),
                b.get("intermediate_scale"),
                MaskedRows(num_rows, b["gate_up"].shape[1]),
                *self._activation,
            )

        multiply = self._library.grouped_gemm_masked
        multiply(x, self._w13, b["gate_up"], num_rows, expected_rows)
        self._launch((kind, "activate"), [num_rows], workspace, activate)
        out = b["slot_output"] if output is None else output
        multiply(b.operand("intermediate"), self._w2, out, num_rows, expected_rows)

    def _apply_batched(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None) -> torch.Tensor:
        config, counts = self.config, dispatched.expert_num_tokens
        x, x_scale = dispatched.activations, dispatched.scales
        assert counts is not None
        experts, max_tokens, hidden = x.shape
        if output is None:
            output = workspace.tensor("output", (experts, max_tokens, hidden), config.dtype)
        if output.numel() == 0:
            return output
        layout = self.layouts.batched(max_tokens)
        if self._ue8m0 and x_scale is not None:
            # Packed scales are for DeepGEMM, those that are no powers of two for the others.
            layout = MASKED if x_scale.dtype is torch.int32 else TRITON_FUSED_MOE
        self._calls[layout] += 1
        if layout == TRITON_FUSED_MOE:
            return self._triton.apply(dispatched, workspace, output)
        kind = (self._facts, "batched", experts, max_tokens, x_scale is not None)

        def make() -> _Buffers:
            return _Buffers(workspace, batched_buffers(config, experts, max_tokens, self._ue8m0))

        b = workspace.cached(kind, make)
        operand = self._batched_operand(kind, x, x_scale, counts, b, workspace)
        whole = max_tokens % ALIGNMENT == 0
        expected = self._expected_rows(max_tokens, whole_batch=True)
        self._multiply_masked(kind, b, operand, counts, expected, workspace, output if whole else None)
        return output if whole else output.copy_(b["slot_output"][:, :max_tokens])

    def _batched_operand(
        self,
        kind: Hashable,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        counts: torch.Tensor,
        b: _Buffers,
        workspace: Workspace,
    ) -> Operand:
        """The rows as DeepGEMM takes them: where they lie if they lie right, else copied; quantized for fp8."""
        max_tokens = x.shape[1]
        if self._is_fp8 and x_scale is None:
            rows, scales = b["activations"], b["activation_scale"].mT

            def quantize() -> list[Launch]:
                from moe_plugin.kernels.quantize_rows import quantize_rows_launches

                return quantize_rows_launches(x, rows[:, :max_tokens], scales[:, :max_tokens], expert_num_tokens=counts)

            self._launch((kind, "quantize"), [x, counts], workspace, quantize)
            return b.operand("activations")
        lies_right = max_tokens % ALIGNMENT == 0 and _lie_right(x)
        if not lies_right:
            b["activations"][:, :max_tokens].copy_(x)
        rows = x if lies_right else b["activations"]
        if x_scale is None:
            return rows
        scales = b["activation_scale"].mT
        if lies_right and x_scale.stride() == scales.stride() and x_scale.data_ptr() % 16 == 0:
            return rows, x_scale
        scales[:, :max_tokens].copy_(x_scale)
        return rows, scales

    def _expected_rows(self, num_rows: int, whole_batch: bool = False) -> int:
        """Rows an expert of this rank may expect of `num_rows` received ones, rounded to a power of two.

        For the library's choice of tiles alone; rounded, since each of them is compiled. whole_batch: `num_rows` are
        those of all ranks, not those that want an expert of this one.
        """
        config = self.config
        share = config.num_local_experts / config.num_experts
        # Of K independent choices, how many fall on this rank, given that one does.
        hits = config.top_k * share / (1.0 if whole_batch else 1.0 - (1.0 - share) ** config.top_k)
        return next_power_of_2(max(1, round(num_rows * hits / config.num_local_experts)))

    def _wide_tiles(self, num_rows: int) -> HopperTiles:
        tiles = self._triton.tiles.hopper(num_rows)
        return tiles if tiles.gate_up.wide else hopper_tiles(WIDE_ROWS, self.config.weight_dtype.itemsize)

    def _launch(
        self,
        key: Hashable,
        tensors: Sequence[torch.Tensor | None],
        workspace: Workspace,
        launches: Callable[[], Sequence[Launch]],
    ) -> None:
        """Launch; with what is known of a call of the same kind and layouts, if there was one.

        tensors: what may lie elsewhere in each call; key: from which, with their layouts, all else follows.
        """
        layouts = [None if each is None else (each.dtype, each.stride()) for each in tensors]
        sequence = workspace.cached((key, *layouts), LaunchSequence)
        sequence([each for each in tensors if each is not None], launches)


class _Buffers:
    """Tensors of a workspace by name, and as operands of a GEMM."""

    __slots__ = ("_operands", "_tensors")

    def __init__(self, workspace: Workspace, buffers: Buffers) -> None:
        self._tensors = {name: workspace.tensor(name, *spec) for name, spec in buffers.items()}
        self._operands: dict[str, Operand] = {}
        for name, scale in (("activations", "activation_scale"), ("intermediate", "intermediate_scale")):
            if name in self._tensors:
                rows, scales = self._tensors[name], self._tensors.get(scale)
                self._operands[name] = rows if scales is None else (rows, scales.mT)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get(self, name: str) -> torch.Tensor | None:
        return self._tensors.get(name)

    def operand(self, name: str) -> Operand:
        """The rows, for fp8 with their scales as DeepGEMM indexes them: [rows, groups], rows next to each other."""
        return self._operands[name]


def contiguous_buffers(
    config: MoEConfig,
    num_rows: int,
    top_k: int | None = None,
    slots: int | None = None,
    ue8m0: bool = False,
    psum: bool = True,
) -> Buffers:
    """Shape and dtype of each buffer of a call in a contiguous layout.

    slots: as many as any routing needs when None.
    """
    top_k, experts = top_k or config.top_k, config.num_local_experts
    sort = counting_sort_shapes(num_rows, top_k, experts, ALIGNMENT)
    (most,) = sort.pop("sorted_pairs")
    slots = most if slots is None else slots
    sort["block_expert"] = (slots // ALIGNMENT,)
    buffers: Buffers = {name: (shape, torch.int32) for name, shape in sort.items()}
    buffers["group_ends"] = (experts,), torch.int32
    if not psum:
        buffers["row_expert"] = (slots,), torch.int32
    return buffers | _gemm_buffers(config, (slots,), ue8m0)


def segment_buffers(config: MoEConfig, slots: int, ue8m0: bool, psum: bool, quantizes: bool) -> Buffers:
    """The same for the Contiguous format. quantizes: rows are to be quantized, and copied for that."""
    buffers: Buffers = {"block_expert": ((slots // ALIGNMENT,), torch.int32), "num_blocks": ((1,), torch.int32)}
    if not psum:
        buffers["row_expert"] = (slots,), torch.int32
    for name, spec in _gemm_buffers(config, (slots,), ue8m0).items():
        if name != "slot_output" and (quantizes or not name.startswith("activation")):
            buffers[name] = spec
    return buffers


def masked_buffers(config: MoEConfig, num_rows: int, top_k: int | None = None, ue8m0: bool = False) -> Buffers:
    """The same for the masked layout: room for every received row in the slice of every expert."""
    experts = config.num_local_experts
    return {
        "slot_of_pair": ((num_rows, top_k or config.top_k), torch.int32),
        "expert_num_tokens": ((experts,), torch.int32),
        **_gemm_buffers(config, (experts, cdiv(num_rows, ALIGNMENT) * ALIGNMENT), ue8m0),
    }


def batched_buffers(config: MoEConfig, num_experts: int, max_tokens: int, ue8m0: bool = False) -> Buffers:
    """The same for BatchedExperts, whose slices are padded to whole blocks where they are not."""
    return _gemm_buffers(config, (num_experts, cdiv(max_tokens, ALIGNMENT) * ALIGNMENT), ue8m0)


def _gemm_buffers(config: MoEConfig, rows: tuple[int, ...], ue8m0: bool) -> Buffers:
    hidden, inner = config.hidden_size, config.local_intermediate_size
    buffers: Buffers = {
        "activations": ((*rows, hidden), config.weight_dtype),
        "gate_up": ((*rows, 2 * inner), config.dtype),
        "intermediate": ((*rows, inner), config.weight_dtype),
        "slot_output": ((*rows, hidden), config.dtype),
    }
    if config.quantization is not None:
        for name, depth in (("activation_scale", hidden), ("intermediate_scale", inner)):
            groups = cdiv(depth, GROUP_SIZE)
            shape = (*rows[:-1], cdiv(groups, UE8M0_PACKED) if ue8m0 else groups, rows[-1])
            buffers[name] = shape, torch.int32 if ue8m0 else torch.float32
    return buffers


def _lie_right(*tensors: torch.Tensor | None) -> bool:
    """Whether DeepGEMM can take them where they lie."""
    return all(each is None or (each.is_contiguous() and each.data_ptr() % 16 == 0) for each in tensors)


def _row_sum(
    rows: torch.Tensor, slots: torch.Tensor, router_weights: torch.Tensor | None, output: torch.Tensor
) -> list[Launch]:
    from moe_plugin.kernels.row_sum import row_sum_launches

    return row_sum_launches(rows, slots, router_weights, output)


def _sm(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
