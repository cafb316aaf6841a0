"""Launches Triton and Gluon kernels at a low cost on the host.

`kernel[grid](...)` binds its arguments, prints the options into a cache key, reads environment knobs and asks the CUDA
driver about every pointer, each time. `Launcher` does that once per specialization and later calls the C function of
the compiled kernel itself, with addresses as integers.

A specialization is what Triton compiles a kernel for. Example, kernel f(x_ptr, n, stride, BLOCK: constexpr), with n in
do_not_specialize:

    x bf16 at 0x7f00, n = 5, stride = 64, BLOCK = 128  -> key (bf16, 0, True, 128): compiled by Triton
    x bf16 at 0x9a10, n = 9, stride = 32, BLOCK = 128  -> the same key: launched directly
    x bf16 at 0x9a12, n = 9, stride = 1, BLOCK = 128   -> key ((bf16, False), 0, 2, 128): compiled anew

TMA descriptors that the host makes are encoded for the hardware at each ordinary launch; `tensor_descriptor` gives
arguments that are encoded once for the same memory, shape, strides and block.

`LaunchSequence` repeats several launches of which only some tensors change: nothing is left to do for a launch then
but to replace their addresses and call the C function.

All this stands on Triton's internals (read in 3.6.0 and 3.7.1). Where they look different, in its interpreter, and
while launch hooks (profilers) are set, the ordinary launch is used. This module works without Triton.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeAlias

import torch

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
except ImportError:
    GluonTensorDescriptor = None

logger = logging.getLogger(__name__)

P = ParamSpec("P")

DirectLaunch: TypeAlias = Callable[[int, int, int, int, list[Any]], None]
"""Grid sizes x, y and z, the stream's handle, the values of the kernel's run-time parameters."""

_INT32_MIN, _INT32_MAX = -(1 << 31), (1 << 31) - 1
_FAMILIAR_VERSIONS = ("3.6.", "3.7.")
"""Versions of Triton whose C launch functions take their arguments in one of the two orders below."""


class Pointer:
    """A tensor whose address, alignment and dtype were asked once; for memory that outlives many launches."""

    __slots__ = ("address", "key", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.address = tensor.data_ptr()
        self.key: Any = tensor.dtype if not self.address & 15 else (tensor.dtype, False)


class _Memory:
    """What Triton asks of a descriptor's base. The tensor itself, kept in a cache, could never be freed."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Descriptor:
    """A TMA descriptor argument. `descriptor` is Triton's; the hardware's form is kept per way of encoding."""

    __slots__ = ("_encoded", "descriptor", "key")

    def __init__(self, descriptor: Any) -> None:
        self.descriptor = descriptor
        # A text, since a layout is slow to hash and this is part of the key of every launch.
        kind = (descriptor.base.dtype, list(descriptor.block_shape), getattr(descriptor, "layout", None))
        self.key = f"tensordesc{kind}"
        self._encoded: dict[Any, list[Any]] = {}

    def encoded(self, how: Any, encode: Callable[[Any], list[Any]]) -> list[Any]:
        """The arguments that stand for it in a C launch function; `how` names what `encode` does."""
        found = self._encoded.get(how)
        if found is None:
            found = self._encoded[how] = encode(self.descriptor)
        return found

    def at(self, address: int) -> Descriptor:
        """The same of memory that begins at `address`."""
        moved = copy.copy(self.descriptor)
        moved.base = _Memory(address, moved.base.dtype)
        return Descriptor(moved)


def tensor_descriptor(
    tensor: torch.Tensor, block_shape: Sequence[int], layout: Any = None, padding: str = "zero"
) -> Descriptor:
    """A TMA descriptor of `tensor` in blocks of `block_shape`, the same object when all of that repeats.

    tensor: 1 to 5 dimensions, 16-byte aligned, contiguous in the last, other strides multiples of 16 bytes. It is not
        kept alive: whoever launches with the descriptor holds it, as with any pointer.
    layout: the shared-memory layout, for a Gluon kernel; None for a Triton kernel.
    """
    block_shape, shape, strides = tuple(block_shape), tuple(tensor.shape), tensor.stride()
    if not tensor.is_cuda:  # Triton's interpreter reads the tensor itself
        return Descriptor(_describe(tensor, shape, strides, block_shape, layout, padding))
    return _cached_descriptor(tensor.data_ptr(), tensor.dtype, shape, strides, block_shape, layout, padding)


