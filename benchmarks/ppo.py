"""An iteration of PPO on one CPU beside TRL's trainer, in one run: `make bench-ppo`.

As cpu.py, with its flags and turns: 32 prompts are answered with 32 tokens each, answers scored, and the policy and its
critic trained on them, 4 epochs of 2 minibatches. Policy, critic, reference and reward model have 5M parameters each.
Both sides have the same weights (the log-probabilities and scores of fixed answers must agree) and the same 32 prompts
in every iteration; nothing ends an answer, so that both have as many tokens. The first iteration is not timed. Beside
the ratio of times there is that of CPU seconds, which other programs on the machine change less.

TRL has no PPO after 1.12: that version is put into a directory of its own, and used with the other peers' environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from cpu import HERE, SMALL, Pair, append, compare, flags, machine, peers_python

from megallm.data.embedded import embedded_prompts
from megallm.data.tokenizer import Tokenizer, train_bpe

TRL = "1.12.0"
SHAPE = SMALL | {"seq": 160, "batch": 32, "minibatches": 2, "epochs": 4, "new_tokens": 32}
PAIRS = tuple(
    Pair(name=name, ours="ours_ppo", peer="trl_ppo", shape=SHAPE | more, threads=threads, layout={"prompts": prompts})
    for name, prompts, threads, more in (
        ("ppo, mixed prompts", "mixed", 1, {}),
        ("ppo, equal prompts", "equal", 1, {}),
        ("ppo, mixed, 2 threads", "mixed", 2, {}),
    )
)
PHASES = ("rollout", "score", "train")


def main() -> int:
    """Makes prompts and weights, runs the pairs, appends to a CSV file."""
    parser = flags(__doc__, out="ppo.csv", rounds=8, steps=1, disturbed=0.0)
    parser.add_argument("--trl-dir", type=Path, help=f"directory of TRL {TRL} (pip install --target); else it is made")
    args = parser.parse_args()
    folder = Path(args.peers_dir)
    python = peers_python(args.peers_python, folder)
    trl = args.trl_dir or trl_of(python, folder / f"trl-{TRL}")
    with tempfile.TemporaryDirectory(prefix="bench-ppo-") as temporary:
        root = Path(temporary)
        texts = [f"{record['prompt']}\n" for record in embedded_prompts()]
        tokenizer = train_bpe(texts[:1024], SHAPE["vocab"])
        (root / "weights").mkdir()
        tokenizer.save(root / "weights")
        for kind in ("mixed", "equal"):
            (root / f"{kind}.json").write_text(json.dumps(rows_of(texts, tokenizer, SHAPE, kind)))
        save = [python, str(HERE / "peers" / "trl_trainers.py"), "--shape", json.dumps(SHAPE), "--save"]
        subprocess.run([*save, str(root / "weights")], check=True, capture_output=True)
        return run(args, python, root, str(trl))


def run(args: argparse.Namespace, python: str, root: Path, trl: str) -> int:
    """Runs the pairs that are asked for, prints a table, appends rows."""
    about = about_peers()
    print(f"{'what':22} {'ours':>10} {'TRL':>10}   ratio of times (20th - 80th percentile), rollout/score/train")
    for pair in PAIRS:
        if args.only not in pair.name:
            continue
        layout = {"rows": str(root / f"{pair.layout['prompts']}.json"), "trl": trl}
        layout |= {side: str(root / f"{side}-steps.json") for side in ("ours", "peer")}
        row = compare(
            replace(pair, layout=layout), peers_python=python, rounds=args.rounds, steps=args.steps,
            weights=str(root / "weights"), disturbed=args.disturbed, limit_s=args.limit_s,
        )  # fmt: skip
        ours, theirs = (json.loads((root / f"{side}-steps.json").read_text()) for side in ("ours", "peer"))
        medians = {name: round(statistics.median(each[f"share_{name}"] for each in ours), 3) for name in PHASES}
        cpu = {f"{side}_cpu_s": statistics.median(each["cpu_s"] for each in lines) for side, lines in
               (("ours", ours), ("peer", theirs))}  # fmt: skip
        extra = {"prompts": pair.layout["prompts"]} | {f"ours_share_{name}": share for name, share in medians.items()}
        extra |= {name: round(seconds, 3) for name, seconds in cpu.items()}
        load = os.getloadavg()[0]
        extra |= {"ratio_cpu": round(cpu["ours_cpu_s"] / cpu["peer_cpu_s"], 4), "load": round(load, 1)}
        extra |= {"note": "shared machine" if load > 1.5 * pair.threads else ""}
        append(Path(args.out), [row | extra | about])
        shares = "/".join(f"{100 * share:.0f} %" for share in medians.values())
        print(
            f"{pair.name:22} {row['ours_ms']:>7} ms {row['peer_ms']:>7} ms   {row['ratio_p50']:.3f} "
            f"({row['ratio_p20']:.3f} - {row['ratio_p80']:.3f}), {row['rounds']} rounds, first numbers "
            f"{row['first_losses_apart']} apart, of CPU seconds {extra['ratio_cpu']:.3f}   {shares}",
            flush=True,
        )
    return 0


def about_peers() -> dict[str, object]:
    """What every row carries, with the TRL that is used here."""
    about = machine()
    others = [word for word in str(about["peers"]).split() if not word.startswith("trl==")]
    return about | {"peers": " ".join([f"trl=={TRL}", *others])}


def rows_of(texts: list[str], tokenizer: Tokenizer, shape: dict[str, int], kind: str) -> dict[str, list[list[int]]]:
    """The prompts, `mixed` as they are or `equal` in length, and an answer to each that both sides score beforehand."""
    encoded = [tokenizer.encode(text) for text in texts]
    longest = shape["seq"] - shape["new_tokens"]
    prompts = [ids for ids in encoded if len(ids) <= longest][: shape["batch"]]
    if kind == "equal":
        middle = sorted(map(len, prompts))[len(prompts) // 2]
        prompts = [ids[-middle:] for ids in encoded if len(ids) >= middle][: shape["batch"]]
    answers = [ids[: shape["new_tokens"]] for ids in encoded if len(ids) >= shape["new_tokens"]][-shape["batch"] :]
    assert len(prompts) == len(answers) == shape["batch"]
    return {"prompts": prompts, "answers": answers}


def trl_of(python: str, folder: Path) -> Path:
    """The directory that has that version; made if it is not there."""
    if not (folder / "trl").is_dir():
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"trl=={TRL}"]
        subprocess.run(command, check=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
