"""Checkpoints of any layout and ZeRO stage, loadable into any other.

    SAVE/step-00000020/
        config.json                     the model's shape and the run's settings
        state.json                      step, consumed samples, tokens: written last, its presence = complete
        model/shard-00001.safetensors           a rank's slices of the weights, by global name and offset
        optimizer/shard-00001.safetensors       `exp_avg.NAME`, `exp_avg_sq.NAME`, `master.NAME` likewise

Weights in 4 bits are stored as such (nf4.py). A slice held by several ranks is written by one. A rank that loads reads
just the overlap of its slices with what any rank had written. Storage is safetensors with JSON headers (slices.py):
nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint.adapters import check_adapters, names_of, open_weights, read_lora_config
from megallm.checkpoint.nf4 import CodedFiles, code_slices
from megallm.checkpoint.slices import SliceFiles, TensorSlice, write_slices
from megallm.config.model import ModelConfig
from megallm.config.serialize import from_plain, to_plain
from megallm.model.hf_names import HEADS
from megallm.model.transformer import Transformer
from megallm.optim.flat import FlatParameters
from megallm.optim.layout import boxes
from megallm.optim.optimizer import Optimizer, StatePart
from megallm.parallel.collectives import barrier
from megallm.parallel.layout import is_counted

_PREFIX = "step-"
_OTHER_CHECKPOINT = "copy the checkpoint again, or give another step-..."


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Sequences trained on, whole job."""
    tokens: int
    """Tokens trained on, whole job."""
    extra: dict[str, float] = field(default_factory=dict)
    """Numbers of the trainer's own."""


def save(
    root: str | Path,
    model: Transformer,
    optimizer: Optimizer | None,
    state: TrainState,
    *,
    flat: FlatParameters | None = None,
    run_config: dict[str, Any] | None = None,
    keep: int = 0,
) -> Path:
    """Writes SAVE/step-N and returns it; older ones beyond `keep` are then removed (0 = none). A collective.

    flat: the model's flat parameters, where it has some.
    Written under a temporary name and renamed when complete, so that a crash leaves no half checkpoint.
    """
    mesh = model.mesh
    final = Path(root) / f"{_PREFIX}{state.step:08d}"
    partial = final.with_name(final.name + ".partial")
    is_writer = mesh.world.rank == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        lora = {} if model.lora is None else {"lora": to_plain(model.lora)}
        _write_json(partial / "config.json", {"model": to_plain(model.config)} | lora | {"run": run_config or {}})
    barrier(mesh.world, mesh.device)
    _save_part(partial / "model", [*weight_slices(model, flat), *code_slices(model)], model)
    if optimizer is not None:
        moments = [
            each
            for kind, parts in optimizer.state().items()
            for each in _part_slices(model, parts, prefix=f"{kind}.", is_owner=_writes_shards(model, flat))
        ]
        _save_part(partial / "optimizer", moments, model)
    barrier(mesh.world, mesh.device)
    if is_writer:
        _write_json(partial / "state.json", vars(state) | _scalars(optimizer))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _prune(Path(root), keep)
    barrier(mesh.world, mesh.device)
    return final


