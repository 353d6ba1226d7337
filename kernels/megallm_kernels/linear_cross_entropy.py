"""The lm head and its loss in one, as operations that autograd and torch.compile understand.

For one rank that holds the whole vocabulary: `linear_cross_entropy`, `linear_token_logprobs`. For a vocabulary over
several ranks: a `Head` that says which columns are here and how to reduce, and `token_losses`, `gradients` and
`losses_and_gradients` of linear_cross_entropy_chunks.py, where the method is described.

Letters: T tokens, H hidden, V vocabulary, V' columns of this rank (with padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megallm_kernels.cross_entropy_kernels import IGNORE_INDEX
from megallm_kernels.linear_cross_entropy_chunks import (
    Head,
    gradients,
    losses_and_gradients,
    rows_per_chunk,
    scale_,
    token_losses,
)

__all__ = ["Head", "linear_cross_entropy", "linear_token_logprobs"]
__all__ += ["token_losses", "gradients", "losses_and_gradients", "rows_per_chunk"]


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, token_weight: torch.Tensor | None = None,
    vocab_size: int | None = None, ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0,
    z_loss: float = 0.0, chunk_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(sum of token_weight times loss, 0-d fp32; number of tokens not ignored, 0-d int64); gradients made in forward.

    hidden [T, H], weight [V', H], labels [T], token_weight [T] (a constant; None = 1 each). The sum may be used in any
    way, but backward runs once: it scales the stored gradients in place. Best handed weights that already hold the
    1 / count, so that the incoming gradient is 1.
    """
    wanted = [torch.is_grad_enabled() and each.requires_grad for each in (hidden, weight)]
    weights = None if token_weight is None else token_weight.detach()
    size = len(weight) if vocab_size is None else vocab_size
    settings = (size, ignore_index, label_smoothing, z_loss, chunk_rows)
    loss_sum = _WeightedLoss.apply(hidden, weight, labels, weights, *settings, *wanted)
    return loss_sum, (labels != ignore_index).sum()


def linear_token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX, with_entropy: bool = False, chunk_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(log p(label) [T], entropy [T] or None), fp32, 0 for ignored tokens; backward makes the logits once more."""
    size = len(weight) if vocab_size is None else vocab_size
    settings = (size, ignore_index, 0.0, 0.0, chunk_rows)
    loss, _, entropy = linear_token_losses(hidden, weight, labels, with_entropy, *settings)
    return -loss, entropy if with_entropy else None


def _head(settings: Sequence[Any]) -> Head:
    vocab_size, ignore_index, label_smoothing, z_loss, chunk_rows = settings
    return Head(
        vocab_size=vocab_size, valid_columns=vocab_size, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, chunk_rows=chunk_rows,
    )  # fmt: skip


@torch.library.custom_op("megallm_kernels::weighted_loss", mutates_args=())
def weighted_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weight: torch.Tensor | None,
    vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float, chunk_rows: int, needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(sum of token_weight times loss, its gradients dhidden [T, H] or [0] and dweight [V', H] or [0])."""
    head = _head((vocab_size, ignore_index, label_smoothing, z_loss, chunk_rows))
    dloss = torch.ones((), device=hidden.device).expand(len(hidden)) if token_weight is None else token_weight
    if not needs_dhidden and not needs_dweight:
        loss = token_losses(hidden, weight, labels, head)[0]
        return (loss * dloss).sum(), hidden.new_empty(0), weight.new_empty(0)
    wide = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if needs_dweight else None
    loss, _, dhidden = losses_and_gradients(
        hidden, weight, labels, dloss, head, needs_dhidden=needs_dhidden, dweight=wide
    )  # fmt: skip
    dweight = weight.new_empty(0) if wide is None else wide.to(weight.dtype)
    return (loss * dloss).sum(), hidden.new_empty(0) if dhidden is None else dhidden, dweight


