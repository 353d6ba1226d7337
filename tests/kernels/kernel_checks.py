"""What the tests of several kernels share."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, contiguous."""
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (numbers * scale).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every other column of a wider tensor."""
    wide = x.new_full((*x.shape[:-1], 2 * x.size(-1)), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def far_rows(*shape: int) -> str:
    """Source of `far()`: an fp16 tensor [3, *shape] whose rows are 2^30 elements apart, over untouched memory.

    Three, because the offset of the last row is the first that 32 bits do not hold.
    """
    return textwrap.dedent(f"""
        import torch
        from megallm.testing.triton_interpreter import repair_bf16
        repair_bf16()

        def far(shape={shape!r}):
            buffer = torch.empty(2**31 + {max(1, _numel(shape))}, dtype=torch.float16)
            inner = torch.empty(shape).stride()
            return buffer.as_strided((3, *shape), (2**30, *inner)).normal_(generator=torch.Generator().manual_seed(1))
    """)


def run_alone(source: str) -> None:
    """Runs Python source in a process of its own, where an address that overflows ends the process, not the tests."""
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'kernels')!r}]\n{source}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
