"""What theory says about each schedule: bubble and live activations. The simulator must agree; tests hold both equal.

p = pp, v = virtual stages, m = microbatches. Exact for equal stages and free p2p.
"""

from __future__ import annotations


def bubble_formula(name: str, *, pp: int, virtual_stages: int, num_microbatches: int) -> float:
    """Idle time over ideal compute time, m (tf + tb), of a rank.

    gpipe, 1f1b: (p - 1) / m; interleaved: (p - 1) / (v m) (SC21, sections 2.2.1 and 2.2.2). Breadth-first gpipe with
    v > 1 equals interleaved if m >= p; with fewer microbatches each of the v - 1 returns to the first rank also waits
    for p - m of the p hops round the ranks.
    """
    idle = pp - 1
    if name == "gpipe":
        idle += (virtual_stages - 1) * max(0, pp - num_microbatches)
    return idle / (virtual_stages * num_microbatches)


def peak_live_formula(name: str, *, pp: int, virtual_stages: int, num_microbatches: int, rank: int) -> int:
    """Most chunk-microbatches whose activations this rank holds at once (divide by v for whole-rank microbatches).

    gpipe: v m. 1f1b: p - r. interleaved: 2 (p - r - 1) + (v - 1) p + 1, which on rank 0 is
    v p (1 + (p - 1) / (p v)), the factor of arXiv 2205.05198, section 4.2.3. Never more than v m.
    """
    every = virtual_stages * num_microbatches
    if name == "gpipe":
        return every
    if name == "1f1b" or virtual_stages == 1:
        return min(pp - rank, every)
    return min(2 * (pp - rank - 1) + (virtual_stages - 1) * pp + 1, every)
