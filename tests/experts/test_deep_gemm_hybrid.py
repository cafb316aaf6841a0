"""DeepGemmHybrid against the oracle in every layout: on a GPU with the library itself, elsewhere with its double."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin import reference
from moe_plugin.compat import deep_gemm as compat
from moe_plugin.compat.deep_gemm import DeepGemm
from moe_plugin.config import Activation, Fp8Block, Fp8PerToken, ParallelConfig, QuantConfig
from moe_plugin.environment import Environment, Package
from moe_plugin.errors import InputError
from moe_plugin.experts import deep_gemm_hybrid, layout_tables
from moe_plugin.experts.deep_gemm_hybrid import (
    ALIGNMENT,
    Buffers,
    DeepGemmHybrid,
    batched_buffers,
    contiguous_buffers,
    masked_buffers,
)
from moe_plugin.experts.layout_tables import (
    CONTIGUOUS,
    CONTIGUOUS_TRITON_DOWN,
    CONTIGUOUS_TRITON_GATE_UP,
    MASKED,
    TRITON_FUSED_MOE,
    FixedLayout,
)
from moe_plugin.kernels import counting_sort, gated_activation, masked_slots, quantize_rows
from moe_plugin.kernels.launcher import Launch
from moe_plugin.kernels.tiling import cdiv
from moe_plugin.modular_kernel import ActivationFormat, ExpertWeights, ModularKernel, warm_up_rows
from moe_plugin.numerics import TOLERANCES, Tolerance, assert_close_to_oracle
from moe_plugin.prepare_finalize.local import Local
from moe_plugin.quantization import (
    dequantize_rows,
    gate_first,
    pack_ue8m0,
    requantize_weights_ue8m0,
    unpack_ue8m0,
)
from moe_plugin.quantization import (
    quantize_rows as quantized_rows,
)
from moe_plugin.strategies.phases import PhasedLayer
from moe_plugin.testing.cases import Inputs, Weights, oracle
from moe_plugin.workspace import WorkspaceArena
from tests.doubles import deep_gemm as double
from tests.experts.cases import (
    DEVICE,
    Layer,
    backwards,
    check_capture_between_calls,
    check_graph_replays,
    group_major,
    make_config,
    make_weights,
    normal,
    packed_with_scales,
    quantizer,
    random_ids,
)
from tests.strategies import machines

on_gpu = DEVICE == "cuda"
if on_gpu:
    pytestmark = pytest.mark.sm90
gpu_only = pytest.mark.gpu
cpu_only = pytest.mark.skipif(on_gpu, reason="looks into the double, or takes what only the interpreter runs")

MORE_ROWS = 16 if on_gpu else 1
"""Times as many rows on tensor cores, whose short fp8 sums flip values: a few rows are too few to judge by."""
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 128, "max_tokens_per_rank": 512}
KINDS = {"bf16": None, "fp8": Fp8Block()}
DEEP_GEMM_LAYOUTS = [
    MASKED,
    CONTIGUOUS,
    pytest.param(CONTIGUOUS_TRITON_GATE_UP, marks=gpu_only),
    pytest.param(CONTIGUOUS_TRITON_DOWN, marks=gpu_only),
]
by_kind = pytest.mark.parametrize("quantization", KINDS.values(), ids=KINDS)
# In fp8 a call does all that it does in bf16, and scales: that is enough where the interpreter takes its time.
by_kind_of_few = pytest.mark.parametrize("quantization", [pytest.param(None, marks=gpu_only), Fp8Block()], ids=KINDS)
by_layout = pytest.mark.parametrize("layout", [*DEEP_GEMM_LAYOUTS, TRITON_FUSED_MOE])
by_deep_gemm_layout = pytest.mark.parametrize("layout", DEEP_GEMM_LAYOUTS)
by_contiguous_layout = pytest.mark.parametrize("layout", DEEP_GEMM_LAYOUTS[1:])


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if on_gpu:
        compat.forget()
        verdict = DeepGemmHybrid.supports(make_config(**SIZES), Environment.probe())
        if not verdict.ok:
            pytest.skip(verdict.reason)
        yield
    else:
        # In the interpreter programs run one by one: a few share the rows, instead of thousands that find none.
        for module in (gated_activation, quantize_rows):
            monkeypatch.setattr(module, "_RESIDENT_WARPS", 4)
        for name in ("_TILE_ROWS", "_NARROW_TILE_ROWS"):
            monkeypatch.setattr(gated_activation, name, ALIGNMENT)
        with double.installed():
            yield


def hybrid(layer: Layer) -> Any:
    assert isinstance(layer.experts, DeepGemmHybrid)
    return layer.experts


def fix(layer: Layer, layout: str | None) -> Layer:
    """Let every call of `layer` go that way; None: as the rule says."""
    experts = hybrid(layer)
    if layout is not None:
        if layout in (CONTIGUOUS_TRITON_GATE_UP, CONTIGUOUS_TRITON_DOWN) and not experts.has_wide_tiles:
            pytest.skip("needs the wide tiles of the Hopper kernels")
        experts.layouts = FixedLayout(layout)
    layer.rounds_gate_up = layout not in (CONTIGUOUS_TRITON_GATE_UP, TRITON_FUSED_MOE)
    return layer


def make(layout: str | None = None, **overrides: Any) -> Layer:
    return fix(Layer.of(DeepGemmHybrid, **(SIZES | overrides)), layout)


def distinct_ids(num_rows: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """int32 [num_rows, top_k], no expert twice in a row, a fifth of the pairs skipped."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_rows, num_experts, generator=generator).topk(top_k, dim=1).indices.int()
    return ids.masked_fill_(torch.rand(num_rows, top_k, generator=generator) < 0.2, -1).to(DEVICE)


def counts_of(local_ids: torch.Tensor, num_experts: int) -> list[int]:
    return torch.bincount(local_ids[local_ids >= 0].cpu(), minlength=num_experts).tolist()


def assert_same(first: torch.Tensor, second: torch.Tensor) -> None:
    """Of two layouts. Bitwise on the double, whose sums do not know the layout.

    The library takes its tiles by layout and size; a tile does not decide in which order a sum over K is taken, but
    nothing that the library says promises it, and in fp8 what rounds differently once is off by more.
    """
    if on_gpu:
        assert_close_to_oracle(first, second, TOLERANCES[torch.bfloat16])
    else:
        assert torch.equal(first, second)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype, says torch
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_kind
@by_layout
def test_standard(layout: str, quantization: QuantConfig | None) -> None:
    layer = make(layout, quantization=quantization)
    many, few = 8 * MORE_ROWS, 2 * MORE_ROWS
    layer.check_standard(layer.rows(many), random_ids(many, 2, 5), normal(many, 2, seed=7))
    layer.check_standard(layer.rows(few), random_ids(few, 2, 5))
    assert layer.experts.counters() == {layout: 2}


@pytest.mark.parametrize("activation", list(Activation))
@by_deep_gemm_layout
def test_activations(layout: str, activation: Activation) -> None:
    layer = make(layout, activation=activation, swiglu_limit=2.0)
    layer.check_standard(layer.rows(4) * 3, random_ids(4, 2, 5), normal(4, 2, seed=7))


@pytest.mark.parametrize(
    ("quantization", "hidden", "inner"),
    [(None, 64, 64), (None, 576, 192), (Fp8Block(), 128, 384), (Fp8Block(), 640, 256)],
    ids=str,
)
@by_deep_gemm_layout
def test_sizes(layout: str, quantization: QuantConfig | None, hidden: int, inner: int) -> None:
    layer = make(layout, quantization=quantization, hidden_size=hidden, intermediate_size=inner)
    layer.check_standard(layer.rows(5), random_ids(5, 2, 5), normal(5, 2, seed=7))


@pytest.mark.parametrize("top_k", [1, 3, 8])
@by_deep_gemm_layout
def test_top_k(layout: str, top_k: int) -> None:
    layer = make(layout, num_experts=9, top_k=top_k)
    layer.check_standard(layer.rows(5), random_ids(5, top_k, 9), normal(5, top_k, seed=7))


@by_kind
def test_masked_and_contiguous_agree(quantization: QuantConfig | None) -> None:
    masked, contiguous = (make(layout, quantization=quantization) for layout in (MASKED, CONTIGUOUS))
    num_rows = 200 if on_gpu else 16
    rows, ids, weights = masked.rows(num_rows), distinct_ids(num_rows, 2, 5), normal(num_rows, 2, seed=7)
    first, second = (each.apply(rows, local_ids=ids, topk_weights=weights) for each in (masked, contiguous))
    assert_same(first, second)


