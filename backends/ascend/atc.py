"""`atc` command lines: one a graph. ATC's options by their documentation (sources in `atc_limits.toml`)."""

from __future__ import annotations

import re
import shlex

from backends.ascend.catalog import family, limits
from backends.errors import Unsupported

_ONNX = 5  # --framework
_SOC = re.compile(r"^Ascend[0-9A-Za-z_-]+$")
SOC_HINT = "--soc-version is 'Ascend' and the Name that `npu-smi info` prints on the host, as in Ascend910B3"


def check_soc(soc_version: str) -> str:
    """The value, if ATC may know it. Raises `Unsupported` for one that no chip has."""
    if not _SOC.match(soc_version):
        raise Unsupported(f"--soc-version {soc_version}: {SOC_HINT}")
    if family(soc_version) is None:
        known = ", ".join(f"{prefix}.." for prefix in limits()["families"])
        raise Unsupported(f"--soc-version {soc_version}: CANN's fused operators are for {known}; {SOC_HINT}")
    names = limits()["soc_versions"].get(family(soc_version))
    if names and soc_version not in names:
        raise Unsupported(f"--soc-version {soc_version}: no such chip; CANN names {', '.join(names)}; {SOC_HINT}")
    return soc_version


def command(model: str, output: str, soc_version: str) -> list[str]:
    """The arguments that compile `model` (ONNX) to `output`.om for a chip.

    Shapes are in the file. `--precision_mode_v2=origin` keeps the graph's own number formats; ATC's default for ONNX
    is float16 throughout.
    """
    return [
        "atc",
        f"--framework={_ONNX}",
        f"--model={model}",
        f"--output={output}",
        f"--soc_version={soc_version}",
        "--input_format=ND",
        "--precision_mode_v2=origin",
    ]


def line(arguments: list[str]) -> str:
    """A command as a line of shell."""
    return shlex.join(arguments)
