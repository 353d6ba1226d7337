"""What is trained, to look at: the text of examples with their masks, and a line that sums them up.

With colour, trained text is green and the rest dim; without, trained text stands between >>> and <<<. Text is cut where
the mask changes, not at tokens: bytes of one character in two runs show as replacement characters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megallm.data.conversation import Dropped
from megallm.data.masks import Example
from megallm.data.tokenizer import Tokenizer

_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_OPEN, _CLOSE = ">>>", "<<<"


def show_masks(examples: Sequence[Example], tokenizer: Tokenizer, num_examples: int, *, colour: bool = False) -> str:
    """The first `num_examples` as text, special tokens included, a heading before each."""
    shown = []
    for number, example in enumerate(examples[:num_examples], start=1):
        cut = f", {example.num_cut} cut off" if example.num_cut else ""
        shown.append(
            f"--- example {number} of {len(examples):,}: {len(example)} tokens, {example.num_trained} trained{cut}\n"
            + mask_text(example, tokenizer, colour=colour)
        )
    return "\n".join(shown)


def mask_text(example: Example, tokenizer: Tokenizer, *, colour: bool = False) -> str:
    """The text of an example with what is trained made visible."""
    changes = np.flatnonzero(np.diff(example.is_trained)) + 1
    parts = []
    for ids, mask in zip(
        np.split(example.input_ids, changes), np.split(example.is_trained, changes), strict=True
    ):
        if not len(ids):
            continue
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        if colour:
            parts.append(f"{_GREEN if mask[0] else _DIM}{text}{_RESET}")
        else:
            parts.append(f"{_OPEN}{text}{_CLOSE}" if mask[0] else text)
    return "".join(parts)


def summary_line(examples: Sequence[Example], dropped: Dropped) -> str:
    """How many examples and tokens, what share is trained, what was cut and what was left out and why."""
    tokens = sum(len(example) for example in examples)
    trained = sum(example.num_trained for example in examples)
    cut = [example.num_cut for example in examples if example.num_cut]
    share = 100.0 * trained / tokens if tokens else 0.0
    parts = [f"{len(examples):,} examples", f"{tokens:,} tokens, {share:.1f} % trained"]
    if cut:
        parts.append(f"{len(cut):,} cut at their end by {sum(cut):,} tokens")
    return "; ".join([*parts, str(dropped)])
