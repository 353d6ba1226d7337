"""`megallm COMMAND ...`: one module a command, imported when it is used.

`python -m megallm.cli` is the same, so that torchrun can start a command on several ranks.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from megallm.runtime.launch import run_main, usage_errors

COMMANDS = {
    "prepare": "tokenise text files once, to train on them many times",
    "export": "write a checkpoint as a Hugging Face directory",
    "eval": "mean negative log-likelihood of documents under a model",
    "score": "what a reward model thinks of responses",
    "judge": "preferences and revisions by a model with a written constitution",
    "self-instruct": "new instructions with answers, from a few seed tasks",
    "generate": "continue prompts with a model",
    "chat": "talk with a model in the terminal",
    "schedule": "show a pipeline schedule as text or picture, with its bubble",
    "memory": "what ZeRO and offload leave on a device, and how large a model may get",
    "presets": "list the model shapes that --model knows by name",
    "doctor": "show this machine, and which back end each fused operation runs on",
}
_MODULES = {"eval": "evaluate", "self-instruct": "self_instruct"}


def main() -> None:
    """Runs the command that the arguments name; never returns."""
    run_main(lambda: run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """The exit code of `megallm *argv`. argparse ends the process with code 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="megallm",
        description="Train large language models on any 3D layout of ranks.",
        epilog="commands:\n" + "\n".join(f"  {name:13} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    chosen = parser.parse_args(argv[:1])
    module = importlib.import_module(f"megallm.cli.{_MODULES.get(chosen.command, chosen.command)}")
    own = argparse.ArgumentParser(prog=f"megallm {chosen.command}", description=COMMANDS[chosen.command])
    module.add_arguments(own)
    with usage_errors():
        work = module.run(own.parse_args(argv[1:]))
    return work if isinstance(work, int) else work()
