"""Tokenizers: a thin class around a Hugging Face `tokenizers` object, and the three that we make ourselves.

Every tokenizer is a `tokenizer.json`, ours too, so that any program that reads Hugging Face tokenizers reads them:

    byte_tokenizer()        id = byte value, <|endoftext|> = 256
    char_tokenizer(texts)   id = rank of the character among the sorted characters of the texts
    train_bpe(texts, ...)   byte-level BPE, <|endoftext|> = 0, the 256 bytes, then the merges

Special ids come from the JSON files beside tokenizer.json; no pickle is ever read and no code from them is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
"""What published tokenizers call their marks; tried in this order where no file beside tokenizer.json names them."""
_MIN_BPE_VOCAB = 257
_LINE_CUTS = (("ab", "\r\nCd"), ("12", "\n  3"), ("def f():\n", "class"), (")\n", "("), ("a.\n", "\u00e9"))


@dataclass(frozen=True, eq=False)
class Encoded:
    """The ids of a text and where they come from."""

    ids: npt.NDArray[np.int32]
    """[n]."""
    starts: npt.NDArray[np.int64]
    """[n]: the first character of each token's text."""
    ends: npt.NDArray[np.int64]
    """[n]: past its last character. Tokens that share a character (parts of its bytes) both have it."""

    def overlapping(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """[n]: the tokens that hold at least one character of [start, end)."""
        return (self.starts < end) & (self.ends > start)


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, inner: tokenizers.Tokenizer, *, eos_id: int | None = None, bos_id: int | None = None) -> None:
        """Wrap `inner`, taking over its object; truncation and padding stored in it are switched off, so that
        documents keep their length. `eos_id` and `bos_id`: None = looked up by the usual names."""
        inner.no_truncation()
        inner.no_padding()
        vocab = inner.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ValueError("the tokenizer has an empty vocabulary")
        self._inner = inner
        self._vocab = vocab
        self.vocab_size: int = max(vocab.values()) + 1
        """Largest id + 1: rows that an embedding needs. Larger than the count of tokens where ids have gaps."""
        self.eos_id: int | None = _first_known(vocab, _EOS_NAMES) if eos_id is None else eos_id
        """The id that ends a document, None if there is none."""
        self.bos_id: int | None = _first_known(vocab, _BOS_NAMES) if bos_id is None else bos_id
        """The id that starts a document, None if there is none."""
        added = inner.get_added_tokens_decoder()
        self.control_tokens: tuple[str, ...] = tuple(added[key].content for key in sorted(added) if added[key].special)
        """The texts that become one id of their own wherever they stand, marked as special in the file."""

    @classmethod
    def from_path(cls, path: str | os.PathLike[str], *, also: str = "") -> Tokenizer:
        """Read a tokenizer.json, or the one in a directory, with the special ids that the files beside it name:
        tokenizer_config.json, else generation_config.json, else config.json. FileNotFoundError if there is none,
        ValueError if it is not a tokenizer. `also`: what else may be given, to be said where there is none."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {file}: give a tokenizer.json, or a directory that holds one{also}"
            )
        try:
            inner = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"{file} is not a Hugging Face tokenizer.json: {error}") from error
        vocab = inner.get_vocab(with_added_tokens=True)
        return cls(
            inner,
            eos_id=_special_id(file.parent, "eos", vocab),
            bos_id=_special_id(file.parent, "bos", vocab),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; `add_special_tokens`: with the marks that the tokenizer's own template adds."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text, computed on all cores; equal to `encode` of each. ValueError if one has no ids."""
        try:
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"the tokenizer cannot encode this text: {self._why(texts, error)}") from error
        return [encoding.ids for encoding in encodings]

    def encode_batch_with_offsets(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[Encoded]:
        """The ids of each text as `encode_batch` gives them, each with the characters of its text that it stands for:
        a token without characters of its own in the file's offsets (blanks that some tokenizers trim from them) has
        those since the token before it."""
        try:
            encodings = self._inner.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"the tokenizer cannot encode this text: {self._why(texts, error)}") from error
        return [_encoded(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """`encode_batch_with_offsets` of one text."""
        return self.encode_batch_with_offsets([text], add_special_tokens=add_special_tokens)[0]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, without the special marks unless they are asked for."""
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name, None if it has none."""
        return self._vocab.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The name of the token with this id, None if there is none."""
        token = self._inner.id_to_token(token_id)
        return None if token is None else str(token)

    def special_tokens(self) -> dict[str, str]:
        """The marks that exist, by the names that chat templates know them by: `bos_token`, `eos_token`. Only control
        tokens: in some vocabularies `<s>` is an ordinary token."""
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        tokens = {name: self.id_to_token(token_id) for name, token_id in named.items() if token_id is not None}
        return {name: token for name, token in tokens.items() if token is not None and token in self.control_tokens}

    def with_control_tokens(self, tokens: Iterable[str]) -> Tokenizer:
        """A copy that knows these texts as single ids, those of them that are new with ids after all others: what a
        chat template's marks need. A model then needs `vocab_size` rows of the copy."""
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        return Tokenizer(inner, eos_id=self.eos_id, bos_id=self.bos_id)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write tokenizer.json (into `path` if it is a directory) and return its path; replaced in one step."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        temporary = file.with_name(f"{file.name}.tmp-{uuid.uuid4().hex}")
        temporary.write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        os.replace(temporary, file)
        return file

    def moved(self, other: Tokenizer) -> str | None:
        """A token of this vocabulary that has another id in `other`, or none; None if `other` holds all of it."""
        theirs = other._vocab
        return next((token for token, token_id in self._vocab.items() if theirs.get(token) != token_id), None)

    def vocabulary_hash(self) -> str:
        """A hash of (token, id) pairs only: equal for two files of one vocabulary, however they are written."""
        pairs = sorted(self._vocab.items(), key=lambda pair: (pair[1], pair[0]))
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids of a document: the tokenizer and its end mark."""
        return hashlib.sha256(f"{self.eos_id}\n{self._inner.to_str()}".encode()).hexdigest()

    def can_cut_at_lines(self) -> bool:
        """Whether text cut where `documents.read_pieces` cuts has the ids of the whole (tried on samples): true of
        byte-level BPE, not of tokenizers that put a mark at the start of every text."""
        try:
            return all(
                self.encode(before + after, add_special_tokens=False)
                == self.encode(before, add_special_tokens=False) + self.encode(after, add_special_tokens=False)
                for before, after in _LINE_CUTS
            )
        except ValueError:  # a vocabulary without these characters: `chars`, where every cut is exact
            return isinstance(self._inner.model, models.WordLevel) and self._inner.normalizer is None

    def _why(self, texts: Sequence[str], error: Exception) -> str:
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            return "it holds bytes that are not UTF-8, or half of a surrogate pair"
        if isinstance(self._inner.model, models.WordLevel):
            unknown = sorted({character for text in texts for character in set(text) if character not in self._vocab})
            if unknown:
                listed = ", ".join(ascii(character) for character in unknown[:8])
                more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
                return f"its vocabulary of {self.vocab_size} characters has no {listed}{more}"
        return str(error)


def byte_tokenizer() -> Tokenizer:
    """One token a byte of UTF-8, id = byte value, and <|endoftext|> = 256: 257 ids, every text has ids."""
    symbols = _byte_symbols()
    inner = tokenizers.Tokenizer(models.BPE(vocab={symbol: value for value, symbol in enumerate(symbols)}, merges=[]))
    _make_byte_level(inner)
    return _with_end_mark(inner)


def char_tokenizer(texts: Iterable[str], *, end_mark: bool = False) -> Tokenizer:
    """One token a character; the ids are the ranks of the sorted characters of `texts` (nanoGPT's char level: 65 on
    tinyshakespeare). `end_mark`: one more id, <|endoftext|>, to end documents with. Other characters have no id."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise ValueError("the text is empty: a character vocabulary needs at least one character")
    vocab = {character: rank for rank, character in enumerate(sorted(characters))}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab=vocab))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return _with_end_mark(inner) if end_mark else Tokenizer(inner)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on `texts` with at most `vocab_size` ids: <|endoftext|> = 0, the 256 bytes, merges.
    The same texts in the same order give the same tokenizer. Small texts can give fewer ids than asked for."""
    if vocab_size < _MIN_BPE_VOCAB:
        raise ValueError(
            f"tokenizer_vocab_size ({vocab_size}) is below {_MIN_BPE_VOCAB}, the 256 bytes and one end mark: "
            "use a larger one, or the tokenizer `bytes`"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    _make_byte_level(inner)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_byte_symbols(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(inner)


def _encoded(ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    pairs = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(pairs[:, 1]) if len(pairs) else pairs[:, 1]
    before = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]])
    starts = np.minimum(pairs[:, 0], before)  # blanks between two tokens belong to the later one
    return Encoded(ids=np.array(ids, dtype=np.int32), starts=starts, ends=ends)


def _make_byte_level(inner: tokenizers.Tokenizer) -> None:
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()


def _with_end_mark(inner: tokenizers.Tokenizer) -> Tokenizer:
    inner.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(inner)


def _byte_symbols() -> list[str]:
    """GPT-2's printable character for each byte value 0..255: itself where printable, else 256, 257, ... in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    symbol = {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}
    return [symbol[value] for value in range(256)]


def _first_known(vocab: dict[str, int], names: Sequence[str]) -> int | None:
    return next((vocab[name] for name in names if name in vocab), None)


def _special_id(folder: Path, name: str, vocab: dict[str, int]) -> int | None:
    """The id that tokenizer_config.json, generation_config.json or config.json gives for `eos` or `bos`."""
    token = _read_json(folder / "tokenizer_config.json").get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str) and token in vocab:
        return vocab[token]
    for file in ("generation_config.json", "config.json"):
        found = _read_json(folder / file).get(f"{name}_token_id")
        if isinstance(found, list):  # several stop tokens: the first is the main one
            found = found[0] if found else None
        if isinstance(found, int) and 0 <= found <= max(vocab.values()):
            return found
    return None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
