"""Bytes of a rank by cause, and its traffic, by formula, before anything is built.

    parameters, gradients, optimizer    model states, which ZeRO divides (Rajbhandari et al., arXiv 1910.02054,
                                        section 5) and offload moves to the host (Ren et al., arXiv 2101.06840)
    activations                         planner/activations.py
    buffers                             buckets that are whole for a while: planner/transients.py

Counted as they are, padding included, so that a run's own measure agrees (tests/test_memory_measured.py). Not counted:
what NCCL and CUDA take for themselves, and what gloo copies on a CPU.

Letters: P parameters, N ranks that share shards, m microbatches of a step.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.config.numerics import NumericsConfig
from megallm.config.parallel import Offload, ParallelConfig
from megallm.model.counts import Recompute
from megallm.pipeline.generators import make_schedule
from megallm.pipeline.schedule import Schedule
from megallm.planner.activations import Activations, peak_activations
from megallm.planner.parameters import (
    Units,
    dense_bytes,
    layer_nf4_bytes,
    rank_buckets,
    rank_units,
    stage_layers,
    trained_names,
)
from megallm.planner.transients import most_whole_bytes

PARAMETER_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What one rank holds, in bytes, all the time."""

    parameters: Fraction
    gradients: Fraction
    optimizer: Fraction
    """Moments, and fp32 master weights of low-precision parameters."""

    @property
    def total(self) -> Fraction:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class CauseBytes:
    """Bytes in one memory by cause; None = not known."""

    parameters: int | None = 0
    gradients: int | None = 0
    optimizer: int | None = 0
    activations: int | None = 0
    """Between forward and backward, and what the computation works with."""
    buffers: int | None = 0
    """Buckets that are whole for a while."""

    @property
    def total(self) -> int:
        """The sum of what is known."""
        return sum(value for _, value in self.items() if value is not None)

    def items(self) -> list[tuple[str, int | None]]:
        """(cause, bytes) in order."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one rank will need."""

    pp_rank: int
    device: CauseBytes
    host: CauseBytes
    """Of the host's memory, with offload."""


@dataclass(frozen=True, kw_only=True)
class ElementBytes:
    """Bytes of one parameter's parts."""

    parameter: int
    gradient: int
    """Of the sum."""
    master: int
    """Of the wide copy that is updated; 0 = the parameter itself is."""
    moments: int


def element_bytes(numerics: NumericsConfig, *, optimizer: str = "adamw") -> ElementBytes:
    """The sizes that a precision and an optimizer mean; of Muon those of the parameters it leaves to AdamW."""
    parameter = PARAMETER_BYTES[numerics.precision]
    wide = max(parameter, 4)
    return ElementBytes(
        parameter=parameter,
        gradient=2 if numerics.grad_dtype == "bf16" else wide,
        master=wide if parameter < wide else 0,
        moments=wide if optimizer == "sgd" else 2 * wide,
    )


def effective_stage(zero: int, *, num_shards: int, offload: Offload = "none") -> int:
    """The stage that `zero` comes to: of one rank, whose shards are wholes, as far as it sends them to the host."""
    return zero if num_shards > 1 else min(zero, {"none": 1, "optimizer": 2, "optimizer+params": 3}[offload])


def state_bytes(
    num_parameters: int,
    *,
    zero: int,
    num_shards: int,
    parameter_bytes: int = 2,
    gradient_bytes: int = 4,
    optimizer_bytes: int = 12,
) -> StateBytes:
    """Model states of a rank with `num_parameters` (P) at a ZeRO stage over `num_shards` (N) ranks.

    The sizes are bytes a parameter: by default bf16 parameters, fp32 sums of gradients, fp32 masters and two moments.
    The paper's are 2, 2 and 12.
    """
    if zero not in (0, 1, 2, 3) or num_shards < 1:
        raise ValueError(f"zero {zero} over {num_shards} ranks: use stages 0 to 3 and at least one rank")

    def held(size: int, sharded_from: int) -> Fraction:
        return Fraction(size * num_parameters, num_shards if zero >= sharded_from else 1)

    return StateBytes(
        parameters=held(parameter_bytes, 3), gradients=held(gradient_bytes, 2), optimizer=held(optimizer_bytes, 1)
    )


