"""Reads an engine description and checks it.

A TOML file holds `name`, `description` and sections of settings; each setting is
`{value=, source=, date=, grade=, note=}`. Sections only group for the reader: `Engine` is flat.
A value may depend on the device: `by_memory_gib = [[limit, value], ...]` gives the value for devices
whose memory is below `limit` GiB (first match); `value` is what holds when the memory is not given.
Grades: A read from the engine's own source or documentation, B measured by others, C assumed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from foundation.reading import Unreadable, read_toml
from runtime.deployment.document import Fault, place, validated
from runtime.deployment.errors import EngineError

_GIB = 2**30
_FOLDER = Path(__file__).parent

Policy = Literal["prefill-first", "mixed"]
Admission = Literal["estimate", "prompt", "max-length"]
MemoryOf = Literal["free-before-load", "device", "free-after-peak"]
Victim = Literal["least-output", "last"]

_FRACTIONS = ("memory_fraction", "watermark_fraction", "new_token_ratio", "new_token_ratio_min")
_POSITIVE = (
    "max_step_tokens",
    "max_running_requests",
    "page_tokens",
    "stream_interval_tokens",
    "new_token_ratio_decay_steps",
    "max_new_tokens_clip",
)


@dataclass(frozen=True)
class Source:
    """Where one setting comes from."""

    source: str
    date: str
    grade: str
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """A setting as its file has it."""

    value: Any
    source: str
    date: str
    grade: str
    note: str = ""
    by_memory_gib: tuple[tuple[float, Any], ...] = ()


@dataclass(frozen=True)
class Engine:
    """One serving engine's policy and overheads. Tokens, seconds and fractions of one.

    Scheduling
    policy: "prefill-first": while a prompt waits and is admitted, steps compute prompts only and decoding
        stands still. "mixed": each step holds every decoding sequence, then prompt chunks, up to
        `max_step_tokens`.
    chunked_prefill_tokens: prompt tokens a step computes at most, prompts being cut to fit; 0: prompts are
        never cut.
    max_step_tokens: prefill-first: prompt tokens a step takes up before it stops adding requests;
        mixed: all tokens of a step.
    max_running_requests: requests in service at most, per rank.
    admission: "estimate": prompt plus output must fit beside the estimated rest of those running
        (SGLang; see `serving.scheduler`). "prompt": the prompt must fit now (vLLM). "max-length": prompt
        and output of everything in service must fit at once, so nothing is ever preempted (TensorRT-LLM).
    watermark_fraction: share of the pages that "prompt" admission leaves free.
    new_token_ratio, new_token_ratio_min, new_token_ratio_decay_steps, max_new_tokens_clip,
        retract_decode_steps: only "estimate" admission reads these.
    preemption_victim: who is thrown out and recomputed when pages run short.
    preempted_go: end of the waiting queue that a preempted request joins.
    overlap_scheduling: a step is planned while the one before it runs: host time hides behind device time,
        and a request that arrives during a step waits for the end of the next one.

    Memory
    page_tokens, prefix_cache: the KV pool's unit, and whether prompts are kept for reuse.
    memory_fraction, memory_fraction_of: see `kv_bytes`.

    Graphs
    graph_batch_sizes: decode batch sizes captured; a batch is padded to the next one, and runs eagerly
        above the largest.

    Overheads
    graph_step_host_seconds, eager_step_host_seconds: host work of a step that replays a graph, and of
        one that launches each kernel.
    eager_layer_host_seconds, eager_sparse_layer_host_seconds: host work to launch one layer, and what a
        layer with sparse attention adds: for each layer of the model, on top of `eager_step_host_seconds`.
    sparse_layer_seconds: device time of the small kernels around sparse attention (index-key quantisation,
        page-table transforms) that whole-block measurements of later releases no longer have, a layer and step.
    request_seconds, tokenize_seconds_per_token: from the client's send to the scheduler's queue; the
        tokenizer handles one request at a time, so a burst arrives spread out.
    response_seconds: from a step's end to the client seeing its tokens.
    stream_interval_tokens: tokens a client receives together. All engines described here send the first
        token at once and flush at the end, so TTFT and TPOT do not depend on it.
    """

    name: str
    description: str
    policy: Policy
    chunked_prefill_tokens: int
    max_step_tokens: int
    max_running_requests: int
    admission: Admission
    preemption_victim: Victim
    preempted_go: Literal["front", "back"]
    overlap_scheduling: bool
    page_tokens: int
    prefix_cache: bool
    memory_fraction: float
    memory_fraction_of: MemoryOf
    graph_batch_sizes: tuple[int, ...]
    graph_step_host_seconds: float
    eager_step_host_seconds: float
    request_seconds: float
    tokenize_seconds_per_token: float
    response_seconds: float
    stream_interval_tokens: int
    watermark_fraction: float = 0.0
    new_token_ratio: float = 0.0
    new_token_ratio_min: float = 0.0
    new_token_ratio_decay_steps: int = 1
    max_new_tokens_clip: int = 4096
    retract_decode_steps: int = 0
    eager_layer_host_seconds: float = 0.0
    eager_sparse_layer_host_seconds: float = 0.0
    sparse_layer_seconds: float = 0.0
    evidence: Mapping[str, Source] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)

    def kv_bytes(
        self, *, device_bytes: float, weight_bytes: float, activation_bytes: float, runtime_bytes: float
    ) -> float:
        """Bytes per device that this engine gives to the KV pool; negative when the model does not fit.

        device_bytes: the device's memory. weight_bytes: weights held there. activation_bytes: peak of a
        full step, in engines that measure it. runtime_bytes: driver context, communication buffers.
        What the fraction f is OF differs:
            "free-before-load" (SGLang --mem-fraction-static):   f (device - runtime) - weights;
                activations and graphs live in the (1 - f) left.
            "device" (vLLM --gpu-memory-utilization):            f device - weights - activations - runtime.
            "free-after-peak" (TensorRT-LLM free_gpu_memory_fraction):
                                                                 f (device - weights - activations - runtime).
        """
        fraction = self.memory_fraction
        if self.memory_fraction_of == "free-before-load":
            return fraction * (device_bytes - runtime_bytes) - weight_bytes
        used = weight_bytes + activation_bytes + runtime_bytes
        if self.memory_fraction_of == "device":
            return fraction * device_bytes - used
        return fraction * (device_bytes - used)

    def decode_rows(self, sequences: int) -> tuple[int, bool]:
        """(rows computed, graph replayed) for a decode batch of `sequences`."""
        sizes = self.graph_batch_sizes
        if not sizes or sequences > sizes[-1]:
            return sequences, False
        return next(size for size in sizes if size >= sequences), True


def names() -> list[str]:
    """Names of the engines described here."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(name: str, overrides: Mapping[str, Any] | None = None, *, device_memory_bytes: float | None = None) -> Engine:
    """The engine called `name`, or described by the TOML file at that path.

    overrides: setting -> value, as `{"chunked_prefill_tokens": 32768}`.
    device_memory_bytes: settles the defaults that the engine derives from the device's memory.
    Raises EngineError: unknown engine or setting, incomplete or malformed file, absurd value.
    """
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        raise EngineError(f"unknown engine {name!r}: choose one of {', '.join(names())}, or give a .toml path")
    document = _document(path, path.stat().st_mtime_ns)
    values, evidence = _settings(document, device_memory_bytes)
    for key, value in (overrides or {}).items():
        _known(key)
        values[key] = _expand(value) if key == "graph_batch_sizes" else value
        evidence[key] = Source("override", "", "A", "set by the caller")
    missing = [each for each in _REQUIRED if each not in values]
    if missing:
        raise EngineError(f"{path.name} lacks {', '.join(missing)}: add each as {{value=, source=, date=, grade=}}")
    values = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in values.items()}  # 1e4 tokens
    about = {"name": document.get("name", path.stem), "description": document.get("description", "")}
    engine = validated(Engine, {**about, **values}, EngineError, path.name, say=_say)
    return replace(engine, evidence=evidence)


