"""Every rule that ties fields together, checked before any process group exists.

Pure functions of configs and the world size. A broken rule raises ValueError with the values, the rule and the way out;
what is legal but probably not meant comes back as a list of warnings.

    check_run        everything below, for one run
    check_model      a model's shape by itself
    check_layout     model x parallel x world size
    check_batch      batch sizes x data parallelism x schedule
    check_train, check_numerics, check_optim, check_data, check_checkpoint    one section each
    check_optimizer_layout    optimizer x parallel

Letters: N query heads, K key/value heads.
"""

from __future__ import annotations

from megallm.config.backends import parse_backends
from megallm.config.check_optim import check_numerics, check_offload, check_optim, check_optimizer_layout
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.data import DataConfig
from megallm.config.model import ModelConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.resolve import resolve_parallel
from megallm.config.rules import (
    divisors,
    either,
    fraction,
    is_positive_number,
    nearest_multiples,
    not_negative,
    positive,
)
from megallm.config.run import JobConfig, RunConfig
from megallm.config.train import TrainConfig


def check_run(run: JobConfig, model: ModelConfig, world_size: int) -> list[str]:
    """Warnings about `run` of `model` on `world_size` ranks; ValueError for the first broken rule."""
    parse_backends(run.backend)
    check_train(run.train)
    check_numerics(run.numerics)
    check_optim(run.optim, total_steps=run.train.steps)
    if isinstance(run, RunConfig):
        check_data(run.data)
    check_checkpoint(run.checkpoint)
    check_model(model)
    check_layout(model, run.parallel, world_size)
    check_optimizer_layout(run.optim, run.parallel)
    dp = data_parallel_size(run.parallel, world_size)
    warnings = check_length(model, seq_length=run.train.seq_length)
    return warnings + check_batch(run.train, run.parallel, dp=dp)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """What remains of the world size after tp, pp and cp; ValueError if they do not divide it."""
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_ranks:
        raise ValueError(
            f"world size ({world_size}) is not divisible by tp * pp * cp ({parallel.tp} * {parallel.pp} * "
            f"{parallel.cp} = {model_ranks}): start {nearest_multiples(world_size, model_ranks)} ranks"
        )
    return world_size // model_ranks


def num_microbatches(train: TrainConfig, dp: int) -> int:
    """Microbatches of one optimizer step on each data-parallel rank; ValueError if they are not whole."""
    per_microbatch = train.micro_batch_size * dp
    if train.global_batch_size % per_microbatch:
        raise ValueError(
            f"global_batch_size ({train.global_batch_size}) is not divisible by micro_batch_size * dp "
            f"({train.micro_batch_size} * {dp} = {per_microbatch}): use global_batch_size "
            f"{nearest_multiples(train.global_batch_size, per_microbatch)}"
        )
    return train.global_batch_size // per_microbatch


def check_model(model: ModelConfig) -> None:
    """ValueError unless the shape of `model` holds together."""
    positive(
        model, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "norm_eps", "rope_theta", "initializer_range",
    )  # fmt: skip
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads ({heads}) is not divisible by num_key_value_heads ({kv_heads}): "
            f"use num_key_value_heads {either(divisors(heads))}"
        )
    fraction(model, "hidden_dropout", "attention_dropout")
    if model.sliding_window is not None and model.sliding_window < 1:
        raise ValueError(f"sliding_window ({model.sliding_window}) must be at least 1, or none for full attention")
    if model.head == "scalar" and model.tie_word_embeddings:
        raise ValueError(
            "head scalar with tie_word_embeddings: a scalar head is [1, hidden_size] and can share nothing with the "
            "embedding: set tie_word_embeddings to false"
        )
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(model, name)
        if token is not None and not 0 <= token < model.vocab_size:
            raise ValueError(f"{name} ({token}) is outside the vocabulary: use 0 to {model.vocab_size - 1}")
    if model.position_embedding == "rope":
        _check_rope(model)
    elif model.rope_scaling is not None:
        raise ValueError("rope_scaling with position_embedding learned: there is nothing to scale: set it to none")


