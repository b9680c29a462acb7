"""Op lists: equal to a fresh trace at any size, complete in prices and FLOP rules, and true to the weights."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import LayerType, ModelConfig
from model.hf_config import load_config, preset_names
from model.split import Layout
from model.weights import Weight, layer_weights, outer_weights
from runtime.pricing import Chip, PriceError, load, open_book
from runtime.pricing.oplist import FLOPS, OpList, Sizes, TensorUse, TracedOp
from runtime.pricing.pricer import GraphPricer, OpLists
from runtime.pricing.prices import FUSED, PRICERS, Context, price
from runtime.pricing.trace import PAGE_SIZE, Traced, _flatten, _Tracer, trace
from tests.cost.chips import CHIPS
from tests.marks import slow_but
from tests.plans import formats

MODELS = ("glm-5", "glm-5.2", "deepseek-v3", "deepseek-v3.2", "glm-4.5", "glm-4.7-flash", "kimi-k2")
LAYOUTS = (Layout(), Layout(tp=4), Layout(tp=2, dp=2), Layout(tp=4, dp=2, ep=8),
           Layout(tp=8, ep=4), Layout(tp=2, dp=4, ep=2))  # fmt: skip
NO_PRODUCT = {"glm.embed", "glm.rms_norm", "glm.layer_norm", "glm.bias", "glm.swiglu", "glm.rope", "glm.cache_write",
              "glm.select_topk"}  # fmt: skip
"""Ops of the contract that multiply no matrices."""


@cache
def traced(model: str, layout: Layout, phase: Any, sparse: bool) -> Traced:
    return trace(load_config(model), layout, phase, sparse)


def programs(found: Traced) -> dict[str, OpList]:
    named = {kind.name: program for kind, program in found.layers.items()}
    named |= {"embed": found.embed, "head": found.head}
    return named | ({"mtp": found.mtp} if found.mtp else {})


def fresh(found: Traced, name: str, sizes: Sizes) -> list[TracedOp]:
    """The ops of a new trace at `sizes`, with numbers for dimensions."""
    tracer = _Tracer(found.cfg, found.layout, found.phase, found.sparse)
    if name in ("embed", "head"):
        at = tracer.end(name)  # type: ignore[arg-type]
    elif name == "mtp":
        at = tracer.mtp
    else:
        at = tracer.layer(next(kind for kind in found.layers if kind.name == name))
    return list(_flatten(at(sizes)))


def described(op: TracedOp) -> tuple[Any, ...]:
    tensors = (*op.inputs, *op.outputs)
    return op.name, op.stage, op.axes, dict(op.attributes), [(x.element_bytes, x.weight) for x in tensors]


@settings(max_examples=3)
@given(
    model=st.sampled_from(MODELS),
    layout=st.sampled_from(LAYOUTS),
    phase=st.sampled_from(("prefill", "decode")),
    sparse=st.booleans(),
    b=st.integers(2, 200),
    t=st.integers(2, 3000),
    p=st.integers(1, 400),
)
def test_the_list_equals_a_fresh_trace(
    model: str, layout: Layout, phase: str, sparse: bool, b: int, t: int, p: int
) -> None:
    """Shapes, types, attributes, collectives, FLOPs and bytes, at sizes that were never fitted."""
    cfg = load_config(model)
    limit = cfg.indexer.topk // PAGE_SIZE if cfg.indexer else 0
    if cfg.indexer:
        p = p + limit + 1 if sparse else 1 + p % limit
    sizes = Sizes(b, 1 if phase == "decode" else t, p)
    found = traced(model, layout, phase, sparse and cfg.indexer is not None)
    for name, program in programs(found).items():
        ops = fresh(found, name, sizes)
        assert len(ops) == len(program.ops), name
        for op, new in zip(program.ops, ops, strict=True):
            ins, outs = [list(x.shape) for x in new.inputs], [list(x.shape) for x in new.outputs]
            assert described(op) == described(new)
            assert [list(x.at(sizes)) for x in op.inputs] == ins, (name, op.name)
            assert [list(x.at(sizes)) for x in op.outputs] == outs, (name, op.name)
            count = FLOPS.get(op.name)
            assert op.flops(sizes) == (count(new, *([tuple(s) for s in side] for side in (ins, outs))) if count else 0)
            held = sum(math.prod(x.shape) * x.element_bytes for x in (*new.inputs, *new.outputs))
            assert op.moved_bytes(sizes) == held


# One preset for each graph; the others differ in numbers only.
GRAPHS = {
    (cfg.model_type, type(cfg.attention), *cfg.layer_counts): name
    for name, cfg in ((name, load_config(name)) for name in preset_names())
}.values()


@pytest.mark.parametrize(
    "model",
    [name if name in GRAPHS else pytest.param(name, marks=pytest.mark.slow) for name in preset_names()],
)
def test_every_op_of_every_model_has_a_price_and_a_flop_rule(model: str) -> None:
    cfg = load_config(model)
    seen: set[str] = set()
    for phase, sparse in (("prefill", False), ("decode", False), ("prefill", True), ("decode", True)):
        if sparse and not cfg.indexer:
            continue
        tracer = _Tracer(cfg, Layout(tp=2, dp=2, ep=4), phase, sparse)  # type: ignore[arg-type]
        size, *_ = tracer.points()
        made = [tracer.layer(kind) for kind in cfg.layer_counts if not kind.mtp] + [
            tracer.end("embed"),
            tracer.end("head"),
        ]
        for at in made + ([tracer.mtp] if cfg.mtp_layers else []):
            seen |= {op.name for op in _flatten(at(size)) if not op.axes}
    contract = {name for name in seen if name.startswith("glm.")}
    assert contract <= set(PRICERS)
    assert contract - NO_PRODUCT <= set(FLOPS) and not contract & NO_PRODUCT & set(FLOPS)
    assert seen - contract <= FUSED | {"add"}


def context(model: str) -> Context:
    cfg = load_config(model)
    weights = {w.name: w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)}
    return Context(cfg, Layout(), formats("fp8"), open_book(CHIPS["h200-sxm"]), load.uniform(256), weights)


@pytest.mark.parametrize("name", ["glm.warp_drive", "dot_general", "sort", "while"])
def test_an_op_that_nobody_priced_is_an_error(name: str) -> None:
    with pytest.raises(PriceError, match=f"{name} .* has no price"):
        price(TracedOp(name, "", (), ()), Sizes(1, 1, 1), context("glm-5"))


def test_a_graph_with_an_unknown_op_cannot_be_priced() -> None:
    cfg, found = load_config("glm-5"), traced("glm-5", Layout(), "decode", False)
    kind, program = next(iter(found.layers.items()))
    strange = dataclasses.replace(program, ops=(*program.ops, TracedOp("glm.warp_drive", "", (), ())))
    lists = OpLists({**found.layers, kind: strange}, found.embed, found.head, found.mtp)
    with pytest.raises(PriceError, match=r"glm\.warp_drive"):
        GraphPricer(cfg, Layout(), formats("fp8"), lists, open_book(CHIPS["h200-sxm"]), load.uniform(256))


def test_a_chip_without_a_link_cannot_price_a_collective() -> None:
    cfg, found = load_config("glm-5"), traced("glm-5", Layout(tp=2), "decode", False)
    lists = OpLists(found.layers, found.embed, found.head, found.mtp)
    alone = Chip("lonely", {"bf16": 1e14, "fp8": 2e14}, 1e12)
    with pytest.raises(PriceError, match="link.scale_up"):
        GraphPricer(cfg, Layout(tp=2), formats("fp8"), lists, open_book(alone), load.uniform(256))


def matrices(cfg: ModelConfig, kind: LayerType) -> list[Weight]:
    return [w for w in layer_weights(cfg, kind) if len(w.shape) > 1]


@pytest.mark.parametrize("model", MODELS)
def test_flops_outside_attention_are_two_a_weight_and_token(model: str) -> None:
    """From the list of weights, which knows nothing of the op lists: each matrix once, each routed one top-k times."""
    cfg = load_config(model)
    found = traced(model, Layout(), "decode", cfg.indexer is not None)
    sizes = Sizes(5, 1, 40)
    for kind, program in found.layers.items():
        counted = sum(op.flops(sizes) for op in program.ops if op.weights)
        expected = sum(
            w.size * (cfg.moe.top_k / w.expert_count if w.expert_count and cfg.moe else 1) for w in matrices(cfg, kind)
        )
        assert counted == 2 * 5 * expected, kind.name
    head = next(w for w in outer_weights(cfg) if w.name == "head")
    assert found.head.flops(sizes) == 2 * 5 * head.size


def test_attention_flops_of_glm_5_by_hand() -> None:
    """A decode step of 3 sequences: scores and values over 2,048 chosen rows, index scores over all 12,800."""
    found = traced("glm-5", Layout(tp=8), "decode", True)
    (kind,) = [kind for kind in found.layers if kind.ffn == "moe"]
    flops = {op.name: op.flops(Sizes(3, 1, 200)) for op in found.layers[kind].ops if op.name in FLOPS}
    assert flops["glm.sparse_attention"] == 2 * 3 * (64 // 8) * 2048 * (576 + 512)
    assert flops["glm.index_scores"] == 2 * 3 * 12800 * 32 * 129


@settings(max_examples=4)
@given(model=st.sampled_from(MODELS), layout=st.sampled_from([layout for layout in LAYOUTS if layout.devices > 1]))
def test_collectives_of_a_layer(model: str, layout: Layout) -> None:
    """tp completes two sums a layer; dp gathers tokens in front of the experts and scatters them behind."""
    cfg, sizes = load_config(model), Sizes(6, 1, 1)
    for kind, program in traced(model, layout, "decode", False).layers.items():
        moved = [(op.name, op.axes, max(x.elements(sizes) for x in (*op.inputs, *op.outputs)))
                 for op in program.collectives()]  # fmt: skip
        size = 6 * cfg.hidden_size
        sums = [("psum", ("tp",), size)] * 2 if layout.tp > 1 else []
        tokens = [m for m in moved if m[1] == ("dp",) and m[2] == size * layout.dp]
        assert [m for m in moved if m[1] == ("tp",)] == sums
        assert len(tokens) == (2 if layout.dp > 1 and kind.ffn == "moe" else 0)
        assert all(axes in (("tp",), ("dp",)) for _, axes, _ in moved)


@pytest.mark.parametrize("model", slow_but(["glm-5", "glm-4.5", "deepseek-v3"], MODELS))
def test_a_trace_names_every_weight_once(model: str) -> None:
    cfg = load_config(model)
    layout = Layout(tp=2, dp=2, ep=4)
    found = traced(model, layout, "decode", cfg.indexer is not None)
    for kind, program in found.layers.items():
        named: dict[str, TensorUse] = {x.weight: x for op in program.ops for x in op.inputs if x.weight}
        held = {w.name: layout.local_shape(w) for w in layer_weights(cfg, kind)}
        assert {name: x.at(Sizes(1, 1, 1)) for name, x in named.items()} == held
