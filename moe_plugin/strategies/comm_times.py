"""What dispatch and combine take, as measured by `moe-plugin bench comm`: what `auto` ranks dispatchers by.

Microseconds of one dispatch and one combine behind it, replayed from a CUDA graph, with the rows of DeepSeek-V3: H
7168, top-8, 256 experts. Source: benchmarks/comm-h200-2026-11-21-4-gpus.json, -2-gpus-bf16.json and -2-gpus-fp8.json,
whose medians these are.

Example, 2 ranks, fp8 rows, 4096 tokens of each: nccl_all_to_all 488, hybrid_dense_routing 528, DeepEP's 726. So `auto`
prefers nccl_all_to_all there, and hybrid_dense_routing at 512 tokens and fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.quantization import dispatched_groups

HYBRID, NCCL = "hybrid_dense_routing", "nccl_all_to_all"
HIGH_THROUGHPUT, LOW_LATENCY = "deepep_high_throughput", "deepep_low_latency"

DEVICE = "NVIDIA H200"
BF16, FP8 = "bf16", "fp8"
MAX_RANKS = 8
"""Of one node; what holds for two and four of its ranks says nothing of several nodes."""

_COLUMNS = (HYBRID, NCCL, HIGH_THROUGHPUT, LOW_LATENCY)
_TIMES: Mapping[tuple[int, str], Mapping[int, tuple[float | None, ...]]] = {
    (2, BF16): {
        8: (17.2, 37.7, 71.0, 37.0),
        128: (33.7, 63.3, 94.2, 101.1),
        512: (84.7, 120.0, 164.9, 284.1),
        4096: (468.4, 581.6, 788.1, None),
        8192: (961.2, 1077.2, 1517.8, None),
    },
    (2, FP8): {
        8: (18.0, 37.3, 69.6, 35.4),
        128: (35.9, 59.1, 89.7, 88.7),
        512: (88.8, 107.7, 147.3, 230.1),
        4096: (528.4, 487.9, 726.4, None),
        8192: (1016.4, 892.7, 1396.4, None),
    },
    (4, BF16): {
        8: (19.5, 42.5, 71.9, 38.0),
        128: (57.4, 92.3, 126.3, 127.4),
        512: (167.2, 240.9, 260.0, 396.2),
        4096: (980.0, 1489.7, 1423.6, None),
        8192: (2050.2, 2862.1, 2740.0, None),
    },
    (4, FP8): {
        8: (22.1, 40.9, 72.2, 48.2),
        128: (52.2, 80.6, 111.9, 109.1),
        512: (140.2, 197.4, 212.2, 323.2),
        4096: (806.4, 1160.8, 1071.1, None),
        8192: (1577.3, 2247.2, 2048.1, None),
    },
}
"""By ranks and rows, by tokens of a rank; None where the class does not run."""


@dataclass(frozen=True, slots=True)
class MeasuredCell:
    """The measurement that speaks for a layer. times: microseconds by dispatcher, of those that run."""

    ranks: int
    rows: str
    tokens: int
    times: Mapping[str, float]

    def describe(self, dispatcher: str) -> str:
        """Example: "528 us on 2 NVIDIA H200 with 4096 fp8 rows"."""
        return f"{self.times[dispatcher]:.0f} us on {self.ranks} {DEVICE} with {self.tokens} {self.rows} rows"


def measured_cell(config: MoEConfig, environment: Environment) -> MeasuredCell | None:
    """The cell nearest to a layer: as many ranks or the next fewer, tokens nearest by ratio. None on another device."""
    ranks = config.parallel.ep_size
    if environment.device_name != DEVICE or ranks > MAX_RANKS or config.parallel.num_nodes > 1:
        return None
    measured = [size for size, _ in _TIMES if size <= ranks]
    if not measured:
        return None
    rows = FP8 if dispatched_groups(config.quantization, config.hidden_size) else BF16
    by_tokens = _TIMES[max(measured), rows]
    tokens = min(by_tokens, key=lambda each: abs(math.log(each / config.max_tokens_per_rank)))
    times = {name: time for name, time in zip(_COLUMNS, by_tokens[tokens], strict=True) if time is not None}
    return MeasuredCell(max(measured), rows, tokens, times)
