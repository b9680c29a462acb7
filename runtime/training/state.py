"""A run's state on disk: parameters, optimizer moments and the step, in one safetensors file that is replaced whole.

Why not orbax: a state is a dozen megabytes on one host. Replacing one file gives all that is needed here (a killed
run leaves the last good state), while orbax brings eleven packages, a storage engine and an event loop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from foundation.errors import UsageError
from foundation.writing import replacing

FILE = "state.safetensors"


class State(NamedTuple):
    """params by name; the optimizers' states, of the main weights and of the indexers."""

    params: dict[str, Any]
    main: Any
    index: Any


def _named(state: State) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def write(folder: Path, state: State, step: int, config_hash: str) -> None:
    """Replaces the state in `folder`. Raises `UsageError` where it cannot be written; the last one then stays."""
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in _named(state)}
    content = save(arrays, {"step": json.dumps(step), "config": config_hash})
    with replacing(folder / FILE) as temporary:
        temporary.write_bytes(content)


def read(folder: Path, like: State, config_hash: str) -> tuple[State, int]:
    """The state in `folder` in the shape of `like`, and its step. Raises `UsageError` for one of another config."""
    path = folder / FILE
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("config") != config_hash:
                raise UsageError(f"{folder} holds a run of another config; give its config, or another --out")
            leaves = [file.get_tensor(name) for name, _ in _named(like)]
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({' '.join(str(error).split())}); remove it to begin anew") from None
    restored = [jax.numpy.asarray(leaf) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), restored), int(json.loads(metadata["step"]))
