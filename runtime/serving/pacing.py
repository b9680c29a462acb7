"""How generation is paced by training: which groups of rollouts may begin, and which ones a training step takes.

A *group* is one question answered several times. The groups of a stage are numbered from 0 and begin in that order. A
training step takes `batch` groups and makes the next *version* of the policy; version 0 is what the stage begins with.
How stale a group is: versions made between the one that it began with and the step that trains on it.

`paced`: groups below `(version + 1 + staleness) * batch` may have begun. A step takes the oldest that are there, and
waits where all that would then be left could not be trained on before they are more than `staleness` versions behind.
It need not wait for ever: once all have come, the oldest are a batch, and as many begin as a step takes. So nothing
that was generated is thrown away.

`discard`: so many groups are always under way, and a step waits for none in particular: it takes the oldest of those
that are there, and what is too stale by then is thrown away, and counted. It favours what is over soon.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

RolloutAdmission = Literal["paced", "discard"]


@dataclasses.dataclass(frozen=True)
class Taken:
    """Groups that a step trains on, and the version that each began with; oldest first."""

    groups: tuple[int, ...]
    versions: tuple[int, ...]


class Pacer:
    """Of one stage. total: groups that it trains on in all. version: how many steps it has made so far.

    thrown_away: groups generated for nothing.
    """

    def __init__(self, batch: int, total: int, staleness: int = 0, admission: RolloutAdmission = "paced"):
        if batch < 1 or total < 0 or total % batch or staleness < 0:
            raise ValueError(f"batch {batch}, total {total}, staleness {staleness}")
        self.batch, self.total, self.staleness, self.admission = batch, total, staleness, admission
        self.version = self.thrown_away = 0
        self._begun = 0
        self._trained = 0
        self._under_way: dict[int, int] = {}
        self._finished: dict[int, int] = {}

    @property
    def done(self) -> bool:
        return self._trained == self.total

    @property
    def under_way(self) -> int:
        """Groups that have begun and not finished."""
        return len(self._under_way)

    @property
    def finished(self) -> list[int]:
        """Groups that have come back and that no step has taken or thrown away."""
        return list(self._finished)

    def begin(self) -> range:
        """The groups that begin now, with the present version."""
        if self.admission == "paced":
            allowed = min(self.total, (self.version + 1 + self.staleness) * self.batch)
        else:
            self._throw_away()
            left = self.total - self._trained - len(self._finished)
            wanted = min((1 + self.staleness) * self.batch, left)
            allowed = self._begun + max(0, wanted - len(self._under_way))
        fresh = range(self._begun, max(self._begun, allowed))
        self._under_way |= dict.fromkeys(fresh, self.version)
        self._begun = fresh.stop
        return fresh

    def finish(self, group: int) -> None:
        """A group has come back. Raises `KeyError` for one that is not under way."""
        self._finished[group] = self._under_way.pop(group)

    def again(self) -> list[int]:
        """The groups under way, which begin once more with the present version: who generated them was lost."""
        self._under_way = dict.fromkeys(self._under_way, self.version)
        return list(self._under_way)

    def take(self) -> Taken | None:
        """What the next step trains on, once it is there; the version moves on by one. None: wait for more."""
        if self.admission == "discard":
            self._throw_away()
        oldest = sorted(self._finished, key=self._finished.__getitem__)[: self.batch]  # of one age, as they finished
        if len(oldest) < self.batch or (self.admission == "paced" and not self._may_take(oldest)):
            return None
        versions = tuple(self._finished.pop(group) for group in oldest)
        self._trained += self.batch
        self.version += 1
        return Taken(tuple(oldest), versions)

    def _may_take(self, groups: Sequence[int]) -> bool:
        """Whether the steps behind this one can then train on all others before they are too stale."""
        left = [began for group, began in self._finished.items() if group not in groups]
        due = sorted(began + self.staleness - self.version for began in (*left, *self._under_way.values()))
        return all(place < steps * self.batch for place, steps in enumerate(due))

    def _throw_away(self) -> None:
        stale = [group for group, began in self._finished.items() if began < self.version - self.staleness]
        self.thrown_away += len(stale)
        for group in stale:
            del self._finished[group]