def descriptor_at(
    address: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    block_shape: Sequence[int],
    layout: Any = None,
) -> Descriptor:
    """`tensor_descriptor` of device memory that is no tensor of this process, such as a peer's."""
    return _cached_descriptor(address, dtype, tuple(shape), tuple(strides), tuple(block_shape), layout, "zero")


@functools.lru_cache(maxsize=4096)
def _cached_descriptor(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block_shape: tuple[int, ...],
    layout: Any,
    padding: str,
) -> Descriptor:
    return Descriptor(_describe(_Memory(address, dtype), shape, strides, block_shape, layout, padding))


def _describe(
    base: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block_shape: tuple[int, ...],
    layout: Any,
    padding: str,
) -> Any:
    sizes = list(shape), list(strides), list(block_shape)
    if layout is None:
        return TensorDescriptor(base, *sizes, padding)
    return GluonTensorDescriptor(base, *sizes, layout, padding)


def _wrapped(descriptor: Any) -> Descriptor:
    """The Descriptor of one that was made with Triton's own class."""
    base = descriptor.base
    if getattr(descriptor, "round_f32_to_tf32", False) or not getattr(base, "is_cuda", False):
        return Descriptor(descriptor)
    return _cached_descriptor(
        base.data_ptr(),
        base.dtype,
        tuple(descriptor.shape),
        tuple(descriptor.strides),
        tuple(descriptor.block_shape),
        getattr(descriptor, "layout", None),
        descriptor.padding,
    )


