"""Where `glm5 run` and `glm5 serve` keep what they compile."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from foundation.errors import UsageError


def open_compile_cache(asked: str | None) -> None:
    """asked: a folder, `off`, or None for the user's own cache, without which it goes as well; JAX's own setting in the
    environment stands. Raises `UsageError` for a folder that is not taken."""
    if asked is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    from backends import compiled

    if asked == "off":
        compiled.keep_nothing()
    elif asked:
        compiled.keep_in(Path(asked))
    elif asked == "":
        raise UsageError("--compile-cache takes a folder, or off")
    else:
        try:
            compiled.keep_in(_of_user())
        except (UsageError, RuntimeError) as error:  # RuntimeError: no home
            print(f"glm5: nothing compiled is kept: {error}", file=sys.stderr)


def _of_user() -> Path:
    """As the XDG Base Directory Specification has it: a relative path there is ignored."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if named.startswith("/") else Path.home() / ".cache"
    return base / "glm5" / "compiled"
