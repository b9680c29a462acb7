"""What a checkpoint directory stores, by the names that the model gives its tensors. Free of JAX.

The shards of an index, or one file; MTP layers in a file beside them that no index lists; and experts that
transformers has fused into one tensor (`save_original_format=False`), seen one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from foundation.paths import Outside, inside
from foundation.reading import Unreadable, read_json
from model.errors import CheckpointError
from model.safetensors_file import SafetensorsFile

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED = 1 << 24  # elements at a time
_FUSED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)(_scale_inv|_scale)?$")
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class StoredTensor(NamedTuple):
    """A tensor of a file, or the part of one that is an expert's matrix: its rows from `first` on."""

    file: SafetensorsFile
    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0

    @property
    def dtype_name(self) -> str:
        """As the header spells it: "BF16", "F8_E4M3", .."""
        return self.file.dtype_name(self.name)

    def array(self) -> np.ndarray:
        """A view into its file."""
        whole = self.file.array(self.name)
        return whole if self.expert is None else whole[self.expert, self.first : self.first + self.shape[0]]


def stored_tensors(path: Path, mtp_prefixes: tuple[str, ...] = ()) -> dict[str, StoredTensor]:
    """Of the checkpoint directory `path`; reads headers only. mtp_prefixes: what the names of each MTP layer begin
    with; a layer that the index leaves out is looked for in the files beside it.

    Raises `CheckpointError`.
    """
    held, files = _listed(path)
    absent = tuple(prefix for prefix in mtp_prefixes if not any(name.startswith(prefix) for name in held))
    if absent:
        for beside in sorted(set(path.glob("*.safetensors")) - files):
            file = _shard(path, beside.name)
            held |= {name: file for name in file.names if name.startswith(absent) and name not in held}
    found: dict[str, StoredTensor] = {}
    for name, file in held.items():
        for seen, tensor in _experts(file, name) or [(name, StoredTensor(file, name, file.shape(name)))]:
            if seen in found:
                raise CheckpointError(f"{path}: tensor {seen} is stored twice, by itself and in {name}")
            found[seen] = tensor
    return found


def stores_own_head(path: Path) -> bool:
    """Whether the checkpoint directory stores a head that is not its embedding; not where it cannot be read."""
    try:
        held = stored_tensors(path)
    except CheckpointError:
        return False
    return HEAD in held and not _same(held[HEAD], held.get(EMBEDDING))


def _same(a: StoredTensor, b: StoredTensor | None) -> bool:
    """Whether two tensors hold the same bytes; reads as far as they do."""
    if b is None or (a.shape, a.dtype_name) != (b.shape, b.dtype_name):
        return False
    rows = max(1, _COMPARED // max(1, int(np.prod(a.shape[1:]))))
    left, right = a.array(), b.array()
    return all(
        left[start : start + rows].tobytes() == right[start : start + rows].tobytes()
        for start in range(0, len(left), rows)
    )


def _listed(path: Path) -> tuple[dict[str, SafetensorsFile], set[Path]]:
    """Tensor name to the open file that holds it, and the paths of those files."""
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if not index.exists():
        if not single.exists():
            raise CheckpointError(f"{path}: holds neither {INDEX_FILE} nor {SINGLE_FILE}")
        shard = _shard(path, SINGLE_FILE)
        return dict.fromkeys(shard.names, shard), {single}
    try:
        weight_map = read_json(inside(path, INDEX_FILE))["weight_map"]
        shards = {
            name: _shard(path, name, f"{index}: `weight_map` names ") for name in sorted(set(weight_map.values()))
        }
    except Outside as error:
        raise CheckpointError(f"{index}: {error}; a checkpoint's files lie in its own folder") from None
    except Unreadable as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: not a safetensors index (no valid `weight_map`)") from None
    for tensor, name in weight_map.items():
        if tensor not in shards[name].names:
            raise CheckpointError(f"{path / name}: tensor {tensor} is missing (the index promises it)")
    return {tensor: shards[name] for tensor, name in weight_map.items()}, {path / name for name in shards}


def _shard(path: Path, name: str, said: str = "") -> SafetensorsFile:
    """The file `name` of the checkpoint directory `path`. said: what a refusal of the name begins with."""
    try:
        return SafetensorsFile(inside(path, name))
    except Outside as error:
        if error.reason == "absent":
            raise CheckpointError(f"{path / name}: shard is missing") from None
        where = f"{said}{name[:80]!r}" if said else path / name
        raise CheckpointError(f"{where}: {error}; a checkpoint's files lie in its own folder") from None


def _experts(file: SafetensorsFile, name: str) -> Iterator[tuple[str, StoredTensor]] | None:
    """The matrices of a fused tensor [experts, out, in], or its scales, under the names of separate ones; None for any
    other tensor. Gate comes before up."""
    match, shape = _FUSED.match(name), file.shape(name)
    if match is None or len(shape) != 3:
        return None
    prefix, fused, suffix = match[1], match[2], match[3] or ""
    halves = _HALVES[fused]
    if shape[1] % len(halves):
        return None
    rows = shape[1] // len(halves)
    return (
        (f"{prefix}{expert}.{half}.weight{suffix}", StoredTensor(file, name, (rows, shape[2]), expert, rows * index))
        for expert in range(shape[0])
        for index, half in enumerate(halves)
    )
