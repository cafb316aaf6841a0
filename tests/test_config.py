"""A configuration is validated once, and what follows from it is right."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_plugin.config import (
    Activation,
    ExpertPlacement,
    Fp8Block,
    Fp8PerTensor,
    Fp8PerToken,
    MoEConfig,
    ParallelConfig,
)
from moe_plugin.errors import ConfigError

LAYER: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 48}
SIZES = ["num_experts", "top_k", "hidden_size", "intermediate_size", "max_tokens_per_rank", "decode_max_tokens"]


def test_defaults() -> None:
    config = MoEConfig(**LAYER)
    assert config.dtype is torch.bfloat16
    assert config.weight_dtype is torch.bfloat16
    assert config.activation is Activation.SILU_AND_MUL
    assert config.quantization is None
    assert config.parallel == ParallelConfig()
    assert config.placement == ExpertPlacement.linear(8, 1)
    assert (config.num_local_experts, config.local_intermediate_size) == (8, 48)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", None])
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {value!r}"):
        MoEConfig(**(LAYER | {name: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k 9 exceeds num_experts 8"),
        ({"dtype": torch.float64}, "dtype must be bfloat16, float16 or float32, got torch.float64"),
        ({"dtype": "bfloat16"}, "dtype must be bfloat16, float16 or float32, got bfloat16"),
        ({"quantization": "fp8"}, "quantization must be None or a QuantConfig, got 'fp8'"),
        ({"quantization": Fp8Block}, "quantization must be None or a QuantConfig"),
        ({"activation": "relu"}, "relu"),
        ({"parallel": ParallelConfig(tp_size=5)}, "intermediate_size 48 is not divisible by tp_size 5"),
        ({"apply_router_weight_on_input": True}, "defined for top_k 1 only, got top_k 2"),
        (
            {"intermediate_size": 384, "quantization": Fp8Block(), "parallel": ParallelConfig(tp_size=2)},
            "intermediate_size 384 over tp_size 2 leaves 192 columns to a rank; with fp8_block it must be a multiple "
            "of 128, so that no tile is cut in two",
        ),
        (
            {"quantization": Fp8Block(24, 16), "parallel": ParallelConfig(tp_size=2)},
            "leaves 24 columns to a rank; with fp8_block it must be a multiple of 16",
        ),
        ({"quantization": Fp8Block, "parallel": ParallelConfig(tp_size=2)}, "must be None or a QuantConfig"),
        ({"dispatch_capacity": 0}, "dispatch_capacity must be positive, got 0"),
        ({"dispatch_capacity": -3}, "dispatch_capacity must be positive, got -3"),
        ({"placement": ExpertPlacement.linear(7, 1)}, "for 7 experts on 1 ranks, the layer has 8 on 1"),
        ({"placement": ExpertPlacement.linear(8, 2)}, "for 8 experts on 2 ranks, the layer has 8 on 1"),
    ],
)
def test_what_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEConfig(**(LAYER | changes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ep_size": 0}, "ep_rank 0 does not lie in"),
        ({"ep_size": 2, "ep_rank": 2}, r"ep_rank 2 does not lie in \[0, ep_size=2\)"),
        ({"ep_size": 2, "ep_rank": -1}, "ep_rank -1 does not lie in"),
        ({"tp_size": -1}, "tp_rank 0 does not lie in"),
        ({"tp_size": 2, "tp_rank": 5}, r"tp_rank 5 does not lie in \[0, tp_size=2\)"),
        ({"timeout_seconds": 0}, "timeout_seconds must be positive, got 0"),
        ({"timeout_seconds": -1.5}, "timeout_seconds must be positive, got -1.5"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"ep_size": 3, "num_nodes": 2}, "3 ranks do not spread evenly over num_nodes=2"),
        ({"ep_size": 2, "tp_size": 2, "num_nodes": 3}, "4 ranks do not spread evenly over num_nodes=3"),
    ],
)
def test_layouts_that_cannot_be_right(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**sizes)


def test_layouts() -> None:
    assert ParallelConfig().world_size == 1
    assert ParallelConfig(ep_size=4, tp_size=2, num_nodes=2).world_size == 8


def test_sizes_and_ranks_follow_from_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", {"ep": 4, "tp": 2}.__getitem__)
    monkeypatch.setattr("torch.distributed.get_rank", {"ep": 3, "tp": 1}.__getitem__)
    parallel = ParallelConfig(ep_group="ep", tp_group="tp")
    assert (parallel.ep_size, parallel.ep_rank, parallel.tp_size, parallel.tp_rank) == (4, 3, 2, 1)


def test_configurations_are_frozen() -> None:
    config = MoEConfig(**LAYER)
    for frozen, name in ((config, "top_k"), (config.parallel, "ep_size"), (config.placement, "num_experts")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)
    assert config == MoEConfig(**LAYER)
    assert hash(config) == hash(MoEConfig(**LAYER))


def test_the_activation_may_be_given_by_name() -> None:
    assert MoEConfig(**LAYER, activation="swiglu_oai").activation is Activation.SWIGLU_OAI


def test_an_extreme_but_valid_layer() -> None:
    config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1, apply_router_weight_on_input=True)
    assert config.num_local_experts == 1
    assert MoEConfig(**(LAYER | {"num_experts": 40_000})).num_local_experts == 40_000


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(Fp8Block(), "fp8_block"), (Fp8PerTensor(), "fp8_per_tensor"), (Fp8PerToken(), "fp8_per_token")],
)
def test_quantized_weights(scheme: Any, name: str) -> None:
    config = MoEConfig(**LAYER, quantization=scheme)
    assert scheme.name == name
    assert config.weight_dtype is torch.float8_e4m3fn
    assert config.dtype is torch.bfloat16


def test_sizes_that_quantization_does_not_limit() -> None:
    MoEConfig(**(LAYER | {"intermediate_size": 200}), quantization=Fp8Block())
    two = ParallelConfig(tp_size=2)
    assert MoEConfig(**LAYER, quantization=Fp8Block(24, 24), parallel=two).local_intermediate_size == 24
    for scheme in (Fp8PerTensor(), Fp8PerToken()):
        assert MoEConfig(**LAYER, quantization=scheme, parallel=two).local_intermediate_size == 24


@pytest.mark.parametrize("blocks", [(0, 128), (128, -1)])
def test_blocks_must_be_positive(blocks: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"must be positive, got {blocks[0]} x {blocks[1]}"):
        Fp8Block(*blocks)


def test_a_rank_s_share() -> None:
    config = MoEConfig(**(LAYER | {"num_experts": 7}), parallel=ParallelConfig(ep_size=3, ep_rank=1, tp_size=2))
    assert (config.num_local_experts, config.local_intermediate_size) == (2, 24)


def test_shared_fields_are_what_ranks_must_agree_on() -> None:
    def of(**parallel: int) -> dict[str, str]:
        return MoEConfig(**LAYER, parallel=ParallelConfig(ep_size=2, tp_size=2, **parallel)).shared_fields()

    assert of() == of(ep_rank=1, tp_rank=1)
    fields = of()
    assert set(fields) == {
        *(field.name for field in dataclasses.fields(MoEConfig) if field.name != "parallel"),
        *(f"parallel.{name}" for name in ("ep_size", "tp_size", "dp_size", "num_nodes", "timeout_seconds")),
    }
    assert fields["parallel.ep_size"] == "2"


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "expected"),
    [
        (8, 2, ((0, 1, 2, 3), (4, 5, 6, 7))),
        (7, 3, ((0, 1, 2), (3, 4), (5, 6))),
        (2, 4, ((0,), (1,), (), ())),
        (1, 1, ((0,),)),
        (1, 2, ((0,), ())),
    ],
)
def test_linear_placement(num_experts: int, num_ranks: int, expected: tuple[tuple[int, ...], ...]) -> None:
    assert ExpertPlacement.linear(num_experts, num_ranks).experts_of_rank == expected


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "expected"),
    [(8, 2, ((0, 2, 4, 6), (1, 3, 5, 7))), (7, 3, ((0, 3, 6), (1, 4), (2, 5))), (1, 2, ((0,), ()))],
)
def test_round_robin_placement(num_experts: int, num_ranks: int, expected: tuple[tuple[int, ...], ...]) -> None:
    assert ExpertPlacement.round_robin(num_experts, num_ranks).experts_of_rank == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1], [2, 4]], "placement of rank 1 names expert 4; valid are 0 to 3"),
        ([[0, 1, -1], [2, 3]], "placement of rank 0 names expert -1"),
        ([[0, 1], [2, 3, 2]], "placement of rank 1 names an expert twice"),
        ([[0], [2]], r"no rank holds expert 1 \(2 experts are placed nowhere\)"),
        ([], r"no rank holds expert 0 \(4 experts are placed nowhere\)"),
    ],
)
def test_tables_that_cannot_be_right(table: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertPlacement.from_table(4, table)


def test_replicas_in_device_tables() -> None:
    placement = ExpertPlacement.from_table(3, [[2, 0], [0, 1], [0]])
    assert (placement.num_ranks, placement.max_replicas) == (3, 3)
    assert [placement.num_local_experts(rank) for rank in range(3)] == [2, 2, 1]
    tables = placement.tables("cpu")
    assert tables.num_replicas.tolist() == [3, 1, 1]
    # An expert with fewer replicas repeats them to fill its row.
    assert tables.rank.tolist() == [[0, 1, 2], [1, 1, 1], [0, 0, 0]]
    assert tables.slot.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]


@pytest.mark.gpu
def test_tables_on_a_gpu() -> None:
    tables = ExpertPlacement.linear(5, 2).tables("cuda")
    assert {tables.rank.device.type, tables.slot.device.type, tables.num_replicas.device.type} == {"cuda"}
    assert tables.rank.flatten().tolist() == [0, 0, 0, 1, 1]


def assert_tables_match(placement: ExpertPlacement) -> None:
    """Looked up through the tables, every expert is found exactly where the placement puts it."""
    tables = placement.tables("cpu")
    assert {tables.rank.dtype, tables.slot.dtype, tables.num_replicas.dtype} == {torch.int32}
    assert tables.rank.is_contiguous()
    assert tables.slot.is_contiguous()
    assert tables.rank.shape == tables.slot.shape == (placement.num_experts, placement.max_replicas)
    for expert in range(placement.num_experts):
        count = int(tables.num_replicas[expert])
        places = list(zip(tables.rank[expert].tolist(), tables.slot[expert].tolist(), strict=True))
        assert len(set(places[:count])) == count
        assert all(placement.experts_of_rank[rank][slot] == expert for rank, slot in places)
    placed = sum(len(experts) for experts in placement.experts_of_rank)
    assert int(tables.num_replicas.sum()) == placed


@given(st.integers(1, 60), st.integers(1, 12), st.sampled_from([ExpertPlacement.linear, ExpertPlacement.round_robin]))
def test_experts_are_spread_evenly_and_once(num_experts: int, num_ranks: int, place: Any) -> None:
    placement = place(num_experts, num_ranks)
    held = [len(experts) for experts in placement.experts_of_rank]
    assert placement.num_ranks == num_ranks
    assert sorted(expert for experts in placement.experts_of_rank for expert in experts) == list(range(num_experts))
    assert max(held) - min(held) <= 1
    assert placement.max_replicas == 1
    assert_tables_match(placement)


@st.composite
def tables_with_replicas(draw: st.DrawFn) -> ExpertPlacement:
    num_experts, num_ranks = draw(st.integers(1, 10)), draw(st.integers(1, 5))
    holders = [draw(st.sets(st.integers(0, num_ranks - 1), min_size=1, max_size=num_ranks)) for _ in range(num_experts)]
    table = [
        draw(st.permutations([expert for expert in range(num_experts) if rank in holders[expert]]))
        for rank in range(num_ranks)
    ]
    return ExpertPlacement.from_table(num_experts, table)


@given(tables_with_replicas())
def test_any_table_is_found_again_on_the_device(placement: ExpertPlacement) -> None:
    assert_tables_match(placement)
