"""`megallm self-instruct --model DIR --num N --out OUT.jsonl`: new instruction data from a few seed tasks.

Texts are continued as they are, without a chat template. After each round what was found stands in OUT.jsonl.progress:
the same command goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megallm.cli.inference import add_model_arguments, check_out, check_positive, open_job, write_jsonl
from megallm.cli.judge import open_chat
from megallm.config.serialize import from_plain
from megallm.data.chat_model import ChatModel
from megallm.data.records import read_records
from megallm.data.seed_tasks import seed_tasks
from megallm.data.self_instruct import (
    Complete,
    Completion,
    Progress,
    SelfInstruct,
    Task,
    instruction_prompt,
    read_seeds,
    run_round,
)
from megallm.generate.sampling import Sampling
from megallm.parallel.collectives import broadcast_text
from megallm.trainers.engine import Engine

_SETTINGS = ("model", "precision", "temperature", "max_new_tokens", "seed", "prompts_per_round", "rouge", "seq_length")
"""What another result comes from: a run does not go on with others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Seeds, how many, how they are generated, and where they go."""
    add_model_arguments(parser)
    parser.add_argument("--seeds", nargs="+", metavar="F.jsonl", help="alpaca records; default: 16 tasks of our own")
    parser.add_argument("--num", type=int, default=100, help="tasks to find")
    parser.add_argument("--max-rounds", type=int, default=50, help="rounds after which it ends with what there is")
    parser.add_argument("--prompts-per-round", type=int, default=8, help="prompts for instructions in a round")
    parser.add_argument("--rouge", type=float, default=0.7, help="ROUGE-L that makes a task too similar to another")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest list of instructions, longest answer")
    parser.add_argument("--temperature", type=float, default=0.7, help="of instructions; their answers are greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks shown and of the samples")
    parser.add_argument("--seq-length", type=int, help="longest sequence; default: the positions of the model")
    parser.add_argument("--out", required=True, metavar="OUT.jsonl", help="write alpaca records here")


def run(args: argparse.Namespace) -> Callable[[], int]:
    """Checks everything, then returns what generates and writes."""
    check_positive(args, "num", "max_rounds", "prompts_per_round", "max_new_tokens")
    if not 0.0 < args.rouge <= 1.0:
        raise ValueError(f"rouge ({args.rouge}) must be above 0 and at most 1")
    if args.temperature < 0.0:
        raise ValueError(f"temperature ({args.temperature}) must be at least 0")
    check_out(args.out, *(args.seeds or []))
    job = open_job(args)
    chat = open_chat(args, job, "text")
    where = " ".join(args.seeds or ["the built-in seeds"])
    seeds = read_seeds(read_records(args.seeds) if args.seeds else seed_tasks(), where=where)
    options = SelfInstruct(
        num=args.num, seed=args.seed, prompts_per_round=args.prompts_per_round, threshold=args.rouge
    )
    _check_length(seeds, options, chat, args.max_new_tokens)
    file = Path(args.out + ".progress")
    settings = _settings(args, seeds)
    stored = _read_progress(file, settings)

    def work() -> int:
        engine = job.start()
        world = engine.mesh.world
        progress = _progress(json.loads(broadcast_text(json.dumps(stored), world, engine.mesh.device, src=0)))
        complete = completer(engine, chat, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
        while len(progress.kept) < args.num and progress.rounds < args.max_rounds:
            run_round(progress, seeds, options, complete)
            if world.rank == 0:
                _write(file, json.dumps({"settings": settings, **asdict(progress)}, ensure_ascii=False))
                print(progress.line(), flush=True)
        if world.rank == 0:
            if progress.kept:
                write_jsonl(args.out, [task.record() for task in progress.kept[: args.num]])
            if len(progress.kept) >= args.num:
                file.unlink(missing_ok=True)
                print(f"{args.num} tasks in {args.out}")
            else:
                place = f"in {args.out}" if progress.kept else f"{args.out} is not written"
                found_few = f"only {len(progress.kept)} of {args.num} tasks after {progress.rounds} rounds"
                print(f"{found_few}, {place}: a higher --max-rounds goes on")
        return 0

    return work


def completer(engine: Engine, chat: ChatModel, *, max_new_tokens: int, temperature: float) -> Complete:
    """Completions by the engine's model, on every rank alike. Each call is a collective."""

    def complete(prompts: Sequence[str], seed: int, is_sampled: bool) -> list[Completion | None]:
        ids = [chat.tokenizer.encode(prompt) for prompt in prompts]
        fitting = [i for i, each in enumerate(ids) if len(each) + max_new_tokens <= chat.max_length]
        found: list[Completion | None] = [None] * len(prompts)
        if fitting:
            sampling = Sampling(temperature=temperature if is_sampled else 0.0, seed=seed, stop_ids=chat.stop_ids)
            new = engine.generate([ids[i] for i in fitting], max_new_tokens=max_new_tokens, sampling=sampling)
            for i, own in zip(fitting, new, strict=True):
                found[i] = Completion(chat.tokenizer.decode(own), has_ended=bool(own) and own[-1] in chat.stop_ids)
        return found

    return complete


def _check_length(seeds: Sequence[Task], options: SelfInstruct, chat: ChatModel, max_new_tokens: int) -> None:
    count = options.seeds_shown + options.kept_shown
    longest = sorted(seeds, key=lambda task: -len(task.instruction))[:count]
    tokens = len(chat.tokenizer.encode(instruction_prompt(longest)))
    if tokens + max_new_tokens > chat.max_length:
        raise ValueError(
            f"a prompt of {len(longest)} seed tasks ({tokens} tokens) and max_new_tokens ({max_new_tokens}) are more "
            f"than seq_length ({chat.max_length}): give shorter seeds, fewer new tokens, or a model of more positions"
        )


def _settings(args: argparse.Namespace, seeds: Sequence[Task]) -> dict[str, Any]:
    text = json.dumps([task.record() for task in seeds])
    return {name: getattr(args, name) for name in _SETTINGS} | {"seeds": hashlib.sha256(text.encode()).hexdigest()}


def _read_progress(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        return {"rounds": 0, "kept": [], "dropped": {}}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _progress(found)
        other = [name for name in settings if found["settings"].get(name) != settings[name]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read as the progress of a run ({type(error).__name__}: {error}): delete it to start "
            "anew, or choose another --out"
        ) from error
    if other:
        raise ValueError(f"{file} is of a run with another {other[0]}: delete it, or choose another --out")
    return found


def _progress(stored: dict[str, Any]) -> Progress:
    """ValueError, KeyError, TypeError or AttributeError if that is not what it holds."""
    rounds, dropped = stored["rounds"], dict(stored["dropped"])
    if any(type(count) is not int for count in (rounds, *dropped.values())):
        raise ValueError("rounds and dropped must be whole numbers")
    return Progress(rounds, [from_plain(Task, task) for task in stored["kept"]], dropped)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
