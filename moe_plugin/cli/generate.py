"""`moe-plugin generate`: text to stdout, through the same path as the server but without HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from moe_plugin.cli.launch import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    Ranks,
    StrategyOption,
    TracebackOption,
    clear_errors,
    joined_ranks,
    load_model,
    require_transformers,
    set_up_logging,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: ModelArgument = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "import os\n",
    moe_strategy: StrategyOption = "auto",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above, sample.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    traceback: TracebackOption = False,
) -> None:
    """Continue a prompt. Under torchrun the experts are spread over the ranks and rank 0 prints."""
    with clear_errors(traceback):
        require_transformers("generate")
        with joined_ranks(device) as ranks:
            set_up_logging(ranks)
            loaded, tokenizer = load_model(model, moe_strategy, dtype, ranks)
            sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
            torch.manual_seed(seed)
            _generate(loaded, tokenizer, ranks, prompt, max_new_tokens=max_new_tokens, **sampling)


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, prompt: str, **options: Any
) -> None:
    from transformers import TextStreamer

    from moe_plugin.cli.lockstep import Lockstep

    lockstep = Lockstep(model, tokenizer, ranks)
    if not ranks.is_first:
        lockstep.follow()
        return
    inputs = tokenizer(prompt, return_tensors="pt").to(ranks.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    lockstep.generate(**inputs, streamer=streamer, **options)
    lockstep.close()
