"""Floating-point operations that a training step needs, each product once whatever its layout: for shares of a peak."""

from __future__ import annotations

from model.config import ModelConfig
from model.split import Layout
from runtime.pricing.oplist import Sizes, TracedOp
from runtime.pricing.pricer import main_kinds
from runtime.pricing.training.backward import differentiated
from runtime.pricing.training.passes import MicroBatch, layer_ops, programs
from runtime.pricing.training.sequences import Attended, Sequences


def forward_flops(op: TracedOp, seen: Attended) -> float:
    """Of the products of one op of a one-device program: `TracedOp.flops`, but that attention reads what a causal mask
    leaves, and keys are expanded once a token."""
    one = Sizes(1, 1, 1)
    if op.name == "glm.expanded_attention":
        (_, _, heads, qk), v = op.inputs[0].at(one), op.outputs[0].at(one)[-1]
        expand = sum(x.elements(one) for x in op.inputs[3:5])
        return 2.0 * seen.tokens * (expand + heads * seen.keys * (qk + v))
    if op.name == "glm.sparse_attention":
        _, _, heads, qk = op.inputs[0].at(one)
        return 2.0 * seen.tokens * heads * seen.selected * (qk + op.attributes["value_dim"])
    if op.name == "glm.paged_attention":
        _, _, heads, width = op.inputs[0].at(one)
        return 4.0 * seen.tokens * heads * seen.keys * width
    if op.name == "glm.index_scores":
        _, _, heads, width = op.inputs[0].at(one)
        return 2.0 * seen.tokens * seen.keys * heads * (width + 1)
    return seen.tokens * float(op.flops(one))


def training_flops(cfg: ModelConfig, sequences: Sequences) -> float:
    """Of all devices: forward, and twice that for gradients where there are any; nothing computed again.

    About 6 x active parameters x tokens where attention is short.
    """
    whole, batch = programs(cfg, Layout()), MicroBatch(*sequences.attended(cfg))
    counted = [(op, seen, n) for kind, n in main_kinds(cfg) for op, seen in layer_ops(whole, kind, batch)]
    counted += [(op, batch.all, 1) for op in whole.head.ops]
    return sum(n * (3 if differentiated(op) else 1) * forward_flops(op, seen) for op, seen, n in counted)
