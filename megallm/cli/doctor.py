"""`megallm doctor`: what this machine has, and which back end each fused operation would run on."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from megallm.config.backends import BACKENDS, parse_backends
from megallm.config.hardware import find_gpu
from megallm.config.presets import get_preset
from megallm.model.fused import fused_cases
from megallm.ops.backends import Case, choose, package_refusal, refusal
from megallm.trainers.engine import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--model", default="llama3-8b", help="preset whose sizes the choices are made for")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of weights and activations")
    parser.add_argument("--backend", nargs="*", default=(), help="operation=back end items to force, as in training")


def run(args: argparse.Namespace) -> int:
    """Prints the picture; exit code 0. ValueError for a forced back end that cannot run here."""
    forced = parse_backends(args.backend)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cases = fused_cases(get_preset(args.model), tp=args.tp, device=device, dtype=DTYPES[args.precision])
    lines = [*machine(), "", *packages(), ""]
    lines += [f"fused operations of {args.model}, tp {args.tp}, {args.precision}, on {device.type}:"]
    for case in cases:
        lines += operation(case, forced.get(case.op))
    print("\n".join(lines))
    return 0


def machine() -> list[str]:
    """Lines on the system, the versions and the GPUs."""
    lines = [
        f"system      {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"torch       {torch.__version__}, CUDA {torch.version.cuda or 'none (a CPU build)'}",
        f"triton      {_version('triton') or 'not installed'}",
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


def packages() -> list[str]:
    """Lines on the optional parts: there, or why not."""
    from megallm_kernels import compiled

    reasons = {"compiled": compiled.why_absent()} | {name: package_refusal(name) for name in ("flash-attn", "apex")}
    return [f"{name:11} {why or 'ready'}" for name, why in reasons.items()]


def operation(case: Case, forced: str | None) -> list[str]:
    """The choice for one operation with its reason, then why each other back end cannot run."""
    choice = choose(case, forced)
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
