"""`megallm schedule`: draws a pipeline schedule and says what it costs, before any GPU is spent on it.

    megallm schedule --pp 4 --microbatches 8 --schedule interleaved --virtual-stages 2 --out schedule.png

prints the timeline (or with --slots the order), the bubble and the live activations, each beside its formula.
"""

from __future__ import annotations

import argparse

from megallm.pipeline.formulas import bubble_formula, peak_live_formula
from megallm.pipeline.generators import SCHEDULE_NAMES, make_schedule
from megallm.pipeline.picture import format_text, save_png
from megallm.pipeline.simulate import Simulation, simulate
from megallm.pipeline.validate import validate
from megallm.runtime.outputs import check_output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches in a step (default 8)")
    parser.add_argument(
        "--schedule",
        choices=SCHEDULE_NAMES,
        help="default: interleaved if --virtual-stages is above 1, else 1f1b",
    )
    parser.add_argument("--virtual-stages", type=int, default=1, help="model chunks per rank (default 1)")
    parser.add_argument("--forward-time", type=float, default=1.0, help="one microbatch through a rank (default 1)")
    parser.add_argument("--backward-time", type=float, default=2.0, help="one microbatch back through it (default 2)")
    parser.add_argument("--p2p-time", type=float, default=0.0, help="one message between ranks (default 0)")
    parser.add_argument("--slots", action="store_true", help="draw the order of actions instead of their times")
    parser.add_argument("--width", type=int, default=160, help="characters before the picture wraps (default 160)")
    parser.add_argument("--out", metavar="FILE", help="also write the picture to this PNG file")


def run(args: argparse.Namespace) -> int:
    """Prints the picture, the bubble and the live activations, and writes the PNG if asked; returns 0.

    ValueError for sizes that the schedule refuses, or a FILE that cannot be written.
    """
    if args.out:
        check_output_file(args.out)
    schedule = make_schedule(
        args.schedule, pp=args.pp, virtual_stages=args.virtual_stages, num_microbatches=args.microbatches
    )
    validate(schedule)
    times = {"forward_time": args.forward_time, "backward_time": args.backward_time, "p2p_time": args.p2p_time}
    simulation = simulate(schedule, **times)
    print(format_text(schedule if args.slots else simulation, max_width=args.width))
    print()
    print(_facts(simulation, batched=simulate(schedule, **times, batched_p2p=True), virtual_stages=args.virtual_stages))
    if args.out:
        save_png(simulation, args.out)
        print(f"picture:   {args.out}")
    return 0


def _facts(simulation: Simulation, *, batched: Simulation, virtual_stages: int) -> str:
    schedule = simulation.schedule
    pp, num_microbatches = schedule.num_ranks, schedule.num_microbatches
    formula = bubble_formula(schedule.name, pp=pp, virtual_stages=virtual_stages, num_microbatches=num_microbatches)
    peaks = [f"{peak:.4g}" for peak in simulation.peak_live_microbatches]
    expected = [
        peak_live_formula(
            schedule.name, pp=pp, virtual_stages=virtual_stages, num_microbatches=num_microbatches, rank=rank
        )
        / virtual_stages
        for rank in range(pp)
    ]
    messages = sum(
        message.src == rank
        for rank in range(pp)
        for slot in range(schedule.num_slots)
        for message in schedule.transfers(rank, slot)
    )
    expected_text = " ".join(f"{peak:.4g}" for peak in expected)
    bubbles = (
        f"bubble:    {100 * simulation.bubble:.2f} % of the compute time (formula for free p2p: {100 * formula:.2f} %; "
        f"if messages arrive batch by batch: {100 * batched.bubble:.2f} %)"
    )
    return "\n".join(
        (
            bubbles,
            f"time:      {simulation.total_time:.6g}, of which computing {max(simulation.busy):.6g}",
            f"peak live: {' '.join(peaks)} microbatches, rank by rank (formula: {expected_text})",
            f"messages:  {messages} in {schedule.num_slots} slots",
        )
    )
