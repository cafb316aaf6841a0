"""Uninitialized memory full of NaN, so that a read of padding shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """While active, torch.empty and its relatives return NaN (floats) or a large odd number (integers)."""
    originals = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    saved = [(owner, name, getattr(owner, name)) for owner, name in originals]

    def poisoning(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            return poison(original(*args, **kwargs))

        return make

    for owner, name, original in saved:
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill in place with what no computation survives unnoticed."""
    if tensor.dtype == torch.bool or tensor.is_meta:
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(0x7B if tensor.dtype.itemsize == 1 else 0x7B7B)
