"""`torch.library` operators over the compiled part, with the meaning of the Triton ones in norm.py, rope.py, adamw.py.

    compiled_rms_norm        norm without a bias      (y, rstd)                     differentiable in y
    compiled_add_rms_norm    add_norm without a bias  (y, new residual, rstd)       differentiable in the first two
    compiled_rope, _rope_    rope, rope_              a new tensor; in place        the first is differentiable
    compiled_adamw_          adamw_                   over the same tables: an AdamWPlan serves both

`why_absent(device)` says whether they can run. Needs no triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megallm_kernels import compiled_part
from megallm_kernels.adamw_plan import AdamWPlan, check_scalars, log_beta
from megallm_kernels.compiled_part import load


def why_absent(device: torch.device | None = None) -> str | None:
    """Why the operators cannot run; None if the compiled part is there and, where `device` is given, runs on it."""
    return load().reason or None if device is None else compiled_part.why_not_on(device)


@torch.library.custom_op("megallm_kernels::compiled_rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd) of x [..., H]. Differentiable in y."""
    y, _, rstd = compiled_part.rms_norm_forward(x, weight, eps)
    return y, rstd


@torch.library.custom_op("megallm_kernels::compiled_add_rms_norm", mutates_args=())
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, new residual, rstd): the norm of new residual = x + residual. Differentiable in the first two."""
    y, new_residual, rstd = compiled_part.rms_norm_forward(x, weight, eps, residual)
    assert new_residual is not None
    return y, new_residual, rstd


@torch.library.custom_op("megallm_kernels::compiled_rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, dnew_residual: torch.Tensor | None,
    needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dweight)."""
    return compiled_part.rms_norm_backward(
        dy, x, weight, rstd, dnew_residual=dnew_residual, needs_dweight=needs_dweight
    )


@rms_norm.register_fake
def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return x.new_empty(x.shape), _fake_rstd(x)


@add_rms_norm.register_fake
def _add_rms_norm_fake(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return x.new_empty(x.shape), x.new_empty(x.shape), _fake_rstd(x)


@rms_norm_backward.register_fake
def _rms_norm_backward_fake(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, dnew_residual: torch.Tensor | None,
    needs_dweight: bool,
) -> Any:  # fmt: skip
    return x.new_empty(x.shape), weight.new_empty(x.size(-1) if needs_dweight else 0)


def _fake_rstd(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Of both forms: what was normalised, the weight and the statistics."""
    ctx.save_for_backward(inputs[0] if len(inputs) == 3 else output[1], inputs[-2], output[-1])
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, dy: torch.Tensor | None, dnew_residual: torch.Tensor | None) -> tuple[Any, Any]:
    x, weight, rstd = ctx.saved_tensors
    if dy is None:  # only the residual was used
        return dnew_residual, None
    needs_dweight = ctx.needs_input_grad[-2]
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, dnew_residual, needs_dweight)
    return dx, dweight if needs_dweight else None


def _rms_norm_grad(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*_norm_gradients(ctx, dy, None), None)


def _add_rms_norm_grad(
    ctx: Any, dy: torch.Tensor | None, dnew_residual: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    dx, dweight = _norm_gradients(ctx, dy, dnew_residual)
    return dx, dx, dweight, None


rms_norm.register_autograd(_rms_norm_grad, setup_context=_save_norm)
add_rms_norm.register_autograd(_add_rms_norm_grad, setup_context=_save_norm)


@torch.library.custom_op("megallm_kernels::compiled_rope", mutates_args=())
def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, conjugate: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x [T, h, D] rotated, a new contiguous tensor. Differentiable in x."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotary_dim = 2 * cos.size(-1)
    if rotary_dim < x.size(-1):
        out[..., rotary_dim:] = x[..., rotary_dim:]
    compiled_part.rotate(x, out, cos, sin, positions, cu_seqlens, conjugate=conjugate)
    return out


@torch.library.custom_op("megallm_kernels::compiled_rope_", mutates_args=("x",))
def rope_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, conjugate: bool = False,
) -> None:  # fmt: skip
    """Rotates x [T, h, D] in place; unit stride along D. Not differentiable: the caller's Function undoes it."""
    compiled_part.rotate(x, x, cos, sin, positions, cu_seqlens, conjugate=conjugate)


@rope.register_fake
def _rope_fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, conjugate: bool = False,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape)


@rope_.register_fake
def _rope_in_place_fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, conjugate: bool = False,
) -> None:  # fmt: skip
    return None


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, positions, cu_seqlens, ctx.conjugate = inputs
    ctx.save_for_backward(cos, sin, positions, cu_seqlens)


