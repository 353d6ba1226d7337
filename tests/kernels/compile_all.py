"""Compiles kernels for sm_80 and sm_90 and compares what they take with the stored budgets.

    python tests/kernels/compile_all.py [OP ...] [--write | --check]

Plain: prints a line for each kernel, setting and architecture. --check: exit code 1 and a line for every regression.
--write: stores the budgets of this triton version. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")]

from megallm.testing.compiled_kernel import CompileCase, compile_case  # noqa: E402
from megallm_kernels.device import shared_limit_bytes  # noqa: E402

REGISTER_SLACK = 8
"""Registers are given out eight at a time; a difference below that is the assembler's noise."""


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem.removeprefix("cases_") for path in HERE.glob("cases_*.py"))
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    unknown = [op for op in arguments.ops if op not in known]
    if unknown:  # argparse's choices refuse the empty list of a positional "*" in some versions of Python
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(known)}")
    problems = []
    with ProcessPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        for op in arguments.ops or known:
            problems += _one_op(op, pool, write=arguments.write, check=arguments.check)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


def load_cases(op: str) -> dict[str, CompileCase]:
    """The op's cases by name."""
    listed = importlib.import_module(f"cases_{op}").cases()
    named = {case.name: case for case in listed}
    if len(named) != len(listed):
        raise ValueError(f"cases_{op}.py gives two cases the same name")
    return named


def _one_op(op: str, pool: ProcessPoolExecutor, *, write: bool, check: bool) -> list[str]:
    cases = load_cases(op)
    wanted = [(op, name, arch) for name, case in cases.items() for arch in case.arches]
    measured: dict[str, dict[str, Any]] = {}
    problems = []
    for (_, name, arch), found in zip(wanted, pool.map(_compile, wanted), strict=True):
        counts = {k: n for k, n in found["instructions"].items() if n}
        numbers = f"{found['registers']} registers, stack {found['stack_bytes']}, shared {found['shared_bytes']}"
        print(f"{op} {name} sm_{arch}: {numbers}, {counts}", flush=True)
        measured.setdefault(name, {})[f"sm_{arch}"] = found
        problems += [f"{op} {name} sm_{arch}: {fault}" for fault in faults(cases[name], arch, found)]
    path = HERE / "budgets" / f"{op}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    version = triton_version()
    if write:
        keep = ("registers", "stack_bytes", "shared_bytes")
        stored[version] = {n: {a: {k: f[k] for k in keep} for a, f in by.items()} for n, by in measured.items()}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    elif check:
        problems += regressions(op, stored.get(version), measured)
    return problems


def faults(case: CompileCase, arch: int, found: dict[str, Any]) -> list[str]:
    """What no kernel may do, whatever its budget."""
    out = []
    if found["stack_bytes"]:
        out.append(f"registers spill: stack of {found['stack_bytes']} bytes")
    if found["shared_bytes"] > shared_limit_bytes(arch):
        out.append(f"shared memory {found['shared_bytes']} is over the limit {shared_limit_bytes(arch)}")
    expected = {"HGMMA" if arch == 90 else "HMMA"} if case.tensor_cores else set()
    expected |= {"UTMALDG"} if case.tma and arch == 90 else set()
    out += [f"no {name} in the machine code" for name in sorted(expected) if not found["instructions"][name]]
    return out


def regressions(op: str, budget: dict[str, Any] | None, measured: dict[str, dict[str, Any]]) -> list[str]:
    """Every number over its budget; every case without one."""
    if budget is None:
        return [f"{op}: no budget for triton {triton_version()}: run compile_all.py {op} --write and review it"]
    out = []
    slack = {"registers": REGISTER_SLACK, "stack_bytes": 0, "shared_bytes": 0}
    for name, by_arch in measured.items():
        for arch, found in by_arch.items():
            allowed = budget.get(name, {}).get(arch)
            if allowed is None:
                out.append(f"{op} {name} {arch}: no budget")
                continue
            over = [k for k in slack if found[k] > allowed[k] + slack[k]]
            out += [f"{op} {name} {arch}: {k} {found[k]}, budget {allowed[k]}" for k in over]
    return out


def triton_version() -> str:
    """Major and minor: `3.9`."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def _compile(wanted: tuple[str, str, int]) -> dict[str, Any]:
    op, name, arch = wanted
    return asdict(compile_case(load_cases(op)[name], arch))


if __name__ == "__main__":
    sys.exit(main())
