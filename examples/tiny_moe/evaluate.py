"""Measure how well a language model predicts the held-out sample ``heldout.txt``.

Run it on the model in this folder, or name another one::

    python examples/tiny_moe/evaluate.py
    python examples/tiny_moe/evaluate.py --model path/to/model

The measure is the mean cross-entropy of every token of the sample but the first. The tokenizer is byte-level, so
this is a loss per byte, and it does not depend on the Python version: the sample is stored next to the model.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parent
HELDOUT = FOLDER / "heldout.txt"
WINDOW = 256


@torch.inference_mode()
def heldout_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path | str = HELDOUT,
    window: int = WINDOW,
) -> float:
    """Return the mean next-token cross-entropy of ``model`` on the text at ``path``, in nats.

    The text is cut into consecutive windows of ``window`` predictions each, taken one by one and in order, so
    that the result depends neither on a batch size nor on a random seed. The last window may be shorter. No
    context is carried from one window to the next.
    """
    tokens = encode(tokenizer, path).to(model.device)
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(tokens) - 1, window):
        # Neighbouring windows share one token: the last target of a window is the first input of the next.
        chunk = tokens[start : start + window + 1]
        logits = model(input_ids=chunk[None, :-1], use_cache=False).logits[0]
        total += functional.cross_entropy(logits.float(), chunk[1:], reduction="sum").item()
    model.train(was_training)
    return total / (len(tokens) - 1)


def encode(tokenizer: PreTrainedTokenizerBase, path: Path | str) -> torch.Tensor:
    """Return the tokens of the text at ``path``, read as bytes so that no newline is translated."""
    text = Path(path).read_bytes().decode("utf-8")
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def summary(loss: float, tokens: int) -> dict[str, float | int]:
    """Return the record that ``heldout.json`` holds for a held-out loss over ``tokens`` tokens."""
    return {"loss": round(loss, 4), "bits_per_byte": round(loss / math.log(2), 4), "tokens": tokens, "window": WINDOW}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Print the held-out loss of a model as JSON.")
    parser.add_argument("--model", type=Path, default=FOLDER, help="model folder (default: this folder)")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="held-out text (default: heldout.txt)")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loss = heldout_loss(model, tokenizer, arguments.text)
    print(json.dumps(summary(loss, len(encode(tokenizer, arguments.text)))))


if __name__ == "__main__":
    main()
