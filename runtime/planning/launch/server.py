"""One replica of a pool as an engine sees it, and the words that every engine has in common."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from hw_profiles import Profile
from model.config import ModelConfig
from runtime.deployment.engines import Engine, load
from runtime.deployment.engines.flags import (
    LaunchTable,
    format_facts,
    launched,
    layout_facts,
    pair_facts,
    runs_on,
    why_uneven,
)
from runtime.deployment.engines.releases import same_release
from runtime.deployment.errors import LaunchError
from runtime.deployment.pool import Pool
from runtime.planning.launch.words import Command, Word

EXPRESSED = (
    "chunked_prefill_tokens", "max_step_tokens", "max_running_requests", "memory_fraction", "page_tokens",
    "prefix_cache", "graph_batch_sizes", "graph_max_batch", "graph_mode", "context_tokens",
)  # fmt: skip
"""Engine settings that flags say; the others describe an engine and cannot be told to it."""
_BUFFERS, _COMMUNICATOR = "HCCL_BUFFSIZE", "overhead.communicator_buffer_bytes"
_WAYS, _MIB = 2, 1 << 20  # HCCL_BUFFSIZE is in MiB, once to send and once to receive


@dataclasses.dataclass(frozen=True)
class NodeShare:
    """The devices of a replica on one node: `count` from local number `first` on."""

    node: int
    first: int
    count: int
    host: Word


@dataclasses.dataclass(frozen=True)
class LaunchServer:
    """One replica: an engine's process group.

    index: among the replicas of its pool. peer: the pool at the other end of a KV transfer. connected: whether the
    engine's own connector joins the two, which wants one engine on one vendor's chips. model: what the engine
    loads. context_tokens: the longest request it admits. experts_file: the engine's own file of the placement, None
    where experts are in order. host_bytes: of the host tier a device, None where it is not asked for.
    """

    table: LaunchTable
    cfg: ModelConfig
    profile: Profile
    pool: Pool
    peer: Pool | None
    connected: bool
    engine: Engine
    index: int
    parts: tuple[NodeShare, ...]
    node_devices: int
    model: Word
    context_tokens: int
    experts_file: str | None = None
    host_bytes: float | None = None

    @property
    def title(self) -> str:
        return f"{self.pool.role} {self.index}"

    @property
    def slot(self) -> int:
        """Sets its ports apart from those of other servers on its first node: the number of its first device there."""
        return self.parts[0].first

    @property
    def port(self) -> int:
        return self.table.port + self.slot

    @property
    def redundant(self) -> int:
        """Expert slots beyond one an expert, over all devices of a stage."""
        return self.pool.redundant_slots * self.pool.layout.ep

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the conditions of the table may ask."""
        pool = self.pool
        placement = self.experts_file is not None or self.redundant > 0
        found = format_facts(self.cfg, self.profile, pool.scheme, pool.formats.kv)
        found |= layout_facts(pool.layout, pool.drafts, pool.role, placement)
        if self.peer is not None and self.connected:
            ends = [(each.layout, each.formats) for each in (pool, self.peer)]
            found |= pair_facts(self.cfg, *(ends if pool.role == "prefill" else ends[::-1]))
        return {**found, "nodes": len(self.parts) > 1, "graph_mode": self.engine.graph_mode}

    @property
    def stage_sizes(self) -> str:
        """Layers of each stage, as both engines' *_PP_LAYER_PARTITION take them."""
        return ",".join(str(len(stage)) for stage in self.pool.layout.stage_layers(self.cfg.num_layers))

    @cached_property
    def remarks(self) -> list[str]:
        """What holds for every process of this server."""
        found = self.table.remarks(self.facts)
        if self.profile.vendor not in self.table.runs_on:
            found.append(
                f"{self.table.name}'s own releases run on {' and '.join(self.table.runs_on)}: take "
                f"{self.profile.vendor}'s build for this chip, whose flags may differ"
            )
        planned = load(self.pool.engine)
        if planned.kind != self.table.name:
            found.append(
                f"planned for {self.pool.engine}: pages, limits and figures of the plan follow its rules; "
                f"plan with --engine {self.table.name} for this engine's"
            )
        else:
            if not same_release(planned.release, self.table.release):
                found.append(
                    f"planned for {self.table.name} {planned.release}: limits and figures of the plan follow its "
                    f"rules, the flags those of {self.table.release}"
                )
            others = sorted(key for key in self.pool.settings if key not in EXPRESSED)
            if others:
                found.append(f"of the prediction alone, no flag says it: engine.{', engine.'.join(others)}")
        for stage in self.pool.layout.stage_layers(self.cfg.num_layers):
            source = self.cfg.index_source(stage.start)
            if source != stage.start:
                found.append(
                    f"the stage from layer {stage.start} on reuses the selection of layer {source}, on the stage "
                    "before: check that this release hands it on"
                )
        return found

    def refuse(self) -> None:
        """Raises `LaunchError` for the first thing that the engine cannot do."""
        others = [name for name in launched() if self.profile.vendor in runs_on(name)]
        if self.table.name not in others and others:  # of a vendor that none names, its own build may be meant
            raise LaunchError(
                f"{self.table.name} does not run on {self.pool.profile} ({self.profile.vendor}); "
                f"use --engine {' or '.join(others)}"
            )
        if self.pool.scheme == "f32":
            raise LaunchError("no serving engine runs float32 weights; plan with bf16, fp8, w8a8, w4a8 or w4a16")
        offload = self.pool.offload
        if offload.disk_bytes and not self.table.can("disk_tier"):
            raise LaunchError(f"{self.table.name} has no flag for a cache on disk: plan without --kv-disk-gb")
        if offload.disk_bytes and not offload.host_bytes:
            raise LaunchError(f"{self.table.name} has a cache on disk only below one in host memory: add --kv-host-gb")
        for why in self.table.refusals(self.facts):
            raise LaunchError(why)
        counts = [part.count for part in self.parts]
        if len(set(counts)) > 1:
            raise LaunchError(f"{self.title}: {why_uneven(self.table.name, counts, self.node_devices)}")


