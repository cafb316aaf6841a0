"""TritonFusedMoE keeps what repeats between calls, and layers share it: no call may see another's tensors."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken, QuantConfig
from moe_plugin.experts.triton_fused_moe import TritonFusedMoE
from moe_plugin.kernels.tile_tables import HOPPER, FixedTiles
from moe_plugin.kernels.tiling import shared_memory_bytes
from moe_plugin.workspace import WorkspaceArena
from tests.experts.cases import (
    DEVICE,
    Layer,
    backwards,
    check_capture_between_calls,
    make_config,
    make_weights,
    normal,
    random_ids,
)

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48}
SCHEMES = [None, Fp8Block(), Fp8PerToken(), Fp8PerTensor(static_activations=True)]
by_scheme = pytest.mark.parametrize("quantization", SCHEMES, ids=str)


@pytest.fixture(autouse=True)
def _sm89(request: pytest.FixtureRequest) -> None:
    scheme = request.node.callspec.params.get("quantization") if hasattr(request.node, "callspec") else None
    if scheme is not None and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton has e4m3 from SM 89 on")


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call whose launches had to be described."""
    seen: list[int] = []
    for name in ("_standard_launches", "_hopper_launches"):
        original = getattr(TritonFusedMoE, name)

        def describe(self: Any, dispatched: Any, *args: Any, original: Any = original) -> Any:
            seen.append(dispatched.activations.shape[0])
            return original(self, dispatched, *args)

        monkeypatch.setattr(TritonFusedMoE, name, describe)
    return seen


def two_layers(**overrides: Any) -> list[Layer]:
    """Of one configuration, with other weights and in one arena."""
    config = make_config(**(SIZES | overrides))
    arena, weights = WorkspaceArena(DEVICE, poison=True), make_weights(config)
    return [Layer(config, each, TritonFusedMoE(config, each), arena) for each in (weights, backwards(weights))]


def check(layer: Layer, seed: int, num_rows: int, top_k: int = 2, **changes: Any) -> None:
    """A call in the layer's arena has the bits of one that shares nothing with any other."""
    given: dict[str, Any] = {
        "activations": normal(num_rows, layer.config.hidden_size, seed=seed, dtype=layer.config.dtype),
        "local_ids": random_ids(num_rows, top_k, 5).roll(seed, 0),
        "topk_weights": normal(num_rows, top_k, seed=seed + 1),
    } | changes
    alone = replace(
        layer, experts=TritonFusedMoE(layer.config, layer.weights), arena=WorkspaceArena(DEVICE, poison=True)
    )
    expected = alone.apply(**(given | {"output": None}))
    handle = layer.handle(num_rows)
    assert torch.equal(layer.apply(handle=handle, **given), expected)
    handle.workspace.release()


@by_scheme
def test_layers_in_one_arena_do_not_mix(quantization: QuantConfig | None) -> None:
    first, second = two_layers(quantization=quantization)
    for step, num_rows in enumerate((1, 1, 1, 7, 1, 18, 7, 1)):
        check(first, step, num_rows)
        check(second, step, num_rows)


def test_layers_of_one_configuration_describe_their_launches_once(described: list[int]) -> None:
    first, second = two_layers()
    rows, ids, weights = first.rows(6), random_ids(6, 2, 5), normal(6, 2, seed=7)
    for _ in range(5):
        for layer in (first, second):
            handle = layer.handle(6)
            layer.apply(rows.clone(), handle=handle, local_ids=ids.clone(), topk_weights=weights.clone())
            handle.workspace.release()
    # One call to compile, one to see that all of it launches directly; the interpreter needs the first alone.
    assert len(described) <= 2


@pytest.mark.parametrize(
    "overrides",
    [
        {"activation": Activation.GELU_AND_MUL},
        {"activation": Activation.SWIGLU_OAI, "swiglu_limit": 0.5},
        {"hidden_size": 128},
        {"intermediate_size": 96},
        {"num_experts": 6},
        {"quantization": Fp8Block()},
        {"dtype": torch.float16},
        {"has_bias": True},
    ],
    ids=str,
)
def test_layers_of_two_configurations_in_one_arena(overrides: dict[str, Any]) -> None:
    first = two_layers()[0]
    second = replace(two_layers(**overrides)[0], arena=first.arena)
    for step in range(3):
        check(first, step, 6)
        check(second, step, 6)


