"""fp16's dynamic loss scale (Micikevicius et al., arXiv 1710.03740, section 3.2), on the device: nothing waits for it.

    bad step     the update is skipped; the scale halves if this is the `hysteresis`-th since it last grew, or later
    good step    the `window`-th in a row doubles the scale
All ranks see the same bad steps, so all hold the same scale.
"""

from __future__ import annotations

import torch

from megallm.config.numerics import NumericsConfig

_LARGEST, _SMALLEST = 2.0**40, 1.0


class LossScale:
    """The scale and what decides when it changes."""

    def __init__(self, numerics: NumericsConfig, device: torch.device) -> None:
        self._window, self._hysteresis = float(numerics.loss_scale_window), float(numerics.loss_scale_hysteresis)
        self.value = torch.tensor(numerics.loss_scale, dtype=torch.float32, device=device)
        """0-d fp32."""
        self._good = torch.zeros_like(self.value)
        self._patience = torch.full_like(self.value, self._hysteresis)

    def update_(self, is_bad: torch.Tensor) -> None:
        """After a step; `is_bad` 0-d fp32: 0 or 1."""
        self._patience.sub_(is_bad)
        halves = (is_bad > 0) & (self._patience <= 0)
        self._good.add_(1).mul_(1 - is_bad)
        doubles = self._good >= self._window
        self.value.mul_(1 - 0.5 * halves).mul_(1 + 1.0 * doubles).clamp_(_SMALLEST, _LARGEST)
        self._good.mul_(~doubles)
        self._patience.copy_(torch.where(doubles, self._hysteresis, self._patience))

    def state(self) -> list[float]:
        """For a checkpoint: scale, good steps in a row, bad steps to go until it halves."""
        return [float(self.value), float(self._good), float(self._patience)]

    def load(self, state: list[float]) -> None:
        """Takes over `state()`."""
        for tensor, value in zip((self.value, self._good, self._patience), state, strict=True):
            tensor.fill_(value)
