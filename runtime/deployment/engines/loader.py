"""Reads an engine description and checks it.

A TOML file holds `kind` (which engine it describes: defaults that are formulas and launch flags go by it, never by the
file's name; "other" where those of none hold), `release`, `prices` (whose operator tables price it), `hosts` (vendors
of the chips beside which its host times were taken), `name`, `description` and sections of settings; each
setting is `{value=, source=, date=, grade=, note=}`. Sections only group for the reader: `Engine` is flat.
A value may depend on the device: `by_memory_gib = [[limit, value], ...]` gives the value for devices
whose memory is below `limit` GiB (first match); `value` is what holds when the memory is not given. Or on the chip and
model: `cases = [{when = {..}, value = ..}, ..]`, the first whose conditions hold (see `Circumstances`).
The section `cache` says what rows are stored in; its values are names of `model.formats.ROWS`, `kv` one of `KV`.
Grades: A read from the engine's own source or documentation, B measured by others, C assumed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from foundation.limits import within
from foundation.reading import Unreadable, read_toml
from hw_profiles import Profile
from model.config import ModelConfig
from model.formats import KV, ROWS
from runtime.deployment.document import Fault, place, validated
from runtime.deployment.errors import EngineError

_GIB = 2**30
MOST_GRAPHS = 10_000
"""Decode batch sizes captured: engines capture fifty, and each takes memory of a device."""
_MOST = 1e12
"""Of any setting: tokens, seconds, requests; a larger one is a misprint, and overflows what is made of it."""
_FOLDER = Path(__file__).parent

Policy = Literal["prefill-first", "mixed"]
Admission = Literal["estimate", "prompt", "max-length"]
MemoryOf = Literal["free-before-load", "device", "free-after-peak"]
Victim = Literal["least-output", "last"]
Tables = Literal["sglang", "trtllm", "vllm"]
"""Engines whose operator tables price steps."""

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
class Circumstances:
    """What an engine's defaults depend on, beside its release; None: not known, so no condition on it holds.

    sparse: the model's attention selects what it reads. family: of the chip, as profiles name it. fp8: the chip keeps
    caches in FP8. memory_bytes: of a device. built_bytes: of one as its profile has it, where the memory was set to
    another size: settings by memory stay those of the chip that it is, so that nothing else changes with the memory.
    kv: what the KV cache was asked to be kept in.
    """

    sparse: bool | None = None
    family: str | None = None
    fp8: bool | None = None
    memory_bytes: float | None = None
    built_bytes: float | None = None
    kv: str | None = None

    @classmethod
    def of(cls, cfg: ModelConfig, profile: Profile) -> Circumstances:
        capacity = profile.get("chip.memory.capacity_bytes")
        memory, built = (capacity.value, capacity.replaces or capacity.value) if capacity else (None, None)
        return cls(cfg.sparse, profile.family, "fp8" in profile.formats.kv, memory, built)


def holds(when: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether every condition is met: a list holds the fact, anything else is the fact."""
    return all(facts[key] in want if isinstance(want, list) else facts[key] == want for key, want in when.items())


@dataclass(frozen=True)
class Case:
    """A value where every condition holds."""

    when: Mapping[str, Any]
    value: Any


@dataclass(frozen=True)
class Choice:
    """A value by circumstances: that of the first case that holds, else `value`."""

    value: Any
    cases: tuple[Case, ...] = ()

    def under(self, at: Circumstances) -> Any:
        return next((case.value for case in self.cases if holds(case.when, vars(at))), self.value)


def _by_kv(fp8: str, int8: str) -> Choice:
    return Choice("bf16", (Case({"kv": "fp8"}, fp8), Case({"kv": "int8"}, int8)))


@dataclass(frozen=True)
class CacheRules:
    """What an engine stores a token's rows in.

    kv: what it picks when told nothing.
    latent: the row of an MLA layer.
    index: the row of an indexer.
    heads: the rows of keys and values of a GQA layer.
    sized_latent: the row that the pool is sized with, where an engine counts another than it stores.
    """

    kv: Choice = Choice("bf16")
    latent: Choice = _by_kv("fp8", "int8")
    index: Choice = _by_kv("fp8_scaled", "int8_scaled")
    heads: Choice = _by_kv("fp8", "int8")
    sized_latent: Choice | None = None


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
    cases: tuple[Case, ...] = ()
    by_memory_gib: tuple[tuple[float, Any], ...] = ()

    def under(self, at: Circumstances) -> Any:
        return Choice(self.value, self.cases).under(at)


