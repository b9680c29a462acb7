"""What a serving engine is: the rules and figures that a description of it settles, each with its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from foundation.limits import within
from hw_profiles import Profile
from model.config import ModelConfig
from runtime.deployment.errors import EngineError

Policy = Literal["prefill-first", "mixed"]
Admission = Literal["estimate", "prompt", "chunk", "max-length"]
MemoryOf = Literal["free-before-load", "device", "free-after-peak"]
Victim = Literal["least-output", "last"]
RouterPolicy = Literal["round-robin", "least-loaded", "cache-aware"]
GraphMode = Literal["eager", "piecewise", "full"]
ContextParallel = Literal["none", "latent", "dense", "any"]
Tables = Literal["sglang", "trtllm", "vllm"]
"""Engines whose operator tables price steps."""

_FRACTIONS = ("memory_fraction", "watermark_fraction", "new_token_ratio", "new_token_ratio_min")
_MOST = 1e12
"""Of any setting: tokens, seconds, requests; a larger one is a misprint, and overflows what is made of it."""
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
class FittedTo:
    """Measurements that an engine's constants were fitted to (`glm5 fit`): of one deployment.

    rows: how many. model, chip, layout: whose. in_flight, prompt_tokens: the least and the most of their loads.
    residuals: ln(measured / predicted) of "tpot", "ttft" and "throughput", each row predicted by a fit to the others.
    """

    rows: int
    model: str
    chip: str
    layout: str
    in_flight: tuple[float, float]
    prompt_tokens: tuple[float, float]
    residuals: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Engine:
    """One serving engine's policy and overheads. Tokens, seconds and fractions of one.

    kind, release: which engine this is. released: the day that release came out. prices: whose operator tables price
        it. hosts: vendors of the chips beside which its host times were taken; empty: it does not say. fitted: what
        measurements its constants were fitted to, if any.

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
        (SGLang; see `serving.scheduler`). "prompt": the prompt must fit now (vLLM). "chunk": its first
        chunk must, and pages are taken chunk by chunk (vLLM up to 0.18). "max-length": prompt
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
    context_tokens: the longest request that the server is told to take; 0: the model's positions.
    sampler_logit_bytes: what a logit takes in the run that the engine profiles its sampler with (vLLM).
    graph_memory_bytes: what graphs are taken to need before the pool is sized (vLLM).
    piecewise_reserve_mib: what a default share leaves for graphs of steps with prompts (SGLang).
    drafting_reserve_mib: what a default share leaves for drafting (SGLang).
    cache: what rows are stored in.

    Graphs
    graph_mode: how decode steps are launched. "full": they replay a graph of the whole step. "piecewise": graphs of
        what lies between attention, which the host launches. "eager": each kernel from the host, in steps with prompts
        too.
    planned_graph_mode: what a plan asks for, where recipes pass another mode than the one without flags; "": that.
    graph_batch_sizes: decode batch sizes captured; a batch is padded to the next one, and runs eagerly
        above the largest.
    graph_max_batch: the largest batch captured, which cuts the sizes; 0: all of them.
    graph_padding: whether a batch between two captured sizes is padded; otherwise it runs eagerly.
    piecewise_step_tokens: a step with prompts of at most so many tokens replays graphs of what lies between attention;
        longer ones are launched eagerly.
    prompt_row_tokens: a step's pieces of prompts are rows of one length, padded to a power of two times this, and
        padded to a power of two in their number; 0: they are not padded.

    Layouts
    expert_groups: whether experts can be cut both ways: over groups of devices, and in a group by width.
    decode_context_parallel: whether the ranks of a tp group that would hold the same cache can deal its tokens out
        among them (DCP): "none", in models of dense "latent" attention alone, where attention is "dense", grouped
        queries included, or in "any" model, indexers included.
    deals_narrow_cache: whether a cache that is dealt out may be kept in 8 bits.
    prefill_context_parallel: whether tp groups can compute a prompt's tokens together (PCP): "none", in models of
        "sparse" attention alone, or of any "latent" attention.
    cuts_prompts_beside_tp: whether attention's heads may be cut over tp ranks beside that.

    Overheads
    graph_step_host_seconds: host work of a step that replays graphs: scheduling, sampling, results.
    eager_step_host_seconds: host work of a step that launches each kernel, but for the launches.
    row_host_seconds: host work that each sequence of a step adds: its sampling, books, and the sending of its token.
    request_host_seconds: host work that a request adds to the step it begins in: its front end's, where that runs on
        the thread that steps wait for (Python's), and delays them.
    idle_host_seconds: what a step takes longer that finds the machine at rest (cores that sleep, caches that others
        have used), as on a host whose own cores are the device.
    warming_host_seconds: what the steps after that one take longer, less and less until they have run for some time.
    ahead_step_seconds: what a step of answers takes at least that follows one of the same sequences, its rows' part
        beside: it is launched before the host has read that one, and hides the host's work otherwise. 0: none is.
    eager_layer_host_seconds: host work to launch one layer eagerly; launches run beside the device's work.
    eager_sparse_layer_host_seconds: what a layer with sparse attention adds to that.
    eager_launch_seconds: host work to launch a whole step eagerly; from the two above where nothing is given.
    piecewise_layer_host_seconds: host work to launch what one layer has between graphs of pieces.
    piecewise_sparse_layer_host_seconds: what a layer with sparse attention adds to that.
    piecewise_launch_seconds: host work to launch a whole step in pieces; from the two above where nothing is given.
    sparse_layer_seconds: device time of the small kernels around sparse attention (index-key quantisation,
        page-table transforms) that whole-block measurements of later releases no longer have, a layer and step.
    layer_seconds: device time of small kernels that have no price (quantisation, reordering), a layer and step.
    reduces_in_switches: NCCL's all-reduces on one server are done by NVLink's switches, where they can (NVLS).
    kernel_time_factor: what kernels take of the time that their tables say, all alike.
    request_seconds: what the front end (HTTP, chat template, hand-over to the engine) works on a request; it serves one
        at a time, so a burst arrives spread out.
    tokenize_seconds_per_token: the tokenizer's share of that work.
    request_delay_seconds: what a request waits on its way to the scheduler's queue beside that, whoever else is there.
    router: how the router before several replicas picks one.
    front_end_gathers: requests that wait for a front end are handed on together, when it has been through all of them,
        to a tokenizer beside it, which takes up to 32 prompts at a time.
    front_end_per_rank: every rank of attention data parallelism brings a front end, not only every replica.
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
    released: str = ""
    prices: Tables = "sglang"
    hosts: tuple[str, ...] = ()
    cache: CacheRules = CacheRules()
    row_host_seconds: float = 0.0
    request_host_seconds: float = 0.0
    idle_host_seconds: float = 0.0
    warming_host_seconds: float = 0.0
    ahead_step_seconds: float = 0.0
    eager_layer_host_seconds: float = 0.0
    eager_sparse_layer_host_seconds: float = 0.0
    eager_launch_seconds: float = 0.0
    piecewise_layer_host_seconds: float = 0.0
    piecewise_sparse_layer_host_seconds: float = 0.0
    piecewise_launch_seconds: float = 0.0
    sparse_layer_seconds: float = 0.0
    layer_seconds: float = 0.0
    kernel_time_factor: float = 1.0
    reduces_in_switches: bool = True
    request_delay_seconds: float = 0.0
    front_end_gathers: bool = False
    front_end_per_rank: bool = False
    graph_mode: GraphMode = "full"
    planned_graph_mode: Literal["", "eager", "piecewise", "full"] = ""
    router: RouterPolicy = "round-robin"
    graph_max_batch: int = 0
    graph_padding: bool = True
    piecewise_step_tokens: int = 0
    prompt_row_tokens: int = 0
    context_tokens: int = 0
    sampler_logit_bytes: float = 0.0
    graph_memory_bytes: float = 0.0
    piecewise_reserve_mib: float = 0.0
    drafting_reserve_mib: float = 0.0
    expert_groups: bool = False
    decode_context_parallel: ContextParallel = "none"
    prefill_context_parallel: Literal["none", "sparse", "latent"] = "none"
    cuts_prompts_beside_tp: bool = True
    deals_narrow_cache: bool = True
    evidence: Mapping[str, Source] = field(default_factory=dict, repr=False, compare=False)
    fitted: FittedTo | None = None

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

    def front_seconds(self, prompt_tokens: float) -> float:
        """What the front end works on a request."""
        return self.request_seconds + prompt_tokens * self.tokenize_seconds_per_token

    def decode_rows(self, sequences: int) -> tuple[int, bool]:
        """(rows computed, whole graph replayed) for a decode batch of `sequences`."""
        sizes = self.graph_batch_sizes
        if self.graph_mode == "eager" or not sizes or sequences > sizes[-1]:
            return sequences, False
        rows = next(size for size in sizes if size >= sequences)
        if rows != sequences and not self.graph_padding:
            return sequences, False
        return rows, self.graph_mode == "full"

    def in_pieces(self, sequences: int, prompts: int, tokens: int) -> bool:
        """Whether a step that decodes `sequences` and computes `prompts` tokens of prompts, `tokens` in all, replays
        graphs of pieces."""
        if self.graph_mode == "eager":
            return False
        if prompts:
            return tokens <= self.piecewise_step_tokens
        return self.graph_mode == "piecewise" and sequences <= (self.graph_batch_sizes or (0,))[-1]

    def captured_tokens(self, query_tokens: int) -> int:
        """Tokens of the largest step whose products and collectives are replayed from graphs, of the whole step or of
        pieces; sequences have `query_tokens` each."""
        if self.graph_mode == "eager":
            return 0
        return max(query_tokens * max(self.graph_batch_sizes, default=0), self.piecewise_step_tokens)

    def prompt_padding(self, pieces: Sequence[int]) -> int:
        """Tokens that are computed beside those of a step's pieces of prompts."""
        if not self.prompt_row_tokens or not pieces:
            return 0
        least = self.prompt_row_tokens
        width = least * _power_of_two(-(-max(pieces) // least))
        return _power_of_two(len(pieces)) * width - sum(pieces)

    def step_seconds(
        self, device_seconds: float, graphed: bool, pieces: bool, rows: int = 0, requests: int = 0, ahead: bool = False
    ) -> float:
        """Duration of a step with so many sequences, of which `requests` begin: the device works while the host
        launches, and all of the host's work hides behind the device's where steps overlap, or where this one was
        launched ahead."""
        if ahead:
            return max(device_seconds, self.ahead_step_seconds + rows * self.row_host_seconds)
        if graphed:
            launch, host = 0.0, self.graph_step_host_seconds
        elif pieces:
            launch, host = self.piecewise_launch_seconds, self.graph_step_host_seconds
        else:
            launch, host = self.eager_launch_seconds, self.eager_step_host_seconds
        host += rows * self.row_host_seconds + requests * self.request_host_seconds
        if self.overlap_scheduling:
            return max(device_seconds, launch + host)
        return max(device_seconds, launch) + host

    def host_settings(self, graphed: bool, pieces: bool, ahead: bool = False) -> tuple[str, ...]:
        """The settings that make a step's host time."""
        if ahead:
            return ("ahead_step_seconds",)
        if graphed:
            return ("graph_step_host_seconds",)
        how, step = ("piecewise", "graph") if pieces else ("eager", "eager")
        return f"{step}_step_host_seconds", f"{how}_layer_host_seconds", f"{how}_sparse_layer_host_seconds"


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


ABOUT = ("name", "description", "kind", "release", "released", "prices", "hosts")
SETTINGS = tuple(f.name for f in fields(Engine) if f.name not in (*ABOUT, "cache", "evidence", "fitted"))
REQUIRED = tuple(f.name for f in fields(Engine) if f.name in SETTINGS and f.default is MISSING)


def wrong_setting(key: str, value: Any) -> str | None:
    """What is wrong with a number as a setting, in words to stand behind it."""
    if isinstance(value, int | float) and value < 0:
        return "must be a number, zero or more"
    if isinstance(value, int | float) and value > _MOST:
        return f"must be at most {_MOST:g}"
    if key in _POSITIVE and value < 1:
        return "must be a whole number, one or more"
    if key in _FRACTIONS and value > 1:
        return "must be a fraction, at most 1"
    return None


def _check(engine: Engine) -> None:
    """Raises EngineError for a value outside its range."""

    def refuse(key: str, why: str) -> None:
        raise EngineError(f"engine {engine.name}: {key} = {getattr(engine, key)!r} {why}")

    for key in SETTINGS:
        if why := wrong_setting(key, getattr(engine, key)):
            refuse(key, why)
    if not 0.25 <= engine.kernel_time_factor <= 4:
        refuse("kernel_time_factor", "must be from 0.25 to 4")
    if engine.memory_fraction == 0:
        refuse("memory_fraction", "leaves no memory: give a fraction above 0")
    within(f"engine {engine.name}: graph_batch_sizes:", max(engine.graph_batch_sizes, default=0), _MOST, EngineError)
    if any(size < 1 for size in engine.graph_batch_sizes):
        refuse("graph_batch_sizes", "must hold sizes of one or more")
