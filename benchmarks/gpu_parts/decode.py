"""Decoding with the library's decoder: tokens a second, and the share of the memory bandwidth that a step reaches.

A step has to read every weight but the embedding's (of which it reads a row a sequence), and all keys and values of its
sequences. Those bytes over its time, over the peak bandwidth of the GPU's row in config/hardware.py, is the share; the
step includes choosing tokens, their way to the host, and the plan of the next step.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu_parts.clock import spread
from gpu_parts.place import Place
from gpu_parts.rows import Row, row
from gpu_parts.train import SHAPES, TINY
from gpu_parts.train_worker import SEED, model_config

ATTENTIONS = ("torch", "triton")
BATCHES = (1, 8, 32)


def measure_decode(place: Place, attention: str) -> list[Row]:
    """A row for each batch, with CUDA graphs and without; what cannot run is a row too."""
    from megallm.ops.backends import Backends
    from megallm.parallel import Engine, Mesh

    shape: dict[str, Any] = TINY if place.tiny else SHAPES["train_1b"]
    rows = []
    common = {"section": "decode", "op": "decode", "dtype": place.dtype_name, "direction": "step"}
    try:
        engine = Engine(
            model_config(shape), Mesh.build(device=place.device), train=False, seed=SEED,
            precision="bf16" if place.is_cuda else "fp32", backends=Backends({"decode_attention": attention}),
        )  # fmt: skip
        for batch in BATCHES:
            for graphs in (True, False):
                contender = f"megallm {attention}, {'graphs' if graphs else 'no graphs'}"
                numbers = _measured(place, engine, batch=batch, graphs=graphs)
                rows.append(row(**common, case=f"{shape['name']} batch {batch}", contender=contender, **numbers))
    except Exception as error:
        note = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row(**common, case=shape["name"], contender=f"megallm {attention}", status="error", note=note))
    return rows


def _measured(place: Place, engine: Any, *, batch: int, graphs: bool) -> dict[str, Any]:
    """Some steps of `batch` sequences that all go on, after the prompts and the first steps, which are recorded."""
    from megallm.config.hardware import find_gpu
    from megallm.generate.decode import Decoder
    from megallm.generate.replay import make_recorder
    from megallm.generate.sampling import Sampling
    from megallm.generate.scheduler import Request, plan_cache

    config, prompt, warmup, steps = engine.config, place.pick(512, 5), place.pick(8, 1), place.pick(64, 2)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, config.vocab_size, (batch, prompt), generator=generator).tolist()
    most = warmup + steps + 2
    requests = [
        Request(prompt_index=i, sample_index=0, prompt=own, max_new_tokens=most) for i, own in enumerate(ids)
    ]  # fmt: skip
    plan = plan_cache(prompt + most, batch, max_batch=batch, kv_cache_tokens=None, sliding_window=None)
    recorder = make_recorder(engine.mesh, wanted=graphs)
    decoder = Decoder(engine.model, requests, Sampling(), plan, prefill_tokens=4096, recorder=recorder)
    made = 0
    while made < batch:  # prompts come first
        made += len(decoder.step())
    for _ in range(warmup):
        decoder.step()
    samples = []
    for _ in range(steps):  # a step ends when the host has its tokens
        started = time.perf_counter()
        assert len(decoder.step()) == batch
        samples.append((time.perf_counter() - started) * 1e6)
    times = spread(samples)
    moved = step_bytes(engine.model, batch=batch, length=prompt + 1 + warmup + steps / 2)
    numbers: dict[str, Any] = {
        "eager_us": times.p50, "eager_us_p20": times.p20, "eager_us_p80": times.p80,
        "tokens_per_s": batch / times.p50 * 1e6, "gb_per_s": moved / times.p50 * 1e-3,
    }  # fmt: skip
    gpu = find_gpu(torch.cuda.get_device_name(place.device)) if place.is_cuda else None
    if gpu is not None:
        numbers["of_ceiling"] = numbers["gb_per_s"] * 1e9 / gpu.memory_bytes_per_s
    kind = "CUDA graphs" if recorder.is_recording else "launched op by op"
    return numbers | {"note": f"{kind}; {moved / 1e9:.3g} GB a step, prompts of {prompt} tokens, greedy"}


def step_bytes(model: Any, *, batch: int, length: float) -> float:
    """Weights, and keys and values of sequences of `length` tokens, that a step of one rank must read."""
    config = model.config
    table = "" if config.tie_word_embeddings else "embed_tokens.weight"
    weights = sum(each.nbytes for name, _, each in model.slices() if not table or not name.endswith(table))
    cell = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * model.dtype.itemsize
    return weights + batch * length * cell
