"""An equation read off once for all targets: gathers, scatters and products in the forms that the model uses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from backends.errors import Unsupported


def dtype_of(eqn: Any, place: int = 0) -> str:
    """A result's dtype in numpy's spelling."""
    return np.dtype(eqn.outvars[place].aval.dtype).name


def shape_of(eqn: Any, place: int = 0) -> tuple[int, ...]:
    """A result's shape."""
    return tuple(eqn.outvars[place].aval.shape)


@dataclasses.dataclass(frozen=True)
class Take:
    """`operand` indexed along `axis` by an index array of any rank, whole slices of the other dims.

    The result is `operand[:axis] + index shape + operand[axis + 1:]`, then transposed by `order`.
    """

    axis: int
    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pick:
    """`operand` indexed by its first `dims` dims at once, indices [.., dims]: [index dims.., window..], in order."""

    dims: int


@dataclasses.dataclass(frozen=True)
class Along:
    """`take_along_axis`: each batch dim of the operand goes with one of the indices.

    The operand is transposed by `operand_order` to [batch.., indexed, window..], the indices by `index_order` to
    [batch.., rest..]; the result [batch.., rest.., window..] is transposed by `order`.
    """

    batch: int
    operand_order: tuple[int, ...]
    index_order: tuple[int, ...]
    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What happens to indices outside [0, size): "promised" (there are none), "clip" or "drop" (they read as `fill`,
    and are not written)."""

    mode: str
    size: int
    fill: Any = None


def _bounds(mode: Any, size: int, fill: Any = None) -> Bounds:
    mode = GatherScatterMode.from_any(mode) if not isinstance(mode, GatherScatterMode) else mode
    if mode in (GatherScatterMode.PROMISE_IN_BOUNDS, GatherScatterMode.ONE_HOT):
        return Bounds("promised", size)
    return Bounds("clip" if mode is GatherScatterMode.CLIP else "drop", size, fill)


def gather_form(eqn: Any) -> tuple[Take | Along | Pick, Bounds]:
    """Raises `Unsupported` for gathers of parts of slices."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = (v.aval for v in eqn.invars)
    batch = tuple(numbers.operand_batching_dims)
    window = [d for d in range(operand.ndim) if d not in numbers.collapsed_slice_dims and d not in batch]
    whole = all(sizes[d] == operand.shape[d] for d in window)
    indexed = tuple(numbers.start_index_map)
    if len(indexed) > 1 and indexed == tuple(range(len(indexed))) == tuple(numbers.collapsed_slice_dims) and not batch:
        bounds = _bounds(eqn.params["mode"], 0)
        trailing = tuple(numbers.offset_dims) == tuple(range(indices.ndim - 1, indices.ndim - 1 + len(window)))
        if whole and trailing and bounds.mode == "promised":
            return Pick(len(indexed)), bounds
    if len(numbers.start_index_map) != 1 or tuple(numbers.collapsed_slice_dims) != numbers.start_index_map or not whole:
        raise Unsupported(f"a gather that is no take along one axis cannot be exported: {numbers}, slices {sizes}")
    (axis,) = numbers.start_index_map
    bounds = _bounds(eqn.params["mode"], operand.shape[axis], eqn.params.get("fill_value"))
    out_rank = indices.ndim - 1 + len(window)
    offset = list(numbers.offset_dims)
    places = [d for d in range(out_rank) if d not in offset]  # of the index dims in the result
    if not batch:
        # result before ordering: operand dims below the axis, index dims, operand dims above it
        below = sum(d < axis for d in window)
        now = offset[:below] + places + offset[below:]
        return Take(axis, _inverse(now)), bounds
    index_batch = tuple(numbers.start_indices_batching_dims)
    rest = [d for d in range(indices.ndim - 1) if d not in index_batch]
    now = [places[d] for d in (*index_batch, *rest)] + offset
    return Along(len(batch), (*batch, axis, *window), (*index_batch, *rest), _inverse(now)), bounds


def _inverse(now: list[int]) -> tuple[int, ...]:
    """The transposition that brings result dim `now[i]`, found at place i, to its own place."""
    order = [0] * len(now)
    for place, dim in enumerate(now):
        order[dim] = place
    return tuple(order)


def scatter_form(eqn: Any) -> Bounds:
    """The bounds of a scatter of whole rows along dim 0, indices [n, 1], updates [n, ..].

    Raises `Unsupported` for any other scatter.
    """
    numbers = eqn.params["dimension_numbers"]
    operand, indices, updates = (v.aval for v in eqn.invars)
    rows = (
        numbers.scatter_dims_to_operand_dims == (0,)
        and numbers.inserted_window_dims == (0,)
        and not numbers.operand_batching_dims
        and indices.ndim == 2
        and tuple(numbers.update_window_dims) == tuple(range(1, operand.ndim))
        and updates.shape[1:] == operand.shape[1:]
    )
    if not rows:
        raise Unsupported(f"a scatter that does not write whole rows cannot be exported: {numbers}")
    return _bounds(eqn.params["mode"], operand.shape[0])


@dataclasses.dataclass(frozen=True)
class Product:
    """A dot_general: dims of both sides by role; the result is [batch.., left free.., right free..]."""

    left_batch: tuple[int, ...]
    right_batch: tuple[int, ...]
    left_contract: tuple[int, ...]
    right_contract: tuple[int, ...]
    left_free: tuple[int, ...]
    right_free: tuple[int, ...]


def product_form(eqn: Any) -> Product:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = (v.aval.ndim for v in eqn.invars)
    return Product(
        tuple(lb),
        tuple(rb),
        tuple(lc),
        tuple(rc),
        tuple(d for d in range(left) if d not in lc and d not in lb),
        tuple(d for d in range(right) if d not in rc and d not in rb),
    )