@lru_cache(maxsize=32)
def _document(path: Path, modified_ns: int) -> dict[str, Any]:
    """The file as read; planning loads an engine for each of hundreds of layouts."""
    try:
        document = read_toml(path)
    except Unreadable as error:
        what = f" is not valid TOML: {error}" if error.reason == "syntax" else f": {error}"
        raise EngineError(f"{path.name}{what}") from None
    sections = {name: part for name, part in document.items() if isinstance(part, dict)}
    return document | validated(dict[str, dict[str, Setting]], sections, EngineError, path.name, say=_say)


def _say(where: str, fault: Fault) -> str:
    """A fault in the shape of a setting, or in an engine's values."""
    if fault.missing:
        return f"{where}: {fault.path[-1]} lacks {', '.join(fault.missing)}"
    if fault.unknown:
        return f"{where}: {fault.path[-1]} does not take {fault.unknown[0]}; it takes {', '.join(fault.known)}"
    wrong = fault.wrong.replace("must be int", "must be a number without a fraction")
    return f"{where}: {place(fault.path)} = {fault.shown} {wrong}"


_SETTINGS = tuple(f.name for f in fields(Engine) if f.name not in ("name", "description", "evidence"))
_REQUIRED = tuple(f.name for f in fields(Engine) if f.name in _SETTINGS and f.default is MISSING)


