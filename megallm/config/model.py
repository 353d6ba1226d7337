"""What a model is: one frozen dataclass that covers every supported family.

A family is nothing but a setting of these fields (`gpt2` = layernorm + learned positions + gelu + biases + tied;
`llama` = rmsnorm + rope + silu-gated + GQA; ...). Names are Hugging Face's wherever it has one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Family = Literal["gpt2", "llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (Hugging Face `rope_scaling`)."""

    rope_type: Literal["linear", "llama3", "yarn"]
    """`linear` (arXiv 2306.15595), `llama3` (Llama 3.1 release) or `yarn` (arXiv 2309.00071)."""
    factor: float = 1.0
    """Context extension factor."""
    original_max_position_embeddings: int | None = None
    """Context length the frequencies were trained with, tokens; None = the model's `max_position_embeddings`."""
    low_freq_factor: float = 1.0
    """llama3 only: wavelengths above original/low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3 only: wavelengths below original/high_freq_factor are kept."""
    beta_fast: float = 32.0
    """yarn only: rotations above which a frequency is kept."""
    beta_slow: float = 1.0
    """yarn only: rotations below which a frequency is divided by `factor`."""
    attention_factor: float | None = None
    """yarn only: multiplies cos and sin; None = the paper's 0.1 ln(factor) + 1."""
    mscale: float | None = None
    """yarn only (DeepSeek's variant): numerator of the attention factor."""
    mscale_all_dim: float | None = None
    """yarn only (DeepSeek's variant): denominator of the attention factor."""
    truncate: bool = True
    """yarn only: round the correction range to whole dimensions, as the paper's code does."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder-only transformer."""

    family: Family
    """Decides the Hugging Face `model_type` written on export; every behaviour below is its own field."""
    vocab_size: int
    """Number of token ids V; padded internally to what tp divides, the padding is never saved."""
    hidden_size: int
    """Width H of the residual stream."""
    intermediate_size: int
    """Width of the MLP's hidden layer."""
    num_hidden_layers: int
    """Number of transformer blocks."""
    num_attention_heads: int
    """Number of query heads N."""
    num_key_value_heads: int
    """Number of key/value heads K (GQA when smaller than N, MQA when 1)."""
    head_dim: int
    """Width D of one head; Qwen3 has D != H / N."""
    max_position_embeddings: int
    """Longest sequence, tokens; the table's length for learned positions."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """`layernorm` has a bias, `rmsnorm` has none."""
    norm_eps: float = 1e-5
    """Added to the (mean) square under the root; HF's `rms_norm_eps` / `layer_norm_epsilon`."""
    position_embedding: Literal["rope", "learned"] = "rope"
    """Rotary on q and k, or a learned table added to the token embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies; None = none."""
    hidden_act: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """MLP activation; `gelu_tanh` is HF's `gelu_new` / `gelu_pytorch_tanh`."""
    gated_mlp: bool = True
    """act(gate) * up (SwiGLU, GEGLU) instead of act(up)."""
    attention_bias: bool = False
    """Bias on q, k, v."""
    attention_out_bias: bool = False
    """Bias on the attention output projection."""
    mlp_bias: bool = False
    """Bias on the MLP's projections."""
    qk_norm: bool = False
    """RMSNorm over head_dim on q and k before rope (Qwen3)."""
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window` - 1 tokens before it; None = all before it."""
    tie_word_embeddings: bool = False
    """lm_head shares the embedding's weight."""
    hidden_dropout: float = 0.0
    """Dropout after the embedding, the attention output and the MLP output."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initial weights."""
    scale_residual_init: bool = True
    """Divide the std of o_proj and down_proj by sqrt(2 * num_hidden_layers) (GPT-2, section 2.3)."""
    head: Literal["lm", "scalar"] = "lm"
    """`lm`: logits over the vocabulary; `scalar`: one number a token (reward and value models)."""
    bos_token_id: int | None = None
    """First id of a document, where the tokenizer has one."""
    eos_token_id: int | None = None
    """Id that ends a document; generation stops at it."""

    def replace(self, **changes: object) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
