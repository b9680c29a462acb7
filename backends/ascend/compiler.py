"""ONNX to .om by `atc`, where CANN is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from backends.ascend import atc
from backends.errors import ArtifactError, BackendUnavailable


def find_atc() -> str | None:
    """ATC's executable, or None."""
    return shutil.which("atc")


def compile_graph(model: Path, output: Path, soc_version: str, environment: Mapping[str, str] | None = None) -> Path:
    """`model` compiled to `output` (a path without ".om"); returns the .om.

    `environment`: set beside the process's own (ASCEND_CUSTOM_OPP_PATH for a package's plugin).
    Raises `BackendUnavailable` without ATC, `ArtifactError` with ATC's own words where it refuses the graph.
    """
    if find_atc() is None:
        raise BackendUnavailable(
            "`atc` is not on the PATH; source CANN's set_env.sh, or emulate the chip with --backend sim"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    arguments = atc.command(str(model), str(output), soc_version)
    done = subprocess.run(
        arguments, capture_output=True, text=True, env={**os.environ, **(environment or {})}, check=False
    )
    om = output.with_name(output.name + ".om")
    if done.returncode != 0 or not om.is_file():
        words = [line for line in (done.stdout + done.stderr).split("\n") if line.strip()]
        first = next((line for line in words if line.lstrip().startswith("E")), words[-1] if words else "no message")
        raise ArtifactError(f"{model}: atc refuses it: {first.strip()}")
    return om
