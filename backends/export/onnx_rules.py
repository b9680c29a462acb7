"""The ONNX table: a rule a primitive. Elementwise operators broadcast lazily; see `onnx.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.errors import Unsupported
from backends.export.forms import Bounds, Pick, Take, gather_form, product_form, scatter_form

if TYPE_CHECKING:
    from backends.export.onnx import OnnxTarget, Ref

Rule = Callable[..., Any]


def _dtype(eqn: Any, place: int = 0) -> str:
    return np.dtype(eqn.outvars[place].aval.dtype).name


def _shape(eqn: Any, place: int = 0) -> tuple[int, ...]:
    return tuple(eqn.outvars[place].aval.shape)


# --- elementwise ---------------------------------------------------------------------------------


def _elementwise(op_type: str, **attributes: Any) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, *values: Ref) -> Ref:
        return t.elementwise(op_type, *values, dtype=_dtype(eqn), **attributes)

    return rule


def _mul(t: OnnxTarget, eqn: Any, a: Ref, b: Ref) -> Ref:
    for x, factor in ((a, b), (b, a)):
        if t.scalars.get(factor.name) == 1.0 and factor.real in (None, ()):
            return x
    return t.elementwise("Mul", a, b, dtype=_dtype(eqn))


def _logical(op_type: str) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, *values: Ref) -> Ref:
        if values[0].dtype != "bool":
            raise Unsupported(f"onnx has no rule for a bitwise {op_type} of {values[0].dtype}")
        return t.elementwise(op_type, *values)

    return rule


def _compare(op_type: str, negate: bool = False) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, *values: Ref) -> Ref:
        out = t.elementwise(op_type, *values, dtype="bool")
        return t.elementwise("Not", out) if negate else out

    return rule


def _select(t: OnnxTarget, eqn: Any, which: Ref, *cases: Ref) -> Ref:
    first, second = cases
    return t.elementwise("Where", which, second, first, dtype=_dtype(eqn))


def _unwrapped(t: OnnxTarget, indices: Ref, size: int) -> Ref:
    """Indices without JAX's own step of counting negative ones from the end: ONNX does that itself."""
    match t.made.get(indices.name):
        case ("Where", (which, moved, plain)) if plain.shape == indices.shape:
            below, added = t.made.get(which.name), t.made.get(moved.name)
            if (
                below and added
                and (below[0], below[1][0].name, t.scalars.get(below[1][1].name)) == ("Less", plain.name, 0)
                and (added[0], added[1][0].name, t.scalars.get(added[1][1].name)) == ("Add", plain.name, size)
            ):  # fmt: skip
                return plain
    return indices


def _div(t: OnnxTarget, eqn: Any, a: Ref, b: Ref) -> Ref:
    """The quotient that ends a softmax over the last dim is the softmax; of integers it rounds towards zero."""
    last = f"({len(a.shape) - 1},)"
    raised, total = t.made.get(a.name), t.made.get(b.name)
    if raised and total and (raised[0], total[0]) == ("Exp", f"ReduceSum {last}") and total[1][0].name == a.name:
        shifted = t.made.get(raised[1][0].name)
        if shifted and shifted[0] == "Sub":
            x, most = shifted[1]
            top = t.made.get(most.name)
            if top and top[0] == f"ReduceMax {last}" and top[1][0].name == x.name and x.held == x.shape:
                return t.node("Softmax", x, shape=x.shape, dtype=x.dtype, axis=len(x.shape) - 1)
    return t.elementwise("Div", a, b, dtype=_dtype(eqn))


def _floor_divide(t: OnnxTarget, eqn: Any, a: Ref, b: Ref) -> Ref:
    if a.dtype not in ("int32", "int64"):
        return t.elementwise("Floor", t.elementwise("Div", a, b))
    return t.elementwise("Div", t.elementwise("Sub", a, t.elementwise("Mod", a, b)), b)


