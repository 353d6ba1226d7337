"""The parameters of one rank, from shapes alone: as many, in the same order and in the same buckets as the model's own.

    model shape x tp x pipeline stages  ->  units of local parameters  ->  buckets

Nothing is built and no rank is needed, so that a planner can ask for many layouts. Every tp rank holds equal sizes:
what does not divide is padded, key/value heads are repeated.

Letters: H hidden, N query heads, K key/value heads, D head dim, t tp size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megallm.config.lora import LoraConfig, lora_targets, projection_shape, projections_of
from megallm.config.model import ModelConfig
from megallm.config.parallel import ParallelConfig
from megallm.model.parameters import WIDE_VOCABULARY
from megallm.ops.nf4 import BLOCK, SCALE_BLOCK
from megallm.optim.layout import Bucket, Entry, plan_buckets
from megallm.pipeline.partition import partition_layers


@dataclass(frozen=True, kw_only=True)
class LocalParameter:
    """One parameter as a rank holds it."""

    name: str
    shape: tuple[int, ...]
    """Of this rank's part."""
    is_decayed: bool
    """Whether it is weight-decayed: matrices are."""
    is_tied: bool = False
    """Whether the first and the last pipeline rank both hold it."""
    uses: int = 1
    """Layers that take it in one forward: 2 for an embedding that is also the head of the same rank."""
    is_trained: bool = True
    """Whether it has a gradient and optimizer state."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


Units = dict[str, tuple[LocalParameter, ...]]
"""What is needed together (`{stage}.{embed, layer or head}`), in the order of use."""


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[range, ...]:
    """The layers of each of the pp * virtual_stages stages."""
    num_stages = parallel.pp * parallel.virtual_stages
    return partition_layers(model.num_hidden_layers, num_stages, explicit=parallel.pipeline_partition)


def rank_units(
    model: ModelConfig, parallel: ParallelConfig, *, pp_rank: int, lora: LoraConfig | None = None
) -> Units:
    """The units of a pipeline rank; a parameter in two of them (a tied embedding without pipeline) has one name.

    Weights in 4 bits are left out: they lie in no bucket."""
    units = _full_units(model, parallel, pp_rank=pp_rank)
    if lora is None or lora.lora_rank == 0:
        return units
    adapters = adapter_parameters(model, lora, tp=parallel.tp)
    for unit, needed in units.items():
        stage, place = unit.split(".")
        frozen = tuple(
            replace(each, is_trained=each.name == "score.weight")
            for each in needed
            if not (lora.is_nf4 and each.name.endswith("_proj.weight"))
        )
        added = tuple(replace(each, name=f"layers.{place}.{each.name}") for each in adapters) if place.isdigit() else ()
        units[f"{stage}.{place}"] = (*frozen, *added)
    return units


def layer_parameters(model: ModelConfig, *, tp: int) -> tuple[LocalParameter, ...]:
    """The parameters of one transformer layer on a tp rank."""
    hidden, dim = model.hidden_size, model.head_dim
    inner = (2 if model.gated_mlp else 1) * model.intermediate_size // tp
    queries = model.num_attention_heads // tp * dim
    packed = queries + 2 * max(model.num_key_value_heads // tp, 1) * dim
    found = [*_norm(model, "input_layernorm")]
    if model.qk_norm:
        found += [_vector("self_attn.q_norm", dim), _vector("self_attn.k_norm", dim)]
    found += _linear("self_attn.qkv_proj", packed, hidden, model.attention_bias)
    found += _linear("self_attn.o_proj", hidden, queries, model.attention_out_bias)
    found += _norm(model, "post_attention_layernorm")
    found += _linear("mlp.gate_up_proj", inner, hidden, model.mlp_bias)
    found += _linear("mlp.down_proj", hidden, model.intermediate_size // tp, model.mlp_bias)
    return tuple(found)


def adapter_parameters(model: ModelConfig, lora: LoraConfig, *, tp: int) -> tuple[LocalParameter, ...]:
    """The adapters of one layer on a tp rank, in the order of use."""
    hidden, inner, rank = model.hidden_size, model.intermediate_size // tp, lora.lora_rank
    queries = model.num_attention_heads // tp * model.head_dim
    keys = max(model.num_key_value_heads // tp, 1) * model.head_dim
    targets = lora_targets(lora, model)
    found = []
    for linear, columns, rows in (
        ("self_attn.qkv", hidden, {"q_proj": queries, "k_proj": keys, "v_proj": keys}),
        ("self_attn.o", queries, {"o_proj": hidden}),
        ("mlp.gate_up", hidden, {"gate_proj": inner, "up_proj": inner}),
        ("mlp.down", inner, {"down_proj": hidden}),
    ):
        own = [name for name in rows if name in targets]
        if own:
            shapes = {"lora_A": (len(own) * rank, columns)} | {f"lora_B_{name}": (rows[name], rank) for name in own}
            found += [
                LocalParameter(name=f"{linear}_adapter.{name}", shape=shape, is_decayed=True)
                for name, shape in shapes.items()
            ]
    return tuple(found)


def layer_nf4_bytes(model: ModelConfig, lora: LoraConfig | None, *, tp: int) -> int:
    """Bytes that a tp rank holds of one layer's weights in 4 bits; 0 where there are none."""
    if lora is None or not lora.is_nf4:
        return 0
    total = 0
    for name in projections_of(model):
        own, whole = (math.prod(projection_shape(model, name, tp=t)) for t in (tp, 1))
        total += own // 2 + math.ceil(own / BLOCK) * (1 if lora.lora_double_quant else 4)
        if lora.lora_double_quant:
            total += 4 * math.ceil(math.ceil(whole / BLOCK) / SCALE_BLOCK) + 4
    return total


