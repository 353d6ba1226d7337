"""Built-in reward functions say what they promise, and specs that name none are refused in words."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megallm.data.reward_functions import boxed, check_text, exact_answer, function_name, length, load, python_tests


def score(spec: str, completion: str, **record: Any) -> float:
    found = load(spec).score("a prompt", completion, record)
    assert isinstance(found, float)
    return found


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (" 15\n", "15", 1.0),
        ("15.0", 15, 1.0),
        ("1,500", "1500", 1.0),
        ("+.5", "0.50", 1.0),
        ("1e3", "1000", 1.0),
        ("1e9999", "1e9998", 0.0),
        ("015", "15", 1.0),
        ("16", "15", 0.0),
        ("15 or 16", "15", 0.0),
        ("1_5", "15", 0.0),
        ("nan", "NaN", 0.0),
        ("Paris", " Paris ", 1.0),
        ("", "0", 0.0),
    ],
)
def test_exact_answer_compares_texts_and_numbers(completion: str, answer: Any, expected: float) -> None:
    assert exact_answer("", completion, answer=answer) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}", 1.0),
        (r"first \boxed{1}, no: \boxed{ $2.0$ }", "2", 1.0),
        ("2 + 2 = 4\n#### 4", "he has 2 + 2 = 4.\n#### 4", 1.0),
        (r"\boxed{3} #### 4.", "4", 1.0),
        (r"#### 4 \boxed{3}", "4", 0.0),
        ("4", "4", 0.0),
        (r"\boxed{4", "4", 0.0),
        ("#### 1,000", "#### 1000", 1.0),
    ],
)
def test_boxed_reads_the_last_answer(completion: str, answer: str, expected: float) -> None:
    assert boxed("", completion, answer=answer) == expected


def test_format_takes_its_expression_from_the_record_before_the_option() -> None:
    assert score("format:<a>.*</a>", " <a>x\ny</a>\n") == 1.0
    assert score("format:<a>.*</a>", "<a>x</a> and more") == 0.0
    assert score("format:<a>.*</a>", "b", format="b") == 1.0
    with pytest.raises(ValueError, match="format needs the column `format`, this record has no columns"):
        score("format", "b")


def test_length_counts_characters_beyond_what_is_free() -> None:
    assert length("", "12345") == 5.0 and score("length:3", "12345") == 2.0 and score("length:9", "12345") == 0.0


CODE = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (CODE, 1.0),
        (f"Here:\n```python\nimport os; os._exit(1)\n```\nbetter:\n```py\n{CODE}```\nDone.", 1.0),
        (CODE.replace("+", "-"), 0.0),
        ("def add(a, b:", 0.0),
        ("import sys; sys.exit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        (CODE + "print('x' * 10_000_000)", 1.0),
        (CODE + "x = bytearray(4 << 30)", 0.0),
        (CODE + "import os; assert not [key for key in os.environ if key != 'LC_CTYPE']", 1.0),
    ],
)
def test_python_tests_run_the_code_and_the_tests(completion: str, expected: float) -> None:
    assert python_tests("", completion, tests=TESTS) == expected


def test_python_tests_end_in_time_with_what_they_started() -> None:
    begin = time.monotonic()
    assert score("python_tests:0.5", "while True: pass", tests="") == 0.0
    assert score("python_tests:0.5", "import time; time.sleep(60)", tests="") == 0.0
    assert score("python_tests", CODE, tests=[TESTS, "assert add(1, 1) == 2"], test_limit_s=3) == 1.0
    assert score("python_tests", CODE, tests=[TESTS, "assert add(1, 1) == 3"]) == 0.0
    assert time.monotonic() - begin < 60.0  # without its limit it ends never


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact", "'exact' is no reward function: use one of exact_answer, boxed"),
        ("exact_answer:5", "exact_answer has no option: write exact_answer alone"),
        ("format:(", r"'\(' is not what format takes as format: no regular expression"),
        ("python_tests:0", "'0' is not what python_tests takes as test_limit_s: seconds must be more than 0"),
        ("my.py", "which function of the file\\? Write my.py:NAME"),
        ("my.py:a b", "'a b' is no name of a function"),
    ],
)
def test_specs_that_name_no_function_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_text(spec)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/my.py:score: there is no file nowhere/my.py"):
        check_text("nowhere/my.py:score")


FILE = """
import neighbour

def every(prompt, completion, **record):
    return record

def some(prompt, completion, answer, level=3):
    return [prompt, completion, answer, level]

class Kept:
    def __call__(self, prompt, _completion):
        return neighbour.VALUE

kept = Kept()
number = 5

def swapped(completion, prompt): ...
def few(prompt): ...
async def later(prompt, completion): ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("VALUE = 0.25\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_functions_of_a_file_get_the_columns_that_they_take(file: Path) -> None:
    record = {"answer": 1, "prompt": "raw", "completion": "raw", "other": 2}
    assert load(f"{file}:every").score("p", "c", record) == {"answer": 1, "other": 2}
    assert load(f"{file}:some").score("p", "c", record) == ["p", "c", 1, 3]
    assert load(f"{file}:kept").score("p", "c", record) == 0.25
    assert function_name(f"{file}:kept") == "kept"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "has no function missing; it has every, some, swapped, few"),
        ("number", "is no function but int"),
        ("swapped", r"swapped\(completion, prompt\) does not fit: it is called with"),
        ("few", r"few\(prompt\) does not fit"),
        ("later", "is an async function"),
    ],
)
def test_functions_of_a_file_that_cannot_be_called_are_refused(file: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(f"{file}:{name}")


def test_a_file_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("\n\nimport nothing_of_this_name\n")
    with pytest.raises(ValueError, match=r"broken.py cannot be loaded: ModuleNotFoundError: .*\(line 3 of broken.py\)"):
        load(f"{tmp_path / 'broken.py'}:score")
