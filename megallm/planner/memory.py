"""Bytes and traffic of model states under ZeRO, by formula (Rajbhandari et al., arXiv 1910.02054, sections 5 and 7).

Letters: P parameters, N ranks that share shards, m microbatches of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What one rank holds, in bytes, all the time."""

    parameters: Fraction
    gradients: Fraction
    optimizer: Fraction
    """Moments, and fp32 master weights of low-precision parameters."""

    @property
    def total(self) -> Fraction:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    num_parameters: int,
    *,
    zero: int,
    num_shards: int,
    parameter_bytes: int = 2,
    gradient_bytes: int = 4,
    optimizer_bytes: int = 12,
) -> StateBytes:
    """Model states of a rank with `num_parameters` (P) at a ZeRO stage over `num_shards` (N) ranks.

    The sizes are bytes a parameter: by default bf16 parameters, fp32 sums of gradients, fp32 masters and two moments.
    The paper's are 2, 2 and 12.
    """
    if zero not in (0, 1, 2, 3) or num_shards < 1:
        raise ValueError(f"zero {zero} over {num_shards} ranks: use stages 0 to 3 and at least one rank")

    def held(size: int, sharded_from: int) -> Fraction:
        return Fraction(size * num_parameters, num_shards if zero >= sharded_from else 1)

    return StateBytes(
        parameters=held(parameter_bytes, 3), gradients=held(gradient_bytes, 2), optimizer=held(optimizer_bytes, 1)
    )


def elements_sent(num_parameters: int, *, zero: int, num_shards: int, num_microbatches: int = 1) -> Fraction:
    """Elements one rank sends in a step for gradients and parameters, with ring algorithms; at stage 3 at most."""
    gathers = {0: 1, 1: 1, 2: 1, 3: 2 * num_microbatches}[zero]  # of the all-reduce of stage 0, half is a gather
    reductions = num_microbatches if zero >= 2 else 1
    return (gathers + reductions) * num_parameters * Fraction(num_shards - 1, num_shards)
