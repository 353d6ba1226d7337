"""Direct preference optimisation: chosen and rejected responses in one forward, against the model before training.

The reference's log-probabilities depend on nothing that is trained: `precomputed`, they cost one pass over the data and
its weights are gone before the first step; `live`, a second model without gradients has them for every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch

from megallm.config.check_finetune import check_dpo
from megallm.config.finetune import DpoConfig
from megallm.data.finetune import PairDataset
from megallm.data.loader import BatchLoader, ValidationLoader
from megallm.parallel.collectives import all_reduce_
from megallm.runtime.environment import LaunchInfo
from megallm.runtime.logging import Log
from megallm.trainers.engine import Engine
from megallm.trainers.evaluate import validation_metrics
from megallm.trainers.finetune import FinetunePlan, batches, plan_comparisons, valid_batches
from megallm.trainers.job import run_job
from megallm.trainers.losses import Batch
from megallm.trainers.preference_losses import DpoLoss, count_prompts, response_logprobs


def plan(
    run: DpoConfig, *, world_size: int, device: torch.device, local_world_size: int = 1
) -> FinetunePlan[PairDataset]:
    """The checked run. ValueError or FileNotFoundError, in one message, for everything a user can get wrong."""
    check_dpo(run.dpo)
    return plan_comparisons(
        run, head="lm", only_pairs=True, world_size=world_size, local_world_size=local_world_size, device=device
    )


def train(plan: FinetunePlan[PairDataset], info: LaunchInfo, device: torch.device) -> Engine:
    """Trains as planned; leaves checkpoints, metrics and a plot in the save directory. A collective of the job."""
    run = plan.job.run
    assert isinstance(run, DpoConfig)
    options = run.dpo
    loss_fn = DpoLoss(
        kind=options.dpo_loss, beta=options.beta, label_smoothing=options.label_smoothing,
        reference_free=options.reference == "none", length_normalised=not options.ipo_sums,
    )  # fmt: skip
    reference: list[Engine] = []

    def loader(engine: Engine) -> _Referenced | BatchLoader:
        inner = batches(plan, engine)
        if options.reference == "none":
            return inner
        reference.append(reference_engine(plan, engine))
        if options.reference == "live":
            return _Referenced(inner, lambda batch: reference_logprobs(reference[0], batch))
        Log(info.rank).info("the reference's log-probabilities: one pass over the training data")
        table = precompute(reference[0], plan.data.train, batch_size=run.train.global_batch_size)
        return _Referenced(inner, lambda batch: look_up(table, plan.data.train, batch))

    def validate(engine: Engine) -> Callable[[], dict[str, float]] | None:
        held_out = valid_batches(plan, engine)
        known: Iterable[Batch] | None = held_out
        if held_out is not None and reference:
            known = [batch | {"ref_logprobs": reference_logprobs(reference[0], batch)} for batch in held_out]
        if options.reference == "precomputed":
            reference.clear()  # its weights go
        return None if known is None else lambda: validation_metrics(engine, known, loss_fn)

    return run_job(
        plan.job, info, device, loader=loader, loss_fn=loss_fn, validate=validate, count_fn=count_prompts
    )


def reference_engine(plan: FinetunePlan[PairDataset], engine: Engine) -> Engine:
    """The model before training on the policy's ranks, without gradients. A collective.

    With adapters it is the policy itself, whose weights are frozen.
    """
    if engine.lora is not None:
        return engine
    run = plan.job.run
    parallel = replace(run.parallel, offload="none", zero=3 if run.parallel.zero == 3 else 0)
    reference = Engine(
        plan.job.config, engine.mesh, parallel=parallel, micro_batch_size=engine.micro_batch_size,
        precision=run.numerics, seed=run.train.seed, train=False,
    )  # fmt: skip
    plan.job.source.load_weights(reference)
    return reference


def reference_logprobs(reference: Engine, batch: Batch) -> torch.Tensor:
    """[B] fp32 (fp64 of an fp64 model): of each response under the reference; 0 on ranks without the last stage."""
    with reference.model.adapters_off() if reference.lora is not None else nullcontext():
        found = reference.forward(batch, response_logprobs)
    if found:
        return torch.cat(found)
    dtype = torch.float64 if reference.model.dtype == torch.float64 else torch.float32
    return torch.zeros(batch["input_ids"].size(0), dtype=dtype, device=reference.mesh.device)


def precompute(reference: Engine, dataset: PairDataset, *, batch_size: int) -> torch.Tensor:
    """[groups, rows of a group], on the CPU: the log-probabilities of every response, on all ranks. A collective."""
    mesh, rows = reference.mesh, dataset.rows_per_sample
    every = ValidationLoader(
        dataset.unshuffled(), num_sequences=dataset.num_samples, batch_size=batch_size, dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
    )  # fmt: skip
    table: torch.Tensor | None = None
    for batch in every:
        found = reference_logprobs(reference, batch)
        if table is None:
            table = torch.zeros(dataset.num_samples, rows, dtype=found.dtype, device=mesh.device)
        groups = batch["sample_ids"][::rows].to(mesh.device)
        table[groups[groups >= 0]] = found.view(-1, rows)[groups >= 0]
    assert table is not None
    return all_reduce_(all_reduce_(table, mesh.dp), mesh.pp).cpu()


def look_up(table: torch.Tensor, dataset: PairDataset, batch: Batch) -> torch.Tensor:
    """[B]: the rows of `precompute`'s table for a training batch."""
    samples = batch["sample_ids"][:: dataset.rows_per_sample].tolist()
    groups = torch.tensor([dataset.member(sample) for sample in samples])
    return table[groups].view(-1)


class _Referenced:
    """Batches with the reference's log-probabilities."""

    def __init__(self, loader: BatchLoader, logprobs: Callable[[Batch], torch.Tensor]) -> None:
        self._loader, self._logprobs = loader, logprobs

    def batch(self, consumed_samples: int) -> Batch:
        """This dp rank's part of the batch."""
        batch = self._loader.batch(consumed_samples)
        return batch | {"ref_logprobs": self._logprobs(batch)}

    def close(self) -> None:
        """Ends the prefetch."""
        self._loader.close()
