"""Routing and the routed experts as CANN operators. See `lowerings.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from backends.ascend import constraints
from backends.ascend.catalog import cann_operators
from backends.ascend.lowerings import CannLowerings, Declined, accept, require
from backends.ascend.lowerings_dense import GE_TYPES, int8_inputs, quantise_rows
from backends.toolchains.onnx_target import OnnxTarget, Ref
from backends.toolchains.walker import OpCall

_SIGMOID, _BEST_TWO, _COUNTS, _GATHER, _PLAIN = 1, 1, 1, 0, -1  # enumerations of the operators' READMEs


def route(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    """Logits by a float32 MatMul, as the decomposition has them; choice and weights by MoeGatingTopK."""
    x, router, bias = call.operands
    a = call.attributes
    operator = lower.operator("MoeGatingTopK", "float32")
    tokens, experts = x.shape[0], router.shape[1]
    require(bool(a["normalise"]), "MoeGatingTopK normalises sigmoid weights, this model does not")
    accept(constraints.moe_gating_top_k(experts, a["n_group"]))
    wide = t.whole(t.cast(x, "float32")), t.whole(t.cast(router, "float32"))
    logits = t.node("MatMul", *wide, shape=(tokens, experts), dtype="float32")
    attributes = {
        "k": int(a["top_k"]),
        "k_group": int(a["topk_group"]),
        "group_count": int(a["n_group"]),
        "group_select_mode": _BEST_TWO,
        "renorm": 0,
        "norm_type": _SIGMOID,
        "out_flag": 0,
        "routed_scaling_factor": float(a["scale"]),
        "eps": 1e-20,
    }
    chosen = (tokens, int(a["top_k"]))
    results = [(chosen, "float32"), (chosen, "int32"), ((tokens, experts), "float32")]
    given = {"x": logits, "bias": t.cast(bias, "float32")}
    weights, indices, _ = lower.emit(t, operator, given, results, **attributes)
    return [indices, weights]


def expert_ffn(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    """Tokens sorted by expert, two grouped products, and the sum back in the tokens' order.

    An expert id of `count` or more lives elsewhere: all such become `count`, outside the active range, whose rows
    MoeInitRoutingV3 numbers -1.
    """
    x, experts, weights, *matrices = call.operands
    require(len(matrices) == 2, "GroupedMatmul takes no FP8 blocks")
    gate_up, down = matrices
    sort = lower.operator("MoeInitRoutingV3", x.dtype)
    lower.operator("GroupedMatmul", x.dtype)
    (tokens, width), (_, choices) = x.shape, experts.shape
    count, f = gate_up.shape[0], gate_up.shape[3]
    accept(constraints.grouped_matmul(2 * f, width))
    slots = tokens * choices
    ceiling = t.constant(np.full((1, 1), count, np.int32))
    ids = t.elementwise("Min", experts, Ref(ceiling.name, experts.shape, "int32", ceiling.held), dtype="int32")
    results = [((slots, width), x.dtype), ((slots,), "int32"), ((count,), "int64"), ((slots,), "float32")]
    attributes = {
        "active_num": slots,
        "expert_capacity": -1,
        "expert_num": count + 1,
        "drop_pad_mode": 0,
        "expert_tokens_num_type": _COUNTS,
        "expert_tokens_num_flag": 1,
        "quant_mode": _PLAIN,
        "active_expert_range": [0, count],
        "row_idx_type": _GATHER,
    }
    rows, places, group_list, _ = lower.emit(t, sort, {"x": x, "expert_idx": ids}, results, **attributes)
    hidden = _grouped(lower, t, rows, gate_up, (width, 2 * f), (2, f), group_list)
    out = _grouped(lower, t, _swiglu(t, hidden, f), down, (f, width), (width,), group_list)
    return [_combine(t, out, places, weights, (tokens, choices, width))]


def _grouped(
    lower: CannLowerings,
    t: OnnxTarget,
    x: Ref,
    weight: Ref,
    matrix: tuple[int, int],
    outputs: Sequence[int],
    groups: Ref,
) -> Ref:
    """x [n, i] sorted by group times weight [e, i, ..]: [n, o]."""
    operator = cann_operators()["GroupedMatmul"]
    count, shape = weight.shape[0], (x.shape[0], matrix[1])
    attributes = {
        "split_item": 3,  # one tensor in, one out
        "dtype": GE_TYPES[x.dtype],
        "transpose_weight": 0,
        "transpose_x": 0,
        "group_type": 0,  # rows are grouped
        "group_list_type": _COUNTS,
        "act_type": 0,
    }
    if weight.name in lower.options.int8:
        values, scale = int8_inputs(t, weight, (count, *outputs))
        rows, row_scale = quantise_rows(lower, t, x)
        given = {
            "x": rows,
            "weight": t.reshape(values, (count, *matrix)),
            "scale": t.cast(t.reshape(scale, (count, matrix[1])), x.dtype if x.dtype == "bfloat16" else "float32"),
            "group_list": groups,
            "per_token_scale": row_scale,
        }
    else:
        if weight.dtype != x.dtype:
            raise Declined(f"GroupedMatmul takes weights in {x.dtype}, not {weight.dtype}")
        given = {"x": x, "weight": t.reshape(weight, (count, *matrix)), "group_list": groups}
    return lower.emit(t, operator, given, [(shape, x.dtype)], **attributes)[0]


def _swiglu(t: OnnxTarget, hidden: Ref, f: int) -> Ref:
    """[n, 2f] -> silu(first half) * second half."""
    shape = (hidden.shape[0], f)
    gate, up = t.nodes("Split", hidden, results=[(shape, hidden.dtype)] * 2, axis=1, num_outputs=2)
    return t.elementwise("Mul", t.elementwise("Mul", gate, t.elementwise("Sigmoid", gate)), up)


def _combine(t: OnnxTarget, rows: Ref, places: Ref, weights: Ref, dims: tuple[int, int, int]) -> Ref:
    """Each token's rows times their weights, summed in float32; places of -1 count as nothing, whatever is there."""
    tokens, choices, width = dims
    zero = t.constant(np.zeros(places.shape, np.int32))
    own = t.node("Gather", rows, t.elementwise("Max", places, zero), shape=(math.prod(dims[:2]), width),
                 dtype=rows.dtype, axis=0)  # fmt: skip
    own = t.cast(t.reshape(own, dims), "float32")
    here = t.reshape(t.elementwise("GreaterOrEqual", places, zero, dtype="bool"), (tokens, choices, 1))
    nothing = t.constant(np.zeros((1, 1, 1), np.float32))
    kept = t.elementwise("Where", here, own, nothing, dtype="float32")
    share = t.reshape(t.cast(weights, "float32"), (tokens, choices, 1))
    total = t.node(
        "ReduceSum", t.elementwise("Mul", kept, share), t.ints([1]), shape=(tokens, width), dtype="float32", keepdims=0
    )
    return t.cast(total, rows.dtype)
