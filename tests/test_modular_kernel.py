"""What passes between the two halves of a layer, how it may be misused, and how the kernel runs the halves."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import DtypeError, HandleError, InputError, ShapeError, TooManyTokensError
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import (
    ActivationFormat,
    Dispatched,
    DispatchHandle,
    Experts,
    ExpertWeights,
    ModularKernel,
    MoELayer,
    Monolithic,
    MonolithicKernel,
    PrepareAndFinalize,
    Receiver,
    RouterWeightStage,
    validate_inputs,
    warm_up_rows,
)
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.prepare_finalize.local import Local
from moe_plugin.prepare_finalize.nccl_all_to_all import NcclAllToAll
from moe_plugin.reference import reference_moe
from moe_plugin.strategies.phases import PhasedLayer
from moe_plugin.testing.cases import Inputs, Weights
from moe_plugin.workspace import Workspace, WorkspaceArena
from tests.matrix.third_party import OracleMonolith

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T = 5
CONFIG = MoEConfig(
    num_experts=8, top_k=2, hidden_size=32, intermediate_size=16, dtype=torch.float32, max_tokens_per_rank=16
)
PREPARE_FINALIZE = [Local, NcclAllToAll]


def expert_weights(config: MoEConfig = CONFIG) -> ExpertWeights:
    return ExpertWeights(**Weights.random(config, DEVICE).of_rank(config))


def make_kernel(prepare_finalize: type[PrepareAndFinalize] = Local, config: MoEConfig = CONFIG) -> ModularKernel:
    arena = WorkspaceArena(DEVICE, poison=True)
    return ModularKernel(prepare_finalize(config, arena), TorchNative(config, expert_weights(config)))


def make_monolithic() -> MonolithicKernel:
    return MonolithicKernel(OracleMonolith(CONFIG, expert_weights(), WorkspaceArena(DEVICE)))


@pytest.fixture(params=[*PREPARE_FINALIZE, OracleMonolith], ids=lambda part: part.name)
def layer(request: pytest.FixtureRequest) -> MoELayer:
    return make_monolithic() if request.param is OracleMonolith else make_kernel(request.param)


@pytest.fixture(params=PREPARE_FINALIZE, ids=lambda part: part.name)
def kernel(request: pytest.FixtureRequest) -> ModularKernel:
    return make_kernel(request.param)


@pytest.fixture
def inputs() -> Inputs:
    return Inputs.random(CONFIG, T, DEVICE, seed=0)


def expected(inputs: Inputs) -> torch.Tensor:
    weights = expert_weights()
    return reference_moe(*inputs.as_tuple(), weights.w13, weights.w2)


VALID: dict[str, Any] = {
    "hidden_states": torch.zeros(T, 32),
    "topk_ids": torch.zeros(T, 2, dtype=torch.int64),
    "topk_weights": torch.zeros(T, 2),
    "max_num_tokens": None,
    "out": None,
}
INVALID: list[tuple[dict[str, Any], type[InputError], str]] = [
    ({"hidden_states": torch.zeros(T, 31)}, ShapeError, r"hidden_states must be \[T, 32\], got \[5, 31\]"),
    ({"hidden_states": torch.zeros(T * 32)}, ShapeError, r"hidden_states must be \[T, 32\], got \[160\]"),
    ({"hidden_states": torch.zeros(1, T, 32)}, ShapeError, r"got \[1, 5, 32\]"),
    ({"hidden_states": torch.zeros(T, 32).bfloat16()}, DtypeError, "hidden_states must be float32, got bfloat16"),
    ({"topk_ids": torch.zeros(T - 1, 2).long()}, ShapeError, r"topk_ids must be \[5, 2\], got \[4, 2\]"),
    ({"topk_ids": torch.zeros(T, 3).long()}, ShapeError, r"topk_ids must be \[5, 2\], got \[5, 3\]"),
    ({"topk_ids": torch.zeros(T, 2)}, DtypeError, "topk_ids must be one of int16, int32, int64, got float32"),
    ({"topk_ids": torch.zeros(T, 2).to(torch.uint8)}, DtypeError, "topk_ids must be one of"),
    ({"topk_ids": torch.zeros(T, 2, device="meta").long()}, InputError, "topk_ids is on meta, hidden_states on cpu"),
    ({"topk_weights": torch.zeros(T)}, ShapeError, r"topk_weights must be \[5, 2\], got \[5\]"),
    ({"topk_weights": torch.zeros(T + 1, 2)}, ShapeError, r"topk_weights must be \[5, 2\], got \[6, 2\]"),
    ({"topk_weights": torch.zeros(T, 2).double()}, DtypeError, "topk_weights must be one of float32, bfloat16"),
    ({"topk_weights": torch.zeros(T, 2, device="meta")}, InputError, "topk_weights is on meta"),
    ({"max_num_tokens": T - 1}, TooManyTokensError, "max_num_tokens=4 must lie between T=5 and max_tokens_per_rank=16"),
    ({"max_num_tokens": 17}, TooManyTokensError, "max_num_tokens=17 must lie between"),
    ({"out": torch.zeros(T - 1, 32)}, ShapeError, r"out must be \[5, 32\] float32, got \[4, 32\] float32"),
    ({"out": torch.zeros(T, 32).half()}, ShapeError, r"out must be \[5, 32\] float32, got \[5, 32\] float16"),
    ({"out": torch.zeros(T, 32, device="meta")}, InputError, "out is on meta"),
    (
        {
            "hidden_states": torch.zeros(17, 32),
            "topk_ids": torch.zeros(17, 2).long(),
            "topk_weights": torch.zeros(17, 2),
        },
        TooManyTokensError,
        "17 tokens exceed max_tokens_per_rank=16",
    ),
]


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
@pytest.mark.parametrize(("changes", "error", "message"), INVALID)
def test_arguments_that_do_not_fit(
    changes: dict[str, Any], error: type[InputError], message: str, device: torch.device | None
) -> None:
    with pytest.raises(error, match=message) as caught:
        validate_inputs(CONFIG, **(VALID | changes), device=device)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "changes",
    [
        {"topk_ids": torch.zeros(T, 2, dtype=torch.int16)},
        {"topk_ids": torch.zeros(T, 2, dtype=torch.int32)},
        {"topk_weights": torch.zeros(T, 2, dtype=torch.bfloat16)},
        {"topk_weights": torch.zeros(T, 2, dtype=torch.float16)},
        {"max_num_tokens": T},
        {"max_num_tokens": 16},
        {"out": torch.zeros(T, 32)},
        {"hidden_states": torch.zeros(32, T).t()},
        {
            "hidden_states": torch.zeros(0, 32),
            "topk_ids": torch.zeros(0, 2).long(),
            "topk_weights": torch.zeros(0, 2),
            "max_num_tokens": 0,
        },
    ],
)
def test_arguments_that_fit(changes: dict[str, Any]) -> None:
    validate_inputs(CONFIG, **(VALID | changes))


def test_arguments_on_another_device_than_the_layer() -> None:
    with pytest.raises(InputError, match="hidden_states is on cpu, the layer on meta"):
        validate_inputs(CONFIG, **VALID, device=torch.device("meta"))


def test_dispatchers_that_move_rows_say_nothing_about_the_experts_output(inputs: Inputs) -> None:
    kernel = make_kernel(NcclAllToAll)
    dispatched = kernel.prepare(*inputs.as_tuple())
    assert kernel.prepare_finalize.expert_output(dispatched.handle) is None


def test_values_are_not_looked_at() -> None:
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in VALID.items()}
    validate_inputs(CONFIG, **meta)


def test_a_layer_checks_its_arguments(layer: MoELayer, inputs: Inputs) -> None:
    with pytest.raises(ShapeError, match="hidden_states must be"):
        layer(inputs.hidden_states[:, 1:], inputs.topk_ids, inputs.topk_weights)
    with pytest.raises(TooManyTokensError):
        layer(*inputs.as_tuple(), max_num_tokens=T - 1)
    with pytest.raises(ShapeError, match="out must be"):
        layer(*inputs.as_tuple(), out=torch.empty(T, 31, device=DEVICE))
    # An error leaves the layer as it was.
    assert_close_to_oracle(layer(*inputs.as_tuple()), expected(inputs), torch.float32)


@pytest.mark.parametrize("half", ["prepare", "prepare_async"])
def test_both_forms_of_prepare_check_their_arguments(kernel: ModularKernel, inputs: Inputs, half: str) -> None:
    with pytest.raises(DtypeError, match="topk_ids must be"):
        getattr(kernel, half)(inputs.hidden_states, inputs.topk_ids.float(), inputs.topk_weights)


def test_the_layer_equals_the_oracle(layer: MoELayer, inputs: Inputs) -> None:
    out = layer(*inputs.as_tuple())
    layer.check_errors()
    assert_close_to_oracle(out, expected(inputs), torch.float32)


def test_shared_experts_are_added(layer: MoELayer, inputs: Inputs) -> None:
    seen: list[torch.Tensor] = []

    def shared(hidden_states: torch.Tensor) -> torch.Tensor:
        seen.append(hidden_states)
        return 3 * hidden_states

    out = layer(*inputs.as_tuple(), shared_experts=shared)
    assert_close_to_oracle(out, expected(inputs) + 3 * inputs.hidden_states, torch.float32)
    assert len(seen) == 1
    assert seen[0] is inputs.hidden_states


def test_shared_experts_run_between_the_halves_of_dispatch(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, order = make_kernel(), []
    start = kernel.prepare_finalize.prepare_async

    def prepare_async(*args: Any) -> Receiver[Dispatched]:
        order.append("start")
        receiver = start(*args)

        def complete() -> Dispatched:
            order.append("complete")
            return receiver.wait()

        return Receiver(complete)

    monkeypatch.setattr(kernel.prepare_finalize, "prepare_async", prepare_async)
    kernel(*inputs.as_tuple(), shared_experts=lambda x: order.append("shared") or x)
    assert order == ["start", "shared", "complete"]


@pytest.mark.parametrize("with_shared", [False, True])
def test_out_is_written_and_returned(layer: MoELayer, inputs: Inputs, with_shared: bool) -> None:
    out = torch.full((T, 32), torch.nan, device=DEVICE)
    result = layer(*inputs.as_tuple(), out=out, shared_experts=torch.square if with_shared else None)
    assert result.data_ptr() == out.data_ptr()
    added = inputs.hidden_states.square() if with_shared else 0
    assert_close_to_oracle(out, expected(inputs) + added, torch.float32)


@pytest.mark.parametrize("form", ["rows_apart", "columns_apart"])
def test_out_of_any_strides_is_right_or_refused(layer: MoELayer, inputs: Inputs, form: str) -> None:
    canary = torch.full((T, 64), torch.nan, device=DEVICE)
    out = canary[:, :32] if form == "rows_apart" else canary[:, ::2]
    refusal = None
    try:
        layer(*inputs.as_tuple(), out=out)
    except InputError as problem:
        refusal = str(problem)
    if refusal is not None:
        assert form == "columns_apart"
        assert "out" in refusal
        return
    assert_close_to_oracle(out.contiguous(), expected(inputs), torch.float32)
    assert canary.isnan().sum() == T * 32


def test_the_result_is_not_workspace_memory(layer: MoELayer, inputs: Inputs) -> None:
    first = layer(*inputs.as_tuple())
    kept = first.clone()
    layer(*Inputs.random(CONFIG, T, DEVICE, seed=1).as_tuple())
    assert torch.equal(first, kept)


def test_finalize_takes_what_prepare_returned(kernel: ModularKernel, inputs: Inputs) -> None:
    dispatched = kernel.prepare(*inputs.as_tuple())
    rows = kernel.apply_experts(dispatched)
    for wrong in (None, dispatched.handle, rows):
        for finalize in (kernel.finalize, kernel.finalize_async):
            with pytest.raises(HandleError, match="finalize takes the Dispatched that prepare returned"):
                finalize(rows, wrong)
    assert_close_to_oracle(kernel.finalize(rows, dispatched), expected(inputs), torch.float32)


@pytest.mark.parametrize("form", ["finalize", "finalize_async"])
def test_finalize_runs_once(kernel: ModularKernel, inputs: Inputs, form: str) -> None:
    dispatched = kernel.prepare(*inputs.as_tuple())
    rows = kernel.apply_experts(dispatched)
    kernel.finalize(rows, dispatched)
    with pytest.raises(HandleError, match=f"{kernel.prepare_finalize.name}: finalize was already called"):
        getattr(kernel, form)(rows, dispatched)


def test_finalize_with_the_handle_of_another_object(kernel: ModularKernel, inputs: Inputs) -> None:
    other = make_kernel(type(kernel.prepare_finalize))
    dispatched = kernel.prepare(*inputs.as_tuple())
    rows = kernel.apply_experts(dispatched)
    with pytest.raises(HandleError, match=f"comes from another {kernel.prepare_finalize.name} object"):
        other.finalize(rows, dispatched)
    # The attempt does not spend the handle.
    assert_close_to_oracle(kernel.finalize(rows, dispatched), expected(inputs), torch.float32)


def test_calls_in_flight_do_not_mix(kernel: ModularKernel) -> None:
    calls = [Inputs.random(CONFIG, n, DEVICE, seed=n) for n in (3, 7, 1)]
    flying = [kernel.prepare(*call.as_tuple()) for call in calls]
    rows = [kernel.apply_experts(dispatched) for dispatched in reversed(flying)][::-1]
    for call, row, dispatched in zip(calls, rows, flying, strict=True):
        assert_close_to_oracle(kernel.finalize(row, dispatched), expected(call), torch.float32)


def test_a_workspace_goes_back_after_finalize_and_not_before(kernel: ModularKernel, inputs: Inputs) -> None:
    arena = kernel.prepare_finalize.arena
    dispatched = kernel.prepare(*inputs.as_tuple())
    workspace = dispatched.handle.workspace
    assert arena.lease() is not workspace
    kernel.finalize(kernel.apply_experts(dispatched), dispatched)
    assert arena.lease() is workspace


def test_a_receiver_is_waited_for_once(kernel: ModularKernel, inputs: Inputs) -> None:
    receiver = kernel.prepare_async(*inputs.as_tuple())
    dispatched = receiver.wait()
    with pytest.raises(HandleError, match="already waited for"):
        receiver.wait()
    combined = kernel.finalize_async(kernel.apply_experts(dispatched), dispatched)
    assert_close_to_oracle(combined.wait(), expected(inputs), torch.float32)
    with pytest.raises(HandleError, match="already waited for"):
        combined.wait()


def test_a_receiver_that_failed_is_spent() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    receiver = Receiver(fail)
    with pytest.raises(ZeroDivisionError):
        receiver.wait()
    with pytest.raises(HandleError):
        receiver.wait()


def dispatched(**changes: Any) -> Dispatched:
    """A Dispatched as it should be, with `changes`."""
    local = Local(CONFIG, WorkspaceArena(DEVICE))
    fields = {
        "activations": torch.zeros(T, 32),
        "activation_format": ActivationFormat.STANDARD,
        "router_weight_stage": RouterWeightStage.EXPERTS_GATHER,
        "handle": DispatchHandle(local, T, local.arena.lease()),
        "local_ids": torch.zeros(T, 2, dtype=torch.int32),
        "topk_weights": torch.zeros(T, 2),
    }
    return Dispatched(**(fields | changes))


BATCHED = {"activation_format": ActivationFormat.BATCHED_EXPERTS, "local_ids": None}
COMBINE = {"router_weight_stage": RouterWeightStage.COMBINE, "topk_weights": None}
COUNTS = {"expert_num_tokens": torch.zeros(8, dtype=torch.int32)}


@pytest.mark.parametrize(
    "changes",
    [{}, COMBINE, BATCHED | COMBINE | COUNTS, {"router_weight_stage": "before_dispatch", "topk_weights": None}],
)
def test_what_may_be_dispatched(changes: dict[str, Any]) -> None:
    assert dispatched(**changes).handle.num_tokens == T


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_weights": None}, "must travel exactly when experts apply them; stage is experts_gather"),
        ({"router_weight_stage": RouterWeightStage.COMBINE}, "stage is combine"),
        ({"router_weight_stage": RouterWeightStage.BEFORE_DISPATCH}, "stage is before_dispatch"),
        ({"local_ids": None}, "activation format Standard needs local_ids"),
        (BATCHED | COMBINE, "activation format BatchedExperts needs expert_num_tokens"),
    ],
)
def test_what_may_not_be_dispatched(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HandleError, match=message):
        dispatched(**changes)


@pytest.mark.parametrize("prepare_finalize", PREPARE_FINALIZE)
def test_router_weights_are_applied_in_one_place(prepare_finalize: type[PrepareAndFinalize]) -> None:
    on_input = MoEConfig(
        num_experts=8,
        top_k=1,
        hidden_size=32,
        intermediate_size=16,
        dtype=torch.float32,
        apply_router_weight_on_input=True,
    )
    x, ids = torch.ones(2, 32, device=DEVICE), torch.tensor([[1], [3]], device=DEVICE)
    sent = make_kernel(prepare_finalize, on_input).prepare(x, ids, torch.tensor([[2.0], [-0.5]], device=DEVICE))
    assert sent.router_weight_stage is RouterWeightStage.BEFORE_DISPATCH
    assert sent.topk_weights is None
    assert sorted(sent.activations[:, 0].tolist()) == [-0.5, 2.0]
    assert (x == 1).all()


def test_the_kernel_is_named_after_its_pair(kernel: ModularKernel) -> None:
    assert kernel.strategy == f"{kernel.prepare_finalize.name}+torch_native"


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        (PrepareAndFinalize, {"supports", "prepare", "finalize"}),
        (Experts, {"supports", "apply"}),
        (Monolithic, {"supports", "apply"}),
        (MoELayer, {"forward", "check_errors"}),
    ],
)
def test_what_a_class_must_implement(kind: type, methods: set[str]) -> None:
    assert kind.__abstractmethods__ == methods


@pytest.mark.parametrize("part", [Local, NcclAllToAll, TorchNative, OracleMonolith])
def test_supports_and_memory_touch_no_device(part: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gate allocated memory")

    for name in ("empty", "zeros", "tensor", "arange", "full"):
        monkeypatch.setattr(torch, name, refuse)
    assert part.supports(CONFIG, Environment(sm=90, device_type="cuda")).gates
    assert all(size >= 0 for size in part.memory(CONFIG).values())


def test_what_is_no_tensor_is_named(layer: MoELayer, inputs: Inputs) -> None:
    for position, name in enumerate(("hidden_states", "topk_ids", "topk_weights")):
        arguments: list[Any] = list(inputs.as_tuple())
        arguments[position] = None
        with pytest.raises(DtypeError, match=f"{name} must be a tensor, got NoneType"):
            layer(*arguments)


def test_a_wrong_out_is_refused_before_combine(kernel: ModularKernel, inputs: Inputs) -> None:
    dispatched = kernel.prepare(*inputs.as_tuple())
    rows = kernel.apply_experts(dispatched)
    for wrong in (torch.empty(T - 1, 32, device=DEVICE), torch.empty(T, 32, dtype=torch.float64, device=DEVICE)):
        with pytest.raises(ShapeError, match="out must be"):
            kernel.finalize(rows, dispatched, wrong)
        with pytest.raises(ShapeError, match="out must be"):
            kernel.finalize_async(rows, dispatched, wrong)
    assert_close_to_oracle(kernel.finalize(rows, dispatched), expected(inputs), torch.float32)


def test_transposed_weights_are_refused() -> None:
    weights = expert_weights()
    with pytest.raises(ShapeError, match="w13 must be contiguous in its last dimension"):
        ExpertWeights(w13=weights.w13.mT.contiguous().mT, w2=weights.w2).check(CONFIG)


def test_experts_cannot_overwrite_what_the_dispatcher_keeps(inputs: Inputs) -> None:
    class Careless(TorchNative):
        def apply(self, dispatched: Dispatched, workspace: Any, output: torch.Tensor | None = None) -> torch.Tensor:
            for name in ("row_index", "local_ids", "topk_weights", "received"):
                workspace.tensor(name, (64, 64), torch.float32).fill_(float("nan"))
            return super().apply(dispatched, workspace, output)

    arena = WorkspaceArena(DEVICE)
    layer = ModularKernel(NcclAllToAll(CONFIG, arena), Careless(CONFIG, expert_weights()))
    assert_close_to_oracle(layer(*inputs.as_tuple()), expected(inputs), torch.float32)


class Counting(TorchNative):
    """Notes every call: its rows, and who applies router weights."""

    def __init__(self, config: MoEConfig, weights: ExpertWeights) -> None:
        super().__init__(config, weights)
        self.calls: list[tuple[int, RouterWeightStage]] = []

    def counters(self) -> dict[str, int]:
        return {"few": sum(rows <= 2 for rows, _ in self.calls), "many": sum(rows > 2 for rows, _ in self.calls)}

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        self.calls.append((dispatched.activations.shape[0], dispatched.router_weight_stage))
        workspace.tensor("rows", dispatched.activations.shape, torch.float32).fill_(1)
        return super().apply(dispatched, workspace, output)


def counting(config: MoEConfig = CONFIG) -> ModularKernel:
    return ModularKernel(Local(config, WorkspaceArena(DEVICE)), Counting(config, expert_weights(config)))


def test_counters_carry_the_name_of_the_class(inputs: Inputs) -> None:
    layer = counting()
    name = TorchNative.name
    assert layer.counters() == {f"{name}.few": 0, f"{name}.many": 0}
    layer(*inputs.as_tuple())
    layer(*Inputs.random(CONFIG, 2, DEVICE, seed=1).as_tuple())
    layer(*inputs.as_tuple())
    assert layer.counters() == {f"{name}.few": 1, f"{name}.many": 2}


def test_layers_without_ways_inside_count_nothing(layer: MoELayer, inputs: Inputs) -> None:
    layer(*inputs.as_tuple())
    assert layer.counters() == {}


def test_counters_of_a_monolithic_layer() -> None:
    class CountingMonolith(OracleMonolith):
        def counters(self) -> dict[str, int]:
            return {"calls": 7}

    layer = MonolithicKernel(CountingMonolith(CONFIG, expert_weights(), WorkspaceArena(DEVICE)))
    assert layer.counters() == {f"{OracleMonolith.name}.calls": 7}


def test_counters_of_both_phases(inputs: Inputs) -> None:
    layer = PhasedLayer(counting(), counting())
    layer(*inputs.as_tuple(), max_num_tokens=T)
    layer(*inputs.as_tuple())
    layer(*inputs.as_tuple())
    name = TorchNative.name
    assert layer.counters() == {
        f"decode.{name}.few": 0,
        f"decode.{name}.many": 1,
        f"prefill.{name}.few": 0,
        f"prefill.{name}.many": 2,
    }


def test_rows_to_warm_up() -> None:
    assert warm_up_rows(0) == []
    assert warm_up_rows(3) == [3, 2, 1]
    assert warm_up_rows(64) == list(range(64, 0, -1))
    for most in (65, 100, 257, 4096, 100_000):
        rows = warm_up_rows(most)
        assert rows == sorted(set(rows), reverse=True)
        assert rows[0] == most
        assert rows[-64:] == list(range(64, 0, -1))
        # Steps of 5%, but for the rounding to whole rows.
        assert all(one <= 1.05 * less + 1 for one, less in itertools.pairwise(rows))


@pytest.mark.parametrize("on_input", [False, True])
def test_warming_up_is_a_call_of_every_number_of_rows(on_input: bool) -> None:
    config = replace(CONFIG, max_tokens_per_rank=4, top_k=1, apply_router_weight_on_input=on_input)
    layer = counting(config)
    experts = layer.experts
    assert isinstance(experts, Counting)
    arena = layer.prepare_finalize.arena
    steps = list(experts.warm_up_steps(arena))
    assert [name for name, _ in steps] == [f"torch_native, {rows} rows" for rows in (4, 3, 2, 1)]
    assert not experts.calls
    for _, step in steps:
        step()
    stage = RouterWeightStage.BEFORE_DISPATCH if on_input else RouterWeightStage.EXPERTS_GATHER
    assert experts.calls == [(rows, stage) for rows in (4, 3, 2, 1)]
    # In the buffers that calls of the layer take: the first one makes none but the dispatcher's.
    held = arena.nbytes
    assert held >= 4 * config.hidden_size * 4
    dispatched = layer.prepare(*Inputs.random(config, 4, DEVICE, seed=0).as_tuple())
    before = dispatched.handle.workspace.nbytes
    layer.finalize(layer.apply_experts(dispatched), dispatched)
    assert arena.nbytes == before


def test_classes_that_take_no_standard_rows_have_nothing_to_warm_up() -> None:
    class Batched(TorchNative):
        activation_formats = frozenset({ActivationFormat.BATCHED_EXPERTS})

    experts = Batched(CONFIG, expert_weights())
    assert list(experts.warm_up_steps(WorkspaceArena(DEVICE))) == []
