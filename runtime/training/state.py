"""A run's state on disk: parameters, optimizer moments and the step, in one safetensors file that is replaced whole.

Why not orbax: a state is a dozen megabytes on one host. Replacing one file gives all that is needed here (a killed
run leaves the last good state), without the storage engine and the event loop of orbax.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from foundation.errors import UsageError
from foundation.writing import replacing
from model.module import Model
from runtime.training.params import named, put

FILE = "state.safetensors"


class State(NamedTuple):
    """The model, and the optimizers' states, of the main weights and of the indexers."""

    model: Model
    main: Any
    index: Any


Kept = TypeVar("Kept", bound=tuple)
"""A state: a named tuple whose first field is the model, the others trees of arrays."""


def _stored(state: tuple) -> tuple[Any, dict[str, Any]]:
    """What a state file holds: `params` in the place of the model, and the other fields. And its leaves by name."""
    fields = ("params", *state._fields[1:])  # type: ignore[attr-defined]
    stored = collections.namedtuple("Stored", fields)(named(state[0]), *state[1:])
    return stored, {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}


def write(folder: Path, state: tuple, step: int, config_hash: str) -> None:
    """Replaces the state in `folder`. Raises `UsageError` where it cannot be written; the last one then stays."""
    write_arrays(folder / FILE, _stored(state)[1], {"step": str(step), "config": config_hash})


def write_arrays(path: Path, leaves: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Replaces a file of arrays by name, whole."""
    # `ascontiguousarray` would give counters, which have no dims, one
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}
    content = save(arrays, dict(metadata))
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read(folder: Path, like: Kept, config_hash: str) -> tuple[Kept, int]:
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
    restored = jax.tree.unflatten(jax.tree.structure(stored), map(jax.numpy.asarray, leaves))
    model = nnx.clone(like[0])
    put(model, restored.params)
    return like._replace(model=model, **dict(zip(like._fields[1:], restored[1:], strict=True))), step  # type: ignore[attr-defined]


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file that `write_arrays` wrote, and its metadata."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def step_of(folder: Path) -> int:
    """The step of the state in `folder`, before anything like it is there to compare; `read` says what is wrong."""
    try:
        with safe_open(folder / FILE, "np") as file:
            return int((file.metadata() or {}).get("step", "0"))
    except (OSError, SafetensorError, ValueError):
        return 0


def _as(leaf: Any, found: np.ndarray, name: str) -> np.ndarray:
    """A stored tensor in the place of a leaf. Earlier versions kept `q_b` with heads, counters with a dim."""
    if found.dtype != leaf.dtype or found.size != leaf.size:
        raise ValueError(f"{name} is {found.dtype}{list(found.shape)}, not {leaf.dtype}{list(leaf.shape)}")
    return found.reshape(leaf.shape)
