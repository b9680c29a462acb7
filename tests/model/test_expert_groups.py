"""Experts in groups: cut over the groups by number, and over the devices of a group by width."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ops
from model.parallel import Parallel
from model.split import Layout

EXPERTS, WIDTH, INNER, TOP = 8, 16, 8, 3


@pytest.mark.parametrize(
    "layout",
    [Layout(4, 1, 2), Layout(2, 2, 2), Layout(2, 4, 2), Layout(4, 2, 4), Layout(1, 4, 2)],
    ids=lambda layout: layout.name,
)
def test_the_shares_sum_to_the_whole_layer(layout: Layout) -> None:
    """Every device runs the graph's own dispatch and combine on the slice that `places` and the cuts give it: summed
    over tp, each group's tokens get what one device with all experts computes."""
    rng = np.random.default_rng(0)
    tokens, parts = 5, layout.expert_tensor_parts
    x = rng.normal(size=(layout.dp, tokens, WIDTH)).astype(np.float32)
    chosen = np.stack([rng.permutation(EXPERTS)[:TOP] for _ in range(layout.dp * tokens)]).astype(np.int32)
    chosen = chosen.reshape(layout.dp, tokens, TOP)
    weights = rng.random(chosen.shape).astype(np.float32)
    gate_up = rng.normal(size=(EXPERTS, WIDTH, 2, INNER)).astype(np.float32)
    down = rng.normal(size=(EXPERTS, INNER, WIDTH)).astype(np.float32)
    count, width = EXPERTS // layout.ep, INNER // parts

    def held(index: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        mine, part = (
            slice(group * count, (group + 1) * count),
            slice(index % parts * width, (index % parts + 1) * width),
        )
        return gate_up[mine, :, :, part], down[mine, part]

    shares = [held(place.dp * layout.tp + place.tp, place.ep) for place in layout.places()]
    par = Parallel.of(layout)
    ranks = (layout.dp, layout.tp)
    mine = [np.stack(each).reshape(*ranks, *each[0].shape) for each in zip(*shares, strict=True)]

    def device(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        found = par.dispatch(x, chosen, weights, count)
        run = ops.substitute(ops.expert_ffn, inline=True)
        return par.sum_heads(par.combine(run(*found, gate_up, down), tokens))

    over_tp = jax.vmap(device, in_axes=(None, None, None, 0, 0), axis_name=par.tp)
    out = jax.jit(jax.vmap(over_tp, axis_name=par.dp))(x, chosen, weights, *mine)
    flat = [jnp.asarray(part.reshape(-1, part.shape[-1])) for part in (x, chosen, weights)]
    expected = ops.expert_ffn(*flat, gate_up, down).reshape(x.shape)
    assert np.abs(expected).max() > 1
    for rank in range(layout.tp):
        np.testing.assert_allclose(out[:, rank], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "layout"), [(4, Layout(2, 2, 4)), (5, Layout(2, 2, 4)), (1, Layout(2, 2, 4)), (3, Layout(1, 4, 4))]
)
def test_operators_that_reach_all_experts_change_nothing(tokens: int, layout: Layout) -> None:
    """A device gives in its share of its group's tokens, also where they do not divide; the op does the rest."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(layout.dp, tokens, WIDTH)).astype(np.float32)
    chosen = np.stack([rng.permutation(EXPERTS)[:TOP] for _ in range(layout.dp * tokens)]).astype(np.int32)
    chosen = chosen.reshape(layout.dp, tokens, TOP)
    weights = rng.random(chosen.shape).astype(np.float32)
    gate_up = rng.normal(size=(EXPERTS, WIDTH, 2, INNER)).astype(np.float32)
    down = rng.normal(size=(EXPERTS, INNER, WIDTH)).astype(np.float32)
    par = dataclasses.replace(Parallel.of(layout), exchange="operators")

    def device(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        found = par.dispatch(x, chosen, weights, EXPERTS // layout.ep)
        run = ops.substitute(functools.partial(ops.expert_ffn, across=par.across), inline=True)
        return par.sum_heads(par.combine(run(*found, gate_up, down), tokens))

    mine = (
        gate_up.reshape(layout.dp, layout.tp, -1, WIDTH, 2, INNER),
        down.reshape(layout.dp, layout.tp, -1, INNER, WIDTH),
    )
    over_tp = jax.vmap(device, in_axes=(None, None, None, 0, 0), axis_name="tp")
    out = jax.jit(jax.vmap(over_tp, axis_name="dp"))(x, chosen, weights, *mine)
    flat = [jnp.asarray(part.reshape(-1, part.shape[-1])) for part in (x, chosen, weights)]
    expected = ops.expert_ffn(*flat, gate_up, down).reshape(x.shape)
    assert np.abs(expected).max() > 1
    for rank in range(layout.tp):
        np.testing.assert_allclose(out[:, rank], expected, rtol=1e-4, atol=1e-4)
