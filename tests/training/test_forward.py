"""The training pass is the graph: same logits, same gradients; and each stage's go where the recipe says."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import graph
from model.cache import cache_rows
from model.module import Model
from runtime.training import steps
from runtime.training.config import TrainConfig
from runtime.training.forward import Aim, forward, index_recall, loss, staged, surprise
from runtime.training.params import named

LENGTH, ROWS = 32, 3


def compiled(fn: Any, *args: Any) -> Any:
    return jax.jit(fn).lower(*args).compile()(*args)


def is_index(name: str) -> bool:
    """Whether a weight belongs to an indexer, by its name."""
    return ".index_" in name


def is_balance(name: str) -> bool:
    return name.endswith(".router_bias")


@pytest.fixture(scope="module")
def tokens(tiny: TrainConfig) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, tiny.model.vocab_size, (ROWS, LENGTH)), jnp.int32)


@pytest.mark.parametrize("attention", [pytest.param("dense", marks=pytest.mark.slow), "sparse"])
def test_the_training_pass_is_the_graph(model: Model, tokens: jax.Array, attention: Any) -> None:
    """Against the graph's own step over a cache of small pages in a scrambled order."""
    cfg, page = staged(model.config, attention, LENGTH), 8
    pages = LENGTH // page
    table = jnp.asarray(1 + np.random.default_rng(1).permutation(ROWS * pages).reshape(ROWS, pages), jnp.int32)
    batch = graph.Batch(tokens, jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, LENGTH, jnp.int32), table)

    def caches(kinds: Any) -> list[Any]:
        return [{r.name: jnp.zeros((ROWS * pages + 1, page, *r.shape)) for r in cache_rows(cfg, k)} for k in kinds]

    def plain(model: Model) -> list[Any]:
        weights, mode = model.weights(), graph.Mode("expanded", "all")
        main = graph.step(cfg, weights, caches(cfg.layers), batch, mode)
        said, hidden = [main.logits], main.hidden
        for depth in (1, 2):
            ahead = batch._replace(tokens=jnp.roll(tokens, -depth, axis=1))
            draft = graph.mtp_step(cfg, weights, caches([cfg.mtp_type])[0], ahead, hidden, mode)
            hidden = draft.hidden
            said.append(draft.logits)
        return said

    def training(model: Model) -> list[Any]:
        passed = forward(model, tokens, attention, drafts=2, draft_rows=ROWS)
        return [passed.logits, *passed.drafts]

    for mine, theirs in zip(compiled(training, model), compiled(plain, model), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_training_pass_is_the_module(model: Model, tokens: jax.Array, attention: Any) -> None:
    """The language loss of a stage and its gradients are those of the model as anyone calls it; here of two layers,
    which is quicker to compile."""
    cfg = dataclasses.replace(model.config, layers=model.config.layers[1:], mtp_layers=0)
    held = {**model.weights(), "layers": model.weights()["layers"][1:], "mtp": []}
    model, called = Model(cfg, held), Model(staged(cfg, attention, LENGTH), held)
    weights = jnp.ones(tokens.shape, jnp.float32)

    def plain(model: Model) -> jax.Array:
        losses, counts = surprise(model(tokens), tokens, weights, 1)
        return jnp.sum(losses) / jnp.sum(counts)

    def training(model: Model) -> jax.Array:
        return loss(model, Aim(attention), tokens, weights)[1]["loss"]

    ours, theirs = compiled(jax.value_and_grad(training), model), compiled(jax.value_and_grad(plain), called)
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-6)
    gradients = named(theirs[1])
    for name, gradient in named(ours[1]).items():
        np.testing.assert_allclose(gradient, gradients[name], atol=2e-5 * max(1, np.abs(gradient).max()), err_msg=name)


