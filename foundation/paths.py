"""Paths that a file names: they stay inside the folder that the file describes, however they are spelt.

A manifest, an index of shards or a graph may come from anybody. What it names is a regular file below its folder; a
link may lead to another file there, and out of it only where Hugging Face's cache keeps the bytes of a checkpoint:
`snapshots/REVISION/FILE` is a link to `blobs/HASH` of the same repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_MOST_CHARACTERS = 1024


class Outside(Exception):
    """A path that is not taken: why, in words to stand behind "PATH: ".

    reason: "absent": no such file. "outside": it leads out of the folder, or is spelt as if. "kind": it is a directory,
    a pipe or a device.
    """

    def __init__(self, reason: Literal["absent", "outside", "kind"], why: str) -> None:
        super().__init__(why)
        self.reason: Literal["absent", "outside", "kind"] = reason


def inside(folder: str | Path, name: object) -> Path:
    """The regular file that `name`, which a file in `folder` gives, stands for. Raises `Outside`."""
    named = spelt_inside(name)
    path = Path(folder) / named
    try:
        found = path.resolve(strict=True)
        root = Path(folder).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise Outside("absent", "missing") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise Outside("kind", f"cannot be read ({getattr(error, 'strerror', None) or 'a link to itself'})") from None
    if not found.is_relative_to(root) and not _in_cache(root, found):
        raise Outside("outside", f"a link that leads out of the folder, to {found}")
    if not found.is_file():
        raise Outside("kind", "no regular file")
    return path


def beside(folder: str | Path, path: str) -> Path:
    """The regular file in or below a folder that stands for `path`, which a file in the folder was made from: of
    `a/b/c` that is `a/b/c`, `b/c` or `c`, the first that is there. Nothing elsewhere is looked at. Raises `Outside`."""
    found = Outside("absent", "missing")
    parts = path[-_MOST_CHARACTERS:].replace("\\", "/").split("/")
    for first in range(len(parts)):
        try:
            return inside(folder, "/".join(parts[first:]))
        except Outside as error:
            found = error
    raise found


def spelt_inside(name: object) -> str:
    """`name`, where it is spelt as a path below a folder, whether or not it is there. Raises `Outside`."""
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_CHARACTERS or not name.isprintable():
        raise Outside("outside", "no path")
    if "\\" in name or ":" in name.split("/")[0] or name.startswith("/"):
        raise Outside("outside", "no path relative to the folder")
    if ".." in name.split("/"):
        raise Outside("outside", "leads out of the folder")
    return name


def _in_cache(root: Path, found: Path) -> bool:
    """Whether `found` is a blob of the repository in Hugging Face's cache that the folder `root` is a snapshot of."""
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    return snapshots is not None and found.parent == snapshots.parent / "blobs"
