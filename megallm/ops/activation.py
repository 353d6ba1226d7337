"""MLP activations; the gated ones take the packed [gate | up] projection and save nothing else.

gated:    y = act(gate) * up          (Shazeer, "GLU variants improve Transformer", arXiv 2002.05202)
plain:    y = act(up)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from megallm.ops.backends import DEFAULT, Backends

Activation = Literal["silu", "gelu", "gelu_tanh"]


def gated_reference(gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
    """The specification: gate_up [T, 2F] -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _act(gate, kind) * up


def activation(x: torch.Tensor, kind: Activation, *, backends: Backends = DEFAULT) -> torch.Tensor:
    """act(x), elementwise."""
    if backends.pick("activation", x, x.size(-1)) == "triton":
        from megallm_kernels.activation import activation as triton_activation

        return triton_activation(x, kind, False)
    return _act(x, kind)


def gated(gate_up: torch.Tensor, kind: Activation, *, backends: Backends = DEFAULT) -> torch.Tensor:
    """act(gate) * up for gate_up [T, 2F] = [gate | up] -> [T, F]; backward writes the packed gradient."""
    if backends.pick("activation", gate_up, gate_up.size(-1) // 2) == "triton":
        from megallm_kernels.activation import activation as triton_activation

        return triton_activation(gate_up, kind, True)
    return _Gated.apply(gate_up, kind) if torch.is_grad_enabled() else _gate(gate_up, kind)


def _act(x: torch.Tensor, kind: Activation) -> torch.Tensor:
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _gate(gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return _act(gate, kind).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate_up)
        ctx.kind = kind
        return _gate(gate_up, kind)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, dim=-1)
        torch.mul(dy, _act(gate, ctx.kind), out=dup)
        dact = dy * up
        if ctx.kind == "silu":
            torch.ops.aten.silu_backward.grad_input(dact, gate, grad_input=dgate)
        else:
            approximate = "tanh" if ctx.kind == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(dact, gate, approximate=approximate, grad_input=dgate)
        return out, None
