"""Tokens on disk: the `.bin` / `.idx` pair of Megatron's indexed datasets, byte by byte.

`PREFIX.bin` holds nothing but token ids, little-endian, document after document. `PREFIX.idx` says where they are:

    offset       type                 content
    0            9 bytes              MMIDIDX and two zero bytes
    9            u64                  version, 1
    17           u8                   dtype code (table below)
    18           u64                  N, sequences
    26           u64                  D, documents + 1
    34           i32[N]               tokens of each sequence
    34 + 4 N     i64[N]               byte offset of each sequence in .bin
    34 + 12 N    i64[D]               first sequence of each document, then N
    34 + 12 N + 8 D                   end (i8[N] more in multimodal files: ignored)

A document is one sequence, or several if it has over 2^30 tokens. The writer keeps neither tokens nor lengths in
memory: all is appended to temporary files, put in place at the end by renames, `.idx` last.
`PREFIX.info.json` is ours: counts, largest id and vocabulary hash, so that they need no scan; other readers ignore it.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of integer types. 6 and 7 are float64 and float32: not tokens, refused."""
_U16_VOCAB = 65_500
"""Megatron's writer takes u16 below this vocabulary, int32 from it on."""
_MAX_SEQUENCE_TOKENS = 1 << 30
_CHUNK = 1 << 22
"""Entries handled at once where a file is scanned or rewritten."""

Tokens: TypeAlias = "npt.NDArray[np.integer[Any]]"


@dataclass(frozen=True, kw_only=True)
class IndexedInfo:
    """What a pair of files holds."""

    documents: int
    tokens: int
    max_token_id: int
    dtype: str
    """numpy name of the stored type, as `<u2`."""
    bin_bytes: int
    vocabulary_hash: str | None = None
    """`Tokenizer.vocabulary_hash()` of the tokenizer that wrote the ids, None if unknown."""
    eos_id: int | None = None
    """The id at the end of every document, None if there is none."""


