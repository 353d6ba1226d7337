"""Attention as differentiable operators: of q, k, v, or of the packed projection they are slices of.

    attention          (q, k, v)             -> (out, lse)
    packed_attention   qkv [T, N + 2K, D]    -> (out, lse); its gradient is one buffer too, nothing is concatenated

Both results are differentiable: ring attention joins partial results by their lse. Saved for backward: the inputs, out
and lse; probabilities are recomputed there. The formulas are in attention_forward.py and attention_backward.py.

Letters: Tq query tokens, Tk key tokens, T = Tq = Tk, B sequences, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from megallm_kernels import attention_backward as backward_pass
from megallm_kernels import attention_forward as forward_pass

_Tensors = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op("megallm_kernels::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None, batch_size: int, max_seqlen_q: int, max_seqlen_k: int, causal: bool, window: int,
    softcap: float, scale: float, deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out [Tq, N, D], lse [N, Tq] fp32) of q [Tq, N, D], k and v [Tk, K, D]; see `attention_forward.forward`.

    `deterministic`: the gradients do not depend on timing.
    """
    return forward_pass.forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, batch_size=batch_size, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=causal, window=window, softcap=softcap, scale=scale,
    )  # fmt: skip


@torch.library.custom_op("megallm_kernels::attention_backward", mutates_args=())
def attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    dlse: torch.Tensor | None, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, batch_size: int,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, window: int, softcap: float, scale: float, deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, of dout [Tq, N, D] and dlse [N, Tq] (None = 0)."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    backward_pass.backward(
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, batch_size=batch_size, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=causal, window=window, softcap=softcap, scale=scale,
        deterministic=deterministic, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return dq, dk, dv


@torch.library.custom_op("megallm_kernels::packed_attention", mutates_args=())
def packed_attention(
    qkv: torch.Tensor, num_heads: int, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None,
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, causal: bool, window: int, softcap: float, scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`attention` of the slices of qkv [T, N + 2K, D]: N = `num_heads` query heads, then K of keys, K of values."""
    return forward_pass.forward(
        *_split(qkv, num_heads), cu_seqlens_q, cu_seqlens_k, batch_size=batch_size, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=causal, window=window, softcap=softcap, scale=scale,
    )  # fmt: skip


@torch.library.custom_op("megallm_kernels::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None,
    num_heads: int, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, batch_size: int,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, window: int, softcap: float, scale: float, deterministic: bool,
) -> torch.Tensor:  # fmt: skip
    """dqkv [T, N + 2K, D], contiguous."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = _split(dqkv, num_heads)
    backward_pass.backward(
        dout, *_split(qkv, num_heads), out, lse, dlse, cu_seqlens_q, cu_seqlens_k, batch_size=batch_size,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, causal=causal, window=window, softcap=softcap,
        scale=scale, deterministic=deterministic, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return dqkv


def _split(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rest = qkv.size(1) - num_heads
    if rest <= 0 or rest % 2:
        raise ValueError(f"{qkv.size(1)} packed heads are not {num_heads} of queries and as many of keys as of values")
    return (
        qkv.narrow(1, 0, num_heads),
        qkv.narrow(1, num_heads, rest // 2),
        qkv.narrow(1, num_heads + rest // 2, rest // 2),
    )


def _fake_forward(x: torch.Tensor, num_heads: int) -> _Tensors:
    out = x.new_empty((x.size(0), num_heads, x.size(2)))
    return out, x.new_empty((num_heads, x.size(0)), dtype=torch.float32)


@attention.register_fake
def _attention_fake(q: torch.Tensor, *_: Any, **__: Any) -> _Tensors:
    return _fake_forward(q, q.size(1))


@packed_attention.register_fake
def _packed_attention_fake(qkv: torch.Tensor, num_heads: int, *_: Any, **__: Any) -> _Tensors:
    return _fake_forward(qkv, num_heads)


@attention_backward.register_fake
def _attention_backward_fake(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@packed_attention_backward.register_fake
def _packed_attention_backward_fake(dout: torch.Tensor, qkv: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    """Inputs: q, k, v, offsets of queries, offsets of keys, settings."""
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.settings = inputs[5:]
    ctx.set_materialize_grads(False)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    """Inputs: qkv, number of heads, offsets of queries, offsets of keys, settings."""
    ctx.save_for_backward(inputs[0], *output, *inputs[2:4])
    ctx.num_heads, ctx.settings = inputs[1], inputs[4:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *offsets = ctx.saved_tensors
    nothing = (None,) * (2 + len(ctx.settings))
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    dout = torch.zeros_like(out) if dout is None else dout
    return (*attention_backward(dout, q, k, v, out, lse, dlse, *offsets, *ctx.settings), *nothing)


def _packed_gradient(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    qkv, out, lse, *offsets = ctx.saved_tensors
    nothing = (None,) * (3 + len(ctx.settings))
    if dout is None and dlse is None:
        return (None, *nothing)
    dout = torch.zeros_like(out) if dout is None else dout
    return (packed_attention_backward(dout, qkv, out, lse, dlse, ctx.num_heads, *offsets, *ctx.settings), *nothing)


attention.register_autograd(_gradient, setup_context=_save)
packed_attention.register_autograd(_packed_gradient, setup_context=_save_packed)
