"""The planner's formulas: the ZeRO paper's table of memory and its traffic, offload, a rank's own parameters, hosts."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from training_cases import MODELS

from megallm.config.model import ModelConfig
from megallm.config.numerics import NumericsConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.presets import get_preset
from megallm.model.counts import parameter_counts
from megallm.model.transformer import Transformer
from megallm.optim import gradients
from megallm.optim.flat import FlatParameters
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.recorder import Recorder
from megallm.planner import transients
from megallm.planner.host import check_host_memory
from megallm.planner.memory import (
    CauseBytes,
    MemoryPlan,
    effective_stage,
    element_bytes,
    elements_sent,
    largest_model,
    placed_states,
    predict_memory,
    state_bytes,
)
from megallm.planner.parameters import rank_buckets, rank_units, stage_layers
from megallm.runtime.host_memory import available_host_memory

# arXiv 1910.02054, table 1: GB of model states a device, {N: stages 1, 2, 3 of 7.5B, of 128B, of 1T}.
TABLE = {
    1: ((120, 120, 120), (2048, 2048, 2048), (16000, 16000, 16000)),
    4: ((52.5, 41.3, 30), (896, 704, 512), (7000, 5500, 4000)),
    16: ((35.6, 21.6, 7.5), (608, 368, 128), (4750, 2875, 1000)),
    64: ((31.4, 16.6, 1.88), (536, 284, 32), (4187, 2218, 250)),
    256: ((30.4, 15.4, 0.47), (518, 263, 8), (4046, 2054, 62.5)),
    1024: ((30.1, 15.1, 0.12), (513, 257, 2), (4011, 2013, 15.6)),
}
CELLS = [
    (number, ranks, stage, gigabytes)
    for ranks, row in TABLE.items()
    for number, cells in zip((7_500_000_000, 128_000_000_000, 1_000_000_000_000), row, strict=True)
    for stage, gigabytes in enumerate(cells, start=1)
]


@pytest.mark.parametrize(("number", "ranks", "stage", "gigabytes"), CELLS)
def test_the_paper_s_table_comes_out(number: int, ranks: int, stage: int, gigabytes: float) -> None:
    held = state_bytes(number, zero=stage, num_shards=ranks, gradient_bytes=2)
    last_digit = 10.0 ** -len(str(gigabytes).partition(".")[2])  # the paper cuts some cells and rounds others
    assert abs(float(held.total) / 1e9 - gigabytes) < last_digit


def test_traffic_is_two_or_three_times_the_parameters() -> None:
    sent = [elements_sent(1000, zero=zero, num_shards=4) / (1000 * Fraction(3, 4)) for zero in (0, 1, 2, 3)]
    assert sent == [2, 2, 2, 3]
    sent = [elements_sent(1000, zero=zero, num_shards=4, num_microbatches=5) / 750 for zero in (0, 1, 2, 3)]
    assert sent == [2, 2, 6, 15]


def test_what_is_no_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="zero 4 over 2 ranks"):
        state_bytes(1, zero=4, num_shards=2)


# -- offload -----------------------------------------------------------------------------------------------------------

BF16 = element_bytes(NumericsConfig(precision="bf16"))
FP32 = element_bytes(NumericsConfig(precision="fp32"))


def bytes_a_parameter(sizes: object, zero: int, num_shards: int, offload: str) -> tuple[list[Fraction], list[Fraction]]:
    """(device, host): bytes of parameters, gradients and optimizer state for one parameter of the whole."""
    placed = placed_states(1, zero=zero, num_shards=num_shards, offload=offload, sizes=sizes)  # type: ignore[arg-type]
    return tuple([each.parameters, each.gradients, each.optimizer] for each in placed)  # type: ignore[return-value]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_without_offload_everything_is_on_the_device(zero: int) -> None:
    device, host = placed_states(1000, zero=zero, num_shards=4, sizes=BF16)
    assert device == state_bytes(1000, zero=zero, num_shards=4)
    assert host.total == 0


@pytest.mark.parametrize(
    ("zero", "device", "shards"),
    [(0, [2, 4, 0], 1), (1, [2, 4, 0], 4), (2, [2, 0, 0], 4), (3, [Fraction(1, 2), 0, 0], 4)],
)
def test_an_offloaded_optimizer_in_bf16(zero: int, device: list[Fraction], shards: int) -> None:
    """Sums, masters, moments and the bf16 copy that is sent back are on the host; whole gradients at stages 0 and 1."""
    found = bytes_a_parameter(BF16, zero, 4, "optimizer")
    assert found == (device, [0, Fraction(4, shards), Fraction(4 + 8 + 2, shards)])


def test_an_offloaded_optimizer_in_fp32_keeps_its_weights_on_the_host() -> None:
    assert bytes_a_parameter(FP32, 2, 4, "optimizer") == ([4, 0, 0], [0, 1, 3])
    assert bytes_a_parameter(FP32, 3, 4, "optimizer+params") == ([0, 0, 0], [1, 1, 3])


def test_offloaded_parameters_leave_nothing_on_the_device() -> None:
    assert bytes_a_parameter(BF16, 3, 4, "optimizer+params") == ([0, 0, 0], [Fraction(1, 2), 1, 3])
    with pytest.raises(ValueError, match="offload optimizer.params with zero 2: .* use zero 3"):
        placed_states(1, zero=2, num_shards=4, offload="optimizer+params", sizes=BF16)


def test_one_rank_s_stage_goes_as_far_as_it_sends_to_the_host() -> None:
    stages = {offload: effective_stage(3, num_shards=1, offload=offload) for offload in ("none", "optimizer")}
    assert stages == {"none": 1, "optimizer": 2}
    assert effective_stage(3, num_shards=1, offload="optimizer+params") == 3
    assert effective_stage(3, num_shards=2) == 3
    assert bytes_a_parameter(BF16, 3, 1, "optimizer")[0] == [2, 0, 0]


def test_sizes_follow_the_precision_and_the_optimizer() -> None:
    def sizes(optimizer: str = "adamw", **numerics: str) -> tuple[int, ...]:
        return dataclasses.astuple(element_bytes(NumericsConfig(**numerics), optimizer=optimizer))  # type: ignore[arg-type]

    assert sizes(precision="fp32") == (4, 4, 0, 8)
    assert sizes(precision="fp64") == (8, 8, 0, 16)
    assert sizes(precision="bf16") == sizes(precision="fp16") == (2, 4, 4, 8)
    assert sizes(precision="bf16", grad_dtype="bf16") == (2, 2, 4, 8)
    assert sizes("sgd", precision="bf16") == (2, 4, 4, 4)


def test_the_plan_of_an_offloaded_run_has_a_host() -> None:
    def plan(**parallel: object) -> MemoryPlan:
        return predict_memory(
            MODELS["llama_untied"], ParallelConfig(bucket_size=5000, **parallel), dp=2, micro_batch_size=1,  # type: ignore[arg-type]
            seq_length=16, num_microbatches=4, numerics=NumericsConfig(precision="bf16"),
        )  # fmt: skip

    plain, offloaded = plan(zero=2), plan(zero=2, offload="optimizer")
    assert plain.host == CauseBytes()
    assert offloaded.device.gradients == offloaded.device.optimizer == 0
    assert offloaded.host.gradients == plain.device.gradients and offloaded.host.parameters == 0
    copies = (plain.device.parameters or 0) // 2  # the bf16 weights that are sent back
    assert offloaded.host.optimizer == (plain.device.optimizer or 0) + copies
    assert (offloaded.device.buffers or 0) > (plain.device.buffers or 0)  # a sum comes back with the next microbatch
    assert offloaded.device.activations == plain.device.activations
    away = plan(zero=3, offload="optimizer+params")
    assert away.device.parameters == 0 and away.host.total == offloaded.host.total
    assert (away.device.buffers or 0) > 0


def test_muon_keeps_one_moment_of_the_layers_matrices() -> None:
    model = MODELS["llama_untied"]

    def optimizer_bytes(optimizer: str) -> int:
        plan = predict_memory(
            model, ParallelConfig(), dp=1, micro_batch_size=1, seq_length=16, num_microbatches=1,
            numerics=NumericsConfig(), optimizer=optimizer,
        )  # fmt: skip
        return plan.device.optimizer or 0

    counts = parameter_counts(model)
    assert optimizer_bytes("adamw") == 8 * counts.total
    assert optimizer_bytes("sgd") == 4 * counts.total
    assert optimizer_bytes("muon") == 8 * counts.total - 4 * (counts.attention + counts.mlp)


# -- the largest model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "offload", "billions"),
    [(0, "none", 80 / 18), (0, "optimizer", 80 / 6), (2, "optimizer", 80 / 2), (3, "optimizer+params", 1000 / 18)],
)
def test_the_largest_model_of_one_gpu(zero: int, offload: str, billions: float) -> None:
    largest = largest_model(80e9, 1e12, zero=zero, offload=offload, sizes=BF16)  # type: ignore[arg-type]
    assert largest == pytest.approx(billions * 1e9, rel=1e-9)
    device, host = placed_states(largest, zero=zero, num_shards=1, offload=offload, sizes=BF16)  # type: ignore[arg-type]
    assert max(device.total / 80, host.total / 1000) == pytest.approx(1e9, rel=1e-6)


def test_whole_buckets_and_neighbours_on_the_host_leave_less() -> None:
    assert largest_model(80e9, 1e12, zero=2, offload="optimizer", sizes=BF16, layer_parameters=10**9) == 34 * 10**9
    two = largest_model(80e9, 1e12, zero=3, num_shards=2, offload="optimizer+params", sizes=BF16, ranks_per_host=2)
    assert two == pytest.approx(1e12 / 18, rel=1e-9)  # the shards of both lie on one host
    assert largest_model(1e9, 1e12, zero=2, offload="optimizer", sizes=BF16, layer_parameters=10**9) == 0


# -- a rank's parameters -----------------------------------------------------------------------------------------------


def rank_of(*, tp: int = 1, pp: int = 1, dp: int = 1, pp_rank: int = 0) -> Mesh:
    """A mesh without groups: enough to build a model on."""
    recorder = Recorder()

    def axis(name: str, size: int, rank: int = 0) -> Axis:
        return Axis(name, size, rank, tuple(range(size)), None, recorder)

    return Mesh(
        pp=axis("pp", pp, pp_rank), dp=axis("dp", dp), cp=axis("cp", 1), tp=axis("tp", tp, tp - 1),
        world=axis("world", tp * pp * dp), shard=axis("dp", dp), replicate=axis("replicate", 1),
        embedding=axis("embedding", 1), device=torch.device("cpu"), recorder=recorder,
    )  # fmt: skip


WIDE = MODELS["llama_untied"].replace(vocab_size=4133)
BUILT: list[tuple[ModelConfig, ParallelConfig, int]] = [
    (model, ParallelConfig(tp=tp, pp=pp, virtual_stages=v, zero=zero, bucket_size=size), dp)
    for model in (*MODELS.values(), WIDE, MODELS["llama_untied"].replace(head="scalar"))
    for tp, pp, v, dp in ((1, 1, 1, 2), (2, 1, 1, 4), (4, 1, 1, 1), (1, 3, 1, 2), (2, 2, 2, 2))
    for zero, size in ((0, 3000), (1, 5000), (3, 1))
    if pp * v <= model.num_hidden_layers
]


@pytest.mark.parametrize(("model", "parallel", "dp"), BUILT, ids=range(len(BUILT)))  # type: ignore[arg-type]
def test_buckets_by_shapes_are_those_of_the_model(model: ModelConfig, parallel: ParallelConfig, dp: int) -> None:
    for pp_rank in range(parallel.pp):
        mesh = rank_of(tp=parallel.tp, pp=parallel.pp, dp=dp, pp_rank=pp_rank)
        built = Transformer(model, mesh, partition=stage_layers(model, parallel), allocate=False)
        flat = FlatParameters(built, bucket_size=parallel.bucket_size, zero=parallel.zero)
        units = rank_units(model, parallel, pp_rank=pp_rank)
        buckets = rank_buckets(
            units, bucket_size=parallel.bucket_size, num_shards=dp if parallel.zero else 1, by_unit=flat.zero == 3
        )
        assert list(units) == list(flat.units)
        for ours, theirs in zip(buckets, (each.bucket for each in flat.buckets), strict=True):
            assert ours.numel == theirs.numel and ours.decay_numel == theirs.decay_numel
            assert [slot.numel for slot in ours.slots] == [slot.numel for slot in theirs.slots]
        assert flat.zero == effective_stage(parallel.zero, num_shards=dp)


@pytest.mark.parametrize("name", ["gpt3-175b", "llama3-8b", "qwen2.5-0.5b", "qwen3-32b"])
def test_one_rank_holds_every_parameter_and_padding(name: str) -> None:
    model = get_preset(name)
    units = rank_units(model, ParallelConfig(), pp_rank=0)
    held = {each.name: each.numel for unit in units.values() for each in unit}
    assert 0 <= sum(held.values()) - parameter_counts(model).total < 64 * 2 * model.hidden_size


def test_as_many_reductions_are_under_way_as_in_a_step() -> None:
    assert transients.REDUCTIONS_UNDER_WAY == gradients._IN_FLIGHT


# -- the host ----------------------------------------------------------------------------------------------------------


def test_too_small_a_host_is_refused_with_the_numbers() -> None:
    check_host_memory(10 * 2**30, ranks_per_node=8, available_bytes=80 * 2**30)
    check_host_memory(10 * 2**30, ranks_per_node=8, available_bytes=None)
    with pytest.raises(ValueError) as error:
        check_host_memory(10 * 2**30 + 1, ranks_per_node=8, available_bytes=80 * 2**30)
    assert str(error.value) == (
        "offload needs 80.0 GiB of this node's memory (10.0 GiB for each of 8 ranks), but 80.0 GiB are available: use "
        "more data-parallel ranks on more nodes with zero 1 or higher, a smaller model, or offload none"
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:   1000 kB\n"}


def test_available_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert available_host_memory(tmp_path) is None
    assert available_host_memory(write(tmp_path, MEMINFO)) == 1000 * 1024


def test_a_limit_of_the_container_counts_what_it_can_give_back(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/job"
    files = {
        "proc/self/cgroup": "0::/job/inner\n",
        f"{group}/memory.max": "600000\n",
        f"{group}/memory.current": "500000\n",
        f"{group}/memory.stat": "anon 400000\ninactive_file 50000\n",
        f"{group}/inner/memory.max": "max\n",
        f"{group}/inner/memory.current": "500000\n",
    }
    assert available_host_memory(write(tmp_path, MEMINFO | files)) == 150000


def test_a_limit_of_an_older_container(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "5:cpu:/\n4:memory:/unseen\n0::/\n",
        f"{group}/memory.limit_in_bytes": "300000\n",
        f"{group}/memory.usage_in_bytes": "400000\n",
        f"{group}/memory.stat": "cache 1\ntotal_inactive_file 40000\n",
    }
    assert available_host_memory(write(tmp_path, MEMINFO | files)) == 0
