"""What this package relies on in DeepGEMM: the same tests for the library on a GPU and for its double on a CPU."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from moe_plugin.compat import deep_gemm as compat
from moe_plugin.compat.deep_gemm import DeepGemm
from moe_plugin.config import Fp8Block
from moe_plugin.numerics import max_row_error, relative_error
from moe_plugin.quantization import dequantize_rows, dequantize_weights, quantize_rows, quantize_weights
from tests.doubles import deep_gemm as double

REAL = pytest.param("cuda", id="library", marks=[pytest.mark.gpu, pytest.mark.sm90, pytest.mark.deep_gemm])
"""The library itself, which computes on a GPU."""

COUNTS = {
    "empty_in_front": [0, 0, 3, 128],
    "empty_in_the_middle": [129, 0, 0, 5],
    "empty_at_the_end": [5, 128, 0, 0],
    "around_a_block": [127, 1, 129, 128],
    "one_group": [0, 300, 0, 0],
    "all_empty": [0, 0, 0, 0],
}
CANARY = 7.0


def rounded_up(rows: int) -> int:
    return -(-rows // 128) * 128


@pytest.fixture(params=[pytest.param("cpu", id="double"), REAL])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cpu":
        with double.installed():
            yield torch.device("cpu")
    else:
        compat.forget()
        yield torch.device("cuda")


@pytest.fixture
def library(device: torch.device) -> DeepGemm:
    found = compat.library()
    assert ("cpu" in found.features) == (device.type == "cpu")
    return found


@contextmanager
def no_synchronization(device: torch.device) -> Iterator[None]:
    """Whatever waits for the device raises."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype, says torch
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Problem:
    """Operands as the library takes them, and the fp32 values that they stand for.

    a: [rows, K] or [G, capacity, K] (with scales for fp8); NaN in every row that `valid` leaves out.
    """

    a: compat.Operand
    b: compat.Operand
    values: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        return self.out.flatten(0, -2)


def problem(
    library: DeepGemm,
    kind: str,
    valid: torch.Tensor,
    groups: int,
    n: int = 256,
    k: int = 384,
    seed: int = 0,
) -> Problem:
    """valid: bool [rows] or [G, capacity]."""
    device = valid.device
    generator = torch.Generator(device).manual_seed(seed)
    a = torch.randn(*valid.shape, k, generator=generator, device=device).bfloat16()
    b = torch.randn(groups, n, k, generator=generator, device=device).bfloat16()
    out = torch.full((*valid.shape, n), CANARY, dtype=torch.bfloat16, device=device)
    if kind == "bf16":
        a[~valid] = torch.nan
        return Problem(a, b, a.float(), b.float(), out)
    # Rows of very different size, so that a scale of another row is seen.
    a *= torch.arange(1, valid.shape[-1] + 1, device=device)[:, None] % 13 + 1
    quantized, scales = quantize_rows(a, 128)
    weights, weight_scales = quantize_weights(b.float(), Fp8Block())
    values = dequantize_rows(quantized, scales, 128)
    quantized.view(torch.uint8)[~valid] = 0x7F  # NaN
    scales[~valid] = torch.nan
    group_major = scales.mT.clone(memory_format=torch.contiguous_format)
    restored = dequantize_weights(weights, weight_scales, Fp8Block())
    b_operand = (weights, library.weight_scales(weight_scales, n, k))
    return Problem((quantized, group_major.mT), b_operand, values, restored, out)


def check_groups(given: Problem, groups: list[slice]) -> None:
    """Rows of every group hold its product; a row of the flattened output is addressed."""
    values = given.values.flatten(0, -2)
    for group, rows in enumerate(groups):
        expected = values[rows] @ given.weights[group].T
        if expected.shape[0]:
            assert relative_error(given.rows[rows], expected) <= 1e-2
            assert max_row_error(given.rows[rows], expected) <= 1e-2


