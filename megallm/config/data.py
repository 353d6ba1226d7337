"""What is trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Paths of text or tokens, and how to read them."""

    data: tuple[str, ...] = ()
    """One path, or `weight path weight path ...`: .txt, .jsonl, or the prefix of a tokenised .bin/.idx pair. Empty =
    the embedded corpus: the running Python's own standard library."""
    valid_data: tuple[str, ...] = ()
    """The same for validation. auto = the last `valid_fraction` of `data`."""
    valid_fraction: float = 0.05
    """Share of the documents (or, of one long document, of its tokens) kept for validation."""
    text_key: str = "text"
    """Key of the text in a .jsonl line."""
    tokenizer: str | None = None
    """A tokenizer.json, a directory that holds one, `bytes` or `chars`. auto = the one beside the data or model, else a
    byte-level BPE trained once on the data and cached."""
    tokenizer_vocab_size: int = 4096
    """Vocabulary of the BPE that is trained when none is given."""
    cache_dir: str | None = None
    """Where tokenised data is kept. auto = `megallm` in the user's cache directory."""
