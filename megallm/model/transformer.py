"""The transformer as this rank holds it: a list of stages, one per virtual stage.

    stage 0            stage 1 .. p*v-2        stage p*v-1
    embedding, layers  layers                  layers, final norm, head

Stage s lives on pipeline rank s mod pp. A stage maps hidden states [T', H] (token ids for the first) to hidden states
(the head's output for the last); T' = T, or T/tp under sequence parallelism.

Letters: B sequences, S positions, T = B * S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.model.block import Block, Norm, drop_hidden
from megallm.model.context import TokenContext
from megallm.model.parameters import ParameterFactory, initialize_
from megallm.model.presence import Presence
from megallm.model.rotary import RotaryTable
from megallm.ops.backends import DEFAULT, Backends
from megallm.ops.fp8 import Fp8Recipe
from megallm.parallel.collectives import join_sequence, own_part
from megallm.parallel.embedding import VocabEmbedding
from megallm.parallel.layout import ParamSpec
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Mesh
from megallm.parallel.nf4 import Nf4Weight

Recompute = Literal["none", "selective", "full"]


class Stage(nn.Module):
    """Some consecutive layers, with the embedding if first and the head if last."""

    def __init__(
        self,
        factory: ParameterFactory,
        *,
        index: int,
        layers: Sequence[int],
        is_first: bool,
        is_last: bool,
        recompute: Recompute,
        tied_to: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        config, mesh = factory.config, factory.mesh
        self.config, self.is_first, self.is_last = config, is_first, is_last
        self._mesh, self._sequence_parallel, self._backends = mesh, factory.sequence_parallel, factory.backends
        self._recompute_layers = recompute == "full"
        self.index = index
        self.presence = Presence()
        if is_first:
            self.embed_tokens = VocabEmbedding(
                factory.vocab("model.embed_tokens.weight", tied=config.tie_word_embeddings),
                tp=mesh.tp,
                sequence_parallel=factory.sequence_parallel,
            )
            if config.position_embedding == "learned":
                table = (config.max_position_embeddings, config.hidden_size)
                self.embed_positions = factory.replicated("model.embed_positions.weight", table, init="normal")
        self.layers = nn.ModuleDict(
            {str(i): Block(factory, layer=i, recompute_attention=recompute == "selective") for i in layers}
        )
        self._rotary: RotaryTable | None = None
        if layers and config.position_embedding == "rope":
            dtype = next(self.layers.parameters()).dtype
            self._rotary = RotaryTable(config, dtype=dtype, device=mesh.device)
        if is_last:
            self.norm = Norm(factory, "model.norm")
            self._build_head(factory, tied_to)

    def _build_head(self, factory: ParameterFactory, tied_to: nn.Parameter | None) -> None:
        config = factory.config
        if config.head == "scalar":
            self.score = factory.replicated("score.weight", (1, config.hidden_size), init="normal")
            return
        if config.tie_word_embeddings:
            if self.is_first:
                tied_to = self.embed_tokens.weight
            weight = tied_to if tied_to is not None else factory.vocab("model.embed_tokens.weight", tied=True)
        else:
            weight = factory.vocab("lm_head.weight", tied=False)
        self.lm_head = ColumnLinear(weight, None, tp=factory.mesh.tp, sequence_parallel=factory.sequence_parallel)

    def forward(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor | VocabLogits:
        """x: token ids [T] (first stage) or hidden states [T', H].

        Returns hidden states [T', H]; of the last stage VocabLogits (lm head) or values [B, S] fp32 (scalar head).
        """
        presence, residual = self.presence, None
        if self.is_first:
            presence.enter(f"{self.index}.embed")
            x = self._embed(x, context)
        rotary = None
        if self._rotary is not None:
            given = context.num_positions or max(self.config.max_position_embeddings, context.seq_length)
            rotary = self._rotary.lookup(context, context.seq_length if context.position_ids is None else given)
        outputs = self._outputs(context)
        for layer, block in self.layers.items():
            presence.enter(f"{self.index}.{layer}")
            kept = outputs if int(layer) == self.config.num_hidden_layers - 1 else None
            if self._recompute_layers and torch.is_grad_enabled():
                x = checkpoint(block.whole, x, context, rotary, kept, use_reentrant=False, preserve_rng_state=False)
            else:
                x, residual = block(x, residual, context, rotary, kept)
            x, residual = presence.leave(f"{self.index}.{layer}", x, residual)
        if self.is_last:
            presence.enter(f"{self.index}.head")
            x = self.norm.after(x, residual)[0]
            if outputs is not None:
                x = x.new_zeros(context.batch_size * context.seq_length, x.size(1)).index_copy(0, outputs, x)
            return self._head(x, context)
        return x if residual is None else residual + x

    @property
    def rotary_table(self) -> torch.Tensor | None:
        """What this stage reads cos and sin from; None if it has no layers, or no rotary embedding."""
        return None if self._rotary is None else self._rotary.table

    def units(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each unit (see `Presence`), in the order of use; a tied embedding is in two."""
        units = {f"{self.index}.{layer}": list(block.parameters()) for layer, block in self.layers.items()}
        if self.is_first:
            learned = [self.embed_positions] if self.config.position_embedding == "learned" else []
            units = {f"{self.index}.embed": [*self.embed_tokens.parameters(), *learned]} | units
        if self.is_last:
            head = [self.score] if self.config.head == "scalar" else list(self.lm_head.parameters())
            units[f"{self.index}.head"] = [*self.norm.parameters(), *head]
        return units

    def _embed(self, input_ids: torch.Tensor, context: TokenContext) -> torch.Tensor:
        x = self.embed_tokens(input_ids)  # [T', H]
        part = self._mesh.tp if self._sequence_parallel else None
        if self.config.position_embedding == "learned":
            positions = context.position_ids
            if positions is None:
                positions = torch.arange(context.seq_length, device=x.device).repeat(context.batch_size)
            positions = own_part(positions, part) if part is not None else positions
            x = x + F.embedding(positions, self.embed_positions)
        tp_rank = part.rank if part is not None else 0
        if context.dropout is not None and context.dropout.noise:
            x = context.dropout.noisy(x, first_token=tp_rank * x.size(0), seq_length=context.seq_length)
        return drop_hidden(x, context, self.config.hidden_dropout, layer=-1, place="embedding", tp_rank=tp_rank)

    def _outputs(self, context: TokenContext) -> torch.Tensor | None:
        """The tokens behind the last layer's attention; None = all.

        Under sequence parallelism ranks hold tokens, and dropout's masks are those of whole sequences: all.
        """
        if self._sequence_parallel or context.dropout is not None or not self.is_last or not self.layers:
            return None
        return context.outputs

    def _head(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor | VocabLogits:
        if self.config.head == "scalar":
            values = F.linear(x, self.score).view(-1)  # [T']
            values = values if values.dtype == torch.float64 else values.float()
            if self._sequence_parallel:
                values = join_sequence(values, self._mesh.tp)
            return values.view(context.batch_size, context.seq_length)
        return VocabLogits(
            None, vocab_size=self.config.vocab_size, tp=self._mesh.tp, backends=self._backends, hidden=x,
            head=self.lm_head,
        )  # fmt: skip


class Transformer(nn.Module):
    """This rank's stages (chunks) and the ParamSpec of each of their parameters."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        partition: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
        sequence_parallel: bool | None = None,
        recompute: Recompute = "none",
        backends: Backends = DEFAULT,
        fp8: Fp8Recipe | None = None,
        lora: LoraConfig | None = None,
        allocate: bool = True,
    ) -> None:
        """`partition[s]`: the layers of stage s, of all pp * virtual_stages stages of the pipeline.

        `fp8`: how the layers' linears multiply; None = in `dtype`.
        `lora`: adapters that the layers have; all other parameters are frozen then, but for a scalar head.
        `allocate=False`: parameters have shapes but no memory, until `FlatParameters` gives them theirs.
        """
        super().__init__()
        self.config, self.mesh, self.dtype = config, mesh, dtype
        self.lora, self.backends = lora, backends
        self.sequence_parallel = mesh.tp.size > 1 if sequence_parallel is None else sequence_parallel
        self.num_stages = len(partition)
        factory = ParameterFactory(
            config,
            mesh,
            dtype=dtype,
            sequence_parallel=self.sequence_parallel,
            tied_copies=mesh.pp.size > 1 and config.head == "lm",
            backends=backends,
            fp8=fp8,
            lora=lora,
            allocate=allocate,
        )
        self._adapters = factory.adapters
        self.stages = nn.ModuleDict()
        for stage in range(mesh.pp.rank, self.num_stages, mesh.pp.size):
            self.stages[str(stage)] = Stage(
                factory,
                index=stage,
                layers=list(partition[stage]),
                is_first=stage == 0,
                is_last=stage == self.num_stages - 1,
                recompute=recompute,
                tied_to=self.stages["0"].embed_tokens.weight if mesh.pp.size == 1 and stage > 0 else None,  # type: ignore[union-attr, arg-type]
            )
        self.specs: dict[str, ParamSpec] = {n: factory.specs[p] for n, p in self.named_parameters()}
        self.quantized: dict[str, Nf4Weight] = {
            n: factory.quantized[p] for n, p in self.named_parameters() if p in factory.quantized
        }
        """Weights in 4 bits, by local name; their parameters have no memory."""
        if lora is not None:
            for name, spec, parameter in self.slices():
                parameter.requires_grad_(spec.is_adapter or name.endswith(".score"))

    def stage(self, index: int) -> Stage:
        """The stage of global index `index`, which must live on this rank."""
        return self.stages[str(index)]  # type: ignore[return-value]

    def initialize(self, seed: int, *, names: Collection[str] | None = None) -> Transformer:
        """Fills parameters (default: all): a function of (seed, parameter's name, global index) alone. Returns self."""
        for name, parameter in self.named_parameters():
            if names is None or name in names:
                initialize_(parameter.data, self.specs[name], seed=seed)
        return self

    def rotary_tables(self) -> list[torch.Tensor]:
        """The tables of this rank's stages; another one takes the place of a table that is too short."""
        tables = (self.stage(int(index)).rotary_table for index in self.stages)
        return [table for table in tables if table is not None]

    @property
    def has_adapters_off(self) -> bool:
        """Whether it is inside `adapters_off`."""
        return not self._adapters.is_on

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, adapters add nothing: outputs are those of the frozen weights, to the bit."""
        before, self._adapters.is_on = self._adapters.is_on, False
        try:
            yield
        finally:
            self._adapters.is_on = before

    def is_second_copy(self, name: str) -> bool:
        """Whether the parameter is the last pipeline stage's copy of the tied embedding."""
        return self.specs[name].tied and name.endswith("lm_head.weight")

    def slices(self) -> Iterator[tuple[str, ParamSpec, torch.Tensor]]:
        """(name, spec, local parameter) of every parameter on this rank."""
        for name, parameter in self.named_parameters():
            yield name, self.specs[name], parameter
