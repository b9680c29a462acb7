"""Norms, activations and quantised products as torch_npu's operators. See `target.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ascend import constraints
from backends.ascend.check import type_name
from backends.ascend.declare import SCALAR_TYPES
from backends.ascend.target import KernelMatrix, NpuTarget, RoundedRows, accept, require
from backends.emulation.rounding import LARGEST, LEAST
from backends.toolchains.narrow import rounds_activations
from backends.toolchains.walker import OpCall
from model.formats import INT4, matrix_format
from model.formats import INT8 as INT8_VALUES
from model.ops import FORMAT

INT8 = "w8a8-int8"


def rms_norm(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    x, weight = call.operands
    return [t.npu("npu_rms_norm", x, weight.to(x.dtype), float(call.attributes["eps"]))[0]]


def swiglu(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    gate_up = call.operands[0]
    return [t.npu("npu_swiglu", gate_up.reshape(*gate_up.shape[:-2], -1), -1)]


def rope(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Neighbours rotated, and put out as two halves, as the op has them. Cosines and sines are found in float32 and
    then in x's type, which is what the operator takes (and what transformers multiplies with)."""
    x, positions, inv_freq = call.operands
    width = 2 * inv_freq.shape[0]
    require(bool(call.attributes["interleaved"]), "npu_interleave_rope takes neighbours, not halves")
    require(t.options.takes(x), f"npu_interleave_rope takes no {type_name(x)}")
    accept(constraints.interleave_rope(width))
    tokens, heads = x.shape[0] * x.shape[1], x.shape[2]
    found = rotations(positions, inv_freq, float(call.attributes["factor"]), x.dtype)
    cos, sin = (part.reshape(tokens, 1, 1, width) for part in found)
    rotated = x[..., :width].reshape(tokens, heads, 1, width).contiguous()
    out = t.npu("npu_interleave_rope", rotated, cos, sin).reshape(*x.shape[:-1], width)
    return [out if width == x.shape[-1] else torch.cat([out, x[..., width:]], dim=-1)]


def rotations(positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> list[Tensor]:
    """Cosines and sines times `factor`, [n, 2 * len(inv_freq)] each: of both halves of a head."""
    angle = positions.reshape(-1, 1).to(torch.float32) * inv_freq.to(torch.float32)[None]
    parts = [(part * factor).to(dtype) for part in (torch.cos(angle), torch.sin(angle))]
    return [torch.cat([part, part], dim=-1) for part in parts]


def linear(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """x [.., i] times an int8 weight [i, ..]; a weight in 16 or 32 bits is a plain product."""
    if FORMAT not in call.attributes:
        return t.decomposed(call, call.operands)
    x, values, scale = call.operands
    fmt = matrix_format(call.attributes[FORMAT])
    if isinstance(x, RoundedRows) and fmt.name != INT8:
        x = x.whole
    matrix = as_matrix(values, 1)
    if isinstance(x, RoundedRows):
        return [_rounded_product(t, x, matrix, scale).reshape(*x.values.shape[:-1], *values.shape[1:])]
    require(t.options.takes(x), f"npu_dynamic_quant takes no {type_name(x)}")
    if fmt.values == INT4 and not rounds_activations(fmt):
        return [_widened(t, x, values, matrix, scale)]
    require(fmt.name == INT8, f"npu_quant_matmul is not mapped for {fmt.name}")
    rows = RoundedRows(*quantised_rows(t, x.reshape(-1, matrix.shape[0])), x.dtype)
    return [_rounded_product(t, rows, matrix, scale).reshape(*x.shape[:-1], *values.shape[1:])]


def _rounded_product(t: NpuTarget, x: RoundedRows, matrix: Tensor, scale: Tensor) -> Tensor:
    """[n, columns] in the type that rows were in."""
    return t.npu(
        "npu_quant_matmul",
        x.values.reshape(-1, matrix.shape[0]),
        matrix,
        scale.reshape(-1).to(torch.float32),
        pertoken_scale=x.scale.reshape(-1),
        output_dtype=SCALAR_TYPES[x.wide],
    )


def _widened(t: NpuTarget, x: Tensor, values: Any, matrix: Tensor, scale: Tensor) -> Tensor:
    """x [.., i] times 4-bit integers in int32, [i, columns / 8], with a scale [groups, ..] for rows in groups."""
    width, groups = matrix.shape[0], scale.shape[0]
    size = width // groups
    require(
        groups == 1 or (size % 32 == 0 and size * groups == width), f"npu_weight_quant_batchmatmul: groups of {size}"
    )
    out = t.npu(
        "npu_weight_quant_batchmatmul",
        x.reshape(-1, width),
        matrix,
        scale.reshape(groups, -1).to(x.dtype),
        antiquant_group_size=0 if groups == 1 else size,
    )
    return out.reshape(*x.shape[:-1], *values.shape[1:])


def as_matrix(weight: Tensor | KernelMatrix, lead: int) -> Tensor:
    """A weight with all dims after the first `lead` as one; itself where it has no more."""
    if isinstance(weight, KernelMatrix):
        return weight.tensor
    return weight if weight.dim() == lead + 1 else weight.reshape(*weight.shape[:lead], -1)


def int8_rows(t: NpuTarget, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantised_rows`, in ATen where x is of a type that the operator does not take."""
    if t.options.takes(x):
        return quantised_rows(t, x)
    wide = x.to(torch.float32)
    scale = torch.amax(torch.abs(wide), dim=-1).clamp(min=LEAST) / LARGEST[INT8_VALUES]
    nearest = torch.round(wide / scale.unsqueeze(-1))
    return nearest.clamp(-128, 127).to(torch.int8), scale


def quantised_rows(t: NpuTarget, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, i] as int8 with one float32 scale a row."""
    return t.npu("npu_dynamic_quant", x)
