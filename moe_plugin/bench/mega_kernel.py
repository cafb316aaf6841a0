"""DeepGEMM's SM 90 mega kernel beside our strategies: an expert-parallel fp8 layer that is one kernel.

Calls follow sgl-deep-gemm 0.1.5; compat/deep_gemm.py says what they take and where the library is found. A call is
timed whole: the launch that quantizes the rows into shared memory, and the kernel that does all the rest.
"""

from __future__ import annotations

import torch

from moe_plugin.bench.contenders import (
    Contender,
    Job,
    Prepared,
    UnsupportedError,
    deep_gemm_library,
    deep_gemm_version,
    noise_check,
)
from moe_plugin.bench.layers import Inputs, Layer
from moe_plugin.bench.results import PEER
from moe_plugin.config import Activation, ExpertPlacement, Fp8Block, MoEConfig
from moe_plugin.errors import DeepGemmError


class DeepGemmMega(Contender):
    """The mega kernel, its shared memory as large as the call measured needs, which is what suits it best."""

    name, role, package = "deep_gemm_mega", PEER, "deep_gemm"

    def version(self) -> str:
        return deep_gemm_version()

    def prepare(self, layer: Layer, max_tokens: int) -> Prepared:
        config = layer.config
        if reason := _why_not(config, layer.w13.device):
            raise UnsupportedError(reason)
        library = deep_gemm_library()
        if "mega" not in library.features:
            raise UnsupportedError(f"{library.module.__name__} {library.version} lacks the SM 90 mega kernel")
        names = ("w13", "w13_scale", "w2", "w2_scale")
        weights = library.mega_weights(*(_contiguous(layer, name) for name in names))

        def bind(inputs: Inputs) -> Job:
            mega = library.mega_layer(
                config.parallel.ep_group,
                weights,
                num_experts=config.num_experts,
                top_k=config.top_k,
                max_tokens=inputs.tokens,
            )
            out = torch.empty_like(inputs.hidden_states)
            arguments = (inputs.hidden_states, inputs.topk_ids, inputs.topk_weights, out)
            return Job(lambda: mega(*arguments), noise_check(layer, inputs))

        return Prepared(bind)


def _why_not(config: MoEConfig, device: torch.device) -> str:
    """What the kernel does not compute of this layer; empty where it computes all of it."""
    ranks = config.parallel.ep_size
    if config.quantization != Fp8Block() or config.dtype != torch.bfloat16:
        return "the mega kernel computes fp8 in 128 x 128 blocks on bf16 rows"
    if config.activation is not Activation.SILU_AND_MUL or config.has_bias:
        return "the mega kernel has silu_and_mul between its GEMMs and no biases"
    if config.hidden_size % 128 or config.hidden_size > 8192:
        return f"the mega kernel needs H a multiple of 128 up to 8192, got {config.hidden_size}"
    if config.intermediate_size % 128 or config.intermediate_size > 4096:
        return f"the mega kernel needs I a multiple of 128 up to 4096, got {config.intermediate_size}"
    if config.top_k > 32:
        return f"the mega kernel needs top-k up to 32, got {config.top_k}"
    if config.parallel.ep_group is None:
        return "the mega kernel needs a process group"
    if config.num_experts % ranks or config.expert_placement != ExpertPlacement.linear(config.num_experts, ranks):
        return "the mega kernel needs as many experts on every rank, in order"
    if device.type != "cuda":
        return f"the mega kernel is for SM 90, this is a {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) == (9, 0) else f"the mega kernel is for SM 90, this is SM {10 * major + minor}"


def _contiguous(layer: Layer, name: str) -> torch.Tensor:
    tensor = layer.weights[name]
    if tensor is None:
        raise DeepGemmError(f"the mega kernel needs {name}")
    return tensor.contiguous()
