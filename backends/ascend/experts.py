"""Routing and the routed experts as torch_npu's operators. See `target.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ascend import constraints
from backends.ascend.check import type_name
from backends.ascend.declare import SCALAR_TYPES
from backends.ascend.dense import as_matrix, quantised_rows
from backends.ascend.target import KernelMatrix, NotTaken, NpuTarget, accept, require
from backends.errors import Unsupported
from backends.toolchains.narrow import rounds_activations
from backends.toolchains.walker import OpCall
from model.formats import INT4, matrix_format
from model.formats import INT8 as INT8_VALUES
from model.ops import FORMAT

# enumerations of the operators' documentation
_SIGMOID, _BEST_TWO, _COUNTS, _GATHER, _PLAIN, _ONE_OUTPUT, _ROWS, _BY_TOKEN = 1, 1, 1, 0, -1, 3, 0, 2
_ROUNDED = 2  # quant_mode: int8, a scale a row
EP_GROUP = "ep"  # stands where the name of the experts' group goes


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
    x, experts, weights, *_ = call.operands
    if call.attributes.get("across"):
        try:
            return [_across_devices(t, call)]
        except NotTaken as reason:  # what the body does between devices is no graph's
            raise Unsupported(f"{reason}; export with --npu-ops local") from None
    gate_up, down = _weights(t, call)
    tokens, choices, count = x.shape[0], experts.shape[1], gate_up.matrix.shape[0]
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
    out = _ffn(t, _Rows(rows), gate_up, down, groups)
    return [_combined(t, out, places, groups, weights)]


def _across_devices(t: NpuTarget, call: OpCall[Any]) -> Tensor:
    """Each token's row to the devices of its experts, their grouped products there, and the weighted sum back here.

    Where products round rows to int8 they are sent as that. `run.py` puts in the group's name and the device's rank.
    """
    x, experts, weights, *_ = call.operands
    gate_up, down = _weights(t, call)
    ranks = math.prod(size for _, size in call.attributes["across"])
    count = gate_up.matrix.shape[0]
    accept(constraints.moe_distribute(constraints.Sent(x.shape[0], x.shape[1], experts.shape[1], count, ranks)))
    require(t.options.takes(x), f"npu_moe_distribute_dispatch_v2 takes no {type_name(x)}")
    group = (EP_GROUP, ranks, 0, count * ranks)
    rows, scales, places, groups, received, *_ = t.npu(
        "npu_moe_distribute_dispatch_v2",
        x,
        experts,
        *group,
        quant_mode=_ROUNDED if gate_up.rounds else 0,
        expert_token_nums_type=_COUNTS,
    )
    sent = _Rows(rows, x.dtype, scales) if gate_up.rounds else _Rows(rows)
    out = _ffn(t, sent, gate_up, down, groups)
    return t.npu("npu_moe_distribute_combine_v2", out, experts, places, received, weights.to(torch.float32), *group)


def _weights(t: NpuTarget, call: OpCall[Any]) -> tuple[_Weight, _Weight]:
    """The matrices of a call. Raises `NotTaken`."""
    x, _, _, *matrices = call.operands
    fmt = call.attributes.get(FORMAT, "")
    require(len(matrices) == (4 if fmt else 2), "npu_grouped_matmul takes no FP8 blocks")
    require(fmt == "" or t.options.takes(x), f"npu_dynamic_quant takes no {type_name(x)}")
    half = len(matrices) // 2
    gate_up, down = (_Weight.of(*each, fmt=fmt) for each in (matrices[:half], matrices[half:]))
    count, _, columns = gate_up.matrix.shape
    require(count > 1, "npu_grouped_matmul takes no single group")
    require(
        bool(fmt) or gate_up.matrix.dtype == down.matrix.dtype == x.dtype,
        f"npu_grouped_matmul takes weights in {type_name(x)}",
    )
    four_bits = gate_up.matrix.dtype == torch.int32
    needs = "int8 rows times int4" if four_bits and gate_up.rounds else ""
    if four_bits and not gate_up.rounds and gate_up.scale is not None and gate_up.scale.shape[1] > 1:
        needs = "int4 in groups"
    accept(constraints.grouped_matmul(columns, x.shape[1], needs=needs, series=t.options.series))
    return gate_up, down


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows [n, i] of a grouped product, in int8 with the type of what they were and their `scale` [n] float32."""

    values: Tensor
    wide: torch.dtype | None = None
    scale: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Matrices [e, i, o] of a grouped product, o / 8 where eight 4-bit integers are in an int32; scale [e, groups, o];
    `bias` [e, o] where the kernel wants one."""

    matrix: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    rounds: bool = False

    @classmethod
    def of(cls, values: Any, scale: Tensor | None = None, fmt: str = "") -> _Weight:
        matrix = as_matrix(values, 2)
        if scale is None:
            return cls(matrix)
        found = matrix_format(fmt)
        require(found.values in (INT8_VALUES, INT4), f"npu_grouped_matmul is not mapped for {fmt}")
        bias = values.bias if isinstance(values, KernelMatrix) else None
        scale = scale.reshape(*scale.shape[:2], -1)
        require(not rounds_activations(found) or scale.shape[1] == 1, f"npu_grouped_matmul is not mapped for {fmt}")
        return cls(matrix, scale, bias, rounds_activations(found))


def _ffn(t: NpuTarget, x: _Rows, gate_up: _Weight, down: _Weight, groups: Tensor) -> Tensor:
    """Two grouped products and the activation between them, of rows sorted by group: [n, d]."""
    hidden = _grouped(t, x, gate_up, groups)
    return _grouped(t, _Rows(t.npu("npu_swiglu", hidden, -1)), down, groups)


def _grouped(t: NpuTarget, x: _Rows, weight: _Weight, groups: Tensor) -> Tensor:
    """x [n, i] sorted by group times a weight: [n, o]."""
    given: dict[str, Any] = {}
    rows, scale, four_bits = x.values, weight.scale, weight.matrix.dtype == torch.int32
    wide = x.wide or rows.dtype
    if scale is not None and weight.rounds:
        rows, row_scale = (rows, x.scale) if x.scale is not None else quantised_rows(t, rows)
        given = {"per_token_scale": [row_scale], "output_dtype": SCALAR_TYPES[wide]}
        if four_bits:  # the bits of a float32 in an int64
            require(weight.bias is not None, "npu_grouped_matmul wants the sums of 4-bit weights")
            given |= {"scale": [scale.to(torch.float32).view(torch.int32).to(torch.int64)], "bias": [weight.bias]}
        else:
            given["scale"] = [scale[:, 0].to(wide if wide == torch.bfloat16 else torch.float32)]
    elif scale is not None:
        narrow = scale.to(wide) if four_bits else scale[:, 0].to(wide)
        given = {"antiquant_scale": [narrow], "antiquant_offset": [torch.zeros(narrow.shape, dtype=narrow.dtype)]}
    return t.npu(
        "npu_grouped_matmul",
        [rows],
        [weight.matrix],
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
