"""What the commands that run a model without training share: flags, checks, and the engine on its ranks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallm.config.check import check_layout
from megallm.config.numerics import NumericsConfig, Precision
from megallm.config.parallel import ParallelConfig
from megallm.data.records import read_json_lines
from megallm.generate.sampling import Sampling
from megallm.model.fp8 import check_fp8
from megallm.ops.fp8 import fp8_recipe
from megallm.parallel.mesh import Mesh, start_process_group
from megallm.runtime.environment import launch_info
from megallm.runtime.launch import device_for
from megallm.runtime.outputs import check_output_file
from megallm.trainers.engine import DTYPES, Engine
from megallm.trainers.source import ModelSource, open_model


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--model and the layout."""
    parser.add_argument("--model", required=required, help="a Hugging Face model directory, or a checkpoint of ours")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel ranks")
    parser.add_argument("--virtual-stages", type=int, default=1, help="model chunks per pipeline rank")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="of weights and activations")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its directory; default: the one beside the model")


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int, temperature: float) -> None:
    """How answers are generated; the defaults of two flags."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=temperature, help="divides the logits; 0 = greedy")
    parser.add_argument("--top-k", type=int, default=0, help="only the k most likely tokens; 0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, help="only the likeliest tokens, to this sum; 1 = all")
    parser.add_argument("--min-p", type=float, default=0.0, help="only tokens this times as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="on tokens that were there; 1 = none")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """What `add_sampling_arguments` was told; ValueError if it makes no sense."""
    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop_strings=tuple(args.stop),
    )


@dataclass(frozen=True, kw_only=True)
class InferenceJob:
    """A checked model and layout; `start` makes the ranks talk."""

    source: ModelSource
    parallel: ParallelConfig
    precision: Precision
    device: torch.device

    def start(self) -> Engine:
        """The engine with its weights loaded. A collective."""
        info = launch_info()
        start_process_group(rank=info.rank, world_size=info.world_size, device=self.device)
        mesh = Mesh.build(tp=self.parallel.tp, pp=self.parallel.pp, device=self.device)
        engine = Engine(self.source.config, mesh, parallel=self.parallel, precision=self.precision, train=False)
        self.source.load_weights(engine)
        return engine


def open_job(args: argparse.Namespace) -> InferenceJob:
    """The job that the flags ask for. ValueError or FileNotFoundError for what cannot run."""
    source = open_model(args.model)
    if source.path is None:
        raise ValueError(f"--model {args.model} is a preset, which has no weights: give a directory that holds some")
    parallel = ParallelConfig(tp=args.tp, pp=args.pp, virtual_stages=args.virtual_stages)
    source.check_weights()
    info = launch_info()
    check_layout(source.config, parallel, info.world_size)
    device = device_for(info.local_rank)
    check_fp8(fp8_recipe(NumericsConfig(precision=args.precision)), source.config, tp=args.tp, device=device)
    return InferenceJob(source=source, parallel=parallel, precision=args.precision, device=device)


def check_out(out: str | None, *inputs: str | None) -> None:
    """ValueError if what is to be written is one of the files that are read, or cannot be written."""
    if out is None:
        return
    if launch_info().rank == 0:  # who writes it: other nodes need not have the place
        check_output_file(out)
    for each in inputs:
        if each is not None and Path(each).resolve() == Path(out).resolve():
            raise ValueError(f"{out} is read, and would be overwritten with the results: choose another file to write")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """ValueError for the first of these flags that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"{name} ({getattr(args, name)}) must be at least 1")


def read_jsonl(path: str, key: str) -> list[Any]:
    """The value of `key` on each line of a .jsonl file; ValueError naming the line that has none."""
    rows = read_json_lines(path)
    if not rows:
        raise ValueError(f"{path} has no lines")
    for row in rows:
        if key not in row:
            raise ValueError(f"{row.where}: no key {key!r} in it")
    return [row[key] for row in rows]


def write_jsonl(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, written under a temporary name and renamed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(target)
