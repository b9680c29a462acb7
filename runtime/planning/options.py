"""What a replica can be on one chip: every layout, number format and cache format that the memory allows.

Free of prices: this is the first sieve. What it takes out is kept with the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import hw_profiles
from foundation.errors import CapacityError, UsageError
from foundation.limits import within
from hw_profiles import Profile
from model.config import MOST_DRAFTS, ModelConfig
from model.formats import FORMATS, KV, Scheme, matrix_format, scheme_of
from model.formats import scheme as named_scheme
from model.quantization_config import is_scheme
from model.split import Layout
from runtime.deployment.choice import missing_formats, offered_schemes
from runtime.deployment.demand import Demand
from runtime.deployment.engines import Circumstances, deals_cache, load
from runtime.deployment.engines.flags import format_facts, releases, unsupported, why_uneven
from runtime.deployment.kv import Offload
from runtime.deployment.plan import Rejected
from runtime.planning.assign import stage_pages, uneven_nodes
from runtime.serving.workload import MOST_REQUESTS
from runtime.simulation.build import Spec, memories, node_devices, spec_for

_MARGIN, _MOST_FRACTION = 0.02, 0.95
"""Of a device's memory left free, and the most that recipes pass to an engine."""
_PP = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_GROUPED = 16
"""Devices of a stage up to which groups of experts are searched: within a server or two, where gathering all tokens is
cheap. Wider ones are tried where `--ep` asks for them."""
_PP_KEPT = 2
"""Stages are for memory: the fewest that hold the model are kept, and so many more."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What a search is asked, beside the chips: the model, the load and what is given rather than searched.

    scheme, kv: None to search. drafts: tokens of multi-token prediction a step, acceptance: of each of them, and its
    ranges (see `Speculation`). held: degrees, by axis of `Layout`, that a layout must have; most_pp: pipeline stages at
    most. prefill_held: what the layout of a prefill pool is held to instead; where anything, pools apart are asked for.
    offload: memory below the devices' that prompts are kept in.
    """

    cfg: ModelConfig
    demand: Demand
    engine: str = "sglang"
    scheme: str | None = None
    kv: str | None = None
    drafts: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)
    most_pp: int | None = None
    acceptance: tuple[float, ...] = ()
    acceptance_ranges: tuple[tuple[float, float], ...] = ()
    prefill_held: Mapping[str, int] = dataclasses.field(default_factory=dict)
    offload: Offload = Offload()

    def __post_init__(self) -> None:
        within("concurrency", self.demand.concurrency or 0, MOST_REQUESTS)
        within("drafts a step (--mtp):", self.drafts, MOST_DRAFTS)

    def admits(self, stage: Layout) -> bool:
        """Whether the layout of a stage is one of those that may be searched."""
        return all(getattr(stage, axis) == degree for axis, degree in self.held.items() if axis != "pp")

    def spec(
        self, profile: Profile, layout: Layout, formats: str | Scheme, kv: str, settings: Mapping[str, Any], **more: Any
    ) -> Spec:
        """A deployment that may answer it. settings: of the engine, beside those that are given."""
        mode = load(self.engine).planned_graph_mode
        asked = {**({"graph_mode": mode} if mode else {}), **self.settings, **settings}
        return spec_for(
            self.cfg,
            profile,
            layout,
            formats,
            kv,
            self.engine,
            asked,
            drafts=self.drafts,
            acceptance=self.acceptance,
            acceptance_ranges=self.acceptance_ranges,
            offload=self.offload,
            **more,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Option:
    """A replica, by its deployment, and the pages of a rank of it."""

    spec: Spec
    pages: int

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.spec.settings

    @property
    def layout(self) -> Layout:
        return self.spec.layout

    @property
    def devices(self) -> int:
        return self.spec.layout.devices

    @property
    def pool_tokens(self) -> int:
        """Tokens of cache of one rank."""
        return self.pages * self.spec.engine.page_tokens

    def limited(self, running: int) -> Option:
        """The same with at most `running` requests in service a rank; 0: as it is."""
        if not running:
            return self
        engine = dataclasses.replace(self.spec.engine, max_running_requests=running)
        settings = {**self.settings, "max_running_requests": running}
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, engine=engine, settings=settings))

    @cached_property
    def name(self) -> str:
        extra = [f"{key}={value}" for key, value in self.settings.items()]
        extra += [f"+{self.spec.redundant_slots} expert slots"] if self.spec.redundant_slots else []
        return ", ".join([named(self.spec), *extra])