@pytest.mark.parametrize("quantization", [None, pytest.param(Fp8Block(), marks=gpu_only)], ids=KINDS)
def test_the_boundary_of_the_rule(quantization: QuantConfig | None) -> None:
    layer = make(num_experts=2, top_k=1, quantization=quantization, hidden_size=128)
    seen = []
    for num_rows in (255, 256, 257):
        before = layer.experts.counters()
        # A part of the rows is wanted: the rule counts those received.
        ids = torch.full((num_rows, 1), -1, dtype=torch.int32, device=DEVICE)
        ids[:: 32 // MORE_ROWS], ids[-1] = 1, 0
        layer.check_standard(layer.rows(num_rows), ids, normal(num_rows, 1, seed=7))
        after = layer.experts.counters()
        seen += [layout for layout, calls in after.items() if calls > before.get(layout, 0)]
    assert seen == [MASKED, MASKED, CONTIGUOUS]


@gpu_only
@pytest.mark.parametrize("num_rows", [127, 128, 129])
@by_kind
@by_deep_gemm_layout
def test_around_a_block_of_rows(layout: str, num_rows: int, quantization: QuantConfig | None) -> None:
    """Of one expert: a segment or slice just not full, full, and one that begins another block."""
    layer = make(layout, num_experts=2, top_k=1, quantization=quantization, hidden_size=128)
    ids = torch.ones(num_rows, 1, dtype=torch.int32, device=DEVICE)
    layer.check_standard(layer.rows(num_rows), ids)


ROUTINGS = {
    "one_expert": [[3, -1]] * 4,
    "one_expert_twice": [[4, 4]] * 3,
    "twice_in_a_row": [[3, 3], [0, 3], [2, 2]],
    "empty_in_front": [[3, 4]] * 3,
    "empty_in_the_middle": [[0, 4]] * 3,
    "empty_at_the_end": [[1, 0]] * 3,
    "some_skipped": [[-1, 2], [0, -1], [-1, -1]],
    "none_here": [[-1, -1]] * 2,
    "one_row": [[2, 1]],
}


@by_kind_of_few
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@by_deep_gemm_layout
def test_routings(layout: str, routing: list[list[int]], quantization: QuantConfig | None) -> None:
    layer = make(layout, quantization=quantization)
    ids = torch.tensor(routing, dtype=torch.int32, device=DEVICE)
    out = layer.check_standard(layer.rows(len(ids)), ids, normal(len(ids), 2, seed=7))
    assert (out[(ids < 0).all(dim=1)] == 0).all()


@pytest.mark.parametrize(("layout", "num_rows"), [(MASKED, 128), (CONTIGUOUS, 65)])
@pytest.mark.parametrize("quantization", [None, pytest.param(Fp8Block(), marks=gpu_only)], ids=KINDS)
def test_one_expert_wanted_twice_by_all_rows(layout: str, num_rows: int, quantization: QuantConfig | None) -> None:
    """A slice without room to spare, which cannot overflow, and a segment that begins another block."""
    layer = make(layout, num_experts=2, quantization=quantization, hidden_size=128)
    ids = torch.ones(num_rows, 2, dtype=torch.int32, device=DEVICE)
    layer.check_standard(layer.rows(num_rows), ids, normal(num_rows, 2, seed=7))


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grid of every launch that is made."""
    seen: list[tuple[int, ...]] = []
    run = Launch.run

    def noted(launch: Launch) -> Any:
        seen.append(launch.grid)
        return run(launch)

    monkeypatch.setattr(Launch, "run", noted)
    return seen


def spy(layer: Layer, seen: list[torch.Size]) -> None:
    """Note the shape of the result of every GEMM that the library is asked for."""
    library: DeepGemm = hybrid(layer)._library

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(a: Any, b: Any, out: torch.Tensor, *layout: Any) -> Any:
            seen.append(out.shape)
            return call(a, b, out, *layout)

        return noted

    (first, second), (third, fourth) = library._contiguous
    bf16, fp8 = library._masked
    hybrid(layer)._library = replace(
        library,
        _contiguous=((noting(first), noting(second)), (noting(third), noting(fourth))),
        _masked=(noting(bf16), noting(fp8)),
    )


@by_kind_of_few
@by_layout
def test_no_rows_launch_nothing(layout: str, quantization: QuantConfig | None, grids: list[Any]) -> None:
    layer = make(layout, quantization=quantization)
    gemms: list[torch.Size] = []
    spy(layer, gemms)
    out = layer.check_standard(layer.rows(0), random_ids(0, 2, 5), normal(0, 2, seed=7))
    assert out.shape == (0, 256)
    batch = torch.empty(5, 0, 256, dtype=torch.bfloat16, device=DEVICE)
    counts = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    assert layer.apply(batch, expert_num_tokens=counts).shape == batch.shape
    assert not grids
    assert not gemms
    assert not layer.experts.counters()
    # The spies see what is there to be seen.
    layer.check_standard(layer.rows(2), random_ids(2, 2, 5))
    assert all(min(grid) > 0 for grid in grids)
    assert grids
    assert bool(gemms) == (layout != TRITON_FUSED_MOE)


@by_kind_of_few
@by_layout
@pytest.mark.parametrize("num_rows", [0, 4])
def test_rank_without_experts(num_rows: int, layout: str, quantization: QuantConfig | None, grids: list[Any]) -> None:
    parallel = ParallelConfig(ep_size=3, ep_rank=2)
    layer = make(layout, quantization=quantization, num_experts=2, parallel=parallel)
    assert layer.config.num_local_experts == 0
    ids = torch.full((num_rows, 2), -1, dtype=torch.int32, device=DEVICE)
    out = layer.apply(layer.rows(num_rows), local_ids=ids, topk_weights=normal(num_rows, 2, seed=7))
    assert torch.equal(out, torch.zeros(num_rows, 256, dtype=torch.bfloat16, device=DEVICE))
    batch = torch.empty(0, 4, 256, dtype=torch.bfloat16, device=DEVICE)
    counts = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert layer.apply(batch, expert_num_tokens=counts).shape == batch.shape
    assert not grids
    assert not layer.experts.counters()
    assert list(layer.experts.warm_up_steps(layer.arena))[-1][0] == "deep_gemm_hybrid, 1 rows"


@by_kind_of_few
@by_deep_gemm_layout
def test_garbage_in_unwanted_rows_does_not_leak(layout: str, quantization: QuantConfig | None) -> None:
    layer = make(layout, quantization=quantization)
    ids, weights, rows = random_ids(6, 2, 5), normal(6, 2, seed=7), layer.rows(6)
    ids[::3] = -1
    expected = layer.expected(rows, ids, weights)
    rows[::3] = torch.nan
    weights[ids < 0] = torch.nan
    assert_close_to_oracle(layer.apply(rows, local_ids=ids, topk_weights=weights), expected, layer.tolerance)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on inf in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@by_kind_of_few
@by_deep_gemm_layout
def test_nan_and_inf_stay_in_their_row(layout: str, quantization: QuantConfig | None, value: float) -> None:
    layer = make(layout, quantization=quantization)
    ids, rows = torch.full((5, 2), 3, dtype=torch.int32, device=DEVICE), layer.rows(5)
    ids[:, 1] = torch.arange(5)
    clean = layer.apply(rows, local_ids=ids, topk_weights=None)
    rows[3, 1] = value
    out = layer.apply(rows, local_ids=ids, topk_weights=None)
    others = [0, 1, 2, 4]
    assert torch.equal(out[others], clean[others])
    assert not out[3].isfinite().any()


@by_kind_of_few
@by_deep_gemm_layout
def test_strided_rows_and_ids(layout: str, quantization: QuantConfig | None) -> None:
    layer = make(layout, quantization=quantization)
    rows = normal(4, 300, seed=5, dtype=torch.bfloat16)[:, 16:272]
    layer.check_standard(rows, random_ids(4, 6, 5)[:, ::3], normal(4, 4, seed=7)[:, 1:3])
    layer.check_standard(rows[:1].expand(4, -1), random_ids(4, 2, 5), normal(4, 2, seed=7))


@by_deep_gemm_layout
def test_result_goes_where_finalize_wants_it(layout: str) -> None:
    layer = make(layout)
    rows, ids = layer.rows(4), random_ids(4, 2, 5)
    expected = layer.apply(rows, local_ids=ids, topk_weights=None)
    output = torch.full_like(expected, torch.nan)
    assert layer.apply(rows, output=output, local_ids=ids, topk_weights=None) is output
    assert torch.equal(output, expected)
    # Where whole blocks are stored: through memory of the workspace, unless there is room for them.
    for max_tokens in (128, 3):
        batch, counts, used = layer.batch([1, 0, 2, 1, 0], max_tokens)
        expected = layer.apply(batch, expert_num_tokens=counts)
        output = torch.full_like(expected, torch.nan)
        assert layer.apply(batch, output=output, expert_num_tokens=counts) is output
        assert torch.equal(output[used], expected[used])


@by_layout
def test_rows_that_the_dispatcher_quantized(layout: str) -> None:
    """Quantized before they are scattered or on the way, to the same bits."""
    layer = make(layout, quantization=Fp8Block())
    rows, ids, weights = layer.rows(9), random_ids(9, 2, 5), normal(9, 2, seed=7)
    expected = layer.apply(rows, local_ids=ids, topk_weights=weights)
    quantized, scales = quantized_rows(rows, 128)
    for sent in ((quantized, scales), packed_with_scales(quantized, scales)):
        out = layer.apply(sent[0], local_ids=ids, topk_weights=weights, scales=sent[1])
        assert torch.equal(out, expected)
    if layout not in (MASKED, TRITON_FUSED_MOE):
        given = {"topk_weights": weights, "scales": scales, "expert_num_tokens_host": counts_of(ids, 5)}
        assert_same(layer.apply(quantized, local_ids=ids, **given), expected)


def test_quantized_rows_with_other_scales_go_to_the_fused_experts() -> None:
    layer = make(MASKED, quantization=Fp8Block())
    layer.rounds_gate_up = False
    rows, ids, weights = layer.rows(9), random_ids(9, 2, 5), normal(9, 2, seed=7)
    quantized, scales = quantized_rows(rows)
    out = layer.apply(quantized, local_ids=ids, topk_weights=weights, scales=scales)
    assert_close_to_oracle(
        out, layer.apply(rows, local_ids=ids, topk_weights=weights), Tolerance(frobenius=6e-2, row=2e-1)
    )
    assert layer.experts.counters() == {TRITON_FUSED_MOE: 1, MASKED: 1}


SEGMENTS = [0, 5, 0, 130, 0]
"""Rows of each expert; empty segments leading, in the middle and trailing, and one of two blocks."""


@by_kind
@by_layout
def test_contiguous_format(layout: str, quantization: QuantConfig | None) -> None:
    counts = SEGMENTS if on_gpu or quantization is None else [0, 5, 0, 2, 0]
    layer = make(layout, quantization=quantization)
    if layout == MASKED:  # which it can never be
        hybrid(layer).layouts, layout = FixedLayout(MASKED), CONTIGUOUS
    here = layer.check_contiguous(counts, num_rows=9)
    if quantization is not None:
        assert torch.equal(layer.check_contiguous(counts, quantizer(quantization), num_rows=9), here)
    layer.check_contiguous([0] * 5, num_rows=9)
    assert layer.experts.counters() == {layout: 2 + (quantization is not None)}


@by_kind
def test_contiguous_format_in_a_library_without_group_ends(quantization: QuantConfig | None) -> None:
    layer = without_psum(make(CONTIGUOUS, quantization=quantization))
    counts = [0, 5, 0, 2, 0]
    assert_same(layer.check_contiguous(counts), make(CONTIGUOUS, quantization=quantization).check_contiguous(counts))


def test_contiguous_format_by_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(num_experts=2, hidden_size=128)
    hybrid(layer).layouts = lookup = FixedLayout(CONTIGUOUS)
    asked: list[int] = []
    monkeypatch.setattr(lookup, "contiguous", lambda rows: asked.append(rows) or CONTIGUOUS)
    layer.check_contiguous([1, 2], num_rows=7)
    layer.check_contiguous([1, 2])
    # At most as many rows as there are slots for their pairs.
    assert asked == [7, 3 * 128 // 2]


@by_layout
def test_contiguous_format_without_slots_or_experts(layout: str, grids: list[Any]) -> None:
    layer = make(layout, num_experts=2)
    none = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert layer.apply(layer.rows(0), group_ends=none).shape == (0, 256)
    layer = make(layout, num_experts=2, parallel=ParallelConfig(ep_size=3, ep_rank=2))
    assert layer.apply(layer.rows(128), group_ends=none[:0]).shape == (128, 256)
    assert not grids


def test_contiguous_rows_that_do_not_lie_right_go_to_the_fused_experts() -> None:
    layer = make(CONTIGUOUS)
    rows, group_ends, expert_of = layer.segments([3, 0, 1, 0, 0])
    used = expert_of >= 0
    expected = layer.apply(rows, group_ends=group_ends)[used]
    strided = torch.cat([rows, rows], dim=1)[:, :256]
    out = layer.apply(strided, group_ends=group_ends)[used]
    assert_close_to_oracle(out, expected, layer.tolerance)
    assert layer.experts.counters() == {CONTIGUOUS: 1, TRITON_FUSED_MOE: 1}


@by_kind_of_few
@by_contiguous_layout
def test_contiguous_calls_of_two_layers_share_their_memory(layout: str, quantization: QuantConfig | None) -> None:
    """Into `output` or memory of the workspace, no more of it than declared."""
    layers = two_layers(layout, quantization=quantization, max_tokens_per_rank=6)
    slots, held = 6 * 128, 0
    for counts in ([2, 0, 9, 1, 0], [0, 0, 0, 0, 12]):
        for layer in layers:
            rows, group_ends, expert_of = layer.segments(counts)
            rows = torch.cat([rows, rows.new_full((slots, 256), torch.nan)])[:slots]
            used = (expert_of >= 0).nonzero()[:, 0]
            output = torch.full_like(rows, torch.nan) if layer is layers[0] else None
            handle = layer.handle(6)
            out = layer.apply(rows, handle=handle, output=output, group_ends=group_ends, num_rows=6)
            expected = layer.expected(rows[used], expert_of[used, None].int(), None)
            assert_close_to_oracle(out[used], expected, layer.tolerance)
            assert output is None or out is output
            handle.workspace.release()
            held = max(held, layer.arena.nbytes)
    declared = DeepGemmHybrid.memory(layers[0].config)
    assert held <= sum(declared.values()) + 16 * len(declared)


@cpu_only
@pytest.mark.parametrize("layout", [CONTIGUOUS_TRITON_GATE_UP, CONTIGUOUS_TRITON_DOWN])
def test_layouts_for_hopper_are_contiguous_elsewhere(layout: str) -> None:
    layer = make(CONTIGUOUS)
    hybrid(layer).layouts = FixedLayout(layout)
    layer.check_standard(layer.rows(4), random_ids(4, 2, 5))
    assert layer.experts.counters() == {CONTIGUOUS: 1}


def nbytes(*buffers: Buffers, output: int = 0) -> int:
    """What a workspace holds for them and for `output` bytes more."""
    sizes = {
        name: torch.Size(shape).numel() * dtype.itemsize for each in buffers for name, (shape, dtype) in each.items()
    }
    return sum(max(size, 16) for size in sizes.values()) + output


@by_kind
@by_contiguous_layout
def test_counts_on_the_host(layout: str, quantization: QuantConfig | None) -> None:
    layer = make(layout, quantization=quantization)
    rows, ids, weights = layer.rows(12), random_ids(12, 2, 5), normal(12, 2, seed=7)
    ids[ids == 1] = 2
    counts = counts_of(ids, 5)
    assert counts[1] == 0
    fields = {"local_ids": ids, "topk_weights": weights}
    handle = layer.handle(12)
    out = layer.apply(rows, handle=handle, **fields, expert_num_tokens_host=counts)
    slots = sum(cdiv(count, ALIGNMENT) for count in counts) * ALIGNMENT
    exact = contiguous_buffers(layer.config, 12, 2, slots, psum=False)
    assert exact["slot_output"] == ((4 * 128, 256), torch.bfloat16)
    assert handle.workspace.nbytes == nbytes(exact, output=out.nbytes)
    assert_close_to_oracle(out, layer.expected(rows, ids, weights), layer.tolerance)
    assert_same(out, layer.apply(rows, **fields))


@by_contiguous_layout
def test_counts_on_the_host_of_one_call_after_the_other(layout: str) -> None:
    """Of few and of many experts, in one arena with calls that have none."""
    layer = make(layout)
    weights = normal(5, 2, seed=7)
    for step, last_expert in enumerate((0, 4, 1, 4, 0)):
        rows, ids = normal(5, 256, seed=step, dtype=torch.bfloat16), random_ids(5, 2, 5).clamp(max=last_expert)
        expected = layer.expected(rows, ids, weights)
        for counts in (counts_of(ids, 5), None):
            handle = layer.handle(5)
            given = {"local_ids": ids, "topk_weights": weights, "expert_num_tokens_host": counts}
            assert_close_to_oracle(layer.apply(rows, handle=handle, **given), expected, torch.bfloat16)
            handle.workspace.release()


@pytest.mark.parametrize("layout", [MASKED, TRITON_FUSED_MOE])
def test_counts_on_the_host_change_nothing_elsewhere(layout: str) -> None:
    layer = make(layout)
    rows, ids = layer.rows(5), random_ids(5, 2, 5)
    expected = layer.apply(rows, local_ids=ids, topk_weights=None)
    assert torch.equal(layer.apply(rows, local_ids=ids, expert_num_tokens_host=counts_of(ids, 5)), expected)


@pytest.mark.parametrize(
    ("counts", "seen"),
    [
        ([1, 2, 3], "3 that add up to 6"),
        ([0] * 6, "6 that add up to 0"),
        ([19, 0, 0, 0, 0], "5 that add up to 19"),
        ([9, -1, 0, 0, 0], "5 that add up to 8"),
        ([], "0 that add up to 0"),
    ],
    ids=str,
)
@by_layout
def test_wrong_counts_on_the_host_are_refused(layout: str, counts: list[int], seen: str) -> None:
    layer = make(layout)
    rows, ids = layer.rows(9), random_ids(9, 2, 5)
    with pytest.raises(InputError, match=f"must be 5 counts that add up to at most 18 pairs, got {seen}"):
        layer.apply(rows, local_ids=ids, expert_num_tokens_host=counts)


@by_layout
def test_counts_of_zero_on_the_host_give_zeros(layout: str, grids: list[Any]) -> None:
    layer = make(layout)
    ids = torch.full((3, 2), -1, dtype=torch.int32, device=DEVICE)
    out = layer.apply(layer.rows(3) * torch.nan, local_ids=ids, expert_num_tokens_host=[0] * 5)
    assert torch.equal(out, torch.zeros_like(out))
    assert not grids


def without_psum(layer: Layer) -> Layer:
    library: DeepGemm = hybrid(layer)._library
    hybrid(layer)._library = replace(library, features=library.features - {"psum"})
    return layer


@by_kind
@pytest.mark.parametrize("routing", [ROUTINGS["empty_in_front"], ROUTINGS["some_skipped"], ROUTINGS["none_here"]])
def test_library_without_group_ends(routing: list[list[int]], quantization: QuantConfig | None) -> None:
    layer = without_psum(make(CONTIGUOUS, quantization=quantization))
    ids = torch.tensor(routing, dtype=torch.int32, device=DEVICE)
    handle, rows, num_rows = layer.handle(len(ids)), layer.rows(len(ids)), len(ids)
    out = layer.apply(rows, handle=handle, local_ids=ids)
    buffers = contiguous_buffers(layer.config, num_rows, 2, psum=False)
    # Room for any routing, and the expert of each row of it.
    assert buffers["row_expert"][0] == buffers["slot_output"][0][:1] == (num_rows * 2 * 128,)
    assert handle.workspace.nbytes == nbytes(buffers, output=out.nbytes)
    assert_close_to_oracle(out, layer.expected(rows, ids, None), layer.tolerance)
    assert_same(out, make(CONTIGUOUS, quantization=quantization).apply(rows, local_ids=ids))


def test_buffers_of_a_large_layer_are_exact_arithmetic() -> None:
    config = make_config(
        num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048, quantization=Fp8Block(),
        parallel=ParallelConfig(ep_size=8),
    )  # fmt: skip
    fp8, fp32, bf16, int32 = torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.int32
    slots = cdiv(65536 * 8 + 32 * 127, 128) * 128
    buffers = contiguous_buffers(config, 65536)
    assert buffers["activations"] == ((slots, 7168), fp8)
    assert buffers["activation_scale"] == ((56, slots), fp32)
    assert buffers["gate_up"] == ((slots, 4096), bf16)
    assert buffers["intermediate"] == ((slots, 2048), fp8)
    assert buffers["intermediate_scale"] == ((16, slots), fp32)
    assert buffers["slot_output"] == ((slots, 7168), bf16)
    assert buffers["block_expert"] == ((slots // 128,), int32)
    assert buffers["group_ends"] == ((32,), int32)
    assert not {"row_expert", "sorted_pairs"} & buffers.keys()
    masked = masked_buffers(config, 129, ue8m0=True)
    assert masked["activations"] == ((32, 256, 7168), fp8)
    assert masked["activation_scale"] == ((32, 14, 256), int32)
    assert masked["intermediate_scale"] == ((32, 4, 256), int32)
    assert masked["slot_of_pair"] == ((129, 8), int32)
    batched = batched_buffers(replace(config, quantization=None), 32, 64)
    assert batched["activations"] == ((32, 128, 7168), bf16)
    assert not {"activation_scale", "intermediate_scale", "slot_of_pair"} & batched.keys()


BATCHES = [
    # In the interpreter an expert with all the rows of its slice is one of few: each row takes milliseconds.
    *((max_tokens, 512 if on_gpu else 5) for max_tokens in (128, 64, 1)),
    (40, 40),
]


@pytest.mark.parametrize(("max_tokens", "max_rows"), BATCHES)
@by_kind
def test_batched_experts(max_tokens: int, max_rows: int, quantization: QuantConfig | None) -> None:
    layer = make(quantization=quantization)
    most = min(max_tokens, max_rows)
    layer.check_batched([0, most, 1, 0, min(most, 3)], max_tokens)
    layer.check_batched([0] * 5, max_tokens)
    assert layer.experts.counters() == {MASKED: 2}


@by_kind
def test_batched_experts_of_several_blocks(quantization: QuantConfig | None) -> None:
    layer = make(quantization=quantization, num_experts=2, hidden_size=128)
    layer.check_batched([130, 2] if on_gpu else [2, 0], max_tokens=256)


@by_kind
def test_batched_experts_in_the_fused_experts(quantization: QuantConfig | None) -> None:
    layer = make(TRITON_FUSED_MOE, quantization=quantization)
    layer.check_batched([0, 7, 1, 0, 3], max_tokens=24)
    assert layer.experts.counters() == {TRITON_FUSED_MOE: 1}


@pytest.mark.parametrize("by_group", [True, False], ids=["by_group", "by_row"])
@pytest.mark.parametrize(("max_tokens", "max_rows"), BATCHES)
def test_batched_rows_that_the_dispatcher_quantized(max_tokens: int, max_rows: int, by_group: bool) -> None:
    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized, scales = quantized_rows(rows, 128)
        return quantized, group_major(scales) if by_group else scales.contiguous()

    layer = make(quantization=Fp8Block())
    most = min(max_tokens, max_rows)
    layer.check_batched([0, most, 1, 0, min(most, 3)], max_tokens, quantize)
    assert layer.experts.counters() == {MASKED: 1}


@by_kind
def test_batched_rows_are_not_copied_where_they_lie_right(quantization: QuantConfig | None) -> None:
    layer = make(quantization=quantization)
    taken: list[tuple[int, ...]] = []
    library: DeepGemm = hybrid(layer)._library

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(a: Any, *rest: Any) -> Any:
            operands = a if isinstance(a, tuple) else (a,)
            taken.append(tuple(operand.data_ptr() for operand in operands))
            return call(a, *rest)

        return noted

    hybrid(layer)._library = replace(library, _masked=tuple(map(noting, library._masked)))
    batch, counts, _ = layer.batch([1, 0, 2, 1, 0], 128)
    sent: tuple[torch.Tensor, ...] = (batch,)
    if quantization is not None:
        rows, scales = quantized_rows(batch, 128)
        sent = rows, group_major(scales)
    layer.apply(sent[0], expert_num_tokens=counts, scales=sent[1] if len(sent) > 1 else None)
    assert taken[0] == tuple(each.data_ptr() for each in sent)
    # TMA takes addresses of 16 bytes.
    unaligned = batch.new_zeros(batch.numel() + 1)[1:].view_as(batch).copy_(batch)
    layer.apply(unaligned, expert_num_tokens=counts)
    assert all(address % 16 == 0 for operands in taken for address in operands)


@by_kind
@pytest.mark.parametrize("max_tokens", [128, 3])
def test_batches_of_any_strides_and_alignment(max_tokens: int, quantization: QuantConfig | None) -> None:
    layer = make(quantization=quantization)
    batch, counts, used = layer.batch([1, 0, 2, 1, 0], max_tokens)
    expected = layer.apply(batch, expert_num_tokens=counts)[used]
    storage = torch.full((5, max_tokens + 1, 256 + 8), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    unaligned = torch.full((batch.numel() + 1,), torch.nan, dtype=torch.bfloat16, device=DEVICE)[1:].view_as(batch)
    for place in (storage[:, :max_tokens, :256], storage[:, 1:, 1:257], unaligned):
        place.copy_(batch)
        assert torch.equal(layer.apply(place, expert_num_tokens=counts)[used], expected)


@by_kind
@by_deep_gemm_layout
def test_two_ranks_add_up_to_the_layer(layout: str, quantization: QuantConfig | None) -> None:
    whole = make_config(**(SIZES | {"quantization": quantization}))
    weights, inputs = (
        Weights.random(whole, torch.device(DEVICE)),
        Inputs.random(whole, 6, torch.device(DEVICE), seed=3),
    )
    total = torch.zeros(6, 256, device=DEVICE)
    for rank in range(2):
        parallel = ParallelConfig(ep_size=2, ep_rank=rank)
        config = make_config(**(SIZES | {"quantization": quantization, "parallel": parallel}))
        mine = config.expert_placement.experts_of_rank[rank]
        assert len(mine) == config.num_local_experts == (3, 2)[rank]
        slot_of = torch.full((5,), -1, dtype=torch.int32, device=DEVICE)
        slot_of[list(mine)] = torch.arange(len(mine), dtype=torch.int32, device=DEVICE)
        own = ExpertWeights(**weights.of_rank(config)).canonical(config)
        layer = fix(Layer(config, own, DeepGemmHybrid(config, own), WorkspaceArena(DEVICE, poison=True)), layout)
        ids = slot_of[inputs.topk_ids]
        total += layer.check_standard(inputs.hidden_states, ids, inputs.topk_weights).float()
    assert_close_to_oracle(total, oracle(whole, weights, inputs, layer.rounds_gate_up), layer.tolerance)


def two_layers(layout: str | None, **overrides: Any) -> list[Layer]:
    """Of one configuration, with other weights and in one arena."""
    config = make_config(**(SIZES | overrides))
    arena, weights = WorkspaceArena(DEVICE, poison=True), make_weights(config)
    both = weights, backwards(weights)
    return [fix(Layer(config, each, DeepGemmHybrid(config, each), arena), layout) for each in both]


def alone(layer: Layer) -> Layer:
    """The same layer, sharing nothing but its weights with any other."""
    experts = DeepGemmHybrid(layer.config, layer.weights)
    experts.layouts = hybrid(layer).layouts
    return Layer(layer.config, layer.weights, experts, WorkspaceArena(DEVICE, poison=True))


def check(layer: Layer, seed: int, num_rows: int, expected: torch.Tensor | None = None, **changes: Any) -> torch.Tensor:
    """A call in the layer's arena has the bits of one that shares nothing with any other, which are returned."""
    given: dict[str, Any] = {
        "activations": normal(num_rows, layer.config.hidden_size, seed=seed, dtype=torch.bfloat16),
        "local_ids": random_ids(num_rows, 2, 5).roll(seed, 0),
        "topk_weights": normal(num_rows, 2, seed=seed + 1),
    } | changes
    if expected is None:
        expected = alone(layer).apply(**(given | {"output": None}))
    handle = layer.handle(num_rows)
    assert torch.equal(layer.apply(handle=handle, **given), expected)
    handle.workspace.release()
    return expected


@by_kind_of_few
@by_deep_gemm_layout
def test_layers_in_one_arena_do_not_mix(layout: str, quantization: QuantConfig | None) -> None:
    first, second = two_layers(layout, quantization=quantization)
    for step, num_rows in enumerate((1, 2, 1, 2)):
        check(first, step, num_rows)
        check(second, step, num_rows)


@pytest.mark.parametrize(
    "overrides",
    [
        {"activation": Activation.GELU_AND_MUL},
        {"hidden_size": 128},
        {"intermediate_size": 256},
        {"num_experts": 6},
        {"quantization": None},
    ],
    ids=str,
)
@by_deep_gemm_layout
def test_layers_of_two_configurations_in_one_arena(layout: str, overrides: dict[str, Any]) -> None:
    first = two_layers(layout, quantization=Fp8Block())[0]
    other = two_layers(layout, **({"quantization": Fp8Block()} | overrides))[0]
    second = fix(Layer(other.config, other.weights, other.experts, first.arena), layout)
    expected: list[torch.Tensor | None] = [None, None]
    for _ in range(3 if on_gpu else 2):
        for place, layer in enumerate((first, second)):
            expected[place] = check(layer, 1, 2, expected[place])


def test_layouts_share_their_memory() -> None:
    first, second = two_layers(None, quantization=Fp8Block())
    layouts = [MASKED, CONTIGUOUS, TRITON_FUSED_MOE]
    if hybrid(first).has_wide_tiles:
        layouts += [CONTIGUOUS_TRITON_GATE_UP, CONTIGUOUS_TRITON_DOWN]
    expected: dict[tuple[str, int], torch.Tensor] = {}
    for layout in layouts * 2:
        for place, layer in enumerate((first, second)):
            hybrid(layer).layouts = FixedLayout(layout)
            expected[layout, place] = check(layer, place, 2, expected.get((layout, place)))


@by_deep_gemm_layout
def test_layouts_of_the_arguments(layout: str) -> None:
    layer = two_layers(layout)[0]
    wide = normal(2, 320, seed=3, dtype=torch.bfloat16)
    changes: list[dict[str, Any]] = [
        {},
        {"activations": wide[:, :256]},
        {"activations": wide[:, 1:257]},
        {"activations": wide[:1, :256].expand(2, -1)},
        {"local_ids": random_ids(2, 4, 5)[:, ::2]},
        {"topk_weights": normal(2, 4, seed=7)[:, 1::2]},
        {"topk_weights": None},
        {"output": torch.full((2, 256), torch.nan, dtype=torch.bfloat16, device=DEVICE)},
    ]
    expected = [check(layer, step, 2, **change) for step, change in enumerate(changes)]
    for step, change in enumerate(changes):
        check(layer, step, 2, expected[step], **change)


@by_kind_of_few
@pytest.mark.parametrize(
    ("layout", "module"), [(MASKED, masked_slots), (CONTIGUOUS, counting_sort)], ids=[MASKED, CONTIGUOUS]
)
def test_layers_of_one_configuration_describe_their_launches_once(
    layout: str, module: Any, quantization: QuantConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[int] = []
    name = f"{module.__name__.rpartition('.')[2]}_launches"
    original = getattr(module, name)

    def describe(local_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        described.append(len(local_ids))
        return original(local_ids, *args, **kwargs)

    monkeypatch.setattr(module, name, describe)
    first, second = two_layers(layout, quantization=quantization)
    rows, ids, weights = first.rows(2), random_ids(2, 2, 5), normal(2, 2, seed=7)
    for _ in range(3):
        for layer in (first, second):
            handle = layer.handle(2)
            layer.apply(rows.clone(), handle=handle, local_ids=ids.clone(), topk_weights=weights.clone())
            handle.workspace.release()
    # One call to compile, one to see that all of it launches directly; the interpreter needs the first alone.
    assert 1 <= len(described) <= 2


@pytest.mark.parametrize("layout", [MASKED, TRITON_FUSED_MOE])
@by_kind_of_few
def test_batched_experts_in_one_arena(layout: str, quantization: QuantConfig | None) -> None:
    first, second = two_layers(layout, quantization=quantization)
    kept = []
    for max_tokens, few in ((4, [0, 1, 2, 4, 0]), (4, [4, 0, 2, 0, 1]), (128, [3, 0, 0, 1, 2])) * 2:
        counts = [MORE_ROWS * count for count in few]
        if max_tokens == 4:
            max_tokens *= MORE_ROWS
        for layer in (first, second):
            batch, expert_num_tokens, used = layer.batch(counts, max_tokens)
            handle = layer.handle(max_tokens)
            out = layer.apply(batch, handle=handle, expert_num_tokens=expert_num_tokens)
            expected = layer.expected(batch[used], used.nonzero()[:, :1].int(), None)
            assert_close_to_oracle(out[used], expected, layer.tolerance)
            handle.workspace.release()
            # Other tensors than the next call's, even for what looks at addresses; later calls must not read them.
            kept += [batch.zero_(), expert_num_tokens.zero_()]


@by_kind_of_few
@by_deep_gemm_layout
def test_repeats_bitwise(layout: str, quantization: QuantConfig | None) -> None:
    layer = make(layout, quantization=quantization)
    num_rows = 300 if on_gpu else 6
    rows, ids, weights = layer.rows(num_rows), random_ids(num_rows, 2, 5), normal(num_rows, 2, seed=7)
    first = layer.apply(rows, local_ids=ids, topk_weights=weights)
    for _ in range(20 if on_gpu else 1):
        assert torch.equal(first, layer.apply(rows, local_ids=ids, topk_weights=weights))


@by_kind_of_few
@by_deep_gemm_layout
def test_steady_state_allocates_nothing(
    layout: str, quantization: QuantConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(layout, quantization=quantization)
    rows, ids, weights = layer.rows(3), random_ids(3, 2, 5), normal(3, 2, seed=7)
    handle = layer.handle(3)
    # The first call compiles, and on a GPU the second one finds that all of it launches directly.
    for _ in range(3 if on_gpu else 1):
        first = layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
    held = handle.workspace.nbytes
    for name in ("empty", "zeros", "full", "empty_like", "zeros_like"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("allocates"))
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"] if on_gpu else 0
    again = layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
    assert not on_gpu or torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert again.data_ptr() == first.data_ptr()
    assert handle.workspace.nbytes == held


@by_kind_of_few
@by_layout
def test_declared_memory_covers_a_call(
    layout: str, quantization: QuantConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many rows as can be received; also with the counts on the host, and with a library that wants them."""
    monkeypatch.setattr(deep_gemm_hybrid, "reachable", lambda _, most, *__: {(layout, most)})
    config = make_config(**(SIZES | {"quantization": quantization, "max_tokens_per_rank": 6}))
    declared = DeepGemmHybrid.memory(config)
    ids = random_ids(6, 2, 5)
    kinds: list[tuple[Any, Any]] = [(None, None)]
    if layout not in (MASKED, TRITON_FUSED_MOE):
        kinds += [(counts_of(ids, 5), None), (None, without_psum)]
    for counts, prepare in kinds:
        layer = make(layout, quantization=quantization, max_tokens_per_rank=6)
        if prepare is not None:
            prepare(layer)
        handle = layer.handle(6)
        layer.apply(layer.rows(6), handle=handle, local_ids=ids, expert_num_tokens_host=counts)
        assert handle.workspace.nbytes <= sum(declared.values()) + 16 * len(declared)


@by_kind
def test_declared_memory_is_the_largest_of_all_layouts(quantization: QuantConfig | None) -> None:
    config = make_config(**(SIZES | {"quantization": quantization, "num_experts": 40, "top_k": 1}))
    declared = DeepGemmHybrid.memory(config)
    # 256 rows in slices of 256 for each expert take more than 512 rows sorted by expert.
    masked, contiguous = masked_buffers(config, 256), contiguous_buffers(config, 512, psum=False)
    assert declared["activations"] == torch.Size(masked["activations"][0]).numel() * config.weight_dtype.itemsize
    assert masked["activations"][0][:2] == (40, 256)
    for buffers in (masked, contiguous):
        for name, (shape, dtype) in buffers.items():
            assert declared[name] >= torch.Size(shape).numel() * dtype.itemsize, name
    assert declared["output"] == 512 * 256 * 2


def test_dispatch_capacity_bounds_memory() -> None:
    small = make_config(**SIZES, dispatch_capacity=8, cuda_graph=True, parallel=ParallelConfig(ep_size=4))
    assert DeepGemmHybrid.memory(small)["output"] == 4 * 8 * 256 * 2


def test_weights_stay_where_they_are() -> None:
    for quantization in KINDS.values():
        config = make_config(**(SIZES | {"quantization": quantization}))
        weights = make_weights(config)
        assert DeepGemmHybrid.prepare_weights(config, weights) is weights
    assert DeepGemmHybrid.extra_weight_bytes(config) == 0


@by_kind_of_few
def test_checkpoints_that_store_up_before_gate(quantization: QuantConfig | None) -> None:
    layer = make(MASKED, quantization=quantization)
    rows, ids = layer.rows(5), random_ids(5, 2, 5)
    expected = layer.apply(rows, local_ids=ids)

    def halves_swapped(tensor: torch.Tensor) -> torch.Tensor:
        gate, up = tensor.chunk(2, dim=1)
        return torch.cat([up, gate], dim=1)

    weights = layer.weights
    stored = {name: getattr(weights, name) for name in ("w13", "w13_scale") if getattr(weights, name) is not None}
    up_gate = {name: halves_swapped(tensor) for name, tensor in stored.items()}
    restored = replace(weights, **{name: gate_first(tensor) for name, tensor in up_gate.items()})
    for given, is_right in ((restored, True), (replace(weights, **up_gate), False)):
        experts = DeepGemmHybrid(layer.config, given)
        out = Layer(layer.config, given, experts, layer.arena).apply(rows, local_ids=ids)
        assert torch.equal(out, expected) == is_right


@pytest.fixture
def ue8m0_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle quantizes activations by scales that are powers of two."""

    def fake_quantize(x: torch.Tensor, group_size: int | None = None, *_: object, **__: object) -> torch.Tensor:
        return dequantize_rows(*quantized_rows(x, group_size, ue8m0=True), group_size)

    monkeypatch.setattr(reference, "fake_quantize", fake_quantize)


def packed_scales(layout: str) -> Layer:
    """A layer as SM 100 has it: the double gets packed scales and unpacks them."""
    layer = make(layout, quantization=Fp8Block(), hidden_size=640)
    weights = layer.weights
    assert weights.w13_scale is not None
    assert weights.w2_scale is not None
    w13, w13_scale = requantize_weights_ue8m0(weights.w13, weights.w13_scale)
    w2, w2_scale = requantize_weights_ue8m0(weights.w2, weights.w2_scale)
    weights = replace(weights, w13=w13, w13_scale=w13_scale, w2=w2, w2_scale=w2_scale)
    experts: Any = DeepGemmHybrid(layer.config, weights)
    experts._ue8m0, experts.layouts = True, hybrid(layer).layouts
    library: DeepGemm = experts._library

    def unpacking(call: Callable[..., Any]) -> Callable[..., Any]:
        def unpacked(a: tuple[torch.Tensor, torch.Tensor], *rest: Any) -> Any:
            rows, packed = a
            groups = rows.shape[-1] // 128
            assert packed.dtype is torch.int32
            assert packed.shape == (*rows.shape[:-1], cdiv(groups, 4))
            assert packed.mT.is_contiguous()
            return call((rows, group_major(unpack_ue8m0(packed, groups))), *rest)

        return unpacked

    bf16, (per_row, psum) = library._contiguous
    experts._library = replace(
        library,
        _contiguous=(bf16, (unpacking(per_row), unpacking(psum))),
        _masked=(library._masked[0], unpacking(library._masked[1])),
    )
    return Layer(layer.config, weights, experts, layer.arena)


@cpu_only
@pytest.mark.usefixtures("ue8m0_oracle")
@pytest.mark.parametrize("layout", [MASKED, CONTIGUOUS])
def test_packed_scales(layout: str) -> None:
    layer = packed_scales(layout)
    layer.check_standard(layer.rows(9), random_ids(9, 2, 5), normal(9, 2, seed=7))


@cpu_only
@pytest.mark.usefixtures("ue8m0_oracle")
def test_packed_scales_of_the_contiguous_format() -> None:
    layer = packed_scales(CONTIGUOUS)
    layer.check_contiguous([0, 5, 0, 3, 0])
    assert layer.experts.counters() == {CONTIGUOUS: 1}


@cpu_only
def test_sent_scales_that_are_no_powers_of_two_go_to_the_fused_experts() -> None:
    layer = packed_scales(CONTIGUOUS)
    layer.rounds_gate_up = False
    layer.check_contiguous([0, 5, 0, 3, 0], quantizer(Fp8Block()))
    rows, ids = layer.rows(4), random_ids(4, 2, 5)
    quantized, scales = quantized_rows(rows, 128)
    out = layer.apply(quantized, local_ids=ids, scales=scales)
    assert_close_to_oracle(out, layer.expected(rows, ids, None), layer.tolerance)
    assert layer.experts.counters() == {TRITON_FUSED_MOE: 2}


@cpu_only
@pytest.mark.usefixtures("ue8m0_oracle")
@pytest.mark.parametrize("max_tokens", [128, 40])
def test_packed_scales_of_batched_experts(max_tokens: int) -> None:
    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized, scales = quantized_rows(rows, 128, ue8m0=True)
        return quantized, pack_ue8m0(scales)

    layer = packed_scales(MASKED)
    layer.check_batched([0, 7, 1, 0, 5], max_tokens)
    layer.check_batched([0, 7, 1, 0, 5], max_tokens, quantize)
    # The fused experts do not take packed ones, whatever the rule says.
    hybrid(layer).layouts = FixedLayout(TRITON_FUSED_MOE)
    layer.check_batched([0, 7, 1, 0, 5], max_tokens, quantize)
    assert layer.experts.counters() == {MASKED: 3}


@cpu_only
def test_batched_scales_that_are_no_powers_of_two_go_to_the_fused_experts() -> None:
    layer = packed_scales(MASKED)
    layer.rounds_gate_up = False
    layer.check_batched([0, 7, 1, 0, 5], 16, lambda rows: quantized_rows(rows, 128))
    assert layer.experts.counters() == {TRITON_FUSED_MOE: 1}


def test_counters_of_layers() -> None:
    layer = make(MASKED)
    assert layer.experts.counters() == {}
    decode, prefill = (
        ModularKernel(Local(layer.config, layer.arena), DeepGemmHybrid(layer.config, layer.weights)) for _ in range(2)
    )
    experts: Any = prefill.experts
    experts.layouts = FixedLayout(CONTIGUOUS)
    both = PhasedLayer(decode, prefill)
    inputs = Inputs.random(layer.config, 3, torch.device(DEVICE), seed=0)
    both(*inputs.as_tuple(), max_num_tokens=3)
    for _ in range(2):
        both(*inputs.as_tuple())
    assert decode.counters() == {"deep_gemm_hybrid.masked": 1}
    assert prefill.counters() == {"deep_gemm_hybrid.contiguous": 2}
    assert both.counters() == {
        "decode.deep_gemm_hybrid.masked": 1,
        "prefill.deep_gemm_hybrid.contiguous": 2,
    }
    first, *others = decode.counters().values()
    decode(*inputs.as_tuple())
    assert (first, others, decode.counters()) == (1, [], {"deep_gemm_hybrid.masked": 2})


@pytest.mark.parametrize(
    ("quantization", "psum"), [(None, True), (Fp8Block(), False)], ids=["bf16-psum", "fp8-per_row"]
)
def test_warm_up_covers_every_number_of_slots(
    quantization: QuantConfig | None, psum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous from three rows on, so that few rows are enough to warm up all there is."""
    monkeypatch.setattr(layout_tables, "MASKED_ROWS", 2)
    layer = make(quantization=quantization, num_experts=20, top_k=8, max_tokens_per_rank=4, hidden_size=128)
    gemms: list[torch.Size] = []
    if not psum:
        without_psum(layer)
    spy(layer, gemms)
    steps = list(layer.experts.warm_up_steps(layer.arena))
    assert not gemms
    names = [name for name, _ in steps]
    assert names[:4] == [f"deep_gemm_hybrid, {rows} rows" for rows in (4, 3, 2, 1)]
    # 32 pairs open 20 segments, none of which they can fill: 21 blocks at most.
    assert names[4:] == ["deep_gemm, contiguous, 128 to 2048 slots", "deep_gemm, contiguous, 2176 to 2688 slots"]
    for _, step in steps[:4]:
        step()
    assert layer.experts.counters() == {MASKED: 2, CONTIGUOUS: 2}
    gemms.clear()
    held = layer.arena.nbytes
    for _, step in steps[4:]:
        step()
    assert layer.arena.nbytes == held
    assert layer.experts.counters() == {MASKED: 2, CONTIGUOUS: 2}
    assert sorted(gemms) == sorted(
        (slots, columns) for slots in range(128, 2688 + 1, 128) for columns in (2 * 128, 128)
    )
    # A buffer that is outgrown would be made anew by the first call after warming up.
    whole = ModularKernel(Local(layer.config, layer.arena), layer.experts)
    dispatched = whole.prepare(*Inputs.random(layer.config, 4, torch.device(DEVICE), seed=0).as_tuple())
    held = dispatched.handle.workspace.nbytes
    whole.finalize(whole.apply_experts(dispatched), dispatched)
    assert layer.arena.nbytes == held


def test_warm_up_without_a_contiguous_call_is_rows_alone() -> None:
    layer = make(max_tokens_per_rank=200)
    names = [name for name, _ in layer.experts.warm_up_steps(layer.arena)]
    assert names == [f"deep_gemm_hybrid, {rows} rows" for rows in warm_up_rows(200)]


SUPPORTED = [
    ({}, {}),
    ({"cuda_graph": True}, {}),
    ({"hidden_size": 64, "intermediate_size": 192}, {}),
    ({"quantization": Fp8Block()}, {}),
    ({}, {"sm": 100}),
    ({"quantization": Fp8Block()}, {"sm": 103}),
    ({}, {"packages": machines.deep_gemm_with("bf16")}),
    ({"quantization": Fp8Block()}, {"packages": machines.deep_gemm_with("fp8")}),
    ({}, {"packages": machines.deep_gemm_with("bf16", "nvrtc"), "nvcc": False}),
    ({"intermediate_size": 256, "parallel": ParallelConfig(tp_size=2), "quantization": Fp8Block()}, {}),
    ({"activation": Activation.SWIGLU_OAI}, {}),
]
"""(configuration, machine): each on this side of a gate."""

REFUSED = [
    ("dtype", {"dtype": torch.float16}, {}, "float16"),
    ("dtype", {"dtype": torch.float32}, {}, "float32"),
    ("quantization", {"quantization": Fp8PerToken()}, {}, "fp8_per_token"),
    ("quantization", {"quantization": Fp8Block(64, 128)}, {}, "64 x 128"),
    ("deep_gemm", {}, {"packages": machines.TRITON}, "not installed"),
    ("symbols", {}, {"packages": machines.deep_gemm_with("fp8", "psum")}, "fp8, psum"),
    ("symbols", {"quantization": Fp8Block()}, {"packages": machines.deep_gemm_with("bf16")}, "bf16"),
    ("sm", {}, {"sm": 89}, "SM 89"),
    ("sm", {}, {"sm": 120}, "SM 120"),
    ("jit compiler", {}, {"nvcc": False}, "none"),
    ("triton", {}, {"packages": {"deep_gemm": machines.DEEP_GEMM, "triton": Package("triton")}}, "not installed"),
    ("sizes", {"hidden_size": 96}, {}, "H 96, I 128"),
    ("sizes", {"intermediate_size": 96}, {}, "H 256, I 96"),
    ("sizes", {"hidden_size": 192, "quantization": Fp8Block()}, {}, "H 192, I 128"),
    ("sizes", {"parallel": ParallelConfig(tp_size=4)}, {}, "H 256, I 32 of a rank"),
    ("sizes", {"intermediate_size": 192, "quantization": Fp8Block()}, {}, "H 256, I 192"),
    ("has_bias", {"has_bias": True}, {}, "True"),
]
"""(gate that refuses, configuration, machine, what it saw)."""


def described(changes: dict[str, Any]) -> Environment:
    environment = machines.gpu(changes.get("sm", 90))
    return environment.pretend(**{name: value for name, value in changes.items() if name != "sm"})


@pytest.mark.parametrize(("overrides", "changes"), SUPPORTED)
def test_supported(overrides: dict[str, Any], changes: dict[str, Any]) -> None:
    verdict = DeepGemmHybrid.supports(make_config(**(SIZES | overrides)), described(changes))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(("gate", "overrides", "changes", "seen"), REFUSED)
def test_refused(gate: str, overrides: dict[str, Any], changes: dict[str, Any], seen: str) -> None:
    verdict = DeepGemmHybrid.supports(make_config(**(SIZES | overrides)), described(changes))
    # Of a library that is not there nothing else can be found.
    missing = {"symbols"} if gate == "deep_gemm" else set()
    assert {failed.name for failed in verdict.failed} == {gate} | missing
    failed = next(each for each in verdict.failed if each.name == gate)
    assert seen in failed.seen
    assert failed.needs


def test_every_gate_is_tested_both_ways() -> None:
    gates = {gate.name for gate in DeepGemmHybrid.supports(make_config(**SIZES), described({})).gates}
    assert gates - {gate for gate, *_ in REFUSED} == {"cuda_graph"}  # which it never refuses


def test_supported_in_the_interpreter_with_a_library_that_computes_there() -> None:
    packages = machines.deep_gemm_with("bf16", "fp8", "psum", "cpu")
    for quantization in KINDS.values():
        config = make_config(**(SIZES | {"quantization": quantization}))
        assert DeepGemmHybrid.supports(config, machines.INTERPRETER.pretend(packages=packages)).ok
        for environment in (
            machines.CPU.pretend(packages=packages),
            machines.INTERPRETER.pretend(packages=machines.deep_gemm_with("bf16", "fp8", "psum")),
        ):
            failed = DeepGemmHybrid.supports(config, environment).failed
            assert [gate.name for gate in failed] == ["sm", "jit compiler"]
            assert failed[0].seen == "no CUDA device"
    assert DeepGemmHybrid.activation_formats == set(ActivationFormat)


def test_details_say_what_will_run() -> None:
    config = make_config(**SIZES)

    def gemms(changes: dict[str, Any]) -> str:
        return DeepGemmHybrid.details(config, described(changes))["gemms"]

    assert gemms({}) == "deep_gemm 0.1.5, contiguous: group ends on the device"
    without = {"packages": machines.deep_gemm_with("bf16")}
    assert gemms(without) == "deep_gemm 0.1.5, contiguous: one expert per row, full capacity"
    assert gemms({"sm": 100}).endswith("; SM 100 has never been run")
    details = DeepGemmHybrid.details(config, described({}))
    assert details["layouts"].startswith("masked up to 256 rows, contiguous above; not measured on")
    assert details["triton kernels"].startswith("hopper")


LARGE: dict[str, Any] = {
    "num_experts": 32,
    "top_k": 4,
    "hidden_size": 2048,
    "intermediate_size": 768,
    "max_tokens_per_rank": 4096,
}


@gpu_only
@pytest.mark.parametrize("num_rows", [1, 64, 256, 257, 1000, 4096])
@by_kind
@by_layout
def test_large_layers(layout: str, quantization: QuantConfig | None, num_rows: int) -> None:
    layer = make(layout, **LARGE, quantization=quantization)
    layer.check_standard(layer.rows(num_rows), random_ids(num_rows, 4, 32), normal(num_rows, 4, seed=7))


@gpu_only
@pytest.mark.parametrize("max_tokens", [40, 64, 128, 512])
@by_kind
def test_large_batches(max_tokens: int, quantization: QuantConfig | None) -> None:
    layer = make(**LARGE, quantization=quantization)
    layer.check_batched([0, max_tokens, 1, 17, 0, 33, 40, 2] * 4, max_tokens)


@gpu_only
@by_kind
@by_layout
def test_nothing_waits_for_the_device(layout: str, quantization: QuantConfig | None) -> None:
    layer = make(layout, quantization=quantization)
    rows, ids, weights = layer.rows(300), random_ids(300, 2, 5), normal(300, 2, seed=7)
    handle, batch_handle = layer.handle(300), layer.handle(5)
    batch, counts, _ = layer.batch([0, 128, 1, 0, 5], 128)
    host_counts = counts_of(ids, 5)

    def run() -> None:
        layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)
        layer.apply(rows, handle=handle, local_ids=ids, topk_weights=weights, expert_num_tokens_host=host_counts)
        for max_tokens in (128, 40):
            layer.apply(batch[:, :max_tokens].contiguous(), handle=batch_handle, expert_num_tokens=counts.clamp(max=40))

    for _ in range(3):
        run()
    with no_synchronization():
        run()


@gpu_only
@by_kind
@by_layout
def test_first_calls_of_a_shape_do_not_wait_either(layout: str, quantization: QuantConfig | None) -> None:
    """Once kernels are compiled: buffers of another size are made on the way."""
    layer = make(layout, quantization=quantization)
    rows, ids, weights = layer.rows(300), random_ids(300, 2, 5), normal(300, 2, seed=7)
    layer.apply(rows, local_ids=ids, topk_weights=weights)
    fresh = alone(layer)
    fresh.arena.poison = False
    handle = fresh.handle(300)
    with no_synchronization():
        fresh.apply(rows, handle=handle, local_ids=ids, topk_weights=weights)


@gpu_only
@pytest.mark.parametrize("num_rows", [9, 300])
@by_kind
@by_layout
def test_graph_replays_with_new_routing(layout: str, quantization: QuantConfig | None, num_rows: int) -> None:
    check_graph_replays(make(layout, quantization=quantization), num_rows, num_experts=5)


@gpu_only
@pytest.mark.parametrize("num_rows", [9, 300])
@by_kind
@by_layout
def test_graph_replays_of_the_contiguous_format(layout: str, quantization: QuantConfig | None, num_rows: int) -> None:
    """Nothing waits for the device, and each replay finds other group ends in the same places."""
    layer = make(layout, quantization=quantization)
    slots = cdiv(2 * num_rows + 5 * 127, 128) * 128
    rows = torch.zeros(slots, 256, dtype=torch.bfloat16, device=DEVICE)
    group_ends = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    handle = layer.handle(num_rows)

    def run() -> torch.Tensor:
        return layer.apply(rows, handle=handle, group_ends=group_ends, num_rows=num_rows)

    for _ in range(3):
        run()
    with no_synchronization():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for counts in ([0, 0, 0, 0, 2 * num_rows], [num_rows // 5] * 5, [0] * 5, [1, 0, num_rows, 3, 0]):
        given, ends, expert_of = layer.segments(counts)
        length = min(slots, len(given))
        rows[:length] = given[:length]
        group_ends.copy_(ends)
        graph.replay()
        replayed = out[:length][expert_of[:length] >= 0].clone()
        assert_same(replayed, layer.check_contiguous(counts, num_rows=num_rows))


@gpu_only
@pytest.mark.parametrize("max_tokens", [128, 40])
@by_kind
@pytest.mark.parametrize("layout", [MASKED, TRITON_FUSED_MOE])
def test_graph_replays_of_batched_experts(layout: str, quantization: QuantConfig | None, max_tokens: int) -> None:
    layer = make(layout, quantization=quantization)
    batch = normal(5, max_tokens, 256, seed=6, dtype=torch.bfloat16)
    counts = torch.full((5,), max_tokens, dtype=torch.int32, device=DEVICE)
    handle = layer.handle(max_tokens)
    for _ in range(2):
        layer.apply(batch, handle=handle, expert_num_tokens=counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.apply(batch, handle=handle, expert_num_tokens=counts)
    for step, given in enumerate(([0, 1, 7, max_tokens, 3], [0] * 5, [max_tokens, 0, 0, 2, 1])):
        batch.copy_(normal(5, max_tokens, 256, seed=step, dtype=torch.bfloat16))
        counts.copy_(torch.tensor(given))
        graph.replay()
        used = torch.arange(max_tokens, device=DEVICE) < counts[:, None]
        assert torch.equal(out[used], layer.apply(batch, expert_num_tokens=counts)[used])
        expected = layer.expected(batch[used], used.nonzero()[:, :1].int(), None)
        assert_close_to_oracle(out[used], expected, layer.tolerance)


@gpu_only
@by_kind
@by_deep_gemm_layout
def test_capture_between_eager_calls(layout: str, quantization: QuantConfig | None) -> None:
    first, second = two_layers(layout, quantization=quantization)

    def between(step: int) -> None:
        check(first, step, 9)
        check(second, step, 300)

    check_capture_between_calls(first, second, between)
