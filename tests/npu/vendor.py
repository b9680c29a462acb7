"""torch_npu on a machine without CANN: its operators' schemas and Meta kernels, which need no device.

The wheel links against libraries of CANN that only a driver's machine has. Importing needs them to be there, not to do
anything: one compiler call makes a library whose functions return 0, under each of the names that are missing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_CANN = re.compile(r"(acl|Hccl|Msprof|rt)[A-Z_]?\w*")  # how CANN's C functions begin; C++ is mangled: _Z
_NAME = "stub" * 16  # longer than the name of any library


@functools.cache
def reason_absent() -> str | None:
    """Why torch_npu cannot be imported here, None where it is now; importing it is the first call's work."""
    if find_spec("torch_npu") is None:
        return "torch_npu is not installed here: `make test-npu` does it"
    try:
        _stub()
        importlib.import_module("torch_npu")
    except (OSError, ImportError, subprocess.CalledProcessError) as error:
        return f"torch_npu {version('torch_npu')} does not import: {error}"
    return None


def operators() -> Any:
    """`torch.ops.npu`, with the vendor's schemas and Meta kernels."""
    assert reason_absent() is None
    import torch

    return torch.ops.npu


def _stub() -> None:
    import torch

    spec = find_spec("torch_npu")
    assert spec is not None and spec.origin is not None
    vendor, ours = Path(spec.origin).parent, Path(torch.__file__).parent / "lib"
    objects = sorted(vendor.glob("lib/*torch_npu.so")) + sorted(vendor.glob("lib/libtensorpipe.so"))
    objects += sorted(vendor.glob("lib/libnpu_profiler.so")) + sorted(vendor.glob("_C*.so"))
    names = {name for path in objects for name in _missing_functions(path)}
    libraries = {name for path in objects for name in _missing_libraries(path, (vendor / "lib", ours))}
    source = "".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(names))
    with tempfile.TemporaryDirectory(prefix="glm5-npu-") as folder:
        stub = Path(folder, "stub.so")
        command = ["cc", "-w", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{_NAME}", "-o", str(stub)]
        subprocess.run(command, input=source.encode(), check=True)
        for name in sorted(libraries):  # the loader takes a library that is loaded already, by its soname
            path = Path(folder, name)
            path.write_bytes(stub.read_bytes().replace(_NAME.encode(), name.encode().ljust(len(_NAME), b"\0")))
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _missing_functions(path: Path) -> Iterable[str]:
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(path)], check=True, capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        name = line.split()[-1]
        if _CANN.fullmatch(name):
            yield name


def _missing_libraries(path: Path, folders: tuple[Path, ...]) -> Iterable[str]:
    listed = subprocess.run(["ldd", str(path)], check=True, capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        name, _, found = line.strip().partition(" => ")
        if found == "not found" and not any((folder / name).exists() for folder in folders):
            yield name
