"""Chat templates: a conversation to the text that a model sees, by a Jinja program.

A template comes with a model, so it is somebody else's program: it runs in Jinja's sandbox, sees strings, lists and
dicts only, and can reach no attribute of ours. What it may use is what transformers gives it: blocks without their line
ends (trim_blocks, lstrip_blocks), loop controls, `tojson`, `raise_exception`, `strftime_now`, and the block

    {% generation %} ... {% endgeneration %}

around what the model is to write. Its place in the rendered text is found by rendering with two characters around each
block that stand nowhere else, and taking them out again: right also where a macro or a `set` block holds the block.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from megallm.data.conversation import Message
from megallm.data.templates import get_template
from megallm.data.tokenizer import Tokenizer

Span = tuple[int, int]
"""Characters [start, end) of a rendered text."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARKS_VARIABLE = "generation_marks_"
_NONCHARACTERS = range(0xFDD0, 0xFDF0)
"""Code points that stand for no character in any text (Unicode 23.7)."""
_PROBES = ("a question", "the answer", "one more")


class TemplateRefusal(ValueError):
    """What a template said with raise_exception: it cannot render this conversation."""


class ChatTemplate:
    """A chat template with the special tokens of a tokenizer."""

    def __init__(
        self,
        text: str,
        special_tokens: Mapping[str, str],
        *,
        name: str = "the chat template",
        now: datetime.datetime | None = None,
    ) -> None:
        """Compile `text`. `special_tokens`: by their names, as `Tokenizer.special_tokens` gives them. `now`: what
        strftime_now tells; None = the clock, with which a template that writes the date makes other tokens tomorrow.
        ValueError for a text that is no template, or that ends turns with an end mark the tokenizer lacks."""
        self.text = text
        self.name = name
        self.special_tokens = dict(special_tokens)
        environment = _environment(now)
        try:
            self._template = environment.from_string(text)
            tree = environment.parse(text)
            used = jinja2.meta.find_undeclared_variables(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(f"{name} is not a chat template{line}: {error}") from error
        if "eos_token" in used and "eos_token" not in self.special_tokens:
            raise ValueError(
                f"{name} ends turns with eos_token, and the tokenizer has no end mark: use a tokenizer that has one, "
                "or another template"
            )
        self.uses_date = any(name.name == "strftime_now" for name in tree.find_all(jinja2.nodes.Name))
        """Whether the text depends on the date."""
        self._has_prompt_flag = "add_generation_prompt" in used
        calls = tree.find_all(jinja2.nodes.Call)
        self.has_generation_marks = any(isinstance(call.node, jinja2.nodes.ExtensionAttribute) for call in calls)
        """Whether it says with {% generation %} what is the model's."""

    @classmethod
    def named(cls, name: str, tokenizer: Tokenizer) -> ChatTemplate:
        """One of `templates.TEMPLATES`."""
        return cls(get_template(name), tokenizer.special_tokens(), name=f"the template {name}")

    @classmethod
    def from_directory(
        cls, path: str | os.PathLike[str], *, now: datetime.datetime | None = None
    ) -> ChatTemplate | None:
        """The template of a Hugging Face directory: chat_template.jinja, else `chat_template` of tokenizer_config.json
        (of several the one called default), with the special tokens of that file. None if there is none."""
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), special_tokens, name=str(file), now=now)
        found = config.get("chat_template")
        where = f"chat_template of {folder / 'tokenizer_config.json'}"
        if isinstance(found, list):
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            if "default" not in named:
                raise ValueError(f"{where} holds the templates {sorted(map(str, named))}, none called default")
            found = named["default"]
        if found is None:
            return None
        if not isinstance(found, str):
            raise ValueError(f"{where} must be a text")
        return cls(found, special_tokens, name=where, now=now)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of a conversation. `add_generation_prompt`: with what precedes an answer. `variables`: what else
        the template knows, e.g. enable_thinking. TemplateRefusal if it says no, ValueError if it fails."""
        plain = [{"role": message.role, "content": message.content} for message in messages]
        given = {**self.special_tokens, "tools": None, "documents": None, **variables}
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **given)
        except _Refused as error:
            raise TemplateRefusal(f"{self.name} refuses: {error}") from None
        except Exception as error:  # it is a program: anything can come out of it
            raise ValueError(f"{self.name} fails: {type(error).__name__}: {error}") from error

    def render_with_spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and the characters of its {% generation %} blocks, in order."""
        variables = {**variables, "add_generation_prompt": add_generation_prompt}
        text = self.render(messages, **variables)
        opening, closing = _unused_pair(text)
        marked = self.render(messages, **{**variables, _MARKS_VARIABLE: (opening, closing)})
        spans: list[Span] = []
        start = length = 0
        pieces = re.split(f"([{opening}{closing}])", marked)
        for piece in pieces:
            if piece == opening:
                start = length
            elif piece == closing:
                spans.append((start, length))
            else:
                length += len(piece)
        if "".join(pieces[::2]) != text:
            raise ValueError(f"{self.name} changes the text of a generation block after it: the block cannot be found")
        return text, spans

    @cached_property
    def answer_tail(self) -> tuple[str, str]:
        """What follows the last answer of a conversation: what ends the turn, and the rest, which is not the model's.
        ("<|im_end|>", "\\n") of chatml; ("", "") if nothing ends a turn."""
        question, answer = Message("user", _PROBES[0]), Message("assistant", _PROBES[1])
        try:
            text = self.render([question, answer])
            longer = self.render([question, answer, Message("user", _PROBES[2]), answer])
        except TemplateRefusal:  # of these conversations: others may do
            return "", ""
        if _PROBES[1] not in text or not all(probe in longer for probe in _PROBES):
            raise ValueError(f"{self.name} does not show the messages of a conversation of two turns")
        tail = text[text.rindex(_PROBES[1]) + len(_PROBES[1]) :]
        between = longer[longer.index(_PROBES[1]) + len(_PROBES[1]) : longer.index(_PROBES[2])]
        end = _turn_end(tail, between, before=text[: text.index(_PROBES[0])], has_prompt_flag=self._has_prompt_flag)
        return end, tail[len(end) :] if end else ""

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids that end an answer, one after the other: generation stops behind them. Empty if nothing does."""
        return tokenizer.encode(self.answer_tail[0].strip(), add_special_tokens=False)


class _Refused(jinja2.TemplateError):
    """raise_exception was called."""


class _Generation(jinja2.ext.Extension):
    """{% generation %}: nothing but its body, between two marks where `_MARKS_VARIABLE` gives them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: jinja2.runtime.Context, caller: jinja2.runtime.Macro) -> str:
        opening, closing = context.get(_MARKS_VARIABLE) or ("", "")
        return f"{opening}{caller()}{closing}"


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` of templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja, so that `self` may be a name
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


class _Dict:
    """`dict` of templates: the call, and nothing that leads to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _environment(now: datetime.datetime | None) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise _Refused(str(message))

    def strftime_now(format: str) -> str:
        return (now or datetime.datetime.now()).strftime(format)

    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, namespace=_Namespace, dict=_Dict()
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace({name}=...): names of a namespace begin with a letter")


def _turn_end(tail: str, between: str, *, before: str, has_prompt_flag: bool) -> str:
    """What ends an answer, from what follows the `tail` of the last one, what stands `between` one and the next
    question, and what stands `before` the first question."""
    if between.startswith(tail.rstrip()):
        return tail.rstrip()
    if has_prompt_flag:  # the last answer ends otherwise, or the conversation has an end of its own behind it (Phi-3)
        found = re.match(r"\s*\S[^\n]*", tail)
        return found[0].rstrip() if found else ""
    # A generation prompt is always there (Llama 3's first template): what is left of `between` without the heading of a
    # question, to the end of the mark that it stops in.
    heading = len(_common_prefix(between[::-1], before[::-1]))
    end = _common_prefix(between[: len(between) - heading], tail)
    if end.rfind("<") > end.rfind(">"):
        end = tail[: tail.find(">", len(end)) + 1]
    return end.rstrip()


def _common_prefix(first: str, second: str) -> str:
    shorter = min(len(first), len(second))
    return first[: next((at for at in range(shorter) if first[at] != second[at]), shorter)]


def _unused_pair(text: str) -> tuple[str, str]:
    """Two characters that are not in the text."""
    free = [chr(code) for code in _NONCHARACTERS if chr(code) not in text]
    if len(free) < 2:
        raise ValueError("a conversation holds all of Unicode's noncharacters U+FDD0 to U+FDEF: leave it out")
    return free[0], free[1]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Those that are set, by name: a text, or an object with the text as `content`."""
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
