"""`megallm generate --model DIR --prompt TEXT`: continues prompts, under any tp x pp (dp ranks share the prompts)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megallm.cli.evaluate import tokenise
from megallm.cli.inference import (
    add_model_arguments,
    add_sampling_arguments,
    check_out,
    open_job,
    read_jsonl,
    sampling_of,
    write_jsonl,
)
from megallm.data.tokenizer import Tokenizer
from megallm.generate.rollout import Limits, Rollout, check_request
from megallm.generate.text import cut_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompts, length, sampling and where the results go."""
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one text to continue")
    prompts.add_argument("--prompts", metavar="F.jsonl", help="one object a line with `prompt`: a text or token ids")
    add_sampling_arguments(parser, max_new_tokens=64, temperature=0.0)
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the end-of-text token")
    parser.add_argument("--num-samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--max-batch", type=int, default=32, help="sequences decoded together, on each replica")
    parser.add_argument("--kv-cache-tokens", type=int, help="tokens whose keys and values are kept; default: enough")
    parser.add_argument("--logprobs", action="store_true", help="write the log-probability of each new token as well")
    parser.add_argument("--out", metavar="OUT.jsonl", help="write prompt, text, token_ids (new ones), finish_reason")


def run(args: argparse.Namespace) -> Callable[[], int]:
    """Checks everything, then returns what decodes and prints."""
    check_out(args.out, args.prompts)
    job = open_job(args)
    config = job.source.config
    prompts = read_jsonl(args.prompts, "prompt") if args.prompts else [args.prompt]
    ids = tokenise(prompts, args.tokenizer, job.source.tokenizer(), where=args.prompts or "--prompt")
    tokenizer = Tokenizer.from_path(args.tokenizer) if args.tokenizer else job.source.tokenizer()
    stop = () if args.ignore_eos or config.eos_token_id is None else (config.eos_token_id,)
    sampling = replace(sampling_of(args), stop_ids=stop)
    limits = Limits(max_batch=args.max_batch, kv_cache_tokens=args.kv_cache_tokens)
    request: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens, "sampling": sampling, "num_samples": args.num_samples, "limits": limits,
        "tokenizer": tokenizer,
    }  # fmt: skip
    check_request(config, ids, **request)

    def work() -> int:
        engine = job.start()
        found = engine.rollout(ids, **request)
        if engine.mesh.world.rank == 0:
            rows = _rows(prompts, found, tokenizer, sampling.stop_strings, with_logprobs=args.logprobs)
            if args.out:
                write_jsonl(args.out, rows)
            for row in rows if not args.out else []:
                print(f"{row['prompt']}{row['text'] if tokenizer is not None else row['token_ids']}")
        return 0

    return work


def _rows(
    prompts: Sequence[Any], found: Rollout, tokenizer: Tokenizer | None, stops: Sequence[str], *, with_logprobs: bool
) -> list[dict[str, Any]]:
    rows = []
    for at, (ids, logprobs, reason) in enumerate(
        zip(found.token_ids, found.logprobs, found.finish_reasons, strict=True)
    ):
        text = "" if tokenizer is None else cut_text(tokenizer, ids, stops)
        row = {"prompt": prompts[at // found.num_samples], "text": text, "token_ids": ids, "finish_reason": reason}
        if found.num_samples > 1:
            row["sample"] = at % found.num_samples
        rows.append(row | ({"logprobs": logprobs} if with_logprobs else {}))
    return rows
