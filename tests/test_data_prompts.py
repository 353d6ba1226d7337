"""Prompts: those of records of any format, endless, each once an epoch; and the arithmetic that can be checked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megallm.data.arithmetic import CHARACTERS, arithmetic_examples, arithmetic_prompts
from megallm.data.chat_model import ChatModel
from megallm.data.chat_template import ChatTemplate
from megallm.data.convert import conversations
from megallm.data.prompts import PromptDataset, read_prompts
from megallm.data.templates import MARKS
from megallm.data.tokenizer import byte_tokenizer, char_tokenizer

PLAIN = ChatModel(tokenizer=byte_tokenizer(), template=None, max_length=512)
MARKED = byte_tokenizer().with_control_tokens(MARKS["chatml"])
CHAT = ChatModel(tokenizer=MARKED, template=ChatTemplate.named("chatml", MARKED), max_length=512)
USER, OTHER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def dataset(*texts: str, **kwargs: Any) -> PromptDataset:
    records = [{"prompt": text, "number": number} for number, text in enumerate(texts)]
    return PromptDataset(records, kwargs.pop("chat", PLAIN), **{"max_prompt_tokens": 20, "seed": 3, **kwargs})


def test_an_epoch_has_every_prompt_once_and_epochs_differ() -> None:
    prompts = dataset(*"abcdefghijk")
    assert prompts.num_prompts == 11
    epochs = ["".join(prompts.prompt(11 * epoch + at).text for at in range(11)) for epoch in range(4)]
    assert {"".join(sorted(each)) for each in epochs} == {"abcdefghijk"} and len(set(epochs)) == 4
    assert [dataset(*"abcdefghijk").prompt(at).text for at in range(11)] == list(epochs[0])
    assert "".join(dataset(*"abcdefghijk", seed=4).prompt(at).text for at in range(11)) != epochs[0]
    assert "".join(dataset(*"abc", shuffle=False).prompt(at).text for at in range(5)) == "abcab"


def test_a_prompt_keeps_ids_text_and_columns() -> None:
    prompt = dataset("7+8=").prompt(0)
    assert PLAIN.tokenizer.decode(prompt.ids) == prompt.text == "7+8="
    assert prompt.record == {"prompt": "7+8=", "number": 0}
    prompt = dataset("7+8=", chat=CHAT, max_prompt_tokens=99).prompt(0)
    text = MARKED.decode(prompt.ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\n7+8=<|im_end|>\n<|im_start|>assistant\n") and prompt.text == "7+8="


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi"},
        {"prompt": [USER]},
        {"messages": [USER, OTHER]},
        {"instruction": "hi", "output": "yes"},
        {"chosen": [USER, OTHER], "rejected": [USER, {"role": "assistant", "content": "no"}]},
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "completion": "yes"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    ],
)
def test_records_of_every_format_have_a_prompt(record: dict[str, Any]) -> None:
    prompts = PromptDataset([record], CHAT, max_prompt_tokens=99)
    alone = PromptDataset([{"prompt": "hi"}], CHAT, max_prompt_tokens=99)
    assert prompts.prompt(0).ids == alone.prompt(0).ids and prompts.prompt(5).record == record


def test_long_and_empty_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc", "x" * 21, " ", "de", "y" * 30)))
    prompts = PromptDataset(read_prompts([file]), PLAIN, max_prompt_tokens=20)
    assert prompts.num_prompts == 2 and prompts.longest == 3
    too_long = "longer than max_prompt_tokens (20), what seq_length leaves beside answers"
    assert prompts.dropped.counts == {too_long: 2, "empty prompt": 1}
    assert f"first: {file}:2: 21 tokens" in prompts.summary() and "2 prompts of 2 to 3 tokens" in prompts.summary()
    with pytest.raises(ValueError, match="no prompt left to use: 1 row left out: 1 longer than max_prompt_tokens"):
        dataset("abc", max_prompt_tokens=2)


def test_without_files_prompts_are_the_embedded_ones() -> None:
    assert read_prompts(None, embedded="arithmetic") == arithmetic_prompts("train")
    assert read_prompts([], embedded="arithmetic") == arithmetic_prompts("train")
    assert read_prompts(split="valid")[0].keys() == {"prompt"}
    with pytest.raises(ValueError, match="'sums' are not known: use one of instructions"):
        read_prompts(None, embedded="sums")


def test_problems_are_right_different_and_held_out() -> None:
    train, valid = arithmetic_prompts("train", operators="+-*"), arithmetic_prompts("valid", operators="+-*")
    assert (len(train), len(valid)) == (270, 30)
    assert len({each["prompt"] for each in [*train, *valid]}) == 300
    for each in [*train, *valid]:
        left, sign, right, end = each["prompt"][0], each["prompt"][1], each["prompt"][2:-1], each["prompt"][-1]
        found = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        assert each["answer"] == str(found) and end == "="
    large = arithmetic_prompts("train", digits=4, num_prompts=50)
    assert len({each["prompt"] for each in large}) == 50 and large == arithmetic_prompts(digits=4, num_prompts=50)
    assert large != arithmetic_prompts(digits=4, num_prompts=50, seed=1)
    assert arithmetic_prompts(num_prompts=40) == arithmetic_prompts()[:40]


def test_a_stated_share_of_the_examples_is_wrong() -> None:
    answers = {each["prompt"]: each["answer"] for each in arithmetic_prompts()}
    examples = arithmetic_examples()
    wrong = [each for each in examples if answers[each["prompt"]] != each["completion"]]
    assert len(examples) == 20 * len(answers) and len(wrong) == round(0.85 * len(examples))
    assert set(Counter(each["prompt"] for each in examples).values()) == {20}
    for prompt, answer in answers.items():
        given = Counter(each["completion"] for each in examples if each["prompt"] == prompt)
        assert given[answer] == 3 < min(count for other, count in given.items() if other != answer)
    off = Counter(int(each["completion"]) - int(answers[each["prompt"]]) for each in wrong)
    assert set(off) == {1, 2, 3, 4} and min(off.values()) > len(examples) - len(wrong)
    for share, rows in ((0.0, 0), (1.0, 333)):
        some = arithmetic_examples(wrong=share, num_examples=333)
        assert sum(answers[each["prompt"]] != each["completion"] for each in some) == rows
    tokenizer = char_tokenizer([CHARACTERS], end_mark=True)
    assert not conversations(examples)[1].total
    assert all(tokenizer.encode(each["prompt"] + each["completion"]) for each in examples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digits": 0}, "digits"),
        ({"operators": "+/"}, "operators"),
        ({"operators": "++"}, "each once"),
        ({"num_prompts": 91}, "there are 90 train problems"),
        ({"split": "test"}, "use train or valid"),
        ({"digits": 4}, "there are 90,000,000 train problems of 4 digits: say with num_prompts"),
    ],
)
def test_problems_that_do_not_exist_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic_prompts(**arguments)
    if "num_prompts" not in arguments:
        with pytest.raises(ValueError, match=message):
            arithmetic_examples(**arguments)
