"""Whole steps of a few layers, timed, beside what their ops' prices come to (`runtime.pricing.whole_steps`).

The model's own layers, of each type one or two, where one device is to hold them whole and they fit a part of its
memory. Weights and caches are random. What a call takes is taken out, as it is of ops: of the same program with nothing
in it. Where the whole model is more than caches hold, so much is read between two steps: few layers would stay there.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hw_profiles
from backends.interface import Backend
from foundation.errors import CapacityError
from hw_profiles import Profile
from model import abstract
from model.config import LayerType, ModelConfig
from model.graph import Batch, Mode, StepOutput
from model.split import Layout
from model.weights import Arrangement, Weight, layer_weights, outer_weights
from runtime.deployment.manifest import Phase
from runtime.execution.batches import gear
from runtime.execution.local import feed
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.programs import Programs, ProgramShape
from runtime.porting.calibrate import Calibration, measure, prices, profile
from runtime.porting.calibrate_calls import FILLED, ModelRank
from runtime.porting.calibrate_ops import FORMAT_OF_DTYPE
from runtime.porting.calibrate_sizes import PAGE, Effort, host_bytes, loaded, pass_rows, random_buffers
from runtime.pricing.pricer import GraphPricer
from runtime.pricing.whole_steps import LEAST, MOST, PHASES, knots, model_key
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import PriceTables, Spec, pricer_of, spec_for

_LAYERS_OF_A_TYPE = 2
_CONTEXT = 256
_SHARE = 4  # of a device's memory that the layers may take: one of so many parts
_MOST_STEP_S = 2.0  # beyond which a step is left out
_VISIT_S = 0.2


@dataclasses.dataclass(frozen=True)
class _Step:
    """One shape of step: what the programs are given, and what the price is asked of."""

    phase: Phase
    batch: Batch
    mode: Mode
    priced: BatchShape


class EmptyPrograms(Programs):
    """Take what a model's programs take, and compute nothing of it."""

    def _step(
        self, shape: ProgramShape, weights: Any, caches: Any, fed: Any, previous: Any
    ) -> tuple[StepOutput, Any, Any]:
        batch, _ = feed.unpacked(fed, previous, shape.tokens, shape.pages)
        last = batch.tokens[:, -1]
        logits = jnp.zeros((shape.batch, self.cfg.vocab_size), jnp.float32) + last[:, None].astype(jnp.float32)
        return StepOutput(logits, logits[:, :1], caches), last, None


def empty_of(programs: Programs) -> EmptyPrograms:
    """Programs of the same weights and sizes."""
    return EmptyPrograms(
        programs.backend, programs.cfg, programs.weights, programs.pages, programs.page_size, programs.dtype
    )


def measure_with_steps(
    backend: Backend,
    effort: Effort = Effort(),
    progress: Callable[[int, int], Any] | None = None,
    rank: ModelRank | None = None,
) -> Calibration:
    """As `measure`, and with a rank its whole steps, where one device holds its layers and they fit."""
    clock = StepClock(backend, rank, effort) if rank else None
    found = measure(backend, effort, progress, rank, clock.visit if clock else None)
    if clock is None:
        return found
    described = profile(found, backend, "measured", "measured.prices.json")
    return dataclasses.replace(found, steps=clock.shares(described, prices(found, described)))


