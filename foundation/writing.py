"""Writing whole or not at all: a file, or a folder.

What is written stands beside its place, under a name of its own, until it is done. All of that is known here, so that
a process that must end can remove it, whatever its other threads are about (`abandon`).

A process that is killed removes nothing. So each of these names is locked while its process lives, which no kill
survives, and whoever writes the same file or folder next removes those that nobody holds (`_clear`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from foundation.errors import UsageError

_TEMPORARY, _EARLIER = "glm5-tmp", "glm5-old"  # what is being written; what stood in its place
_unfinished: set[Path] = set()
_naming = threading.RLock()  # held while something takes its name, or is begun


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes its place when the block ends well.

    Raises `UsageError` where the file cannot be written, before the block where that shows; an earlier file of that
    name is then untouched.
    """
    with replacing_together(path) as (temporary,):
        yield temporary


@contextmanager
def replacing_together(*paths: str | Path) -> Iterator[list[Path]]:
    """`replacing`, of several files: all of them take their places, in this order, or none does. A process that is
    killed just then may leave the first without the rest."""
    named: dict[Path, Path] = {}
    with ExitStack() as stack:
        stack.enter_context(_said_of(Path(paths[0]), named))
        for path in map(Path, paths):
            with _said_of(path):
                _require_a_file(path)
                named[stack.enter_context(_new_beside(path, _new_file))] = path
        yield list(named)
        with _naming:
            _take_places(named, stack)


def require_writable(path: str | Path) -> None:
    """Raises the `UsageError` that `replacing` would, for work that takes its time before it writes."""
    path = Path(path)
    with _said_of(path):
        _require_a_file(path)
        with _new_beside(path, _new_file):
            pass


@contextmanager
def new_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and is removed when not.

    replace: in the place of an earlier folder of that name; otherwise there must be none, or an empty one. Raises
    `UsageError` where the folder cannot be written; an earlier one is then untouched. The block fills the folder, and
    puts no other in its place.
    """
    path = Path(path)
    with _said_of(path), _parents(path), _new_beside(path, os.mkdir, replace) as temporary, ExitStack() as stack:
        old = stack.enter_context(_beside(path, _EARLIER))
        yield temporary
        with _naming:
            try:
                if replace and path.exists():
                    stack.enter_context(_held(path))
                    os.rename(path, old)
                os.replace(temporary, path)
            except BaseException:
                if old.exists():
                    os.rename(old, path)
                raise


def abandon() -> None:
    """Removes what is unfinished, and lets nothing more be begun or take its name: for a process that ends now."""
    _naming.acquire()
    for _ in range(100):  # another thread may be writing to a folder as it is removed
        left = [path for path in list(_unfinished) if os.path.lexists(path)]
        if not left:
            break
        for path in left:
            _remove(path)


@contextmanager
def _said_of(path: Path, named: Mapping[Path, Path] | None = None) -> Iterator[None]:
    """What the system refuses, as one line: of `path`, or of what the temporary path that it names stands for."""
    try:
        yield
    except OSError as error:
        whose = (named or {}).get(Path(str(error.filename)), path)
        raise UsageError(f"{whose} cannot be written: {error.strerror or error}") from None


def _require_a_file(path: Path) -> None:
    """Raises where `path` cannot be a file's name. What is no regular file is not replaced by one."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} cannot be written: it is no regular file")


def _take_places(named: Mapping[Path, Path], stack: ExitStack) -> None:
    """Temporary files take their names, or none does."""
    taken: list[tuple[Path, Path | None]] = []
    try:
        for temporary, path in named.items():
            earlier = None
            if len(named) > 1 and path.exists():
                earlier = stack.enter_context(_new_beside(path, lambda old, path=path: shutil.copy2(path, old)))
            os.replace(temporary, path)
            taken.append((path, earlier))
    except OSError:
        for path, earlier in reversed(taken):
            if earlier is None:
                path.unlink()
            else:
                os.replace(earlier, path)
        raise


# --- names beside a place ------------------------------------------------------------------------------


@contextmanager
def _beside(path: Path, kind: str) -> Iterator[Path]:
    """A path beside `path` that is removed at the end, with what has been written there."""
    path = path.absolute()
    made = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.{kind}")
    with _naming:
        _unfinished.add(made)
    try:
        yield made
    finally:
        _remove(made)
        _unfinished.discard(made)


@contextmanager
def _new_beside(path: Path, make: Callable[[Path], object], restore: bool = False) -> Iterator[Path]:
    """A path beside `path` at which `make` has made something, locked; what is left of dead processes is removed."""
    _clear(path, restore)
    with ExitStack() as stack:
        made = path
        for _ in range(8):  # who clears may have come between the making and the lock
            made = stack.enter_context(_beside(path, _TEMPORARY))
            make(made)
            if stack.enter_context(_held(made)):
                break
        yield made


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Locks what is at `path`. False where it is gone, or somebody else has it."""
    try:
        lock: int | None = _lock(path)
    except (BlockingIOError, FileNotFoundError):
        yield False
        return
    except OSError:  # a kind of disk without locks: then nobody can clear there either
        lock = None
    try:
        yield True
    finally:
        if lock is not None:
            os.close(lock)


def _lock(path: str | Path) -> int:
    """A descriptor with the lock of what is at `path`; it ends with the process. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _clear(path: Path, restore: bool) -> None:
    """Removes what processes that are no more have left beside `path`.

    restore: a folder that one had put aside, and has not replaced, gets its name back. Without, it stays aside.
    """
    path = path.absolute()
    ours = re.compile(re.escape(f".{path.name}.") + rf"\d+-[0-9a-f]{{8}}\.(?:{_TEMPORARY}|{_EARLIER})")
    left: list[os.DirEntry[str]] = []
    with suppress(OSError), os.scandir(path.parent) as entries:
        left = [entry for entry in entries if ours.fullmatch(entry.name)]
    for entry in left:
        with suppress(OSError):
            lock = _lock(entry.path)
            try:
                if not entry.name.endswith(_EARLIER) or path.exists():
                    _remove(Path(entry.path))
                elif restore:
                    os.rename(entry.path, path)
            finally:
                os.close(lock)


def _new_file(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))


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
