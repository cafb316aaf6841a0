"""What is measured: strategies of this package, and other libraries on the same tensors.

Peers are imported when they are asked for and never before; one that is absent, refuses a layer or breaks says so in
its place in the table. Calls follow vLLM 0.25.1 and the grouped GEMMs of DeepGEMM (sgl-deep-gemm 0.1.5, or the copy in
vLLM's wheel).
"""

from __future__ import annotations

import abc
import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from moe_plugin.bench.layers import Inputs, Layer, oracle_of_sample, right_answers
from moe_plugin.bench.results import GEMMS_ONLY, PEER, STRATEGY
from moe_plugin.compat import deep_gemm
from moe_plugin.compat.deep_gemm import DeepGemm
from moe_plugin.config import Activation, Fp8Block, Fp8PerTensor, Fp8PerToken
from moe_plugin.environment import probe_package
from moe_plugin.errors import ConfigError, MissingPackageError, StrategyUnsupportedError
from moe_plugin.modular_kernel import ModularKernel, MoELayer
from moe_plugin.numerics import FP8_NOISE, FP8_TOLERANCE, TOLERANCES, Tolerance, max_row_error, relative_error
from moe_plugin.quantization import GROUP_SIZE, dequantize_rows, quantize_rows
from moe_plugin.strategies.build import build
from moe_plugin.strategies.selector import parse_strategy
from moe_plugin.workspace import WorkspaceArena


class NotInstalledError(Exception):
    """A peer's package is absent; the message says how to get it."""


