"""`megallm export`: writes a checkpoint as a directory that transformers opens.

    megallm export runs/books out
    megallm export runs/books/step-00002000 out --dtype bfloat16
    megallm export runs/books out --adapters

writes out/config.json, generation_config.json, the weights as safetensors and, where the checkpoint has a tokenizer,
tokenizer.json with its tokenizer_config.json, and a reward model's calibration.json. Adapters are added to the weights;
with --adapters they alone are written, as peft does. `out` appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

from megallm.checkpoint import sharded
from megallm.checkpoint.adapters import open_weights, read_lora_config
from megallm.checkpoint.huggingface import HFWriter
from megallm.checkpoint.peft import adapter_shapes, write_peft
from megallm.config.model import ModelConfig
from megallm.data.tokenizer import Tokenizer
from megallm.runtime.outputs import check_output_directory
from megallm.trainers.scores import FILE as CALIBRATION

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_BESIDE_TOKENIZER = (_TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument("checkpoint", metavar="CKPT", help="a step-... directory, or the one that holds several")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: that of the checkpoint)")
    parser.add_argument("--adapters", action="store_true", help="only the adapters of a LoRA run, for peft to load")


def run(args: argparse.Namespace) -> int:
    """Writes the directory and says what is in it; returns 0.

    FileNotFoundError if there is no complete checkpoint; ValueError if OUT is not empty, if transformers has no such
    model, or if weights are missing.
    """
    check_output_directory(args.out)
    checkpoint = sharded.latest(args.checkpoint)
    if checkpoint is None:
        raise FileNotFoundError(f"{args.checkpoint} holds no complete checkpoint: give SAVE or SAVE/step-...")
    model = sharded.read_model_config(checkpoint)
    if args.adapters:
        return _write_adapters(checkpoint, model, args)
    num_parameters = 0
    with HFWriter(args.out, model, dtype=_DTYPES.get(args.dtype)) as writer:
        files = _tokenizer_files(checkpoint, model)
        for name, content in (files | _calibration_file(checkpoint)).items():
            writer.add_file(name, content)
        for name, tensor in sharded.read_full_tensors(checkpoint):
            writer.add(name, tensor)
            num_parameters += tensor.numel()
    tokenizer = "with its tokenizer" if files else "without a tokenizer, since the checkpoint has none"
    print(f"{args.out}: {model.family} model of {num_parameters:,} parameters from {checkpoint}, {tokenizer}")
    return 0


def _write_adapters(checkpoint: Path, model: ModelConfig, args: argparse.Namespace) -> int:
    lora = read_lora_config(checkpoint)
    if lora is None:
        raise ValueError(f"{checkpoint} has no adapters: leave out --adapters")
    dtype = _DTYPES.get(args.dtype)
    wanted = adapter_shapes(model, lora)
    stored = open_weights(checkpoint, keep_adapters=True).whole()
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in stored if name in wanted}
    write_peft(args.out, tensors, lora, model)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{args.out}: adapters of {count:,} parameters for a {model.family} model from {checkpoint}")
    return 0


def _calibration_file(checkpoint: Path) -> dict[str, bytes]:
    """What `megallm score` subtracts, where a reward model has it."""
    file = checkpoint / CALIBRATION
    return {CALIBRATION: file.read_bytes()} if file.is_file() else {}


def _tokenizer_files(checkpoint: Path, model: ModelConfig) -> dict[str, bytes]:
    """Name and content of the tokenizer's files; none where there is no tokenizer beside or above the weights."""
    folder = next((f for f in (checkpoint, checkpoint.parent) if (f / _TOKENIZER).is_file()), None)
    if folder is None:
        return {}
    files = {_TOKENIZER: (folder / _TOKENIZER).read_bytes()}
    files |= {name: (folder / name).read_bytes() for name in _BESIDE_TOKENIZER if (folder / name).is_file()}
    if _TOKENIZER_CONFIG not in files:
        config = _tokenizer_config(folder / _TOKENIZER, model)
        files[_TOKENIZER_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def _tokenizer_config(path: Path, model: ModelConfig) -> dict[str, Any]:
    """What AutoTokenizer needs beside a bare tokenizer.json: its class and its special tokens.

    The model's ids go first, where the tokenizer has special tokens of those ids: a preset's may be of another one.
    """
    added = tokenizers.Tokenizer.from_file(str(path)).get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special}
    tokenizer = Tokenizer.from_path(path)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    for name, ids in (
        ("bos_token", (model.bos_token_id, tokenizer.bos_id)),
        ("eos_token", (model.eos_token_id, tokenizer.eos_id)),
    ):
        found = [special[i] for i in ids if i in special]
        if found:
            config[name] = found[0]
    return config
