"""What is told of an answer as it comes. Joined, the texts of a kind are the whole of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Thought:
    """Text of the model's thinking."""

    text: str


@dataclasses.dataclass(frozen=True)
class Said:
    """Text of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallBegun:
    """A call of a tool, by its whole name; what follows of it is `CallGrown`."""

    name: str


@dataclasses.dataclass(frozen=True)
class CallGrown:
    """The next piece of the JSON of the arguments."""

    json: str


@dataclasses.dataclass(frozen=True)
class CallEnded:
    """The arguments are whole."""


Event = Thought | Said | CallBegun | CallGrown | CallEnded


def merged(events: Iterable[Event]) -> list[Event]:
    """The same, with neighbours of a kind made one: how events compare that were cut differently."""
    found: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        if kind is Thought:
            found.append(Thought("".join(event.text for event in group if isinstance(event, Thought))))
        elif kind is Said:
            found.append(Said("".join(event.text for event in group if isinstance(event, Said))))
        elif kind is CallGrown:
            found.append(CallGrown("".join(event.json for event in group if isinstance(event, CallGrown))))
        else:
            found += group
    return found
