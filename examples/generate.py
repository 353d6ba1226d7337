"""Continues prompts with a trained model, on any layout of ranks.

    python examples/generate.py --model runs/pretrain_gpt --prompt "def main(" --max-new-tokens 40
    torchrun --standalone --nproc-per-node 4 examples/generate.py --tp 2 --pp 2 --model DIR --prompts F.jsonl
"""

import argparse

from megallm.cli import generate
from megallm.runtime.launch import run_main, usage_errors


def main() -> int:
    """The command `megallm generate` under another name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generate.add_arguments(parser)
    args = parser.parse_args()
    with usage_errors():
        work = generate.run(args)
    return work()


if __name__ == "__main__":
    run_main(main)
