"""Error words: what writes them, when the host raises, and that it raises once."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.config import MoEConfig
from moe_plugin.errors import CapacityError, ExpertIdError, InputError
from moe_plugin.kernels.placement_lookup import LookupTables, placement_lookup
from moe_plugin.prepare_finalize.deferred_errors import DeferredErrors, ErrorFlag

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8)


@pytest.fixture
def errors() -> DeferredErrors:
    return DeferredErrors(CONFIG, DEVICE)


def flags(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32, device=DEVICE)


class Kernel:
    """A launch that stores its flag when `topk_ids` holds an id out of range."""

    def __init__(self, errors: DeferredErrors) -> None:
        self.errors = errors
        self.tables = LookupTables.of(CONFIG.expert_placement.tables(DEVICE))
        self.topk_ids = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
        self.slot = torch.empty_like(self.topk_ids)

    def launch(self) -> None:
        word = self.errors.kernel_word()
        placement_lookup(self.topk_ids, self.tables, self.slot, word, int(ErrorFlag.EXPERT_ID), use_triton=True)
        self.errors.launched()

    def launch_and_finish(self) -> None:
        self.launch()
        host_point(self.errors)


def host_point(errors: DeferredErrors) -> None:
    """Where errors of a finished call are raised."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    errors.raise_pending()


@pytest.mark.parametrize("wrong", [-2, 4])
def test_a_kernel_s_flag_is_raised_once(errors: DeferredErrors, wrong: int) -> None:
    kernel = Kernel(errors)
    for _ in range(2):
        kernel.topk_ids[1, 1] = wrong
        with pytest.raises(ExpertIdError, match=r"\[-1, 4\)"):
            kernel.launch_and_finish()
        kernel.topk_ids[1, 1] = -1
        kernel.launch_and_finish()
        errors.raise_pending(synchronize=True)


@pytest.mark.parametrize(
    ("flag", "error"),
    [(ErrorFlag.EXPERT_ID, ExpertIdError), (ErrorFlag.CAPACITY, CapacityError), (ErrorFlag.ABORTED, InputError)],
)
def test_a_recorded_flag_is_raised_once(errors: DeferredErrors, flag: ErrorFlag, error: type[Exception]) -> None:
    def record() -> None:
        errors.record(flags(int(flag)))
        host_point(errors)

    with pytest.raises(error):
        record()
    errors.record(flags(0))
    host_point(errors)
    errors.raise_pending(synchronize=True)


def test_both_ways_share_an_object(errors: DeferredErrors) -> None:
    kernel = Kernel(errors)
    errors.record(flags(0))
    kernel.topk_ids[0, 0] = 9

    def both() -> None:
        kernel.launch()
        errors.record(flags(0))  # must not wipe out what the kernel wrote
        host_point(errors)

    with pytest.raises(ExpertIdError):
        both()
    errors.raise_pending(synchronize=True)


def test_words_look_alike_to_kernels(errors: DeferredErrors) -> None:
    """A word of another alignment would be another specialization of every kernel that gets it."""
    assert [word.data_ptr() % 16 for word in errors._kernel_words] == [0, 0]
    assert {word.shape for word in errors._kernel_words} == {(1,)}


@pytest.mark.gpu
def test_an_eager_call_looks_at_the_call_before_without_waiting(errors: DeferredErrors) -> None:
    kernel = Kernel(errors)
    kernel.launch()
    kernel.topk_ids[0, 0] = 9
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        kernel.launch()
        errors.raise_pending()  # the kernel has not run yet
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.raises(ExpertIdError):
        errors.raise_pending()
    errors.raise_pending(synchronize=True)


@pytest.mark.gpu
def test_what_a_replay_flags_is_raised_where_the_host_waits(errors: DeferredErrors) -> None:
    kernel = Kernel(errors)
    kernel.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        errors.raise_pending()
        kernel.launch()
    for wrong in (9, -7):
        kernel.topk_ids[0, 0] = wrong
        graph.replay()
        host_point(errors)
        with pytest.raises(ExpertIdError):
            errors.raise_pending(synchronize=True)
        errors.raise_pending(synchronize=True)
        kernel.topk_ids[0, 0] = 0
        graph.replay()
        errors.raise_pending(synchronize=True)
