"""A file with a prompt a line, as `--prompts` takes it."""

from __future__ import annotations

from pathlib import Path

from foundation.errors import UsageError
from foundation.limits import within
from foundation.reading import Unreadable, read_lines

MOST_PROMPTS = 100_000
"""Each is encoded, scheduled and answered before the command ends."""
MOST_PROMPT_BYTES = 1 << 26
"""67 MB: of such a file."""


def read_prompts(path: Path) -> list[str]:
    """The lines that are not blank. Raises `UsageError` for a file that cannot be read, holds none, or too many."""
    try:
        lines = [line for line in read_lines(path, MOST_PROMPT_BYTES) if line.strip()]
    except Unreadable as error:
        raise UsageError(f"--prompts {path}: {error}") from None
    if not lines:
        raise UsageError(f"--prompts {path}: no prompt in it")
    within(f"--prompts {path}: the number of prompts", len(lines), MOST_PROMPTS)
    return lines
