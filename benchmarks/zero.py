"""ZeRO on two CPU ranks beside DeepSpeed's and torch's FSDP2, in one run: `make bench-zero`.

As cpu.py, with its shape, flags and turns. All workers of a run begin with the same weights, and see the same tokens;
a pair whose first losses differ by more than rounding is an error.

    zero 1, 2, 3       DeepSpeed's stage of that number
    zero 2             FSDP2 that keeps parameters from forward to backward, all in one group (the fastest here), and
                       sums whole gradients over microbatches before it shards them
    zero 3             FSDP2 that frees them in between

Each with two microbatches a rank, which are accumulated, and with one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cpu import HERE, SMALL, Pair, flags, peers_python, run

SHAPES = {"2 microbatches": SMALL, "1 microbatch": SMALL | {"microbatches": 2}}
SIDES: tuple[tuple[str, str, dict[str, object], dict[str, object]], ...] = (
    ("zero 1", "deepspeed_zero", {"zero": 1}, {"zero": 1}),
    ("zero 2", "deepspeed_zero", {"zero": 2}, {"zero": 2}),
    ("zero 3", "deepspeed_zero", {"zero": 3}, {"zero": 3}),
    ("zero 2", "fsdp2", {"zero": 2}, {"reshard": False, "one": True}),
    ("zero 3", "fsdp2", {"zero": 3}, {"reshard": True}),
)
PAIRS = tuple(
    Pair(name=f"{name}, {count}", peer=peer, shape=shape, ranks=2, layout=layout, peer_layout=peer_layout)
    for count, shape in SHAPES.items()
    for name, peer, layout, peer_layout in SIDES
)


def main() -> int:
    """Compiles the peer's operators if they are not, makes the weights, runs the pairs."""
    args = flags(__doc__, out="zero.csv", rounds=15, steps=2, disturbed=0.05).parse_args()
    python = peers_python(args.peers_python, Path(args.peers_dir))
    subprocess.run([python, str(HERE / "peers" / "deepspeed_zero.py"), "--build"], check=True)
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as weights:
        save = [python, str(HERE / "peers" / "hf.py"), "--shape", json.dumps(SMALL), "--save", weights]
        subprocess.run(save, check=True)
        return run(PAIRS, args, python, weights=weights)


if __name__ == "__main__":
    sys.exit(main())
