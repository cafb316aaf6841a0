"""Results made up by hand, for what only reads them."""

from __future__ import annotations

from moe_plugin.bench.results import (
    GEMMS_ONLY,
    PEER,
    STRATEGY,
    Ceilings,
    Cell,
    LayerFacts,
    MachineFacts,
    Measurement,
    Run,
    Settings,
    Timing,
)

OURS = "local+triton_fused_moe"
QWEN = LayerFacts(name="qwen3-30b", num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
MIXTRAL = LayerFacts(name="mixtral-8x7b", num_experts=8, top_k=2, hidden_size=4096, intermediate_size=14336)


def timing(median: float, count: int = 20) -> Timing:
    return Timing(median=median, p10=median * 0.98, p90=median * 1.05, count=count)


def measured(contender: str, graph: float | None, eager: float | None = None, cpu: float | None = None) -> Measurement:
    role = STRATEGY if "+" in contender else GEMMS_ONLY if contender == "deep_gemm" else PEER
    times = {"graph": graph, "eager": eager, "cpu": cpu}
    return Measurement(
        contender=contender,
        role=role,
        status="ok",
        error=3e-3,
        row_error=5e-3,
        **{clock: None if time is None else timing(time) for clock, time in times.items()},
    )


def failed(contender: str, status: str, detail: str) -> Measurement:
    return Measurement(contender=contender, role=PEER, status=status, detail=detail)


def cell(*measurements: Measurement, tokens: int = 128, dtype: str = "bf16", layer: LayerFacts = QWEN, **more) -> Cell:
    facts = {"skew": "uniform", "experts_hit": 128, "flops": 10**9, "bytes": 10**9, "floor": 200.0, "bound": "memory"}
    return Cell(layer=layer, dtype=dtype, tokens=tokens, measurements=measurements, **(facts | more))


def run(*cells: Cell, device: str = "NVIDIA H200") -> Run:
    return Run(
        command="moe-plugin bench experts --preset qwen3-30b",
        date="2026-01-01T00:00:00+00:00",
        machine=MachineFacts(device=device, device_type="cuda", sm=90, torch="2.11.0", peers={"vllm": "0.25.1"}),
        ceilings=Ceilings(copy_bytes_per_second=4e12, matmul_flops={"bf16": 7.7e14}, graph_overhead=2.5),
        settings=Settings(
            layers=("qwen3-30b",),
            tokens=(128,),
            dtypes=("bf16",),
            strategies=(OURS,),
            peers=("vllm",),
            skew="uniform",
            seed=0,
            time_budget=0.3,
        ),
        cells=cells,
    )
