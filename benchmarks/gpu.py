"""Kernels and training steps on one GPU, beside peers, in one run: `make bench-gpu`.

In this order, as far as the time budget reaches: what the GPU can do (copy, matrix product); every op and every row of
the launch tables against fp64; every op timed beside its peers, forward, backward and both; decoding; whole training
steps; the demands, met or not met. Rows go to results/gpu.csv as they come, a log line each.

    python benchmarks/gpu.py                                    everything
    python benchmarks/gpu.py --check-only                       correctness
    python benchmarks/gpu.py --sections attention --only "S 8192"
    python benchmarks/gpu.py --tiny --device cpu                the code path, interpreted
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

from gpu_parts.rows import BAD, UNKNOWN, row, run_facts  # noqa: E402  (the paths come first)

SHARES: dict[str, float] = {
    "ceilings": 12, "check": 75, "rms_norm": 45, "rope": 12, "activation": 12, "attention": 50, "cross_entropy": 20,
    "adamw": 15, "linear_cross_entropy": 30, "decode": 35, "train_1b": 130, "attention_more": 35, "moe": 20,
    "layer_norm": 30, "geglu": 15, "train_3b": 110,
}  # fmt: skip
"""Every section in order of importance, and how much of the time each may take; what one leaves, the next ones have.
Estimates: nothing was measured yet."""
SPARE_S = 12.0
"""For the verdicts at the end."""


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 where a check failed or one of our own kernels did not run; 2 where nothing could be begun."""
    args = parse(argv)
    if args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
    started = time.time()
    from gpu_parts.bars import judge, show
    from gpu_parts.place import why_no_device
    from gpu_parts.supervise import Results

    missing = why_no_device(args.device)
    if missing is not None:
        print(f"gpu.py: {missing}", file=sys.stderr, flush=True)
        return 2
    device = {"gpu": "cpu, interpreted", "driver": ""} if args.device == "cpu" else {}
    command = "python benchmarks/gpu.py " + " ".join(sys.argv[1:] if argv is None else argv)
    facts = run_facts(commit=args.commit, command=command, **device)
    if facts["gpu"] == UNKNOWN:
        print("gpu.py: neither nvidia-smi nor torch says what GPU this is: put nvidia-smi in PATH", file=sys.stderr)
        return 2
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(csv=out / "gpu.csv", facts=facts)
    print(f"seed {args.seed}", flush=True)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    try:
        run(args, results, folder, started)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.tiny:
        print("tiny shapes: the figures and verdicts below mean nothing", flush=True)
    verdicts = judge(results.rows)
    text = show(verdicts)
    (out / "gpu-verdicts.txt").write_text(text + "\n")
    print(text, flush=True)
    if args.update_table:
        from gpu_parts.table import TABLE, table_rows, update_table

        target = Path(args.table) if args.table else TABLE
        print(f"{update_table(target, table_rows(results.rows, facts))} rows of {target} are new", flush=True)
    return report_end(results, time.time() - started)


def run(args: argparse.Namespace, results: Any, folder: Path, started: float) -> None:
    """All sections; those of ops in one worker as long as none of training comes between."""
    from gpu_parts.supervise import run_sections

    sections = args.sections
    ends = deadlines(sections, started=started, budget_s=args.budget_s)
    plan = {
        "device": args.device, "tiny": args.tiny, "seed": args.seed, "only": args.only, "deadlines": ends,
        "compile_budget_s": args.compile_budget_s, "ceilings": {}, "condemned": {}, "done": [],
    }  # fmt: skip
    for group in groups(sections):
        if group[0].startswith("train_"):
            from gpu_parts.train import CONTENDERS, run_training

            wanted = [each for each in CONTENDERS if args.only in each] or list(CONTENDERS)
            run_training(
                group[0], results, folder, device=args.device, tiny=args.tiny, deadline=ends[group[0]],
                limit_s=args.train_limit_s, contenders=wanted,
            )  # fmt: skip
            continue
        plan["sections"] = group
        count = args.check_workers if group == ["check"] else 1
        if args.in_process:
            run_here(plan, results, folder)
        else:
            run_sections(plan, results, folder, num_workers=count, unit_limit_s=args.unit_limit_s)
        if group == ["check"] and not args.only:
            audit(results)


def run_here(plan: dict[str, Any], results: Any, folder: Path) -> None:
    """The sections in this process: for a debugger, and for tests."""
    import json

    from gpu_parts.rows import JsonLines
    from gpu_parts.worker import run_worker

    name = "-".join(plan["sections"])
    state = {"ceilings": results.ceilings, "condemned": results.condemned, "done": sorted(results.done)}
    (folder / "plan.json").write_text(json.dumps(plan | state))
    run_worker(folder, name)
    results.take(JsonLines(folder / f"rows-{name}.jsonl").new())


