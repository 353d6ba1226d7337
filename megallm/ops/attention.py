"""Causal attention over heads, with grouped queries, sliding windows, packed documents and a KV cache.

    out = softmax(q k^T / sqrt(D) + mask) v        (Vaswani et al., arXiv 1706.03762)

    rotary_attention   from the packed qkv projection, rotary embedding included: training
    attention          from q, k, v: with a mask, dropout, or norms of q and k in between

Letters: B batch, S query positions, L key positions, T = B S tokens, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F

from megallm.ops.backends import DEFAULT, FLASH_ATTENTION_4, Backends, flash_attention_module
from megallm.ops.documents import Documents
from megallm.ops.rope import rope


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification: q [B, N, S, D], k and v [B, K, L, D], mask true = visible; keep scales probabilities."""
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    return (weights if keep is None else weights * keep) @ v


def rotary_attention(
    qkv: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    num_heads: int,
    batch_size: int,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    in_place: bool = False,
    backends: Backends = DEFAULT,
) -> torch.Tensor:
    """Causal self-attention of each sequence from its packed projection: qkv [T, N + 2K, D] -> [T, N * D].

    `documents`: what attends to itself alone; None = whole sequences.
    `rotary`: cos and sin [T, D/2], applied to q and k; None = no rotary embedding. `in_place=True` allows a back end to
    rotate q and k inside `qkv`, which the caller must not read again (nor recompute from).
    """
    name = backends.pick("attention", qkv, qkv.size(-1))
    if name == "triton" and (rotary is None or takes_rotary(backends)):
        cos, sin = rotary if rotary is not None else (None, None)
        if rotary is not None:
            backends.take("rope", name, "in place, in front of its attention")
        out = _RotaryAttention.apply(qkv, cos, sin, num_heads, batch_size, sliding_window or 0, documents, in_place)
        return out.flatten(1)
    num_kv_heads = (qkv.size(1) - num_heads) // 2
    qk, v = qkv.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    if rotary is not None:
        qk = rope(qk, *rotary, backends=backends)
    q, k = qk.split([num_heads, num_kv_heads], dim=1)
    q, k, v = (t.unflatten(0, (batch_size, -1)) for t in (q, k, v))
    return attention(q, k, v, sliding_window=sliding_window, documents=documents, backends=backends).flatten(0, 1)


def takes_rotary(backends: Backends) -> bool:
    """Whether Triton's attention also does the rotary embedding in front of it: unless another is forced for that."""
    return backends.forced.get("rope", "triton") == "triton"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sliding_window: int | None = None,
    mask: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    documents: Documents | None = None,
    backends: Backends = DEFAULT,
) -> torch.Tensor:
    """Attention of q [B, S, N, D] over k, v [B, L, K, D] -> [B, S, N * D].

    Without `mask` it is causal (S = L), limited to `sliding_window` positions and to `documents` if given. `mask`
    [B or 1, 1, S, L] bool (true = visible) replaces these. `keep` [B, N, S, L] multiplies the probabilities (dropout).
    """
    assert mask is None or documents is None
    name = backends.pick("attention", q, q.size(-1))
    if name != "torch" and (mask is not None or keep is not None):
        name = backends.take("attention", "torch", "with a mask of its own" if mask is not None else "with dropout")
    if name == "triton":
        return _triton_attention(q, k, v, sliding_window or 0, documents)
    if name == "flash-attn":
        return _flash_attention(q, k, v, sliding_window, documents)
    if documents is not None:
        return _torch_attention_by_document(q, k, v, documents, sliding_window=sliding_window, keep=keep)
    return _torch_attention(q, k, v, sliding_window=sliding_window, mask=mask, keep=keep)


def causal_mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """[S, L] bool: query i (aligned to the end) sees key j when j <= i and i - j < sliding_window."""
    i = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    j = torch.arange(num_keys, device=device).unsqueeze(0)
    mask = j <= i
    return mask if sliding_window is None else mask & (i - j < sliding_window)


def _torch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sliding_window: int | None,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask is None and (keep is not None or (sliding_window is not None and sliding_window < k.size(2))):
        mask = causal_mask(q.size(2), k.size(2), sliding_window, q.device)
    if keep is not None:
        out = attention_reference(q, k, v, mask=mask, keep=keep)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
        )
    return out.transpose(1, 2).reshape(out.size(0), out.size(2), -1)


