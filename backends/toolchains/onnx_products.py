"""The ONNX table: any `dot_general` as one MatMul, in the order that moves least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from backends.toolchains.forms import Product, dtype_of, product_form, shape_of
from backends.toolchains.onnx_target import OnnxTarget, Ref


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


def dot_general(t: OnnxTarget, eqn: Any, left: Ref, right: Ref) -> Ref:
    """MatMul of [batch.., M, K] and [batch.., K, N], with the sides in the order that transposes least.

    Free dims of the right side that lie before its contracted ones become batch dims (broadcast on the left), so
    that stacked weights such as [expert, d, f] are used as they lie.
    """
    return product(t, product_form(eqn), shape_of(eqn), dtype_of(eqn), left, right)


def product(t: OnnxTarget, p: Product, shape: Sequence[int], out_dtype: str, left: Ref, right: Ref) -> Ref:
    """See `dot_general`: of a form that is known already."""
    left, right = t.whole(left), t.whole(right)
    straight = _plan(left, right, p.left_batch, p.right_batch, p.left_contract, p.right_contract)
    swapped = _plan(right, left, p.right_batch, p.left_batch, p.right_contract, p.left_contract)
    swapped = dataclasses.replace(swapped, swapped=True)
    plan = min(straight, swapped, key=lambda each: each.cost(shape))
    return plan.emit(t, right if plan.swapped else left, left if plan.swapped else right, out_dtype)


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

    def emit(self, t: OnnxTarget, x: Ref, y: Ref, work: str) -> Ref:
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
