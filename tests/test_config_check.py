"""Every cross-field rule: what is refused, with which way out, and what is let through."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megallm.config.check import (
    check_batch,
    check_checkpoint,
    check_data,
    check_layout,
    check_length,
    check_model,
    check_numerics,
    check_optim,
    check_optimizer_layout,
    check_run,
    check_train,
    data_parallel_size,
    num_microbatches,
)
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.data import DataConfig
from megallm.config.model import ModelConfig, RopeScaling
from megallm.config.numerics import NumericsConfig
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.presets import get_preset, preset_names
from megallm.config.resolve import resolve_run
from megallm.config.run import RunConfig
from megallm.config.train import TrainConfig


def model(**changes: Any) -> ModelConfig:
    """30 query heads, 6 kv heads, 6 layers."""
    shape = ModelConfig(
        family="llama", vocab_size=101, hidden_size=60, intermediate_size=120, num_hidden_layers=6,
        num_attention_heads=30, num_key_value_heads=6, head_dim=2, max_position_embeddings=32,
    )  # fmt: skip
    return dataclasses.replace(shape, **changes)


def parallel(**changes: Any) -> ParallelConfig:
    return ParallelConfig(**changes)


def refused(check: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the ValueError that `check` raises: one line."""
    with pytest.raises(ValueError) as error:
        check(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_heads_not_divisible_by_tp_lists_the_tp_that_work() -> None:
    shape = model(num_key_value_heads=30)
    message = refused(check_layout, shape, parallel(tp=4), 4)
    assert message == "num_attention_heads (30) is not divisible by tp (4): use tp 2, 3, 5 or 6"


def test_suggested_tp_also_fits_kv_heads_and_mlp() -> None:
    assert refused(check_layout, model(), parallel(tp=4), 4).endswith("use tp 2, 3 or 6")
    assert refused(check_layout, model(intermediate_size=121), parallel(tp=4), 4).endswith("use tp 1")
    message = refused(check_layout, model(intermediate_size=122), parallel(tp=3), 3)
    assert message == "intermediate_size (122) is not divisible by tp (3): use tp 2"


@pytest.mark.parametrize("tp", [2, 3, 6, 30])
def test_tp_may_divide_kv_heads_or_replicate_them(tp: int) -> None:
    check_layout(model(), parallel(tp=tp), tp)


def test_tp_that_cuts_kv_heads_unevenly_is_refused() -> None:
    message = refused(check_layout, model(), parallel(tp=10), 10)
    assert message.startswith("num_key_value_heads (6) is neither divisible by tp (10) nor a divisor of it: use tp 2")


def test_world_size_must_be_a_multiple_of_the_model_ranks() -> None:
    message = refused(check_layout, model(), parallel(tp=2, pp=2), 6)
    assert message == "world size (6) is not divisible by tp * pp * cp (2 * 2 * 1 = 4): start 4 or 8 ranks"
    assert refused(check_layout, model(), parallel(tp=2, pp=2), 3).endswith("start 4 ranks")
    assert "world size (0)" in refused(check_layout, model(), parallel(), 0)
    assert data_parallel_size(parallel(tp=2, pp=3), 12) == 2


@pytest.mark.parametrize(("name", "value", "only"), [("cp", 2, 1), ("ep", 2, 1)])
def test_what_is_not_there_yet_is_refused(name: str, value: int, only: int) -> None:
    message = refused(check_layout, model(), parallel(**{name: value}), 2)
    assert message == f"{name} ({value}) is not available yet: use {name} {only}"


def test_stages_and_schedules() -> None:
    def layout(**changes: Any) -> str:
        return refused(check_layout, model(), parallel(**changes), changes.get("pp", 1))

    assert "pp * virtual_stages (7 * 1 = 7 stages) is more than num_hidden_layers (6)" in layout(pp=7)
    assert "(4 * 2 = 8 stages)" in layout(pp=4, virtual_stages=2)
    assert "needs virtual_stages of at least 2, got 1" in layout(pp=2, schedule="interleaved")
    assert "needs pp of at least 2" in layout(virtual_stages=2)
    assert "virtual_stages (2) needs schedule interleaved, got 1f1b" in layout(
        pp=2, virtual_stages=2, schedule="1f1b"
    )
    assert "got gpipe" in layout(pp=2, virtual_stages=2, schedule="gpipe")
    for fits in (parallel(pp=6), parallel(pp=3, virtual_stages=2), parallel(pp=2, schedule="gpipe")):
        check_layout(model(), fits, fits.pp)


def test_pipeline_partition_has_an_entry_for_each_stage_and_all_layers() -> None:
    def layout(*partition: int) -> str:
        return refused(check_layout, model(), parallel(pp=2, pipeline_partition=partition), 2)

    entries = "pipeline_partition (2,2,2) has 3 entries for pp * virtual_stages (2 * 1 = 2 stages): give 2"
    assert entries in layout(2, 2, 2)
    assert "(3,2) sums to 5, not to num_hidden_layers (6): change its entries by +1 in all" in layout(3, 2)
    assert "(6,0) has a stage without a layer" in layout(6, 0)
    check_layout(model(), parallel(pp=2, pipeline_partition=(5, 1)), 2)


@pytest.mark.parametrize("name", ["tp", "pp", "cp", "ep", "virtual_stages", "bucket_size"])
def test_degrees_are_positive(name: str) -> None:
    assert refused(check_layout, model(), parallel(**{name: 0}), 1) == f"{name} (0) must be at least 1"


def test_global_batch_size_is_whole_microbatches() -> None:
    train = TrainConfig(micro_batch_size=3, global_batch_size=20)
    assert refused(num_microbatches, train, 2) == (
        "global_batch_size (20) is not divisible by micro_batch_size * dp (3 * 2 = 6): use global_batch_size 18 or 24"
    )
    assert refused(num_microbatches, train, 8).endswith("use global_batch_size 24")
    assert num_microbatches(dataclasses.replace(train, global_batch_size=24), 2) == 4


def test_tokens_are_divisible_by_tp_under_sequence_parallelism() -> None:
    train = TrainConfig(seq_length=7, micro_batch_size=3, global_batch_size=3)
    message = refused(check_batch, train, parallel(tp=2), dp=1)
    assert "(3 * 7 = 21 tokens) is not divisible by tp (2)" in message
    assert "use seq_length 6 or 8, or --no-sequence-parallel" in message
    assert check_batch(train, parallel(tp=2, sequence_parallel=False), dp=1) == []
    assert check_batch(train, parallel(tp=3), dp=1) == []


def test_interleaving_needs_microbatches_in_groups_of_pp() -> None:
    train = TrainConfig(micro_batch_size=2, global_batch_size=20)
    message = refused(check_batch, train, parallel(pp=4, virtual_stages=2), dp=2)
    assert "num_microbatches (5 = global_batch_size 20 / (micro_batch_size 2 * dp 2))" in message
    assert "to be a multiple of pp (4)" in message
    assert "use global_batch_size 16 or 32, or schedule 1f1b" in message
    assert check_batch(train, parallel(pp=4), dp=2) == []


def test_fewer_microbatches_than_stages_is_a_warning() -> None:
    (warning,) = check_batch(TrainConfig(global_batch_size=2), parallel(pp=3), dp=1)
    assert warning.startswith("num_microbatches (2) is smaller than pp (3): each rank idles 50% of the step")


def test_learned_positions_end_and_rotary_ones_warn() -> None:
    assert "use seq_length 32 or less" in refused(check_length, model(position_embedding="learned"), seq_length=33)
    assert check_length(model(), seq_length=32) == []
    (warning,) = check_length(model(), seq_length=33)
    assert "max_position_embeddings (32)" in warning


def test_unknown_precision_names_those_that_exist() -> None:
    assert refused(check_numerics, NumericsConfig(precision="bf17")) == (  # type: ignore[arg-type]
        "precision bf17 does not exist: use fp32, bf16, fp16, fp64 or fp8"
    )
    for precision in ("fp32", "bf16", "fp16", "fp64", "fp8"):
        check_numerics(NumericsConfig(precision=precision))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numerics", "words"),
    [
        (NumericsConfig(grad_dtype="bf16"), "grad_dtype bf16 with precision fp32: use precision bf16"),
        (NumericsConfig(precision="fp16", grad_dtype="bf16"), "grad_dtype bf16 with precision fp16"),
        (NumericsConfig(precision="bf16", tf32=True), "tf32 with precision bf16"),
        (NumericsConfig(precision="bf16", fp8_recipe="rowwise"), "fp8_recipe with precision bf16: leave it out"),
        (NumericsConfig(fp8_keep_ends=True), "fp8_keep_ends with precision fp32"),
        (NumericsConfig(fp8_emulate=True), "fp8_emulate with precision fp32: leave it out, or use precision fp8"),
        (NumericsConfig(loss_scale=1024.0), "loss_scale with precision fp32: leave it out, or use precision fp16"),
        (NumericsConfig(precision="bf16", loss_scale_window=5), "loss_scale_window with precision bf16"),
        (NumericsConfig(precision="fp64", grad_dtype="fp32"), "grad_dtype fp32 with precision fp64"),
        (NumericsConfig(precision="fp16", loss_scale=1000.0), "loss_scale (1000.0) must be 1 or a power of 2"),
        (NumericsConfig(precision="fp16", loss_scale=0.5), "loss_scale (0.5) must be 1 or a power of 2"),
        (NumericsConfig(loss_scale=0.0), "loss_scale (0.0) must be above 0"),
        (NumericsConfig(max_bad_steps=-1), "max_bad_steps (-1) must be 0 or more"),
    ],
)
def test_numerics_belong_together(numerics: NumericsConfig, words: str) -> None:
    assert words in refused(check_numerics, numerics)


