"""Launches that call after call makes with the same grids, numbers and buffers, and with other tensors in places.

What a launch costs on the host beyond the C function's own work is then: replacing some addresses. Example, two kernels
with a buffer between them:

    sequence = LaunchSequence()
    sequence((x, out), lambda: [first.launch((8,), (x, buffer, 64)), second.launch((8,), (buffer, out, 64))])

    call 1    runs what the function describes; Triton compiles
    call 2    the same; all of it has been launched directly, so each C function's arguments are kept
    call 3    puts the addresses of this call's x and out into their places and calls the C functions

In Triton's interpreter the same happens with tensors in the place of addresses, so that tests on a CPU see what a wrong
key or a forgotten tensor does. This module works without Triton.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from moe_plugin.kernels.launcher import (
    STREAM,
    CLaunch,
    Descriptor,
    DirectLaunch,
    Encodings,
    Launch,
    Pointer,
    current_device,
    current_stream,
    hooks_are_set,
)

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=4096)
def one_object(*facts: Hashable) -> object:
    """The same object for the same facts: a part of keys that is quick to hash, whatever the facts are."""
    return object()


class LaunchSequence:
    """See this module's docstring.

    Keep one for everything that the launches depend on besides addresses: shapes, strides and dtypes of the tensors,
    and which of them are there. What is not among the tensors of a call (workspace buffers) must stay where it is as
    long as the sequence is used, which keeps nothing of it alive on a GPU. One call at a time.
    """

    __slots__ = ("_bound", "_is_bindable")

    def __init__(self) -> None:
        self._is_bindable = True
        self._bound: _Direct | _Interpreted | None = None

    def __call__(self, tensors: Sequence[torch.Tensor], describe: Callable[[], Sequence[Launch]]) -> None:
        """Launch on the current stream.

        tensors: what may lie elsewhere in each call, no two at one place. An argument of a launch that begins where one
            of them begins follows it, be it the tensor, a view, a Pointer or a descriptor of it.
        describe: gives the launches for these tensors; called until they can be repeated without it, and where they
            must be ordinary: while launch hooks are set, on another device, or for tensors of another alignment.
        """
        bound = self._bound
        if bound is not None and bound.repeat(tensors):
            return
        launches = describe()
        direct = [launch.run() for launch in launches]
        if self._is_bindable and bound is None:
            self._bind(tensors, launches, direct)

    def _bind(
        self, tensors: Sequence[torch.Tensor], launches: Sequence[Launch], direct: Sequence[DirectLaunch | None]
    ) -> None:
        """Keep what later calls repeat, if all of it was launched directly, or interpreted."""
        followers = _followers(tensors, launches)
        if followers is None:
            self._is_bindable = False
        elif all(launch.launcher.is_interpreted for launch in launches):
            self._bound = _Interpreted.of(tensors, launches, followers)
        else:
            functions = [function for function in direct if isinstance(function, CLaunch)]
            if len(functions) == len(launches):
                self._bound = _Direct(tensors, launches, functions, followers)


class _Direct:
    """Calls of C functions."""

    __slots__ = ("_are_aligned", "_calls", "_descriptors", "_device", "_is_aligned", "_places", "_pre_run_hooks")

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        launches: Sequence[Launch],
        functions: Sequence[CLaunch],
        followers: Sequence[list[_Follower]],
    ) -> None:
        self._device = current_device()
        # Triton compiles for aligned pointers.
        self._are_aligned = [not tensor.data_ptr() & 15 for tensor in tensors]
        self._is_aligned = all(self._are_aligned)
        self._pre_run_hooks = [launch.launcher.kernel.pre_run_hooks for launch in launches]
        self._calls: list[tuple[Callable[..., None], list[Any]]] = []
        # Where to put addresses, with the stream after the last of them, and where what descriptors encode.
        self._places: list[tuple[list[Any], int, int]] = []
        self._descriptors: list[tuple[list[Any], int, int, Encodings]] = []
        for function, launch, each in zip(functions, launches, followers, strict=True):
            call = function.bound(launch)
            self._calls.append((call.function, call.args))
            self._places.append((call.args, STREAM, len(tensors)))
            for argument, which in each:
                place, encodings = call.places[argument]
                if encodings is None:
                    self._places.append((call.values, place, which))
                else:
                    self._descriptors.append((call.values, place, which, encodings))

    def repeat(self, tensors: Sequence[torch.Tensor]) -> bool:
        """False where launches must be ordinary."""
        device = self._device
        if device != current_device() or hooks_are_set() or any(self._pre_run_hooks):
            return False
        given = [tensor.data_ptr() for tensor in tensors]
        low_bits = 0
        for address in given:
            low_bits |= address
        if (low_bits & 15 or not self._is_aligned) and [not address & 15 for address in given] != self._are_aligned:
            return False
        given.append(current_stream(device))
        for values, place, which in self._places:
            values[place] = given[which]
        for values, place, which, encodings in self._descriptors:
            values[place] = encodings[given[which]]
        for function, args in self._calls:
            function(*args)
        return True


class _Interpreted:
    """Runs of Triton's interpreter."""

    __slots__ = ("_launches",)

    def __init__(self, launches: list[tuple[Launch, list[_Follower]]]) -> None:
        self._launches = launches

    @classmethod
    def of(
        cls, tensors: Sequence[torch.Tensor], launches: Sequence[Launch], followers: Sequence[list[_Follower]]
    ) -> _Interpreted | None:
        """None where a tensor cannot stand for an argument: its descriptor, or a view of another dtype."""
        kept = []
        for launch, each in zip(launches, followers, strict=True):
            if any(_dtype(launch.args[place]) is not tensors[which].dtype for place, which in each):
                return None
            # Without the arguments that each call replaces, which it would keep alive.
            replaced = {place for place, _ in each}
            args = [None if place in replaced else arg for place, arg in enumerate(launch.args)]
            kept.append((replace(launch, args=args), each))
        return cls(kept)

    def repeat(self, tensors: Sequence[torch.Tensor]) -> bool:
        for launch, followers in self._launches:
            args = list(launch.args)
            for place, which in followers:
                args[place] = tensors[which]
            replace(launch, args=args).run()
        return True


