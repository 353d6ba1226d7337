"""`megallm judge --model DIR --data F.jsonl --out OUT.jsonl`: preferences by a model with a written constitution.

Two responses a prompt are compared, sampled first where there are none; with --revise N one response is criticised and
rewritten N times instead. What is written is data for examples/dpo.py, reward.py and sft.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megallm.cli.inference import InferenceJob, add_model_arguments, check_out, check_positive, open_job, write_jsonl
from megallm.data.chat_model import ChatModel
from megallm.data.constitution import (
    CHOICES,
    Constitution,
    critique_request,
    preference_question,
    read_constitution,
    show,
)
from megallm.data.conversation import Dropped, Message, Unusable
from megallm.data.finetune_data import open_template
from megallm.data.judged import Judged, judged
from megallm.data.records import read_records
from megallm.data.tokenizer import Tokenizer
from megallm.trainers.judge import Verdict, ask, judge
from megallm.trainers.revise import Decoding, respond, revise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The judge, its principles, what it judges, and where that goes."""
    add_model_arguments(parser, required=False)
    parser.add_argument("--data", nargs="+", help=".jsonl or .json files: prompts, pairs of responses, or one response")
    parser.add_argument("--data-format", help="format of the records; default: by their keys")
    parser.add_argument("--template", help="chat template of the judge; default: the model's own, else alpaca")
    parser.add_argument("--seq-length", type=int, help="longest sequence; default: the positions of the model")
    parser.add_argument("--constitution", metavar="F.json", help="principles: name, critique, revision, preference")
    parser.add_argument("--show-constitution", action="store_true", help="print the principles as such a file and stop")
    parser.add_argument("--principles", choices=("one", "all"), default="one", help="by one a pair, or the mean of all")
    parser.add_argument("--one-order", action="store_true", help="ask about each pair once, not in both orders")
    parser.add_argument("--min-margin", type=float, default=0.0, help="leave pairs of less P(chosen) - P(rejected) out")
    parser.add_argument("--agreeing", action="store_true", help="leave pairs out whose two orders disagree")
    parser.add_argument("--policy", metavar="DIR", help="model that responses are sampled from; default: the judge")
    parser.add_argument("--policy-template", help="its chat template; default: its own, else alpaca")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest response, critique or revision")
    parser.add_argument("--temperature", type=float, default=1.0, help="of what is generated; 0 = greedy")
    parser.add_argument("--seed", type=int, default=0, help="of principles and samples")
    parser.add_argument("--revise", type=int, default=0, metavar="N", help="rounds of critique and revision")
    parser.add_argument("--out-format", choices=("preference", "sft"), default="preference", help="of revisions")
    parser.add_argument("--out", metavar="OUT.jsonl", help="write the records here")
    parser.add_argument("--tokens-at-once", type=int, default=4096, help="tokens of one forward, padding included")


