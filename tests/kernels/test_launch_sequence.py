"""Repeated launches: what reaches the kernels and the C functions, and when launches are ordinary again."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.nvidia import driver

from moe_plugin.kernels import launch_sequence as sequence_module
from moe_plugin.kernels import launcher as module
from moe_plugin.kernels.launch_sequence import LaunchSequence
from moe_plugin.kernels.launcher import Launch, Launcher, Pointer, tensor_descriptor
from tests.kernels.recorded_launches import CountingKernel, as_c_sees_it, compiled_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 16


@triton.jit
def add_scaled_kernel(x_ptr, y_ptr, out_ptr, factor, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.float32) + factor * tl.load(y_ptr + at))


add_scaled = Launcher(add_scaled_kernel)


class Layer:
    """out = x + 2 * (x + 3 * w), in two launches with a buffer between them."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(SIZE, device=DEVICE)
        self.sequence = LaunchSequence()
        self.described = 0

    def launches(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> list[Launch]:
        self.described += 1
        return [
            add_scaled.launch((1,), (x, w, self.buffer, 3.0), (SIZE,)),
            add_scaled.launch((1,), (x, self.buffer, out, 2.0), (SIZE,)),
        ]

    def check(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> None:
        out = torch.full((SIZE,), torch.nan, device=DEVICE) if out is None else out
        self.buffer.fill_(torch.nan)
        expected = x.float() + 2 * (x.float() + 3 * w)
        self.sequence((x, w, out), lambda: self.launches(x, w, out))
        torch.testing.assert_close(out, expected)


def numbers(seed: int, offset: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE + offset, generator=generator).to(DEVICE)[offset:]


def test_other_tensors_at_every_call() -> None:
    layer = Layer()
    for seed in range(5):
        layer.check(numbers(seed), numbers(seed + 100))
    assert layer.described <= 3
    described = layer.described
    x, w = numbers(7), numbers(8)
    for first, second in ((x, w), (w, x)):
        layer.check(first, second)
    assert layer.described == described


def test_nothing_of_a_call_is_kept_alive() -> None:
    layer = Layer()
    for seed in range(4):
        tensors = numbers(seed), numbers(seed + 100), torch.empty(SIZE, device=DEVICE)
        layer.check(*tensors)
        references = [weakref.ref(tensor) for tensor in tensors]
        del tensors
        gc.collect()
        assert [reference() for reference in references] == [None] * 3, seed


def test_two_tensors_at_one_place_are_described_every_time() -> None:
    layer = Layer()
    x = numbers(0)
    for count in range(1, 5):
        layer.check(x, x)
        assert layer.described == count


def test_an_argument_inside_a_tensor_that_moves_is_described_every_time() -> None:
    sequence, described = LaunchSequence(), 0
    for seed in range(4):
        x, out = numbers(seed, offset=0).repeat(2), torch.empty(SIZE, device=DEVICE)

        def launches(x: torch.Tensor = x, out: torch.Tensor = out) -> list[Launch]:
            nonlocal described
            described += 1
            return [add_scaled.launch((1,), (x, x[SIZE:], out, 1.0), (SIZE,))]

        sequence((x, out), launches)
        torch.testing.assert_close(out, 2 * x[:SIZE])
    assert described == 4


def test_views_and_pointers_that_begin_with_a_tensor_follow_it() -> None:
    sequence = LaunchSequence()
    for seed in range(4):
        x, w, out = numbers(seed), numbers(seed + 10), torch.empty(SIZE, device=DEVICE)

        def launches(x: torch.Tensor = x, w: torch.Tensor = w, out: torch.Tensor = out) -> list[Launch]:
            return [add_scaled.launch((1,), (x.view(4, 4), Pointer(w), out, 1.0), (SIZE,))]

        sequence((x, w, out), launches)
        torch.testing.assert_close(out, x + w)


def test_without_launches() -> None:
    sequence = LaunchSequence()
    for _ in range(3):
        sequence((numbers(0),), list)


# On the way around Triton's Python.


def two_pointers(a_ptr, b_ptr, n, m, f, flag, BLOCK: tl.constexpr):
    pass


def described_tiles(a_desc, b_ptr, c_desc, n, BLOCK: tl.constexpr):
    pass


MEMORY = torch.zeros(256)


class Recorded:
    """One kernel twice in a sequence: with (x, buffer) and with (buffer, out)."""

    def __init__(self) -> None:
        kinds = dict.fromkeys(("a_ptr", "b_ptr", "n", "m", "f", "flag"), "i32")
        compiled, self.recorder = compiled_for(kinds | {"BLOCK": "constexpr"}, None)
        self.kernel = CountingKernel(two_pointers, compiled)
        self.launcher = Launcher(self.kernel)
        self.sequence = LaunchSequence()
        self.described = 0

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> list[tuple[Any, ...]]:
        """What the C function is called with."""
        del self.recorder.calls[:]

        def launches() -> list[Launch]:
            self.described += 1
            return [
                self.launcher.launch((3, 2), (x, MEMORY, 5, 7, 1.0, True), (8,)),
                self.launcher.launch((1,), (MEMORY, out, 9, 7, 1.0, True), (8,)),
            ]

        self.sequence((x, out), launches)
        return self.recorder.calls


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    for each in (module, sequence_module):
        monkeypatch.setattr(each, "current_device", lambda: 0)
        monkeypatch.setattr(each, "current_stream", lambda device: 77)
    return Recorded()


familiar = pytest.mark.skipif(
    not triton.__version__.startswith(module._FAMILIAR_VERSIONS), reason="another version of Triton"
)


def warm_up(recorded: Recorded) -> None:
    for _ in range(2):
        recorded(torch.zeros(4), torch.zeros(4))
    # The first call compiles, which then serves its second launch too, and the second call binds.
    assert recorded.described == 2


@familiar
def test_the_c_function_gets_what_a_direct_launch_gives_it(recorded: Recorded) -> None:
    warm_up(recorded)
    for _ in range(3):
        x, out = torch.zeros(4), torch.zeros(4)
        repeated = [as_c_sees_it(call) for call in recorded(x, out)]
        assert recorded.described == 2
        del recorded.recorder.calls[:]
        recorded.launcher((3, 2), (x, MEMORY, 5, 7, 1.0, True), (8,))
        recorded.launcher((1,), (MEMORY, out, 9, 7, 1.0, True), (8,))
        assert repeated == [as_c_sees_it(call) for call in recorded.recorder.calls]
    assert recorded.kernel.launched == 1


@familiar
def test_the_stream_is_asked_for_at_every_call(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up(recorded)
    for stream in (5, 6):
        monkeypatch.setattr(sequence_module, "current_stream", lambda device, stream=stream: stream)
        assert [call[module.STREAM] for call in recorded(torch.zeros(4), torch.zeros(4))] == [stream, stream]
    assert recorded.described == 2


@familiar
def test_tensors_of_another_alignment_are_launched_as_what_they_are(recorded: Recorded) -> None:
    warm_up(recorded)
    launched = recorded.kernel.launched
    recorded(torch.zeros(8)[1:], torch.zeros(4))
    assert (recorded.described, recorded.kernel.launched) == (3, launched + 1)
    recorded(torch.zeros(4), torch.zeros(4))
    assert recorded.described == 3


@familiar
def test_a_sequence_that_began_with_unaligned_tensors(recorded: Recorded) -> None:
    for _ in range(4):
        recorded(torch.zeros(8)[1:], torch.zeros(4))
    assert recorded.described == 2
    recorded(torch.zeros(4), torch.zeros(4))
    assert recorded.described == 3


@familiar
def test_another_device_is_not_mistaken_for_the_first(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up(recorded)
    launched = recorded.kernel.launched
    for each in (module, sequence_module):
        monkeypatch.setattr(each, "current_device", lambda: 1)
    recorded(torch.zeros(4), torch.zeros(4))
    assert (recorded.described, recorded.kernel.launched) == (3, launched + 1)


@familiar
def test_profilers_see_every_launch(recorded: Recorded) -> None:
    warm_up(recorded)
    launched = recorded.kernel.launched
    chain = triton.knobs.runtime.launch_enter_hook

    def profile(metadata: Any) -> None: ...

    chain.add(profile)
    try:
        assert recorded(torch.zeros(4), torch.zeros(4)) == []
    finally:
        chain.remove(profile)
    assert recorded.kernel.launched == launched + 2
    assert len(recorded(torch.zeros(4), torch.zeros(4))) == 2


@familiar
def test_pre_run_hooks_see_every_launch(recorded: Recorded) -> None:
    warm_up(recorded)
    launched = recorded.kernel.launched
    recorded.kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    assert recorded(torch.zeros(4), torch.zeros(4)) == []
    assert recorded.kernel.launched == launched + 2


@familiar
def test_ordinary_launches_are_never_bound(recorded: Recorded) -> None:
    recorded.kernel.compiled = None
    for count in range(1, 5):
        recorded(torch.zeros(4), torch.zeros(4))
        assert (recorded.described, recorded.kernel.launched) == (count, 2 * count)


@familiar
def test_descriptors_follow_their_tensors(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def encode(arg: Any, metadata: Any) -> list[Any]:
        encoded.append(arg.base.data_ptr())
        return [f"map {arg.base.data_ptr()} {metadata['swizzle']}", *arg.shape, *arg.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    signature = {"a_desc": "tensordesc<fp32[8, 16]>", "b_ptr": "*fp32", "c_desc": "tensordesc<fp32[8, 16]>"}
    signature |= {"n": "i32", "BLOCK": "constexpr"}
    compiled, recorder = compiled_for(signature, [{"swizzle": 3}, {"swizzle": 2}])
    launcher, sequence = Launcher(CountingKernel(described_tiles, compiled)), LaunchSequence()
    fixed = tensor_descriptor(torch.zeros(16, 32), (8, 16))
    weights, out = [torch.zeros(16, 32) for _ in range(3)], torch.zeros(8)

    def args(w: torch.Tensor) -> tuple[Any, ...]:
        return tensor_descriptor(w, (8, 16)), out, fixed, 5

    for _ in range(2):
        sequence((weights[0], out), lambda: [launcher.launch((4,), args(weights[0]), (8,))])
    for w in (*weights, *weights):
        del recorder.calls[:]
        sequence((w, out), pytest.fail)
        launcher((4,), args(w), (8,))
        ours, theirs = (as_c_sees_it(call) for call in recorder.calls)
        assert ours == theirs
    del encoded[:]
    for w in weights:
        sequence((w, out), pytest.fail)
    assert encoded == []


@pytest.mark.gpu
def test_repeated_launches_on_a_gpu_are_direct() -> None:
    layer = Layer()
    for seed in range(3):
        layer.check(numbers(seed), numbers(seed + 100))
    assert layer.described <= 2
    assert layer.sequence._bound is not None
    for offset in (1, 4, 0):
        layer.check(numbers(5, offset), numbers(6))


@pytest.mark.gpu
def test_repeated_launches_are_captured_and_replayed() -> None:
    layer = Layer()
    x, w, out = numbers(0), numbers(1), torch.zeros(SIZE, device=DEVICE)
    for _ in range(3):
        layer.check(x, w, out)
    described = layer.described
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        layer.sequence((x, w, out), lambda: layer.launches(x, w, out))
    assert layer.described == described
    # Eager calls in between change what the sequence holds, not what the graph holds.
    for seed in range(3):
        layer.check(numbers(seed + 20), numbers(seed + 30))
        x.normal_()
        out.zero_()
        graph.replay()
        torch.testing.assert_close(out, x + 2 * (x + 3 * w))


@pytest.mark.gpu
def test_repeated_launches_take_the_current_stream() -> None:
    layer = Layer()
    x, w, out = numbers(0), numbers(1), torch.zeros(SIZE, device=DEVICE)
    for _ in range(3):
        layer.check(x, w, out)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(3)
        layer.sequence((x, w, out), lambda: layer.launches(x, w, out))
    side.synchronize()
    torch.testing.assert_close(out, 3 + 2 * (3 + 3 * w))
