"""Adapters in the format of Hugging Face's peft: adapter_config.json beside adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      ours, behind a prefix
    base_model.model.score.weight                                       the scalar head of a reward model, trained too

Files are written whole from whatever layout holds the adapters, and read slice by slice into any. Pickled adapters
(.bin) are refused, whoever made them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megallm.checkpoint.adapters import described, names_of
from megallm.checkpoint.sharded import weight_slices
from megallm.checkpoint.slices import SliceFiles, write_slices
from megallm.config.lora import PROJECTIONS, LoraConfig, lora_targets
from megallm.config.model import ModelConfig
from megallm.model.hf_names import canonical_parameters
from megallm.model.transformer import Transformer
from megallm.optim.flat import FlatParameters
from megallm.parallel.collectives import barrier

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SCORE = "score.weight"
_REFUSED = {
    "use_dora": "DoRA", "rank_pattern": "ranks that differ", "alpha_pattern": "scales that differ",
    "fan_in_fan_out": "transposed weights", "lora_bias": "biases of adapters", "layer_replication": "repeated layers",
    "trainable_token_indices": "trained tokens", "target_parameters": "adapters of bare parameters",
    "alora_invocation_tokens": "adapters that wait for tokens", "use_qalora": "pooled inputs",
    "use_bdlora": "block-diagonal factors", "velora_config": "VeLoRA", "kasa_config": "KaSA",
    "arrow_config": "routing between adapters", "monteclora_config": "MonteCLoRA",
}  # fmt: skip
"""Settings of peft's adapters that make them more than W + s B A, and what they ask for."""
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin (`init_lora_weights`) that change the base weights as well."""


def save_peft(
    directory: str | Path, model: Transformer, *, flat: FlatParameters | None = None, base_model: str | None = None
) -> None:
    """Writes the model's adapters as a directory that peft loads. A collective; `directory` appears when complete.

    flat: the model's flat parameters, where it has some. base_model: where users find the weights it stands beside.
    ValueError if the model has no adapters, if peft has no such adapters, or if the directory exists and is not empty.
    """
    out, mesh = Path(directory), model.mesh
    _check_model(model.config)
    if model.lora is None:
        raise ValueError("this model has no adapters to write: build it with lora_rank above 0")
    _check_empty(out)
    barrier(mesh.world, mesh.device)
    parts = _partial(out).with_suffix(".slices")
    if mesh.world.rank == 0:
        shutil.rmtree(parts, ignore_errors=True)
    barrier(mesh.world, mesh.device)
    own = [s for s in weight_slices(model, flat) if s.is_owner and s.name in names_of(model, "trained")]
    write_slices(parts, own, rank=mesh.world.rank)
    barrier(mesh.world, mesh.device)
    if mesh.world.rank == 0:
        write_peft(out, dict(SliceFiles(parts).whole()), model.lora, model.config, base_model=base_model)
        shutil.rmtree(parts)
    barrier(mesh.world, mesh.device)


def write_peft(
    directory: str | Path,
    tensors: Mapping[str, torch.Tensor],
    lora: LoraConfig,
    model: ModelConfig,
    *,
    base_model: str | None = None,
) -> None:
    """The directory of whole adapters, given by their global names, of one process; errors as `save_peft`."""
    out = Path(directory)
    _check_model(model)
    _check_empty(out)
    partial = _partial(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    named = {_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    weights = partial / WEIGHTS_FILE
    weights.touch()
    mode = weights.stat().st_mode  # what the umask allows; safetensors makes files that only their owner can read
    save_file(named, weights, metadata={"format": "pt"})
    weights.chmod(mode)
    text = json.dumps(_peft_config(lora, model, base_model), indent=2) + "\n"
    (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
    if out.exists():
        out.rmdir()
    partial.rename(out)


def load_peft(directory: str | Path, model: Transformer, *, flat: FlatParameters | None = None) -> None:
    """Fills the model's adapters from a peft directory, reading this rank's slices only. No collective.

    ValueError if they are of another base model or kind than the model's; nothing is changed then.
    """
    if model.lora is None:
        raise ValueError(f"this model has no adapters to take those of {directory}: build it with read_peft_config's")
    found = read_peft_config(directory)
    if described(found, model.config) != described(model.lora, model.config):
        raise ValueError(
            f"the adapters in {directory} have {described(found, model.config)}, this model's have "
            f"{described(model.lora, model.config)}: build the model with read_peft_config's"
        )
    with _open(Path(directory)) as file:
        _check_tensors(Path(directory), file, model)
        wanted = names_of(model, "trained")
        for each in weight_slices(model, flat):
            if each.name in wanted:
                part = (slice(a, a + n) for a, n in zip(each.start, each.data.shape, strict=True))
                each.data.copy_(file.get_slice(_PREFIX + each.name)[tuple(part)])


def read_peft_config(directory: str | Path) -> LoraConfig:
    """What a model needs to have to take a peft directory's adapters.

    FileNotFoundError if there are none; ValueError if they are pickled, or are more than LoRA of a layer's linears.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG_FILE}: give a directory that peft saved adapters in")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if plain.get("peft_type") != "LORA":
        raise ValueError(f"{path} is of peft_type {plain.get('peft_type')}: only LORA can be read")
    for name, what in _REFUSED.items():
        if plain.get(name):
            raise ValueError(f"{path} asks for {what} ({name}), which these adapters do not have: merge them with peft")
    start = str(plain.get("init_lora_weights", True))
    if start.startswith(_CHANGED_BASE):
        raise ValueError(
            f"{path} was begun with init_lora_weights {start}, which changes the base weights: save it with peft's "
            "path_initial_model_for_weight_conversion, or merge it with peft"
        )
    if plain.get("bias", "none") != "none":
        raise ValueError(f"{path} trained biases (bias {plain['bias']}), which these adapters lack: merge with peft")
    others = [name for name in plain.get("modules_to_save") or () if name != "score"]
    if others:
        raise ValueError(f"{path} trained whole modules ({', '.join(others)}) as well: merge them with peft")
    with _open(Path(directory)) as file:
        targets = {_projection(name) for name in file.keys() if not name.endswith(_SCORE)}
    unknown = sorted(targets - set(PROJECTIONS))
    if unknown:
        raise ValueError(f"{directory} has adapters of {', '.join(unknown)}: only {', '.join(PROJECTIONS)} can be read")
    return LoraConfig(
        lora_rank=int(plain["r"]),
        lora_alpha=float(plain["lora_alpha"]),
        lora_dropout=float(plain.get("lora_dropout") or 0.0),
        lora_targets=tuple(name for name in PROJECTIONS if name in targets),
        lora_rslora=bool(plain.get("use_rslora")),
    )


