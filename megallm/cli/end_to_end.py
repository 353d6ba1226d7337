"""What examples/pipeline.py does: read the settings, start the ranks, run the stages, write the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megallm.config.end_to_end import EndToEndConfig, from_file, with_layout, with_settings
from megallm.runtime.environment import become_ranks, is_launched, launch_info, user_cache_dir
from megallm.runtime.launch import device_for, usage_errors
from megallm.runtime.logging import Log
from megallm.runtime.outputs import check_output_directory

if TYPE_CHECKING:
    from megallm.runtime.environment import LaunchInfo

REPORT = "report.html"


class _Parser(argparse.ArgumentParser):
    """Exits with code 2 and one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_example(defaults: EndToEndConfig, *, presets: Mapping[str, Path], description: str) -> int:
    """The exit code of a program that does as the command line says. `presets`: YAML files by name."""
    args = parser(presets, description=description).parse_args()
    with usage_errors():
        config = settings(args, defaults, presets)
        check_output_directory(args.save)
    if args.report_only:
        with usage_errors():
            _write_report(args.save)
        return 0
    ranks = config.base.parallel.tp * config.base.parallel.pp
    with usage_errors():
        info = launch_info()
        starts_ranks = ranks > 1 and not is_launched()
        from megallm.trainers import end_to_end  # after the flags, which fail at once

        world_size = ranks if starts_ranks else info.world_size
        device = device_for(info.local_rank, local_world_size=ranks if starts_ranks else None)
        end_to_end.check(config, args.save, world_size=world_size, device=device)
        if starts_ranks:
            become_ranks(ranks, sys.argv)
    end_to_end.run_stages(config, args.save, info, device, cache_dir=user_cache_dir())
    if info.rank == 0:
        _write_report(args.save, info)
    return 0


def parser(presets: Mapping[str, Path], *, description: str) -> argparse.ArgumentParser:
    """The command line."""
    found = _Parser(
        usage="%(prog)s [flags] [PART.NAME=VALUE ...]", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    found.add_argument(
        "settings", nargs="*", metavar="PART.NAME=VALUE",
        help="a flag of a stage's example program (parts: base, sft, reward, ppo, dpo; all: every one that has it; "
        "evaluation)",
    )  # fmt: skip
    found.add_argument("--preset", choices=sorted(presets), help="settings that come with this program")
    found.add_argument("--config", metavar="FILE", help="YAML file with settings, by part; the command line wins")
    found.add_argument("--tp", type=int, help="tensor-parallel ranks of every stage")
    found.add_argument("--pp", type=int, help="pipeline-parallel ranks of every stage")
    found.add_argument(
        "--save", default="runs/pipeline", metavar="DIR", help="where everything goes (default: %(default)s)"
    )
    found.add_argument("--report-only", action="store_true", help="write the report of what is there, and stop")
    return found


def settings(
    args: argparse.Namespace, defaults: EndToEndConfig, presets: Mapping[str, Path]
) -> EndToEndConfig:
    """Defaults < preset < file < command line. ValueError or FileNotFoundError for what is wrong with them."""
    config = defaults
    for path in ([str(presets[args.preset])] if args.preset else []) + ([args.config] if args.config else []):
        config = from_file(config, path)
    config = with_settings(config, args.settings)
    return with_layout(config, tp=args.tp, pp=args.pp)


def _write_report(root: str, info: LaunchInfo | None = None) -> None:
    from megallm.monitor.end_to_end_report import read_run, render

    path = Path(root) / REPORT
    path.write_text(render(read_run(root)), encoding="utf-8")
    Log(0 if info is None else info.rank).info(f"report      {path}")
