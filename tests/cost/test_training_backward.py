"""The gradient's products, as priced, against those of the graph's own gradient, traced."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from model import abstract, graph, ops
from model.config import LayerType
from model.hf_config import load_config
from model.split import Layout
from model.weights import layer_weights, outer_weights, parameter_counts
from runtime.pricing import Price, attention, load
from runtime.pricing.oplist import Sizes
from runtime.pricing.prices import Context
from runtime.pricing.trace import PAGE_SIZE, trace
from runtime.pricing.training import Sequences, backward
from runtime.pricing.training.backward import differentiated, gradient_flops, trained
from runtime.pricing.training.flops import training_flops
from runtime.pricing.training.ops import OpPrices
from runtime.pricing.training.sequences import Attended
from tests.plans import formats


def product_flops(jaxpr: Any) -> int:
    """2 m n k of every dot_general, bodies entered."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            count += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count += product_flops(inner)
    return count


def gradient_products(fn: Any, *args: Any) -> int:
    """FLOPs of the products in the gradient of `fn(*args)` by all of them, its forward products left out."""
    inlined = ops.substitute(fn, inline=True)
    out = jax.eval_shape(inlined, *args)

    def pulled(cotangent: Any, *given: Any) -> Any:
        return jax.vjp(inlined, *given)[1](cotangent)

    both = product_flops(jax.make_jaxpr(pulled)(out, *args).jaxpr)
    return both - product_flops(jax.make_jaxpr(inlined)(*args).jaxpr)


LAYERS = [
    ("glm-5", LayerType("mla", "full", "moe"), 1),
    ("glm-5", LayerType("mla", "full", "dense"), 40),
    ("glm-5.2", LayerType("mla", "shared", "moe"), 40),
    ("deepseek-v3", LayerType("mla", "none", "dense"), 2),
    ("glm-4.5-air", LayerType("gqa", "none", "moe"), 2),
]
"""Models, a layer type of each, and the pages of a sequence."""


@pytest.mark.parametrize(("model", "kind", "pages"), LAYERS)
def test_a_layers_gradient_has_the_products_of_the_traced_one(model: str, kind: LayerType, pages: int) -> None:
    """Pages: 40 are more than the selection, so that the indexer, whose weights have no gradient, takes part."""
    cfg, shape = load_config(model), abstract.StepShape(2, 3, pages, PAGE_SIZE)
    sparse = cfg.indexer is not None and shape.context > cfg.indexer.topk
    of_name = {weight.name: weight for weight in layer_weights(cfg, kind)}
    weights = abstract.abstract_weights(cfg, kind)
    learnt = {name: w for name, w in weights.items() if trained(of_name[name])}
    frozen = {name: w for name, w in weights.items() if name not in learnt}
    cache = abstract.abstract_cache(cfg, kind, shape.pages, shape.page_size)
    at = jnp.zeros((2, 3), jnp.int32)
    view = graph.View(at, at, jnp.zeros((2, pages), jnp.int32))
    chosen = None
    if kind.indexer == "shared" and cfg.indexer:
        chosen = jnp.zeros((2, 3, cfg.indexer.topk), jnp.int32)

    def given(learnt: Any, x: Any) -> Any:
        zeros = {name: jnp.zeros(w.shape, w.dtype) for name, w in {**frozen, **cache}.items()}
        held = {name: zeros[name] for name in cache}
        mode = graph.Mode("expanded")
        rest = {name: zeros[name] for name in frozen}
        return graph.layer(cfg, kind, {**rest, **learnt}, x, held, view, chosen, mode)[0]  # type: ignore[arg-type]

    x = jax.ShapeDtypeStruct((2, 3, cfg.hidden_size), jnp.bfloat16)
    listed = trace(cfg, Layout(), "prefill", sparse, mtp=False).layers[kind]
    sizes = Sizes(2, 3, pages)
    assert sum(gradient_flops(op, sizes) for op in listed.ops) == gradient_products(given, learnt, x)
    assert any(not differentiated(op) and op.flops(sizes) for op in listed.ops) == (kind.indexer == "full")


def flop(count: float) -> Price:
    return Price(count, "compute", "measured", 0.0)


class CountingBook:
    """Takes a second for every FLOP of a product, and no time for what is moved."""

    wide, wide_bytes = "bf16", 2.0

    def gemm(self, m: float, n: int, k: int, fmt: str) -> Price:
        return flop(2.0 * m * n * k)

    def bmm(self, m: float, heads: int, n: int, k: int) -> Price:
        return flop(2.0 * heads * m * n * k)

    def memory(self, moved_bytes: float, op: str = "any") -> Price:
        return flop(0.0)

    def named(self, key: str) -> None:
        """No kernel was measured on its own."""


