"""The last layer makes outputs of the tokens that are read: results are those of all, and fewer are made."""

from __future__ import annotations

import pytest
import torch

from megallm.config.model import FAMILIES
from megallm.config.parallel import ParallelConfig
from megallm.model.block import Block
from megallm.model.transformer import Recompute
from megallm.parallel.logprobs import IGNORE_INDEX, VocabLogits
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.losses import Batch, count_labels, language_model_loss
from megallm.trainers.preference_losses import RewardLoss, count_prompts

ROWS, SEQ = 4, 32


def batch_of(num_labels: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 101, (ROWS, SEQ + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, : SEQ - num_labels] = IGNORE_INDEX
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}


def masked(batch: Batch) -> Batch:
    return batch | {"output_mask": batch["labels"] != IGNORE_INDEX}


def ends(batch: Batch, *, with_mask: bool) -> Batch:
    """Pairs for a reward model."""
    lengths = torch.tensor([SEQ, 9, 20, 3])
    found = {
        "input_ids": batch["input_ids"], "lengths": lengths, "ranks": torch.tensor([0, 1, 0, 1]),
        "sample_ids": torch.tensor([0, 0, 1, 1]),
    }  # fmt: skip
    is_end = torch.arange(SEQ) == lengths.unsqueeze(1) - 1
    return found | ({"output_mask": is_end} if with_mask else {})


def trained(batch: Batch, family: str = "llama", *, recompute: Recompute = "none", zero: int = 0) -> list[float]:
    """What two steps say."""
    engine = Engine(
        tiny_config(family), Mesh.build(), parallel=ParallelConfig(zero=zero), micro_batch_size=2, precision="fp64",
        recompute=recompute,
    )  # fmt: skip
    found = []
    for _ in range(2):
        values = engine.train_step(batch, language_model_loss, learning_rate=1e-2).metrics()
        found += [values["loss"], values["grad_norm"]]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_alike(family: str) -> None:
    assert trained(masked(batch_of()), family) == pytest.approx(trained(batch_of(), family), rel=1e-12)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("zero", [0, 3])
def test_recomputed_and_gathered(recompute: Recompute, zero: int) -> None:
    found = trained(masked(batch_of()), recompute=recompute, zero=zero)
    assert found == pytest.approx(trained(batch_of()), rel=1e-12)


@pytest.mark.parametrize("num_labels", [0, 1, 4, 29, SEQ])
def test_few_labels_and_many(num_labels: int) -> None:
    """None at all and all are fine as well."""
    found = trained(masked(batch_of(num_labels)))
    assert found == pytest.approx(trained(batch_of(num_labels)), rel=1e-12, abs=1e-12, nan_ok=True)


def test_rows_end_to_end() -> None:
    batch = batch_of() | {"lengths": torch.tensor([SEQ, 29, 28, 30])}
    batch["labels"] = batch["labels"].masked_fill(torch.arange(SEQ) >= batch["lengths"].unsqueeze(1), IGNORE_INDEX)
    assert trained(masked(batch)) == pytest.approx(trained(batch), rel=1e-12)


def test_reward_models_read_ends() -> None:
    def run(*, with_mask: bool) -> list[float]:
        config = tiny_config(head="scalar", tie_word_embeddings=False)
        engine = Engine(config, Mesh.build(), micro_batch_size=4, precision="fp64")
        result = engine.train_step(ends(batch_of(), with_mask=with_mask), RewardLoss(), count_fn=count_prompts)
        values = result.metrics()
        return [values["loss"], values["grad_norm"], values["reward_margin"]]

    assert run(with_mask=True) == pytest.approx(run(with_mask=False), rel=1e-12)


def on_stages(rank: int, world_size: int) -> list[float]:
    mesh = Mesh.build(pp=2)
    engine = Engine(tiny_config(), mesh, micro_batch_size=2, precision="fp64")
    values = engine.train_step(masked(batch_of()), language_model_loss, learning_rate=1e-2).metrics()
    return [values["loss"], values["grad_norm"]]


def test_the_last_stage_alone_leaves_tokens_out() -> None:
    for found in run_ranks(on_stages, 2):
        assert found == pytest.approx(trained(batch_of())[:2], rel=1e-12)


def test_fewer_tokens_pass_the_last_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 rows of 5 labels in a microbatch of 64 tokens: 16, what is above 10, in the last of 3 layers."""
    sizes: list[int] = []
    forward = Block.forward

    def counting(self: Block, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        found = forward(self, *args)  # type: ignore[arg-type]
        sizes.append(found[0].size(0))
        return found

    monkeypatch.setattr(Block, "forward", counting)
    engine = Engine(tiny_config(), Mesh.build(), micro_batch_size=2, train=False)

    def logprobs(logits: VocabLogits, batch: Batch) -> torch.Tensor:
        return logits.token_logprobs(batch["labels"])

    found = torch.cat(engine.forward(masked(batch_of()), logprobs))
    assert sizes == [64, 64, 16] * 2
    torch.testing.assert_close(found, torch.cat(engine.forward(batch_of(), logprobs)), rtol=1e-5, atol=1e-6)
    assert int(count_labels(batch_of())) == 20
