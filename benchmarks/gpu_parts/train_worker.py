"""One contender's training steps in a process of its own: ours on one set of back ends, or transformers.

Everybody gets the same initial weights (functions of the seed and the parameter's name), the same random batch, the
same microbatches, clipping to norm 1.0 and AdamW that updates fp32 master weights:

    megallm     bf16 weights, fp32 gradients, masters and moments                        2 + 4 + 4 + 8 bytes a parameter
    hf          bf16 weights and gradients, fp32 gradients for the update, masters, moments     2 + 2 + 4 + 4 + 8

The peer so computes in bf16 throughout (faster than autocast over fp32 weights) and accumulates microbatches in bf16,
which is less exact than ours. torch.compile takes each of its decoder layers, and its head with the loss, as a region.

Waits for folder/go-NAME before it touches the GPU, so that imports of the next contender overlap with the last one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts.clock import spread
from gpu_parts.place import Place, make_place
from gpu_parts.rows import JsonLines, Row, row

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input_ids, labels) [B, S] -> the step's mean loss, 0-d; nothing waits for the device."""
SEED = 1234
LEARNING_RATE = 1e-4


def model_config(shape: dict[str, Any]) -> Any:
    """Ours; the peer's is made from the same numbers."""
    from megallm.config.model import ModelConfig

    return ModelConfig(
        family="llama", vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        head_dim=shape["hidden"] // shape["heads"], max_position_embeddings=shape["max_seq"], rope_theta=500000.0,
    )  # fmt: skip


def forced_backends(kind: str) -> dict[str, str]:
    """{op: kind} for every op whose kernel file is there; of what is missing, torch runs."""
    from megallm.config.backends import BACKENDS

    files = {"rms_norm": "norm", "layer_norm": "norm", "adamw": "adamw"}
    forced = {}
    for op, names in BACKENDS.items():
        if kind not in names:
            continue
        module = f"megallm_kernels.{files.get(op, op)}"
        if kind == "torch" or importlib.util.find_spec(module) is not None:
            forced[op] = kind
    return forced


def make_ours(kind: str, shape: dict[str, Any], place: Place, micro_batch: int) -> tuple[Step, str]:
    """The library's engine on one rank with its back ends forced."""
    from megallm.config.optim import OptimConfig
    from megallm.ops.backends import Backends
    from megallm.parallel import Engine, Mesh, language_model_loss

    forced = forced_backends(kind)
    chosen: list[str] = []
    engine = Engine(
        model_config(shape), Mesh.build(device=place.device),
        optim=OptimConfig(learning_rate=LEARNING_RATE, weight_decay=0.1, beta2=0.95, max_grad_norm=1.0),
        micro_batch_size=micro_batch, precision="bf16" if place.is_cuda else "fp32", seed=SEED,
        backends=Backends(forced, announce=chosen.append),
    )  # fmt: skip

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return engine.train_step({"input_ids": input_ids, "labels": labels}, language_model_loss).loss_sum

    return step, "fp32 master weights; " + ", ".join(f"{op}={name}" for op, name in sorted(forced.items()))


def make_hf(kind: str, shape: dict[str, Any], place: Place, micro_batch: int) -> tuple[Step, str]:
    """LlamaForCausalLM from its config: plain, compiled, or with Liger's kernels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["max_seq"], tie_word_embeddings=False, use_cache=False, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa",
    )  # fmt: skip
    if kind == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    with torch.device(place.device):
        model = LlamaForCausalLM(config).to(place.dtype).train()
    initialize(model, shape)
    update = MasterAdamW(list(model.parameters()))
    head = head_loss
    if kind == "compile":
        torch._dynamo.config.recompile_limit = 64  # more than layers, should each be taken for another function
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        head = torch.compile(head_loss, dynamic=False)

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if kind == "liger":
            return model(input_ids=ids, shift_labels=labels, labels=labels).loss
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return head(hidden.flatten(0, 1), model.lm_head.weight, labels.reshape(-1))

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=place.device)
        parts = list(zip(input_ids.split(micro_batch), labels.split(micro_batch), strict=True))
        for ids, wanted in parts:
            loss = loss_of(ids, wanted) / len(parts)
            loss.backward()
            total += loss.detach()
        update.step()
        return total

    return step, "fp32 master weights, bf16 gradients; fused AdamW" + (
        "; torch.compile of each layer and of the head with its loss" if kind == "compile" else ""
    )


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of hidden [T, H]."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


@torch.no_grad()
def initialize(model: torch.nn.Module, shape: dict[str, Any]) -> None:
    """The weights our engine starts from: normal numbers that depend on the parameter's name alone."""
    from megallm.parallel import random

    std = model_config(shape).initializer_range
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        own = std / (2 * shape["layers"]) ** 0.5 if residual else std
        start = (0,) * parameter.dim()
        random.normal_(
            parameter, key=random.key(SEED, "init", name), start=start, shape=tuple(parameter.shape), std=own
        )