@pytest.mark.parametrize(
    ("optim", "layout", "words"),
    [
        ({"optimizer": "lion"}, {}, "optimizer lion does not exist: use adamw, muon or sgd"),
        ({"optimizer": "muon"}, {"zero": 3}, "optimizer muon with zero 3: it needs whole matrices: use zero 1 or 2"),
        ({"optimizer": "sgd"}, {"offload": "optimizer"}, "optimizer sgd with offload optimizer: only AdamW"),
    ],
)
def test_optimizers_work_on_what_the_layout_gives_them(
    optim: dict[str, Any], layout: dict[str, Any], words: str
) -> None:
    assert words in refused(check_optimizer_layout, OptimConfig(**optim), ParallelConfig(**layout))


def test_parameters_leave_the_device_at_stage_3_only() -> None:
    words = refused(check_layout, model(), ParallelConfig(offload="optimizer+params", zero=2), 2)
    assert "offload optimizer+params with zero 2" in words and "use zero 3, or offload optimizer" in words


@pytest.mark.parametrize("name", ["steps", "micro_batch_size", "global_batch_size", "seq_length", "log_every"])
def test_sizes_are_positive(name: str) -> None:
    assert refused(check_train, TrainConfig(**{name: 0})) == f"{name} (0) must be at least 1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate (0.0) must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay (-0.1) must be 0 or more"),
        ({"beta2": 1.0}, "beta2 (1.0) must be at least 0 and below 1"),
        ({"min_learning_rate": 1.0}, "min_learning_rate (1.0) must be between 0 and learning_rate (0.0003)"),
        ({"warmup_steps": 10}, "warmup_steps (10) must be smaller than steps (10): use warmup_steps 9 or less"),
        ({"warmup_steps": -1}, "warmup_steps (-1) must be 0 or more"),
        ({"decay_steps": 0}, "decay_steps (0) must be at least 1"),
        ({"decay_steps": 11}, "is more than steps (10): use decay_steps 10 or less"),
        ({"decay_steps": 8, "warmup_steps": 3, "lr_schedule": "wsd"}, "use decay_steps 7 or less"),
        ({"decay_steps": 8, "lr_schedule": "constant"}, "lr_schedule constant, which never decays"),
    ],
)
def test_schedules_fit_into_the_run(changes: dict[str, Any], message: str) -> None:
    assert message in refused(check_optim, OptimConfig(**changes), total_steps=10)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_what_was_resolved_passes_the_same_checks(schedule: Any, optimizer: Any) -> None:
    run = RunConfig(optim=OptimConfig(lr_schedule=schedule, optimizer=optimizer), train=TrainConfig(steps=10))
    check_run(run, model(), 1)
    check_run(resolve_run(run), model(), 1)


