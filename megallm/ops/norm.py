"""RMSNorm and LayerNorm over the last dimension.

    rms_norm:    y = x / sqrt(mean(x^2) + eps) * w                       (Zhang, Sennrich, arXiv 1910.07467)
    layer_norm:  y = (x - mean(x)) / sqrt(var(x) + eps) * w + b          (Ba et al., arXiv 1607.06450)

Letters: T rows, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megallm.ops.backends import DEFAULT, Backends


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The specification: statistics in fp32 (fp64 for fp64), the result in x's dtype."""
    wide = x.to(_wide(x))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backends: Backends = DEFAULT) -> torch.Tensor:
    """y [..., H] for x [..., H] and weight [H]; statistics in fp32 (fp64 for fp64)."""
    return norm(x, weight, None, eps, backends=backends)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, backends: Backends = DEFAULT
) -> torch.Tensor:
    """y [..., H] for x [..., H], weight [H] and bias [H]."""
    return norm(x, weight, bias, eps, backends=backends)


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, *, backends: Backends = DEFAULT
) -> torch.Tensor:
    """RMSNorm of x [..., H] without a bias, LayerNorm with one."""
    name = backends.pick("rms_norm" if bias is None else "layer_norm", x, x.size(-1))
    if name == "triton":
        from megallm_kernels.norm import norm as triton_norm

        return triton_norm(x, weight, bias, eps)[0]
    if name == "cuda":
        from megallm_kernels.compiled import rms_norm as cuda_rms_norm

        return cuda_rms_norm(x, weight, eps)[0]
    if name == "apex":
        return _apex_norm(x, weight, bias, eps)
    return _torch_norm(x, weight, bias, eps)


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    backends: Backends = DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, the sum = residual + x), both [..., H]: one pass over memory where the back end fuses them."""
    name = backends.pick("rms_norm" if bias is None else "layer_norm", x, x.size(-1))
    if x.dtype != residual.dtype:  # the fused forms would round the sum to x's dtype
        name = "torch"
    if name == "triton":
        from megallm_kernels.norm import add_norm as triton_add_norm

        return triton_add_norm(x, residual, weight, bias, eps)[:2]
    if name == "cuda":
        from megallm_kernels.compiled import add_rms_norm as cuda_add_rms_norm

        return cuda_add_rms_norm(x, residual, weight, eps)[:2]
    total = residual + x
    return norm(total, weight, bias, eps, backends=backends), total


def _torch_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if bias is not None:
        return F.layer_norm(x, (x.size(-1),), weight, bias, eps)
    if x.is_cuda:
        return F.rms_norm(x, (x.size(-1),), weight, eps)
    # Without gradients (one token of each sequence, when generating) the Function itself would take half the time.
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _rms_norm(x, weight, eps)[0]


def _apex_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    from apex.normalization import fused_layer_norm

    shape = (x.size(-1),)
    if bias is None:
        return fused_layer_norm.fused_rms_norm_affine(x, weight, shape, eps)
    return fused_layer_norm.fused_layer_norm_affine(x, weight, bias, shape, eps)


class _RMSNorm(torch.autograd.Function):
    """Few passes over memory, where torch's CPU form is a chain of elementwise operations."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # type: ignore[override]
        y, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        unit = x * scale  # x / rms, in the wide dtype
        product = unit * dy
        wide_weight = weight.to(unit.dtype)
        # dx = scale (w dy - unit mean(w dy unit));  dw = sum over rows of dy unit
        rows = product.reshape(-1, x.size(-1))
        mean = torch.mv(rows, wide_weight).div_(x.size(-1)).view(scale.shape)
        dweight = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = unit.mul_(mean.neg_()).addcmul_(dy.to(unit.dtype), wide_weight).mul_(scale)
        return dx.to(x.dtype), dweight, None


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [..., H], 1 / rms [..., 1])."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight), scale


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
