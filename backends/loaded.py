"""Programs that are kept loaded, as many as may be, and what a launch of a model's step makes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from backends.interface import Executable


class StepMade(NamedTuple):
    """What a step will have made, on the device: float32 logits [rows, (t,) vocab], the ids chosen from them, and the
    hidden states that drafts are made from (None where there are none to make). told: where log-probabilities are asked
    for, the ids with those (`model.choosing.with_logprobs`)."""

    logits: Any
    ids: Any
    hidden: Any
    told: Any = None


class LoadedPrograms:
    """Programs by what asks for them; of more than `most` the one not used for longest goes, and is loaded anew when it
    is asked for again.

    made: how many have been loaded so far.
    """

    def __init__(self, most: int):
        self._most, self._held = most, OrderedDict[Hashable, Executable]()
        self.made = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], Executable]) -> Executable:
        """The program of a key, by `make` where it is not there."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        while len(self._held) >= self._most:  # before there is another
            self._held.popitem(last=False)
        self._held[key] = made = make()
        self.made += 1
        return made
