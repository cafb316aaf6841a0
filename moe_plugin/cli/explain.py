"""`moe-plugin explain`: which strategy would run a layer, here or on a machine you describe, and why."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import torch
import typer

from moe_plugin.cli.launch import StrategyOption, TracebackOption, clear_errors
from moe_plugin.config import Fp8Block, Fp8PerTensor, Fp8PerToken, ParallelConfig, QuantConfig
from moe_plugin.environment import Environment
from moe_plugin.presets import PRESETS, preset_config
from moe_plugin.strategies.selector import explain as explain_strategy


class DtypeName(str, enum.Enum):
    """What `--dtype` takes; the fp8 names mean bf16 activations with that quantization."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP8_BLOCK = "fp8_block"
    FP8_PER_TENSOR = "fp8_per_tensor"
    FP8_PER_TOKEN = "fp8_per_token"

    def fields(self) -> dict[str, Any]:
        """The MoEConfig fields this name stands for."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        schemes: dict[str, QuantConfig] = {
            scheme.name: scheme for scheme in (Fp8Block(), Fp8PerTensor(), Fp8PerToken())
        }
        return {"dtype": dtypes.get(self.value, torch.bfloat16), "quantization": schemes.get(self.value)}


PresetOption = Annotated[str, typer.Option(help=f"Whose layer: {', '.join(PRESETS)}.")]
WorldOption = Annotated[int, typer.Option(min=1, help="Ranks of the expert-parallel group.")]
TpOption = Annotated[int, typer.Option(min=1, help="Ranks that share each expert's intermediate size.")]
NodesOption = Annotated[int, typer.Option(min=1, help="Nodes that the ranks are spread over.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Largest number of tokens per rank.")]


def explain(
    preset: PresetOption = "qwen3-30b",
    moe_strategy: StrategyOption = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="Activation dtype, or an fp8 scheme.")] = DtypeName.BF16,
    sm: Annotated[
        int | None, typer.Option(help="Compute capability to assume, e.g. 90; this machine's if left out.")
    ] = None,
    world: WorldOption = 1,
    tp: TpOption = 1,
    nodes: NodesOption = 1,
    max_tokens: MaxTokensOption = 4096,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="The layer will be captured in a CUDA graph.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    traceback: TracebackOption = False,
) -> None:
    """Show every strategy and every gate: pass or fail, with the value seen. Needs no GPU."""
    with clear_errors(traceback):
        config = preset_config(
            preset,
            **dtype.fields(),
            parallel=ParallelConfig(ep_size=world, tp_size=tp, num_nodes=nodes),
            max_tokens_per_rank=max_tokens,
            cuda_graph=cuda_graph,
        )
        environment = Environment.probe()
        if sm is not None:
            environment = environment.pretend(sm=sm)
        report = explain_strategy(config, moe_strategy, environment)
        typer.echo(report.json() if as_json else report.text().rstrip())
