"""Checks a package against the graph it was cut from: an independent runtime takes the same steps as JAX.

Both sides take several steps in a row, each with its own caches, on random tokens, ragged lengths and shuffled pages,
up to and past `index_topk` where the gear reaches that far. All devices of the layout run in lockstep; what is compared
is every sequence's logits and every cache row that a real token was written to.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backends.emulation.host import Converted
from backends.toolchains.narrow import rounds_activations
from foundation.errors import Failure, UsageError
from model import graph, ops
from model.cache import cache_rows
from model.checkpoint import Checkpoint
from model.config import Gqa, ModelConfig
from model.formats import matrix_format
from model.split import Grid
from model.weights import layer_weights
from runtime.deployment.manifest import GearUnits, Manifest
from runtime.execution.package.executor import executor, executor_of
from runtime.execution.package.runner import Runner, StepBatch, stored_weights
from runtime.porting.export import kept_rows, shares
from runtime.porting.export.job import ExportJob
from runtime.porting.export.shares import rows_of

TOLERANCE = 1e-4
"""Of float32 graphs without rounded activations: the largest absolute difference."""
ROUNDED = 0.02
"""Of graphs that round activations, or rows of caches: the root mean square of differences, in that of what is right.
A value half way between two steps of int8 may go either way, as sums in another order have it."""
_STEPS = 4


class VerificationError(Failure):
    """A package that does not compute what the graph does."""


@dataclasses.dataclass(frozen=True)
class Verified:
    """One program's check: steps taken, the longest context reached, and how far off, in the measure of the tolerance
    (`TOLERANCE` or, where `relative`, `ROUNDED`)."""

    phase: str
    gear: str
    runtime: str
    steps: int
    context: int
    logits: float
    caches: float
    tolerance: float = TOLERANCE
    relative: bool = False

    @property
    def worst(self) -> float:
        return max(self.logits, self.caches)

    @property
    def text(self) -> str:
        """How far off, for people."""
        of = " of their size" if self.relative else ""
        return f"{self.logits:.1e}{of} in logits, {self.caches:.1e}{of} in caches"


def refuse(request: ExportJob) -> None:
    """Raises `UsageError` where a package of this kind cannot be verified here: before it is made."""
    if executor_of(request.format) is None:
        raise UsageError(f"--verify: no runtime here runs {request.format}; verify the same options as onnx")
    if request.format == "ascend" and request.options.get("npu_ops") != "none":
        raise UsageError(
            "--verify runs the package here, where torch_npu's operators have no kernels: add --npu-ops none"
        )
    if request.checkpoint is None:
        raise UsageError("--verify needs weights: give --checkpoint")
    what = request.cut
    if request.scheme != "f32" and not what.lowerings:
        raise UsageError(
            f"--verify compares float32 graphs, or quantised ones with their emulation: use --formats f32, not "
            f"{request.scheme}"
        )
    if what.dtype != "float32":  # in bfloat16 sums in another order choose other experts: nothing is told apart
        raise UsageError("--verify compares what is left wide in float32: add --dtype float32")
    if request.device is not None:
        raise UsageError("--verify runs all devices of the layout: leave out --device")
    for weight in (weight for kind in what.unit_types.values() for weight in layer_weights(what.cfg, kind)):
        dim, axes = what.grid.layout.split(weight)
        rounded = rounds_activations(what.scheme.held(weight))
        if rounded and weight.axes[dim] and dim == len(weight.shape) - 2 and what.grid.layout.parts(axes) > 1:
            raise UsageError(
                f"--verify of {request.scheme} under tensor parallelism has nothing to compare with: each device "
                "rounds its own part of a token; verify with --tp 1"
            )


def verify(folder: Path, manifest: Manifest, checkpoint: Checkpoint, grid: Grid, seed: int = 0) -> list[Verified]:
    """Every program of a package. Raises `VerificationError` for one that is further off than `TOLERANCE`."""
    name = executor_of(manifest.format)
    assert name is not None
    runtime = executor(name, manifest.format, trusted=True)  # it has just been written here
    weights = stored_weights(folder, manifest) or shares.in_memory(checkpoint, grid, manifest)
    reference = Reference(checkpoint, manifest)
    out = []
    for program in manifest.programs:
        runner = Runner(folder, manifest, runtime, weights)
        found = compare(manifest, program, runner, reference, np.random.default_rng(seed))
        if not found.worst <= found.tolerance:
            raise VerificationError(
                f"{manifest.format} {found.phase} at {found.gear} differs from the graph by {found.text} (at most "
                f"{found.tolerance:g}): not exported"
            )
        out.append(found)
    return out


Caches = list[graph.LayerCache]


class Reference:
    """The graph's own step on one device, compiled by JAX for the host CPU."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest):
        self.cfg, self.manifest = checkpoint.config, manifest
        self.mtp = manifest.mtp is not None
        self.numbers = shares.emulated(checkpoint, manifest)
        source = checkpoint if self.numbers is None else Converted(checkpoint.path, self.numbers)
        loaded = source.load(self.dtype, keep_fp8=self.numbers is not None, mtp=self.mtp)
        self.weights = jax.tree.map(jnp.asarray, loaded)
        self._step = jax.jit(self._both, static_argnames="mode")

    @property
    def dtype(self) -> str:
        return "float32" if self.numbers is None else self.numbers.dtype

    @property
    def measure(self) -> tuple[bool, float]:
        """Whether differences are relative, and how large they may be."""
        formats = self.numbers.scheme.formats if self.numbers else ()
        relative = any(rounds_activations(matrix_format(name)) for name in formats) or bool(rows_of(self.manifest))
        return relative, ROUNDED if relative else TOLERANCE

    def empty(self) -> Caches:
        """Of the main layers, and last of the MTP layer."""
        pages, size = self.manifest.pool_pages, self.manifest.page_size
        kinds = [*self.cfg.layers, *([self.cfg.mtp_type] if self.mtp else [])]
        return [
            {row.name: jnp.zeros((pages, size, *row.shape), self.dtype) for row in cache_rows(self.cfg, kind)}
            for kind in kinds
        ]

    def _both(self, weights: Any, caches: Any, batch: graph.Batch, mode: graph.Mode) -> Any:
        replaced = self.numbers.lowerings() if self.numbers else {}
        return ops.substitute(functools.partial(self._meant, mode=mode), replaced)(weights, caches, batch)

    def _meant(self, weights: Any, caches: Any, batch: graph.Batch, mode: graph.Mode) -> Any:
        main = self.cfg.num_layers
        out = graph.step(self.cfg, weights, caches[:main], batch, mode)
        if not self.mtp:
            return (out.logits,), out.caches
        draft = graph.mtp_step(self.cfg, weights, caches[main], batch, out.hidden, mode)
        return (out.logits, draft.logits), [*out.caches, *draft.caches]

    def step(self, caches: Caches, batch: StepBatch, expanded: bool) -> tuple[list[np.ndarray], Caches]:
        """Feeds the main stack, and the MTP layer with the same tokens: the logits of each, and the caches."""
        mode = graph.Mode("expanded" if expanded else "absorbed")
        logits, caches = self._step(self.weights, caches, graph.Batch(*map(jnp.asarray, batch)), mode=mode)
        return [np.asarray(each) for each in logits], caches


