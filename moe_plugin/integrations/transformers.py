"""Hugging Face transformers: moe_plugin as an experts implementation.

    model = AutoModelForCausalLM.from_pretrained(path)
    activate(model, strategy="auto")

transformers hands every experts module to a registered function. Ours builds one MoELayer per module, at the first call
and again when the module's weights change, and runs it.

Expert parallelism. `activate(model, parallel=ParallelConfig(ep_group=group))` keeps this rank's experts of each module
and frees the others. Everything else stays replicated: all ranks run the same model on the same tokens. Each rank then
dispatches its slice of the tokens, and an all-gather gives every rank all outputs, bitwise equal.

fp8 checkpoints run as transformers' FP8Experts hold them: tiles (`weight_block_size`) with dynamic activation scales,
or one scale per matrix with dynamic or static ones. moe_plugin.quantization defines what they mean; from transformers'
own kernels it differs in detail: the intermediate is quantized in groups of 128 columns in every dynamic scheme, and
experts share the largest of the static input scales.

transformers has a plan for expert parallelism of its own. It is not used: it refuses numbers of experts that the ranks
do not divide, and replaces the forward methods of routers and experts modules.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import moe_plugin
from moe_plugin.activation import gated_activation
from moe_plugin.config import (
    Activation,
    ExpertPlacement,
    Fp8Block,
    Fp8PerTensor,
    MoEConfig,
    ParallelConfig,
    QuantConfig,
)
from moe_plugin.errors import ConfigError, MissingPackageError
from moe_plugin.modular_kernel import ExpertWeights, MoELayer
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.quantization import FP8_DTYPE
from moe_plugin.verdict import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS_IMPLEMENTATION = "moe_plugin"
"""The name to give to `from_pretrained(..., experts_implementation=...)` or `model.set_experts_implementation(...)`."""

ExpertsModule = Any
"""An nn.Module with the attributes that transformers' `use_experts_implementation` and its model code give it."""

DEFAULT_MAX_TOKENS = 4096

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSettings:
    """How the experts modules of one model run; see `activate`."""

    strategy: str = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    max_tokens_per_rank: int = DEFAULT_MAX_TOKENS


def register() -> None:
    """Make "moe_plugin" known to transformers as an experts implementation. May be called any number of times.

    Raises MissingPackageError without transformers.
    """
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as problem:
        raise MissingPackageError("transformers", "serve", "the transformers integration") from problem
    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)
    FP8ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)


def activate(
    model: PreTrainedModel,
    strategy: str = "auto",
    parallel: ParallelConfig | None = None,
    max_tokens_per_rank: int | None = None,
) -> None:
    """Run the experts of `model` through moe_plugin from the next call on.

    strategy: as in `moe_plugin.build`.
    parallel: an `ep_group` spreads the experts over its ranks, each of which calls this with its own copy of the whole
        model; the other ranks' experts are then freed, which cannot be undone.
    max_tokens_per_rank: buffers are sized by it; calls with more tokens are split. When None, the context length of the
        model, but at most 4096.
    Raises UnknownStrategyError, and ConfigError for a model whose experts cannot run here.
    """
    register()
    moe_plugin.parse_strategy(strategy)
    settings = ExpertsSettings(
        strategy=strategy,
        parallel=parallel or ParallelConfig(),
        max_tokens_per_rank=max_tokens_per_rank or _default_max_tokens(model),
    )
    if settings.parallel.tp_size > 1:
        raise ConfigError("this integration spreads whole experts over ranks: tp_size must be 1")
    modules = list(experts_modules(model))
    if not modules:
        raise ConfigError(f"{type(model).__name__} has no experts that transformers lets another implementation run")
    for name, module in modules:
        _check_module(name, module)
    announced: set[str] = set()
    for _, module in modules:
        runner = ExpertsRunner(settings, announced)
        _keep_local_experts(module, settings.parallel)
        module._moe_plugin = runner
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)


def selection_report(model: nn.Module) -> Any:
    """The report on the strategy that `model` runs with; None before its first call."""
    runners = [module.__dict__.get("_moe_plugin") for module in model.modules()]
    return next((runner.layer.report for runner in runners if runner is not None and runner.layer is not None), None)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, ExpertsModule]]:
    """The modules of `model` that transformers calls through its experts interface, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "num_experts") and hasattr(module, "_apply_gate"):
            yield name, module


def experts_forward(
    module: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function transformers calls: hidden_states [T, H], global expert ids and router weights [T, K] -> [T, H]."""
    runner = module.__dict__.get("_moe_plugin")
    if runner is None:
        _check_module(type(module).__name__, module)
        runner = module._moe_plugin = ExpertsRunner(ExpertsSettings(), set())
    return runner(module, hidden_states, top_k_index, top_k_weights)


