"""PPO beside TRL's on one task: does it learn as much? Run by hand, minutes.

    python benchmarks/ppo_learning.py --model runs/answers --reward runs/taste --template plain --seeds 1 2 3

Both sides begin with the same policy and reward model (checkpoints, exported for TRL), have the same prompts in orders
of their own, and the same settings as far as both know them:

    rollouts of 64 answers of up to 32 tokens at temperature 1, which the end mark ends; no penalty for a missing one
    2 epochs of 2 minibatches; AdamW, learning rate 1e-4 for policy and critic, constant, beta2 0.95, no decay, no
    clipping of gradients
    KL 0.05 (k1, in the reward), clip 0.2, value clip 0.2, gamma 1, lambda 0.95, advantages whitened; rewards are not

What differs: TRL trains policy and critic with one optimizer and the value loss times 0.1, which is nearly the same
after AdamW without clipping; its old log-probabilities are the sampler's, ours the training forward's; ours takes the
mean score of good responses off every score and value, which the table adds again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from cpu import HERE, append, peers_python
from ppo import TRL, about_peers, trl_of

from megallm.data.chat_model import ChatModel
from megallm.data.finetune_data import open_template
from megallm.data.prompts import PromptDataset, read_prompts
from megallm.data.tokenizer import Tokenizer
from megallm.trainers.scores import read_calibration
from megallm.trainers.source import open_model

SHAPE = {"batch": 64, "minibatches": 2, "epochs": 2, "new_tokens": 32, "seq": 128}
LEARNING_RATE = 1e-4
LAST = 10


def main() -> int:
    """Trains with both, prints a table, draws a picture, appends rows."""
    args = flags()
    python = peers_python(args.peers_python, Path(args.peers_dir))
    trl = args.trl_dir or trl_of(python, Path(args.peers_dir) / f"trl-{TRL}")
    known: list[Curves] = []
    for seed in args.seeds:
        folder = args.work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        offset = prepare(args, folder, seed)
        ours, theirs = folder / "ours" / "metrics.jsonl", folder / "trl.jsonl"
        peer = [
            python, str(HERE / "peers" / "trl_ppo_learning.py"), "--settings", str(folder / "settings.json"),
            "--weights", str(folder / "weights"), "--trl", str(trl), "--out", str(theirs),
        ]  # fmt: skip
        is_new = train(args, "ours", ours, own_command(args, folder, seed)) | train(args, "trl", theirs, peer)
        if ours.is_file() and theirs.is_file():
            known.append({"ours": own_curve(ours, offset), f"TRL {TRL}": trl_curve(theirs)})
            report(known[-1], offset, seed=seed, out=args.out if is_new else None)
    if known:
        draw(args.picture, known)
    return 0


def train(args: argparse.Namespace, side: str, metrics: Path, command: list[str]) -> bool:
    """Runs the side, unless it is not wanted or its metrics are there and kept; whether it did."""
    if side not in args.sides or (args.keep and metrics.is_file()):
        return False
    print(f"training: {side}, for {metrics}", flush=True)
    metrics.parent.mkdir(exist_ok=True)
    with metrics.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return True


def flags() -> argparse.Namespace:
    """What this is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint of the policy")
    parser.add_argument("--reward", required=True, help="checkpoint of the reward model")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=Path("runs/ppo_learning"), help="exports, logs and metrics")
    parser.add_argument("--sides", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    parser.add_argument("--keep", action="store_true", help="do not train again what has metrics in --work")
    parser.add_argument("--peers-python", help="interpreter of an environment that has the peers")
    parser.add_argument("--peers-dir", default=str(Path.home() / ".cache" / "megallm" / "bench-peers"))
    parser.add_argument("--trl-dir", type=Path, help=f"directory of TRL {TRL}; else it is made")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ppo_learning.csv")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "img" / "ppo-trl.png")
    return parser.parse_args()


def prepare(args: argparse.Namespace, folder: Path, seed: int) -> float:
    """Writes weights/ and settings.json for TRL; returns what calibration takes off raw scores."""
    weights = folder / "weights"
    export = [sys.executable, "-c", "import sys; from megallm.cli.main import main; sys.exit(main())", "export"]
    for name, head in ((args.model, "lm"), (args.reward, "scalar")):
        if not (weights / head).is_dir():
            subprocess.run([*export, name, str(weights / head)], check=True)
    tokenizer = Tokenizer.from_path(args.model)
    tokenizer.save(weights)
    chat = ChatModel(
        tokenizer=tokenizer, template=open_template(args.template, tokenizer, None), max_length=SHAPE["seq"]
    )
    assert chat.stop_ids == (tokenizer.eos_id,), "TRL ends answers at the end mark alone"
    pool = PromptDataset(read_prompts(), chat, max_prompt_tokens=SHAPE["seq"] - SHAPE["new_tokens"], shuffle=False)
    prompts = [pool.prompt(index).ids for index in range(pool.num_prompts)]
    settings = {
        "shape": SHAPE, "prompts": prompts, "learning_rate": LEARNING_RATE, "iterations": args.iterations,
        "kl_coefficient": 0.05, "seed": seed,
        "fixed": {"prompts": prompts[:32], "answers": [(ids * 32)[:16] for ids in prompts[32:64]]},
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    source = open_model(args.reward)
    assert source.path is not None
    return read_calibration(source.path).mean


def own_command(args: argparse.Namespace, folder: Path, seed: int) -> list[str]:
    """examples/ppo.py with what the module docstring says."""
    minibatch = SHAPE["batch"] // SHAPE["minibatches"]
    options = {
        "model": args.model, "reward": args.reward, "template": args.template, "steps": args.iterations,
        "rollout-batch-size": SHAPE["batch"], "global-batch-size": minibatch, "micro-batch-size": minibatch,
        "update-epochs": SHAPE["epochs"], "max-new-tokens": SHAPE["new_tokens"], "seq-length": SHAPE["seq"],
        "learning-rate": LEARNING_RATE, "critic-learning-rate": LEARNING_RATE, "kl-coefficient": 0.05,
        "max-grad-norm": 0.0, "beta2": 0.95, "weight-decay": 0.0, "save-every": 0, "seed": seed,
        "save": folder / "ours",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(HERE.parent / "examples" / "ppo.py"), *words]


Curves = dict[str, list[dict[str, float]]]
"""{side: what each iteration has}."""


def own_curve(file: Path, offset: float) -> list[dict[str, float]]:
    """Raw score, its KL, the tokens of an answer, of each iteration."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {"score": line["score"] + offset, "kl": line["kl"], "seconds": line["step_time_s"]} for line in lines
        if "score" in line
    ]  # fmt: skip


def trl_curve(file: Path) -> list[dict[str, float]]:
    """Likewise; scores are raw."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if "objective/scores" in line]
    ends = [0.0, *(line["seconds"] for line in lines)]
    return [
        {"score": line["objective/scores"], "kl": line["objective/kl"], "seconds": end - begin}
        for line, begin, end in zip(lines, ends[:-1], ends[1:], strict=True)
    ]


def report(curves: Curves, offset: float, *, seed: int, out: Path | None) -> None:
    """The table; the rows, appended to `out`."""
    about = about_peers()
    print(f"{'':12} {'first':>8} {f'last {LAST}':>8} {'kl':>8}   raw score; {offset:.2f} is a good response's")
    for side, curve in curves.items():
        last = curve[-LAST:]
        row = {"side": side, "iterations": len(curve), "first_score": round(curve[0]["score"], 3)}
        row |= {f"last_{name}": round(sum(line[name] for line in last) / len(last), 3) for name in ("score", "kl")}
        row |= {"calibration_offset": round(offset, 3), "seed": seed}
        if out is not None:
            append(out, [row | about])
        print(f"{side:12} {row['first_score']:8.2f} {row['last_score']:8.2f} {row['last_kl']:8.2f}", flush=True)


def draw(picture: Path, known: list[Curves]) -> None:
    """Score and KL of the iterations, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.2), layout="constrained")
    for axis, name, words in zip(axes, ("score", "kl"), ("mean score, raw", "KL of an answer, nats"), strict=True):
        for number, side in enumerate(known[0]):
            for at, curves in enumerate(known):
                curve, label = curves[side], side if at == 0 else None
                axis.plot([line[name] for line in curve], color=f"C{number}", linewidth=1.0, label=label)
        axis.set(xlabel="iteration", ylabel=words)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
