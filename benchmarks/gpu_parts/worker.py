"""A process that works through a list of units (checks, or contenders on cases) and writes rows as it goes.

    folder/plan.json           what to do, what to leave out, what is known so far
    folder/rows-NAME.jsonl     rows, and {"done": key} after each unit
    folder/current-NAME.json   the unit under way, so that the driver knows what a crash or a hang belongs to
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_parts import launches
from gpu_parts.calls import OURS, Buffers, Case, CompileBudget
from gpu_parts.ceilings import measure_ceilings
from gpu_parts.checks import CheckUnit, check_units
from gpu_parts.clock import Clock
from gpu_parts.decode import ATTENTIONS, measure_decode
from gpu_parts.measure import DeviceLost, check_device, log_line, measure_contender
from gpu_parts.place import Place, make_place
from gpu_parts.rows import JsonLines, Row, row

LOST = 99
"""Exit code of a worker whose CUDA context died; the driver starts another for the rest."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One thing to do."""

    key: str
    section: str
    run: Callable[[], list[Row]]


def op_sections() -> dict[str, Callable[[Place], list[Case]]]:
    """Section -> its cases, the most important sections first."""
    from gpu_parts import cases_attention, cases_losses, cases_moe, cases_pointwise, cases_update

    return {
        "rms_norm": lambda p: cases_pointwise.norm_cases(p, section="rms_norm", centered=False),
        "rope": cases_pointwise.rope_cases,
        "activation": lambda p: cases_pointwise.activation_cases(p, section="activation", kinds=("silu",)),
        "attention": lambda p: cases_attention.attention_cases(p, section="attention", dims=(128,), variants=False),
        "cross_entropy": cases_losses.cross_entropy_cases,
        "adamw": cases_update.adamw_cases,
        "linear_cross_entropy": cases_losses.linear_cases,
        "attention_more": lambda p: cases_attention.attention_cases(
            p, section="attention_more", dims=(64, 256), variants=True
        ),
        "moe": cases_moe.moe_cases,
        "layer_norm": lambda p: cases_pointwise.norm_cases(p, section="layer_norm", centered=True),
        "geglu": lambda p: cases_pointwise.activation_cases(p, section="geglu", kinds=("gelu_tanh", "gelu")),
    }


