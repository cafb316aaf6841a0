"""Compiles what a launch needs, for a GPU that need not be there."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import mangle_type

from moe_plugin.kernels.launcher import Launch


def compile_launch(launch: Launch, sm: int, specialize: bool = False) -> Any:
    """The kernel as Triton compiles it at the first such launch, on tensors that may lie on the CPU.

    specialize: for numbers, too, that are 1 or multiples of 16.
    """
    kernel = launch.launcher.kernel
    is_gluon = isinstance(kernel, GluonJITFunction)
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for position, (name, value) in enumerate(zip(kernel.arg_names, (*launch.args, *launch.constexprs), strict=True)):
        if position >= len(launch.args) or value is None:
            signature[name], constants[(position,)] = "constexpr", value
            continue
        is_special = specialize and type(value) is int and not kernel.params[position].do_not_specialize
        if is_special and value == 1:
            signature[name], constants[(position,)] = "constexpr", 1
            continue
        signature[name] = mangle_type(getattr(value, "descriptor", getattr(value, "tensor", value)))
        if signature[name].startswith("*") or (is_special and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    names = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
    options = {name: value for name, value in zip(names, launch.options, strict=True) if value is not None}
    source = (GluonASTSource if is_gluon else ASTSource)(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
