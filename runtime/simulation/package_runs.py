"""What an Ascend package's run.py measured (`--json FILE`): read, and as rows of measured steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from foundation.errors import UsageError
from foundation.reading import Unreadable, parse_json, read_text

KIND, VERSION = "glm5-npu-measurements", 1
LINEAR = {"W8A8_DYNAMIC": "w8a8", "W4A8_DYNAMIC": "w4a8", "DISABLED": "bf16"}
"""Schemes by what rows of steps call them."""
_DEVICES = {
    "Ascend910_93": "ascend-910c-die",
    "Ascend910B2": "ascend-910b2",
    "Ascend910B3": "ascend-910b3",
    "Ascend910B4": "ascend-910b4",
}
"""Profiles by how torch_npu's names of devices begin."""


def read(path: Path) -> dict[str, Any]:
    """Raises `UsageError` for a file of another kind or version."""
    try:
        found = parse_json(read_text(path))
    except Unreadable as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UsageError(f"{path}: no measurements of a package's run.py (--json FILE)")
    if found.get("version") != VERSION:
        raise UsageError(f"{path}: measurements of version {found.get('version')!r}, this release reads {VERSION}")
    return found


def steps(path: Path) -> list[dict[str, str]]:
    """The steps that were timed, a row each in the columns of `runtime.simulation.validation.STEP`; `start` are the
    tokens before a chunk. Raises `UsageError`."""
    found = read(path)
    if not found.get("programs"):
        raise UsageError(f"{path}: no steps that a package's run.py has measured (--measure N --json FILE)")
    try:
        degrees = {axis: int(size) for axis, size in re.findall(r"(tp|dp|ep|pp)(\d+)", found["layout"])}
        device, formats = found["device"], found["formats"]
        shared = {
            "device": next((name for prefix, name in _DEVICES.items() if device.startswith(prefix)), device),
            "model": found["model"],
            "world": str(found["devices"]),
            "mtp": "0",
            "q_attn": "DISABLED",
            "q_linear": next((name for name, scheme in LINEAR.items() if scheme == formats), formats),
            **{axis: str(degrees[axis]) for axis in ("tp", "dp", "ep")},
        }
        return [shared | _step(found["model"], degrees["dp"], program) for program in found["programs"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: {type(error).__name__}: {error}; measure again with this package's run.py") from None


def _step(model: str, groups: int, program: dict[str, Any]) -> dict[str, str]:
    gear, decode = program["gear"], program["phase"] == "decode"
    return {
        "name": f"{model} {program['phase']}",
        "num_queries": str(gear["sequences"] * groups),
        "query_len": str(gear["tokens"]),
        "context": str(program["context_tokens"] if decode else 0),
        "start": str(0 if decode else program["context_tokens"] - gear["tokens"]),
        "measured_s": str(float(program["step"]["median_s"])),
    }