class MasterAdamW:
    """torch's fused AdamW on fp32 copies of the parameters, with clipping to norm 1.0."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._masters = [p.detach().float().clone().requires_grad_() for p in parameters]
        decayed = [m for m in self._masters if m.dim() > 1]
        others = [m for m in self._masters if m.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        for master in self._masters:
            master.grad = torch.zeros_like(master)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the parameters' .grad, which is dropped."""
        grads = [master.grad for master in self._masters]
        torch._foreach_copy_(grads, [p.grad for p in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0, foreach=True)
        self._optimizer.step()
        torch._foreach_copy_(self._parameters, self._masters)


def measure(step: Step, place: Place, task: dict[str, Any], seq: int, contender: str, note: str) -> Row:
    """Some steps on one batch, after warm-up; the loss is that of the first step ever at this length."""
    from megallm.config.hardware import find_gpu
    from megallm.model.counts import model_flops_per_token

    shape, tokens = task["shape"], task["tokens"]
    generator = torch.Generator().manual_seed(SEED + seq)
    ids = torch.randint(0, shape["vocab"], (tokens // seq, seq + 1), generator=generator).to(place.device)
    input_ids, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    first_loss = float(step(input_ids, labels))
    for _ in range(task["warmup"]):
        step(input_ids, labels)
    place.synchronize()
    if place.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(task["steps"]):
        started = time.perf_counter()
        step(input_ids, labels)
        place.synchronize()
        samples.append((time.perf_counter() - started) * 1e6)
    times = spread(samples)
    rate = tokens / times.p50 * 1e6
    gpu = find_gpu(torch.cuda.get_device_name(place.device)) if place.is_cuda else None
    peak = gpu.peak_flops("bf16") if gpu is not None else None
    flops = model_flops_per_token(model_config(shape | {"max_seq": max(shape["max_seq"], seq)}), seq_length=seq)
    numbers: dict[str, Any] = {"mfu": rate * flops / peak} if peak else {}
    if place.is_cuda:
        numbers["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row(
        section=task["section"], op="train_step", case=f"{task['shape']['name']} S {seq}", dtype=place.dtype_name,
        contender=contender, direction="step", eager_us=times.p50, eager_us_p20=times.p20, eager_us_p80=times.p80,
        tokens_per_s=rate, tflop_per_s=rate * flops * 1e-12, loss=first_loss, note=note, **numbers,
    )  # fmt: skip


def run(task: dict[str, Any], contender: str, lines: JsonLines, wait: Callable[[], None] = lambda: None) -> None:
    """All sequence lengths of one contender, one after another on one model; a length that fails is a row."""
    family, _, kind = contender.partition(" ")
    if family == "hf":
        import transformers  # noqa: F401  (slow: before the GPU's turn)
    else:
        import megallm.parallel  # noqa: F401
    wait()
    place = make_place(task["device"], tiny=task["tiny"], seed=SEED)
    common = {"section": task["section"], "op": "train_step", "contender": contender}
    for seq in task["seqs"]:
        case = f"{task['shape']['name']} S {seq}"
        try:
            micro_batch = max(task["micro_tokens"] // seq, 1)
            make = make_hf if family == "hf" else make_ours
            # a new model for each length: the losses of all contenders start from the same weights
            step, note = make(kind, task["shape"], place, micro_batch)
            lines.add(measure(step, place, task, seq, contender, note))
        except Exception as error:
            text = str(error).strip().splitlines()
            note = f"{type(error).__name__}: {text[0][:300] if text else ''}"
            lines.add(row(**common, case=case, status="error", note=note))
        step = None  # type: ignore[assignment]
        if place.is_cuda:
            import gc

            gc.collect()
            torch.cuda.empty_cache()


def main() -> int:
    """--folder, --name, --contender; the task is folder/train.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--contender", required=True)
    args = parser.parse_args()
    task = json.loads((args.folder / f"train-{args.name}.json").read_text())
    lines = JsonLines(args.folder / f"rows-train-{args.name}.jsonl")

    def wait() -> None:
        while not (args.folder / f"go-{args.name}").exists():
            time.sleep(0.05)

    run(task, args.contender, lines, wait)
    return 0


if __name__ == "__main__":
    sys.exit(main())
