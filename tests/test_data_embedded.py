"""The embedded records: many, of the formats they say, held out by module, and fit to be trained on."""

from __future__ import annotations

from collections import Counter

import pytest

from megallm.data.chat_template import ChatTemplate
from megallm.data.convert import conversations, preferences, prompts
from megallm.data.embedded import EMBEDDED, Split, _read_library
from megallm.data.examples import comparison_groups, conversation_examples
from megallm.data.records import detect_format
from megallm.data.show import mask_text
from megallm.data.templates import MARKS
from megallm.data.tokenizer import byte_tokenizer

FORMATS = {"instructions": "alpaca", "dialogues": "messages", "preferences": "preference"}
AT_LEAST = {"instructions": 2000, "dialogues": 100, "preferences": 2000, "prompts": 2000, "arithmetic": 90}


@pytest.mark.parametrize("kind", EMBEDDED)
def test_records_are_many_and_of_their_format(kind: str) -> None:
    train, valid = (EMBEDDED[kind](split) for split in ("train", "valid"))
    assert len(train) >= AT_LEAST[kind] and len(train) > 5 * len(valid) > 0
    if kind in FORMATS:
        assert {detect_format(record) for record in [*train, *valid]} == {FORMATS[kind]}
    assert EMBEDDED[kind]("train") == train
    assert len({repr(record) for record in [*train, *valid]}) == len(train) + len(valid)


def test_modules_are_held_out_as_a_whole() -> None:
    functions, _ = _read_library()
    sides: dict[str, set[str]] = {"train": set(), "valid": set()}
    splits: tuple[Split, Split] = ("train", "valid")
    for split in splits:
        kept = {record["input"] + record["output"] for record in EMBEDDED["instructions"](split)}
        sides[split] = {each.module for each in functions if each.signature + each.summary in kept}
    assert not sides["train"] & sides["valid"] and len(sides["train"] | sides["valid"]) > 100


def test_every_record_can_be_used() -> None:
    for kind in ("instructions", "dialogues"):
        made, dropped = conversations(EMBEDDED[kind]("train"))
        assert not dropped.total and len(made) == len(EMBEDDED[kind]("train"))
    assert not preferences(EMBEDDED["preferences"]("train"))[1].total
    assert not prompts([*EMBEDDED["prompts"]("train"), *EMBEDDED["arithmetic"]("train")])[1].total


def test_dialogues_have_several_turns() -> None:
    made, _ = conversations(EMBEDDED["dialogues"]("train"))
    answers = Counter(sum(message.role == "assistant" for message in each.messages) for each in made)
    assert min(answers) == 2 and sum(answers[count] for count in answers if count >= 4) > 40
    assert all(message.content.startswith(">>> ") for each in made for message in each.messages[1::2])


def test_rejected_texts_are_the_words_of_the_chosen_ones_in_another_order() -> None:
    for record in EMBEDDED["preferences"]("train"):
        right, wrong = record["chosen"].split(" "), record["rejected"].split(" ")
        assert right != wrong and sorted(right) == sorted(wrong) and right[0] == wrong[0] and right[-1] == wrong[-1]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split 'test' is not known: use train or valid"):
        EMBEDDED["prompts"]("test")  # type: ignore[arg-type]


def test_examples_of_the_records_train_the_answers() -> None:
    tokenizer = byte_tokenizer().with_control_tokens(MARKS["chatml"])
    template = ChatTemplate.named("chatml", tokenizer)
    rows, _ = conversations(EMBEDDED["dialogues"]("valid"))
    examples, _ = conversation_examples(rows, tokenizer, template, max_length=4096)
    text = mask_text(examples[0], tokenizer)
    assert text.count(">>>" + rows[0].messages[2].content + "<|im_end|><<<") >= 1
    groups, _ = comparison_groups(preferences(EMBEDDED["preferences"]("valid"))[0], tokenizer, template, max_length=512)
    assert len(groups) == len(EMBEDDED["preferences"]("valid"))