def dense_bytes(model: ModelConfig, *, tp: int, element_bytes: int, is_fused: bool) -> int:
    """Most bytes at once for making one linear's weight, in 4 bits, dense.

    Plain torch looks up two weights by an int32 and scales them in fp32 before they are rounded, matrix by matrix.
    """
    linear = max(each.numel for each in layer_parameters(model, tp=tp) if each.name.endswith("_proj.weight"))
    matrix = max(math.prod(projection_shape(model, name, tp=tp)) for name in projections_of(model))
    return linear * element_bytes + (0 if is_fused else 6 * matrix)


def rank_buckets(units: Units, *, bucket_size: int, num_shards: int, by_unit: bool) -> tuple[Bucket, ...]:
    """The flat buckets of a rank's parameters, padding included; those of frozen ones are apart, and last."""
    entries: dict[str, Entry] = {}
    for unit, parameters in units.items():
        for each in parameters:
            entries[each.name] = Entry(
                name=each.name, numel=each.numel, weight_decay=each.is_decayed, unit=unit,
                stage=int(unit.split(".")[0]), is_alone=each.is_tied or each.name in entries,
            )  # fmt: skip
    trained = trained_names(units)
    halves = ([e for n, e in entries.items() if (n in trained) == is_trained] for is_trained in (True, False))
    return tuple(
        bucket
        for half in halves
        for bucket in plan_buckets(half, bucket_size=bucket_size, num_shards=num_shards, by_unit=by_unit)
    )


def trained_names(units: Units) -> set[str]:
    """The parameters that are not frozen."""
    return {each.name for needed in units.values() for each in needed if each.is_trained}


def _full_units(model: ModelConfig, parallel: ParallelConfig, *, pp_rank: int) -> Units:
    tp, layers = parallel.tp, stage_layers(model, parallel)
    is_tied = model.tie_word_embeddings and parallel.pp > 1
    uses = 2 if model.tie_word_embeddings and parallel.pp == 1 else 1
    embedding = _vocab_matrix(model, "embed_tokens.weight", tp, is_tied=is_tied, uses=uses)
    units: Units = {}
    for stage in range(pp_rank, len(layers), parallel.pp):
        if stage == 0:
            table = _vector("embed_positions", model.max_position_embeddings, model.hidden_size)
            units["0.embed"] = (embedding, table) if model.position_embedding == "learned" else (embedding,)
        for layer in layers[stage]:
            prefix = f"layers.{layer}"
            units[f"{stage}.{layer}"] = tuple(
                replace(each, name=f"{prefix}.{each.name}") for each in layer_parameters(model, tp=tp)
            )
        if stage == len(layers) - 1:
            units[f"{stage}.head"] = (*_norm(model, "norm"), _head(model, tp, embedding, is_tied=is_tied))
    return units


def _linear(name: str, rows: int, columns: int, has_bias: bool) -> Sequence[LocalParameter]:
    weight = LocalParameter(name=f"{name}.weight", shape=(rows, columns), is_decayed=True)
    return (weight, _vector(f"{name}.bias", rows)) if has_bias else (weight,)


def _norm(model: ModelConfig, name: str) -> Sequence[LocalParameter]:
    parts = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    return [_vector(f"{name}.{part}", model.hidden_size) for part in parts]


def _vector(name: str, *shape: int) -> LocalParameter:
    return LocalParameter(name=name, shape=shape, is_decayed=False)


def _head(model: ModelConfig, tp: int, embedding: LocalParameter, *, is_tied: bool) -> LocalParameter:
    if model.head == "scalar":
        return _vector("score.weight", 1, model.hidden_size)
    if not model.tie_word_embeddings:
        return _vocab_matrix(model, "lm_head.weight", tp)
    return replace(embedding, name="lm_head.weight") if is_tied else embedding


def _vocab_matrix(
    model: ModelConfig, name: str, tp: int, *, is_tied: bool = False, uses: int = 1
) -> LocalParameter:
    return LocalParameter(
        name=name, shape=(vocab_rows(model, tp=tp), model.hidden_size), is_decayed=True, is_tied=is_tied, uses=uses
    )


def vocab_rows(model: ModelConfig, *, tp: int) -> int:
    """Rows of the embedding and the head on one tp rank, with padding."""
    multiple = 64 if model.vocab_size >= WIDE_VOCABULARY else 1
    return math.ceil(model.vocab_size / (tp * multiple)) * multiple
