"""Muon Split: each head's update is orthogonal by itself, and no other head's gradient changes it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime.training import optimizer
from runtime.training.config import TrainConfig
from runtime.training.forward import Params

RATES = optimizer.LearningRates(0.01, 0.01, steps=10, rise=0, fall=5)
SPLIT = {"layers.0.q_b": (1, 0, 2), "layers.0.k_up": (0, 2, 1), "layers.0.v_up": (0, 1, 2)}  # to [heads, in, out]


def update(name: Any, params: Params, gradients: Params) -> Params:
    made = optimizer.make(name, RATES, weight_decay=0.0, clip=1e9)
    run = jax.jit(lambda g, p: made.update(g, made.init(p), p)[0]).lower(gradients, params)
    return run.compile(compiler_options={"xla_backend_optimization_level": 0})(gradients, params)


@pytest.fixture(scope="module")
def few(params: Params) -> Params:
    """The split matrices, one of experts and one of AdamW's: what is compiled is small."""
    return {key: params[key] for key in (*SPLIT, "layers.1.experts_down", "outer.final_norm")}


@pytest.fixture(scope="module")
def gradients(few: Params) -> Params:
    rng = np.random.default_rng(0)
    return {key: jnp.asarray(rng.standard_normal(value.shape), jnp.float32) for key, value in few.items()}


def test_each_heads_update_is_orthogonal(few: Params, gradients: Params) -> None:
    updates = update("muon-split", few, gradients)
    for key, axes in SPLIT.items():
        for head in np.transpose(updates[key], axes):
            values = np.linalg.svd(head, compute_uv=False)
            # Newton-Schulz leaves 0.7 to 1.2, less of what was next to nothing
            assert np.median(values) > 0.6 * values.max() and values.min() > 0.2 * values.max(), key


@pytest.mark.parametrize(("name", "alone"), [("muon-split", True), ("muon", False)])
def test_a_loud_head_drowns_the_others_only_without_the_split(
    few: Params, gradients: Params, name: str, alone: bool
) -> None:
    loud = dict(gradients)
    for key, axes in SPLIT.items():
        scale = np.ones(few[key].shape, np.float32)
        np.moveaxis(scale, axes[0], 0)[0] = 1000.0
        loud[key] = gradients[key] * jnp.asarray(scale)
    before, after = update(name, few, gradients), update(name, few, loud)
    for key, axes in SPLIT.items():
        others = (np.transpose(each[key], axes)[1:] for each in (before, after))
        assert np.allclose(*others, atol=1e-6) == alone, key


def test_who_is_trained_by_what(tiny: TrainConfig, params: Params) -> None:
    split = optimizer.dimension_numbers(params, "muon-split")
    by_adam = {key.rpartition(".")[2] for key, numbers in split.items() if numbers is None}
    assert {key for key in by_adam if "norm" not in key} == {"embed", "head", "router", "router_bias", "index_k_bias"}
    assert all(params[key].ndim == 1 for key, n in split.items() if n is None and "norm" in key)
    assert not any(optimizer.dimension_numbers(params, "adamw").values())


def test_experts_are_matrices_of_their_own(few: Params, gradients: Params) -> None:
    updates = update("muon-split", few, gradients)["layers.1.experts_down"]
    for expert in np.asarray(updates):
        values = np.linalg.svd(expert, compute_uv=False)
        assert np.median(values) > 0.6 * values.max() and values.min() > 0.2 * values.max()


def test_the_rate_rises_stays_and_falls() -> None:
    rates = optimizer.LearningRates(1.0, 1.0, steps=100, rise=10, fall=40)
    at = [float(optimizer.schedule(1.0, rates)(step)) for step in range(101)]
    assert at[0] == pytest.approx(0.1) and at[10:61] == [1.0] * 51
    assert all(b < a for a, b in zip(at[60:], at[61:], strict=False)) and at[100] == pytest.approx(0.02)


def test_the_balance_moves_towards_the_mean() -> None:
    bias = optimizer.rebalance(jnp.zeros(4), jnp.asarray([10.0, 2.0, 4.0, 4.0]), 0.1)
    np.testing.assert_allclose(bias, [-0.1, 0.1, 0.1, 0.1])


def test_balancing_evens_a_skewed_router() -> None:
    """Loads of a router that prefers one expert come below 1.5 times the mean."""
    rng = np.random.default_rng(0)
    affinity = jax.nn.sigmoid(jnp.asarray(rng.standard_normal((512, 8)) + np.array([2.0] + [0.0] * 7), jnp.float32))
    bias = jnp.zeros(8)

    def load(bias: jax.Array) -> jax.Array:
        chosen = jax.lax.top_k(affinity + bias[None, :], 2)[1]
        return jnp.sum(jax.nn.one_hot(chosen, 8), axis=(0, 1))

    assert load(bias).max() / load(bias).mean() > 2
    for _ in range(200):
        bias = optimizer.rebalance(bias, load(bias), 0.01)
    assert load(bias).max() / load(bias).mean() < 1.5
