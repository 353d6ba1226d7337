"""Steps of decoding that are recorded once and repeated: they depend on their buffers alone, and change no sample."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tape import Again, Tape
from test_rollout import CONFIGS, FAMILIES, FILTERED, LENGTHS, SAMPLED, flat, make_engine, roll
from training_cases import once

from megallm.config.lora import LoraConfig
from megallm.generate import decode, replay, rollout
from megallm.generate.cache import PagedCache
from megallm.generate.replay import CudaGraphs, Direct, bucket, make_recorder, refusal
from megallm.generate.rollout import Limits, Rollout
from megallm.generate.sampling import Sampling
from megallm.ops.backends import Backends
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.trainers.engine import Engine

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": Sampling(), "num_samples": 1},
    "greedy, penalty, pages": {
        "sampling": Sampling(repetition_penalty=1.4), "num_samples": 1, "limits": Limits(kv_cache_tokens=70),
    },
    "sampled": {"sampling": SAMPLED, "limits": Limits(max_batch=6)},
    "sampled, pages": {"sampling": SAMPLED, "limits": Limits(max_batch=7, kv_cache_tokens=160)},
    "filtered, pages": {"sampling": FILTERED, "limits": Limits(max_batch=5, kv_cache_tokens=130)},
}  # fmt: skip
"""Sequences of 1 to 30 new tokens, so that rows come and go; penalties, windows, one to four key/value heads."""


def recorded(recorder: Any) -> AbstractContextManager[Any]:
    """Inside, rollouts decode with this recorder."""
    return patch.object(rollout, "make_recorder", lambda mesh, wanted: recorder)


def few_cells() -> AbstractContextManager[Any]:
    """Inside, buckets of 16, 32, 64, ... cells, so that short sequences cross their borders."""
    return patch("megallm.generate.cache._FEWEST_CELLS", 16)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", FAMILIES)
def test_replays_give_the_samples_of_steps_that_are_called(model: str, case: str) -> None:
    """Equal bits to the same sizes called from Python, and the tokens of sizes that fit."""
    engine, options, tape = make_engine(model), {"max_new_tokens": LENGTHS, **CASES[case]}, Tape()
    plain = roll(engine, **options)
    with few_cells():
        with recorded(Again()):
            called = roll(engine, **options)
        with recorded(tape):
            replayed = roll(engine, **options)
    assert replayed == called
    assert replayed.token_ids == plain.token_ids and replayed.finish_reasons == plain.finish_reasons
    assert tape.num_replayed > 2 * tape.num_recorded > 0


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_every_precision_can_be_recorded(precision: Any) -> None:
    engine, tape = make_engine("mistral", precision=precision), Tape()
    plain = roll(engine)
    with recorded(tape):
        assert roll(engine).token_ids == plain.token_ids
    assert tape.num_replayed > 0


def test_adapters_can_be_recorded_and_turned_off_in_between() -> None:
    """A stream whose adapters are turned off half way goes on as without them."""
    engine = Engine(CONFIGS["llama"], Mesh.build(), seed=3, lora=LoraConfig(lora_rank=4, lora_alpha=512.0))
    with torch.no_grad():
        for name, _, parameter in engine.model.slices():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))

    def half_and_half() -> list[int]:
        stream = engine.stream([5, 17, 3], max_new_tokens=12)
        tokens = [next(stream).token_id for _ in range(6)]
        with engine.model.adapters_off():
            tokens += [token.token_id for token in stream]
        return tokens

    plain = half_and_half()
    with recorded(tape := Tape()):
        assert half_and_half() == plain
    assert tape.num_recorded == 2


@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_attention_to_pages_where_they_lie_gives_the_same_samples(model: str) -> None:
    """Triton's, interpreted; recorded, it needs a step for each number of rows only."""
    backends = Backends({"decode_attention": "triton"})
    ours = Engine(CONFIGS[model], Mesh.build(), precision="fp32", seed=3, train=False, backends=backends)
    options: dict[str, Any] = {"max_new_tokens": [1, 9, 3, 5, 2], "num_samples": 1}
    for limits in (Limits(), Limits(max_batch=4, kv_cache_tokens=70)):
        wanted = roll(make_engine(model), limits=limits, **options)
        with few_cells(), recorded(tape := Tape()):
            found = roll(ours, limits=limits, **options)
        assert found.token_ids == wanted.token_ids
        torch.testing.assert_close(flat(found.logprobs), flat(wanted.logprobs), rtol=0, atol=1e-4)
        assert 0 < tape.num_recorded <= 2


TP: dict[str, dict[str, Any]] = {"tp2": {"tp": 2}, "tp2 no sp": {"tp": 2, "sequence_parallel": False}}


def on_two_ranks(rank: int, world: int) -> dict[tuple[str, str, str], tuple[Rollout, Rollout, int]]:
    """(called, replayed, number of replays) by (layout, model, case)."""
    found = {}
    for name, layout in TP.items():
        for model, case in (("llama", "sampled"), ("mistral", "filtered, pages")):
            engine, options = make_engine(model, **layout), {"max_new_tokens": LENGTHS, **CASES[case]}
            tape = Tape()
            with few_cells():
                with recorded(Again()):
                    called = roll(engine, **options)
                with recorded(tape):
                    found[name, model, case] = (called, roll(engine, **options), tape.num_replayed)
    return found