def compare(
    manifest: Manifest, program: GearUnits, runner: Runner, reference: Reference, rng: np.random.Generator
) -> Verified:
    gear, size, rows = program.gear, manifest.page_size, rows_of(manifest)
    context = gear.context_pages * size
    dp = manifest.axes.get("dp", 1)
    topk = manifest.model.index_topk or 0
    # decoding starts a little below the selection's size and passes it, if the gear goes that far
    before = 0 if program.phase == "prefill" else max(1, min(topk + 1, context - _STEPS))
    chunks = min(
        max(_STEPS if gear.tokens == 1 else 2, -(-(topk + gear.tokens) // gear.tokens)), context // gear.tokens
    )
    steps = max(1, chunks if program.phase == "prefill" else _STEPS)
    tables = [_tables(gear.sequences, gear.context_pages, rng) for _ in range(dp)]
    caches = [reference.empty() for _ in range(dp)]
    starts = [np.maximum(before - np.arange(gear.sequences, dtype=np.int32), min(before, 1)) for _ in range(dp)]
    if before:
        for rank in range(dp):
            tokens = rng.integers(0, manifest.model.vocab_size, (gear.sequences, before), dtype=np.int32)
            first = StepBatch(tokens, np.zeros_like(starts[rank]), starts[rank], tables[rank])
            caches[rank] = reference.step(caches[rank], first, True)[1]
        for place, name, value in _caches(runner, reference.cfg, caches):
            for each, buffer in kept_rows.stored(np.array(value), name, rows, reference.cfg).items():
                runner.caches[place][each] = runner.executor.put(buffer)
    relative, tolerance = reference.measure
    far = _rms if relative else _far
    worst, worst_cache = 0.0, 0.0
    for number in range(steps):
        batches = []
        for rank in range(dp):
            tokens = rng.integers(0, manifest.model.vocab_size, (gear.sequences, gear.tokens), dtype=np.int32)
            length = np.full(gear.sequences, gear.tokens, np.int32)
            if number == steps - 1 and gear.tokens > 1:  # a ragged last chunk
                length -= (np.arange(gear.sequences, dtype=np.int32) + 1) % gear.tokens
            batches.append(StepBatch(tokens, starts[rank], length, tables[rank]))
        results = [runner.step(program, batches)]
        if reference.mtp:
            results.append(runner.draft(program, batches, [env["hidden"] for env in results[0]]))
        for rank in range(dp):
            logits, caches[rank] = reference.step(caches[rank], batches[rank], program.phase == "prefill")
            for found, expected in zip(results, logits, strict=True):
                worst = max(worst, far(runner.executor.get(found[rank]["logits"]), expected))
            starts[rank] = starts[rank] + batches[rank].length
    for place, name, expected in _caches(runner, reference.cfg, caches):
        found = kept_rows.read(
            lambda each, place=place: runner.executor.get(runner.caches[place][each]),
            name, rows, reference.cfg, expected.dtype,
        )  # fmt: skip
        worst_cache = max(worst_cache, far(found[1:], expected[1:]))
    shape = f"{gear.sequences} x {gear.tokens} tokens, context {context}"
    reached = int(max(s.max() for s in starts))
    return Verified(program.phase, shape, runner.executor.name, steps, reached, worst, worst_cache, tolerance, relative)


def _caches(runner: Runner, cfg: ModelConfig, caches: list[Caches]) -> list[tuple[Any, str, np.ndarray]]:
    """Every cache of the graph on every device of the runner: its place, its name, and the reference's value of it."""
    out = []
    for place, owner in runner.caches:
        layer = cfg.num_layers if owner == "mtp" else int(str(owner).partition(".")[2])
        for name, whole in caches[place[1]][layer].items():
            value = np.asarray(whole)
            part = value if not isinstance(cfg.attention, Gqa) else np.split(value, runner.tp, axis=2)[place[2]]
            out.append(((place, owner), name, part))
    return out


def _far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found.astype(np.float64) - expected))) if expected.size else 0.0


def _rms(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean squares: of the difference, in that of what is expected."""
    right = np.asarray(expected, np.float64)
    off = np.linalg.norm(np.asarray(found, np.float64) - right)
    return float(off / max(np.linalg.norm(right), np.finfo(np.float32).tiny))


def _tables(sequences: int, pages: int, rng: np.random.Generator) -> np.ndarray:
    """Page tables of shuffled pages; page 0 is nobody's."""
    return (1 + rng.permutation(sequences * pages)).reshape(sequences, pages).astype(np.int32)
