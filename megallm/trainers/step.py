"""One optimizer step, the same for every trainer: what differs is the batch and the loss.

    split the rank's batch into microbatches            data
    count the tokens of the step over all ranks         one number, so that gradients are only ever summed
    run the schedule: forwards and backwards            gradients of full buckets are reduced meanwhile
    finish the reductions, take the global norm
    clip and update                                     one pass over flat memory
Nothing waits for the device; `StepResult.metrics()` does, when somebody wants to see numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megallm.model.context import Dropout, TokenContext
from megallm.model.transformer import Transformer
from megallm.ops.documents import Documents
from megallm.optim.clip import GradientNorm, clip_divisor, global_norm
from megallm.optim.gradients import Gradients
from megallm.optim.optimizer import Optimizer
from megallm.parallel import random
from megallm.parallel.collectives import all_reduce_, broadcast_text
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Mesh
from megallm.pipeline.runtime import Microbatch, run_schedule
from megallm.pipeline.schedule import Schedule
from megallm.trainers.losses import Batch, LossFunction, count_tokens
from megallm.trainers.rows import lay_end_to_end

_WIDTH = 8
"""Rows end to end are filled up to a multiple of this (times tp)."""
_OUTPUTS, _WORTH_IT = 16, 0.9
"""Tokens that have outputs are a multiple of the first, which fp8's products need; all, if more than this share."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, on the device."""

    loss_sum: torch.Tensor
    """0-d: the loss sums of this rank's microbatches, divided by the step's count; 0 without the last stage."""
    sums: dict[str, torch.Tensor]
    """0-d sums of the loss function's own metrics, likewise divided."""
    count: torch.Tensor
    """0-d: what the loss is a mean over, of the step over all ranks: trained tokens, or prompts."""
    num_tokens: torch.Tensor
    """0-d: tokens that the model read, over all ranks; padding that `lengths` tells is none."""
    grad_norm: GradientNorm
    """Global gradient norm before clipping."""
    clip_coefficient: torch.Tensor
    """0-d: what gradients were multiplied by, 1 where they were not clipped."""
    loss_scale: torch.Tensor | None
    """0-d: what the losses were multiplied by; of fp16 runs."""
    mesh: Mesh
    last_stage_rank: int
    """Pipeline rank of the last stage."""

    def metrics(self) -> dict[str, float]:
        """`loss`, `grad_norm`, `count`, `tokens` and the loss's own, of the whole job. A collective, and waits."""
        # Only the last stage saw the loss function's metrics: the others learn their names from it.
        own = "\n".join(["loss", *sorted(self.sums)])
        names = broadcast_text(own, self.mesh.pp, self.mesh.device, src=self.last_stage_rank).split("\n")
        sums = {"loss": self.loss_sum} | self.sums
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        values = torch.stack([sums[n].double() if n in sums else zero for n in names])
        values = all_reduce_(all_reduce_(values, self.mesh.dp), self.mesh.pp)
        result = dict(zip(names, values.tolist(), strict=True))
        result |= {"grad_norm": float(self.grad_norm.value), "clip_coefficient": float(self.clip_coefficient)}
        result |= {"count": float(self.count), "tokens": float(self.num_tokens)}
        return result if self.loss_scale is None else result | {"loss_scale": float(self.loss_scale)}


