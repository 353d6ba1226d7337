"""Numbers of an iteration of PPO or GRPO: where its time goes, what its updates say."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from megallm.optim.clip import GradientNorm
from megallm.trainers.step import StepResult

Metrics = dict[str, float]
PHASES = ("rollout", "score", "train")


class Timer:
    """Seconds of the phases."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds what is inside to the phase."""
        begin = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] += time.perf_counter() - begin

    def shares(self) -> Metrics:
        """Of their sum, 0 to 1."""
        total = sum(self.seconds.values()) or 1.0
        return {f"share_{name}": seconds / total for name, seconds in self.seconds.items()}


@dataclass(frozen=True, kw_only=True)
class IterationResult:
    """See loop.Result."""

    values: Metrics
    grad_norm: GradientNorm
    """That of the last update that changed something, of the last one if none did."""

    def metrics(self) -> Metrics:
        """See loop.Result."""
        return dict(self.values)


@dataclass
class Updates:
    """The optimizer steps of an iteration. Their numbers are read when they are first asked for, a collective, so that
    nothing waits for the device between two steps."""

    _unread: list[StepResult] = field(default_factory=list)
    _read: list[tuple[StepResult, Metrics]] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        """One more."""
        self._unread.append(result)

    @property
    def results(self) -> list[tuple[StepResult, Metrics]]:
        """With their metrics, in order."""
        self._read += [(result, result.metrics()) for result in self._unread]
        self._unread = []
        return self._read

    def approx_kl(self) -> float:
        """Of the last one, nats a token."""
        values = self.results[-1][1]
        return values["approx_kl"] / values["num_tokens"] if values["num_tokens"] else 0.0

    def norm(self) -> GradientNorm:
        """See IterationResult."""
        return (self._finite or [result for result, _ in self.results])[-1].grad_norm

    def mean(self, name: str) -> float:
        """Over the updates; those whose gradients were not finite changed nothing and do not count, if others did."""
        chosen = [v for _, v in self.results if math.isfinite(v["grad_norm"])] or [v for _, v in self.results]
        return sum(values[name] for values in chosen) / len(chosen)

    def overflows(self) -> Metrics:
        """What fp16 leaves: the loss scale of the last update; and how many changed nothing, if some did."""
        found = {name: self.results[-1][1][name] for name in ("loss_scale",) if name in self.results[-1][1]}
        skipped = len(self.results) - len(self._finite)
        return found | ({"skipped_updates": float(skipped)} if skipped else {})

    @property
    def _finite(self) -> list[StepResult]:
        return [result for result, values in self.results if math.isfinite(values["grad_norm"])]

    def total(self, name: str) -> float:
        """Over the updates."""
        return sum(values[name] for _, values in self.results)

    def per_token(self, name: str, *, of: str = "num_tokens") -> float:
        """A metric that the loss sums over tokens, over the tokens of all updates; nan without any."""
        counts = [max(values["count"], 1.0) for _, values in self.results]  # what train_step divided by
        total = sum(values.get(of, 0.0) * count for (_, values), count in zip(self.results, counts, strict=True))
        summed = sum(values.get(name, 0.0) * count for (_, values), count in zip(self.results, counts, strict=True))
        return summed / total if total else float("nan")

    def names(self) -> set[str]:
        """Of all metrics."""
        return {name for _, values in self.results for name in values}


def mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    """Over the mask; nan where it is empty."""
    return float(values[mask].double().mean()) if bool(mask.any()) else float("nan")
