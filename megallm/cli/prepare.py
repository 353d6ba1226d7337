"""`megallm prepare`: tokenise text once, into a pair of files that any number of runs can train on.

    megallm prepare --data books.jsonl --tokenizer ./llama --out tokens/books
    megallm prepare --data shakespeare.txt --tokenizer chars --valid-fraction 0.1 --out runs/shakespeare

writes OUT.bin, OUT.idx (Megatron's format), with a validation fraction OUT_valid.bin and OUT_valid.idx, and the
tokenizer.json that belongs to them beside them. `--data OUT` then trains on them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megallm.config.data import DataConfig
from megallm.data.cache import default_cache_dir
from megallm.data.documents import DataSource, open_source, parse_sources, source_bytes
from megallm.data.encode import Progress, encode_sources
from megallm.data.indexed import IndexedDataset, IndexedInfo, IndexedWriter, indexed_files
from megallm.data.prepare import VALID_SUFFIX, choose_tokenizer, split_position
from megallm.data.tokenizer import Tokenizer
from megallm.runtime.outputs import check_output_file

_COPY_TOKENS = 1 << 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `megallm prepare`."""
    defaults = DataConfig()
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help=".txt (one document each) or .jsonl (one document a line); several are put one after the other. "
        "Default: the embedded corpus",
    )
    parser.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx")
    parser.add_argument(
        "--tokenizer",
        default=defaults.tokenizer,
        metavar="T",
        help="a tokenizer.json, a directory that holds one, `bytes` or `chars`. Default: a byte-level BPE trained "
        "on the data",
    )
    parser.add_argument(
        "--tokenizer-vocab-size",
        type=int,
        default=defaults.tokenizer_vocab_size,
        metavar="N",
        help=f"vocabulary of the BPE that is trained (default {defaults.tokenizer_vocab_size})",
    )
    parser.add_argument(
        "--text-key", default=defaults.text_key, help=f"key of the text in .jsonl (default {defaults.text_key})"
    )
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="last part of the documents (of one document: of its tokens) to write as PREFIX_valid (default 0: none)",
    )
    parser.add_argument(
        "--cache-dir", default=None, help="where a trained tokenizer is kept (default: megallm in the user's cache)"
    )


def run(args: argparse.Namespace) -> int:
    """Do what the flags say, print what was written, return 0. ValueError or FileNotFoundError before any output."""
    if not 0.0 <= args.valid_fraction < 1.0:
        raise ValueError(f"--valid-fraction ({args.valid_fraction}) must be at least 0 and below 1")
    paths: list[str] = args.data
    sources = (
        [open_source(path, text_key=args.text_key) for path in paths]
        if paths
        else list(parse_sources((), text_key=args.text_key))
    )
    for source in sources:
        if source.kind == "tokens":
            raise ValueError(f"{source.path} is tokenised already: pass it to training as --data {source.path}")
    if not os.path.basename(args.out):
        raise ValueError(f"--out {args.out!r} is a directory: give the names' common start, such as {args.out}tokens")
    check_output_file(f"{args.out}.bin")
    started = time.monotonic()
    cache = Path(args.cache_dir) if args.cache_dir else default_cache_dir(os.environ, Path.home())
    tokenizer = choose_tokenizer(args.tokenizer, sources=sources, cache=cache, vocab_size=args.tokenizer_vocab_size)
    if tokenizer is None:
        raise ValueError("there is no tokenizer for this text: give one with --tokenizer")
    out = str(args.out)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    _check_tokenizer_beside(out, tokenizer)
    written = _write(sources, out, tokenizer=tokenizer, valid_fraction=args.valid_fraction)
    tokenizer_path = tokenizer.save(Path(out).parent)
    _report(written, sources=sources, tokenizer=tokenizer, tokenizer_path=tokenizer_path, started=started)
    return 0


def _write(
    sources: Sequence[DataSource], out: str, *, tokenizer: Tokenizer, valid_fraction: float
) -> dict[str, IndexedInfo]:
    """Tokenise into OUT, or into a temporary folder beside it and from there into OUT and OUT_valid."""
    if valid_fraction == 0.0:
        info = encode_sources(sources, out, tokenizer=tokenizer, progress=_show)
        for file in indexed_files(out + VALID_SUFFIX):
            file.unlink(missing_ok=True)  # of an earlier run: it would be taken as the validation part of this one
        return {out: info}
    with tempfile.TemporaryDirectory(dir=Path(out).parent, prefix=f".{Path(out).name}.tmp-") as folder:
        whole = Path(folder) / "tokens"
        encode_sources(sources, whole, tokenizer=tokenizer, progress=_show)
        tokens = IndexedDataset(whole)
        cut = split_position(tokens, valid_fraction)
        return {
            prefix: _copy_tokens(tokens, start, end, prefix, tokenizer=tokenizer)
            for prefix, start, end in ((out, 0, cut), (out + VALID_SUFFIX, cut, tokens.num_tokens))
        }


def _copy_tokens(tokens: IndexedDataset, start: int, end: int, prefix: str, *, tokenizer: Tokenizer) -> IndexedInfo:
    """Write the tokens from `start` to `end` as a dataset of their own, their documents kept apart."""
    writer = IndexedWriter(
        prefix,
        vocab_size=tokenizer.vocab_size,
        vocabulary_hash=tokenizer.vocabulary_hash(),
        eos_id=tokenizer.eos_id,
    )
    try:
        for document in range(len(tokens)):
            first = max(start, tokens.document_start(document))
            last = min(end, tokens.document_start(document + 1))
            for at in range(first, last, _COPY_TOKENS):
                writer.add(tokens.tokens[at : min(at + _COPY_TOKENS, last)])
            writer.end_document()
        return writer.close()
    except BaseException:
        writer.abort()
        raise


def _check_tokenizer_beside(out: str, tokenizer: Tokenizer) -> None:
    """Raise ValueError where writing tokenizer.json would take away the one that other tokens in the folder need."""
    folder = Path(out).parent
    mine = {f"{out}.bin", f"{out}{VALID_SUFFIX}.bin"}
    others = sorted(str(file) for file in folder.glob("*.bin") if str(file) not in mine)
    file = folder / "tokenizer.json"
    if others and file.is_file() and Tokenizer.from_path(file).vocabulary_hash() != tokenizer.vocabulary_hash():
        raise ValueError(
            f"{file} is another tokenizer, of {others[0]}: put --out into another directory, or use that one with "
            f"--tokenizer {file}"
        )


def _show(progress: Progress) -> None:
    print(f"tokenising {progress}", file=sys.stderr, flush=True)


def _report(
    written: dict[str, IndexedInfo],
    *,
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    started: float,
) -> None:
    seconds = time.monotonic() - started
    for prefix, info in written.items():
        print(f"{prefix}: documents {info.documents:,}, tokens {info.tokens:,}, stored as {info.dtype[1:]}")
    size = sum(map(source_bytes, sources))
    eos = "none" if tokenizer.eos_id is None else tokenizer.eos_id
    print(f"{tokenizer_path}: vocabulary {tokenizer.vocab_size}, end mark {eos}")
    print(f"{size / 1e6:.1f} MB in {seconds:.1f} s")
