"""Abstract traces: full-size models by layer type, with nothing allocated, and true to the graph."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from model import abstract, graph, ops
from model.abstract import StepShape, trace_ends, trace_layer, trace_mtp
from model.config import LayerType, ModelConfig
from model.hf_config import from_hf, load_config
from model.parallel import Parallel
from model.weights import Quantized, Weight, layer_weights, parameter_counts
from tests.model.oracle import CASES, compiled, on_device, random_weights
from tests.model.test_op_contract import composites

ROOT = Path(__file__).parents[2]
MODELS = ("glm-5", "glm-5.2", "deepseek-v3.2", "glm-4.5")
# 128K tokens of context: a chunk of a prefill, and a batch decoding.
PREFILL = StepShape(sequences=1, tokens=4096, context_pages=2048)
DECODE = StepShape(sequences=32, tokens=1, context_pages=2048)
FORMS = ((PREFILL, graph.Mode("expanded", "last")), (DECODE, graph.Mode("absorbed", "last")))


def trace_model(cfg: ModelConfig) -> dict[str, Any]:
    """Every layer type, the MTP layer and both ends, for prefill and decode."""
    traces: dict[str, Any] = {}
    for shape, mode in FORMS:
        for kind in cfg.layer_counts:
            trace = trace_mtp(cfg, shape, mode=mode) if kind.mtp else trace_layer(cfg, kind, shape, mode=mode)
            traces[f"{mode.attention} {kind.name}"] = trace
        for end in ("embed", "head"):
            traces[f"{mode.attention} {end}"] = trace_ends(cfg, end, shape)  # type: ignore[arg-type]
    return traces


SCRIPT = """
from pathlib import Path
from model.hf_config import load_config
from tests.model.test_trace import trace_model
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
traces = trace_model(load_config("glm-5"))
print(resident() - before, len(traces))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see resident memory")
def test_glm_5_is_traced_in_no_memory() -> None:
    """In a process of its own, as the first thing it does: no trace is warm, no memory already there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    grown, traces = map(float, run.stdout.split())
    assert traces == 2 * (3 + 2)
    assert grown < 200e6, "traces are small; the weights of one expert layer alone are 19 GB"


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_type_of_full_size_models(name: str) -> None:
    cfg = load_config(name)
    traces = trace_model(cfg)
    assert len(traces) == 2 * (len(cfg.layer_counts) + 2)
    for label, trace in traces.items():
        held = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in trace.jaxpr.invars)
        assert held > 1e6, label
        constants = sum(np.asarray(c).nbytes for c in trace.consts)
        assert constants < 1e4, "no weight may be a constant of the trace"


@pytest.mark.parametrize("name", MODELS)
def test_inputs_of_the_traces_are_the_weights(name: str) -> None:
    """Sizes of the named inputs, layer by layer, add up to the exact parameter count."""
    cfg = load_config(name)
    counts = parameter_counts(cfg)["total"]
    total = 0
    for kind, times in cfg.layer_counts.items():
        if not kind.mtp:
            total += times * weights_of(trace_layer(cfg, kind, DECODE))
    for weight in abstract.abstract_weights(cfg, None).values():
        total += math.prod(weight.shape)
    assert total == sum(size for part, size in counts.items() if part != "mtp")


def weights_of(trace: Any) -> int:
    names = trace.jaxpr.debug_info.arg_names
    assert len(names) == len(trace.jaxpr.invars)
    return sum(
        math.prod(v.aval.shape) for name, v in zip(names, trace.jaxpr.invars, strict=True) if name.startswith("w[")
    )


def ops_of(trace: Any) -> Counter[str]:
    return composites(jaxpr_as_fun(trace), *trace.in_avals)


def test_prefill_and_decode_differ_where_they_should() -> None:
    cfg = load_config("glm-5")
    kind = cfg.layers[-1]
    short = StepShape(sequences=1, tokens=512, context_pages=16)
    prefill = ops_of(trace_layer(cfg, kind, short, mode=graph.Mode("expanded")))
    decode = ops_of(trace_layer(cfg, kind, short, mode=graph.Mode("absorbed")))
    long = ops_of(trace_layer(cfg, kind, PREFILL, mode=graph.Mode("expanded")))
    assert prefill["glm.expanded_attention"] == decode["glm.latent_attention"] == long["glm.sparse_attention"] == 1
    assert long["glm.index_scores"] == long["glm.select_topk"] == 1
    assert not prefill["glm.index_scores"] and not decode["glm.index_scores"], "below index_topk nothing is scored"
    assert prefill["glm.cache_write"] == 2, "but the index keys are written"


def test_a_sharing_layer_takes_the_selection_and_scores_nothing() -> None:
    cfg = load_config("glm-5.2")
    shared = LayerType("mla", "shared", "moe")
    trace = trace_layer(cfg, shared, PREFILL)
    assert "selected" in trace.jaxpr.debug_info.arg_names
    used = ops_of(trace)
    assert used["glm.sparse_attention"] == 1 and not used["glm.select_topk"] and used["glm.cache_write"] == 1
    below = trace_layer(cfg, shared, StepShape(1, 16, context_pages=32))
    assert "selected" not in below.jaxpr.debug_info.arg_names


def test_a_trace_is_the_program_of_the_graph() -> None:
    """A tiny model run from its traces, layer by layer, gives what `graph.step` gives."""
    fields = {**CASES["glm_moe_dsa"].fields, "num_hidden_layers": 2, "indexer_types": ["full", "shared"]}
    cfg = from_hf({"model_type": "glm_moe_dsa", **fields, "index_topk": 4})
    shape, mode = StepShape(sequences=2, tokens=5, context_pages=2, page_size=4), graph.Mode("absorbed", "all")
    weights = on_device(random_weights(cfg))
    caches = [
        {name: jnp.zeros(s.shape, s.dtype) for name, s in abstract.abstract_cache(cfg, kind, 5, 4, jnp.float32).items()}
        for kind in cfg.layers
    ]
    batch = graph.Batch(
        jnp.asarray([[5, 9, 2, 7, 1], [3, 3, 8, 0, 0]], jnp.int32),
        jnp.zeros(2, jnp.int32),
        jnp.asarray([5, 3], jnp.int32),
        jnp.asarray([[1, 2], [4, 3]], jnp.int32),
    )
    expected = compiled(cfg, mode)(weights, caches, batch).logits
    view = graph.view_of(batch, 4)
    x = call(trace_ends(cfg, "embed", shape, jnp.float32), weights["outer"], batch.tokens)[0]
    selected = None
    for kind, w, cache in zip(cfg.layers, weights["layers"], caches, strict=True):
        given = None if kind.indexer == "full" else selected
        x, *_, selected = call(trace_layer(cfg, kind, shape, jnp.float32, mode), w, x, cache, view, given)
    logits = call(trace_ends(cfg, "head", shape, jnp.float32), weights["outer"], x)[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def call(trace: Any, *args: Any) -> list[Any]:
    flat = jax.tree.leaves(args)
    assert [(x.shape, x.dtype) for x in flat] == [(v.shape, v.dtype) for v in trace.in_avals]
    return jax.jit(jaxpr_as_fun(trace))(*flat)


def test_weights_kept_in_fp8() -> None:
    cfg = load_config("glm-5-fp8")
    kind = cfg.layers[-1]
    weights = abstract.abstract_weights(cfg, kind, keep_fp8=True)
    kept = {name for name, weight in weights.items() if isinstance(weight, Quantized)}
    assert {"q_a", "o", "experts_gate_up", "experts_down", "shared_down", "index_q"} <= kept
    assert not {"router", "index_w", "k_up", "v_up", "input_norm"} & kept
    gate_up = weights["experts_gate_up"]
    assert gate_up.values.shape == (256, 6144, 2, 2048) and gate_up.scale.shape == (256, 48, 2, 16)
    trace = trace_layer(cfg, kind, DECODE, weights=weights)
    assert ops_of(trace) == ops_of(trace_layer(cfg, kind, DECODE))


def test_the_program_of_one_device_of_many() -> None:
    """Heads and feed-forward split over 8, experts over 8 x 4: local shapes in, collectives inside."""
    cfg = load_config("glm-5")
    kind = cfg.layers[-1]

    def local(weight: Weight) -> tuple[int, ...]:
        split = {"heads": 8, "vocab": 8, "expert": 32, "ffn": 1 if weight.expert_count else 8}
        return tuple(n // split.get(axis or "", 1) for n, axis in zip(weight.shape, weight.axes, strict=True))

    weights = abstract.abstract_weights(cfg, kind, local=local)
    assert weights["experts_down"].shape == (8, 2048, 6144)
    par = Parallel(tp="tp", dp="dp", moe="expert")
    trace = trace_layer(cfg, kind, DECODE, weights=weights, par=par, axes={"tp": 8, "dp": 4})
    assert trace.out_avals[0].shape == (32, 1, 6144)
    text = str(trace.jaxpr)
    assert "psum" in text and "all_gather" in text and "reduce_scatter" in text
    assert ops_of(trace_layer(cfg, kind, DECODE))["glm.expert_ffn"] == 1


def test_mtp_is_traced_by_its_own_function() -> None:
    cfg = load_config("glm-5")
    with pytest.raises(ValueError, match="trace_mtp"):
        trace_layer(cfg, cfg.mtp_type, DECODE)
    trace = trace_mtp(cfg, DECODE)
    assert trace.out_avals[0].shape == (32, 154880)
    assert weights_of(trace) == sum(weight.size for weight in layer_weights(cfg, cfg.mtp_type))


def test_every_op_of_every_trace_is_registered() -> None:
    """Work outside the ops is layout and residuals only: no product, no exponential, no sort."""
    for name in MODELS:
        for label, trace in trace_model(load_config(name)).items():
            assert set(ops_of(trace)) <= set(ops.OPS), label
            loose = primitives_outside_ops(trace.jaxpr)
            assert not loose & {"dot_general", "exp", "sort", "top_k", "scatter", "logistic", "cos"}, (label, loose)


def primitives_outside_ops(jaxpr: Any) -> set[str]:
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        nested = eqn.params["jaxpr"].jaxpr if eqn.primitive.name in ("jit", "pjit") else None
        found |= primitives_outside_ops(nested) if nested else {eqn.primitive.name}
    return found
