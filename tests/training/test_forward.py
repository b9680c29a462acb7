"""The training pass is the graph: same logits; and each stage's gradients go where the recipe says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import graph
from model.cache import cache_rows
from runtime.training import steps
from runtime.training.config import TrainConfig
from runtime.training.forward import (
    Aim,
    Params,
    flatten,
    forward,
    index_recall,
    is_balance,
    is_index,
    loss,
    staged,
    unflatten,
)

LENGTH, ROWS = 32, 3
OPTIONS = {"xla_backend_optimization_level": 0}  # compiles in half the time, and these run for milliseconds


def compiled(fn: Any, *args: Any) -> Any:
    return jax.jit(fn).lower(*args).compile(compiler_options=OPTIONS)(*args)


@pytest.fixture(scope="module")
def tokens(tiny: TrainConfig) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, tiny.model.vocab_size, (ROWS, LENGTH)), jnp.int32)


def test_params_and_weights_are_the_same_thing_twice(tiny: TrainConfig, params: Params) -> None:
    again = flatten(tiny.model, unflatten(tiny.model, params))
    assert params.keys() == again.keys()
    assert all(np.array_equal(params[key], again[key]) for key in params)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_training_pass_is_the_graph(tiny: TrainConfig, params: Params, tokens: jax.Array, attention: Any) -> None:
    """Against the graph's own step over a cache of small pages in a scrambled order."""
    cfg, page = staged(tiny.model, attention, LENGTH), 8
    pages = LENGTH // page
    table = jnp.asarray(1 + np.random.default_rng(1).permutation(ROWS * pages).reshape(ROWS, pages), jnp.int32)
    batch = graph.Batch(tokens, jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, LENGTH, jnp.int32), table)

    def caches(kinds: Any) -> list[Any]:
        return [{r.name: jnp.zeros((ROWS * pages + 1, page, *r.shape)) for r in cache_rows(cfg, k)} for k in kinds]

    def plain(params: Params) -> list[Any]:
        weights, mode = unflatten(cfg, params), graph.Mode("expanded", "all")
        main = graph.step(cfg, weights, caches(cfg.layers), batch, mode)
        said, hidden = [main.logits], main.hidden
        for depth in (1, 2):
            ahead = batch._replace(tokens=jnp.roll(tokens, -depth, axis=1))
            draft = graph.mtp_step(cfg, weights, caches([cfg.mtp_type])[0], ahead, hidden, mode)
            hidden = draft.hidden
            said.append(draft.logits)
        return said

    def training(params: Params) -> list[Any]:
        passed = forward(tiny.model, params, tokens, attention, drafts=2, draft_rows=ROWS)
        return [passed.logits, *passed.drafts]

    for mine, theirs in zip(compiled(training, params), compiled(plain, params), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def gradients(tiny: TrainConfig, aim: Aim, params: Params, tokens: jax.Array) -> dict[str, float]:
    weights = jnp.ones(tokens.shape, jnp.float32)
    grads = compiled(jax.grad(lambda p: loss(tiny.model, aim, p, tokens, weights)[0]), params)
    return {name: float(jnp.abs(grad).max()) for name, grad in grads.items()}


def test_dense_trains_everything_but_the_indexers(tiny: TrainConfig, params: Params, tokens: jax.Array) -> None:
    found = gradients(tiny, Aim("dense", 2, ROWS, 0.3), params, tokens)
    for name, size in found.items():
        assert (size > 0) != (is_index(name) or is_balance(name)), name


def test_the_warmup_trains_the_indexers_only(tiny: TrainConfig, params: Params, tokens: jax.Array) -> None:
    found = gradients(tiny, Aim("warmup", 1, ROWS), params, tokens)
    assert {name for name, size in found.items() if size > 0} == {name for name in found if is_index(name)}
    assert steps.trained(params, "warmup") == {name for name in found if is_index(name)}


def test_sparse_keeps_the_two_losses_apart(tiny: TrainConfig, params: Params, tokens: jax.Array) -> None:
    """The divergence gives the indexers their whole gradient and the rest none of theirs."""
    weights = jnp.ones(tokens.shape, jnp.float32)
    aim = Aim("sparse")

    def parts(p: Params) -> jax.Array:
        total, found = loss(tiny.model, aim, p, tokens, weights)
        return jnp.stack([total, found["index_loss"]])

    both = compiled(jax.jacrev(parts), params)
    total, index = ({name: grad[i] for name, grad in both.items()} for i in (0, 1))
    for name in params:
        if is_index(name) and not name.startswith("mtp"):
            np.testing.assert_allclose(total[name], index[name], atol=1e-7)
            assert jnp.abs(index[name]).max() > 0
        elif not is_index(name):
            assert jnp.abs(index[name]).max() == 0, name


def test_a_shared_indexer_learns_from_every_layer_it_serves(
    tiny: TrainConfig, params: Params, tokens: jax.Array
) -> None:
    """Layer 1 owns the indexer, layer 2 shares it: its target is the mean of both layers' distributions."""
    served: list[int] = []

    def targets(params: Params) -> list[jax.Array]:
        gauges = forward(tiny.model, params, tokens, "warmup").gauges
        served.extend(map(len, gauges.served))
        return gauges.targets()

    found = compiled(targets, params)
    assert served == [1, 2]
    for target in found:
        np.testing.assert_allclose(jnp.sum(target, axis=-1), 1.0, atol=1e-5)  # a distribution
        assert float(jnp.abs(jnp.triu(target[0], 1)).max()) == 0  # over the past


def test_an_indexer_that_is_right_has_no_loss(tiny: TrainConfig, params: Params, tokens: jax.Array) -> None:
    """Scores that are the logarithms of the attention distribution: divergence 0, recall 1."""

    def losses(params: Params) -> tuple[jax.Array, jax.Array]:
        gauges = forward(tiny.model, params, tokens, "warmup").gauges
        untrained = gauges.index_loss()
        gauges.scores = [jnp.log(jnp.maximum(target, 1e-30)) for target in gauges.targets()]
        return untrained, gauges.index_loss()

    untrained, right = compiled(losses, params)
    assert untrained > 0.01 and abs(right) < 1e-5


def test_index_recall_is_a_share(tiny: TrainConfig, params: Params, tokens: jax.Array) -> None:
    assert 0 < float(compiled(lambda p: index_recall(tiny.model, p, tokens), params)) < 1


def test_loads_count_every_choice(tiny: TrainConfig, params: Params, tokens: jax.Array) -> None:
    moe = tiny.model.moe
    assert moe is not None
    loads = compiled(lambda p: forward(tiny.model, p, tokens, "dense").gauges.loads, params)
    assert [float(load.sum()) for load in loads] == [ROWS * LENGTH * moe.top_k] * 2
