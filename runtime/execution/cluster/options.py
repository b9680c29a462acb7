"""What the command line says about emulated devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class SimOptions:
    """What the command line says about the devices. plan: a file; without one, a plan is made on the spot.

    scale_memory: share of the chips' memory that is there.
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
    scale_memory: float = 1.0
    trace: Path | None = None

    @property
    def given(self) -> list[str]:
        """The options that were given, as they are spelled."""
        spelled = [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]
        return [name for name in spelled if name != "--scale-memory" or self.scale_memory != 1.0]
