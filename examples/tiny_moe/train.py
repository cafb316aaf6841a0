"""Train the tiny mixture-of-experts model of this folder, from nothing, on a GPU or a CPU.

Run it from the root of the repository::

    python examples/tiny_moe/train.py

It reads the source text of the running Python's standard library, trains a byte-level Qwen3-MoE of 1.8 million
parameters on it, and writes the model, its tokenizer, the held-out sample and the model card. The model is saved
every ``--save-every`` steps as well, so an interrupted run leaves a usable model. The defaults take minutes on a GPU;
half an hour on a CPU core gets to about 1.01 nats per byte::

    python examples/tiny_moe/train.py --device cpu --steps 4500 --tokens-per-batch 2048

A quick look at whether everything works, written elsewhere::

    python examples/tiny_moe/train.py --steps 20 --output /tmp/tiny_moe
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template

import torch
from evaluate import FOLDER, HELDOUT, encode, heldout_loss, summary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
# The reserved tokens round the vocabulary up to a multiple of eight, which keeps it easy to shard and to align.
SPECIAL_TOKENS = [END_OF_TEXT, PADDING, *(f"<|reserved_{number}|>" for number in range(6))]
END_OF_TEXT_ID = 256
PADDING_ID = 257

# The model continues text and knows no roles, so a conversation is simply its messages, one after the other.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '' if loop.last else '\\n' }}{% endfor %}"

HELDOUT_MODULES = ("bisect.py", "fnmatch.py", "queue.py", "shlex.py")
# Tests, other people's packages, generated tables and applications: text unlike the library modules themselves.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip"}
)

# Transformers' grouped matrix products train fastest on a CPU; the implementations compute the same function.
EXPERTS_IMPLEMENTATION = "grouped_mm"

EXAMPLE_PROMPT = """\
    def close(self):
        if self._file is not None:
            """
EXAMPLE_LENGTH = 160


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run."""

    steps: int
    learning_rate: float
    seed: int
    tokens_per_batch: int
    warmup_steps: int = 200
    weight_decay: float = 0.1
    # Short windows train fastest. One batch in eight has windows as long as the context, so that all of it is used.
    window_lengths: tuple[int, ...] = (256, 256, 256, 256, 256, 256, 256, 1024)


@dataclass(frozen=True)
class Outcome:
    """What a training run came to."""

    train_loss: float
    heldout: dict[str, float | int]
    minutes: float
    hardware: str


@dataclass(frozen=True)
class Corpus:
    """The text to learn from, as tokens, and the text to be judged on."""

    train: torch.Tensor
    modules: int
    heldout: bytes


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer which gives every byte of the UTF-8 text its own token, whose id is the byte's value.

    It is a byte-pair encoding without any merges, a form that every Hugging Face compatible server can load.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=build_config().max_position_embeddings,
    )


