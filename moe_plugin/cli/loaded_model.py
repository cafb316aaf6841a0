"""A model manager for transformers' server that holds one model, loaded by us, for good."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager


class LoadedModelManager(ModelManager):
    """Serves one model under one name; never loads another one and never unloads it.

    The base class would load on demand, on this rank only and without moe_plugin.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__(device="cpu")
        # Only now: given to the base class, it would be loaded.
        self.force_model = name
        self._model, self._tokenizer = model, tokenizer
        self._created = int(time.time())

    def load_model_and_processor(
        self, model_id_and_revision: str, progress_callback: Callable[[dict[str, Any]], None] | None = None, **_: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model. Raises ValueError when another one is wanted."""
        if model_id_and_revision != self.process_model_name(str(self.force_model)):
            raise ValueError(f"this server is pinned to {self.force_model!r}")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return self._model, self._tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """What GET /v1/models answers."""
        return [{"id": self.force_model, "object": "model", "owned_by": "moe_plugin", "created": self._created}]

    def shutdown(self) -> None:
        """Nothing to unload; POST /reset ends here too."""
