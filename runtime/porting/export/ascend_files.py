"""The texts of an Ascend package: its build script, HCCL's rank table, and its README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from backends.ascend import atc
from backends.ascend.plugin import VENDOR
from runtime.deployment.manifest import Manifest

_PORT = 16666  # device_port: any free port from 1024 (HCCL, rank table configuration)


def build_script(files: Sequence[str], soc: str | None, plugin: bool) -> str:
    """Compiles every graph; a graph that is compiled already is left alone."""
    chosen = (
        f'SOC_VERSION="${{SOC_VERSION:-{soc}}}"'
        if soc
        else ': "${SOC_VERSION:?set it to Ascend and the Name that npu-smi info prints, as Ascend910B3}"'
    )
    lines = [
        "#!/bin/sh",
        "# Compiles every graph with ATC. Needs CANN's environment (source set_env.sh).",
        "set -e",
        'cd "$(dirname "$0")"',
        chosen,
        'command -v atc >/dev/null || { echo "atc is not on the PATH: source CANN\'s set_env.sh" >&2; exit 2; }',
    ]
    if plugin:
        lines += [
            f"[ -f {VENDOR}/framework/onnx/libglm5_onnx_plugin.so ] || sh {VENDOR}/build.sh",
            f'export ASCEND_CUSTOM_OPP_PATH="$PWD/{VENDOR}${{ASCEND_CUSTOM_OPP_PATH:+:$ASCEND_CUSTOM_OPP_PATH}}"',
        ]
    lines += [
        "build() {",
        '  [ -f "om/$1.om" ] && return',
        '  mkdir -p "$(dirname "om/$1")"',
        "  " + atc.line(atc.command("MODEL", "OUTPUT", "SOC")).replace("=MODEL", '="$1.onnx"')
        .replace("=OUTPUT", '="om/$1"').replace("=SOC ", '="$SOC_VERSION" '),
        "}",
    ]  # fmt: skip
    return "\n".join([*lines, *(f"build {file.removesuffix('.onnx')}" for file in files)]) + "\n"


def rank_table(devices: int, a_server: int) -> dict[str, Any]:
    """HCCL's rank table for `devices` in servers of `a_server`: rank r is device r of the plan.

    The form is HCCL's "rank table configuration" (hccl, docs/zh/user_guide/cluster_info_config, 2026-08-22): version
    1.0 for Atlas A2, and for Atlas A3 in AI Server mode, which needs no super-pod ids. Numbers are strings. A single
    server needs no device_ip; for several, the addresses are the hosts' own and must be filled in.
    """
    servers = []
    for server in range(-(-devices // a_server)):
        ranks = range(server * a_server, min(devices, (server + 1) * a_server))
        entries: list[dict[str, str]] = []
        for rank in ranks:
            entry = {"device_id": str(rank - server * a_server), "rank_id": str(rank)}
            if devices > a_server:
                entry |= {"device_ip": f"FILL IN: address_{rank - server * a_server} of /etc/hccn.conf",
                          "device_port": str(_PORT + rank % a_server)}  # fmt: skip
            entries.append(entry)
        servers.append({"server_id": f"node_{server}", "device": entries})
    return {"status": "completed", "version": "1.0", "server_count": str(len(servers)), "server_list": servers}


def readme(manifest: Manifest, devices: int, a_server: int) -> str:
    """What an engineer with the chip reads and types."""
    extra = manifest.extra["ascend"]
    soc, graphs = extra["soc_version"], len(extra["commands"])
    uses: Counter[tuple[str, str]] = Counter()
    for program in manifest.programs[:1]:
        for chain in program.units.values():
            for step in chain:
                uses.update({(use.name, use.target or "decomposed"): use.count for use in step.ops})
    gears = "\n".join(
        f"| {p.phase} | {p.gear.sequences} | {p.gear.tokens} | {p.gear.context_pages * manifest.page_size} |"
        for p in manifest.programs
    )
    parts = [
        f"# {manifest.model.name} for {soc or 'Ascend'}",
        f"{graphs} ONNX graphs in {manifest.dtype} ({manifest.formats}), {manifest.layout or 'one device'}, made with "
        f"glm5-runtime {manifest.toolchain.get('glm5-runtime', '')}. It was checked against ATC's published operator "
        "list and was not compiled: no Ascend device or CANN was at hand.",
        "## What to type\nOn a host with CANN (8.0 or later; the fused attention operators need the release that has "
        "their kernels, and their README names the chips):\n\n```sh\n" + _steps(extra, soc) + "```",
        "## Gears\nA gear is a set of static shapes and an .om of its own. A step takes the smallest gear that holds "
        "it; its start plus its tokens, padding included, must not exceed the gear's context.\n\n"
        "| phase | sequences | tokens | context |\n|---|---|---|---|\n" + gears,
        "## How the graphs fit together\n`manifest.json`: `programs` lists the units of each gear and their steps, "
        "`layers` the order in which units run, `aliases` the outputs whose buffer is an input's (give a cache's "
        "device memory as both: CANN writes it in place), `weights` what each `w.NAME` input is made of.",
        "## Operators\n| op | becomes | times, over one layer of each type |\n|---|---|---|\n"
        + "\n".join(f"| {op} | {target} | {count} |" for (op, target), count in sorted(uses.items())),
    ]
    if extra["declined"]:
        parts.append(
            "Not taken by a fused operator, and decomposed:\n" + "\n".join(f"- {x}" for x in extra["declined"])
        )
    if extra["plugin"]:
        parts.append(
            "## The plugin\nCANN has kernels for " + ", ".join(extra["plugin"]) + " but maps no ONNX node to them; "
            f"`{VENDOR}/` is the ATC plugin that does. It needs CANN's headers and nlohmann's json. "
            "CANN 8.5's documentation says of Atlas A3 that plugins for ONNX are not supported yet: there, export with "
            "`--cann-ops shipped` or `none`, which need no plugin."
        )
    if devices > 1:
        parts.append(_several(devices, a_server))
    if manifest.devices[0].weights:
        parts.append(
            "## Weights\nOne safetensors file a device (`devices[].weights` of the manifest), tensors named "
            "`layers.INDEX.NAME` and `outer.NAME` in the graphs' own layout. `NAME.values` is int8, `NAME.scale` its "
            "float32 scale an output channel."
        )
    return "\n\n".join(parts) + "\n"


def _steps(extra: dict[str, Any], soc: str | None) -> str:
    lines = ["source /usr/local/Ascend/ascend-toolkit/set_env.sh"]
    if not soc:
        lines.append("npu-smi info                          # the Name column, as 910B3")
        lines.append("export SOC_VERSION=Ascend<Name>        # as Ascend910B3")
    lines.append(f"glm5 export check .{'' if soc else ' --soc-version $SOC_VERSION'}   # what ATC would refuse")
    if extra["plugin"]:
        lines.append(f"pip install nlohmann-json && sh {VENDOR}/build.sh")
    lines += [
        "sh build.sh                           # atc, once a graph: om/",
        "glm5 run --artifact . --backend ascend --trust-package --prompt ...   # runs what was compiled",
    ]
    return "\n".join(lines) + "\n"


def _several(devices: int, a_server: int) -> str:
    servers = -(-devices // a_server)
    fill = (
        f" The {devices} devices span {servers} servers of {a_server}: put each server's addresses in `device_ip` "
        "(`/etc/hccn.conf`, address_N is device N's)."
        if servers > 1
        else ""
    )
    return (
        f"## {devices} devices\nGraphs are cut where devices exchange data; a step of kind `all_reduce`, `all_gather`, "
        "`reduce_scatter` or `all_to_all` is HCCL's call of that name over the ranks of its mesh axis. "
        f"`rank_table.json` is HCCL's, "
        f"rank r being device r of the manifest (`export RANK_TABLE_FILE=$PWD/rank_table.json RANK_ID=r`).{fill} Each "
        "process runs the same graphs with its own weights file, `rank.tp` and `rank.dp` inputs."
    )
