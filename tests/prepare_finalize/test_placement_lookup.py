"""What a dispatcher that holds all experts gets from the placement table."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.config import ExpertPlacement, MoEConfig, ParallelConfig
from moe_plugin.errors import ExpertIdError
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors, ErrorFlag
from moe_plugin.prepare_finalize.placement_lookup import PlacementLookup
from moe_plugin.workspace import WorkspaceArena

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOCAL = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8)
by_form = pytest.mark.parametrize("use_triton", [False, True], ids=["torch", "triton"])


def ids(rows: list[list[int]], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


@by_form
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_local_slots_and_weights(use_triton: bool, num_tokens: int) -> None:
    lookup, errors = PlacementLookup(LOCAL, DEVICE, use_triton), DeferredErrors(LOCAL, DEVICE)
    workspace = WorkspaceArena(DEVICE, poison=True).lease()
    topk_ids = ids([[3, -1]] * num_tokens).view(num_tokens, 2)
    weights = torch.rand(num_tokens, 2, device=DEVICE)
    slot, passed = lookup.local(topk_ids, weights, workspace, errors)
    assert torch.equal(slot, topk_ids)
    assert slot.data_ptr() != topk_ids.data_ptr() or num_tokens == 0
    assert passed is weights
    half = weights.to(torch.bfloat16)
    _, converted = lookup.local(topk_ids, half, workspace, errors)
    assert converted is not None
    assert torch.equal(converted, half.float())
    assert lookup.local(topk_ids, None, workspace, errors)[1] is None


@by_form
def test_wrong_ids_go_to_the_errors(use_triton: bool) -> None:
    lookup, errors = PlacementLookup(LOCAL, DEVICE, use_triton), DeferredErrors(LOCAL, DEVICE)
    workspace = WorkspaceArena(DEVICE).lease()

    def look_up() -> None:
        lookup.local(ids([[0, 4]]), None, workspace, errors)
        errors.raise_pending(synchronize=True)

    with pytest.raises(ExpertIdError):
        look_up()
    errors.raise_pending(synchronize=True)
    assert workspace.tensor("local_ids", (1, 2), torch.int32).tolist() == [[0, -1]]


@by_form
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_physical_ids(use_triton: bool, dtype: torch.dtype) -> None:
    """Of 2 ranks with room for 3 experts each, one of which both have."""
    placement = ExpertPlacement.from_table(4, [[2, 0, 1], [3, 1]])
    config = MoEConfig(
        num_experts=4,
        top_k=2,
        hidden_size=8,
        intermediate_size=8,
        placement=placement,
        parallel=ParallelConfig(ep_size=2),
    )
    lookup, errors = PlacementLookup(config, DEVICE, use_triton, slots_per_rank=3), DeferredErrors(config, DEVICE)
    workspace = WorkspaceArena(DEVICE, poison=True).lease()
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0], [3.0, 4.0]], device=DEVICE)
    for _ in range(3):  # described, then repeated
        found, of_ids, flags = lookup.physical(ids([[3, 1], [1, 1], [-1, 2]]), weights, dtype, workspace, errors)
        assert found.dtype is dtype
        assert found.tolist() == [[3, 2], [4, -1], [-1, 0]]
        assert of_ids is not None
        assert of_ids.tolist() == [[0.5, 0.25], [3.0, 0.0], [0.0, 4.0]]
        assert flags is None if use_triton else int(flags) == 0
        errors.raise_pending(synchronize=True)
    _, _, flags = lookup.physical(ids([[4, 0]]), None, dtype, workspace, errors)
    if flags is not None:
        assert int(flags) == ErrorFlag.EXPERT_ID
    else:
        with pytest.raises(ExpertIdError):
            errors.raise_pending(synchronize=True)


@by_form
def test_physical_ids_of_one_expert_each_pass_weights_that_are_right(use_triton: bool) -> None:
    config = MoEConfig(num_experts=4, top_k=1, hidden_size=8, intermediate_size=8)
    lookup, errors = PlacementLookup(config, DEVICE, use_triton, slots_per_rank=4), DeferredErrors(config, DEVICE)
    workspace, weights = WorkspaceArena(DEVICE).lease(), torch.rand(3, 1, device=DEVICE)
    found, passed, _ = lookup.physical(ids([[3], [-1], [0]]), weights, torch.int64, workspace, errors)
    assert found.tolist() == [[3], [-1], [0]]
    assert passed is weights
    spread = torch.rand(3, 2, device=DEVICE)[:, :1]
    _, dense, _ = lookup.physical(ids([[3], [-1], [0]]), spread, torch.int64, workspace, errors)
    assert dense is not None
    assert dense.is_contiguous()
    assert torch.equal(dense, spread)


def test_repeated_lookups_take_each_call_s_tensors() -> None:
    """Lookups of two placements in one workspace, with ids and weights of several layouts."""
    swapped = ExpertPlacement.from_table(4, [[1, 0, 3, 2]])
    workspace = WorkspaceArena(DEVICE, poison=True).lease()
    parts = []
    for placement in (None, swapped):
        config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8, placement=placement)
        lookups = [PlacementLookup(config, DEVICE, use_triton) for use_triton in (True, False)]
        parts.append((*lookups, DeferredErrors(config, DEVICE), DeferredErrors(config, DEVICE)))
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (3, 3, 5, 3, 5):
        for dtype in (torch.int32, torch.int64):
            for step in (1, 2):
                wide = torch.randint(-1, 4, (num_tokens, 2 * step), generator=generator, dtype=dtype).to(DEVICE)
                weights = torch.rand(num_tokens, 2, generator=generator).to(DEVICE, torch.bfloat16)
                for lookup, torch_lookup, errors, torch_errors in parts:
                    expected, _ = torch_lookup.local(
                        wide[:, ::step], None, WorkspaceArena(DEVICE).lease(), torch_errors
                    )
                    slot, converted = lookup.local(wide[:, ::step], weights, workspace, errors)
                    assert torch.equal(slot, expected)
                    assert converted is not None
                    assert torch.equal(converted, weights.float())
                    errors.raise_pending(synchronize=True)


def test_a_repeated_lookup_flags_wrong_ids_of_its_own_layer() -> None:
    workspace = WorkspaceArena(DEVICE).lease()
    lookups = [PlacementLookup(LOCAL, DEVICE, use_triton=True) for _ in range(2)]
    errors = [DeferredErrors(LOCAL, DEVICE) for _ in range(2)]
    for _ in range(3):
        for lookup, own in zip(lookups, errors, strict=True):
            lookup.local(ids([[0, 3]]), None, workspace, own)

    def look_up() -> None:
        lookups[1].local(ids([[0, 4]]), None, workspace, errors[1])
        errors[1].raise_pending(synchronize=True)

    for _ in range(2):
        with pytest.raises(ExpertIdError):
            look_up()
        errors[0].raise_pending(synchronize=True)