def byte_symbols() -> Iterator[str]:
    """Yield, for each byte, the printable character that stands for it in a byte-level vocabulary.

    Printable Latin-1 characters stand for themselves. The others are numbered from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    replacements = iter(range(256, 512))
    for byte in range(256):
        yield chr(byte if byte in printable else next(replacements))


def build_config() -> Qwen3MoeConfig:
    """Return the shape of the model: every layer has sixteen experts, of which each token uses four."""
    return Qwen3MoeConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PADDING_ID,
        dtype="float32",
    )


def build_model() -> Qwen3MoeForCausalLM:
    """Return a model with random weights."""
    model = Qwen3MoeForCausalLM(build_config())
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=PADDING_ID, do_sample=False
    )
    return model


def read_corpus(library: Path) -> Corpus:
    """Read the Python modules under ``library``, setting aside the held-out ones."""
    tokens = bytearray()
    boundaries = []
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if EXCLUDED_FOLDERS.isdisjoint(module.parts) and module.as_posix() not in HELDOUT_MODULES:
            tokens += path.read_bytes()
            boundaries.append(len(tokens))
            tokens.append(0)

    # A byte cannot hold the number of the end-of-text token, so it takes its place only in the wider type.
    train = torch.frombuffer(tokens, dtype=torch.uint8).to(torch.int16)
    train[boundaries] = END_OF_TEXT_ID
    heldout = b"\n".join((library / module).read_bytes() for module in HELDOUT_MODULES)
    return Corpus(train, len(boundaries), heldout)


def batches(tokens: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield the batches of a run, made of windows which start at random places of ``tokens``.

    A window holds one token more than its length, because the inputs and the targets are shifted by one.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    for length in itertools.islice(itertools.cycle(recipe.window_lengths), recipe.steps):
        windows = recipe.tokens_per_batch // length
        starts = torch.randint(len(tokens) - length, (windows, 1), generator=generator)
        yield tokens[(starts + torch.arange(length + 1)).to(tokens.device)].long()


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Return the share of the peak learning rate at ``step``: a linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: Qwen3MoeForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices alone: the scales of the norms stay free."""
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: Qwen3MoeForCausalLM,
    tokens: torch.Tensor,
    recipe: Recipe,
    save: Callable[[], None],
    log_every: int,
    save_every: int,
) -> float:
    """Train ``model`` in place and return its mean training loss over the last ``log_every`` steps."""
    optimizer = build_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    losses: list[torch.Tensor] = []
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(batches(tokens, recipe), start=1):
        outputs = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch[:, 1:].flatten())
        # The auxiliary loss is smallest when the router spreads the tokens evenly over the experts.
        (loss + model.config.router_aux_loss_coef * outputs.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        losses.append(loss.detach())
        if step % log_every == 0:
            recent = torch.stack(losses[-log_every:]).mean().item()
            elapsed = time.monotonic() - started
            speed = step * recipe.tokens_per_batch / elapsed
            print(
                f"step {step}/{recipe.steps}  loss {recent:.4f}  balance {outputs.aux_loss.item():.3f}  "
                f"{elapsed:.0f} s  {speed:.0f} tokens/s",
                flush=True,
            )
        if step % save_every == 0:
            save()
    return torch.stack(losses[-log_every:]).mean().item()


def save_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model and the tokenizer, under the names that earlier versions of Transformers expect as well."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # Of two names for the same thing, Transformers 5 writes the one which Transformers 4 does not know.
    update_json(folder / "config.json", num_experts=model.config.num_experts)
    update_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def update_json(path: Path, **entries: object) -> None:
    """Set ``entries`` in the JSON object at ``path``."""
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def complete(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new_tokens: int) -> str:
    """Return ``prompt`` and its greedy continuation."""
    inputs = tokenizer(prompt, return_tensors="pt")
    model.eval()
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


CARD = Template("""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language:
- code
tags:
- mixture-of-experts
- qwen3_moe
- byte-level
- tiny
---

# Tiny MoE

A mixture-of-experts language model small enough to live in a source repository. It is a Qwen3-MoE of
$parameters parameters which writes text that looks like Python, one byte at a time. Its purpose is to run a true,
trained mixture of experts, with a routing that matters, in tests and examples within seconds and without a download.
It is not good for anything else.

## Shape

| | |
|---|---|
| Architecture | `Qwen3MoeForCausalLM` |
| Layers | $layers, all with experts |
| Hidden size | $hidden |
| Experts per layer | $experts, of which each token uses $top_k (weights normalised) |
| Intermediate size of an expert | $intermediate |
| Attention | $heads heads of $head_dim, $kv_heads key-value heads |
| Context | $context tokens |
| Vocabulary | $vocabulary: 256 bytes, end of text, padding and six reserved tokens |
| Weights | float32, input and output embeddings tied |

The tokenizer turns each byte of the UTF-8 text into one token, whose id is the value of the byte. Any text comes back
from it unchanged. The chat template joins the contents of the messages with newlines, and the model continues them:
it knows no roles.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("examples/tiny_moe")
tokenizer = AutoTokenizer.from_pretrained("examples/tiny_moe")
inputs = tokenizer("class Error(Exception):\\n    pass\\n\\n\\nclass ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.7)[0]))
```

## Data

The training text is the source of $modules modules of the standard library of Python $python ($megabytes MB), without
its tests, applications and generated tables. `heldout.txt` holds these modules, one after the other, which were left
out of the training: $heldout_modules.

Python and its standard library are copyright © Python Software Foundation and used under the
[PSF License Agreement](https://docs.python.org/3/license.html), which goes on to hold for `heldout.txt`. The rest of
this folder is under Apache-2.0.

## Training

```sh
python examples/tiny_moe/train.py
```

This took $minutes minutes on $hardware: $steps steps of $tokens_per_batch tokens with AdamW,
a cosine schedule from a learning rate of $learning_rate, and a load-balancing loss with a coefficient of $balance.
Most windows were $short_window tokens long, and one batch in $batches_per_cycle had windows of $long_window. The
training loss over the last steps was $train_loss nats per byte. Another Python version or machine gives a slightly
different model.

## Evaluation

```sh
python examples/tiny_moe/evaluate.py
```

The held-out loss is **$heldout_loss** nats per byte ($bits bits per byte), the mean over all bytes but the first of
`heldout.txt` in windows of $window. `heldout.json` holds the same numbers for programs.

## Example

The first $prompt_lines lines are the prompt, and the $example_length bytes after them are decoded greedily:

```python
$completion
```

A model of this size cannot keep greedy decoding going: sooner or later it repeats itself, in a docstring for instance,
and after a prompt of a few bytes, such as `import os` and a newline, it does so at once. A prompt with some lines of
code puts this off, and sampling avoids it.
""")


def write_card(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    recipe: Recipe,
    outcome: Outcome,
) -> str:
    """Return the text of the model card."""
    config = model.config
    return CARD.substitute(
        parameters=f"{model.num_parameters() / 1e6:.2f} million",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        intermediate=config.moe_intermediate_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        kv_heads=config.num_key_value_heads,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        modules=corpus.modules,
        python=platform.python_version(),
        megabytes=f"{len(corpus.train) / 1e6:.1f}",
        heldout_modules=", ".join(f"`{module}`" for module in HELDOUT_MODULES),
        minutes=f"{outcome.minutes:.0f}",
        hardware=outcome.hardware,
        steps=recipe.steps,
        tokens_per_batch=recipe.tokens_per_batch,
        learning_rate=recipe.learning_rate,
        balance=config.router_aux_loss_coef,
        short_window=min(recipe.window_lengths),
        long_window=max(recipe.window_lengths),
        batches_per_cycle=len(recipe.window_lengths),
        train_loss=f"{outcome.train_loss:.4f}",
        heldout_loss=f"{outcome.heldout['loss']:.4f}",
        bits=f"{outcome.heldout['bits_per_byte']:.4f}",
        window=outcome.heldout["window"],
        prompt_lines=EXAMPLE_PROMPT.count("\n"),
        example_length=EXAMPLE_LENGTH,
        completion=complete(model, tokenizer, EXAMPLE_PROMPT, EXAMPLE_LENGTH).rstrip(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny mixture-of-experts model on the standard library.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write (default: this folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tokens-per-batch", type=int, default=32768)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100, help="steps between two lines of the log")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints")
    arguments = parser.parse_args()
    recipe = Recipe(arguments.steps, arguments.learning_rate, arguments.seed, arguments.tokens_per_batch)
    output: Path = arguments.output
    device = torch.device(arguments.device)

    torch.manual_seed(recipe.seed)
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = build_tokenizer()
    model = build_model()

    output.mkdir(parents=True, exist_ok=True)
    heldout = output / HELDOUT.name
    heldout.write_bytes(corpus.heldout)
    save = partial(save_model, model, tokenizer, output)

    started = time.monotonic()
    model.to(device)
    train_loss = train(model, corpus.train.to(device), recipe, save, arguments.log_every, arguments.save_every)
    minutes = (time.monotonic() - started) / 60
    # The record and the sample in the card are a CPU's, which everyone can repeat.
    model.to("cpu")
    save()

    record = summary(heldout_loss(model, tokenizer, heldout), len(encode(tokenizer, heldout)))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    outcome = Outcome(train_loss, record, minutes, hardware)
    (output / "heldout.json").write_text(json.dumps(record, indent=2) + "\n")
    (output / "README.md").write_text(write_card(model, tokenizer, corpus, recipe, outcome), encoding="utf-8")
    print(outcome)


if __name__ == "__main__":
    main()
