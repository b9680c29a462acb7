"""vLLM, and vLLM with the vllm-ascend plugin: limits and batches are per dp rank, `--tensor-parallel-size` is tp.

A replica on one node is one process. On several nodes: dp ranks that fit a node are dealt out to nodes; one rank
over several nodes is `--nnodes`; several ranks that each span nodes go through Ray. vllm-ascend's published way to
disaggregate starts a process for each dp rank.
"""

from __future__ import annotations

import json
import math
from typing import Any

from runtime.deployment.errors import LaunchError
from runtime.planning.launch.server import LaunchServer, Line
from runtime.planning.launch.words import Command, Shell, Word

_GIB = 2**30
_DP_PORT, _MASTER_PORT = 13345, 29501
_NIXL_PORT = 5600
_HOST_TIER = "SimpleCPUOffloadConnector"
_KV_PORT = {"prefill": 30000, "decode": 30100}


def commands(server: LaunchServer) -> list[Command]:
    """The processes of a replica, node by node."""
    layout = server.pool.layout
    group = layout.tp * layout.pp
    if server.pool.role != "serve" and server.table.can("data_rank"):
        return _a_process_each(server)
    if len(server.parts) == 1:
        return [_command(server, 0, "")]
    if layout.dp == 1:
        return [_command(server, rank, "nodes") for rank in range(len(server.parts))]
    if group <= server.parts[0].count and server.parts[0].count % group == 0:
        return [_command(server, rank, "ranks") for rank in range(len(server.parts))]
    if not server.table.can("data_backend"):
        raise _wide_ranks(server)
    return [_command(server, 0, "ray")]


def _wide_ranks(server: LaunchServer) -> LaunchError:
    layout, here = server.pool.layout, server.node_devices
    return LaunchError(
        f"{server.title}: {layout.dp} dp ranks of {layout.tp * layout.pp} devices, over nodes of {here}: "
        f"{server.table.name} documents no way to start them; plan with tp x pp up to {here}, or dp 1"
    )


def _command(server: LaunchServer, rank: int, across: str) -> Command:
    """across: how nodes share the replica: "" (one node), "nodes", "ranks" or "ray"."""
    layout, parts = server.pool.layout, server.parts
    line = Line(server, server.model)
    _parallel(server, line)
    if layout.dp > 1:
        line.whole("data", layout.dp)
    head = parts[0].host
    if across == "ranks":
        local = parts[rank].count // (layout.tp * layout.pp)
        line.whole("data_local", local)
        if rank:
            line.whole("data_start", rank * local)
        line.flag("data_address", head)
        line.whole("data_port", _DP_PORT + server.slot)
    elif across == "nodes":
        line.flag("executor", "mp")
        line.whole("nodes", len(parts))
        line.whole("node_rank", rank)
        line.flag("master", head)
        line.whole("master_port", _MASTER_PORT + server.slot)
    elif across == "ray":
        line.flag("data_backend", "ray")
        line.flag("executor", "ray")
        line.environment["VLLM_RAY_DP_PACK_STRATEGY"] = "span"
        names = ", ".join(str(part.node) for part in parts)
        line.remarks.append(f"first start a Ray cluster over nodes {names}; this command then runs on its head alone")
    if rank:
        line.flag("headless")
    else:
        line.flag("host", "0.0.0.0")
        line.whole("port", server.port)
    _visible(server, line, parts[rank].first, parts[rank].count)
    _limits(server, line)
    title = server.title if len(parts) == 1 or across == "ray" else f"{server.title}, node rank {rank}"
    return _finish(server, line, rank, parts[rank].node, title)


