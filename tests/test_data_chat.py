"""Records, conversations and chat templates: what is read, what is refused, and transformers' own rendering."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from megallm.data.chat_template import ChatTemplate, TemplateRefusal
from megallm.data.conversation import Conversation, Dropped, Message, Preference, Ranking
from megallm.data.convert import conversations, preferences, prompts, rankings
from megallm.data.records import Record, detect_format, kind_of, read_json_lines, read_records
from megallm.data.templates import MARKS, TEMPLATES
from megallm.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", " Hi, \u4f60\n"), Message("assistant", "Hello! ")
TURNS = (USER, ANSWER, Message("user", "And?"), Message("assistant", "No\n  more."))
CONVERSATIONS = [TURNS[:2], TURNS, (SYSTEM, *TURNS), TURNS[:1], (SYSTEM, *TURNS[:3])]
ALPACA = {"instruction": "Add.", "output": "3"}


def dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def oracle(**kwargs: Any) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of bytes, whose template is given."""
    inner = RawTokenizer.from_str(byte_tokenizer().with_control_tokens(["<s>", "</s>"])._inner.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**SPECIAL, **kwargs})


def write(file: Path, *lines: object) -> Path:
    file.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return file


# Records.


def test_records_of_several_files_come_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"text": "1"}, "\n", {"text": "2"})
    second = write(tmp_path / "b.json", [{"text": "3"}])
    assert read_records([first, str(second)]) == [{"text": "1"}, {"text": "2"}, {"text": "3"}]
    assert read_records(first) == [{"text": "1"}, {"text": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON \(Expecting value, column \d+\)"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: a JSON object is needed, this is a list"),
        ("a.json", '{"text": "x"}', r"must hold a list of objects, this is an object: name a file with .*\.jsonl"),
        ("a.json", '[{"text": "x"},\n]', r"a\.json:\d: not JSON .*; a file with an object a line is named \.jsonl"),
        ("a.json", '[{"text": "x"}, 3]', r"a\.json:item 2: a JSON object is needed, this is a number"),
        ("a.jsonl", "\n\n", "holds no records"),
        ("a.csv", "x", r"are read from \.jsonl .* or \.json"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path / name, content))


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """Others stand in strings of JSON as they are."""
    rows = [{"text": "a\u2028b\u2029c\x85d"}, {"text": "e"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    found = read_json_lines(tmp_path / "a.jsonl")
    assert found == rows and found[1].where.endswith("a.jsonl:2")


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not UTF-8"):
        read_records(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_records(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="at least one"):
        read_records([])


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (ALPACA | {"input": ""}, "alpaca"),
        (ALPACA | {"text": "rendered"}, "alpaca"),
        ({"conversations": []}, "sharegpt"),
        ({"messages": [], "id": 3}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": [], "rejected": []}, "preference"),
        ({"prompt": "a", "responses": []}, "ranking"),
        ({"text": "a"}, "text"),
    ],
)
def test_formats_are_told_by_their_keys(record: dict[str, Any], name: str) -> None:
    assert detect_format(record) == name


def test_keys_that_fit_none_or_two_formats_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}, {"messages": [], "chosen": "", "rejected": ""})
    neither, both = read_records(file)
    with pytest.raises(ValueError, match=r":1: the keys \['answer', 'question'\] fit no format; expected alpaca"):
        detect_format(neither)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .* fit messages and preference: choose one with --data-format"):
        detect_format(both)
    with pytest.raises(ValueError, match=r"--data-format alpaca needs the keys instruction and output; instr"):
        conversations([both], data_format="alpaca")
    with pytest.raises(ValueError, match=r"--data-format 'openai' is not known: use one of alpaca, sharegpt"):
        conversations([both], data_format="openai")