def audit(results: Any) -> None:
    """A row for each launch setting of the tables that no check has used on this GPU."""
    from gpu_parts import launches

    launches.import_kernels()
    arch, num_sms = results.device.get("arch", 0), results.device.get("num_sms", 2)
    used = {launch for each in results.rows for launch in each.get("settings") or () if each.get("section") == "check"}
    missing = {name: sorted(wanted - used) for name, wanted in launches.expected(arch, num_sms).items()}
    for name, gaps in missing.items():
        for gap in gaps:
            results.add(
                row(section="check", op=name, case="table row", contender="coverage", status="skipped",
                    note=f"no check reaches {gap}")
            )  # fmt: skip
    total = sum(map(len, launches.expected(arch, num_sms).values()))
    covered = total - sum(map(len, missing.values()))
    print(f"launch tables: {covered} of {total} settings were checked", flush=True)


def deadlines(sections: list[str], *, started: float, budget_s: float) -> dict[str, float]:
    """When each section must end (of time.time): shares of the budget, in order; what is left over flows on."""
    total = sum(SHARES[each] for each in sections)
    ends, used = {}, 0.0
    for each in sections:
        used += SHARES[each]
        ends[each] = started + (budget_s - SPARE_S) * used / total
    return ends


def groups(sections: list[str]) -> list[list[str]]:
    """Neighbours that one worker runs together; the checks, the ceilings and training steps stand alone."""

    def alone(section: str) -> bool:
        return section in ("ceilings", "check") or section.startswith("train_")

    result: list[list[str]] = []
    for each in sections:
        if result and not alone(each) and not alone(result[-1][0]):
            result[-1].append(each)
        else:
            result.append([each])
    return result


def report_end(results: Any, seconds: float) -> int:
    """Says what went wrong; the exit code."""

    def is_bad(each: dict[str, Any]) -> bool:
        ours = str(each.get("contender", "")).startswith(("triton", "cuda", "megallm", "first losses"))
        return (each["status"] in BAD or each["status"] == "error") and ours

    bad = [each for each in results.rows if is_bad(each)]
    for each in bad:
        name = f"{each.get('op', '')} {each.get('case', '')} {each.get('contender', '')}"
        print(f"BAD: {each.get('section', '')} {name}: {each['status']}: {each.get('note', '')}", flush=True)
    checks = [each for each in results.rows if each.get("section") == "check" and each["status"] == "ok"]
    print(f"{len(checks)} checks good, {len(bad)} bad; {len(results.rows)} rows in {seconds:.0f} s", flush=True)
    return 1 if bad else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="", help=f"comma-separated, of {','.join(SHARES)}; default: all")
    parser.add_argument("--skip", default="", help="sections to leave out, comma-separated")
    parser.add_argument("--only", default="", help="cases whose section/op/name contains this; no checks are left out")
    parser.add_argument("--check-only", action="store_true", help="correctness, nothing is timed")
    parser.add_argument("--budget-s", type=float, default=460.0, help="seconds for the whole run")
    parser.add_argument("--compile-budget-s", type=float, default=60.0, help="seconds for compiled peers, by worker")
    parser.add_argument("--train-limit-s", type=float, default=70.0, help="seconds for one contender's training steps")
    parser.add_argument("--unit-limit-s", type=float, default=75.0, help="seconds after which a unit is taken to hang")
    parser.add_argument("--check-workers", type=int, default=6, help="processes that share the checks")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of gpu.csv and gpu-verdicts.txt")
    parser.add_argument("--commit", default="", help="what to write as commit where there is no .git")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; default: a new one, which is printed")
    parser.add_argument("--update-table", action="store_true", help="write ops/measured.csv too")
    parser.add_argument("--table", default="", help="another file for --update-table")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for the interpreter")
    parser.add_argument("--in-process", action="store_true", help="no worker processes")
    args = parser.parse_args(argv)
    try:
        args.sections = choose_sections(args.sections, skip=args.skip, check_only=args.check_only)
    except ValueError as error:
        parser.error(str(error))
    if args.device == "cpu" and not args.tiny:
        parser.error("full shapes on CPU would take days: add --tiny")
    if args.update_table and args.tiny and not args.table:
        parser.error("--update-table with --tiny would put meaningless times into ops/measured.csv: give --table")
    args.seed = secrets.randbits(31) if args.seed is None else args.seed
    return args


def choose_sections(sections: str, *, skip: str, check_only: bool) -> list[str]:
    """The sections to run, in the order of SHARES; ValueError where the options name none or contradict each other."""
    named = {each for each in sections.split(",") if each}
    left_out = {each for each in skip.split(",") if each}
    unknown = (named | left_out) - set(SHARES)
    if unknown:
        raise ValueError(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    others = ", ".join(sorted(named - {"check"}))
    if check_only and others:
        raise ValueError(f"--check-only runs check alone, but --sections names {others}: give one of the two")
    if check_only and "check" in left_out:
        raise ValueError("--check-only runs check alone, but --skip leaves it out: give one of the two")
    both = ", ".join(sorted(named & left_out))
    if both:
        raise ValueError(f"--sections and --skip both name {both}: take it out of one of the two")
    chosen = {"check"} if check_only else (named or set(SHARES)) - left_out
    if not chosen:
        raise ValueError("no section is left: --skip names all of them")
    return [each for each in SHARES if each in chosen]


if __name__ == "__main__":
    sys.exit(main())
