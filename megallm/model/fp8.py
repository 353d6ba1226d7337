"""Which linears of a model have fp8 products, and whether they can run: known before the model is built."""

from __future__ import annotations

import torch

from megallm.config.model import ModelConfig
from megallm.ops.fp8 import MULTIPLE, Fp8Recipe, fits, hardware_refusal


def linear_shapes(config: ModelConfig, *, tp: int) -> dict[str, tuple[int, int]]:
    """[out, in] of the weights of every layer's linears, as one of `tp` ranks holds them."""
    hidden, inner = config.hidden_size, -(-config.intermediate_size // tp)
    heads, kv_heads = config.num_attention_heads // tp, max(config.num_key_value_heads // tp, 1)
    return {
        "qkv_proj": ((heads + 2 * kv_heads) * config.head_dim, hidden),
        "o_proj": (hidden, heads * config.head_dim),
        "gate_up_proj": (inner * (2 if config.gated_mlp else 1), hidden),
        "down_proj": (hidden, inner),
    }


def has_fp8(recipe: Fp8Recipe, config: ModelConfig, *, layer: int, shape: tuple[int, ...]) -> bool:
    """Whether a linear of `layer` (0-based, of the whole model) with a weight of `shape` has fp8 products."""
    is_end = layer in (0, config.num_hidden_layers - 1)
    return fits(shape) and not (recipe.keep_ends and is_end)


def check_fp8(recipe: Fp8Recipe | None, config: ModelConfig, *, tp: int, device: torch.device) -> list[str]:
    """Warnings about linears that stay in bf16; ValueError if the device cannot multiply in fp8, or no linear would."""
    if recipe is None:
        return []
    refusal = None if recipe.emulate else hardware_refusal(device)
    if refusal is not None:
        raise ValueError(f"precision fp8 {refusal}: use precision bf16, or fp8_emulate to study fp8's rounding")
    shapes = linear_shapes(config, tp=tp)
    odd = {name: f"{name} {rows} x {columns}" for name, (rows, columns) in shapes.items() if not fits((rows, columns))}
    if len(odd) == len(shapes):
        raise ValueError(
            f"precision fp8: no linear of this model at tp {tp} has sides that are multiples of {MULTIPLE} "
            f"({', '.join(odd.values())}): use precision bf16{', or a smaller tp' if tp > 1 else ''}"
        )
    if recipe.keep_ends and config.num_hidden_layers <= 2:
        raise ValueError(
            f"fp8_keep_ends with num_hidden_layers {config.num_hidden_layers} leaves no layer in fp8: leave it out, "
            "or use precision bf16"
        )
    if not odd:
        return []
    return [f"precision fp8: {', '.join(odd.values())} is not in multiples of {MULTIPLE}, so it stays in bf16"]
