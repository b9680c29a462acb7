"""Whether there is an Ascend NPU to be used."""

from __future__ import annotations

import functools
import importlib
import importlib.util

from backends.ascend.operators import npu_release
from foundation.errors import first_line


@functools.cache
def why_not_imported() -> str | None:
    """Why there is no torch_npu here, None where there is; it is imported then."""
    for package in ("torch", "torch_npu"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install 'glm5-runtime[npu]')"
    try:
        torch_npu = importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:
        return f"torch_npu does not import ({first_line(error)}); source CANN's set_env.sh"
    found, expected = torch_npu.__version__, npu_release().version
    if found.split(".")[:2] != expected.split(".")[:2]:
        return f"torch_npu {found} is here, and graphs are written for {expected}: install that"
    return None


@functools.cache
def why_not() -> str | None:
    """Why no NPU can be used here, None where one can. Imports torch_npu where there is one."""
    if (reason := why_not_imported()) is None:
        import torch

        if torch.npu.is_available():  # type: ignore[attr-defined]
            return None
        reason = "torch_npu finds no device (see `npu-smi info`)"
    return f"{reason}; or emulate the chip with --backend sim"