class Launcher:
    """Launches one `triton.jit` or `gluon.jit` kernel, whose constexpr parameters come after all others."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        names = list(kernel.arg_names)
        parameters = getattr(kernel, "params", None)
        annotations = getattr(getattr(kernel, "fn", None), "__annotations__", {})
        constexpr = {name for name in names if "constexpr" in str(annotations.get(name, ""))}
        self._names = [name for name in names if name not in constexpr]
        self._constexpr_names = [name for name in names if name in constexpr]
        self._is_compiled = parameters is not None and _is_familiar(kernel)
        """False in the interpreter and for decorated kernels (autotuners), whose launches are always ordinary."""
        if self._is_compiled and names != self._names + self._constexpr_names:
            logger.debug("%s: constexpr parameters are mixed with others, so launches are ordinary", kernel.fn.__name__)
            self._is_compiled = False
        self._specialized = [not p.do_not_specialize for p in parameters[: len(self._names)]] if parameters else []
        self._launches: dict[tuple[Any, ...], DirectLaunch | None] = {}

    @property
    def is_interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernel, which reads tensors rather than addresses."""
        return triton is not None and type(self.kernel).__name__ == "InterpretedFunction"

    def __call__(
        self,
        grid: tuple[int, ...],
        args: Sequence[Any],
        constexprs: tuple[Any, ...] | Mapping[str, Any] = (),
        *,
        num_warps: int = 4,
        num_stages: int | None = None,
        launch_pdl: bool = False,
        maxnreg: int | None = None,
    ) -> None:
        """Launch on the current stream of the current device, where all tensors must be: that is not checked.

        grid: one to three sizes; none of the kernel's work happens when one is 0.
        args: the run-time parameters, all of them, in order: tensors, Pointer, Descriptor (or Triton's own descriptor
            classes), int, float, bool, None.
        constexprs: values in order or by name, hashable. One parameter keeps to one type (1, 1.0 and True are equal).
        The rest: as Triton's launch options of these names; None leaves Triton's default.
        """
        self._launch(grid, args, constexprs, (num_warps, num_stages, launch_pdl, maxnreg))

    def launch(
        self,
        grid: tuple[int, ...],
        args: Sequence[Any],
        constexprs: tuple[Any, ...] | Mapping[str, Any] = (),
        *,
        num_warps: int = 4,
        num_stages: int | None = None,
        launch_pdl: bool = False,
        maxnreg: int | None = None,
    ) -> Launch:
        """What `__call__` does, described but not done."""
        return Launch(self, grid, args, constexprs, (num_warps, num_stages, launch_pdl, maxnreg))

    def _launch(
        self,
        grid: tuple[int, ...],
        args: Sequence[Any],
        constexprs: tuple[Any, ...] | Mapping[str, Any],
        options: Options,
    ) -> DirectLaunch | None:
        """Launch; returns what did it, None for Triton itself."""
        if not self._is_compiled or hooks_are_set() or self.kernel.pre_run_hooks:
            self._launch_ordinarily(grid, args, constexprs, options)
            return None
        values: list[Any] = []
        key: list[Any] = [current_device(), constexprs if type(constexprs) is tuple else (*constexprs.items(),)]  # type: ignore[union-attr]
        key += options
        if type(grid) is not tuple or not self._bind(args, key, values):
            self._launch_ordinarily(grid, args, constexprs, options)
            return None
        found = tuple(key)
        try:
            launch = self._launches[found]
        except KeyError:
            compiled = self._launch_ordinarily(grid, args, constexprs, options)
            self._launches[found] = _direct_launch(compiled, self._names, len(self._constexpr_names))
            return None
        except TypeError:  # a constexpr without a hash
            launch = None
        if launch is None:
            self._launch_ordinarily(grid, args, constexprs, options)
            return None
        x, y, z = _three(grid)
        try:
            launch(x, y, z, current_stream(key[0]), values)
        except (TypeError, ValueError, OverflowError, SystemError) as problem:
            # Raised while arguments are read, so nothing has been launched.
            logger.debug("%s: direct launch failed (%s), launching ordinarily", self.kernel.fn.__name__, problem)
            launch = self._launches[found] = None
            self._launch_ordinarily(grid, args, constexprs, options)
        return launch

    def _bind(self, args: Sequence[Any], key: list[Any], values: list[Any]) -> bool:
        """Append one item per argument to `key` and `values`; False for arguments of other types or number."""
        if len(args) != len(self._specialized):
            return False
        for arg, specialized in zip(args, self._specialized, strict=True):
            kind = type(arg)
            if kind is Pointer:
                key.append(arg.key)
                values.append(arg.address)
            elif kind is int:
                if not _INT32_MIN <= arg <= _INT32_MAX:
                    key.append(("u64" if arg >> 63 == 1 else "i64", specialized and not arg & 15))
                elif specialized:
                    key.append(2 if arg == 1 else not arg & 15)
                else:
                    key.append(0)
                values.append(arg)
            elif kind is torch.Tensor:
                address = arg.data_ptr()
                key.append(arg.dtype if not address & 15 else (arg.dtype, False))
                values.append(address)
            elif arg is None:
                key.append(None)
                values.append(None)
            elif kind is Descriptor:
                key.append(arg.key)
                values.append(arg)
            elif kind is float or kind is bool:
                key.append(kind)
                values.append(arg)
            elif isinstance(arg, torch.Tensor):
                pointer = Pointer(arg)
                key.append(pointer.key)
                values.append(pointer.address)
            elif kind is TensorDescriptor or kind is GluonTensorDescriptor:
                descriptor = _wrapped(arg)
                key.append(descriptor.key)
                values.append(descriptor)
            else:
                return False
        return True

    def _launch_ordinarily(
        self,
        grid: tuple[int, ...],
        args: Sequence[Any],
        constexprs: tuple[Any, ...] | Mapping[str, Any],
        options: Options,
    ) -> Any:
        """Triton's own launch; returns what it returns, the compiled kernel."""
        named = dict(zip(self._names, map(_as_triton_takes_it, args), strict=True))
        named |= (
            constexprs
            if isinstance(constexprs, Mapping)
            else dict(zip(self._constexpr_names, constexprs, strict=False))
        )
        if self._is_compiled:
            num_warps, num_stages, launch_pdl, maxnreg = options
            given = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
            named |= {name: value for name, value in given.items() if value is not None}
            if launch_pdl:
                named["launch_pdl"] = True
        return self.kernel[grid](**named)


Options: TypeAlias = tuple[int, int | None, bool, int | None]
"""num_warps, num_stages, launch_pdl, maxnreg."""


