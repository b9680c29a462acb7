"""The checkpoint that a command names, and what is to be said of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint


def opened_checkpoint(path: Path | None) -> Checkpoint:
    """The checkpoint in a directory, by default the embedded one; none of its weights has been read yet. Where what is
    stored is not what its config.json says, a line on stderr says so."""
    from model.checkpoint import Checkpoint
    from runtime.execution.local.load import embedded_checkpoint

    opened = Checkpoint(path or embedded_checkpoint())
    for note in opened.notes:
        print(f"glm5: {note}", file=sys.stderr)
    return opened
