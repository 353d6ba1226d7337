"""Which tokens are trained: answers and what ends them, by place and never by value, whichever way they are found."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from megallm.data.chat_template import ChatTemplate
from megallm.data.conversation import Conversation, Dropped, Message, Messages, Preference, Ranking
from megallm.data.examples import CONSTRUCTIONS, comparison_groups, conversation_examples, prompt_ids
from megallm.data.masks import Example, labels
from megallm.data.show import mask_text, show_masks, summary_line
from megallm.data.templates import MARKS, TEMPLATES
from megallm.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe

TEXTS = ["Hello there, how are you today?\n", "[INST] user [/INST]\n### Response:\n", "the cat sat on it. "] * 9
SYSTEM = Message("system", "Be brief.")
TURNS = (
    Message("user", "Hi there, caf\u00e9?"),
    Message("assistant", "Hello, how are you \U0001f600"),
    Message("user", "the cat"),
    Message("assistant", "sat on\nit."),
    Message("user", "today?"),
    Message("assistant", "you are"),
)
CONVERSATIONS = [Conversation(TURNS[:2]), Conversation((SYSTEM, *TURNS)), Conversation(TURNS[:4], where="a.jsonl:3")]
LONG = 1000
THINKING = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + m.content + '<|im_end|>' }}
        {%- endgeneration %}{{- '\\n' }}
    {%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Like Qwen3's: an answer is rendered otherwise while it is the last."""


def without_marks(text: str) -> str:
    return re.sub(r"\{%- (end)?generation %\}", "", text)


def tokenizer_for(name: str) -> Tokenizer:
    return train_bpe(TEXTS, 330).with_control_tokens(["<s>", "</s>", *MARKS.get(name, ())])


def template_for(name: str, texts: Any = TEMPLATES) -> ChatTemplate:
    return ChatTemplate(texts[name], {"bos_token": "<s>", "eos_token": "</s>"}, name=f"the template {name}")


def one(messages: Messages, tokenizer: Tokenizer, template: ChatTemplate | None, **kwargs: Any) -> Example:
    (example,), dropped = conversation_examples(
        [Conversation(messages)], tokenizer, template, **{"max_length": LONG, **kwargs}
    )
    assert not dropped.total
    return example


def trained_text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.input_ids[example.is_trained].tolist(), skip_special_tokens=False)


def pair(prompt: str, completion: str) -> Messages:
    return Message("user", prompt), Message("assistant", completion)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(name: str) -> None:
    tokenizer, template = tokenizer_for(name), template_for(name)
    other = PreTrainedTokenizerFast(
        tokenizer_object=RawTokenizer.from_str(tokenizer._inner.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATES[name],
    )
    examples, _ = conversation_examples(CONVERSATIONS, tokenizer, template, max_length=LONG)
    for conversation, example in zip(CONVERSATIONS, examples, strict=True):
        messages = [{"role": each.role, "content": each.content} for each in conversation.messages]
        expected = other.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert example.input_ids.tolist() == expected["input_ids"]
        assert example.is_trained.astype(int).tolist() == expected["assistant_masks"]
        assert example.prompt_length == expected["assistant_masks"].index(1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_trained(name: str) -> None:
    tokenizer, template = tokenizer_for(name), template_for(name)
    end = template.answer_tail[0]
    space = " " if name in ("llama2", "mistral") else ""
    assert end.strip() in ("<|im_end|>", "<|eot_id|>", "</s>")
    example = one((SYSTEM, *TURNS), tokenizer, template)
    answers = [message.content for message in TURNS if message.role == "assistant"]
    assert trained_text(example, tokenizer) == "".join(space + answer + end for answer in answers)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])  # whose tokens merge: see below
def test_a_template_without_marks_gives_the_same_masks(name: str) -> None:
    tokenizer = tokenizer_for(name)
    bare = template_for(name, {name: without_marks(TEMPLATES[name])})
    assert template_for(name).has_generation_marks and not bare.has_generation_marks
    for construction in CONSTRUCTIONS:
        kwargs: Any = {"max_length": LONG, "construction": construction}
        marked, _ = conversation_examples(CONVERSATIONS, tokenizer, template_for(name), **kwargs)
        found, _ = conversation_examples(CONVERSATIONS, tokenizer, bare, **kwargs)
        assert len(marked) == len(found)
        for one_, other in zip(marked, found, strict=True):
            assert one_.input_ids.tolist() == other.input_ids.tolist()
            assert one_.is_trained.tolist() == other.is_trained.tolist()


