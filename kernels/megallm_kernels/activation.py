"""MLP activations: SwiGLU, GEGLU (arXiv 2002.05202) on the packed projection, and the plain ones.

    gated   y = act(gate) up        x = [gate | up]      dgate = dy up act'(gate),  dup = dy act(gate)
    plain   y = act(x)                                   dx = dy act'(x)

    silu       act(g) = g s(g)                 act' = s (1 + g (1 - s)),  s the logistic function
    gelu       act(g) = g Phi(g)               act' = Phi + g phi          (arXiv 1606.08415, exact: erf)
    gelu_tanh  act(g) = g (1 + tanh u) / 2     u = sqrt(2/pi) (g + 0.044715 g^3)

Saved for backward: the input alone; act is computed again. Bytes per element of y in bf16: forward 6, backward 10
(plain: 4 and 6). Tiling: a program holds a piece of BLOCK columns of one row. Arithmetic in fp32, rounded once at the
store.
int64: row numbers are widened before they meet a stride.

Letters: T rows, F features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megallm_kernels.device import on_its_device
from megallm_kernels.rows import next_power_of_2

KINDS = ("silu", "gelu", "gelu_tanh")

_SETTINGS = ((512, 1), (1024, 2), (1 << 30, 4))
"""(largest block, warps): eight or sixteen numbers a thread and operand, one or two 16-byte accesses in bf16."""
_MAX_BLOCK = 1024


def plan(features: int) -> tuple[int, int]:
    """(BLOCK, warps) for rows of F features."""
    block = min(next_power_of_2(features), _MAX_BLOCK)
    return block, next(warps for largest, warps in _SETTINGS if block <= largest)


@triton.jit
def _act(g, KIND: tl.constexpr):
    """(act(g), act'(g)) in fp32."""
    if KIND == "silu":
        s = tl.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    elif KIND == "gelu":
        cumulative = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cumulative, cumulative + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        half = tl.sigmoid(2.0 * inner)  # (1 + tanh(inner)) / 2
        slope = 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        return g * half, half + g * 2.0 * half * (1.0 - half) * slope


@triton.jit
def forward_kernel(x, y, features, x_row, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr):
    """One piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    x += row * x_row
    result, _ = _act(tl.load(x + column, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        result *= tl.load(x + features + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * features + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy, x, dx, features, dy_row, x_row, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr
):
    """One piece of one row; dx is packed as x is, and contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    x += row * x_row
    d = tl.load(dy + row * dy_row + column, mask=inside, other=0.0)
    gate = tl.load(x + column, mask=inside, other=0.0)
    up = tl.load(x + features + column, mask=inside, other=0.0) if GATED else gate  # all loads before any arithmetic
    d = d.to(tl.float32)
    value, slope = _act(gate.to(tl.float32), KIND)
    if GATED:
        dx += row * 2 * features
        tl.store(dx + features + column, (d * value).to(dx.dtype.element_ty), mask=inside)
        d *= up.to(tl.float32)
    else:
        dx += row * features
    tl.store(dx + column, (d * slope).to(dx.dtype.element_ty), mask=inside)


def _as_matrix(x: torch.Tensor) -> torch.Tensor:
    """[..., n] as [T, n] with unit stride along n; a view where strides allow it."""
    x = x if x.stride(-1) == 1 or x.size(-1) <= 1 else x.contiguous()
    return x.reshape(-1, x.size(-1)) if x.dim() != 2 else x


def _features(x: torch.Tensor, kind: str, gated: bool) -> int:
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if gated and x.size(-1) % 2:
        raise ValueError(f"a gated activation takes [gate | up], an even number of columns, got {x.size(-1)}")
    return x.size(-1) // 2 if gated else x.size(-1)


@torch.library.custom_op("megallm_kernels::activation", mutates_args=())
@on_its_device
def activation(x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    """act(gate) * up of x [..., 2F] if gated, else act(x) of x [..., F] -> [..., F]. Differentiable."""
    features = _features(x, kind, gated)
    y = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    if y.numel():
        rows = _as_matrix(x)
        block, num_warps = plan(features)
        forward_kernel[(rows.size(0), triton.cdiv(features, block))](
            rows, y, features, rows.stride(0), BLOCK=block, KIND=kind, GATED=gated, num_warps=num_warps
        )
    return y


@torch.library.custom_op("megallm_kernels::activation_backward", mutates_args=())
@on_its_device
def activation_backward(dy: torch.Tensor, x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    """The gradient of x, packed as x is: [..., 2F] if gated, else [..., F]."""
    features = _features(x, kind, gated)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        rows, drows = _as_matrix(x), _as_matrix(dy)
        block, num_warps = plan(features)
        backward_kernel[(rows.size(0), triton.cdiv(features, block))](
            drows, rows, dx, features, drows.stride(0), rows.stride(0),
            BLOCK=block, KIND=kind, GATED=gated, num_warps=num_warps,
        )  # fmt: skip
    return dx


@activation.register_fake
def _activation_fake(x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.size(-1) // 2 if gated else x.size(-1)))


@activation_backward.register_fake
def _activation_backward_fake(dy: torch.Tensor, x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.kind, ctx.gated = inputs
    ctx.save_for_backward(x)


def _activation_grad(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return activation_backward(dy, x, ctx.kind, ctx.gated), None, None


activation.register_autograd(_activation_grad, setup_context=_save)