@dataclass(slots=True)
class Launch:
    """One launch of a kernel, described but not made yet; fields as `Launcher.__call__` takes them."""

    launcher: Launcher
    grid: tuple[int, ...]
    args: Sequence[Any]
    constexprs: tuple[Any, ...] | Mapping[str, Any]
    options: Options

    def run(self) -> DirectLaunch | None:
        """Make it; returns what did it, None for Triton itself."""
        return self.launcher._launch(self.grid, self.args, self.constexprs, self.options)


def running(describe: Callable[P, Sequence[Launch]]) -> Callable[P, None]:
    """The function that makes the launches which `describe` describes."""

    @functools.wraps(describe)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        for launch in describe(*args, **kwargs):
            launch.run()

    return run


class Encodings(dict[int, Any]):
    """The hardware's form of one descriptor, by the address where its memory begins."""

    def __init__(self, descriptor: Descriptor, how: Any, encode: Callable[[Any], list[Any]]) -> None:
        super().__init__()
        self._arguments = descriptor, how, encode

    def __missing__(self, address: int) -> Any:
        descriptor, how, encode = self._arguments
        # The sizes that follow it are the same everywhere.
        encoded = self[address] = descriptor.at(address).encoded(how, encode)[0]
        return encoded


class BoundCall(NamedTuple):
    """A C launch function and its arguments, with the places where something may be replaced.

    args: the stream's handle is at STREAM.
    values: the kernel's run-time parameters: a list among `args`, or `args` itself.
    places: of each argument of the launch, where in `values` its address goes, or what its descriptor encodes.
    """

    function: Callable[..., None]
    args: list[Any]
    values: list[Any]
    places: list[tuple[int, Encodings | None]]


STREAM = 3


def _three(grid: tuple[int, ...]) -> tuple[int, ...]:
    return grid if len(grid) == 3 else (*grid, 1, 1)[:3]


def _as_triton_takes_it(arg: Any) -> Any:
    if type(arg) is Pointer:
        return arg.tensor
    return arg.descriptor if type(arg) is Descriptor else arg


def _is_familiar(kernel: Any) -> bool:
    """Whether what each launch looks at is there."""
    try:
        hooks_are_set()
        return isinstance(kernel.pre_run_hooks, list)
    except AttributeError as problem:
        logger.debug("unfamiliar internals of Triton (%s), launching ordinarily", problem)
        return False


def hooks_are_set() -> bool:
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # A chain of hooks may be empty; anything else that is not None is a hook.
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def _direct_launch(compiled: Any, names: list[str], num_constexprs: int) -> DirectLaunch | None:
    """A function that launches `compiled` without Triton's Python, as far as its internals are familiar."""
    try:
        signature = list(compiled.src.signature.items())
        if [name for name, _ in signature[: len(names)]] != names or len(signature) != len(names) + num_constexprs:
            raise AttributeError(f"unexpected signature {signature}")
        run = compiled.run  # which loads the binary, if that has not been done
        packed, function = compiled.packed_metadata, compiled.function
        if not isinstance(function, int):
            raise AttributeError(f"unexpected function {function!r}")
        is_descriptor = [isinstance(kind, str) and kind.startswith("tensordesc") for _, kind in signature]
        constexprs = (None,) * num_constexprs
        launch = _c_launch(run, function, packed, constexprs, is_descriptor)
        if launch is None:
            logger.debug("%s: launching through the compiled kernel's own Python", compiled.name)
            return _python_launch(run, function, packed, constexprs)
        return launch
    except (AttributeError, TypeError, ImportError, ValueError) as problem:
        logger.debug("unfamiliar internals of Triton (%s), launching ordinarily", problem)
        return None


def _python_launch(run: Any, function: int, packed: Any, constexprs: tuple[None, ...]) -> DirectLaunch:
    def launch(x: int, y: int, z: int, stream: int, values: list[Any]) -> None:
        values = [_as_triton_takes_it(value) for value in values]
        run(x, y, z, stream, function, packed, None, None, None, *values, *constexprs)

    return launch


