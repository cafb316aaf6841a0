"""What tests of launches share: Triton's launcher objects with a recorder in the place of the C function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.backends.nvidia import driver
from triton.runtime.jit import JITFunction


class Recorder:
    """In place of the C function: keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(tuple(tuple(arg) if isinstance(arg, list) else arg for arg in args))


def as_c_sees_it(call: tuple[Any, ...]) -> tuple[Any, ...]:
    """Addresses for tensors, nothing for constexprs, which the C function skips."""
    return tuple(
        as_c_sees_it(arg) if isinstance(arg, tuple) else arg.data_ptr() if hasattr(arg, "data_ptr") else arg
        for arg in call
    )


def compiled_for(signature: dict[str, str], tensordesc_meta: list[Any] | None) -> tuple[Any, Recorder]:
    """A compiled kernel of that signature, with Triton's real launcher object up to its C function."""
    recorder = Recorder()
    run = object.__new__(driver.CudaLauncher)
    run.num_ctas = 1
    run.launch = driver.wrap_handle_tensordesc(recorder, dict(enumerate(signature.values())), tensordesc_meta)
    run.global_scratch_size = run.profile_scratch_size = 0
    run.global_scratch_align = run.profile_scratch_align = 1
    run.launch_cooperative_grid, run.launch_pdl = False, True
    if hasattr(driver, "expand_signature"):
        run.arg_annotations = list(driver.expand_signature(signature.values(), tensordesc_meta))
        run.kernel_signature = b"signature"
    compiled = SimpleNamespace(
        src=SimpleNamespace(signature=signature), packed_metadata=(4, 1, 0), function=1234, run=run, name="kernel"
    )
    return compiled, recorder


class CountingKernel(JITFunction):
    """A kernel whose ordinary launches are counted and return what they would on a GPU."""

    def __init__(self, fn: Any, compiled: Any) -> None:
        super().__init__(fn)
        self.compiled = compiled
        self.launched = 0

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        self.launched += 1
        return self.compiled
