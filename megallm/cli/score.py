"""`megallm score --model REWARD --data F.jsonl`: what a reward model thinks of responses.

A record of comparisons (chosen and rejected, or ranked responses) gets a score for each response, any other one for its
last answer, written in the record's own order. Scores are those at the token that ends the answer, less the
calibration's mean.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megallm.cli.inference import (
    InferenceJob,
    add_model_arguments,
    check_out,
    check_positive,
    open_job,
    write_jsonl,
)
from megallm.data.convert import conversations, preferences, rankings
from megallm.data.examples import comparison_groups, conversation_examples, ended
from megallm.data.finetune_data import open_template
from megallm.data.masks import TokenIds
from megallm.data.records import COMPARED, kind_of, place, read_records
from megallm.data.tokenizer import Tokenizer
from megallm.trainers.scores import Calibration, read_calibration, score_responses


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is scored of a record."""

    sequences: tuple[TokenIds, ...]
    """A response each, with its prompt; the one that the record calls best first."""
    order: tuple[int, ...]
    """Their places in the record."""

    def as_written(self, scores: Sequence[float]) -> dict[str, float | list[float]]:
        """The line for scores of `sequences`."""
        if len(scores) == 1:
            return {"score": scores[0]}
        return {"scores": [score for _, score in sorted(zip(self.order, scores, strict=True))]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, how to read it, and where scores go."""
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, nargs="+", help=".jsonl or .json files of records")
    parser.add_argument("--data-format", help="format of the records; default: by their keys")
    parser.add_argument("--template", help="chat template, as in training; default: the model's own, else alpaca")
    parser.add_argument("--seq-length", type=int, default=2048, help="longest sequence; longer ones are an error")
    parser.add_argument("--raw", action="store_true", help="leave the calibration out")
    parser.add_argument("--out", metavar="OUT.jsonl", help="write the scores of each record")
    parser.add_argument("--tokens-at-once", type=int, default=4096, help="tokens of one forward, padding included")


def run(args: argparse.Namespace) -> Callable[[], int]:
    """Checks everything, then returns what computes and prints."""
    check_out(args.out, *args.data)
    check_positive(args, "tokens_at_once")
    job = open_job(args)
    if job.source.config.head != "scalar":
        raise ValueError(f"--model {args.model} is a language model: train a reward model on it (examples/reward.py)")
    tokenizer = job.source.tokenizer() if args.tokenizer is None else Tokenizer.from_path(args.tokenizer)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer.json beside it: give one with --tokenizer")
    rows = read_rows(args, job, tokenizer)
    calibration = Calibration() if args.raw or job.source.path is None else read_calibration(job.source.path)

    def work() -> int:
        engine = job.start()
        sequences = [ids.tolist() for row in rows for ids in row.sequences]
        flat = score_responses(engine, sequences, tokens_at_once=args.tokens_at_once)
        scores = iter(score - calibration.mean for score in flat)
        found = [[next(scores) for _ in row.sequences] for row in rows]
        if engine.mesh.world.rank == 0:
            if args.out:
                write_jsonl(args.out, (row.as_written(each) for row, each in zip(rows, found, strict=True)))
            print(summary(found))
        return 0

    return work


def read_rows(args: argparse.Namespace, job: InferenceJob, tokenizer: Tokenizer) -> list[Row]:
    """One of each record. ValueError if one cannot be scored."""
    records = read_records(args.data)
    template = open_template(args.template, tokenizer, job.source.directory)
    kind = kind_of(records, args.data_format)
    unlimited = sys.maxsize  # what is too long is told below, by this program's flag
    if kind in COMPARED:
        read = preferences if kind == "preference" else rankings
        compared, dropped = read(records, data_format=kind)  # type: ignore[operator]
        groups, dropped = comparison_groups(compared, tokenizer, template, max_length=unlimited, dropped=dropped)
        rows = [
            Row(
                sequences=tuple(each.input_ids for each in group.examples),
                order=group.order or tuple(range(len(group.examples))),
            )
            for group in groups
        ]
    else:
        made, dropped = conversations(records, data_format=args.data_format)
        examples, dropped = conversation_examples(
            made, tokenizer, template, max_length=unlimited, construction="last-turn", dropped=dropped
        )
        rows = [Row(sequences=(ended(each).input_ids,), order=(0,)) for each in examples]
    if dropped.total:
        raise ValueError(f"every record must have a score, but {dropped}: take them out of the data")
    for record, row in zip(records, rows, strict=True):
        _check_length(place(record), max(map(len, row.sequences)), args.seq_length, job)
    return rows


def summary(found: Sequence[Sequence[float]]) -> str:
    """One line: how many, their mean and spread, how often the first of several is the best."""
    flat = [score for row in found for score in row]
    mean = math.fsum(flat) / len(flat)
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in flat) / len(flat))
    line = f"records {len(found)}   responses {len(flat)}   score {mean:.4f}   std {spread:.4f}"
    compared = [row for row in found if len(row) > 1]
    if compared:
        better = sum(row[0] > max(row[1:]) for row in compared) / len(compared)
        line += f"   first is best {better:.1%}"
    return line


def _check_length(where: str, tokens: int, seq_length: int, job: InferenceJob) -> None:
    config = job.source.config
    if tokens > seq_length:
        raise ValueError(
            f"{where}: a response with its prompt has {tokens} tokens, more than seq_length ({seq_length}): raise it, "
            "or take the record out of the data"
        )
    if config.position_embedding == "learned" and tokens > config.max_position_embeddings:
        raise ValueError(
            f"{where}: a response with its prompt has {tokens} tokens, but the model has learned "
            f"{config.max_position_embeddings} positions: take the record out of the data"
        )
