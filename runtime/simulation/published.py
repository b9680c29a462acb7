"""Deployments that people published, as rows of a CSV: what was served, by what, under which load, and what came out.

A row is words and numbers as its source prints them; this module reads them into what `spec_for` and the loads take.
Every rule that does so is here, for anyone to read: what a format is called, which flag is which setting, which release
stands for which. Columns, and how each is read: docs/validation.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import hw_profiles
from foundation.errors import UsageError
from foundation.limits import within
from hw_profiles import Profile
from model.config import ModelConfig
from model.formats import SCHEMES
from model.hf_config import load_config, preset, preset_names
from model.split import Layout
from runtime.deployment.engines import Circumstances, described, nearest_release
from runtime.deployment.engines import load as load_engine
from runtime.deployment.engines.releases import older_than_all
from runtime.serving import Workload, closed_loop, open_loop
from runtime.serving.lengths import Fixed, Lengths, Uniform
from runtime.simulation.build import Spec, spec_for
from runtime.simulation.mechanisms import Mechanism

COLUMNS = (
    "source", "model", "formats", "chip", "devices", "engine", "engine_version", "tp", "dp", "ep", "pp", "kv_dtype",
    "mtp", "server_flags", "isl", "osl", "length_ratio", "concurrency", "rate", "num_prompts",
)  # fmt: skip
"""What a row must say; an empty cell is "not stated"."""

MEASURED = (
    "ttft_mean_ms", "ttft_median_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_median_ms", "tpot_p99_ms", "output_tok_s",
)  # fmt: skip
"""Columns of figures; a row has one of them at least."""

ALIASES = {
    "deepseek-v3.1": "deepseek-v3", "deepseek-v3-0324": "deepseek-v3", "deepseek-r1-0528": "deepseek-r1",
    "deepseek-v3.2-exp": "deepseek-v3.2", "deepseek-v3.2-speciale": "deepseek-v3.2", "kimi-k2-instruct": "kimi-k2",
    "kimi-k2-instruct-0905": "kimi-k2", "kimi-k2-thinking": "kimi-k2",
}  # fmt: skip
"""Models with another's config. Kimi-K2-Thinking's is Kimi-K2's, with int4 experts: number formats are the row's."""
_PRECISIONS = re.compile(r"-(fp8|nvfp4|fp4|bf16|w8a8|w4a8|w4a16|awq|int4|int8)$")

_FORMATS: tuple[tuple[str, str], ...] = (
    (r"nvfp4|modelopt fp4|\bfp4\b", "nvfp4"),
    (r"mxfp4", "mxfp4"),
    (r"mxfp8", "mxfp8"),
    (r"w4afp8|int4[- ]fp8", "w4afp8"),
    (r"w4a8", "w4a8"),
    (r"awq|gptq", "w4a16-g128"),
    (r"w4a16|int4", "w4a16"),
    (r"w8a8|int8", "w8a8"),
    (r"(per[- ])?(tensor)", "fp8-tensor"),
    (r"channel", "fp8-channel"),
    (r"fp8", "fp8"),
    (r"bf16|fp16|16[- ]bit", "bf16"),
)
"""A format's words -> the scheme; the first that is found holds."""

