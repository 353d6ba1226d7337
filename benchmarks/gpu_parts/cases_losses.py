"""What is timed of cross-entropy and of the lm head with its loss, beside whom.

Letters: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts.calls import (
    OURS,
    Buffers,
    Case,
    Contender,
    Direction,
    Directions,
    autograd_directions,
    compiled,
    differentiable,
    needs,
)
from gpu_parts.place import Place

GEMMS = "the three GEMMs"
"""What the head costs without any loss: the floor of linear_cross_entropy."""
MAIN_GRAD = "triton, fp32 gradient buffer"
"""Ours as the engine runs it: the gradient of the weight goes into the optimizer's fp32 buffer."""


def cross_entropy_cases(place: Place) -> list[Case]:
    """Sum of the losses of 8192 tokens; ours overwrites the logits with their gradient, as the engine does."""
    tokens = place.pick(8192, 5)
    cases = []
    for vocab in (50,) if place.tiny else (128256, 32000):
        moved = float(tokens * vocab * place.dtype.itemsize)
        contenders = (
            Contender(name=OURS, build=_ours_in_place, note="in place"),
            compiled(_formula),
            differentiable("torch", _formula),
            differentiable("liger", _liger, why_absent=needs("liger_kernel.ops"), retain=False, note="in place"),
            differentiable("quack", _quack, why_absent=needs("quack"), retain=False),
        )
        cases.append(
            Case(
                section="cross_entropy", op="cross_entropy", name=f"V {vocab}", size=vocab,
                make=partial(_logits, tokens=tokens, vocab=vocab), contenders=contenders, set_bytes=moved,
                bytes_moved={"fwd": moved, "bwd": 2 * moved, "both": 3 * moved}, mutates=True,
            )
        )  # fmt: skip
    return cases


def _logits(place: Place, generator: torch.Generator, count: int, *, tokens: int, vocab: int) -> list[Buffers]:
    """inputs: logits [T, V]; constants: labels [T]."""
    one = torch.ones((), device=place.device)
    result = []
    for _ in range(count):
        logits = place.normal(tokens, vocab, generator=generator).requires_grad_()
        labels = torch.randint(0, vocab, (tokens,), generator=generator, device=place.device)
        result.append(Buffers(inputs=(logits,), grads=(one,), constants={"labels": labels}))
    return result


def _ours_in_place(sets: Sequence[Buffers]) -> Directions:
    """The two custom operations that a step runs; after the first backward the logits hold gradients."""
    from megallm_kernels.cross_entropy import IGNORE_INDEX, gradient_, token_losses

    logits = [each.inputs[0].detach() for each in sets]
    labels = [each.constants["labels"] for each in sets]
    ones = torch.ones((), device=logits[0].device).expand(logits[0].size(0))
    vocab = logits[0].size(1)

    def forward(i: int) -> torch.Tensor:
        loss, lse, _ = token_losses(logits[i], labels[i], vocab, IGNORE_INDEX, 0.0, 0.0, False)
        loss.sum()
        return lse

    statistics = [forward(i) for i in range(len(sets))]

    def backward(i: int, lse: torch.Tensor) -> None:
        gradient_(logits[i], labels[i], lse, ones, vocab_size=vocab)

    return {
        "fwd": Direction(call=forward),
        "bwd": Direction(call=lambda i: backward(i, statistics[i])),
        "both": Direction(call=lambda i: backward(i, forward(i))),
    }


def _formula(logits: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def _liger(logits: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(logits, labels, None, -100, 0.0, 0.0, "sum")[0]


def _quack(logits: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    from quack import cross_entropy

    return cross_entropy(logits, labels, reduction="sum", inplace_backward=True)


# -- the head with its loss -------------------------------------------------------------------------------------------


def linear_cases(place: Place) -> list[Case]:
    """8192 tokens of H 4096 and V 128256, beside the three GEMMs alone; graphs are left out, nothing there is short."""
    tokens, hidden, vocab = place.pick(8192, 6), place.pick(4096, 16), place.pick(128256, 40)
    flops = 2.0 * tokens * hidden * vocab
    contenders = (
        Contender(name=GEMMS, build=_gemms),
        _head(OURS, _ours_linear),
        Contender(name=MAIN_GRAD, build=_ours_main_grad),
        _head("liger", _liger_linear, why_absent=needs("liger_kernel.ops")),
        _head("cut-cross-entropy", _cce, why_absent=needs("cut_cross_entropy"), note="filter_eps=None: exact"),
        _head("quack", _quack_linear, why_absent=needs("quack.linear_cross_entropy")),
        compiled(_linear_formula, mode=None),
        _head("torch", _linear_formula),
    )
    returned = float((tokens * hidden + vocab * hidden) * place.dtype.itemsize)
    return [
        Case(
            section="linear_cross_entropy", op="linear_cross_entropy", name=f"H {hidden} V {vocab}", size=vocab,
            make=partial(_head_buffers, tokens=tokens, hidden=hidden, vocab=vocab), contenders=contenders,
            flops={"both": 3 * flops}, set_bytes=2e9, returned_bytes=returned,
        )
    ]  # fmt: skip


def _head(
    name: str, function: Callable[..., Any], *, why_absent: Callable[[], str | None] = lambda: None, note: str = ""
) -> Contender:
    """Only the two passes together: several make the gradients in forward."""

    def build(sets: Sequence[Buffers]) -> Directions:
        both = autograd_directions(function, sets, retain=False, graph=False)["both"]
        return {"both": both}

    return Contender(name=name, build=build, why_absent=why_absent, note=note)


def _head_buffers(
    place: Place, generator: torch.Generator, count: int, *, tokens: int, hidden: int, vocab: int
) -> list[Buffers]:
    """inputs: hidden [T, H], weight [V, H]; constants: labels [T]."""
    x = place.normal(tokens, hidden, generator=generator).requires_grad_()
    weight = (place.normal(vocab, hidden, generator=generator) * hidden**-0.5).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator, device=place.device)
    one = torch.ones((), device=place.device)
    return [Buffers(inputs=(x, weight), grads=(one,), constants={"labels": labels})] * count


def _gemms(sets: Sequence[Buffers]) -> Directions:
    x, weight = (t.detach() for t in sets[0].inputs)
    logits = torch.randn(x.size(0), weight.size(0), device=x.device, dtype=x.dtype)

    def call(i: int) -> object:
        torch.mm(x, weight.t(), out=logits)
        return torch.mm(logits, weight), torch.mm(logits.t(), x)

    return {"both": Direction(call=call, graph=False)}


def _ours_linear(x: torch.Tensor, weight: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    from megallm_kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, labels)[0]


def _ours_main_grad(sets: Sequence[Buffers]) -> Directions:
    from megallm_kernels.linear_cross_entropy import Head, losses_and_gradients

    x, weight = (t.detach() for t in sets[0].inputs)
    labels = sets[0].constants["labels"]
    main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    dloss = torch.ones((), device=x.device).expand(x.size(0))
    head = Head(vocab_size=weight.size(0))

    def call(i: int) -> object:
        return losses_and_gradients(x, weight, labels, dloss, head, dweight=main_grad)

    return {"both": Direction(call=call, graph=False)}


def _linear_formula(x: torch.Tensor, weight: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")


def _liger_linear(x: torch.Tensor, weight: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    out = LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels, None, None, -100, 0.0, 0.0, "sum")
    return out[0] if isinstance(out, tuple) else out


def _cce(x: torch.Tensor, weight: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, labels, reduction="sum", filter_eps=None)


def _quack_linear(x: torch.Tensor, weight: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, weight, labels, chunk_size=4096, reduction="sum", tuned=False)