@dataclass(frozen=True)
class Engine:
    """One serving engine's policy and overheads. Tokens, seconds and fractions of one.

    kind, release: which engine this is. prices: whose operator tables price it. hosts: vendors of the chips beside
        which its host times were taken; empty: it does not say.

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
    new_token_ratio: "estimate" admission: share of its remaining output that a running request is taken to need.
    new_token_ratio_min: the least that this share falls to.
    new_token_ratio_decay_steps: decode steps in which it falls there.
    max_new_tokens_clip: output tokens of one request that count at most in that estimate.
    retract_decode_steps: after a preemption the share becomes (decoded + this x running) / (requested + 1).
    preemption_victim: who is thrown out and recomputed when pages run short.
    preempted_go: end of the waiting queue that a preempted request joins.
    overlap_scheduling: a step is planned while the one before it runs: host time hides behind device time,
        and a request that arrives during a step waits for the end of the next one.

    Memory
    page_tokens: tokens of a page, the KV pool's unit.
    prefix_cache: whether prompts are kept for reuse.
    memory_fraction: share of the device's memory for weights and KV pool, by the engine's own rule.
    memory_fraction_of: that rule: what the share is of, see `Engine.kv_bytes`.
    cache: what rows are stored in.

    Graphs
    graph_batch_sizes: decode batch sizes captured; a batch is padded to the next one, and runs eagerly
        above the largest.

    Overheads
    graph_step_host_seconds: host work of a step that replays a graph.
    eager_step_host_seconds: host work of a step that launches each kernel.
    eager_layer_host_seconds: host work to launch one layer eagerly: for each layer of the model, on top of
        `eager_step_host_seconds`.
    eager_sparse_layer_host_seconds: what a layer with sparse attention adds to that.
    sparse_layer_seconds: device time of the small kernels around sparse attention (index-key quantisation,
        page-table transforms) that whole-block measurements of later releases no longer have, a layer and step.
    request_seconds: from the client's send to the scheduler's queue, but for the tokenizer.
    tokenize_seconds_per_token: the tokenizer's share of it; it handles one request at a time, so a burst arrives
        spread out.
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
    kind: str = ""
    release: str = ""
    prices: Tables = "sglang"
    hosts: tuple[str, ...] = ()
    cache: CacheRules = CacheRules()
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


KINDS = (*names(), "other")
ENGINES_HELP = f"{', '.join(names())}, or a TOML file."
"""How help texts list them."""


def load(name: str, overrides: Mapping[str, Any] | None = None, at: Circumstances = Circumstances()) -> Engine:
    """The engine called `name`, or described by the TOML file at that path.

    overrides: setting -> value, as `{"chunked_prefill_tokens": 32768}`. at: settles the defaults that depend on the
    device or the model.
    Raises EngineError: unknown engine or setting, incomplete or malformed file, absurd value.
    """
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        raise EngineError(f"unknown engine {name!r}: choose one of {', '.join(names())}, or give a .toml path")
    document = _document(path, path.stat().st_mtime_ns)
    values, evidence = _settings(path.name, document, at)
    for key, value in (overrides or {}).items():
        _known(key)
        values[key] = _expand(value) if key == "graph_batch_sizes" else value
        evidence[key] = Source("override", "", "A", "set by the caller")
    missing = [each for each in _REQUIRED if each not in values]
    if missing:
        raise EngineError(f"{path.name} lacks {', '.join(missing)}: add each as {{value=, source=, date=, grade=}}")
    if document.get("kind") not in KINDS:
        raise EngineError(f"{path.name}: kind = {document.get('kind')!r} must be one of {', '.join(KINDS)}")
    values = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in values.items()}  # 1e4 tokens
    about = {"name": path.stem, "description": ""} | {key: document[key] for key in _ABOUT if key in document}
    engine = validated(Engine, {**about, **values}, EngineError, path.name, say=_say)
    return replace(engine, cache=_cache_rules(path.name, document.get("cache", {})), evidence=evidence)


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


_ABOUT = ("name", "description", "kind", "release", "prices", "hosts")
SETTINGS = tuple(f.name for f in fields(Engine) if f.name not in (*_ABOUT, "cache", "evidence"))
_REQUIRED = tuple(f.name for f in fields(Engine) if f.name in SETTINGS and f.default is MISSING)


def _settings(file: str, document: dict[str, Any], at: Circumstances) -> tuple[dict[str, Any], dict[str, Source]]:
    """Flattens the sections into setting -> value and setting -> evidence."""
    values: dict[str, Any] = {}
    evidence: dict[str, Source] = {}
    for section in (part for key, part in document.items() if isinstance(part, dict) and key != "cache"):
        for key, entry in section.items():
            _known(key)
            _conditions(file, key, entry)
            value = entry.under(at)
            memory = at.built_bytes or at.memory_bytes
            if memory is not None and entry.by_memory_gib:
                steps = entry.by_memory_gib
                value = next((v for limit, v in steps if memory < limit * _GIB), steps[-1][1])
            values[key] = _expand(value) if key == "graph_batch_sizes" else value
            evidence[key] = Source(entry.source, entry.date, entry.grade, entry.note)
    return values, evidence


def _conditions(file: str, key: str, setting: Setting) -> None:
    """Raises EngineError for a case of what is no circumstance."""
    known = [f.name for f in fields(Circumstances)]
    for case in setting.cases:
        if unknown := sorted(case.when.keys() - set(known)):
            raise EngineError(f"{file}: {key} has a case of {unknown[0]!r}; cases can be of {', '.join(known)}")


def _cache_rules(file: str, section: Any) -> CacheRules:
    if not isinstance(section, Mapping):
        raise EngineError(f"{file}: cache = {section!r} must be a section of settings")
    known = [f.name for f in fields(CacheRules)]
    if unknown := sorted(section.keys() - set(known)):
        raise EngineError(f"{file}: unknown cache {unknown[0]!r}; known: {', '.join(known)}")
    for key, rule in section.items():
        _conditions(file, f"cache.{key}", rule)
        names = KV if key == "kv" else ROWS
        for value in (rule.value, *(case.value for case in rule.cases)):
            if not isinstance(value, str) or value not in names:
                raise EngineError(f"{file}: cache.{key} {value!r} is unknown; known: {', '.join(names)}")
    return CacheRules(**{key: Choice(rule.value, rule.cases) for key, rule in section.items()})


def _expand(sizes: Any) -> tuple[int, ...]:
    """[1, 2, "8:32:8"] -> (1, 2, 8, 16, 24, 32); ranges include their end."""
    expanded: set[int] = set()
    try:
        for size in sizes:
            if isinstance(size, str):
                first, last, step = (int(part) for part in size.split(":"))
                held = range(first, last + 1, step)
                within(f"graph_batch_sizes: {size[:60]} holds", len(held[: MOST_GRAPHS + 1]), MOST_GRAPHS, EngineError)
                expanded.update(held)
            else:
                expanded.add(int(size))
    except (TypeError, ValueError, OverflowError):
        raise EngineError(
            f'graph_batch_sizes = {_cut(repr(sizes))} must hold sizes and ranges as "first:last:step"'
        ) from None
    within("graph_batch_sizes: sizes of", len(expanded), MOST_GRAPHS, EngineError)
    return tuple(sorted(expanded))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _known(key: str) -> None:
    if key not in SETTINGS:
        close = difflib.get_close_matches(key, SETTINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(SETTINGS)}"
        raise EngineError(f"unknown engine setting {key!r}: {hint}")


def _check(engine: Engine) -> None:
    """Raises EngineError for a value outside its range."""

    def refuse(key: str, why: str) -> None:
        raise EngineError(f"engine {engine.name}: {key} = {getattr(engine, key)!r} {why}")

    for key in SETTINGS:
        value = getattr(engine, key)
        if isinstance(value, int | float) and value < 0:
            refuse(key, "must be a number, zero or more")
        if isinstance(value, int | float) and value > _MOST:
            refuse(key, f"must be at most {_MOST:g}")
        if key in _POSITIVE and value < 1:
            refuse(key, "must be a whole number, one or more")
        if key in _FRACTIONS and value > 1:
            refuse(key, "must be a fraction, at most 1")
    if engine.memory_fraction == 0:
        refuse("memory_fraction", "leaves no memory: give a fraction above 0")
    within(f"engine {engine.name}: graph_batch_sizes:", max(engine.graph_batch_sizes, default=0), _MOST, EngineError)
    if any(size < 1 for size in engine.graph_batch_sizes):
        refuse("graph_batch_sizes", "must hold sizes of one or more")