def _remainder(t: OnnxTarget, eqn: Any, a: Ref, b: Ref) -> Ref:
    """Of the divisor's sign, as ONNX's Mod of integers is."""
    if a.dtype in ("int32", "int64"):
        return t.elementwise("Mod", a, b)
    return t.elementwise("Sub", a, t.elementwise("Mul", b, t.elementwise("Floor", t.elementwise("Div", a, b))))


def _integer_pow(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    power = eqn.params["y"]
    out = x
    for _ in range(abs(power) - 1):
        out = t.elementwise("Mul", out, x)
    return t.elementwise("Reciprocal", out) if power < 0 else out


def _rsqrt(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    return t.elementwise("Reciprocal", t.elementwise("Sqrt", x))


def _clamp(t: OnnxTarget, eqn: Any, low: Ref, x: Ref, high: Ref) -> Ref:
    return t.elementwise("Min", t.elementwise("Max", x, low), high)


def _convert(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    return t.cast(x, _dtype(eqn))


# --- shapes --------------------------------------------------------------------------------------


def _broadcast_in_dim(t: OnnxTarget, eqn: Any, x: Ref, *_: Ref) -> Ref:
    shape, places = tuple(eqn.params["shape"]), eqn.params["broadcast_dimensions"]
    held = [1] * len(shape)
    for place, n in zip(places, x.held, strict=True):
        held[place] = n
    kept = t.base(x)
    if kept is not None and kept.shape == tuple(held):  # a reduction that kept its dims
        return dataclasses.replace(kept, shape=shape)
    real = x.held if x.real is None else x.real
    lead = len(shape) - len(real)
    if all(n == 1 for n in held[:lead]) and tuple(held[lead:]) == real:  # leading dims: broadcasting does it
        return dataclasses.replace(x, shape=shape, held=tuple(held), real=real)
    flat = dataclasses.replace(x, shape=x.held)  # reshape the tensor as it is held
    return dataclasses.replace(t.reshape(flat, held), shape=shape)


def _reshape(t: OnnxTarget, eqn: Any, x: Ref, *_: Ref) -> Ref:
    shape = _shape(eqn)
    real = [(n, h) for n, h in zip(x.shape, x.held, strict=True) if n != 1]
    if x.held != x.shape and [n for n in shape if n != 1] == [n for n, _ in real]:  # only dims of 1 come or go
        remaining = iter(h for _, h in real)
        held = [1 if n == 1 else next(remaining) for n in shape]
        return dataclasses.replace(t.reshape(dataclasses.replace(x, shape=x.held), held), shape=shape)
    return t.reshape(x, shape)


def _transpose(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    order = eqn.params["permutation"]
    out = t.transpose(dataclasses.replace(x, shape=x.held), order)
    return dataclasses.replace(out, shape=_shape(eqn))


def _slice(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    cut = [
        d
        for d, (n, h) in enumerate(zip(x.shape, x.held, strict=True))
        if (starts[d], limits[d], steps[d]) != (0, n, 1) and not h == 1 != n
    ]
    shape = _shape(eqn)
    if not cut:
        return dataclasses.replace(x, shape=shape, held=tuple(min(h, n) for h, n in zip(x.held, shape, strict=True)))
    if len(cut) == 1 and shape[cut[0]] == 1:  # one entry: without the dim, which is mostly dropped next
        (axis,) = cut
        kept = [n for d, n in enumerate(x.held) if d != axis]
        index = t.constant(np.asarray(starts[axis], np.int64))
        out = t.node("Gather", x, index, shape=kept, dtype=x.dtype, axis=axis)
        held = [1 if d == axis else n for d, n in enumerate(x.held)]
        return dataclasses.replace(t.reshape(out, held), shape=shape)
    held = tuple(n if d in cut else h for d, (n, h) in enumerate(zip(shape, x.held, strict=True)))
    pick = [[each[d] for d in cut] for each in (starts, limits)]
    vectors = [t.ints(pick[0]), t.ints(pick[1]), t.ints(cut)]
    if any(steps[d] != 1 for d in cut):
        vectors.append(t.ints([steps[d] for d in cut]))
    return dataclasses.replace(t.node("Slice", x, *vectors, shape=held, dtype=x.dtype), shape=shape)


def _concatenate(t: OnnxTarget, eqn: Any, *parts: Ref) -> Ref:
    values = [t.whole(part) for part in parts if 0 not in part.shape]
    if len(values) == 1:
        return values[0]
    return t.node("Concat", *values, shape=_shape(eqn), dtype=_dtype(eqn), axis=eqn.params["dimension"])


def _split(t: OnnxTarget, eqn: Any, x: Ref) -> list[Ref]:
    results = [(_shape(eqn, i), x.dtype) for i in range(len(eqn.outvars))]
    return t.nodes("Split", t.whole(x), t.ints(eqn.params["sizes"]), results=results, axis=eqn.params["axis"])


def _iota(t: OnnxTarget, eqn: Any, *_: Ref) -> Ref:
    shape, dim = tuple(eqn.params["shape"]), eqn.params["dimension"]
    held = tuple(n if d == dim else 1 for d, n in enumerate(shape))
    values = np.arange(shape[dim]).astype(_dtype(eqn)).reshape(held)
    return dataclasses.replace(t.constant(values), shape=shape)


# --- reductions ----------------------------------------------------------------------------------


def _reduce(op_type: str) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
        axes = eqn.params["axes"]
        if any(x.held[d] != x.shape[d] for d in axes):
            x = t.whole(x)
        flag = x.dtype == "bool"  # ONNX does not reduce booleans
        x = t.cast(x, "int32") if flag else x
        kept = tuple(1 if d in axes else n for d, n in enumerate(x.held))
        out = t.node(op_type, x, t.ints(axes), shape=kept, dtype=x.dtype, keepdims=1)
        t.made[out.name] = (f"{op_type} {tuple(axes)}", (x,))
        out = t.reshape(out, [n for d, n in enumerate(x.held) if d not in axes])
        return t.cast(dataclasses.replace(out, shape=_shape(eqn)), "bool" if flag else x.dtype)

    return rule


def _argmax(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    (axis,) = eqn.params["axes"]
    out = t.node("ArgMax", t.whole(x), shape=_shape(eqn), dtype="int64", axis=axis, keepdims=0)
    return t.cast(out, _dtype(eqn))


def _top_k(t: OnnxTarget, eqn: Any, x: Ref) -> list[Ref]:
    """ONNX takes the lowest index among equals, as XLA does."""
    axis = eqn.params.get("axis", -1) % len(x.shape)
    shape = _shape(eqn)
    values, indices = t.nodes(
        "TopK", t.whole(x), t.ints([eqn.params["k"]]), results=[(shape, x.dtype), (shape, "int64")], axis=axis
    )
    return [values, t.cast(indices, _dtype(eqn, 1))]


def _cumsum(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    axis = t.constant(np.asarray(eqn.params["axis"], np.int64))
    return t.node("CumSum", t.whole(x), axis, shape=x.shape, dtype=x.dtype, reverse=int(eqn.params["reverse"]))


# --- indexing ------------------------------------------------------------------------------------


def _outside(t: OnnxTarget, indices: Ref, size: int) -> Ref:
    zero, last = (t.constant(np.asarray(n, indices.dtype)) for n in (0, size - 1))
    return t.elementwise(
        "Or", t.elementwise("Less", indices, zero, dtype="bool"), t.elementwise("Greater", indices, last, dtype="bool")
    )


def _in_bounds(t: OnnxTarget, indices: Ref, bounds: Bounds) -> Ref:
    if bounds.mode == "promised":
        return indices
    zero, last = (t.constant(np.asarray(n, indices.dtype)) for n in (0, bounds.size - 1))
    return t.elementwise("Min", t.elementwise("Max", indices, zero), last)


def _gather(t: OnnxTarget, eqn: Any, operand: Ref, indices: Ref) -> Ref:
    form, bounds = gather_form(eqn)
    operand = t.whole(operand)
    if isinstance(form, Pick):
        index = t.cast(t.whole(indices), "int64")
        return t.node("GatherND", operand, index, shape=_shape(eqn), dtype=operand.dtype)
    indices = t.reshape(indices, indices.shape[:-1])
    if bounds.mode == "promised":
        indices = _unwrapped(t, indices, bounds.size)
    index = _in_bounds(t, indices, bounds)
    if isinstance(form, Take):
        at = form.axis
        shape = (*operand.shape[:at], *index.shape, *operand.shape[at + 1 :])
        out = t.node("Gather", operand, index, shape=shape, dtype=operand.dtype, axis=at)
        missing = indices.shape if bounds.mode == "drop" else None
        lead, trail = at, len(operand.shape) - at - 1
    else:
        out, missing = _along(t, operand, index, form), None
        lead, trail = 0, len(operand.shape) - form.batch - 1
        if bounds.mode == "drop":
            indices = t.transpose(indices, form.index_order)
            missing = indices.shape
    if missing is not None and bounds.mode == "drop":
        outside = t.reshape(_outside(t, indices, bounds.size), (1,) * lead + missing + (1,) * trail)
        fill = np.asarray(bounds.fill, operand.dtype).reshape((1,) * len(out.shape))
        out = t.elementwise("Where", outside, t.constant(fill), out, dtype=operand.dtype)
        out = t.whole(dataclasses.replace(out, shape=out.held))
    return t.transpose(out, form.order)


def _along(t: OnnxTarget, operand: Ref, index: Ref, form: Any) -> Ref:
    """GatherElements over [batch.., indexed, window..] with indices [batch.., rest.., 1..]."""
    operand, index = t.transpose(operand, form.operand_order), t.transpose(index, form.index_order)
    nb = form.batch
    lead, rest, window = operand.shape[:nb], index.shape[nb:], operand.shape[nb + 1 :]
    flat = (*lead, math.prod(rest), *(1,) * len(window))
    wide = (*lead, math.prod(rest), *window)
    index = t.whole(dataclasses.replace(t.reshape(index, flat), shape=wide))
    out = t.node("GatherElements", operand, index, shape=wide, dtype=operand.dtype, axis=nb)
    return t.reshape(out, (*lead, *rest, *window))


def _scatter(reduction: str) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, operand: Ref, indices: Ref, updates: Ref) -> Ref:
        bounds = scatter_form(eqn)
        operand, indices, updates = t.whole(operand), t.whole(indices), t.whole(updates)
        shape = operand.shape
        if bounds.mode == "promised":
            indices = t.reshape(_unwrapped(t, t.reshape(indices, indices.shape[:1]), bounds.size), indices.shape)
        if bounds.mode == "clip":
            indices = _in_bounds(t, indices, bounds)
        elif bounds.mode == "drop":  # what is outside goes to one more row, cut off afterwards
            spare = t.constant(np.zeros((1, *shape[1:]), operand.dtype))
            operand = t.node("Concat", operand, spare, shape=(shape[0] + 1, *shape[1:]), dtype=operand.dtype, axis=0)
            last = t.constant(np.full((1,) * len(indices.shape), shape[0], indices.dtype))
            indices = t.elementwise("Where", _outside(t, indices, bounds.size), last, indices, dtype=indices.dtype)
        attributes = {"reduction": reduction} if reduction != "none" else {}
        index = t.cast(indices, "int64")
        out = t.node("ScatterND", operand, index, updates, shape=operand.shape, dtype=operand.dtype, **attributes)
        if bounds.mode == "drop":
            out = t.node("Slice", out, t.ints([0]), t.ints([shape[0]]), t.ints([0]), shape=shape, dtype=out.dtype)
        return out

    return rule


def _dynamic_slice(t: OnnxTarget, eqn: Any, x: Ref, *starts: Ref) -> Ref:
    sizes = eqn.params["slice_sizes"]
    cut = [d for d, (n, k) in enumerate(zip(x.shape, sizes, strict=True)) if n != k]
    if not cut:
        return x
    begin = [t.reshape(t.cast(starts[d], "int64"), (1,)) for d in cut]
    vector = begin[0] if len(cut) == 1 else t.node("Concat", *begin, shape=(len(cut),), dtype="int64", axis=0)
    room = t.ints([x.shape[d] - sizes[d] for d in cut])  # XLA moves a slice that does not fit inside
    vector = t.elementwise("Min", t.elementwise("Max", vector, t.ints([0] * len(cut))), room)
    end = t.elementwise("Add", vector, t.ints([sizes[d] for d in cut]))
    return t.node("Slice", t.whole(x), vector, end, t.ints(cut), shape=_shape(eqn), dtype=x.dtype)


# --- products ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Side:
    """An operand arranged for MatMul: its dims in order, and how many elements that transposes."""

    order: tuple[int, ...]
    moved: int


def _arrange(ref: Ref, order: Sequence[int]) -> _Side:
    moved = [d for d in order if ref.shape[d] != 1]
    last = len(order) - 1
    swapped = last > 0 and tuple(order) == (*range(last - 1), last, last - 1)
    free = moved == sorted(moved) or swapped  # runtimes multiply by a matrix transposed as it is
    return _Side(tuple(order), 0 if free else math.prod(ref.shape))


def _dot_general(t: OnnxTarget, eqn: Any, left: Ref, right: Ref) -> Ref:
    """MatMul of [batch.., M, K] and [batch.., K, N], with the sides in the order that transposes least.

    Free dims of the right side that lie before its contracted ones become batch dims (broadcast on the left), so
    that stacked weights such as [expert, d, f] are used as they lie.
    """
    p, out_dtype = product_form(eqn), _dtype(eqn)
    left, right = t.whole(left), t.whole(right)
    straight = _plan(left, right, p.left_batch, p.right_batch, p.left_contract, p.right_contract)
    swapped = _plan(right, left, p.right_batch, p.left_batch, p.right_contract, p.left_contract)
    swapped = dataclasses.replace(swapped, swapped=True)
    plan = min(straight, swapped, key=lambda each: each.cost(_shape(eqn)))
    narrow = t.narrow_products and left.dtype == right.dtype == "bfloat16"
    work = left.dtype if narrow else out_dtype
    return t.cast(plan.emit(t, right if plan.swapped else left, left if plan.swapped else right, work, eqn), out_dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    x: _Side
    y: _Side
    batch: tuple[int, ...]  # sizes
    rows: tuple[int, ...]
    depth: int
    stacks: tuple[int, ...]
    columns: tuple[int, ...]
    swapped: bool = False

    def order(self) -> tuple[int, ...]:
        """From [batch.., stacks.., rows.., columns..] to the equation's order."""
        b, s, m, n = (len(part) for part in (self.batch, self.stacks, self.rows, self.columns))
        batch, stacks = range(b), range(b, b + s)
        rows, columns = range(b + s, b + s + m), range(b + s + m, b + s + m + n)
        if self.swapped:  # the right side of MatMul is the equation's left: its dims come first
            return (*batch, *stacks, *columns, *rows)
        return (*batch, *rows, *stacks, *columns)

    def cost(self, out: Sequence[int]) -> int:
        shape = (*self.batch, *self.stacks, *self.rows, *self.columns)
        moved = [d for d in self.order() if shape[d] != 1]
        return self.x.moved + self.y.moved + (math.prod(out) if moved != sorted(moved) else 0)

    def emit(self, t: OnnxTarget, x: Ref, y: Ref, work: str, eqn: Any) -> Ref:
        x, y = (t.transpose(ref, side.order) for ref, side in ((x, self.x), (y, self.y)))
        m, n = math.prod(self.rows), math.prod(self.columns)
        plain = not self.batch and not self.stacks
        if plain and self.rows and len(x.shape) == len(self.rows) + 1:  # [.., K] x [K, N]
            x_shape: tuple[int, ...] = (*self.rows, self.depth)
            out_shape: tuple[int, ...] = (*self.rows, n)
        else:
            x_shape = (*self.batch, *(1,) * len(self.stacks), m, self.depth)
            out_shape = (*self.batch, *self.stacks, m, n)
        x = t.cast(t.reshape(x, x_shape), work)
        y = t.cast(t.reshape(y, (*self.batch, *self.stacks, self.depth, n)), work)
        out = t.node("MatMul", x, y, shape=out_shape, dtype=work)
        return t.transpose(t.reshape(out, (*self.batch, *self.stacks, *self.rows, *self.columns)), self.order())


def _plan(
    x: Ref,
    y: Ref,
    x_batch: Sequence[int],
    y_batch: Sequence[int],
    x_contract: Sequence[int],
    y_contract: Sequence[int],
) -> _Plan:
    x_free = [d for d in range(len(x.shape)) if d not in (*x_batch, *x_contract)]
    y_free = [d for d in range(len(y.shape)) if d not in (*y_batch, *y_contract)]
    first = min(y_contract, default=0)
    before, after = [d for d in y_free if d < first], [d for d in y_free if d > first]
    if not after:
        before, after = [], y_free
    sizes = [tuple(ref.shape[d] for d in dims) for ref, dims in ((x, x_batch), (x, x_free), (y, before), (y, after))]
    return _Plan(
        _arrange(x, (*x_batch, *x_free, *x_contract)),
        _arrange(y, (*y_batch, *before, *y_contract, *after)),
        sizes[0],
        sizes[1],
        math.prod(x.shape[d] for d in x_contract),
        sizes[2],
        sizes[3],
    )


CALLS: Mapping[str, Rule] = {"floor_divide": _floor_divide, "remainder": _remainder}

RULES: Mapping[str, Rule] = {
    "add": _elementwise("Add"),
    "add_any": _elementwise("Add"),
    "sub": _elementwise("Sub"),
    "mul": _mul,
    "div": _div,
    "rem": _elementwise("Mod", fmod=1),
    "max": _elementwise("Max"),
    "min": _elementwise("Min"),
    "pow": _elementwise("Pow"),
    "neg": _elementwise("Neg"),
    "abs": _elementwise("Abs"),
    "sign": _elementwise("Sign"),
    "exp": _elementwise("Exp"),
    "log": _elementwise("Log"),
    "sqrt": _elementwise("Sqrt"),
    "tanh": _elementwise("Tanh"),
    "logistic": _elementwise("Sigmoid"),
    "sin": _elementwise("Sin"),
    "cos": _elementwise("Cos"),
    "floor": _elementwise("Floor"),
    "ceil": _elementwise("Ceil"),
    "copy": lambda t, eqn, x: x,
    "copy_p": lambda t, eqn, x: x,
    "stop_gradient": lambda t, eqn, x: x,
    "optimization_barrier": lambda t, eqn, *x: list(x),
    "square": lambda t, eqn, x: t.elementwise("Mul", x, x),
    "rsqrt": _rsqrt,
    "integer_pow": _integer_pow,
    "clamp": _clamp,
    "and": _logical("And"),
    "or": _logical("Or"),
    "not": _logical("Not"),
    "eq": _compare("Equal"),
    "ne": _compare("Equal", negate=True),
    "lt": _compare("Less"),
    "le": _compare("LessOrEqual"),
    "gt": _compare("Greater"),
    "ge": _compare("GreaterOrEqual"),
    "select_n": _select,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "iota": _iota,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax"),
    "reduce_and": _reduce("ReduceMin"),
    "argmax": _argmax,
    "top_k": _top_k,
    "cumsum": _cumsum,
    "gather": _gather,
    "scatter": _scatter("none"),
    "scatter-add": _scatter("add"),
    "dynamic_slice": _dynamic_slice,
    "dot_general": _dot_general,
}
