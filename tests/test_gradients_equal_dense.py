"""Every parameter's gradient after one step, gathered from all ranks, is that of one rank; so are the initial weights.

One rank's gradient in turn is the slope of its loss. Replicas (data-parallel copies, norms, key/value heads held by
several tp ranks, the two copies of a tied embedding) must agree to the bit, or they would drift apart.
"""

from __future__ import annotations

import pytest
import torch
from gathered import Part, assembled, parts_of
from training_cases import MODELS, OPTIM, Case, global_batch, make_engine, once, own_batch

from megallm.config.optim import OptimConfig
from megallm.model.counts import parameter_shapes
from megallm.testing.pool import run_ranks
from megallm.trainers.losses import count_labels, language_model_loss

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
UNCLIPPED = OptimConfig(learning_rate=OPTIM.learning_rate, max_grad_norm=0.0)
CASES = [
    Case(model=QWEN3, tp=2),  # the key/value head is held by both
    Case(model=QWEN3, tp=4),  # ... by all four
    Case(model=QWEN3, tp=4, sp=False),
    Case(model=UNTIED, tp=4),  # two key/value heads, each held by two
    Case(model=UNTIED, tp=2, sp=False),
    Case(model=TIED, tp=2, sp=False),
    Case(model=TIED, tp=2, mbs=2, recompute="selective"),
    Case(model=TIED, pp=2, v=2),
    Case(model=QWEN2, pp=4, mbs=1),
    Case(model=TIED, pp=2, dp=2, v=2, mbs=1, recompute="full"),
    Case(model=TIED, tp=2, pp=2, dp=2),
    Case(model=QWEN2, tp=2, pp=2, dp=2, mbs=2),
    Case(model=QWEN3, tp=4, pp=2),
]


def one_step(rank: int, world_size: int, cases: list[Case]) -> dict[str, tuple[list[Part], list[Part]]]:
    """(initial weights, gradients of step 0) as slices, by the case's name."""
    found = {}
    for case in cases:
        engine = make_engine(case, optim=UNCLIPPED)
        weights = parts_of(engine.model, {n: p.data for n, p in engine.model.named_parameters()})
        engine.train_step(own_batch(0, engine.mesh), language_model_loss)
        assert engine.gradients is not None
        found[case.name] = (weights, parts_of(engine.model, engine.gradients.named()))
    return found


@once
def measured(world_size: int) -> list[dict[str, tuple[list[Part], list[Part]]]]:
    return run_ranks(one_step, world_size, [c for c in CASES if c.world_size == world_size])


@once
def dense(model: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and gradients of one rank."""
    case = Case(model=model)
    weights, grads = one_step(0, 1, [case])[case.name]
    return assembled([weights]), assembled([grads])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_equals_the_dense_one(case: Case) -> None:
    actual = assembled([found[case.name][1] for found in measured(case.world_size)])
    _, expected = dense(case.model)
    assert actual.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        error = (actual[name] - grad).abs().max().item()
        # A gradient that is 0 by symmetry (k_proj.bias) has only rounding errors of the others' size.
        assert error <= 1e-10 * max(grad.abs().max().item(), 1e-5 * largest), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_initial_weights_are_the_same_bits_on_every_layout(case: Case) -> None:
    actual = assembled([found[case.name][0] for found in measured(case.world_size)])
    expected, _ = dense(case.model)
    assert {name: tuple(t.shape) for name, t in actual.items()} == parameter_shapes(MODELS[case.model])
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


@pytest.mark.parametrize("model", [UNTIED, TIED, QWEN2, QWEN3])
def test_no_gradient_is_zero_but_those_of_key_biases(model: str) -> None:
    """A key's bias adds the same to all scores of a query: without rotary positions softmax does not see it."""
    for name, grad in dense(model)[1].items():
        if model != TIED or not name.endswith("k_proj.bias"):
            assert grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("model", [UNTIED, TIED, QWEN2, QWEN3])
def test_the_dense_gradient_is_the_slope_of_the_loss(model: str) -> None:
    """Along a random direction of each parameter, in fp64: (f(w + e d) - f(w - e d)) / 2e, error e^2 f'''/6."""
    case = Case(model=model, mbs=8)
    config = MODELS[model].replace(hidden_dropout=0.0, attention_dropout=0.0)
    MODELS["_no_dropout"] = config
    try:
        engine = make_engine(Case(model="_no_dropout", mbs=case.mbs), optim=UNCLIPPED)
    finally:
        del MODELS["_no_dropout"]
    batch, weights = global_batch(0), dict(engine.model.named_parameters())
    engine.train_step(batch, language_model_loss, learning_rate=0.0)
    assert engine.gradients is not None
    grads = {name: grad.clone() for name, grad in engine.gradients.named().items()}

    def loss() -> float:
        (total,) = engine.forward(batch, lambda out, part: language_model_loss(out, part)[0])
        return float(total) / int(count_labels(batch))

    generator = torch.Generator().manual_seed(3)
    step = 1e-4
    for name, weight in weights.items():
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        slope = float((grads[name] * direction).sum())
        values = []
        for sign in (1.0, -1.0):
            weight.data.add_(direction, alpha=sign * step)
            values.append(loss())
            weight.data.add_(direction, alpha=-sign * step)
        assert abs((values[0] - values[1]) / (2 * step) - slope) < 1e-7, name