_Setting = tuple[str, Callable[[float], Any]]
_FLAGS: Mapping[str, _Setting] = {
    "gpu-memory-utilization": ("memory_fraction", float),
    "util": ("memory_fraction", float),
    "mem-fraction-static": ("memory_fraction", float),
    "mem-fraction": ("memory_fraction", float),
    "free-gpu-memory-fraction": ("memory_fraction", float),
    "kv-cache-free-gpu-mem-fraction": ("memory_fraction", float),
    "max-num-seqs": ("max_running_requests", int),
    "max-running-requests": ("max_running_requests", int),
    "max-batch-size": ("max_running_requests", int),
    "max-num-batched-tokens": ("max_step_tokens", int),
    "max-num-tokens": ("max_step_tokens", int),
    "max-prefill-tokens": ("max_step_tokens", int),
    "chunked-prefill-size": ("chunked_prefill_tokens", int),
    "block-size": ("page_tokens", int),
    "page-size": ("page_tokens", int),
    "max-model-len": ("context_tokens", int),
    "context-length": ("context_tokens", int),
    "cuda-graph-max-bs": ("graph_max_batch", int),
    "max-cudagraph-capture-size": ("graph_max_batch", int),
    "stream-interval": ("stream_interval_tokens", int),
}
"""Servers' flags, and words for them -> `Engine` settings."""
_SWITCHES: tuple[tuple[str, str, Any], ...] = (
    (r"no[- ]prefix[- ]cach\w*|no-enable-prefix-caching|disable-radix-cache|radix cache off", "prefix_cache", False),
    (r"enforce[- ]eager|disable[- ]cuda[- ]graph\b|\beager mode", "graph_mode", "eager"),
    (r"full[-_]decode[-_]only", "graph_mode", "full"),
    (r"enable-mixed-chunk", "policy", "mixed"),
    (r"enable-nccl-nvls|enable-symm-mem", "reduces_in_switches", True),
    (r"disable-overlap-schedule|no-async-scheduling", "overlap_scheduling", False),
)
"""Words that stand for a setting's value."""
_TUNED = r"tuned per point|best configuration"
_DP_ATTENTION = r"enable[- ]dp[- ]attention|dp[- ]attention"
_SHARED = ("chunked_prefill_tokens", "max_running_requests")
"""What a SGLang server is told of all ranks of attention data parallelism together (server_args.py, tp_worker.py)."""


@dataclass(frozen=True)
class PublishedRow:
    """A published row, read.

    group: rows of one group share their errors: source, model, chip, engine, release and layout. engine: with the
    described release that stands for its own. measured: figures by column. accept_length: tokens a step with drafts;
    None where none are drafted. without: a cause that is switched off. older: its engine is older than every described
    release. apart: why the row is scored apart from the others, or "".
    """

    name: str
    group: str
    cfg: ModelConfig
    profile: Profile
    layout: Layout
    scheme: str
    kv: str | None
    engine: str
    settings: Mapping[str, Any]
    drafts: int
    accept_length: float | None
    load: Workload
    measured: Mapping[str, float]
    apart: str = ""
    older: bool = False
    without: Mechanism | None = None

    def spec(self) -> Spec:
        """The deployment. Raises `UsageError` or `EngineError`."""
        found = spec_for(
            self.cfg,
            self.profile,
            self.layout,
            self.scheme,
            self.kv,
            self.engine,
            self.settings,
            drafts=self.drafts,
            accept_length=self.accept_length,
            expert_load=self.without.expert_load if self.without else None,
        )
        if self.without and self.without.newest_tables:
            return dataclasses.replace(found, engine=dataclasses.replace(found.engine, release=""))
        return found


MOST_CHARACTERS, MOST_COUNT = 2_000, 10**9  # of a cell, and what one may count
_DEALT = r"(?:--decode-context-parallel-size|-dcp)[ =]+(\d{1,6})\b"
"""Decode context parallelism is no column: servers say it in their flags."""
_CUT_PROMPTS = r"(?:--prefill-context-parallel-size|-pcp)[ =]+(\d{1,6})\b"
_CUT_IN_TP = r"(?:--attn-cp-size|--attention-context-parallel-size)[ =]+(\d{1,6})\b"
_ALL_CUT = r"--enable-(?:(?:nsa-|dsa-)?prefill-context-parallel|prefill-cp)\b"
"""Prefill context parallelism: of vLLM beside its tp, of SGLang a part of it, all where no number says which."""


