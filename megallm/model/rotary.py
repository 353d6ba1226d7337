"""Tables of cos and sin for the rotary embedding.

Letters: B sequences, S positions, T = B * S tokens, D head dim.
"""

from __future__ import annotations

import torch

from megallm.config.model import ModelConfig
from megallm.model.context import TokenContext
from megallm.ops.rope_frequencies import rope_frequencies


class RotaryTable:
    """cos and sin of position * frequency, grown on demand and kept."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        inv_freq, self._factor = rope_frequencies(
            head_dim=config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            max_position_embeddings=config.max_position_embeddings,
        )
        self._inv_freq = inv_freq.to(device=device, dtype=torch.float32)
        self._dtype = dtype
        self._table = self._rows(0)
        self._last: tuple[int, int, torch.Tensor, torch.Tensor] | None = None

    @property
    def table(self) -> torch.Tensor:
        """cos and sin [2, positions, D/2], as they are now."""
        return self._table

    def lookup(self, context: TokenContext, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, D/2] of the microbatch's positions, all below num_positions."""
        if self._table.size(1) < num_positions:
            self._table = self._rows(num_positions)
        if context.position_ids is not None:
            cos, sin = self._table[:, context.position_ids]
            return cos, sin
        shape = (context.batch_size, context.seq_length)
        if self._last is None or self._last[:2] != shape:
            cos, sin = self._table[:, : shape[1]].repeat(1, shape[0], 1)
            self._last = (*shape, cos, sin)
        return self._last[2], self._last[3]

    def _rows(self, num_positions: int) -> torch.Tensor:
        """[2, positions, D/2]; the angle is computed in fp32, as Hugging Face's models do."""
        positions = torch.arange(num_positions, dtype=torch.float32, device=self._inv_freq.device)
        angle = torch.outer(positions, self._inv_freq)
        return (torch.stack([angle.cos(), angle.sin()]) * self._factor).to(self._dtype)
