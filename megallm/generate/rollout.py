"""Answers to many prompts: the prompts shared over dp, decoded on every replica, the results gathered on every rank."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from megallm.config.check import check_positions
from megallm.config.model import ModelConfig
from megallm.config.rules import is_whole
from megallm.data.tokenizer import Tokenizer
from megallm.generate.decode import Decoder, FinishReason, Token
from megallm.generate.replay import make_recorder
from megallm.generate.sampling import Sampling
from megallm.generate.scheduler import CachePlan, Request, plan_cache
from megallm.generate.text import with_special_stops
from megallm.generate.weights import transposed_weights
from megallm.model.transformer import Transformer
from megallm.parallel.collectives import all_gather, all_reduce_
from megallm.parallel.mesh import Axis

_REASONS: tuple[FinishReason, ...] = ("stop", "length", "stop_string")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the memory of generation, on each replica."""

    max_batch: int = 32
    """Sequences decoded together at most."""
    kv_cache_tokens: int | None = None
    """Tokens whose keys and values are kept at a time; None = what max_batch sequences of the longest need."""
    prefill_tokens: int = 2048
    """Prompts are read together up to so many tokens; a longer one alone."""
    copy_weights: bool = True
    """On CPUs, in fp32: a second copy of the linears' weights meanwhile, in the form that decodes fastest."""
    cuda_graphs: bool = True
    """On GPUs, without pp: steps of decoding are recorded once for each size, and launched as one thing."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The samples of all prompts: those of prompt 0, those of prompt 1, ..."""

    num_samples: int
    """Samples of each prompt."""
    token_ids: list[list[int]]
    """The new tokens of each sample, the stop id included, or the token that completes a stop string."""
    logprobs: list[list[float]]
    """Of each token, fp32: of the softmax at the sampling temperature (greedy: 1), before top-k, top-p, min-p and the
    repetition penalty."""
    finish_reasons: list[FinishReason]
    """Why each sample ends: a stop id, a stop string, or its length."""

    def __len__(self) -> int:
        return len(self.token_ids)


def rollout(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    num_samples: int = 1,
    limits: Limits | None = None,
    tokenizer: Tokenizer | None = None,
) -> Rollout:
    """`num_samples` answers to every prompt, on every rank. A collective.

    ValueError for a prompt that cannot be continued, or more than `limits` hold.
    """
    requests = check_request(
        model.config, prompts, max_new_tokens=max_new_tokens, sampling=sampling, num_samples=num_samples,
        limits=limits, tokenizer=tokenizer,
    )  # fmt: skip
    if not requests:
        return Rollout(num_samples=num_samples, token_ids=[], logprobs=[], finish_reasons=[])
    dp = model.mesh.dp
    own = [each for each in requests if each.prompt_index % dp.size == dp.rank]
    ids: list[list[int]] = [[] for _ in own]
    logprobs: list[list[float]] = [[] for _ in own]
    reasons: list[FinishReason] = ["length"] * len(own)
    limits = limits or Limits()
    for tokens in _decoded(model, own, sampling, limits, tokenizer):
        for number, token_id, logprob, reason in tokens:
            ids[number].append(token_id)
            logprobs[number].append(logprob)
            if reason is not None:
                reasons[number] = reason
    most = -(-len(prompts) // dp.size) * num_samples
    all_ids, all_logprobs, all_reasons = _gathered(ids, logprobs, reasons, most, dp, model.mesh.device)
    place = [dp_rank * most + at for i in range(len(prompts)) for dp_rank, at in _places(i, dp.size, num_samples)]
    return Rollout(
        num_samples=num_samples,
        token_ids=[all_ids[at] for at in place],
        logprobs=[all_logprobs[at] for at in place],
        finish_reasons=[all_reasons[at] for at in place],
    )


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    tokenizer: Tokenizer | None = None,
) -> Generator[Token, None, None]:
    """The tokens of one answer as they come, on every rank of every replica; whoever has enough stops asking, on all
    ranks alike. Each token is a collective over tp and pp."""
    requests = check_request(
        model.config, [prompt], max_new_tokens=max_new_tokens, sampling=sampling, tokenizer=tokenizer
    )
    for tokens in _decoded(model, requests, sampling, Limits(copy_weights=False), tokenizer):
        yield from tokens


