"""Programmatic dependent launch: the next kernel's programs start while the last ones of the kernel before still run.

A kernel launched so calls `wait_for_the_kernel_before` before it touches memory. It then lets its successor start,
which in turn waits for it: whatever runs has waited, in a chain, for everything before its predecessor, so tables that
were written two launches ago may be read before the wait (hopper_gemm does).

    time      ------------------------------------------------>
    kernel 1  wait | work ................ last programs |
    kernel 2                     set-up | wait ..........| work

Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization". This module works without Triton.
"""

from __future__ import annotations

import functools

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def wait_for_the_kernel_before(PDL: tl.constexpr):
        if PDL:
            gdc_wait()
            gdc_launch_dependents()


def dependent_launch() -> bool:
    """Whether kernels of this process's current device are launched this way: from SM 90, and not interpreted."""
    if triton is None or not torch.cuda.is_initialized():
        return False
    return _supports(torch.cuda.current_device())


@functools.cache
def _supports(device: int) -> bool:
    return not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device) >= (9, 0)
