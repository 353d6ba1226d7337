"""`megallm memory`: what ZeRO and offload leave on a device, and how large a model may get.

    megallm memory --parameters 7.5e9 --ranks 64 --grad-dtype bf16 --out zero_memory.png

Model states alone, by formula; a run prints its own table, with activations and buffers, and measures it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megallm.config.numerics import NumericsConfig
from megallm.config.parallel import Offload
from megallm.monitor.memory_picture import Placement, plot_placements
from megallm.planner.memory import ElementBytes, element_bytes, largest_model, placed_states
from megallm.runtime.outputs import check_output_file

_STAGES: dict[Offload, tuple[int, ...]] = {"none": (0, 1, 2, 3), "optimizer": (0, 1, 2, 3), "optimizer+params": (3,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument("--parameters", type=float, default=7.5e9, help="of the model, or a rank's tp and pp part")
    parser.add_argument("--ranks", type=int, default=64, help="data-parallel ranks that share shards (default 64)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="default bf16")
    parser.add_argument("--grad-dtype", choices=("fp32", "bf16"), help="what gradients are summed in (default fp32)")
    parser.add_argument("--device-gb", type=float, default=80.0, help="memory of a device, 1e9 bytes (default 80)")
    parser.add_argument("--host-gb", type=float, default=1000.0, help="memory of a host, 1e9 bytes (default 1000)")
    parser.add_argument("--ranks-per-host", type=int, help="ranks that share it (default: all, at most 8)")
    parser.add_argument(
        "--layer-parameters", type=float, default=8e8, help="of one layer, for whole buckets (default 8e8, hidden 8192)"
    )
    parser.add_argument("--out", metavar="FILE", help="also draw the states to this PNG file")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each stage and offload, and writes the PNG if asked; returns 0.

    ValueError for sizes that cannot be, or a FILE that cannot be written.
    """
    if args.out:
        check_output_file(args.out)
    for name in ("parameters", "ranks", "device_gb", "host_gb", "layer_parameters"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name):g}: give a number above 0")
    sizes = element_bytes(NumericsConfig(precision=args.precision, grad_dtype=args.grad_dtype))
    placements = list(_placements(int(args.parameters), args.ranks, sizes))
    per_host = args.ranks_per_host or min(args.ranks, 8)
    what = (
        f"{args.parameters / 1e9:g}B parameters in {args.precision}, gradients in {args.grad_dtype or 'fp32'}, "
        f"{args.ranks} {'rank' if args.ranks == 1 else 'ranks'}"
    )
    print(f"model states of a rank, GB: {what}")
    print(f"{'':26}{'on the device':^44}{'on the host':^12}{'largest model':^15}")
    header = f"{'zero':6}{'offload':20}{'parameters':>12}{'gradients':>11}{'optimizer':>11}{'total':>9}{'total':>11}"
    print(f"{header}{'parameters':>15}")
    for each in placements:
        largest = largest_model(
            args.device_gb * 1e9,
            args.host_gb * 1e9,
            zero=each.zero,
            num_shards=args.ranks,
            offload=each.offload,
            sizes=sizes,
            layer_parameters=int(args.layer_parameters),
            ranks_per_host=per_host,
        )
        device = each.device
        cells = [f"{float(size) / 1e9:.2f}" for size in (device.parameters, device.gradients, device.optimizer)]
        total, host = float(device.total) / 1e9, float(each.host.total) / 1e9
        print(
            f"{each.zero:<6}{each.offload:20}{cells[0]:>12}{cells[1]:>11}{cells[2]:>11}{total:>9.2f}"
            f"{f'{host:.2f}' if host else '-':>11}{f'{largest / 1e9:.1f}B':>15}"
        )
    print(
        f"the largest model's states, with buckets of layers of {args.layer_parameters / 1e9:g}B, fill a device of "
        f"{args.device_gb:g} GB\nor, by {per_host} {'rank' if per_host == 1 else 'ranks'}, a host of "
        f"{args.host_gb:g} GB: activations come on top"
    )
    if args.out:
        plot_placements(placements, args.out, title=f"Model states of a rank: {what}")
        print(f"picture: {args.out}")
    return 0


def _placements(num_parameters: int, num_shards: int, sizes: ElementBytes) -> Iterator[Placement]:
    for offload, stages in _STAGES.items():
        for zero in stages:
            device, host = placed_states(
                num_parameters, zero=zero, num_shards=num_shards, offload=offload, sizes=sizes
            )
            yield Placement(zero=zero, offload=offload, device=device, host=host)