def _check_tensors(directory: Path, file: Any, model: Transformer) -> None:
    """ValueError unless the file holds what the whole model has: the same on every rank."""
    assert model.lora is not None
    expected = adapter_shapes(model.config, model.lora)
    stored = {name.removeprefix(_PREFIX): tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is unexpected" for name in stored if name not in expected]
    problems += [
        f"{name} is {list(shape)} instead of {list(expected[name])}"
        for name, shape in stored.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        rest = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"the adapters in {directory} are of another base model than this {model.config.family} model: "
            f"{'; '.join(problems[:4])}{rest}"
        )


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Global name and shape of what trains beside the weights: adapters, and a scalar head."""
    targets, shapes = lora_targets(lora, model), {}
    for name, shape in canonical_parameters(model).items():
        if name == _SCORE:
            shapes[name] = shape
        elif name.endswith(".weight") and name.split(".")[-2] in targets:
            prefix = name.removesuffix(".weight")
            shapes[f"{prefix}.lora_A.weight"] = (lora.lora_rank, shape[1])
            shapes[f"{prefix}.lora_B.weight"] = (shape[0], lora.lora_rank)
    return shapes


def _peft_config(lora: LoraConfig, model: ModelConfig, base_model: str | None) -> dict[str, Any]:
    is_scalar = model.head == "scalar"
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_scalar else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.lora_rank,
        "lora_alpha": int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.lora_rslora,
        "target_modules": list(lora_targets(lora, model)),
        "modules_to_save": ["score"] if is_scalar else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _check_model(model: ModelConfig) -> None:
    if model.family == "gpt2":
        raise ValueError(
            "peft has one adapter for GPT-2's q, k and v together, and these are three: export the checkpoint with "
            "its adapters added to the weights"
        )


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: remove it, or write to another directory")


def _partial(out: Path) -> Path:
    place = out.absolute()
    return place.with_name(place.name + ".partial")


def _projection(name: str) -> str:
    """`q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return name.split(".")[-3] if name.count(".") >= 3 else name


def _open(directory: Path) -> Any:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise ValueError(
                f"{directory} holds pickled adapters (adapter_model.bin), which can run code when opened and are not "
                "read: save them with peft's save_pretrained(directory, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{directory} holds no {WEIGHTS_FILE}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): copy it again") from error
