"""Muon for the layers' matrices, AdamW for everything else (Jordan et al., kellerjordan.github.io/posts/muon; Liu et
al., arXiv 2502.16982, algorithm 1).

    matrices    m <- mu m + (1 - mu) g          u = (1 - mu) g + mu m, Nesterov's momentum
                p <- p - lr (wd p + 0.2 sqrt(max(rows, cols)) orthogonal(u))
    the rest    AdamW at the same rate: embeddings, head, norms, biases, positions

A matrix is one of Hugging Face's: q, k, v, gate and up are each orthogonalised by itself, however they are stored and
cut. Momentum and masters are flat shards, updated as AdamW's are; only u becomes whole matrices, each at one owner, and
only for a moment (matrices.py says what is sent). On GPUs u travels and is multiplied in bf16.

Bytes of state per element, beside the master's 4 (where there is one): 4 of a matrix, 8 of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megallm.config.optim import OptimConfig
from megallm.ops.adamw import FusedAdamW
from megallm.ops.backends import DEFAULT, Backends
from megallm.ops.muon import orthogonalize, step_scale, working_dtype
from megallm.optim.gradients import Gradients
from megallm.optim.layout import overlap
from megallm.optim.matrices import Matrix, MatrixExchange, find_matrices
from megallm.optim.optimizer import Optimizer, StatePart
from megallm.optim.residency import Residency

_BATCH_NUMEL = 2**25
"""Matrices of one shape are multiplied together, up to so many elements: beyond, one keeps a GPU busy."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What this rank's shards hold of one parameter."""

    name: str
    start: int
    stop: int
    """[start, stop) in the flat parameter."""
    is_decayed: bool
    master: torch.Tensor
    grad: torch.Tensor


