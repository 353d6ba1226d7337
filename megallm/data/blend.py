"""Blending: samples of several datasets in fixed proportions.

Sample i goes to the dataset that is furthest behind its share, as in Megatron's blended datasets:

    argmax over d of  weight_d * max(i, 1) - drawn_d        (the first one of equals)

so that after any number of samples each dataset has been drawn its share, within a few samples. The choice is a
function of the weights and of i, not of chance. It depends on all choices before: they are made a block at a time,
and only the counts at the start of each block are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megallm.data.dataset import Ids, SampleSource, TokenDataset, TokenRange

_BLOCK = 4096


class Blend:
    """One sequence of samples drawn from several."""

    def __init__(self, datasets: Sequence[SampleSource], weights: Sequence[float]) -> None:
        """Blend `datasets`, all of one seq_length, by `weights`, which need not sum to one."""
        if not datasets or len(datasets) != len(weights):
            raise ValueError(f"a blend needs one weight a dataset: {len(datasets)} datasets, {len(weights)} weights")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"blend weights {list(weights)} must be positive numbers")
        lengths = sorted({dataset.seq_length for dataset in datasets})
        if len(lengths) != 1:
            raise ValueError(f"blended datasets have different seq_length: {lengths}")
        total = math.fsum(weights)
        self.weights = tuple(weight / total for weight in weights)
        self.seq_length = lengths[0]
        self.num_samples = max(
            1, min(int(dataset.num_samples / weight) for dataset, weight in zip(datasets, self.weights, strict=True))
        )
        """Samples until the dataset that is used up first has been seen once, within one sample a dataset."""
        self._datasets = tuple(datasets)
        self._counts = [[0] * len(datasets)]
        self._block = -1
        self._chosen: npt.NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, index in that dataset) of sample `index`. Near the last one asked for it costs nothing; the first
        jump to i costs about 0.7 microseconds a sample and dataset up to i."""
        if index < 0:
            raise IndexError(f"sample {index}: samples count from 0")
        block, row = divmod(index, _BLOCK)
        if block != self._block:
            for known in range(len(self._counts) - 1, block):
                self._counts.append(_draw(self.weights, self._counts[known], known * _BLOCK, _BLOCK)[1])
            chosen, after = _draw(self.weights, self._counts[block], block * _BLOCK, _BLOCK)
            if len(self._counts) == block + 1:
                self._counts.append(after)
            self._block, self._chosen = block, chosen
        dataset, position = self._chosen[row]
        return int(dataset), int(position)

    def sample(self, index: int) -> tuple[Ids, Ids]:
        """(input_ids, labels) of sample `index`, int64 [S] each."""
        dataset, position = self.locate(index)
        return self._datasets[dataset].sample(position)


def open_ranges(
    parts: Sequence[TokenRange], *, seq_length: int, seed: int = 0, shuffle: bool = True
) -> TokenDataset | Blend:
    """The samples of one range of tokens, or the blend of several by their weights."""
    datasets = [
        TokenDataset.open(part, seq_length=seq_length, seed=seed, stream=stream, shuffle=shuffle)
        for stream, part in enumerate(parts)
    ]
    if len(datasets) == 1:
        return datasets[0]
    return Blend(datasets, [part.weight for part in parts])


def _draw(
    weights: Sequence[float], counts: Sequence[int], start: int, length: int
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Rows (dataset, index in it) [length, 2] of the samples from `start`, and the counts after them."""
    drawn = list(counts)
    rows = []
    for index in range(start, start + length):
        turns = max(index, 1)
        behind = [weight * turns - count for weight, count in zip(weights, drawn, strict=True)]
        dataset = behind.index(max(behind))
        rows.append((dataset, drawn[dataset]))
        drawn[dataset] += 1
    return np.array(rows, dtype=np.int64), drawn
