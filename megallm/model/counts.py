"""Parameters, FLOPs and activation bytes of a model, from its shape alone.

Conventions, so that figures compare with published ones:
- A matrix product of [m, k] x [k, n] is 2 m k n FLOPs; backward is twice forward. Norms, activations, softmax, biases,
  the embedding lookup and the optimizer are not counted.
- *Model* FLOPs are what the mathematics needs, *hardware* FLOPs add what recomputation repeats: MFU and HFU.
- Attention counts the full S x S scores, although a causal kernel skips half, as arXiv 2205.05198 (K22), 2104.04473
  (SC21) and PaLM (arXiv 2204.02311, appendix B) do. A sliding window counts the window.

Letters: B batch, S sequence, H hidden, I intermediate, N query heads, K kv heads, D head dim, V vocab, L layers, t tp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megallm.config.model import ModelConfig

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Number of parameters of each part; a tied head counts once, in `embedding`."""

    embedding: int
    """Token embedding, V H."""
    positions: int
    """Learned position table."""
    attention: int
    """q, k, v, o of all layers, with biases and q/k norms."""
    mlp: int
    """gate, up, down of all layers, with biases."""
    norms: int
    """Layer norms of all layers and the final norm."""
    head: int
    """lm_head or score."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.without_embedding + self.embedding + self.positions + self.head

    @property
    def without_embedding(self) -> int:
        """Parameters of the blocks and the final norm: neither embeddings nor head."""
        return self.attention + self.mlp + self.norms


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and full, unpadded shape of every parameter, in the order of the model."""
    hidden = model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    if model.position_embedding == "learned":
        shapes["model.embed_positions.weight"] = (model.max_position_embeddings, hidden)
    for i in range(model.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in _layer_shapes(model).items()}
    shapes |= {f"model.norm.{part}": (hidden,) for part in _norm_parts(model)}
    if model.head == "scalar":
        shapes["score.weight"] = (1, hidden)
    elif not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Exact number of parameters by part."""
    layer = {name: math.prod(shape) for name, shape in _layer_shapes(model).items()}
    layers = model.num_hidden_layers

    def of_layers(part: str) -> int:
        return layers * sum(count for name, count in layer.items() if part in name)

    head = model.hidden_size if model.head == "scalar" else 0 if model.tie_word_embeddings else _vocab_matrix(model)
    return ParameterCounts(
        embedding=_vocab_matrix(model),
        positions=model.max_position_embeddings * model.hidden_size if model.position_embedding == "learned" else 0,
        attention=of_layers("self_attn."),
        mlp=of_layers("mlp."),
        norms=of_layers("layernorm.") + len(_norm_parts(model)) * model.hidden_size,
        head=head,
    )


def matmul_parameters(model: ModelConfig) -> int:
    """Entries of the matrices that multiply every token: attention, MLP and head (also a tied one); no embedding
    lookup, no biases, no norms."""
    layer = sum(math.prod(shape) for shape in _layer_shapes(model).values() if len(shape) == 2)
    return model.num_hidden_layers * layer + _head_matrix(model)


def model_flops_per_token(model: ModelConfig, *, seq_length: int) -> int:
    """FLOPs of forward and backward for one token of a sequence of `seq_length`.

    6 x matmul_parameters + 12 L N D S: each matrix costs 2 FLOPs an entry in forward and 4 in backward; scores and
    their product with the values cost 2 S N D each in forward. For GPT shapes (I = 4 H, N D = K D = H) a batch of B
    sequences costs 72 B L S H^2 (1 + S/(6 H) + V/(12 H L)), which is K22, equation 7.
    """
    return 6 * matmul_parameters(model) + 3 * _attention_forward(model, seq_length)


def hardware_flops_per_token(model: ModelConfig, *, seq_length: int, recompute: Recompute) -> int:
    """`model_flops_per_token` and the forward FLOPs that `recompute` repeats in backward.

    `full` repeats every layer, not the head: for GPT shapes 96 B L S H^2 (1 + S/(6 H) + V/(16 H L)), SC21 section 5.1.
    `selective` repeats one forward of the scores and of their product with the values, 4 S N D per layer. (K22's
    equation 8 has s/(3h), 12 S H per layer, three times that; its HFU column is so 0.5 to 1.4 points above ours.)
    """
    flops = model_flops_per_token(model, seq_length=seq_length)
    if recompute == "selective":
        return flops + _attention_forward(model, seq_length)
    if recompute == "full":
        return flops + 2 * (matmul_parameters(model) - _head_matrix(model)) + _attention_forward(model, seq_length)
    return flops


def activation_bytes_per_layer(
    model: ModelConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    tp: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    flash_attention: bool = False,
    element_bytes: int = 2,
) -> float:
    """Bytes that one rank keeps of one layer and one microbatch between forward and backward.

    K22, section 4, tensor by tensor, so that it also holds for GQA, gated MLPs and no dropout: with GPT shapes, both
    dropouts on and 2-byte elements it is s b h (34 + 5 a s / h) and its tp, sp and selective forms (table 2).
    `flash_attention` keeps one fp32 log-sum-exp a row instead of the scores; `selective` keeps neither; `full` keeps
    the layer's input only.
    """
    tokens, hidden = seq_length * micro_batch_size, model.hidden_size
    token_shards = tp if sequence_parallel else 1
    if recompute == "full":  # K22 keeps the input whole on every rank; ours is sharded with the tokens
        return element_bytes * tokens * hidden / token_shards
    queries = model.num_attention_heads * model.head_dim
    keys_values = 2 * max(model.num_key_value_heads, tp) * model.head_dim  # with K < tp every rank holds one kv head
    # Inputs of the two norms, of qkv and of the MLP, which are replicated (or sharded by tokens) ...
    replicated = float(4 * element_bytes * hidden)
    # ... and one byte a dropped element of the attention's and the MLP's output.
    replicated += 2 * hidden if model.hidden_dropout > 0.0 else 0
    # q, k, v; the input of o_proj; with q/k norms also their inputs.
    sharded = float(element_bytes * (2 * queries + keys_values))
    if model.qk_norm:
        sharded += element_bytes * (queries + keys_values // 2)
    # Inputs of the activation and of down_proj: gate, up and their product, or up and act(up).
    sharded += element_bytes * (3 if model.gated_mlp else 2) * model.intermediate_size
    if recompute == "none":
        sharded += _attention_core_bytes(model, seq_length, flash_attention, element_bytes)
    return tokens * (replicated / token_shards + sharded / tp)


def _layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names below `model.layers.{i}.` and shapes [out_features, in_features] of one block."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    linears: list[tuple[str, int, int, bool]] = [
        ("self_attn.q_proj", queries, hidden, model.attention_bias),
        ("self_attn.k_proj", keys, hidden, model.attention_bias),
        ("self_attn.v_proj", keys, hidden, model.attention_bias),
        ("self_attn.o_proj", hidden, queries, model.attention_out_bias),
        *([("mlp.gate_proj", inner, hidden, model.mlp_bias)] if model.gated_mlp else []),
        ("mlp.up_proj", inner, hidden, model.mlp_bias),
        ("mlp.down_proj", hidden, inner, model.mlp_bias),
    ]
    shapes: dict[str, tuple[int, ...]] = {f"input_layernorm.{part}": (hidden,) for part in _norm_parts(model)}
    for name, rows, columns, has_bias in linears:
        if name == "self_attn.o_proj" and model.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (model.head_dim,), "self_attn.k_norm.weight": (model.head_dim,)}
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
        if name == "self_attn.o_proj":
            shapes |= {f"post_attention_layernorm.{part}": (hidden,) for part in _norm_parts(model)}
    return shapes


def _norm_parts(model: ModelConfig) -> tuple[str, ...]:
    return ("weight", "bias") if model.norm == "layernorm" else ("weight",)


def _vocab_matrix(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def _head_matrix(model: ModelConfig) -> int:
    return model.hidden_size if model.head == "scalar" else _vocab_matrix(model)


def _attention_forward(model: ModelConfig, seq_length: int) -> int:
    """FLOPs of q k^T and of probabilities x v of all layers, for one token."""
    attended = min(seq_length, model.sliding_window or seq_length)
    return 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * attended


def _attention_core_bytes(model: ModelConfig, seq_length: int, flash_attention: bool, element_bytes: int) -> int:
    """Bytes a token that softmax and dropout of the scores keep: [N, S] probabilities, a mask, the dropped ones."""
    if flash_attention:
        return 4 * model.num_attention_heads
    a_score = 2 * element_bytes + 1 if model.attention_dropout > 0.0 else element_bytes
    return a_score * model.num_attention_heads * seq_length
