"""The engine: a model on a mesh with its optimizer, and the verbs a trainer needs.

    engine = Engine(config, mesh)             build this rank's part, initialise or load
    engine.train_step(batch, loss_fn)         one optimizer step
    engine.forward(batch, fn)                 outputs of the last stage, no gradients
    engine.generate(...)  .save(dir)  .load(dir)

It needs no command line, no config file and no global; two engines (an actor and a critic) can share a process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from megallm.checkpoint import sharded
from megallm.checkpoint.peft import load_peft, save_peft
from megallm.checkpoint.sharded import TrainState
from megallm.config.check_lora import check_lora
from megallm.config.check_optim import check_optimizer_layout
from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.config.numerics import NumericsConfig, Precision
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig, ScheduleName
from megallm.data.tokenizer import Tokenizer
from megallm.generate.decode import Token
from megallm.generate.rollout import Limits, Rollout, rollout, stream
from megallm.generate.sampling import Sampling
from megallm.model.fp8 import check_fp8
from megallm.model.fused import check_backends
from megallm.model.transformer import Recompute, Transformer
from megallm.ops.backends import DEFAULT, Backends
from megallm.ops.fp8 import fp8_recipe
from megallm.optim.factory import make_optimizer
from megallm.optim.flat import FlatParameters, refill
from megallm.optim.gradients import Gradients
from megallm.optim.loss_scale import LossScale
from megallm.optim.merge import merge_adapters
from megallm.optim.optimizer import Optimizer
from megallm.optim.residency import Residency
from megallm.parallel.collectives import all_reduce_
from megallm.parallel.mesh import Mesh
from megallm.pipeline.generators import forward_only, make_schedule
from megallm.pipeline.partition import partition_layers
from megallm.pipeline.runtime import Microbatch, run_schedule
from megallm.pipeline.schedule import Schedule
from megallm.pipeline.validate import validate
from megallm.trainers.losses import Batch, LossFunction, count_labels
from megallm.trainers.step import StepResult, dropout_key, split_batch, train_step

DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16,
}  # fmt: skip
"""What weights and activations are kept in."""
GRAD_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


class Engine:
    """One model on one mesh."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        parallel: ParallelConfig | None = None,
        optim: OptimConfig | None = None,
        micro_batch_size: int = 1,
        precision: Precision | NumericsConfig = "fp32",
        recompute: Recompute = "none",
        seed: int = 1234,
        train: bool = True,
        neftune_alpha: float = 0.0,
        backends: Backends = DEFAULT,
        lora: LoraConfig | None = None,
    ) -> None:
        """Builds and initialises this rank's part. Of `parallel` only what the mesh does not say is used.

        precision: its name, or all about it; ValueError for fp8 without fp8 hardware, unless it is to be emulated.
        micro_batch_size: sequences a forward takes at once; `train=False` leaves out gradients and optimizer state.
        neftune_alpha: of the noise on the embeddings of training steps.
        backends: what the fused operations run on; ValueError if one is forced that cannot run here.
        lora: adapters, which train instead of the weights; None or rank 0 = none.
        ValueError if the optimizer does not exist, or cannot work on what `parallel` leaves a rank.
        """
        parallel = parallel if parallel is not None else ParallelConfig(tp=mesh.tp.size, pp=mesh.pp.size)
        numerics = NumericsConfig(precision=precision) if isinstance(precision, str) else precision
        dtype = DTYPES[numerics.precision]
        self.config, self.mesh, self.optim = config, mesh, optim if optim is not None else OptimConfig()
        self.lora = lora if lora is not None and lora.lora_rank else None
        if train:
            check_optimizer_layout(self.optim, parallel)
        if lora is not None:
            check_lora(
                lora, config, self.optim if train else None, tp=mesh.tp.size, precision=numerics.precision
            )
        self._tf32 = numerics.tf32
        check_backends(
            backends, config, tp=mesh.tp.size, device=mesh.device, dtype=dtype, offload=parallel.offload != "none",
            lora=self.lora,
        )  # fmt: skip
        fp8 = fp8_recipe(numerics)
        for warning in check_fp8(fp8, config, tp=mesh.tp.size, device=mesh.device):
            logging.getLogger("megallm.trainers").info(warning)
        self.micro_batch_size, self.seed, self._noise = micro_batch_size, seed, neftune_alpha
        self._virtual_stages, self._schedule_name = parallel.virtual_stages, parallel.schedule
        self.num_stages = mesh.pp.size * parallel.virtual_stages
        self.model = Transformer(
            config,
            mesh,
            partition=partition_layers(config.num_hidden_layers, self.num_stages, explicit=parallel.pipeline_partition),
            dtype=dtype,
            sequence_parallel=parallel.sequence_parallel,
            recompute=recompute,
            backends=backends,
            fp8=fp8,
            lora=self.lora,
            allocate=not (train or parallel.zero == 3),
        )
        self.flat: FlatParameters | None = None
        self._residency: Residency | None = None
        self.gradients: Gradients | None = None
        self.optimizer: Optimizer | None = None
        if train or parallel.zero == 3:
            self._fill_flat(parallel)
        else:
            self._initialize()
        if train:
            self._add_optimizer(numerics, backends)
        self.step = 0
        """Optimizer steps done."""

    def _fill_flat(self, parallel: ParallelConfig) -> None:
        self.flat = FlatParameters(
            self.model, bucket_size=parallel.bucket_size, zero=parallel.zero, offload=parallel.offload
        )
        self._initialize()
        self._residency = Residency(self.flat, keep=parallel.zero_keep)

    def _initialize(self) -> None:
        for names in refill(self.model, self.flat, anew=True):
            self.model.initialize(self.seed, names=names)

    def _add_optimizer(self, numerics: NumericsConfig, backends: Backends) -> None:
        assert self.flat is not None and self._residency is not None
        self.gradients = Gradients(self.flat, dtype=GRAD_DTYPES[numerics.grad_dtype])
        self.optimizer = make_optimizer(self.gradients, self._residency, self.optim, backends=backends)
        if numerics.precision == "fp16":
            self.optimizer.loss_scale = LossScale(numerics, self.mesh.device)

    @property
    def last_stage_rank(self) -> int:
        """The pipeline rank that has the model's output."""
        return (self.num_stages - 1) % self.mesh.pp.size

    def train_step(
        self,
        batch: Batch,
        loss_fn: LossFunction,
        *,
        learning_rate: float | None = None,
        count_fn: Callable[[Batch], torch.Tensor] = count_labels,
    ) -> StepResult:
        """One optimizer step on this data-parallel rank's batch: `input_ids` [B, S] int64 and what the loss reads.

        B is a multiple of micro_batch_size; the batch is the same on all tp and pp ranks. A collective.
        """
        if self.gradients is None or self.optimizer is None:
            raise ValueError("this engine was built with train=False: build it with train=True to train")
        if self.lora is not None and self.model.has_adapters_off:
            raise ValueError("train_step inside adapters_off, where nothing trains: leave that first")
        is_random = self.config.hidden_dropout > 0 or self.config.attention_dropout > 0 or self._noise > 0
        is_random |= self.lora is not None and self.lora.lora_dropout > 0
        with self._products():
            result = train_step(
                self.model,
                self.gradients,
                self.optimizer,
                batch,
                loss_fn,
                schedule=self._schedule(self._num_microbatches(batch)),
                count_fn=count_fn,
                learning_rate=self.optim.learning_rate if learning_rate is None else learning_rate,
                max_grad_norm=self.optim.max_grad_norm,
                dropout_key=dropout_key(self.seed, self.step) if is_random else None,
                noise=self._noise,
            )
        self.step += 1
        return result

    @torch.no_grad()
    def forward(self, batches: Batch | Sequence[Batch], fn: Callable[[Any, Batch], Any]) -> list[Any]:
        """`fn(output, microbatch)` for each microbatch, where `output` is the last stage's VocabLogits or values.

        One batch is cut into microbatches of micro_batch_size; several are taken as microbatches as they are, each
        [B, S] of its own. No gradients, no dropout. Results in order on the last pipeline rank, an empty list
        elsewhere. A collective over tp and pp, and over dp at ZeRO stage 3, where ranks may still bring different
        numbers of microbatches.
        """
        if isinstance(batches, dict):
            microbatches = split_batch(batches, self._num_microbatches(batches), mesh=self.mesh)
        else:
            parts = [split_batch(batch, 1, mesh=self.mesh)[0] for batch in batches]
            microbatches = [replace(part, index=index) for index, part in enumerate(parts)]
        num_own = len(microbatches)
        microbatches = [*microbatches, *self._fillers(num_own)]
        if not microbatches:
            return []

        def call(output: Any, microbatch: Microbatch) -> Any:
            return fn(output, microbatch.batch) if microbatch.index < num_own else None

        schedule = forward_only(self.mesh.pp.size, self._virtual_stages, len(microbatches))
        with self._products():
            return run_schedule(self.model, schedule, microbatches, call, train=False)[:num_own]

    def _fillers(self, num_own: int) -> list[Microbatch]:
        """Microbatches of zeros, so that all ranks that gather parameters together pass as often."""
        if self.flat is None or self.flat.zero < 3:
            return []
        most = torch.tensor(num_own, device=self.mesh.device)
        num_missing = int(all_reduce_(most, self.mesh.shard, op="max")) - num_own
        ids = torch.zeros(1, self.mesh.tp.size, dtype=torch.int64)
        empty = split_batch({"input_ids": ids}, 1, mesh=self.mesh)[0]
        return [replace(empty, index=num_own + i) for i in range(num_missing)]

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """New token ids of each prompt (all prompts on every rank), on every rank: `rollout` without the rest."""
        return self.rollout(prompts, max_new_tokens=max_new_tokens, sampling=sampling).token_ids

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | None = None,
        num_samples: int = 1,
        limits: Limits | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Rollout:
        """`num_samples` answers to each prompt (all prompts on every rank) with log-probabilities, on every rank. A
        collective.

        dp ranks share the prompts; a sample depends on (seed, prompt's place, sample's number), not on the layout nor
        on what is decoded with it. Whole parameters are held meanwhile, at ZeRO stage 3 too.
        max_new_tokens: of all, or of each prompt. tokenizer: for stop strings.
        """
        with self._generating():
            return rollout(
                self.model, prompts, max_new_tokens=max_new_tokens, sampling=sampling or Sampling(),
                num_samples=num_samples, limits=limits, tokenizer=tokenizer,
            )  # fmt: skip

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Generator[Token, None, None]:
        """The tokens of one answer as they come, on every rank; all ranks take as many. Each is a collective."""
        with self._generating():
            yield from stream(
                self.model, prompt, max_new_tokens=max_new_tokens, sampling=sampling or Sampling(), tokenizer=tokenizer
            )

    @contextmanager
    def _generating(self) -> Iterator[None]:
        with self._products(), nullcontext() if self._residency is None else self._residency.hold():
            yield

    def save(self, directory: str, *, consumed_samples: int = 0, tokens: int = 0, keep: int = 0) -> None:
        """Writes `directory`/step-N: weights, optimizer state, shape. A collective."""
        state = TrainState(step=self.step, consumed_samples=consumed_samples, tokens=tokens)
        sharded.save(directory, self.model, self.optimizer, state, flat=self.flat, keep=keep)

    def load(
        self, directory: str, *, weights_only: bool = False, new_head: bool = False, merge_adapters: bool = False
    ) -> TrainState:
        """Takes over the newest checkpoint in `directory`, saved at any layout; ValueError if none. A collective.

        new_head: the stored head is another, and is left out; with weights_only.
        merge_adapters: stored adapters become part of the weights, this engine's own stay new; with weights_only.
        """
        found = sharded.latest(directory)
        if found is None:
            raise ValueError(f"no complete checkpoint in {directory}")
        if self._residency is not None:
            self._residency.start_update()  # whole buckets that a forward left would be stale
        optimizer = None if weights_only else self.optimizer
        state = sharded.load(
            found, self.model, optimizer, flat=self.flat, new_head=new_head, merge_adapters=merge_adapters
        )  # fmt: skip
        if weights_only and self.optimizer is not None:
            self.optimizer.refresh_master()
        self.step = 0 if weights_only else state.step
        return state

    def save_adapters(self, directory: str, *, base_model: str | None = None) -> None:
        """Writes the adapters as a directory that peft loads (checkpoint/peft.py). A collective."""
        save_peft(directory, self.model, flat=self.flat, base_model=base_model)

    def load_adapters(self, directory: str) -> None:
        """Takes over the adapters of a peft directory; ValueError if they are of another base model or kind."""
        if self._residency is not None:
            self._residency.start_update()
        load_peft(directory, self.model, flat=self.flat)
        if self.optimizer is not None:
            self.optimizer.refresh_master()

    def merge_adapters(self) -> None:
        """Adds the adapters to the weights they stand beside, and lets them start anew, from B = 0. A collective.

        The model computes what it did, up to rounding: sums are made in fp32 and rounded once to the weights' dtype.
        Weights in 4 bits become dense ones, in the model's dtype, and stay so.
        """
        merge_adapters(self.model, self.flat)
        self.lora = self.model.lora
        if self.optimizer is not None:
            self.optimizer.refresh_master()

    @contextmanager
    def _products(self) -> Iterator[None]:
        """fp32 products inside are what this engine wants; other engines' are their own."""
        if self.mesh.device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self._tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _num_microbatches(self, batch: Batch) -> int:
        size = batch["input_ids"].size(0)
        if size % self.micro_batch_size:
            raise ValueError(
                f"a batch of {size} sequences is not a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return size // self.micro_batch_size

    def _schedule(self, num_microbatches: int) -> Schedule:
        return _validated(self._schedule_name, self.mesh.pp.size, self._virtual_stages, num_microbatches)


@lru_cache(maxsize=16)
def _validated(name: ScheduleName | None, pp: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    schedule = make_schedule(name, pp=pp, virtual_stages=virtual_stages, num_microbatches=num_microbatches)
    validate(schedule)
    return schedule
