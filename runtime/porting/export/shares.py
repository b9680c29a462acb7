"""Each device's share of a checkpoint's weights, as the exported graphs take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from backends.ascend.sums import bias_of
from backends.emulation.number_formats import NumberFormats
from backends.spmd.shard import divisible, is_split
from model.checkpoint import Checkpoint, groups
from model.config import ModelConfig
from model.formats import CacheFormats, Formats, scheme
from model.split import Grid
from model.weights import Quantized, Weight
from runtime.deployment.manifest import DeviceShare, Manifest
from runtime.deployment.tensors import TensorWriter

Sink = Callable[[DeviceShare, str, np.ndarray], None]


def devices(cfg: ModelConfig, grid: Grid) -> tuple[DeviceShare, ...]:
    """The devices of a grid, in the order stage, dp rank, tp rank."""
    return tuple(
        DeviceShare(place.index, place.stage, {"dp": place.dp, "tp": place.tp}, tuple(grid.stages[place.stage]))
        for place in grid.layout.places()
    )


def share(array: np.ndarray, weight: Weight, grid: Grid, device: DeviceShare) -> np.ndarray:
    """A device's part of a weight's values, or of its block scales."""
    dim, axes = grid.layout.split(weight)
    count = grid.layout.parts(axes)
    if not is_split(array, dim, count):
        return array
    place = 0
    for axis in axes:  # the outermost axis first
        place = place * grid.layout.axes[axis] + device.ranks[axis]
    size = array.shape[dim] // count
    return array[(slice(None),) * dim + (slice(place * size, (place + 1) * size),)]


def each_share(
    checkpoint: Checkpoint, grid: Grid, targets: tuple[DeviceShare, ...], manifest: Manifest, sink: Sink
) -> None:
    """Builds the checkpoint's weights one at a time, and hands each device its share: sink(device, name, array).

    Matrices in narrow formats keep the checkpoint's own values where it has that format, and are else rounded as
    `glm5 quantize` does.
    """
    cfg, mtp = checkpoint.config, manifest.mtp is not None
    keep = any(ref.name.endswith(".scale") for refs in manifest.weights.values() for ref in refs)
    numbers = emulated(checkpoint, manifest)
    held = {device.index: set(manifest.owners(device)) for device in targets}
    named = {owner: {ref.name for ref in manifest.weights[unit]} for owner, unit in manifest.owner_units.items()}
    order = _order(cfg, mtp)

    def deal(weight: Weight, value: np.ndarray | Quantized) -> np.ndarray | Quantized:
        owner = next(order)
        if numbers is not None:
            value = _exact(numbers.weight(weight, value, mtp=owner == "mtp"), numbers, weight, owner)
        layer = int(owner.partition(".")[2]) if owner.startswith("layers.") else None
        placed = grid.placement(cfg, layer) if weight.expert_count else None
        dim, axes = grid.layout.split(weight)
        value = divisible(value, weight, dim, grid.layout.parts(axes))  # scales of blocks that a cut goes through
        parts: dict[str, Any] = (
            {".values": value.values, ".scale": value.scale} if isinstance(value, Quantized) else {"": value}
        )
        for suffix, array in list(parts.items()):
            if placed is not None:
                array = array[placed[0]]  # the expert in each slot, copies included
            parts[suffix] = array
            for device in targets:
                if owner in held[device.index]:
                    sink(device, f"{owner}.{weight.name}{suffix}", share(array, weight, grid, device))
        if f"w.{weight.name}.bias" in named[owner]:
            for device in targets:
                if owner in held[device.index]:
                    values, scale = (share(parts[each], weight, grid, device) for each in (".values", ".scale"))
                    sink(device, f"{owner}.{weight.name}.bias", bias_of(values, scale))
        return _NOTHING  # what `load` would keep

    checkpoint.load(manifest.dtype if numbers is None else "float32", keep, mtp=mtp, convert=deal)
    for owner, unit in manifest.owner_units.items():
        table = next((ref for ref in manifest.weights[unit] if ref.name == "w.expert_slots"), None)
        if table is not None:
            layer = None if owner == "mtp" else int(owner.partition(".")[2])
            value = slot_table(cfg, grid, layer, table.shape[1])
            for device in targets:
                if owner in held[device.index]:
                    sink(device, f"{owner}.expert_slots", value)


_NOTHING = np.zeros(0, np.uint8)


def rows_of(manifest: Manifest) -> dict[str, str]:
    """The formats of caches that a package keeps in int8, by cache."""
    return manifest.extra.get("ascend", {}).get("rows", {})


def emulated(checkpoint: Checkpoint, manifest: Manifest) -> NumberFormats | None:
    """The number formats that a package computes and keeps caches in as an emulated chip does; None where the graph's
    own meaning, wide matrices or widened FP8 blocks, is all there is."""
    found = scheme(manifest.formats)
    formats = {ref.format for refs in manifest.weights.values() for ref in refs} - {"", "fp8-block"}
    rows = rows_of(manifest)
    if not formats and not rows:
        return None
    kept = Formats(found.dense, found.experts, cache=CacheFormats(**rows))
    return NumberFormats(checkpoint.config, kept, manifest.dtype == "float32")


def _exact(value: Any, numbers: NumberFormats, weight: Weight, owner: str) -> np.ndarray | Quantized:
    """Values in the format's own type where the emulation holds them in a wider one."""
    if not isinstance(value, Quantized):
        return value
    return Quantized(value.values.astype(numbers.scheme.held(weight, owner == "mtp").values, copy=False), value.scale)


