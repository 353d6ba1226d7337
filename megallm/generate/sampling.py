"""From logits to the next token, and its log-probability.

    logits -> repetition penalty -> / temperature -> exp, fp64 -> top-k, top-p, min-p -> a race down a tree of sums

A sample is a function of (seed, prompt, number of the sample, position) and of its own logits: uniform numbers come
from a counter-based generator (parallel/random.py).

    sums of 16 sums      [ . . . . ]      the child with the largest weight / exponential number is entered: with
    sums of 16 weights   [ . . . . . ]    probability weight / sum of the 16, so a token with the product of these
    weights of tokens    [ . . . . . . ]

One number and the cumulative distribution would do, but logits that differ in their last bits (those of two layouts, or
of two shapes of a product) move all borders between tokens that come later: with many likely tokens, another one is
drawn that often. A race's outcome turns only where its two first are as close to each other as the bits, at five levels
for 100,000 tokens. It is faster as well: a cumulative sum of the vocabulary takes longer than these sums.

Letters: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megallm.config.rules import whole
from megallm.parallel import random

_CHILDREN, _MAX_LEVELS = 16, 8
"""Of a node of the tree of sums; levels, so vocabularies have at most 16^8 tokens."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and what ends a sequence."""

    temperature: float = 0.0
    """Divides the logits; 0 = greedy."""
    top_k: int = 0
    """Only the k most likely tokens, and those as likely as the k-th; 0 = all."""
    top_p: float = 1.0
    """Only the most likely tokens whose probabilities first add up to this, of equal ones those of lower ids; 1 =
    all."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the most likely one; 0 = all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt or answer, multiplies the negative ones (arXiv 1909.05858)."""
    seed: int = 0
    """Of the samples."""
    stop_ids: tuple[int, ...] = ()
    """A sequence ends with the first of these."""
    stop_strings: tuple[str, ...] = ()
    """A sequence ends with the token that completes one of these in its text."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature ({self.temperature}) must be 0 (greedy) or above")
        whole(self, "top_k", "seed")
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must be 0 (all tokens) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p ({self.top_p}) must be above 0, and at most 1 (all tokens)")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p ({self.min_p}) must be between 0 (all tokens) and 1")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty ({self.repetition_penalty}) must be above 0; 1 = none")
        stops = self.stop_strings
        if not isinstance(stops, tuple | list) or not all(isinstance(each, str) for each in stops):
            raise ValueError(f"stop_strings ({stops!r}) must be a tuple of texts, such as ('User:',)")
        if "" in stops:
            raise ValueError("an empty stop string would end every sequence at once: leave it out")

    @property
    def is_plain(self) -> bool:
        """Whether tokens follow the softmax at the temperature: what importance ratios of training rest on."""
        return self.temperature > 0.0 and not self.truncates and self.repetition_penalty == 1.0

    @property
    def truncates(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    *,
    keys: torch.Tensor | None,
    positions: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B] int64, their log-probabilities [B] fp64) for logits [B, V] fp32.

    keys [B] int64 of the samples (`random.signed`) and positions [B] int64 of the new tokens; keys None = greedy.
    seen [B, V] bool: tokens that the repetition penalty is for.
    Log-probabilities are of the softmax of the logits at the temperature (greedy: 1), as training computes them:
    before the penalty, and with no token left out. NaN where the logits are not finite.
    """
    temperature = sampling.temperature or 1.0
    scores = logits
    if seen is not None:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if keys is None:
        tokens = scores.argmax(dim=-1)
        picked = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
        return tokens, (picked - logits.logsumexp(dim=-1)).double()
    assert positions is not None
    weights = _weights(scores, temperature)
    if sampling.truncates:
        weights = _filtered(weights, sampling)
    tokens, total = _race(weights, keys, positions)
    if seen is not None or sampling.truncates:
        total = _weights(logits, temperature).sum(dim=-1)
    picked = logits.gather(1, tokens.unsqueeze(1)).squeeze(1).double() - logits.amax(dim=-1).double()
    return tokens, picked / temperature - total.log()


def _race(
    weights: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B], drawn in proportion to their weights [B, V]; the sum of the weights [B])."""
    levels = [_filled(weights)]
    while levels[-1].size(1) > _CHILDREN:
        levels.append(_filled(levels[-1].unflatten(1, (-1, _CHILDREN)).sum(dim=-1)))
    total = levels[-1].sum(dim=-1)
    places = torch.arange(_MAX_LEVELS * _CHILDREN, device=weights.device)[: len(levels) * _CHILDREN]
    index = positions.unsqueeze(1) * (_MAX_LEVELS * _CHILDREN) + places
    times = random.uniform(index, keys.unsqueeze(1)).log_().neg_()  # exponential; the least time / weight wins
    node = torch.zeros_like(positions)
    children = places[:_CHILDREN]
    for depth, level in enumerate(reversed(levels)):
        at = node.unsqueeze(1) * _CHILDREN + children
        own = level.gather(1, at) / times[:, depth * _CHILDREN : (depth + 1) * _CHILDREN]
        node = at.gather(1, own.argmax(dim=1, keepdim=True)).squeeze(1)
    return node, total


def _filled(level: torch.Tensor) -> torch.Tensor:
    """[B, n] with zeros up to a multiple of the number of children."""
    missing = -level.size(1) % _CHILDREN
    return F.pad(level, (0, missing)) if missing else level


def _weights(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp((logits - max) / temperature) [B, V], fp64."""
    scaled = logits.double()
    return scaled.sub_(scaled.amax(dim=-1, keepdim=True)).div_(temperature).exp_()


def _filtered(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The weights [B, V], 0 for tokens that are left out. Each filter looks at what the one before it has left."""
    if 0 < sampling.top_k < weights.size(-1):
        weights = weights.masked_fill(weights < weights.topk(sampling.top_k, dim=-1).values[:, -1:], 0.0)
    if sampling.top_p < 1.0:
        ordered, tokens = weights.sort(dim=-1, descending=True, stable=True)  # of equal ones, those of lower ids first
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        weights = torch.zeros_like(weights).scatter_(1, tokens, ordered)
    if sampling.min_p > 0.0:  # what the other filters have left always holds the most likely token
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
    return weights