def gradients(model: Model, aim: Aim, tokens: jax.Array) -> dict[str, float]:
    weights = jnp.ones(tokens.shape, jnp.float32)
    grads = compiled(jax.grad(lambda m: loss(m, aim, tokens, weights)[0]), model)
    return {name: float(jnp.abs(grad).max()) for name, grad in named(grads).items()}


def test_dense_trains_everything_but_the_indexers(model: Model, tokens: jax.Array) -> None:
    found = gradients(model, Aim("dense", 1, ROWS, 0.3), tokens)
    for name, size in found.items():
        assert (size > 0) != (is_index(name) or is_balance(name)), name


def test_the_warmup_trains_the_indexers_only(model: Model, tokens: jax.Array) -> None:
    found = gradients(model, Aim("warmup", 1, ROWS), tokens)
    assert {name for name, size in found.items() if size > 0} == {name for name in found if is_index(name)}


@pytest.mark.parametrize("attention", ["dense", "warmup", "sparse"])
def test_what_a_stage_trains(model: Model, attention: str) -> None:
    chosen = named(model, steps.TRAINED[attention])
    kinds = {"dense": {False}, "warmup": {True}, "sparse": {False, True}}[attention]
    assert set(chosen) == {name for name in named(model) if is_index(name) in kinds and not is_balance(name)}


def test_sparse_keeps_the_two_losses_apart(model: Model, tokens: jax.Array) -> None:
    """The divergence gives the indexers their whole gradient and the rest none of theirs."""
    weights = jnp.ones(tokens.shape, jnp.float32)
    aim = Aim("sparse")

    def parts(m: Model) -> jax.Array:
        total, found = loss(m, aim, tokens, weights)
        return jnp.stack([total, found["index_loss"]])

    both = named(compiled(jax.jacrev(parts), model))
    total, index = ({name: grad[i] for name, grad in both.items()} for i in (0, 1))
    for name in both:
        if is_index(name) and not name.startswith("mtp"):
            np.testing.assert_allclose(total[name], index[name], atol=1e-7)
            assert jnp.abs(index[name]).max() > 0
        elif not is_index(name):
            assert jnp.abs(index[name]).max() == 0, name


def test_a_shared_indexer_learns_from_every_layer_it_serves(model: Model, tokens: jax.Array) -> None:
    """Layer 1 owns the indexer, layer 2 shares it: its target is the mean of both layers' distributions."""
    served: list[int] = []

    def targets(model: Model) -> list[jax.Array]:
        gauges = forward(model, tokens, "warmup").gauges
        served.extend(map(len, gauges.served))
        return gauges.targets()

    found = compiled(targets, model)
    assert served == [1, 2]
    for target in found:
        np.testing.assert_allclose(jnp.sum(target, axis=-1), 1.0, atol=1e-5)  # a distribution
        assert float(jnp.abs(jnp.triu(target[0], 1)).max()) == 0  # over the past


def test_an_indexer_that_is_right_has_no_loss(model: Model, tokens: jax.Array) -> None:
    """Scores that are the logarithms of the attention distribution: divergence 0, recall 1."""

    def losses(model: Model) -> tuple[jax.Array, jax.Array]:
        gauges = forward(model, tokens, "warmup").gauges
        untrained = gauges.index_loss()
        gauges.scores = [jnp.log(jnp.maximum(target, 1e-30)) for target in gauges.targets()]
        return untrained, gauges.index_loss()

    untrained, right = compiled(losses, model)
    assert untrained > 0.01 and abs(right) < 1e-5


def test_index_recall_is_a_share(model: Model, tokens: jax.Array) -> None:
    assert 0 < float(compiled(lambda m: index_recall(m, tokens), model)) < 1


def test_loads_count_every_choice(model: Model, tokens: jax.Array) -> None:
    moe = model.config.moe
    assert moe is not None
    loads = compiled(lambda m: forward(m, tokens, "dense").gauges.loads, model)
    assert [float(load.sum()) for load in loads] == [ROWS * LENGTH * moe.top_k] * 2