class UnsupportedError(Exception):
    """A contender does not compute this layer, by design; the message says why."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How far a result is from what it must be, and how far it may be."""

    error: float
    row_error: float
    tolerance: Tolerance

    @classmethod
    def of(cls, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Accuracy:
        return cls(relative_error(actual, expected), max_row_error(actual, expected), tolerance)

    @classmethod
    def of_any(cls, actual: torch.Tensor, answers: Sequence[torch.Tensor], tolerance: Tolerance) -> Accuracy:
        """Compared with the nearest of several right answers."""
        return min((cls.of(actual, each, tolerance) for each in answers), key=lambda found: (not found.ok, found.error))

    @property
    def ok(self) -> bool:
        # A NaN compares false with everything and must not pass.
        return self.error <= self.tolerance.frobenius and self.row_error <= self.tolerance.row

    def __str__(self) -> str:
        limit = self.tolerance
        return (
            f"relative error {self.error:.2e} (tolerance {limit.frobenius:g}), "
            f"row error {self.row_error:.2e} (tolerance {limit.row:g})"
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One call, ready to run: `run()` enqueues it and returns its output, `check` compares such an output."""

    run: Callable[[], Any]
    check: Callable[[Any], Accuracy]


Bind = Callable[[Inputs], Job]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A contender with a layer's weights. capturable: its calls may be captured in a CUDA graph."""

    bind: Bind
    capturable: bool = True
    note: Callable[[int], str] = lambda tokens: ""


class Contender(abc.ABC):
    """One line of the table. name: what it is called there; role: one of results.ROLES."""

    name: str
    role: str
    package: ClassVar[str] = ""
    """The module that has to be importable; "" where it is this package."""

    @abc.abstractmethod
    def prepare(self, layer: Layer, max_tokens: int) -> Prepared:
        """Take a layer's weights. Raises NotInstalledError, UnsupportedError, or whatever the library raises."""

    def version(self) -> str:
        """Of the package, or "not installed"."""
        return probe_package(self.package).describe()


class StrategyContender(Contender):
    """A strategy of this package, as a user builds and calls it. Peer `torch` is one, too."""

    def __init__(self, strategy: str, name: str = "", role: str = STRATEGY) -> None:
        parse_strategy(strategy)
        self.strategy, self.name, self.role = strategy, name or strategy, role

    def version(self) -> str:
        return torch.__version__

    def prepare(self, layer: Layer, max_tokens: int) -> Prepared:
        capturable = layer.w13.device.type == "cuda"
        try:
            built = self.build(layer, max_tokens, capturable)
        except UnsupportedError:
            if not capturable:
                raise
            capturable = False
            built = self.build(layer, max_tokens, capturable)
        seen = f"chose {built.strategy}" if built.strategy != self.name and self.role == STRATEGY else ""
        return Prepared(functools.partial(self.bind, built, layer), capturable, lambda tokens: seen)

    def build(self, layer: Layer, max_tokens: int, cuda_graph: bool) -> MoELayer:
        """The layer, for calls that are captured or not. Raises UnsupportedError with the gate that fails."""
        config = replace(layer.config, max_tokens_per_rank=max_tokens, cuda_graph=cuda_graph)
        # An arena of its own: memory that captured graphs keep is freed with the layer.
        arena = WorkspaceArena(layer.w13.device)
        try:
            return build(config, **layer.weights, strategy=self.strategy, arena=arena)  # type: ignore[arg-type]
        except StrategyUnsupportedError as problem:
            raise UnsupportedError(str(problem)) from problem

    def bind(self, built: MoELayer, layer: Layer, inputs: Inputs) -> Job:
        """One call. Where there are several ranks, all announce their number of tokens, as a server does."""
        arguments = (inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
        announced = inputs.tokens if layer.config.parallel.ep_size > 1 else None
        return Job(
            lambda: built(*arguments, max_num_tokens=announced),
            lambda output: _own_accuracy(built, layer, inputs, output),
        )


class VllmFusedExperts(Contender):
    """vLLM's Triton `fused_experts`, with the tuned configuration of its wheel where it has one for the device."""

    name, role, package = "vllm", PEER, "vllm"

    def prepare(self, layer: Layer, max_tokens: int) -> Prepared:
        fused_moe = _vllm("model_executor.layers.fused_moe.fused_moe")
        activation = _vllm_activation(layer)
        quant_config = _vllm_quant_config(layer)
        block = layer.config.quantization
        sizes = (block.block_n, block.block_k) if isinstance(block, Fp8Block) else (0, 0)
        dtype = None if block is None else "fp8_w8a8"
        tuned = fused_moe.get_moe_configs(layer.config.num_experts, layer.config.intermediate_size, dtype, *sizes)
        note = "its tuned configuration" if tuned else "its default configuration"

        def bind(inputs: Inputs) -> Job:
            arguments = {
                "hidden_states": inputs.hidden_states,
                "w1": layer.w13,
                "w2": layer.w2,
                "topk_weights": inputs.topk_weights,
                "topk_ids": inputs.topk_ids,
                "activation": activation,
                "quant_config": quant_config,
            }
            return Job(lambda: fused_moe.fused_experts(**arguments), noise_check(layer, inputs))

        return Prepared(bind, note=lambda tokens: note)


class VllmDeepGemmExperts(Contender):
    """vLLM's DeepGemmExperts in the modular kernel it has without data or expert parallelism; fp8 blocks."""

    name, role, package = "vllm_deep_gemm", PEER, "vllm"

    def prepare(self, layer: Layer, max_tokens: int) -> Prepared:
        config = layer.config
        if config.quantization != Fp8Block() or config.has_bias or config.intermediate_size % 128:
            raise UnsupportedError("DeepGemmExperts computes fp8 in 128 x 128 blocks, I a multiple of 128, no biases")
        fused_moe = _vllm("model_executor.layers.fused_moe")
        settings = _vllm("model_executor.layers.fused_moe.config")
        kernels = _vllm("model_executor.layers.fused_moe.modular_kernel")
        no_dispatch = _vllm("model_executor.layers.fused_moe.prepare_finalize.no_dp_ep")
        workspace = _vllm("v1.worker.workspace")
        activation = _vllm_activation(layer)
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(layer.w13.device)
        moe_config = settings.FusedMoEConfig(
            num_experts=config.num_experts,
            experts_per_token=config.top_k,
            hidden_dim=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_local_experts=config.num_experts,
            num_logical_experts=config.num_experts,
            activation=activation,
            device=layer.w13.device,
            routing_method=settings.RoutingMethodType.TopK,
            moe_parallel_config=settings.FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=config.dtype,
            max_num_tokens=max_tokens,
        )
        experts = fused_moe.DeepGemmExperts(moe_config, _vllm_quant_config(layer))
        kernel = kernels.FusedMoEKernel(no_dispatch.MoEPrepareAndFinalizeNoDPEPModular(), experts)

        def bind(inputs: Inputs) -> Job:
            arguments = {
                "hidden_states": inputs.hidden_states,
                "w1": layer.w13,
                "w2": layer.w2,
                "topk_weights": inputs.topk_weights,
                "topk_ids": inputs.topk_ids,
                "activation": activation,
                "global_num_experts": config.num_experts,
                "expert_map": None,
                "apply_router_weight_on_input": False,
            }
            return Job(lambda: kernel.apply(**arguments), noise_check(layer, inputs))

        return Prepared(bind)


class DeepGemmGroupedGemms(Contender):
    """The two grouped GEMMs of the layer and nothing else: no sort, gather, activation, quantization or reduction.

    Rows are gathered and quantized beforehand, so this is a ceiling for layers and not one of them. Up to MASKED_TOKENS
    tokens in the masked layout, above in the contiguous one, both with their groups padded to the 128 rows they need.
    """

    name, role, package = "deep_gemm", GEMMS_ONLY, "deep_gemm"
    MASKED_TOKENS: ClassVar[int] = 256
    ALIGNMENT: ClassVar[int] = 128

    def version(self) -> str:
        return deep_gemm_version()

    def prepare(self, layer: Layer, max_tokens: int) -> Prepared:
        config = layer.config
        if config.quantization not in (None, Fp8Block()) or config.dtype != torch.bfloat16:
            raise UnsupportedError("DeepGEMM has grouped GEMMs for bf16 and for fp8 in 128 x 128 blocks")
        if layer.w13.device.type != "cuda" or torch.cuda.get_device_capability(layer.w13.device) != (9, 0):
            raise UnsupportedError("these calls of DeepGEMM are for SM 90")
        unit = 64 if config.quantization is None else 128
        if config.hidden_size % unit or config.intermediate_size % unit:
            raise UnsupportedError(f"DeepGEMM needs H and I to be multiples of {unit}")
        library = deep_gemm_library()
        kind = "bf16" if config.quantization is None else "fp8"
        if kind not in library.features:
            raise UnsupportedError(f"{library.module.__name__} {library.version} lacks grouped GEMMs for {kind}")
        return Prepared(lambda inputs: _grouped_gemms(library, layer, inputs))


def deep_gemm_version() -> str:
    """Which DeepGEMM peers get."""
    package = deep_gemm.probe()
    if package.usable and package.module != deep_gemm.PACKAGE:
        return f"of vllm {probe_package('vllm').describe()}"
    return package.version if package.usable and package.version else package.describe()


def deep_gemm_library() -> DeepGemm:
    """DeepGEMM for a peer. Raises NotInstalledError, or DeepGemmError when it is unusable."""
    try:
        return deep_gemm.library()
    except MissingPackageError as problem:
        raise NotInstalledError(deep_gemm.INSTALL) from problem


def _grouped_gemms(library: DeepGemm, layer: Layer, inputs: Inputs) -> Job:
    config = layer.config
    masked = inputs.tokens <= DeepGemmGroupedGemms.MASKED_TOKENS
    token, rows, layout, expected = _layout(inputs, config.num_experts, masked)
    groups, capacity = (config.num_experts, rows // config.num_experts) if masked else (1, rows)
    device = inputs.hidden_states.device
    generator = torch.Generator(device).manual_seed(0)
    gathered = inputs.hidden_states[token]
    between = torch.randn(rows, config.intermediate_size, generator=generator, device=device).to(config.dtype)
    shape = (lambda t: t.unflatten(0, (groups, capacity))) if masked else (lambda t: t)
    products: list[tuple[Any, Any, torch.Tensor, torch.Tensor, str]] = []
    for source, weight, scale in ((gathered, "w13", "w13_scale"), (between, "w2", "w2_scale")):
        w = layer.weights[weight]
        assert w is not None
        out = shape(torch.empty(rows, w.shape[1], dtype=config.dtype, device=device))
        if config.quantization is None:
            products.append((shape(source), w, out, source, weight))
            continue
        quantized, row_scale = quantize_rows(source, GROUP_SIZE)
        # Rows of scales next to each other: any other order costs the library another kernel in every call. Cloned, as
        # a single group of columns counts as contiguous with strides that the library does not take for this order.
        group_major = shape(row_scale).mT.clone(memory_format=torch.contiguous_format)
        restored = dequantize_rows(quantized, row_scale, GROUP_SIZE)
        products.append(((shape(quantized), group_major.mT), (w, layer.weights[scale]), out, restored, weight))

    def run() -> list[torch.Tensor]:
        for a, b, out, _, _ in products:
            if masked:
                library.grouped_gemm_masked(a, b, out, layout, expected)
            else:
                library.grouped_gemm_contiguous(a, b, out, layout, psum=False)
        return [out for _, _, out, _, _ in products]

    samples = _sampled_rows(inputs, config.num_experts, masked, capacity)

    def check(outputs: list[torch.Tensor]) -> Accuracy:
        found = []
        for output, (_, _, _, operand, weight) in zip(outputs, products, strict=True):
            flat = output.flatten(0, -2)
            right = [operand[rows].float() @ layer.dequantized(weight, e)[0].float().T for e, rows in samples]
            actual = torch.cat([flat[rows] for _, rows in samples])
            found.append(Accuracy.of(actual, torch.cat(right), TOLERANCES[config.dtype]))
        return max(found, key=lambda accuracy: (not accuracy.ok, accuracy.error))

    return Job(run, check)


def _layout(inputs: Inputs, num_experts: int, masked: bool) -> tuple[torch.Tensor, int, torch.Tensor, int]:
    """Which token stands in each row, the number of rows, DeepGEMM's layout argument, and its expected rows per group.

    Masked: every expert has the same capacity, the layout is the number of its rows. Contiguous: groups follow each
    other, padded; the layout is each row's expert. Padding rows hold token 0 rather than zeros, which would be faster.
    """
    align = DeepGemmGroupedGemms.ALIGNMENT
    pair_expert = inputs.topk_ids.flatten().long()
    order = pair_expert.argsort(stable=True)
    counts = torch.bincount(pair_expert, minlength=num_experts)
    padded = (counts + align - 1) // align * align
    if masked:
        padded = padded.max().expand(num_experts)
    starts = padded.cumsum(0) - padded
    within = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[pair_expert[order]]
    rows = int(padded.sum())
    token = torch.zeros(rows, dtype=torch.int64, device=order.device)
    token[starts[pair_expert[order]] + within] = order // inputs.topk_ids.shape[1]
    if masked:
        expected = max(1, round(len(order) / num_experts))
        return token, rows, counts.to(torch.int32), expected
    experts = torch.arange(num_experts, dtype=torch.int32, device=order.device)
    return token, rows, experts.repeat_interleave(padded), 0


def _sampled_rows(inputs: Inputs, num_experts: int, masked: bool, capacity: int) -> list[tuple[int, list[int]]]:
    """The first and the last row of several experts that were hit, spread over all: (expert, rows)."""
    counts = torch.bincount(inputs.topk_ids.flatten().long(), minlength=num_experts).tolist()
    align = DeepGemmGroupedGemms.ALIGNMENT
    start, found = 0, []
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, [start, start + count - 1]))
        start += capacity if masked else -(-count // align) * align
    return found[:: -(-len(found) // 8)]


PEERS: Mapping[str, Callable[[], Contender]] = {
    "vllm": VllmFusedExperts,
    "vllm_deep_gemm": VllmDeepGemmExperts,
    "deep_gemm": DeepGemmGroupedGemms,
    "torch": lambda: StrategyContender("local+torch_native", "torch", PEER),
}
"""What `--peer` takes."""


def peer(name: str) -> Contender:
    """A peer by name. Raises ConfigError for an unknown one."""
    if name not in PEERS:
        raise ConfigError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    return PEERS[name]()


def _own_accuracy(built: MoELayer, layer: Layer, inputs: Inputs, output: torch.Tensor) -> Accuracy:
    """Of a layer of this package, which quantizes activations as the oracle does."""
    rounds = isinstance(built, ModularKernel) and built.experts.rounds_gate_up
    tolerance = TOLERANCES[layer.config.dtype] if layer.config.quantization is None else FP8_TOLERANCE
    return Accuracy.of_any(output[inputs.sample()], right_answers(layer, inputs, rounds), tolerance)


def noise_check(layer: Layer, inputs: Inputs) -> Callable[[Any], Accuracy]:
    """Compare a peer's output with the oracle on a sample of tokens.

    Peers round fp8 scales and intermediates in ways of their own, so activations of that oracle are not quantized.
    """
    fp8 = layer.config.quantization is not None
    tolerance = FP8_NOISE if fp8 else TOLERANCES[layer.config.dtype]

    def check(output: torch.Tensor) -> Accuracy:
        expected = oracle_of_sample(layer, inputs, quantized_activations=False)
        return Accuracy.of(output[inputs.sample()], expected, tolerance)

    return check


def _vllm(module: str) -> Any:
    # vLLM reports every configuration file it opens; set before its first import, a user's own choice stands.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if probe_package("vllm").version is None:
        raise NotInstalledError("pip install vllm==0.25.1")
    return importlib.import_module(f"vllm.{module}")


def _vllm_activation(layer: Layer) -> Any:
    activations = _vllm("model_executor.layers.fused_moe.activation").MoEActivation
    known = {Activation.SILU_AND_MUL: activations.SILU, Activation.GELU_AND_MUL: activations.GELU_TANH}
    activation = layer.config.activation
    if activation not in known:
        raise UnsupportedError(f"fused_experts has no {activation.value} with gate rows first")
    return known[activation]


def _vllm_quant_config(layer: Layer) -> Any:
    settings = _vllm("model_executor.layers.fused_moe.config")
    scheme, weights = layer.config.quantization, layer.weights
    biases = {"w1_bias": weights.get("w13_bias"), "w2_bias": weights.get("w2_bias")}
    if scheme is None:
        return settings.biased_moe_quant_config(**biases) if layer.config.has_bias else None
    scales: dict[str, Any] = {"w1_scale": weights["w13_scale"], "w2_scale": weights["w2_scale"]}
    if isinstance(scheme, Fp8Block):
        if layer.config.intermediate_size % scheme.block_n:
            raise UnsupportedError("vLLM's blocks run on from gate to up: I must be a multiple of the block")
        return settings.fp8_w8a8_moe_quant_config(**scales, **biases, block_shape=[scheme.block_n, scheme.block_k])
    if isinstance(scheme, Fp8PerTensor):
        return settings.fp8_w8a8_moe_quant_config(**scales, **biases)
    if isinstance(scheme, Fp8PerToken):
        per_channel = {name: scale.unsqueeze(-1) for name, scale in scales.items()}
        return settings.fp8_w8a8_moe_quant_config(
            **per_channel, **biases, per_act_token_quant=True, per_out_ch_quant=True
        )
    raise UnsupportedError(f"no {scheme.name} in fused_experts")
