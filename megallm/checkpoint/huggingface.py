"""Weights of Hugging Face directories: read slice by slice into any layout, written shard by shard.

    HFWeights    model.safetensors, or the shards that model.safetensors.index.json lists; checked from their headers
    load_into    fills a rank's parameters, reading just that rank's slices
    HFWriter     takes whole tensors one by one and leaves a directory that transformers opens

Everything is safetensors: pickled weights (.bin) are refused, whoever made them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megallm.config.huggingface import model_config_to_hf, with_family_biases
from megallm.config.model import ModelConfig
from megallm.model.hf_names import HEADS, base_prefix, canonical_parameters, hf_places, is_ignorable
from megallm.model.transformer import Transformer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "BF16", "F16")
_MAX_NAMES = 8
_ROWS_AT_A_TIME = 8192


class HFWeights:
    """The weights of a Hugging Face directory, under our global names. Opens files and reads headers.

    No data is read before `read`, but for a head that is stored although it is tied.
    """

    def __init__(self, directory: str | Path, model: ModelConfig, *, new_head: bool = False) -> None:
        """`new_head`: the head of `model` may be missing, because it is to be trained from new weights.

        FileNotFoundError if there are no safetensors weights; ValueError if they are not those of `model`: it names
        the tensors that are missing, of another shape or type, or unexpected, or a tied head that is not tied.
        """
        self.directory = Path(directory)
        self._places = hf_places(model)
        self._shapes = canonical_parameters(model)
        self._prefix = base_prefix(model.family)
        self._files = _open_files(self.directory)
        self._stored = self._index_names()
        self.missing: tuple[str, ...] = self._check(model, new_head=new_head)
        """Global names that the directory does not hold: the head, with `new_head`; else none."""
        if model.tie_word_embeddings and model.head == "lm":
            self._check_tied()

    def read(self, name: str, *, start: int = 0, length: int | None = None, dim: int = 0) -> torch.Tensor:
        """[start, start + length) along `dim` of the global parameter `name`, in the stored dtype, contiguous.

        Only that slice is read. length None = to the end. ValueError for a name or a range that is not there.
        """
        shape = self._shapes.get(name)
        if shape is None or name in self.missing:
            raise ValueError(f"{self.directory} holds no {name}")
        end = shape[dim] if length is None else start + length
        if not 0 <= start <= end <= shape[dim]:
            raise ValueError(f"{name} {list(shape)} has no range {start}:{end} in dimension {dim}")
        place = self._places[name]
        file, stored_name = self._stored[self._key(place.name)]
        part = file.get_slice(stored_name)[place.slices(dim=dim, start=start, length=end - start)]
        return part.t().contiguous() if place.is_transposed else part.contiguous()

    def _key(self, stored_name: str) -> str:
        """A name without the prefix that only models saved with their head have."""
        return stored_name.removeprefix(self._prefix)

    def _index_names(self) -> dict[str, tuple[Any, str]]:
        """Name without prefix -> (open file, name in it) of every stored tensor but ignorable buffers."""
        stored: dict[str, tuple[Any, str]] = {}
        for file in self._files:
            for name in file.keys():
                if is_ignorable(name):
                    continue
                if self._key(name) in stored:
                    raise ValueError(f"{self.directory} holds {self._key(name)} twice, the second time as {name}")
                stored[self._key(name)] = (file, name)
        return stored

    def _check_tied(self) -> None:
        """ValueError if a head is stored that is not the embedding: transformers 5 would then use it untied."""
        if "lm_head.weight" not in self._stored:
            return
        key = self._key(self._places["model.embed_tokens.weight"].name)
        head, embedding = (file.get_slice(name) for file, name in (self._stored["lm_head.weight"], self._stored[key]))
        is_same = (head.get_shape(), head.get_dtype()) == (embedding.get_shape(), embedding.get_dtype())
        for start in range(0, embedding.get_shape()[0], _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            is_same = is_same and torch.equal(head[rows], embedding[rows])
        if not is_same:
            raise ValueError(
                f"config.json in {self.directory} ties lm_head.weight to the embedding, but another one is stored: "
                "set tie_word_embeddings to false there to use it, or remove it from the files"
            )

    def _check(self, model: ModelConfig, *, new_head: bool) -> tuple[str, ...]:
        missing, problems = [], []
        expected = {self._key(place.name): (name, place) for name, place in self._places.items()}
        absent = [place.name for key, (_, place) in expected.items() if key not in self._stored]
        if new_head:
            missing = [name for name in absent if name in HEADS]
            absent = [name for name in absent if name not in HEADS]
        unneeded = {"lm_head.weight"} if model.tie_word_embeddings or model.head == "scalar" else set()
        if new_head:
            unneeded |= set(HEADS)
        extra = [name for key, (_, name) in self._stored.items() if key not in expected and key not in unneeded]
        differing = []
        for key, (_, place) in expected.items():
            if key not in self._stored:
                continue
            file, name = self._stored[key]
            header = file.get_slice(name)
            shape, kind = tuple(header.get_shape()), header.get_dtype()
            if shape != place.shape:
                differing.append(f"{name} is {list(shape)} instead of {list(place.shape)}")
            elif kind not in _FLOATS:
                differing.append(f"{name} is stored as {kind} instead of {', '.join(_FLOATS)}")
        for what, names in (
            ("missing", _unique(absent)),
            ("unexpected", extra),
            ("not as config.json says", differing),
        ):
            if names:
                problems.append(f"{what}: {_enumerate(names)}")
        if problems:
            raise ValueError(
                f"the weights in {self.directory} are not those of the {model.family} model that its config.json "
                f"describes; {'; '.join(problems)}"
            )
        return tuple(missing)


def load_into(
    model: Transformer,
    directory: str | Path,
    *,
    new_head: bool = False,
    groups: Iterable[Collection[str]] | None = None,
) -> tuple[str, ...]:
    """Fills this rank's parameters from a Hugging Face directory, reading only its slices.

    groups: local names of parameters that are filled one group after another (`FlatParameters.refill`).
    Values are cast to the parameters' dtype; adapters stay as they are. Returns the global names that keep their
    initial weights: none, or the head with `new_head`. Errors as HFWeights; every rank finds the same ones, before any
    parameter is touched.
    """
    weights = HFWeights(directory, model.config, new_head=new_head)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name in chain.from_iterable([parameters] if groups is None else groups):
            for piece in () if model.specs[name].is_adapter else model.specs[name].pieces:
                if piece.length and piece.name not in weights.missing:
                    part = weights.read(piece.name, start=piece.start, length=piece.length, dim=piece.dim)
                    piece.local(parameters[name]).copy_(part)
    return weights.missing


class HFWriter:
    """Writes a Hugging Face directory from whole tensors that come one by one, in any order.

        with HFWriter(directory, model) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor)

    Biases that the model lacks and transformers' models of its family always have are written as zeros.
    Keeps at most one shard in memory, and fused tensors whose parts have not all come. The directory appears under its
    name when everything is in it; after an error nothing is left.
    """

    def __init__(
        self,
        directory: str | Path,
        model: ModelConfig,
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        """`dtype`: what the weights are cast to; None = they stay as they come.

        ValueError if the directory exists and is not empty, or if transformers has no such model.
        """
        self.directory = Path(directory)
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise ValueError(f"{self.directory} exists and is not empty: remove it, or write to another directory")
        model_config_to_hf(model)  # refuses what transformers cannot express, before anything is written
        self._model, self._dtype, self._max_shard_bytes = model, dtype, max_shard_bytes
        self._shapes = canonical_parameters(with_family_biases(model))
        self._places = hf_places(with_family_biases(model))
        self._left = set(canonical_parameters(model))
        self._fused: dict[str, tuple[torch.Tensor, int]] = {}  # stored name -> tensor, elements still to come
        self._shard: dict[str, torch.Tensor] = {}
        self._weight_map: dict[str, int] = {}  # stored name -> shard
        self._num_shards = self._shard_bytes = self._total_bytes = self._num_parameters = 0
        self._written_dtype: torch.dtype | None = None
        place = self.directory.absolute()
        self._partial = place.with_name(place.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a copy of the whole global parameter `name`; ValueError for an unknown, repeated or misshapen one."""
        if name not in self._left:
            known = (
                "was given twice"
                if name in canonical_parameters(self._model)
                else f"is no parameter of this {self._model.family} model"
            )
            raise ValueError(f"{name} {known}")
        if tuple(tensor.shape) != self._shapes[name]:
            raise ValueError(f"{name} is {list(tensor.shape)} instead of {list(self._shapes[name])}")
        self._left.remove(name)
        self._place(name, tensor.detach())

    def add_file(self, name: str, content: bytes) -> None:
        """Puts one more file, such as tokenizer.json, into the directory."""
        (self._partial / name).write_bytes(content)

    def close(self) -> None:
        """Completes the directory; ValueError names the parameters that never came. `with` calls it."""
        if self._left:
            raise ValueError(f"cannot complete {self.directory}; missing: {_enumerate(sorted(self._left))}")
        own = canonical_parameters(self._model)
        for name in [name for name in self._shapes if name not in own]:  # biases that transformers adds
            self._place(name, torch.zeros(self._shapes[name], dtype=self._written_dtype))
        self._flush()
        files = {i: _shard_name(i, self._num_shards) for i in range(self._num_shards)}
        for i, file in files.items():
            (self._partial / _part_name(i)).rename(self._partial / file)
        if self._num_shards > 1:
            weight_map = {name: files[shard] for name, shard in sorted(self._weight_map.items())}
            metadata = {"total_parameters": self._num_parameters, "total_size": self._total_bytes}
            self._write_json(INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
        dtype = str(self._written_dtype).removeprefix("torch.")
        self._write_json("config.json", model_config_to_hf(self._model, dtype=dtype))
        ids = {"bos_token_id": self._model.bos_token_id, "eos_token_id": self._model.eos_token_id}
        self._write_json("generation_config.json", {"_from_model_config": True, **ids})
        if self.directory.exists():
            self.directory.rmdir()
        self._partial.rename(self.directory)

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        place, dtype = self._places[name], self._dtype or tensor.dtype
        if place.name not in self._fused:
            stored = torch.empty(place.shape, dtype=dtype)
            self._fused[place.name] = (stored, stored.numel())
        stored, elements_left = self._fused.pop(place.name)
        place.view(stored).copy_(tensor)
        if elements_left > tensor.numel():
            self._fused[place.name] = (stored, elements_left - tensor.numel())
        else:
            self._add_stored(place.name, stored)

    def _add_stored(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self._max_shard_bytes:
            self._flush()
        self._shard[name] = tensor
        self._shard_bytes += size
        self._weight_map[name] = self._num_shards
        self._total_bytes += size
        self._num_parameters += tensor.numel()
        self._written_dtype = self._written_dtype or tensor.dtype

    def _flush(self) -> None:
        path = self._partial / _part_name(self._num_shards)
        path.touch()
        mode = path.stat().st_mode  # what the umask allows; safetensors makes files that only their owner can read
        save_file(self._shard, path, metadata={"format": "pt"})
        path.chmod(mode)
        self._shard, self._shard_bytes = {}, 0
        self._num_shards += 1

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.add_file(name, (json.dumps(value, indent=2) + "\n").encode())


def _open_files(directory: Path) -> list[Any]:
    """The directory's safetensors files, open. FileNotFoundError or ValueError says what was looked for."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file():
        paths = [directory / name for name in _shards_of(index)]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"{index} lists files that are not there: {_enumerate(absent)}")
    elif single.is_file():
        paths = [single]
    elif not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: give a Hugging Face model directory")
    else:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickled:
            raise ValueError(
                f"{directory} holds pickled weights ({_enumerate(pickled)}), which can run code when opened and are "
                "not read: convert them with model.save_pretrained(directory, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{directory} holds no weights: looked for {SINGLE_FILE} and {INDEX_FILE}")
    return [_open_file(path) for path in paths]


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): download it again") from error


def _shards_of(index: Path) -> list[str]:
    """File names in an index, each once; all lie beside it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside or not names:
        raise ValueError(f"{index} must list files beside it, got {_enumerate(list(map(str, outside or ['none'])))}")
    return names


def _part_name(shard: int) -> str:
    return f"part-{shard}"


def _shard_name(shard: int, num_shards: int) -> str:
    return SINGLE_FILE if num_shards == 1 else f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _enumerate(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
