"""The order in which `auto` prefers strategies, and why. The first row whose gates pass is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.experts.layout_tables import TRITON_FUSED_MOE, describe_rule, measured_gain
from moe_plugin.prepare_finalize.hybrid_dense_routing import HybridDenseRouting
from moe_plugin.verdict import Gate

AutoGate = Callable[[MoEConfig, Environment], Gate]


@dataclass(frozen=True, slots=True)
class RankedStrategy:
    """One row of the table.

    reason: why it stands where it stands.
    opt_in: why `auto` never picks it, though an explicit request may; None for a strategy that `auto` may pick.
    auto_gate: a condition that holds for `auto` alone.
    """

    strategy: str
    reason: str
    opt_in: str | None = None
    auto_gate: AutoGate | None = None


def compiled_triton(config: MoEConfig, environment: Environment) -> Gate:
    seen = "Triton's interpreter" if environment.triton_interpret else environment.device_type
    compiled = environment.device_type == "cuda" and not environment.triton_interpret
    return Gate("compiled kernels (auto only)", compiled, seen, "a CUDA device: the interpreter is for tests")


def measured_faster(config: MoEConfig, environment: Environment) -> Gate:
    """DeepGEMM's GEMMs are for `auto` where a table of the device and layer says that they win at some size."""
    on_device = environment.device_type == "cuda"
    return Gate(
        "measured (auto only)",
        on_device and measured_gain(config, environment.device_name),
        describe_rule(config, environment.device_name) if on_device else environment.device_type,
        f"a layout table of this device and layer that has more than {TRITON_FUSED_MOE}",
        "moe-plugin tune makes one; an explicit request needs none",
    )


def nvlink(config: MoEConfig, environment: Environment) -> Gate:
    """Where rows go over torch.distributed anyway, nccl_all_to_all sends fewer that nobody uses."""
    why_not = HybridDenseRouting.why_not_nvlink(config, environment)
    return Gate(
        "peer access (auto only)",
        not why_not,
        why_not or "every pair",
        "GPUs of one host that reach each other's memory, and Triton",
        "an explicit request moves rows over torch.distributed where they do not",
    )


def all_of(*gates: AutoGate) -> AutoGate:
    """The first of `gates` that fails, else the last."""

    def gate(config: MoEConfig, environment: Environment) -> Gate:
        found = [each(config, environment) for each in gates]
        return next((each for each in found if not each.ok), found[-1])

    return gate


RANKING: tuple[RankedStrategy, ...] = (
    RankedStrategy(
        "local+deep_gemm_hybrid",
        "every expert is on this rank, and DeepGEMM's GEMMs were measured to be faster; Triton where they are not",
        auto_gate=measured_faster,
    ),
    RankedStrategy(
        "local+triton_fused_moe",
        "every expert is on this rank: nothing travels, and the fused kernels never wait for the host",
        auto_gate=compiled_triton,
    ),
    RankedStrategy("local+torch_native", "every expert is on this rank; torch's grouped matmul runs on any device"),
    RankedStrategy(
        "hybrid_dense_routing+deep_gemm_hybrid",
        "rows go straight into peers' memory over NVLink, and DeepGEMM's GEMMs were measured to be faster",
        auto_gate=all_of(nvlink, measured_faster),
    ),
    RankedStrategy(
        "hybrid_dense_routing+triton_fused_moe",
        "rows go straight into peers' memory over NVLink and nothing waits for the host, fused kernels in between",
        auto_gate=all_of(nvlink, compiled_triton),
    ),
    RankedStrategy(
        "hybrid_dense_routing+torch_native",
        "rows go straight into peers' memory over NVLink; torch's grouped matmul runs on any device",
        auto_gate=nvlink,
    ),
    RankedStrategy(
        "nccl_all_to_all+deep_gemm_hybrid",
        "experts are spread over ranks, and DeepGEMM's GEMMs were measured to be faster; Triton where they are not",
        auto_gate=measured_faster,
    ),
    RankedStrategy(
        "nccl_all_to_all+triton_fused_moe",
        "experts are spread over ranks: one packed all-to-all each way, fused kernels in between",
        auto_gate=compiled_triton,
    ),
    RankedStrategy(
        "nccl_all_to_all+torch_native", "experts are spread over ranks; torch's grouped matmul runs on any device"
    ),
)

UNRANKED = "not in the ranking table: ask for it by name"