def test_trimmed_offsets_change_no_mask() -> None:
    """GPT-2's and Llama 3's files leave blanks out of their tokens' offsets."""
    inner = RawTokenizer.from_str(tokenizer_for("chatml")._inner.to_str())
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = pair("a", "  the   cat \n\n   ")
    plain, trimmed = tokenizer_for("chatml"), Tokenizer(inner)
    expected = one(messages, plain, template_for("chatml"))
    example = one(messages, trimmed, template_for("chatml"))
    assert example.input_ids.tolist() == expected.input_ids.tolist()
    assert trained_text(example, trimmed) == trained_text(expected, plain) == "  the   cat \n\n   <|im_end|>"


# Constructions.


def targets(examples: list[Example]) -> list[tuple[tuple[int, ...], int]]:
    """Every (context, target) that is trained, sorted."""
    return sorted(
        (tuple(each.input_ids[:at].tolist()), int(each.input_ids[at]))
        for each in examples
        for at in np.flatnonzero(each.is_trained)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_turns_and_split_train_the_same_targets_if_the_template_is_prefix_stable(name: str) -> None:
    tokenizer, template = tokenizer_for(name), template_for(name)
    made = {
        construction: conversation_examples(
            CONVERSATIONS, tokenizer, template, max_length=LONG, construction=construction
        )[0]
        for construction in CONSTRUCTIONS
    }
    assert [len(made[construction]) for construction in CONSTRUCTIONS] == [3, 3, 6]
    assert targets(made["all-turns"]) == targets(made["split"])
    last = [made["split"][index] for index in (0, 3, 5)]
    assert targets(made["last-turn"]) == targets(last)
    assert sum(map(len, made["split"])) > sum(map(len, made["all-turns"]))


def test_a_template_that_is_not_prefix_stable_trains_other_targets_or_is_refused() -> None:
    tokenizer = tokenizer_for("chatml")
    kwargs: Any = {"max_length": LONG}
    marked = ChatTemplate(THINKING, {})
    whole, _ = conversation_examples(CONVERSATIONS[2:], tokenizer, marked, **kwargs)
    split, _ = conversation_examples(CONVERSATIONS[2:], tokenizer, marked, construction="split", **kwargs)
    assert targets(whole) != targets(split)

    bare = ChatTemplate(without_marks(THINKING), {}, name="T")
    with pytest.raises(ValueError, match=r"a\.jsonl:3: T renders the conversation up to its end not .*Message 2: from"):
        conversation_examples(CONVERSATIONS[2:], tokenizer, bare, **kwargs)
    for construction, count in (("split", 2), ("last-turn", 1)):
        made, _ = conversation_examples(CONVERSATIONS[2:], tokenizer, bare, construction=construction, **kwargs)
        assert len(made) == count
        assert trained_text(made[-1], tokenizer) == "<think>\n\n</think>\n\nsat on\nit.<|im_end|>"
        assert made[-1].prompt_length == len(prompt_ids([TURNS[:3]], tokenizer, bare, max_length=LONG)[0][0])


def test_a_refusal_shows_both_runs_of_tokens() -> None:
    """`plain` without marks: the answer's first bytes merge with the prompt's last ones. The row is left out."""
    tokenizer = train_bpe(["foobar"] * 20, 300)
    bare = ChatTemplate(without_marks(TEMPLATES["plain"]), tokenizer.special_tokens(), name="T")
    (whole,) = tokenizer.encode("foobar")
    prompt = tokenizer.encode("foo")
    rows = [Conversation(pair("foo", "bar"), where="x:1"), Conversation(pair("foo", " bar"))]
    examples, dropped = conversation_examples(rows, tokenizer, bare, max_length=LONG)
    assert len(examples) == 1 and dropped.counts == {"an answer whose tokens merge with its neighbours'": 1}
    runs = rf"x:1: message 2: from token 0 on \[{prompt[0]}.*\] alone, \[{whole}, 0\] in the whole"
    assert re.search(runs, str(dropped))
    marked = one(pair("foo", "bar"), tokenizer, ChatTemplate.named("plain", tokenizer))
    assert marked.input_ids.tolist() == [whole, 0] and marked.is_trained.tolist() == [False, True]


def test_what_ends_a_turn_behind_the_marks_is_trained_too() -> None:
    text = TEMPLATES["chatml"].replace("message.content + '<|im_end|>' }}", "message.content }}")
    text = text.replace("{{- '\\n' }}", "{{- '<|im_end|>\\n' }}")
    tokenizer = tokenizer_for("chatml")
    assert text != TEMPLATES["chatml"]
    assert trained_text(one(TURNS[:2], tokenizer, ChatTemplate(text, {})), tokenizer).endswith("\U0001f600<|im_end|>")


ENDS = {
    "all in one": ("{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\\n{% endfor %}", "<end>"),
    "an end of the whole": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\\n{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt else eos_token }}",
        "<end>",
    ),
    "another end of the last answer": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{{ '<return>' if loop.last and m.role == 'assistant' else '<end>' }}{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt }}",
        "<return>",
    ),
    "a generation prompt always": (
        "<|start|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
        "<|end|>",
    ),
    "nothing": ("{% for m in messages %}\\n{{ m.role }}: {{ m.content }}{% endfor %}", ""),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_an_answer_is_told_from_what_else_follows_it(name: str) -> None:
    text, end = ENDS[name]
    template = ChatTemplate(text.replace("\\n", "\n"), {"eos_token": "</s>"})
    assert template.answer_tail[0] == end
    example = one(TURNS[:4], byte_tokenizer(), template, construction="last-turn")
    assert trained_text(example, byte_tokenizer()).endswith("sat on\nit." + end)