class Worker:
    """One run over the units of a plan."""

    def __init__(self, place: Place, plan: dict[str, Any], folder: Path, name: str, *, echo: bool = True) -> None:
        self._place, self._plan, self._echo = place, plan, echo
        self._lines = JsonLines(folder / f"rows-{name}.jsonl")
        self._current = folder / f"current-{name}.json"
        self._clock = Clock(place, seconds=0.08)
        self._budget = CompileBudget(plan["compile_budget_s"])
        self._sets: list[Buffers] = []
        self._case_key = ""

    def run(self, shard: tuple[int, int] = (0, 1)) -> None:
        """All units of the plan's sections that are not yet done; with a shard (i, n), every n-th of them."""
        done = set(self._plan["done"])
        self._lines.add({"device": {"arch": self._place.arch, "num_sms": self._place.num_sms}})
        for name, why in launches.import_kernels().items():
            if shard[0] == 0:
                self._add(row(section="check", op=name, case="import", status="error", contender=OURS, note=why))
        late: set[str] = set()
        for index, unit in enumerate(self._units()):
            if index % shard[1] != shard[0] or unit.key in done:
                continue
            if time.time() > self._plan["deadlines"][unit.section]:
                if unit.section not in late:
                    late.add(unit.section)
                    note = f"the section's time is used up before {unit.key} and what follows it"
                    self._add(row(section=unit.section, status="skipped", note=note))
                continue
            self._current.write_text(json.dumps({"key": unit.key, "since": time.time()}))
            rows = unit.run()
            for each in rows:
                self._add(each)
            self._lines.add({"done": unit.key})
            if any(each["status"] == "error" for each in rows):
                check_device(self._place)
        self._current.unlink(missing_ok=True)

    def _add(self, each: Row) -> None:
        self._lines.add(each)
        if self._echo:
            print(log_line(each), flush=True)

    def _units(self) -> Iterator[Unit]:
        for section in self._plan["sections"]:
            if section == "ceilings":
                yield Unit(key="ceilings", section=section, run=self._ceilings)
            elif section == "check":
                for check in check_units(self._place):
                    yield Unit(key=check.key, section=section, run=partial(self._check, check))
            elif section == "decode":
                for attention in ATTENTIONS:
                    key = f"decode/{attention}"
                    if self._plan["only"] in key:
                        yield Unit(key=key, section=section, run=partial(self._decode, attention))
            else:
                for case in op_sections()[section](self._place):
                    if self._plan["only"] in case.key:
                        for i, contender in enumerate(case.contenders):
                            run = partial(self._contender, case, i)
                            yield Unit(key=f"{case.key}/{contender.name}", section=section, run=run)

    def _ceilings(self) -> list[Row]:
        rows = measure_ceilings(self._place, self._clock)
        names = ("gb_per_s", "tflop_per_s")
        self._plan["ceilings"] = {name: each[name] for each in rows for name in names if name in each}
        self._release()
        return rows

    def _decode(self, attention: str) -> list[Row]:
        self._release()
        rows = measure_decode(self._place, attention)
        self._release()
        return rows

    def _check(self, unit: CheckUnit) -> list[Row]:
        """One row: the finding nearest to its bound, or the first bad ones in the note."""
        place = self._place
        common = {"section": "check", "op": unit.op, "case": unit.name, "contender": OURS, "dtype": place.dtype_name}
        common |= {"contender": unit.backend}
        with launches.recorded() as used:
            used |= {f"{unit.backend}: {unit.op}"} if unit.backend != OURS else set()
            try:
                findings = unit.run(place, place.generator(unit.key))
                place.synchronize()
            except Exception as error:
                note = traceback.format_exception_only(error)[-1].strip()[:400]
                return [row(**common, status="error", note=note, settings=sorted(used))]
        bad = [each for each in findings if not each.is_good]
        worst = max(bad or findings, key=lambda each: each.error / each.bound if each.bound else each.error)
        note = "; ".join(f"{each.what} {each.error:.2e} > {each.bound:.2e}" for each in bad[:4])
        note = note or f"worst: {worst.what}"
        status = "failed" if bad else "ok"
        largest = worst.error if math.isfinite(worst.error) else 1e30
        return [row(**common, status=status, error=largest, bound=worst.bound, note=note, settings=sorted(used))]

    def _contender(self, case: Case, index: int) -> list[Row]:
        """Buffers are kept while the case stays the same."""
        if self._case_key != case.key or case.mutates:
            self._release()
            try:
                self._sets = case.make(self._place, self._place.generator(case.key), case.num_sets(self._place))
            except Exception as error:  # a kernel file that the buffers need, or memory
                note = f"buffers: {type(error).__name__}: {error}"
                common = {"section": case.section, "op": case.op, "case": case.name, "contender": OURS}
                return [row(**common, status="error", note=note)]
            self._case_key = case.key
        return measure_contender(
            case, case.contenders[index], self._sets, self._place, self._clock, ceilings=self._plan["ceilings"],
            condemned=self._plan["condemned"], budget=self._budget,
        )  # fmt: skip

    def _release(self) -> None:
        self._sets, self._case_key = [], ""
        gc.collect()
        if self._place.is_cuda:
            torch.cuda.empty_cache()


def run_worker(folder: Path, name: str, *, shard: tuple[int, int] = (0, 1), echo: bool = True) -> int:
    """Works through folder/plan.json; the exit code."""
    plan = json.loads((folder / "plan.json").read_text())
    place = make_place(plan["device"], tiny=plan["tiny"], seed=plan["seed"])
    warnings.filterwarnings("ignore")
    try:
        Worker(place, plan, folder, name, echo=echo).run(shard)
    except DeviceLost as error:
        print(f"the CUDA context is lost: {str(error)[:300]}", flush=True)
        return LOST
    return 0


def main() -> int:
    """--folder, --name, --shard i/n."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--shard", default="0/1")
    args = parser.parse_args()
    index, _, count = args.shard.partition("/")
    return run_worker(args.folder, args.name, shard=(int(index), int(count)))


if __name__ == "__main__":
    sys.exit(main())
