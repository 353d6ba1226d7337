"""`megallm eval --model DIR --data F.jsonl`: how well a model predicts documents.

    mean negative log-likelihood = sum over documents and scored tokens of -log p(token | those before it) / tokens

A document is tokenised as the tokenizer does it and scored alone: each token but the first, given those before it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from megallm.cli.inference import add_model_arguments, check_out, check_positive, open_job, read_jsonl, write_jsonl
from megallm.data.tokenizer import Tokenizer
from megallm.trainers.evaluate import score_documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data and where per-document results go."""
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help=".jsonl file, one document a line")
    parser.add_argument("--text-key", default="text", help="key of the text; a list under it is taken as token ids")
    parser.add_argument("--per-document", metavar="OUT.jsonl", help="write loss and tokens of each document")
    parser.add_argument("--tokens-at-once", type=int, default=4096, help="tokens of one forward, padding included")


def run(args: argparse.Namespace) -> Callable[[], int]:
    """Checks everything, then returns what computes and prints."""
    check_out(args.per_document, args.data)
    check_positive(args, "tokens_at_once")
    job = open_job(args)
    texts = read_jsonl(args.data, args.text_key)
    documents = tokenise(texts, args.tokenizer, job.source.tokenizer(), where=args.data)
    vocab_size = job.source.config.vocab_size
    for index, ids in enumerate(documents, start=1):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"{args.data}, document {index}: token id {max(ids)} is outside the model's vocabulary of {vocab_size}"
            )

    def work() -> int:
        engine = job.start()
        scores = score_documents(engine, documents, tokens_at_once=args.tokens_at_once)
        total, tokens = sum(s for s, _ in scores), sum(n for _, n in scores)
        if engine.mesh.world.rank == 0:
            if args.per_document:
                write_jsonl(args.per_document, ({"loss": s / n if n else None, "tokens": n} for s, n in scores))
            loss = total / tokens if tokens else math.nan
            print(f"documents {len(documents)}   tokens {tokens}   loss {loss:.6f}   perplexity {math.exp(loss):.4f}")
        return 0

    return work


def tokenise(texts: list[object], given: str | None, beside: Tokenizer | None, *, where: str) -> list[list[int]]:
    """Token ids of each text; a list of integers is taken as it is. ValueError if a tokenizer is needed and missing."""
    tokenizer = Tokenizer.from_path(given) if given is not None else beside
    documents = []
    for number, text in enumerate(texts, start=1):
        if isinstance(text, list) and all(type(i) is int for i in text):
            documents.append(text)
        elif not isinstance(text, str):
            raise ValueError(f"{where}, document {number}: expected a text or a list of token ids")
        elif tokenizer is None:
            raise ValueError("the model has no tokenizer.json beside it: give one with --tokenizer, or token ids")
        else:
            try:
                documents.append(tokenizer.encode(text))
            except ValueError as error:
                raise ValueError(f"{where}, document {number}: {error}") from error
    return documents
