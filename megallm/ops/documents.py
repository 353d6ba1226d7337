"""Where the documents of packed sequences begin and end: attention sees none but its own.

    tokens      [ a a a a a | b b | c c c c ]  [ d d d d d d d | e e . . ]       two sequences, five documents
    lengths       5 2 4 7 2 2                                                  padding is a document as well
    offsets     0 5 7 11 18 20 22
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Documents:
    """Consecutive documents of a microbatch; none reaches into the next sequence."""

    lengths: tuple[int, ...]
    """Tokens of each, at least 1."""
    offsets: torch.Tensor
    """[documents + 1] int32, on the device: 0 and the running sum of lengths."""

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)

    @classmethod
    def of(cls, document_ids: torch.Tensor) -> Documents:
        """From document_ids [B, S] on the CPU: a document is a run of equal numbers within a sequence."""
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        first = starts.flatten().nonzero().flatten()
        offsets = torch.cat([first, first.new_tensor([document_ids.numel()])])
        return cls(tuple(offsets.diff().tolist()), offsets.to(torch.int32))

    def to(self, device: torch.device) -> Documents:
        """The same on another device."""
        return Documents(self.lengths, self.offsets.to(device, non_blocking=True))
