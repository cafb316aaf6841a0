"""One layer, two phases: decode and prefill through different strategies."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_plugin.modular_kernel import MoELayer


class PhasedLayer(MoELayer):
    """Sends each call to the layer of its phase.

    The phase follows only from what all ranks share: a call under CUDA graph capture is decode; otherwise the announced
    `max_num_tokens` decides; a call that announces nothing is prefill, which can run any size.
    """

    def __init__(self, decode: MoELayer, prefill: MoELayer) -> None:
        self.decode, self.prefill = decode, prefill
        self.config = prefill.config
        self.strategy = f"decode={decode.strategy},prefill={prefill.strategy}"

    def layer_of(self, max_num_tokens: int | None) -> MoELayer:
        """The layer that a call made now would run through."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.decode
        announced_decode = max_num_tokens is not None and max_num_tokens <= self.config.decode_max_tokens
        return self.decode if announced_decode else self.prefill

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int | None = None,
        shared_experts: Callable[[torch.Tensor], torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        layer = self.layer_of(max_num_tokens)
        return layer.forward(hidden_states, topk_ids, topk_weights, max_num_tokens, shared_experts, out)

    def counters(self) -> dict[str, int]:
        phases = (("decode", self.decode), ("prefill", self.prefill))
        return {f"{phase}.{way}": calls for phase, layer in phases for way, calls in layer.counters().items()}

    def check_errors(self) -> None:
        self.decode.check_errors()
        self.prefill.check_errors()

    def close(self) -> None:
        self.decode.close()
        self.prefill.close()
