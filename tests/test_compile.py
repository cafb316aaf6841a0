"""torch.compile keeps one graph around a layer, whatever number of tokens it was traced with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import moe_plugin
from moe_plugin.config import MoEConfig
from moe_plugin.modular_kernel import MoELayer
from moe_plugin.numerics import assert_close_to_oracle
from moe_plugin.strategies import registry
from moe_plugin.testing.cases import Inputs, Weights
from tests.matrix.third_party import register

DEVICE = torch.device("cpu")
CONFIG = MoEConfig(
    num_experts=8, top_k=2, hidden_size=32, intermediate_size=16, dtype=torch.float32, max_tokens_per_rank=64
)
STRATEGIES = {
    "local": "local+torch_native",
    "all_to_all": "nccl_all_to_all+torch_native",
    "phased": "decode=local+loop,prefill=local+torch_native",
    "monolithic": "oracle",
}


@pytest.fixture(autouse=True)
def _third_party() -> Iterator[None]:
    register()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    registry.prepare_finalize_classes.unregister("batched_local")
    registry.experts_classes.unregister("loop")
    registry.monolithic_classes.unregister("oracle")


@pytest.fixture(params=STRATEGIES.values(), ids=STRATEGIES)
def layer(request: pytest.FixtureRequest) -> MoELayer:
    return moe_plugin.build(CONFIG, **Weights.random(CONFIG, DEVICE).of_rank(CONFIG), strategy=request.param)


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.modules.append(module)
        return module.forward

    @property
    def moe_calls(self) -> list[int]:
        """Calls of the layer's operator in each graph."""
        op = torch.ops.moe_plugin.moe_layer
        return [sum(node.target in (op, op.default) for node in module.graph.nodes) for module in self.modules]


def block(layer: MoELayer, max_num_tokens: int | None = None) -> Callable[..., torch.Tensor]:
    """A layer with something to compile on either side."""

    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        weights = weights / weights.sum(-1, keepdim=True)
        return x + layer(x * 2, ids, weights, max_num_tokens=max_num_tokens).relu()

    return forward


def expected(inputs: Inputs) -> torch.Tensor:
    x, ids, weights = inputs.as_tuple()
    experts = Weights.random(CONFIG, DEVICE)
    weights = weights / weights.sum(-1, keepdim=True)
    return x + moe_plugin.reference_moe(x * 2, ids, weights, experts.w13, experts.w2).relu()


def test_one_graph(layer: MoELayer) -> None:
    graphs = Graphs()
    compiled = torch.compile(block(layer), backend=graphs, fullgraph=True)
    inputs = Inputs.random(CONFIG, 6, DEVICE, seed=0)
    for _ in range(2):
        assert_close_to_oracle(compiled(*inputs.as_tuple()), expected(inputs), torch.float32)
    assert graphs.moe_calls == [1]


def test_the_number_of_tokens_is_dynamic(layer: MoELayer) -> None:
    graphs = Graphs()
    compiled = torch.compile(block(layer), backend=graphs, fullgraph=True)
    for num_tokens in (6, 3, 17, 64):
        inputs = Inputs.random(CONFIG, num_tokens, DEVICE, seed=num_tokens)
        for tensor in inputs.as_tuple():
            torch._dynamo.mark_dynamic(tensor, 0)
        assert_close_to_oracle(compiled(*inputs.as_tuple()), expected(inputs), torch.float32)
    assert graphs.moe_calls == [1]


def test_the_announced_size_reaches_the_layer(layer: MoELayer) -> None:
    graphs = Graphs()
    inputs = Inputs.random(CONFIG, 6, DEVICE, seed=0)
    compiled = torch.compile(block(layer, max_num_tokens=8), backend=graphs, fullgraph=True)
    assert_close_to_oracle(compiled(*inputs.as_tuple()), expected(inputs), torch.float32)
    assert graphs.moe_calls == [1]
    too_small = torch.compile(block(layer, max_num_tokens=5), backend=Graphs(), fullgraph=True)
    with pytest.raises(moe_plugin.MoEPluginError, match="max_num_tokens=5"):
        too_small(*inputs.as_tuple())


def test_two_layers_in_one_graph(layer: MoELayer) -> None:
    other = moe_plugin.build(CONFIG, **Weights.random(CONFIG, DEVICE, seed=1).of_rank(CONFIG), strategy="torch")

    def both(*call: torch.Tensor) -> torch.Tensor:
        return layer(*call) - other(*call)

    graphs = Graphs()
    inputs = Inputs.random(CONFIG, 6, DEVICE, seed=0)
    out = torch.compile(both, backend=graphs, fullgraph=True)(*inputs.as_tuple())
    torch.testing.assert_close(out, both(*inputs.as_tuple()))
    assert graphs.moe_calls == [2]
    assert layer.op_key != other.op_key


def test_through_the_ahead_of_time_tracer(layer: MoELayer) -> None:
    inputs = Inputs.random(CONFIG, 6, DEVICE, seed=0)
    compiled = torch.compile(block(layer), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close_to_oracle(compiled(*inputs.as_tuple()), expected(inputs), torch.float32)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_the_operator_keeps_its_contract(layer: MoELayer, num_tokens: int) -> None:
    inputs = Inputs.random(CONFIG, num_tokens, DEVICE, seed=0)
    for max_num_tokens in (None, 8):
        torch.library.opcheck(
            torch.ops.moe_plugin.moe_layer.default,
            (*inputs.as_tuple(), layer.op_key, max_num_tokens),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_the_operator_says_the_shape_of_strided_input(layer: MoELayer) -> None:
    x, ids, weights = Inputs.random(CONFIG, 6, DEVICE, seed=0).as_tuple()
    strided = x.t().contiguous().t()
    torch.library.opcheck(
        torch.ops.moe_plugin.moe_layer.default,
        (strided, ids, weights, layer.op_key, None),
        test_utils="test_faketensor",
    )


def test_eager_calls_do_not_go_through_the_operator(layer: MoELayer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an eager call went through the operator")

    monkeypatch.setattr(torch.ops.moe_plugin, "moe_layer", refuse)
    inputs = Inputs.random(CONFIG, 6, DEVICE, seed=0)
    assert layer(*inputs.as_tuple()).shape == (6, 32)


def test_layers_do_not_live_on_for_the_operator() -> None:
    import gc
    import weakref

    layer = moe_plugin.build(CONFIG, **Weights.random(CONFIG, DEVICE).of_rank(CONFIG), strategy="torch")
    alive, _ = weakref.ref(layer), layer.op_key
    del layer
    gc.collect()
    assert alive() is None
