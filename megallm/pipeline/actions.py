"""What a pipeline does, as data: compute actions, what each one needs, and the messages between ranks.

The one idea: everything else (placement, validation, simulation, the runtime) asks `dependencies` and `consumer`
here, so a new kind of action is described once. The split of backward into input gradient (`I`) and weight
gradient (`W`) of the zero-bubble schedules (arXiv 2401.10241) would add: `I` needs what `B` needs and feeds
`I` of the stage before; `W` needs `I` of its own stage and feeds nobody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B"]

KINDS: tuple[Kind, ...] = ("F", "B")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One forward (`F`) or backward (`B`) of a stage on a microbatch. `str` gives `2F0`: stage 2, F, microbatch 0."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        """The action that `str` wrote; ValueError for anything else."""
        match = re.fullmatch(r"(\d+)([FB])(\d+)", text.strip(), re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is not a pipeline action: write stage, F or B, microbatch, for example 2F0")
        kind: Kind = "F" if match[2] == "F" else "B"
        return Action(kind, int(match[1]), int(match[3]))


@dataclass(frozen=True, slots=True, order=True)
class Transfer:
    """One message between two different pipeline ranks.

    Kind `F` carries the output of `src_stage` to the next stage, kind `B` the gradient of the input of `src_stage`
    to the stage before. `src` and `dst` are pipeline ranks.
    """

    kind: Kind
    src_stage: int
    dst_stage: int
    microbatch: int
    src: int
    dst: int

    @property
    def producer(self) -> Action:
        """The action on `src` whose result is sent."""
        return Action(self.kind, self.src_stage, self.microbatch)

    @property
    def consumer(self) -> Action:
        """The action on `dst` that waits for this message."""
        return Action(self.kind, self.dst_stage, self.microbatch)

    def __str__(self) -> str:
        return f"{self.producer}->{self.consumer} (rank {self.src} to {self.dst})"


def dependencies(action: Action, num_stages: int) -> tuple[Action, ...]:
    """The actions that must be complete before this one starts, in a model of `num_stages` stages.

    F needs F of the stage before; B needs B of the stage after and its own F (whose activations it consumes).
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return (Action("F", stage - 1, microbatch),) if stage > 0 else ()
    own = Action("F", stage, microbatch)
    return (own, Action("B", stage + 1, microbatch)) if stage + 1 < num_stages else (own,)


def consumer(action: Action, num_stages: int) -> Action | None:
    """The action that takes this one's result as its input; None at the end of the model in that direction."""
    stage = action.stage + 1 if action.kind == "F" else action.stage - 1
    return Action(action.kind, stage, action.microbatch) if 0 <= stage < num_stages else None
