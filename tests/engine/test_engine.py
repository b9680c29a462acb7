"""What a user of the engine relies on: batching, chunking, preemption and drafts never change the tokens."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import registry
from foundation.errors import CapacityError, UsageError
from model import graph
from model.cache import cache_rows
from model.checkpoint import Checkpoint
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.load import load_engine, rows_for, token_bytes
from runtime.execution.local.request import Completion, Prompt
from runtime.serving.sampling import Sampling
from tests.engine.conftest import SMALL
from tests.marks import slow_but

VOCAB = 160
Engines = dict[tuple[str, int], LocalEngine]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng([seed, length]).integers(1, VOCAB, length))


def assert_all_pages_are_back(engine: LocalEngine) -> None:
    assert engine.pool is not None and engine.pool.used == 0
    engine.pool.check([])


def alone(engine: LocalEngine, request: Prompt) -> Completion:
    return engine.generate([request])[0]


@pytest.mark.parametrize("family", slow_but(["dsa"], ["dsa", "mla"]))
def test_batched_tokens_equal_each_request_alone(engines: Engines, family: str) -> None:
    engine = engines[family, 0]
    requests = [Prompt(prompt(n, n), max_tokens=6 + n % 5) for n in (3, 40, 17, 70, 1, 33)]
    together = engine.generate(requests)
    assert [c.token_ids for c in together] == [alone(engine, r).token_ids for r in requests]
    assert_all_pages_are_back(engine)


@pytest.mark.parametrize(("family", "drafts"), slow_but([("dsa", 3)], [("dsa", 3), ("mla", 3)]))
def test_drafts_leave_greedy_tokens_as_they_are(engines: Engines, family: str, drafts: int) -> None:
    requests = [Prompt(prompt(n, n), max_tokens=24) for n in (5, 50, 21)]
    plain = engines[family, 0].generate(requests)
    drafted = engines[family, drafts].generate(requests)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert all(c.accept_length is not None and 1 <= c.accept_length <= 1 + drafts for c in drafted)
    assert all(c.accept_length is None for c in plain)
    assert_all_pages_are_back(engines[family, drafts])


@pytest.mark.parametrize(
    ("family", "drafts"),
    [("dsa", 0), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("dsa", 3), ("gqa", 0)))],
)
def test_kept_logits_have_a_row_for_every_token(engines: Engines, family: str, drafts: int) -> None:
    done = alone(engines[family, drafts], Prompt(prompt(45), max_tokens=7, keep_logits=True))
    assert done.logits is not None and done.logits.dtype == np.float32
    assert done.logits.shape == (45 + 7, VOCAB)
    assert tuple(done.logits[44:-1].argmax(-1)) == done.token_ids
    # the same sequence as one prompt: prefill gives the rows that decoding gave
    whole = alone(engines[family, 0], Prompt(done.prompt_ids + done.token_ids, max_tokens=1, keep_logits=True))
    assert whole.logits is not None
    np.testing.assert_allclose(whole.logits[:52], done.logits, atol=1e-4)


def test_preempted_sequences_continue_where_they_were(engines: Engines) -> None:
    requests = [Prompt(prompt(30, n), max_tokens=30) for n in range(3)]
    shared = engines["dsa", 0]
    roomy, tight = (
        LocalEngine(shared.cfg, shared.programs, EngineConfig(**{**vars(SMALL), "pool_tokens": n})) for n in (1024, 112)
    )
    expected = [c.token_ids for c in roomy.generate(requests)]
    assert [c.token_ids for c in tight.generate(requests)] == expected
    assert tight.preemptions > 0 and roomy.preemptions == 0
    assert_all_pages_are_back(tight)


def test_stop_token_ends_a_request_and_is_reported(engines: Engines) -> None:
    free = alone(engines["dsa", 0], Prompt(prompt(12), max_tokens=20))
    stop = free.token_ids[9]
    first = free.token_ids.index(stop)
    for drafts in (0, 3):
        ended = alone(engines["dsa", drafts], Prompt(prompt(12), max_tokens=20, stop_ids=frozenset({stop})))
        assert ended.finish_reason == "stop" and ended.token_ids == free.token_ids[: first + 1]
    assert free.finish_reason == "length"


def test_sampling_repeats_with_its_seed_and_ignores_its_neighbours(engines: Engines) -> None:
    engine = engines["gqa", 0]
    warm = Sampling(temperature=1.0, top_p=0.9, top_k=40, seed=5)
    request = Prompt(prompt(9), max_tokens=16, sampling=warm)
    first = alone(engine, request)
    assert first.token_ids == alone(engine, request).token_ids
    assert engine.generate([request, Prompt(prompt(20), max_tokens=16)])[0].token_ids == first.token_ids
    other = Prompt(prompt(9), max_tokens=16, sampling=Sampling(temperature=1.0, top_p=0.9, top_k=40, seed=6))
    assert alone(engine, other).token_ids != first.token_ids


def test_tokens_stream_in_order(engines: Engines) -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}
    done = engines["dsa", 3].generate(
        [Prompt(prompt(8), max_tokens=9), Prompt(prompt(30), max_tokens=5)], lambda i, t: seen[i].append(t)
    )
    assert [tuple(seen[i]) for i in (0, 1)] == [c.token_ids for c in done]


class Graph:
    """The graph's step over one sequence at a time, from its first token on: no scheduling, no pages to share."""

    def __init__(self, engine: LocalEngine):
        self._engine = engine
        self._step = jax.jit(partial(graph.step, engine.cfg, mode=graph.Mode("expanded", "all")))

    def check(self, done: Completion) -> None:
        """The answer is what the model says at every place."""
        known = [*done.prompt_ids, *done.token_ids]
        ids = np.zeros((1, 128), np.int32)
        ids[0, : len(known)] = known
        cfg, pages = self._engine.cfg, np.arange(1, 17, dtype=np.int32)[None]
        caches = [
            {row.name: np.zeros((18, 8, *row.shape), np.float32) for row in cache_rows(cfg, kind)}
            for kind in cfg.layers
        ]
        batch = graph.Batch(ids, np.zeros(1, np.int32), np.array([len(known)], np.int32), pages)
        said = np.asarray(self._step(self._engine.programs.weights, caches, batch).logits)[0].argmax(-1)
        first = len(done.prompt_ids) - 1
        assert tuple(said[first : first + len(done.token_ids)]) == done.token_ids


