"""Kernels compiled for a GPU that is not here: what registers, memory and instructions the machine code takes.

Triton brings its own assembler and disassembler, so this runs on any machine, in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDG", "STG", "LDL", "STL", "RED", "ATOM")


@dataclass(frozen=True, kw_only=True)
class CompileCase:
    """One kernel with one setting, as it is launched."""

    name: str
    """Unique; the key of its budget."""
    kernel: Any
    """The @triton.jit function."""
    signature: Mapping[str, str]
    """Type of every argument that is not a constexpr: `*bf16`, `*fp32`, `*i64`, `i32`, `i64`, `fp32`."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    """Values of the constexpr arguments; integers that a launch would specialise to 1 belong here too."""
    unaligned: tuple[str, ...] = ()
    """Integers that are not multiples of 16; pointers and all other integers are taken to be."""
    num_warps: int = 4
    num_stages: int = 3
    arches: tuple[int, ...] = (80, 90)
    tensor_cores: bool = False
    """HMMA (sm_80) or HGMMA (sm_90) must appear."""
    tma: bool = False
    """UTMALDG must appear on sm_90."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further compile options, such as maxnreg."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel takes."""

    registers: int
    """Of a thread, at most 255."""
    stack_bytes: int
    """Of a thread; more than 0 = registers spill."""
    shared_bytes: int
    """Of a program."""
    instructions: Mapping[str, int]
    """How often the machine code has HGMMA, HMMA, UTMALDG, LDGSTS, LDG, STG, LDL, STL, RED, ATOM."""


def compile_case(case: CompileCase, arch: int) -> Resources:
    """Compiles `case` for compute capability `arch` (80, 90) and reads the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = [n for n in names if n not in case.signature and n not in case.constexprs]
    if missing:
        raise ValueError(f"{case.name}: arguments without type or value: {', '.join(missing)}")
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in case.constexprs and n not in case.unaligned and case.signature[n][0] in "*iu"
    }
    constants = {(names.index(n),): v for n, v in case.constexprs.items()}
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, shared_bytes: int) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"no resource usage in the output of {tool.name}")
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", text, flags=re.MULTILINE)
    counts = {name: operations.count(name) for name in _COUNTED}
    return Resources(
        registers=int(usage[1]), stack_bytes=int(usage[2]), shared_bytes=shared_bytes, instructions=counts
    )