def _a_process_each(server: LaunchServer) -> list[Command]:
    """vllm-ascend, disaggregated: a process a dp rank (GLM5.md), or a node where one rank spans nodes (GLM5.2.md)."""
    layout, parts = server.pool.layout, server.parts
    group = layout.tp * layout.pp
    if group > parts[0].count:
        if layout.dp > 1:
            raise _wide_ranks(server)
        return [_command(server, rank, "nodes") for rank in range(len(parts))]
    found = []
    for rank in range(layout.dp):
        part, within = parts[rank * group // parts[0].count], rank * group % parts[0].count
        line = Line(server, server.model)
        _parallel(server, line)
        if layout.dp > 1:
            line.whole("data", layout.dp)
            line.whole("data_rank", rank)
            line.flag("data_address", parts[0].host)
            line.whole("data_port", _DP_PORT + server.slot)
        line.flag("host", "0.0.0.0")
        line.whole("port", server.port + rank)
        _visible(server, line, part.first + within, group)
        _limits(server, line)
        title = server.title if layout.dp == 1 else f"{server.title}, dp rank {rank}"
        found.append(_finish(server, line, rank, part.node, title))
    return found


def _parallel(server: LaunchServer, line: Line) -> None:
    layout = server.pool.layout
    line.whole("tensor", layout.tp)
    if layout.pp > 1:
        line.whole("pipeline", layout.pp)
        line.environment["VLLM_PP_LAYER_PARTITION"] = server.stage_sizes
        if layout.dp > 1:
            line.remarks.append(
                "the plan numbers devices stage first, then dp rank; vLLM gives each dp rank its stages on neighbours"
            )
    if layout.by_expert:
        line.flag("expert")
    if layout.dcp > 1:
        line.whole("cache_ranks", layout.dcp)
    if layout.pcp > 1:
        line.whole("prompt_groups", layout.pcp)


def _visible(server: LaunchServer, line: Line, first: int, count: int) -> None:
    if count < server.node_devices:
        chosen = ",".join(str(number) for number in range(first, first + count))
        line.environment[server.table.visible_devices] = chosen
    if server.facts["vendor"] == "Huawei" and (server.facts["nodes"] or server.pool.role != "serve"):
        line.environment |= {"HCCL_IF_IP": Shell("${LOCAL_IP:?address of this node}")}
        line.environment |= dict.fromkeys(
            ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"),
            Shell("${NIC:?network interface of this node}"),
        )


def _limits(server: LaunchServer, line: Line) -> None:
    engine = server.engine
    line.whole("context", server.context_tokens)
    line.whole("page", engine.page_tokens)
    line.flag("memory", engine.memory_fraction)
    line.whole("running", engine.max_running_requests)
    line.whole("step", engine.max_step_tokens)
    if engine.chunked_prefill_tokens and engine.chunked_prefill_tokens < engine.max_step_tokens:
        line.remarks.append(
            f"the plan computes at most {engine.chunked_prefill_tokens} prompt tokens in a step of "
            f"{engine.max_step_tokens}; this engine limits the step alone"
        )
    if not engine.prefix_cache:
        line.flag("no_prefix_cache")
    elif server.table.can("prefix_cache") and server.pool.role == "serve":
        line.flag("prefix_cache")
    if {"graph_batch_sizes", "graph_max_batch"} & server.pool.settings.keys() and engine.graph_batch_sizes:
        if server.table.can("graph_limit"):
            line.whole("graph_limit", engine.graph_batch_sizes[-1])
        else:
            line.remarks.append(
                "engine.graph_batch_sizes: give them as cudagraph_capture_sizes of --compilation-config"
            )


def _finish(server: LaunchServer, line: Line, rank: int, node: int, title: str) -> Command:
    line.extras(server)
    if server.table.can("drafting"):
        _ascend(server, line, rank)
    else:
        _cuda(server, line, rank)
    return line.command(server, node, title)


def _cuda(server: LaunchServer, line: Line, rank: int) -> None:
    pool = server.pool
    if pool.drafts:
        line.whole("draft_tokens", pool.drafts)
    if server.experts_file or server.redundant:
        line.flag("eplb")
        line.whole("redundant", server.redundant)
        line.remarks.append(
            "vLLM reads no expert placement: its load balancer starts in order and finds its own from the load it sees"
        )
    if pool.role != "serve":
        kind = "kv_producer" if pool.role == "prefill" else "kv_consumer"
        line.flag(
            "transfer", json.dumps({"kv_connector": "NixlConnector", "kv_role": kind, "kv_load_failure_policy": "fail"})
        )
        line.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] = server.parts[rank].host
        line.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_NIXL_PORT + server.slot)
    if server.host_bytes is not None:
        # the buffer is summed over the ranks of a tp group
        size = server.host_bytes * pool.layout.tp * pool.layout.pp / _GIB
        line.whole("host_tier_size", max(1, math.floor(size)))
        line.flag("host_tier", "native")
        if pool.role != "serve":
            line.remarks.append("host offloading beside a KV connector needs a release with multi-connector support")


