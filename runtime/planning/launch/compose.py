"""From a plan to the commands of all its nodes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from foundation.errors import UsageError
from foundation.writing import replacing_together
from model.config import ModelConfig
from model.quantization_config import is_scheme
from runtime.deployment.engines import check_dealt, engine_for, load, nearest_release
from runtime.deployment.engines.flags import LaunchTable, checkpoint, launched, releases, table
from runtime.deployment.engines.releases import same_release
from runtime.deployment.errors import LaunchError
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Pool, profile_of
from runtime.planning.kv_tiers import HOST_RATIO, device_bytes_per_token
from runtime.planning.launch import experts, sglang, vllm
from runtime.planning.launch.server import LaunchServer, NodeShare
from runtime.planning.launch.words import Command, Shell, Word, comment, joined, plain
from runtime.simulation.build import node_devices

LAUNCHED_ENGINES = tuple(launched())


class _Writer(Protocol):
    """A module that writes an engine's lines."""

    def commands(self, server: LaunchServer) -> list[Command]: ...

    def router(self, servers: list[LaunchServer]) -> Command | None: ...


WRITERS: Mapping[str, _Writer] = {"sglang": sglang, "vllm": vllm, "vllm-ascend": vllm}
"""By the name of the launch table. router: what stands before several servers; None where the engine brings nothing."""
_MODEL = Shell("${MODEL:?the checkpoint to load}")


@dataclasses.dataclass(frozen=True)
class Launch:
    """The commands of a plan. releases: engine -> the release that its lines are for. router: before several servers,
    None where there is one. files: name -> JSON document that commands read, beside which they are started. remarks:
    on all of it."""

    title: str
    releases: Mapping[str, str]
    commands: tuple[Command, ...]
    router: Command | None
    files: Mapping[str, Any]
    remarks: tuple[str, ...]

    @property
    def nodes(self) -> list[int]:
        return sorted({command.node for command in self.commands})

    def script(self, node: int, sources: bool = False) -> str:
        """The shell text of one node; several processes run side by side until all have ended."""
        found = [command for command in self.commands if command.node == node]
        body = "\n\n".join(command.text(sources, background=len(found) > 1) for command in found)
        return body + ("\nwait" if len(found) > 1 else "") + "\n"

    def text(self, sources: bool = False) -> str:
        """Everything, for a terminal: a part a node, then the router."""
        parts = [self._head()]
        for node in self.nodes:
            parts.append(f"# ---- on node {node}\n{self.script(node, sources)}")
        if self.router:
            parts.append(f"# ---- on any machine\n{self.router.text(sources)}\n")
        return "\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        def shown(command: Command) -> dict[str, Any]:
            return {
                "title": command.title,
                "node": command.node if command.node >= 0 else None,
                "environment": {name: plain(value) for name, value in command.environment.items()},
                "argv": command.argv,
                "remarks": list(command.remarks),
                "sources": dict(command.sources),
            }

        return {
            "title": self.title,
            "releases": dict(self.releases),
            "remarks": list(self.remarks),
            "commands": [shown(command) for command in self.commands],
            "router": shown(self.router) if self.router else None,
            "files": dict(self.files),
        }

    def write(self, folder: Path, sources: bool = False) -> list[Path]:
        """A script a node, `router.sh`, and the files that they read. Raises `UsageError`."""
        texts = {f"node{node}.sh": f"#!/bin/sh\n{self._head()}{self.script(node, sources)}" for node in self.nodes}
        if self.router:
            texts["router.sh"] = f"#!/bin/sh\n{self.router.text(sources)}\n"
        texts |= {name: json.dumps(body, separators=(",", ":")) + "\n" for name, body in self.files.items()}
        with replacing_together(*(folder / name for name in texts)) as files:
            for temporary, (name, text) in zip(files, texts.items(), strict=True):
                temporary.write_text(text, encoding="utf-8")
                if name.endswith(".sh"):
                    temporary.chmod(0o755)
        return [folder / name for name in texts]

    def _head(self) -> str:
        lines = [self.title, *(f"note: {remark}" for remark in self.remarks)]
        return "".join(f"{comment(line)}\n" for line in lines)


def launch(
    plan: Plan,
    cfg: ModelConfig,
    engine: str | None = None,
    *,
    release: str | None = None,
    model: str | None = None,
    hosts: Sequence[str] = (),
    host_tier: bool = False,
) -> Launch:
    """The commands that deploy a plan.

    engine: for all pools; each pool's own by default. release: of the engine, that its description names by default.
    model: what the engine loads; the published checkpoint by
    default. hosts: an address a node of the plan; `$NODE0`, `$NODE1`, … by default. host_tier: keep evicted pages in
    host memory too. Raises `LaunchError` for what an engine cannot express.
    """
    nodes = 1 + max(device.node for device in plan.devices)
    if hosts and len(hosts) != nodes:
        raise LaunchError(f"--hosts names {len(hosts)} addresses, the plan has {nodes} nodes: name one each, in order")
    addresses: list[Word] = list(hosts) or [Shell(f"${{NODE{node}:?address of node {node}}}") for node in range(nodes)]
    servers: list[LaunchServer] = []
    files: dict[str, Any] = {}
    for pool in plan.pools:
        servers += _servers(plan, cfg, pool, engine, release, model, addresses, host_tier, files)
    for server in servers:
        server.refuse()
    commands = [command for server in servers for command in WRITERS[server.table.name].commands(server)]
    names = {server.table.name for server in servers}
    router = WRITERS[servers[0].table.name].router(servers) if len(names) == 1 else None
    title = f"{plan.model.name}: " + "; ".join(pool.name for pool in plan.pools)
    tables = {server.table.name: server.table for server in servers}
    chosen = {name: each.release for name, each in tables.items()}
    remarks = [*_releases(tables.values()), *_remarks(plan, servers, names, router)]
    return Launch(title, chosen, tuple(commands), router, files, tuple(remarks))