class Line:
    """A command line being written: each flag by its key in the table, so that each has a source."""

    def __init__(self, server: LaunchServer, *before: Word):
        self._table = server.table
        self.words: list[Word] = [*server.table.program, *before]
        self.sources: dict[str, str] = {}
        self.environment: dict[str, Word] = dict(server.table.variables(server.facts))
        self.remarks: list[str] = list(server.remarks)
        self._buffers(server.profile)

    def _buffers(self, profile: Profile) -> None:
        """HCCL's buffers as the plan counts them, where a person has set that; else a word where the engine's recipe
        has others."""
        figure = profile.figures.get(_COMMUNICATOR)
        if _BUFFERS not in self.environment or figure is None:
            return
        counted, said = figure.value / _WAYS / _MIB, float(str(self.environment[_BUFFERS]))
        if figure.grade == "user":
            self.environment[_BUFFERS] = f"{counted:.0f}"
        elif said != counted:
            self.remarks.append(
                f"{_BUFFERS}={said:.0f}, this engine's recipe, takes {_WAYS * said:.0f} MiB of a device for "
                f"each group that it is in, and the plan counted {_WAYS * counted:.0f}: plan with "
                f"--set {_COMMUNICATOR}={_WAYS * said * _MIB:.0f}"
            )

    def flag(self, key: str, *values: Word | int | float) -> None:
        if not self._table.can(key):
            raise LaunchError(f"no flag of {self._table.name} {self._table.release} is known for {key!r}")
        flag, source = self._table.flags[key]
        self.words += [flag, *(value if isinstance(value, Word) else f"{value:g}" for value in values)]
        self.sources[flag] = self._table.sources[source]

    def whole(self, key: str, value: int) -> None:
        """A flag with a whole number."""
        self.flag(key, str(value))

    def command(self, server: LaunchServer, node: int, title: str) -> Command:
        return Command(title, node, self.environment, tuple(self.words), tuple(self.remarks), self.sources)

    def extras(self, server: LaunchServer) -> None:
        """What the table adds."""
        documented = self._table.documented
        for words in self._table.extra_words(server.facts):
            self.words += words
            self.sources |= {w.partition("=")[0]: documented[w.partition("=")[0]] for w in words if w.startswith("--")}
