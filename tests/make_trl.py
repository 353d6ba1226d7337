"""Writes tests/fixtures/trl.json: what TRL's own trainers make of trl_cases.py, on one CPU process in fp32.

    PYTHONPATH=.:kernels:tests python tests/make_trl.py

in an environment that has trl 1.16 and what it needs (transformers 5, datasets, accelerate).
The weights are ours: an engine initialises them from a seed, they are exported as a Hugging Face directory, and
transformers reads that. From there on nothing of ours computes: TRL renders, tokenises, masks, packs, collates, trains.
Run it only when the initial weights, the records or TRL's version are meant to change.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
import trl
from trl_cases import (
    BETA,
    BOS,
    LABEL_SMOOTHING,
    LENGTH,
    MODELS,
    OPTIM,
    PAD,
    POLICY_SEED,
    REFERENCE_SEED,
    RESULTS,
    STEPS,
    VARIANTS,
    Variant,
    config_of,
    digest,
    make_tokenizer,
    records_of,
    variants_of,
)

from megallm.checkpoint.huggingface import HFWriter
from megallm.config.serialize import to_plain
from megallm.data.templates import get_template
from megallm.data.tokenizer import END_OF_TEXT
from megallm.parallel.mesh import Mesh
from megallm.trainers.engine import Engine

SFT_METRICS: tuple[str, ...] = ()
"""None to compare: TRL's token accuracy and entropy are means of microbatches' means."""
REWARD_METRICS = ("accuracy", "margin", "mean_reward")
DPO_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip
Curves = dict[str, list[float]]
Rows = Iterable[tuple[list[int], list[bool]]]


def main() -> None:
    """Every variant of every model."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    results: dict[str, Any] = {}
    for model in MODELS:
        results[model] = {}
        for name in variants_of(model):
            variant = VARIANTS[name]
            with tempfile.TemporaryDirectory() as folder:
                results[model][name] = found = compute(model, variant, Path(folder))
            print(f"{model:6} {name:26} loss {found['loss'][0]:.6f}  grad_norm {found['grad_norm'][0]:.6f}", flush=True)
    content = {
        "made_by": "python tests/make_trl.py",
        "how": f"one process, fp32, no dropout, all records a step in two microbatches, {STEPS} steps",
        "versions": {each.__name__: each.__version__ for each in (trl, transformers, torch, datasets)},
        "models": {name: to_plain(config) for name, config in MODELS.items()},
        "optim": to_plain(OPTIM),
        "results": results,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def compute(model: str, variant: Variant, folder: Path) -> dict[str, Any]:
    """{"rows": a hash of the tokenised rows, "loss", "grad_norm", metrics: a number a step}."""
    config = config_of(model, variant)
    export(config, POLICY_SEED, folder / "policy")
    kind = transformers.AutoModelForCausalLM
    if variant.kind == "reward":
        kind = transformers.AutoModelForSequenceClassification
    policy = kind.from_pretrained(folder / "policy", dtype=torch.float32)
    reference = None
    if variant.kind == "dpo":
        export(config, REFERENCE_SEED, folder / "reference")
        reference = kind.from_pretrained(folder / "reference", dtype=torch.float32)
    if variant.oracle == "torch":
        return written_out(policy, reference, variant)
    trainer = make_trainer(policy, reference, variant, folder)
    rows = digest(rows_of(trainer.train_dataset, variant))
    trainer.train()
    metrics = {"sft": SFT_METRICS, "reward": REWARD_METRICS, "dpo": DPO_METRICS}[variant.kind]
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == STEPS, trainer.state.log_history
    curves = {name: [float(entry[name]) for entry in steps] for name in ("loss", "grad_norm", *metrics)}
    return {"rows": rows} | curves


def export(config: Any, seed: int, folder: Path) -> None:
    """Our initial weights as a Hugging Face directory."""
    engine = Engine(config, Mesh.build(), seed=seed, train=False)
    with HFWriter(folder, config) as writer:
        for _, spec, parameter in engine.model.slices():
            for piece in spec.pieces:
                writer.add(piece.name, piece.local(parameter.detach()).clone())


def hf_tokenizer(template: str | None) -> Any:
    """The tokenizer as transformers has it."""
    with tempfile.TemporaryDirectory() as folder:
        file = make_tokenizer().save(folder)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(file), bos_token=BOS, eos_token=END_OF_TEXT, pad_token=PAD
        )
    tokenizer.chat_template = None if template is None else get_template(template).strip("\n")
    return tokenizer


