"""Batches: the samples of one global order, sliced by data-parallel rank.

    global order      s0 s1 s2 s3 | s4 s5 s6 s7 | ...        global_batch_size 4, dp 2
    dp rank 0         s0 s1       | s4 s5       |
    dp rank 1               s2 s3 |       s6 s7 |

A batch is a function of the number of samples consumed before it. That number is all the state there is: a run
resumes from it exactly, with another dp too, and another micro_batch_size, as long as global_batch_size is kept.

B: sequences of this rank, global_batch_size / dp. S: seq_length.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megallm.data.dataset import IGNORE_INDEX, Ids, RowSource, SampleSource

Batch = dict[str, torch.Tensor]


class BatchLoader:
    """The training batches of one data-parallel rank."""

    def __init__(
        self,
        dataset: SampleSource | RowSource,
        *,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: bool = False,
    ) -> None:
        """Batches of `global_batch_size` sequences over all `dp_size` ranks. `prefetch`: a thread reads the batch after
        the one asked for, which hides slow disks."""
        self.per_rank = _per_rank(global_batch_size, dp_rank, dp_size, "global_batch_size")
        self.global_batch_size = global_batch_size
        self._dataset = dataset
        self._first = dp_rank * self.per_rank
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") if prefetch else None
        self._ahead: tuple[int, Future[Batch]] | None = None

    def batch(self, consumed_samples: int) -> Batch:
        """The batch after `consumed_samples` samples of the whole job (step k of a constant batch size:
        k * global_batch_size), a function of that number only:
        input_ids int64 [B, S]; labels int64 [B, S], the next tokens; sample_ids int64 [B], places in the global
        order. A RowSource makes rows of its own."""
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples ({consumed_samples}) must not be negative")
        if self._executor is None:
            return self._read(consumed_samples)
        ahead, self._ahead = self._ahead, None
        result = ahead[1].result() if ahead and ahead[0] == consumed_samples else self._wait(ahead, consumed_samples)
        following = consumed_samples + self.global_batch_size
        self._ahead = (following, self._executor.submit(self._read, following))
        return result

    def close(self) -> None:
        """End the prefetch thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _wait(self, ahead: tuple[int, Future[Batch]] | None, consumed_samples: int) -> Batch:
        """Read now, after a batch that was read ahead for nothing: a dataset serves one thread at a time."""
        if ahead:
            ahead[1].exception()
        return self._read(consumed_samples)

    def _read(self, consumed_samples: int) -> Batch:
        first = consumed_samples + self._first
        whole = range(consumed_samples, consumed_samples + self.global_batch_size)
        return _stack(self._dataset, range(first, first + self.per_rank), rows=self.per_rank, whole=whole)


class ValidationLoader:
    """The same sequences at every evaluation: the first `num_sequences` of a dataset, in order."""

    def __init__(
        self,
        dataset: SampleSource | RowSource,
        *,
        num_sequences: int,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Batches of `batch_size` sequences over all ranks. Fewer than `num_sequences` if one epoch of the dataset has
        fewer: none is counted twice."""
        if num_sequences < 1:
            raise ValueError(f"eval_sequences ({num_sequences}) must be at least 1")
        self.per_rank = _per_rank(batch_size, dp_rank, dp_size, "the evaluation batch size")
        self.num_sequences = min(num_sequences, dataset.num_samples)
        self._dataset, self._batch_size = dataset, batch_size
        self._first = dp_rank * self.per_rank

    def __len__(self) -> int:
        """The number of batches, equal on all ranks."""
        return -(-self.num_sequences // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches as `BatchLoader.batch` gives them, all [B, S]: rows past the end have labels -100, input_ids 0 and
        sample_ids -1, so that every rank has batches of one shape."""
        for start in range(0, self.num_sequences, self._batch_size):
            first = start + self._first
            indices = range(first, max(first, min(first + self.per_rank, self.num_sequences)))
            whole = range(start, min(start + self._batch_size, self.num_sequences))
            yield _stack(self._dataset, indices, rows=self.per_rank, whole=whole)


def _per_rank(batch_size: int, dp_rank: int, dp_size: int, name: str) -> int:
    if dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp rank {dp_rank} is not one of {dp_size} ranks")
    if batch_size < 1 or batch_size % dp_size:
        raise ValueError(f"{name} ({batch_size}) must be a positive multiple of dp ({dp_size})")
    return batch_size // dp_size


def _stack(dataset: SampleSource | RowSource, indices: range, *, rows: int, whole: range) -> Batch:
    """The samples of `indices` as a batch of `rows` rows, the last ones padding if there are fewer indices."""
    if isinstance(dataset, RowSource):
        arrays = dataset.collate(indices, num_samples=rows, whole=whole)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    input_ids: Ids = np.zeros((rows, dataset.seq_length), dtype=np.int64)
    labels: Ids = np.full((rows, dataset.seq_length), IGNORE_INDEX, dtype=np.int64)
    sample_ids: Ids = np.full(rows, -1, dtype=np.int64)
    for row, index in enumerate(indices):
        input_ids[row], labels[row] = dataset.sample(index)
        sample_ids[row] = index
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "sample_ids": torch.from_numpy(sample_ids),
    }