class StepClock:
    """Times steps of a model's layers, a little at each visit: a host has faster minutes and slower ones, and the ops
    are measured over several. Nothing is timed where no device holds whole layers, or they do not fit."""

    def __init__(self, backend: Backend, rank: ModelRank, effort: Effort):
        offered = backend.capabilities()
        self._cfg, self._dtype = few_layers(rank.cfg), offered.preferred_dtype
        self._keep_fp8 = rank.stored_fp8 and offered.fp8_weights
        self._timed: list[tuple[_Step, list[float], list[float]]] = []
        room = (offered.devices[0].memory_bytes or host_bytes()) / _SHARE
        held = ModelRank(self._cfg)
        held_bytes = held.weight_bytes(self._dtype, self._keep_fp8) + held.outer_bytes(self._dtype)
        if rank.layout.stage_devices > 1 or held_bytes > room:
            return
        self._cold = rank.weight_bytes(self._dtype, self._keep_fp8) > effort.cold_bytes
        try:
            self._between = _sweep(backend, effort.cold_bytes, self._dtype) if self._cold else _nothing
            self._both = self._made(backend, steps := list(_steps(self._cfg, effort)))
            for step in steps:
                for each in self._both:
                    _seconds(each, step)  # compiles
                if _seconds(self._both[0], step) <= _MOST_STEP_S:
                    self._timed.append((step, [], []))
        except Exception as error:
            if not (isinstance(error, CapacityError) or backend.exhausted(error)):
                raise
            self._timed = []

    def _made(self, backend: Backend, steps: Sequence[_Step]) -> tuple[Programs, EmptyPrograms]:
        pages = max(int(step.batch.page_table.max()) for step in steps)
        weights = random_weights(backend, self._cfg, self._dtype, self._keep_fp8)
        programs = Programs(backend, self._cfg, weights, pages, PAGE, self._dtype)
        _fill(programs)
        return programs, empty_of(programs)

    def visit(self) -> None:
        """Rounds of a part of a second for each step."""
        for step, *times in self._timed:
            until = time.perf_counter() + _VISIT_S
            while not times[0] or time.perf_counter() < until:
                for each, kept in zip(self._both, times, strict=True):
                    self._between()
                    kept.append(_seconds(each, step))

    def shares(self, described: Profile, tables: Mapping[str, Any]) -> dict[str, Any] | None:
        """`steps` of the price file. described, tables: the machine as it was measured. Frees what was timed."""
        if not self._timed:
            return None
        del self._both, self._between
        spec, pricer = self._priced(described, tables)
        found: dict[Phase, list[tuple[float, float]]] = {phase: [] for phase in PHASES}
        for step, *times in self._timed:
            whole, own = map(statistics.median, times)
            layers_s = pricer.layers_seconds(step.priced)
            head_s = pricer.seconds(step.priced) - layers_s
            share = (whole - own - head_s) / layers_s
            if LEAST <= share <= MOST:
                found[step.phase].append((layers_s / self._cfg.num_layers, share))
        if not all(found.values()):
            return None
        key = model_key(self._cfg, spec.formats)
        return {"model": key, **{phase: knots(points) for phase, points in found.items()}}

    def _priced(self, described: Profile, tables: Mapping[str, Any]) -> tuple[Spec, GraphPricer]:
        scheme = self._cfg.stored_scheme if self._keep_fp8 else FORMAT_OF_DTYPE[self._dtype]
        with tempfile.TemporaryDirectory() as folder:
            measured = _written(described, tables, Path(folder), {"chip.memory.cache_bytes": 1.0} if self._cold else {})
            spec = spec_for(self._cfg, measured, Layout(), scheme, engine="glm5", expert_load="uniform")
            return spec, pricer_of(spec, PriceTables())


def _sweep(backend: Backend, size: float, dtype: str) -> Callable[[], Any]:
    """Reads so many bytes."""
    (held,) = random_buffers(backend, (pass_rows(2 * size, dtype), 1024), dtype, 1)
    run = loaded(backend, "calibrate sweep", jnp.sum, (held,))
    return lambda: backend.get(run(held))


def _nothing() -> None:
    pass


def _written(described: Profile, tables: Mapping[str, Any], folder: Path, changes: Mapping[str, float]) -> Profile:
    beside = folder / "measured.prices.json"
    beside.write_text(json.dumps(tables), encoding="utf-8")
    path = folder / "measured.toml"
    path.write_text(
        hw_profiles.dumps(dataclasses.replace(described, prices=beside.name, prices_sha256="")), encoding="utf-8"
    )
    return hw_profiles.load(str(path), changes)