@dataclass(frozen=True)
class Contiguous:
    """Counts laid out one group after the other, with 128 rows to spare at the end."""

    counts: list[int]
    device: torch.device
    capacity: int = 0

    @property
    def starts(self) -> list[int]:
        return [sum(map(rounded_up, self.counts[:group])) for group in range(len(self.counts))]

    @property
    def groups(self) -> list[slice]:
        return [slice(start, start + count) for start, count in zip(self.starts, self.counts, strict=True)]

    @property
    def used(self) -> int:
        return sum(map(rounded_up, self.counts))

    @property
    def valid(self) -> torch.Tensor:
        valid = torch.zeros(self.capacity or self.used + 128, dtype=torch.bool, device=self.device)
        for rows in self.groups:
            valid[rows] = True
        return valid

    def layout(self, psum: bool) -> torch.Tensor:
        if psum:
            return torch.tensor([rows.stop for rows in self.groups], dtype=torch.int32, device=self.device)
        experts = torch.full(self.valid.shape, -1, dtype=torch.int32, device=self.device)
        for group, rows in enumerate(self.groups):
            experts[rows] = group
        return experts


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("psum", [True, False], ids=["psum", "per_row"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_contiguous(library: DeepGemm, device: torch.device, counts: list[int], psum: bool, kind: str) -> None:
    where = Contiguous(counts, device)
    given = problem(library, kind, where.valid, len(counts))
    layout = where.layout(psum)
    library.grouped_gemm_contiguous(given.a, given.b, given.out, layout, psum=psum)
    check_groups(given, where.groups)
    given.out.fill_(CANARY)
    with no_synchronization(device):
        library.grouped_gemm_contiguous(given.a, given.b, given.out, layout, psum=psum)
    check_groups(given, where.groups)
    if psum:
        assert bool((given.out[where.used :] == CANARY).all()), "rows after the last group's block are not touched"


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("expected_rows", [1, 200])
def test_masked(library: DeepGemm, device: torch.device, counts: list[int], kind: str, expected_rows: int) -> None:
    capacity = 384
    num_rows = torch.tensor(counts, dtype=torch.int32, device=device)
    valid = torch.arange(capacity, device=device) < num_rows[:, None]
    given = problem(library, kind, valid, len(counts))
    groups = [slice(group * capacity, group * capacity + count) for group, count in enumerate(counts)]
    library.grouped_gemm_masked(given.a, given.b, given.out, num_rows, expected_rows)
    check_groups(given, groups)
    given.out.fill_(CANARY)
    with no_synchronization(device):
        library.grouped_gemm_masked(given.a, given.b, given.out, num_rows, expected_rows)
    check_groups(given, groups)
    for group, count in enumerate(counts):
        assert bool((given.out[group, rounded_up(count) :] == CANARY).all()), "only blocks with rows are stored"


@pytest.mark.parametrize(("kind", "n", "k"), [("bf16", 320, 192), ("bf16", 128, 64), ("fp8", 128, 128)])
def test_small_and_odd_sizes(library: DeepGemm, device: torch.device, kind: str, n: int, k: int) -> None:
    where = Contiguous([3, 130], device)
    given = problem(library, kind, where.valid, 2, n, k)
    library.grouped_gemm_contiguous(given.a, given.b, given.out, where.layout(True), psum=True)
    check_groups(given, where.groups)


def test_the_alignment_is_that_of_the_layout(library: DeepGemm) -> None:
    assert library.alignment == 128


def test_every_feature_is_found(library: DeepGemm) -> None:
    assert {"bf16", "fp8", "psum"} <= library.features


def in_a_graph(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.deep_gemm
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_graph_replays_with_other_group_ends(kind: str) -> None:
    compat.forget()
    library, device = compat.library(), torch.device("cuda")
    capacity = 4 * 384 + 128
    first = Contiguous([127, 1, 129, 128], device, capacity)
    given, layout = problem(library, kind, first.valid, 4), first.layout(True)
    graph = in_a_graph(lambda: library.grouped_gemm_contiguous(given.a, given.b, given.out, layout, psum=True))
    for counts in ([0, 300, 0, 2], [0, 0, 0, 0], [384, 384, 384, 384]):
        where = Contiguous(counts, device, capacity)
        other = problem(library, kind, where.valid, 4, seed=1)
        copy_operand(given.a, other.a)
        layout.copy_(where.layout(True))
        given.out.fill_(CANARY)
        graph.replay()
        # Weights are those of the capture.
        check_groups(replace(given, values=other.values), where.groups)
        assert bool((given.out[where.used :] == CANARY).all())


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.deep_gemm
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_graph_replays_with_other_numbers_of_rows(kind: str) -> None:
    compat.forget()
    library, device, capacity = compat.library(), torch.device("cuda"), 256
    num_rows = torch.tensor([7, 128, 0, 1], dtype=torch.int32, device=device)
    within = torch.arange(capacity, device=device)
    given = problem(library, kind, within < num_rows[:, None], 4)
    graph = in_a_graph(lambda: library.grouped_gemm_masked(given.a, given.b, given.out, num_rows, 34))
    for counts in ([0, 256, 3, 0], [0, 0, 0, 0]):
        num_rows.copy_(torch.tensor(counts, dtype=torch.int32))
        other = problem(library, kind, within < num_rows[:, None], 4, seed=1)
        copy_operand(given.a, other.a)
        graph.replay()
        groups = [slice(group * capacity, group * capacity + count) for group, count in enumerate(counts)]
        check_groups(replace(given, values=other.values), groups)


def copy_operand(to: compat.Operand, source: compat.Operand) -> None:
    pairs = zip(to, source, strict=True) if isinstance(to, tuple) else [(to, source)]
    for old, new in pairs:
        old.copy_(new)


@pytest.mark.gpu
@pytest.mark.deep_gemm
def test_the_double_has_the_signatures_of_the_library() -> None:
    real = importlib.import_module("deep_gemm")
    for name in double.EXPORTED:
        if name in ("COMPUTES_ON_CPU", "__version__", "get_mk_alignment_for_contiguous_layout"):
            continue
        theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in (real, double))
        assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}, name


class TestTheTrapsOfTheDouble:
    """What the library gets wrong or slow in silence is an AssertionError or NaN in the double."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> Iterator[None]:
        with double.installed():
            yield

    def contiguous(self, counts: list[int], kind: str = "bf16") -> tuple[DeepGemm, Problem, Contiguous]:
        where = Contiguous(counts, torch.device("cpu"))
        return compat.library(), problem(compat.library(), kind, where.valid, len(counts)), where

    def test_rows_of_a_block_that_belong_to_nobody_are_nan(self) -> None:
        for psum in (True, False):
            library, given, where = self.contiguous([3, 130])
            library.grouped_gemm_contiguous(given.a, given.b, given.out, where.layout(psum), psum=psum)
            assert bool(given.out[~where.valid][:-128].isnan().all())

    def test_a_masked_block_ends_in_nan(self) -> None:
        num_rows = torch.tensor([3], dtype=torch.int32)
        given = problem(compat.library(), "bf16", torch.arange(256)[None] < 3, 1)
        compat.library().grouped_gemm_masked(given.a, given.b, given.out, num_rows, 3)
        assert bool(given.out[0, 3:128].isnan().all())

    def test_a_block_has_the_expert_of_its_first_row(self) -> None:
        library, given, where = self.contiguous([100, 20])
        layout = where.layout(False)
        layout[100:120] = 1
        library.grouped_gemm_contiguous(given.a, given.b, given.out, layout, psum=False)
        check_groups(given, [slice(0, 100)])
        assert bool(given.out[100:120].isnan().all()), "computed from rows that are NaN, with the weights of expert 0"

    def test_an_empty_group_at_the_end_of_the_one_before(self) -> None:
        library, given, _ = self.contiguous([3, 0])
        ends = torch.tensor([3, 3], dtype=torch.int32)
        with pytest.raises(AssertionError, match="group 1 starts at row 128 of 256 and ends at 3"):
            library.grouped_gemm_contiguous(given.a, given.b, given.out, ends, psum=True)

    def test_a_group_that_ends_after_the_last_row(self) -> None:
        library, given, _ = self.contiguous([3, 0])
        ends = torch.tensor([3, 257], dtype=torch.int32)
        with pytest.raises(AssertionError, match="ends at 257"):
            library.grouped_gemm_contiguous(given.a, given.b, given.out, ends, psum=True)

    def test_a_masked_capacity_that_is_no_multiple_of_a_block(self) -> None:
        num_rows = torch.tensor([3, 3], dtype=torch.int32)
        given = problem(compat.library(), "bf16", torch.arange(64).expand(2, 64) < 3, 2)
        with pytest.raises(AssertionError, match="blocks of 128 rows run over the end of groups of 64"):
            compat.library().grouped_gemm_masked(given.a, given.b, given.out, num_rows, 3)

    def test_scales_in_row_order(self) -> None:
        library, given, where = self.contiguous([3, 130], "fp8")
        values, scales = given.a
        with pytest.raises(AssertionError, match="strides"):
            library.grouped_gemm_contiguous(
                (values, scales.contiguous()), given.b, given.out, where.layout(True), psum=True
            )

    @pytest.mark.parametrize("layout_dtype", [torch.int64, torch.int16])
    def test_layouts_of_another_dtype(self, layout_dtype: torch.dtype) -> None:
        library, given, where = self.contiguous([3, 130])
        layout = where.layout(True).to(layout_dtype)
        with pytest.raises(AssertionError):
            library.grouped_gemm_contiguous(given.a, given.b, given.out, layout, psum=True)

    def test_k_that_is_no_multiple_of_64(self) -> None:
        where = Contiguous([3], torch.device("cpu"))
        given = problem(compat.library(), "bf16", where.valid, 1, k=96)
        with pytest.raises(AssertionError, match="K is 96, no multiple of 64"):
            compat.library().grouped_gemm_contiguous(given.a, given.b, given.out, where.layout(True), psum=True)

    def test_no_expected_rows(self) -> None:
        num_rows = torch.tensor([3], dtype=torch.int32)
        given = problem(compat.library(), "bf16", torch.arange(128)[None] < 3, 1)
        with pytest.raises(AssertionError):
            compat.library().grouped_gemm_masked(given.a, given.b, given.out, num_rows, 0)
