"""Prompts in, tokens out, on one device of any backend.

    from runtime.execution.local import Prompt, load_engine
    [answer] = load_engine(Checkpoint(DIR), backend).generate([Prompt(ids, max_tokens=8)])

Owns compiled programs by shape, and what carries the scheduler's steps out with them. Reads the model through `model`
and devices through `backends`. The names below are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.execution.local.engine import EngineConfig, LocalEngine
    from runtime.execution.local.load import load_engine
    from runtime.execution.local.request import Completion, Prompt

__all__ = ["Completion", "EngineConfig", "LocalEngine", "Prompt", "load_engine"]

_MODULES = {
    "Completion": "request",
    "EngineConfig": "engine",
    "LocalEngine": "engine",
    "Prompt": "request",
    "load_engine": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
