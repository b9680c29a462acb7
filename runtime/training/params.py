"""A model's variables by name, "layers.0.q_b" or "outer.embed": as optimizers step them and a state file holds them."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.nnx.filterlib import Filter
from jax import Array

from model.module import Model

Params = dict[str, Array]


def variables(tree: Any, wanted: Filter = ...) -> dict[str, Any]:
    """The variables of a model, or of a state of one (its gradients), that a filter chooses; in order of the layers."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(tree, wanted))}


def named(tree: Any, wanted: Filter = ...) -> Params:
    """Their arrays."""
    return {name: variable.get_value() for name, variable in variables(tree, wanted).items()}


def put(model: Model, params: Params) -> None:
    """Gives some of a model's variables new values."""
    paths = {name: tuple(int(key) if key.isdecimal() else key for key in name.split(".")) for name in params}
    nnx.update(model, nnx.from_flat_state({paths[name]: array for name, array in params.items()}))
