"""Makes this rank's parameters together with their ParamSpecs, and fills them with initial values.

Letters: H hidden, N query heads, K key/value heads, D head dim, F intermediate, V vocabulary, t tp size.
"""

from __future__ import annotations

import torch
from torch import nn

from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.model.fp8 import has_fp8
from megallm.ops.backends import DEFAULT, Backends
from megallm.ops.fp8 import Fp8Recipe
from megallm.parallel import random
from megallm.parallel.layout import ParamSpec, Piece, shard_range, whole
from megallm.parallel.lora import Switch
from megallm.parallel.mesh import Mesh
from megallm.parallel.nf4 import Nf4Products, Nf4Weight
from megallm.parallel.products import PLAIN, Fp8Products, Products

WIDE_VOCABULARY = 4096
"""From here on local rows are padded to a multiple of 64, which GEMM kernels like."""


class ParameterFactory:
    """Creates parameters on one mesh in one dtype and remembers each one's spec."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        sequence_parallel: bool,
        tied_copies: bool,
        backends: Backends = DEFAULT,
        fp8: Fp8Recipe | None = None,
        lora: LoraConfig | None = None,
        allocate: bool = True,
    ) -> None:
        """fp8: how the layers' linears multiply, None = in `dtype`. lora: which adapters they have, None = none.

        allocate: whether parameters have memory from the start; without, somebody else's takes its place."""
        self.config = config
        self.mesh = mesh
        self.backends = backends
        """What the layers run their fused operations on."""
        self.lora = lora
        self.adapters = Switch()
        """The switch of all adapters."""
        self.sequence_parallel = sequence_parallel and mesh.tp.size > 1
        self.specs: dict[nn.Parameter, ParamSpec] = {}
        self.quantized: dict[nn.Parameter, Nf4Weight] = {}
        """The weights that are in 4 bits."""
        self._dtype, self._allocate, self._fp8 = dtype, allocate, fp8
        self._tied_copies = tied_copies
        """Whether the tied embedding lives on two pipeline ranks."""

    def column(self, names: list[tuple[str, int]], in_features: int) -> nn.Parameter:
        """[sum of out/t, in]: matrices `(name, out_features)` cut along their rows and stacked."""
        pieces, rows = [], 0
        for name, out_features in names:
            size, start, length = shard_range(out_features, self.mesh.tp)
            pieces.append(
                Piece(name=name, shape=(out_features, in_features), start=start, length=length, offset=rows)
            )
            rows += size
        return self.make((rows, in_features), ParamSpec(pieces=tuple(pieces), std=self.config.initializer_range))

    def column_bias(self, names: list[tuple[str, int]]) -> nn.Parameter:
        """[sum of out/t]: the biases of `column`."""
        pieces, rows = [], 0
        for name, features in names:
            size, start, length = shard_range(features, self.mesh.tp)
            pieces.append(Piece(name=name, shape=(features,), start=start, length=length, offset=rows))
            rows += size
        return self.make((rows,), ParamSpec(pieces=tuple(pieces), init="zeros", weight_decay=False))

    def qkv(self, prefix: str) -> nn.Parameter:
        """[(N + 2 K') D / t, H]: this rank's query heads, then its key heads, then its value heads."""
        spec = ParamSpec(pieces=self._qkv_pieces(prefix, "weight"), std=self.config.initializer_range)
        return self.make((_rows(spec), self.config.hidden_size), spec)

    def qkv_bias(self, prefix: str) -> nn.Parameter:
        """[(N + 2 K') D / t]: the bias of `qkv`."""
        spec = ParamSpec(pieces=self._qkv_pieces(prefix, "bias"), init="zeros", weight_decay=False)
        return self.make((_rows(spec),), spec)

    def row(self, name: str, out_features: int, in_features: int, *, std: float) -> nn.Parameter:
        """[out, in/t]: a matrix cut along its columns."""
        size, start, length = shard_range(in_features, self.mesh.tp)
        piece = Piece(name=name, shape=(out_features, in_features), dim=1, start=start, length=length)
        return self.make((out_features, size), ParamSpec(pieces=(piece,), std=std))

    def vocab(self, name: str, *, tied: bool) -> nn.Parameter:
        """[V'/t, H]: an embedding or head cut along the padded vocabulary; padding rows are zero."""
        vocab_size, hidden_size = self.config.vocab_size, self.config.hidden_size
        multiple = 64 if vocab_size >= WIDE_VOCABULARY else 1
        size, start, length = shard_range(vocab_size, self.mesh.tp, multiple=multiple)
        piece = Piece(name=name, shape=(vocab_size, hidden_size), start=start, length=length)
        std = self.config.initializer_range
        return self.make((size, hidden_size), ParamSpec(pieces=(piece,), std=std, tied=tied and self._tied_copies))

    def replicated(self, name: str, shape: tuple[int, ...], *, init: str, partial: bool | None = None) -> nn.Parameter:
        """A vector or small table that every tp rank holds.

        `partial`: whether each tp rank's gradient covers only part of the tokens or heads (default: under sequence
        parallelism).
        """
        is_partial = self.sequence_parallel if partial is None else partial and self.mesh.tp.size > 1
        spec = ParamSpec(
            pieces=(whole(name, shape),),
            init=init,  # type: ignore[arg-type]
            std=self.config.initializer_range,
            weight_decay=False,
            tp_replicated=True,
            tp_partial=is_partial,
        )
        return self.make(shape, spec)

    def products(self, weight: nn.Parameter, *, layer: int) -> Products:
        """What a linear of `layer` with this weight multiplies with."""
        if self.lora is not None and self.lora.is_nf4:
            double = self.lora.lora_double_quant
            held = self.quantized[weight] = Nf4Weight(
                weight, self.specs[weight], tp=self.mesh.tp, double_quant=double, backends=self.backends
            )
            return Nf4Products(held)
        if self._fp8 is None or not has_fp8(self._fp8, self.config, layer=layer, shape=weight.shape):
            return PLAIN
        return Fp8Products(self._fp8)

    def make(self, shape: tuple[int, ...], spec: ParamSpec) -> nn.Parameter:
        """A parameter of this local shape; its spec is remembered."""
        parameter = nn.Parameter(torch.empty(shape, dtype=self._dtype, device=self.mesh.device))
        if self._allocate:
            parameter.data.zero_()
        else:
            parameter.data.untyped_storage().resize_(0)
        self.specs[parameter] = spec
        return parameter

    def _qkv_pieces(self, prefix: str, suffix: str) -> tuple[Piece, ...]:
        config, tp = self.config, self.mesh.tp
        trailing = (config.hidden_size,) if suffix == "weight" else ()
        q_heads = config.num_attention_heads // tp.size
        kv_heads = max(config.num_key_value_heads // tp.size, 1)
        replicas = max(tp.size // config.num_key_value_heads, 1)
        pieces, offset = [], 0
        for name, total, heads, first, copies in (
            ("q_proj", config.num_attention_heads, q_heads, tp.rank * q_heads, 1),
            ("k_proj", config.num_key_value_heads, kv_heads, tp.rank // replicas * kv_heads, replicas),
            ("v_proj", config.num_key_value_heads, kv_heads, tp.rank // replicas * kv_heads, replicas),
        ):
            piece = Piece(
                name=f"{prefix}.{name}.{suffix}",
                shape=(total * config.head_dim, *trailing),
                start=first * config.head_dim,
                length=heads * config.head_dim,
                offset=offset,
                replicas=copies,
            )
            pieces.append(piece)
            offset += piece.length
        return tuple(pieces)


@torch.no_grad()
def initialize_(parameter: torch.Tensor, spec: ParamSpec, *, seed: int) -> None:
    """Fills a local parameter with its slices of the layout-independent initial weights."""
    for piece in spec.pieces:
        view = piece.local(parameter)
        if spec.init in ("normal", "uniform"):
            draw_ = random.normal_ if spec.init == "normal" else random.uniform_
            key = random.key(seed, "init", piece.name)
            draw_(view, key=key, start=piece.local_start, shape=piece.shape, std=spec.std)
        else:
            view.fill_(1.0 if spec.init == "ones" else 0.0)


def _rows(spec: ParamSpec) -> int:
    return sum(piece.length for piece in spec.pieces)
