"""What travels in a dispatch, in which order, through which collectives, and how much memory it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moe_plugin.config import (
    SUPPORTED_DTYPES,
    ExpertPlacement,
    Fp8Block,
    Fp8PerTensor,
    Fp8PerToken,
    MoEConfig,
    ParallelConfig,
    QuantConfig,
)
from moe_plugin.errors import CapacityError, ConfigError
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.experts.triton_fused_moe import TritonFusedMoE
from moe_plugin.kernels.launcher import Launch
from moe_plugin.kernels.pack_rows import triton
from moe_plugin.modular_kernel import Dispatched, Experts
from moe_plugin.prepare_finalize.nccl_all_to_all import ROW_ALIGNMENT, NcclAllToAll, RowLayout
from moe_plugin.quantization import quantize_rows
from moe_plugin.testing import shared_pool
from moe_plugin.testing.rank_pool import RankContext
from moe_plugin.workspace import WorkspaceArena

CPU = torch.device("cpu")
LAYER: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 2,
    "hidden_size": 32,
    "intermediate_size": 16,
    "dtype": torch.float32,
    "max_tokens_per_rank": 12,
}


FORMS = [
    pytest.param(True, id="triton", marks=pytest.mark.skipif(triton is None, reason="triton is not installed")),
    pytest.param(False, id="torch"),
]
each_form = pytest.mark.parametrize("use_triton", FORMS)


def make(config: MoEConfig, use_triton: bool | None = None) -> NcclAllToAll:
    return NcclAllToAll(config, WorkspaceArena(CPU, poison=True), use_triton)


def on_one_rank(use_triton: bool | None = None, **changes: Any) -> NcclAllToAll:
    return make(MoEConfig(**(LAYER | changes)), use_triton)


def numbered(
    num_tokens: int, first: int = 0, hidden_size: int = 32, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Hidden states that say which token they are."""
    return torch.arange(first, first + num_tokens, dtype=dtype)[:, None].expand(num_tokens, hidden_size).contiguous()


class TestRowLayout:
    """Hidden states, slots, weights and flags in one row of bytes."""

    def test_docstring_example(self) -> None:
        layout = RowLayout(64, 2, torch.bfloat16)
        assert (layout.slots_at, layout.row_bytes) == (128, 192)
        rows = torch.zeros(1, 192, dtype=torch.uint8)
        start = rows.data_ptr()
        assert layout.slots(rows).data_ptr() - start == 128
        assert layout.weights(rows).data_ptr() - start == 136
        assert layout.flags(rows).data_ptr() - start == 144

    @given(
        st.integers(1, 200), st.integers(1, 16), st.sampled_from(SUPPORTED_DTYPES), st.integers(0, 5), st.integers(0, 3)
    )
    def test_parts_hold_what_is_put_there(
        self, hidden_size: int, top_k: int, dtype: torch.dtype, num_rows: int, num_scales: int
    ) -> None:
        layout = RowLayout(hidden_size, top_k, dtype, num_scales)
        rows = torch.full((num_rows, layout.row_bytes), 0xFF, dtype=torch.uint8)
        expected = {
            "hidden": torch.randint(-99, 99, (num_rows, hidden_size)).to(dtype),
            "slots": torch.randint(-1, 9, (num_rows, top_k), dtype=torch.int32),
            "weights": torch.rand(num_rows, top_k),
            "flags": torch.randint(0, 8, (num_rows, 1), dtype=torch.int32),
            "scales": torch.rand(num_rows, num_scales),
        }
        for name, values in expected.items():
            getattr(layout, name)(rows).copy_(values)
        for name, values in expected.items():
            seen = getattr(layout, name)(rows)
            assert (seen.shape, seen.dtype) == (values.shape, values.dtype)
            assert torch.equal(seen, values), f"{name} was written over"

    @given(st.integers(1, 5000), st.integers(1, 32), st.sampled_from(SUPPORTED_DTYPES))
    def test_rows_are_aligned_and_not_wasteful(self, hidden_size: int, top_k: int, dtype: torch.dtype) -> None:
        layout = RowLayout(hidden_size, top_k, dtype)
        used = hidden_size * dtype.itemsize + 8 * top_k + 4
        assert layout.row_bytes % ROW_ALIGNMENT == 0
        assert layout.row_bytes // dtype.itemsize % 16 == 0
        assert layout.slots_at % 4 == 0
        assert used <= layout.row_bytes < used + ROW_ALIGNMENT + 4


