"""The embedded model computes the same with every strategy, on one, two and three ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.tiny_moe.evaluate import heldout_loss
from moe_plugin.cli.launch import embedded_model
from moe_plugin.config import ParallelConfig
from moe_plugin.integrations.transformers import activate
from tests.integrations.ranks import run_on_ranks

FOLDER = embedded_model()
PROMPT = "import os\n\ndef "
NUM_TOKENS = 24
PIECE_BYTES = 800

pytestmark = pytest.mark.slow


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0])


@pytest.fixture(scope="module")
def piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the held-out text."""
    path = tmp_path_factory.mktemp("heldout") / "piece.txt"
    path.write_bytes((FOLDER / "heldout.txt").read_bytes()[:PIECE_BYTES])
    return path


@pytest.fixture(scope="module")
def eager(piece: Path) -> tuple[float, str]:
    """Loss and greedy text by transformers' own experts."""
    model, tokenizer = load()
    model.set_experts_implementation("eager")
    return heldout_loss(model, tokenizer, piece), greedy(model, tokenizer)


def check(strategy: str, piece: Path, loss: float, text: str) -> None:
    """On every rank: loss and greedy text as given."""
    model, tokenizer = load()
    parallel = ParallelConfig(ep_group=dist.group.WORLD) if dist.is_initialized() else None
    activate(model, strategy, parallel)
    assert heldout_loss(model, tokenizer, piece) == pytest.approx(loss, abs=1e-4)
    assert greedy(model, tokenizer) == text


@pytest.mark.parametrize("strategy", ["local+torch_native", "nccl_all_to_all+torch_native"])
def test_one_process(strategy: str, piece: Path, eager: tuple[float, str]) -> None:
    check(strategy, piece, *eager)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks(num_ranks: int, piece: Path, eager: tuple[float, str]) -> None:
    run_on_ranks(check, num_ranks, "nccl_all_to_all+torch_native", piece, *eager)


def test_recorded_heldout_loss() -> None:
    record = FOLDER / "heldout.json"
    if not record.is_file():
        pytest.skip("no loss was recorded")
    model, tokenizer = load()
    activate(model)
    with torch.inference_mode():
        assert heldout_loss(model, tokenizer) == pytest.approx(json.loads(record.read_text())["loss"], abs=1e-3)
