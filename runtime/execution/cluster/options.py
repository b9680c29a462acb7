"""What the command line says about emulated devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

DECIDED_BY_PLAN = frozenset({"profile", "tp", "dp", "ep", "pp", "formats", "kv", "engine", "mtp"})
"""Options that are not read where there is a plan."""


@dataclasses.dataclass(frozen=True)
class SimOptions:
    """What the command line says about the devices. plan: a file; without one, a plan is made on the spot.

    mtp: tokens drafted a step. scale_memory: share of the chips' memory that is there.
    """

    plan: Path | None = None
    profile: str | None = None
    devices: int | None = None
    tp: int | None = None
    dp: int | None = None
    ep: int | None = None
    pp: int | None = None
    formats: str | None = None
    kv: str | None = None
    engine: str | None = None
    mtp: int = 0
    scale_memory: float = 1.0
    trace: Path | None = None
