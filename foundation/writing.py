"""Writing whole or not at all: a file, or a folder.

What is written stands beside its place, under a name of its own, until it is done. All of that is known here, so that
a process that must end can remove it, whatever its other threads are about (`abandon`).
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from foundation.errors import UsageError

_unfinished: set[Path] = set()
_naming = threading.RLock()  # held while something takes its name, or is begun


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes its place when the block ends well.

    Raises `UsageError` where the file cannot be written; an earlier file of that name is then untouched.
    """
    path = Path(path)
    with _said_of(path), _beside(path, "tmp") as temporary:
        yield temporary
        with _naming:
            os.replace(temporary, path)


@contextmanager
def new_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and is removed when not.

    replace: in the place of an earlier folder of that name; otherwise there must be none, or an empty one. Raises
    `UsageError` where the folder cannot be written; an earlier one is then untouched.
    """
    path = Path(path)
    with _said_of(path), _parents(path), _beside(path, "tmp") as temporary, _beside(path, "old") as old:
        temporary.mkdir()
        yield temporary
        with _naming:
            try:
                if replace and path.exists():
                    os.rename(path, old)
                os.replace(temporary, path)
            except BaseException:
                if old.exists():
                    os.rename(old, path)
                raise


def abandon() -> None:
    """Removes what is unfinished, and lets nothing more be begun or take its name: for a process that ends now."""
    _naming.acquire()
    for _ in range(3):  # another thread may be writing to a folder as it is removed
        for path in list(_unfinished):
            _remove(path)


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """What the system refuses, as one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def _beside(path: Path, kind: str) -> Iterator[Path]:
    """A path beside `path` that is removed at the end, with what has been written there."""
    made = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.{kind}")
    with _naming:
        _unfinished.add(made)
    try:
        yield made
    finally:
        _remove(made)
        _unfinished.discard(made)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Makes the folders above `path`, and removes those that it made when the block ends badly."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
