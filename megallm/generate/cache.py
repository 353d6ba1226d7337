"""Keys and values of the positions seen so far, for the layers and heads of this rank.

Rows are right-padded prompts: row b has its own length, and a new token overwrites the padding behind it.

Letters: B sequences, S new positions, L longest length, K key/value heads of this rank, D head dim.
"""

from __future__ import annotations

import torch


class KVCache:
    """Plain preallocated cache: two tensors [B, L, K, D] a layer, made when the layer first writes."""

    def __init__(self, *, max_length: int) -> None:
        self._max_length = max_length
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._positions: torch.Tensor | None = None
        self._visible = 0

    def at(self, positions: torch.Tensor, *, visible: int) -> KVCache:
        """Sets where the next forward writes (positions [B, S] int64) and how many places attention sees."""
        self._positions, self._visible = positions, visible
        return self

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes k and v [B, S, K, D] at the set positions; returns the first `visible` places of both."""
        if layer not in self._layers:
            shape = (k.size(0), self._max_length, *k.shape[2:])
            self._layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        assert self._positions is not None
        rows = torch.arange(k.size(0), device=k.device).unsqueeze(1)
        keys, values = self._layers[layer]
        keys[rows, self._positions] = k
        values[rows, self._positions] = v
        return keys[:, : self._visible], values[:, : self._visible]
