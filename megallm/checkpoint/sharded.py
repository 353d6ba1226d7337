"""Checkpoints of any layout, loadable into any other, through torch.distributed.checkpoint (DCP).

    SAVE/step-00000020/
        config.json                     the model's shape and the run's settings
        state.json                      step, consumed samples, tokens: written last, its presence = complete
        model/shard-00001-....safetensors       every rank's slices of the weights, by global name and offset
        optimizer/shard-....safetensors         `exp_avg.NAME`, `exp_avg_sq.NAME`, `master.NAME` likewise

A slice held by several ranks is written by one. A rank that loads reads just the overlap of its slices with what any
rank had written. Storage is safetensors with JSON headers: nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megallm.checkpoint.planners import SliceLoader, SliceSaver, TensorSlice
from megallm.config.model import ModelConfig
from megallm.config.serialize import from_plain, to_plain
from megallm.model.transformer import Transformer
from megallm.optim.optimizer import AdamW
from megallm.parallel.collectives import barrier
from megallm.parallel.layout import is_counted

_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Sequences trained on, whole job."""
    tokens: int
    """Tokens trained on, whole job."""


def save(
    root: str | Path,
    model: Transformer,
    optimizer: AdamW | None,
    state: TrainState,
    *,
    run_config: dict[str, Any] | None = None,
    keep: int = 0,
) -> Path:
    """Writes SAVE/step-N and returns it; older ones beyond `keep` are then removed (0 = none). A collective.

    Written under a temporary name and renamed when complete, so that a crash leaves no half checkpoint.
    """
    mesh = model.mesh
    final = Path(root) / f"{_PREFIX}{state.step:08d}"
    partial = final.with_name(final.name + ".partial")
    is_writer = mesh.world.rank == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", {"model": to_plain(model.config), "run": run_config or {}})
    barrier(mesh.world, mesh.device)
    _save_part(partial / "model", _weights(model), model)
    if optimizer is not None:
        _save_part(partial / "optimizer", _moments(model, optimizer), model)
    barrier(mesh.world, mesh.device)
    if is_writer:
        _write_json(partial / "state.json", vars(state) | {"optimizer_steps": _optimizer_steps(optimizer)})
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _prune(Path(root), keep)
    barrier(mesh.world, mesh.device)
    return final


def load(directory: str | Path, model: Transformer, optimizer: AdamW | None = None) -> TrainState:
    """Fills the model (and the optimizer) from a checkpoint of any layout; returns where that run stood. A collective.

    ValueError if the model's shape is another, or if tensors are missing.
    """
    directory = Path(directory)
    saved = read_model_config(directory)
    if saved != model.config:
        changed = [k for k, v in to_plain(model.config).items() if to_plain(saved).get(k) != v]
        raise ValueError(f"checkpoint {directory} is of another model: {', '.join(changed)} differ")
    values = json.loads((directory / "state.json").read_text())
    _load_part(directory / "model", _weights(model))
    if optimizer is not None:
        moments = directory / "optimizer"
        if not moments.is_dir():
            raise ValueError(f"checkpoint {directory} has no optimizer state: load it as weights only, to start anew")
        state = optimizer.state()
        if _holds(moments, "master."):  # saved by a bf16 run: its fp32 weights are there
            state.setdefault("master", {name: p.data for name, p in model.named_parameters()})
        elif master := state.pop("master", None):  # saved in fp32, which a bf16 run keeps in its master weights
            parameters = dict(model.named_parameters())
            wide = {name: view.view(parameters[name].shape) for name, view in master.items()}
            _load_part(directory / "model", _slices(model, wide, prefix=""))
        _load_part(moments, _shaped(model, state))
        optimizer.set_num_steps(values["optimizer_steps"])
        optimizer.publish()
    return TrainState(step=values["step"], consumed_samples=values["consumed_samples"], tokens=values["tokens"])


