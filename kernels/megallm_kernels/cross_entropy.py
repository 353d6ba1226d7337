"""Cross-entropy and per-token log-probabilities as operations that autograd and torch.compile understand.

For one rank that holds the whole vocabulary: `cross_entropy`, `token_logprobs`. For a vocabulary over several ranks the
caller puts its two reductions between `statistics`, `rescale_`, `losses` and `gradient_`; the formulas, and the recipe,
are in cross_entropy_kernels.py.

Letters: T tokens, V vocabulary, V' columns of this rank (with padding).
"""

from __future__ import annotations

from typing import Any

import torch

from megallm_kernels import cross_entropy_kernels as kernels
from megallm_kernels.cross_entropy_kernels import IGNORE_INDEX, rescale_

__all__ = ["IGNORE_INDEX", "statistics", "rescale_", "losses", "gradient_", "cross_entropy", "token_logprobs"]


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int | None = None, ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0, z_loss: float = 0.0, inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(sum of the losses, 0-d fp32, differentiable; number of tokens that are not ignored, 0-d int64); no sync.

    logits [T, V'] with V' >= vocab_size (default: all columns), labels [T]. `inplace_backward`: backward writes the
    gradient over the logits, which nobody may need by then (their producer's backward included).
    """
    form = _InPlace.apply if inplace_backward else token_losses
    size = logits.size(-1) if vocab_size is None else vocab_size
    loss = form(logits, labels, size, ignore_index, label_smoothing, z_loss, False)[0]
    return loss.sum(), (labels != ignore_index).sum()


def token_logprobs(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int | None = None, ignore_index: int = IGNORE_INDEX,
    with_entropy: bool = False, inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(log p(label) [T], entropy of p [T] or None), fp32, differentiable; 0 for ignored tokens.

    Arguments as of `cross_entropy`.
    """
    form = _InPlace.apply if inplace_backward else token_losses
    size = logits.size(-1) if vocab_size is None else vocab_size
    loss, _, entropy = form(logits, labels, size, ignore_index, 0.0, 0.0, with_entropy)
    return -loss, entropy if with_entropy else None


@torch.library.custom_op("megallm_kernels::cross_entropy_statistics", mutates_args=())
def statistics(
    logits: torch.Tensor, labels: torch.Tensor, *, first_column: int = 0, valid_columns: int | None = None,
    ignore_index: int = IGNORE_INDEX, with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(row_max [T], sums [3, T], or [4, T] with the entropy); see `cross_entropy_kernels.statistics`."""
    return kernels.statistics(
        logits, labels, first_column=first_column, valid_columns=valid_columns, ignore_index=ignore_index,
        with_entropy=with_entropy,
    )  # fmt: skip


@statistics.register_fake
def _statistics_fake(logits, labels, *, with_entropy=False, **_: Any) -> Any:  # type: ignore[no-untyped-def]
    num_rows = logits.size(0)
    row_max = logits.new_empty(num_rows, dtype=torch.float32)
    return row_max, row_max.new_empty((4 if with_entropy else 3, num_rows))


@torch.library.custom_op("megallm_kernels::cross_entropy_losses", mutates_args=())
def losses(
    row_max: torch.Tensor, sums: torch.Tensor, labels: torch.Tensor, *, vocab_size: int,
    ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss [T], lse [T], entropy [T] or [0]); see `cross_entropy_kernels.losses`."""
    return kernels.losses(
        row_max, sums, labels, vocab_size=vocab_size, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss,
    )  # fmt: skip


@losses.register_fake
def _losses_fake(row_max, sums, labels, **_: Any) -> Any:  # type: ignore[no-untyped-def]
    num_entropies = row_max.size(0) if sums.size(0) == 4 else 0
    return torch.empty_like(row_max), torch.empty_like(row_max), row_max.new_empty(num_entropies)


@torch.library.custom_op("megallm_kernels::cross_entropy_gradient_", mutates_args={"logits"})
def gradient_(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, dloss: torch.Tensor,
    dlse: torch.Tensor | None = None, entropy: torch.Tensor | None = None, dentropy: torch.Tensor | None = None, *,
    vocab_size: int, first_column: int = 0, valid_columns: int | None = None, ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> None:  # fmt: skip
    """Overwrites the logits [T, V'] with their gradient; see `cross_entropy_kernels.gradient_`."""
    kernels.gradient_(
        logits, labels, lse, dloss, dlse, entropy, dentropy, vocab_size=vocab_size, first_column=first_column,
        valid_columns=valid_columns, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip


@torch.library.custom_op("megallm_kernels::token_losses", mutates_args=())
def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, ignore_index: int, label_smoothing: float,
    z_loss: float, with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss [T], lse [T], entropy [T] or [0]), fp32, of logits [T, V'] on one rank. Differentiable in all three."""
    row_max, sums = kernels.statistics(
        logits, labels, valid_columns=vocab_size, ignore_index=ignore_index, with_entropy=with_entropy
    )
    return kernels.losses(
        row_max, sums, labels, vocab_size=vocab_size, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss,
    )  # fmt: skip


@token_losses.register_fake
def _token_losses_fake(logits, *rest: Any) -> Any:  # type: ignore[no-untyped-def]
    num_rows = logits.size(0)
    loss = logits.new_empty(num_rows, dtype=torch.float32)
    return loss, torch.empty_like(loss), loss.new_empty(num_rows if rest[-1] else 0)


@torch.library.custom_op("megallm_kernels::token_losses_backward", mutates_args=())
def token_losses_backward(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, entropy: torch.Tensor, dloss: torch.Tensor,
    dlse: torch.Tensor | None, dentropy: torch.Tensor | None, vocab_size: int, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the logits, in a new tensor [T, V']."""
    return kernels.gradient_(
        logits, labels, lse, dloss, dlse, entropy, dentropy, vocab_size=vocab_size, valid_columns=vocab_size,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        out=torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
    )  # fmt: skip


@token_losses_backward.register_fake
def _token_losses_backward_fake(logits, *_: Any) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, labels, *ctx.settings, ctx.with_entropy = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, labels, lse, entropy)
    ctx.set_materialize_grads(False)


_Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _incoming(ctx: Any, lse: torch.Tensor, grads: _Grads) -> tuple[torch.Tensor, Any, Any]:
    """dloss, zeros where the loss was not used; dlse and dentropy, None where they were not."""
    dloss, dlse, dentropy = grads
    return torch.zeros_like(lse) if dloss is None else dloss, dlse, dentropy if ctx.with_entropy else None


def _token_losses_grad(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    logits, labels, lse, entropy = ctx.saved_tensors
    dlogits = token_losses_backward(logits, labels, lse, entropy, *_incoming(ctx, lse, grads), *ctx.settings)  # type: ignore[arg-type]
    return dlogits, *[None] * 6


token_losses.register_autograd(_token_losses_grad, setup_context=_save)


class _InPlace(torch.autograd.Function):
    """`token_losses` whose backward overwrites the logits."""

    @staticmethod
    def forward(logits: torch.Tensor, *rest: Any) -> Any:
        with torch.no_grad():
            return token_losses(logits, *rest)

    setup_context = staticmethod(_save)  # type: ignore[assignment]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        logits, labels, lse, entropy = ctx.saved_tensors
        dloss, dlse, dentropy = _incoming(ctx, lse, grads)  # type: ignore[arg-type]
        vocab_size, ignore_index, label_smoothing, z_loss = ctx.settings
        gradient_(
            logits, labels, lse, dloss, dlse, entropy, dentropy, vocab_size=vocab_size, valid_columns=vocab_size,
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip
        return logits, *[None] * 6
