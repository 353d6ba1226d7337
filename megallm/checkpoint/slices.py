"""Slices of global tensors in safetensors files: every rank writes what it holds, and reads any overlap with it.

    shard-00003.safetensors     key "NAME@0,512": the slice of NAME whose first element has the index (0, 512)
                                metadata "shapes": {"NAME": [4096, 1024], ...} in JSON, global shapes

torch.distributed.checkpoint's safetensors storage keeps one slice of a tensor in a file; a ZeRO shard, which begins and
ends anywhere, is up to three (a part of a row, whole rows, a part of a row).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """A slice of a global tensor, as it lies on this rank."""

    name: str
    shape: tuple[int, ...]
    """Global shape."""
    start: tuple[int, ...]
    """Index of the slice's first element in the global tensor."""
    data: torch.Tensor
    """The slice, a view of live memory."""
    is_owner: bool
    """Whether this rank is the one that writes it."""


@dataclass(frozen=True)
class _Stored:
    """A slice in a file."""

    path: Path
    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]


def write_slices(directory: Path, slices: Sequence[TensorSlice], *, rank: int) -> None:
    """This rank's file; none where there is nothing to write. Together the ranks must give every element once."""
    if slices:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"{s.name}@{','.join(map(str, s.start))}": s.data.contiguous() for s in slices}
        shapes = {s.name: list(s.shape) for s in slices}
        save_file(tensors, directory / f"shard-{rank:05d}.safetensors", metadata={"shapes": json.dumps(shapes)})


class SliceFiles:
    """All files of a directory, of any number of ranks; opening reads their headers."""

    def __init__(self, directory: Path) -> None:
        """ValueError if a file is not one of ours."""
        self._directory = directory
        self._files: dict[Path, Any] = {}
        self._stored: dict[str, list[_Stored]] = {}
        self.stored_shapes: dict[str, tuple[int, ...]] = {}
        """Global shapes of what is stored, by name."""
        for path in sorted(directory.glob("*.safetensors")):
            self._open(path)
        self.shapes = self.stored_shapes
        """Global shapes of what can be read, by name."""

    def _open(self, path: Path) -> None:
        try:
            file = self._files[path] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged or was cut off ({error}): copy the checkpoint again, or give another step-..."
            ) from error
        text = (file.metadata() or {}).get("shapes")
        if text is None:
            raise ValueError(f"{path} is not part of a checkpoint: it does not say what its slices belong to")
        self.stored_shapes |= {name: tuple(shape) for name, shape in json.loads(text).items()}
        for key in file.keys():
            name, _, start = key.rpartition("@")
            shape = tuple(file.get_slice(key).get_shape())
            self._stored.setdefault(name, []).append(_Stored(path, key, tuple(map(int, start.split(","))), shape))

    def fill(self, wanted: TensorSlice) -> None:
        """Copies what is stored into the slice; ValueError if it is missing in part, or of another shape."""
        self.fill_stored(wanted)

    def fill_stored(self, wanted: TensorSlice) -> None:
        """`fill`, of a tensor that is stored as it is."""
        if wanted.name not in self.stored_shapes:
            raise ValueError(f"{self._directory} has no tensor {wanted.name}")
        self.check_shape(wanted, self.stored_shapes[wanted.name])
        self._copy(wanted)

    def check_shape(self, wanted: TensorSlice, found: tuple[int, ...]) -> None:
        """ValueError unless the slice is of a tensor of the shape `found`."""
        if found != wanted.shape:
            raise ValueError(f"{wanted.name} has shape {found} in {self._directory}, {wanted.shape} in the model")

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor's numbers are stored in."""
        some = self._stored[name][0]
        return self._files[some.path].get_slice(some.key)[:0].dtype

    def _copy(self, wanted: TensorSlice) -> None:
        covered = 0
        for stored in self._stored[wanted.name]:
            common = [
                (max(a, b), min(a + m, b + n))
                for a, m, b, n in zip(stored.start, stored.shape, wanted.start, wanted.data.shape, strict=True)
            ]
            if all(first < stop for first, stop in common):
                source = tuple(slice(f - a, s - a) for (f, s), a in zip(common, stored.start, strict=True))
                target = tuple(slice(f - a, s - a) for (f, s), a in zip(common, wanted.start, strict=True))
                wanted.data[target].copy_(self._files[stored.path].get_slice(stored.key)[source])
                covered += math.prod(s - f for f, s in common)
        if covered != wanted.data.numel():
            size = wanted.data.numel()
            raise ValueError(f"{self._directory} lacks part of {wanted.name}: {covered} of {size} elements found")

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of all, one at a time, in the stored dtype."""
        for name, shape in self.shapes.items():
            full = torch.empty(shape, dtype=self.dtype_of(name))
            self.fill(TensorSlice(name=name, shape=shape, start=(0,) * len(shape), data=full, is_owner=False))
            yield name, full
