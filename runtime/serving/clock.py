"""What time is, where steps are carried out.

virtual   steps take what they are priced at, and nobody waits
wall      steps take what they take
paced     steps take what they are priced at, and are waited for; one that this machine takes longer over is late
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from foundation.errors import UsageError


class Clock(Protocol):
    """Seconds since the clock began."""

    measures: bool
    """Steps take what they take by `now`; otherwise what they are priced at."""

    def now(self) -> float:
        """What it shows to those outside."""
        ...

    def wait_s(self, until: float) -> float:
        """Seconds of the wall until it shows that much; negative: so long ago. 0 where nobody waits."""
        ...

    def shown_s(self, wall_s: float) -> float:
        """Seconds of its own that so many of the wall are. 0 where nobody waits."""
        ...


class Virtual:
    """Shows 0 to those outside: whatever they ask for is asked for as early as may be."""

    measures = False

    def now(self) -> float:
        return 0.0

    def wait_s(self, until: float) -> float:
        return 0.0

    def shown_s(self, wall_s: float) -> float:
        return 0.0


class Wall:
    """paused_s: seconds that do not count, so far (of compiling, say)."""

    measures = True

    def __init__(self, paused_s: Callable[[], float] = lambda: 0.0):
        self._paused_s = paused_s
        self._began = time.perf_counter() - paused_s()

    def now(self) -> float:
        return time.perf_counter() - self._paused_s() - self._began

    def wait_s(self, until: float) -> float:
        return 0.0

    def shown_s(self, wall_s: float) -> float:
        return wall_s


class Paced:
    """time_scale: seconds of the wall for each of the clock's; above 1 it goes slower. paused_s: as of `Wall`."""

    measures = False

    def __init__(self, time_scale: float = 1.0, paused_s: Callable[[], float] = lambda: 0.0):
        if not 0 < time_scale < float("inf"):
            raise UsageError(f"--time-scale must be above 0, not {time_scale:g}")
        self.time_scale = time_scale
        self._wall = Wall(paused_s)

    def now(self) -> float:
        return self._wall.now() / self.time_scale

    def wait_s(self, until: float) -> float:
        return until * self.time_scale - self._wall.now()

    def shown_s(self, wall_s: float) -> float:
        return wall_s / self.time_scale
