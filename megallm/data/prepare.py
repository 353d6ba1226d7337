"""From a DataConfig to tokens: find or train the tokenizer, tokenise what is not tokenised yet, split off validation.

    data            tokenizer                          tokens
    .txt .jsonl     given, or trained on it, cached    cached under the hash of (text, tokenizer)
    PREFIX          tokenizer.json beside it           PREFIX.bin/.idx as they are
    (none)          trained on the corpus, cached      cached

Every rank calls `load_or_build`; one of each machine does the work, the others wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megallm.config.data import DataConfig
from megallm.data.blend import Blend, open_ranges
from megallm.data.cache import cache_key, cached_folder
from megallm.data.dataset import TokenDataset, TokenRange
from megallm.data.documents import DataSource, parse_sources, source_fingerprint
from megallm.data.encode import ProgressCallback, collect_characters, encode_sources, log_progress, train_tokenizer
from megallm.data.indexed import IndexedDataset, indexed_files
from megallm.data.tokenizer import Tokenizer, byte_tokenizer

VALID_SUFFIX = "_valid"
"""`megallm prepare --out PREFIX --valid-fraction F` writes the validation part as PREFIX_valid."""
_VERSION = 1
"""Part of every cache key: raised when the same text and settings give other tokens than before."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Tokens on disk, ready to train on."""

    train: tuple[TokenRange, ...]
    valid: tuple[TokenRange, ...]
    """Empty if there is no validation part."""
    tokenizer: Tokenizer | None
    """None for tokens of another program without a tokenizer.json beside them."""
    vocab_size: int
    """Ids that a model needs: the tokenizer's, else the largest id in the data + 1."""
    valid_was_asked_for: bool
    """Whether `valid_data` was given, not cut from the training data."""

    def train_dataset(self, *, seq_length: int, seed: int) -> TokenDataset | Blend:
        """The training samples, shuffled by `seed`. ValueError if the data is shorter than one sample."""
        return open_ranges(self.train, seq_length=seq_length, seed=seed)

    def valid_dataset(self, *, seq_length: int) -> TokenDataset | Blend | None:
        """The validation samples in file order; None if there are none, or if the part cut from the training data is
        shorter than one sample (logged). ValueError if `valid_data` was given and is that short."""
        long_enough = [part for part in self.valid if self.valid_was_asked_for or part.num_tokens > seq_length]
        if len(long_enough) < len(self.valid):
            _logger.warning(
                "%d of %d validation parts are shorter than seq_length + 1 = %d and left out: raise valid_fraction",
                len(self.valid) - len(long_enough),
                len(self.valid),
                seq_length + 1,
            )
        return open_ranges(long_enough, seq_length=seq_length, shuffle=False) if long_enough else None


def load_or_build(
    config: DataConfig,
    *,
    cache_dir: str | Path,
    tokenizer: Tokenizer | None = None,
    progress: ProgressCallback = log_progress,
) -> PreparedData:
    """The tokens of `config`, from the cache or built into it. `tokenizer`: the model's, used unless config names one.
    `cache_dir` is used unless config has its own. ValueError or FileNotFoundError for what the user can mend."""
    if not 0.0 <= config.valid_fraction < 1.0:
        raise ValueError(f"valid_fraction ({config.valid_fraction}) must be at least 0 and below 1")
    cache = Path(config.cache_dir or cache_dir)
    sources, valid_sources = data_sources(config)
    chosen = choose_tokenizer(
        config.tokenizer,
        sources=sources,
        valid_sources=valid_sources,
        cache=cache,
        vocab_size=config.tokenizer_vocab_size,
        model_tokenizer=tokenizer,
    )
    train, valid = [], [_whole(_tokens(source, chosen, cache, progress), source) for source in valid_sources]
    for source in sources:
        prefix = _tokens(source, chosen, cache, progress)
        kept, split_off = _parts(prefix, source, 0.0 if valid_sources else config.valid_fraction)
        train.append(kept)
        valid += split_off
    prefixes = {part.prefix for part in (*train, *valid)}
    vocab_size = chosen.vocab_size if chosen else max(IndexedDataset(p).info().max_token_id for p in prefixes) + 1
    for prefix in sorted(prefixes):
        check_token_range(prefix, vocab_size)
        _check_vocabulary(prefix, chosen)
    return PreparedData(
        train=tuple(train),
        valid=tuple(valid),
        tokenizer=chosen,
        vocab_size=vocab_size,
        valid_was_asked_for=bool(valid_sources),
    )


def data_sources(config: DataConfig) -> tuple[tuple[DataSource, ...], tuple[DataSource, ...]]:
    """(to train on, for validation). ValueError or FileNotFoundError; reads nothing."""
    sources = parse_sources(config.data, text_key=config.text_key)
    return sources, parse_sources(config.valid_data, text_key=config.text_key) if config.valid_data else ()


def check_token_range(prefix: str | Path, vocab_size: int) -> None:
    """Raise ValueError if an id in PREFIX.bin does not fit a vocabulary of `vocab_size`. Scans files of other
    programs once; ours carry their largest id."""
    largest = IndexedDataset(prefix).info().max_token_id
    if largest >= vocab_size:
        raise ValueError(
            f"{prefix}.bin holds token id {largest}, but the vocabulary has {vocab_size}: it was made with another "
            "tokenizer; prepare it again, or use a model with a larger vocab_size"
        )


