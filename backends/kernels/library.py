"""The PTX that is shipped, by variant and compute capability."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any

from backends.kernels.variants import TARGETS

Capability = tuple[int, int]
LEAST: Capability = divmod(TARGETS[0], 10)


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """PTX text with one entry. target: the architecture it was compiled for. shared_bytes: dynamic shared memory."""

    entry: str
    ptx: str
    target: int
    shared_bytes: int


def target_for(capability: Capability) -> int:
    """The architecture whose PTX a compute capability runs: its own, or the least, which all newer ones run (PTX for
    9.0 and 10.0 uses features that no other capability has)."""
    own = capability[0] * 10 + capability[1]
    return own if own in TARGETS else TARGETS[0]


def shared_bytes_of(capability: Capability) -> int:
    """How much shared memory a program may have (CUDA's programming guide, "Technical Specifications per Compute
    Capability"; less 1 KB that the system keeps)."""
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    return 227 * 1024 if capability[0] in (9, 10) else 99 * 1024


def fits(variant: str, capability: Capability) -> bool:
    """Whether a capability has the shared memory that a variant wants."""
    return compiled_kernel(variant, target_for(capability)).shared_bytes <= shared_bytes_of(capability)


@functools.cache
def index() -> Mapping[str, Any]:
    """What `tools.kernels` wrote: entries by "variant.smNN", and the compiler."""
    return MappingProxyType(json.loads(_folder().joinpath("index.json").read_text()))


@functools.cache
def compiled_kernel(variant: str, target: int) -> CompiledKernel:
    """The shipped PTX of a variant for an architecture."""
    name = f"{variant}.sm{target}"
    entry = index()["entries"][name]
    ptx = _folder().joinpath(f"{name}.ptx").read_text()
    return CompiledKernel(entry["entry"], ptx, target, entry["shared_bytes"])


def _folder() -> Any:
    return resources.files("backends.kernels") / "ptx"
