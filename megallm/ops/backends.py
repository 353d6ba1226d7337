"""Chooses, for each fused operation, the back end that runs it, and says why.

    forced (`--backend rms_norm=triton`)       that one, or an error if it cannot run
    no GPU                                 torch; AdamW in C++ where that was built
    a GPU with measurements                the fastest of those that can run, from ops/measured.csv
    a GPU without                          torch: nothing is taken for faster before it was measured there

A choice depends on the operation, the device, the dtype and one size (the row length, the head dim); it is made once
for each, remembered, and announced once: by an engine for its whole model when it is built, so that nothing is left to
be looked up inside torch.compile.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from megallm.config.backends import BACKENDS, parse_backends
from megallm_kernels.cpu_adamw import instruction_sets, why_absent

FLASH_ATTENTION_2, FLASH_ATTENTION_4 = "flash_attn.flash_attn_interface", "flash_attn.cute"
MEASURED = Path(__file__).with_name("measured.csv")
"""Rows gpu, op, dtype, size, backend, microseconds (forward and backward) and where they come from; written by
benchmarks/gpu.py --update-table."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a choice depends on."""

    op: str
    """A key of `config.backends.BACKENDS`."""
    device: torch.device
    dtype: torch.dtype
    size: int
    """Row length (norms, activation), head dim (rope, attention), vocabulary columns (losses), 0 otherwise."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A back end and the reason it was taken."""

    name: str
    reason: str


class Backends:
    """The choices of one engine."""

    def __init__(
        self, forced: Mapping[str, str] | None = None, *, announce: Callable[[str], None] | None = None
    ) -> None:
        """`forced`: {operation: back end}. `announce` is given a line for every choice; None = the log, level info."""
        self.forced = parse_backends(f"{op}={name}" for op, name in (forced or {}).items())
        self._announce = announce if announce is not None else logging.getLogger("megallm.ops").info
        self._chosen: dict[tuple[str, torch.device, torch.dtype, int], str] = {}
        self._said: set[str] = set()

    def pick(self, op: str, tensor: torch.Tensor, size: int) -> str:
        """The name of the back end for `op` on tensors like this one. ValueError if a forced one cannot run."""
        key = (op, tensor.device, tensor.dtype, size)
        name = self._chosen.get(key)
        if name is None:
            case = Case(op=op, device=tensor.device, dtype=tensor.dtype, size=size)
            choice = choose(case, self.forced.get(op))
            self.settle(case, choice)
            name = choice.name
        return name

    def settle(self, case: Case, choice: Choice) -> None:
        """Remembers and announces a choice, for `pick` to find."""
        self._chosen[case.op, case.device, case.dtype, case.size] = choice.name
        is_plain = case.device.type != "cuda" and choice.name == "torch" and not self.forced
        self._say(f"{'every operation' if is_plain else case.op}: {choice.name} ({choice.reason})")

    def take(self, op: str, name: str, reason: str) -> str:
        """`name`, for a call of `op` whose form leaves no other choice; announced once for each reason."""
        self._say(f"{op}: {name} ({reason})")
        return name

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._announce(line)


DEFAULT = Backends()
"""For operations called without an engine: nothing forced."""


def choose(case: Case, forced: str | None = None) -> Choice:
    """The back end for `case`; ValueError if the forced one cannot run."""
    if forced is not None:
        why_not = refusal(case, forced)
        if why_not is not None:
            able = [name for name in BACKENDS[case.op] if refusal(case, name) is None]
            raise ValueError(f"{case.op}={forced} cannot run: {why_not}: use {case.op}={' or '.join(able)}")
        return Choice(name=forced, reason="asked for")
    if case.op == "adamw" and _cpu_refusal(case) is None:
        return Choice(name="cpu", reason=f"C++, {instruction_sets()[0]}")
    if case.device.type != "cuda":
        return Choice(name="torch", reason=f"on {case.device.type}")
    gpu = torch.cuda.get_device_name(case.device)
    times = _measured(gpu, case)
    usable = {name: time for name, time in times.items() if refusal(case, name) is None}
    if not usable:
        return Choice(name="torch", reason=f"{case.op} was not measured on {gpu}")
    best = min(usable, key=lambda name: usable[name])
    return Choice(name=best, reason=", ".join(f"{n} {t:.0f} us" for n, t in sorted(times.items(), key=lambda x: x[1])))


_LONGEST = {"rms_norm": 16384, "layer_norm": 16384, "attention": 256, "decode_attention": 256, "rope": 4096}
"""Rows that the Triton and CUDA kernels take, at most."""