def test_schedules_that_just_fit() -> None:
    check_optim(OptimConfig(warmup_steps=9), total_steps=10)
    check_optim(OptimConfig(warmup_steps=3, decay_steps=7, lr_schedule="wsd"), total_steps=10)
    check_optim(OptimConfig(), total_steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "(30) is not divisible by num_key_value_heads (4): use num_key_value_heads 1, 2,"),
        ({"head_dim": 5}, "head_dim (5) must be even for rotary positions: use 6"),
        ({"head": "scalar", "tie_word_embeddings": True}, "set tie_word_embeddings to false"),
        ({"vocab_size": 0}, "vocab_size (0) must be at least 1"),
        ({"norm_eps": 0.0}, "norm_eps (0.0) must be above 0"),
        ({"hidden_dropout": 1.0}, "hidden_dropout (1.0) must be at least 0 and below 1"),
        ({"sliding_window": 0}, "sliding_window (0) must be at least 1"),
        ({"eos_token_id": 101}, "eos_token_id (101) is outside the vocabulary: use 0 to 100"),
        ({"rope_scaling": RopeScaling(rope_type="linear", factor=0.5)}, "factor (0.5) must be at least 1"),
        ({"rope_scaling": RopeScaling(rope_type="llama3", low_freq_factor=4.0)}, "low_freq_factor (4.0)"),
        ({"rope_scaling": RopeScaling(rope_type="yarn", beta_slow=40.0)}, "beta_slow (40.0)"),
        (
            {"rope_scaling": RopeScaling(rope_type="linear"), "position_embedding": "learned"},
            "rope_scaling with position_embedding learned",
        ),
    ],
)
def test_shapes_that_do_not_hold_together(changes: dict[str, Any], message: str) -> None:
    assert message in refused(check_model, model(**changes))