def check_layout(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    """ValueError unless `model` can be laid over `world_size` ranks as `parallel` says."""
    positive(parallel, "tp", "pp", "cp", "ep", "virtual_stages", "bucket_size")
    if world_size < 1:
        raise ValueError(f"world size ({world_size}) must be at least 1")
    for name, only in (("cp", 1), ("ep", 1)):
        value = getattr(parallel, name)
        if value != only:
            raise ValueError(f"{name} ({value}) is not available yet: use {name} {only}")
    _check_tensor_parallel(model, parallel.tp)
    _check_schedule(parallel)
    _check_stages(model, parallel)
    check_offload(parallel)
    _check_zero(parallel, dp=data_parallel_size(parallel, world_size))


def _check_zero(parallel: ParallelConfig, *, dp: int) -> None:
    if parallel.zero not in (0, 1, 2, 3):
        raise ValueError(f"zero ({parallel.zero}) is not a ZeRO stage: use 0, 1, 2 or 3")
    size = parallel.zero_shard_size
    if size is not None and parallel.zero == 0:
        raise ValueError(f"zero_shard_size ({size}) without zero: nothing is sharded; use zero 1, 2 or 3")
    if size is not None and (size < 1 or dp % size):
        raise ValueError(
            f"zero_shard_size ({size}) does not divide the {dp} data-parallel ranks: use a divisor of {dp}, such as "
            "the ranks of one node, or leave it out to shard over all"
        )
    if parallel.zero_keep and parallel.zero != 3:
        raise ValueError(f"zero_keep with zero {parallel.zero}: only stage 3 gathers parameters; use zero 3")


def check_batch(train: TrainConfig, parallel: ParallelConfig, *, dp: int) -> list[str]:
    """Warnings about the batch on `dp` data-parallel ranks; ValueError if it cannot be split as `parallel` needs."""
    parallel = resolve_parallel(parallel)
    count = num_microbatches(train, dp)
    tokens = train.micro_batch_size * train.seq_length
    if parallel.sequence_parallel and tokens % parallel.tp:
        raise ValueError(
            f"micro_batch_size * seq_length ({train.micro_batch_size} * {train.seq_length} = {tokens} tokens) is not "
            f"divisible by tp ({parallel.tp}), which sequence parallelism needs: use seq_length "
            f"{nearest_multiples(train.seq_length, parallel.tp)}, or --no-sequence-parallel"
        )
    if parallel.schedule == "interleaved" and count % parallel.pp:
        per_microbatch = train.micro_batch_size * dp
        sizes = nearest_multiples(train.global_batch_size, per_microbatch * parallel.pp)
        raise ValueError(
            f"the interleaved schedule needs num_microbatches ({count} = global_batch_size {train.global_batch_size} "
            f"/ (micro_batch_size {train.micro_batch_size} * dp {dp})) to be a multiple of pp ({parallel.pp}): "
            f"use global_batch_size {sizes}, or schedule 1f1b with virtual_stages 1"
        )
    if count < parallel.pp:
        idle = (parallel.pp - 1) / (count * parallel.virtual_stages + parallel.pp - 1)
        warning = (
            f"num_microbatches ({count}) is smaller than pp ({parallel.pp}): each rank idles {idle:.0%} of the step; "
            "a larger global_batch_size or a smaller micro_batch_size helps"
        )
        return [warning]
    return []


def check_length(model: ModelConfig, *, seq_length: int) -> list[str]:
    """Warnings about `seq_length` tokens for `model`; ValueError if its position table is shorter."""
    longest = model.max_position_embeddings
    if seq_length <= longest:
        return []
    if model.position_embedding == "learned":
        raise ValueError(
            f"seq_length ({seq_length}) is longer than the table of learned positions (max_position_embeddings "
            f"{longest}): use seq_length {longest} or less"
        )
    warning = (
        f"seq_length ({seq_length}) is longer than max_position_embeddings ({longest}): rotary positions beyond it "
        "were never trained; consider rope_scaling"
    )
    return [warning]


def check_positions(model: ModelConfig, what: str, *, prompt_tokens: int, new_tokens: int) -> None:
    """ValueError unless the model has a position for every token of the prompt `what` and of its answer: beyond them a
    learned table ends, and rotary angles were never trained."""
    length, longest = prompt_tokens + new_tokens, model.max_position_embeddings
    if length > longest:
        way_out = "shorten the prompt or max_new_tokens"
        if model.position_embedding != "learned":
            way_out += ", or raise it in the model's config.json"
        raise ValueError(
            f"{what} ({prompt_tokens} tokens) + {new_tokens} new ones = {length} positions, but the model has "
            f"{longest} (max_position_embeddings): {way_out}"
        )


def check_train(train: TrainConfig) -> None:
    """ValueError unless sizes are positive."""
    positive(train, "steps", "micro_batch_size", "global_batch_size", "seq_length", "log_every", "eval_sequences")
    not_negative(train, "eval_every", "seed")


def check_data(data: DataConfig) -> None:
    """ValueError unless `data` and `valid_data` are empty, one path, or `weight path` pairs."""
    if not 0.0 <= data.valid_fraction < 1.0:
        raise ValueError(f"valid_fraction ({data.valid_fraction}) must be at least 0 and below 1")
    positive(data, "tokenizer_vocab_size")
    for name in ("data", "valid_data"):
        parts: tuple[str, ...] = getattr(data, name)
        if len(parts) < 2:
            continue
        rule = f"{name} with more than one part must be `weight path weight path ...`"
        if len(parts) % 2:
            raise ValueError(f"{rule}: got {len(parts)} parts: {' '.join(parts)}")
        for weight in parts[::2]:
            if not is_positive_number(weight):
                raise ValueError(f"{rule}: {weight!r} is not a positive weight")


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    """ValueError unless what is asked for can be saved."""
    not_negative(checkpoint, "save_every", "keep")
    if checkpoint.save_every and checkpoint.save is None:
        raise ValueError(f"save_every ({checkpoint.save_every}) without a directory to save to: give --save DIR")


def _check_tensor_parallel(model: ModelConfig, tp: int) -> None:
    """Heads and MLP columns are cut into tp equal parts; kv heads too, or each is held by tp / K ranks."""
    heads, kv_heads, columns = model.num_attention_heads, model.num_key_value_heads, model.intermediate_size
    way_out = f"use tp {either(_working_tp(model, near=tp))}"
    if heads % tp:
        raise ValueError(f"num_attention_heads ({heads}) is not divisible by tp ({tp}): {way_out}")
    if kv_heads % tp and tp % kv_heads:
        raise ValueError(
            f"num_key_value_heads ({kv_heads}) is neither divisible by tp ({tp}) nor a divisor of it: {way_out}"
        )
    if columns % tp:
        raise ValueError(f"intermediate_size ({columns}) is not divisible by tp ({tp}): {way_out}")


def _working_tp(model: ModelConfig, *, near: int) -> list[int]:
    """The tp sizes above 1 that the model allows, up to a node's 8 ranks or twice `near`; [1] if there is none."""
    kv_heads = model.num_key_value_heads
    sizes = [
        tp
        for tp in divisors(model.num_attention_heads)
        if 1 < tp <= max(8, 2 * near)
        and not (kv_heads % tp and tp % kv_heads)
        and model.intermediate_size % tp == 0
    ]
    return sizes or [1]


def _check_schedule(parallel: ParallelConfig) -> None:
    """virtual_stages and the interleaved schedule come together, and only with a pipeline."""
    schedule, chunks, pp = resolve_parallel(parallel).schedule, parallel.virtual_stages, parallel.pp
    if schedule == "interleaved" and pp < 2:
        raise ValueError(
            f"the interleaved schedule (virtual_stages {chunks}) needs pp of at least 2, got pp {pp}: use "
            "virtual_stages 1 and no schedule, or a larger pp"
        )
    if schedule == "interleaved" and chunks < 2:
        raise ValueError(f"schedule interleaved needs virtual_stages of at least 2, got {chunks}: use 2, or 1f1b")
    if schedule != "interleaved" and chunks > 1:
        raise ValueError(
            f"virtual_stages ({chunks}) needs schedule interleaved, got {schedule}: use schedule interleaved, or "
            "virtual_stages 1"
        )


def _check_stages(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Every stage has a layer, and a given partition is one."""
    layers, stages = model.num_hidden_layers, parallel.pp * parallel.virtual_stages
    product = f"pp * virtual_stages ({parallel.pp} * {parallel.virtual_stages} = {stages} stages)"
    if stages > layers:
        raise ValueError(
            f"{product} is more than num_hidden_layers ({layers}): every stage needs a layer: use at most "
            f"{layers} stages"
        )
    partition = parallel.pipeline_partition
    if partition is None:
        return
    shown = ",".join(map(str, partition))
    if len(partition) != stages:
        raise ValueError(f"pipeline_partition ({shown}) has {len(partition)} entries for {product}: give {stages}")
    if min(partition) < 1:
        raise ValueError(f"pipeline_partition ({shown}) has a stage without a layer: every entry must be at least 1")
    if sum(partition) != layers:
        raise ValueError(
            f"pipeline_partition ({shown}) sums to {sum(partition)}, not to num_hidden_layers ({layers}): "
            f"change its entries by {layers - sum(partition):+d} in all"
        )


def _check_rope(model: ModelConfig) -> None:
    """Rotary positions turn pairs of dimensions; a scaling stretches."""
    if model.head_dim % 2:
        raise ValueError(f"head_dim ({model.head_dim}) must be even for rotary positions: use {model.head_dim + 1}")
    scaling = model.rope_scaling
    if scaling is None:
        return
    if scaling.factor < 1.0:
        raise ValueError(f"rope_scaling factor ({scaling.factor}) must be at least 1")
    if scaling.rope_type == "llama3" and not 0.0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(
            f"rope_scaling low_freq_factor ({scaling.low_freq_factor}) must be positive and below high_freq_factor "
            f"({scaling.high_freq_factor})"
        )
    if scaling.rope_type == "yarn" and not 0.0 < scaling.beta_slow < scaling.beta_fast:
        raise ValueError(
            f"rope_scaling beta_slow ({scaling.beta_slow}) must be positive and below beta_fast ({scaling.beta_fast})"
        )
    original = scaling.original_max_position_embeddings
    if original is not None and original < 1:
        raise ValueError(f"rope_scaling original_max_position_embeddings ({original}) must be at least 1")
