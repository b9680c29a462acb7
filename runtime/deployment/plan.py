"""The plan: which part of a model, its experts and its KV pages each device holds, and what that promises.

A `Plan` is plain data, written as one JSON file: one pool (`pool.py`) that serves, or one that prefills and one that
decodes. The file carries a hash of its own text, so that a changed byte is noticed, and of the model's config, so that
it is not used for another model. Free of JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from foundation.errors import printable, shortened
from foundation.paths import Outside, beside
from foundation.reading import Unreadable, parse_json, read_text
from foundation.writing import replacing
from model.config import ModelConfig
from model.formats import Formats
from model.hf_config import load_config, preset, preset_names
from runtime.deployment.demand import Demand, Figures
from runtime.deployment.document import document_text, to_json, validated
from runtime.deployment.engines import split_release
from runtime.deployment.errors import PlanFileError
from runtime.deployment.kv import PoolKv
from runtime.deployment.pool import Device, Experts, Pool
from runtime.deployment.sound import number_faults, plan_faults

SCHEMA_VERSION = 6
_HASH = re.compile(r'^"hash": "([0-9a-f]{64})",$', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class ModelRef:
    """The model of a plan: its preset name or path, and the SHA-256 of its config."""

    name: str
    config_hash: str


@dataclasses.dataclass(frozen=True)
class Route:
    """What one device sends to another of each token of a prompt. source, target: stage x tp + tp rank, among the
    devices of a prefill and of a decode replica that hold a sequence."""

    source: int
    target: int
    bytes_per_token: float


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What moving a prompt's cache from a prefill to a decode replica takes.

    kv_bytes_per_token: of one copy, in the prefill pool's format. link_bandwidth_bytes_per_s: at which a copy moves, as
    the busiest port lets it. conversion_seconds_per_token: rewriting it in the decode pool's format. bytes and seconds:
    of one prompt of `isl` tokens; bytes of all copies. routes: who sends to whom.
    """

    kv_bytes_per_token: float
    link_bandwidth_bytes_per_s: float
    link_latency_seconds: float
    conversion_seconds_per_token: float
    bytes: float
    seconds: float
    routes: tuple[Route, ...]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the serving simulator expects of a plan under its demand, with how far to trust it.

    ttft_ms, tpot_ms, e2e_ms: mean, p50, p90, p99. band: for "ttft_ms" and "tpot_ms", what should hold the measured
    mean nine times in ten; band_basis: on what it rests, for TPOT. evidence: the weakest grade of what went in;
    extrapolated: share of steps outside a fit's range. requests_per_s, output_tokens_per_s: over a steady window, ramp
    and drain left out; ..._per_device: of the devices that are used. meets_targets: by what they bound, and by whether
    the rate asked for is kept up with. assumed: what nobody gave, and what was taken for it, in words; the evidence is
    then "assumed". prefix_hit_rate: share of prompt tokens found in the prefix cache;
    prefix_hits: by the tier they were found in.
    """

    concurrency: int | None
    rate: float | None
    requests_per_s: float
    output_tokens_per_s: float
    output_tokens_per_s_per_device: float
    output_tokens_per_s_per_user: float | None
    ttft_ms: Figures
    tpot_ms: Figures
    e2e_ms: Figures
    band: Mapping[str, tuple[float, float]]
    evidence: str
    extrapolated: float
    kv_peak_fraction: float
    requests_simulated: int
    saturated_by: str
    bottleneck: str
    meets_targets: bool
    assumed: tuple[str, ...] = ()
    band_basis: str = ""
    prefix_hit_rate: float = 0.0
    prefix_hits: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def missed(self, demand: Demand) -> list[str]:
        """What of the demand is missed, in words."""
        kept_up = not self.saturated_by
        return demand.missed(self.ttft_ms, self.tpot_ms, self.requests_per_s, kept_up)


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A plan that was priced. simulated: by the serving simulator; otherwise a steady-state estimate. Answers of one
    token have no tpot_ms, and no rate a user.

    front: no other of its kind has both more tokens a second and device, and more a second and user.
    """

    name: str
    devices: int
    concurrency: int
    simulated: bool
    chosen: bool
    front: bool
    output_tokens_per_s_per_device: float
    output_tokens_per_s_per_user: float | None
    ttft_ms: float
    tpot_ms: float | None
    meets_targets: bool
    evidence: str


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A candidate that was left out, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A deployment, decided. pools: one that serves, or one that prefills and then one that decodes.

    predicted: None for a plan made on the spot. transfer: between the two pools. kv: the cache's tiers, a pool each
    (see `kv_tiers.pool_kv`); empty where nobody worked them out. idle_devices: given, and not used.
    """

    model: ModelRef
    demand: Demand
    pools: tuple[Pool, ...]
    transfer: Transfer | None = None
    kv: tuple[PoolKv, ...] = ()
    idle_devices: int = 0
    predicted: Predicted | None = None
    alternatives: tuple[Alternative, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def serving(self) -> Pool:
        """The pool that makes the answers: the only one, or the one that decodes."""
        return self.pools[-1]

    @property
    def formats(self) -> Formats:
        """Number formats of the pool that makes the answers."""
        return self.serving.formats

    @property
    def engine(self) -> str:
        return self.serving.engine

    @property
    def experts(self) -> Experts | None:
        return self.serving.experts

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices, by index."""
        return tuple(device for pool in self.pools for device in pool.devices)

    @cached_property
    def text(self) -> str:
        """The file: JSON, a top-level field a line; `hash` is the SHA-256 of the text with zeros in its place."""
        body = to_json(self)
        head = {"schema_version": body.pop("schema_version"), "hash": "0" * 64, "model": body.pop("model")}
        text = document_text({**head, "formats": to_json(self.formats), **body})
        return text.replace("0" * 64, _digest(text), 1)

    @property
    def hash(self) -> str:
        """SHA-256 of the plan's text."""
        found = _HASH.search(self.text)
        assert found
        return found[1]

    def write(self, path: str | Path) -> None:
        """Writes the file, whole or not at all. Raises `UsageError`."""
        with replacing(path) as temporary:
            temporary.write_text(self.text, encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path, cfg: ModelConfig | None = None) -> Plan:
        """The plan in a file. cfg: the model it must be for.

        A profile or an engine that does not ship with this program is read where it stands beside the file, and
        nowhere else. Raises `PlanFileError` with the reason for a file that is cut short, edited, of another schema
        version or for another model, and for one that names what is not there.
        """
        try:
            text = read_text(path)
        except Unreadable as error:
            if error.reason == "encoding":
                raise PlanFileError(f"{path}: damaged, it is not UTF-8 text; make the plan anew") from None
            raise PlanFileError(f"{path}: cannot be read: {error}") from None
        plan = cls.parse(text, str(path))
        if cfg is not None:
            plan.require_model(cfg, str(path))
        found = dataclasses.replace(plan, pools=tuple(_beside(Path(path), *each) for each in enumerate(plan.pools)))
        found.__dict__["text"] = text  # and its hash, wherever the files of its pools are
        return found

    @classmethod
    def parse(cls, text: str, where: str = "plan") -> Plan:
        """The plan in a text. Raises `PlanFileError`, see `read`."""
        try:
            document = parse_json(text)
        except Unreadable as error:
            found = f"not JSON from line {error.line} ({error.what})" if error.line else str(error)
            raise PlanFileError(f"{where}: cut short or damaged, {found}; make the plan anew") from None
        if not isinstance(document, dict) or "schema_version" not in document or "pools" not in document:
            raise PlanFileError(f"{where}: no plan (a plan has schema_version and pools); `glm5 plan --out` writes one")
        if document["schema_version"] != SCHEMA_VERSION:
            raise PlanFileError(
                f"{where}: schema version {document['schema_version']!r}, this program reads {SCHEMA_VERSION}; "
                "make the plan anew"
            )
        stated = _HASH.search(text)
        if stated is None:
            raise PlanFileError(f"{where}: edited, its hash is gone; make the plan anew")
        actual = _digest(text[: stated.start(1)] + "0" * 64 + text[stated.end(1) :])
        if stated[1] != actual:
            raise PlanFileError(
                f"{where}: edited or damaged, its text hashes to {actual[:12]}… and not to {stated[1][:12]}…; "
                "make the plan anew"
            )
        body = {key: value for key, value in document.items() if key not in ("hash", "formats")}
        plan = validated(cls, body, PlanFileError, where, complete=True)
        if fault := next(chain(number_faults(body), plan_faults(plan)), None):
            raise PlanFileError(f"{where}: {fault}; make the plan anew")
        for index, pool in enumerate(plan.pools):
            if pool.scheme != (meant := pool.formats.scheme.name):
                raise PlanFileError(f"{where}: pools[{index}].scheme is {pool.scheme!r}, its formats are {meant}'s")
        if document.get("formats", to_json(plan.formats)) != to_json(plan.formats):
            raise PlanFileError(f"{where}: formats: not those of pools[{len(plan.pools) - 1}]")
        return plan

    def files_elsewhere(self, path: str | Path) -> list[str]:
        """The profiles and engines that a plan at `path` could not be read with: they do not stand beside it."""
        found = []
        for name in dict.fromkeys(name for pool in self.pools for name, _ in _files(pool).values()):
            try:
                beside(Path(path).parent, name)
            except Outside:
                found.append(name)
        return found

    def require_model(self, cfg: ModelConfig, where: str = "plan") -> None:
        """Raises `PlanFileError` unless the plan is for this model."""
        if config_hash(cfg) != self.model.config_hash:
            raise PlanFileError(
                f"{where}: a plan for {self.model.name} (config {self.model.config_hash[:12]}…), not for {cfg.name} "
                f"(config {config_hash(cfg)[:12]}…); make a plan for {cfg.name}"
            )

    def config(self, given: str | Path | None = None, file: str | Path = "plan") -> ModelConfig:
        """The plan's model: the one that a person names, or else a preset, or a config that stands beside the plan's
        file. Raises `ConfigError`, or `PlanFileError` where it is another one or none of these."""
        if given is not None or self.model.name in preset_names():
            cfg = load_config(given) if given is not None else preset(self.model.name)
        else:
            try:
                found = beside(Path(file).parent, self.model.name)
            except Outside:
                name = shortened(printable(self.model.name))
                raise PlanFileError(
                    f"{file}: model.name: {name} neither ships with this program nor lies beside the plan: name the "
                    "model with --model"
                ) from None
            cfg = load_config(found.parent if found.name == "config.json" else found)
        self.require_model(cfg, str(file))
        return cfg


def _files(pool: Pool) -> dict[str, tuple[str, str]]:
    """Of a pool's profile and engine, those that are files: the path, and what names a release behind it."""
    named = {"profile": (pool.profile, ""), "engine": split_release(pool.engine)}
    return {key: each for key, each in named.items() if each[0].endswith(".toml") or "/" in each[0] or "\\" in each[0]}


def _beside(file: Path, number: int, pool: Pool) -> Pool:
    """A pool with its profile and its engine where they are. Raises `PlanFileError`."""
    changed = {}
    for key, (name, release) in _files(pool).items():
        try:
            changed[key] = str(beside(file.parent, name)) + release
        except Outside as error:
            raise PlanFileError(
                f"{file}: pools[{number}].{key}: {shortened(printable(name))} must stand beside the plan ({error}): "
                "copy it there"
            ) from None
    return dataclasses.replace(pool, **changed)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(cfg: ModelConfig) -> str:
    """SHA-256 of everything in a config but its name."""
    body: dict[str, Any] = dataclasses.asdict(cfg)
    del body["name"]
    return _digest(json.dumps(body, sort_keys=True))
