"""The devices of one pipeline stage as JAX sees them: where shares live, and the program that runs on all of them.

`Hosts` gives every device of the stage its own XLA host device; `Mapped` runs them as the named axes of `vmap`
on one. Both run the same body, which is one device's. A value is placed by saying along which dim it is split over
which mesh axes; caches and batches are split over `dp` along their first dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backends.errors import BackendUnavailable
from backends.spmd.shard import is_split
from model.split import Axes, Grid

Body = Callable[..., Any]
_P = PartitionSpec
_SMALL_BYTES = 256e6


def _options(weights: Any) -> dict[str, Any] | None:
    """How to compile: a program that a small model's weights keep busy for milliseconds is not worth optimising."""
    if sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > _SMALL_BYTES:
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Stage(Protocol):
    """Places values on a stage's devices, and makes programs of one device's body."""

    inline: bool
    """Whether ops must be replaced by their bodies (they have no batching rule)."""
    here: bool
    """Whether this process has any of the stage's devices."""

    def place(self, value: np.ndarray, dim: int, axes: Axes) -> Any:
        """A whole value, cut along `dim` over `axes`; held whole by every device without."""
        ...

    def cache(self, value: np.ndarray, split_heads: bool) -> Any:
        """A cache of the whole stage, [dp x pages, page_size, ..]; split_heads: the next dim is cut over tp, too."""
        ...

    def batch(self, value: Any) -> Any:
        """A tree of values [dp x rows, ..], from the host or from another stage."""
        ...

    def fetch(self, value: Any) -> np.ndarray:
        """A cache or a value of a batch, whole, on the host."""
        ...

    def hand_on(self, value: Any) -> Any:
        """A tree that the stage has put out, as the next stage's `batch` takes it."""
        ...

    def program(self, body: Body, weights: Any, caches: Any, *rest: Any) -> Callable[..., Any]:
        """Compiles body(weights, caches, *rest) -> tree with leaves [rows, ..] and caches; donates the caches."""
        ...


class Hosts:
    """XLA host devices `first`, `first + 1`, ..: one for each device of the stage."""

    inline = False
    here = True

    def __init__(self, grid: Grid, first: int):
        devices = jax.devices("cpu")
        if len(devices) < first + grid.stage_devices:
            raise BackendUnavailable(
                f"{first + grid.stage_devices} emulated devices need as many XLA host devices, and JAX was started "
                f"with {len(devices)}: set XLA_FLAGS=--xla_force_host_platform_device_count=N"
            )
        chosen = np.array(devices[first : first + grid.stage_devices], dtype=object)
        self.grid, self.mesh = grid, Mesh(chosen.reshape(grid.dp, grid.tp), ("dp", "tp"))

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, _P(*spec))

    def place(self, value: np.ndarray, dim: int, axes: Axes) -> Any:
        spec = [None] * dim + [axes] if is_split(value, dim, self.grid.layout.parts(axes)) else []
        return jax.device_put(value, self._sharding(*spec))

    def cache(self, value: np.ndarray, split_heads: bool) -> Any:
        return jax.device_put(value, self._sharding(*(("dp", None, "tp") if split_heads else ("dp",))))

    def batch(self, value: Any) -> Any:
        return jax.device_put(value, self._sharding("dp"))

    def fetch(self, value: Any) -> np.ndarray:
        return np.asarray(value)

    def hand_on(self, value: Any) -> Any:
        return value

    def program(self, body: Body, weights: Any, caches: Any, *rest: Any) -> Callable[..., Any]:
        specs = [jax.tree.map(lambda a: a.sharding.spec, tree) for tree in (weights, caches)]
        rows = _P("dp")

        def run(weights: Any, caches: Any, *rest: Any) -> Any:
            inside = jax.shard_map(
                body,
                mesh=self.mesh,
                in_specs=(*specs, *(rows for _ in rest)),
                out_specs=(rows, specs[1]),
                check_vma=False,
            )
            return inside(weights, caches, *rest)

        return jax.jit(run, donate_argnums=1).lower(weights, caches, *rest).compile(_options(weights))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """An array with a leading dim for each of the mesh `axes` it is split over, outermost first."""

    array: Any
    axes: Axes = dataclasses.field(metadata={"static": True})


def _is_held(leaf: Any) -> bool:
    return isinstance(leaf, Held)


class Mapped:
    """All devices of the stage on one, as the axes "dp" and "tp" of nested `vmap`s. What is equal on every device
    of an axis is held once."""

    inline = True
    here = True

    def __init__(self, grid: Grid):
        self.grid = grid

    def place(self, value: np.ndarray, dim: int, axes: Axes) -> Any:
        shares = self.grid.layout.parts(axes)
        if not is_split(value, dim, shares):
            return Held(jnp.asarray(value), ())
        sizes = [getattr(self.grid, axis) for axis in axes]
        cut = value.reshape(*value.shape[:dim], *sizes, value.shape[dim] // shares, *value.shape[dim + 1 :])
        return Held(jnp.asarray(np.moveaxis(cut, range(dim, dim + len(sizes)), range(len(sizes)))), axes)

    def cache(self, value: np.ndarray, split_heads: bool) -> Any:
        dp, tp = self.grid.dp, self.grid.tp
        ranks = value.reshape(dp, -1, *value.shape[1:])
        if not split_heads or tp == 1:
            return Held(jnp.asarray(ranks), ("dp",))
        heads = ranks.reshape(*ranks.shape[:3], tp, -1, *ranks.shape[4:])
        return Held(jnp.asarray(np.moveaxis(heads, 3, 1)), ("dp", "tp"))

    def batch(self, value: Any) -> Any:
        def rows(leaf: Any) -> Any:
            return (
                leaf if _is_held(leaf) else Held(jnp.asarray(leaf.reshape(self.grid.dp, -1, *leaf.shape[1:])), ("dp",))
            )

        return jax.tree.map(rows, value, is_leaf=_is_held)

    def fetch(self, value: Any) -> np.ndarray:
        if "tp" not in value.axes:
            return np.asarray(value.array).reshape(-1, *value.array.shape[2:])
        heads = np.moveaxis(np.asarray(value.array), 1, 3)  # [dp, pages, page_size, tp, heads, ..]
        return heads.reshape(-1, heads.shape[2], heads.shape[3] * heads.shape[4], *heads.shape[5:])

    def hand_on(self, value: Any) -> Any:
        return value

    def program(self, body: Body, weights: Any, caches: Any, *rest: Any) -> Callable[..., Any]:
        def split(tree: Any, axis: str) -> Any:
            return jax.tree.map(lambda held: 0 if axis in held.axes else None, tree, is_leaf=_is_held)

        def run(*args: Any) -> Any:
            mapped = body
            for axis in ("tp", "dp"):
                ins = tuple(split(arg, axis) for arg in args)
                mapped = jax.vmap(
                    mapped,
                    in_axes=ins,
                    out_axes=(0 if axis == "dp" else None, ins[1]),
                    axis_name=axis,
                    axis_size=getattr(self.grid, axis),
                )
            rows, new = mapped(*jax.tree.map(lambda held: held.array, args, is_leaf=_is_held))
            held = jax.tree.map(lambda old, array: Held(array, old.axes), args[1], new, is_leaf=_is_held)
            return jax.tree.map(lambda array: Held(array, ("dp",)), rows), held

        return jax.jit(run, donate_argnums=1).lower(weights, caches, *rest).compile(_options(weights))