class CLaunch:
    """Calls the C function that launches one compiled kernel: (x, y, z, stream, *head) and then the values.

    head: from the function's handle to what precedes the values.
    in_list: whether the values are one list (Triton 3.7) or arguments (3.6).
    num_values: how many values a list must have, since the C function does not count them.
    """

    __slots__ = ("_constexprs", "_encoders", "_function", "_head", "_in_list", "_num_values")

    def __init__(
        self,
        function: Callable[..., None],
        head: tuple[Any, ...],
        encoders: list[_Encoder],
        constexprs: tuple[None, ...],
        in_list: bool,
        num_values: int | None,
    ) -> None:
        self._function, self._head, self._encoders, self._constexprs = function, head, encoders, constexprs
        self._in_list, self._num_values = in_list, num_values

    def __call__(self, x: int, y: int, z: int, stream: int, values: list[Any]) -> None:
        for place, how, encode in self._encoders:
            values[place : place + 1] = values[place].encoded(how, encode)
        if self._in_list:
            values.extend(self._constexprs)
            self._check(values)
            self._function(x, y, z, stream, *self._head, values)
        else:
            self._function(x, y, z, stream, *self._head, *values, *self._constexprs)

    def bound(self, launch: Launch) -> BoundCall:
        """The same call, kept for a LaunchSequence."""
        values: list[Any] = []
        launch.launcher._bind(launch.args, [], values)
        encoders = {place: (how, encode) for place, how, encode in self._encoders}
        flat: list[Any] = []
        places: list[tuple[int, Encodings | None]] = []
        for place, value in enumerate(values):
            how_encode = encoders.get(place)
            if how_encode is None:
                places.append((len(flat), None))
                flat.append(value)
            else:
                places.append((len(flat), Encodings(value, *how_encode)))
                flat += value.encoded(*how_encode)
        flat += self._constexprs
        args = [*_three(launch.grid), 0, *self._head]
        if self._in_list:
            self._check(flat)
            return BoundCall(self._function, [*args, flat], flat, places)
        places = [(len(args) + place, encodings) for place, encodings in places]
        args += flat
        return BoundCall(self._function, args, args, places)

    def _check(self, values: list[Any]) -> None:
        if len(values) != self._num_values:
            raise TypeError(f"{len(values)} values for {self._num_values} parameters")


def _c_launch(
    run: Any, function: int, packed: Any, constexprs: tuple[None, ...], is_descriptor: list[bool]
) -> CLaunch | None:
    """Calls the C function under `run`, triton's CudaLauncher; None when this kernel or version needs its Python."""
    from triton.backends.nvidia import driver

    if type(run) is not driver.CudaLauncher or not triton.__version__.startswith(_FAMILIAR_VERSIONS):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None  # memory that Triton allocates at each launch
    c_function = run.launch
    encoders: list[_Encoder] = []
    if any(is_descriptor):
        inside = dict(zip(c_function.__code__.co_freevars, c_function.__closure__, strict=True))
        c_function = inside["launcher"].cell_contents
        encoders = _encoders(driver, is_descriptor, inside["tensordesc_meta"].cell_contents)
    flags = (function, run.launch_cooperative_grid, run.launch_pdl)
    if hasattr(run, "arg_annotations"):  # 3.7
        annotations = run.arg_annotations
        nothing = (None,) * 5
        head: tuple[Any, ...] = (*flags, packed, *nothing, annotations, run.kernel_signature)
        return CLaunch(c_function, head, encoders, constexprs, True, len(annotations))
    if getattr(driver, "_BASE_ARGS_FORMAT", None) == "iiiKKppOOOOOO":  # 3.6
        head = (*flags, None, None, packed, None, None, None)
        return CLaunch(c_function, head, encoders, constexprs, False, None)
    return None


_Encoder: TypeAlias = tuple[int, Any, Callable[[Any], list[Any]]]


def _encoders(driver: Any, is_descriptor: list[bool], ways: Sequence[Any]) -> list[_Encoder]:
    """(place, name of the way, encode) of each descriptor parameter, the last first."""
    places = [place for place, found in enumerate(is_descriptor) if found]
    encoders: list[_Encoder] = [
        (place, repr(way), functools.partial(driver.make_tensordesc_arg, metadata=way))
        for place, way in zip(places, ways, strict=True)
    ]
    return encoders[::-1]


current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _stream_handle(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_handle)
