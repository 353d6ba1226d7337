"""Fine-tuning data as endless samples: examples in rows of their own or packed, groups of answers side by side.

A sample is what `consumed_samples` counts: an example, a pack of examples, or a group. Its place is enough to know it:

    unpacked, groups    epoch = i // n; the epoch's order is a permutation given by (seed, epoch)
    packed              each epoch shuffles the examples anew, packs them a window of the order at a time, and shuffles
                        the packs: all functions of (seed, epoch) and of the lengths. Epochs differ by a few packs, so
                        that the epochs before are planned too (lengths only) to know where one begins.

Every epoch has every example once.

B: samples of a batch on this rank. S: length of rows. R: rows a sample, 1 or the size of the largest group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megallm.data.dataset import IGNORE_INDEX, Ids
from megallm.data.examples import Group
from megallm.data.masks import Example, labels
from megallm.data.packing import fill_fraction, pack_row, plan_packs
from megallm.data.permutation import hash_ints, permutation, permute

PACK_WINDOW = 8192
"""Examples packed at a time. Best-fit decreasing sorts them by length: over a whole epoch it would put the same ones
together every time. Of 100,000 lengths (lognormal, mean 400) in rows of 4096, 0.08 % of the places stay empty; 0.16 %
packed 4096 at a time, 0.54 % 1024 at a time, 0.01 % all at once."""

_EXAMPLES, _PACKS = 1, 2
"""Which of the random orders of an epoch a hash is for."""
_PLANS_KEPT = 2

Rows = dict[str, npt.NDArray[Any]]


class SftDataset:
    """Samples for supervised fine-tuning."""

    rows_per_sample = 1
    """As PairDataset's."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        seq_length: int,
        seed: int = 0,
        pack: bool = False,
        pad_to_multiple: int | None = None,
        shuffle: bool = True,
        pack_window: int = PACK_WINDOW,
    ) -> None:
        """Samples of `examples` of at most `seq_length` tokens. `pack`: as many to a row as fit. `pad_to_multiple`:
        rows of a batch are as long as its longest example on any rank, rounded up to this; None = `seq_length`, always
        one shape. Without `shuffle` the order is that of `examples`. ValueError for sizes that do not fit."""
        _check_lengths([len(example) for example in examples], seq_length, pad_to_multiple)
        if pack and pad_to_multiple:
            raise ValueError("packed rows are full: pad_to_multiple is for unpacked ones, leave one of them out")
        self.seq_length = seq_length
        self.is_packed = pack
        self._examples = examples
        self._lengths = np.array([len(example) for example in examples], dtype=np.int64)
        self._seed, self._shuffle, self._multiple, self._window = seed, shuffle, pad_to_multiple, pack_window
        self._plans: dict[int, list[list[int]]] = {}
        self._begins = [0]
        self.num_samples = self.epoch_samples(0)
        """Samples of the first epoch."""

    def epoch_samples(self, epoch: int) -> int:
        """Samples of an epoch: of all the same number if not packed."""
        return len(self._plan(epoch)) if self.is_packed else len(self._examples)

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, place in the epoch) of sample `index`."""
        if index < 0:
            raise IndexError(f"sample {index}: samples count from 0")
        if not self.is_packed:
            return divmod(index, len(self._examples))
        while index >= self._begins[-1]:
            self._begins.append(self._begins[-1] + self.epoch_samples(len(self._begins) - 1))
        epoch = int(np.searchsorted(self._begins, index, side="right")) - 1
        return epoch, index - self._begins[epoch]

    def members(self, index: int) -> list[int]:
        """The examples of sample `index`, by their places in the list."""
        epoch, place = self.locate(index)
        if self.is_packed:
            return self._plan(epoch)[place]
        return [_shuffled(place, len(self._examples), self._seed, epoch) if self._shuffle else place]

    def fill_fraction(self) -> float:
        """The share of the first epoch's places that hold tokens, 0 to 1, in rows of `seq_length`."""
        plan = self._plan(0) if self.is_packed else [[place] for place in range(len(self._examples))]
        return fill_fraction(self._lengths, plan, self.seq_length)

    def collate(self, indices: range, *, num_samples: int, whole: range) -> Rows:
        """input_ids, labels int64 [B, S]; output_mask bool [B, S], where labels are, as trainers/step.py has it;
        sample_ids int64 [B], -1 for rows that only fill up, whose labels are -100.
        Unpacked: lengths int64 [B], tokens of the row. Packed: position_ids and document_ids int64 [B, S], as
        packing.py has them."""
        if self.is_packed:
            return self._collate_packed(indices, num_samples)
        chosen = [self._examples[self.members(index)[0]] for index in indices]
        longest = 0 if self._multiple is None else max(self._length(index) for index in whole)
        rows = _padded(chosen, num_samples, _row_length(longest, self.seq_length, self._multiple))
        is_read = rows["labels"] != IGNORE_INDEX
        return rows | {"output_mask": is_read, "sample_ids": _ids(indices, num_samples)}

    def _length(self, index: int) -> int:
        return int(self._lengths[self.members(index)[0]])

    def _collate_packed(self, indices: range, num_samples: int) -> Rows:
        packs = [
            pack_row([self._examples[place] for place in members], members, self.seq_length)
            for members in map(self.members, indices)
        ]
        packs += [pack_row([], [], self.seq_length)] * (num_samples - len(packs))
        names = ("input_ids", "labels", "position_ids", "document_ids")
        rows = {name: np.stack([getattr(pack, name) for pack in packs]) for name in names}
        is_read = rows["labels"] != IGNORE_INDEX
        return rows | {"output_mask": is_read, "sample_ids": _ids(indices, num_samples)}

    def _plan(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch, in its order."""
        if epoch not in self._plans:
            while len(self._plans) >= _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> list[list[int]]:
        number = len(self._examples)
        order = np.arange(number)
        if self._shuffle:
            order = permutation(number, hash_ints(self._seed, epoch, _EXAMPLES))
        packs: list[list[int]] = []
        for first in range(0, number, self._window):
            part = order[first : first + self._window]
            packs += [part[pack].tolist() for pack in plan_packs(self._lengths[part], self.seq_length)]
        if self._shuffle:
            packs = [packs[place] for place in permutation(len(packs), hash_ints(self._seed, epoch, _PACKS))]
        return packs


class PairDataset:
    """Samples for preferences: the answers to one prompt, in rows that follow each other, best first."""

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        seq_length: int,
        seed: int = 0,
        pad_to_multiple: int | None = None,
        shuffle: bool = True,
        outputs: Literal["responses", "ends"] = "responses",
    ) -> None:
        """Samples of `groups`, each of as many rows as the largest group has answers (2 for preferences); `seq_length`,
        `pad_to_multiple` and `shuffle` as of SftDataset. outputs: what a loss reads, of labels and rows' ends, or of
        ends alone."""
        sizes = [len(example) for group in groups for example in group.examples]
        _check_lengths(sizes, seq_length, pad_to_multiple)
        self.seq_length = seq_length
        self.num_samples = len(groups)
        """Samples of an epoch."""
        self.rows_per_sample = max(len(group.examples) for group in groups)
        """R."""
        self._groups, self._seed, self._shuffle, self._multiple = groups, seed, shuffle, pad_to_multiple
        self._outputs: Literal["responses", "ends"] = outputs

    def best_responses(self, number: int) -> list[list[int]]:
        """Ids of prompt and best response of the first `number` groups."""
        return [group.examples[0].input_ids.tolist() for group in self._groups[:number]]

    def responses(self, number: int) -> list[tuple[list[list[int]], list[int]]]:
        """(ids of prompt and response of each, their ranks) of the first `number` groups."""
        return [
            ([example.input_ids.tolist() for example in group.examples], list(group.ranks))
            for group in self._groups[:number]
        ]

    def unshuffled(self) -> PairDataset:
        """The same groups in the order of the list, whose rows lie as they do here."""
        return PairDataset(
            self._groups, seq_length=self.seq_length, seed=self._seed, pad_to_multiple=self._multiple, shuffle=False,
            outputs=self._outputs,
        )  # fmt: skip

    def member(self, index: int) -> int:
        """The group of sample `index`, by its place in the list."""
        if index < 0:
            raise IndexError(f"sample {index}: samples count from 0")
        epoch, place = divmod(index, self.num_samples)
        return _shuffled(place, self.num_samples, self._seed, epoch) if self._shuffle else place

    def _length(self, index: int) -> int:
        return max(len(each) for each in self._groups[self.member(index)].examples)

    def collate(self, indices: range, *, num_samples: int, whole: range) -> Rows:
        """input_ids, labels int64 [B R, S]; lengths int64 [B R], tokens of the row: the answer's end is at length - 1;
        output_mask bool [B R, S], what a loss reads; ranks int64 [B R], 0 the best answer of its group, -1 in rows that
        only fill up; margins float32 [B R], the group's or 0; sample_ids int64 [B R], one number a group, -1 past the
        end of the data."""
        size = self.rows_per_sample
        longest = 0
        if self._multiple is not None:
            longest = max(self._length(index) for index in whole)
        length = _row_length(longest, self.seq_length, self._multiple)
        ranks: Ids = np.full((num_samples, size), -1, dtype=np.int64)
        margins = np.zeros((num_samples, size), dtype=np.float32)
        parts = []
        for row, index in enumerate(indices):
            group = self._groups[self.member(index)]
            parts.append(_padded(group.examples, size, length))
            ranks[row, : len(group.ranks)] = group.ranks
            margins[row] = group.margin or 0.0
        parts += [_padded((), size, length)] * (num_samples - len(parts))
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        is_read = np.arange(length) == rows["lengths"][:, None] - 1
        if self._outputs == "responses":
            is_read |= rows["labels"] != IGNORE_INDEX
        rows["output_mask"] = is_read
        sample_ids = np.repeat(_ids(indices, num_samples), size)
        return rows | {"ranks": ranks.reshape(-1), "margins": margins.reshape(-1), "sample_ids": sample_ids}


def _check_lengths(sizes: Sequence[int], seq_length: int, pad_to_multiple: int | None) -> None:
    if not sizes:
        raise ValueError("there are no examples: give data that hold some")
    if max(sizes) > seq_length:
        raise ValueError(
            f"an example has {max(sizes)} tokens, more than seq_length ({seq_length}): make the examples with that "
            "max_length"
        )
    if pad_to_multiple is not None and (pad_to_multiple < 1 or seq_length % pad_to_multiple):
        raise ValueError(f"seq_length ({seq_length}) is not a multiple of pad_to_multiple ({pad_to_multiple})")


def _row_length(longest: int, seq_length: int, multiple: int | None) -> int:
    return seq_length if multiple is None else -(-longest // multiple) * multiple


def _shuffled(place: int, number: int, seed: int, epoch: int) -> int:
    return permute(place, number, hash_ints(seed, epoch, _EXAMPLES))


def _ids(indices: Sequence[int], num_samples: int) -> Ids:
    """[num_samples]: the indices, then -1."""
    ids: Ids = np.full(num_samples, -1, dtype=np.int64)
    ids[: len(indices)] = indices
    return ids


def _padded(examples: Sequence[Example], num_rows: int, length: int) -> Rows:
    """The examples in rows of `length`, padded on the right, and rows of padding up to `num_rows`."""
    input_ids: Ids = np.zeros((num_rows, length), dtype=np.int64)
    targets: Ids = np.full((num_rows, length), IGNORE_INDEX, dtype=np.int64)
    lengths: Ids = np.zeros(num_rows, dtype=np.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = example.input_ids
        targets[row, : len(example)] = labels(example)
        lengths[row] = len(example)
    return {"input_ids": input_ids, "labels": targets, "lengths": lengths}
