"""The .bin/.idx files: bytes by the format's formula, round trips, refusal of damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megallm.data.indexed import IndexedDataset, IndexedWriter, indexed_files, token_dtype

DOCUMENTS = [[5, 6, 7], [1], [2, 2, 9, 100]]


def write(prefix: Path, documents: list[list[int]], **kwargs: int) -> None:
    with IndexedWriter(prefix, vocab_size=kwargs.pop("vocab_size", 101), **kwargs) as writer:
        for document in documents:
            writer.add(document)
            writer.end_document()


def test_files_match_the_format_byte_by_byte(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    expected_idx = (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 3, 4)  # version, u16, sequences, documents + 1
        + struct.pack("<3i", 3, 1, 4)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert (tmp_path / "x.idx").read_bytes() == expected_idx
    assert len(expected_idx) == 34 + 12 * 3 + 8 * 4
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<8H", 5, 6, 7, 1, 2, 2, 9, 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.info.json"]


@pytest.mark.parametrize("vocab_size, dtype", [(65_499, "<u2"), (65_500, "<i4"), (151_669, "<i4")])
def test_type_follows_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    write(tmp_path / "x", [[0, vocab_size - 1]], vocab_size=vocab_size)
    read = IndexedDataset(tmp_path / "x")
    assert read.dtype == np.dtype(dtype)
    assert read.tokens.tolist() == [0, vocab_size - 1]


def test_reader_returns_the_documents(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    read = IndexedDataset(tmp_path / "x")
    assert len(read) == 3
    assert [read.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert [read.document_start(i) for i in range(4)] == [0, 3, 4, 8]
    with pytest.raises(IndexError):
        read.document(3)


def test_long_document_is_several_sequences(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]], max_sequence_tokens=3)
    read = IndexedDataset(tmp_path / "x")
    assert read.lengths.tolist() == [3, 3, 1, 3]
    assert read.pointers.tolist() == [0, 6, 12, 14]
    assert read.document_indices.tolist() == [0, 3, 4]
    assert [read.document(i).tolist() for i in range(2)] == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "x", [[], [4], [], [5, 6]])
    assert [IndexedDataset(tmp_path / "x").document(i).tolist() for i in range(2)] == [[4], [5, 6]]


@pytest.mark.parametrize("bad", [101, -1])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, bad: int) -> None:
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 101"):
        write(tmp_path / "x", [[1], [bad]])
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_files(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    before = [file.read_bytes() for file in indexed_files(tmp_path / "x")]
    with pytest.raises(RuntimeError, match="stop"), IndexedWriter(tmp_path / "x", vocab_size=9) as writer:
        writer.add([1, 2, 3])
        raise RuntimeError("stop")
    assert [file.read_bytes() for file in indexed_files(tmp_path / "x")] == before
    assert len(list(tmp_path.iterdir())) == 3


def test_no_tokens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        write(tmp_path / "x", [[]])
    assert list(tmp_path.iterdir()) == []


def test_info_is_stored_and_equals_a_scan(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    stored = IndexedDataset(tmp_path / "x").info()
    (tmp_path / "x.info.json").unlink()
    assert IndexedDataset(tmp_path / "x").info() == stored
    assert (stored.documents, stored.tokens, stored.max_token_id) == (3, 8, 100)


def test_info_of_other_files_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    write(tmp_path / "y", [[1]])
    (tmp_path / "y.info.json").rename(tmp_path / "x.info.json")
    assert IndexedDataset(tmp_path / "x").info().max_token_id == 100


@pytest.mark.parametrize("cut", [5, 20, 40, 60, 101])
def test_truncated_index_is_refused(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "x", DOCUMENTS)
    idx = tmp_path / "x.idx"
    idx.write_bytes(idx.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"x\.idx (is|has)"):
        IndexedDataset(tmp_path / "x")


def test_truncated_tokens_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    file = tmp_path / "x.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"describes 16 bytes of tokens, but .* has 14"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize(
    "at, value, message", [(0, b"X", "is not an index"), (9, b"\x02", "has version 2"), (17, b"\x06", "dtype code 6")]
)
def test_foreign_header_is_refused(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    write(tmp_path / "x", DOCUMENTS)
    content = bytearray((tmp_path / "x.idx").read_bytes())
    content[at : at + 1] = value
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "x")


def test_missing_half_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    (tmp_path / "x.idx").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.idx"):
        IndexedDataset(tmp_path / "x")