def few_layers(cfg: ModelConfig) -> ModelConfig:
    """The first layers of each type of the main stack, in their order."""
    seen: Counter[LayerType] = Counter()
    kept = []
    for kind in cfg.layers:
        seen[kind] += 1
        if seen[kind] <= _LAYERS_OF_A_TYPE:
            kept.append(kind)
    return dataclasses.replace(cfg, layers=tuple(kept), mtp_layers=0)


# --- measuring ------------------------------------------------------------------------------------------


def _seconds(programs: Programs, step: _Step) -> float:
    before = time.perf_counter()
    programs.fetch(programs.launch(step.batch, step.mode).ids)
    return time.perf_counter() - before


def _steps(cfg: ModelConfig, effort: Effort) -> Iterator[_Step]:
    rng, engine = np.random.default_rng(0), EngineConfig().described
    context = min(_CONTEXT, gear(cfg.max_positions, 1) // 2)
    for rows in sorted({min(count, engine.max_running_requests) for count in effort.tokens}):
        yield _step(cfg, rng, "decode", rows, 1, round(FILLED * context))
    for count in sorted({min(count, engine.chunked_prefill_tokens) for count in effort.chunks}):
        yield _step(cfg, rng, "prefill", 1, count, count)


def _step(cfg: ModelConfig, rng: np.random.Generator, phase: Phase, rows: int, tokens: int, end: int) -> _Step:
    pages = gear(-(-end // PAGE), EngineConfig().least_context // PAGE)
    batch = Batch(
        rng.integers(0, cfg.vocab_size, (rows, tokens)).astype(np.int32),
        np.full(rows, end - tokens, np.int32),
        np.full(rows, tokens, np.int32),
        1 + np.arange(rows * pages, dtype=np.int32).reshape(rows, pages),
    )
    if phase == "decode":
        return _Step(phase, batch, Mode(), BatchShape(np.full(rows, end), decode_rows=rows, graphed=True))
    return _Step(phase, batch, Mode("expanded"), BatchShape(prefill_chunks=[(tokens, 0)]))


def random_weights(backend: Backend, cfg: ModelConfig, dtype: str, keep_fp8: bool = False) -> dict[str, Any]:
    """Weights in the graph's layout with which layers neither grow nor vanish, and tokens fall on experts at random."""

    def made(kind: LayerType | None) -> dict[str, Any]:
        specs = abstract.abstract_weights(cfg, kind, jnp.dtype(dtype), keep_fp8)
        described = {each.name: each for each in (outer_weights(cfg) if kind is None else layer_weights(cfg, kind))}
        return {name: jax.tree.map(partial(_put, backend, described[name]), spec) for name, spec in specs.items()}

    return {"outer": made(None), "layers": [made(kind) for kind in cfg.layers], "mtp": []}


def _put(backend: Backend, weight: Weight, spec: Any) -> Any:
    if len(weight.shape) == 1:
        value = 1.0 if weight.component == "norms" and not weight.name.endswith("_bias") else 0.0
        return backend.put(np.full(spec.shape, value, spec.dtype))
    if spec.dtype == jnp.float32 and weight.stays_narrow and spec.shape != weight.shape:  # the scales of FP8 blocks
        scale = 0.01
    else:
        scale = weight.shape[0 if len(weight.shape) == 2 or weight.arrangement is Arrangement.GATE_UP else 1] ** -0.5
    return random_buffers(backend, spec.shape, str(spec.dtype), 1, scale, backend.capabilities().order(weight))[0]


def _fill(programs: Programs) -> None:
    """Caches of random rows: zeros would all be scored alike."""
    programs.caches = [
        {name: random_buffers(programs.backend, held.shape, str(held.dtype), 1)[0] for name, held in cache.items()}
        for cache in programs.caches
    ]
