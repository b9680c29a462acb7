"""The README of an Ascend package: what an engineer with the chip types, and what to expect."""

from __future__ import annotations

from collections import Counter
from typing import Any

from runtime.deployment.manifest import Manifest


def readme(manifest: Manifest) -> str:
    """Of a finished package."""
    devices = _devices(manifest)
    said = manifest.extra["ascend"]
    start = "python run.py" if devices == 1 else f"torchrun --nproc-per-node {min(devices, 16)} run.py"
    several = (
        f"\n\n{devices} devices are more than a server of 16 has: start the same line on each of {-(-devices // 16)} "
        "servers with torchrun's `--nnodes`, `--node-rank` and `--rdzv-endpoint`; rank r is device r of manifest.json."
        if devices > 16
        else ""
    )
    gears = "\n".join(
        f"| {p.phase} | {p.gear.sequences} | {p.gear.tokens} | {p.gear.context_pages * manifest.page_size} |"
        for p in manifest.programs
    )
    uses: Counter[tuple[str, str]] = Counter()
    for chain in manifest.programs[0].units.values():
        for step in chain:
            uses.update({(use.name, use.target): use.count for use in step.ops})
    wants = (
        f"torch {manifest.toolchain.get('torch', '').partition('+')[0]} and torch_npu {said['torch_npu']}"
        if said["operators"]
        else f"torch {manifest.toolchain.get('torch', '').partition('+')[0]} (and, on Ascend, torch_npu)"
    )
    rows = "; caches in int8" if "rows" in said else ""
    parts = [
        f"# {manifest.model.name} for Ascend",
        f"Graphs in {manifest.dtype} ({manifest.formats}{rows}), {manifest.layout or 'one device'}. They have not been "
        "run on an Ascend device: torch_npu's Meta kernels and references on a CPU stand in for one where they are "
        "made (docs/ascend.md of the GLM-5 runtime says what that covers).",
        f"## What to type\nOn a host with CANN (`source set_env.sh`), {wants}; nothing else is needed.\n\n```sh\n"
        f"{start} --prompt-ids 1,2,3 --max-tokens 16 --graph-mode eager      # does it run, and what does it say\n"
        f"{start} --prompt-ids 1,2,3 --max-tokens 16                         # compiled: npugraph_ex\n"
        f"{start} --measure 20 --operators --json measured.json              # how long does it take\n"
        f"glm5 calibrate --from measured.json --profile {said['profile']} --out my-chip.toml\n"
        "```" + several,
        "## What to expect\nThe model and the layout, a line `tokens N:` for each prompt (greedy; with the same "
        "weights in float32 they are those of `glm5 run`), then the median of a step for prefill and decode. With "
        "`--measure` a line for each gear and each unit in it: calls a step times milliseconds, with a wait after "
        "each unit. What cannot be done is one line on stderr, and exit code 2.",
        "`--graph-mode`: `eager`; `npugraph_ex` (the default) and `torchair` compile each unit once and keep it under "
        '`compiled/`; `npugraph_ex-compile` is `torch.compile(backend="npugraph_ex")`. The collectives between a '
        "unit's graphs are operators of `torch.distributed` inside what is compiled, over HCCL.",
        *_exchange(said),
        "## Gears\nA gear is a set of static shapes. run.py takes the smallest that holds the prompts.\n\n"
        "| phase | sequences | tokens | context |\n|---|---|---|---|\n" + gears,
        "## How the graphs fit together\n`manifest.json`: `programs` lists the units of each gear and their steps, "
        "`layers` the order in which units run, `aliases` the outputs that are inputs (caches are written in place). A "
        "weight is given in the shape of the graph's input, its elements in the file's order"
        + (
            "; those in `extra.ascend.nz` are cast to FRACTAL_NZ as they are loaded (npu_format_cast, 29)."
            if said["nz"]
            else "."
        ),
        "## Operators\n| op | becomes | times, over one layer of each type |\n|---|---|---|\n"
        + "\n".join(f"| {op} | {target} | {count} |" for (op, target), count in sorted(uses.items()))
        + f"\n\nWhat operators take is of their documents for {said['series']}.",
    ]
    if "chip" in said:
        parts.append(
            f"This package is for another chip ({said['chip']}), where operators may take less: see what torch_npu's "
            "documentation says of it."
        )
    if said["declined"]:
        parts.append("Not taken by an operator, and decomposed:\n" + "\n".join(f"- {x}" for x in said["declined"]))
    if manifest.devices[0].weights:
        parts.append(
            "## Weights\nOne safetensors file a device (`devices[].weights` of the manifest), tensors named "
            "`layers.INDEX.NAME` and `outer.NAME`. Of a matrix in a narrow format, `NAME.values` are its integers and "
            "`NAME.scale` their float32 scales."
        )
    return "\n\n".join(parts) + "\n"


def _exchange(said: dict[str, Any]) -> list[str]:
    """What a host must have for operators that talk to other devices."""
    if "exchange" not in said:
        return []
    return [
        "## Experts on other devices\nDecode graphs exchange tokens themselves (`npu_moe_distribute_dispatch_v2`, "
        f"`_combine_v2`) in a group of their own, whose buffers take {said['exchange']['hccl_buffer_mb']} MB of each "
        "device (hccl_buffer_size; run.py sets it). run.py puts the group's name and the device's rank into the graphs "
        'where they say `group_ep="ep"` and `ep_rank_id=0`.'
    ]


def _devices(manifest: Manifest) -> int:
    stages = 1 + max(device.stage for device in manifest.devices)
    return stages * manifest.axes.get("dp", 1) * manifest.axes.get("tp", 1)