def latest(root: str | Path) -> Path | None:
    """The newest complete checkpoint under `root` (or `root` itself, if it is one); None if there is none."""
    root = Path(root)
    if (root / "state.json").is_file():
        return root
    if not root.is_dir():
        return None
    complete = [p for p in _steps(root) if (p / "state.json").is_file()]
    return complete[-1] if complete else None


def read_model_config(directory: str | Path) -> ModelConfig:
    """The shape of the model in a checkpoint directory."""
    return from_plain(ModelConfig, json.loads((Path(directory) / "config.json").read_text())["model"])


def read_full_tensors(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(global name, whole tensor) of every weight of a checkpoint, one at a time, without ranks."""
    reader = HuggingFaceStorageReader(str(Path(directory) / "model"))
    metadata = reader.read_metadata()
    files = {index: info.relative_path for index, info in metadata.storage_data.items()}
    for name, tensor_metadata in metadata.state_dict_metadata.items():
        assert isinstance(tensor_metadata, TensorStorageMetadata)
        full = torch.empty(tensor_metadata.size, dtype=tensor_metadata.properties.dtype)
        for index, path in files.items():
            if index.fqn == name:
                with safe_open(path, framework="pt") as f:
                    part = f.get_tensor(name)
                where = tuple(slice(o, o + n) for o, n in zip(index.offset, part.shape, strict=True))
                full[where] = part
        yield name, full


def _weights(model: Transformer) -> list[TensorSlice]:
    return _slices(model, {name: parameter.data for name, parameter in model.named_parameters()}, prefix="")


def _moments(model: Transformer, optimizer: AdamW) -> list[TensorSlice]:
    return _shaped(model, optimizer.state())


def _shaped(model: Transformer, state: dict[str, dict[str, torch.Tensor]]) -> list[TensorSlice]:
    parameters = dict(model.named_parameters())
    slices = []
    for kind, views in state.items():
        shaped = {name: view.view(parameters[name].shape) for name, view in views.items()}
        slices += _slices(model, shaped, prefix=f"{kind}.")
    return slices


def _slices(model: Transformer, tensors: dict[str, torch.Tensor], *, prefix: str) -> list[TensorSlice]:
    slices = []
    for name, tensor in tensors.items():
        spec = model.specs[name]
        for piece in spec.pieces:
            if piece.length:
                slices.append(
                    TensorSlice(
                        name=prefix + piece.name,
                        shape=piece.shape,
                        start=piece.local_start,
                        data=piece.local(tensor),
                        is_owner=model.mesh.dp.rank == 0
                        and is_counted(spec, piece, tp=model.mesh.tp, is_second_copy=model.is_second_copy(name)),
                    )
                )
    return slices


def _save_part(directory: Path, slices: list[TensorSlice], model: Transformer) -> None:
    own = [s for s in slices if s.is_owner]
    world = model.mesh.world
    with _silence():
        dcp_save(
            {s.name: s.data for s in own},
            storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True),
            planner=SliceSaver(own),
            process_group=world.group,
            no_dist=world.size == 1,
        )


def _load_part(directory: Path, slices: list[TensorSlice]) -> None:
    reader = HuggingFaceStorageReader(str(directory))
    state = {s.name: s.data for s in slices}
    with _silence():
        dcp_load(state, storage_reader=reader, planner=SliceLoader(slices), no_dist=True)


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps DCP from warning that a rank works by itself, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _holds(directory: Path, prefix: str) -> bool:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            if any(key.startswith(prefix) for key in f.keys()):
                return True
    return False


def _optimizer_steps(optimizer: AdamW | None) -> float:
    return 0.0 if optimizer is None else float(optimizer.num_steps)


def _steps(root: Path) -> list[Path]:
    return sorted(p for p in root.glob(f"{_PREFIX}*") if p.is_dir() and not p.name.endswith(".partial"))


def _prune(root: Path, keep: int) -> None:
    complete = [p for p in _steps(root) if (p / "state.json").is_file()]
    for old in complete[:-keep] if keep else []:
        shutil.rmtree(old)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
