"""Attention of one new token a sequence to its cache.

    dense_decode_attention   to keys and values that lie together, with a bias that hides cells: torch
    paged_decode_attention   to pages where they lie: Triton

The cache, its cells and pages: megallm/generate/cache.py.

Letters: B sequences, N query heads, K key/value heads, D head dim, L cells, P pages a sequence.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from megallm.ops.attention import attention_reference


def decode_attention_reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, *,
    window: int | None,
) -> torch.Tensor:  # fmt: skip
    """The specification: q [B, N, D], pools [pages, K, cells, D], table [B, P], positions [B] -> [B, N * D].

    Cell c holds the newest position up to that of the sequence which is c modulo all cells of the sequence.
    """
    k, v = (pool[table].transpose(1, 2).flatten(2, 3) for pool in (keys, values))  # [B, K, L, D]
    at, cells = positions.unsqueeze(1), torch.arange(k.size(2), device=q.device)
    age = (at - cells) % k.size(2)
    seen = (age <= at) if window is None else (age <= at) & (age < window)
    return attention_reference(q.unsqueeze(2), k, v, mask=seen[:, None, None]).flatten(1)


def dense_decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """q [B, N, D] over k, v [B, K, L, D] -> [B, N * D].

    bias [B, 1, L] in q's dtype is added to the scores: 0, or -inf where a sequence does not see. On CPUs two batched
    products, which read k and v where they lie: 326 us, SDPA 481 (B 32, N 8, K 4, L 160, D 32, fp32, one thread).
    """
    batch_size, num_heads, dim = q.shape
    num_kv_heads, length = k.size(1), k.size(2)
    q = q.reshape(batch_size, num_kv_heads, -1, dim)  # the queries of a key/value head together
    if q.is_cuda or q.dtype not in (torch.float32, torch.float64):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(1))
        return out.reshape(batch_size, num_heads * dim)
    scores = torch.bmm((q * (1.0 / math.sqrt(dim))).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    scores.view(batch_size, num_heads, length).add_(bias)
    return torch.bmm(torch.softmax(scores, dim=-1), v.flatten(0, 1)).view(batch_size, num_heads * dim)


def paged_decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, *,
    window: int | None,
) -> torch.Tensor:  # fmt: skip
    """As the reference, on Triton: reads the cells that a sequence sees, once, and gathers nothing."""
    from megallm_kernels.decode_attention import decode_attention

    scale = 1.0 / math.sqrt(q.size(-1))
    out: torch.Tensor = decode_attention(q, keys, values, table, positions, window or 0, scale)
    return out.flatten(1)