def read(row: Mapping[str, str], without: Mechanism | None = None) -> PublishedRow:
    """A row of a CSV with `COLUMNS`. without: a cause to switch off. Raises `UsageError` naming the column that cannot
    be read."""
    cell = {key: (value or "").strip() for key, value in row.items() if key is not None}
    for column, text in cell.items():
        within(f"{column}: characters:", len(text), MOST_CHARACTERS)
    cfg, profile = model_of(cell["model"]), hw_profiles.load(cell["chip"])
    degrees = {axis: _whole(cell, axis, 1) for axis in ("tp", "dp", "ep", "pp")}
    dealt = re.search(_DEALT, cell["server_flags"])
    cut = _cut(cell["server_flags"], degrees)
    layout = Layout(**degrees, dcp=int(dealt[1]) if dealt else 1, **cut)
    devices = _whole(cell, "devices", layout.devices)
    if devices != layout.devices:
        raise UsageError(f"devices {devices}: tp x dp x pp is {layout.devices}")
    drafts, accept_length, apart = _drafts(cell)
    version = f"{cell['engine_version']} {cell.get('date', '')}"
    engine = nearest_release(cell["engine"], version)
    off = without or Mechanism("", "")
    if off.newest:
        engine = cell["engine"]
    if changed := {path: value for path, value in off.chip.items() if profile.number(path) is not None}:
        profile = hw_profiles.load(cell["chip"], changed)
    if older := older_than_all(version, described(cell["engine"])):
        apart = apart or f"older than every described release of {cell['engine']}"
    if not cfg.mtp_layers:
        drafts, accept_length = 0, None  # drafted by something else than the model
    return PublishedRow(
        name=f"{cell.get('id', '')} {cell['model']} {cell['chip']} {cell['engine']}".strip(),
        group=group_of(cell),
        cfg=cfg,
        profile=profile,
        layout=layout,
        scheme=scheme_of_words(cell["formats"]),
        kv=_kv(cell["kv_dtype"]),
        engine=engine,
        settings={
            **off.settings,
            **settings_of(cell["server_flags"], engine, Circumstances.of(cfg, profile), _clients(cell), layout.dp),
        },
        drafts=drafts,
        accept_length=accept_length,
        load=_load(cell),
        measured=_measured(cell),
        apart=apart,
        older=older,
        without=without,
    )


def _cut(flags: str, degrees: dict[str, int]) -> dict[str, int]:
    """tp groups that a prompt is cut over, by a server's flags. degrees: of the row; what SGLang cuts goes off its tp.
    Raises `UsageError` where its tp does not divide."""
    if found := re.search(_CUT_PROMPTS, flags):
        return {"pcp": int(found[1])}
    named = re.search(_CUT_IN_TP, flags)
    if not (named or re.search(_ALL_CUT, flags)):
        return {}
    cut = int(named[1]) if named else degrees["tp"]
    if cut < 1 or degrees["tp"] % cut:
        raise UsageError(f"server_flags: tp {degrees['tp']} is not cut over {cut} ranks")
    degrees["tp"] //= cut
    return {"pcp": cut}


def group_of(cell: Mapping[str, str]) -> str:
    """Source (its page, without the row in it), model, chip, engine, release and layout."""
    source = re.split(r"/results/|:\d|@|#\d", cell["source"])[0].strip()
    layout = " ".join(f"{axis}{cell[axis]}" for axis in ("tp", "dp", "ep", "pp") if cell[axis] not in ("", "1"))
    return f"{cell['model']} {cell['chip']} {cell['engine']} {cell['engine_version']} {layout or 'tp1'}, {source}"


def model_of(name: str) -> ModelConfig:
    """A model by preset, by its Hugging Face name ("deepseek-ai/DeepSeek-V3.1"), by that and a precision, or by the
    path of a config.json. Raises `ConfigError`; a name is never taken for a folder."""
    short = name.split("/")[-1].lower()
    for known in (short, ALIASES.get(short), _PRECISIONS.sub("", short), ALIASES.get(_PRECISIONS.sub("", short))):
        if known in preset_names():
            return load_config(str(known))
    return load_config(name) if name.endswith(".json") else preset(name)


def scheme_of_words(words: str) -> str:
    """The scheme that a source's words for its number formats mean. Raises `UsageError`."""
    if words in SCHEMES:
        return words
    first = words.lower()
    for pattern, name in _FORMATS:
        if re.search(pattern, first):
            return name
    raise UsageError(f"formats {words!r}: none that is known")