def named(spec: Spec) -> str:
    return f"{spec.layout.name} on {spec.profile.name}, {spec.formats.scheme.name}, KV {spec.formats.kv}"


def make_option(
    question: Question,
    profile: Profile,
    layout: Layout,
    scheme: str | Scheme,
    kv: str,
    settings: Mapping[str, Any],
    **more: Any,
) -> Option:
    """An option, sized. more: fields of `Spec`. Raises `UsageError`, or `CapacityError` where it does not fit."""
    layout.check(question.cfg)
    spec = question.spec(profile, layout, scheme, kv, settings, **more)
    try:
        return Option(spec, stage_pages(spec)[1])
    except CapacityError:
        fraction = _tight_fraction(spec)
        if "memory_fraction" in spec.settings or fraction <= spec.engine.memory_fraction:
            raise
    spec = question.spec(profile, layout, scheme, kv, {**settings, "memory_fraction": fraction}, **more)
    return Option(spec, stage_pages(spec)[1])


def _tight_fraction(spec: Spec) -> float:
    """The engine's memory fraction that leaves `_MARGIN` of the fullest device free, where its own is too cautious
    for the model to fit."""
    fractions = []
    for held in memories(spec):
        overhead = held.communication_bytes + held.runtime_bytes
        left = held.usable_bytes - held.weights_total_bytes - held.workspace_bytes - held.activation_bytes - overhead
        cache = left - _MARGIN * held.usable_bytes
        of = spec.engine.memory_fraction_of
        if of == "free-before-load":
            fractions.append((cache + held.weights_total_bytes) / (held.usable_bytes - overhead))
        elif of == "device":
            fractions.append(1 - _MARGIN)
        else:
            fractions.append(cache / max(left, 1.0))
    return max(0.0, math.floor(1000 * min(*fractions, _MOST_FRACTION)) / 1000)


def schemes(question: Question, profile: Profile) -> tuple[list[Scheme], list[Rejected]]:
    """Formats to search on a chip, best first, and those left out: the one asked for, or those it computes in.

    To quantise is the user's decision, not a planner's: none is narrower than the checkpoint's own, in experts or in
    dense matrices, nor as narrow and stored in another way where the chip computes with what is stored. And none that
    has no fewer bits and no higher rate than one before it. Raises `UsageError` where none is left.
    """
    asked_only = question.scheme is not None and not is_scheme(question.cfg.weight_format)
    own = None if asked_only else question.cfg.stored_scheme
    runs = [known for known in offered_schemes(profile) if known.wide != "f32"]
    as_stored = own and _as_stored(own, profile)
    if as_stored is not None and as_stored not in runs:
        runs.append(as_stored)  # one without a name of its own
    known = ", ".join(each.name for each in runs) or "none"
    if question.scheme is not None:
        asked = named_scheme(question.scheme)
        if asked.wide == "f32" or missing_formats(profile, asked):
            raise UsageError(f"{profile.name} does not compute in {question.scheme}; it runs {known}")
        return [asked], []
    assert own is not None
    anew = [s for s in runs if as_stored and s != as_stored and s.bits == own.bits and not s.narrower_than(own)]
    wide = [s for s in runs if s not in anew and not s.narrower_than(own)]
    order = sorted(wide, key=lambda s: (s != as_stored, s.bits))
    kept: list[Scheme] = []
    left_out = [
        Rejected(
            f"{s.name} on {profile.name}",
            f"narrower than the checkpoint's {own.name}: ask for it with --formats {s.name}",
        )
        for s in runs
        if s.narrower_than(own)
    ]
    left_out += [
        Rejected(
            f"{s.name} on {profile.name}",
            f"quantises the checkpoint's {own.name} anew: ask for it with --formats {s.name}",
        )
        for s in anew
    ]
    for each in order:
        better = next((k for k in kept if k.bits <= each.bits and _rate(profile, k) >= _rate(profile, each)), None)
        if better is None:
            kept.append(each)
        else:
            reason = f"{better.name} takes no more bytes and computes no slower"
            left_out.append(Rejected(f"{each.name} on {profile.name}", reason))
    if not kept:
        raise UsageError(
            f"{profile.name} computes in no format as wide as {question.cfg.name}'s {own.name}; narrower ones it runs: "
            f"--formats {' or '.join(each.name for each in runs) or 'none'}"
        )
    return kept, left_out


