"""Preferences of a language model: which of two responses is better by the principles of a constitution.

    P(first better) = mean over principles and orders of softmax(log p("(A)"), log p("(B)")) at the first response

log p is that of the answer behind the question, as a text of its own tokens (Bai et al., arXiv 2212.08073, section
4.1). Each question is asked in both orders, so that a model that likes "(A)" better than "(B)" gains nothing by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megallm.data.chat_model import ChatModel, Continuation
from megallm.data.constitution import CHOICES, Constitution, preference_principle, preference_question
from megallm.data.conversation import Dropped, Unusable
from megallm.data.judged import Judged, as_content
from megallm.trainers.engine import Engine
from megallm.trainers.evaluate import score_documents

_DIGITS = 6
"""Of probabilities in files: layouts differ by rounding, beyond them."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A pair with the questions about it."""

    pair: Judged
    principle: str
    """Its name, or `all`."""
    questions: tuple[tuple[Continuation, Continuation], ...]
    """(the text up to "(A)", up to "(B)"), of each principle one or both orders in turn."""
    num_orders: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge said of a pair."""

    pair: Judged
    principle: str
    by_order: tuple[float, ...]
    """P(first response better), mean over principles, of each order."""
    says_a: float
    """Mean probability of "(A)": 0.5 of a judge without a liking for a place, if both orders were asked."""

    @property
    def first_better(self) -> float:
        """The mean over the orders."""
        return round(math.fsum(self.by_order) / len(self.by_order), _DIGITS)

    @property
    def margin(self) -> float:
        """P(better) - P(worse), 0 to 1."""
        return round(abs(2.0 * self.first_better - 1.0), _DIGITS)

    @property
    def orders_agree(self) -> bool:
        """Whether each order prefers the same response."""
        return len({p > 0.5 for p in self.by_order}) == 1

    def record(self) -> dict[str, Any]:
        """A preference record."""
        first, second = self.pair.responses
        chosen, rejected = (first, second) if self.first_better > 0.5 else (second, first)
        return {
            "prompt": as_content(self.pair.prompt),
            "chosen": as_content(chosen),
            "rejected": as_content(rejected),
            "probability": max(self.first_better, round(1.0 - self.first_better, _DIGITS)),
            "principle": self.principle,
        }


def ask(
    pairs: Sequence[Judged], chat: ChatModel, constitution: Constitution, *, seed: int, every: bool, both_orders: bool
) -> tuple[list[Asked], Dropped]:
    """The questions about pairs: by one principle each, or by `every` one. Those that do not fit are left out."""
    asked: list[Asked] = []
    dropped = Dropped()
    for pair in pairs:
        one = preference_principle(constitution, seed=seed, record=pair.number)
        first, second = pair.responses
        orders = [(first, second), (second, first)] if both_orders else [(first, second)]
        try:
            questions = tuple(
                (found[0], found[1])
                for principle in (constitution if every else (one,))
                for order in orders
                for found in [chat.choices(preference_question(principle, pair.prompt, *order), CHOICES)]
            )
        except Unusable as reason:
            dropped.add_row(reason, pair.where)
            continue
        name = "all" if every else one.name
        asked.append(Asked(pair=pair, principle=name, questions=questions, num_orders=len(orders)))
    return asked, dropped


def judge(engine: Engine, asked: Sequence[Asked], *, tokens_at_once: int = 4096) -> list[Verdict]:
    """The verdict on each pair, on every rank. A collective."""
    flat = [each for one in asked for question in one.questions for each in question]
    scores = score_documents(
        engine, [each.ids for each in flat], starts=[each.start for each in flat], tokens_at_once=tokens_at_once
    )
    losses = iter(loss for loss, _ in scores)
    verdicts = []
    for one in asked:
        says_a = [_softmax_first(-next(losses), -next(losses)) for _ in one.questions]
        orders = [says_a[order :: one.num_orders] for order in range(one.num_orders)]
        means = [math.fsum(order) / len(order) for order in orders]
        by_order = (means[0], *(1.0 - mean for mean in means[1:]))
        verdicts.append(
            Verdict(pair=one.pair, principle=one.principle, by_order=by_order, says_a=math.fsum(means) / len(means))
        )
    return verdicts


def _softmax_first(first: float, second: float) -> float:
    """exp(first) / (exp(first) + exp(second)), without overflow: the larger one's exponent is 0."""
    top = max(first, second)
    a, b = math.exp(first - top), math.exp(second - top)
    return a / (a + b)
