"""How a model is laid over ranks. Data parallelism is what remains of the world size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["gpipe", "1f1b", "interleaved"]
Offload = Literal["none", "optimizer", "optimizer+params"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh axes and the pipeline's schedule."""

    tp: int = 1
    """Tensor-parallel ranks; keep it within one node (SC21, section 5.4)."""
    pp: int = 1
    """Pipeline stages' ranks."""
    cp: int = 1
    """Context-parallel ranks; only 1 for now."""
    ep: int = 1
    """Expert-parallel ranks; only 1 for now."""
    sequence_parallel: bool | None = None
    """Split norms, residuals and dropout over tp along tokens (arXiv 2205.05198). auto = on when tp > 1."""
    schedule: ScheduleName | None = None
    """Pipeline schedule. auto = `interleaved` when virtual_stages > 1, else `1f1b`."""
    virtual_stages: int = 1
    """Model chunks per pipeline rank; more of them shrink the bubble and cost p2p traffic."""
    pipeline_partition: tuple[int, ...] | None = None
    """Transformer layers of each of the pp * virtual_stages stages, in order. auto = balanced, counting embedding
    and head."""
    zero: Literal[0, 1, 2, 3] = 0
    """What data-parallel ranks share out (arXiv 1910.02054): 1 = optimizer state, 2 = also gradients, 3 = also
    parameters."""
    zero_shard_size: int | None = None
    """Ranks over which ZeRO shards; groups of so many neighbours replicate each other. auto = all data-parallel
    ranks."""
    zero_keep: bool = False
    """ZeRO 3: gathered parameters stay until the update, instead of being gathered for each pass of a layer."""
    offload: Offload = "none"
    """What lives in the host's memory: `optimizer` = its state and gradient sums, updated there by the CPU;
    `optimizer+params` = also parameters between their uses (ZeRO 3)."""
    bucket_size: int = 25_000_000
    """Gradient elements reduced together; the reduction of a full bucket overlaps the rest of backward."""