@weighted_loss.register_fake
def _weighted_loss_fake(hidden, weight, labels, *rest: Any) -> Any:  # type: ignore[no-untyped-def]
    needs_dhidden, needs_dweight = rest[-2:]
    dhidden, dweight = (
        each.new_empty(each.shape if needed else 0)
        for each, needed in ((hidden, needs_dhidden), (weight, needs_dweight))
    )
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


class _WeightedLoss(torch.autograd.Function):
    """`weighted_loss` whose backward scales the gradients that forward made, in place."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:  # type: ignore[override]
        loss_sum, dhidden, dweight = weighted_loss(hidden, weight, *rest)
        ctx.save_for_backward(dhidden, dweight)
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        results: list[torch.Tensor | None] = []
        for needed, stored in zip(ctx.needs_input_grad[:2], ctx.saved_tensors, strict=True):
            if needed:
                scale_(stored, grad)
            results.append(stored if needed else None)
        return *results, *[None] * 9


@torch.library.custom_op("megallm_kernels::linear_token_losses", mutates_args=())
def linear_token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, with_entropy: bool, vocab_size: int,
    ignore_index: int, label_smoothing: float, z_loss: float, chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss [T], lse [T], entropy [T] or [0]), fp32. Differentiable in all three."""
    head = _head((vocab_size, ignore_index, label_smoothing, z_loss, chunk_rows))
    return token_losses(hidden, weight, labels, head, with_entropy=with_entropy)


@linear_token_losses.register_fake
def _linear_token_losses_fake(hidden, weight, labels, with_entropy, *_: Any) -> Any:  # type: ignore[no-untyped-def]
    loss = hidden.new_empty(hidden.size(0), dtype=torch.float32)
    return loss, torch.empty_like(loss), loss.new_empty(hidden.size(0) if with_entropy else 0)


@torch.library.custom_op("megallm_kernels::linear_token_losses_backward", mutates_args=())
def linear_token_losses_backward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, entropy: torch.Tensor,
    dloss: torch.Tensor, dlse: torch.Tensor | None, dentropy: torch.Tensor | None, needs_dhidden: bool,
    needs_dweight: bool, vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float, chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dhidden [T, H] or [0], dweight [V', H] or [0])."""
    head = _head((vocab_size, ignore_index, label_smoothing, z_loss, chunk_rows))
    wide = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if needs_dweight else None
    dhidden = gradients(
        hidden, weight, labels, lse, dloss, head, dlse=dlse, entropy=None if dentropy is None else entropy,
        dentropy=dentropy, needs_dhidden=needs_dhidden, dweight=wide,
    )  # fmt: skip
    dweight = weight.new_empty(0) if wide is None else wide.to(weight.dtype)
    return hidden.new_empty(0) if dhidden is None else dhidden, dweight


@linear_token_losses_backward.register_fake
def _linear_token_losses_backward_fake(hidden, weight, *rest: Any) -> Any:  # type: ignore[no-untyped-def]
    needs_dhidden, needs_dweight = rest[6:8]
    dhidden, dweight = (
        each.new_empty(each.shape if needed else 0)
        for each, needed in ((hidden, needs_dhidden), (weight, needs_dweight))
    )
    return dhidden, dweight


def _save_linear_token_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels, ctx.with_entropy, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, labels, *output[1:])
    ctx.set_materialize_grads(False)


def _linear_token_losses_grad(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    hidden, weight, labels, lse, entropy = ctx.saved_tensors
    dloss, dlse, dentropy = grads
    dloss = torch.zeros_like(lse) if dloss is None else dloss
    needed = ctx.needs_input_grad[:2]
    results = linear_token_losses_backward(
        hidden, weight, labels, lse, entropy, dloss, dlse, dentropy if ctx.with_entropy else None, *needed,
        *ctx.settings,
    )  # fmt: skip
    return *(each if wanted else None for each, wanted in zip(results, needed, strict=True)), *[None] * 7


linear_token_losses.register_autograd(_linear_token_losses_grad, setup_context=_save_linear_token_losses)