class ExpertsRunner:
    """Runs one experts module: builds its layer, splits long calls and spreads tokens over the ranks."""

    def __init__(self, settings: ExpertsSettings, announced: set[str]) -> None:
        parallel = settings.parallel
        self.settings = settings
        self.layer: MoELayer | None = None
        self._built_from: tuple[object, ...] = ()
        self._announced = announced
        self._ranks = Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, parallel.timeout_seconds)

    def __call__(
        self, module: ExpertsModule, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        if module.training and torch.is_grad_enabled():
            raise ConfigError("moe_plugin runs inference only; to train, set another experts implementation")
        # Buffers outlive the call, and torch lets no inference tensor be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            layer = self._layer_of(module, topk_ids.shape[1], hidden_states.dtype)
            inputs = hidden_states.to(layer.config.dtype)
            output = torch.empty_like(inputs, memory_format=torch.contiguous_format)
            limit = self.settings.max_tokens_per_rank * self._ranks.size
            for start in range(0, inputs.shape[0], limit):
                part = slice(start, start + limit)
                self._run(layer, inputs[part], topk_ids[part], topk_weights[part], output[part])
            return output.to(hidden_states.dtype)

    def _run(
        self,
        layer: MoELayer,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        if self._ranks.size == 1:
            layer(hidden_states, topk_ids, topk_weights, max_num_tokens=hidden_states.shape[0], out=output)
            return
        num_tokens, hidden_size = hidden_states.shape
        # Every rank has the same tokens here, so all agree on the slices, some of which may be empty.
        per_rank = -(-num_tokens // self._ranks.size)
        mine = slice(per_rank * self._ranks.rank, per_rank * (self._ranks.rank + 1))
        inputs = hidden_states[mine]
        part = output.new_empty(per_rank, hidden_size)
        layer(inputs, topk_ids[mine], topk_weights[mine], max_num_tokens=per_rank, out=part[: inputs.shape[0]])
        gathered = output.new_empty(self._ranks.size, per_rank, hidden_size)
        self._ranks.all_gather(gathered, part, "output exchange").wait()
        # Only the last slices are shorter than per_rank, so what is undefined comes after all tokens.
        output.copy_(gathered.view(-1, hidden_size)[:num_tokens])

    def _layer_of(self, module: ExpertsModule, top_k: int, dtype: torch.dtype) -> MoELayer:
        """The layer of the module's present weights; one with fp8 weights computes in the `dtype` of its input."""
        if module.down_proj.dtype != FP8_DTYPE:
            dtype = module.down_proj.dtype
        source = (top_k, dtype, *(_identity(parameter) for parameter in module.parameters(recurse=False)))
        if self.layer is None or source != self._built_from:
            # The old layer may hold a converted copy of the weights: drop it before there is a second one.
            self.layer = None
            self.layer = self._build(module, top_k, dtype)
            self._built_from = source
        return self.layer

    def _build(self, module: ExpertsModule, top_k: int, dtype: torch.dtype) -> MoELayer:
        weights = _expert_weights(module)
        activation, constants = _activation_of(module)
        num_experts = int(module.num_experts)
        config = MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=weights.w2.shape[1],
            intermediate_size=weights.w2.shape[2],
            dtype=dtype,
            quantization=_quantization_of(module),
            activation=activation,
            has_bias=weights.w2_bias is not None,
            parallel=self.settings.parallel,
            placement=ExpertPlacement.linear(num_experts, self._ranks.size),
            max_tokens_per_rank=self.settings.max_tokens_per_rank,
            **constants,
        )
        layer = moe_plugin.build(
            config,
            weights.w13,
            weights.w2,
            strategy=self.settings.strategy,
            w13_scale=weights.w13_scale,
            w2_scale=weights.w2_scale,
            w13_bias=weights.w13_bias,
            w2_bias=weights.w2_bias,
            a13_scale=weights.a13_scale,
            a2_scale=weights.a2_scale,
        )
        self._announce(layer)
        return layer

    def _announce(self, layer: MoELayer) -> None:
        """One line per distinct choice, not one per module."""
        line = layer.report.line()
        if self._ranks.rank == 0 and line not in self._announced:
            self._announced.add(line)
            logger.info(line)


def _default_max_tokens(model: PreTrainedModel) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(context or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS)


def _identity(parameter: nn.Parameter) -> tuple[object, ...]:
    """Changes when the parameter is replaced, moved or written to."""
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device


def _check_module(name: str, module: ExpertsModule) -> None:
    """Raises the ConfigError that says why moe_plugin cannot run this module."""
    where = f"{name} ({type(module).__name__})"
    if not module.has_gate:
        raise ConfigError(f"{where}: experts without a gate projection are not supported")
    dtype = module.gate_up_proj.dtype
    if dtype not in (*WEIGHT_DTYPES, FP8_DTYPE):
        allowed = ", ".join(map(dtype_name, (*WEIGHT_DTYPES, FP8_DTYPE)))
        raise ConfigError(f"{where}: expert weights are {dtype_name(dtype)}; this integration runs {allowed}")
    try:
        _quantization_of(module)
    except ConfigError as problem:
        raise ConfigError(f"{where}: {problem}") from None
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        raise ConfigError(f"{where}: expert weights are offloaded; this integration needs them in memory")
    _activation_of(module)


def _quantization_of(module: ExpertsModule) -> QuantConfig | None:
    """The scheme of an fp8 module, None for another. Raises ConfigError where moe_plugin has no definition for it."""
    if module.gate_up_proj.dtype != FP8_DTYPE:
        return None
    if not hasattr(module, "gate_up_proj_scale_inv"):
        raise ConfigError("fp8 expert weights come without the scales that transformers' FP8Experts hold")
    static = module.activation_scheme == "static"
    if module.block_size is None:
        return Fp8PerTensor(static_activations=static)
    if static:
        raise ConfigError("fp8 weights in tiles need dynamic activation scales, and these are static")
    block_n, block_k = module.block_size
    inner = module.down_proj.shape[2]
    if inner % block_n:
        raise ConfigError(
            f"intermediate size {inner} is no multiple of {block_n}, so one tile of scales belongs to gate and to up"
        )
    return Fp8Block(block_n, block_k)


def _activation_of(module: ExpertsModule) -> tuple[Activation, dict[str, Any]]:
    """The activation a module applies and its constants.

    Recognised by what `_apply_gate` computes on a grid of values, since models name, clamp and interleave differently.
    """
    limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
    alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", None))
    oai = {} if limit is None or alpha is None else {"swiglu_limit": float(limit), "swiglu_alpha": float(alpha)}
    # Wide enough to pass any limit that a model clamps at.
    values = torch.linspace(-1, 1, 33, device=module.down_proj.device) * 2 * max(10.0, limit or 0.0)
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(values, values, indexing="ij"))
    packed = torch.cat((gate, up), -1) if module.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
    with torch.no_grad():
        result = module._apply_gate(packed)
    for activation in Activation:
        constants = oai if activation is Activation.SWIGLU_OAI else {}
        expected = gated_activation(torch.cat((gate, up), -1), activation, **constants)
        if torch.allclose(result, expected, rtol=1e-5, atol=1e-5):
            return activation, constants
    known = ", ".join(activation.value for activation in Activation)
    raise ConfigError(f"{type(module).__name__} applies an activation that is none of {known}")


def _expert_weights(module: ExpertsModule) -> ExpertWeights:
    """The module's weights as `build` takes them; views where the layouts agree, copies otherwise."""
    w13, w2 = module.gate_up_proj.detach(), module.down_proj.detach()
    if module.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    scales = {} if _quantization_of(module) is None else _scales(module)
    w13_bias = module.gate_up_proj_bias.detach() if module.has_bias else None
    w2_bias = module.down_proj_bias.detach() if module.has_bias else None
    if not module.is_concatenated:
        w13 = _gate_first(w13)
        w13_bias = None if w13_bias is None else _gate_first(w13_bias)
    return ExpertWeights(w13=w13.contiguous(), w2=w2.contiguous(), w13_bias=w13_bias, w2_bias=w2_bias, **scales)


def _scales(module: ExpertsModule) -> dict[str, torch.Tensor]:
    """The scales of an fp8 module, which may be stored as powers of two (e8m0), by their names in ExpertWeights."""
    # One scale per matrix stands there as [E, 2, 1] for gate and up, and as [E, 1, 1].
    per_matrix = module.block_size is None
    w13_scale, w2_scale = module.gate_up_proj_scale_inv.detach().float(), module.down_proj_scale_inv.detach().float()
    scales = {
        "w13_scale": w13_scale.flatten(1) if per_matrix else w13_scale,
        "w2_scale": w2_scale.flatten() if per_matrix else w2_scale,
    }
    if module.activation_scheme == "static":
        scales["a13_scale"] = module.gate_up_proj_activation_scale.detach().float()
        scales["a2_scale"] = module.down_proj_activation_scale.detach().float()
    return scales


def _gate_first(interleaved: torch.Tensor) -> torch.Tensor:
    """[E, 2I, ...] with gate and up rows in turn -> the gate rows, then the up rows."""
    return torch.cat((interleaved[:, ::2], interleaved[:, 1::2]), dim=1)


def _keep_local_experts(module: ExpertsModule, parallel: ParallelConfig) -> None:
    """Cut the module's weights to this rank's experts."""
    num_experts = int(module.num_experts)
    experts = ExpertPlacement.linear(num_experts, parallel.ep_size).experts_of_rank[parallel.ep_rank]
    held_before = module.__dict__.get("_moe_plugin_experts", tuple(range(num_experts)))
    if experts == held_before:
        return
    if len(held_before) < num_experts:
        raise ConfigError("the experts of this model were spread over other ranks before; load the model again")
    for name, parameter in list(module.named_parameters(recurse=False)):
        kept = parameter.detach()[list(experts)]
        setattr(module, name, nn.Parameter(kept, requires_grad=False))
    module._moe_plugin_experts = experts