class Muon(Optimizer):
    """Orthogonalised momentum for matrices, AdamW for the rest."""

    name = "muon"

    def __init__(
        self, gradients: Gradients, residency: Residency, config: OptimConfig, *, backends: Backends = DEFAULT
    ) -> None:
        """config.momentum is decided."""
        super().__init__(gradients, residency, config)
        assert config.momentum is not None and self._host is None
        flat, mesh = gradients.flat, gradients.flat.model.mesh
        shard = mesh.shard if gradients.is_sharded else replace(mesh.shard, size=1, rank=0, group=None)
        self._momentum = config.momentum
        self._matrices = find_matrices(flat, num_shards=shard.size)
        parts = self._parts(gradients)
        matrices = {m.parameter for m in self._matrices}
        self._of_matrices = [part for part in parts if part.name in matrices]
        self._others = [part for part in parts if part.name not in matrices]
        self.momentum = [torch.zeros_like(part.master) for part in self._of_matrices]
        self.exp_avg = [torch.zeros_like(part.master) for part in self._others]
        self.exp_avg_sq = [torch.zeros_like(part.master) for part in self._others]
        self._places = [_place(m, self._of_matrices) for m in self._matrices]
        """Of each matrix: the part that holds some of it, and where; None = no part does."""
        device = mesh.device
        empty = torch.empty(0, dtype=working_dtype(torch.empty(0, dtype=self._wide, device=device)), device=device)
        self._exchange = MatrixExchange(self._matrices, shard=shard, tp=mesh.tp, empty=empty)
        self._empty = empty
        self._step = torch.zeros((), device=device)
        self._adamw: FusedAdamW | None = None
        if self._others:
            self._adamw = FusedAdamW(
                [part.master for part in self._others], [part.grad for part in self._others], self.exp_avg,
                self.exp_avg_sq, [], decayed=[part.is_decayed for part in self._others], step=self._step,
                backend=backends.pick("adamw", self._others[0].master, 0),
            )  # fmt: skip

    @torch.no_grad()
    def step(self, *, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        """See Optimizer."""
        c = self._config
        self._residency.start_update()
        if self._matrices:
            self._step_matrices(learning_rate, grad_divisor, is_bad > 0)
        if self._adamw is None:
            self._step.add_(1 - is_bad)
        else:
            self._adamw.update_(
                learning_rate=learning_rate, grad_divisor=grad_divisor, is_bad=is_bad, beta1=c.beta1, beta2=c.beta2,
                eps=c.eps, weight_decay=c.weight_decay,
            )  # fmt: skip
        self.publish()

    def _step_matrices(self, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        updates = [
            self._nesterov(momentum, part.grad.to(momentum.dtype) / grad_divisor, is_bad)
            for momentum, part in zip(self.momentum, self._of_matrices, strict=True)
        ]
        parts = [self._empty if place is None else updates[place[0]][place[1]] for place in self._places]
        results = self._exchange.give_back(self._orthogonal(self._exchange.collect(parts), is_bad))
        decayed = [part.master for part in self._of_matrices if part.is_decayed]
        if decayed:
            torch._foreach_mul_(decayed, 1.0 - learning_rate * self._config.weight_decay * (~is_bad).to(self._wide))
        for matrix, place, result in zip(self._matrices, self._places, results, strict=True):
            if place is not None:
                rate = learning_rate * step_scale(*matrix.piece.shape)
                self._of_matrices[place[0]].master[place[1]].add_(result, alpha=-rate)

    def _nesterov(self, momentum: torch.Tensor, grad: torch.Tensor, is_bad: torch.Tensor) -> torch.Tensor:
        """u, as it travels; momentum is brought up to date, grad used up."""
        new = momentum.lerp(grad, 1 - self._momentum)
        momentum.copy_(torch.where(is_bad, momentum, new))
        return grad.lerp_(new, self._momentum).to(self._empty.dtype)

    def _orthogonal(self, wholes: list[torch.Tensor], is_bad: torch.Tensor) -> list[torch.Tensor]:
        """Of each; zeros where is_bad."""
        results = list(wholes)
        of_shape: dict[torch.Size, list[int]] = {}
        for i, whole in enumerate(wholes):
            of_shape.setdefault(whole.shape, []).append(i)
        for shape, indices in of_shape.items():
            count = max(1, _BATCH_NUMEL // shape.numel())
            for first in range(0, len(indices), count):
                batch = indices[first : first + count]
                done = orthogonalize(torch.stack([wholes[i] for i in batch])).masked_fill_(is_bad, 0.0)
                for i, result in zip(batch, done.unbind(), strict=True):
                    results[i] = result
        return results

    @property
    def num_steps(self) -> torch.Tensor:
        """0-d: updates done so far."""
        return self._step

    def set_num_steps(self, steps: float) -> None:
        """Sets the count that AdamW's bias correction uses."""
        self._step.fill_(steps)

    def state(self) -> dict[str, list[StatePart]]:
        """momentum of matrices, exp_avg and exp_avg_sq of the rest, masters where there are some."""
        found = {"momentum": _state(self._of_matrices, self.momentum)}
        found |= {"exp_avg": _state(self._others, self.exp_avg), "exp_avg_sq": _state(self._others, self.exp_avg_sq)}
        return found | super().state()

    def _parts(self, gradients: Gradients) -> list[_Part]:
        specs = gradients.flat.model.specs
        return [
            _Part(
                name=slot.name,
                start=start,
                stop=stop,
                is_decayed=specs[slot.name].weight_decay,
                master=master[at : at + stop - start],
                grad=grad[at : at + stop - start],
            )
            for flat, master, grad in zip(self._flats, self.master, self._grads, strict=True)
            for slot, start, stop, at in flat.parts()
        ]


def _place(matrix: Matrix, parts: list[_Part]) -> tuple[int, slice] | None:
    for i, part in enumerate(parts):
        start, stop = overlap((matrix.first, matrix.stop), (part.start, part.stop))
        if part.name == matrix.parameter and start < stop:
            return i, slice(start - part.start, stop - part.start)
    return None


def _state(parts: list[_Part], tensors: list[torch.Tensor]) -> list[StatePart]:
    return [StatePart(part.name, part.start, data) for part, data in zip(parts, tensors, strict=True)]