def load(
    directory: str | Path,
    model: Transformer,
    optimizer: Optimizer | None = None,
    *,
    flat: FlatParameters | None = None,
    new_head: bool = False,
    merge_adapters: bool = False,
) -> TrainState:
    """Fills the model (and the optimizer) from a checkpoint of any layout; returns where that run stood. A collective.

    new_head: the model's head keeps its weights, the checkpoint's is another.
    merge_adapters: the checkpoint's adapters become part of the weights, beside which the model's own begin; without an
    optimizer. What loading means where one of the two has adapters: adapters.py.
    ValueError if the model's shape or the optimizer is another, or if tensors are missing.
    """
    directory = Path(directory)
    saved = read_model_config(directory)
    if new_head:
        saved = saved.replace(head=model.config.head, tie_word_embeddings=model.config.tie_word_embeddings)
    if saved != model.config:
        changed = [k for k, v in to_plain(model.config).items() if to_plain(saved).get(k) != v]
        raise ValueError(f"checkpoint {directory} is of another model: {', '.join(changed)} differ")
    values = _read_json(directory / "state.json")
    if merge_adapters:
        assert optimizer is None
    else:
        check_adapters(directory, model.lora, model.config, weights_only=optimizer is None)
    weights = open_weights(directory, keep_adapters=model.lora is not None and not merge_adapters)
    kept = set(HEADS) if new_head else set()
    if merge_adapters or read_lora_config(directory) is None:
        kept |= names_of(model, "adapters")
    for each in weight_slices(model, flat):
        if each.name not in kept:
            weights.fill(each)
    _fill_quantized(model, weights)
    if optimizer is not None:
        stored, state = SliceFiles(directory / "optimizer"), optimizer.state()
        if not stored.shapes and not values.get("optimizer"):
            raise ValueError(f"checkpoint {directory} has no optimizer state: load it as weights only, to start anew")
        writer = values.get("optimizer", "adamw")
        if writer != optimizer.name:
            raise ValueError(
                f"checkpoint {directory} was saved with optimizer {writer}, this is {optimizer.name}: use that, or "
                "load it as weights only, to start anew"
            )
        if not any(name.startswith("master.") for name in stored.shapes):  # saved in fp32
            for each in _part_slices(model, state.pop("master", ()), prefix="", is_owner=False):
                weights.fill(each)
        elif "master" not in state:  # saved by a bf16 run: its fp32 weights are there
            frozen = {f"master.{name}" for name in names_of(model, "frozen")}
            for each in weight_slices(model, flat, prefix="master."):
                if each.name not in frozen:
                    stored.fill(each)
        for kind, parts in state.items():
            for each in _part_slices(model, parts, prefix=f"{kind}.", is_owner=False):
                stored.fill(each)
        optimizer.set_num_steps(values["optimizer_steps"])
        if optimizer.loss_scale is not None and "loss_scale" in values:
            optimizer.loss_scale.load(values["loss_scale"])
        if "master" not in optimizer.state():
            optimizer.refresh_master()
        optimizer.publish()
    return TrainState(
        step=values["step"], consumed_samples=values["consumed_samples"], tokens=values["tokens"],
        extra=values.get("extra", {}),
    )  # fmt: skip


def latest(root: str | Path) -> Path | None:
    """The newest complete checkpoint under `root` (or `root` itself, if it is one); None if there is none."""
    root = Path(root)
    if (root / "state.json").is_file():
        return root
    if not root.is_dir():
        return None
    complete = [p for p in _steps(root) if (p / "state.json").is_file()]
    return complete[-1] if complete else None


