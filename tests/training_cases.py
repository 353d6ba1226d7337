"""Models, batches and layouts that several test files train: one `Case` is one run, named after what it varies.

The models are awkward on purpose: a vocabulary that nothing divides, labels that are missing in very different
numbers from sequence to sequence (in one sequence of each batch altogether), a clipped gradient, dropout, layers that
do not divide over stages. The sequences count upwards in steps of 1 to 3, so that there is something to learn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from megallm.config.model import ModelConfig
from megallm.config.numerics import NumericsConfig, Precision
from megallm.config.optim import OptimConfig
from megallm.config.parallel import Offload, ParallelConfig, ScheduleName
from megallm.model.transformer import Recompute
from megallm.parallel.mesh import Mesh
from megallm.testing.tiny import tiny_config
from megallm.testing.worker import call_number
from megallm.trainers.engine import Engine
from megallm.trainers.losses import language_model_loss

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_STEPS = 20
BATCH, SEQ, VOCAB = 8, 16, 101
SEED = 7
OPTIM = OptimConfig(learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1)

Result = TypeVar("Result")
_MESHES: dict[tuple[int, int, int, int, int | None], Mesh] = {}

_SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
MODELS: dict[str, ModelConfig] = {
    # Two query heads share a key/value head.
    "llama_untied": tiny_config("llama", num_hidden_layers=4, num_key_value_heads=2, **_SMALL),
    "gpt2_tied_dropout": tiny_config(
        "gpt2", num_hidden_layers=4, num_key_value_heads=4, hidden_dropout=0.1, attention_dropout=0.1, **_SMALL
    ),
    # 5 layers: no pipeline divides them.
    "qwen2_tied_uneven": tiny_config("qwen2", num_hidden_layers=5, num_key_value_heads=2, **_SMALL),
    # One key/value head, which several tp ranks must hold; norms of q and k; head_dim is not hidden_size / heads.
    "qwen3_untied_one_kv_head": tiny_config(
        "qwen3", num_hidden_layers=3, num_key_value_heads=1, **(_SMALL | {"head_dim": 12})
    ),
}
# For pp 4 x 2 virtual stages.
MODELS["llama_untied_deep"] = MODELS["llama_untied"].replace(num_hidden_layers=8)
MODELS["gpt2_tied_deep"] = MODELS["gpt2_tied_dropout"].replace(num_hidden_layers=8)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: a model, a layout and what else must not matter."""

    model: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    v: int = 1
    sp: bool | None = None
    schedule: ScheduleName | None = None
    mbs: int = 4
    recompute: Recompute = "none"
    precision: Precision = "fp64"
    zero: Literal[0, 1, 2, 3] = 0
    shard: int | None = None
    keep: bool = False
    offload: Offload = "none"
    grads: Literal["fp32", "bf16"] | None = None
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        """Everything that is not the default, as a test's id."""
        words = [self.model]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(value if isinstance(value, str) else f"{field.name}{value}")
        return "-".join(words)


def make_engine(case: Case, *, config: ModelConfig | None = None, **overrides: Any) -> Engine:
    """The case's engine on this rank, fresh, of its model or of `config`. A collective of the case's world."""
    mesh = _mesh_of(case.tp, case.pp, case.dp, case.shard)
    options: dict[str, Any] = {
        "parallel": ParallelConfig(
            tp=case.tp,
            pp=case.pp,
            virtual_stages=case.v,
            schedule=case.schedule,
            sequence_parallel=case.sp,
            zero=case.zero,
            zero_keep=case.keep,
            offload=case.offload,
            bucket_size=5000,  # several buckets a model
        ),
        "optim": dataclasses.replace(OPTIM, optimizer=case.optimizer),
        "micro_batch_size": case.mbs,
        "precision": NumericsConfig(precision=case.precision, grad_dtype=case.grads),
        "recompute": case.recompute,
        "seed": SEED,
    }
    return Engine(MODELS[case.model] if config is None else config, mesh, **(options | overrides))


def _mesh_of(tp: int, pp: int, dp: int, shard: int | None) -> Mesh:
    """One mesh for all cases of a layout: every gloo group has threads and sockets that wake up again and again.

    A pool destroys the groups of a call when it ends.
    """
    key = (call_number(), tp, pp, dp, shard)
    if key not in _MESHES:
        for old in [each for each in _MESHES if each[0] != key[0]]:
            del _MESHES[old]
        _MESHES[key] = Mesh.build(tp=tp, pp=pp, dp=dp, shard_size=shard)
    return _MESHES[key]


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """input_ids and labels [BATCH, SEQ] of a step; sequence i lacks about i / 12 of its labels, one lacks all."""
    generator = torch.Generator().manual_seed(1000 + step)
    first = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (BATCH, 1), generator=generator)
    ids = (first + stride * torch.arange(SEQ + 1)) % VOCAB
    labels = ids[:, 1:].clone()
    missing = torch.rand(BATCH, SEQ, generator=generator) < torch.arange(BATCH).unsqueeze(1) / 12
    missing[step % BATCH] = True
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels.masked_fill_(missing, -100)}


def own_batch(step: int, mesh: Mesh) -> dict[str, torch.Tensor]:
    """This data-parallel rank's sequences."""
    return {name: tensor.chunk(mesh.dp.size)[mesh.dp.rank] for name, tensor in global_batch(step).items()}


def labelled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with a label at every place: what formulas of memory and traffic are for."""
    return batch | {"labels": batch["input_ids"]}


def train(engine: Engine, first: int, stop: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps first .. stop-1."""
    curve = []
    for step in range(first, stop):
        metrics = engine.train_step(own_batch(step, engine.mesh), language_model_loss).metrics()
        curve.append((metrics["loss"], metrics["grad_norm"]))
    return curve


def train_cases(rank: int, world_size: int, cases: list[Case], steps: int) -> dict[str, list[tuple[float, float]]]:
    """The curves of several cases, by name. To be run on `world_size` ranks."""
    return {case.name: train(make_engine(case), 0, steps) for case in cases}


def once(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, called once for each argument: later calls return what the first did, or raise what it raised.

    Many tests look at one run of many ranks; when that fails, each of them says so without running it again.
    """

    @functools.cache
    def outcome(*args: Any) -> tuple[Any, BaseException | None]:
        try:
            return function(*args), None
        except Exception as error:
            return None, error

    @functools.wraps(function)
    def remembered(*args: Any) -> Result:
        result, error = outcome(*args)
        if error is not None:
            raise error
        return result

    return remembered
