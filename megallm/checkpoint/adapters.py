"""Adapters in checkpoints: which there are, and the weights with them added.

    checkpoint   model     what loading means
    without      without   the weights
    without      with      the weights; adapters stay as they are           weights only
    with         without   the weights with the adapters added to them      weights only
    with         with      both; the adapters must be of one kind
    with         with      merge_adapters: the weights with the adapters added to them; the model's own stay as they are
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megallm.checkpoint.nf4 import CodedFiles
from megallm.checkpoint.slices import TensorSlice
from megallm.config.lora import LoraConfig, lora_targets
from megallm.config.model import ModelConfig
from megallm.config.serialize import from_plain
from megallm.model.transformer import Transformer

_FACTORS = ("lora_A", "lora_B")


def read_lora_config(directory: str | Path) -> LoraConfig | None:
    """The adapters in a checkpoint directory; None = it has none."""
    plain = json.loads((Path(directory) / "config.json").read_text()).get("lora")
    return None if plain is None else from_plain(LoraConfig, plain)


def open_weights(directory: Path, *, keep_adapters: bool) -> CodedFiles:
    """The weights of a checkpoint, dense, with its adapters beside them or else added to them."""
    lora = read_lora_config(directory)
    return CodedFiles(directory / "model") if keep_adapters or lora is None else MergedFiles(directory / "model", lora)


def check_adapters(directory: Path, own: LoraConfig | None, model: ModelConfig, *, weights_only: bool) -> None:
    """ValueError unless the checkpoint's adapters and the model's own go together as the table above says."""
    saved = read_lora_config(directory)
    if saved is None and own is not None and not weights_only:
        raise ValueError(
            f"checkpoint {directory} is of a run without adapters, so it has no optimizer state of theirs: load it as "
            "weights only (--model), to train adapters beside its weights"
        )
    if saved is not None and own is None and not weights_only:
        raise ValueError(
            f"checkpoint {directory} is of a run with adapters ({described(saved, model)}), and its optimizer "
            "state is theirs: give the same, or load it as weights only (--model), with the adapters added to them"
        )
    if saved is None or own is None:
        return
    if not weights_only and _base(saved) != _base(own):
        raise ValueError(
            f"checkpoint {directory} has adapters beside {_base(saved)}, this model beside {_base(own)}: give the "
            "same, or load it as weights only (--model), to go on beside other frozen weights"
        )
    if described(saved, model) != described(own, model):
        raise ValueError(
            f"checkpoint {directory} has adapters with {described(saved, model)}, this model with "
            f"{described(own, model)}: give the same, or export the checkpoint, which adds its adapters to "
            "the weights, and begin from that"
        )


def names_of(model: Transformer, kind: Literal["adapters", "trained", "frozen"]) -> set[str]:
    """Global names of this rank's parameters of a kind; what trains are adapters and a scalar head."""
    return {
        piece.name
        for name, parameter in model.named_parameters()
        for piece in model.specs[name].pieces
        if (model.specs[name].is_adapter if kind == "adapters" else parameter.requires_grad == (kind == "trained"))
    }


def described(lora: LoraConfig, model: ModelConfig) -> str:
    """What makes two adapters' weights mean the same."""
    kind = ", lora_rslora" if lora.lora_rslora else ""
    return (
        f"lora_rank {lora.lora_rank}, lora_alpha {lora.lora_alpha:g}{kind}, lora_targets "
        f"{' '.join(lora_targets(lora, model))}"
    )


def _base(lora: LoraConfig) -> str:
    if not lora.is_nf4:
        return "weights in the model's dtype (lora_base model)"
    return f"weights in 4 bits (lora_base nf4, lora_double_quant {str(lora.lora_double_quant).lower()})"


class MergedFiles(CodedFiles):
    """Weights with adapters, read as W + s B A: added in fp32, and rounded once to the dtype of what is filled."""

    def __init__(self, directory: Path, lora: LoraConfig) -> None:
        """lora: of the adapters in the files."""
        super().__init__(directory)
        self._scale = lora.scale
        self._factors = {name: shape for name, shape in self.shapes.items() if name.split(".")[-2] in _FACTORS}
        self.shapes = {name: shape for name, shape in self.shapes.items() if name not in self._factors}

    def fill(self, wanted: TensorSlice) -> None:
        """See SliceFiles."""
        down, up = (f"{wanted.name.removesuffix('.weight')}.{factor}.weight" for factor in _FACTORS)
        if down not in self._factors:
            super().fill(wanted)
            return
        dtype = torch.float64 if wanted.data.dtype == torch.float64 else torch.float32
        wide = torch.empty_like(wanted.data, dtype=dtype)
        super().fill(replace(wanted, data=wide))
        rank, (row, column), (rows, columns) = self._factors[down][0], wanted.start, wide.shape
        a = self._factor(down, (0, column), wide.new_empty(rank, columns))
        b = self._factor(up, (row, 0), wide.new_empty(rows, rank))
        wanted.data.copy_(wide.addmm_(b, a, alpha=self._scale))

    def _factor(self, name: str, start: tuple[int, int], out: torch.Tensor) -> torch.Tensor:
        shape = self._factors[name]
        self._copy(TensorSlice(name=name, shape=shape, start=start, data=out, is_owner=False))
        return out
