"""Reading and writing: load matrices, placements, and the file SGLang starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from foundation.limits import within
from foundation.npy import read_npy
from foundation.reading import Unreadable, read_json
from foundation.writing import replacing
from model.config import MOST_LAYERS
from runtime.deployment.errors import LoadError, PreviousError
from runtime.planning.experts.packing import Floats, Packing
from runtime.planning.experts.placement import ExpertPlacement, checked_load, placement_of


def read_load(path: Path) -> Floats:
    """The load matrix [layers, experts] in the .npy file at `path`. Raises LoadError."""
    try:
        stored = read_npy(path)
        array = np.frombuffer(stored.content, stored.dtype).reshape(stored.shape, order="F" if stored.fortran else "C")
        return checked_load(array)
    except Unreadable as error:
        what = error if error.reason == "syntax" else f"cannot be read: {error}"
        raise LoadError(f"{path}: {what}") from None
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from None


def sglang_init_expert_location(placement: ExpertPlacement, dense_layers: int = 0) -> dict[str, list[list[int]]]:
    """What SGLang's `--init-expert-location FILE.json` reads: the expert in each slot, [layers][slots].

    SGLang passes every key of the file on as an argument, so there is this one only. It wants the same
    number of slots on every device, experts + `--ep-num-redundant-experts` in all, and a row for every
    layer of the model: `dense_layers` rows for the first ones, without experts, are put in front.
    """
    within("layers without experts (--dense-layers):", dense_layers, MOST_LAYERS)
    layers, slots = placement.slot_expert.shape
    dense = (np.arange(slots) % placement.replicas.shape[1]).tolist()
    return {"physical_to_logical_map": [dense] * dense_layers + placement.slot_expert.tolist()}


def read_placement(path: Path, load: Floats, nodes: int = 1, groups: int = 1) -> ExpertPlacement:
    """The placement in a file written by `glm5 plan experts --json`, weighed with `load`.

    Raises: PreviousError if the file is no such file or does not fit `load` [layers, experts].
    """
    try:
        document: Any = read_json(path)
        rows = document["placement"]
        room = np.array([len(device) for device in rows[0]])
        same = all([len(device) for device in layer] == room.tolist() for layer in rows)
        flat = np.array([[e for device in layer for e in device] for layer in rows], dtype=np.int64)
    except Unreadable as error:
        what = "no `placement` of [layers][devices][slots] in it"
        what = what if error.reason in ("syntax", "encoding") else f"cannot be read: {error}"
        raise PreviousError(f"{path}: {what}") from None
    except (ValueError, KeyError, TypeError, IndexError, OverflowError):
        raise PreviousError(f"{path}: no `placement` of [layers][devices][slots] in it") from None
    layers, experts = load.shape
    if not same or flat.ndim != 2 or len(flat) != layers:
        raise PreviousError(f"{path}: {len(rows)} layers != {layers} of the load, or uneven devices")
    if any(set(row) != set(range(experts)) for row in flat.tolist()):
        raise PreviousError(f"{path}: some layer does not place exactly the experts 0 ... {experts - 1}")
    if len(room) % nodes:
        raise PreviousError(f"{path}: devices {len(room)} % nodes {nodes} = {len(room) % nodes}, must be 0")
    expert = np.full((layers, len(room), room.max()), experts)
    expert[:, np.arange(room.max()) < room[:, None]] = flat
    packing = Packing.of(load, expert)
    return placement_of(packing, room, nodes, groups, packing.load.sum(axis=1) / len(room))


def write_json(document: Any, path: Path) -> None:
    """Write `document` to `path`, whole or not at all: see `foundation.writing.replacing`."""
    with replacing(path) as temporary, temporary.open("w") as file:
        json.dump(document, file, separators=(",", ":"))
        file.write("\n")
