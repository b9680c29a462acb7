"""Arrays of JAX that lie in memory in another order of dims than their shape's (`backends.interface.Order`)."""

from __future__ import annotations

from typing import Any, TypeVar

from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from backends.interface import Order

_Place = TypeVar("_Place", bound=Sharding | None)


def laid(place: _Place, order: Order | None) -> _Place | Format:
    """A place on devices, for arrays that lie there in an order: what `jax.device_put`, `jax.ShapeDtypeStruct` and
    `jax.make_array_from_callback` take for a sharding."""
    return place if order is None else Format(Layout(order), place)


def order_of(array: Any) -> Order | None:
    """How an array of JAX lies, or is said to by its `jax.ShapeDtypeStruct`, where not as its shape has it. NumPy's are
    going to a device, where they will lie so."""
    layout = getattr(getattr(array, "format", None), "layout", None)
    order = layout.major_to_minor if isinstance(layout, Layout) else None
    return None if order is None or order == tuple(range(len(order))) else order