def choose_tokenizer(
    name: str | None,
    *,
    sources: Sequence[DataSource],
    valid_sources: Sequence[DataSource] = (),
    cache: Path,
    vocab_size: int,
    model_tokenizer: Tokenizer | None = None,
) -> Tokenizer | None:
    """The tokenizer of a run: `name` (a path, `bytes` or `chars`), else the model's, else the one beside tokenised
    data, else a BPE of `vocab_size` trained once on `sources`. None only for tokenised data without any."""
    found = planned_tokenizer(name, sources=sources, valid_sources=valid_sources, model_tokenizer=model_tokenizer)
    if not isinstance(found, str):
        return found
    texts = [source for source in sources if source.kind != "tokens"]
    if found == "chars":
        every_text = [*texts, *(source for source in valid_sources if source.kind != "tokens")]
        return _cached_tokenizer(every_text, cache, vocab_size=None)
    return _cached_tokenizer(texts, cache, vocab_size=vocab_size)


def planned_tokenizer(
    name: str | None,
    *,
    sources: Sequence[DataSource],
    valid_sources: Sequence[DataSource] = (),
    model_tokenizer: Tokenizer | None = None,
) -> Tokenizer | Literal["chars", "bpe"] | None:
    """What choose_tokenizer returns, or of which kind, where it has to be made of the data."""
    texts = [source for source in sources if source.kind != "tokens"]
    if name == "bytes":
        return byte_tokenizer()
    if name == "chars" and texts:
        return "chars"
    if name is not None and name != "chars":
        return Tokenizer.from_path(name, also="; or `bytes`, or `chars`")
    if model_tokenizer is not None and name is None:
        return model_tokenizer
    beside = [file for file in map(tokenizer_file, sources) if file is not None]
    if beside:
        return Tokenizer.from_path(beside[0])
    if len(texts) == len(sources):
        return "bpe"
    if name == "chars" or texts or any(source.kind != "tokens" for source in valid_sources):
        tokenised = next(source.path for source in sources if source.kind == "tokens")
        raise ValueError(f"{tokenised} is tokenised and has no tokenizer.json beside it: give its tokenizer's path")
    return None


def tokenizer_file(source: DataSource) -> Path | None:
    """The tokenizer.json in the folder of tokenised data, None if there is none or the source is text."""
    file = Path(source.path).parent / "tokenizer.json"
    return file if source.kind == "tokens" and file.is_file() else None


def split_position(tokens: IndexedDataset, valid_fraction: float) -> int:
    """The token at which the validation part starts: the last `valid_fraction` of the documents, or, of fewer than
    1 / valid_fraction documents, of the tokens (nanoGPT's `int(n * 0.9)` for one document and 0.1)."""
    documents = len(tokens)
    if documents * valid_fraction >= 1.0:
        return tokens.document_start(documents - min(documents - 1, round(documents * valid_fraction)))
    return max(1, int(tokens.num_tokens * (1.0 - valid_fraction)))


def _cached_tokenizer(sources: Sequence[DataSource], cache: Path, *, vocab_size: int | None) -> Tokenizer:
    """The BPE of `vocab_size` trained on the sources, or for None their characters; trained once."""
    key = cache_key(_VERSION, "bpe" if vocab_size else "chars", vocab_size, [source_fingerprint(s) for s in sources])

    def build(folder: Path) -> None:
        if vocab_size is None:
            collect_characters(sources).save(folder)
        else:
            _logger.info("training a byte-level BPE of %d tokens on %s", vocab_size, _names(sources))
            train_tokenizer(sources, vocab_size=vocab_size).save(folder)

    return Tokenizer.from_path(cached_folder(cache / "tokenizers", key, build))


def _tokens(source: DataSource, tokenizer: Tokenizer | None, cache: Path, progress: ProgressCallback) -> str:
    """The prefix of the tokens of a source."""
    if source.kind == "tokens":
        return source.path
    if tokenizer is None:
        raise ValueError(f"{source.path} is text and there is no tokenizer for it: give one with --tokenizer")
    chosen = tokenizer

    def build(folder: Path) -> None:
        encode_sources([source], folder / "tokens", tokenizer=chosen, progress=progress)

    key = cache_key(_VERSION, source_fingerprint(source), chosen.fingerprint())
    return str(cached_folder(cache / "tokens", key, build) / "tokens")


def _whole(prefix: str, source: DataSource) -> TokenRange:
    return TokenRange(prefix=prefix, start=0, end=IndexedDataset(prefix).num_tokens, weight=source.weight)


def _parts(prefix: str, source: DataSource, valid_fraction: float) -> tuple[TokenRange, list[TokenRange]]:
    """The training part, and the validation part if there is one: PREFIX_valid where it was prepared, else cut off."""
    whole = _whole(prefix, source)
    if valid_fraction == 0.0:
        return whole, []
    if source.kind == "tokens" and indexed_files(prefix + VALID_SUFFIX)[1].is_file():
        return whole, [_whole(prefix + VALID_SUFFIX, source)]
    at = split_position(IndexedDataset(prefix), valid_fraction)
    kept = TokenRange(prefix=prefix, start=0, end=at, weight=source.weight)
    return kept, [TokenRange(prefix=prefix, start=at, end=whole.end, weight=source.weight)]


def _check_vocabulary(prefix: str, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError if the files say that another vocabulary wrote them."""
    written_by = IndexedDataset(prefix).info().vocabulary_hash
    if tokenizer and written_by and written_by != tokenizer.vocabulary_hash():
        raise ValueError(
            f"{prefix}.bin was tokenised with another vocabulary than the tokenizer in use ({tokenizer.vocab_size} "
            "ids): prepare it again with this one, or use the tokenizer.json that it was made with"
        )


def _names(sources: Iterable[DataSource]) -> str:
    return ", ".join(source.path for source in sources)
