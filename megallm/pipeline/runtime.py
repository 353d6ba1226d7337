"""Executes any schedule: one loop over slots; at the end of each slot it posts the messages that the schedule names.

    for slot:  action = grid[rank][slot]
               F: x = token ids | received | handed over    ->  out = stage(x)        keep (x, out)
               B: dout = 1 (loss) | received | handed over  ->  autograd from out     give x.grad upstream
               post all sends and receives of the slot

Memory: a stage's output is needed until it is sent; after that only its shape is, by autograd, so its storage is
freed ("pseudo-free", K22 section 4.2.2 counts on it). A received tensor lives until its backward.

Letters: B sequences, S positions, T = B * S tokens, H hidden; T' = T, or T/tp under sequence parallelism.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megallm.model.context import TokenContext
from megallm.model.transformer import Transformer
from megallm.parallel.p2p import Message, post
from megallm.pipeline.actions import Action, Transfer
from megallm.pipeline.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one pass through the pipeline works on; the same on every pipeline and tp rank."""

    index: int
    batch: dict[str, torch.Tensor]
    """`input_ids` [B, S] int64 and whatever the loss needs."""
    context: TokenContext


LastStage = Callable[[Any, Microbatch], Any]


def run_schedule(
    model: Transformer, schedule: Schedule, microbatches: Sequence[Microbatch], on_output: LastStage, *, train: bool
) -> list[Any]:
    """Runs all microbatches through this rank's stages.

    `on_output(output, microbatch)` is called with the last stage's output (VocabLogits or values). For training it
    returns the scalar to differentiate. Returns what it returned, in microbatch order (detached when training); an
    empty list on ranks without the last stage.
    """
    run = _Run(model, schedule, microbatches, on_output)
    rank = model.mesh.pp.rank
    with torch.set_grad_enabled(train):
        for slot, action in enumerate(schedule.grid[rank]):
            if action is not None:
                run.forward(action) if action.kind == "F" else run.backward(action)
            run.post(schedule.transfers(rank, slot), slot)
    run.drain()
    return [run.results[m.index] for m in microbatches if m.index in run.results]


class _Run:
    """The tensors in flight during one execution of a schedule."""

    def __init__(
        self, model: Transformer, schedule: Schedule, microbatches: Sequence[Microbatch], on_output: LastStage
    ) -> None:
        self._model, self._schedule, self._on_output = model, schedule, on_output
        self._microbatches = microbatches
        self._held: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = {}
        """(stage, microbatch) -> (input leaf, output) between forward and backward."""
        self._inbox: dict[Action, tuple[torch.Tensor, Any]] = {}
        """What an action of this rank will consume, and the receive to wait for (None: handed over)."""
        self._outbox: dict[Action, torch.Tensor] = {}
        self._sends: deque[tuple[int, Any, torch.Tensor, bool]] = deque()
        self.results: dict[int, Any] = {}

    def forward(self, action: Action) -> None:
        """One stage, one microbatch."""
        microbatch = self._microbatches[action.microbatch]
        stage = self._model.stage(action.stage)
        x: torch.Tensor | None = None
        if stage.is_first:
            out = stage(microbatch.batch["input_ids"].reshape(-1), microbatch.context)
        else:
            x = self._take(action)
            if torch.is_grad_enabled():
                x.requires_grad_()
            out = stage(x, microbatch.context)
        if stage.is_last:
            out = self._on_output(out, microbatch)
            self.results[microbatch.index] = out.detach() if torch.is_grad_enabled() else out
        else:
            self._give(action, out.detach())
        if torch.is_grad_enabled():
            self._held[action.stage, action.microbatch] = (x, out)

    def backward(self, action: Action) -> None:
        """The gradients of one stage, one microbatch; a first stage of a frozen embedding alone has none."""
        x, out = self._held.pop((action.stage, action.microbatch))
        grad = None if self._model.stage(action.stage).is_last else self._take(action)
        if x is not None or out.requires_grad or self._model.stage(action.stage).is_last:
            torch.autograd.backward(out, grad)
        if x is not None:
            assert x.grad is not None
            self._give(action, x.grad)

    def post(self, transfers: tuple[Transfer, ...], slot: int) -> None:
        """Starts the slot's messages, and lets go of sends of earlier slots."""
        rank, messages, received = self._model.mesh.pp.rank, [], []
        for transfer in transfers:
            is_send = transfer.src == rank
            if is_send:
                tensor = self._outbox.pop(transfer.producer)
            else:
                tensor = self._empty(transfer.microbatch)
                received.append((transfer.consumer, tensor))
            peer = transfer.dst if is_send else transfer.src
            messages.append(Message(tensor, peer, is_send, _tag(transfer, self._schedule)))
        works = post(messages, self._model.mesh.pp)
        self._inbox.update({c: (t, w) for (c, t), (m, w) in zip(received, _only(messages, works, False), strict=True)})
        self._sends.extend((slot, w, m.tensor, m.tag % 2 == 0) for m, w in _only(messages, works, True))
        while self._sends and self._sends[0][0] < slot - 1:
            self._release()

    def drain(self) -> None:
        """Waits for what is still being sent."""
        while self._sends:
            self._release()

    def _release(self) -> None:
        _, work, tensor, is_activation = self._sends.popleft()
        work.wait()
        if is_activation:
            tensor.untyped_storage().resize_(0)

    def _give(self, action: Action, tensor: torch.Tensor) -> None:
        taker = self._schedule.consumer(action)
        assert taker is not None
        if self._schedule.stage_to_rank[taker.stage] == self._model.mesh.pp.rank:
            self._inbox[taker] = (tensor, None)
        else:
            self._outbox[action] = tensor.contiguous()

    def _take(self, action: Action) -> torch.Tensor:
        tensor, work = self._inbox.pop(action)
        if work is not None:
            work.wait()
        return tensor

    def _empty(self, microbatch: int) -> torch.Tensor:
        """Room for hidden states [T', H] of a microbatch, or their gradient."""
        model, context = self._model, self._microbatches[microbatch].context
        tokens = context.batch_size * context.seq_length
        if model.sequence_parallel:
            tokens //= model.mesh.tp.size
        return torch.empty(tokens, model.config.hidden_size, dtype=model.dtype, device=model.mesh.device)


def _only(messages: list[Message], works: list[Any], is_send: bool) -> list[tuple[Message, Any]]:
    return [(m, w) for m, w in zip(messages, works, strict=True) if m.is_send == is_send]


def _tag(transfer: Transfer, schedule: Schedule) -> int:
    """A number no other message of the run has; even for activations. Used by gloo only."""
    place = transfer.microbatch * schedule.num_stages + transfer.src_stage
    return 2 * place + (transfer.kind == "B")
