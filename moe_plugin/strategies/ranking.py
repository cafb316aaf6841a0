"""The order in which `auto` prefers strategies, and why. The first row whose gates pass is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.experts.layout_tables import TRITON_FUSED_MOE, describe_rule, measured_gain
from moe_plugin.prepare_finalize.hybrid_dense_routing import HybridDenseRouting
from moe_plugin.strategies.comm_times import HIGH_THROUGHPUT, HYBRID, LOW_LATENCY, NCCL, measured_cell
from moe_plugin.strategies.registry import prepare_finalize_classes
from moe_plugin.verdict import Gate

AutoGate = Callable[[MoEConfig, Environment], Gate]
UNMEASURED = (HYBRID, NCCL)
"""Dispatchers that `auto` may take where nobody has measured."""


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


def fastest(dispatcher: str) -> AutoGate:
    """Of the dispatchers that run here, the one that was measured to take least on as many rows; see `comm_times`.

    Where nothing was measured it is left to the order of the table, and to those that need nothing to be installed.
    """

    def gate(config: MoEConfig, environment: Environment) -> Gate:
        name, needs = "measured (auto only)", "the shortest dispatch and combine of those that run here"
        cell = measured_cell(config, environment)
        if cell is None or dispatcher not in cell.times:
            where = f"{config.parallel.ep_size} ranks of {environment.device_name or environment.device_type}"
            return Gate(name, dispatcher in UNMEASURED, f"no times for {where}", needs, "moe-plugin bench comm")
        faster = [
            other
            for other, time in cell.times.items()
            if time < cell.times[dispatcher] and _runs(other, config, environment)
        ]
        seen = cell.describe(dispatcher) + "".join(f"; {other} {cell.times[other]:.0f} us" for other in faster)
        return Gate(name, not faster, seen, needs, "an explicit request needs no measurement")

    return gate


def _runs(dispatcher: str, config: MoEConfig, environment: Environment) -> bool:
    if dispatcher == HYBRID and not nvlink(config, environment).ok:
        return False
    return prepare_finalize_classes.all()[dispatcher].supports(config, environment).ok


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
        "rows go straight into peers' memory over NVLink, the fastest measured on 4 H200 and up to 512 rows on 2; and "
        "DeepGEMM's GEMMs were measured to be faster",
        auto_gate=all_of(nvlink, fastest(HYBRID), measured_faster),
    ),
    RankedStrategy(
        "hybrid_dense_routing+triton_fused_moe",
        "rows go straight into peers' memory over NVLink and nothing waits for the host: the fastest measured on 4 "
        "H200 and up to 512 rows on 2",
        auto_gate=all_of(nvlink, fastest(HYBRID), compiled_triton),
    ),
    RankedStrategy(
        "hybrid_dense_routing+torch_native",
        "rows go straight into peers' memory over NVLink; torch's grouped matmul runs on any device",
        auto_gate=all_of(nvlink, fastest(HYBRID)),
    ),
    RankedStrategy(
        "deepep_high_throughput+deep_gemm_hybrid",
        "DeepEP's kernels, where they were measured to be the fastest that run: 4096 rows and more on 4 H200 without "
        "hybrid_dense_routing; and DeepGEMM's GEMMs were measured to be faster",
        auto_gate=all_of(fastest(HIGH_THROUGHPUT), measured_faster),
    ),
    RankedStrategy(
        "deepep_high_throughput+triton_fused_moe",
        "DeepEP's kernels, where they were measured to be the fastest that run: 4096 rows and more on 4 H200 without "
        "hybrid_dense_routing",
        auto_gate=all_of(fastest(HIGH_THROUGHPUT), compiled_triton),
    ),
    RankedStrategy(
        "deepep_high_throughput+torch_native",
        "DeepEP's kernels, where they were measured to be the fastest that run; torch's grouped matmul",
        auto_gate=fastest(HIGH_THROUGHPUT),
    ),
    RankedStrategy(
        "deepep_low_latency+deep_gemm_hybrid",
        "DeepEP's kernels, where they were measured to be the fastest that run: about 8 rows on H200 without "
        "hybrid_dense_routing; and DeepGEMM's GEMMs were measured to be faster",
        auto_gate=all_of(fastest(LOW_LATENCY), measured_faster),
    ),
    RankedStrategy(
        "deepep_low_latency+triton_fused_moe",
        "DeepEP's kernels, where they were measured to be the fastest that run: about 8 rows on H200 without "
        "hybrid_dense_routing",
        auto_gate=all_of(fastest(LOW_LATENCY), compiled_triton),
    ),
    RankedStrategy(
        "deepep_low_latency+torch_native",
        "DeepEP's kernels, where they were measured to be the fastest that run; torch's grouped matmul",
        auto_gate=fastest(LOW_LATENCY),
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
