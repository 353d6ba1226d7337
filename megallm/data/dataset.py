"""Samples: a stream of tokens cut in windows of S + 1 tokens, endless, in an order given by the seed.

    tokens    t0 t1 t2 t3 t4 t5 t6 t7 t8 t9 ...          S = 3, this epoch's offset 2
    window 0        [t2 t3 t4 t5]                        input_ids t2 t3 t4, labels t3 t4 t5
    window 1                 [t5 t6 t7 t8]               neighbours share one token: each token is a label once

Documents follow each other in the stream, each ended by the tokenizer's end mark; windows do not care where they end.
Each epoch visits all windows once, in its own permutation, and starts them at its own random offset below 2 S: over
the epochs a token is seen at every place of a window, as with random offsets, yet no token is drawn twice in an epoch.
(The price: up to 2 S - 2 tokens at the two ends of the stream are left out of an epoch, others each time.)
Offset and permutation are functions of (seed, epoch), so sample i is known without the samples before it.

S: seq_length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from megallm.data.indexed import IndexedDataset, Tokens
from megallm.data.permutation import hash_ints, permute

Ids: TypeAlias = "npt.NDArray[np.int64]"
IGNORE_INDEX = -100
"""Label of a position that is not trained on or counted."""

_OFFSET, _ORDER = 1, 2
"""Which of the two random choices of an epoch a hash is for."""


class SampleSource(Protocol):
    """An endless sequence of samples."""

    seq_length: int
    num_samples: int
    """Samples before any comes again: one epoch."""

    def sample(self, index: int) -> tuple[Ids, Ids]:
        """(input_ids, labels) of sample `index` >= 0, both int64 [S]; labels[i] is the token after input_ids[i]."""
        ...


@runtime_checkable
class RowSource(Protocol):
    """An endless sequence of samples that are more than tokens and labels: it makes its batches itself."""

    num_samples: int
    """Samples of the first epoch."""

    def collate(self, indices: range, *, num_samples: int, whole: range) -> dict[str, npt.NDArray[Any]]:
        """The samples `indices` as arrays whose first dimensions are equal, each sample the same number of rows, filled
        up with padding to `num_samples` samples. `whole`: the samples of the batch over all ranks, which decide what
        all ranks must have in common, such as the length of rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenRange:
    """A part of the tokens of an indexed dataset."""

    prefix: str
    start: int
    """First token."""
    end: int
    """Past the last token."""
    weight: float = 1.0
    """Share of the samples drawn from it, relative to the other ranges."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the range."""
        return self.end - self.start


class TokenDataset:
    """The samples of one stream of tokens."""

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_length: int,
        seed: int = 0,
        stream: int = 0,
        shuffle: bool = True,
        name: str = "the data",
    ) -> None:
        """Samples of `tokens` [N], which may be a file's memory map. `stream` tells datasets of one seed apart.
        Without `shuffle` the windows start at token 0 and come in order, every epoch. ValueError if N < S + 1."""
        if seq_length < 1:
            raise ValueError(f"seq_length ({seq_length}) must be at least 1")
        if len(tokens) < seq_length + 1:
            raise ValueError(
                f"{name} holds {len(tokens)} tokens, fewer than one sample of seq_length + 1 = {seq_length + 1}: "
                "use more data or a smaller seq_length"
            )
        self.seq_length = seq_length
        self._tokens, self._seed, self._stream, self._shuffle = tokens, seed, stream, shuffle
        # Every epoch has the same number of windows, with room left for at least S different offsets (S - 1 tokens), so
        # that over the epochs every token is a label, the last ones too.
        self.num_samples = (len(tokens) - 1) // seq_length
        if shuffle:
            self.num_samples = max(1, (len(tokens) - seq_length) // seq_length)

    @classmethod
    def open(
        cls, part: TokenRange, *, seq_length: int, seed: int = 0, stream: int = 0, shuffle: bool = True
    ) -> TokenDataset:
        """The samples of a part of an indexed dataset, memory-mapped."""
        tokens = IndexedDataset(part.prefix).tokens[part.start : part.end]
        name = f"{part.prefix} (tokens {part.start:,} to {part.end:,})"
        return cls(tokens, seq_length=seq_length, seed=seed, stream=stream, shuffle=shuffle, name=name)

    def epoch_offset(self, epoch: int) -> int:
        """The token at which the first window of an epoch starts, 0 <= offset < 2 S - 1: any that leaves room."""
        if not self._shuffle:
            return 0
        slack = len(self._tokens) - 1 - self.num_samples * self.seq_length
        return hash_ints(self._seed, self._stream, epoch, _OFFSET) % (slack + 1)

    def window_start(self, index: int) -> int:
        """The position in the stream of the first token of sample `index`."""
        if index < 0:
            raise IndexError(f"sample {index}: samples count from 0")
        epoch, window = divmod(index, self.num_samples)
        if self._shuffle:
            window = permute(window, self.num_samples, hash_ints(self._seed, self._stream, epoch, _ORDER))
        return self.epoch_offset(epoch) + window * self.seq_length

    def sample(self, index: int) -> tuple[Ids, Ids]:
        """(input_ids, labels) of sample `index`, int64 [S] each, without end: epoch = index // num_samples."""
        start = self.window_start(index)
        window = np.asarray(self._tokens[start : start + self.seq_length + 1], dtype=np.int64)
        return window[:-1], window[1:]
