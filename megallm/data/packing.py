"""Packing: short documents side by side in sequences of one length, so that little is padding.

    capacity 8     [a a a a a b b b]  [c c c c d d . .]      three documents would pad 9 of 24 places; packed 2 of 16

Plans are made from lengths alone (`plan_packs`), by best-fit decreasing: the longest document first, each into the
fullest pack that it still fits in. A row then carries what keeps its documents apart:

    input_ids      a a a a a b b b        c c c c d d 0 0
    labels         a a a a - b b -        c c c - d - - -      - = -100: no document predicts the next one's first token
    position_ids   0 1 2 3 4 0 1 2        0 1 2 3 0 1 0 1
    document_ids   0 0 0 0 0 1 1 1        0 0 0 0 1 1 2 2      padding is a last document of its own
    cu_seqlens     0 5 8                  0 4 6 8

Positions that restart do not isolate documents: attention must be told, by document_ids or cu_seqlens.

S: capacity, the row's length. D: documents of a row, padding included.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megallm.data.dataset import IGNORE_INDEX, Ids
from megallm.data.masks import Example, labels

Lengths = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """One row of packed documents."""

    input_ids: Ids
    """[S] int64; 0 where it is padding."""
    labels: Ids
    """[S] int64."""
    position_ids: Ids
    """[S] int64, from 0 in every document and in the padding."""
    document_ids: Ids
    """[S] int64, counting up from 0; the padding's is the last."""
    cu_seqlens: npt.NDArray[np.int32]
    """[D + 1]: where documents begin, and S."""
    sample_ids: Ids
    """[D, without padding] int64: which examples these are."""


def plan_packs(lengths: Lengths, capacity: int) -> list[list[int]]:
    """The documents of each pack, by their places in `lengths`; the packs' sums are at most `capacity`, each document
    is in one. Best-fit decreasing: of equal documents the first comes first, of equally full packs the newest. O(n log
    n): a second or two for a million documents. ValueError for a document that is longer or empty."""
    sizes = np.asarray(lengths, dtype=np.int64)
    if capacity < 1:
        raise ValueError(f"the capacity of a pack ({capacity}) must be at least 1")
    for wrong in np.flatnonzero((sizes > capacity) | (sizes < 1))[:1]:
        rule = f"longer than a pack ({capacity}): cut it first" if sizes[wrong] > capacity else "empty: leave it out"
        raise ValueError(f"document {wrong} of {sizes[wrong]} tokens is {rule}")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # free room: the packs that have it
    rooms: list[int] = []  # the keys of open_packs, sorted
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[at]
        packs[pack].append(document)
        if left := room - size:
            if left not in open_packs:
                open_packs[left] = []
                insort(rooms, left)
            open_packs[left].append(pack)
    return packs


def fill_fraction(lengths: Lengths, packs: Sequence[Sequence[int]], capacity: int) -> float:
    """The share of the packs' places that hold documents, 0 to 1."""
    sizes = np.asarray(lengths, dtype=np.int64)
    documents = [document for pack in packs for document in pack]
    return float(sizes[documents].sum()) / (len(packs) * capacity) if packs else 0.0


def pack_row(examples: Sequence[Example], sample_ids: Sequence[int], seq_length: int) -> Packed:
    """The examples side by side in a row of `seq_length`, which they must fit in."""
    sizes = [len(example) for example in examples]
    padding = seq_length - sum(sizes)
    assert padding >= 0, f"{sum(sizes)} tokens in a row of {seq_length}"
    segments = [*sizes, padding] if padding else sizes
    input_ids: Ids = np.zeros(seq_length, dtype=np.int64)
    targets: Ids = np.full(seq_length, IGNORE_INDEX, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(segments)]).astype(np.int32)
    for example, start in zip(examples, starts.tolist(), strict=False):
        input_ids[start : start + len(example)] = example.input_ids
        targets[start : start + len(example)] = labels(example)
    return Packed(
        input_ids=input_ids,
        labels=targets,
        position_ids=np.arange(seq_length) - np.repeat(starts[:-1], segments),
        document_ids=np.repeat(np.arange(len(segments)), segments),
        cu_seqlens=starts,
        sample_ids=np.array(sample_ids, dtype=np.int64),
    )


def batch_cu_seqlens(document_ids: Ids) -> npt.NDArray[np.int32]:
    """[documents of all rows + 1]: where documents begin in the flattened [B * S] tokens of `document_ids` [B, S], and
    B * S; no document reaches over the end of a row."""
    begins = np.ones(document_ids.shape, dtype=np.bool_)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return np.append(np.flatnonzero(begins), document_ids.size).astype(np.int32)
