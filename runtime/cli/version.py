"""The product's version: of the installed package, or of the source tree where nothing is installed."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

_DISTRIBUTION = "glm5-runtime"
_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def version() -> str:
    """As in 0.1.0; "unknown" where neither says it."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        pass
    try:
        return str(tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, ValueError, KeyError):
        return "unknown"
