"""What a TOML file of `launch/` says about a release of an engine. The files' own heads explain their sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from foundation.reading import Unreadable, read_toml
from hw_profiles import Profile
from model.cache import cache_rows
from model.config import ModelConfig
from model.formats import Formats
from model.split import Layout
from runtime.deployment.engines.engine import holds
from runtime.deployment.engines.releases import same_release
from runtime.deployment.errors import EngineError, LaunchError

Facts = Mapping[str, Any]
"""What the conditions of a table ask; the head of sglang.toml lists them."""

_FOLDER = Path(__file__).parent / "launch"


@dataclasses.dataclass(frozen=True)
class LaunchTable:
    """The flags and rules of one release of an engine, as read. checked: the packages whose own parsers and code they
    were checked with, as pip names them."""

    name: str
    release: str
    checked: tuple[str, ...]
    program: tuple[str, ...]
    runs_on: tuple[str, ...]
    port: int
    visible_devices: str
    flags: Mapping[str, tuple[str, str]]
    additional: tuple[Mapping[str, Any], ...]
    sources: Mapping[str, str]
    extra: tuple[Mapping[str, Any], ...]
    environment: tuple[Mapping[str, Any], ...]
    remark: tuple[Mapping[str, Any], ...]
    refuse: tuple[Mapping[str, Any], ...]

    def flag(self, key: str) -> str:
        return self.flags[key][0]

    def can(self, key: str) -> bool:
        return key in self.flags

    def extra_words(self, facts: Facts) -> list[list[str]]:
        """The words of each `[[extra]]` that applies."""
        return [list(rule["words"]) for rule in self.extra if holds(rule["when"], facts)]

    def variables(self, facts: Facts) -> dict[str, str]:
        """The environment variables that apply."""
        return _merged(self.environment, facts)

    def additional_config(self, facts: Facts) -> dict[str, Any]:
        """The keys of --additional-config that apply, dotted ones nested."""
        found: dict[str, Any] = {}
        for key, value in _merged(self.additional, facts).items():
            *outer, last = key.split(".")
            inner = found
            for name in outer:
                inner = inner.setdefault(name, {})
            inner[last] = value
        return found

    def remarks(self, facts: Facts) -> list[str]:
        return [rule["text"] for rule in self.remark if holds(rule["when"], facts)]

    def refusals(self, facts: Facts) -> list[str]:
        """Why a server is refused, by the rules that these facts decide; a rule that asks for others is left out."""
        known = facts.keys()
        return [rule["why"] for rule in self.refuse if rule["when"].keys() <= known and holds(rule["when"], facts)]

    @property
    def documented(self) -> Mapping[str, str]:
        """Every flag that this engine may be given, and the document it was read in."""
        found = {flag: source for flag, source in self.flags.values()}
        for rule in self.extra:
            found |= {word.partition("=")[0]: rule["source"] for word in rule["words"] if word.startswith("--")}
        return {flag: self.sources[source] for flag, source in found.items()}


def layout_facts(layout: Layout, drafts: int, role: str, placement: bool = False) -> dict[str, Any]:
    """What a table asks of how a pool is spread and of what it is for."""
    return {
        "role": role,
        "by_expert": layout.by_expert,
        "groups": layout.dp > 1,
        "cut": layout.pcp > 1,
        "drafts": drafts > 0,
        "pp": layout.pp > 1,
        "placement": placement,
    }


def format_facts(cfg: ModelConfig, profile: Profile, scheme: str, kv: str) -> dict[str, Any]:
    """What a table asks of a model and its number formats on a chip."""
    return {
        "vendor": profile.vendor,
        "model": cfg.name.removesuffix("-fp8"),
        "model_type": cfg.model_type,
        "scheme": scheme,
        "kv": kv,
        "sparse": cfg.sparse,
        "fp4": profile.number("chip.peak.fp4_flops_per_s") is not None,
    }


def pair_facts(cfg: ModelConfig, prefill: tuple[Layout, Formats], decode: tuple[Layout, Formats]) -> dict[str, Any]:
    """What a table asks of two pools that hand a cache on."""
    names = {row.name for kind in cfg.layer_counts for row in cache_rows(cfg, kind)}
    (before, given), (after, kept) = prefill, decode
    return {
        "same_cache": all(given.cache.of(name) == kept.cache.of(name) for name in names),
        "tp_fits": before.tp % after.tp == 0,
    }


@lru_cache
def _document(name: str) -> dict[str, Any]:
    path = _FOLDER / f"{name}.toml"
    try:
        return read_toml(path)
    except Unreadable as error:
        raise EngineError(f"{path}: {error}") from None


def _merged(rules: tuple[Mapping[str, Any], ...], facts: Facts) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rule in rules:
        if holds(rule["when"], facts):
            found |= rule["set"]
    return found


def launched() -> list[str]:
    """Engines that there are tables of."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml") if "releases" in _document(path.stem))


def releases(name: str) -> list[str]:
    """Releases of an engine that there are tables of, oldest first; none for an engine without a file."""
    return list(_document(name)["releases"]) if name in launched() else []


def runs_on(name: str) -> tuple[str, ...]:
    """Vendors of the chips that an engine's own releases run on."""
    return tuple(_document(name)["runs_on"])


@lru_cache
def table(name: str, release: str) -> LaunchTable:
    """The table of a release of an engine. Raises `LaunchError` where there is none."""
    known = releases(name)
    listed = next((each for each in known if same_release(each, release)), None)
    if listed is None:
        raise LaunchError(
            f"no launch table for {name} {release or 'of no release'}; there are tables for {name} {', '.join(known)}: "
            "name one with --release"
        )
    body = _document(name)

    def applying(section: str) -> tuple[Mapping[str, Any], ...]:
        """The rules that this release does not rule out, the release taken out of what they ask."""
        found = []
        for rule in body.get(section, ()):
            when = dict(rule["when"])
            if listed in when.pop("release", [listed]):
                found.append({**rule, "when": when})
        return tuple(found)

    spelt = {key: flag for rule in applying("spelt") for key, flag in rule["flags"].items()}
    return LaunchTable(
        name=body["name"],
        release=listed,
        checked=tuple(body["releases"][listed]),
        program=tuple(body["program"]),
        runs_on=tuple(body["runs_on"]),
        port=body["port"],
        visible_devices=body["visible_devices"],
        flags={key: (flag, source) for key, (flag, source) in {**body["flags"], **spelt}.items()},
        additional=applying("additional"),
        sources=body["sources"],
        extra=applying("extra"),
        environment=applying("environment"),
        remark=applying("remark"),
        refuse=applying("refuse"),
    )


def checkpoint(model: str, scheme: str) -> str | None:
    """The published checkpoint of a preset (its name without "-fp8") in these formats, if there is one."""
    return _document("checkpoints").get(scheme, {}).get(model)


def why_uneven(name: str, counts: Sequence[int], node: int) -> str:
    """What to say of a server that has not as many devices on each of its nodes, which every engine wants."""
    return (
        f"{' + '.join(map(str, counts))} devices over nodes of {node}: {name} wants as many on each node; plan with a "
        "number of devices that divides or fills nodes"
    )


def unsupported(name: str, release: str, facts: Facts) -> str | None:
    """Why a release of an engine does not serve what these facts say of a server; None where it does or where nothing
    is known.

    A release without a table is judged by the latest that has one.
    """
    known = releases(name)
    if not known:
        return None
    found = next((each for each in known if same_release(each, release)), known[-1])
    return next(iter(table(name, found).refusals(facts)), None)
