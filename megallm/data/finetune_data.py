"""From an ExamplesConfig to samples: read the records, split some off, write them as the model's template says.

    data, template, tokenizer        records -> conversations, preferences, rankings -> examples of ids and masks

What is left out is counted and said. Every rank reads the same files and makes the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from megallm.config.finetune import ExamplesConfig, SftOptions
from megallm.data.chat_template import ChatTemplate
from megallm.data.conversation import Dropped, Preference, Ranking
from megallm.data.convert import conversations, preferences, rankings
from megallm.data.embedded import Split, embedded_dialogues, embedded_instructions, embedded_preferences
from megallm.data.examples import Group, comparison_groups, conversation_examples
from megallm.data.finetune import PairDataset, SftDataset
from megallm.data.masks import Example
from megallm.data.permutation import hash_ints, permutation
from megallm.data.records import kind_of, read_records
from megallm.data.show import summary_line
from megallm.data.templates import TEMPLATES
from megallm.data.tokenizer import Tokenizer

AS_TEXT = "text"
"""The template's name that means none."""
_SPLIT = 7
"""Which random order a hash is for."""
Records = Sequence[dict[str, Any]]
Dataset = TypeVar("Dataset", SftDataset, PairDataset)


@dataclass(frozen=True, kw_only=True)
class FinetuneData(Generic[Dataset]):
    """Samples, ready to train on."""

    train: Dataset
    valid: Dataset | None
    examples: Sequence[Example]
    """Those of the training samples, to be looked at."""
    template: ChatTemplate | None
    notes: tuple[str, ...]
    """Lines on what was read and what was left out."""


def open_template(name: str | None, tokenizer: Tokenizer, model: Path | None) -> ChatTemplate | None:
    """The template that `--template` means; None for texts as they are. ValueError or FileNotFoundError."""
    if name == AS_TEXT:
        return None
    if name is None:
        own = None if model is None else ChatTemplate.from_directory(model)
        return own if own is not None else ChatTemplate.named("alpaca", tokenizer)
    path = Path(name)
    if path.is_dir():
        found = ChatTemplate.from_directory(path)
        if found is None:
            raise ValueError(f"--template {name}: the directory has no chat template: give a file, or a name")
        return found
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), tokenizer.special_tokens(), name=name)
    if name not in TEMPLATES and ("/" in name or "." in name):
        names = ", ".join((*TEMPLATES, AS_TEXT))
        raise FileNotFoundError(f"--template {name}: no such file; give one, or one of {names}")
    return ChatTemplate.named(name, tokenizer)


def sft_data(
    config: ExamplesConfig,
    options: SftOptions,
    *,
    tokenizer: Tokenizer,
    model: Path | None,
    seq_length: int,
    seed: int,
    multiple: int,
) -> FinetuneData[SftDataset]:
    """The samples of supervised fine-tuning; validation is never packed. `multiple`: row lengths are rounded to it."""
    template = open_template(config.template, tokenizer, model)

    def examples(records: Records) -> tuple[list[Example], Dropped]:
        made, dropped = conversations(records, data_format=config.data_format)
        return conversation_examples(
            made, tokenizer, template, max_length=seq_length, construction=options.construction,
            train_on=options.train_on, overflow=config.overflow, dropped=dropped,
        )  # fmt: skip

    train, valid, notes = _both(config, examples, _embedded_conversations, seed=seed, describe=summary_line)
    padded = _multiple(multiple, seq_length)
    return FinetuneData(
        train=SftDataset(
            train, seq_length=seq_length, seed=seed, pack=options.pack, pad_to_multiple=None if options.pack else padded
        ),
        valid=SftDataset(valid, seq_length=seq_length, pad_to_multiple=padded, shuffle=False) if valid else None,
        examples=train,
        template=template,
        notes=notes,
    )


