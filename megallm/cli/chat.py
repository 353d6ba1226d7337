"""`megallm chat --model DIR`: a conversation in the terminal, on any tp x pp.

Rank 0 reads lines and prints; the others hear of each line from it, and at least once a minute that there is none yet:
a collective that nobody joins for long would end the job. Ctrl-C stops the answer (under torchrun it ends torchrun).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from megallm.cli.inference import add_model_arguments, add_sampling_arguments, check_positive, open_job, sampling_of
from megallm.cli.judge import open_chat
from megallm.data.chat_model import ChatModel
from megallm.data.conversation import Message, Unusable
from megallm.data.permutation import hash_ints
from megallm.generate.sampling import Sampling
from megallm.generate.text import TextStream
from megallm.parallel.collectives import broadcast_, broadcast_text
from megallm.runtime.environment import launch_info
from megallm.trainers.engine import Engine

_HELP = "/reset begins anew, /system TEXT with other instructions, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
_WAIT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how it answers, and its instructions."""
    add_model_arguments(parser)
    parser.add_argument("--template", help="chat template; default: the model's own, else alpaca")
    parser.add_argument("--seq-length", type=int, help="longest conversation; default: the positions of the model")
    parser.add_argument("--system", metavar="TEXT", help="instructions that the conversation begins with")
    add_sampling_arguments(parser, max_new_tokens=256, temperature=0.7)


def run(args: argparse.Namespace) -> Callable[[], int]:
    """Checks everything, then returns what converses."""
    world_size = launch_info().world_size
    if world_size != args.tp * args.pp:
        raise ValueError(
            f"a chat is one conversation: {world_size} ranks are not tp x pp = {args.tp * args.pp}: start as many"
        )
    check_positive(args, "max_new_tokens")
    job = open_job(args)
    chat = open_chat(args, job, args.template)
    if args.system is not None:
        try:
            chat.tokenizer.encode(args.system)
        except ValueError as error:
            raise ValueError(f"--system: {error}") from error
    ends = chat.template is not None and len(chat.template.stop_ids(chat.tokenizer)) == 1
    stops = (*args.stop, *([chat.turn_end] if chat.turn_end and not ends else []))
    sampling = replace(sampling_of(args), stop_ids=chat.stop_ids, stop_strings=stops)

    def work() -> int:
        engine = job.start()
        lines = _Lines(engine)
        lines.say(f"{_HELP}\n" if lines.is_terminal else "")
        Conversation(engine, chat, sampling, args.max_new_tokens, args.system).run(lines)
        return 0

    return work


class Conversation:
    """What was said so far, and the model that answers. All ranks do the same."""

    def __init__(
        self, engine: Engine, chat: ChatModel, sampling: Sampling, max_new_tokens: int, system: str | None
    ) -> None:
        self._engine, self._chat, self._sampling, self._max_new_tokens = engine, chat, sampling, max_new_tokens
        self._turns = 0
        self._reset(system)

    def run(self, lines: _Lines) -> None:
        """Until the lines end."""
        while (line := lines.next()) is not None:
            word, _, rest = line.strip().partition(" ")
            if word in ("/exit", "/quit"):
                return
            if word == "/reset":
                self._reset(self._system)
            elif word == "/system":
                self._instruct(rest.strip(), lines)
            elif word.startswith("/"):
                lines.say(f"{_HELP}\n")
            elif word:
                self._answer(line.strip(), lines)

    def _instruct(self, system: str, lines: _Lines) -> None:
        try:
            self._chat.tokenizer.encode(system)
        except ValueError as error:
            lines.say(f"line {lines.number} is left out: {error}\n")
            return
        self._reset(system or None)

    def _reset(self, system: str | None) -> None:
        self._system = system
        self._messages = (Message("system", system),) if system else ()

    def _answer(self, question: str, lines: _Lines) -> None:
        messages = (*self._messages, Message("user", question))
        try:
            prompt = self._chat.prompt(messages, new_tokens=self._max_new_tokens)
        except Unusable as reason:
            lines.say(f"{reason}: /reset begins anew, a lower --max-new-tokens leaves more room\n")
            return
        except ValueError as error:  # of a text that has no ids
            lines.say(f"line {lines.number} is left out: {error}\n")
            return
        self._turns += 1
        sampling = replace(self._sampling, seed=hash_ints(self._sampling.seed, self._turns))
        tokenizer, ids = self._chat.tokenizer, list[int]()
        text = TextStream(tokenizer, sampling.stop_strings)
        tokens = self._engine.stream(
            prompt, max_new_tokens=self._max_new_tokens, sampling=sampling, tokenizer=tokenizer
        )
        with contextlib.closing(tokens), lines.interruptible() as is_stopped:
            for token in tokens:
                ids.append(token.token_id)
                lines.say(text.push(token.token_id))
                if token.finish_reason is None and is_stopped():
                    break
        lines.say("\n")
        if answer := self._chat.answer(ids):
            self._messages = (*messages, Message("assistant", answer))


class _Lines:
    """The user's lines on every rank, and what is said to them, by rank 0."""

    def __init__(self, engine: Engine) -> None:
        self._world, self._device = engine.mesh.world, engine.mesh.device
        self._is_first = self._world.rank == 0
        self.is_terminal = self._is_first and sys.stdin.isatty()
        self.number = 0
        """Of the line that came last, from 1."""
        self._read: queue.Queue[str] | None = None
        if self._is_first and isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a wrong byte is a fault of its line, not of the program
        if self._is_first and self._world.size > 1:
            self._read = queue.Queue()
            threading.Thread(target=self._read_on, args=(self._read,), daemon=True).start()

    def say(self, text: str) -> None:
        """Prints at once, without a line end."""
        if self._is_first and text:
            print(text, end="", flush=True)

    def next(self) -> str | None:
        """The next line, None behind the last one. A collective."""
        self.say("> " if self.is_terminal else "")
        while True:
            line = self._own_line() if self._is_first else None
            found: str | None = json.loads(broadcast_text(json.dumps(line), self._world, self._device, src=0))
            if found is not None:
                self.number += 1
                return found or None

    def _own_line(self) -> str | None:
        """The next line, empty behind the last one; None if there is none for a while."""
        if self._read is None:
            return sys.stdin.readline()
        with contextlib.suppress(queue.Empty):
            return self._read.get(timeout=_WAIT_S)
        return None

    @staticmethod
    def _read_on(into: queue.Queue[str]) -> None:
        while line := sys.stdin.readline():
            into.put(line)
        into.put("")

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[Callable[[], bool]]:
        """Inside, Ctrl-C ends nothing: what is given tells on all ranks whether it was pressed (a collective)."""
        pressed = torch.zeros(1, dtype=torch.int64, device=self._device)

        def note(*_: object) -> None:
            pressed.fill_(1)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield lambda: bool(broadcast_(pressed, self._world, src=0))
        finally:
            signal.signal(signal.SIGINT, before)
