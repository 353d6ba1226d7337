"""Causal attention over heads, with grouped queries, sliding windows and a KV cache.

    out = softmax(q k^T / sqrt(D) + mask) v        (Vaswani et al., arXiv 1706.03762)

Letters: B batch, S query positions, L key positions, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


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


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sliding_window: int | None = None,
    mask: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [B, S, N, D] over k, v [B, L, K, D] -> [B, S, N * D].

    Without `mask` it is causal (S = L), limited to `sliding_window` positions if given. `mask` [B or 1, 1, S, L] bool
    (true = visible) replaces both. `keep` [B, N, S, L] multiplies the probabilities (dropout).
    """
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


def causal_mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """[S, L] bool: query i (aligned to the end) sees key j when j <= i and i - j < sliding_window."""
    i = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    j = torch.arange(num_keys, device=device).unsqueeze(0)
    mask = j <= i
    return mask if sliding_window is None else mask & (i - j < sliding_window)
