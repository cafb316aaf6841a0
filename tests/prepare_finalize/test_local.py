"""No dispatch: what reaches the experts, where they write, and what the caller keeps."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.config import MoEConfig
from moe_plugin.errors import ExpertIdError
from moe_plugin.experts.torch_native import TorchNative
from moe_plugin.modular_kernel import Dispatched, Experts, ExpertWeights, ModularKernel
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.prepare_finalize.local import Local
from moe_plugin.prepare_finalize.placement_lookup import PlacementLookup
from moe_plugin.reference import reference_moe
from moe_plugin.testing.cases import Inputs, Weights
from moe_plugin.workspace import Workspace, WorkspaceArena

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T, H = 5, 32
CONFIG = MoEConfig(
    num_experts=8, top_k=2, hidden_size=H, intermediate_size=16, dtype=torch.float32, max_tokens_per_rank=16
)


class Obedient(TorchNative):
    """Writes where it is told to, NaN first, as a kernel that accumulates in place would."""

    given: torch.Tensor | None = None

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        self.given = output
        if output is None:
            return super().apply(dispatched, workspace)
        output.fill_(torch.nan)
        return output.copy_(super().apply(dispatched, workspace))


class Stubborn(TorchNative):
    """Ignores where it is told to write, and returns memory of the workspace."""

    def apply(self, dispatched: Dispatched, workspace: Workspace, output: torch.Tensor | None = None) -> torch.Tensor:
        rows = super().apply(dispatched, workspace)
        return workspace.tensor("rows", rows.shape, rows.dtype).copy_(rows)


def make(experts: type[Experts] = Obedient, use_triton: bool = False) -> ModularKernel:
    weights = ExpertWeights(**Weights.random(CONFIG, DEVICE).of_rank(CONFIG))
    local = Local(CONFIG, WorkspaceArena(DEVICE, poison=True))
    local._lookup = PlacementLookup(CONFIG, DEVICE, use_triton)
    return ModularKernel(local, experts(CONFIG, weights))


def given_to(layer: ModularKernel) -> torch.Tensor | None:
    assert isinstance(layer.experts, Obedient)
    return layer.experts.given


@pytest.fixture
def inputs() -> Inputs:
    return Inputs.random(CONFIG, T, DEVICE, seed=0)


def check(layer: ModularKernel, result: torch.Tensor, inputs: Inputs) -> None:
    weights = layer.experts.weights
    assert_close_to_oracle(result, reference_moe(*inputs.as_tuple(), weights.w13, weights.w2), torch.float32)


def call_and_check_errors(layer: ModularKernel, inputs: Inputs) -> None:
    layer(*inputs.as_tuple())
    layer.check_errors()


def test_experts_write_into_the_result(inputs: Inputs) -> None:
    layer = make()
    result = layer(*inputs.as_tuple())
    assert result is given_to(layer)
    check(layer, result, inputs)


def test_experts_write_into_out(inputs: Inputs) -> None:
    layer, out = make(), torch.empty(T, H, device=DEVICE)
    assert layer(*inputs.as_tuple(), out=out) is out
    assert given_to(layer) is out
    check(layer, out, inputs)


def test_out_with_gaps_between_rows(inputs: Inputs) -> None:
    layer, wide = make(), torch.full((T, 2 * H), 7.0, device=DEVICE)
    out = wide[:, :H]
    assert layer(*inputs.as_tuple(), out=out) is out
    check(layer, out, inputs)
    assert (wide[:, H:] == 7).all()


def test_out_may_be_the_input(inputs: Inputs) -> None:
    layer, hidden_states = make(), inputs.hidden_states.clone()
    assert layer(hidden_states, inputs.topk_ids, inputs.topk_weights, out=hidden_states) is hidden_states
    check(layer, hidden_states, inputs)


@pytest.mark.parametrize("with_out", [False, True])
def test_experts_may_ignore_where_to_write(inputs: Inputs, with_out: bool) -> None:
    layer, out = make(Stubborn), torch.empty(T, H, device=DEVICE) if with_out else None
    result = layer(*inputs.as_tuple(), out=out)
    assert out is None or result is out
    kept = result.clone()
    layer(*Inputs.random(CONFIG, T, DEVICE, seed=1).as_tuple())
    assert torch.equal(result, kept), "the next call must not write into this one's result"
    check(layer, result, inputs)


@pytest.mark.parametrize("with_out", [False, True])
def test_halves_called_one_by_one(inputs: Inputs, with_out: bool) -> None:
    layer, out = make(), torch.empty(T, H, device=DEVICE) if with_out else None
    dispatched = layer.prepare(*inputs.as_tuple())
    result = layer.finalize(layer.apply_experts(dispatched), dispatched, out)
    assert out is None or result is out
    check(layer, result, inputs)


def test_results_in_flight_do_not_share_memory(inputs: Inputs) -> None:
    layer = make()
    first, second = inputs, Inputs.random(CONFIG, T, DEVICE, seed=1)
    sent = [layer.prepare(*each.as_tuple()) for each in (first, second)]
    rows = [layer.apply_experts(each) for each in sent]
    results = [layer.finalize(rows[i], sent[i]) for i in (1, 0)]
    check(layer, results[0], second)
    check(layer, results[1], first)


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
def test_an_error_gives_its_workspace_back(inputs: Inputs, use_triton: bool) -> None:
    layer = make(use_triton=use_triton)
    layer(*inputs.as_tuple())
    arena = layer.prepare_finalize.arena
    bytes_held = arena.nbytes
    wrong = inputs.with_ids(torch.full_like(inputs.topk_ids, CONFIG.num_experts))
    with pytest.raises(ExpertIdError):
        call_and_check_errors(layer, wrong)
    assert arena.nbytes == bytes_held
    check(layer, layer(*inputs.as_tuple()), inputs)


@pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_the_lookup_give_the_same(inputs: Inputs, use_triton: bool, dtype: torch.dtype) -> None:
    weights = inputs.topk_weights.to(dtype)
    layer = make(use_triton=use_triton)
    result = layer(inputs.hidden_states, inputs.topk_ids, weights)
    check(layer, result, Inputs(inputs.hidden_states, inputs.topk_ids, weights.float()))


def test_steady_state_allocates_the_result_and_nothing_else(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(use_triton=True)
    arguments = inputs.hidden_states, inputs.topk_ids, inputs.topk_weights.bfloat16()
    layer.prepare(*arguments).handle.workspace.release()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("allocated in steady state")

    for name in ("empty", "zeros", "empty_like", "arange", "where", "tensor"):
        monkeypatch.setattr(torch, name, refuse)
    for _ in range(2):
        dispatched = layer.prepare(*arguments)
        dispatched.handle.workspace.release()


def test_gradient_mode_is_as_it_was(inputs: Inputs) -> None:
    layer = make()
    assert torch.is_grad_enabled()
    result = layer(inputs.hidden_states.requires_grad_(), inputs.topk_ids, inputs.topk_weights)
    assert torch.is_grad_enabled()
    assert not result.requires_grad
    with pytest.raises(ExpertIdError):
        call_and_check_errors(layer, inputs.with_ids(inputs.topk_ids - 9))
    assert torch.is_grad_enabled()
    with torch.no_grad():
        layer(*inputs.as_tuple())
        assert not torch.is_grad_enabled()
