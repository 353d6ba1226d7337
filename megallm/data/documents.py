"""Documents: what a path of `--data` means, and its text as a stream of pieces in bounded memory.

    x.txt         one document, the file
    x.jsonl       one document a line, the string under `text_key`
    PREFIX        already tokenised: PREFIX.bin and PREFIX.idx
    (nothing)     the embedded corpus

A piece is a document or a part of one, cut where a line ends, so that a file of any size is read and tokenised a piece
at a time. Text is taken as it is: no character is changed, newlines neither.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megallm.data.corpus import corpus_bytes, corpus_fingerprint, read_corpus
from megallm.data.indexed import indexed_files

PIECE_CHARACTERS = 1 << 16
_EXTENSIONS = (".txt", ".jsonl")
_CUT = re.compile(r"(?<=[^\W_])(?=[\r\n])|(?<=\S\n)(?=\S)")
"""Between a letter or digit and a newline, or after a single newline: where no word of GPT-2's splitting (which keeps
blanks together) or of its successors' (cl100k, Llama 3, Qwen: newlines belong to the punctuation before) is cut."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One path of the data, checked to exist."""

    kind: Literal["txt", "jsonl", "tokens", "corpus"]
    path: str
    """The file, for `tokens` the prefix, for `corpus` its name."""
    weight: float = 1.0
    """Share of the samples drawn from it, relative to the other sources."""
    text_key: str = "text"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text of one document."""

    text: str
    ends_document: bool
    position: int
    """Bytes of the source read so far."""


def parse_sources(data: Sequence[str], *, text_key: str) -> tuple[DataSource, ...]:
    """The sources that `path` or `weight path weight path ...` means; nothing = the embedded corpus.
    ValueError or FileNotFoundError where the list or a path is wrong."""
    if not data:
        return (DataSource(kind="corpus", path="the Python standard library"),)
    if len(data) == 1:
        return (open_source(data[0], text_key=text_key),)
    rule = f"data {list(data)} must be one path, or `weight path weight path ...`"
    if len(data) % 2:
        raise ValueError(f"{rule}: it has {len(data)} items, an odd number")
    sources = []
    for word, path in zip(data[::2], data[1::2], strict=True):
        try:
            weight = float(word)
        except ValueError:
            raise ValueError(f"{rule}: {word!r} is not a number; put a weight before each path") from None
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{rule}: weight {word} is not a positive number")
        sources.append(open_source(path, text_key=text_key, weight=weight))
    return tuple(sources)


def open_source(path: str, *, text_key: str, weight: float = 1.0) -> DataSource:
    """The source at a path, by its extension; a prefix may also be given as its .bin or .idx file."""
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    bin_file, idx_file, _ = indexed_files(prefix)
    if bin_file.is_file() or idx_file.is_file():
        for file in (bin_file, idx_file):
            if not file.is_file():
                raise FileNotFoundError(f"data {path}: {file} is missing; tokenised data is a pair of .bin and .idx")
        return DataSource(kind="tokens", path=prefix, weight=weight)
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"data {path} is a directory: give a .txt or .jsonl file, or the prefix of a .bin/.idx pair")
    if not file.is_file():
        raise FileNotFoundError(f"data {path} does not exist, as a file or as {bin_file} and {idx_file}")
    if file.suffix.lower() not in _EXTENSIONS:
        raise ValueError(
            f"data {path}: unknown extension {file.suffix!r}; give .txt (one document), .jsonl (one document a line) "
            "or the prefix of a .bin/.idx pair"
        )
    if file.stat().st_size == 0:
        raise ValueError(f"data {path} is empty")
    kind: Literal["txt", "jsonl"] = "txt" if file.suffix.lower() == ".txt" else "jsonl"
    return DataSource(kind=kind, path=path, weight=weight, text_key=text_key)


def source_bytes(source: DataSource) -> int:
    """Size of the text of a source in bytes."""
    return corpus_bytes() if source.kind == "corpus" else Path(source.path).stat().st_size


def source_fingerprint(source: DataSource) -> str:
    """A hash that changes when the text of a source does: of path, size, date and key of a file, not of its content,
    which may be terabytes; of the Python version and file sizes for the embedded corpus."""
    if source.kind == "corpus":
        return corpus_fingerprint()
    file = Path(source.path).resolve()
    status = file.stat()
    key = source.text_key if source.kind == "jsonl" else ""
    described = [source.kind, str(file), status.st_size, status.st_mtime_ns, key]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def read_pieces(source: DataSource, *, cut: bool = True, size: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """The text of a source in order; with `cut` in pieces of about `size` characters, else in whole documents.
    Documents without any text are left out. ValueError names the file and line of text that cannot be read."""
    if source.kind == "tokens":
        raise ValueError(f"data {source.path} is tokenised already: text is needed here")
    if source.kind == "txt":
        yield from _document_pieces(_read_txt(source.path, size), cut=cut)
        return
    documents = _read_corpus() if source.kind == "corpus" else _read_jsonl(source)
    for text, position in documents:
        if text:
            chunks = ((text[i : i + size], position) for i in range(0, len(text), size))
            yield from _document_pieces(chunks, cut=cut)


def _document_pieces(chunks: Iterable[tuple[str, int]], *, cut: bool) -> Iterator[Piece]:
    """The pieces of one document that comes in chunks (text, bytes read so far)."""
    held: list[str] = []
    position = 0
    for chunk, position in chunks:
        at = _last_cut(chunk) if cut else 0
        if at:
            yield Piece(text="".join(held) + chunk[:at], ends_document=False, position=position)
            held = [chunk[at:]]
        else:
            held.append(chunk)
    if held:
        yield Piece(text="".join(held), ends_document=True, position=position)


def _last_cut(text: str) -> int:
    """Index of the last place where `text` may be cut, 0 if there is none."""
    for start in (max(0, len(text) - 2048), 0):
        places = [match.start() for match in _CUT.finditer(text, start)]
        if places:
            return places[-1]
    return 0


def _read_txt(path: str, size: int) -> Iterator[tuple[str, int]]:
    """(text, bytes read so far) of a UTF-8 file, a byte-order mark left out."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(size)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 near byte {position}: {error.reason}; convert it") from error
            position += len(block)
            if text:
                yield text, position
            if not block:
                return


def _read_jsonl(source: DataSource) -> Iterator[tuple[str, int]]:
    """(text, bytes read so far) of every line that is not blank."""
    position = 0
    with open(source.path, "rb") as file:
        for number, line in enumerate(file, start=1):
            position += len(line)
            if line.strip():
                yield _text_of_line(line, source, f"{source.path}, line {number}"), position


def _text_of_line(line: bytes, source: DataSource, where: str) -> str:
    try:
        record: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON object is needed, this is {type(record).__name__}")
    if source.text_key not in record:
        raise ValueError(
            f"{where}: no key {source.text_key!r}; its keys are {sorted(record)}: choose one with --text-key"
        )
    text = record[source.text_key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {source.text_key!r} is {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {source.text_key!r} holds half of a surrogate pair ({error.reason})") from error
    return text


def _read_corpus() -> Iterator[tuple[str, int]]:
    position = 0
    for _, text in read_corpus():
        position += len(text)
        yield text, position