def placed_states(
    num_parameters: int, *, zero: int, num_shards: int, offload: Offload = "none", sizes: ElementBytes
) -> tuple[StateBytes, StateBytes]:
    """Model states of a rank (on its device, on the host).

        offload            on the device                             on the host, as shards
        optimizer          parameters as without; gradients whole    gradient sums, moments, wide weights, and narrow
                           at stages 0 and 1, else none              ones that are sent back
        optimizer+params   gradients likewise                        parameters, gradient sums, moments, wide weights
    """
    stage = effective_stage(zero, num_shards=num_shards, offload=offload)
    whole = state_bytes(
        num_parameters, zero=stage, num_shards=num_shards, parameter_bytes=sizes.parameter,
        gradient_bytes=sizes.gradient, optimizer_bytes=sizes.master + sizes.moments,
    )  # fmt: skip
    nothing = Fraction(0)
    if offload == "none":
        return whole, StateBytes(parameters=nothing, gradients=nothing, optimizer=nothing)
    if offload == "optimizer+params" and zero != 3:
        raise ValueError(f"offload {offload} with zero {zero}: parameters leave the device at stage 3 only: use zero 3")
    shard = Fraction(num_parameters, num_shards if zero >= 1 else 1)
    keeps_parameters = offload == "optimizer"
    device = StateBytes(
        parameters=whole.parameters if keeps_parameters else nothing,
        gradients=whole.gradients if stage < 2 else nothing,
        optimizer=nothing,
    )
    wide = max(sizes.parameter, sizes.master)
    copies = sizes.parameter if keeps_parameters and sizes.master else 0
    host = StateBytes(
        parameters=nothing if keeps_parameters else sizes.parameter * shard,
        gradients=sizes.gradient * shard,
        optimizer=(sizes.moments + wide + copies) * shard,
    )
    return device, host


def predict_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    dp: int,
    micro_batch_size: int,
    seq_length: int,
    num_microbatches: int,
    numerics: NumericsConfig,
    optimizer: str = "adamw",
    recompute: Recompute = "none",
    lora: LoraConfig | None = None,
    device_type: str = "cuda",
    fused: Collection[str] = (),
    pp_rank: int | None = None,
) -> MemoryPlan:
    """What a rank will need in a step; `pp_rank` None = on the device what the pipeline rank needs that needs most of
    it, on the host what the one needs that needs most there.

    `fused`: operations that run on Triton (see `Activations`).
    `lora`: adapters; activations are then those of training everything, which is more, but for what dropout on their
    inputs keeps. Frozen weights in 4 bits are counted as such, and one of them dense on top of the activations.
    """
    schedule = make_schedule(
        parallel.schedule,
        pp=parallel.pp,
        virtual_stages=parallel.virtual_stages,
        # More of them repeat the same; gpipe holds them all.
        num_microbatches=num_microbatches if parallel.schedule == "gpipe" else min(num_microbatches, 4 * parallel.pp),
    )
    sizes = element_bytes(numerics, optimizer=optimizer)
    each = Activations(
        model=model,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        tp=parallel.tp,
        sequence_parallel=parallel.tp > 1 and parallel.sequence_parallel is not False,
        recompute=recompute,
        element_bytes=sizes.parameter,
        gradient_bytes=sizes.gradient,
        is_cpu=device_type == "cpu",
        fused=fused,
    )
    layers = stage_layers(model, parallel)
    plans = []
    for rank in range(parallel.pp) if pp_rank is None else (pp_rank,):
        device, host = _states_and_buffers(
            rank_units(model, parallel, pp_rank=rank, lora=lora), parallel, schedule, sizes, pp_rank=rank, dp=dp,
            is_muon=optimizer == "muon",
        )  # fmt: skip
        activations = peak_activations(each, schedule, layers, pp_rank=rank)
        activations += each.held_always(num_microbatches, num_stages=len(schedule.stages_of(rank)))
        in_4_bits = layer_nf4_bytes(model, lora, tp=parallel.tp) * sum(len(layers[s]) for s in schedule.stages_of(rank))
        if in_4_bits:
            activations += dense_bytes(
                model, tp=parallel.tp, element_bytes=sizes.parameter, is_fused="nf4" in fused
            )
            device = replace(device, parameters=(device.parameters or 0) + in_4_bits)
        plans.append(MemoryPlan(pp_rank=rank, device=replace(device, activations=activations), host=host))
    most_of_host = max(plans, key=lambda plan: plan.host.total)
    return replace(max(plans, key=lambda plan: plan.device.total), host=most_of_host.host)


