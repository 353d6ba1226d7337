"""A whole training step on one GPU: each contender in a process of its own, one at a time on the device.

The next contender is started while the last one measures, and imports what it needs; it waits for its turn before it
touches the GPU. A contender that takes too long is ended, and its row says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_parts.measure import log_line
from gpu_parts.rows import ROOT, JsonLines, row
from gpu_parts.supervise import Results, worker_environment

SHAPES: dict[str, dict[str, Any]] = {
    "train_1b": {"name": "Llama 1B", "hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv_heads": 8,
                 "vocab": 128256, "max_seq": 8192},
    "train_3b": {"name": "Llama 3B", "hidden": 3072, "intermediate": 8192, "layers": 28, "heads": 24, "kv_heads": 8,
                 "vocab": 128256, "max_seq": 8192},
}  # fmt: skip
"""Llama 3.2's shapes with an untied head."""
TINY = {"name": "tiny", "hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 101,
        "max_seq": 32}  # fmt: skip
CONTENDERS = ("megallm triton", "hf compile", "hf liger", "megallm torch")


def task_of(section: str, *, device: str, tiny: bool) -> dict[str, Any]:
    """What a train worker is told. 16384 tokens a step in two microbatches."""
    task: dict[str, Any] = {
        "section": section, "shape": SHAPES[section], "seqs": [4096, 8192], "tokens": 16384, "micro_tokens": 8192,
        "warmup": 2, "steps": 6, "device": device, "tiny": tiny,
    }  # fmt: skip
    if tiny:
        task |= {"shape": TINY, "seqs": [8], "tokens": 16, "micro_tokens": 8, "warmup": 0, "steps": 1}
    return task


def run_training(
    section: str, results: Results, folder: Path, *, device: str, tiny: bool, deadline: float, limit_s: float,
    contenders: Sequence[str] = CONTENDERS,
) -> None:  # fmt: skip
    """Rows of every contender that fits before `deadline` (of time.time)."""
    task = task_of(section, device=device, tiny=tiny)
    waiting: list[str] = []
    for contender in contenders:
        missing = [m for m in _modules(contender) if find_spec(m) is None]
        if missing:
            note = f"{missing[0]} is not installed"
            results.add(row(section=section, op="train_step", contender=contender, status="absent", note=note))
        else:
            waiting.append(contender)
    started = [_Contender(folder, task, waiting[0])] if waiting else []
    try:
        for index, contender in enumerate(waiting):
            if index + 1 < len(waiting):
                started.append(_Contender(folder, task, waiting[index + 1]))
            if time.time() > deadline:
                note = "no time left"
                results.add(row(section=section, op="train_step", contender=contender, status="skipped", note=note))
                continue
            started[index].measure(results, min(limit_s, max(deadline - time.time(), 1.0) + limit_s / 2))
    finally:
        for each in started:
            each.end()
    _compare_losses(section, results)


def _modules(contender: str) -> tuple[str, ...]:
    if not contender.startswith("hf"):
        return ()
    return ("transformers", "liger_kernel") if contender.endswith("liger") else ("transformers",)


class _Contender:
    """One process that waits for its turn."""

    def __init__(self, folder: Path, task: dict[str, Any], contender: str) -> None:
        self._folder, self._task, self._contender = folder, task, contender
        self._name = f"{task['section']}-{contender.replace(' ', '-')}"
        (folder / f"train-{self._name}.json").write_text(json.dumps(task))
        self._lines = JsonLines(folder / f"rows-train-{self._name}.jsonl")
        self._log = (folder / f"log-{self._name}.txt").open("w")
        command = [sys.executable, "-m", "gpu_parts.train_worker", "--folder", str(folder), "--name", self._name]
        self._process = subprocess.Popen(
            [*command, "--contender", contender], env=worker_environment(), cwd=ROOT, stdout=self._log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def measure(self, results: Results, limit_s: float) -> None:
        """Gives it the device and waits until it leaves, at most so long."""
        (self._folder / f"go-{self._name}").touch()
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = None
        rows = self._lines.new()
        for each in rows:
            print(log_line(each), flush=True)
        results.take(rows)
        if code == 0:
            return
        why = f"was ended after {limit_s:.0f} s" if code is None else f"ended with code {code}: {self._tail()}"
        status = "hung" if code is None else "crashed"
        common = {"section": self._task["section"], "op": "train_step", "case": self._task["shape"]["name"]}
        results.add(row(**common, contender=self._contender, status=status, note=why))

    def end(self) -> None:
        """No process stays."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _tail(self) -> str:
        self._log.flush()
        return (self._folder / f"log-{self._name}.txt").read_text(errors="replace")[-300:].strip()


def _compare_losses(section: str, results: Results) -> None:
    """The first losses of all contenders at a length must agree: same weights, same batch, bf16 arithmetic."""
    rows = [e for e in results.rows if e.get("section") == section and "loss" in e]
    for case in sorted({each["case"] for each in rows}):
        losses = {each["contender"]: each["loss"] for each in rows if each["case"] == case}
        if len(losses) < 2:
            continue
        spread = (max(losses.values()) - min(losses.values())) / max(abs(min(losses.values())), 1e-9)
        status = "ok" if spread <= 2e-3 else "failed"
        note = ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
        results.add(
            row(section="check", op="train_step", case=case, contender="first losses", status=status, error=spread,
                bound=2e-3, note=note)
        )  # fmt: skip