def test_a_template_in_which_no_answer_ends_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate(ENDS["nothing"][0], {}, name="T")
    one(TURNS[:2], byte_tokenizer(), template)
    assert "T puts nothing behind an answer: a model trained with it never stops" in caplog.text


def test_an_answer_may_have_several_marks() -> None:
    """Phi-3.5's has one behind the whole conversation."""
    text = TEMPLATES["chatml"].replace(
        "{%- if add_generation_prompt %}",
        "{%- if not add_generation_prompt %}{% generation %}{{- '</s>' }}{% endgeneration %}{% endif %}\n"
        "{%- if add_generation_prompt %}",
    )
    tokenizer, template = tokenizer_for("chatml"), ChatTemplate(text, {})
    answers = [message.content + "<|im_end|>" for message in TURNS[1::2]]
    for construction, trained in (("all-turns", answers), ("last-turn", answers[2:])):
        example = one(TURNS, tokenizer, template, construction=construction)
        assert trained_text(example, tokenizer) == "".join(trained) + "</s>"


def test_fewer_marks_than_answers_are_refused() -> None:
    text = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    with pytest.raises(ValueError, match="T marks 1 generations for 3 answers"):
        one(TURNS, tokenizer_for("chatml"), ChatTemplate(text, {}, name="T"))


def test_a_template_that_refuses_or_is_imitated_leaves_rows_out() -> None:
    tokenizer = tokenizer_for("chatml")
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATES["chatml"]
    rows = [*CONVERSATIONS, Conversation(pair("a", "stop<|im_end|> here")), Conversation(pair("<s>", "a"))]
    examples, dropped = conversation_examples(rows, tokenizer, ChatTemplate(text, {}, name="T"), max_length=LONG)
    assert len(examples) == 2 and dropped.counts == {
        "T refuses: no system": 1,
        "the special token <|im_end|> in a message": 1,
        "the special token <s> in a message": 1,
    }


# Without a template.


def test_a_completion_begins_where_its_ids_leave_the_prompt_s() -> None:
    tokenizer = train_bpe(["foobar foo bar"] * 20, 300)
    for prompt, completion in (("foo", "bar"), ("foo bar", " foo"), ("a b", "c")):
        example = one(pair(prompt, completion), tokenizer, None)
        alone, both = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
        start = next((at for at in range(len(alone)) if alone[at] != both[at]), len(alone))
        assert example.input_ids.tolist() == [*both, tokenizer.eos_id]
        assert example.prompt_length == start
        assert example.is_trained.tolist() == [at >= max(start, 1) for at in range(len(both) + 1)]