def _settings(document: dict[str, Any], device_memory_bytes: float | None) -> tuple[dict[str, Any], dict[str, Source]]:
    """Flattens the sections into setting -> value and setting -> evidence."""
    values: dict[str, Any] = {}
    evidence: dict[str, Source] = {}
    for section in (part for part in document.values() if isinstance(part, dict)):
        for key, entry in section.items():
            _known(key)
            value = entry.value
            if device_memory_bytes is not None and entry.by_memory_gib:
                steps = entry.by_memory_gib
                value = next((v for limit, v in steps if device_memory_bytes < limit * _GIB), steps[-1][1])
            values[key] = _expand(value) if key == "graph_batch_sizes" else value
            evidence[key] = Source(entry.source, entry.date, entry.grade, entry.note)
    return values, evidence


def _expand(sizes: Any) -> tuple[int, ...]:
    """[1, 2, "8:32:8"] -> (1, 2, 8, 16, 24, 32); ranges include their end."""
    expanded: set[int] = set()
    try:
        for size in sizes:
            if isinstance(size, str):
                first, last, step = (int(part) for part in size.split(":"))
                expanded.update(range(first, last + 1, step))
            else:
                expanded.add(int(size))
    except (TypeError, ValueError):
        raise EngineError(f'graph_batch_sizes = {sizes!r} must hold sizes and ranges as "first:last:step"') from None
    return tuple(sorted(expanded))


def _known(key: str) -> None:
    if key not in _SETTINGS:
        close = difflib.get_close_matches(key, _SETTINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(_SETTINGS)}"
        raise EngineError(f"unknown engine setting {key!r}: {hint}")


def _check(engine: Engine) -> None:
    """Raises EngineError for a value outside its range."""

    def refuse(key: str, why: str) -> None:
        raise EngineError(f"engine {engine.name}: {key} = {getattr(engine, key)!r} {why}")

    for key in _SETTINGS:
        value = getattr(engine, key)
        if isinstance(value, int | float) and value < 0:
            refuse(key, "must be a number, zero or more")
        if key in _POSITIVE and value < 1:
            refuse(key, "must be a whole number, one or more")
        if key in _FRACTIONS and value > 1:
            refuse(key, "must be a fraction, at most 1")
    if engine.memory_fraction == 0:
        refuse("memory_fraction", "leaves no memory: give a fraction above 0")
    if any(size < 1 for size in engine.graph_batch_sizes):
        refuse("graph_batch_sizes", "must hold sizes of one or more")
