"""torch: an `ExportedProgram` (`.pt2`) of ATen operators, weights as inputs.

The graph is walked once inside `torch.export`, with fake tensors, so that nothing of the model's size is allocated.
Ops of the contract are decomposed: ATen has no operators of that grain that every torch device has.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jax.lax import RoundingMethod
from torch._subclasses.fake_tensor import FakeTensorMode

from backends.errors import Unsupported
from backends.toolchains.forms import Bounds, Pick, Take, gather_form, product_form, scatter_form
from backends.toolchains.walker import Graph, Port, Target, walk

Tensor = torch.Tensor
TORCH_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool", "float8_e4m3fn")
}


def write(graph: Graph) -> bytes:
    """The `.pt2` file of a graph: positional inputs and outputs in the graph's order.

    Raises `Unsupported` for a primitive without a rule.
    """

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        results = walk(TorchTarget(), graph.jaxpr.jaxpr, graph.jaxpr.consts, given)
        return tuple(result.contiguous() for result in results)

    return archive(run, graph.inputs)


def archive(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Port]) -> bytes:
    """The `.pt2` file of a function of tensors, which is called once, with fake ones."""
    return saved(exported(run, inputs))


def exported(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Port]) -> torch.export.ExportedProgram:
    """A function of tensors as a program; it is called once, with fake ones."""
    with FakeTensorMode():
        example = tuple(torch.empty(port.shape, dtype=TORCH_DTYPES[port.dtype]) for port in inputs)
    program = torch.export.export(_Module(run), example, strict=False)
    program._example_inputs = None  # fake tensors: not to be stored
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths
    return program


def saved(program: torch.export.ExportedProgram) -> bytes:
    """A program's `.pt2` file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


class _Module(torch.nn.Module):
    def __init__(self, run: Callable[..., tuple[Tensor, ...]]):
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.run(*inputs)


class TorchTarget(Target[Tensor]):
    """Evaluates on torch tensors, real or fake."""

    name = "torch"

    def __init__(self) -> None:
        self.rules, self.calls = RULES, CALLS

    def constant(self, value: np.ndarray) -> Tensor:
        dtype = TORCH_DTYPES[value.dtype.name]
        if value.ndim == 0:
            return torch.full((), value.item(), dtype=dtype)
        return torch.tensor(value.astype(np.float64 if dtype.is_floating_point else value.dtype).tolist(), dtype=dtype)


def _dtype(eqn: Any, place: int = 0) -> torch.dtype:
    name = np.dtype(eqn.outvars[place].aval.dtype).name
    return TORCH_DTYPES["int8" if name == "int4" else name]


def _shape(eqn: Any) -> tuple[int, ...]:
    return tuple(eqn.outvars[0].aval.shape)


def _plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda t, eqn, *values: fn(*values)


