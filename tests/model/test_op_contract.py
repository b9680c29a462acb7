"""How an op appears: one equation in a trace, one composite in an export, and what may replace it."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from model import graph, ops
from model.cache import cache_rows
from model.hf_config import from_hf
from model.weights import Quantized
from tests.marks import slow_but
from tests.model.oracle import CASES, on_device, random_weights

quick = functools.partial(jax.jit)
F, I = jnp.float32, jnp.int32  # noqa: E741


def spec(*shape: int, dtype: Any = F) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# Operands and attributes of every op: 2 sequences, 3 tokens, 4 heads, 11 pages of 4 rows.
TABLE, AT = spec(2, 5, dtype=I), spec(2, 3, dtype=I)
ATTENTION = {"scale": 0.5, "value_dim": 6}
EXAMPLES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "glm.embed": ((AT, spec(9, 8)), {}),
    "glm.rms_norm": ((spec(2, 3, 8), spec(8)), {"eps": 1e-5}),
    "glm.layer_norm": ((spec(2, 3, 8), spec(8), spec(8)), {"eps": 1e-6}),
    "glm.linear": ((spec(2, 3, 8), spec(8, 5)), {}),
    "glm.head_linear": ((spec(2, 3, 4, 8), spec(4, 8, 5)), {}),
    "glm.bias": ((spec(2, 3, 8), spec(8)), {}),
    "glm.swiglu": ((spec(2, 3, 2, 8),), {}),
    "glm.rope": ((spec(2, 3, 4, 8), AT, spec(4)), {"interleaved": True, "factor": 1.0}),
    "glm.cache_write": ((spec(11, 4, 8), spec(2, 3, 8), AT), {}),
    "glm.index_scores": ((spec(2, 3, 16, 8), spec(2, 3, 16), spec(11, 4, 8), TABLE, AT), {}),
    "glm.select_topk": ((spec(2, 3, 20),), {"k": 7}),
    "glm.sparse_attention": ((spec(2, 3, 4, 8), spec(11, 4, 8), TABLE, spec(2, 3, 7, dtype=I), AT), ATTENTION),
    "glm.latent_attention": ((spec(2, 3, 4, 8), spec(11, 4, 8), TABLE, AT), ATTENTION),
    "glm.expanded_attention": (
        (spec(2, 3, 4, 7), spec(11, 4, 8), TABLE, spec(4, 5, 6), spec(4, 6, 5), AT),
        {"scale": 0.5},
    ),
    "glm.paged_attention": ((spec(2, 3, 4, 8), spec(11, 4, 2, 8), spec(11, 4, 2, 8), TABLE, AT), {"scale": 0.5}),
    "glm.route": (
        (spec(6, 8), spec(8, 16), spec(16)),
        {"top_k": 3, "n_group": 4, "topk_group": 2, "normalise": True, "scale": 2.5},
    ),
    "glm.expert_ffn": ((spec(6, 8), spec(6, 3, dtype=I), spec(6, 3), spec(4, 8, 2, 5), spec(4, 5, 8)), {}),
}


def test_every_op_has_an_example() -> None:
    assert set(EXAMPLES) == set(ops.OPS)


def call(name: str) -> Any:
    attributes = EXAMPLES[name][1]
    return lambda *operands: ops.OPS[name].call(*operands, **attributes)


def values(name: str) -> list[jax.Array]:
    """Random operands of an example; integers are small, valid indices."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.integers(0, 4, s.shape).astype(np.int32) if s.dtype == I else rng.normal(size=s.shape), s.dtype)
        for s in EXAMPLES[name][0]
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_is_one_equation(name: str) -> None:
    operands, attributes = EXAMPLES[name]
    equations = jax.make_jaxpr(call(name))(*operands).jaxpr.eqns
    assert [(eqn.primitive.name, eqn.params["name"]) for eqn in equations] == [("composite", name)]
    assert ops.attributes_of(equations[0]) == attributes
    assert len(equations[0].invars) == len(operands)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_is_one_composite_in_an_export(name: str) -> None:
    text = export.export(jax.jit(call(name)), platforms=["cpu"])(*EXAMPLES[name][0]).mlir_module()
    # bodies may hold composites of JAX's own (`chlo.top_k`); of ours there is one
    assert re.findall(r'stablehlo\.composite "(glm\.\w+)"', text) == [name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_inlined_ops_have_the_same_values(name: str) -> None:
    operands = values(name)
    inlined = ops.substitute(call(name), inline=True)
    both = zip(jax.tree.leaves(quick(inlined)(*operands)), jax.tree.leaves(quick(call(name))(*operands)), strict=True)
    for ours, expected in both:
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert not composites(inlined, *operands)


@pytest.mark.parametrize(
    "name", slow_but(["glm.rope", "glm.index_scores", "glm.sparse_attention", "glm.route", "glm.expert_ffn"], EXAMPLES)
)
def test_inlined_ops_can_be_differentiated_and_batched(name: str) -> None:
    operands = values(name)
    inlined = ops.substitute(call(name), inline=True)
    leading = [jnp.stack([x, x]) for x in operands]
    singles, pairs = quick(inlined)(*operands), quick(jax.vmap(inlined))(*leading)
    for one, two in zip(jax.tree.leaves(singles), jax.tree.leaves(pairs), strict=True):
        np.testing.assert_allclose(two, jnp.stack([one, one]), rtol=1e-5, atol=1e-6)
    if name == "glm.select_topk":
        return  # positions have no gradient

    def total(*real: jax.Array) -> jax.Array:
        given = iter(real)
        out = inlined(*(next(given) if x.dtype == F else x for x in operands))
        return sum((jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out) if leaf.dtype == F), jnp.zeros((), F))

    real = [x for x in operands if x.dtype == F]
    gradients = quick(jax.grad(total, argnums=tuple(range(len(real)))))(*real)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert any(bool(jnp.any(g != 0)) for g in gradients)


