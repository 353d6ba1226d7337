"""Tiny models of every family, awkward on purpose: 3 layers, 101 ids, head counts that tp 4 divides and little else."""

from __future__ import annotations

import dataclasses
from typing import Any

from megallm.config.model import Family, ModelConfig

_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[Family, dict[str, Any]] = {
    "gpt2": {
        "hidden_size": 40,
        "intermediate_size": 136,
        "num_key_value_heads": 8,
        "head_dim": 5,
        "norm": "layernorm",
        "position_embedding": "learned",
        "hidden_act": "gelu_tanh",
        "gated_mlp": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama": {"hidden_size": 48, "intermediate_size": 88, "head_dim": 6, "scale_residual_init": False},
    "mistral": {"hidden_size": 40, "intermediate_size": 72, "head_dim": 8, "sliding_window": 7},
    "qwen2": {
        "hidden_size": 32,
        "intermediate_size": 88,
        "head_dim": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
    },
    "qwen3": {
        "hidden_size": 40,
        "intermediate_size": 104,
        "head_dim": 10,
        "qk_norm": True,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
    },
}


def tiny_config(family: Family = "llama", **overrides: Any) -> ModelConfig:
    """A model of `family` with under 100,000 parameters, no dropout; tp 1, 2 and 4 divide it, its vocabulary none.

    Mistral's and Qwen3's head_dim is not hidden_size / num_attention_heads. `overrides`: fields of ModelConfig.
    """
    config = ModelConfig(family=family, **{**_COMMON, **_FAMILIES[family]})
    return dataclasses.replace(config, **overrides)
