"""PPO with TRL for ppo_learning.py: PPOTrainer's metrics of every iteration, as JSON lines."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from trl_ppo import fixed, import_trl, make_trainer


def main() -> None:
    """--settings: what ppo_learning.py wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="folder of lm/ and scalar/, and of tokenizer.json")
    parser.add_argument("--trl", required=True, help="directory of the package")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    import_trl(args.trl)
    settings = json.loads(args.settings.read_text())
    shape = settings["shape"]
    with tempfile.TemporaryDirectory() as out, args.out.open("w") as file:
        trainer = make_trainer(
            settings["prompts"], shape, args.weights, out, learning_rate=settings["learning_rate"],
            kl_coef=settings["kl_coefficient"], stop_token="eos", seed=settings["seed"],
            total_episodes=settings["iterations"] * shape["batch"],
        )  # fmt: skip
        logprob, score = fixed(trainer, settings["fixed"]["prompts"], settings["fixed"]["answers"])
        file.write(json.dumps({"fixed_logprob": logprob, "fixed_score": score}) + "\n")
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Lines(file))
        trainer.train()


class Lines(transformers.TrainerCallback):
    """Writes the logs."""

    def __init__(self, file: Any) -> None:
        self._file, self._began = file, time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """A line an iteration."""
        seconds = time.perf_counter() - self._began
        self._file.write(json.dumps({"step": state.global_step, "seconds": round(seconds, 2)} | logs) + "\n")
        self._file.flush()


if __name__ == "__main__":
    main()