def test_data_is_one_path_or_weighted_pairs() -> None:
    for fits in ((), ("a",), ("0.3", "a", "2", "b")):
        check_data(DataConfig(data=fits))
    assert "got 3 parts: a b c" in refused(check_data, DataConfig(data=("a", "b", "c")))
    assert "'a' is not a positive weight" in refused(check_data, DataConfig(valid_data=("a", "b")))
    assert "'0' is not a positive weight" in refused(check_data, DataConfig(data=("0", "b")))
    assert "valid_fraction (1.0)" in refused(check_data, DataConfig(valid_fraction=1.0))


def test_saving_needs_a_directory() -> None:
    assert "give --save DIR" in refused(check_checkpoint, CheckpointConfig(save_every=10))
    check_checkpoint(CheckpointConfig(save_every=10, save="out"))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_sound(name: str) -> None:
    check_model(get_preset(name))


@pytest.mark.parametrize(("tp", "pp", "chunks"), [(1, 1, 1), (4, 2, 1), (2, 2, 2), (8, 4, 1)])
def test_tiny_runs_in_many_layouts(tp: int, pp: int, chunks: int) -> None:
    run = RunConfig(parallel=parallel(tp=tp, pp=pp, virtual_stages=chunks))
    assert check_run(run, get_preset("tiny"), tp * pp * 2) == []


def test_one_run_is_checked_as_a_whole() -> None:
    def run(**sections: Any) -> str:
        return refused(check_run, RunConfig(**sections), model(), 2)

    assert "tf32 with precision bf16" in run(numerics=NumericsConfig(precision="bf16", tf32=True))
    assert "warmup_steps" in run(optim=OptimConfig(warmup_steps=100))
    assert "parts" in run(data=DataConfig(data=("a", "b", "c")))
    assert "--save" in run(checkpoint=CheckpointConfig(save_every=1))
    assert "tp" in run(parallel=parallel(tp=4))
    assert "global_batch_size" in run(train=TrainConfig(global_batch_size=3))
    assert len(check_run(RunConfig(train=TrainConfig(global_batch_size=2)), model(), 2)) == 1  # seq_length 256 > 32
