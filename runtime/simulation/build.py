"""From what a person names (model, profile, layout, formats, engine) to a deployment that can be simulated.

Both `glm5 simulate` and `glm5 validate` go through `build`. Imports the tracer, and with it JAX, inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import hw_profiles
from foundation.errors import UsageError
from foundation.limits import within
from foundation.reading import Unreadable, parse_toml
from hw_profiles import Profile
from model.config import MOST_DRAFTS, MOST_EXPERTS, ModelConfig
from model.formats import Formats, Scheme, scheme
from model.split import MOST_DEVICES, Layout
from runtime.deployment.engines import Engine, check_dealt, engine_for, formats_for, sized_cache, with_pool
from runtime.deployment.kv import Offload
from runtime.deployment.ledger import (
    COMMUNICATION_BYTES,
    RUNTIME_BYTES,
    DeviceMemory,
    Ledger,
    fullest,
    stage_kv_bytes_per_token,
    stage_ledgers,
    stage_weight_bytes,
)
from runtime.pricing import Chip, PriceBook, load, open_book
from runtime.pricing.chip import kept_share
from runtime.pricing.pricer import GraphPricer, OpLists
from runtime.serving import CacheTier, Deployment, Speculation
from runtime.simulation.offload import cache_tiers, tiers_assumed

_HALF, _BRAIN = (f"chip.peak.{name}_flops_per_s" for name in ("fp16", "bf16"))
_ACCEPTED, _ACCEPTED_RANGE = 0.65, (0.60, 0.90)
"""Chance that a draft is taken, where nobody says, and what it may be: DeepSeek-V3.2 makes 2.55 tokens at 4 steps,
which a chance of 0.61 gives (arXiv 2602.15763, table of accept lengths), DeepSeek-V3's first draft is taken 85 to 90 %
of the time (arXiv 2412.19437, 5.4.3)."""
_ACCEPTED_SPREAD = 0.025
"""Either way, of a chance that is given without one: it goes by the text, and DeepSeek-V3's lies between 85 and 90 %
over topics (the same)."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """A deployment, by name.

    expert_load: how tokens fall on experts, by name (see `runtime.pricing.load.parse`) or as a load over the expert
    slots in their order. redundant_slots: copies of experts a device, in each MoE layer. named, settings: the engine as
    it was asked for, a name or a TOML file, and what of it was set by hand (see `spec_for`). replicas: how many of it
    sit one behind another on the chip's servers. offload: memory below the chip's that prompts are kept in.
    """

    cfg: ModelConfig
    profile: Profile
    layout: Layout
    formats: Formats
    engine: Engine
    expert_load: str | load.ExpertLoad | None = None
    drafts: int = 0
    accept_length: float | None = None
    acceptance: tuple[float, ...] = ()
    acceptance_ranges: tuple[tuple[float, float], ...] = ()
    pool_tokens: int | None = None
    redundant_slots: int = 0
    named: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    replicas: int = 1
    offload: Offload = Offload()

    def __post_init__(self) -> None:
        within("drafts a step (--mtp):", self.drafts, MOST_DRAFTS)
        within("expert slots a device beyond an even share:", self.redundant_slots, MOST_EXPERTS)
        check_dealt(self.engine, self.layout, self.formats)
        within("devices of all replicas:", self.replicas * self.layout.devices, MOST_DEVICES)


def spec_for(
    cfg: ModelConfig,
    profile: Profile,
    layout: Layout,
    formats: str | Scheme,
    kv: str | None = None,
    engine: str = "sglang",
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Spec:
    """A deployment from what a person names: a scheme, a cache format (None: the engine's choice) and an engine.

    more: the other fields of `Spec`. Raises `UsageError` or `EngineError`.
    """
    described = engine_for(engine, cfg, profile, layout, settings, more.get("drafts", 0))
    held = formats_for(described, cfg, profile, scheme(formats) if isinstance(formats, str) else formats, kv)
    return Spec(cfg, profile, layout, held, described, named=engine, settings=dict(settings or {}), **more)


@dataclasses.dataclass(frozen=True)
class Built:
    """A deployment ready to simulate, with what it was made from."""

    spec: Spec
    ledger: Ledger | None
    pricer: GraphPricer
    deployment: Deployment


@lru_cache(maxsize=32)
def _programs(cfg: ModelConfig, layout: Layout, mtp: bool = True) -> OpLists:
    from runtime.pricing.trace import trace

    traced = trace(cfg, layout, "decode", mtp=mtp)
    return OpLists(traced.layers, traced.embed, traced.head, traced.mtp)


def model_override(cfg: ModelConfig, path: str, value: str) -> ModelConfig:
    """`--set model.<field>=value`. Only `model.index_topk`: another selection, or 0 for dense attention."""
    if path != "model.index_topk" or cfg.indexer is None:
        raise UsageError(f"--set {path}: only model.index_topk can be set, and only for a model with an indexer")
    try:
        topk = int(value)
    except ValueError:
        raise UsageError(f"--set {path}={value}: not a whole number") from None
    if topk < 0:
        raise UsageError(f"--set {path}={value}: must be 0 (dense) or more")
    if topk:
        return dataclasses.replace(cfg, indexer=dataclasses.replace(cfg.indexer, topk=topk))
    layers = tuple(dataclasses.replace(kind, indexer="none") for kind in cfg.layers)
    return dataclasses.replace(cfg, name=f"{cfg.name} (dense)", indexer=None, layers=layers)


def default_expert_load(cfg: ModelConfig, layout: Layout) -> str:
    """How tokens fall on experts when nobody measured it: evenly at random, or by a power law of 0.8, whose tokens meet
    fewer experts in a small batch.

    The power law was set on DeepSeek-V3's decode steps on H200 (SGLang, TensorRT-LLM) and holds for routers that are
    limited to a few groups. Kimi-K2.5's steps under vLLM on H200, B200 and B300 are as it says where experts are cut by
    width; with whole experts on devices (EP4 there, a prompt's step on Ascend) they are as with even loads. GLM-5's are
    even on H200.
    """
    limited = cfg.moe is not None and cfg.moe.n_group > 1
    skewed = limited or (cfg.moe is not None and cfg.model_type in _SKEWED and not layout.by_expert)
    return "power_law:0.8" if skewed else "uniform"


_SKEWED = frozenset({"deepseek_v3", "deepseek_v32"})


def split_settings(settings: list[str]) -> tuple[dict[str, Any], list[tuple[str, str]], dict[str, Any]]:
    """`--set field=value` options by what they change: the profile, the model, the engine.

    Raises `UsageError` or `InvalidOverride` for one that is no `field=value`.
    """
    chip: dict[str, Any] = {}
    of_model: list[tuple[str, str]] = []
    of_engine: dict[str, Any] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write it as field=value")
        if field.startswith("model."):
            of_model.append((field, value))
        elif field.startswith("engine."):
            of_engine[field.removeprefix("engine.")] = _parsed(value)
        else:
            path, number = hw_profiles.parse_override(setting)
            chip[path] = number
    return chip, of_model, of_engine


def chip_with(name: str, settings: Mapping[str, Any]) -> Profile:
    """A profile with figures set by hand. Raises `ProfileError`, or `UsageError` for one that changes no answer."""
    found = hw_profiles.load(name, settings)
    for path in settings:
        if why := hw_profiles.refused(path):
            raise UsageError(f"--set {path}: {why}")
        if path == _HALF and found.number(_BRAIN) is not None:
            raise UsageError(f"--set {path}: 16-bit products on {found.name} are at the rate of {_BRAIN}; set that")
    return found


def _parsed(value: str) -> Any:
    """An engine setting's value: a TOML value where it is one, else the text itself."""
    try:
        return parse_toml(f"value = {value}")["value"]
    except Unreadable:
        return value


def memory(spec: Spec) -> Ledger:
    """The ledger of a deployment's fullest device. Raises `CapacityError` where it does not fit."""
    return fullest(memories(spec), spec.cfg, spec.layout, spec.engine.page_tokens, spec.engine.memory_fraction)


def memories(spec: Spec) -> list[Ledger]:
    """The ledger of each pipeline stage's devices, fitting or not."""
    return stage_ledgers(
        spec.cfg,
        spec.layout,
        spec.formats,
        spec.engine,
        **vars(DeviceMemory.of(spec.profile, spec.layout.devices, spec.layout.communicators)),
        mtp=spec.drafts > 0,
        redundant_slots=spec.redundant_slots,
        sized=sized_cache(spec.engine, spec.cfg, spec.profile, spec.formats),
    )


def node_devices(profile: Profile) -> int:
    """Devices in one node of this chip; 8 where the profile does not say."""
    return int(profile.number("node.devices") or profile.number("link.scale_up.domain_devices") or 8)


def require_positions(cfg: ModelConfig, prompt_tokens: int, output_tokens: int) -> None:
    """Raises `UsageError` for a request longer than the model has positions."""
    if prompt_tokens + output_tokens > cfg.max_positions:
        asked = f"{prompt_tokens:,} tokens in and {output_tokens:,} out are {prompt_tokens + output_tokens:,}"
        raise UsageError(f"{asked}, and {cfg.name} has {cfg.max_positions:,} positions: ask for fewer")


class PriceTables:
    """What builds of several deployments share: price books and their tables.

    coarse: tables with fewer knots, for comparing many layouts.
    """

    def __init__(self, coarse: bool = False):
        self.coarse = coarse
        self._books: dict[Any, tuple[PriceBook, dict[Any, Any]]] = {}
        self._loads: dict[Any, load.ExpertLoad] = {}

    def book(self, profile: Profile, engine: Engine, wide: str, kept: float = 0.0) -> tuple[PriceBook, dict[Any, Any]]:
        """The price book of a chip under an engine, and the tables made from it so far. kept: as of `Chip`."""
        key = (id(profile), engine.prices, engine.release, wide, kept)
        if key not in self._books:
            graded = {curve.grade for curve in profile.curves.values()}
            # a curve set by hand counts beside its own
            grades = {"measured", "user"} if "measured" in graded else {"measured"}
            curves = {path: curve.knots for path, curve in profile.curves.items() if curve.grade in grades}
            chip = Chip.from_fields(profile.name, profile.number, curves).keeping(kept)
            # the profile is kept, so that its id stays its own
            # a release of the engine whose tables they are: others only borrow them
            release = engine.release if engine.kind == engine.prices else ""
            book = open_book(chip, engine.prices, profile.prices_path, wide, release, profile.family)
            self._books[key] = book, {"profile": profile}
        return self._books[key]

    def load(self, name: str, experts: int) -> load.ExpertLoad:
        if (name, experts) not in self._loads:
            self._loads[name, experts] = load.parse(name, experts)
        return self._loads[name, experts]


def _kept(spec: Spec) -> float:
    """The share of a device's weights that its cache keeps from step to step: none, but for a model that is small."""
    cache_bytes = spec.profile.number("chip.memory.cache_bytes")
    if not cache_bytes or not spec.profile.number("chip.memory.cache_bandwidth_bytes_per_s"):
        return 0.0
    stages = range(spec.layout.pp)
    held = (stage_weight_bytes(spec.cfg, spec.layout, spec.formats, stage, spec.drafts > 0) for stage in stages)
    return float(kept_share(cache_bytes, max(sum(each.values()) for each in held)))


def pricer_of(spec: Spec, tables: PriceTables) -> GraphPricer:
    """The prices of a deployment's steps. Raises `ProfileError` or `PriceError`."""
    book, shared = tables.book(spec.profile, spec.engine, spec.formats.wide, _kept(spec))
    experts = spec.expert_load
    if not isinstance(experts, load.ExpertLoad):
        experts = tables.load(
            experts or default_expert_load(spec.cfg, spec.layout), spec.cfg.moe.experts if spec.cfg.moe else 1
        )
    return GraphPricer(
        spec.cfg,
        spec.layout,
        spec.formats,
        _programs(spec.cfg, dataclasses.replace(spec.layout.by_groups, pp=1, dcp=1), spec.drafts > 0),
        book,
        experts,
        spec.engine.sparse_layer_seconds,
        shared,
        tables.coarse,
        spec.replicas,
        spec.engine.layer_seconds,
        spec.engine.kernel_time_factor,
        spec.engine.captured_tokens(1 + spec.drafts),
        not spec.engine.reduces_in_switches,
    )


def assumed(spec: Spec, memory: bool = True, drafting: bool = True) -> frozenset[str]:
    """What of a deployment nobody gave, and what was taken for it, in words; what its prices rest on, they say
    themselves. memory: its pool was worked out. drafting: it makes answers."""
    profile, engine = spec.profile, spec.engine
    taken: dict[str, str] = {}
    if memory:
        taken["chip.memory.usable_bytes"] = "all of the capacity"
        taken["overhead.runtime_reserved_bytes"] = f"{RUNTIME_BYTES / 1e9:g} GB"
        if spec.layout.devices > 1 and profile.number("overhead.communicator_buffer_bytes") is None:
            taken["overhead.collective_buffer_bytes"] = f"{COMMUNICATION_BYTES / 1e9:g} GB"
    found = {f"{path} {text}" for path, text in taken.items() if profile.number(path) is None}
    times = ("graph_step_host_seconds", "eager_step_host_seconds")
    if engine.hosts and profile.vendor not in engine.hosts and not all(name in spec.settings for name in times):
        replayed, launched = (engine.step_seconds(0.0, whole, False) * 1e3 for whole in (True, False))
        found.add(
            f"host times of {engine.name} as beside {' and '.join(engine.hosts)} chips: {replayed:g} ms a step that "
            f"replays a graph, {launched:.3g} ms one that launches each kernel"
        )
    if drafting and spec.drafts and spec.accept_length is None and not spec.acceptance:
        mean = _default_acceptance(spec.drafts)
        found.add(f"MTP acceptance {_ACCEPTED:g} a draft: {mean:.2f} tokens a step with {spec.drafts} drafted")
    return frozenset(found) | tiers_assumed(spec.offload, profile)


def tiers_of(spec: Spec) -> tuple[CacheTier, ...]:
    """The memory below the devices' that a rank keeps prompts in. Raises `UsageError` for a link that is not known."""
    layout = spec.layout
    size = max(
        stage_kv_bytes_per_token(spec.cfg, layout, spec.formats, stage, spec.drafts > 0) for stage in range(layout.pp)
    )
    return cache_tiers(spec.offload, spec.profile, spec.engine.page_tokens, size, layout.dp)


def build(spec: Spec, tables: PriceTables | None = None) -> Built:
    """Traces, prices and sizes a deployment.

    Raises `UsageError`, `CapacityError`, `ProfileError` or `PriceError`, each in one line (a model that does
    not fit prints its ledger below it).
    """
    spec.layout.check(spec.cfg)
    if spec.drafts and not spec.cfg.mtp_layers:
        raise UsageError(f"{spec.cfg.name} has no MTP layer to draft with: leave out --mtp")
    if spec.accept_length is not None and not spec.drafts:
        raise UsageError(f"--accept {spec.accept_length:g} says nothing without drafts: add --mtp")
    held = memory(spec) if spec.pool_tokens is None else None
    pricer = pricer_of(spec, tables or PriceTables())
    pool = spec.pool_tokens or (held.pool_tokens if held else 0)
    deployment = Deployment(
        with_pool(spec.engine, spec.cfg, pool, spec.settings),
        pricer,
        pool_tokens=pool,
        devices=spec.layout.devices,
        ranks=spec.layout.dp,
        speculation=speculation(spec.drafts, spec.accept_length, spec.acceptance, spec.acceptance_ranges),
        assumed=assumed(spec, memory=held is not None),
        tiers=tiers_of(spec),
        router=spec.engine.router,
    )
    return Built(spec, held, pricer, deployment)


def speculation(
    drafts: int,
    accept_length: float | None = None,
    acceptance: tuple[float, ...] = (),
    ranges: tuple[tuple[float, float], ...] = (),
) -> Speculation | None:
    """Drafts a step, and how many of them are taken: on average, or by position as of `Speculation`, whose ranges are
    those of published acceptance where none are given."""
    if not drafts and not acceptance:
        return None
    if accept_length is None and not acceptance:
        chances = Speculation.from_mean(drafts, _default_acceptance(drafts)).acceptance
        return Speculation(chances, (_ACCEPTED_RANGE,) * drafts)
    chances = acceptance or Speculation.from_mean(drafts, accept_length or 1.0).acceptance
    return Speculation(chances, ranges or tuple(accepted_within(chance) for chance in chances))


def accepted_within(chance: float, spread: float | None = None) -> tuple[float, float]:
    """The range of a chance that is known to within `spread`, as published ones are where nobody says."""
    spread = _ACCEPTED_SPREAD if spread is None else spread
    return max(0.0, chance - spread), min(1.0, chance + spread)


def _default_acceptance(drafts: int) -> float:
    """Tokens a step: GLM-5's report gives 2.76 at 4 speculative steps (arXiv 2602.15763), which is what a
    geometric acceptance of 0.65 gives; the same chance is taken for other draft lengths."""
    return (1 - _ACCEPTED ** (drafts + 1)) / (1 - _ACCEPTED)