@once
def both_ranks() -> list[dict[tuple[str, str, str], tuple[Rollout, Rollout, int]]]:
    return run_ranks(on_two_ranks, 2)


@pytest.mark.parametrize("layout", TP)
def test_replays_with_collectives_give_the_same_samples(layout: str) -> None:
    first, second = both_ranks()
    assert first == second
    for (name, _, _), (called, replayed, count) in first.items():
        assert name != layout or (replayed == called and count > 0)


def test_a_step_is_recorded_once_for_each_number_of_rows_and_cells() -> None:
    made: list[decode.Decoder] = []

    class Remembered(decode.Decoder):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    tape = Tape()
    with patch.object(rollout, "Decoder", Remembered), few_cells(), recorded(tape):
        roll(make_engine("llama"), sampling=Sampling(temperature=1.0), max_new_tokens=[9, 20, 33, 33, 40])
    (decoder,) = made
    assert {rows for rows, _, _ in decoder._steps} <= {4, 8, 16}
    assert {cells for _, cells, _ in decoder._steps} == {16, 32, 48}  # 48: all there are
    assert len(decoder._steps) == tape.num_recorded < 10
    assert decoder._held  # cos and sin that a graph reads


def test_sizes_are_few() -> None:
    assert [bucket(n, least=1, most=48) for n in (1, 2, 3, 5, 8, 9, 33, 48)] == [1, 2, 4, 8, 8, 16, 48, 48]
    options: dict[str, Any] = {"num_slots": 1, "num_pages": 9, "window": None, "dtype": torch.float32}
    cache = PagedCache(page_size=32, num_cells=1504, device=torch.device("cpu"), **options)
    assert [cache.visible_cells(n, are_few=True) for n in (1, 256, 257, 1024, 1025, 1500)] == [
        256, 256, 512, 1024, 1504, 1504,
    ]  # fmt: skip
    assert cache.visible_cells(33, are_few=False) == 64
    whole = PagedCache(page_size=48, num_cells=48, device=torch.device("cpu"), **options)
    assert [whole.visible_cells(n, are_few=few) for n in (9, 33) for few in (False, True)] == [16, 48, 48, 48]


# -- what cannot be recorded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: bool((x > 0).all()),
    ],
)
def test_a_tape_refuses_what_a_graph_cannot_hold(run: Any) -> None:
    """Else the tests above would show nothing."""
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="host|depends"):
        Tape().record(lambda: run(x))


def test_a_tape_reads_its_buffers_and_nothing_else() -> None:
    x, out, scale = torch.ones(3), torch.zeros(3), [2.0]
    again = Tape().record(lambda: out.copy_((x * scale[0]).cumsum(0)))  # type: ignore[arg-type, return-value]
    x.fill_(5.0)
    scale[0] = 100.0
    again()
    assert out.tolist() == [10.0, 20.0, 30.0]


def axis(size: int, backend: str = "nccl") -> Any:
    return SimpleNamespace(size=size, backend=backend)


def test_pipelines_and_collectives_of_the_host_are_not_recorded() -> None:
    assert refusal(SimpleNamespace(pp=axis(1), tp=axis(1, "none"))) is None  # type: ignore[arg-type]
    assert refusal(SimpleNamespace(pp=axis(1), tp=axis(4))) is None  # type: ignore[arg-type]
    assert "pp 2" in str(refusal(SimpleNamespace(pp=axis(2), tp=axis(1))))  # type: ignore[arg-type]
    assert "gloo" in str(refusal(SimpleNamespace(pp=axis(1), tp=axis(2, "gloo"))))  # type: ignore[arg-type]


def test_the_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    replay._say_once.cache_clear()
    mesh: Any = SimpleNamespace(device=torch.device("cuda"), pp=axis(2), tp=axis(1))
    with caplog.at_level("INFO"):
        assert [type(make_recorder(mesh, wanted=True)) for _ in range(3)] == [Direct] * 3
        assert isinstance(make_recorder(mesh, wanted=False), Direct)
    assert [each.message for each in caplog.records] == [
        "decoding without CUDA graphs: a step passes through pp 2 stages, whose ranks wait for each other in between"
    ]


def test_a_cpu_records_nothing() -> None:
    assert isinstance(make_recorder(Mesh.build(), wanted=True), Direct)


def test_a_graph_is_captured_behind_one_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for torch.cuda: order of streams, run, capture; then replays alone."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: Any = "side") -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def capture(graph: Any, *, pool: Any, stream: Stream, capture_error_mode: str) -> Any:
        said.append(f"capture on {stream.name}, {pool}, {capture_error_mode}")
        yield
        said.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "one pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: said.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    again = CudaGraphs(torch.device("cuda")).record(lambda: said.append("run"))
    again()
    again()
    assert said == [
        "side waits for current", "run", "current waits for side",
        "capture on side, one pool, thread_local", "run", "captured", "replay", "replay",
    ]  # fmt: skip