# Conversations.


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (ALPACA, [("user", "Add."), ("assistant", "3")]),
        (ALPACA | {"input": "1 2"}, [("user", "Add.\n\n### Input:\n1 2"), ("assistant", "3")]),
        (
            ALPACA | {"system": "S", "history": [["a", "b"]]},
            [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "Add."), ("assistant", "3")],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"},
            [("system", "S"), ("user", "a"), ("assistant", "b")],
        ),
        ({"messages": dicts(TURNS), "tools": None}, [(m.role, m.content) for m in TURNS]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, dicts(TURNS)[1]]},
            [("user", "a"), ("assistant", "Hello! ")],
        ),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": dicts(TURNS[:3]), "completion": dicts(TURNS[3:])}, [(m.role, m.content) for m in TURNS]),
        ({"text": "a"}, [("assistant", "a")]),
    ],
)
def test_conversations_of_every_format(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    made, dropped = conversations([record])
    assert made == [Conversation(tuple(Message(*each) for each in expected))] and dropped.total == 0


def turns(*roles: str, content: Any = "x") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ALPACA | {"output": "  "}, "empty response"),
        ({"prompt": "", "completion": "b"}, "empty prompt"),
        ({"text": "\n"}, "empty text"),
        ({"text": "a \ud800"}, "half of a surrogate pair in the text"),
        (turns("assistant", "user", "assistant"), "the first message is not the user's"),
        (turns("user", "assistant", "user"), "the last message is not the assistant's"),
        (turns("user", "user", "assistant"), "two messages of one role"),
        (turns("user"), "no assistant message"),
        (turns("user", "narrator"), "role 'narrator'"),
        (turns("user", "assistant", "system", "user", "assistant"), "a system message that is not the first"),
        (turns("user", "assistant", content=[{"type": "image_url"}]), "content that is not text"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool calls"),
    ],
)
def test_useless_rows_are_counted_by_reason(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    made, dropped = conversations(read_records(write(tmp_path / "a.jsonl", {"text": "kept"}, record, record)))
    assert len(made) == 1 and dropped.counts == {reason: 2} and dropped.total == 2
    assert f"2 rows left out: 2 {reason} (first: {tmp_path}/a.jsonl:2)" == str(dropped)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ALPACA | {"output": 3}, r"a\.jsonl:1: output must be a string, this is 3"),
        (ALPACA | {"history": ["a"]}, r"history\[0\] must be a pair"),
        ({"messages": "hi"}, r"a\.jsonl:1: messages must be a list, this is a string"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object with role and content, this is a string"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"messages\[0\] has the keys \['from', 'value'\], .*format"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\]\.content must be a string, this is 1"),
        ({"prompt": 3, "completion": "x"}, "prompt must be a text or a list of messages, this is 3"),
        ({"prompt": "x", "responses": []}, r"a\.jsonl:1: a ranking record is no conversation; .* alpaca"),
    ],
)
def test_malformed_rows_are_errors(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversations(read_records(write(tmp_path / "a.jsonl", record)))


def test_nothing_left_is_an_error_with_the_reasons() -> None:
    dropped = Dropped()
    dropped.update(Dropped(counts={"empty response": 3}, first={"empty response": "a.jsonl:1"}))
    with pytest.raises(ValueError, match=r"no conversation left to use: 3 rows left out: 3 empty response \(first: a"):
        dropped.require(0, "conversation")


# Preferences, rankings, prompts.

QUESTION, GOOD, BAD = (Message("user", "a"),), (Message("assistant", "good"),), (Message("assistant", "bad"),)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "a", "chosen": "good", "rejected": "bad"}, QUESTION),
        ({"prompt": dicts(QUESTION), "chosen": dicts(GOOD), "rejected": dicts(BAD)}, QUESTION),
        ({"prompt": "a", "chosen": dicts(QUESTION + GOOD), "rejected": dicts(QUESTION + BAD)}, QUESTION),
        ({"chosen": dicts((*TURNS[:2], *QUESTION, *GOOD)), "rejected": dicts((*TURNS[:2], *QUESTION, *BAD))}, None),
        (
            {"prompt": "a", "chosen": dicts((SYSTEM, *QUESTION, *GOOD)), "rejected": dicts((SYSTEM, *QUESTION, *BAD))},
            (SYSTEM, *QUESTION),
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: bad"}, QUESTION),
    ],
)
def test_preferences_with_and_without_a_prompt_of_their_own(record: dict[str, Any], prompt: Any) -> None:
    made, dropped = preferences([record])
    assert made == [Preference(prompt or (*TURNS[:2], *QUESTION), GOOD, BAD)] and not dropped.total


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty response"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, "empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}, "rejected scored above chosen"),
        (
            {"chosen": dicts(QUESTION + GOOD), "rejected": dicts((USER, *BAD))},
            "chosen and rejected do not begin with one prompt",
        ),
    ],
)
def test_useless_preferences_are_counted(record: dict[str, Any], reason: str) -> None:
    assert preferences([record]) == ([], Dropped(counts={reason: 1}, first={reason: ""}))


