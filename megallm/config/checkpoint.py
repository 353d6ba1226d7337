"""Where a run is saved and resumed from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save: str | None = None
    """Directory of checkpoints, metrics and plots; None = nothing is saved."""
    load: str | None = None
    """Directory to resume from. auto = `save`, if it holds a checkpoint."""
    save_every: int = 0
    """Steps between checkpoints; 0 = only at the end."""
    keep: int = 2
    """Newest checkpoints kept; 0 = all."""
