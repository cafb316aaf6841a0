"""The arena that calls lease their scratch memory from."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moe_plugin.workspace import Workspace, WorkspaceArena

CPU = torch.device("cpu")


@pytest.fixture
def arena() -> WorkspaceArena:
    return WorkspaceArena(CPU)


def memory_of(tensor: torch.Tensor) -> StorageWeakRef:
    """What a tensor lies in, without keeping it alive."""
    return StorageWeakRef(tensor.untyped_storage())


def test_tensors_have_the_asked_shape_and_dtype(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    for dtype in (torch.uint8, torch.int32, torch.bfloat16, torch.float32, torch.int64):
        tensor = workspace.tensor(str(dtype), (3, 5), dtype)
        assert (tensor.shape, tensor.dtype, tensor.device) == ((3, 5), dtype, CPU)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), ()])
def test_tensors_without_elements_and_scalars(arena: WorkspaceArena, shape: tuple[int, ...]) -> None:
    assert arena.lease().tensor("x", shape, torch.float32).shape == shape


def test_the_same_name_is_the_same_memory(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    first, again = workspace.tensor("x", (4, 4), torch.float32), workspace.tensor("x", (2, 4), torch.int32)
    other = workspace.tensor("y", (4, 4), torch.float32)
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    first.fill_(1)
    other.fill_(2)
    assert (first == 1).all()


def test_steady_state_allocates_nothing(arena: WorkspaceArena, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> set[int]:
        workspace = arena.lease()
        tensors = [workspace.tensor(name, (8, 8), torch.float32) for name in "abc"]
        tensors.append(workspace.host_tensor("host", (4,), torch.int32))
        workspace.release()
        return {tensor.data_ptr() for tensor in tensors}

    addresses = call()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("allocated in steady state")

    monkeypatch.setattr(torch, "empty", refuse)
    for _ in range(3):
        assert call() == addresses


def test_buffers_grow_and_do_not_shrink(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    workspace.tensor("x", (16,), torch.float32)
    assert workspace.nbytes == 64
    workspace.tensor("x", (64,), torch.float32)
    assert workspace.nbytes == 256
    workspace.tensor("x", (2,), torch.float32)
    assert workspace.nbytes == 256


def test_an_outgrown_buffer_stays_valid_for_who_holds_it(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    small = workspace.tensor("x", (4,), torch.float32).fill_(3)
    workspace.tensor("x", (400,), torch.float32).fill_(0)
    assert (small == 3).all()


def test_leases_held_together_differ(arena: WorkspaceArena) -> None:
    first, second = arena.lease(), arena.lease()
    assert first is not second
    a, b = (workspace.tensor("x", (8,), torch.float32) for workspace in (first, second))
    assert a.data_ptr() != b.data_ptr()


def test_a_released_workspace_is_leased_again(arena: WorkspaceArena) -> None:
    first = arena.lease()
    first.tensor("x", (8,), torch.float32)
    assert arena.nbytes == 0
    first.release()
    assert arena.nbytes == 32
    assert arena.lease() is first
    assert arena.lease() is not first


def test_a_workspace_released_twice_is_still_leased_once(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    workspace.release()
    workspace.release()
    assert arena.lease() is not arena.lease()


def test_a_lease_that_is_dropped_is_freed(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    buffer = memory_of(workspace.tensor("x", (32,), torch.uint8))
    assert not buffer.expired()
    del workspace
    gc.collect()
    assert buffer.expired()
    assert arena.nbytes == 0


def test_a_graph_s_buffers_outlive_growth(arena: WorkspaceArena) -> None:
    def outgrown(captured: bool) -> StorageWeakRef:
        workspace.captured = captured
        buffer = memory_of(workspace.tensor(f"x{captured}", (32,), torch.uint8))
        workspace.tensor(f"x{captured}", (320,), torch.uint8)
        gc.collect()
        return buffer

    workspace = Workspace(arena)
    assert outgrown(captured=False).expired()
    assert not outgrown(captured=True).expired()


def test_host_tensors(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    tensor = workspace.host_tensor("x", (2, 3), torch.int32)
    assert (tensor.shape, tensor.dtype, tensor.device) == ((2, 3), torch.int32, CPU)
    assert workspace.host_tensor("x", (2, 3), torch.int32) is tensor
    assert workspace.host_tensor("x", (3, 3), torch.int32).shape == (3, 3)
    assert workspace.host_tensor("x", (3, 3), torch.int64).dtype is torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_poison_is_nan_at_every_lease(dtype: torch.dtype) -> None:
    arena = WorkspaceArena(CPU, poison=True)
    workspace = arena.lease()
    tensor = workspace.tensor("x", (5,), dtype)
    assert tensor.isnan().all()
    tensor.fill_(1)
    # Within one lease contents stay.
    assert (workspace.tensor("x", (5,), dtype) == 1).all()
    workspace.release()
    assert arena.lease().tensor("x", (5,), dtype).isnan().all()


def test_one_arena_a_device_for_the_process() -> None:
    assert WorkspaceArena.shared("cpu") is WorkspaceArena.shared(CPU)
    assert WorkspaceArena.shared("cpu") is not WorkspaceArena.shared("meta")


def test_threads_never_share_a_lease(arena: WorkspaceArena) -> None:
    held: set[int] = set()
    clashes: list[int] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(200):
            workspace = arena.lease()
            if id(workspace) in held:
                clashes.append(id(workspace))
            held.add(id(workspace))
            held.discard(id(workspace))
            workspace.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []


@pytest.mark.gpu
def test_a_lease_waits_for_the_release_on_another_stream() -> None:
    arena = WorkspaceArena("cuda")
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    arena.lease().release()
    with torch.cuda.stream(first):
        workspace = arena.lease()
        tensor = workspace.tensor("x", (1 << 20,), torch.float32).fill_(0)
        torch.cuda._sleep(200_000_000)
        tensor.fill_(1)
        workspace.release()
    with torch.cuda.stream(second):
        again = arena.lease()
        assert again is workspace
        seen = again.tensor("x", (1 << 20,), torch.float32).clone()
    torch.cuda.synchronize()
    assert (seen == 1).all()


@pytest.mark.gpu
def test_host_tensors_of_a_gpu_are_pinned() -> None:
    assert WorkspaceArena("cuda").lease().host_tensor("x", (2,), torch.int32).is_pinned()


@pytest.mark.gpu
def test_capture_marks_the_workspace() -> None:
    arena = WorkspaceArena("cuda")
    workspace = arena.lease()
    workspace.tensor("x", (32,), torch.uint8)
    workspace.release()
    assert not workspace.captured
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = arena.lease()
        tensor = captured.tensor("x", (32,), torch.uint8).fill_(1)
        captured.release()
    assert captured is workspace
    assert captured.captured
    buffer = memory_of(tensor)
    del tensor
    captured.tensor("x", (800,), torch.float32)
    gc.collect()
    assert not buffer.expired()


def test_buffers_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    arena = WorkspaceArena("cpu")
    with torch.inference_mode():
        workspace = arena.lease()
        workspace.tensor("rows", (4,), torch.float32).fill_(1)
        workspace.release()
    arena.lease().tensor("rows", (4,), torch.float32).fill_(2)


def test_a_view_is_made_once(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    first = workspace.tensor("x", (2, 3), torch.float32)
    assert workspace.tensor("x", [2, 3], torch.float32) is first
    assert workspace.tensor("x", torch.Size((2, 3)), torch.float32) is first
    assert workspace.scoped("a").tensor("x", (2, 3), torch.float32) is not first
    others = [((3, 2), torch.float32), ((2, 3), torch.int32)]
    assert all(workspace.tensor("x", *other) is not first for other in others)
    workspace.release()
    assert arena.lease().tensor("x", (2, 3), torch.float32) is first


def test_no_view_of_an_outgrown_buffer_is_given_out(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    small = workspace.tensor("x", (4,), torch.float32)
    large = workspace.tensor("x", (400,), torch.float32)
    again = workspace.tensor("x", (4,), torch.float32)
    assert again.data_ptr() == large.data_ptr() != small.data_ptr()


def test_views_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    arena = WorkspaceArena("cpu")
    workspace = arena.lease()
    workspace.tensor("rows", (8,), torch.float32)
    with torch.inference_mode():
        view = workspace.tensor("rows", (4,), torch.float32)
    assert not view.is_inference()
    assert workspace.tensor("rows", (4,), torch.float32).fill_(2) is view


def test_a_workspace_does_not_collect_views_for_ever(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    for size in range(5000, 0, -1):
        workspace.tensor("x", (size,), torch.uint8)
    assert len(workspace._derived) <= 1024
    assert workspace.nbytes == 5000


def test_cached_values_live_until_a_buffer_is_replaced(arena: WorkspaceArena) -> None:
    workspace = arena.lease()
    built: list[int] = []

    def build() -> tuple[int, int]:
        built.append(len(built))
        return workspace.tensor("x", (4,), torch.float32).data_ptr(), len(built)

    first = workspace.cached("arguments", build)
    workspace.tensor("y", (4,), torch.float32)  # new, which replaces nothing
    workspace.release()
    assert arena.lease() is workspace
    assert workspace.cached("arguments", build) is first
    assert workspace.scoped("a").cached("arguments", build) is not first
    workspace.tensor("x", (400,), torch.float32)
    assert workspace.cached("arguments", build) != first
    assert len(built) == 3


def test_a_cached_value_never_holds_a_buffer_that_its_making_replaced(arena: WorkspaceArena) -> None:
    workspace = arena.lease()

    def build() -> tuple[torch.Tensor, torch.Tensor]:
        return workspace.tensor("x", (4,), torch.float32), workspace.tensor("x", (400,), torch.float32)

    small, large = workspace.cached("arguments", build)
    assert small.data_ptr() == large.data_ptr()


@pytest.mark.gpu
def test_one_stream_needs_no_events_and_two_are_ordered() -> None:
    arena = WorkspaceArena("cuda")
    size = (1 << 20,)
    for _ in range(3):
        workspace = arena.lease()
        workspace.release()
        assert workspace._released is None
    tensor = arena.lease().tensor("x", size, torch.float32).fill_(0)
    torch.cuda._sleep(200_000_000)
    tensor.fill_(1)
    workspace.release()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = arena.lease()
        assert again is workspace
        seen = again.tensor("x", size, torch.float32).clone()
        again.release()
        assert again._released is not None
    torch.cuda.synchronize()
    assert (seen == 1).all()


def test_scopes_do_not_share_names() -> None:
    workspace = WorkspaceArena("cpu").lease()
    whole, one, other = (
        part.tensor("rows", (4,), torch.float32) for part in (workspace, workspace.scoped("a"), workspace.scoped("b"))
    )
    assert len({tensor.data_ptr() for tensor in (whole, one, other)}) == 3
    assert workspace.scoped("a").tensor("rows", (4,), torch.float32).data_ptr() == one.data_ptr()
