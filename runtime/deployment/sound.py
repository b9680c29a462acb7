"""What a plan or a manifest must hold beside its fields' types, so that whoever goes through it finds what it names.

Faults are in words, behind the place where they are, the first first. Whether the figures are right is another
question (`runtime.planning.check`, `runtime.porting.export.check`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from model.config import MOST_DRAFTS, MOST_EXPERTS, MOST_LAYERS, MOST_POSITIONS, MOST_VOCAB, MOST_WIDTH
from model.split import MOST_DEVICES
from runtime.deployment.document import Keys, place
from runtime.deployment.tensors import numpy_dtype

# What is gone through is described in `plan.py` and `manifest.py`, which ask here as they read.
_Plan = _Pool = _Manifest = _GearUnits = _Step = Any

_FIGURES = ("ttft_ms", "tpot_ms", "e2e_ms")
_AXES = ("dp", "tp")


MOST_COUNT = 2**53
"""Of anything counted: up to there float64 holds each whole number."""


def number_faults(document: Any, path: Keys = ()) -> Iterator[str]:
    """The integers in a parsed document that are more than `MOST_COUNT`."""
    if isinstance(document, int) and abs(document) > MOST_COUNT:
        yield f"{place(path)} is {document:.3g}, which must lie within 2^53 of 0"
    elif isinstance(document, dict | list | tuple):
        for key, item in document.items() if isinstance(document, dict) else enumerate(document):
            if isinstance(item, dict | list | tuple | int):
                yield from number_faults(item, (*path, key))


def _outside(where: str, count: int, least: int, most: int) -> Iterator[str]:
    if not least <= count <= most:
        yield f"{where} is {count:,}, which must lie between {least:,} and {most:,}"


def plan_faults(plan: _Plan) -> Iterator[str]:
    """What is wrong with a plan, as far as its readers would stumble over it."""
    demand = plan.demand
    yield from _outside("pools: their number", len(plan.pools), 1, 2)
    yield from _outside("devices of all pools: their number", len(plan.devices), 1, MOST_DEVICES)
    yield from _outside("demand.isl", demand.isl, 1, MOST_POSITIONS)
    yield from _outside("demand.osl", demand.osl, 1, MOST_POSITIONS)
    if not 0 < demand.length_ratio <= 1:
        yield f"demand.length_ratio is {demand.length_ratio:g}, which must be above 0 and at most 1"
    if demand.length_cv is not None and not demand.length_cv > 0:
        yield f"demand.length_cv is {demand.length_cv:g}, which must be above 0"
    if not 1 <= demand.length_most <= MOST_POSITIONS:
        yield f"demand.length_most is {demand.length_most:g}, which must be 1 or more"
    for number, (tokens_in, tokens_out, weight) in enumerate(demand.histogram):
        yield from _outside(f"demand.histogram[{number}][0]", tokens_in, 1, MOST_POSITIONS)
        yield from _outside(f"demand.histogram[{number}][1]", tokens_out, 1, MOST_POSITIONS)
        if not weight > 0:
            yield f"demand.histogram[{number}][2] is {weight:g}, which must be above 0"
    if not 0 <= demand.shared_prefix <= 1:
        yield f"demand.shared_prefix is {demand.shared_prefix:g}, which must be from 0 to 1"
    yield from _outside("demand.prefix_groups", demand.prefix_groups, 1, MOST_COUNT)
    yield from _outside("demand.turns", demand.turns, 1, MOST_COUNT)
    if not demand.think_s >= 0:
        yield f"demand.think_s is {demand.think_s:g}, which must be 0 or more"
    if demand.rate is not None and not demand.rate > 0:
        yield f"demand.rate is {demand.rate:g}, which must be above 0"
    for number, pool in enumerate(plan.pools):
        yield from _pool(pool, f"pools[{number}]")
    for name in _FIGURES if plan.predicted else ():
        if "mean" not in getattr(plan.predicted, name):
            yield f"predicted.{name} lacks its mean"


def _pool(pool: _Pool, where: str) -> Iterator[str]:
    yield from _outside(f"{where}.devices: their number", len(pool.devices), 1, MOST_DEVICES)
    yield from _outside(f"{where}.replicas", pool.replicas, 1, MOST_DEVICES)
    yield from _outside(f"{where}.page_tokens", pool.page_tokens, 1, MOST_POSITIONS)
    yield from _outside(f"{where}.drafts", pool.drafts, 0, MOST_DRAFTS)
    if pool.acceptance and (len(pool.acceptance) != pool.drafts or not all(0 <= p <= 1 for p in pool.acceptance)):
        yield f"{where}.acceptance must hold a chance from 0 to 1 for each of {pool.drafts} drafts, or nothing"
    ranges = pool.acceptance_ranges
    within = all(0 <= low <= p <= high <= 1 for p, (low, high) in zip(pool.acceptance, ranges, strict=False))
    if ranges and not (within and len(ranges) == len(pool.acceptance)):
        yield f"{where}.acceptance_ranges must hold a range around each of {len(pool.acceptance)} chances, or nothing"
    for number, device in enumerate(pool.devices):
        at = f"{where}.devices[{number}]"
        if not 0 <= device.layers[0] < device.layers[1] <= MOST_LAYERS:
            yield f"{at}.layers are {list(device.layers)}, which must be a first layer and one past the last"
        if missing := {"tp", "dp", "ep"} - device.ranks.keys():
            yield f"{at}.ranks lack {min(missing)}"
        for name in ("node", "replica", "stage", "kv_pages"):
            if getattr(device, name) < 0:
                yield f"{at}.{name} is {getattr(device, name)}, which must be 0 or more"
    if pool.experts is None:
        return
    slots = pool.experts.slots_per_device
    yield from _outside(f"{where}.experts.slots_per_device", slots, 1, MOST_EXPERTS)
    yield from _outside(f"{where}.experts.slot_expert: its layers", len(pool.experts.slot_expert), 1, MOST_LAYERS)
    for number, row in enumerate(pool.experts.slot_expert):
        at = f"{where}.experts.slot_expert[{number}]"
        yield from _outside(f"{at}: its slots", len(row), 1, slots * pool.layout.ep)
        yield from _outside(f"{at}: its least expert", min(row, default=0), 0, MOST_EXPERTS)
        yield from _outside(f"{at}: its last expert", max(row, default=0), 0, MOST_EXPERTS)


def manifest_faults(manifest: _Manifest) -> Iterator[str]:
    """What is wrong with a manifest, as far as its readers would stumble over it."""
    yield from _outside("model.vocab_size", manifest.model.vocab_size, 1, MOST_VOCAB)
    yield from _outside("model.hidden_size", manifest.model.hidden_size, 1, MOST_WIDTH)
    yield from _outside("model.max_positions", manifest.model.max_positions, 1, MOST_POSITIONS)
    yield from _outside("page_size", manifest.page_size, 1, MOST_POSITIONS)
    yield from _outside("pool_pages", manifest.pool_pages, 1, MOST_POSITIONS)
    yield from _outside("programs: their number", len(manifest.programs), 1, MOST_POSITIONS)
    yield from _outside("layers: their number", len(manifest.layers), 1, MOST_LAYERS)
    yield from _outside("devices: their number", len(manifest.devices), 1, MOST_DEVICES)
    for axis, size in manifest.axes.items():
        if axis not in _AXES:
            yield f"axes: {axis[:60]!r} is none of {', '.join(_AXES)}"
        yield from _outside(f"axes.{axis}", size, 1, MOST_DEVICES)
    run = {layer.unit for layer in manifest.layers} | ({manifest.mtp} if manifest.mtp else set())
    for unit in sorted(run):
        if unit not in manifest.caches:
            yield f"caches: none of unit {unit[:60]!r}, which a layer runs"
        if unit not in manifest.weights:
            yield f"weights: none of unit {unit[:60]!r}, which a layer runs"
    if "outer" not in manifest.weights:
        yield "weights: none of 'outer'"
    yield from _devices(manifest)
    for name, held in manifest.caches.items():
        for cache in held:
            if cache.shape[:2] != (manifest.pool_pages, manifest.page_size):
                yield f"caches.{name}: {cache.name} is {list(cache.shape)}, not pool_pages x page_size x its widths"
    for number, program in enumerate(manifest.programs):
        yield from _program(program, manifest, run, f"programs[{number}]")


def _devices(manifest: _Manifest) -> Iterator[str]:
    known = [layer.index for layer in manifest.layers]
    if len(set(known)) != len(known) or min(known) < 0:
        yield "layers: each index must be there once, and be 0 or more"
    for number, device in enumerate(manifest.devices):
        if not device.layers or set(device.layers) - set(known):
            yield f"devices[{number}].layers must be some of those in layers"
        for axis in _AXES:
            if not 0 <= device.ranks.get(axis, 0) < manifest.axes.get(axis, 1):
                yield f"devices[{number}].ranks.{axis} is no rank of an axis of {manifest.axes.get(axis, 1)}"


def _program(program: _GearUnits, manifest: _Manifest, run: set[str], where: str) -> Iterator[str]:
    gear = program.gear
    yield from _outside(f"{where}.gear.sequences", gear.sequences, 1, MOST_WIDTH)
    yield from _outside(f"{where}.gear.tokens", gear.tokens, 1, MOST_WIDTH)
    yield from _outside(f"{where}.gear.sequences x tokens", gear.sequences * gear.tokens, 1, MOST_POSITIONS)
    yield from _outside(f"{where}.gear.context_pages", gear.context_pages, 1, manifest.pool_pages)
    for unit in sorted({"view", "embed", "head", *run} - program.units.keys()):
        yield f"{where}.units: no unit {unit[:60]!r}"
    for unit, steps in program.units.items():
        for number, step in enumerate(steps):
            yield from _step(step, manifest, unit, f"{where}.units.{unit}[{number}]")


def _step(step: _Step, manifest: _Manifest, unit: str, where: str) -> Iterator[str]:
    caches = {cache.name: cache for cache in manifest.caches.get(unit, ())}
    for value in (*step.inputs, *step.outputs):
        if any(not 0 <= size <= MOST_POSITIONS for size in value.shape):
            yield f"{where}: {value.name[:60]} has the impossible shape {list(value.shape)[:8]}"
        if not _is_dtype(value.dtype):
            yield f"{where}: {value.name[:60]} has the unknown type {value.dtype[:60]!r}"
        held = caches.get(value.name.removesuffix(".out"))
        if held and held != type(held)(held.name, value.shape, value.dtype):
            yield f"{where}: {value.name[:60]} is not the cache that `caches` describes"
    if step.kind == "graph":
        if not step.files:
            yield f"{where}: a graph without a file"
        return
    if not (step.inputs and step.outputs):
        yield f"{where}: {step.kind} needs an input and an output"
    elif step.axis not in manifest.axes:
        yield f"{where}: {step.kind} over {step.axis[:60]!r}, which is no axis"
    elif not 0 <= step.dim < max(1, len(step.inputs[0].shape)):
        yield f"{where}: {step.kind} along dim {step.dim} of {len(step.inputs[0].shape)}"


def _is_dtype(name: str) -> bool:
    try:
        return numpy_dtype(name).kind in "biufV"
    except (TypeError, ValueError):
        return False
