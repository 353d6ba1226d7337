"""Seed tasks for Self-Instruct where none are given: short, unlike each other, (instruction, input, output)."""

from __future__ import annotations

from typing import Any

_TASKS = (
    ("Translate the sentence into French.", "The train leaves at noon.", "Le train part \u00e0 midi."),
    ("Give three reasons why people keep a diary.", "",
     "To remember what happened, to think something over, and to see how they change."),
    ("Tell whether the review is positive or negative.", "The soup was cold and the waiter rude.", "Negative"),
    ("Put these numbers in ascending order.", "17, 4, 39, 8", "4, 8, 17, 39"),
    ("Write a short poem about rain in spring.", "",
     "Grey morning taps upon the pane;\nthe bulbs below wake up again."),
    ("Explain to a child why ships float.", "",
     "A ship pushes water aside. The water pushes back, as hard as the water it replaced was heavy, and holds it up."),
    ("Rewrite the sentence in the passive voice.", "The storm broke two windows.",
     "Two windows were broken by the storm."),
    ("What is the opposite of the given word?", "generous", "stingy"),
    ("Write a polite message that declines an invitation to dinner.", "",
     "Thank you for thinking of me. I cannot come on Friday, but I would be glad to see you another time."),
    ("Find the mistake in the calculation and correct it.", "7 * 8 = 54", "7 * 8 is 56, not 54."),
    ("Name an animal that fits all the clues.", "It flies, it is awake at night, and it has fur.", "A bat"),
    ("Summarize the paragraph in one sentence.",
     "The bridge was closed in March. Engineers found cracks in two pillars. Repairs will take until autumn.",
     "The bridge is closed until autumn because two of its pillars are cracked."),
    ("Suggest a title for a story with this outline.",
     "A lighthouse keeper finds letters in bottles, all of them written by himself.", "The Keeper's Own Hand"),
    ("Write a Python function that returns the largest even number of a list.", "",
     "def largest_even(numbers):\n    return max(n for n in numbers if n % 2 == 0)"),
    ("How would you plan a day in a city that you have never visited?", "",
     "Choose one sight for the morning and one quarter to walk through after lunch, and leave the evening open."),
    ("Which of the words does not belong with the others?", "oak, maple, tulip, birch", "Tulip, which is no tree."),
)  # fmt: skip


def seed_tasks() -> list[dict[str, Any]]:
    """Alpaca records."""
    return [{"instruction": asked, "input": given, "output": output} for asked, given, output in _TASKS]