@each_form
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_one_row_a_token_on_one_rank(cuda_graph: bool, use_triton: bool) -> None:
    dispatch = on_one_rank(use_triton, cuda_graph=cuda_graph)
    ids = torch.tensor([[3, 3], [-1, -1], [7, 0], [-1, 5]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 1.0], [2.0, 3.0], [9.0, 4.0]])
    dispatched = dispatch.prepare(numbered(4, first=10), ids, weights)
    # The token whose ids are all dropped does not travel.
    assert dispatched.local_ids is not None
    assert dispatched.topk_weights is not None
    live = (dispatched.local_ids >= 0).any(1)
    assert dispatched.activations[live][:, 0].tolist() == [10, 12, 13]
    assert dispatched.local_ids[live].tolist() == [[3, 3], [7, 0], [-1, 5]]
    assert dispatched.topk_weights[live][:2].tolist() == [[0.5, 0.25], [2.0, 3.0]]
    assert dispatched.topk_weights[live][2, 1] == 4
    assert dispatched.activations.shape[0] == (12 if cuda_graph else 3)
    out = dispatch.finalize(dispatched.activations.clone(), dispatched.handle)
    assert out[:, 0].tolist() == [10, 0, 12, 13]


@each_form
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_call_without_rows_before_one_with_rows(cuda_graph: bool, use_triton: bool) -> None:
    dispatch = on_one_rank(use_triton, cuda_graph=cuda_graph)
    for expert, expected in ((-1, 0), (2, 1), (-1, 0)):
        dispatched = dispatch.prepare(numbered(4), torch.full((4, 2), expert), torch.ones(4, 2))
        assert dispatched.local_ids is not None
        assert (dispatched.local_ids >= 0).any(1).sum() == 4 * expected
        out = dispatch.finalize(dispatched.activations.clone(), dispatched.handle)
        assert torch.equal(out, expected * numbered(4))


def test_fixed_capacity_follows_the_announced_size() -> None:
    dispatch = on_one_rank(cuda_graph=True)
    for max_num_tokens, rows in ((None, 12), (12, 12), (5, 5), (4, 4)):
        ids, weights = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
        dispatched = dispatch.prepare(numbered(4), ids, weights, max_num_tokens)
        assert dispatched.activations.shape[0] == rows
        dispatch.finalize(dispatched.activations.clone(), dispatched.handle)


@each_form
def test_overflow_of_a_fixed_capacity_is_raised(use_triton: bool) -> None:
    dispatch = on_one_rank(use_triton, cuda_graph=True, dispatch_capacity=3)
    ids, weights = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    with pytest.raises(CapacityError, match=r"dispatch_capacity \(now 3\)"):
        dispatch.prepare(numbered(4), ids, weights)
    dispatched = dispatch.prepare(numbered(3), ids[:3], weights[:3])
    assert (dispatch.finalize(dispatched.activations.clone(), dispatched.handle) == numbered(3)).all()


def test_several_ranks_need_a_process_group() -> None:
    config = MoEConfig(**LAYER, parallel=ParallelConfig(ep_size=2))
    with pytest.raises(ConfigError, match="needs its process group"):
        make(config)