def train_step(
    model: Transformer,
    gradients: Gradients,
    optimizer: Optimizer,
    batch: Batch,
    loss_fn: LossFunction,
    *,
    schedule: Schedule,
    count_fn: Callable[[Batch], torch.Tensor],
    learning_rate: float,
    max_grad_norm: float,
    dropout_key: int | None = None,
    noise: float = 0.0,
) -> StepResult:
    """One step on this data-parallel rank's `batch` (tensors [B, ...], the same on its tp and pp ranks)."""
    mesh = model.mesh
    microbatches = split_batch(batch, schedule.num_microbatches, mesh=mesh, dropout_key=dropout_key, noise=noise)
    count, num_tokens = all_reduce_(torch.stack([count_fn(batch), count_tokens(batch)]).to(mesh.device), mesh.dp)
    scale = 1.0 / count.clamp(min=1).to(torch.float64 if model.dtype == torch.float64 else torch.float32)
    loss_scale = None if optimizer.loss_scale is None else optimizer.loss_scale.value.clone()
    backward_scale = scale if loss_scale is None else scale * loss_scale
    sums: dict[str, torch.Tensor] = {}

    def scaled_loss(output: Any, microbatch: Microbatch) -> torch.Tensor:
        if isinstance(output, VocabLogits):
            output.expected_scale = backward_scale
        loss_sum, _, metrics = loss_fn(output, microbatch.batch)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value.detach() * scale
        return loss_sum * backward_scale

    gradients.start(len(microbatches))
    losses = run_schedule(model, schedule, microbatches, scaled_loss, train=True)
    gradients.finish()
    norm = global_norm(gradients.counted(), mesh, is_sharded=gradients.is_sharded)
    is_bad = 1.0 - torch.isfinite(norm.value).float()
    if loss_scale is not None:
        norm = replace(norm, value=norm.value / loss_scale)
    divisor = clip_divisor(norm.value, max_grad_norm)
    optimizer.step(
        learning_rate=learning_rate,
        grad_divisor=divisor if loss_scale is None else divisor * loss_scale,
        is_bad=is_bad,
    )
    if optimizer.loss_scale is not None:
        optimizer.loss_scale.update_(is_bad)
    loss_sum = torch.stack(losses).sum() if losses else torch.zeros((), device=mesh.device)
    return StepResult(
        loss_sum=loss_sum if loss_scale is None else loss_sum / loss_scale,
        sums=sums,
        count=count,
        num_tokens=num_tokens,
        grad_norm=norm,
        clip_coefficient=1.0 / divisor,
        loss_scale=loss_scale,
        mesh=mesh,
        last_stage_rank=schedule.stage_to_rank[-1],
    )


def split_batch(
    batch: Batch, num_microbatches: int, *, mesh: Mesh, dropout_key: int | None = None, noise: float = 0.0
) -> Sequence[Microbatch]:
    """The rank's batch as equal microbatches on the mesh's device, in order.

    `document_ids` [B, S], on the CPU, of packed sequences: runs of equal numbers attend to themselves alone.
    `lengths` [B]: rows end there, and are laid end to end (rows.py); not with dropout, whose masks must not depend on
    the rows beside.
    `output_mask` [B, S] bool, on the CPU: the tokens whose outputs the loss reads; the others' may be anything.
    """
    size = batch["input_ids"].size(0)
    if size % num_microbatches:
        raise ValueError(f"a batch of {size} sequences does not split into {num_microbatches} equal microbatches")
    if "sample_ids" not in batch:
        batch = batch | {"sample_ids": mesh.dp.rank * size + torch.arange(size)}
    parts = {name: tensor.chunk(num_microbatches) for name, tensor in batch.items()}
    microbatches = []
    for index in range(num_microbatches):
        part, documents = {name: chunks[index] for name, chunks in parts.items()}, None
        if "document_ids" in part:
            documents = Documents.of(part.pop("document_ids"))
        elif "lengths" in part and dropout_key is None:
            part, documents = lay_end_to_end(part, _WIDTH * mesh.tp.size)
        outputs = _places(part.pop("output_mask")) if "output_mask" in part else None
        part = {name: tensor.to(mesh.device, non_blocking=True) for name, tensor in part.items()}
        batch_size, seq_length = part["input_ids"].shape
        positions = part.get("position_ids")
        context = TokenContext(
            batch_size=batch_size,
            seq_length=seq_length,
            position_ids=None if positions is None else positions.reshape(-1),
            documents=None if documents is None else documents.to(mesh.device),
            outputs=None if outputs is None else outputs.to(mesh.device),
            dropout=None
            if dropout_key is None
            else Dropout(key=dropout_key, sample_ids=part["sample_ids"], noise=noise),
        )
        microbatches.append(Microbatch(index=index, batch=part, context=context))
    return microbatches


def _places(mask: torch.Tensor) -> torch.Tensor | None:
    """[n]: where the mask [B, S] is set, and others, up to a multiple of _OUTPUTS; None where that leaves few out."""
    flat = mask.flatten().clone()
    number = int(flat.sum())
    wanted = -(-max(1, number) // _OUTPUTS) * _OUTPUTS
    flat[(~flat).nonzero()[: wanted - number, 0]] = True
    found = flat.nonzero().squeeze(1)
    return found if len(found) <= _WORTH_IT * len(flat) else None


def dropout_key(seed: int, step: int) -> int:
    """The key of all dropout masks of one step."""
    return random.key(seed, "dropout", step)
