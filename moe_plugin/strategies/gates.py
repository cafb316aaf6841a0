"""Gates on a pair of classes, beyond what each of them says for itself."""

from __future__ import annotations

from moe_plugin.config import MoEConfig
from moe_plugin.modular_kernel import ActivationFormat, Experts, PrepareAndFinalize, RouterWeightStage
from moe_plugin.verdict import Gate, Verdict


def pair_verdict(config: MoEConfig, prepare_finalize: type[PrepareAndFinalize], experts: type[Experts]) -> Verdict:
    """Whether what `prepare_finalize` hands over is what `experts` takes."""
    produced, taken = prepare_finalize.activation_format, experts.activation_formats
    formats = Gate(
        "activation_format",
        produced in taken,
        produced.value,
        f"one of {', '.join(sorted(f.value for f in taken))}, which {experts.name} takes",
    )
    stage = prepare_finalize.router_weight_stage
    wanted = RouterWeightStage.EXPERTS_GATHER if produced is ActivationFormat.STANDARD else RouterWeightStage.COMBINE
    weights = Gate(
        "router_weight_stage",
        stage is wanted or config.apply_router_weight_on_input,
        stage.value,
        f"{wanted.value}, which goes with {produced.value}",
    )
    return Verdict.of(formats, weights)