def test_a_gradient_is_the_slope() -> None:
    x, weight = values("glm.rms_norm")
    inlined = ops.substitute(call("glm.rms_norm"), inline=True)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), F)
    slope = jnp.vdot(jax.grad(lambda x: jnp.sum(jnp.sin(inlined(x, weight))))(x), direction)
    step = 1e-2
    ahead, behind = (jnp.sum(jnp.sin(inlined(x + sign * step * direction, weight))) for sign in (1, -1))
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-2)


def test_a_composite_itself_has_neither() -> None:
    """Why `substitute` exists; if JAX learns to do it, that can go."""
    x, weight = values("glm.rms_norm")
    with pytest.raises(Exception, match="composite"):
        jax.grad(lambda x: jnp.sum(call("glm.rms_norm")(x, weight)))(x)
    with pytest.raises(Exception, match="composite"):
        jax.vmap(call("glm.rms_norm"), in_axes=(0, None))(x, weight)


def composites(fn: Any, *operands: Any) -> Counter[str]:
    """Names of the ops in a function's trace, `jit` bodies included."""

    def walk(jaxpr: Any) -> Counter[str]:
        found: Counter[str] = Counter()
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "composite":
                found[eqn.params["name"]] += 1
            elif eqn.primitive.name in ("jit", "pjit"):
                found += walk(eqn.params["jaxpr"].jaxpr)
        return found

    return walk(jax.make_jaxpr(fn)(*operands).jaxpr)


def test_a_lowering_gets_operands_and_attributes() -> None:
    seen: list[Any] = []

    def lowering(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
        seen.append((x.shape, weight.shape, eps))
        return x * 2

    def model(x: jax.Array, weight: jax.Array) -> jax.Array:
        return ops.swiglu(jax.jit(lambda y: ops.rms_norm(y, weight, eps=1e-5))(x).reshape(2, 3, 2, 4))

    x, weight = values("glm.rms_norm")
    replaced = ops.substitute(model, {"glm.rms_norm": lowering})
    np.testing.assert_allclose(replaced(x, weight), ops.swiglu((x * 2).reshape(2, 3, 2, 4)))
    assert seen == [((2, 3, 8), (8,), 1e-5)]
    assert composites(model, x, weight) == {"glm.rms_norm": 1, "glm.swiglu": 1}
    assert composites(replaced, x, weight) == {"glm.swiglu": 1}
    assert not composites(ops.substitute(model, {"glm.rms_norm": lowering}, inline=True), x, weight)


def test_a_lowering_with_two_results() -> None:
    x, router, bias = values("glm.route")

    def lowering(x: jax.Array, router: jax.Array, bias: jax.Array, *, top_k: int, **attributes: Any) -> Any:
        assert attributes == {"n_group": 4, "topk_group": 2, "normalise": True, "scale": 2.5}
        return jnp.zeros((x.shape[0], top_k), I), jnp.ones((x.shape[0], top_k), F)

    experts, weights = ops.substitute(call("glm.route"), {"glm.route": lowering})(x, router, bias)
    assert not experts.any() and (weights == 1).all()


def test_the_whole_step_can_be_substituted() -> None:
    """A whole model, inlined: same logits, differentiable with respect to its weights."""
    fields = {**CASES["glm_moe_dsa"].fields, "num_hidden_layers": 2, "indexer_types": ["full", "shared"]}
    cfg = from_hf({"model_type": "glm_moe_dsa", **fields, "index_topk": 4})
    weights = on_device(random_weights(cfg))
    pages = [{r.name: jnp.zeros((4, 4, *r.shape), F) for r in cache_rows(cfg, kind)} for kind in cfg.layers]
    tokens = jnp.asarray([[5, 9, 2, 7, 11, 3]], I)
    batch = graph.Batch(tokens, jnp.zeros(1, I), jnp.full(1, 6, I), jnp.asarray([[1, 2, 3]], I))

    def logits(weights: Any) -> jax.Array:
        return graph.step(cfg, weights, pages, batch, graph.Mode("absorbed", "all")).logits

    used = composites(logits, weights)
    assert used["glm.sparse_attention"] == cfg.num_layers
    assert used["glm.select_topk"] == used["glm.index_scores"] == 1, "sharing layers do not select"
    inlined = ops.substitute(logits, inline=True)
    assert not composites(inlined, weights)
    np.testing.assert_allclose(quick(inlined)(weights), quick(logits)(weights), atol=1e-5)
    gradient = jax.eval_shape(jax.grad(lambda w: jnp.sum(inlined(w))), weights)
    assert jax.tree.structure(gradient) == jax.tree.structure(weights)


def test_operands_of_plain_and_quantised_weights() -> None:
    plain, scale = jnp.zeros((2, 2)), jnp.ones((1, 1))
    assert ops.operands(plain) == (plain,)
    assert ops.operands(Quantized(plain, scale)) == (plain, scale)
