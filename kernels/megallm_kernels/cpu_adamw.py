"""AdamW over many tensors in CPU memory, one pass over each; and the norm of their gradients, one pass as well.

    g <- grad_scale grad                             (bf16, fp16 or fp32; the only number for unscaling and clipping)
    m <- m + (1 - b1) (g - m)                        v <- b2 v + (1 - b2) g^2
    p <- p (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps),      copy <- p, rounded to nearest even

The operations are those of `torch.optim.AdamW(fused=True)`, in its order, in fp32, no product and sum contracted: every
instruction set and every number of threads give the same bits. Bytes per element: 28 with fp32 gradients and no copy,
28 as well with bf16 gradients and a bf16 copy.

megallm_kernels._cpu (csrc/cpu_*) does this where it was built; `why_absent()` says why it was not. Without it, plain
torch does the same in many passes, if the caller agrees to that with `fallback=True`; numbers differ by rounding.

Letters: n tensors.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

MODULE = "megallm_kernels._cpu"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As in csrc/cpu_adamw.h."""
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_DTYPES = (torch.bfloat16, torch.float16)
_NO_COPY = -1


@dataclass(frozen=True, kw_only=True)
class CpuPart:
    """The module, or why there is none."""

    module: Any
    """megallm_kernels._cpu, or None."""
    reason: str
    """Empty where there is a module."""


@cache
def load() -> CpuPart:
    """The module, looked for once."""
    try:
        return CpuPart(module=importlib.import_module(MODULE), reason="")
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        how = "install again where a C++ compiler is (pip install -v shows why a build fails)"
        return CpuPart(module=None, reason=f"{MODULE} was not built: {how}")
    except ImportError as error:
        return CpuPart(module=None, reason=f"{MODULE} was built and does not load: {error}")


def why_absent() -> str | None:
    """Why AdamW on the CPU has only its torch form here; None if it has the compiled one."""
    return load().reason or None


def instruction_sets() -> tuple[str, ...]:
    """Those that the compiled form can use on this machine, the one it uses first; empty where it was not built."""
    module = load().module
    return () if module is None else tuple(module.ISAS)