def read_run(directory: str | Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint; empty if it did not say."""
    run: dict[str, Any] = _read_json(Path(directory) / "config.json").get("run", {})
    return run


def read_model_config(directory: str | Path) -> ModelConfig:
    """The shape of the model in a checkpoint directory."""
    file = Path(directory) / "config.json"
    plain = _read_json(file)
    if "model" not in plain:
        raise ValueError(f"{file} has no key model, so that it is not of a checkpoint: {_OTHER_CHECKPOINT}")
    try:
        return from_plain(ModelConfig, plain["model"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}: {_OTHER_CHECKPOINT}") from error


def read_full_tensors(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(global name, whole tensor) of every weight of a checkpoint, one at a time, without ranks.

    Adapters are added to the weights they stand beside.
    """
    yield from open_weights(Path(directory), keep_adapters=False).whole()


def weight_slices(model: Transformer, flat: FlatParameters | None, *, prefix: str = "") -> list[TensorSlice]:
    """What this rank holds of the weights but those in 4 bits: its shards at ZeRO stage 3, else whole parameters."""
    if flat is not None:
        flat.settle()
    in_shards = set() if flat is None or flat.zero < 3 else set(flat.parameters)
    whole = [
        StatePart(name, 0, p.data.view(-1))
        for name, p in model.named_parameters()
        if name not in in_shards and name not in model.quantized
    ]
    slices = _part_slices(model, whole, prefix=prefix, is_owner=model.mesh.dp.rank == 0)
    if flat is None or not in_shards:
        return slices
    shards = [
        StatePart(slot.name, start, each.shard[at : at + stop - start])
        for each in flat.buckets
        for slot, start, stop, at in each.parts()
    ]
    return slices + _part_slices(model, shards, prefix=prefix, is_owner=_writes_shards(model, flat))


def _fill_quantized(model: Transformer, weights: CodedFiles) -> None:
    """Weights in 4 bits, taken over as they are stored, or quantised from what is. A collective over tp."""
    codes = code_slices(model)
    if weights.holds(codes):
        for each in codes:
            weights.fill_stored(each)
        return
    for name, held in model.quantized.items():
        for _ in held.refill():
            dense = [StatePart(name, 0, held.parameter.data.view(-1))]
            for each in _part_slices(model, dense, prefix="", is_owner=False):
                weights.fill(each)


def _writes_shards(model: Transformer, flat: FlatParameters | None) -> bool:
    """Whether this rank is the one of those that hold its shards that writes them."""
    sharded = flat is not None and flat.zero > 0
    return model.mesh.replicate.rank == 0 if sharded else model.mesh.dp.rank == 0


def _part_slices(
    model: Transformer, parts: Sequence[StatePart], *, prefix: str, is_owner: bool
) -> list[TensorSlice]:
    """Flat parts of local parameters (or of anything of their shapes) as slices of global tensors."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    slices = []
    for part in parts:
        spec = model.specs[part.name]
        for box in boxes(shapes[part.name], part.start, part.start + part.data.numel()):
            first = box.first - part.start
            values = part.data[first : first + math.prod(box.shape)].view(box.shape)
            for piece in spec.pieces:
                start = max(box.start[piece.dim], piece.offset)
                stop = min(box.start[piece.dim] + box.shape[piece.dim], piece.offset + piece.length)
                if start < stop:
                    place = list(box.start)
                    place[piece.dim] = start - piece.offset + piece.start
                    counted = is_counted(spec, piece, tp=model.mesh.tp, is_second_copy=model.is_second_copy(part.name))
                    slices.append(
                        TensorSlice(
                            name=prefix + piece.name,
                            shape=piece.shape,
                            start=tuple(place),
                            data=values.narrow(piece.dim, start - box.start[piece.dim], stop - start),
                            is_owner=is_owner and counted,
                        )
                    )
    return slices


def _save_part(directory: Path, slices: list[TensorSlice], model: Transformer) -> None:
    write_slices(directory, [each for each in slices if each.is_owner], rank=model.mesh.world.rank)


def _scalars(optimizer: Optimizer | None) -> dict[str, Any]:
    if optimizer is None:
        return {"optimizer_steps": 0.0}
    scale = {} if optimizer.loss_scale is None else {"loss_scale": optimizer.loss_scale.state()}
    return {"optimizer": optimizer.name, "optimizer_steps": float(optimizer.num_steps)} | scale


def _steps(root: Path) -> list[Path]:
    return sorted(p for p in root.glob(f"{_PREFIX}*") if p.is_dir() and not p.name.endswith(".partial"))


def _prune(root: Path, keep: int) -> None:
    complete = [p for p in _steps(root) if (p / "state.json").is_file()]
    for old in complete[:-keep] if keep else []:
        shutil.rmtree(old)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, not JSON ({error}): {_OTHER_CHECKPOINT}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path} is damaged, not a JSON object: {_OTHER_CHECKPOINT}")
    return plain


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
