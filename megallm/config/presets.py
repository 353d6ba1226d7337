"""Named model shapes. A preset is a function that returns a ModelConfig; `get_preset` finds it by name.

Published models take their numbers from the config.json of the Hugging Face repository of that name; `gpt3-*` from
Table 2.1 of arXiv 2005.14165, `sc21-*` from Table 1 of arXiv 2104.04473 (SC21). Dropout is 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megallm.config.fields import did_you_mean
from megallm.config.model import ModelConfig, RopeScaling


def get_preset(name: str) -> ModelConfig:
    """The model shape called `name`; ValueError with the nearest name and the list of all."""
    preset = _PRESETS.get(name)
    if preset is None:
        hint = did_you_mean(name, _PRESETS) or ": it is neither a preset nor a directory with a config.json."
        raise ValueError(f"unknown model {name!r}{hint} Presets: {', '.join(_PRESETS)}")
    return preset()


def preset_names() -> tuple[str, ...]:
    """Every preset's name, smallest of a family first."""
    return tuple(_PRESETS)


def tiny() -> ModelConfig:
    """5.0 M parameters (2.9 M without embedding and head), Llama style: trains on a CPU in a minute, splits up to tp 8
    x pp 4. Its vocabulary is what the default tokenizer has."""
    return ModelConfig(
        family="llama",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
    )


def gpt2_style(
    *, hidden_size: int, num_hidden_layers: int, num_attention_heads: int, vocab_size: int, max_positions: int
) -> ModelConfig:
    """GPT-2's block at any size: layernorm before each half, biases, gelu of 4 H, learned positions, tied head."""
    return ModelConfig(
        family="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=max_positions,
        norm="layernorm",
        position_embedding="learned",
        hidden_act="gelu_tanh",
        gated_mlp=False,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=50256,
        eos_token_id=50256,
    )


def gpt2(hidden_size: int = 768, num_hidden_layers: int = 12, num_attention_heads: int = 12) -> ModelConfig:
    """GPT-2 (Radford et al. 2019)."""
    return gpt2_style(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        vocab_size=50257,
        max_positions=1024,
    )