def test_only_a_margin_is_a_margin() -> None:
    pair = {"prompt": "a", "chosen": "good", "rejected": "bad"}
    rows = [pair, pair | {"margin": 2}, pair | {"score_chosen": 7.5, "score_rejected": 8}]
    assert [each.margin for each in preferences(rows)[0]] == [None, 2.0, None]
    with pytest.raises(ValueError, match="margin must hold numbers, this is 'x'"):
        preferences([pair | {"margin": "x"}])
    with pytest.raises(ValueError, match="without a prompt, chosen must be a list of messages"):
        preferences([{"chosen": "good", "rejected": "bad"}])
    with pytest.raises(ValueError, match="preferences are needed .* this is text"):
        preferences([{"text": "x"}])


@pytest.mark.parametrize("number", ["1e999", "-Infinity", "NaN", "1e39", "1" + 400 * "0"])
def test_numbers_that_are_not_finite_are_refused_by_their_line(number: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"prompt": "a", "chosen": "b", "rejected": "c", "margin": {number}}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: margin must hold finite numbers of at most 3\.4e\+38, this is"):
        preferences(read_records(file))
    file.write_text(f'{{"prompt": "a", "responses": ["b", "c"], "scores": [1, {number}]}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: scores must hold finite numbers"):
        rankings(read_records(file))


def test_records_that_are_compared_are_of_one_kind() -> None:
    pair, ranked = {"chosen": "b", "rejected": "c"}, {"prompt": "a", "responses": ["b", "c"]}
    talk: dict[str, Any] = {"messages": []}
    assert kind_of([pair, pair | {"instruction": "a", "output": "b"}], None) == "preference"
    assert kind_of([talk, {"text": "a"}], None) == "messages"
    for first, other, words_ in (
        (pair, ranked, "F:2 is a ranking record, F:1 is a preference record"),
        (talk, pair, "F:2 is a preference record, F:1 is a messages record"),
        (ranked, talk, "F:2 is a messages record, F:1 is a ranking record"),
    ):
        with pytest.raises(ValueError, match=words_):
            kind_of([Record(first, where="F:1"), Record(other, where="F:2")], None)


def test_rankings_are_sorted_by_their_scores() -> None:
    row = {"prompt": "a", "responses": ["x", "y", "z"]}
    answers = {name: (Message("assistant", name),) for name in "xyz"}
    (plain, scored), _ = rankings([row, row | {"scores": [1, 3, 1]}])
    assert plain == Ranking(QUESTION, (answers["x"], answers["y"], answers["z"])) and plain.ranks == (0, 1, 2)
    assert scored.responses == (answers["y"], answers["x"], answers["z"]) and scored.ranks == (0, 1, 1)
    assert plain.order is None and scored.order == (1, 0, 2)
    useless = [row | {"responses": ["x"]}, row | {"responses": ["x", "x"]}, row | {"scores": [2, 2, 2]}]
    reasons = ["fewer than two responses", "two equal responses", "all responses scored alike"]
    assert list(rankings(useless)[1].counts) == reasons
    with pytest.raises(ValueError, match="3 responses but 1 scores"):
        rankings([row | {"scores": [1]}])


def test_prompts_are_given_or_what_precedes_the_last_answer() -> None:
    pair = {"chosen": dicts(QUESTION + GOOD), "rejected": dicts(QUESTION + BAD)}
    assert prompts([{"prompt": "a"}, {"messages": dicts(TURNS)}, pair])[0] == [QUESTION, TURNS[:3], QUESTION]
    with pytest.raises(ValueError, match="a text has no prompt"):
        prompts([{"text": "x"}])


# Templates.


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_named_templates_render_as_transformers_does(name: str, add_generation_prompt: bool) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    other = oracle(chat_template=TEMPLATES[name])
    for messages in CONVERSATIONS:
        expected = other.apply_chat_template(
            dicts(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected


SHORT = (SYSTEM, Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "X"), Message("assistant", "Y"))
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo"
    "<|im_end|>\n<|im_start|>user\nX<|im_end|>\n<|im_start|>assistant\nY<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|><|start_header_id|>"
    "user<|end_header_id|>\n\nX<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nY<|eot_id|>",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] X [/INST] Y </s>",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Yo</s>[INST] X [/INST] Y</s>",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n<|user|>\nX</s>\n<|assistant|>\n"
    "Y</s>\n",
    "plain": "<s>Be brief.HiYo</s>XY</s>",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYo</s>\n\n### Instruction:\nX\n\n### Response:"
    "\nY</s>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_write_what_their_models_were_trained_on(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    assert template.render(SHORT) == RENDERED[name]
    text, spans = template.render_with_spans(SHORT)
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": " </s>"}
    space = " " if name in ("llama2", "mistral") else ""
    assert [text[a:b] for a, b in spans] == [space + answer + ends.get(name, "</s>") for answer in ("Yo", "Y")]
    before = template.render(SHORT[:2], add_generation_prompt=True)
    assert text.startswith(before) and spans[0][0] == len(before)


def test_alpaca_words_its_preamble_by_the_input() -> None:
    (plain, given), _ = conversations([ALPACA, ALPACA | {"input": "1 2"}])
    template = ChatTemplate(TEMPLATES["alpaca"], SPECIAL)
    assert template.render(plain.messages) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n3</s>"
    )
    assert template.render(given.messages) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3</s>"
    )