@pytest.mark.parametrize(("model", "kind", "pages"), LAYERS)
def test_what_is_priced_are_those_products(
    model: str, kind: LayerType, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, backward, an attention kernel's scores again."""
    cfg = load_config(model)
    sizes, context = Sizes(2, 3, pages), float(pages * PAGE_SIZE)
    sparse = cfg.indexer is not None and context > cfg.indexer.topk
    listed = trace(cfg, Layout(), "prefill", sparse, mtp=False).layers[kind]
    weights = {weight.name: weight for weight in layer_weights(cfg, kind)}
    experts = load.balanced(cfg.moe.experts if cfg.moe else 1)
    prices = OpPrices(Context(cfg, Layout(), formats("bf16"), CountingBook(), experts, weights))  # type: ignore[arg-type]
    selected = min(context, float(cfg.indexer.topk)) if cfg.indexer else context
    seen = Attended(6.0, 2.0, context, selected)
    shares, kernels = {}, {}
    for op in listed.ops:
        if op.name.endswith("_attention"):
            qk, v = op.inputs[0].at(sizes)[-1], op.attributes.get("value_dim", op.outputs[0].at(sizes)[-1])
            shares[op.name], kernels[op.name] = qk / (qk + v), 2 * 6 * cfg.heads * (qk + v) * selected
    (name,) = kernels
    for kernel in ("mla_prefill", "sparse_prefill", "gqa"):
        monkeypatch.setattr(attention, kernel, lambda *_, **__: flop(kernels[name]))
    scored = sum(op.flops(sizes) for op in listed.ops if op.name == "glm.index_scores")
    monkeypatch.setattr(attention, "index_scores", lambda *_, **__: flop(scored))
    monkeypatch.setattr(attention, "select_topk", lambda *_, **__: flop(0.0))
    monkeypatch.setattr(backward, "BACKWARD_RATE", 1.0)
    # sequences of their own length have their keys expanded once a token, the trace's once a position of its pages
    again = [x.elements(sizes) for op in listed.ops if op.name == "glm.expanded_attention" for x in op.inputs[3:5]]
    unread = sum(2 * (2 * context - 6) * elements for elements in again)
    forward = sum(price.seconds for op in listed.ops if (price := prices.forward(op, seen)))
    back = sum(price.seconds for op in listed.ops if (price := prices.backward(op, seen)))
    assert forward == pytest.approx(listed.flops(sizes) - unread, rel=1e-9)
    wanted = sum(gradient_flops(op, sizes) for op in listed.ops) - 2 * unread + shares[name] * kernels[name]
    assert back == pytest.approx(wanted, rel=1e-9)


def test_the_heads_gradient_has_the_products_of_the_traced_one() -> None:
    cfg = load_config("glm-5")
    outer = abstract.abstract_weights(cfg, None)
    x = jax.ShapeDtypeStruct((2, 3, cfg.hidden_size), jnp.bfloat16)

    def head(outer: Any, x: Any) -> Any:
        return graph.head(cfg, outer, ops.rms_norm(x, outer["final_norm"], eps=cfg.norm_eps))

    listed = trace(cfg, Layout(), "prefill", mtp=False).head
    assert sum(gradient_flops(op, Sizes(2, 3, 1)) for op in listed.ops) == gradient_products(head, outer, x)


def test_what_is_frozen() -> None:
    """Indexers, and the routers' biases; nothing else."""
    cfg = load_config("glm-5")
    weights = [w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)] + list(outer_weights(cfg))
    frozen = {weight.name for weight in weights if not trained(weight)}
    assert frozen == {"router_bias", "index_q", "index_k", "index_k_norm", "index_k_bias", "index_w"}


@pytest.mark.parametrize("model", ["glm-5", "deepseek-v3", "glm-4.5-air"])
def test_a_step_takes_six_flops_a_weight_and_token(model: str) -> None:
    """Of the active ones, where sequences are so short that attention is next to nothing; more where they are not."""
    cfg = load_config(model)
    active = sum(size for part, size in parameter_counts(cfg)["active"].items() if part not in ("mtp", "indexer"))
    short, long = Sequences.equal(4, 128), Sequences.equal(4, 16384)
    assert training_flops(cfg, short) == pytest.approx(6 * active * short.tokens, rel=0.02)
    assert training_flops(cfg, long) > 6.6 * active * long.tokens
