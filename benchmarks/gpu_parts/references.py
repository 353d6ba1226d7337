"""The mathematics of every op in fp64 and plain torch; gradients come from autograd.

Letters: T tokens, H hidden, V vocabulary, Sq queries, Sk keys, N query heads, K kv heads, D head dim, E experts.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """fp64 copies that want gradients."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm of x [..., H] without a bias, LayerNorm with one."""
    if bias is not None:
        return F.layer_norm(x, (x.size(-1),), weight, bias, eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def gated(x: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up of x [T, 2F] = [gate | up]."""
    gate, up = x.chunk(2, dim=-1)
    return act(gate, kind) * up


def act(x: torch.Tensor, kind: str) -> torch.Tensor:
    """silu, gelu or gelu_tanh."""
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, h, D] with its first 2 cos.size(1) columns rotated; cos, sin [T, R/2]."""
    half = cos.size(1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s, rest], dim=-1)


def rope_tables(num_tokens: int, half: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [T, R/2] in fp32, base 10000."""
    frequency = 10000.0 ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
    angle = torch.arange(num_tokens, device=device, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float(), angle.sin().float()


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, window: int = 0, softcap: float = 0.0
) -> torch.Tensor:
    """out [Sq, N, D] of one sequence: q [Sq, N, D], k, v [Sk, K, D]; causal aligned at the end; no visible key: 0."""
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qnd,knd->nqk", q, k) / math.sqrt(q.size(-1))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        i = torch.arange(q.size(0), device=q.device).unsqueeze(1) + k.size(0) - q.size(0)
        j = torch.arange(k.size(0), device=q.device).unsqueeze(0)
        visible = (j <= i) & (i - j < window) if window else j <= i
        scores = scores.masked_fill(~visible, float("-inf"))
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - torch.where(top == float("-inf"), 0.0, top))
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("nqk,knd->qnd", weights / torch.where(total == 0, 1.0, total), v)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: list[int], *, causal: bool, window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """out [T, N, D] of documents packed one after another; tokens past the last offset: 0."""
    parts = [
        attention(q[a:b], k[a:b], v[a:b], causal=causal, window=window, softcap=softcap)
        for a, b in itertools.pairwise(offsets)
        if b > a
    ]
    rest = q.size(0) - offsets[-1]
    return torch.cat([*parts, *([q[offsets[-1] :] * 0.0] if rest else [])])


def adamw(
    p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *, step: int, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(p, m, v) after update number `step`, which counts from 1."""
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g.square() - v)
    p = p * (1 - lr * weight_decay)
    return p - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps), m, v