def _as_stored(own: Scheme, profile: Profile) -> Scheme | None:
    """The scheme that a chip runs a checkpoint in as it is stored: its own, or one that differs in what activations
    become; None where there is none."""

    def computes(name: str) -> str | None:
        asked = matrix_format(name)
        alike = (each.name for each in FORMATS.values() if asked.narrow and each.stored_as(asked))
        return next((each for each in (name, *alike) if not missing_formats(profile, scheme_of(each, each))), None)

    dense, experts = computes(own.dense), computes(own.experts)
    if (dense, experts) == (own.dense, own.experts):
        return own
    return None if dense is None or experts is None else scheme_of(dense, experts)


def _rate(profile: Profile, scheme: Scheme) -> float:
    """Peak FLOP/s of a scheme's expert products."""
    rate = hw_profiles.RATE_OF_SCHEME[matrix_format(scheme.experts).base]
    return profile.number(f"chip.peak.{rate}_flops_per_s") or profile.number("chip.peak.bf16_flops_per_s") or 0.0


def kv_formats(question: Question, profile: Profile) -> list[str]:
    """Cache formats to search: the chip's that the engine can keep. Raises `UsageError` for one that the chip does
    not have."""
    known = [name for name in KV if name in profile.formats.kv]
    if question.kv is None:
        engine = load(question.engine)
        asks = {name: format_facts(question.cfg, profile, "", name) for name in known}
        kept = [name for name in known if not unsupported(engine.kind, engine.release, asks[name])]
        return kept or ["bf16"]
    if question.kv not in (known or ["bf16"]):
        raise UsageError(f"{profile.name} keeps no {question.kv} cache; it has {', '.join(known)}")
    return [question.kv]


def nodes_refused(option: Option, replicas: int) -> str | None:
    """Why the engine's launch lines cannot put so many replicas of an option on nodes of its chip; None where they can,
    or where there are none for this engine."""
    engine, node = option.spec.engine, node_devices(option.spec.profile)
    counts = uneven_nodes(option.devices, replicas, node) if releases(engine.kind) else None
    return why_uneven(engine.kind, counts, node) if counts else None