def settings_of(flags: str, engine: str, at: Circumstances, clients: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Settings of the engine from the server's command line, or from words about it. clients: in flight, which a server
    that was tuned for them has graphs for. ranks: of attention data parallelism, over which SGLang shares what
    `_SHARED` says."""
    found: dict[str, Any] = {}
    words, defaults = flags.lower().replace("_", "-"), load_engine(engine, at=at)
    if clients and re.search(_TUNED, words):
        found["graph_batch_sizes"] = tuple(sorted({*defaults.graph_batch_sizes, clients}))
    for flag, (setting, kind) in _FLAGS.items():
        for value in re.findall(rf"(?:^|[\s(,;]|--){re.escape(flag)}[ =:]+([\d.]+k?)", words):
            number = value.rstrip(".,")
            try:
                scaled = float(number[:-1]) * 1024 if number.endswith("k") else float(number)
                found[setting] = kind(scaled)
            except (ValueError, OverflowError):
                raise UsageError(f"server_flags: {flag} {value!r} is not a number") from None
    if defaults.kind == "sglang" and ranks > 1 and re.search(_DP_ATTENTION, words):
        found |= {setting: max(1, found[setting] // ranks) for setting in _SHARED if found.get(setting, 0) > 0}
    for pattern, setting, value in _SWITCHES:
        if re.search(pattern, words):
            found[setting] = value
    if "max_step_tokens" in found and defaults.policy == "mixed" and defaults.chunked_prefill_tokens:
        found.setdefault("chunked_prefill_tokens", found["max_step_tokens"])  # one budget
    return found


def _clients(cell: Mapping[str, str]) -> int:
    """Clients of a closed loop; 0 where their number is not said ("all at once")."""
    return _count(cell, "concurrency")


def _kv(words: str) -> str | None:
    """The cache's format, or None for the engine's choice."""
    found = re.search(r"fp8|int8|bf16|fp16", words.lower())
    return None if found is None else "bf16" if found[0] == "fp16" else found[0]


def _drafts(cell: Mapping[str, str]) -> tuple[int, float | None, str]:
    """Drafts a step, tokens that a step makes, and what is not known of them."""
    drafts, words = _count(cell, "mtp"), cell["mtp"]
    if not drafts:
        return 0, None, ""
    if length := re.search(r"(?:accept\w* length|tokens a step|scored at)\D*([\d.]+)", words):
        return drafts, _number("mtp", length[1].rstrip(".")), ""
    if rate := re.search(r"accept\D*(0?\.\d+|\d+(?:\.\d+)? ?%)", words):
        share = float(rate[1].rstrip(" %")) / (100 if "%" in rate[1] else 1)
        return drafts, (1 - share ** (drafts + 1)) / (1 - share) if share < 1 else drafts + 1.0, ""
    return drafts, None, "acceptance of drafts not recorded"


def _load(cell: Mapping[str, str]) -> Workload:
    """The load, as the client made it: `concurrency` clients, or all prompts at once, or at a rate."""
    said = re.match(r"[\d.]+", cell["length_ratio"])
    ratio = min(1.0, _number("length_ratio", said[0])) if said else 1.0
    prompt, output = (_lengths(_whole(cell, axis), ratio) for axis in ("isl", "osl"))
    clients = _clients(cell)
    requests = _count(cell, "num_prompts") or 10 * clients
    rate = re.match(r"[\d.]+", cell["rate"])
    if rate and not clients:
        load = open_loop(_number("rate", rate[0]), requests or 1000, prompt, output)
        return dataclasses.replace(load, goes_on=None) if requests else load  # clients of so many prompts stop there
    if not requests:
        raise UsageError("neither concurrency, rate nor num_prompts is a number")
    return closed_loop(min(clients, requests) if clients else requests, requests, prompt, output)


def _lengths(tokens: int, ratio: float) -> Lengths:
    return Fixed(tokens) if ratio == 1 else Uniform(tokens, ratio)


def _measured(cell: Mapping[str, str]) -> dict[str, float]:
    found = {}
    for column in MEASURED:
        text = cell.get(column, "")
        if not text:
            continue
        value = _number(column, text)
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{column} is {text}: a measured figure is above zero")
        found[column] = value
    if not found:
        raise UsageError(f"no figure: one of {', '.join(MEASURED)}")
    return found


def _count(cell: Mapping[str, str], column: str) -> int:
    """The whole number that a cell begins with; 0 where it begins otherwise."""
    found = re.match(r"\d+", cell[column])
    count = int(found[0]) if found else 0
    within(f"{column}:", count, MOST_COUNT)
    return count


def _number(column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{column} is {text!r}, not a number") from None


def _whole(cell: Mapping[str, str], column: str, default: int | None = None) -> int:
    text = cell[column]
    if not text and default is not None:
        return default
    value = _number(column, text)
    if not (math.isfinite(value) and value >= 1):
        raise UsageError(f"{column} is {text}: give one or more")
    return round(value)
