"""The adapters by name. Importing this imports none of them."""

from __future__ import annotations

import importlib

from backends.errors import BackendUnavailable, UnknownBackend
from backends.interface import Backend

_ADAPTERS = {
    "cpu": "backends.cpu:CpuBackend",
    "cuda": "backends.cuda:CudaBackend",
    "ascend": "backends.ascend.adapter:AscendBackend",
    "sim": "backends.emulation.backend:SimBackend",
}


def names() -> tuple[str, ...]:
    """Adapter names, in the order in which `glm5 backends` lists them."""
    return tuple(_ADAPTERS)


def get(name: str) -> Backend:
    """The adapter of that name, usable here or not. Raises `UnknownBackend`."""
    if name not in _ADAPTERS:
        raise UnknownBackend(f"unknown backend {name!r}; known: {', '.join(_ADAPTERS)}")
    module, _, attribute = _ADAPTERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def usable(name: str) -> Backend:
    """The adapter of that name, able to run here. Raises `BackendUnavailable` with the reason."""
    backend = get(name)
    if reason := backend.unavailable():
        raise BackendUnavailable(f"backend {name} cannot be used here: {reason} (see `glm5 backends`)")
    return backend
