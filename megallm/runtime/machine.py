"""What a run ran on: versions and hardware, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from megallm.runtime.launch import num_usable_cores


def machine_words(*, num_ranks: int) -> dict[str, str]:
    """Of this process and of the job it is a rank of."""
    found = {
        "ranks": str(num_ranks), "processor": _processor(), "cores of a node that may be used": str(num_usable_cores()),
        "system": platform.system() + " " + platform.release(), "python": platform.python_version(),
        "torch": str(torch.__version__),
    }  # fmt: skip
    if torch.cuda.is_available():
        found["GPUs of a node"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