def test_marks_of_the_tokenizer_lead_and_end_a_text_once() -> None:
    inner = RawTokenizer.from_str(byte_tokenizer().with_control_tokens(["<s>"])._inner.to_str())
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer = Tokenizer(inner)
    example = one(pair("a", "b"), tokenizer, None)
    assert example.input_ids.tolist() == [257, 97, 98, 256]
    assert example.is_trained.tolist() == [False, False, True, True]
    assert one(pair("a", "b<|endoftext|>"), tokenizer, None).input_ids.tolist() == [257, 97, 98, 256]
    assert prompt_ids([pair("a", "b")[:1]], tokenizer, None, max_length=9)[0][0].tolist() == [257, 97]
    with pytest.raises(ValueError, match="the tokenizer has no end mark, so that a model would not learn to stop"):
        one(pair("a", "b"), char_tokenizer("ab"), None)


def test_a_text_is_trained_whole_with_a_template_too() -> None:
    for template in (None, template_for("chatml")):
        example = one((Message("assistant", "abc"),), byte_tokenizer(), template)
        assert example.input_ids.tolist() == [97, 98, 99, 256]
        assert example.is_trained.tolist() == [False, True, True, True] and example.prompt_length == 0


def test_a_conversation_needs_a_template() -> None:
    message = r"a\.jsonl:3: a conversation of 4 messages \(user, assistant, user, assistant\) needs a chat template: "
    message += "choose one with --template"
    with pytest.raises(ValueError, match=message):
        conversation_examples(CONVERSATIONS[2:], byte_tokenizer(), None, max_length=LONG)


# Labels and lengths.


def test_labels_are_the_next_trained_tokens_whatever_their_value() -> None:
    ids = np.array([256, 5, 256, 256, 0, 256], dtype=np.int32)
    mask = np.array([False, False, True, True, True, True])
    example = Example(input_ids=ids, is_trained=mask, prompt_length=2)
    assert labels(example).tolist() == [-100, 256, 256, 0, 256, -100] and labels(example).dtype == np.int64
    assert example.num_trained == sum(label != -100 for label in labels(example))


def test_train_on_full_trains_all_but_the_first_token() -> None:
    example = one(TURNS, tokenizer_for("chatml"), template_for("chatml"), train_on="full")
    assert example.is_trained.tolist() == [False] + [True] * (len(example) - 1)
    assert example.prompt_length == one(TURNS, tokenizer_for("chatml"), template_for("chatml")).prompt_length


def test_long_answers_are_cut_without_an_end_mark_and_rows_without_targets_counted() -> None:
    rows = [Conversation(pair("ab", "cdefgh"), where="x:1"), Conversation(pair("abcdefgh", "i"), where="x:2")]
    tokenizer = byte_tokenizer()
    examples, dropped = conversation_examples(rows, tokenizer, None, max_length=5)
    assert [example.input_ids.tolist() for example in examples] == [list(b"abcde")]
    assert labels(examples[0]).tolist() == [-100, *b"cde", -100] and examples[0].num_cut == 4
    assert str(dropped) == "1 row left out: 1 no answer within max_length (5) (first: x:2)"
    examples, dropped = conversation_examples(rows, tokenizer, None, max_length=9, overflow="drop")
    assert len(examples) == 1 and dropped.counts == {"longer than max_length (9)": 1}
    with pytest.raises(ValueError, match=r"x:2: 10 tokens are more than max_length \(9\): raise it, or choose"):
        conversation_examples(rows, tokenizer, None, max_length=9, overflow="refuse")
    with pytest.raises(ValueError, match=r"no conversation left to use: 2 rows left out: 2 longer than"):
        conversation_examples(rows, tokenizer, None, max_length=4, overflow="drop")


def test_unknown_choices_are_refused() -> None:
    for name in ("construction", "train_on", "overflow"):
        with pytest.raises(ValueError, match=f"{name} 'x' is not known: use one of"):
            one(TURNS[:2], byte_tokenizer(), None, **{name: "x"})
    with pytest.raises(ValueError, match=r"max_length \(1\) must be at least 2"):
        one(TURNS[:2], byte_tokenizer(), None, max_length=1)


