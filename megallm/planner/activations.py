"""What a rank keeps of a microbatch between forward and backward, and works with meanwhile, tensor by tensor.

    kept       what autograd saves: it adds up over layers and over microbatches in flight
    at work    what exists besides for a moment: logits and their gradient, a layer's gradients, a recomputed layer

Kept is K22's count (arXiv 2205.05198, section 4; `model.counts.activation_bytes_per_layer`) with what our layers save
differently: log-sum-exps instead of scores, a second q and k where the rotary embedding is not part of attention,
log-probabilities in fp32, dropout masks in the activations' dtype.

By device: on a CPU gradients of 16-bit weights are made from fp32 copies of both factors (`is_cpu`). By back end
(`fused`): Triton's attention rotates in place, its fused head keeps gradients of the loss instead of logits.
Not counted: what library calls allocate inside themselves (cuBLAS workspaces), and what the allocator cannot use.

Letters: T tokens of a microbatch, S positions, H hidden, F intermediate, V' vocabulary rows of a rank, N query heads,
K key/value heads, D head dim, t tp size; e bytes of an activation, w bytes of what is computed wide (fp32 or fp64).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from megallm.config.model import ModelConfig
from megallm.model.counts import Recompute
from megallm.pipeline.schedule import Schedule
from megallm.planner.parameters import vocab_rows

HEAD_CHUNK_BYTES = 1 << 30
"""Logits that Triton's fused head holds at a time, at most."""
_MASK_BYTES = 32
"""Four int64 a masked element (parallel/random.py)."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one microbatch on one rank."""

    model: ModelConfig
    micro_batch_size: int
    seq_length: int
    tp: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    element_bytes: int = 2
    """e: 2 for bf16 and fp16, 4 for fp32, 8 for fp64."""
    gradient_bytes: int = 4
    """Of the sums of weights' gradients."""
    is_cpu: bool = False
    fused: Collection[str] = ()
    """Operations that run on Triton: attention, rope, cross_entropy and linear_cross_entropy make a difference."""

    @property
    def hidden(self) -> int:
        """Hidden states as they pass from layer to layer, [T, H] or [T/t, H]."""
        return self.element_bytes * self._own_tokens * self.model.hidden_size

    def layer_kept(self) -> int:
        """Of one layer."""
        return self.hidden if self.recompute == "full" else self._layer_kept(self.recompute)

    def layer_at_work(self) -> int:
        """Most besides what is kept, while the backward of the layer that comes first in it runs."""
        element, inner, packed = self.element_bytes, self._inner, self._packed_inner
        width = self.model.hidden_size
        gathered = self._whole_hidden if self.sequence_parallel else 0
        down = gathered + element * inner + self._copies(inner, width)
        # The input of down_proj is gone when the activation's gradient is made, that of the activation after it.
        act = element * ((packed + 2 * inner if self.model.gated_mlp else 2 * inner) - inner)
        up = gathered + self._whole_hidden - element * inner + self._copies(packed, width)
        attention = self._attention_at_work() - element * (packed + inner) - 2 * self.hidden
        if self.recompute != "full":
            return self.hidden + max(down, act, up, attention)
        repeated = self._layer_kept("none") - self.hidden  # its input is kept
        return self.hidden + repeated + max(down, act, up, attention, self._masks_at_work("none"))

    def layer_at_work_forward(self) -> int:
        """Likewise in forward, against what its last layer keeps at the end: the masks of dropout are drawn."""
        return self._masks_at_work("none" if self.recompute == "none" else "selective")

    def first_kept(self) -> int:
        """Of the embedding; its output is the first layer's input and counts there."""
        learned = 8 * self._tokens if self.model.position_embedding == "learned" else 0
        return learned + (self.hidden if self.model.hidden_dropout > 0.0 else 0)

    def head_kept(self) -> int:
        """Of the final norm, the head and the loss."""
        norm = self.hidden + self._wide * self._own_tokens
        if self.model.head == "scalar":
            return norm + self.hidden
        if self._has_fused_head:  # gradients of the hidden states and of the head's weights
            return norm + self._whole_hidden + self._wide * self._columns * self.model.hidden_size
        if "cross_entropy" in self.fused:  # the logits themselves, which become their gradient
            return norm + self.hidden + self.element_bytes * self._logits
        return norm + self.hidden + self._wide * self._logits

    def head_at_work(self) -> int:
        """Most besides what is kept, while the loss or its gradient is computed."""
        if self.model.head == "scalar":
            return self.hidden
        narrow = self.element_bytes * self._logits
        gathered = self._whole_hidden if self.sequence_parallel else 0
        if self._has_fused_head:
            return min(narrow, HEAD_CHUNK_BYTES) + self._whole_hidden + gathered
        if "cross_entropy" in self.fused:
            return gathered + self._whole_hidden + self._copies(self._logits, self.model.hidden_size)
        is_padded, is_narrow = self._columns * self.tp > self.model.vocab_size, self.element_bytes < self._wide
        forward = narrow * (2 if is_padded else 1) + (self._wide * self._logits if is_narrow else 0)
        backward = gathered + self._whole_hidden
        if is_narrow:  # the log-probabilities are gone when the products of their gradient are made
            backward += narrow - self._wide * self._logits + self._copies(self._logits, self.model.hidden_size)
        return max(forward, backward, narrow if is_narrow else 0)

    def held_always(self, num_microbatches: int, *, num_stages: int) -> int:
        """Token ids and labels of all microbatches, and the tables of the rotary embedding of each stage."""
        tables = 0
        if self.model.position_embedding == "rope":
            tables = self.element_bytes * (self._tokens + self.seq_length) * self.model.head_dim
        return 16 * self._tokens * num_microbatches + num_stages * tables

    def _layer_kept(self, recompute: Recompute) -> int:
        model, tokens, element = self.model, self._tokens, self.element_bytes
        statistics = 2 * element if model.norm == "layernorm" and self.is_cpu else self._wide
        kept = 4 * self.hidden + 2 * statistics * self._own_tokens  # the inputs of both norms, of qkv_proj, of the MLP
        kept += element * tokens * (2 * self._queries + 2 * self._keys)  # q, k, v as projected; the input of o_proj
        kept += element * (self._packed_inner + self._inner)  # the inputs of the activation and of down_proj
        if model.hidden_dropout > 0.0:
            kept += 2 * self.hidden
        return kept + (self._attention_kept() if recompute == "none" else 0)

    def _attention_kept(self) -> int:
        """Between the projections, besides q, k, v and the output."""
        model, element, tokens = self.model, self.element_bytes, self._tokens
        heads, kv_heads = model.num_attention_heads // self.tp, max(model.num_key_value_heads // self.tp, 1)
        kept = self._wide * tokens * (heads + kv_heads) if model.qk_norm else 0
        if model.attention_dropout > 0.0:  # probabilities, what drops some, their product; k and v once a query head
            kept += tokens * heads * self.seq_length * (2 * element + self._wide) + 2 * element * tokens * self._queries
            if self.micro_batch_size > 1:  # q is copied as well, and then nothing refers to the projection any more
                kept += element * tokens * self._queries
                kept -= 0 if model.qk_norm else element * tokens * (self._queries + 2 * self._keys)
            return kept
        kept += self._wide * tokens * heads  # log-sum-exps
        has_rope, is_fused = model.position_embedding == "rope", "attention" in self.fused
        if (has_rope or model.qk_norm) and (model.qk_norm or not is_fused or "rope" not in self.fused):
            kept += element * tokens * (self._queries + self._keys)
        if not is_fused and model.sliding_window is not None and model.sliding_window < self.seq_length:
            kept += element * self.seq_length**2  # the mask as a tensor
        return kept

    def _attention_at_work(self) -> int:
        """In attention's backward: gradients of its output and of q, k, v, and what is recomputed."""
        a_feature = self.element_bytes * self._tokens
        queries, keys = a_feature * self._queries, a_feature * self._keys
        if self.recompute != "selective":
            return 2 * queries + 2 * keys
        return queries + max(queries + 2 * keys + queries + self._attention_kept(), self._attention_masks)

    def _masks_at_work(self, recompute: Recompute) -> int:
        """While masks of dropout are drawn, from int64 counters, against the end of the layer's forward."""
        after = self.element_bytes * (self._packed_inner + self._inner) + 2 * self.hidden
        after += self._attention_kept() if recompute == "none" else 0
        attention = self._attention_masks - after if self.model.attention_dropout > 0.0 else 0
        hidden = _MASK_BYTES * self._own_tokens * self.model.hidden_size + self.hidden
        return max(attention, hidden if self.model.hidden_dropout > 0.0 else 0)

    @cached_property
    def _attention_masks(self) -> int:
        if self.model.attention_dropout == 0.0:
            return 0
        return _MASK_BYTES * self._tokens * self.model.num_attention_heads // self.tp * self.seq_length

    def _copies(self, out_elements: int, in_features: int) -> int:
        """fp32 factors and product of a weight's gradient, [T, out]^T [T, in], where they are made (see `is_cpu`).

        out_elements: of [T, out] on this rank.
        """
        if not self.is_cpu or self.element_bytes >= self.gradient_bytes:
            return 0
        out_features = out_elements // self._tokens
        return 4 * (out_elements + self._tokens * in_features + out_features * in_features)

    @cached_property
    def _tokens(self) -> int:
        return self.micro_batch_size * self.seq_length

    @cached_property
    def _own_tokens(self) -> int:
        return self._tokens // self.tp if self.sequence_parallel else self._tokens

    @cached_property
    def _whole_hidden(self) -> int:
        return self.element_bytes * self._tokens * self.model.hidden_size

    @cached_property
    def _queries(self) -> int:
        """N D / t, a token."""
        return self.model.num_attention_heads // self.tp * self.model.head_dim

    @cached_property
    def _keys(self) -> int:
        """K D / t, a token."""
        return max(self.model.num_key_value_heads // self.tp, 1) * self.model.head_dim

    @cached_property
    def _inner(self) -> int:
        """Elements of [T, F/t]."""
        return self._tokens * self.model.intermediate_size // self.tp

    @cached_property
    def _packed_inner(self) -> int:
        """Elements of gate and up together, or of up alone."""
        return self._inner * (2 if self.model.gated_mlp else 1)

    @cached_property
    def _columns(self) -> int:
        return vocab_rows(self.model, tp=self.tp)

    @cached_property
    def _logits(self) -> int:
        """Elements of [T, V']."""
        return self._tokens * self._columns

    @property
    def _wide(self) -> int:
        return 8 if self.element_bytes == 8 else 4

    @property
    def _has_fused_head(self) -> bool:
        return "linear_cross_entropy" in self.fused


def peak_activations(each: Activations, schedule: Schedule, layers: tuple[range, ...], *, pp_rank: int) -> int:
    """Most bytes at once on a pipeline rank that runs `schedule` over stages of these `layers`, `held_always` apart.

    What microbatches in flight keep, and the working set of the action that runs.
    """
    last = schedule.num_stages - 1
    kept = {
        stage: len(layers[stage]) * each.layer_kept()
        + (each.first_kept() if stage == 0 else 0)
        + (each.head_kept() if stage == last else 0)
        for stage in schedule.stages_of(pp_rank)
    }
    sent = each.hidden if schedule.num_ranks > 1 else 0  # an output on its way, or a gradient that came in
    held = most = 0
    for action in schedule.actions_of(pp_rank):
        stage = action.stage
        if action.kind == "F":
            held += kept[stage]
        at_work = 0
        if layers[stage]:
            at_work = each.layer_at_work() if action.kind == "B" else each.layer_at_work_forward()
        if stage == last:
            at_work = max(at_work - each.head_kept(), each.head_at_work())
        most = max(most, held + at_work + sent)
        if action.kind == "B":
            held -= kept[stage]
    return most