def refusal(case: Case, name: str) -> str | None:
    """Why the back end cannot run `case`; None if it can."""
    if name == "torch":
        return None
    if name == "triton":
        return _triton_refusal(case)
    if name == "cpu":
        return _cpu_refusal(case)
    if case.device.type != "cuda":
        return "it needs a GPU"
    if case.dtype == torch.float64:
        return "it has no fp64 form"
    if name == "cuda":
        return _compiled_refusal(case.device) or _length_refusal(case)
    if name == "apex":
        return apex_refusal()
    return "it takes fp16 and bf16 only" if case.dtype == torch.float32 else flash_attention_module(case.device)[1]


def apex_refusal() -> str | None:
    """Why NVIDIA's apex cannot serve; None if it can."""
    if importlib.util.find_spec("apex") is None:
        return "NVIDIA's apex is not installed"
    for module in ("apex.optimizers", "apex.normalization", "amp_C"):
        if why := _import_error(module):
            return f"this apex does not serve ({why}): PyPI's is another project; build NVIDIA's with its CUDA parts"
    return None


def flash_attention_module(device: torch.device) -> tuple[str, str | None]:
    """(the module whose `flash_attn_func` serves on this GPU, None), or ("", why there is none).

    flash-attn 4 (CuTe) on Hopper and newer where it is installed, else flash-attn 2.
    """
    if importlib.util.find_spec("flash_attn") is None:
        return "", "flash-attn is not installed"
    new_enough = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    reasons = []
    for module in (FLASH_ATTENTION_4, FLASH_ATTENTION_2) if new_enough else (FLASH_ATTENTION_2,):
        why = _import_error(module)
        if why is None:
            return module, None
        reasons.append(why)
    return "", f"flash-attn is installed and does not import: {'; '.join(reasons)}"


def _triton_refusal(case: Case) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if case.dtype == torch.float64:
        return "it has no fp64 form"
    if case.device.type != "cuda" and not _is_interpreting():
        return "it needs a GPU (or TRITON_INTERPRET=1, which interprets kernels on the CPU, slowly)"
    return _length_refusal(case) or _spill_refusal(case)


def _spill_refusal(case: Case) -> str | None:
    """Of forms that take more registers than there are: they would run, slowly, out of local memory."""
    size, is_wide = case.size, case.dtype == torch.float32
    if case.op in ("attention", "decode_attention") and is_wide and size > 128:
        return f"in fp32 its heads have at most 128 elements, these have {size}"
    if case.op == "layer_norm" and is_wide and size > 8192:
        return f"in fp32 its longest row is 8192, this one has {size}"
    if case.op in ("rms_norm", "layer_norm") and size > 8192 and size % 16:
        return f"rows over 8192 must be a multiple of 16, this one has {size}"
    if case.op == "grouped_gemm" and size % 16 and case.device.type == "cuda":
        return f"its sizes must be multiples of 16, this one is {size}"
    return None


def _length_refusal(case: Case) -> str | None:
    limit = _LONGEST.get(case.op)
    return f"its longest row is {limit}, this one has {case.size}" if limit is not None and case.size > limit else None


def _is_interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _cpu_refusal(case: Case) -> str | None:
    if case.device.type != "cpu":
        return "it works in the host's memory: with offload, or without a GPU"
    return "it is for fp32" if case.dtype != torch.float32 else why_absent()


def _compiled_refusal(device: torch.device) -> str | None:
    from megallm_kernels import compiled

    return compiled.why_absent(device)


@cache
def _import_error(module: str) -> str | None:
    """Why a module does not import; None if it does. Whatever a broken package raises is a reason."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module}: {error}"
    return None


def _measured(gpu: str, case: Case) -> dict[str, float]:
    """{back end: microseconds} at the measured size nearest (by ratio) to the case's; empty if there is none."""
    dtype = str(case.dtype).removeprefix("torch.")
    rows = [r for r in _table() if (r["gpu"], r["op"], r["dtype"]) == (gpu, case.op, dtype)]
    if not rows:
        return {}

    def distance(size: int) -> float:
        small, large = sorted((max(size, 1), max(case.size, 1)))
        return large / small

    nearest = min((int(r["size"]) for r in rows), key=distance)
    return {r["backend"]: float(r["microseconds"]) for r in rows if int(r["size"]) == nearest}


@cache
def _table() -> tuple[dict[str, str], ...]:
    with MEASURED.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))