def _torch_attention_by_document(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    sliding_window: int | None,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """One after another: no work on what is not seen, and not a bit of one document depends on another."""
    seq_length, done, outs = q.size(1), 0, []
    for parts in zip(*(t.flatten(0, 1).split(documents.lengths) for t in (q, k, v)), strict=True):
        row, start = divmod(done, seq_length)
        done += parts[0].size(0)
        stop = start + parts[0].size(0)
        own = None if keep is None else keep[row : row + 1, :, start:stop, start:stop]
        each = (t.unsqueeze(0) for t in parts)
        outs.append(_torch_attention(*each, sliding_window=sliding_window, mask=None, keep=own).squeeze(0))
    return torch.cat(outs).view(q.size(0), seq_length, -1)


def _triton_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, documents: Documents | None
) -> torch.Tensor:
    from megallm_kernels.attention import attention as triton_attention

    sequences = (None, None, q.size(0), q.size(1), k.size(1)) if documents is None else _sequences(documents)
    flat = (t.flatten(0, 1) for t in (q, k, v))
    scale = 1.0 / math.sqrt(q.size(-1))
    deterministic = torch.are_deterministic_algorithms_enabled()
    out, _ = triton_attention(*flat, *sequences, True, window, 0.0, scale, deterministic)
    return out.view(q.size(0), q.size(1), -1)


def _sequences(documents: Documents) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """As the Triton kernels take them: offsets of queries and keys, number, longest."""
    longest = documents.longest
    return documents.offsets, documents.offsets, len(documents.lengths), longest, longest


def _flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding_window: int | None, documents: Documents | None
) -> torch.Tensor:
    """flash-attn 4 or 2, as `flash_attention_module` finds them; both take [B, S, heads, D]."""
    module, _ = flash_attention_module(q.device)
    none = None if module == FLASH_ATTENTION_4 else -1
    window = (none, none) if sliding_window is None else (sliding_window - 1, 0)
    options: dict[str, Any] = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    options |= {"causal": True, "window_size": window}
    functions = importlib.import_module(module)
    if documents is None:
        out = functions.flash_attn_func(q, k, v, **options)
    else:
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents.offsets)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), documents.longest)
        out = functions.flash_attn_varlen_func(*(t.flatten(0, 1) for t in (q, k, v)), **options)
    out = out[0] if isinstance(out, tuple) else out
    return out.view(q.size(0), q.size(1), -1)


class _RotaryAttention(torch.autograd.Function):
    """Rotates q and k where they lie; backward gives the packed gradient, rotated back in its own buffer."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        qkv: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        num_heads: int,
        batch_size: int,
        window: int,
        documents: Documents | None,
        in_place: bool,
    ) -> torch.Tensor:
        from megallm_kernels.attention import packed_attention
        from megallm_kernels.rope import rope_

        num_rotated = (qkv.size(1) + num_heads) // 2  # N + K
        if cos is not None and sin is not None:
            qkv = qkv if in_place else qkv.clone()
            rope_(qkv[:, :num_rotated], cos, sin)
        length = qkv.size(0) // max(batch_size, 1)
        scale = 1.0 / math.sqrt(qkv.size(2))
        deterministic = torch.are_deterministic_algorithms_enabled()
        sequences = (None, None, batch_size, length, length) if documents is None else _sequences(documents)
        settings = (num_heads, *sequences, True, window, 0.0, scale, deterministic)
        out, lse = packed_attention(qkv, *settings)
        ctx.save_for_backward(qkv, out, lse, cos, sin)
        ctx.settings, ctx.num_rotated = settings, num_rotated
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        from megallm_kernels.attention import packed_attention_backward
        from megallm_kernels.rope import rope_

        qkv, out, lse, cos, sin = ctx.saved_tensors
        dqkv = packed_attention_backward(dout, qkv, out, lse, None, *ctx.settings)
        if cos is not None:
            rope_(dqkv[:, : ctx.num_rotated], cos, sin, None, None, True)
        return dqkv, None, None, None, None, None, None, None