def _div(t: TorchTarget, eqn: Any, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _round(t: TorchTarget, eqn: Any, x: Tensor) -> Tensor:
    """torch rounds ties to even."""
    if eqn.params["rounding_method"] is not RoundingMethod.TO_NEAREST_EVEN:
        raise Unsupported("torch has no rounding of ties away from zero")
    return torch.round(x)


def _broadcast_in_dim(t: TorchTarget, eqn: Any, x: Tensor, *_: Any) -> Tensor:
    shape = eqn.params["shape"]
    held = [1] * len(shape)
    for place, n in zip(eqn.params["broadcast_dimensions"], x.shape, strict=True):
        held[place] = n
    return x.reshape(held).expand(shape)


def _slice(t: TorchTarget, eqn: Any, x: Tensor) -> Tensor:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    return x[tuple(slice(*each) for each in zip(starts, limits, steps, strict=True))]


def _dynamic_slice(t: TorchTarget, eqn: Any, x: Tensor, *starts: Tensor) -> Tensor:
    for d, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if size != x.shape[d]:
            first = start.clamp(0, x.shape[d] - size).to(torch.int64)
            x = torch.index_select(x, d, first + torch.arange(size))
    return x


def _iota(t: TorchTarget, eqn: Any, *_: Any) -> Tensor:
    shape, dim = eqn.params["shape"], eqn.params["dimension"]
    held = [n if d == dim else 1 for d, n in enumerate(shape)]
    return torch.arange(shape[dim], dtype=_dtype(eqn)).reshape(held).expand(shape)


def _reduce(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(t: TorchTarget, eqn: Any, x: Tensor) -> Tensor:
        return fn(x, list(eqn.params["axes"])).to(_dtype(eqn))

    return rule


def _each(fn: Callable[..., Tensor]) -> Callable[[Tensor, list[int]], Tensor]:
    """Of a reduction that takes one dim at a time."""

    def over(x: Tensor, axes: Sequence[int]) -> Tensor:
        for axis in sorted(axes, reverse=True):
            x = fn(x, axis)
        return x

    return over


def _top_k(t: TorchTarget, eqn: Any, x: Tensor) -> list[Tensor]:
    """By a stable sort: `torch.topk` leaves open which of equals it takes, XLA takes the first."""
    axis, k = eqn.params.get("axis", -1) % x.ndim, eqn.params["k"]
    values, indices = torch.sort(x, dim=axis, descending=True, stable=True)
    return [values.narrow(axis, 0, k), indices.narrow(axis, 0, k).to(_dtype(eqn, 1))]


def _cumsum(t: TorchTarget, eqn: Any, x: Tensor) -> Tensor:
    axis = eqn.params["axis"]
    if eqn.params["reverse"]:
        return torch.flip(torch.cumsum(torch.flip(x, [axis]), axis, dtype=x.dtype), [axis])
    return torch.cumsum(x, axis, dtype=x.dtype)


def _in_bounds(indices: Tensor, bounds: Bounds) -> Tensor:
    return (indices if bounds.mode == "promised" else indices.clamp(0, bounds.size - 1)).to(torch.int64)


def _gather(t: TorchTarget, eqn: Any, operand: Tensor, indices: Tensor) -> Tensor:
    form, bounds = gather_form(eqn)
    if isinstance(form, Pick):
        return operand[tuple(indices[..., d].to(torch.int64) for d in range(form.dims))]
    indices = indices[..., 0]
    if isinstance(form, Take):
        axis, rest = form.axis, operand.ndim - form.axis - 1
        index = _in_bounds(indices, bounds)
        shape = (*operand.shape[:axis], *index.shape, *operand.shape[axis + 1 :])
        out = torch.index_select(operand, axis, index.reshape(-1)).reshape(shape)
        lead = axis
    else:
        operand, indices = operand.permute(form.operand_order), indices.permute(form.index_order)
        nb = form.batch
        window, index = operand.shape[nb + 1 :], _in_bounds(indices, bounds)
        flat = index.reshape(*index.shape[:nb], -1, *[1] * len(window))
        flat = flat.expand(*flat.shape[: nb + 1], *window)
        out = torch.gather(operand, nb, flat).reshape(*index.shape, *window)
        lead, rest = 0, len(window)
    if bounds.mode == "drop":
        outside = ((indices < 0) | (indices >= bounds.size)).reshape((1,) * lead + tuple(indices.shape) + (1,) * rest)
        out = torch.where(outside, torch.full((), bounds.fill, dtype=out.dtype), out)
    return out.permute(form.order)


def _scatter(accumulate: bool) -> Callable[..., Tensor]:
    def rule(t: TorchTarget, eqn: Any, operand: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        bounds, index = scatter_form(eqn), indices[:, 0]
        if bounds.mode == "drop":  # what is outside goes to one more row, cut off afterwards
            spare = torch.zeros((1, *operand.shape[1:]), dtype=operand.dtype)
            index = torch.where((index < 0) | (index >= bounds.size), torch.full_like(index, bounds.size), index)
            wide = torch.cat([operand, spare]).index_put((index.to(torch.int64),), updates, accumulate)
            return wide[:-1]
        return operand.index_put((_in_bounds(index, bounds),), updates, accumulate)

    return rule


def _dot_general(t: TorchTarget, eqn: Any, left: Tensor, right: Tensor) -> Tensor:
    p, dtype = product_form(eqn), _dtype(eqn)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names: list[dict[int, str]] = [{}, {}]
    for pairs in (zip(p.left_batch, p.right_batch, strict=True), zip(p.left_contract, p.right_contract, strict=True)):
        for a, b in pairs:
            names[0][a] = names[1][b] = next(letters)
    for side, free in ((0, p.left_free), (1, p.right_free)):
        names[side].update({d: next(letters) for d in free})
    terms = ["".join(names[side][d] for d in range(x.ndim)) for side, x in enumerate((left, right))]
    out = "".join(names[0][d] for d in (*p.left_batch, *p.left_free)) + "".join(names[1][d] for d in p.right_free)
    return torch.einsum(f"{terms[0]},{terms[1]}->{out}", left.to(dtype), right.to(dtype))


CALLS: Mapping[str, Callable[..., Any]] = {
    "floor_divide": lambda t, eqn, a, b: torch.div(a, b, rounding_mode="floor"),
    "remainder": lambda t, eqn, a, b: torch.remainder(a, b),
}

RULES: Mapping[str, Callable[..., Any]] = {
    "add": _plain(torch.add),
    "add_any": _plain(torch.add),
    "sub": _plain(torch.sub),
    "mul": _plain(torch.mul),
    "div": _div,
    "rem": _plain(torch.fmod),
    "max": _plain(torch.maximum),
    "min": _plain(torch.minimum),
    "pow": _plain(torch.pow),
    "neg": _plain(torch.neg),
    "abs": _plain(torch.abs),
    "sign": _plain(torch.sign),
    "exp": _plain(torch.exp),
    "log": _plain(torch.log),
    "sqrt": _plain(torch.sqrt),
    "tanh": _plain(torch.tanh),
    "logistic": _plain(torch.sigmoid),
    "sin": _plain(torch.sin),
    "cos": _plain(torch.cos),
    "floor": _plain(torch.floor),
    "ceil": _plain(torch.ceil),
    "round": _round,
    "copy": _plain(lambda x: x),
    "copy_p": _plain(lambda x: x),
    "stop_gradient": _plain(lambda x: x),
    "optimization_barrier": _plain(lambda *x: list(x)),
    "square": _plain(torch.square),
    "rsqrt": _plain(torch.rsqrt),
    "integer_pow": lambda t, eqn, x: torch.pow(x, eqn.params["y"]),
    "clamp": _plain(lambda low, x, high: torch.minimum(torch.maximum(x, low), high)),
    "and": _plain(torch.bitwise_and),
    "or": _plain(torch.bitwise_or),
    "not": _plain(torch.bitwise_not),
    "eq": _plain(torch.eq),
    "ne": _plain(torch.ne),
    "lt": _plain(torch.lt),
    "le": _plain(torch.le),
    "gt": _plain(torch.gt),
    "ge": _plain(torch.ge),
    "select_n": _plain(lambda which, first, second: torch.where(which, second, first)),
    "convert_element_type": lambda t, eqn, x: x.to(_dtype(eqn)),
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": lambda t, eqn, x, *_: x.reshape(_shape(eqn)),
    "squeeze": lambda t, eqn, x: x.reshape(_shape(eqn)),
    "expand_dims": lambda t, eqn, x: x.reshape(_shape(eqn)),
    "transpose": lambda t, eqn, x: x.permute(eqn.params["permutation"]),
    "slice": _slice,
    "split": lambda t, eqn, x: list(torch.split(x, list(eqn.params["sizes"]), eqn.params["axis"])),
    "concatenate": lambda t, eqn, *parts: torch.cat(parts, eqn.params["dimension"]),
    "iota": _iota,
    "reduce_sum": _reduce(torch.sum),
    "reduce_max": _reduce(torch.amax),
    "reduce_min": _reduce(torch.amin),
    "reduce_or": _reduce(_each(torch.any)),
    "reduce_and": _reduce(_each(torch.all)),
    "argmax": lambda t, eqn, x: torch.argmax(x, eqn.params["axes"][0]).to(_dtype(eqn)),
    "top_k": _top_k,
    "cumsum": _cumsum,
    "gather": _gather,
    "scatter": _scatter(False),
    "scatter-add": _scatter(True),
    "dynamic_slice": _dynamic_slice,
    "dot_general": _dot_general,
}
