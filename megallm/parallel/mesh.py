"""The mesh: which rank sits where on the axes pp, dp, cp and tp. One object, passed, never global.

    global rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank        (within the mesh's own ranks)

    tp=2 pp=2 dp=2:      pp_rank 0          pp_rank 1
              dp_rank 0  [ 0  1 ]           [ 4  5 ]       [..] = one tp group: neighbours, so one node
              dp_rank 1  [ 2  3 ]           [ 6  7 ]

dp may be cut once more, dp_rank = replicate_rank * shard + shard_rank: ZeRO shards over neighbours (the GPUs of a node,
say) and replicates across them. Without that, shard is dp itself.

tp is innermost because it moves the most bytes per layer and needs the fastest links; pp is outermost because it
moves the fewest (SC21, section 3.4). Several meshes may live in one process, over the same ranks or over others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megallm.parallel.gloo_threads import let_gloo_step_back
from megallm.parallel.recorder import Recorder


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one along one axis only."""

    name: str
    size: int
    rank: int
    """This rank's place on the axis, 0 .. size-1."""
    ranks: tuple[int, ...]
    """Global ranks in order of place."""
    group: dist.ProcessGroup | None = field(repr=False)
    """None when size is 1: then every collective is the identity."""
    recorder: Recorder = field(repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank is at place 0."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank is at place size - 1."""
        return self.rank == self.size - 1

    @property
    def backend(self) -> str:
        """Who carries its collectives out: "nccl", "gloo"; "none" when size is 1."""
        return "none" if self.group is None else str(dist.get_backend(self.group))


@dataclass(frozen=True)
class Mesh:
    """All axes as seen from this rank."""

    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    world: Axis
    """Every rank of the mesh."""
    shard: Axis
    """The data-parallel ranks over which ZeRO divides what it shards."""
    replicate: Axis
    """The data-parallel ranks that hold the same shards."""
    embedding: Axis
    """The first and the last pipeline rank, which share a tied embedding; of size 1 on all others."""
    device: torch.device
    recorder: Recorder = field(repr=False)

    @staticmethod
    def build(
        *,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        dp: int | None = None,
        shard_size: int | None = None,
        device: torch.device | str | None = None,
        ranks: tuple[int, ...] | None = None,
    ) -> Mesh:
        """This rank's mesh over `ranks` (default: all). A collective: every rank of the job calls it alike.

        dp defaults to what remains of the ranks, shard_size to dp. Raises ValueError when the degrees do not multiply
        to their number, when shard_size does not divide dp, or when this rank is not among `ranks`.
        """
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        members = tuple(range(world_size)) if ranks is None else tuple(ranks)
        model_size = tp * pp * cp
        if dp is None:
            if len(members) % model_size:
                raise ValueError(
                    f"{len(members)} ranks are not divisible by tp {tp} x pp {pp} x cp {cp} = {model_size}: "
                    f"use a multiple of {model_size} ranks"
                )
            dp = len(members) // model_size
        if dp * model_size != len(members):
            raise ValueError(f"tp {tp} x pp {pp} x cp {cp} x dp {dp} = {dp * model_size}, but {len(members)} ranks")
        if rank not in members:
            raise ValueError(f"rank {rank} is not one of the mesh's ranks {members}")
        shard_size = dp if shard_size is None else shard_size
        if shard_size < 1 or dp % shard_size:
            raise ValueError(f"shard size {shard_size} does not divide dp {dp}: use a divisor, such as {dp}")
        recorder = Recorder()
        grid = torch.tensor(members).view(pp, dp, cp, tp)
        axes = {
            name: _own_axis(name, _lines(grid, dim), rank, recorder)
            for dim, name in enumerate(("pp", "dp", "cp", "tp"))
        }
        axes["shard"], axes["replicate"] = axes["dp"], _own_axis("replicate", [(rank,)], rank, recorder)
        if shard_size < dp:
            split = grid.view(pp, dp // shard_size, shard_size, cp, tp)
            axes["shard"] = _own_axis("shard", _lines(split, 2), rank, recorder)
            axes["replicate"] = _own_axis("replicate", _lines(split, 1), rank, recorder)
        endpoints: list[tuple[int, ...]] = [(line[0], line[-1]) if pp > 1 else (line[0],) for line in _lines(grid, 0)]
        embedding = _own_axis("embedding", endpoints, rank, recorder)
        world = _own_axis("world", [members], rank, recorder)
        if world.backend == "gloo":
            let_gloo_step_back()
        where = torch.device(device) if device is not None else torch.device("cpu")
        return Mesh(**axes, world=world, embedding=embedding, device=where, recorder=recorder)


def start_process_group(
    *, rank: int, world_size: int, device: torch.device, init_method: str = "env://", timeout_s: float = 600.0
) -> None:
    """Joins the job: NCCL where the device is a GPU, gloo on CPU. Does nothing for one rank."""
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )


def stop_process_group() -> None:
    """Leaves the job, if there is one, together with all its ranks. A collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _lines(grid: torch.Tensor, dim: int) -> list[tuple[int, ...]]:
    """All lines of ranks along `dim` of the grid, [pp, dp, cp, tp] or with dp cut in two."""
    return [tuple(line.tolist()) for line in grid.movedim(dim, -1).reshape(-1, grid.size(dim))]


def _own_axis(name: str, lines: list[tuple[int, ...]], rank: int, recorder: Recorder) -> Axis:
    """Creates the groups of all lines (as every rank must, in the same order) and returns the one with `rank`."""
    own: Axis | None = None
    for line in lines:
        group = _new_group(line)
        if rank in line:
            own = Axis(name, len(line), line.index(rank), line, group, recorder)
    return own if own is not None else Axis(name, 1, 0, (rank,), None, recorder)


def _new_group(line: tuple[int, ...]) -> dist.ProcessGroup | None:
    if len(line) == 1:
        return None
    if line == tuple(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(list(line))
