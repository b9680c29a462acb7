"""What is told of an answer as it comes. Joined, the texts of a kind are the whole of it."""

from __future__ import annotations

import dataclasses


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


def merged(events: list[Event]) -> list[Event]:
    """The same, with neighbours of a kind made one: how events compare that were cut differently."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Thought) and isinstance(last, Thought):
            found[-1] = Thought(last.text + event.text)
        elif isinstance(event, Said) and isinstance(last, Said):
            found[-1] = Said(last.text + event.text)
        elif isinstance(event, CallGrown) and isinstance(last, CallGrown):
            found[-1] = CallGrown(last.json + event.json)
        else:
            found.append(event)
    return found