def _releases(tables: Iterable[LaunchTable]) -> list[str]:
    """Which release the lines of each engine are for, and how to get another's."""
    found = []
    for each in tables:
        others = [other for other in releases(each.name) if other != each.release]
        more = f"; --release {' or '.join(others)} for another" if others else ""
        found.append(f"lines for {each.name} {each.release}, checked with {', '.join(each.checked)}{more}")
    return found


def _require_dealt(engine: str, cfg: ModelConfig, pool: Pool, settings: Mapping[str, Any] | None) -> None:
    """Raises `LaunchError` where the release that is launched does not deal the pool's cache out to tp ranks, whichever
    it was planned for."""
    try:
        check_dealt(engine_for(engine, cfg, profile_of(pool), pool.layout, settings), pool.layout, pool.formats)
    except UsageError as error:
        raise LaunchError(str(error)) from None


def _servers(
    plan: Plan,
    cfg: ModelConfig,
    pool: Pool,
    asked: str | None,
    release: str | None,
    model: str | None,
    addresses: Sequence[Word],
    host_tier: bool,
    files: dict[str, Any],
) -> list[LaunchServer]:
    named = load(asked or pool.engine)
    planned = load(pool.engine)
    same = asked is None or ("@" not in asked and named.kind == planned.kind)  # the plan's release, which may be older
    engine = pool.engine if same or asked is None else asked
    named = planned if same else named
    kind = named.kind
    if kind not in LAUNCHED_ENGINES:
        raise LaunchError(f"no launch commands for {engine}: use --engine {', '.join(LAUNCHED_ENGINES)}")
    flags = table(kind, release or named.release)
    profile = profile_of(pool)
    settings = pool.settings if engine == pool.engine else None
    try:
        described = engine_for(engine, cfg, profile, pool.layout, settings, pool.drafts)
    except UsageError as error:  # a layout that another engine was planned with
        raise LaunchError(str(error)) from None
    if pool.layout.dcp > 1:
        own = pool.settings if engine == pool.engine and same_release(planned.release, flags.release) else None
        _require_dealt(nearest_release(kind, flags.release), cfg, pool, own)
    placement = None
    if pool.experts and not experts.in_order(pool.experts):
        placement = f"experts-{pool.role}.json"
        if write := experts.FILES.get(kind):
            files[placement] = write(pool.experts, cfg)
    host_bytes = HOST_RATIO * pool.pool_tokens * device_bytes_per_token(pool) if host_tier else None
    host_bytes = pool.offload.host_bytes or host_bytes
    peers = [other for other in plan.pools if other is not pool]
    per_node = node_devices(profile)
    firsts: dict[int, int] = {}  # of each node; the pool before may have begun it
    for device in plan.devices:
        firsts.setdefault(device.node, device.index)
    found = []
    for index in range(pool.replicas):
        parts: dict[int, NodeShare] = {}
        for device in pool.devices[index * pool.layout.devices : (index + 1) * pool.layout.devices]:
            old = parts.get(device.node)
            start = old.first if old else device.index - firsts[device.node]
            parts[device.node] = NodeShare(device.node, start, old.count + 1 if old else 1, addresses[device.node])
        found.append(
            LaunchServer(
                table=flags,
                cfg=cfg,
                profile=profile,
                pool=pool,
                peer=peers[0] if peers else None,
                connected=all((named if asked else load(each.engine)).kind == kind for each in peers)
                and all(profile_of(each).vendor == profile.vendor for each in peers),
                engine=described,
                index=index,
                parts=tuple(parts.values()),
                node_devices=per_node,
                model=model or _checkpoint(cfg, pool) or _MODEL,
                context_tokens=min(
                    described.context_tokens or cfg.max_positions, *(each.pool_tokens for each in plan.pools)
                ),
                experts_file=placement,
                host_bytes=host_bytes,
            )
        )
    return found


def _checkpoint(cfg: ModelConfig, pool: Pool) -> str | None:
    """The published checkpoint in the pool's formats, or the directory that the model was read from if it has them."""
    config = Path(cfg.name)
    if config.name == "config.json" and is_scheme(cfg.weight_format) and cfg.stored_scheme.name == pool.scheme:
        return str(config.parent)
    return checkpoint(cfg.name.removesuffix("-fp8"), pool.scheme)


def _remarks(plan: Plan, servers: Sequence[LaunchServer], names: set[str], router: Command | None) -> list[str]:
    found = []
    if any(isinstance(server.model, Shell) for server in servers):
        found.append("no checkpoint of this model is published in these formats: set MODEL to one of yours")
    if len(names) > 1 or len({server.profile.vendor for server in servers}) > 1:
        chips = " and ".join(dict.fromkeys(f"{s.table.name} on {s.pool.profile}" for s in servers))
        found.append(f"no released KV connector joins {chips}: the servers start, the transfer between them is yours")
    if len(names) == 1 and len(servers) > 1 and router is None:
        ends = ", ".join(plain(joined(server.parts[0].host, f":{server.port}")) for server in servers)
        found.append(f"{len(servers)} independent servers: put a load balancer before {ends}")
    for pool in plan.pools:
        found.append(
            f"{pool.role}: the plan has {pool.pool_tokens:,} tokens of KV cache a rank, pages of {pool.page_tokens}; "
            "compare with what the server reports as it starts"
        )
    return found
