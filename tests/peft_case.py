"""A tiny Llama with adapters whose every number follows from its name: what peft and this library are both asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megallm.parallel import random

FIXTURE = Path(__file__).parent / "fixtures" / "peft_llama.json"
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 12, "use_rslora": False, "target_modules": None},
    "some": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tensor(name: str, shape: tuple[int, ...], std: float = 0.1) -> torch.Tensor:
    """fp64 numbers that follow from the name."""
    out = torch.empty(shape, dtype=torch.float64)
    random.uniform_(out, key=random.key(11, name), start=(0,) * len(shape), shape=shape, std=std)
    return out


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of the base model by its Hugging Face name; norms are around 1."""
    return tensor(name, shape) + (1.0 if "norm" in name else 0.0)


def batch() -> dict[str, torch.Tensor]:
    """Two sequences of 12 tokens; every fifth label is missing."""
    ids = (torch.arange(2 * 13).view(2, 13) * 37 + 11) % 101
    labels = ids[:, 1:].clone()
    labels.view(-1)[::5] = -100
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}


def numbers(gradients: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """[norm, inner product with a tensor of its own] of each gradient: no mistake leaves both as they are."""
    return {
        name: [float(g.double().norm()), float((g.double() * tensor(f"probe.{name}", tuple(g.shape), 1.0)).sum())]
        for name, g in sorted(gradients.items())
    }