def _rope_grad(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    cos, sin, positions, cu_seqlens = ctx.saved_tensors
    return rope(dy, cos, sin, positions, cu_seqlens, not ctx.conjugate), None, None, None, None, None


rope.register_autograd(_rope_grad, setup_context=_save_rope)


def adamw_(
    previous: AdamWPlan | None, params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor], copies: Sequence[torch.Tensor] = (), *, decayed: Sequence[bool] | None = None,
    step: torch.Tensor, learning_rate: torch.Tensor, grad_divisor: torch.Tensor, is_bad: torch.Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float,
) -> AdamWPlan:  # fmt: skip
    """`megallm_kernels.adamw.adamw_` with the compiled kernel: the plan to pass as `previous` next time."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, copies)
    made = AdamWPlan.renewed(previous, lists, decayed)
    if torch.compiler.is_compiling():  # a graph must name what is written
        adamw_update(
            params, grads, exp_avgs, exp_avg_sqs, list(copies), step, learning_rate, grad_divisor, is_bad, made.table,
            made.chunks, made.ticket, made.host_table, beta1, beta2, eps, weight_decay,
        )  # fmt: skip
        return made
    check_scalars(made.table.device, step, learning_rate, grad_divisor, is_bad)
    _launch_adamw(
        made, step, learning_rate, grad_divisor, is_bad, grads=grads, copies=copies, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *copies, step])
    return made


def _launch_adamw(
    made: AdamWPlan, step: torch.Tensor, learning_rate: torch.Tensor, grad_divisor: torch.Tensor,
    is_bad: torch.Tensor, *, grads: Sequence[torch.Tensor], copies: Sequence[torch.Tensor], beta1: float, beta2: float,
    eps: float, weight_decay: float,
) -> None:  # fmt: skip
    if not len(made.chunks):
        step.add_(is_bad == 0)
        return
    learning_rate, grad_divisor, is_bad = (t.float() for t in (learning_rate, grad_divisor, is_bad))
    compiled_part.run(
        "adamw", made.table.device, table=made.table.data_ptr(), chunks=made.chunks.data_ptr(),
        ticket=made.ticket.data_ptr(), step=step.data_ptr(), learning_rate=learning_rate.data_ptr(),
        grad_divisor=grad_divisor.data_ptr(), is_bad=is_bad.data_ptr(), num_chunks=len(made.chunks),
        chunk=made.launch.chunk, log_beta1=log_beta(beta1), log_beta2=log_beta(beta2), weight1=1 - beta1,
        weight2=1 - beta2, eps=eps, weight_decay=weight_decay, grad_dtype=compiled_part.DTYPE_CODES[grads[0].dtype],
        copy_dtype=compiled_part.DTYPE_CODES[copies[0].dtype] if copies else compiled_part.NO_DTYPE,
    )  # fmt: skip


@torch.library.custom_op(
    "megallm_kernels::compiled_adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies", "step", "ticket")
)
def adamw_update(
    params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor], copies: list[torch.Tensor], step: torch.Tensor, learning_rate: torch.Tensor,
    grad_divisor: torch.Tensor, is_bad: torch.Tensor, table: torch.Tensor, chunks: torch.Tensor, ticket: torch.Tensor,
    host_table: torch.Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """The operator megallm_kernels::adamw_ with the compiled kernel; the same arguments, see adamw.py."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, copies)
    scalars = (step, learning_rate, grad_divisor, is_bad)
    made = AdamWPlan.of_tensors(lists, scalars, table, chunks, ticket, host_table)
    _launch_adamw(
        made, step, learning_rate, grad_divisor, is_bad, grads=grads, copies=copies, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay,
    )  # fmt: skip


@adamw_update.register_fake
def _adamw_update_fake(
    params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor], copies: list[torch.Tensor], step: torch.Tensor, learning_rate: torch.Tensor,
    grad_divisor: torch.Tensor, is_bad: torch.Tensor, table: torch.Tensor, chunks: torch.Tensor, ticket: torch.Tensor,
    host_table: torch.Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    return None