@pytest.fixture(scope="session")
def graphs(engines: Engines) -> dict[str, Graph]:
    return {family: Graph(engines[family, 0]) for family in ("dsa", "gqa")}


@pytest.mark.parametrize(("family", "drafts"), slow_but([("dsa", 3)], [("dsa", 3), ("gqa", 2), ("dsa", 0)]))
@settings(max_examples=7)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    policy=st.sampled_from(["glm5", "vllm", "sglang"]),
    chunk=st.sampled_from([7, 32]),
    pool_tokens=st.sampled_from([128, 1024]),
    shared=st.integers(0, 40),
)
def test_tokens_are_the_models_whatever_the_schedule(
    engines: Engines,
    graphs: dict[str, Graph],
    family: str,
    drafts: int,
    lengths: list[int],
    policy: str,
    chunk: int,
    pool_tokens: int,
    shared: int,
) -> None:
    """Any policy, chunks, pages that run short, prompts that begin alike, drafts."""
    base = engines[family, drafts]
    config = EngineConfig(
        **{**vars(SMALL), "engine": policy, "prefill_chunk": chunk, "pool_tokens": pool_tokens, "drafts": drafts}
    )
    engine = LocalEngine(base.cfg, base.programs, config)  # same programs and caches, another scheduler
    requests = [Prompt(prompt(shared) + prompt(n, i), max_tokens=1 + n % 13) for i, n in enumerate(lengths)]
    done = engine.generate(requests)
    assert [len(c.token_ids) for c in done] == [r.max_tokens for r in requests]
    assert [c.prompt_ids for c in done] == [r.prompt_ids for r in requests]
    for completion in done:
        graphs[family].check(completion)
    assert_all_pages_are_back(engine)


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (Prompt(()), UsageError, "no tokens"),
        (Prompt((1, VOCAB)), UsageError, f"token id {VOCAB} is out of range"),
        (Prompt((-1,)), UsageError, "token id -1 is out of range"),
        (Prompt((1,), max_tokens=0), UsageError, "max-tokens"),
        (Prompt((1,) * 500, max_tokens=13), UsageError, "512 positions"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    engines: Engines, request_: Prompt, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        engines["dsa", 0].generate([Prompt(prompt(4)), request_])
    assert "\n" not in str(caught.value)


def test_prompt_beyond_the_page_pool_is_refused(engines: Engines) -> None:
    shared = engines["dsa", 0]
    small = LocalEngine(shared.cfg, shared.programs, EngineConfig(**{**vars(SMALL), "pool_tokens": 64}))
    with pytest.raises(CapacityError, match="page pool's 64 tokens"):
        small.generate([Prompt(prompt(60), max_tokens=8)])


def test_mtp_needs_an_mtp_layer(checkpoints: dict, tmp_path) -> None:
    from model.checkpoint_writer import save

    opened = Checkpoint(checkpoints["dsa"])
    save(tmp_path / "no-mtp", opened.raw_config, {**opened.load(), "mtp": []})
    config = EngineConfig(**{**vars(SMALL), "drafts": 2})
    with pytest.raises(UsageError, match="holds no MTP layer"):
        load_engine(Checkpoint(tmp_path / "no-mtp"), registry.usable("cpu"), config)


@pytest.mark.slow
def test_fp8_weights_stay_fp8_and_give_the_dequantised_tokens(checkpoints: dict, tmp_path) -> None:
    from model.checkpoint_writer import save

    opened = Checkpoint(checkpoints["dsa"])
    save(tmp_path / "fp8", opened.raw_config, opened.load(), fp8=True)
    quantised = Checkpoint(tmp_path / "fp8")
    kept = load_engine(quantised, registry.usable("cpu"), SMALL, keep_fp8=True)
    widened = load_engine(quantised, registry.usable("cpu"), SMALL)
    assert str(kept.programs.weights["layers"][0]["q_a"].values.dtype) == "float8_e4m3fn"
    request = Prompt(prompt(40), max_tokens=8, keep_logits=True)
    a, b = alone(kept, request), alone(widened, request)
    assert a.logits is not None and b.logits is not None
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
    assert a.token_ids == b.token_ids


@pytest.mark.parametrize("kv", [None, "fp8"])
@pytest.mark.parametrize("name", ["dsa", "gqa", "mla"])
def test_a_pool_is_counted_by_what_its_pages_take(name: str, kv: str | None, checkpoints: dict[str, Path]) -> None:
    """The drafts' layer too; FP8 rows are what is kept, whether a model has latents, index keys or heads."""
    cpu = registry.usable("cpu")
    engine = load_engine(Checkpoint(checkpoints[name]), cpu, dataclasses.replace(SMALL, drafts=1, kv=kv))
    kept, cfg = engine.programs, engine.cfg
    arrays = [page for layer in (*kept.caches, kept.mtp_cache or {}) for page in layer.values()]
    a_token = token_bytes(cfg, "float32", True, rows_for(cfg, cpu, engine.config.described, "float32", kv))
    assert sum(each.nbytes for each in arrays) == (kept.pages + 2) * kept.page_size * a_token
    widths = {each.dtype.itemsize for each in arrays}
    assert widths == ({1} if kv else {4})
