"""`megallm doctor`: what this machine has, and which back end each fused operation would run on."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from megallm.config.backends import BACKENDS, parse_backends
from megallm.config.check import check_layout
from megallm.config.hardware import find_gpu
from megallm.config.parallel import ParallelConfig
from megallm.config.presets import get_preset
from megallm.model.fused import check_names, fused_choices
from megallm.ops.backends import Backends, Case, Choice, apex_refusal, flash_attention_module, refusal
from megallm.ops.fp8 import hardware_refusal
from megallm.trainers.engine import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--model", default="llama3-8b", help="preset whose sizes the choices are made for")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of weights and activations")
    parser.add_argument(
        "--backend", nargs="+", action="extend", default=[], help="operation=back end items to force, as in training"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the picture; exit code 0. ValueError for a forced back end that cannot run here, or a wrong --tp."""
    backends, config = Backends(parse_backends(args.backend)), get_preset(args.model)
    check_layout(config, ParallelConfig(tp=args.tp), args.tp)
    check_names(backends, config)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    choices = fused_choices(config, backends, tp=args.tp, device=device, dtype=DTYPES[args.precision])
    lines = [*machine(), "", *packages(device), ""]
    lines += [f"fused operations of {args.model}, tp {args.tp}, {args.precision}, on {device.type}:"]
    for case, choice in choices:
        lines += operation(case, choice)
    print("\n".join(lines))
    return 0


def machine() -> list[str]:
    """Lines on the system, the versions and the GPUs."""
    lines = [
        f"system      {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"torch       {torch.__version__}, CUDA {torch.version.cuda or 'none (a CPU build)'}",
        f"triton      {_version('triton') or 'not installed'}",
        f"nvcc        {shutil.which('nvcc') or 'not found: csrc/ cannot be compiled here, and nothing needs it'}",
    ]
    if not torch.cuda.is_available():
        return [*lines, "GPU         none that torch can use: everything runs on the CPU, on torch's operations"]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        row = find_gpu(found.name)
        peak = "no peak rates known, so no MFU" if row is None else f"peaks of {row.name}"
        lines.append(
            f"GPU {index}       {found.name}, compute capability {found.major}.{found.minor}, "
            f"{found.multi_processor_count} multiprocessors, {found.total_memory / 2**30:.0f} GiB, {peak}"
        )
    return lines


def packages(device: torch.device) -> list[str]:
    """Lines on the optional parts and fp8 products: there, or why not."""
    from megallm_kernels import compiled

    reasons = {
        "compiled": compiled.why_absent(device),
        "flash-attn": flash_attention_module(device)[1],
        "apex": apex_refusal(),
        "fp8": hardware_refusal(device),
    }
    return [f"{name:11} {why or 'ready'}" for name, why in reasons.items()]


def operation(case: Case, choice: Choice) -> list[str]:
    """The choice for one operation with its reason, then why each other back end cannot run."""
    lines = [f"  {case.op:21} {choice.name:11} {choice.reason}"]
    for name in BACKENDS[case.op]:
        why_not = refusal(case, name)
        if name != choice.name:
            lines.append(f"  {'':21} {name:11} {f'no: {why_not}' if why_not else 'could run'}")
    return lines


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "of unknown version"))