def cpu_adamw_(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor], copies: Sequence[torch.Tensor] = (), *,
    decayed: Sequence[bool] | None = None, step: int, learning_rate: float, grad_scale: float = 1.0, beta1: float,
    beta2: float, eps: float, weight_decay: float, num_threads: int | None = None, fallback: bool = False,
    isa: str | None = None,
) -> None:  # fmt: skip
    """Updates n params, both moments and the copies in place; gradients are only read.

    params, exp_avgs, exp_avg_sqs fp32; grads of one dtype, fp32, bf16 or fp16; copies (none, or n) of one dtype, bf16
    or fp16. Contiguous, on the CPU, no two overlapping. `decayed`: which of them weight decay applies to; None = all.
    `step`: the number of this update, 1 for the first. `num_threads`: None = torch's. `fallback`: whether torch may do
    it where the module is absent, else that is a RuntimeError. `isa`: one of `instruction_sets()`; None = the first.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, copies)
    _check(lists, decayed)
    _check_numbers(step, beta1, beta2)
    keep = 1 - learning_rate * weight_decay
    minus_rate, root_correction2 = -learning_rate / (1 - beta1**step), math.sqrt(1 - beta2**step)
    module = _module_or_none(fallback)
    if module is None:
        for i, param in enumerate(params):
            _torch_adamw_(
                param, grads[i], exp_avgs[i], exp_avg_sqs[i], grad_scale, keep if decayed is None or decayed[i] else 1,
                beta1, beta2, minus_rate, root_correction2, eps,
            )  # fmt: skip
            if copies:
                copies[i].copy_(param)
        return
    addresses = [[t.data_ptr() for t in tensors] for tensors in lists]
    module.adamw(
        params=addresses[0], grads=addresses[1], exp_avgs=addresses[2], exp_avg_sqs=addresses[3], copies=addresses[4],
        sizes=[p.numel() for p in params], decayed=[True] * len(params) if decayed is None else list(decayed),
        grad_scale=grad_scale, keep=keep, beta1=beta1, beta2=beta2, root_correction2=root_correction2,
        minus_rate=minus_rate, eps=eps, grad_dtype=DTYPE_CODES[grads[0].dtype] if grads else 0,
        copy_dtype=DTYPE_CODES[copies[0].dtype] if copies else _NO_COPY, num_threads=_threads(num_threads),
        isa=isa or "",
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *copies])


def squared_norm(
    tensors: Sequence[torch.Tensor], *, num_threads: int | None = None, fallback: bool = False, isa: str | None = None
) -> float:
    """The sum of the squares of all elements; the same bits whatever the number of threads.

    Added in fp64; squares of bf16 and fp16 elements by 16 in fp32 first (relative error below 15 2^-24).

    Contiguous fp32, bf16 and fp16 tensors on the CPU. Other arguments: see `cpu_adamw_`.
    """
    _check_each("tensors", tensors, GRADIENT_DTYPES)
    module = _module_or_none(fallback)
    if module is None:
        pieces = (piece.double() for t in tensors for piece in t.detach().view(-1).split(1 << 20))
        return math.fsum(float(torch.dot(piece, piece)) for piece in pieces)
    return module.squared_norm(
        arrays=[t.data_ptr() for t in tensors], sizes=[t.numel() for t in tensors],
        dtypes=[DTYPE_CODES[t.dtype] for t in tensors], num_threads=_threads(num_threads), isa=isa or "",
    )  # fmt: skip


def _torch_adamw_(
    param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, grad_scale: float,
    keep: float, beta1: float, beta2: float, minus_rate: float, root_correction2: float, eps: float,
) -> None:  # fmt: skip
    with torch.no_grad():
        g = grad.float() * grad_scale
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_(root_correction2).add_(eps)
        param.mul_(keep).addcdiv_(exp_avg, denominator, value=minus_rate)


def _module_or_none(fallback: bool) -> Any:
    part = load()
    if part.module is None and not fallback:
        raise RuntimeError(f"AdamW's compiled CPU form was asked for, but {part.reason}")
    return part.module


def _threads(asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise ValueError(f"num_threads ({asked}) must be at least 1")
    return torch.get_num_threads() if asked is None else asked


def _check_numbers(step: int, beta1: float, beta2: float) -> None:
    if step < 1:
        raise ValueError(f"step ({step}) is the number of this update: 1 for the first")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} ({beta}) must be at least 0 and less than 1")


def _check(lists: Sequence[Sequence[torch.Tensor]], decayed: Sequence[bool] | None) -> None:
    params, grads, *_, copies = lists
    counts = [len(each) for each in lists]
    num_decayed = counts[0] if decayed is None else len(decayed)
    if counts[:4] != counts[:1] * 4 or counts[4] not in (0, counts[0]) or num_decayed != counts[0]:
        raise ValueError(
            f"AdamW takes lists of equal lengths (copies may be empty), got {counts} tensors and {num_decayed} "
            "entries of decayed"
        )
    if len({g.dtype for g in grads}) > 1 or len({c.dtype for c in copies}) > 1:
        raise ValueError("AdamW takes gradients of one dtype and copies of one dtype: make a call for each dtype")
    allowed = ((torch.float32,), GRADIENT_DTYPES, (torch.float32,), (torch.float32,), COPY_DTYPES)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies")
    sizes = [p.numel() for p in params]
    for name, tensors, dtypes in zip(names, lists, allowed, strict=True):
        _check_each(name, tensors, dtypes)
        found = [t.numel() for t in tensors]
        if tensors and found != sizes:
            i = next(i for i, (a, b) in enumerate(zip(found, sizes, strict=True)) if a != b)
            raise ValueError(f"{name}[{i}] has {found[i]} elements, params[{i}] has {sizes[i]}")


def _check_each(name: str, tensors: Sequence[torch.Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    """Runs every step, over thousands of tensors at times: a few whole lists, and words only where one is refused."""
    if all([t.is_cpu for t in tensors]) and all([t.is_contiguous() for t in tensors]):
        if {t.dtype for t in tensors}.issubset(dtypes):
            return
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}[{i}] is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
        if not tensor.is_cpu:
            raise ValueError(f"{name}[{i}] is on {tensor.device}: this AdamW is for CPU memory, copy it there first")
        if not tensor.is_contiguous():
            got = f"{tuple(tensor.shape)} has strides {tensor.stride()}"
            raise ValueError(f"{name}[{i}] {got}: it must be contiguous")
