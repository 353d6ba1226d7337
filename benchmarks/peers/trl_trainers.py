"""The benchmark's worker for TRL on one rank: SFTTrainer, RewardTrainer or DPOTrainer on finetune.py's rows.

The trainer's own loop runs, data loader and logging included; a callback at the end of each step hands over to the
protocol. Settings: fused AdamW, SDPA, fp32, activations not recomputed (they are by default), DPO's reference
precomputed. `--save DIR` writes the initial weights and ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from hf import build_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import serve

BETA = 0.1
KINDS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig), "packed": (trl.SFTTrainer, trl.SFTConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig),
}  # fmt: skip


def main() -> None:
    """--folder of the protocol, --shape and --layout (kind, rows: a file) as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="of the protocol")
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads)
    parser.add_argument("--weights", help="folder of lm/ and scalar/, the initial weights, and of tokenizer.json")
    parser.add_argument("--save", help="write lm/ and scalar/ to this directory and end")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.save:
        save(args.shape, Path(args.save))
        return
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(args.layout["kind"], args.layout["rows"], args.shape, Path(args.weights), out)
        turns = Turns()
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(turns)
        protocol = threading.Thread(target=turns.serve, args=(args.folder,), daemon=True)
        protocol.start()
        trainer.train()  # in the main thread, which has the threads of torch
        protocol.join()


class Turns(transformers.TrainerCallback):
    """Stops the trainer after every step until the protocol wants the next."""

    def __init__(self) -> None:
        self._wanted, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._loss, self._is_over = 0.0, False

    def serve(self, folder: str) -> None:
        """The protocol's side."""
        first = [self._step() for _ in range(2)]
        serve(folder, rank=0, step=self._step, barrier=lambda: None, first=first)
        self._is_over = True
        self._wanted.release()

    def _step(self) -> float:
        self._wanted.release()
        self._done.acquire()
        return self._loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Waits for the first step to be wanted."""
        self._wanted.acquire()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """A step is done, and its loss known: the last thing of a step, since every one is logged."""
        if "loss" not in logs:
            return
        self._loss = float(logs["loss"])
        self._done.release()
        self._wanted.acquire()
        if self._is_over:
            control.should_training_stop = True


def make_trainer(kind: str, rows: str, shape: dict[str, int], weights: Path, out: str) -> Any:
    """The trainer, its data in the file's order."""
    content = json.loads(Path(rows).read_text())
    samples = [[content["rows"][place] for place in sample] for sample in content["samples"]]
    size = shape["micro_batch"] * shape["microbatches"]
    dataset = datasets.Dataset.from_list([columns(kind, sample) for sample in samples[: len(samples) // size * size]])
    trainer_class, config_class = KINDS[kind]
    options: dict[str, Any] = {"max_length": shape["seq"]}
    if kind == "packed":  # the packs are made: its own would be others
        options = {"max_length": None, "padding_free": True, "dataset_kwargs": {"skip_prepare_dataset": True}}
    elif kind == "dpo":
        options |= {"beta": BETA, "precompute_ref_log_probs": True}
        trainer_class = Tokenised
    config = config_class(
        output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False, optim="adamw_torch_fused",
        learning_rate=1e-4, adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="constant",
        num_train_epochs=1000, per_device_train_batch_size=shape["micro_batch"],
        gradient_accumulation_steps=shape["microbatches"], train_sampling_strategy="sequential",
        dataloader_pin_memory=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        **options,
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(weights / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    return trainer_class(model=load(kind, weights), args=config, train_dataset=dataset, processing_class=tokenizer)


class Tokenised(trl.DPOTrainer):
    """DPOTrainer on rows that are ids already, as the other trainers take them."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def columns(kind: str, sample: list[tuple[list[int], int]]) -> dict[str, Any]:
    """A sample with the names that the trainer's collator knows."""
    if kind in ("sft", "packed"):
        ids = [token for own, _ in sample for token in own]
        labels = [token if at >= start else -100 for own, start in sample for at, token in enumerate(own)]
        lengths = {"seq_lengths": [len(own) for own, _ in sample]} if kind == "packed" else {}
        return {"input_ids": ids, "labels": labels} | lengths
    (better, start), (worse, _) = sample
    if kind == "reward":
        return {"chosen_ids": better, "rejected_ids": worse}
    return {"prompt_ids": better[:start], "chosen_ids": better[start:], "rejected_ids": worse[start:]}


def load(kind: str, weights: Path) -> Any:
    """The fp32 model with the head of the kind."""
    head, model_class = "lm", transformers.AutoModelForCausalLM
    if kind == "reward":
        head, model_class = "scalar", transformers.AutoModelForSequenceClassification
    return model_class.from_pretrained(weights / head, dtype=torch.float32, attn_implementation="sdpa")


def save(shape: dict[str, int], folder: Path) -> None:
    """Writes the initial weights with either head."""
    model = build_model(shape)
    model.save_pretrained(folder / "lm")
    model.config.num_labels = 1
    scalar = transformers.LlamaForSequenceClassification(model.config)
    scalar.model.load_state_dict(model.model.state_dict())
    scalar.save_pretrained(folder / "scalar")


if __name__ == "__main__":
    main()
