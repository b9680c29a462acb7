"""Checkpoint directories, written: the exact inverse of `model.checkpoint`. Free of JAX."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from foundation.paths import Outside, inside
from foundation.writing import new_folder
from model import quantised
from model.checkpoint import FP8, SCALE_SUFFIX, Group, groups
from model.config import ModelConfig
from model.errors import CheckpointError
from model.formats import FORMATS, FP8_BLOCK
from model.hf_config import MODELOPT_FILE, MODELSLIM_FILE, from_hf
from model.safetensors_file import write
from model.stored_tensors import INDEX_FILE, SINGLE_FILE
from model.weights import Arrangement, Quantized, Weight

SHARD_BYTES = 5_000_000_000
FP8_CONFIG: Mapping[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}  # fmt: skip


def quantise_blocks(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix `[out, in]` as e4m3 values and float32 scales `[out/128, in/128]` (value * scale)."""
    held = quantised.quantise(FORMATS["fp8-block"], matrix)
    return held.values, held.scale


def save(
    path: str | Path,
    raw_config: Mapping[str, Any],
    weights: Mapping[str, Any],
    fp8: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint directory that transformers reads: config, shards and index.

    `weights` as `Checkpoint.load` returns them. With `fp8`, matrices that a block-FP8 release quantises
    are written as e4m3 with `weight_scale_inv`; weights that are `Quantized` keep their own values. The
    directory must not exist; an interrupted write leaves none behind under its name. Raises `UsageError` where it
    cannot be written.
    """
    raw = {key: value for key, value in raw_config.items() if key != "quantization_config"}
    if fp8 or _holds_quantised(weights):
        raw["quantization_config"] = FP8_CONFIG
    with new_directory(path) as folder:
        (folder / "config.json").write_text(json.dumps(raw, indent=2))
        write_shards(folder, _disassemble_all(from_hf(raw), weights, fp8), shard_bytes)


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory beside `path`, which takes its name when the block ends well and is removed when not.

    Raises `CheckpointError` where the directory exists, `UsageError` where it cannot be written.
    """
    path = Path(path)
    with new_folder(path) as temporary:
        if path.exists():
            raise CheckpointError(f"{path}: already exists; choose another directory or remove it")
        yield temporary


_COMPANIONS = {".json", ".jinja", ".txt", ".model"}


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what a checkpoint directory holds beside its weights and their description: tokenizer, chat template,
    generation settings. Raises `CheckpointError` for a link that leads out of it."""
    for path in sorted(source.iterdir()):
        if path.suffix in _COMPANIONS and path.name not in ("config.json", INDEX_FILE, MODELSLIM_FILE, MODELOPT_FILE):
            try:
                shutil.copyfile(inside(source, path.name), folder / path.name)
            except Outside as error:
                raise CheckpointError(f"{path}: {error}; a checkpoint's files lie in its own folder") from None


def _holds_quantised(weights: Mapping[str, Any]) -> bool:
    return any(
        isinstance(weight, Quantized)
        for held in (weights["outer"], *weights["layers"], *weights["mtp"])
        for weight in held.values()
    )


def write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors, in order, as safetensors shards of at most `shard_bytes` and their index; one shard at a time is
    in memory."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        write(folder / f"part-{len(shards)}", pending)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "part-0", folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"part-{index}", folder / final)
        weight_map.update(dict.fromkeys(names, final))
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2))


def _disassemble_all(cfg: ModelConfig, weights: Mapping[str, Any], fp8: bool) -> Iterator[tuple[str, np.ndarray]]:
    places = groups(cfg, bool(weights["mtp"]))
    for place, found in places.items():
        held = [weights["outer"]] if place == "outer" else weights[place]
        for group, values in zip(found, held, strict=True):
            for weight in group.weights:
                if weight.arrangement is Arrangement.HEAD_VALUES:
                    continue  # written together with the key half
                for name, tensor in _disassemble(cfg, group, weight, values):
                    if fp8 and weight.quantised and tensor.dtype != FP8 and not name.endswith(SCALE_SUFFIX):
                        tensor, scale = quantise_blocks(tensor.astype(np.float32))
                        yield name + SCALE_SUFFIX, scale
                    yield name, tensor


def _disassemble(
    cfg: ModelConfig, group: Group, weight: Weight, values: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    held = values[weight.name]
    names = list(group.tensors(weight))
    if weight.arrangement is Arrangement.HEAD_KEYS:
        keys, up = np.asarray(held), np.asarray(values["v_up"]).transpose(0, 2, 1)
        yield names[0], np.concatenate([keys, up], axis=1).reshape(-1, keys.shape[2])
        return
    if not isinstance(held, Quantized):
        parts = [("", np.asarray(held))]
    else:
        if np.asarray(held.values).dtype != FP8:
            raise CheckpointError(f"{names[0]}: only FP8 blocks are saved as they are; dequantise the weights first")
        parts = [("", np.asarray(held.values)), (SCALE_SUFFIX, np.asarray(held.scale))]
    for suffix, array in parts:
        remaining = iter(names)
        for view in array if weight.expert_count else (array,):
            if weight.arrangement is Arrangement.GATE_UP:
                yield next(remaining) + suffix, view[:, 0, :].T
                yield next(remaining) + suffix, view[:, 1, :].T
            else:
                yield next(remaining) + suffix, view.T if weight.arrangement is Arrangement.MATRIX else view