def test_text_that_has_no_ids_is_named_with_its_row() -> None:
    rows = [Conversation(pair("a", "b")), Conversation(pair("a", "z"), where="x:2")]
    with pytest.raises(ValueError, match=r"x:2: the tokenizer cannot encode this text: .* has no 'z'"):
        conversation_examples(rows, char_tokenizer("ab", end_mark=True), None, max_length=9)


# Comparisons.


def test_pairs_share_their_prompt_and_end_with_the_turn() -> None:
    tokenizer, template = tokenizer_for("chatml"), template_for("chatml")
    good, bad = (Message("assistant", "you are"),), (Message("assistant", "it."), *TURNS[4:])
    (group,), dropped = comparison_groups(
        [Preference(TURNS[:3], good, bad, margin=1.5)], tokenizer, template, max_length=LONG
    )
    chosen, rejected = group.examples
    (prompt,), _ = prompt_ids([TURNS[:3]], tokenizer, template, max_length=LONG)
    assert not dropped.total and group.ranks == (0, 1) and group.margin == 1.5
    for example in (chosen, rejected):
        assert example.prompt_length == len(prompt) and example.input_ids[: len(prompt)].tolist() == prompt.tolist()
        assert example.input_ids[-1] == tokenizer.token_to_id("<|im_end|>") and example.is_trained[-1]
    assert trained_text(chosen, tokenizer) == "you are<|im_end|>"
    assert trained_text(rejected, tokenizer) == "it.<|im_end|>you are<|im_end|>"


def test_rankings_keep_their_ties_and_cut_rows_go_whole() -> None:
    def ranking(*texts: str, scores: tuple[float, ...] | None = None) -> Ranking:
        return Ranking((Message("user", "ab"),), tuple((Message("assistant", text),) for text in texts), scores)

    rows = [ranking("cd", "ef", "g", scores=(2, 1, 1)), ranking("cdX", "cdY"), ranking("c", "c long answer")]
    groups, dropped = comparison_groups(rows, byte_tokenizer(), None, max_length=4)
    assert [group.ranks for group in groups] == [(0, 1, 1), (0, 1)] and groups[0].margin is None
    assert [chr(example.input_ids[2]) for example in groups[0].examples] == ["c", "e", "g"]
    assert dropped.counts == {"two answers equal within max_length": 1}
    _, dropped = comparison_groups(rows, byte_tokenizer(), None, max_length=5, overflow="drop")
    assert dropped.counts == {"longer than max_length (5)": 2}


def test_prompts_that_are_too_long_are_counted() -> None:
    rows = [(Message("user", "abc"),), (Message("user", "abcdef"),)]
    ids, dropped = prompt_ids(rows, byte_tokenizer(), None, max_length=4)
    assert [each.tolist() for each in ids] == [list(b"abc")]
    assert dropped.counts == {"prompts longer than max_length (4)": 1}


# What is shown.


def test_masks_are_shown_with_and_without_colour() -> None:
    tokenizer, template = tokenizer_for("chatml"), template_for("chatml")
    example = one(pair("Hi", "the cat"), tokenizer, template)
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert mask_text(example, tokenizer) == f"{asked}>>>the cat<|im_end|><<<\n"
    assert mask_text(example, tokenizer, colour=True) == (
        f"\x1b[2m{asked}\x1b[0m\x1b[32mthe cat<|im_end|>\x1b[0m\x1b[2m\n\x1b[0m"
    )
    cut = one(pair("Hi", "the cat"), byte_tokenizer(), None, max_length=5)
    shown = show_masks([cut, cut], byte_tokenizer(), 1)
    assert shown == "--- example 1 of 2: 5 tokens, 3 trained, 5 cut off\nHi>>>the<<<"
    dropped = Dropped()
    dropped.add("empty response", "a.jsonl:7")
    assert summary_line([cut, cut], dropped) == (
        "2 examples; 10 tokens, 60.0 % trained; 2 cut at their end by 10 tokens; "
        "1 row left out: 1 empty response (first: a.jsonl:7)"
    )
