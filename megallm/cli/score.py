"""`megallm score --model REWARD --data F.jsonl`: what a reward model thinks of responses.

A record of comparisons (chosen and rejected, or ranked responses) gets a score for each response, any other one for its
last answer. Scores are those at the token that ends the answer, less the calibration's mean.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from megallm.cli.inference import InferenceJob, add_model_arguments, open_job, write_jsonl
from megallm.data.conversation import Dropped
from megallm.data.convert import conversations, preferences, rankings
from megallm.data.examples import comparison_groups, conversation_examples, ended
from megallm.data.finetune_data import open_template
from megallm.data.records import check_format, read_records
from megallm.data.tokenizer import Tokenizer
from megallm.trainers.scores import Calibration, read_calibration, score_responses


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
    job = open_job(args)
    if job.source.config.head != "scalar":
        raise ValueError(f"--model {args.model} is a language model: train a reward model on it (examples/reward.py)")
    tokenizer = job.source.tokenizer() if args.tokenizer is None else Tokenizer.from_path(args.tokenizer)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer.json beside it: give one with --tokenizer")
    rows = read_rows(args, job, tokenizer)
    calibration = Calibration()
    if job.source.kind == "checkpoint" and job.source.path is not None and not args.raw:
        calibration = read_calibration(job.source.path)

    def work() -> int:
        engine = job.start()
        flat = score_responses(engine, [ids for row in rows for ids in row], tokens_at_once=args.tokens_at_once)
        scores = iter(score - calibration.mean for score in flat)
        found = [[next(scores) for _ in row] for row in rows]
        if engine.mesh.world.rank == 0:
            if args.out:
                write_jsonl(args.out, ({"scores": each} if len(each) > 1 else {"score": each[0]} for each in found))
            print(summary(found))
        return 0

    return work


def read_rows(args: argparse.Namespace, job: InferenceJob, tokenizer: Tokenizer) -> list[list[Any]]:
    """The sequences of each record. ValueError if one cannot be scored."""
    records = read_records(args.data)
    template = open_template(args.template, tokenizer, job.source.directory)
    kind = check_format(records[0], args.data_format) if records else "text"
    if kind in ("preference", "ranking"):
        read = preferences if kind == "preference" else rankings
        compared, dropped = read(records, data_format=kind)  # type: ignore[operator]
        groups, left_out = comparison_groups(
            compared, tokenizer, template, max_length=args.seq_length, overflow="refuse"
        )
        rows = [[each.input_ids for each in group.examples] for group in groups]
    else:
        made, dropped = conversations(records, data_format=args.data_format)
        examples, left_out = conversation_examples(
            made, tokenizer, template, max_length=args.seq_length, construction="last-turn", overflow="refuse"
        )
        rows = [[ended(each).input_ids] for each in examples]
    _require_all(dropped, left_out)
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


def _require_all(*dropped: Dropped) -> None:
    for each in dropped:
        if each.total:
            raise ValueError(f"every record must have a score, but {each}: take them out of the data")
