"""Muon Split: each head's update is orthogonal by itself, and no other head's gradient changes it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.module import Model
from runtime.training import optimizer
from runtime.training.params import Params, named

RATES = optimizer.LearningRates(0.01, 0.01, steps=10, rise=0, fall=5)
HEADS = 2  # of the small config
# to [heads, in, out]
SPLIT = {
    "layers.0.q_b": lambda a: np.transpose(np.reshape(a, (a.shape[0], HEADS, -1)), (1, 0, 2)),
    "layers.0.k_up": lambda a: np.transpose(a, (0, 2, 1)),
    "layers.0.v_up": np.asarray,
}


def update(model: Model, name: Any, params: Params, gradients: Params) -> Params:
    made = optimizer.make(model, name, RATES, weight_decay=0.0, clip=1e9)
    run = jax.jit(lambda g, p: made.update(g, made.init(p), p)[0]).lower(gradients, params)
    return run.compile(compiler_options={"xla_backend_optimization_level": 0})(gradients, params)


@pytest.fixture(scope="module")
def few(model: Model) -> Params:
    """The split matrices, one of experts and one of AdamW's: what is compiled is small."""
    params = named(model)
    return {key: params[key] for key in (*SPLIT, "layers.1.experts_down", "outer.final_norm")}


@pytest.fixture(scope="module")
def gradients(few: Params) -> Params:
    rng = np.random.default_rng(0)
    return {key: jnp.asarray(rng.standard_normal(value.shape), jnp.float32) for key, value in few.items()}


def test_each_heads_update_is_orthogonal(model: Model, few: Params, gradients: Params) -> None:
    updates = update(model, "muon-split", few, gradients)
    for key, by_head in SPLIT.items():
        for head in by_head(updates[key]):
            values = np.linalg.svd(head, compute_uv=False)
            # Newton-Schulz leaves 0.7 to 1.2, less of what was next to nothing
            assert np.median(values) > 0.6 * values.max() and values.min() > 0.2 * values.max(), key


@pytest.mark.parametrize(("name", "alone"), [("muon-split", True), ("muon", False)])
def test_a_loud_head_drowns_the_others_only_without_the_split(
    model: Model, few: Params, gradients: Params, name: str, alone: bool
) -> None:
    loud = {key: np.array(gradients[key]) for key in SPLIT}
    loud["layers.0.q_b"][:, : loud["layers.0.q_b"].shape[1] // HEADS] *= 1000.0
    for key in ("layers.0.k_up", "layers.0.v_up"):
        loud[key][0] *= 1000.0
    before, after = (update(model, name, few, {**gradients, **given}) for given in ({}, loud))
    for key, by_head in SPLIT.items():
        assert np.allclose(by_head(before[key])[1:], by_head(after[key])[1:], atol=1e-6) == alone, key


def test_who_is_trained_by_what(model: Model) -> None:
    params, split = named(model), optimizer.matrix_views(model, "muon-split")
    by_adam = {key.rpartition(".")[2] for key in params if key not in split}
    assert {key for key in by_adam if "norm" not in key} == {"embed", "head", "router", "router_bias", "index_k_bias"}
    assert all(params[key].ndim == 1 for key in params if key not in split and "norm" in key)
    assert not optimizer.matrix_views(model, "adamw")
    # rows, then columns of what Muon orthogonalises; heads and experts are a batch
    numbers = {key.rpartition(".")[2]: tuple(view.numbers) for key, view in split.items()}
    assert numbers == {
        **dict.fromkeys(["q_a", "kv_a", "o", "down", "shared_down", "experts_down", "embed_hidden"], (-2, -1)),
        **dict.fromkeys(["gate_up", "shared_gate_up", "experts_gate_up"], (-3, -1)),
        **dict.fromkeys(["index_q", "index_k", "index_w"], (-2, -1)),
        "q_b": (-3, -1), "k_up": (-1, -2), "v_up": (-2, -1),
    }  # fmt: skip
    whole = optimizer.matrix_views(model, "muon")
    by_head = {key: tuple(whole[f"layers.0.{key}"].numbers) for key in ("q_b", "k_up", "v_up")}
    assert by_head == {"q_b": (-3, (-2, -1)), "k_up": (-1, (-3, -2)), "v_up": (-2, (-3, -1))}
    assert {key for key in whole if whole[key] != split[key]} == {key for key in params if key.endswith(tuple(by_head))}


def test_experts_are_matrices_of_their_own(model: Model, few: Params, gradients: Params) -> None:
    updates = update(model, "muon-split", few, gradients)["layers.1.experts_down"]
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
