"""Rotary settings of Hugging Face's config.json, under their old names and their new one.

transformers 4      "rope_theta": 5e5, "rope_scaling": {"rope_type" (once "type"): "llama3", "factor": 8.0, ...}
transformers 5      "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megallm.config.model import ModelConfig, RopeScaling

_DEFAULT_THETA = 10000.0
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
"""rope_type: keys that must be there, keys that may; RopeScaling's fields have the same names."""


def read_rope(config: Mapping[str, Any], *, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """(rope_theta, rope_scaling). As in transformers, `rope_scaling` goes before `rope_parameters`.

    ValueError for anything that would be computed otherwise there.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError(f"rope parameters {parameters!r} are not one flat object for all layers")
    theta = parameters.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA
    _check_number("rope_theta", theta)
    rotated = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise ValueError(f"partial_rotary_factor {rotated}: the whole head is always rotated")
    rope_type = parameters.get("rope_type", parameters.get("type")) or "default"
    if rope_type == "default":
        return float(theta), None
    if rope_type not in _KEYS:
        raise ValueError(f"rope_type {rope_type!r} is not one of default, {', '.join(_KEYS)}")
    values = dict(parameters)
    beside = config.get("original_max_position_embeddings")
    if beside is not None:  # outside the rope parameters it has priority
        values["original_max_position_embeddings"] = beside
    return float(theta), _read_scaling(rope_type, values, max_position_embeddings)


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """The rotary keys of `model`'s config.json, old and new."""
    parameters: dict[str, Any] = {"rope_type": "default"}
    scaling = model.rope_scaling
    if scaling is not None:
        required, optional = _KEYS[scaling.rope_type]
        given = {key: getattr(scaling, key) for key in (*required, *optional)}
        parameters = {"rope_type": scaling.rope_type, **{k: v for k, v in given.items() if v is not None}}
        if scaling.rope_type != "linear":  # transformers 4 insists on it for llama3
            parameters.setdefault("original_max_position_embeddings", model.max_position_embeddings)
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": None if scaling is None else parameters,
        "rope_parameters": {**parameters, "rope_theta": model.rope_theta},
    }


def _read_scaling(rope_type: Any, values: dict[str, Any], max_position_embeddings: int) -> RopeScaling:
    required, optional = _KEYS[rope_type]
    original = values.get("original_max_position_embeddings")
    if rope_type == "yarn" and values.get("factor") is None and original:
        values["factor"] = max_position_embeddings / original
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise ValueError(f"rope_type {rope_type} without {', '.join(missing)}")
    given = {key: values[key] for key in (*required, *optional) if values.get(key) is not None}
    for key, value in given.items():
        if key == "truncate":
            given[key] = bool(value)
        else:
            _check_number(key, value)
            given[key] = int(value) if key == "original_max_position_embeddings" else float(value)
    return RopeScaling(rope_type=rope_type, **given)


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} {value!r} of the rope parameters is not a number")
