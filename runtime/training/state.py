"""A run's state on disk: parameters, optimizer moments and the step, in one safetensors file that is replaced whole.

Why not orbax: a state is a dozen megabytes on one host. Replacing one file gives all that is needed here (a killed
run leaves the last good state), without the storage engine and the event loop of orbax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from foundation.errors import UsageError
from foundation.writing import replacing
from model.module import Model
from runtime.training.params import Params, named, put

FILE = "state.safetensors"


class State(NamedTuple):
    """The model, and the optimizers' states, of the main weights and of the indexers."""

    model: Model
    main: Any
    index: Any


class _Stored(NamedTuple):
    """What a state file holds, its tensors named by these fields."""

    params: Params
    main: Any
    index: Any


def _stored(state: State) -> tuple[_Stored, dict[str, Any]]:
    """And its leaves by name."""
    stored = _Stored(named(state.model), state.main, state.index)
    return stored, {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}


def write(folder: Path, state: State, step: int, config_hash: str) -> None:
    """Replaces the state in `folder`. Raises `UsageError` where it cannot be written; the last one then stays."""
    # `ascontiguousarray` would give counters, which have no dims, one
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _stored(state)[1].items()}
    content = save(arrays, {"step": str(step), "config": config_hash})
    with replacing(folder / FILE) as temporary:
        temporary.write_bytes(content)


def read(folder: Path, like: State, config_hash: str) -> tuple[State, int]:
    """The state in `folder` in the shape of `like`, and its step. Raises `UsageError` for one of another config, or
    for a file that is no state."""
    path = folder / FILE
    stored, wanted = _stored(like)
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("config") != config_hash:
                raise UsageError(f"{folder} holds a run of another config; give its config, or another --out")
            leaves = [_as(leaf, file.get_tensor(name), name) for name, leaf in wanted.items()]
            step = int(metadata.get("step", ""))
            if step < 0:
                raise ValueError(f"its step is {step}")
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({' '.join(str(error).split())}); remove it to begin anew") from None
    restored: _Stored = jax.tree.unflatten(jax.tree.structure(stored), map(jax.numpy.asarray, leaves))
    model = nnx.clone(like.model)
    put(model, restored.params)
    return State(model, restored.main, restored.index), step


def _as(leaf: Any, found: np.ndarray, name: str) -> np.ndarray:
    """A stored tensor in the place of a leaf. Earlier versions kept `q_b` with heads, counters with a dim."""
    if found.dtype != leaf.dtype or found.size != leaf.size:
        raise ValueError(f"{name} is {found.dtype}{list(found.shape)}, not {leaf.dtype}{list(leaf.shape)}")
    return found.reshape(leaf.shape)
