"""Routing and the routed experts as torch_npu's operators. See `target.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ascend import constraints
from backends.ascend.check import type_name
from backends.ascend.declare import SCALAR_TYPES
from backends.ascend.dense import INT8, as_matrix, quantised_rows
from backends.ascend.target import NpuTarget, accept, require
from backends.toolchains.walker import OpCall
from model.ops import FORMAT

# enumerations of the operators' documentation
_SIGMOID, _BEST_TWO, _COUNTS, _GATHER, _PLAIN, _ONE_OUTPUT, _ROWS, _BY_TOKEN = 1, 1, 1, 0, -1, 3, 0, 2


def route(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Logits by a float32 product, as the decomposition has them; choice and weights by npu_moe_gating_top_k."""
    x, router, bias = call.operands
    a = call.attributes
    require(bool(a["normalise"]), "npu_moe_gating_top_k normalises sigmoid weights, this model does not")
    accept(constraints.moe_gating_top_k(router.shape[1], a["n_group"]))
    weights, experts, _ = t.npu(
        "npu_moe_gating_top_k",
        torch.matmul(x.to(torch.float32), router.to(torch.float32)),
        int(a["top_k"]),
        bias=bias.to(torch.float32),
        k_group=int(a["topk_group"]),
        group_count=int(a["n_group"]),
        group_select_mode=_BEST_TWO,
        renorm=0,
        norm_type=_SIGMOID,
        out_flag=False,
        routed_scaling_factor=float(a["scale"]),
        eps=1e-20,
    )
    return [experts, weights]


def expert_ffn(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Tokens sorted by expert, two grouped products, and the sum back in the tokens' order.

    An expert id of `count` or more lives elsewhere: all such become `count`, outside the active range, whose rows
    npu_moe_init_routing_v2 numbers -1 and leaves as they are, whatever is there.
    """
    x, experts, weights, *matrices = call.operands
    fmt = call.attributes.get(FORMAT, "")
    require(fmt in ("", INT8), f"npu_grouped_matmul is not mapped for {fmt}")
    require(len(matrices) == (4 if fmt else 2), "npu_grouped_matmul takes no FP8 blocks")
    require(fmt == "" or t.options.takes(x), f"npu_dynamic_quant takes no {type_name(x)}")
    half = len(matrices) // 2
    (gate_up, *gate_up_scale), (down, *down_scale) = matrices[:half], matrices[half:]
    (tokens, width), choices = x.shape, experts.shape[1]
    gate_up, down = as_matrix(gate_up, 2), as_matrix(down, 2)
    count, _, columns = gate_up.shape
    require(count > 1, "npu_grouped_matmul takes no single group")
    require(bool(fmt) or gate_up.dtype == down.dtype == x.dtype, f"npu_grouped_matmul takes weights in {type_name(x)}")
    accept(constraints.grouped_matmul(columns, width))
    rows, places, groups, _ = t.npu(
        "npu_moe_init_routing_v2",
        x,
        experts.clamp(max=count),
        active_num=tokens * choices,
        expert_capacity=-1,
        expert_num=count + 1,
        drop_pad_mode=0,
        expert_tokens_num_type=_COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=_PLAIN,
        active_expert_range=[0, count],
        row_idx_type=_GATHER,
    )
    hidden = _grouped(t, rows, gate_up, gate_up_scale, groups)
    out = _grouped(t, t.npu("npu_swiglu", hidden, -1), down, down_scale, groups)
    return [_combined(t, out, places, groups, weights)]


def _grouped(t: NpuTarget, x: Tensor, weight: Tensor, scale: Sequence[Tensor], groups: Tensor) -> Tensor:
    """x [n, i] sorted by group times weight [e, i, o]: [n, o]. scale: none, or [e, ..] of int8 weights."""
    given: dict[str, Any] = {}
    rows = x
    if scale:
        rows, row_scale = quantised_rows(t, x)
        of_weights = scale[0].reshape(weight.shape[0], weight.shape[2])
        of_weights = of_weights.to(x.dtype if x.dtype == torch.bfloat16 else torch.float32)
        given = {"scale": [of_weights], "per_token_scale": [row_scale], "output_dtype": SCALAR_TYPES[x.dtype]}
    return t.npu(
        "npu_grouped_matmul",
        [rows],
        [weight],
        group_list=groups,
        split_item=_ONE_OUTPUT,
        group_type=_ROWS,
        group_list_type=_COUNTS,
        **given,
    )[0]


def _combined(t: NpuTarget, out: Tensor, places: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Each token's rows times their weights. A place of -1 becomes row 0 with weight 0; rows of no group are cleared
    first, for what is there need not be a number."""
    here = places >= 0
    own = torch.arange(out.shape[0]) < groups.sum()
    cleared = torch.where(own[:, None], out, torch.zeros((), dtype=out.dtype))
    scales = torch.where(here.reshape(weights.shape), weights, torch.zeros((), dtype=weights.dtype)).to(out.dtype)
    return t.npu(
        "npu_moe_finalize_routing",
        cleared,
        None,
        None,
        None,
        scales,
        places.clamp(min=0),
        None,
        drop_pad_mode=_BY_TOKEN,
    )
