"""The memory that a stranger's graphs may take as they run, beside their weights and caches.

What a graph's operators make is nowhere bounded by its file: forty bytes of it can ask for a terabyte. The kernel keeps
the bound (`RLIMIT_DATA`, of what this process has made its own), and what a runtime raises there is a refusal. Where
the kernel has no such limit (macOS), there is none.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backends.errors import ArtifactError
from foundation.reading import read_text
from runtime.deployment.manifest import Gear
from runtime.execution.package.executor import TRUST

_LEAST_BYTES = 2 << 30  # a runtime's own, and what it compiles with
_BYTES_A_TOKEN = 4 << 20  # of a step: its rows in every operator of a layer that are alive at once
_BYTES_A_PAIR = 2 << 10  # of a new token and a position of its context: scores of all heads, several times
_STATM = Path("/proc/self/statm")
_WORDS = ("alloc", "memory", "RESOURCE_EXHAUSTED")  # what the runtimes say of it


def room_bytes(gear: Gear, page_size: int, held_bytes: int) -> int:
    """What a step at a gear may take, many times what our own exports do. held_bytes: of weights and caches, of which
    a step may have two more copies, in wider numbers or another order."""
    tokens = gear.sequences * gear.tokens
    pairs = tokens * gear.context_pages * page_size
    return _LEAST_BYTES + 2 * held_bytes + tokens * _BYTES_A_TOKEN + pairs * _BYTES_A_PAIR


@contextmanager
def within_room(what: object, most_bytes: int) -> Iterator[None]:
    """Raises `ArtifactError` where more memory is taken here than that, beside what this process has."""
    if not _STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(read_text(_STATM).split()[5]) * os.sysconf("SC_PAGE_SIZE")
    most = held + most_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        yield
    except (ArtifactError, MemoryError) as error:
        if isinstance(error, ArtifactError) and not any(word in str(error) for word in _WORDS):
            raise
        said = f"{what}: takes more than {most_bytes / 1e9:,.1f} GB of memory beside its weights and caches"
        raise ArtifactError(f"{said}; {TRUST}") from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