def layouts(
    devices: int,
    held: int | None = None,
    groups: int | None = None,
    dealt: Callable[[int], Iterable[int]] = lambda tp: (1,),
    cut: int = 1,
) -> Iterator[tuple[Layout, list[int]]]:
    """Every tp x dp, with experts by tensor and by expert, and the numbers of stages to try with it, fewest first: the
    one that is held to, or several.

    groups: of experts, beside those: so many where they divide tp x dp; 0: what lies between, up to `_GROUPED`.
    dealt: of a tp, the ranks that a cache's tokens are dealt out to. cut: tp groups that a prompt is cut over, in all
    of them.
    Stages have a number of devices that divides `devices` or is a power of two.
    """
    sizes = {size for size in range(1, devices + 1) if devices % size == 0 or size & (size - 1) == 0}
    for size in sorted(sizes):
        stages = sorted({pp for pp in ((held,) if held else (*_PP, devices // size)) if pp * size <= devices})
        if not stages:
            continue
        for tp in (tp for tp in range(1, size + 1) if size % tp == 0):
            for dcp in dealt(tp):
                for ep in sorted({1, size, *_groups(size, groups)}):
                    if cut == 1:
                        yield Layout(tp=tp, dp=size // tp, ep=ep, dcp=dcp), stages
                    elif tp * cut == size and dcp == 1:
                        yield Layout(tp=tp, ep=ep, pcp=cut), stages


def _dealt(question: Question, profile: Profile) -> Callable[[int], Iterable[int]]:
    """Of a tp, the ranks to deal a cache's tokens out to: those asked for, or one, and where the engine can all that
    would hold the same of it."""
    if held := question.held.get("dcp"):
        return lambda tp: () if tp % held else (held,)
    at = Circumstances.of(question.cfg, profile)
    if not deals_cache(load(question.engine, question.settings, at), question.cfg):
        return lambda tp: (1,)
    return lambda tp: sorted({1, Layout(tp).cache_copies(question.cfg)})


def _groups(size: int, asked: int | None) -> list[int]:
    if asked:
        return [asked] if size % asked == 0 else []
    return [ep for ep in range(2, size) if size % ep == 0] if asked == 0 and size <= _GROUPED else []


@dataclasses.dataclass(frozen=True)
class Refused:
    """A layout that the memory does not allow. error: with the ledger below its first line. excess_bytes: on a
    device, by which it is too large."""

    name: str
    error: str
    excess_bytes: float


def options(question: Question, profile: Profile, devices: int) -> tuple[list[Option], list[Refused], list[Rejected]]:
    """What fits into `devices` devices of a chip and holds at least one request, what the memory refuses, and what
    is out for another reason."""
    found: list[Option] = []
    refused: list[Refused] = []
    wanted, left_out = schemes(question, profile)
    rejected = {each.name: each.reason for each in left_out}
    most = sum(question.demand.longest) + question.drafts
    groups = question.held.get("ep", 0 if load(question.engine).expert_groups and question.cfg.moe else None)
    cut = question.held.get("pcp", 1)
    searched = layouts(devices, question.held.get("pp"), groups, _dealt(question, profile), cut)
    held = [(base, stages) for base, stages in searched if question.admits(base)]
    if not held:
        asked = ", ".join(f"{axis} {degree}" for axis, degree in question.held.items())
        rejected[f"layouts on {profile.name}"] = f"none on {devices} devices has {asked}"
    for scheme, (base, stages) in itertools.product(wanted, held):
        try:
            base.check(question.cfg)
        except UsageError as error:
            rejected[f"{base.name} on {profile.name}"] = str(error)
            continue
        for kv in kv_formats(question, profile):
            kept = 0
            for pp in stages:
                if pp > (question.most_pp or pp):
                    continue
                layout = dataclasses.replace(base, pp=pp)
                name = f"{layout.name} on {profile.name}, {scheme.name}, KV {kv}"
                try:
                    replicas = devices // layout.devices
                    option = make_option(question, profile, layout, scheme, kv, {}, replicas=replicas)
                except UsageError as error:
                    rejected[name] = str(error)
                    continue
                except CapacityError as error:
                    refused.append(Refused(name, str(error), _excess(question, profile, layout, scheme, kv)))
                    continue
                if why := nodes_refused(option, replicas):
                    rejected[name] = why
                    continue
                if option.pool_tokens < most:
                    reason = f"its cache of {option.pool_tokens:,} tokens does not hold one request of {most:,}"
                    refused.append(Refused(name, reason, 0.0))
                    continue
                found.append(option)
                kept += 1
                if kept > _PP_KEPT:
                    break
    return found, refused, [Rejected(name, reason) for name, reason in rejected.items()]


def _excess(question: Question, profile: Profile, layout: Layout, scheme: Scheme, kv: str) -> float:
    """Bytes by which the weights and all else but the cache exceed the fullest device."""
    return max(held.kv_bytes - held.free_bytes for held in memories(question.spec(profile, layout, scheme, kv, {})))
