"""What the tools that make a page of docs/ share: `python -m tools.docs_... [FILE]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def write(about: str | None, default: Path, render: Callable[[], str]) -> None:
    """Writes the page where the command line says. about: the tool's docstring, whose first line is its help."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=default, metavar="FILE")
    parser.parse_args().file.write_text(render(), encoding="utf-8")
