"""Self-attention of one layer, heads cut over tp.

Letters: B sequences, S positions, T = B * S tokens, H hidden, N query heads, K key/value heads, D head dim, t tp size.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megallm.config.model import ModelConfig
from megallm.model.context import TokenContext
from megallm.model.lora import make_adapter, project
from megallm.model.parameters import ParameterFactory
from megallm.ops.attention import attention, rotary_attention
from megallm.ops.norm import rms_norm
from megallm.ops.rope import rope
from megallm.parallel.linear import ColumnLinear, RowLinear


class SelfAttention(nn.Module):
    """qkv projection, rotary embedding, causal attention, output projection: [T', H] -> [T', H], T' = T or T/t."""

    def __init__(self, factory: ParameterFactory, *, layer: int, std_out: float, recompute: bool) -> None:
        super().__init__()
        config, tp = factory.config, factory.mesh.tp
        self._config, self._layer, self._recompute = config, layer, recompute
        self._backends = factory.backends
        self._num_heads = config.num_attention_heads // tp.size
        self._num_kv_heads = max(config.num_key_value_heads // tp.size, 1)
        self._first_head = tp.rank * self._num_heads
        prefix = f"model.layers.{layer}.self_attn"
        sequence_parallel = factory.sequence_parallel
        weight = factory.qkv(prefix)
        self.qkv_proj = ColumnLinear(
            weight,
            factory.qkv_bias(prefix) if config.attention_bias else None,
            tp=tp,
            sequence_parallel=sequence_parallel,
            products=factory.products(weight, layer=layer),
        )
        width = config.num_attention_heads * config.head_dim
        weight = factory.row(f"{prefix}.o_proj.weight", config.hidden_size, width, std=std_out)
        self.o_proj = RowLinear(
            weight,
            factory.replicated(f"{prefix}.o_proj.bias", (config.hidden_size,), init="zeros")
            if config.attention_out_bias
            else None,
            tp=tp,
            sequence_parallel=sequence_parallel,
            products=factory.products(weight, layer=layer),
        )
        self.qkv_adapter, self.o_adapter = make_adapter(factory, self.qkv_proj), make_adapter(factory, self.o_proj)
        self.q_norm = self.k_norm = None
        if config.qk_norm:  # each rank sees its own heads only, so the gradient is partial even without SP
            self.q_norm = factory.replicated(f"{prefix}.q_norm.weight", (config.head_dim,), init="ones", partial=True)
            self.k_norm = factory.replicated(f"{prefix}.k_norm.weight", (config.head_dim,), init="ones", partial=True)

    def forward(
        self,
        x: torch.Tensor,
        context: TokenContext,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        outputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T', H]; rotary = cos and sin [T, D/2], None with learned positions; outputs: see Block.forward."""
        qkv = project(self.qkv_proj, self.qkv_adapter, x, context)  # [T, (N + 2K) D / t]
        if self._recompute and torch.is_grad_enabled():
            mixed = checkpoint(self._mix, qkv, context, rotary, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._mix(qkv, context, rotary)
        if outputs is not None:
            mixed = mixed.index_select(0, outputs)
        return project(self.o_proj, self.o_adapter, mixed, context)

    def _mix(
        self, qkv: torch.Tensor, context: TokenContext, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """[T, (N + 2K) D / t] -> [T, N D / t]: everything between the two projections."""
        config, backends = self._config, self._backends
        heads, kv_heads, dim = self._num_heads, self._num_kv_heads, config.head_dim
        qkv = qkv.view(qkv.size(0), heads + 2 * kv_heads, dim)
        window = config.sliding_window
        keep = _dropout_keep(config, context, self._layer, self._first_head, heads)
        if self.q_norm is None and context.cache is None and keep is None:
            return rotary_attention(
                qkv, rotary, num_heads=heads, batch_size=context.batch_size, sliding_window=window,
                documents=context.documents, in_place=not self._recompute, backends=backends,
            )  # fmt: skip
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        if self.q_norm is None and rotary is not None:
            qk = rope(qk, *rotary, backends=backends)
        q, k = qk.split([heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, config.norm_eps, backends=backends)
            k = rms_norm(k, self.k_norm, config.norm_eps, backends=backends)
            if rotary is not None:
                q, k = rope(q, *rotary, backends=backends), rope(k, *rotary, backends=backends)
        if context.cache is not None:
            out = context.cache.attend(self._layer, q, k, v)
            if out is not None:
                return out
        q, k, v = (t.unflatten(0, (context.batch_size, context.seq_length)) for t in (q, k, v))
        keep = None if keep is None else keep.to(q.dtype)
        out = attention(
            q, k, v, sliding_window=window, keep=keep, documents=context.documents, backends=backends
        )  # fmt: skip
        return out.view(-1, heads * dim)


def _dropout_keep(
    config: ModelConfig, context: TokenContext, layer: int, first_head: int, num_heads: int
) -> torch.Tensor | None:
    if context.dropout is None or config.attention_dropout == 0.0:
        return None
    return context.dropout.attention(
        config.attention_dropout,
        layer=layer,
        first_head=first_head,
        num_heads=num_heads,
        all_heads=config.num_attention_heads,
        seq_length=context.seq_length,
    )