def _ascend(server: LaunchServer, line: Line, rank: int) -> None:
    pool, table = server.pool, server.table
    if pool.drafts:  # GLM's drafts run eagerly there: spec_decode/llm_base_proposer.py
        drafting = {"num_speculative_tokens": pool.drafts, "method": "mtp", "enforce_eager": True}
        line.flag("drafting", json.dumps(drafting))
    additional = table.additional_config(server.facts)
    if server.experts_file:
        additional["eplb_config"] = {"expert_map_path": server.experts_file}
        if server.redundant:
            line.remarks.append("redundant experts are not supported on A2 (910B) boards")
    if additional:
        line.flag("additional", json.dumps(additional))
    if pool.role != "serve":
        line.flag("transfer", json.dumps(_mooncake(server)))
    if server.host_bytes is not None:
        if pool.role != "serve":
            line.remarks.append("no host tier: one process has one KV connector, and this one transfers")
            return
        size = {"cpu_bytes_to_use": int(server.host_bytes * pool.layout.tp * pool.layout.pp)}
        connector = {"kv_connector": _HOST_TIER, "kv_role": "kv_both", "kv_connector_extra_config": size}
        line.flag("host_tier", json.dumps(connector))


def _mooncake(server: LaunchServer) -> dict[str, Any]:
    pool, peer = server.pool, server.peer
    assert peer is not None
    sides = {}
    for side in (pool, peer):
        layout = side.layout
        sides[side.role] = {"dp_size": layout.dp, "tp_size": layout.tp}
        if layout.pp > 1:
            stages = ",".join(str(len(stage)) for stage in layout.stage_layers(server.cfg.num_layers))
            sides[side.role] |= {"pp_size": layout.pp, "pp_layer_partition": stages}
    first = 0 if pool.role == "prefill" else peer.replicas
    return {
        "kv_connector": "MooncakeConnectorV1",
        "kv_role": "kv_producer" if pool.role == "prefill" else "kv_consumer",
        "kv_port": str(_KV_PORT[pool.role] + server.slot),
        "engine_id": str(first + server.index),
        "kv_connector_extra_config": {
            "prefill": sides["prefill"],
            "decode": sides["decode"],
        },
    }


def router(servers: list[LaunchServer]) -> Command | None:
    """The example proxy before disaggregated servers; vLLM ships no router for independent ones."""
    roles = {server.pool.role for server in servers}
    if "prefill" not in roles:
        return None
    ascend = servers[0].table.can("data_rank")
    program = (
        "examples/disaggregated_prefill_v1/load_balance_proxy_server_example.py"
        if ascend
        else "tests/v1/kv_connector/nixl_integration/toy_proxy_server.py"
    )
    words: list[Word] = ["python3", program, "--host", "0.0.0.0", "--port", "8000"]
    for role, name in (("prefill", "prefiller"), ("decode", "decoder")):
        ends = [end for server in servers if server.pool.role == role for end in _ends(server)]
        words += [f"--{name}-hosts", *(host for host, _ in ends), f"--{name}-ports", *(str(port) for _, port in ends)]
    source = (
        "vllm-ascend docs, tutorials/models/GLM5.md (read 2026-11)"
        if ascend
        else "vLLM docs, features/nixl_connector_usage.md (read 2026-11)"
    )
    flags = [word for word in words if isinstance(word, str) and word.startswith("--")]
    repository = "vllm-ascend" if ascend else "vLLM"
    return Command(
        "router", -1, {}, tuple(words), (f"an example program: run it in a checkout of the {repository} repository",),
        dict.fromkeys(flags, source),
    )  # fmt: skip


def _ends(server: LaunchServer) -> list[tuple[Word, int]]:
    """Addresses that answer requests: one a server, or one a dp rank where each is a process of its own."""
    layout, parts = server.pool.layout, server.parts
    group = layout.tp * layout.pp
    if not server.table.can("data_rank") or group > parts[0].count:
        return [(parts[0].host, server.port)]
    return [(parts[rank * group // parts[0].count].host, server.port + rank) for rank in range(layout.dp)]
