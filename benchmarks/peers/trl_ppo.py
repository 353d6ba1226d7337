"""The benchmark's worker for PPO with TRL on one rank: trl.experimental.ppo's PPOTrainer, its own loop.

A callback at the end of each iteration hands over to the protocol. Settings: fused AdamW, SDPA, fp32, activations not
recomputed, no sample generations, all prompts generated for at once. A minibatch is one microbatch: with gradient
accumulation the trainer makes one update an epoch, however many minibatches it is told.
The padding token is beyond the vocabulary: the trainer takes it in an answer for the answer's end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import serve, write_json


class Over(Exception):
    """The trainer's loop asks nobody whether to stop."""


def main() -> None:
    """--folder of the protocol, --shape and --layout (rows, peer: files; trl: where that package is) as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads, required=True)
    parser.add_argument("--weights", required=True, help="folder of lm/ and scalar/, and of tokenizer.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    import_trl(args.layout["trl"])
    rows = json.loads(Path(args.layout["rows"]).read_text())
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(rows["prompts"], args.shape, Path(args.weights), out)
        first = fixed(trainer, rows["prompts"], rows["answers"])
        turns = Turns(first, Path(args.layout["peer"]))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(turns)
        protocol = threading.Thread(target=turns.serve, args=(args.folder,), daemon=True)
        protocol.start()
        try:
            trainer.train()  # in the main thread, which has the threads of torch
        except Over:
            protocol.join()


def import_trl(folder: str) -> None:
    """The version in `folder`; the environment may have another."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    sys.path.insert(0, folder)
    import trl.experimental.ppo

    assert Path(trl.__file__).is_relative_to(folder), f"{trl.__file__} is not in {folder}"


class Turns(transformers.TrainerCallback):
    """Stops the trainer after every iteration until the protocol wants the next."""

    def __init__(self, first: list[float], file: Path) -> None:
        self._wanted, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._score, self._is_over, self._first = 0.0, False, first
        self._file, self._lines = file, []

    def serve(self, folder: str) -> None:
        """The protocol's side."""
        self._step()
        self._lines.clear()
        serve(folder, rank=0, step=self._step, barrier=lambda: None, first=self._first)
        self._is_over = True
        self._wanted.release()

    def _step(self) -> float:
        began = time.process_time()
        self._wanted.release()
        self._done.acquire()
        self._lines.append({"cpu_s": time.process_time() - began})
        write_json(self._file, self._lines)
        return self._score

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Waits for the first iteration to be wanted."""
        self._wanted.acquire()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """An iteration is done: what follows is a collection of garbage."""
        if "objective/scores" not in logs:
            return
        self._score = float(logs["objective/scores"])
        self._done.release()
        self._wanted.acquire()
        if self._is_over:
            raise Over


def make_trainer(prompts: list[list[int]], shape: dict[str, int], weights: Path, out: str, **options: Any) -> Any:
    """The trainer; `options` go to its config."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(**{
        "output_dir": out, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "optim": "adamw_torch_fused", "learning_rate": 1e-5, "adam_beta2": 0.95, "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "total_episodes": 1_000_000 * shape["batch"],
        "per_device_train_batch_size": shape["batch"], "gradient_accumulation_steps": 1,
        "num_mini_batches": shape["minibatches"], "local_rollout_forward_batch_size": shape["batch"],
        "num_ppo_epochs": shape["epochs"], "response_length": shape["new_tokens"], "temperature": 1.0,
        "kl_coef": 0.05, "num_sample_generations": 0, "dataloader_pin_memory": False, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
    } | options)  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(weights / "tokenizer.json"), eos_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
    language, scalar = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=load(language, weights / "lm"),
        ref_model=load(language, weights / "lm"), reward_model=load(scalar, weights / "scalar"),
        value_model=load(scalar, weights / "scalar"),
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
    )  # fmt: skip
    assert tokenizer.pad_token_id >= trainer.policy_model.config.vocab_size, "the padding token can be sampled"
    return trainer


def fixed(trainer: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """[mean log-probability of the answers' tokens, mean score], by the trainer's own functions."""
    from trl.experimental.ppo.ppo_trainer import forward, get_reward, selective_log_softmax

    pad, width = trainer.processing_class.pad_token_id, max(map(len, prompts))
    rows = [[pad] * (width - len(p)) + p + a for p, a in zip(prompts, answers, strict=True)]
    ids, wanted = torch.tensor(rows), torch.tensor(answers)
    with torch.no_grad():
        logits = forward(trainer.ref_model, ids, pad).logits[:, width - 1 : -1]
        _, scores, _ = get_reward(trainer.reward_model, ids, pad, width)
        return [float(selective_log_softmax(logits, wanted).double().mean()), float(scores.double().mean())]


def load(model_class: Any, folder: Path) -> Any:
    """The fp32 model of a directory."""
    options = {"num_labels": 1} if "Sequence" in model_class.__name__ else {}
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **options)


if __name__ == "__main__":
    main()
