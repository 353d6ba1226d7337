"""From logits to the next token.

A sample is a function of (seed, prompt's place, position): one uniform number picks from the cumulative distribution,
so neither the layout nor what else is in the batch can change it.

Letters: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megallm.parallel import random


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """Divides the logits; 0 = greedy."""
    seed: int = 0
    """Of the samples."""
    stop_ids: tuple[int, ...] = ()
    """A sequence ends with the first of these."""

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ValueError(f"temperature ({self.temperature}) must be 0 (greedy) or above")


def next_tokens(
    logits: torch.Tensor, sampling: Sampling, *, prompt_ids: list[int], positions: torch.Tensor
) -> torch.Tensor:
    """[B] int64 from logits [B, V] fp32; `prompt_ids`: the prompts' places, `positions` [B]: the new tokens' places."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits.double() / sampling.temperature, dim=-1).cumsum(dim=-1)
    draws = [
        random.uniform(positions[row], random.key(sampling.seed, "sample", prompt))
        for row, prompt in enumerate(prompt_ids)
    ]
    threshold = torch.stack(draws).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=logits.size(-1) - 1)
