"""SGLang. `--tp-size` counts all devices of a stage; with DP attention it divides limits and chunks by dp."""

from __future__ import annotations

import math

from runtime.planning.launch.server import LaunchServer, Line
from runtime.planning.launch.words import Command, Shell, Word, joined

_GB = 1e9
_RENDEZVOUS, _BOOTSTRAP = 20000, 8998
_ASCEND_PAGE = 128  # sglang srt/hardware_backend/npu/utils.py set_default_server_args


def commands(server: LaunchServer) -> list[Command]:
    """One process a node."""
    return [_command(server, rank) for rank in range(len(server.parts))]


def _command(server: LaunchServer, rank: int) -> Command:
    pool, engine, part = server.pool, server.engine, server.parts[rank]
    layout = pool.layout
    line = Line(server)
    line.flag("model", server.model)
    line.whole("tensor", layout.stage_devices)
    if layout.dp > 1:
        line.whole("data", layout.dp)
        if server.table.can("dp_attention"):
            line.flag("dp_attention")
        line.flag("dp_lm_head")
        if layout.tp == 1:
            line.whole("dense_tensor", 1)
        else:
            line.remarks.append(
                f"the plan splits dense layers over the {layout.tp} ranks of a tp group; SGLang spreads them over all "
                f"{layout.stage_devices} or keeps them whole"
            )
    if layout.pcp > 1:
        line.flag("cut_prompts")
        line.whole("prompt_groups", layout.pcp)
        line.flag("prompt_pieces", "zigzag" if layout.dispatches else "interleave")
    if layout.by_expert:
        line.whole("expert", layout.ep)
        if layout.dispatches:
            line.flag("all_to_all", "deepep")
    if layout.pp > 1:
        line.whole("pipeline", layout.pp)
        line.environment["SGLANG_PP_LAYER_PARTITION"] = server.stage_sizes
    if len(server.parts) > 1:
        line.whole("nodes", len(server.parts))
        line.whole("node_rank", rank)
        line.flag("rendezvous", joined(server.parts[0].host, f":{_RENDEZVOUS + server.slot}"))
        if server.facts["vendor"] == "Huawei":
            nic = Shell("${NIC:?network interface of this node}")
            line.environment |= {"HCCL_SOCKET_IFNAME": nic, "GLOO_SOCKET_IFNAME": nic}
    if part.first:
        line.whole("first_device", part.first)
    line.flag("host", "0.0.0.0")
    line.whole("port", server.port)
    line.whole("context", server.context_tokens)
    if server.facts["vendor"] != "Huawei":
        line.whole("page", engine.page_tokens)
    elif engine.page_tokens != _ASCEND_PAGE:
        line.remarks.append(
            f"the plan counts pages of {engine.page_tokens} tokens; SGLang's Ascend backend keeps pages of "
            f"{_ASCEND_PAGE}"
        )
    line.flag("memory", engine.memory_fraction)
    line.whole("running", engine.max_running_requests * layout.dp)
    line.whole("chunk", engine.chunked_prefill_tokens * layout.dp or -1)
    line.whole("step", engine.max_step_tokens)
    if not engine.prefix_cache:
        line.flag("no_prefix_cache")
    if {"graph_batch_sizes", "graph_max_batch"} & pool.settings.keys() and engine.graph_batch_sizes:
        line.whole("graph_limit", engine.graph_batch_sizes[-1])
    line.extras(server)
    if pool.drafts:
        line.whole("draft_steps", pool.drafts)
        line.whole("draft_choices", 1)
        line.whole("draft_tokens", pool.drafts + 1)
    if server.redundant:
        line.whole("redundant", server.redundant)
    if server.experts_file:
        line.flag("placement", server.experts_file)
    if pool.role != "serve":
        _disaggregated(server, line)
    if server.pool.offload.disk_bytes:
        line.flag("disk_tier", "file")
        line.remarks.append("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR names the folder of the cache on disk")
    if server.host_bytes is not None:
        line.flag("host_tier")
        line.whole("host_tier_size", max(1, math.floor(server.host_bytes / _GB)))
    title = server.title if len(server.parts) == 1 else f"{server.title}, node rank {rank}"
    return line.command(server, part.node, title)


def _disaggregated(server: LaunchServer, line: Line) -> None:
    line.flag("role", server.pool.role)
    line.flag("transfer", "ascend" if server.facts["vendor"] == "Huawei" else "mooncake")
    if server.pool.role == "prefill":
        line.whole("bootstrap", _BOOTSTRAP + server.slot)


def router(servers: list[LaunchServer]) -> Command | None:
    """SGLang's router before several servers. Sources: docs, advanced_features/pd_disaggregation.md and router.md."""
    if len(servers) == 1:
        return None

    def address(server: LaunchServer) -> Word:
        return joined("http://", server.parts[0].host, f":{server.port}")

    words: list[Word] = ["python3", "-m", "sglang_router.launch_router"]
    prefills = [server for server in servers if server.pool.role == "prefill"]
    if prefills:
        words.append("--pd-disaggregation")
        for server in servers:
            words += [f"--{server.pool.role}", address(server)]
            if server.pool.role == "prefill":
                words.append(str(_BOOTSTRAP + server.slot))
    else:
        words += ["--worker-urls", *(address(server) for server in servers)]
    source = "SGLang docs, advanced_features/pd_disaggregation.md and sgl_model_gateway.md (read 2026-11)"
    flags = [word for word in words if isinstance(word, str) and word.startswith("--")]
    words += ["--host", "0.0.0.0", "--port", "8000"]
    return Command("router", -1, {}, tuple(words), (), dict.fromkeys(dict.fromkeys(flags), source))
