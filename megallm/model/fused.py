"""The fused operations that a model runs, with the size each choice of a back end depends on."""

from __future__ import annotations

import torch

from megallm.config.model import ModelConfig
from megallm.ops.backends import Backends, Case, choose


def fused_cases(config: ModelConfig, *, tp: int, device: torch.device, dtype: torch.dtype) -> tuple[Case, ...]:
    """One case for each operation of the model on one of `tp` ranks; the optimizer's works in fp32 (fp64 for fp64)."""
    sizes = {"rms_norm" if config.norm == "rmsnorm" else "layer_norm": config.hidden_size}
    sizes["attention"] = config.head_dim
    if config.position_embedding == "rope":
        sizes["rope"] = config.head_dim
    sizes["activation"] = config.intermediate_size // tp
    if config.head == "lm":
        sizes["linear_cross_entropy"] = sizes["cross_entropy"] = -(-config.vocab_size // tp)
    cases = [Case(op=op, device=device, dtype=dtype, size=size) for op, size in sizes.items()]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (*cases, Case(op="adamw", device=device, dtype=wide, size=0))


def check_backends(
    backends: Backends, config: ModelConfig, *, tp: int, device: torch.device, dtype: torch.dtype
) -> None:
    """ValueError if a forced back end cannot run what the model needs of it."""
    for case in fused_cases(config, tp=tp, device=device, dtype=dtype):
        choose(case, backends.forced.get(case.op))