def check_request(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    num_samples: int = 1,
    limits: Limits | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Request]:
    """The samples to make; ValueError for what `rollout` refuses."""
    if config.head != "lm":
        raise ValueError("a model with a scalar head generates nothing: a language model is needed")
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise ValueError(f"prompts are of type {type(prompts).__name__}: give lists of token ids (.tolist())")
    _check_count("num_samples", num_samples)
    if num_samples > 1 and sampling.temperature == 0.0:
        raise ValueError(f"num_samples ({num_samples}) of a greedy answer are all equal: give a temperature above 0")
    if sampling.stop_strings and tokenizer is None:
        raise ValueError("stop strings are found in text: give the tokenizer as well")
    with_special_stops(sampling, tokenizer)
    most = max_new_tokens if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * len(prompts)
    if len(most) != len(prompts):
        raise ValueError(f"max_new_tokens has {len(most)} numbers for {len(prompts)} prompts: give one each")
    requests = []
    for index, (prompt, num_new) in enumerate(zip(prompts, most, strict=True)):
        _check_prompt(config, index, prompt, num_new)
        requests += [
            Request(prompt_index=index, sample_index=sample, prompt=prompt, max_new_tokens=num_new)
            for sample in range(num_samples)
        ]
    if requests:
        _plan(config, requests, limits or Limits())
    return requests


def _check_prompt(config: ModelConfig, index: int, prompt: Sequence[int], num_new: int) -> None:
    _check_count("max_new_tokens", num_new)
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        raise ValueError(f"prompt {index} is of type {type(prompt).__name__}: give a list of token ids (.tolist())")
    if not prompt:
        raise ValueError(f"prompt {index} has no tokens: give at least one (a space, or the tokenizer's bos)")
    if wrong := [each for each in prompt if not is_whole(each)]:
        raise ValueError(f"prompt {index} holds {wrong[0]!r}: token ids are whole numbers")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"prompt {index} has token id {low if low < 0 else high}, but the model's vocabulary has "
            f"{config.vocab_size} ids"
        )
    check_positions(config, f"prompt {index}", prompt_tokens=len(prompt), new_tokens=num_new)


def _check_count(name: str, value: int) -> None:
    if not is_whole(value):
        raise ValueError(f"{name} ({value!r}) must be a whole number")
    if value < 1:
        raise ValueError(f"{name} ({value}) must be at least 1")


def _decoded(
    model: Transformer, own: Sequence[Request], sampling: Sampling, limits: Limits, tokenizer: Tokenizer | None
) -> Iterator[list[Token]]:
    """The steps of this replica's requests."""
    if not own:
        return
    sampling, plan = with_special_stops(sampling, tokenizer), _plan(model.config, own, limits)
    with transposed_weights(model, wanted=limits.copy_weights) as copies:
        decoder = Decoder(
            model, own, sampling, plan, prefill_tokens=limits.prefill_tokens, tokenizer=tokenizer, copies=copies,
            recorder=make_recorder(model.mesh, wanted=limits.cuda_graphs),
        )  # fmt: skip
        while not decoder.is_done:
            yield decoder.step()


def _plan(config: ModelConfig, requests: Sequence[Request], limits: Limits) -> CachePlan:
    return plan_cache(
        max(each.max_length for each in requests),
        len(requests),
        max_batch=limits.max_batch,
        kv_cache_tokens=limits.kv_cache_tokens,
        sliding_window=config.sliding_window,
    )


def _places(prompt_index: int, dp_size: int, num_samples: int) -> list[tuple[int, int]]:
    """(dp rank, place among its samples) of a prompt's samples."""
    at, dp_rank = divmod(prompt_index, dp_size)
    return [(dp_rank, at * num_samples + sample) for sample in range(num_samples)]


def _gathered(
    ids: list[list[int]],
    logprobs: list[list[float]],
    reasons: list[FinishReason],
    most: int,
    dp: Axis,
    device: torch.device,
) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
    """Those of all dp ranks, `most` a rank, empty ones behind a rank's own."""
    if dp.size == 1:
        return ids, [_as_fp32(each) for each in logprobs], reasons
    width = int(all_reduce_(torch.tensor(max(map(len, ids), default=0), device=device), dp, op="max"))
    numbers = torch.zeros(most, 2 + width, dtype=torch.int64)
    values = torch.zeros(most, width)
    for row, (own, own_logprobs, reason) in enumerate(zip(ids, logprobs, reasons, strict=True)):
        numbers[row, : 2 + len(own)] = torch.tensor([len(own), _REASONS.index(reason), *own])
        values[row, : len(own)] = torch.tensor(own_logprobs)
    rows = all_gather(numbers.to(device), dp).tolist()
    found = all_gather(values.to(device), dp).tolist()
    return (
        [row[2 : 2 + row[0]] for row in rows],
        [value[: row[0]] for row, value in zip(rows, found, strict=True)],
        [_REASONS[row[1]] for row in rows],
    )


def _as_fp32(values: list[float]) -> list[float]:
    rounded: list[float] = torch.tensor(values).tolist()
    return rounded
