"""Checks of cross-entropy, of the lm head with its loss, and of what RL trainers take: log-probabilities and entropy.

Letters: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch

from gpu_parts import references
from gpu_parts.checks import CheckUnit
from gpu_parts.compare import Finding, compare, identical, poisoned
from gpu_parts.place import Place

IGNORED = -100


def units(place: Place) -> list[CheckUnit]:
    """Vocabulary sizes on both sides of each table row's end; the head with one chunk and with several."""
    sizes = (101, 300, 1000) if place.tiny else (101, 256, 500, 512, 1000, 1024, 8191, 16384, 32000, 128256)
    result = [
        CheckUnit(op="cross_entropy", name=f"V {size}", run=partial(_cross_entropy, vocab=size, dtype=None))
        for size in sizes
    ]
    fp32 = partial(_cross_entropy, vocab=place.pick(32001, 77), dtype=torch.float32)
    result.append(CheckUnit(op="cross_entropy", name="fp32", run=fp32))
    for chunk in (0, place.pick(256, 4)):
        run = partial(_linear, chunk_rows=chunk)
        result.append(CheckUnit(op="linear_cross_entropy", name=f"chunk {chunk or 'auto'}", run=run))
    if not place.tiny:
        result.append(CheckUnit(op="cross_entropy", name="over 2^31 elements", run=_far))
    return result


def _labels(place: Place, generator: torch.Generator, tokens: int, vocab: int) -> torch.Tensor:
    """[T] int64, every seventh one ignored."""
    labels = torch.randint(0, vocab, (tokens,), generator=generator, device=place.device)
    labels[::7] = IGNORED
    return labels


def _token_losses(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [T], entropy [T]) in fp64; 0 for ignored tokens."""
    lse = torch.logsumexp(logits, dim=-1)
    kept = labels != IGNORED
    at_label = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    loss = (1 - smoothing) * (lse - at_label) + smoothing * (lse - logits.mean(-1)) + z_loss * lse.square()
    entropy = lse - (torch.softmax(logits, -1) * logits).sum(-1)
    return torch.where(kept, loss, 0.0), torch.where(kept, entropy, 0.0)


def _cross_entropy(
    place: Place, generator: torch.Generator, *, vocab: int, dtype: torch.dtype | None
) -> list[Finding]:
    """Sum of losses with smoothing and z-loss, log-probabilities with entropy; padding columns, in place and not."""
    from megallm_kernels.cross_entropy import cross_entropy, token_logprobs

    tokens, padding = place.pick(129, 9), 3
    logits = place.normal(tokens, vocab + padding, generator=generator, dtype=dtype) * 3.0
    labels = _labels(place, generator, tokens, vocab)
    weights = place.normal(tokens, generator=generator, dtype=torch.float32)
    (leaf,) = references.wide(logits)
    loss, entropy = _token_losses(leaf[:, :vocab], labels, 0.1, 1e-4)
    (expected,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    findings, runs = [], []
    for in_place in (False, True):
        own = (logits.detach().clone()).requires_grad_()
        with poisoned():
            total, count = cross_entropy(
                own, labels, vocab_size=vocab, label_smoothing=0.1, z_loss=1e-4, inplace_backward=in_place
            )
            (grad,) = torch.autograd.grad(total, own)
        findings.append(compare("loss", total, loss.sum(), terms=vocab))
        findings.append(compare("gradient", grad, expected, terms=vocab))
        findings.append(compare("count", count, (labels != IGNORED).sum().double(), dtype=torch.float32))
        runs.append(grad)
    findings.append(identical("gradient in place and not", runs[0], runs[1]))
    plain, _ = _token_losses(leaf[:, :vocab], labels, 0.0, 0.0)
    (expected,) = torch.autograd.grad(((-plain + 0.3 * entropy) * weights.double()).sum(), leaf)
    own = logits.detach().clone().requires_grad_()
    with poisoned():
        logprobs, spread = token_logprobs(own, labels, vocab_size=vocab, with_entropy=True)
        assert spread is not None
        (grad,) = torch.autograd.grad(((logprobs + 0.3 * spread) * weights).sum(), own)
    findings.append(compare("logprobs", logprobs, -plain, terms=vocab))
    findings.append(compare("entropy", spread, entropy, terms=4 * vocab))
    findings.append(compare("gradient of logprobs and entropy", grad, expected, terms=4 * vocab))
    return findings


def _far(place: Place, generator: torch.Generator) -> list[Finding]:
    """The last rows of more than 2^31 logits; the others are not read."""
    from megallm_kernels.cross_entropy import cross_entropy

    vocab, tokens, last = 128256, 17000, 8
    logits = torch.zeros(tokens, vocab, device=place.device, dtype=place.dtype)
    logits[-last:] = place.normal(last, vocab, generator=generator)
    labels = torch.full((tokens,), IGNORED, device=place.device)
    labels[-last:] = torch.randint(0, vocab, (last,), generator=generator, device=place.device)
    (leaf,) = references.wide(logits[-last:])
    loss = _token_losses(leaf, labels[-last:], 0.0, 0.0)[0].sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    total, _ = cross_entropy(logits.requires_grad_(), labels, inplace_backward=True)
    (grad,) = torch.autograd.grad(total, logits)
    findings = [compare("loss", total, loss, terms=vocab)]
    return [*findings, compare("gradient of the last rows", grad[-last:], expected, terms=vocab)]


def _linear(place: Place, generator: torch.Generator, *, chunk_rows: int) -> list[Finding]:
    """Both forms of the head with its loss, against the logits in fp64 from the same rounded inputs."""
    from megallm_kernels.linear_cross_entropy import linear_cross_entropy, linear_token_logprobs

    tokens, hidden, vocab = place.pick(700, 10), place.pick(512, 24), place.pick(32000, 53)
    x = place.normal(tokens, hidden, generator=generator)
    weight = place.normal(vocab, hidden, generator=generator) * hidden**-0.5
    labels = _labels(place, generator, tokens, vocab)
    scale = torch.full((tokens,), 1.0 / tokens, device=place.device)
    leaves = references.wide(x, weight)
    loss, _ = _token_losses(leaves[0] @ leaves[1].t(), labels, 0.0, 0.0)
    expected = torch.autograd.grad(loss.sum() / tokens, leaves)
    findings, runs = [], []
    for _ in range(2):
        own = [t.detach().clone().requires_grad_() for t in (x, weight)]
        with poisoned():
            total, _ = linear_cross_entropy(own[0], own[1], labels, token_weight=scale, chunk_rows=chunk_rows)
            runs.append((total, *torch.autograd.grad(total, own)))
    # logits and dlogits are rounded to the dtype, then the gradients
    wanted = (loss.sum() / tokens, *expected)
    for name, out, again, reference in zip(("loss", "dhidden", "dweight"), *runs, wanted, strict=True):
        findings.append(compare(name, out, reference, roundings=4, terms=vocab, dtype=place.dtype))
        findings.append(identical(name, out, again))
    own = [t.detach().clone().requires_grad_() for t in (x, weight)]
    with poisoned():
        logprobs, _ = linear_token_logprobs(own[0], own[1], labels, chunk_rows=chunk_rows)
        grads = torch.autograd.grad((logprobs * scale).sum(), own)
    findings.append(compare("logprobs", logprobs, -loss, roundings=4, terms=vocab, dtype=place.dtype))
    for name, out, reference in zip(("dhidden", "dweight"), grads, expected, strict=True):
        findings.append(compare(f"{name} of logprobs", out, -reference, roundings=4, terms=vocab))
    return findings
