"""`megallm generate --model DIR --prompt TEXT`: continues prompts, under any tp x pp (dp ranks share the prompts)."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megallm.cli.evaluate import tokenise
from megallm.cli.inference import add_model_arguments, check_out, open_job, read_jsonl, write_jsonl
from megallm.data.tokenizer import Tokenizer
from megallm.generate.decode import check_prompts
from megallm.generate.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompts, length, sampling and where the results go."""
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one text to continue")
    prompts.add_argument("--prompts", metavar="F.jsonl", help="one object a line with `prompt`: a text or token ids")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="divides the logits; 0 = greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the end-of-text token")
    parser.add_argument("--out", metavar="OUT.jsonl", help="write prompt, text and token_ids (the new ones)")


def run(args: argparse.Namespace) -> Callable[[], int]:
    """Checks everything, then returns what decodes and prints."""
    check_out(args.out, args.prompts)
    job = open_job(args)
    config = job.source.config
    prompts = read_jsonl(args.prompts, "prompt") if args.prompts else [args.prompt]
    ids = tokenise(prompts, args.tokenizer, job.source.tokenizer(), where=args.prompts or "--prompt")
    tokenizer = Tokenizer.from_path(args.tokenizer) if args.tokenizer else job.source.tokenizer()
    check_prompts(config, ids, args.max_new_tokens)
    stop = () if args.ignore_eos or config.eos_token_id is None else (config.eos_token_id,)
    sampling = Sampling(temperature=args.temperature, seed=args.seed, stop_ids=stop)

    def work() -> int:
        engine = job.start()
        new = engine.generate(ids, max_new_tokens=args.max_new_tokens, sampling=sampling)
        texts = ["" if tokenizer is None else tokenizer.decode(n) for n in new]
        rows = [
            {"prompt": prompt, "text": text, "token_ids": token_ids}
            for prompt, text, token_ids in zip(prompts, texts, new, strict=True)
        ]
        if engine.mesh.world.rank == 0:
            if args.out:
                write_jsonl(args.out, rows)
            for row in rows if not args.out else []:
                print(f"{row['prompt']}{row['text'] if tokenizer is not None else row['token_ids']}")
        return 0

    return work
