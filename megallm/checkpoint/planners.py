"""Planners that tell torch.distributed.checkpoint which slices of which global tensors a rank holds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import (
    create_default_global_load_plan,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


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

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Offsets and sizes."""
        return ChunkStorageMetadata(offsets=torch.Size(self.start), sizes=self.data.shape)


class SliceSaver(SavePlanner):
    """Writes the given slices; together the ranks must give every element once."""

    def __init__(self, slices: Sequence[TensorSlice]) -> None:
        self._slices = {(s.name, s.start): s for s in slices}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> SavePlan:
        """One write per slice."""
        return SavePlan([_write_item(s) for s in self._slices.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans as they are; called on one rank."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The slice's data, contiguous."""
        assert write_item.index.offset is not None
        return self._slices[write_item.index.fqn, tuple(write_item.index.offset)].data.contiguous()


class SliceLoader(LoadPlanner):
    """Fills the given slices in place from whatever chunks the checkpoint has; ValueError for what it lacks."""

    def __init__(self, slices: Sequence[TensorSlice]) -> None:
        self._slices = slices
        self._targets = {(s.name, s.start): s for s in slices}
        self._metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keeps the checkpoint's table of contents."""
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """The overlaps of each slice with the stored chunks."""
        assert self._metadata is not None
        stored, items = self._metadata.state_dict_metadata, []
        for s in self._slices:
            found = stored.get(s.name)
            if not isinstance(found, TensorStorageMetadata):
                raise ValueError(f"the checkpoint has no tensor {s.name}")
            if tuple(found.size) != s.shape:
                raise ValueError(f"{s.name} has shape {tuple(found.size)} in the checkpoint, {s.shape} in the model")
            read = create_read_items_for_chunk_list(s.name, found, [s.chunk])
            covered = sum(_numel(item.lengths) for item in read)
            if covered != s.data.numel():
                raise ValueError(f"the checkpoint lacks part of {s.name}: {covered} of {s.data.numel()} elements found")
            items += read
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refused: a checkpoint of ours holds tensors only."""
        raise ValueError(f"the checkpoint holds an object where a tensor was expected: {read_item.storage_index.fqn}")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a slice that one read fills."""
        assert read_item.dest_index.offset is not None
        view = self._targets[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)].data
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing left to do: it was filled in place."""


def _write_item(s: TensorSlice) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(s.name, torch.Size(s.start)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=s.chunk, properties=TensorProperties(dtype=s.data.dtype), size=torch.Size(s.shape)
        ),
    )


def _numel(lengths: torch.Size) -> int:
    total = 1
    for length in lengths:
        total *= length
    return total
