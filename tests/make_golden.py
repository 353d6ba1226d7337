"""Writes tests/golden/*.json: the curves of one rank that every layout must reproduce.

    python tests/make_golden.py

Run it only when the mathematics of a model, the optimizer or the initial weights is meant to change, and say why in
the commit: a change of layout, schedule or kernel must reproduce the committed files.
"""

from __future__ import annotations

import json

import torch
from training_cases import GOLDEN, GOLDEN_STEPS, MODELS, OPTIM, SEED, Case, make_engine, train

from megallm.config.serialize import to_plain


def main() -> None:
    """One file for each model."""
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for name, config in MODELS.items():
        case = Case(model=name)
        curve = train(make_engine(case), 0, GOLDEN_STEPS)
        content = {
            "made_by": "python tests/make_golden.py",
            "how": f"one rank, fp64, micro batch size {case.mbs}, no recomputation, seed {SEED}, "
            "batches of training_cases.global_batch",
            "torch": torch.__version__,
            "model": to_plain(config),
            "optim": to_plain(OPTIM),
            "loss": [loss for loss, _ in curve],
            "grad_norm": [norm for _, norm in curve],
        }
        (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"{name}: loss {curve[0][0]:.4f} -> {curve[-1][0]:.4f}")


if __name__ == "__main__":
    main()