def worst_case(config: MoEConfig, first_rank: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As many tokens as may come, each with experts on as many ranks as it can reach, from `first_rank` on."""
    parallel, num_tokens = config.parallel, config.max_tokens_per_rank
    first_of_rank = [experts[0] for experts in config.expert_placement.experts_of_rank]
    ids = torch.tensor([first_of_rank[(first_rank + k) % parallel.ep_size] for k in range(config.top_k)])
    ids = ids.expand(num_tokens, -1)
    return numbered(num_tokens, hidden_size=config.hidden_size, dtype=config.dtype), ids, torch.ones(ids.shape)


def bytes_taken(dispatch: NcclAllToAll) -> int:
    """Workspace after calls that send and receive as many rows as can be, their experts left out."""
    config = dispatch.config
    for first_rank in (0, config.parallel.ep_rank + 1):
        dispatched = dispatch.prepare(*worst_case(config, first_rank))
        dispatch.finalize(torch.zeros_like(dispatched.activations).contiguous(), dispatched.handle)
    return dispatch.arena.nbytes


def assert_memory_is(taken: int, computed: int) -> None:
    # A buffer takes at least 16 bytes, which shows on error flags and counts.
    assert computed <= taken + 64
    assert taken <= computed + 64


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
@pytest.mark.parametrize(
    "changes", [{}, {"hidden_size": 33}, {"top_k": 3}, {"max_tokens_per_rank": 200}, {"dispatch_capacity": 40}]
)
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["exact", "fixed_capacity"])
def test_memory_is_what_a_call_takes(dtype: torch.dtype, changes: dict[str, Any], cuda_graph: bool) -> None:
    dispatch = on_one_rank(dtype=dtype, cuda_graph=cuda_graph, **changes)
    assert_memory_is(bytes_taken(dispatch), sum(dispatch.memory(dispatch.config).values()))


def memory_on_rank(context: RankContext, tp_size: int, cuda_graph: bool) -> tuple[int, int]:
    config = MoEConfig(**LAYER, parallel=context.parallel(tp_size), cuda_graph=cuda_graph)
    return bytes_taken(make(config)), sum(NcclAllToAll.memory(config).values())


@pytest.mark.slow
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["exact", "fixed_capacity"])
@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 1), (3, 1), (2, 2), (4, 2)])
def test_memory_is_what_a_call_takes_on_ranks(ranks: int, tp_size: int, cuda_graph: bool) -> None:
    taken, computed = zip(*shared_pool("cpu", 4).run(memory_on_rank, tp_size, cuda_graph, ranks=ranks), strict=True)
    # With fewer experts per token than ranks, not every rank meets the worst case.
    assert len(set(computed)) == 1
    assert_memory_is(max(taken), computed[0])


@pytest.mark.parametrize("experts", [TorchNative, TritonFusedMoE])
@pytest.mark.parametrize("dispatch_capacity", [None, 3, 40])
def test_experts_count_on_the_rows_that_exact_dispatch_delivers(
    experts: type[Experts], dispatch_capacity: int | None
) -> None:
    dispatch = on_one_rank(dispatch_capacity=dispatch_capacity)
    delivered = dispatch.prepare(*worst_case(dispatch.config)).activations
    assert experts.memory(dispatch.config)["output"] == delivered.shape[0] * 32 * 4


@pytest.mark.parametrize("experts", [TorchNative, TritonFusedMoE])
@pytest.mark.parametrize("dispatch_capacity", [None, 12, 40])
def test_experts_count_on_the_rows_that_fixed_capacity_delivers(
    experts: type[Experts], dispatch_capacity: int | None
) -> None:
    dispatch = on_one_rank(dispatch_capacity=dispatch_capacity, cuda_graph=True)
    delivered = dispatch.prepare(*worst_case(dispatch.config)).activations
    assert experts.memory(dispatch.config)["output"] == delivered.shape[0] * 32 * 4


COLLECTIVES = {
    "all_gather": ("all_gather_into_tensor", "all_gather_single", "all_gather"),
    "all_to_all": ("all_to_all_single", "all_to_all"),
    "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter_single", "reduce_scatter"),
    "all_reduce": ("all_reduce",),
    "broadcast": ("broadcast", "barrier", "all_gather_object", "broadcast_object_list"),
}
"""What torch.distributed calls them, in one release or another."""


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """The collectives that run meanwhile, in order; one that is made of another counts once."""
    calls: list[str] = []
    depth = 0

    def counting(kind: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                calls.append(kind)
            depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1

        return call

    with contextlib.ExitStack() as stack:
        for kind, names in COLLECTIVES.items():
            for name in filter(partial(hasattr, dist), names):
                stack.enter_context(mock.patch.object(dist, name, counting(kind, getattr(dist, name))))
        yield calls


def collectives_on_rank(context: RankContext, tp_size: int, cuda_graph: bool) -> tuple[list[str], list[str]]:
    config = MoEConfig(**LAYER, parallel=context.parallel(tp_size), cuda_graph=cuda_graph)
    dispatch = make(config)
    with counted_collectives() as in_prepare:
        dispatched = dispatch.prepare(*worst_case(config))
    with counted_collectives() as in_finalize:
        dispatch.finalize(dispatched.activations.contiguous(), dispatched.handle)
    return in_prepare, in_finalize


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cuda_graph", "in_prepare"),
    [(False, ["all_gather", "all_to_all"]), (True, ["all_to_all"])],
    ids=["exact", "fixed_capacity"],
)
def test_collectives_of_a_call(cuda_graph: bool, in_prepare: list[str]) -> None:
    for seen in shared_pool("cpu", 4).run(collectives_on_rank, 1, cuda_graph, ranks=2):
        assert seen == (in_prepare, ["all_to_all"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cuda_graph", "in_prepare"),
    [
        # Counts over EP, then over TP; rows over EP, then over TP.
        (False, ["all_gather"] * 2 + ["all_to_all", "all_gather"]),
        (True, ["all_to_all", "all_gather"]),
    ],
    ids=["exact", "fixed_capacity"],
)
def test_collectives_of_a_call_with_tensor_parallelism(cuda_graph: bool, in_prepare: list[str]) -> None:
    in_finalize = ["reduce_scatter", "all_to_all", "all_gather"]
    for seen in shared_pool("cpu", 4).run(collectives_on_rank, 2, cuda_graph, ranks=4):
        assert seen == (in_prepare, in_finalize)


def received_on_rank(
    context: RankContext, ids_of_rank: list[list[list[int]]], placement: ExpertPlacement | None, use_triton: bool
) -> tuple[list[int], list[list[int]], list[int]]:
    """Received tokens, their slots, and what comes back for each token when every received row is returned as it is."""
    config = MoEConfig(**LAYER, parallel=context.parallel(), placement=placement)
    dispatch = make(config, use_triton)
    ids = torch.tensor(ids_of_rank[context.rank]).view(-1, 2)
    x, weights = numbered(len(ids), first=100 * context.rank), torch.ones(ids.shape)
    results = []
    for _ in range(3):
        dispatched: Dispatched = dispatch.prepare(x, ids, weights)
        assert dispatched.local_ids is not None
        tokens, slots = dispatched.activations[:, 0].int().tolist(), dispatched.local_ids.tolist()
        out = dispatch.finalize(dispatched.activations.contiguous(), dispatched.handle)
        results.append((tokens, slots, out[:, 0].int().tolist()))
    assert results[0] == results[1] == results[2]
    return results[0]


def received(*ids_of_rank: list[list[int]], use_triton: bool, placement: ExpertPlacement | None = None) -> list[Any]:
    return shared_pool("cpu", 4).run(received_on_rank, list(ids_of_rank), placement, use_triton, ranks=len(ids_of_rank))


@pytest.mark.slow
@each_form
def test_a_token_goes_to_a_rank_once(use_triton: bool) -> None:
    # Rank 0 holds experts 0 to 3, rank 1 the others.
    rank_0, rank_1 = received([[0, 1], [2, 2], [0, 4], [7, 5]], [[3, 1], [4, 4]], use_triton=use_triton)
    assert rank_0[0] == [0, 1, 2, 100]
    assert rank_0[1] == [[0, 1], [2, 2], [0, -1], [3, 1]]
    assert rank_1[0] == [101, 2, 3]
    assert rank_1[1] == [[0, 0], [-1, 0], [3, 1]]
    # One row comes back from each rank a token went to.
    assert rank_0[2] == [0, 1, 2 * 2, 3]
    assert rank_1[2] == [100, 101]


@pytest.mark.slow
@each_form
def test_own_rows_come_first_and_others_in_order_of_source_and_token(use_triton: bool) -> None:
    everywhere = [[0, 7], [3, 4], [6, 1]]
    for rank, (tokens, _, _) in enumerate(received(everywhere, everywhere, everywhere[:1], use_triton=use_triton)):
        assert tokens == sorted(tokens, key=lambda token: (token // 100 != rank, token))
    both = received([[0, 7]] * 3, [[7, 0]] * 2, use_triton=use_triton)
    assert [tokens for tokens, *_ in both] == [[0, 1, 2, 100, 101], [100, 101, 0, 1, 2]]


@pytest.mark.slow
@each_form
def test_ranks_without_tokens_and_tokens_without_experts(use_triton: bool) -> None:
    rank_0, rank_1 = received([], [[0, -1], [-1, -1], [-1, 6]], use_triton=use_triton)
    assert rank_0 == ([100], [[0, -1]], [])
    assert rank_1 == ([102], [[-1, 2]], [100, 0, 102])


@pytest.mark.slow
@each_form
def test_replicas_take_turns_by_token(use_triton: bool) -> None:
    # Expert 0 stands on both ranks; tokens alternate between them.
    placement = ExpertPlacement.from_table(8, [[1, 2, 3, 0], [0, 4, 5, 6, 7]])
    rank_0, rank_1 = received([[0, -1]] * 4, [[0, -1]] * 3, placement=placement, use_triton=use_triton)
    assert rank_0[:2] == ([0, 2, 100, 102], [[3, -1]] * 4)
    assert rank_1[:2] == ([101, 1, 3], [[0, -1]] * 3)


def random_call(
    config: MoEConfig, num_tokens: int, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, config.hidden_size, generator=generator).to(config.dtype)
    ids = torch.randint(-1, config.num_experts, (num_tokens, config.top_k), generator=generator)
    return x, ids.to(dtype), torch.rand(ids.shape, generator=generator)


def same_rows(first: Dispatched, second: Dispatched) -> bool:
    """Whether the rows that ask for an expert are the same, and no other asks for one."""
    assert first.local_ids is not None
    live = (first.local_ids >= 0).any(1)
    parts = [
        (first.activations, second.activations),
        (first.topk_weights, second.topk_weights),
        (first.scales, second.scales),
    ]
    return torch.equal(first.local_ids, second.local_ids) and all(
        (a is None and b is None) or torch.equal(a[live].float(), b[live].float()) for a, b in parts
    )


def forms_on_rank(context: RankContext, tp_size: int, changes: dict[str, Any], quantizes: bool) -> list[bool]:
    """Of calls of several sizes and id dtypes, each size twice: whether both forms dispatch and combine alike."""
    config = MoEConfig(**(LAYER | changes), parallel=context.parallel(tp_size))
    forms = [make(config, use_triton) for use_triton in (True, False)]
    for form in forms:
        form.quantizes = quantizes
    found = []
    for call, num_tokens in enumerate([5, 9, 0, 9]):
        # TP ranks get the same tokens; EP ranks get different ones, in different numbers.
        ep_rank = config.parallel.ep_rank
        inputs = random_call(
            config, max(num_tokens - ep_rank, 0), 10 * call + ep_rank, torch.int32 if call % 2 else torch.int64
        )
        dispatched = [form.prepare(*inputs) for form in forms]
        found.append(same_rows(*dispatched))
        made = torch.randn(dispatched[0].activations.shape, generator=torch.Generator().manual_seed(call))
        made = made.to(config.dtype)
        combined = [form.finalize(made, each.handle) for form, each in zip(forms, dispatched, strict=True)]
        found.append(torch.equal(*combined))
    return found


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="triton is not installed")
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["exact", "fixed_capacity"])
@pytest.mark.parametrize(
    ("ranks", "tp_size", "changes"),
    [
        (3, 1, {}),
        (2, 1, {"top_k": 1, "apply_router_weight_on_input": True, "dtype": torch.bfloat16}),
        (2, 1, {"quantization": Fp8Block(), "hidden_size": 256, "dtype": torch.bfloat16}),
        (4, 2, {"quantization": Fp8PerToken(), "hidden_size": 96, "dtype": torch.bfloat16}),
    ],
    ids=["fp32", "weight_on_input", "fp8_block", "tensor_parallel"],
)
def test_both_forms_do_the_same(ranks: int, tp_size: int, changes: dict[str, Any], cuda_graph: bool) -> None:
    arguments = (tp_size, changes | {"cuda_graph": cuda_graph}, "quantization" in changes)
    for found in shared_pool("cpu", 4).run(forms_on_rank, *arguments, ranks=ranks):
        assert all(found), found


@each_form
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["exact", "fixed_capacity"])
@pytest.mark.parametrize("scheme", [Fp8Block(), Fp8PerToken(), Fp8PerTensor()], ids=lambda scheme: scheme.name)
def test_rows_travel_quantized_where_that_is_set(scheme: QuantConfig, cuda_graph: bool, use_triton: bool) -> None:
    dispatch = on_one_rank(
        use_triton, quantization=scheme, hidden_size=320, dtype=torch.bfloat16, cuda_graph=cuda_graph
    )
    dispatch.quantizes = True
    x, ids, weights = random_call(dispatch.config, 7, 0, torch.int32)
    ids[:, 0] = 3
    dispatched = dispatch.prepare(x, ids, weights)
    values, scales = quantize_rows(x, 128 if isinstance(scheme, Fp8Block) else None)
    assert dispatched.scales is not None
    assert dispatched.activations.dtype is torch.float8_e4m3fn
    assert torch.equal(dispatched.activations[:7].float(), values.float())
    assert torch.equal(dispatched.scales[:7], scales)
    made = torch.ones(dispatched.activations.shape, dtype=torch.bfloat16)
    assert (dispatch.finalize(made, dispatched.handle) == 1).all()


def test_static_scales_are_left_to_the_experts() -> None:
    dispatch = on_one_rank(quantization=Fp8PerTensor(static_activations=True), dtype=torch.bfloat16)
    dispatch.quantizes = True
    dispatched = dispatch.prepare(*random_call(dispatch.config, 5, 0, torch.int32))
    assert (dispatched.scales, dispatched.activations.dtype) == (None, torch.bfloat16)


def launches_on_rank(context: RankContext, cuda_graph: bool) -> list[int]:
    """Kernels launched by prepare and finalize, call by call."""
    config = MoEConfig(**LAYER, parallel=context.parallel(), cuda_graph=cuda_graph)
    dispatch, counts = make(config, use_triton=True), []
    for _ in range(3):
        with mock.patch.object(Launch, "run", autospec=True, side_effect=Launch.run) as run:
            dispatched = dispatch.prepare(*worst_case(config))
            counts.append(run.call_count)
            dispatch.finalize(dispatched.activations.contiguous(), dispatched.handle)
            counts.append(run.call_count - counts[-1])
    return counts


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="triton is not installed")
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["exact", "fixed_capacity"])
def test_kernels_of_a_call(cuda_graph: bool) -> None:
    # Plan, rows for peers, own rows, slots and weights; then one sum.
    for counts in shared_pool("cpu", 4).run(launches_on_rank, cuda_graph, ranks=2):
        assert counts == [4, 1] * 3
