"""The learning rate of every step, as a pure function of its index: nothing to save, nothing to restore.

`step` counts from 0 and is the step about to be taken. W = warmup_steps, D = decay_steps:

    rate    peak      ____________________            cosine, linear: the decay starts right after the warm-up
                    /                     \\           wsd: it takes the last D of all steps
            min    /                       \\______    constant: never
            step  0     W-1  W        start   start+D

Warm-up ends with the full peak at step W - 1, and step W is at the peak too: no step is taken at rate 0, and a run of
one step runs at the peak. The minimum is reached at `start + D`, one step after the last of a run that ends there.
"""

from __future__ import annotations

import math

from megallm.config.optim import OptimConfig
from megallm.config.resolve import resolve_optim


def learning_rate_at(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of the optimizer step with 0-based index `step` in a run of `total_steps`.

    peak * (step + 1) / W while step < W; then with p = (step - start) / D clipped to [0, 1]:
    linear and wsd: peak + (min - peak) p; cosine: min + (peak - min) (1 + cos(pi p)) / 2 (arXiv 1608.03983, equation 5,
    one period). start = W, for wsd total_steps - D (arXiv 2404.06395, section 4). Later steps keep the minimum.
    """
    if step < 0:
        raise ValueError(f"step ({step}) must be 0 or more: it is the index of the step about to be taken")
    resolved = resolve_optim(config, total_steps=total_steps)
    peak, minimum, decay_steps = resolved.learning_rate, resolved.min_learning_rate, resolved.decay_steps
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return peak
    assert minimum is not None and decay_steps is not None  # resolve_optim decides them
    start = max(config.warmup_steps, total_steps - decay_steps) if config.lr_schedule == "wsd" else config.warmup_steps
    progress = min(max((step - start) / decay_steps, 0.0), 1.0)
    if config.lr_schedule == "cosine":
        return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak + (minimum - peak) * progress