TRICKY = {
    "a default system message, tools": """
        {%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}
        {%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}{%- endif %}
        {%- for m in messages %}
            {%- if m.tool_calls %}{%- for call in m.tool_calls %}{{- call.function.name }}{%- endfor %}{%- endif %}
            {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
        {%- endfor %}""",
    "a date": """{{- bos_token }}
        {%- if not date is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}
        {{- 'Today Date: ' + date }}{% for m in messages %}{{- m['content'] | trim }}{% endfor %}""",
    "a namespace, slices, loop controls": """{%- set ns = namespace(last=0, seen=dict(a=1)) %}
        {%- for m in messages[::-1] %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- break %}{%- endif %}
        {%- endfor %}{{- ns.last ~ ns.seen.a ~ (messages | map(attribute='role') | join('/')) }}
        {%- for m in messages %}{%- if m.content is string and '\\n' in m.content %}{% continue %}{% endif %}
        {{- m.content.split('!')[0].rstrip() | upper }}{%- endfor %}""",
    "blocks on lines of their own": "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n"
    "    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\n>\n{% endif %}\n",
    "a macro": "{%- macro show(m) %}{{ m.role }}: {{ m | tojson }}{%- endmacro %}"
    "{%- for m in messages %}{{ show(m) }}{% endfor %}",
}


@pytest.mark.parametrize("name", TRICKY)
def test_what_published_templates_use_renders_as_in_transformers(name: str) -> None:
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            expected = oracle(chat_template=TRICKY[name]).apply_chat_template(
                dicts(messages), tokenize=False, add_generation_prompt=prompt
            )
            assert ChatTemplate(TRICKY[name], SPECIAL).render(messages, add_generation_prompt=prompt) == expected


def test_the_date_can_be_fixed() -> None:
    template = ChatTemplate(TRICKY["a date"], SPECIAL, now=datetime.datetime(2024, 7, 26))
    assert template.uses_date and template.render((USER,)).startswith("<s>Today Date: 26 Jul 2024")
    assert not ChatTemplate(TEMPLATES["chatml"], {}).uses_date


def test_generation_blocks_are_found_in_macros_and_sets() -> None:
    text = (
        "{%- macro turn(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{%- endmacro %}"
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set kept %}{{ turn(m) }}{% endset %}{{- kept }}"
        "{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    )
    rendered, spans = ChatTemplate(text, {}).render_with_spans(TURNS)
    assert rendered == " Hi, \u4f60\n[Hello! ]And?[No\n  more.]"
    assert [rendered[a:b] for a, b in spans] == ["Hello! ", "No\n  more."]


