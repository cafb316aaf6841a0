"""Other names of strategies in `--moe_strategy`, and what RTP-LLM's opt-in names ask for on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.verdict import Gate, Verdict, gate_dtype, gate_quantization, gate_sm

AliasGate = Callable[[MoEConfig, Environment], Gate]


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of a strategy.

    gates: conditions under this name, checked in this order in front of the strategy's own. `auto` chooses strategies,
    not names, and so never meets them.
    """

    strategy: str
    gates: tuple[AliasGate, ...] = ()

    def verdict(self, name: str, own: Verdict, config: MoEConfig, environment: Environment) -> Verdict:
        """All gates of the strategy when it is asked for as `name`. own: those of its classes.

        The order is RTP-LLM's: the name, the alias's gates, what the classes say about CUDA graphs, the rest.
        """
        if not self.gates:
            return own
        asked = Gate("moe_strategy", True, name, f"--moe_strategy {name}")
        extra = Verdict.of(asked, *(gate(config, environment) for gate in self.gates)).asked_by(name)
        graph_rule = tuple(gate for gate in own.gates if gate.name == "cuda_graph")
        others = tuple(gate for gate in own.gates if gate.name != "cuda_graph")
        return extra + Verdict(graph_rule) + Verdict(others)


def _dtype(config: MoEConfig, environment: Environment) -> Gate:
    return gate_dtype(config, torch.bfloat16)


def _unquantized(config: MoEConfig, environment: Environment) -> Gate:
    return gate_quantization(config, ("none",))


def _fp8_block(config: MoEConfig, environment: Environment) -> Gate:
    return gate_quantization(config, ("fp8_block",))


def _symbols(kind: str) -> AliasGate:
    def gate(config: MoEConfig, environment: Environment) -> Gate:
        package = environment.package("deep_gemm")
        found = package.usable and kind in package.features
        needs = f"the grouped {kind} GEMMs of DeepGEMM, contiguous and masked"
        fix = None if found else "pip install 'moe-plugin[deepgemm]'"
        return Gate("symbols", found, package.describe(), needs, fix)

    return gate


def _sm90(config: MoEConfig, environment: Environment) -> Gate:
    return gate_sm(environment, 90)


_BF16_DEEP_GEMM: tuple[AliasGate, ...] = (_dtype, _unquantized, _symbols("bf16"), _sm90)
_FP8_DEEP_GEMM: tuple[AliasGate, ...] = (_dtype, _fp8_block, _symbols("fp8"), _sm90)

ALIASES: Mapping[str, Alias] = {
    "batched_triton": Alias("local+triton_fused_moe"),
    "torch": Alias("local+torch_native"),
    "triton": Alias("local+triton_fused_moe"),
    "deepgemm": Alias("local+deep_gemm_hybrid"),
    "nccl": Alias("nccl_all_to_all+triton_fused_moe"),
    "gloo": Alias("nccl_all_to_all+torch_native"),
    "no_quant_dp_normal_deepgemm": Alias("deepep_high_throughput+deep_gemm_hybrid", _BF16_DEEP_GEMM),
    "fp8_per_block_ep_normal": Alias("deepep_high_throughput+deep_gemm_hybrid", _FP8_DEEP_GEMM),
    "fp8_per_block_no_dp": Alias("local+deep_gemm_hybrid", _FP8_DEEP_GEMM),
}
"""`batched_triton` and the last three are RTP-LLM's names. Its `normal` is dispatch from the ranks that own the tokens,
as opposed to its low-latency mode; `no_dp` is without any."""
