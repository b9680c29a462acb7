"""The devices of one pipeline stage as JAX sees them: where shares live, and how one device's program is spread over
all of them.

`Hosts` gives every device of the stage its own XLA device; `Mapped` runs them as the named axes of `vmap` on one.
Both spread the same program, which is one device's; a backend exports and loads it. A value is placed by saying along
which dim it is split over which mesh axes; caches and batches are split over `dp` along their first dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from backends.interface import Backend, Executable, Order, Program
from backends.orders import laid
from backends.spmd.shard import is_split
from model import ops
from model.split import Axes, Grid

_P = PartitionSpec


class Stage(Protocol):
    """Places values on a stage's devices, and has one device's programs compiled for all of them."""

    alone: bool
    """Whether its devices are no other stage's, so that a program loaded on them is its own."""
    here: bool
    """Whether this process has any of the stage's devices."""
    far: bool
    """Whether what its devices make is sent to other processes, so that ids are better chosen there than here."""

    def place(self, value: np.ndarray, dim: int, axes: Axes, order: Order | None = None) -> Any:
        """A whole value, cut along `dim` over `axes`; held whole by every device without. order: how shares lie."""
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

    def compile(self, backend: Backend, program: Program) -> Executable:
        """What `backend` makes of one device's (weights, caches, *rest) -> (tree with leaves [rows, ..], caches) for
        all of them. The program's `args` are values as they are placed here."""
        ...


def sharded(program: Program, mesh: AbstractMesh) -> Program:
    """One device's program as that of a mesh of them, whose arguments are split over it as `args` say."""
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, a.sharding.spec)), program.args
    )
    specs = jax.tree.map(lambda a: a.sharding.spec, args)

    def spread(fn: Any) -> Any:
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=(_P("dp"), specs[1]), check_vma=False)

    return dataclasses.replace(program, args=args, spread=spread, mesh=dict(mesh.shape))


class Hosts:
    """An XLA device for each device of the stage."""

    alone = True
    here = True
    far = False

    def __init__(self, grid: Grid, devices: Sequence[Any]):
        self.grid, self.devices = grid, devices
        self.mesh = Mesh(np.array(devices, dtype=object).reshape(grid.dp, grid.tp), ("dp", "tp"))

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, _P(*spec))

    def _put(self, value: np.ndarray, *spec: Any, order: Order | None = None) -> Any:
        return jax.device_put(value, laid(self._sharding(*spec), order))

    def place(self, value: np.ndarray, dim: int, axes: Axes, order: Order | None = None) -> Any:
        spec = [None] * dim + [axes] if is_split(value, dim, self.grid.layout.parts(axes)) else []
        return self._put(value, *spec, order=order)

    def cache(self, value: np.ndarray, split_heads: bool) -> Any:
        return self._put(value, *(("dp", None, "tp") if split_heads else ("dp",)))

    def batch(self, value: Any) -> Any:
        return jax.device_put(value, self._sharding("dp"))

    def fetch(self, value: Any) -> np.ndarray:
        return np.asarray(value)

    def hand_on(self, value: Any) -> Any:
        return value

    def compile(self, backend: Backend, program: Program) -> Executable:
        return backend.load(backend.export(sharded(program, self.mesh.abstract_mesh)), self.devices)


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

    alone = False
    here = True
    far = False

    def __init__(self, grid: Grid, backend: Backend):
        self.grid, self._put = grid, backend.put

    def place(self, value: np.ndarray, dim: int, axes: Axes, order: Order | None = None) -> Any:
        shares = self.grid.layout.parts(axes)
        if not is_split(value, dim, shares):
            return Held(self._put(value, order), ())
        sizes = [getattr(self.grid, axis) for axis in axes]
        cut = value.reshape(*value.shape[:dim], *sizes, value.shape[dim] // shares, *value.shape[dim + 1 :])
        if order is not None:
            order = (*range(len(sizes)), *(each + len(sizes) for each in order))
        return Held(self._put(np.moveaxis(cut, range(dim, dim + len(sizes)), range(len(sizes))), order), axes)

    def cache(self, value: np.ndarray, split_heads: bool) -> Any:
        dp, tp = self.grid.dp, self.grid.tp
        ranks = value.reshape(dp, -1, *value.shape[1:])
        if not split_heads or tp == 1:
            return Held(self._put(ranks), ("dp",))
        heads = ranks.reshape(*ranks.shape[:3], tp, -1, *ranks.shape[4:])
        return Held(self._put(np.moveaxis(heads, 3, 1)), ("dp", "tp"))

    def batch(self, value: Any) -> Any:
        def rows(leaf: Any) -> Any:
            return leaf if _is_held(leaf) else Held(self._put(leaf.reshape(self.grid.dp, -1, *leaf.shape[1:])), ("dp",))

        return jax.tree.map(rows, value, is_leaf=_is_held)

    def fetch(self, value: Any) -> np.ndarray:
        if "tp" not in value.axes:
            return np.asarray(value.array).reshape(-1, *value.array.shape[2:])
        heads = np.moveaxis(np.asarray(value.array), 1, 3)  # [dp, pages, page_size, tp, heads, ..]
        return heads.reshape(-1, heads.shape[2], heads.shape[3] * heads.shape[4], *heads.shape[5:])

    def hand_on(self, value: Any) -> Any:
        return value

    def compile(self, backend: Backend, program: Program) -> Executable:
        run = backend.load(backend.export(self._mapped(program)))

        def step(weights: Any, caches: Any, *rest: Any) -> Any:
            rows, new = run(*_arrays((weights, caches, *rest)))
            held = jax.tree.map(lambda old, array: Held(array, old.axes), caches, new, is_leaf=_is_held)
            return jax.tree.map(lambda array: Held(array, ("dp",)), rows), held

        return step

    def _mapped(self, program: Program) -> Program:
        def over(axis: str) -> Any:
            return jax.tree.map(lambda held: 0 if axis in held.axes else None, program.args, is_leaf=_is_held)

        def spread(fn: Any) -> Any:
            mapped = ops.substitute(fn, inline=True)  # what is left of the ops has no batching rule
            for axis in ("tp", "dp"):
                ins = over(axis)
                mapped = jax.vmap(
                    mapped,
                    in_axes=ins,
                    out_axes=(0 if axis == "dp" else None, ins[1]),
                    axis_name=axis,
                    axis_size=getattr(self.grid, axis),
                )
            return mapped

        args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), _arrays(program.args))
        return dataclasses.replace(program, args=args, spread=spread)


def _arrays(tree: Any) -> Any:
    return jax.tree.map(lambda held: held.array, tree, is_leaf=_is_held)
