"""Runs a package's units in order: on one device, or on all devices of a layout in lockstep on this host.

The wiring is the names (see `runtime.deployment.manifest`): every device has an environment of named buffers; a graph
reads and writes it, and a collective is done here, in numpy, over the devices of its axis.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backends.errors import ArtifactError
from runtime.deployment.manifest import OUT, DeviceShare, GearUnits, Manifest, Step
from runtime.deployment.tensors import TensorReader, numpy_dtype
from runtime.execution.package.executor import BoundGraph, Executor, Loaded, graph_file, refusing

DpTp = tuple[int, int]  # dp, tp
Env = dict[str, Any]  # buffers by name


class StepBatch(NamedTuple):
    """A step's inputs of one dp rank, int32: tokens [b,t]; start, length [b]; page_table [b,p]."""

    tokens: np.ndarray
    start: np.ndarray
    length: np.ndarray
    page_table: np.ndarray


Weights = Callable[[DeviceShare, str], np.ndarray]
"""A device's share of a weight: "layers.3.q_a", "outer.embed", "mtp.head_norm"."""


def stored_weights(folder: Path, manifest: Manifest) -> Weights | None:
    """The weights in a package's own files; None where it has none. Raises `ArtifactError` for a damaged one."""
    if any(device.weights is None for device in manifest.devices):
        return None
    files = {device.index: TensorReader(folder / str(device.weights)) for device in manifest.devices}
    return lambda device, name: files[device.index].array(name)