def run(args: argparse.Namespace) -> Callable[[], int] | int:
    """Checks everything, then returns what computes and writes."""
    constitution = read_constitution(args.constitution)
    if args.show_constitution:
        print(show(constitution))
        return 0
    _check(args)
    job = open_job(args)
    chat = open_chat(args, job, args.template)
    policy_job, policy = job, chat
    if args.policy is not None:
        policy_job = open_job(argparse.Namespace(**vars(args) | {"model": args.policy}))
        policy = open_chat(argparse.Namespace(**vars(args) | {"tokenizer": None}), policy_job, args.policy_template)
    decoding = Decoding(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    count = 1 if args.revise else 2
    items, dropped = judged(read_records(args.data), data_format=args.data_format, num_responses=count)
    _check_prompts(items, chat, policy, constitution, args)

    def work() -> int:
        engine = policy_job.start()
        complete, left_out = respond(engine, policy, items, decoding, count=count)
        dropped.update(left_out)
        if policy_job is not job:
            del engine  # its memory, before the judge needs some
            engine = job.start()
        if args.revise:
            revised, left_out = revise(engine, chat, complete, constitution, decoding, rounds=args.revise)
            rows, line = [row.record(sft=args.out_format == "sft") for row in revised], f"revised {len(revised)}"
        else:
            asked, left_out = ask(
                complete, chat, constitution,
                seed=args.seed, every=args.principles == "all", both_orders=not args.one_order,
            )  # fmt: skip
            verdicts = judge(engine, asked, tokens_at_once=args.tokens_at_once)
            rows, line = choose(verdicts, min_margin=args.min_margin, agreeing=args.agreeing)
        dropped.update(left_out)
        return finish(args.out, rows, f"records {len(items)}   {line}   {dropped}", rank=engine.mesh.world.rank)

    return work


def choose(verdicts: Sequence[Verdict], *, min_margin: float, agreeing: bool) -> tuple[list[dict[str, Any]], str]:
    """(records that are clear enough, a line on all of them)."""
    kept = [
        each for each in verdicts
        if each.margin > 0.0 and each.margin >= min_margin and (each.orders_agree or not agreeing)
    ]  # fmt: skip
    near = sum(each.margin == 0.0 or each.margin < min_margin for each in verdicts)
    line = f"judged {len(verdicts)}   kept {len(kept)}   near ties {near}"
    if verdicts:
        line += f"   orders disagree {sum(not each.orders_agree for each in verdicts)}"
        line += f"   margin {math.fsum(each.margin for each in verdicts) / len(verdicts):.4f}"
        line += f"   first is better {sum(each.first_better > 0.5 for each in verdicts) / len(verdicts):.1%}"
        line += f"   P{CHOICES[0]} {math.fsum(each.says_a for each in verdicts) / len(verdicts):.4f}"
    return [each.record() for each in kept], line


def finish(out: str, rows: Sequence[Mapping[str, Any]], line: str, *, rank: int) -> int:
    """Writes and says what there is, on rank 0. Exit code 1, and no file, where there is nothing."""
    if rank == 0:
        if rows:
            write_jsonl(out, rows)
        print(line if rows else f"{line}: nothing is left, {out} is not written")
    return 0 if rows else 1


def open_chat(args: argparse.Namespace, job: InferenceJob, template: str | None) -> ChatModel:
    """The job's model as one to talk to. ValueError for a reward model, or one without a tokenizer or positions."""
    config, name = job.source.config, job.source.path
    if config.head != "lm":
        raise ValueError(f"{name} is a reward model, with a scalar head: a language model is needed")
    tokenizer = job.source.tokenizer() if args.tokenizer is None else Tokenizer.from_path(args.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer.json beside it: give one with --tokenizer")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but {name} has a vocabulary of {config.vocab_size}"
        )
    length = config.max_position_embeddings if args.seq_length is None else args.seq_length
    if length > config.max_position_embeddings:
        raise ValueError(f"seq_length ({length}) is more than {name} has positions ({config.max_position_embeddings})")
    return ChatModel(
        tokenizer=tokenizer, template=open_template(template, tokenizer, job.source.directory), max_length=length
    )


def _check(args: argparse.Namespace) -> None:
    if missing := [f"--{name}" for name in ("model", "data", "out") if getattr(args, name) is None]:
        raise ValueError(f"{' and '.join(missing)} must be given")
    if not 0.0 <= args.min_margin < 1.0:
        raise ValueError(f"min_margin ({args.min_margin}) must be at least 0 and below 1")
    if args.agreeing and args.one_order:
        raise ValueError("agreeing with one_order: there is one order only; leave one of them out")
    if args.revise < 0:
        raise ValueError(f"revise ({args.revise}) must be 0, or the number of rounds")
    if args.out_format == "sft" and not args.revise:
        raise ValueError("out_format sft is of revisions: give --revise N")
    check_positive(args, "max_new_tokens", "tokens_at_once")
    if args.temperature < 0.0:
        raise ValueError(f"temperature ({args.temperature}) must be at least 0")
    check_out(args.out, *args.data, args.constitution)


def _check_prompts(
    items: Sequence[Judged], chat: ChatModel, policy: ChatModel, constitution: Constitution, args: argparse.Namespace
) -> None:
    """ValueError if a text has no ids, or not one record fits, as far as can be known before anything is generated."""
    short = (Message("assistant", "-"),)
    dropped = Dropped()
    usable = 0
    for item in items:
        try:
            if not item.responses:
                policy.prompt(item.prompt, new_tokens=args.max_new_tokens)
            first, second = (*item.responses, short, short)[:2]
            if args.revise:
                request = critique_request(constitution[0], item.prompt, first[0].content)
                chat.prompt(request, new_tokens=args.max_new_tokens)
            else:
                chat.choices(preference_question(constitution[0], item.prompt, first, second), CHOICES)
            usable += 1
        except Unusable as reason:
            dropped.add_row(reason, item.where)
    dropped.require(usable, "record")
