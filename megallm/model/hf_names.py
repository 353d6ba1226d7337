"""Where each parameter lies in a Hugging Face checkpoint, as data.

Our global names are those of Hugging Face's Llama, for every family. Mistral, Qwen2 and Qwen3 use the same ones; GPT-2
has its own, stores its matrices transposed ([in, out], its "Conv1D"), and fuses q, k and v along the outputs:

    transformer.h.0.attn.c_attn.weight  [H, 3H]  =  [ q_proj.weight^T | k_proj.weight^T | v_proj.weight^T ]

Letters: H hidden.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from megallm.config.model import Family, ModelConfig
from megallm.model.counts import parameter_shapes

HEADS = ("lm_head.weight", "score.weight")
"""Global names of what is on top of the layers: of a language model, of a reward or value model."""


@dataclass(frozen=True, kw_only=True)
class HFPlace:
    """Which part of which stored tensor is one global parameter."""

    name: str
    """The stored tensor's name."""
    shape: tuple[int, ...]
    """The stored tensor's shape."""
    is_transposed: bool = False
    """Whether it is stored as [in_features, out_features]."""
    start: int = 0
    """First of the parameter's output features among the stored ones."""
    length: int
    """Number of the parameter's output features (rows of its own dimension 0)."""

    def slices(self, *, dim: int, start: int, length: int) -> tuple[slice, ...]:
        """The part of the stored tensor that is [start, start + length) of the parameter's dimension `dim`.

        What it cuts out still is to be transposed if `is_transposed`.
        """
        own = [slice(self.start, self.start + self.length)] + [slice(None)] * (len(self.shape) - 1)
        first = start + (self.start if dim == 0 else 0)
        own[dim] = slice(first, first + length)
        return tuple(reversed(own)) if self.is_transposed else tuple(own)

    def view(self, stored: torch.Tensor) -> torch.Tensor:
        """The parameter, in its own shape, as a view of the stored tensor."""
        part = stored[self.slices(dim=0, start=0, length=self.length)]
        return part.t() if self.is_transposed else part


def canonical_parameters(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global name and shape of every parameter of `model`, in the order of the model.

    A tied head has none of its own; the scalar head is `score.weight` [1, H].
    """
    return parameter_shapes(model)


def hf_places(model: ModelConfig) -> dict[str, HFPlace]:
    """The place of every global parameter of `model`, under the names that transformers writes."""
    shapes = canonical_parameters(model)
    if model.family != "gpt2":
        return {name: HFPlace(name=name, shape=shape, length=shape[0]) for name, shape in shapes.items()}
    return {name: _gpt2_place(name, shape) for name, shape in shapes.items()}


def base_prefix(family: Family) -> str:
    """What stands before the names of all tensors but the head's; files saved without a head lack it."""
    return "transformer." if family == "gpt2" else "model."


def is_ignorable(stored_name: str) -> bool:
    """Whether a stored tensor is a buffer of old transformers versions: causal masks, rotary frequencies."""
    return _BUFFER.search(stored_name) is not None


_BUFFER = re.compile(r"(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")

_GPT2_OUTER = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.embed_positions.weight": "transformer.wpe.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
    "score.weight": "score.weight",
}
_GPT2_LAYER = {
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_GPT2_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""The parts of c_attn, in their order, all of the same size."""


def _gpt2_place(name: str, shape: tuple[int, ...]) -> HFPlace:
    if name in _GPT2_OUTER:
        return HFPlace(name=_GPT2_OUTER[name], shape=shape, length=shape[0])
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _GPT2_LAYER:
        raise ValueError(f"GPT-2 of transformers has no place for {name}: export the model as another family")
    layer, part, kind = match.groups()
    num_parts = len(_GPT2_FUSED) if part in _GPT2_FUSED else 1
    stored = (shape[0] * num_parts, *shape[1:])
    return HFPlace(
        name=f"transformer.h.{layer}.{_GPT2_LAYER[part]}.{kind}",
        shape=stored[::-1],
        is_transposed=len(shape) == 2,
        start=_GPT2_FUSED.index(part) * shape[0] if num_parts > 1 else 0,
        length=shape[0],
    )