def make_trainer(policy: Any, reference: Any, variant: Variant, folder: Path) -> Any:
    """TRL's trainer of the variant, with all records."""
    records = records_of(variant)
    common: dict[str, Any] = {
        "output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "optim": "sgd", "learning_rate": OPTIM.learning_rate, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": OPTIM.max_grad_norm, "num_train_epochs": STEPS, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": len(records) // 2, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "max_length": LENGTH,
    }  # fmt: skip
    given: dict[str, Any] = {
        "model": policy, "train_dataset": datasets.Dataset.from_list(records),
        "processing_class": hf_tokenizer(variant.template),
    }  # fmt: skip
    if variant.kind == "reward":
        centering = variant.loss.get("centering")
        return trl.RewardTrainer(args=trl.RewardConfig(center_rewards_coefficient=centering, **common), **given)
    if variant.kind == "dpo":
        kind = variant.loss.get("kind", "sigmoid")
        arguments = trl.DPOConfig(loss_type=[kind], beta=variant.loss["beta"], **common)
        return trl.DPOTrainer(ref_model=reference, args=arguments, **given)
    options = {
        "assistant_only_loss": variant.records == "conversations" and variant.train_on == "answers",
        "packing": variant.pack, "packing_strategy": "bfd",
    }  # fmt: skip
    trainer = trl.SFTTrainer(args=trl.SFTConfig(**common, **options), **given)
    if variant.pack:  # two microbatches of packs, as many as there are
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = -(-len(trainer.train_dataset) // 2)
    return trainer


def rows_of(dataset: Any, variant: Variant) -> Rows:
    """(ids, which are trained) of TRL's rows, packs taken apart."""
    for row in dataset:
        if variant.kind == "sft":
            start = 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                own = slice(start, start + length)
                yield row["input_ids"][own], [label != -100 for label in row["labels"][own]]
                start += length
        elif variant.kind == "reward":
            for name in ("chosen_ids", "rejected_ids"):
                yield row[name], [True] * len(row[name])
        else:
            for name in ("chosen_ids", "rejected_ids"):
                prompt = row["prompt_ids"]
                yield prompt + row[name], [False] * len(prompt) + [True] * len(row[name])


def written_out(policy: Any, reference: Any, variant: Variant) -> dict[str, Any]:
    """As `compute`, in plain torch and fp64: every answer alone in a forward, no padding, no masks; plain SGD."""
    policy, reference = policy.double(), reference.double()
    tokenizer = hf_tokenizer(variant.template)
    pairs = [encode_pair(record, tokenizer) for record in records_of(variant)]
    free = variant.loss.get("reference_free", False)
    with torch.no_grad():
        known = [[logprob(reference, answer) for answer in pair] for pair in pairs]
    if free:
        known = [[torch.zeros(()) for _ in pair] for pair in pairs]
    rows = [(ids, [at >= start for at in range(len(ids))]) for pair in pairs for ids, start in pair]
    curves: Curves = {name: [] for name in ("loss", "grad_norm", *DPO_METRICS)}
    optimizer = torch.optim.SGD(policy.parameters(), lr=OPTIM.learning_rate)
    policy.eval()
    for _ in range(STEPS):
        logps = torch.stack([torch.stack([logprob(policy, answer) for answer in pair]) for pair in pairs])  # [12, 2]
        ratios = logps - torch.tensor(known, dtype=torch.float64)
        loss = formula(variant)(ratios[:, 0] - ratios[:, 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIM.max_grad_norm)
        optimizer.step()
        rewards, logps = BETA * ratios.detach(), logps.detach()
        better = rewards[:, 0] > rewards[:, 1]
        found = (loss.detach(), norm, *rewards.mean(0), (rewards[:, 0] - rewards[:, 1]).mean(), better.double().mean())
        for name, value in zip(curves, (*found, *logps.mean(0)), strict=True):
            curves[name].append(float(value))
    return {"rows": digest(rows)} | curves


def formula(variant: Variant) -> Callable[[torch.Tensor], torch.Tensor]:
    """The loss of each pair, of h."""
    if variant.loss.get("kind") == "ipo":
        return lambda h: (h - 1 / (2 * BETA)) ** 2
    smooth = LABEL_SMOOTHING if "label_smoothing" in variant.loss else 0.0
    return lambda h: -(1 - smooth) * F.logsigmoid(BETA * h) - smooth * F.logsigmoid(-BETA * h)


def encode_pair(record: dict[str, Any], tokenizer: Any) -> list[tuple[list[int], int]]:
    """(ids, where the answer begins) of the chosen and the rejected answer."""
    render: Callable[..., Any] = tokenizer.apply_chat_template
    prompt = render(record["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    pair = []
    for name in ("chosen", "rejected"):
        ids = render(record["prompt"] + record[name], return_dict=True)["input_ids"]
        assert ids[: len(prompt)] == prompt
        pair.append((ids, len(prompt)))
    return pair


def logprob(model: Any, answer: tuple[list[int], int]) -> torch.Tensor:
    """0-d: the log-probability of an answer, the sum over its tokens."""
    ids, start = torch.tensor([answer[0]]), answer[1]
    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, ids[0, start:, None]).sum()


if __name__ == "__main__":
    main()
