"""AdamW with decoupled weight decay (Loshchilov, Hutter, arXiv 1711.05101, algorithm 2) on flat tensors.

m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
p <- p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw


def adamw_reference_(
    p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *, step: int, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """The specification, one tensor; `step` counts from 1."""
    p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.addcdiv_(m, (v / (1 - beta2**step)).sqrt_().add_(eps), value=-lr / (1 - beta1**step))


def adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    *,
    steps: list[torch.Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_divisor: torch.Tensor,
    is_bad: torch.Tensor,
) -> None:
    """Updates params and both moments in place, one pass over memory; `steps` are counted up.

    All lists hold flat fp32 (or fp64) tensors of equal lengths; gradients are divided by the 0-d tensor
    `grad_divisor` on the way in, and are overwritten by the quotient. Where the 0-d `is_bad` is 1 nothing changes.
    """
    if not params:
        return
    scale: torch.Tensor | None = grad_divisor.float()
    if params[0].dtype == torch.float64:  # the fused kernel's divisor is fp32: too coarse here
        torch._foreach_div_(grads, grad_divisor)
        scale = None
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps,
        fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=lr, eps=eps,
        weight_decay=weight_decay, grad_scale=scale, found_inf=is_bad.float(),
    )  # fmt: skip