def largest_model(
    device_bytes: float,
    host_bytes: float,
    *,
    zero: int,
    num_shards: int = 1,
    offload: Offload = "none",
    sizes: ElementBytes,
    layer_parameters: int = 0,
    ranks_per_host: int = 1,
) -> int:
    """Most parameters whose states fit a rank's device and its share of the host's memory; activations come on top.

    `layer_parameters`: of one layer, for what is whole for a while: three layers' gradients from stage 2 on, two
    layers' parameters at stage 3.
    """
    stage = effective_stage(zero, num_shards=num_shards, offload=offload)
    many = 10**12  # parameters: large enough for exact bytes of one
    device, host = placed_states(many, zero=zero, num_shards=num_shards, offload=offload, sizes=sizes)
    whole = (3 * sizes.gradient if stage >= 2 else 0) + (2 * sizes.parameter if stage == 3 else 0)
    room = device_bytes - whole * layer_parameters
    limits = [
        space * many / held.total for space, held in ((room, device), (host_bytes / ranks_per_host, host)) if held.total
    ]
    return max(int(min(limits)), 0)


def elements_sent(num_parameters: int, *, zero: int, num_shards: int, num_microbatches: int = 1) -> Fraction:
    """Elements one rank sends in a step for gradients and parameters, with ring algorithms; at stage 3 at most."""
    gathers = {0: 1, 1: 1, 2: 1, 3: 2 * num_microbatches}[zero]  # of the all-reduce of stage 0, half is a gather
    reductions = num_microbatches if zero >= 2 else 1
    return (gathers + reductions) * num_parameters * Fraction(num_shards - 1, num_shards)


def _states_and_buffers(
    units: Units, parallel: ParallelConfig, schedule: Schedule, sizes: ElementBytes, *, pp_rank: int, dp: int,
    is_muon: bool,
) -> tuple[CauseBytes, CauseBytes]:  # fmt: skip
    """(on the device, on the host), but for activations."""
    shard_size = parallel.zero_shard_size or dp
    num_shards = shard_size if parallel.zero else 1
    stage = effective_stage(parallel.zero, num_shards=shard_size, offload=parallel.offload)
    buckets = rank_buckets(units, bucket_size=parallel.bucket_size, num_shards=num_shards, by_unit=stage == 3)
    trained = trained_names(units)
    numel = {is_trained: 0 for is_trained in (True, False)}
    for bucket in buckets:
        numel[bucket.slots[0].name in trained] += bucket.numel
    device, host = placed_states(
        numel[True], zero=parallel.zero, num_shards=num_shards, offload=parallel.offload, sizes=sizes
    )  # fmt: skip
    frozen = sizes.parameter * numel[False] // (num_shards if stage == 3 else 1)
    is_frozen_away = parallel.offload == "optimizer+params"
    buffers = most_whole_bytes(
        units, buckets, schedule, pp_rank=pp_rank, zero=stage, zero_keep=parallel.zero_keep,
        parameter_bytes=sizes.parameter, gradient_bytes=sizes.gradient,
    )  # fmt: skip
    if stage >= 2 and parallel.offload != "none" and schedule.num_microbatches > 1:  # a sum comes back to be added to
        summed = [bucket.numel for bucket in buckets if bucket.slots[0].name in trained]
        buffers += sizes.gradient * max(summed, default=0) // num_shards
    saved = _saved_by_muon(units, sizes) // num_shards if is_muon else 0
    return (
        CauseBytes(
            parameters=int(device.parameters) + (0 if is_frozen_away else frozen),
            gradients=int(device.gradients),
            optimizer=int(device.optimizer) - saved,
            buffers=buffers,
        ),
        CauseBytes(
            parameters=int(host.parameters) + (frozen if is_frozen_away else 0),
            gradients=int(host.gradients),
            optimizer=int(host.optimizer),
        ),
    )


def _saved_by_muon(units: Units, sizes: ElementBytes) -> int:
    """Bytes of the second moments that its matrices, those of the layers, do without."""
    layers = [each for unit, needed in units.items() if unit.split(".")[1].isdigit() for each in needed]
    return sizes.moments // 2 * sum(each.numel for each in layers if len(each.shape) == 2)
