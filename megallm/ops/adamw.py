"""AdamW with decoupled weight decay (Loshchilov, Hutter, arXiv 1711.05101, algorithm 2) on flat tensors.

m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
p <- p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from megallm_kernels.cpu_adamw import cpu_adamw_


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

    All lists hold flat fp32 (or fp64) tensors of equal lengths, grads also bf16; gradients are divided by the 0-d
    tensor `grad_divisor` on the way in, and may be overwritten by the quotient. Where `is_bad` is 1 nothing changes.
    """
    if not params:
        return
    grads = [g.to(p.dtype) for p, g in zip(params, grads, strict=True)]
    scale: torch.Tensor | None = grad_divisor.float()
    if params[0].dtype == torch.float64:  # the fused kernel's divisor is fp32: too coarse here
        torch._foreach_div_(grads, grad_divisor)
        scale = None
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps,
        fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=lr, eps=eps,
        weight_decay=weight_decay, grad_scale=scale, found_inf=is_bad.float(),
    )  # fmt: skip


class FusedAdamW:
    """AdamW over many tensors on one back end, in one launch where that is not torch's; low-precision copies included.

    params, exp_avgs, exp_avg_sqs flat fp32, grads fp32 or bf16, only read; copies [] or one bf16 or fp16 tensor each.
    For torch also fp64, grads are perhaps overwritten, and there are no copies.
    """

    def __init__(
        self,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        exp_avgs: list[torch.Tensor],
        exp_avg_sqs: list[torch.Tensor],
        copies: list[torch.Tensor],
        *,
        decayed: list[bool],
        step: torch.Tensor,
        backend: str,
    ) -> None:
        """`step`: 0-d fp32, updates done so far; counted up in place. `backend`: torch, triton, cuda, apex or cpu."""
        assert backend != "torch" or not copies
        self._lists = (params, grads, exp_avgs, exp_avg_sqs, copies)
        self._decayed, self._step, self._backend = decayed, step, backend
        self._learning_rate = torch.zeros((), dtype=torch.float32, device=step.device)
        self._plan: Any = None

    def update_(
        self,
        *,
        learning_rate: float,
        grad_divisor: torch.Tensor,
        is_bad: torch.Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        """One update in place; gradients are divided by the 0-d `grad_divisor`; nothing where 0-d `is_bad` is 1.

        The learning rate comes from the host: a captured graph would repeat the one of its capture.
        """
        settings: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        grad_divisor, is_bad = grad_divisor.to(self._step.device), is_bad.to(self._step.device)
        if self._backend == "torch":
            self._update_in_torch(learning_rate, grad_divisor, is_bad, settings)
            return
        if self._backend == "cpu":
            self._update_on_host(learning_rate, float(grad_divisor), bool(is_bad), settings)
            return
        self._learning_rate.fill_(learning_rate)
        self._plan = _update_of(self._backend)(
            self._plan, *self._lists, decayed=self._decayed, step=self._step, learning_rate=self._learning_rate,
            grad_divisor=grad_divisor, is_bad=is_bad, **settings,
        )  # fmt: skip

    def _update_in_torch(
        self, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor, settings: dict[str, Any]
    ) -> None:
        for wanted in (True, False):
            params = self._lists[0]
            chosen = [i for i, each in enumerate(self._decayed) if each is wanted and params[i].numel()]
            adamw_(
                *([tensors[i] for i in chosen] for tensors in self._lists[:4]),
                steps=list(self._step.repeat(len(chosen)).unbind()),
                lr=learning_rate,
                grad_divisor=grad_divisor,
                is_bad=is_bad,
                **(settings | ({} if wanted else {"weight_decay": 0.0})),
            )
        self._step.add_(1 - is_bad)

    def _update_on_host(
        self, learning_rate: float, grad_divisor: float, is_bad: bool, settings: dict[str, Any]
    ) -> None:
        if not is_bad:
            self._step.add_(1)
            cpu_adamw_(
                *self._lists, decayed=self._decayed, step=int(self._step), learning_rate=learning_rate,
                grad_scale=1.0 / grad_divisor, **settings,
            )  # fmt: skip


def _update_of(backend: str) -> Callable[..., Any]:
    if backend == "triton":
        from megallm_kernels import adamw as triton_adamw

        return triton_adamw.adamw_
    if backend == "cuda":
        from megallm_kernels import compiled

        return compiled.adamw_
    return _apex_adamw_


def _apex_adamw_(
    plan: None,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    copies: list[torch.Tensor],
    *,
    decayed: list[bool],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    grad_divisor: torch.Tensor,
    is_bad: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """NVIDIA apex's capturable multi-tensor Adam (mode 1 = decoupled decay), then one copy for each bf16 tensor.

    It takes one dtype for gradients and parameters: bf16 gradients are copied first.
    """
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    skip = is_bad.to(torch.int32).view(1)
    step.add_(1 - skip[0])
    count = step.to(torch.int32).view(1)
    inverse = (1.0 / grad_divisor.float()).view(1)
    grads = [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)]
    for wanted in (True, False):
        chosen = [i for i, each in enumerate(decayed) if each is wanted and params[i].numel()]
        if not chosen:
            continue
        lists = [[tensors[i] for i in chosen] for tensors in (grads, params, exp_avgs, exp_avg_sqs)]
        multi_tensor_applier(
            amp_C.multi_tensor_adam_capturable, skip, lists, learning_rate, beta1, beta2, eps, count, 1, True,
            weight_decay if wanted else 0.0, inverse,
        )  # fmt: skip
    for copy, param in zip(copies, params, strict=False):
        copy.copy_(param)