def _order(cfg: ModelConfig, mtp: bool) -> Iterator[str]:
    """Whose each weight is that `Checkpoint.load` builds, in its order."""
    for place, found in groups(cfg, mtp).items():
        for index, group in enumerate(found):
            for _ in group.weights:
                yield f"layers.{index}" if place == "layers" else place


def slot_table(cfg: ModelConfig, grid: Grid, layer: int | None, width: int) -> np.ndarray:
    """int32 [experts, width]: the slots of each expert of a layer, repeated in turn."""
    assert cfg.moe is not None
    placed = grid.placement(cfg, layer)
    table = np.arange(cfg.moe.experts, dtype=np.int32)[:, None] if placed is None else placed[1]
    return np.ascontiguousarray(table[:, np.arange(width) % table.shape[1]])


def write_files(
    folder: Path, checkpoint: Checkpoint, grid: Grid, targets: tuple[DeviceShare, ...], manifest: Manifest
) -> dict[int, str]:
    """A safetensors file for each device; its name below `folder`, by the device's index."""
    shapes, names = {}, {}
    (folder / "weights").mkdir()
    for device in targets:
        tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        for owner in manifest.owners(device):
            refs = manifest.weights[manifest.owner_units[owner]]
            tensors |= {f"{owner}.{ref.name.partition('.')[2]}": (ref.shape, ref.dtype) for ref in refs}
        names[device.index] = f"weights/device-{device.index}.safetensors"
        shapes[device.index] = tensors
    with ExitStack() as files:
        writers = {i: files.enter_context(TensorWriter(folder / names[i], shapes[i])) for i in names}
        each_share(checkpoint, grid, targets, manifest, lambda device, name, a: writers[device.index].put(name, a))
    return names


def in_memory(checkpoint: Checkpoint, grid: Grid, manifest: Manifest) -> Callable[[DeviceShare, str], np.ndarray]:
    """Every device's weights, held in memory: what a `Runner` asks for where no files are written."""
    found: dict[tuple[int, str], Any] = {}
    each_share(checkpoint, grid, manifest.devices, manifest, lambda d, name, a: found.update({(d.index, name): a}))
    return lambda device, name: found[device.index, name]
