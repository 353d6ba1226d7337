"""Writes tests/fixtures/nf4.json: what bitsandbytes makes of tests/nf4_cases.py on a CPU.

    PYTHONPATH=.:kernels:tests python tests/make_nf4.py

in an environment with bitsandbytes 0.50.2. Run it only to take in what a newer bitsandbytes changes.
"""

from __future__ import annotations

import json

import bitsandbytes
import torch
from bitsandbytes import functional
from nf4_cases import DTYPES, FIXTURE, cases, digest


def measure(weight: torch.Tensor, *, double: bool) -> dict[str, str]:
    """Digests of all that bitsandbytes keeps of a matrix, and of the matrix made of that again."""
    codes, state = functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    found = {"codes": digest(codes), "absmax": digest(state.absmax)}
    if double:
        found |= {"nested": digest(state.state2.absmax), "offset": digest(state.offset)}
    for name, dtype in DTYPES.items():
        state.dtype = dtype
        found[name] = digest(functional.dequantize_4bit(codes, state))
    return found


def main() -> None:
    """Writes the file."""
    torch.set_num_threads(1)
    found = {
        name: {kind: measure(weight, double=kind == "double") for kind in ("double", "single")}
        for name, weight in cases().items()
    }
    content = {"bitsandbytes": bitsandbytes.__version__, "cases": found}
    FIXTURE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
