"""Rotary position embedding (Su et al., arXiv 2104.09864), Hugging Face's half-split convention.

    y1 = x1 cos - x2 sin        x = [x1 | x2], the halves of a head
    y2 = x2 cos + x1 sin        angle of (position p, pair i) = p * inv_freq[i]

The map is a rotation: its backward is the rotation by the opposite angle.

Letters: T tokens, D head dim, h heads.
"""

from __future__ import annotations

from typing import Any

import torch

from megallm.ops.backends import DEFAULT, Backends


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The specification: x [T, h, D], cos and sin [T, D/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backends: Backends = DEFAULT) -> torch.Tensor:
    """x [T, h, D] (any strides) rotated by the angles whose cos and sin are [T, D/2], in x's dtype; a new tensor."""
    name = backends.pick("rope", x, x.size(-1))
    if name == "triton":
        from megallm_kernels.rope import rope as triton_rope

        return triton_rope(x, cos, sin)
    if name == "cuda":
        from megallm_kernels.compiled import rope as cuda_rope

        return cuda_rope(x, cos, sin)
    return _Rope.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin, sign=1.0)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, sign=1.0)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, sign=-1.0), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, sign: float) -> torch.Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x1, c, out=out[..., :half])
    torch.mul(x2, c, out=out[..., half:])
    out[..., :half].addcmul_(x2, s, value=-sign)
    out[..., half:].addcmul_(x1, s, value=sign)
    return out
