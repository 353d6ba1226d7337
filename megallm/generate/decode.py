"""The decode loop on the weights that train, under any tp x pp x dp.

    prefill: all prompts of this dp rank, right-padded, in one forward      cache: positions 0 .. S-1
    decode:  one token a sequence and forward, until all have ended
    each forward: stage after stage around the pipeline; the last stage's tp ranks gather the logits of one position,
    choose the same token, and the last pipeline rank tells the others

Letters: B sequences (padded to a multiple of tp for sequence parallelism), S prompt positions, T = B * S, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megallm.config.model import ModelConfig
from megallm.generate.cache import KVCache
from megallm.generate.sampling import Sampling, next_tokens
from megallm.model.context import TokenContext
from megallm.model.transformer import Transformer
from megallm.parallel.collectives import all_gather, broadcast_
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.p2p import Message, post

_BATCH = 32  # sequences decoded together: bounds the cache


@torch.no_grad()
def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling
) -> list[list[int]]:
    """New token ids for every prompt, the stop id included, in order, on every rank. A collective.

    ValueError for an empty prompt, an id outside the vocabulary, or more positions than a learned table has.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    dp = model.mesh.dp
    own = list(range(dp.rank, len(prompts), dp.size))
    rounds = -(-len(prompts) // dp.size)
    table = torch.full((rounds, max_new_tokens), -1, dtype=torch.int64, device=model.mesh.device)
    for first in range(0, len(own), _BATCH):
        part = own[first : first + _BATCH]
        new = _generate_batch(model, part, [prompts[i] for i in part], max_new_tokens, sampling)
        table[first : first + len(part)] = new[: len(part)]
    rows = all_gather(table, dp).view(dp.size, rounds, max_new_tokens).tolist()
    return [[t for t in rows[i % dp.size][i // dp.size] if t >= 0] for i in range(len(prompts))]


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """ValueError for the first prompt that cannot be continued."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} has no tokens: give at least one (a space, or the tokenizer's bos)")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt {index} has token id {max(prompt)}, but the model's vocabulary has {config.vocab_size} ids"
            )
        length = len(prompt) + max_new_tokens
        if config.position_embedding == "learned" and length > config.max_position_embeddings:
            raise ValueError(
                f"prompt {index} ({len(prompt)} tokens) + {max_new_tokens} new ones = {length} positions, but the "
                f"model has learned {config.max_position_embeddings}: shorten the prompt or max_new_tokens"
            )


def _generate_batch(
    model: Transformer, prompt_ids: list[int], prompts: list[Sequence[int]], max_new_tokens: int, sampling: Sampling
) -> torch.Tensor:
    """[B, max_new_tokens] int64, -1 after the end of a sequence."""
    device, tp = model.mesh.device, model.mesh.tp
    padding = -len(prompts) % tp.size
    rows = [list(p) for p in prompts] + [[0]] * padding
    lengths = torch.tensor([len(r) for r in rows], device=device)
    longest = int(lengths.max())
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64, device=device)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
    positions = torch.arange(longest, device=device).expand(len(rows), -1)
    cache = KVCache(max_length=longest + max_new_tokens)
    new = torch.full((len(rows), max_new_tokens), -1, dtype=torch.int64, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    ended[len(prompts) :] = True
    stop = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
    last = lengths - 1
    mask: torch.Tensor | None = None
    for step in range(max_new_tokens):
        visible = longest + step
        context = TokenContext(
            batch_size=len(rows),
            seq_length=input_ids.size(1),
            position_ids=positions.reshape(-1),
            num_positions=longest + max_new_tokens,
            cache=cache.at(positions, visible=visible),
            mask=mask,
        )
        logits = _forward(model, input_ids, context, rows=last)
        tokens = _agree(model, logits, sampling, prompt_ids + [-1] * padding, lengths + step)
        new[:, step] = torch.where(ended, -1, tokens)
        ended |= torch.isin(tokens, stop)
        if bool(ended.all()):
            break
        input_ids, last = tokens.unsqueeze(1), torch.zeros_like(last)
        positions = (lengths + step).unsqueeze(1)
        mask = _decode_mask(positions, visible + 1, model.config.sliding_window)
    return new


def _forward(
    model: Transformer, input_ids: torch.Tensor, context: TokenContext, *, rows: torch.Tensor
) -> torch.Tensor | None:
    """Logits [B, V] fp32 at position rows[b] of each sequence, on the last pipeline rank; None elsewhere."""
    pp, tokens = model.mesh.pp, context.batch_size * context.seq_length
    if model.sequence_parallel:
        tokens //= model.mesh.tp.size
    x = input_ids.reshape(-1)
    out: torch.Tensor | VocabLogits | None = None
    for index in range(model.num_stages):
        if index % pp.size != pp.rank:
            continue
        if index > 0 and pp.size > 1:
            x = torch.empty(tokens, model.config.hidden_size, dtype=model.dtype, device=model.mesh.device)
            _transfer(model, x, (index - 1) % pp.size, is_send=False, tag=index)
        out = model.stage(index)(x, context)
        if index < model.num_stages - 1:
            assert isinstance(out, torch.Tensor)
            x = out
            if pp.size > 1:
                _transfer(model, x, (index + 1) % pp.size, is_send=True, tag=index + 1)
    if not isinstance(out, VocabLogits):
        return None
    at = torch.arange(context.batch_size, device=rows.device) * context.seq_length + rows
    picked = VocabLogits(out.local[at], vocab_size=out.vocab_size, tp=model.mesh.tp)
    return picked.gathered()


def _transfer(model: Transformer, x: torch.Tensor, peer: int, *, is_send: bool, tag: int) -> None:
    for work in post([Message(x.contiguous() if is_send else x, peer, is_send, tag)], model.mesh.pp):
        work.wait()


def _agree(
    model: Transformer, logits: torch.Tensor | None, sampling: Sampling, prompt_ids: list[int], positions: torch.Tensor
) -> torch.Tensor:
    """The chosen tokens [B] on every pipeline and tp rank."""
    if logits is None:
        tokens = torch.zeros_like(positions)
    else:
        tokens = next_tokens(logits, sampling, prompt_ids=prompt_ids, positions=positions)
    last_owner = (model.num_stages - 1) % model.mesh.pp.size
    return broadcast_(tokens.contiguous(), model.mesh.pp, src=last_owner)


def _decode_mask(positions: torch.Tensor, visible: int, sliding_window: int | None) -> torch.Tensor:
    """[B, 1, 1, visible] bool: row b sees places j <= positions[b], the last `sliding_window` of them."""
    j = torch.arange(visible, device=positions.device)
    mask = j <= positions
    if sliding_window is not None:
        mask &= positions - j < sliding_window
    return mask.view(positions.size(0), 1, 1, visible)
