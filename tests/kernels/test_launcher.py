"""The cheap launcher: its keys against Triton's own specialization, its calls against Triton's own launch."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_plugin.kernels import launcher as module
from moe_plugin.kernels.launcher import Descriptor, Launcher, Pointer, tensor_descriptor
from tests.kernels.recorded_launches import CountingKernel, Recorder, as_c_sees_it, compiled_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scale_rows(x_ptr, out_ptr, bias_ptr, num_rows, stride, factor, BLOCK: tl.constexpr, NEGATE: tl.constexpr = False):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    if row < num_rows:
        value = tl.load(x_ptr + row * stride + column).to(tl.float32) * factor
        if bias_ptr is not None:
            value += tl.load(bias_ptr + column)
        tl.store(out_ptr + row * BLOCK + column, -value if NEGATE else value)


def double_blocks(source, target, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    target.store([block * BLOCK, 0], source.load([block * BLOCK, 0]) * 2)


def two_pointers(a_ptr, b_ptr, n, m, f, flag, BLOCK: tl.constexpr):
    pass


def constexpr_first(BLOCK: tl.constexpr, x_ptr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


scale_rows_kernel = triton.jit(scale_rows, do_not_specialize=["num_rows"])
double_blocks_kernel = triton.jit(double_blocks)
constexpr_first_kernel = triton.jit(constexpr_first)


def key_of(launcher: Launcher, args: tuple[Any, ...]) -> tuple[Any, ...]:
    key: list[Any] = []
    assert launcher._bind(args, key, [])
    return tuple(key)


MEMORY = torch.zeros(64, dtype=torch.float32)
POINTERS = [
    MEMORY,
    MEMORY[4:],
    MEMORY[1:],
    MEMORY[2:],
    MEMORY.view(torch.int32),
    torch.zeros(8, dtype=torch.bfloat16),
    torch.zeros(8, dtype=torch.float8_e4m3fn),
    torch.nn.Parameter(torch.zeros(8)),
    None,
]
INTS = [0, 1, 2, 15, 16, 17, -1, -16, 64, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 16, 2**40, 2**63, 2**63 + 1]


class TestKeys:
    """Two calls have the same key exactly when Triton would run the same binary for them."""

    @staticmethod
    def check(lists: list[tuple[Any, ...]], do_not_specialize: list[str]) -> None:
        kernel = JITFunction(two_pointers, do_not_specialize=do_not_specialize)
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
        launcher = Launcher(kernel)
        assert launcher._is_compiled
        keys = [key_of(launcher, args) for args in lists]
        specializations = [bind(*args, BLOCK=4)[1][:-1] for args in lists]
        for (a, ours), (b, ours_too) in itertools.combinations(enumerate(keys), 2):
            same = specializations[a] == specializations[b]
            assert (ours == ours_too) == same, (lists[a], lists[b], specializations[a], specializations[b])

    @pytest.mark.parametrize("do_not_specialize", [[], ["n"]], ids=["specialized", "not_specialized"])
    def test_ints(self, do_not_specialize: list[str]) -> None:
        self.check([(MEMORY, MEMORY, n, 16, 1.0, False) for n in INTS], do_not_specialize)

    def test_pointers(self) -> None:
        self.check([(a, b, 3, 3, 1.0, False) for a in POINTERS for b in POINTERS[:4]], [])

    def test_floats_and_bools(self) -> None:
        values = [0.0, 1.0, 1.5, True, False, 1, None]
        self.check([(MEMORY, MEMORY, 3, 3, f, flag) for f in values for flag in values], [])

    def test_the_same_value_at_another_place(self) -> None:
        places = [(MEMORY[1:], MEMORY), (MEMORY, MEMORY[1:]), (MEMORY, None), (None, MEMORY)]
        self.check([(*pair, n, m, 1.0, False) for pair in places for n, m in ((1, 16), (16, 1), (3, 3))], ["m"])

    @pytest.mark.parametrize("tensor", [tensor for tensor in POINTERS if tensor is not None])
    def test_a_pointer_stands_for_its_tensor(self, tensor: torch.Tensor) -> None:
        launcher = Launcher(JITFunction(two_pointers))
        values: list[list[Any]] = [[], []]
        keys: list[list[Any]] = [[], []]
        for arg, key, value in zip((tensor, Pointer(tensor)), keys, values, strict=True):
            assert launcher._bind((arg, None, 1, 2, 3.0, True), key, value)
        assert keys[0] == keys[1]
        assert values[0] == values[1] == [tensor.data_ptr(), None, 1, 2, 3.0, True]

    @pytest.mark.parametrize("args", [(MEMORY,), (MEMORY, MEMORY, 1, 2, 3.0, (1, 2)), (MEMORY, "x", 1, 2, 3.0, True)])
    def test_what_it_does_not_know_is_left_to_triton(self, args: tuple[Any, ...]) -> None:
        assert not Launcher(JITFunction(two_pointers))._bind(args, [], [])

    def test_descriptors_differ_by_dtype_block_and_layout(self) -> None:
        from triton.experimental.gluon.language import NVMMASharedLayout

        tensor = torch.zeros(64, 64, dtype=torch.bfloat16)
        layouts = [None, NVMMASharedLayout(128, 16, 2), NVMMASharedLayout(64, 16, 2)]
        keys = [tensor_descriptor(tensor, block, layout).key for block in ((16, 64), (32, 64)) for layout in layouts]
        keys.append(tensor_descriptor(tensor.half(), (16, 64)).key)
        assert len(set(keys)) == len(keys)
        # Shape, strides and address are arguments and compile nothing.
        assert tensor_descriptor(tensor[::2], (16, 64)).key == tensor_descriptor(tensor, (16, 64)).key


# Ordinary launches: the interpreter, or what a GPU machine does where the internals are unfamiliar.


def check_scale_rows(launch: Launcher, **overrides: Any) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bias = torch.arange(16.0, device=DEVICE)
    for rows, inputs, given_bias, constexprs in (
        (6, x, bias, (16,)),
        (3, x[:, 16:], None, {"BLOCK": 16, "NEGATE": True}),
        (3, x[:, 1:], Pointer(bias), (16, True)),
        (0, x, bias, (16,)),
    ):
        out = torch.full((6, 16), 9.0, device=DEVICE)
        launch((6,), (inputs, out, given_bias, rows, inputs.stride(0), 0.5), constexprs, **overrides)
        expected = inputs[:rows, :16] * 0.5 + (0 if given_bias is None else bias)
        negate = constexprs == (16, True) or isinstance(constexprs, dict)
        assert torch.equal(out[:rows], -expected if negate else expected)
        assert (out[rows:] == 9).all()


def test_it_launches() -> None:
    launcher = Launcher(scale_rows_kernel)
    for _ in range(3):
        check_scale_rows(launcher)
        check_scale_rows(launcher, num_warps=1, num_stages=2, maxnreg=64)


def test_an_argument_too_few_is_an_error() -> None:
    x = torch.zeros(16, device=DEVICE)
    with pytest.raises((TypeError, ValueError)):
        Launcher(scale_rows_kernel)((1,), (x, x, None, 1), (16,))


def test_constexprs_among_the_parameters() -> None:
    x = torch.zeros(8, device=DEVICE)
    launcher = Launcher(constexpr_first_kernel)
    for _ in range(2):
        launcher((1,), (x[4:],), (4,))
    assert x.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert not launcher._is_compiled


def test_mixed_constexprs_launch_ordinarily() -> None:
    assert not Launcher(JITFunction(constexpr_first))._is_compiled


def test_descriptors_reach_the_kernel() -> None:
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    x = torch.arange(32.0 * 16, device=DEVICE).view(32, 16)
    launcher = Launcher(double_blocks_kernel)
    for make in (lambda tensor: tensor_descriptor(tensor, (8, 16)), lambda t: TensorDescriptor.from_tensor(t, [8, 16])):
        for _ in range(3):
            out = torch.zeros_like(x)
            launcher((4,), (make(x), make(out)), (8,))
            assert torch.equal(out, x * 2)


# The way around Triton's Python, against that Python.


def launch_both_ways(
    compiled: Any, recorder: Recorder, args: tuple[Any, ...], num_constexprs: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    names = list(compiled.src.signature)[: len(args)]
    ordinary = [arg.descriptor if isinstance(arg, Descriptor) else arg for arg in args]
    constexprs = [None] * num_constexprs
    packed = compiled.packed_metadata
    compiled.run(3, 2, 1, 77, compiled.function, packed, None, None, None, *ordinary, *constexprs)
    direct = module._direct_launch(compiled, names, num_constexprs)
    assert direct is not None
    direct(3, 2, 1, 77, [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args])
    theirs, ours = recorder.calls[-2:]
    return as_c_sees_it(theirs), as_c_sees_it(ours)


FAMILIAR = triton.__version__.startswith(module._FAMILIAR_VERSIONS)


@pytest.mark.skipif(not FAMILIAR, reason="another version of Triton, where launches go through its Python")
class TestDirectLaunch:
    def test_the_c_function_gets_what_triton_gives_it(self) -> None:
        signature = {"x": "*fp32", "y": "constexpr", "n": "i32", "m": "constexpr", "f": "fp32", "BLOCK": "constexpr"}
        compiled, recorder = compiled_for(signature, None)
        theirs, ours = launch_both_ways(compiled, recorder, (MEMORY, None, 3, 1, 2.0), 1)
        assert ours == theirs
        assert 77 in ours

    def test_descriptors_without_tma(self) -> None:
        x = torch.zeros(16, 32)
        signature = {"a": "tensordesc<fp32[8, 16]>", "n": "i32", "b": "tensordesc<fp32[8, 16]>", "B": "constexpr"}
        compiled, recorder = compiled_for(signature, None)
        descriptors = [tensor_descriptor(x[rows:], (8, 16)) for rows in (0, 4)]
        theirs, ours = launch_both_ways(compiled, recorder, (descriptors[0], 5, descriptors[1]), 1)
        assert ours == theirs

    def test_a_descriptor_is_encoded_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoded: list[tuple[int, int]] = []

        def encode(arg: Any, metadata: Any) -> list[Any]:
            encoded.append((arg.base.data_ptr(), metadata["swizzle"]))
            return [f"map {arg.base.data_ptr()} {metadata['swizzle']}", *arg.shape, *arg.strides]

        monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
        x = torch.zeros(16, 32)
        signature = {"a": "tensordesc<fp32[8, 16]>", "p": "*fp32", "b": "tensordesc<fp32[8, 16]>"}
        compiled, recorder = compiled_for(signature, [{"swizzle": 3}, {"swizzle": 2}])
        a, b = (tensor_descriptor(x[rows:], (8, 16)) for rows in (0, 4))
        for first, second in ((a, b), (a, b), (b, a)):
            theirs, ours = launch_both_ways(compiled, recorder, (first, MEMORY, second), 0)
            assert ours == theirs
        theirs_only = 3 * 2
        # One descriptor under two ways of encoding is two encodings.
        assert len(encoded) == theirs_only + 4

    def test_another_number_of_values_never_reaches_c(self) -> None:
        if not hasattr(driver, "expand_signature"):
            pytest.skip("this version's C function compares them itself")
        compiled, recorder = compiled_for({"x": "*fp32", "n": "i32"}, None)
        direct = module._direct_launch(compiled, ["x", "n"], 0)
        assert direct is not None
        with pytest.raises(TypeError, match="1 values for 2 parameters"):
            direct(1, 1, 1, 0, [0])
        assert recorder.calls == []

    def test_scratch_memory_is_left_to_triton(self) -> None:
        compiled, recorder = compiled_for({"x": "*fp32", "B": "constexpr"}, None)
        compiled.run.profile_scratch_size = 128
        seen: list[int] = []

        def allocate(size: int, align: int, stream: int) -> int:
            seen.append(size)
            return 16

        from triton.runtime import _allocation

        direct = module._direct_launch(compiled, ["x"], 1)
        assert direct is not None
        previous = _allocation._profile_allocator.get()
        try:
            _allocation._profile_allocator.set(allocate)
            direct(2, 1, 1, 0, [MEMORY.data_ptr()])
        finally:
            _allocation._profile_allocator.set(previous)
        assert seen == [256]
        assert len(recorder.calls) == 1

    @pytest.mark.parametrize("lost", ["packed_metadata", "function", "run", "src"])
    def test_unfamiliar_internals_are_no_error(self, lost: str) -> None:
        compiled, _ = compiled_for({"x": "*fp32"}, None)
        delattr(compiled, lost)
        assert module._direct_launch(compiled, ["x"], 0) is None


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> tuple[CountingKernel, Recorder]:
    monkeypatch.setattr(module, "current_device", lambda: 0)
    monkeypatch.setattr(module, "current_stream", lambda device: 77)
    kinds = dict.fromkeys(("a_ptr", "b_ptr", "n", "m", "f", "flag"), "i32")
    compiled, recorder = compiled_for(kinds | {"BLOCK": "constexpr"}, None)
    return CountingKernel(two_pointers, compiled), recorder


ARGS = (MEMORY, MEMORY, 5, 7, 1.0, True)


def test_the_second_launch_of_a_specialization_is_direct(
    counting: tuple[CountingKernel, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, recorder = counting
    launch = Launcher(kernel)
    for step in range(3):
        launch((1,), (MEMORY, MEMORY[4:], 5 + 2 * step, 7, 1.0, True), (8,))
    assert (kernel.launched, len(recorder.calls)) == (1, 2)
    others: list[Any] = [
        lambda: launch((1,), (MEMORY[1:], *ARGS[1:]), (8,)),
        lambda: launch((1,), ARGS, (16,)),
        lambda: launch((1,), ARGS, (8,), num_warps=8),
        lambda: launch((1,), ARGS, (8,), num_stages=2),
        lambda: launch((1,), ARGS, (8,), launch_pdl=True),
        lambda: launch((1,), ARGS, (8,), maxnreg=64),
        lambda: launch((1,), ARGS, {"BLOCK": 8}),
    ]
    for count, other in enumerate(others):
        other()
        assert kernel.launched == 2 + count
        other()
        assert kernel.launched == 2 + count
    monkeypatch.setattr(module, "current_device", lambda: 1)
    launch((1,), ARGS, (8,))
    assert kernel.launched == 2 + len(others)


def test_grids_of_every_rank(counting: tuple[CountingKernel, Recorder]) -> None:
    kernel, recorder = counting
    launch = Launcher(kernel)
    for grid in ((5,), (5,), (6, 7), (2, 3, 4)):
        launch(grid, ARGS, (8,))
    assert [call[:4] for call in recorder.calls] == [(5, 1, 1, 77), (6, 7, 1, 77), (2, 3, 4, 77)]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(counting: tuple[CountingKernel, Recorder], hook: str) -> None:
    kernel, recorder = counting
    launch = Launcher(kernel)
    launch((1,), ARGS, (8,))
    chain = getattr(triton.knobs.runtime, hook)

    def profile(metadata: Any) -> None: ...

    chain.add(profile)
    try:
        launch((1,), ARGS, (8,))
    finally:
        chain.remove(profile)
    assert (kernel.launched, recorder.calls) == (2, [])
    launch((1,), ARGS, (8,))
    assert (kernel.launched, len(recorder.calls)) == (2, 1)


def test_pre_run_hooks_see_every_launch(counting: tuple[CountingKernel, Recorder]) -> None:
    kernel, recorder = counting
    launch = Launcher(kernel)
    kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    for _ in range(3):
        launch((1,), ARGS, (8,))
    assert (kernel.launched, recorder.calls) == (3, [])


def test_a_refused_direct_launch_becomes_an_ordinary_one(
    counting: tuple[CountingKernel, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, _ = counting

    def refuse(*args: Any) -> None:
        raise TypeError("function takes exactly 3 arguments")

    kernel.compiled.run.launch = refuse
    launch = Launcher(kernel)
    for _ in range(3):
        launch((1,), ARGS, (8,))
    assert kernel.launched == 3


def test_a_kernel_that_returns_nothing_is_launched_ordinarily(counting: tuple[CountingKernel, Recorder]) -> None:
    kernel, recorder = counting
    kernel.compiled = None
    launch = Launcher(kernel)
    for _ in range(3):
        launch((1,), ARGS, (8,))
    assert (kernel.launched, recorder.calls) == (3, [])


def test_a_version_of_triton_not_read_yet(
    counting: tuple[CountingKernel, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, recorder = counting
    monkeypatch.setattr(triton, "__version__", "9.0.0")
    launch = Launcher(kernel)
    for _ in range(3):
        launch((1,), ARGS, (8,))
    # Through CudaLauncher.__call__, which PyTorch's own compiler relies on too.
    assert (kernel.launched, len(recorder.calls)) == (1, 2)


def test_equal_descriptors_are_one_on_a_gpu_and_hold_no_memory() -> None:
    make = module._cached_descriptor
    first = make(1 << 20, torch.bfloat16, (64, 64), (64, 1), (16, 64), None, "zero")
    assert first is make(1 << 20, torch.bfloat16, (64, 64), (64, 1), (16, 64), None, "zero")
    for other in ((1 << 21, (64, 64), (16, 64)), (1 << 20, (32, 64), (16, 64)), (1 << 20, (64, 64), (32, 64))):
        address, shape, block = other
        assert make(address, torch.bfloat16, shape, (64, 1), block, None, "zero") is not first
    assert not isinstance(first.descriptor.base, torch.Tensor)


# On a GPU.


@pytest.mark.gpu
def test_a_direct_launch_on_a_gpu() -> None:
    launcher = Launcher(scale_rows_kernel)
    check_scale_rows(launcher)
    known = dict(launcher._launches)
    assert known
    assert all(launch is not None for launch in known.values())
    check_scale_rows(launcher)
    assert launcher._launches == known


@pytest.mark.gpu
def test_another_alignment_is_compiled_anew() -> None:
    launcher = Launcher(scale_rows_kernel)
    x = torch.randn(64, device=DEVICE)
    for offset, specializations in ((0, 1), (4, 1), (1, 2), (2, 2), (0, 2)):
        out = torch.empty(16, device=DEVICE)
        launcher((1,), (x[offset:], out, None, 1, 16, 3.0), (16,))
        assert torch.equal(out, x[offset : offset + 16] * 3)
        assert len(launcher._launches) == specializations


@pytest.mark.gpu
def test_direct_launches_are_captured_and_replayed() -> None:
    launcher = Launcher(scale_rows_kernel)
    x, out = torch.randn(1, 16, device=DEVICE), torch.zeros(1, 16, device=DEVICE)
    launch = lambda: launcher((1,), (x, out, None, 1, 16, 2.0), (16,))  # noqa: E731
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for _ in range(3):
        x.normal_()
        out.zero_()
        graph.replay()
        assert torch.equal(out, x * 2)


@pytest.mark.gpu
def test_direct_launches_take_the_current_stream() -> None:
    launcher = Launcher(scale_rows_kernel)
    x, out = torch.randn(1, 16, device=DEVICE), torch.zeros(1, 16, device=DEVICE)
    launcher((1,), (x, out, None, 1, 16, 2.0), (16,))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(3)
        launcher((1,), (x, out, None, 1, 16, 2.0), (16,))
    side.synchronize()
    assert (out == 6).all()


@pytest.mark.gpu
@pytest.mark.sm90
def test_descriptors_on_a_gpu_follow_their_memory() -> None:
    launcher = Launcher(double_blocks_kernel)
    for step in range(4):
        x = torch.randn(32, 16, device=DEVICE)
        out = torch.zeros_like(x)
        launcher((4,), (tensor_descriptor(x, (8, 16)), tensor_descriptor(out, (8, 16))), (8,))
        assert torch.equal(out, x * 2), step
    assert list(launcher._launches.values()) != [None]


@pytest.mark.gpu
def test_host_time_of_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    launcher = Launcher(scale_rows_kernel)
    x, out = torch.randn(1, 16, device=DEVICE), torch.zeros(1, 16, device=DEVICE)
    args = (x, out, None, 1, 16, 2.0)
    ways = {
        "ordinary": lambda: scale_rows_kernel[(1,)](*args, BLOCK=16, num_warps=4),
        "direct": lambda: launcher((1,), args, (16,)),
    }
    with capsys.disabled():
        for name, way in ways.items():
            way()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(500):
                way()
            print(f"\n{name} launch: {(time.perf_counter() - start) * 2000:.2f} us of host time", end="")
            torch.cuda.synchronize()
