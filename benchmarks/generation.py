"""Generation speed on one CPU beside Hugging Face's generate, in one run: `make bench-generation`.

Both decode the same prompts greedily, from equal weights, with equal results (compared). Prompts and answers have mixed
lengths: log-uniform, prompts from 16 to 128 tokens and answers from 8 to 256; 48 of them for batches of 8, 96 for 32,
in one order for both. Hugging Face pads the prompts of a batch and decodes until its longest answer is done; ours gives
a finished sequence's place to the next prompt. Counted are the tokens of each answer's own length. Workers take turns,
as cpu.py says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu import HERE, SMALL, Pair, append, compare, flags, machine, peers_python
from workload import answer_tokens

MODELS = {
    "5M": {key: SMALL[key] for key in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")},
}
MODELS["5M"]["seq"] = 512
MODELS["22M"] = MODELS["5M"] | {"hidden": 512, "intermediate": 1376, "layers": 6}
PAIRS = tuple(
    Pair(
        name=f"{name}, batch {batch}",
        peer="hf_generation",
        ours="ours_generation",
        shape=shape | {"batch": batch, "prompts": {1: 8, 8: 48, 32: 96}[batch]},
        layout={},
    )
    for name, shape in MODELS.items()
    for batch in (1, 8, 32)
)


def main() -> int:
    """Tokens a second, ours and Hugging Face's."""
    args = flags(__doc__, out="generation.csv", rounds=5, steps=1, disturbed=0.0).parse_args()
    python, about, started = peers_python(args.peers_python, Path(args.peers_dir)), machine(), time.monotonic()
    print(f"{'what':20} {'ours':>12} {'Hugging Face':>14}   ratio of speeds (20th - 80th percentile)", flush=True)
    for pair in PAIRS:
        if args.only not in pair.name:
            continue
        with tempfile.TemporaryDirectory(prefix="bench-") as weights:
            saver = [python, str(HERE / "peers" / "hf_generation.py"), "--save", weights]
            subprocess.run([*saver, "--shape", json.dumps(pair.shape)], check=True, capture_output=True)
            row = compare(
                pair, peers_python=python, rounds=args.rounds, steps=args.steps, weights=weights,
                disturbed=args.disturbed, limit_s=args.limit_s,
            )  # fmt: skip
        tokens = answer_tokens(pair.shape["prompts"])
        ours, theirs = (round(tokens / float(str(row[name])) * 1e3) for name in ("ours_ms", "peer_ms"))
        row |= {"tokens": tokens, "ours_tokens_per_s": ours, "peer_tokens_per_s": theirs}
        append(Path(args.out), [row | about])
        low, middle, high = (1.0 / float(str(row[f"ratio_{name}"])) for name in ("p80", "p50", "p20"))
        print(f"{pair.name:20} {ours:>8} t/s {theirs:>10} t/s   {middle:.2f} ({low:.2f} - {high:.2f})", flush=True)
    print(f"added to {args.out} in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