def nanogpt_char() -> ModelConfig:
    """nanoGPT's character-level model for a CPU (`config/train_shakespeare_char.py` with its README's flags): 0.8 M
    parameters, 65 characters, context 64, no biases in the projections (its layernorms have none either; ours do)."""
    return gpt2_style(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=65, max_positions=64
    ).replace(
        hidden_act="gelu",
        attention_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def gpt3(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> ModelConfig:
    """GPT-3, with dense attention in every layer; the paper alternates dense and banded sparse layers."""
    return gpt2_style(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        vocab_size=50257,
        max_positions=2048,
    )


def sc21(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> ModelConfig:
    """The weak-scaling models of SC21: vocabulary 51,200, sequence 2048."""
    return gpt2_style(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        vocab_size=51200,
        max_positions=2048,
    )


def llama2(
    hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, num_key_value_heads: int
) -> ModelConfig:
    """Llama 2 (arXiv 2307.09288)."""
    return ModelConfig(
        family="llama",
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )


def llama3(
    hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, *, tied: bool = False
) -> ModelConfig:
    """Llama 3 (arXiv 2407.21783), 8 key/value heads at every size."""
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=8,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=tied,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def llama3_long(*shape: int, factor: float, tied: bool = False) -> ModelConfig:
    """Llama 3.1 and 3.2: Llama 3 with its context stretched from 8192 to 131072 tokens."""
    scaling = RopeScaling(
        rope_type="llama3",
        factor=factor,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    return llama3(*shape, tied=tied).replace(max_position_embeddings=131072, rope_scaling=scaling)


def qwen2_5(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    *,
    vocab_size: int = 152064,
    tied: bool = False,
    max_positions: int = 131072,
) -> ModelConfig:
    """Qwen2.5 base models (arXiv 2412.15115): biases on q, k and v only."""
    return ModelConfig(
        family="qwen2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=max_positions,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        attention_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_id=151643,
    )


def qwen3(
    hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, *, tied: bool = False
) -> ModelConfig:
    """Qwen3 dense models (arXiv 2505.09388): norms on q and k, 8 key/value heads of 128 at every size."""
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_id=151645,
    )


def mistral_7b() -> ModelConfig:
    """Mistral 7B v0.1 (arXiv 2310.06825), with its sliding window."""
    return ModelConfig(
        family="mistral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        sliding_window=4096,
        bos_token_id=1,
        eos_token_id=2,
    )


_PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "nanogpt-char": nanogpt_char,
    "gpt2": gpt2,
    "gpt2-medium": partial(gpt2, 1024, 24, 16),
    "gpt2-large": partial(gpt2, 1280, 36, 20),
    "gpt2-xl": partial(gpt2, 1600, 48, 25),
    "gpt3-125m": partial(gpt3, 768, 12, 12),
    "gpt3-350m": partial(gpt3, 1024, 24, 16),
    "gpt3-760m": partial(gpt3, 1536, 24, 16),
    "gpt3-1.3b": partial(gpt3, 2048, 24, 16),  # the table's 24 heads of 128 are not 2048 wide: 16 are
    "gpt3-2.7b": partial(gpt3, 2560, 32, 32),
    "gpt3-6.7b": partial(gpt3, 4096, 32, 32),
    "gpt3-13b": partial(gpt3, 5120, 40, 40),  # the table says 5140, which 40 heads of 128 are not
    "gpt3-175b": partial(gpt3, 12288, 96, 96),
    "llama2-7b": partial(llama2, 4096, 11008, 32, 32, 32),
    "llama2-13b": partial(llama2, 5120, 13824, 40, 40, 40),
    "llama2-70b": partial(llama2, 8192, 28672, 80, 64, 8),
    "llama3-8b": partial(llama3, 4096, 14336, 32, 32),
    "llama3-70b": partial(llama3, 8192, 28672, 80, 64),
    "llama3.1-8b": partial(llama3_long, 4096, 14336, 32, 32, factor=8.0),
    "llama3.1-70b": partial(llama3_long, 8192, 28672, 80, 64, factor=8.0),
    "llama3.1-405b": partial(llama3_long, 16384, 53248, 126, 128, factor=8.0),
    "llama3.2-1b": partial(llama3_long, 2048, 8192, 16, 32, factor=32.0, tied=True),
    "llama3.2-3b": partial(llama3_long, 3072, 8192, 28, 24, factor=32.0, tied=True),
    "qwen2.5-0.5b": partial(qwen2_5, 896, 4864, 24, 14, 2, vocab_size=151936, tied=True, max_positions=32768),
    "qwen2.5-1.5b": partial(qwen2_5, 1536, 8960, 28, 12, 2, vocab_size=151936, tied=True),
    "qwen2.5-3b": partial(qwen2_5, 2048, 11008, 36, 16, 2, vocab_size=151936, tied=True, max_positions=32768),
    "qwen2.5-7b": partial(qwen2_5, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": partial(qwen2_5, 5120, 13824, 48, 40, 8),
    "qwen2.5-32b": partial(qwen2_5, 5120, 27648, 64, 40, 8),
    "qwen2.5-72b": partial(qwen2_5, 8192, 29568, 80, 64, 8),
    "qwen3-0.6b": partial(qwen3, 1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": partial(qwen3, 2048, 6144, 28, 16, tied=True),
    "qwen3-4b": partial(qwen3, 2560, 9728, 36, 32, tied=True),
    "qwen3-8b": partial(qwen3, 4096, 12288, 36, 32),
    "qwen3-14b": partial(qwen3, 5120, 17408, 40, 40),
    "qwen3-32b": partial(qwen3, 5120, 25600, 64, 64),
    "mistral-7b": mistral_7b,
    "sc21-1.7b": partial(sc21, 2304, 24, 24),
    "sc21-3.6b": partial(sc21, 3072, 30, 32),
    "sc21-7.5b": partial(sc21, 4096, 36, 32),
    "sc21-18.4b": partial(sc21, 6144, 40, 48),
    "sc21-39.1b": partial(sc21, 8192, 48, 64),
    "sc21-76.1b": partial(sc21, 10240, 60, 80),
    "sc21-145.6b": partial(sc21, 12288, 80, 96),
    "sc21-310.1b": partial(sc21, 16384, 96, 128),
    "sc21-529.6b": partial(sc21, 20480, 105, 128),
    "sc21-1008b": partial(sc21, 25600, 128, 160),
}