class Runner:
    """A package with its weights and caches in an executor's memory. linked: on one device, let the runtime have a
    step's graphs as one, where it can.

    Raises `ArtifactError` where the package does not hold all devices of its layout.
    """

    def __init__(self, folder: Path, manifest: Manifest, executor: Executor, weights: Weights, linked: bool = False):
        self.folder, self.manifest, self.executor = folder, manifest, executor
        self.devices = {(d.stage, d.ranks.get("dp", 0), d.ranks.get("tp", 0)): d for d in manifest.devices}
        self.dp, self.tp = manifest.axes.get("dp", 1), manifest.axes.get("tp", 1)
        self.stages = sorted({d.stage for d in manifest.devices})
        ran = sorted(layer for stage in self.stages for layer in self._any(stage).layers)
        if len(self.devices) != len(self.stages) * self.dp * self.tp or ran != [x.index for x in manifest.layers]:
            raise ArtifactError(
                f"{folder}: holds {len(self.devices)} of the devices of {manifest.layout}; to run it here, export it "
                "without --device"
            )
        owned = [(place, owner) for place, device in self.devices.items() for owner in manifest.owners(device)]
        self._weights: dict[tuple[Any, str | None], Env] = {
            (place, owner): self._load(self.devices[place], owner, weights) for place, owner in owned
        }
        self._owned = owned
        self.clear()
        self._loaded: dict[str, Loaded] = {}
        self._bound: dict[Any, BoundGraph] = {}
        self.load_s = 0.0  # spent on loading graphs so far
        self._whole: dict[int, BoundGraph | None] = {}  # a program's step as one graph
        self._linked = linked and not manifest.axes and len(manifest.devices) == 1

    def clear(self) -> None:
        """Makes all caches anew, empty."""
        self.caches: dict[tuple[tuple[int, int, int], str | None], Env] = {
            (place, owner): {
                cache.name: self.executor.put(np.zeros(cache.shape, numpy_dtype(cache.dtype)))
                for cache in self.manifest.caches[self.manifest.owner_units[owner]]
            }
            for place, owner in self._owned
            if owner != "outer"
        }

    def _any(self, stage: int) -> DeviceShare:
        return next(device for place, device in self.devices.items() if place[0] == stage)

    def _load(self, device: DeviceShare, owner: str, weights: Weights) -> dict[str, Any]:
        out = {}
        for ref in self.manifest.weights[self.manifest.owner_units[owner]]:
            name = f"{owner}.{ref.name.partition('.')[2]}"
            array = weights(device, name)
            if tuple(array.shape) != ref.shape or array.dtype.name != ref.dtype:
                raise ArtifactError(
                    f"{self.folder}: weight {name} is {array.dtype.name}{list(array.shape)}, the manifest says "
                    f"{ref.dtype}{list(ref.shape)}; export it again"
                )
            out[ref.name] = self.executor.put(array)
        return out

    # --- a step

    def step(self, program: GearUnits, batches: Sequence[StepBatch]) -> list[Env]:
        """Feeds each dp rank its batch. Returns each dp rank's results: "logits" and "hidden" buffers, and what led
        to them."""
        envs = self._envs(batches)
        if self._linked and (whole := self._step_as_one(program)):
            return [self._run_whole(whole, envs[0, 0])]
        for stage in self.stages:
            self._unit(program, "view", stage, envs, None)
            if stage == self.stages[0]:
                self._unit(program, "embed", stage, envs, "outer")
            for layer in self._any(stage).layers:
                self._unit(program, self.manifest.owner_units[f"layers.{layer}"], stage, envs, f"layers.{layer}")
        self._unit(program, "head", self.stages[-1], envs, "outer")
        return [envs[dp, 0] for dp in range(self.dp)]

    def _step_as_one(self, program: GearUnits) -> BoundGraph | None:
        if id(program) not in self._whole:
            begin = time.perf_counter()
            loaded = self.executor.load_step(self.folder, self.manifest, program)
            fixed = {
                name if name.startswith("outer.") else f"{owner}.{name}": buffer
                for (_, owner), held in self._weights.items()
                if owner != "mtp"
                for name, buffer in held.items()
            }
            with refusing(self.folder, self.executor.name):
                self._whole[id(program)] = loaded.bind(fixed) if loaded else None
            self.load_s += time.perf_counter() - begin
        return self._whole[id(program)]

    def _run_whole(self, whole: BoundGraph, env: Env) -> Env:
        held = {(owner, name): cache for (_, owner), caches in self.caches.items() for name, cache in caches.items()}
        with refusing(self.folder, self.executor.name):
            results = whole({**env, **{f"{owner}.{name}": cache for (owner, name), cache in held.items()}})
        for (place, owner), caches in self.caches.items():
            if owner != "mtp":
                self.caches[place, owner] = {name: results[f"{owner}.{name}{OUT}"] for name in caches}
        return {**env, "logits": results["logits.out"], "hidden": results["hidden.out"]}

    def draft(self, program: GearUnits, batches: Sequence[StepBatch], hidden: Sequence[Any]) -> list[Env]:
        """The MTP layer: a batch of following tokens, and the hidden states of each dp rank's positions."""
        assert self.manifest.mtp is not None
        envs = self._envs(batches)
        for (dp, _), env in envs.items():
            env["hidden"] = hidden[dp]
        self._unit(program, self.manifest.mtp, self.stages[-1], envs, "mtp")
        return [envs[dp, 0] for dp in range(self.dp)]

    def _envs(self, batches: Sequence[StepBatch]) -> dict[DpTp, Env]:
        return {
            (dp, tp): {name: self.executor.put(value) for name, value in batches[dp]._asdict().items()}
            for dp in range(self.dp)
            for tp in range(self.tp)
        }

    def _unit(self, program: GearUnits, unit: str, stage: int, envs: Mapping[DpTp, Env], owner: str | None) -> None:
        made: dict[DpTp, Env] = {rank: {} for rank in envs}
        for number, step in enumerate(program.units[unit]):
            if step.kind != "graph":
                self._exchange(step, made)
                continue
            for rank, env in envs.items():
                place = (stage, *rank)
                bound = self._graph(step, (id(program), unit, number, owner, place))
                with refusing(self.folder / graph_file(step, self.executor.platform), self.executor.name):
                    made[rank].update(bound({**env, **made[rank], **self._cache(place, owner)}))
        for rank, results in made.items():
            for name, value in results.items():
                if name.startswith("cache."):
                    self._cache((stage, *rank), owner)[name.removesuffix(OUT)] = value
                elif name.endswith(OUT):
                    envs[rank][name.removesuffix(OUT)] = value

    def _cache(self, place: tuple[int, int, int], owner: str | None) -> Env:
        return self.caches[place, owner] if owner not in (None, "outer") else {}

    def _graph(self, step: Step, key: tuple[Any, ...]) -> BoundGraph:
        """The step's graph with a device's weights and rank in place."""
        if key not in self._bound:
            file = graph_file(step, self.executor.platform)
            if file not in self._loaded:
                begin = time.perf_counter()
                self._loaded[file] = self.executor.load(self.folder / file, step)
                self.load_s += time.perf_counter() - begin
            *_, owner, place = key
            inputs = {value.name for value in step.inputs}
            held = {**self._weights.get((place, "outer"), {}), **self._weights.get((place, owner), {})}
            fixed = {name: buffer for name, buffer in held.items() if name in inputs}
            for axis, rank in (("rank.dp", place[1]), ("rank.tp", place[2])):
                if axis in inputs:
                    fixed[axis] = self.executor.put(np.asarray(rank, np.int32))
            with refusing(self.folder / file, self.executor.name):
                self._bound[key] = self._loaded[file].bind(fixed)
        return self._bound[key]

    def _exchange(self, step: Step, made: Mapping[DpTp, Env]) -> None:
        source, result = step.inputs[0].name, step.outputs[0].name
        across = 0 if step.axis == "dp" else 1
        groups: dict[int, list[DpTp]] = {}
        for rank in sorted(made):
            groups.setdefault(rank[1 - across], []).append(rank)
        for group in groups.values():
            parts = [self.executor.get(made[rank][source]) for rank in group]
            for rank, value in zip(group, collective(step.kind, parts, step.dim), strict=True):
                made[rank][result] = self.executor.put(value)


def collective(kind: str, parts: list[np.ndarray], dim: int) -> list[np.ndarray]:
    """What each rank has after a collective, from what each had before it (see `Step`)."""
    size, dtype = len(parts), parts[0].dtype
    if kind == "all_gather":
        return [np.concatenate(parts, axis=dim)] * size
    if kind == "all_to_all":
        cut = [np.split(part, size, axis=dim) for part in parts]
        return [np.concatenate([each[rank] for each in cut], axis=dim) for rank in range(size)]
    wide = np.float32 if dtype.kind not in "iu" and dtype.itemsize < 4 else dtype
    total = np.sum([part.astype(wide) for part in parts], axis=0).astype(dtype)
    return [total] * size if kind == "all_reduce" else list(np.split(total, size, axis=dim))