def test_a_directory_has_its_template_in_either_file(tmp_path: Path) -> None:
    other = oracle(chat_template=TEMPLATES["llama2"])
    expected = other.apply_chat_template(dicts(TURNS), tokenize=False)
    other.save_pretrained(tmp_path)
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None and template.render(TURNS) == expected and template.special_tokens == SPECIAL
    (tmp_path / "chat_template.jinja").unlink()
    assert ChatTemplate.from_directory(tmp_path) is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    both = [{"name": "tool_use", "template": "-"}, {"name": "default", "template": TEMPLATES["llama2"]}]
    for value in (TEMPLATES["llama2"], both):
        write(tmp_path / "tokenizer_config.json", config | {"chat_template": value, "eos_token": {"content": "</s>"}})
        template = ChatTemplate.from_directory(tmp_path)
        assert template is not None and template.render(TURNS) == expected
    write(tmp_path / "tokenizer_config.json", config | {"chat_template": both[:1]})
    with pytest.raises(ValueError, match=r"holds the templates \['tool_use'\], none called default"):
        ChatTemplate.from_directory(tmp_path)


def test_templates_take_the_special_tokens_of_our_tokenizers() -> None:
    tokenizer = byte_tokenizer().with_control_tokens(MARKS["chatml"])
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (259, 256)
    assert ChatTemplate.named("plain", tokenizer).render(TURNS[:2]) == " Hi, \u4f60\nHello! <|endoftext|>"
    template = ChatTemplate.named("chatml", tokenizer)
    assert template.answer_tail == ("<|im_end|>", "\n") and template.stop_ids(tokenizer) == [258]
    assert ChatTemplate.named("chatml", byte_tokenizer()).stop_ids(byte_tokenizer()) == list(b"<|im_end|>")
    with pytest.raises(ValueError, match="the template plain ends turns with eos_token, and the tokenizer has no end"):
        ChatTemplate.named("plain", char_tokenizer("abc"))
    with pytest.raises(ValueError, match="no chat template is called 'x': use one of alpaca, chatml"):
        ChatTemplate.named("x", tokenizer)


def test_a_tokenizer_knows_where_its_tokens_stand() -> None:
    tokenizer: Tokenizer = byte_tokenizer()
    encoded = tokenizer.encode_with_offsets("a\u4f60 b")
    assert encoded.ids.tolist() == tokenizer.encode("a\u4f60 b")
    assert encoded.starts.tolist() == [0, 1, 1, 1, 2, 3] and encoded.ends.tolist() == [1, 2, 2, 2, 3, 4]
    assert encoded.overlapping(1, 2).tolist() == [False, True, True, True, False, False]
    assert not len(tokenizer.encode_with_offsets("").ids)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ tojson.__globals__.x }}{{ ''['__class__']['__mro__'] }}",
        "{{ lipsum.__globals__['os'].popen('true').read() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self.__init__.__globals__.x }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{{ '{0.__class__.__mro__}'.format(messages).x.y }}",
        "{{ messages.append(1) }}",
        "{% set x = messages[0].update(role='system') %}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{% for i in range(100000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_leaves_the_sandbox(attack: str) -> None:
    messages = (USER,)
    with pytest.raises(ValueError, match="the chat template fails|is not a chat template"):
        ChatTemplate(attack, SPECIAL).render(messages)
    assert messages == (USER,)


def test_templates_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"the chat template is not a chat template, line 2: Expected an exp"):
        ChatTemplate("{% for x in y %}\n{% if %}", {})
    with pytest.raises(TemplateRefusal, match=re.escape("T refuses: no system here")):
        ChatTemplate("{{ raise_exception('no system here') }}", {}, name="T").render((USER,))
    with pytest.raises(ValueError, match="T fails: ZeroDivisionError"):
        ChatTemplate("{{ 1 / 0 }}", {}, name="T").render((USER,))
    with pytest.raises(ValueError, match="changes the text of a generation block"):
        text = "{%- set x %}{% generation %}  a {% endgeneration %}{% endset %}{{ x | trim }}"
        ChatTemplate(text, {}).render_with_spans((USER,))
