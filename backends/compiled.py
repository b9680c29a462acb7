"""What was compiled, kept in a folder for the next start.

A program costs its export and its compilation, and both are kept: artifacts here (`exported`), what the platform's
compiler makes of them in JAX's persistent cache. Both are code that will run, and hashes do not say who wrote them: so
the folder must be one that only this user can write to, as must be every folder above it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

import model
from backends.errors import ArtifactError
from backends.interface import Artifact, Backend, Program
from foundation.errors import UsageError
from foundation.reading import Unreadable, read_bytes
from foundation.writing import replacing

MOST_BYTES = 2_000_000_000
"""Of the folder, when it is opened: what was not used for longest goes."""
_LEAST_COMPILE_S = 0.2  # what compiles faster is not worth a file
_kept: Path | None = None


def keep_in(folder: Path) -> None:
    """From here on, what this process compiles is kept in a folder, which is made, and found there. Raises `UsageError`
    for one that others could write to."""
    global _kept
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        _require_own(folder)
        _prune(folder)
        made = folder / "exported"
        made.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--compile-cache {folder}: {error.strerror or error}; give another folder, or off") from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_COMPILE_S)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it looks at its folder once
    # A full disk, or a file that another process is writing, costs a compilation, not several lines a program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache", UserWarning)
    _kept = made


def keep_nothing() -> None:
    """Ends `keep_in`, and what the environment may have asked of JAX."""
    global _kept
    _kept = None
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def exported(backend: Backend, program: Program, of: str) -> Artifact:
    """The program's artifact, made by the backend or found. of: all that decides what `program.fn` computes, beside its
    arguments and the code of `model` and `backends`, in words that are the same in every process."""
    if _kept is None:
        return backend.export(program)
    path = _kept / f"{_digest(backend, program, of)}.glm5art"
    try:
        found = Artifact.from_bytes(read_bytes(path))
    except (Unreadable, ArtifactError, OSError):
        found = backend.export(program)
        with suppress(UsageError), replacing(path) as temporary:  # a full disk costs the next start, not this one
            temporary.write_bytes(found.to_bytes())
    return found


def _digest(backend: Backend, program: Program, of: str) -> str:
    shapes, tree = jax.tree.flatten(program.args)
    said = (
        _code(), backend.name, backend.capabilities().platform, program.name, of, str(tree),
        [(each.shape, str(each.dtype)) for each in shapes], program.donate, program.optimise,
        program.orders,
    )  # fmt: skip
    return hashlib.sha256(repr(said).encode()).hexdigest()


@cache
def _code() -> str:
    """Of the sources that a program is traced from, and the releases that trace it."""
    found = hashlib.sha256(repr([metadata.version(name) for name in ("jax", "jaxlib")]).encode())
    for package in (Path(model.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            found.update(f"{path.relative_to(package.parent)} ".encode() + read_bytes(path))
    return found.hexdigest()


def _require_own(folder: Path) -> None:
    """Raises `UsageError` where another user could put a program there."""
    for place in (folder, *folder.parents):
        found, own = place.stat(), place == folder
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid not in ((os.geteuid(),) if own else (os.geteuid(), 0)):
            why = f"{place} belongs to another user"
        elif others and (own or not found.st_mode & stat.S_ISVTX):
            why = f"others may write to {place}"
        else:
            continue
        raise UsageError(
            f"--compile-cache {folder}: {why}, and what is read from there is run; give a folder of your own that only "
            "you can write to (mode 0700), or off"
        )


def _prune(folder: Path) -> None:
    files: list[Any] = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
    held = sum(found.st_size for found, _ in files)
    for found, path in sorted(files, key=lambda each: max(each[0].st_atime, each[0].st_mtime)):
        if held <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        held -= found.st_size