def indexed_files(prefix: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    """The paths of `.bin`, `.idx` and `.info.json` of a prefix (appended: a prefix may have dots)."""
    text = os.fspath(prefix)
    return Path(text + ".bin"), Path(text + ".idx"), Path(text + ".info.json")


def token_dtype(vocab_size: int) -> str:
    """The numpy type in which ids below `vocab_size` are stored: u16 below 65,500, else int32, as Megatron's writer."""
    return "<u2" if vocab_size < _U16_VOCAB else "<i4"


class IndexedDataset:
    """Read access to a pair of files, memory-mapped: opening costs no memory and no time in their size."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Open and check; FileNotFoundError if a file is missing, ValueError if they are not a whole, matching pair."""
        self.prefix = os.fspath(prefix)
        bin_file, idx_file, _ = indexed_files(prefix)
        for file in (bin_file, idx_file):
            if not file.is_file():
                raise FileNotFoundError(f"no file {file}: tokenised data is a pair {self.prefix}.bin and .idx")
        self.dtype, sequences, boundaries = _read_header(idx_file)
        self.num_sequences = sequences
        self.num_documents = boundaries - 1
        index = np.memmap(idx_file, dtype=np.uint8, mode="r")
        at = _HEADER.size
        self.lengths: Tokens = index[at : at + 4 * sequences].view("<i4")
        """int32 [N], tokens of each sequence."""
        self.pointers: Tokens = index[at + 4 * sequences : at + 12 * sequences].view("<i8")
        """int64 [N], byte offset of each sequence."""
        self.document_indices: Tokens = index[at + 12 * sequences : at + 12 * sequences + 8 * boundaries].view("<i8")
        """int64 [documents + 1], first sequence of each document."""
        self._check(bin_file, idx_file)
        self.tokens: Tokens = np.memmap(bin_file, dtype=self.dtype, mode="r")
        """All ids in file order, [num_tokens], not in memory."""
        self.num_tokens = len(self.tokens)

    def __len__(self) -> int:
        """The number of documents."""
        return self.num_documents

    def document_start(self, document: int) -> int:
        """The position in `tokens` of the first token of a document; of the end, for `document == len(self)`."""
        sequence = int(self.document_indices[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def document(self, document: int) -> Tokens:
        """The ids of a document, [its length], a view of the file."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        return self.tokens[self.document_start(document) : self.document_start(document + 1)]

    def info(self) -> IndexedInfo:
        """The counts, from `PREFIX.info.json` if it belongs to these files, else by a scan of all tokens."""
        stored = _read_info(indexed_files(self.prefix)[2])
        if stored and (stored.bin_bytes, stored.tokens, stored.documents, stored.dtype) == (
            self.tokens.nbytes,
            self.num_tokens,
            self.num_documents,
            self.dtype.str,
        ):
            return stored
        chunks = (self.tokens[i : i + _CHUNK] for i in range(0, self.num_tokens, _CHUNK))
        return IndexedInfo(
            documents=self.num_documents,
            tokens=self.num_tokens,
            max_token_id=max(int(chunk.max()) for chunk in chunks),
            dtype=self.dtype.str,
            bin_bytes=self.tokens.nbytes,
        )

    def _check(self, bin_file: Path, idx_file: Path) -> None:
        """Cheap checks at both ends of the arrays, which catch any truncation and any mix of two pairs."""
        size = bin_file.stat().st_size
        if self.num_sequences == 0 or size == 0:
            raise ValueError(f"{self.prefix}.bin/.idx hold no tokens: prepare the data again")
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if int(self.pointers[0]) != 0 or end != size:
            raise ValueError(
                f"{idx_file} describes {end} bytes of tokens, but {bin_file} has {size}: one of them is truncated, or "
                "they are not a pair; prepare the data again"
            )
        if int(self.document_indices[0]) != 0 or int(self.document_indices[-1]) != self.num_sequences:
            raise ValueError(
                f"{idx_file}: its documents do not cover its {self.num_sequences} sequences; prepare again"
            )


class IndexedWriter:
    """Appends documents; the files appear under their names only when `close` succeeds. As a context manager it closes
    at the end, and removes everything that it wrote if the block raises."""

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        vocabulary_hash: str | None = None,
        eos_id: int | None = None,
        max_sequence_tokens: int = _MAX_SEQUENCE_TOKENS,
    ) -> None:
        """Start a pair for ids below `vocab_size`, stored as `token_dtype(vocab_size)`. ValueError on larger ids."""
        self.prefix = os.fspath(prefix)
        self.vocab_size = vocab_size
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._vocabulary_hash, self._eos_id = vocabulary_hash, eos_id
        self._max_sequence_tokens = max_sequence_tokens
        self._tokens = self._sequences = self._documents = 0
        self._length, self._max_id = 0, -1
        self._suffix = f".tmp-{uuid.uuid4().hex}"
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {}
        for part in (".bin", ".lengths", ".documents", ".idx"):
            self._files[part] = Path(f"{self.prefix}{part}{self._suffix}").open("xb+")

    def add(self, tokens: Sequence[int] | Tokens) -> None:
        """Append ids, 1-D, to the current document."""
        ids = np.asarray(tokens)
        if ids.size == 0:
            return
        largest, smallest = int(ids.max()), int(ids.min())
        if smallest < 0 or largest >= self.vocab_size:
            raise ValueError(
                f"token id {largest if largest >= self.vocab_size else smallest} is outside the vocabulary of "
                f"{self.vocab_size}: the tokenizer and the vocabulary do not belong together"
            )
        self._max_id = max(self._max_id, largest)
        self._files[".bin"].write(ids.astype(self._dtype).tobytes())
        self._tokens += ids.size
        self._length += ids.size
        while self._length > self._max_sequence_tokens:
            self._end_sequence(self._max_sequence_tokens)

    def end_document(self) -> None:
        """End the current document; one without tokens is left out."""
        if self._length:
            self._end_sequence(self._length)
            self._documents += 1
            self._files[".documents"].write(struct.pack("<q", self._sequences))

    def close(self) -> IndexedInfo:
        """Write the index, rename the files into place and return what they hold. ValueError if there is no token."""
        self.end_document()
        if not self._tokens:
            self.abort()
            raise ValueError(f"no tokens for {self.prefix}: the data holds no document with text")
        info = IndexedInfo(
            documents=self._documents,
            tokens=self._tokens,
            max_token_id=self._max_id,
            dtype=self._dtype.str,
            bin_bytes=self._tokens * self._dtype.itemsize,
            vocabulary_hash=self._vocabulary_hash,
            eos_id=self._eos_id,
        )
        self._write_index()
        for file in self._files.values():
            file.close()
        bin_file, idx_file, info_file = indexed_files(self.prefix)
        temporary = Path(f"{info_file}{self._suffix}")
        temporary.write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")
        idx_file.unlink(missing_ok=True)  # an old index must never be seen with new tokens
        os.replace(f"{bin_file}{self._suffix}", bin_file)
        os.replace(temporary, info_file)
        os.replace(f"{idx_file}{self._suffix}", idx_file)
        self.abort()
        return info

    def abort(self) -> None:
        """Remove what has been written and not been put in place."""
        for part, file in self._files.items():
            file.close()
            Path(f"{self.prefix}{part}{self._suffix}").unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _end_sequence(self, length: int) -> None:
        self._files[".lengths"].write(struct.pack("<i", length))
        self._sequences += 1
        self._length -= length

    def _write_index(self) -> None:
        """Header, lengths (copied), pointers (running sums of the lengths), documents (copied), a chunk at a time."""
        index = self._files[".idx"]
        code = next(code for code, name in _DTYPES.items() if name == self._dtype.str)
        index.write(_HEADER.pack(MAGIC, 1, code, self._sequences, self._documents + 1))
        _copy(self._files[".lengths"], index)
        position = 0
        lengths = self._files[".lengths"]
        lengths.seek(0)
        while block := lengths.read(4 * _CHUNK):
            sizes = np.frombuffer(block, dtype="<i4").astype(np.int64) * self._dtype.itemsize
            ends = position + np.cumsum(sizes)
            index.write((ends - sizes).astype("<i8").tobytes())
            position = int(ends[-1])
        index.write(struct.pack("<q", 0))
        _copy(self._files[".documents"], index)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    source.seek(0)
    while block := source.read(_CHUNK):
        target.write(block)


def _read_header(idx_file: Path) -> tuple[np.dtype[Any], int, int]:
    """(dtype, N, D) of an index, its magic, version, type and size checked."""
    size = idx_file.stat().st_size
    with open(idx_file, "rb") as file:
        head = file.read(_HEADER.size)
    if head[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{idx_file} is not an index of tokenised data: it starts with {head[:9]!r}, not {MAGIC!r}")
    if len(head) < _HEADER.size:
        raise ValueError(f"{idx_file} is truncated: {size} bytes, its header alone has {_HEADER.size}")
    _, version, code, sequences, boundaries = _HEADER.unpack(head)
    if version != 1:
        raise ValueError(f"{idx_file} has version {version}: only version 1 is known")
    if code not in _DTYPES:
        raise ValueError(f"{idx_file} has dtype code {code}, not an integer type ({sorted(_DTYPES)})")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences) or boundaries < 1:
        raise ValueError(
            f"{idx_file} has {size} bytes, but {sequences} sequences and {boundaries} boundaries need {expected}: "
            "it is truncated or damaged; prepare the data again"
        )
    return np.dtype(_DTYPES[code]), sequences, boundaries


def _read_info(file: Path) -> IndexedInfo | None:
    """The stored counts; None if the file is missing or is someone else's JSON of the same name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return IndexedInfo(**content)
    except (FileNotFoundError, ValueError, TypeError):
        return None