_Follower: TypeAlias = tuple[int, int]
"""Place of an argument, and which tensor it follows."""


def _followers(tensors: Sequence[torch.Tensor], launches: Sequence[Launch]) -> list[list[_Follower]] | None:
    """Of each launch; None where it is not certain which arguments follow which tensors."""
    which = {tensor.data_ptr(): index for index, tensor in enumerate(tensors)}
    if len(which) < len(tensors):
        logger.debug("two tensors at one address, so launches are not repeated")
        return None
    storages = [tensor.untyped_storage() for tensor in tensors]
    bounds = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
    found: list[list[_Follower]] = []
    for launch in launches:
        followers = []
        for place, arg in enumerate(launch.args):
            address = _address(arg)
            if address is None:
                continue
            if address in which:
                followers.append((place, which[address]))
            elif any(start <= address < end for start, end in bounds):
                logger.debug("an argument lies within a tensor that may move, so launches are not repeated")
                return None
        found.append(followers)
    return found


def _address(arg: Any) -> int | None:
    """Where the memory begins that an argument points to; None for numbers."""
    if isinstance(arg, torch.Tensor):
        return arg.data_ptr()
    if type(arg) is Pointer:
        return arg.address
    base = getattr(arg.descriptor if type(arg) is Descriptor else arg, "base", None)
    return None if base is None else int(base.data_ptr())


def _dtype(arg: Any) -> torch.dtype | None:
    """Of a tensor that Triton's interpreter takes as it is."""
    tensor = arg.tensor if type(arg) is Pointer else arg
    return tensor.dtype if isinstance(tensor, torch.Tensor) else None
