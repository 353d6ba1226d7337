"""Tokenizers: ids by definition, round trips of text and of files, special ids from the files beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe

TEXT = "First Citizen:\n  na\u00efve caf\u00e9 \u4f60\u597d \U0001f600\n\n\tend <b> 'tis 12345"
TRAINING = ["the cat sat on the mat\n" * 20, "the dog and the cat\n" * 10, TEXT]


@pytest.fixture(params=["bytes", "chars", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return byte_tokenizer()
    return char_tokenizer(TRAINING) if request.param == "chars" else train_bpe(TRAINING, 300)


def test_decode_of_encode_is_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_saved_file_reads_back_as_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path)
    assert file == tmp_path / "tokenizer.json"
    for path in (file, tmp_path):
        again = Tokenizer.from_path(path)
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        assert (again.vocab_size, again.eos_id, again.bos_id) == (tokenizer.vocab_size, tokenizer.eos_id, None)
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.vocabulary_hash() == tokenizer.vocabulary_hash()


def test_batch_is_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["the cat", "", "end\n", TEXT]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_lines_can_be_cut(tokenizer: Tokenizer) -> None:
    assert tokenizer.can_cut_at_lines()


def test_bytes_are_utf8_values() -> None:
    tokenizer = byte_tokenizer()
    everything = "".join(map(chr, range(0x250))) + TEXT
    assert tokenizer.encode(everything) == list(everything.encode())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_chars_are_ranks_of_sorted_characters() -> None:
    tokenizer = char_tokenizer(["hello\n", "world"])
    assert tokenizer.vocab_size == len(set("hello\nworld"))
    assert tokenizer.encode("hello\n") == [sorted(set("hello\nworld")).index(c) for c in "hello\n"]
    assert tokenizer.eos_id is None


def test_chars_can_have_an_end_mark() -> None:
    tokenizer = char_tokenizer("cab", end_mark=True)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.encode("abc")) == (4, 3, [0, 1, 2])


def test_unknown_character_is_named() -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 3 characters has no 'x', '\\xe9'"):
        char_tokenizer("abc").encode("ax\u00e9")


def test_bpe_layout_and_size() -> None:
    tokenizer = train_bpe(TRAINING, 270)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (270, 0)
    assert len(tokenizer.encode("the cat")) == 2
    with pytest.raises(ValueError, match="256"):
        train_bpe(TRAINING, 256)


def test_bpe_is_the_same_in_every_process() -> None:
    code = (
        "from megallm.data.tokenizer import train_bpe\n"
        "print(train_bpe([f'{i * i} words {i % 7} {i} ' * 3 for i in range(300)], 400).fingerprint())"
    )
    root = str(Path(__file__).resolve().parents[1])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert len(outputs) == 1


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    content = json.loads(byte_tokenizer().save(tmp_path).read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.from_path(tmp_path).encode("123456789")) == 9


def test_special_ids_come_from_the_files_beside(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "bos_token_id": 5}))
    assert (Tokenizer.from_path(tmp_path).eos_id, Tokenizer.from_path(tmp_path).bos_id) == (7, 5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8]}))
    assert Tokenizer.from_path(tmp_path).eos_id == 9
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert (Tokenizer.from_path(tmp_path).eos_id, Tokenizer.from_path(tmp_path).bos_id) == (256, 5)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*, or a directory that holds one$"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a Hugging Face"):
        Tokenizer.from_path(tmp_path)
