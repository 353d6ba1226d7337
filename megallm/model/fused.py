"""The fused operations that a model runs, with the size each choice of a back end depends on."""

from __future__ import annotations

import torch

from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.ops.attention import takes_rotary
from megallm.ops.backends import Backends, Case, Choice, choose


def fused_cases(
    config: ModelConfig,
    *,
    tp: int,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
    lora: LoraConfig | None = None,
) -> tuple[Case, ...]:
    """One case for each operation of the model on one of `tp` ranks; the optimizer's works in fp32 (fp64 for fp64).

    offload: the optimizer works in the host's memory. lora: the model's adapters, which say whether weights are in 4
    bits.
    """
    sizes = {"rms_norm" if config.norm == "rmsnorm" else "layer_norm": config.hidden_size}
    sizes["attention"] = config.head_dim
    if config.position_embedding == "rope":
        sizes["rope"] = config.head_dim
    sizes["activation"] = config.intermediate_size // tp
    if config.head == "lm":
        sizes["decode_attention"] = config.head_dim
        sizes["linear_cross_entropy"] = sizes["cross_entropy"] = -(-config.vocab_size // tp)
    if lora is not None and lora.is_nf4:
        sizes["nf4"] = 0
    cases = [Case(op=op, device=device, dtype=dtype, size=size) for op, size in sizes.items()]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    place = torch.device("cpu") if offload else device
    return (*cases, Case(op="adamw", device=place, dtype=wide, size=0))


def fused_choices(
    config: ModelConfig,
    backends: Backends,
    *,
    tp: int,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
    lora: LoraConfig | None = None,
) -> list[tuple[Case, Choice]]:
    """What each operation of the model would run on; ValueError if a forced back end cannot."""
    cases = fused_cases(config, tp=tp, device=device, dtype=dtype, offload=offload, lora=lora)
    choices = {case.op: choose(case, backends.forced.get(case.op)) for case in cases}
    in_front = choices["attention"].name == "triton" and takes_rotary(backends) and not config.qk_norm
    if "rope" in choices and in_front and config.attention_dropout == 0:
        choices["rope"] = Choice(name="triton", reason="in place, in front of its attention")
    return [(case, choices[case.op]) for case in cases]


def check_backends(
    backends: Backends,
    config: ModelConfig,
    *,
    tp: int,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
    lora: LoraConfig | None = None,
) -> None:
    """Makes the model's choices before anything runs; ValueError if a forced back end cannot run what it is to."""
    found = fused_choices(config, backends, tp=tp, device=device, dtype=dtype, offload=offload, lora=lora)
    for case, choice in found:
        backends.settle(case, choice)


def check_names(backends: Backends, config: ModelConfig, *, lora: LoraConfig | None = None) -> None:
    """ValueError if a back end is forced for an operation that the model does not have."""
    own = [case.op for case in fused_cases(config, tp=1, device=torch.device("cpu"), dtype=torch.float32, lora=lora)]
    for op in backends.forced:
        if op not in own:
            raise ValueError(
                f"--backend {op}={backends.forced[op]}: this model has no {op}: leave it out, or name one of "
                f"{', '.join(own)}"
            )
