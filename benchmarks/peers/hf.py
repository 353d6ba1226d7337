"""Hugging Face transformers as a peer: LlamaForCausalLM, torch AdamW, one process with spec.threads threads.

Options: "attention": "sdpa" (default) or "eager"; "optimizer": "auto" (default: the three are timed on this model's
own gradients and the fastest is kept), "fused", "foreach" or "loop"; "compile": true runs the model through
torch.compile. Run it from benchmarks/: python -m peers.hf --steps 5
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from peers import protocol

OPTIMIZERS: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False, "fused": False},
}


class HuggingFace:
    """One rank that trains as a plain transformers loop does."""

    def __init__(self, spec: protocol.Spec) -> None:
        if spec.world_size != 1:
            raise ValueError(f"this worker is one rank; the spec asks for {spec.world_size}")
        self._spec = spec
        self._attention: str = spec.options.get("attention", "sdpa")
        torch.manual_seed(spec.seed)
        self._model = LlamaForCausalLM(_config(spec, self._attention)).train()
        self._is_compiled: bool = spec.options.get("compile", False)
        self._forward = torch.compile(self._model) if self._is_compiled else self._model
        self._batches = [protocol.microbatches(spec, step) for step in range(protocol.DISTINCT_STEPS)]
        self._optimizer_times_ms: dict[str, float] = {}
        self._optimizer_name: str = spec.options.get("optimizer", "auto")
        if self._optimizer_name == "auto":
            self._optimizer_times_ms = self._time_optimizers()
            self._optimizer_name = min(self._optimizer_times_ms, key=self._optimizer_times_ms.__getitem__)
        self._optimizer = self._make_optimizer(self._optimizer_name, spec.learning_rate)

    def train_step(self, step: int) -> float:
        """See protocol.Worker."""
        loss = self._gradients(step)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._spec.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def num_parameters(self) -> int:
        """See protocol.Worker."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def describe(self) -> dict[str, Any]:
        """See protocol.Worker."""
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "settings": {
                "attention": self._attention,
                "optimizer": self._optimizer_name,
                "optimizer_ms": self._optimizer_times_ms,
                "compile": self._is_compiled,
            },
        }

    def _gradients(self, step: int) -> torch.Tensor:  # [] fp32
        total = torch.zeros(())
        for tokens, labels in self._batches[step % protocol.DISTINCT_STEPS]:
            # shift_labels are taken as they are; labels only asks for a loss.
            output = self._forward(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False)
            loss = output.loss / self._spec.num_microbatches
            loss.backward()
            total += loss.detach()
        return total

    def _make_optimizer(self, name: str, learning_rate: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self._model.parameters(),
            lr=learning_rate,
            betas=(0.9, 0.95),
            weight_decay=self._spec.weight_decay,
            **OPTIMIZERS[name],
        )

    def _time_optimizers(self) -> dict[str, float]:
        """Milliseconds of one step of each, the fastest of five; at learning rate 0 they leave the weights alone."""
        self._gradients(0)
        times = {}
        for name in OPTIMIZERS:
            optimizer = self._make_optimizer(name, 0.0)
            optimizer.step()  # makes the state
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                optimizer.step()
                seconds.append(time.perf_counter() - start)
            times[name] = round(1000 * min(seconds), 3)
        self._model.zero_grad(set_to_none=True)
        return times


def _config(spec: protocol.Spec, attention: str) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.seq_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation=attention,
        dtype=torch.float32,
    )


if __name__ == "__main__":
    protocol.main(HuggingFace)