@pytest.mark.parametrize("quantization", [None, Fp8Block()], ids=str)
def test_layouts_of_the_arguments(quantization: QuantConfig | None) -> None:
    layer = two_layers(quantization=quantization)[0]
    hidden = layer.config.hidden_size
    wide = normal(4, hidden + 64, seed=3, dtype=torch.bfloat16)
    changes: list[dict[str, Any]] = [
        {},
        {"activations": wide[:, :hidden]},
        {"activations": wide[:, 32 : hidden + 32]},
        {"activations": wide[:, 1 : hidden + 1]},
        {"activations": wide[:1, :hidden].expand(4, -1)},
        {"local_ids": random_ids(4, 4, 5)[:, ::2]},
        {"local_ids": random_ids(4, 4, 5)[:, 1:3]},
        {"topk_weights": normal(4, 4, seed=7)[:, 1::2]},
        {"topk_weights": normal(4, 2, seed=8, dtype=torch.bfloat16)},
        {"topk_weights": None},
        {"output": torch.full((4, hidden), torch.nan, dtype=torch.bfloat16, device=DEVICE)},
        {"output": torch.full((4, hidden + 8), torch.nan, dtype=torch.bfloat16, device=DEVICE)[:, :hidden]},
    ]
    if quantization is not None:
        changes = changes[:5]  # rows are what it changes
    for _ in range(2):
        for step, change in enumerate(changes):
            check(layer, step, 4, **change)


def test_other_numbers_of_ids_per_row() -> None:
    layer = two_layers()[0]
    for step, top_k in enumerate((2, 4, 2, 1, 4, 2, 1)):
        check(layer, step, 8, top_k=top_k)


def test_buffers_that_are_replaced_by_larger_ones() -> None:
    first, second = two_layers()
    for step, num_rows in enumerate((3, 3, 3, 20, 3, 3, 24, 20, 3)):
        check(first, step, num_rows)
        # Frees what was outgrown, so that another's memory would be found there.
        gc.collect()
        check(second, step, num_rows)


def test_batched_experts_in_one_arena() -> None:
    first, second = two_layers()
    for max_tokens, counts in ((9, [0, 4, 1, 9, 0]), (9, [9, 0, 2, 0, 1]), (3, [3, 0, 0, 1, 2])) * 2:
        for layer in (first, second):
            layer.check_batched(counts, max_tokens)


def test_other_tiles_are_another_sequence(described: list[int]) -> None:
    layer = two_layers()[0]
    experts: Any = layer.experts
    shared_memory = shared_memory_bytes(None)
    on_hopper = experts.kernels == HOPPER
    rows_of_block = {}
    for num_rows in (1, 500):
        tiles = experts.tiles.hopper(num_rows) if on_hopper else experts.tiles.portable(num_rows)
        rows_of_block[tiles.block_x if on_hopper else tiles.block_m] = tiles
    assert len(rows_of_block) == 2
    for step, tiles in enumerate([*rows_of_block.values()] * 3):
        before = len(described)
        experts.tiles = FixedTiles(layer.config, DEVICE, shared_memory, tiles)
        handle = layer.handle(9)
        rows, ids = layer.rows(9), random_ids(9, 2, 5)
        out = layer.apply(rows, handle=handle, local_ids=ids)
        torch.testing.assert_close(out.float(), layer.expected(rows, ids, None).float(), atol=0.05, rtol=0.05)
        handle.workspace.release()
        assert step >= 2 or len(described) == before + 1


def test_a_layer_that_is_gone_leaves_nothing_behind() -> None:
    first, second = two_layers()
    for step in range(4):
        check(second, step, 5)
        check(first, step, 5)
    kept = [weakref.ref(second.weights.w13), weakref.ref(second.weights.w2), weakref.ref(second.experts)]
    arena = first.arena
    del second
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3
    assert arena.nbytes > 0


@pytest.mark.gpu
@by_scheme
def test_capture_between_eager_calls(quantization: QuantConfig | None) -> None:
    first, second = two_layers(quantization=quantization)

    def between(step: int) -> None:
        check(first, step, 9)
        check(second, step, 50)

    check_capture_between_calls(first, second, between)
