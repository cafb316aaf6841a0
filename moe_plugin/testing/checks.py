"""The behaviour matrix: one function per row, run on every rank of a group with the same arguments.

Each takes (context, strategy, dtype) and raises AssertionError when the strategy misbehaves, Refused when a gate
turns the case down. Every rank of the context calls it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from moe_plugin.config import Activation, ExpertPlacement, Fp8Block, Fp8PerTensor, Fp8PerToken, QuantConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import (
    CapacityError,
    DtypeError,
    ExpertIdError,
    HandleError,
    InputError,
    MoEPluginError,
    ShapeError,
    StrategyUnsupportedError,
    TooManyTokensError,
)
from moe_plugin.modular_kernel import ModularKernel, MoELayer, MonolithicKernel, StrategyPart
from moe_plugin.numerics import FP8_NOISE, assert_close_to_oracle
from moe_plugin.quantization import has_static_activations
from moe_plugin.testing.cases import Case, Inputs, tokens_of_rank
from moe_plugin.testing.poison import poisoned_empty
from moe_plugin.testing.rank_pool import RankContext

Check = Callable[[RankContext, str, torch.dtype], None]
CHECKS: dict[str, Check] = {}


class Refused(Exception):
    """A gate turns the case down; the message is its reason."""


def check(function: Check) -> Check:
    """Register a row of the matrix under the function's name."""

    def run(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
        try:
            with poisoned_empty():
                function(context, strategy, dtype)
        except StrategyUnsupportedError as refusal:
            raise Refused(str(refusal)) from None

    CHECKS[function.__name__] = run
    return function


def check_call(case: Case, inputs: Inputs, **options: Any) -> torch.Tensor:
    """Run one call and compare with the oracle."""
    out = run_call(case, inputs, **options)
    assert_close_to_oracle(out, case.expected(inputs), case.tolerance)
    return out


def run_call(case: Case, inputs: Inputs, **options: Any) -> torch.Tensor:
    """Run one call, make sure that the inputs are as they were and the output what it should be in shape and dtype."""
    before = [tensor.clone() for tensor in inputs.as_tuple()]
    out = case.layer(*inputs.as_tuple(), **options)
    case.layer.check_errors()
    for tensor, copy in zip(inputs.as_tuple(), before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True, msg="an input was changed")
    assert out.shape == inputs.hidden_states.shape and out.dtype == case.config.dtype
    return out


def call_and_check_errors(case: Case, inputs: Inputs) -> None:
    """One call and the host point at which a CUDA device's flags are raised.

    To the latter every rank has to come, one whose call raised included.
    """
    try:
        case.layer(*inputs.as_tuple())
    finally:
        case.layer.check_errors()


def expect(error: type[MoEPluginError], function: Callable[[], object], *words: str) -> str:
    """The message of the error that `function` must raise; it must contain `words`."""
    try:
        function()
    except error as problem:
        missing = [word for word in words if word not in str(problem)]
        assert not missing, f"message lacks {missing}: {problem}"
        return str(problem)
    raise AssertionError(f"{error.__name__} was not raised")


def modular(layer: MoELayer) -> ModularKernel:
    if not isinstance(layer, ModularKernel):
        raise Refused("a monolithic strategy has no halves to call")
    return layer


def cases_that_run(make: Iterable[Callable[[], Case]]) -> Iterator[Case]:
    """Every case that no gate refuses. Refuses when there is none, with the last reason."""
    refusal: StrategyUnsupportedError | None = None
    found = False
    for each in make:
        try:
            case = each()
        except StrategyUnsupportedError as problem:
            refusal = problem
            continue
        found = True
        yield case
    if not found and refusal is not None:
        raise refusal


def parts(layer: MoELayer) -> list[StrategyPart]:
    """The classes a layer runs."""
    if isinstance(layer, ModularKernel):
        return [layer.prepare_finalize, layer.experts]
    assert isinstance(layer, MonolithicKernel)
    return [layer.monolithic]


def _top_k_check(top_k: int) -> None:
    def matches_oracle(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
        case = Case(context, strategy, dtype, {"num_experts": 16, "top_k": top_k})
        check_call(case, case.inputs(tokens_of_rank(context, 1, 5, 3, 0, 7)))

    matches_oracle.__name__ = f"top_k_{top_k}"
    check(matches_oracle)


for _top_k in (1, 2, 3, 6, 8, 16):
    _top_k_check(_top_k)


@check
def no_tokens(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    for counts in ((0,), (0, 3), (4, 0)):
        check_call(case, case.inputs(tokens_of_rank(context, 1, *counts)))


@check
def token_counts(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"max_tokens_per_rank": 129, "top_k": 1})
    for counts in ((1,), (7, 2), (127,), (128, 1), (129, 64)):
        check_call(case, case.inputs(tokens_of_rank(context, 1, *counts), seed=counts[0]))


@check
def all_to_one_expert(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"top_k": 1})
    for expert in (0, case.config.num_experts - 1):
        inputs = case.inputs(9)
        check_call(case, inputs.with_ids(torch.full((9, 1), expert)))


@check
def all_to_one_rank(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    for rank in {0, context.size - 1}:
        experts = torch.tensor(case.config.expert_placement.experts_of_rank[rank][:2])
        check_call(case, case.inputs(6).with_ids(experts.expand(6, 2)))


@check
def uneven_expert_counts(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(
        context, strategy, dtype, {"num_experts": 12, "top_k": 1, "max_tokens_per_rank": 300, "intermediate_size": 16}
    )
    # Experts 0, 3 and 11 get nothing: empty groups at the start, in the middle and at the end.
    counts = {1: 1, 2: 16, 4: 17, 5: 129, 6: 1, 8: 128, 10: 3}
    ids = torch.cat([torch.full((n, 1), expert) for expert, n in counts.items()])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(7))]
    check_call(case, case.inputs(len(ids)).with_ids(ids))


@check
def odd_sizes(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    Case(context, strategy, dtype)  # a refusal of ordinary sizes is no answer to odd ones
    for hidden, inner in ((576, 24), (72, 40), (96, 17)):
        try:
            case = Case(context, strategy, dtype, {"hidden_size": hidden, "intermediate_size": inner})
        except StrategyUnsupportedError as refusal:
            assert str(hidden) in str(refusal) or str(inner) in str(refusal), (
                f"refusal does not name the size: {refusal}"
            )
            continue
        check_call(case, case.inputs(5))


@check
def dropped_ids(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"top_k": 3})
    inputs = case.inputs(8)
    ids = inputs.topk_ids.clone()
    ids[0, 1], ids[2], ids[5, 0], ids[7, 2] = -1, -1, -1, -1
    out = check_call(case, inputs.with_ids(ids))
    assert (out[2] == 0).all(), "a token whose ids are all -1 must give zeros"
    check_call(case, inputs.with_ids(torch.full_like(ids, -1)))


@check
def id_out_of_range(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    for bad_id in (case.config.num_experts, -2, 1 << 30):
        inputs = case.inputs(4)
        ids = inputs.topk_ids.clone()
        if context.rank == context.size - 1:
            ids[1, 0] = bad_id

        bad = inputs.with_ids(ids)
        expect(ExpertIdError, lambda bad=bad: call_and_check_errors(case, bad), str(case.config.num_experts))  # type: ignore[misc]
        check_call(case, case.inputs(3))


def _reads_others_errors(case: Case) -> bool:
    """Whether every call waits for what the other ranks have to say."""
    if not isinstance(case.layer, ModularKernel):
        return False
    environment = Environment.probe(case.context.device.type)
    return case.layer.prepare_finalize.host_syncs(case.config, environment) > 0


@check
def wrong_arguments_on_one_rank(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    good = case.inputs(4)
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    wrongs: list[tuple[type[MoEPluginError], tuple[torch.Tensor, ...]]] = [
        (ShapeError, (good.hidden_states[:, :-1], good.topk_ids, good.topk_weights)),
        (DtypeError, (good.hidden_states.to(other), good.topk_ids, good.topk_weights)),
        (ShapeError, (good.hidden_states, good.topk_ids[:-1], good.topk_weights)),
        (DtypeError, (good.hidden_states, good.topk_ids.float(), good.topk_weights)),
        (TooManyTokensError, case.inputs(case.config.max_tokens_per_rank + 1).as_tuple()),
    ]
    # Ranks that never wait for the host learn at the next host point that a peer was called wrongly, not in what way.
    told_later = context.rank > 0 and not _reads_others_errors(case)
    for error, wrong in wrongs:
        if context.rank == 0:
            expect(error, lambda wrong=wrong: case.layer(*wrong))  # type: ignore[misc]
            # Its own flag comes back to it with its peers'.
            with contextlib.suppress(InputError):
                case.layer.check_errors()
        elif told_later:
            expect(InputError, lambda: call_and_check_errors(case, good))
        else:
            expect(error, lambda: case.layer(*good.as_tuple()))
        check_call(case, case.inputs(2))


@check
def duplicate_experts(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"top_k": 3})
    ids = torch.tensor([[1, 1, 1], [0, 2, 0], [7, 7, 3], [5, 6, 6]])
    check_call(case, case.inputs(4).with_ids(ids))


@check
def placements(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    def with_replicas(num_ranks: int) -> ExpertPlacement:
        linear = ExpertPlacement.linear(10, num_ranks).experts_of_rank
        return ExpertPlacement.from_table(10, [list(dict.fromkeys((*experts, 9, 0))) for experts in linear])

    for placement in (None, lambda ranks: ExpertPlacement.round_robin(10, ranks), with_replicas):
        case = Case(context, strategy, dtype, {"num_experts": 10, "placement": placement})
        check_call(case, case.inputs(tokens_of_rank(context, 1, 6, 2, 5)))


@check
def one_expert(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"num_experts": 1, "top_k": 1})
    check_call(case, case.inputs(tokens_of_rank(context, 1, 3, 5)))


@check
def many_experts(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"num_experts": 300, "top_k": 4, "hidden_size": 32, "intermediate_size": 16})
    check_call(case, case.inputs(6))


@check
def input_dtypes(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    inputs = case.inputs(5)
    # Weights that bf16 holds exactly, so that every combination must give the same bits.
    inputs = Inputs(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights.bfloat16().float())
    expected = check_call(case, inputs)
    for id_dtype in (torch.int16, torch.int32):
        for weight_dtype in (torch.float32, torch.bfloat16):
            out = case.layer(inputs.hidden_states, inputs.topk_ids.to(id_dtype), inputs.topk_weights.to(weight_dtype))
            torch.testing.assert_close(out, expected, rtol=0, atol=0)


@check
def strided_inputs(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    inputs, hidden = case.inputs(6), case.config.hidden_size
    wide = torch.cat((inputs.hidden_states, torch.full_like(inputs.hidden_states, float("nan"))), dim=1)
    spread = torch.stack((inputs.hidden_states, inputs.hidden_states), dim=2).flatten(1)
    layouts = [
        wide[:, :hidden],
        spread[:, ::2],
        inputs.hidden_states.t().contiguous().t(),
        inputs.hidden_states[:1].expand(6, hidden),
    ]
    for states in layouts:
        ids = inputs.topk_ids.t().contiguous().t()
        check_call(case, Inputs(states, ids, inputs.topk_weights))


@check
def nan_and_inf_stay_in_their_token(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    inputs = case.inputs(6)
    ids = inputs.topk_ids.clone()
    ids[:] = ids[0]
    clean = case.layer(*inputs.with_ids(ids).as_tuple())
    dirty = inputs.hidden_states.clone()
    dirty[1], dirty[4, 3] = float("nan"), float("inf")
    out = case.layer(dirty, ids, inputs.topk_weights)
    assert not out[1].isfinite().any() and not out[4].isfinite().all()
    others = [0, 2, 3, 5]
    assert torch.equal(out[others], clean[others]), "NaN or Inf of one token reached another"


@check
def literal_router_weights(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    inputs = case.inputs(4)
    weights = torch.tensor([[0.0, 0.0], [-1.5, 2.0], [0.0, 3.0], [-0.25, -0.75]], device=context.device)
    out = check_call(case, Inputs(inputs.hidden_states, inputs.topk_ids, weights))
    assert (out[0] == 0).all()


@check
def router_weight_on_input(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"top_k": 1, "apply_router_weight_on_input": True})
    check_call(case, case.inputs(5))


@check
def activations_and_biases(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    def make(activation: Activation, has_bias: bool) -> Case:
        return Case(context, strategy, dtype, {"activation": activation, "has_bias": has_bias, "swiglu_limit": 0.7})

    kinds = [functools.partial(make, activation, has_bias) for activation in Activation for has_bias in (False, True)]
    for case in cases_that_run(kinds):
        check_call(case, case.inputs(4))


@check
def repeatable(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    inputs = case.inputs(11)
    if not all(part.deterministic for part in parts(case.layer)):
        raise Refused("not declared deterministic")
    first = check_call(case, inputs)
    for _ in range(3):
        case.layer(*case.inputs(5, seed=1).as_tuple())
        assert torch.equal(case.layer(*inputs.as_tuple()), first), "the same input gave different bits"


@check
def output_argument(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    inputs = case.inputs(5)
    out = torch.full_like(inputs.hidden_states, float("nan"))
    result = check_call(case, inputs, out=out)
    assert result.data_ptr() == out.data_ptr()


@check
def micro_batches_interleaved(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    layer = modular(case.layer)
    a, b = case.inputs(6, seed=1), case.inputs(tokens_of_rank(context, 1, 3, 8), seed=2)
    dispatched_a = layer.prepare(*a.as_tuple())
    dispatched_b = layer.prepare(*b.as_tuple())
    rows_b = layer.apply_experts(dispatched_b)
    rows_a = layer.apply_experts(dispatched_a)
    out_b = layer.finalize(rows_b, dispatched_b)
    out_a = layer.finalize(rows_a, dispatched_a)
    assert_close_to_oracle(out_a, case.expected(a), dtype)
    assert_close_to_oracle(out_b, case.expected(b), dtype)


@check
def asynchronous_halves(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    layer = modular(case.layer)
    for seed in range(4):
        inputs = case.inputs(7, seed=seed)
        receiver = layer.prepare_async(*inputs.as_tuple())
        shared = inputs.hidden_states.float().square()
        dispatched = receiver.wait()
        combined = layer.finalize_async(layer.apply_experts(dispatched), dispatched)
        # Nothing may still be read from memory that the caller's stream can hand out again meanwhile.
        scribbles = [torch.full((64, case.config.hidden_size), float("nan"), device=context.device) for _ in range(8)]
        assert shared.isfinite().all() and scribbles[0].isnan().all()
        assert_close_to_oracle(combined.wait(), case.expected(inputs), dtype)
        expect(HandleError, receiver.wait)


@check
def shared_experts(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    inputs = case.inputs(5)
    out = case.layer(*inputs.as_tuple(), shared_experts=lambda x: 2 * x)
    assert_close_to_oracle(out, case.expected(inputs) + 2 * inputs.hidden_states.float(), dtype)


@check
def handle_misuse(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype)
    layer = modular(case.layer)
    dispatched = layer.prepare(*case.inputs(4).as_tuple())
    rows = layer.apply_experts(dispatched)
    layer.finalize(rows, dispatched)
    expect(HandleError, lambda: layer.finalize(rows, dispatched), "already")
    expect(HandleError, lambda: layer.finalize(rows, None), "prepare")  # type: ignore[arg-type]
    other = modular(Case(context, strategy, dtype).layer)
    dispatched = layer.prepare(*case.inputs(4).as_tuple())
    rows = layer.apply_experts(dispatched)
    expect(HandleError, lambda: other.finalize(rows, dispatched), "another")
    layer.finalize(rows, dispatched)


@check
def tensor_parallel(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    if context.size % 2:
        raise Refused("tensor parallelism of 2 needs an even number of ranks")
    for tp_size in {2, context.size}:
        case = Case(context, strategy, dtype, {"has_bias": True}, tp_size=tp_size)
        for counts in ((5, 3), (1, 0), (0, 4), (0, 0)):
            out = check_call(case, case.inputs(tokens_of_rank(context, tp_size, *counts)))
            assert out.isfinite().all()
        case.layer.close()


@check
def fixed_capacity(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"cuda_graph": True, "max_tokens_per_rank": 12})
    check_call(case, case.inputs(tokens_of_rank(context, 1, 12, 0, 5)))
    check_call(case, case.inputs(tokens_of_rank(context, 1, 3, 4), seed=2), max_num_tokens=4)
    wrong = case.inputs(4)
    if context.rank == 0:
        wrong = Inputs(wrong.hidden_states[:, 1:], wrong.topk_ids, wrong.topk_weights)
    expect(MoEPluginError, lambda: call_and_check_errors(case, wrong))
    # A rank that was called wrongly raised at once; on CUDA it also meets its own flag, as its peers do.
    with contextlib.suppress(MoEPluginError):
        case.layer.check_errors()
    check_call(case, case.inputs(2))
    case.layer.close()
    if context.size % 2 == 0:
        case = Case(context, strategy, dtype, {"cuda_graph": True, "max_tokens_per_rank": 9}, tp_size=2)
        check_call(case, case.inputs(tokens_of_rank(context, 2, 9, 4)))


@check
def capacity_overflow_raises(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = Case(context, strategy, dtype, {"cuda_graph": True, "dispatch_capacity": 3, "max_tokens_per_rank": 16})
    if not modular(case.layer).prepare_finalize.has_capacity:
        raise Refused("its exchange has no fixed capacity")
    check_call(case, case.inputs(3))
    inputs = case.inputs(8 if context.rank == 0 else 1)
    crowded = inputs.with_ids(torch.zeros_like(inputs.topk_ids))
    expect(CapacityError, lambda: call_and_check_errors(case, crowded), "dispatch_capacity")
    check_call(case, case.inputs(2))


@check
def cuda_graph_replay(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    if context.device.type != "cuda":
        raise Refused("CUDA graphs need a CUDA device")
    _check_graph_replay(
        Case(context, strategy, dtype, {"cuda_graph": True, "max_tokens_per_rank": 16, "num_experts": 16, "top_k": 4})
    )


def _check_graph_replay(case: Case) -> None:
    context, static = case.context, case.inputs(16)
    for _ in range(3):
        case.layer(*static.as_tuple())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.layer(*static.as_tuple())
    outputs, oracles = [], []
    for step in range(20):
        fresh = case.inputs(16, seed=step + 1)
        # Fewer tokens than captured: the rest of the padded batch is dropped.
        live = 16 if step % 3 else tokens_of_rank(context, 1, 16, 0, 5, 1)
        fresh.topk_ids[live:] = -1
        for target, source in zip(static.as_tuple(), fresh.as_tuple(), strict=True):
            target.copy_(source)
        graph.replay()
        case.layer.check_errors()
        expected = case.expected(fresh)
        # In fp8 a flipped value weighs too much in so few rows; what was routed or kept wrongly is far outside of this.
        assert_close_to_oracle(out, expected, case.tolerance if case.config.quantization is None else FP8_NOISE)
        outputs.append(out.clone())
        oracles.append(expected)
    assert_close_to_oracle(torch.cat(outputs), torch.cat(oracles), case.tolerance)
    if context.rank == context.size - 1:
        static.topk_ids[0, 0] = case.config.num_experts
    graph.replay()
    expect(ExpertIdError, case.layer.check_errors)
    static.topk_ids[0, 0] = 0
    graph.replay()
    case.layer.check_errors()


@check
def host_syncs_as_declared(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    if context.device.type != "cuda":
        raise Refused("host synchronizations are counted on a CUDA device")
    for cuda_graph in (False, True):
        case = Case(context, strategy, dtype, {"cuda_graph": cuda_graph, "max_tokens_per_rank": 16})
        entry = case.layer.report.entry("decode")
        assert entry.host_syncs == 0 or not cuda_graph, "a layer for CUDA graphs must not synchronize"
        inputs = case.inputs(16)
        case.layer(*inputs.as_tuple())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if entry.host_syncs == 0 else "default")
        try:
            case.layer(*inputs.as_tuple())
        finally:
            torch.cuda.set_sync_debug_mode("default")


FP8_SCHEMES: dict[str, QuantConfig] = {
    "fp8_block": Fp8Block(),
    "fp8_per_token": Fp8PerToken(),
    "fp8_per_tensor": Fp8PerTensor(),
    "fp8_per_tensor_static": Fp8PerTensor(static_activations=True),
}


def fp8_case(
    context: RankContext, strategy: str, dtype: torch.dtype, scheme: QuantConfig, tp_size: int = 1, **overrides: Any
) -> Case:
    """A layer in one fp8 scheme, by default with groups of 128 columns that are cut short.

    The arithmetic of an fp8 layer hardly depends on the dtype around it, so its rows run in one.
    """
    if dtype != torch.bfloat16:
        raise Refused("rows of the matrix in fp8 run once, in bfloat16")
    sizes = {"num_experts": 6, "hidden_size": 192, "intermediate_size": 160}
    settings = sizes | {"quantization": scheme} | overrides
    try:
        return Case(context, strategy, dtype, settings, tp_size)
    except StrategyUnsupportedError as refusal:
        if not settings.get("has_bias") or "has_bias" not in str(refusal):
            raise
    return Case(context, strategy, dtype, settings | {"has_bias": False}, tp_size)


def fp8_cases(
    context: RankContext, strategy: str, dtype: torch.dtype, tp_size: int = 1, **overrides: Any
) -> Iterator[Case]:
    """`fp8_case` in every scheme that the strategy computes."""
    return cases_that_run(
        functools.partial(fp8_case, context, strategy, dtype, scheme, tp_size, **overrides)
        for scheme in FP8_SCHEMES.values()
    )


def _fp8_check(name: str, scheme: QuantConfig) -> None:
    def matches_both_oracles(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
        case = fp8_case(context, strategy, dtype, scheme, has_bias=True)
        outputs, oracles = [], []
        for seed, counts in enumerate(((33, 20), (0, 3), (1, 0))):
            inputs = case.inputs(tokens_of_rank(context, 1, *counts), seed)
            outputs.append(run_call(case, inputs))
            oracles.append((case.expected(inputs), case.expected_unquantized(inputs)))
        # All rows of this rank together: a flipped fp8 value weighs too much in three alone.
        quantized, unquantized = (torch.cat(expected) for expected in zip(*oracles, strict=True))
        assert_close_to_oracle(torch.cat(outputs), quantized, case.tolerance)
        assert_close_to_oracle(torch.cat(outputs), unquantized, FP8_NOISE)

    matches_both_oracles.__name__ = name
    check(matches_both_oracles)


for _name, _scheme in FP8_SCHEMES.items():
    _fp8_check(_name, _scheme)


@check
def fp8_extreme_values(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    # An activation that is linear near zero and unbounded: tiny rows stay visible, huge ones huge.
    linear: dict[str, Any] = {"activation": Activation.SWIGLU_OAI, "swiglu_limit": 1e6}
    for case in fp8_cases(context, strategy, dtype, max_tokens_per_rank=80, **linear):
        inputs = case.inputs(80)
        zeros, huge, tiny, edges, scaled = kinds = [slice(first, first + 16) for first in range(0, 80, 16)]
        states = inputs.hidden_states
        states[zeros] = 0
        states[huge] *= 3e4
        # Under the least scale, 1e-4 / 448, these are subnormal in e4m3.
        states[tiny] *= 1e-9
        states[edges] = 448 * states[edges].sign()
        states[scaled] *= 448 / states[scaled].abs().amax(dim=1, keepdim=True)
        # Each kind of row on its own: next to a huge row any error of a tiny one would pass.
        out, expected = case.layer(*inputs.as_tuple()), case.expected(inputs)
        assert out.isfinite().all() and expected.isfinite().all()
        assert (out[zeros] == 0).all(), "a row of zeros gives zeros without a bias"
        for rows in kinds[1:]:
            assert_close_to_oracle(out[rows], expected[rows], case.tolerance)


@check
def fp8_nan_and_inf_stay_in_their_token(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    for case in fp8_cases(context, strategy, dtype):
        inputs = case.inputs(6)
        ids = inputs.topk_ids.clone()
        ids[:] = ids[0]
        clean = case.layer(*inputs.with_ids(ids).as_tuple())
        dirty = inputs.hidden_states.clone()
        dirty[1, 5], dirty[4, 3] = float("nan"), float("inf")
        out = case.layer(dirty, ids, inputs.topk_weights)
        assert not out[1].isfinite().any(), "NaN must not be rounded away"
        # A given scale saturates what a measured one cannot represent.
        assert out[4].isfinite().all() == has_static_activations(case.config.quantization)
        others = [0, 2, 3, 5]
        assert torch.equal(out[others], clean[others]), "NaN or Inf of one token reached another"


@check
def fp8_odd_sizes(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    for ordinary in fp8_cases(context, strategy, dtype):  # a refusal of ordinary sizes is no answer to odd ones
        scheme = ordinary.config.quantization
        assert scheme is not None
        for hidden, inner in ((72, 40), (96, 17)):
            try:
                case = fp8_case(context, strategy, dtype, scheme, hidden_size=hidden, intermediate_size=inner)
            except StrategyUnsupportedError as refusal:
                assert str(hidden) in str(refusal) or str(inner) in str(refusal), (
                    f"refusal does not name the size: {refusal}"
                )
                continue
            check_call(case, case.inputs(9))


@check
def fp8_router_weight_on_input(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    for case in fp8_cases(context, strategy, dtype, top_k=1, apply_router_weight_on_input=True):
        check_call(case, case.inputs(9))


@check
def fp8_repeatable(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    case = fp8_case(context, strategy, dtype, Fp8Block())
    if not all(part.deterministic for part in parts(case.layer)):
        raise Refused("not declared deterministic")
    inputs = case.inputs(11)
    first = check_call(case, inputs)
    case.layer(*case.inputs(5, seed=1).as_tuple())
    assert torch.equal(case.layer(*inputs.as_tuple()), first), "the same input gave different bits"


@check
def fp8_tensor_parallel(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    if context.size % 2:
        raise Refused("tensor parallelism of 2 needs an even number of ranks")
    for tp_size in sorted({2, context.size}):
        # Groups of the intermediate start with a rank's slice: they are those of one rank if slices are whole.
        sizes = {"hidden_size": 160, "intermediate_size": 128 * tp_size, "num_experts": 4}
        for case in fp8_cases(context, strategy, dtype, tp_size, **sizes, has_bias=True):
            for counts in ((9, 3), (0, 4)):
                check_call(case, case.inputs(tokens_of_rank(context, tp_size, *counts)))
            case.layer.close()


@check
def fp8_cuda_graph_replay(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    if context.device.type != "cuda":
        raise Refused("CUDA graphs need a CUDA device")
    captured: dict[str, Any] = {"cuda_graph": True, "max_tokens_per_rank": 16}
    for case in fp8_cases(context, strategy, dtype, num_experts=16, top_k=4, **captured):
        _check_graph_replay(case)
