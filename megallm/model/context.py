"""What the layers need to know about the microbatch that passes through them.

Letters: B sequences, S positions, T = B * S tokens (batch-major), t tp size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from megallm.ops.documents import Documents
from megallm.parallel import random


class Cache(Protocol):
    """Keys and values of earlier positions."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        """Stores k and v [T, K, D] of a layer; attention of q [T, N, D] to all that is stored, [T, N * D].

        None if the tokens see each other only, as without a cache.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout masks, and noise, as a function of (key, layer, place, global token): equal on every layout."""

    key: int
    """Made from the seed and the step."""
    sample_ids: torch.Tensor
    """[B] int64, global number of each sequence."""
    noise: float = 0.0
    """alpha of uniform noise on the embeddings (arXiv 2310.05914, algorithm 1)."""

    def noisy(self, x: torch.Tensor, *, first_token: int, seq_length: int) -> torch.Tensor:
        """x [n, H] of tokens as for `hidden`, plus noise in +- alpha / sqrt(S H)."""
        index = self._index(x, first_token, seq_length)
        noise = random.uniform(index, random.key(self.key, "noise")) * 2.0 - 1.0
        return x + (noise * (self.noise / math.sqrt(seq_length * x.size(-1)))).to(x.dtype)

    def hidden(
        self,
        x: torch.Tensor,
        drop: float,
        *,
        layer: int | str,
        place: str,
        first_token: int,
        seq_length: int,
        first_feature: int = 0,
        num_features: int | None = None,
    ) -> torch.Tensor:
        """x [n, h] = tokens first_token .. first_token+n-1 of the microbatch, with dropped elements zeroed.

        Its features are first_feature .. first_feature+h-1 of num_features (None = of h).
        """
        index = self._index(x, first_token, seq_length, first_feature, num_features)
        keep = random.keep_mask(index, key=random.key(self.key, layer, place), drop=drop)
        return x * (keep.to(x.dtype) / (1.0 - drop))

    def _index(
        self,
        x: torch.Tensor,
        first_token: int,
        seq_length: int,
        first_feature: int = 0,
        num_features: int | None = None,
    ) -> torch.Tensor:
        """Global number of every element of x [n, h]."""
        token = torch.arange(first_token, first_token + x.size(0), device=x.device)
        token = self.sample_ids[token // seq_length] * seq_length + token % seq_length
        feature = torch.arange(first_feature, first_feature + x.size(-1), device=x.device)
        return token.unsqueeze(-1) * (x.size(-1) if num_features is None else num_features) + feature

    def attention(
        self, drop: float, *, layer: int, first_head: int, num_heads: int, all_heads: int, seq_length: int
    ) -> torch.Tensor:
        """[B, num_heads, S, S]: 0 for dropped probabilities, 1 / (1 - drop) for kept ones, fp64."""
        device = self.sample_ids.device
        head = torch.arange(first_head, first_head + num_heads, device=device)
        row = (self.sample_ids.unsqueeze(-1) * all_heads + head).view(-1, num_heads, 1, 1)
        i = torch.arange(seq_length, device=device)
        index = (row * seq_length + i.unsqueeze(-1)) * seq_length + i
        return random.keep_mask(index, key=random.key(self.key, layer, "attention"), drop=drop).double() / (1.0 - drop)


@dataclass(frozen=True, kw_only=True)
class TokenContext:
    """One microbatch as the layers see it."""

    batch_size: int
    """B."""
    seq_length: int
    """S."""
    position_ids: torch.Tensor | None = None
    """[T] int64; None = 0 .. S-1 in every sequence."""
    num_positions: int | None = None
    """All position_ids are below this; None = below max_position_embeddings."""
    documents: Documents | None = None
    """What attends to itself alone; None = whole sequences."""
    dropout: Dropout | None = None
    """None = no dropout (evaluation, or all rates 0)."""
    outputs: torch.Tensor | None = None
    """[n] int64, ascending: the tokens of which the last layer makes an output, where it can; None = all."""
    cache: Cache | None = None
    """Set while generating."""
