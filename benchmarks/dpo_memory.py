"""Peak memory of a DPO step with a large vocabulary, beside the form with whole logits: `make bench-dpo-memory`.

Both forms run the same engine, model and batch in a process of their own: DpoLoss as it is, and a loss that makes the
logits [B, S, V], their log-softmax, and picks the labels' out of it, as DPO is usually written. Measured is how far the
process's resident memory rises during the second step (the first one makes the optimizer state).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpu import HERE, append, machine

FORMS = ("ours", "naive")


def main() -> int:
    """Runs both forms in turn, prints their peaks, appends a row to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128_000, help="V")
    parser.add_argument("--pairs", type=int, default=2, help="comparisons of the batch, in one microbatch")
    parser.add_argument("--seq", type=int, default=512, help="tokens of each response, all of them trained on")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "dpo_memory.csv", help="CSV to append to")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args)))
        return 0
    found: dict[str, Any] = {}
    for form in FORMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[form] = json.loads(done.stdout.splitlines()[-1])
        print(f"{form:6} {found[form]['mib']:>6} MiB   loss {found[form]['loss']:.7f}", flush=True)
    ratio = found["ours"]["mib"] / found["naive"]["mib"]
    print(f"ratio {ratio:.3f}")
    row = {"vocabulary": args.vocabulary, "rows": 2 * args.pairs, "seq": args.seq}
    row |= {f"{form}_peak_mib": found[form]["mib"] for form in FORMS}
    append(args.out, [row | {"ratio": round(ratio, 3)} | machine()])
    return 0


def measure(args: argparse.Namespace) -> dict[str, float]:
    """{mib, loss} of one form."""
    import torch

    from megallm.config.model import ModelConfig
    from megallm.parallel.mesh import Mesh
    from megallm.trainers.engine import Engine
    from megallm.trainers.preference_losses import DpoLoss, count_prompts

    torch.set_num_threads(1)
    rows = 2 * args.pairs
    config = ModelConfig(
        family="llama", vocab_size=args.vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, intermediate_size=128, max_position_embeddings=args.seq,
    )  # fmt: skip
    engine = Engine(config, Mesh.build(), micro_batch_size=rows, seed=0)
    ids = torch.randint(0, args.vocabulary, (rows, args.seq), generator=torch.Generator().manual_seed(1))
    batch = {
        "input_ids": ids, "labels": ids.roll(-1, 1), "lengths": torch.full((rows,), args.seq),
        "ranks": torch.tensor([0, 1] * args.pairs), "sample_ids": torch.arange(args.pairs).repeat_interleave(2),
        "ref_logprobs": torch.full((rows,), -6000.0),
    }  # fmt: skip
    loss_fn = DpoLoss() if args.form == "ours" else naive
    engine.train_step(batch, loss_fn, count_fn=count_prompts)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    result = engine.train_step(batch, loss_fn, count_fn=count_prompts)
    return {"mib": round((_status("VmHWM") - before) / 1024), "loss": result.metrics()["loss"]}


def naive(logits: Any, batch: dict[str, Any]) -> Any:
    """Sigmoid DPO, beta 0.1, through whole logits."""
    import torch
    import torch.nn.functional as F

    logprobs = torch.log_softmax(logits.local.float(), -1)  # [T, V]
    labels = batch["labels"].flatten()
    logprobs = logprobs.gather(-1, labels.unsqueeze(-1)).view(len(batch["ref_logprobs"]), -1).sum(1)
    d = logprobs - batch["ref_logprobs"]
    return -F.logsigmoid(0.1 * (d[0::2] - d[1::2])).sum(), (batch["ranks"] == 0).sum(), {}


def _status(key: str) -> int:
    """KiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


if __name__ == "__main__":
    sys.exit(main())
