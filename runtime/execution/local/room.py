"""Whether a pool of pages that somebody asks for can be held at all."""

from __future__ import annotations

import os

from foundation.errors import CapacityError
from model.config import ModelConfig
from runtime.execution.local.load import token_bytes


def require_room(cfg: ModelConfig, pool_tokens: int, dtype: str, mtp: bool, memory_bytes: int | None) -> None:
    """Raises `CapacityError` for a pool larger than a device's memory, or this host's where that is not told."""
    held = memory_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = pool_tokens * token_bytes(cfg, dtype, mtp)
    if needed > held:
        raise CapacityError(
            f"--pool-tokens {pool_tokens:,} takes {needed / 1e9:,.1f} GB of cache, and there are {held / 1e9:,.1f} GB "
            "of memory; ask for fewer"
        )