def comparison_data(
    config: ExamplesConfig,
    *,
    tokenizer: Tokenizer,
    model: Path | None,
    seq_length: int,
    seed: int,
    multiple: int,
    only_pairs: bool,
    outputs: Literal["responses", "ends"] = "responses",
) -> FinetuneData[PairDataset]:
    """The samples of preference training; `only_pairs`: rankings are refused; outputs: see PairDataset."""
    template = open_template(config.template, tokenizer, model)

    def groups(records: Records) -> tuple[list[Group], Dropped]:
        rows, dropped = _compared(records, config.data_format, only_pairs=only_pairs)
        return comparison_groups(
            rows, tokenizer, template, max_length=seq_length, overflow=config.overflow, dropped=dropped
        )

    def describe(found: Sequence[Group], dropped: Dropped) -> str:
        answers = [example for group in found for example in group.examples]
        return f"{len(found):,} comparisons of {summary_line(answers, dropped)}"

    train, valid, notes = _both(config, groups, embedded_preferences, seed=seed, describe=describe)
    padded = _multiple(multiple, seq_length)
    return FinetuneData(
        train=PairDataset(train, seq_length=seq_length, seed=seed, pad_to_multiple=padded, outputs=outputs),
        valid=PairDataset(
            valid, seq_length=seq_length, pad_to_multiple=padded, shuffle=False, outputs=outputs
        ) if valid else None,
        examples=[example for group in train for example in group.examples],
        template=template,
        notes=notes,
    )


def check_conversations(config: ExamplesConfig) -> None:
    """ValueError or FileNotFoundError for data that sft_data refuses with any tokenizer and template."""
    for records in _named_records(config, _embedded_conversations):
        made, dropped = conversations(records, data_format=config.data_format)
        dropped.require(len(made), "conversation")


def check_comparisons(config: ExamplesConfig, *, only_pairs: bool) -> None:
    """ValueError or FileNotFoundError for data that comparison_data refuses with any tokenizer and template."""
    for records in _named_records(config, embedded_preferences):
        made, dropped = _compared(records, config.data_format, only_pairs=only_pairs)
        dropped.require(len(made), "comparison")


def _named_records(
    config: ExamplesConfig, embedded: Callable[[Split], list[dict[str, Any]]]
) -> Iterator[Records]:
    """Those of the files; embedded ones only where they are read in a format that is named, which may not be theirs."""
    if not config.data and config.data_format is not None:
        yield embedded("valid")
    for files in (config.data, config.valid_data):
        if files:
            yield read_records(files)


def _compared(
    records: Records, data_format: str | None, *, only_pairs: bool
) -> tuple[Sequence[Preference | Ranking], Dropped]:
    kind = kind_of(records, data_format) if records else "preference"
    if kind == "ranking" and only_pairs:
        raise ValueError("pairs are needed (chosen and rejected), this is ranking: train a reward model on it")
    return (rankings if kind == "ranking" else preferences)(records, data_format=kind)


Made = TypeVar("Made")


def _both(
    config: ExamplesConfig,
    make: Callable[[Records], tuple[list[Made], Dropped]],
    embedded: Callable[[Split], list[dict[str, Any]]],
    *,
    seed: int,
    describe: Callable[[Sequence[Made], Dropped], str],
) -> tuple[list[Made], list[Made], tuple[str, ...]]:
    """(for training, for validation, notes)."""
    train, valid = _records(config, embedded, seed=seed)
    notes, found = [], []
    for name, records in (("training", train), ("validation", valid)):
        made, dropped = make(records) if records else ([], Dropped())
        if records:
            notes.append(f"{name} data: {describe(made, dropped)}")
        found.append(made)
    return found[0], found[1], tuple(notes)


def _records(
    config: ExamplesConfig, embedded: Callable[[Split], list[dict[str, Any]]], *, seed: int
) -> tuple[Records, Records]:
    if not config.data:
        return embedded("train"), embedded("valid")
    records = read_records(config.data)
    if config.valid_data:
        return records, read_records(config.valid_data)
    held_out = int(len(records) * config.valid_fraction)
    if held_out == 0:
        return records, []
    order = permutation(len(records), hash_ints(seed, _SPLIT))
    kept, rest = sorted(order[:-held_out].tolist()), sorted(order[-held_out:].tolist())
    return [records[i] for i in kept], [records[i] for i in rest]


def _embedded_conversations(split: Literal["train", "valid"]) -> list[dict[str, Any]]:
    return [*embedded_instructions(split), *embedded_dialogues(split)]


def _multiple(wanted: int, seq_length: int) -> int | None:
    """What rows are rounded to; None (all of seq_length) where that does not divide it."""
    return wanted if seq_length % wanted == 0 else None
