"""Writes tests/fixtures/peft_llama.json: what Hugging Face's peft makes of tests/peft_case.py.

    python tests/make_peft_fixture.py       in an environment with peft and transformers

Run it only to take in what a newer peft changes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft_case import ADAPTERS, FIXTURE, LINEARS, SIZES, batch, numbers, tensor, weight
from safetensors import safe_open


def base_model() -> Any:
    """The base model in fp64."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))
    return model


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Loss, logits and gradients with adapters and without, and what peft saves."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", lora_dropout=0.0, **(options | {"target_modules": options["target_modules"] or LINEARS})
    )
    model = peft.get_peft_model(base_model(), config).double()
    adapters = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(tensor(name, tuple(parameter.shape)))
    data = batch()
    logits = model(input_ids=data["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits.view(-1, SIZES["vocab_size"]), data["labels"].view(-1))
    loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "adapter_config.json").read_text())
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
            stored = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    gradients = {name: p.grad for name, p in adapters.items()}
    merged = model.merge_and_unload()
    with torch.no_grad():
        after = merged(input_ids=data["input_ids"]).logits
    return {
        "options": options,
        "loss": loss.item(),
        "logits": logits[:, -1, :5].tolist(),
        "merged_logits": after[:, -1, :5].tolist(),
        "gradients": numbers(gradients),
        "stored": stored,
        "adapter_config": saved | {"target_modules": sorted(saved["target_modules"])},
    }


def main() -> None:
    """One file of all kinds of adapters."""
    torch.set_num_threads(1)
    content = {
        "made_by": "python tests/make_peft_fixture.py",
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "sizes": SIZES,
        "adapters": {name: measure(options) for name, options in ADAPTERS.items()},
    }
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
