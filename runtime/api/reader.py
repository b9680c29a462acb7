"""Tokens to events: the one state machine for thinking, text and calls.

It goes token by token, so it cannot matter in which bursts they come, and whole answers are its events joined. What it
makes of an answer, beyond the obvious:

- Thinking ends at `</think>`, or where a call begins. Without either, all of the text is thinking.
- Thinking of white space only is none; so is text of white space only in front of a call.
- Text is what stands before the first call. White space between calls is nothing, and other text there is not told.
- A call is told when its name is whole. One without a name is not told.
- Where no tools were asked for, the marks of calls are text like any other.
- Stop strings are looked for in the text alone: not in thoughts, not in arguments.
- The model's end in the middle of a call ends the call; an end by a limit leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from runtime.api.arguments import ArgumentWriter
from runtime.api.events import CallBegun, CallEnded, CallGrown, Event, Said, Thought
from runtime.api.stops import StopText
from runtime.api.tools import Tool
from runtime.api.vocabulary import Vocabulary

_State = Literal["thinking", "text", "name", "between", "key", "value", "done"]


class Reader:
    """Reads one answer.

    thinking: whether it begins inside thoughts. tools: what may be called, by name; None where nothing was asked for.
    ends: tokens that end the answer, which are not shown. plain: all tokens are text, as in a completion.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        thinking: bool = False,
        tools: Mapping[str, Tool] | None = None,
        stops: Sequence[str] = (),
        ends: frozenset[int] = frozenset(),
        plain: bool = False,
    ):
        self._markup, self._tools, self._ends = vocabulary.markup, tools, ends
        self._state: _State = "thinking" if thinking else "text"
        self._stream = vocabulary.tokenizer.stream(skip_special_tokens=True)
        self._stops = StopText(stops)
        self._blank = ""  # white space that is held back until something follows
        self._shown = plain  # whether text, or thoughts, have begun
        self._called = False
        self._word = ""  # a name or a key, as far as it is known
        self._arguments: ArgumentWriter | None = None
        self._transitions: dict[int | None, Any] = {}
        if not plain:
            self._transitions = {self._markup.think: self._think, self._markup.think_end: self._think_end}
            if tools is not None:
                self._transitions |= {
                    self._markup.call: self._call, self._markup.call_end: self._call_end,
                    self._markup.key: self._key, self._markup.key_end: self._key_end,
                    self._markup.value: self._begin_value, self._markup.value_end: self._value_end,
                }  # fmt: skip
            self._transitions.pop(None, None)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer; nothing is told after it."""
        return self._stops.found

    @property
    def thinking(self) -> bool:
        return self._state == "thinking"

    @property
    def speaking(self) -> bool:
        """Whether the next token is text of the answer, unless it is markup."""
        return self._state == "text" and not self._called

    def is_text(self, token: int) -> bool:
        """Whether a token, coming next, would be part of the answer's text."""
        return self.speaking and token not in self._transitions and token not in self._ends

    def put(self, token: int) -> list[Event]:
        """What a token settles. Nothing, once the answer has ended."""
        if self._state == "done":
            return []
        if token in self._ends:
            return self.end(cut=False)
        change = self._transitions.get(token)
        if change is None:
            return self._text(self._stream.put(token))
        found = change()
        return found if found is not None else self._text(self._stream.put(token))

    def end(self, cut: bool) -> list[Event]:
        """What is left, where the answer ends. cut: not by the model itself."""
        if self._state == "done":
            return []
        found = self._text(self._stream.flush())
        if self.speaking:
            found += self._say(self._stops.flush(), last=True)
        elif self._state not in ("thinking", "done") and not cut:
            found += self._close()
        self._state = "done"
        return found

    # --- text, by state ---

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        match self._state:
            case "thinking":
                text = self._begun(text)
                return [Thought(text)] if text else []
            case "text" if not self._called:
                found = self._say(self._stops.put(text))
                if self._stops.found is not None:
                    found += self._say("", last=True)
                    self._state = "done"
                return found
            case "name" | "key":
                self._word += text
            case "value":
                return self._grown(self._arguments.put(text) if self._arguments else "")
        return []

    def _begun(self, text: str) -> str:
        """Text without white space that nothing follows."""
        if self._shown:
            return text
        self._blank += text
        if self._blank.isspace():
            return ""
        text, self._blank, self._shown = self._blank, "", True
        return text

    def _say(self, text: str, last: bool = False) -> list[Event]:
        text = self._begun(text) if text else ""
        if last and not self._shown:
            text, self._blank = self._blank, ""
        return [Said(text)] if text else []

    def _grown(self, json: str) -> list[Event]:
        return [CallGrown(json)] if json else []

    def _flush(self) -> list[Event]:
        """The text that a mark ends: half a character does not go on behind it."""
        return self._text(self._stream.flush())

    def _enter(self, state: _State) -> None:
        self._state, self._blank, self._shown, self._word = state, "", False, ""

    # --- what the marks do; None: the token is text here ---

    def _think(self) -> list[Event] | None:
        if self._state == "value":
            return None
        if self._state != "text":
            return []
        found = self._flush()
        if self._state == "text":
            found += self._say(self._stops.flush())
            self._enter("thinking")
        return found

    def _think_end(self) -> list[Event] | None:
        if self._state == "value":
            return None
        found = self._flush()
        if self._state == "thinking":
            self._enter("text")
        return found

    def _call(self) -> list[Event] | None:
        if self._state == "value":
            return None
        found = self._flush()
        if self._state == "done":
            return found
        if self._state == "text":
            found += self._say(self._stops.flush())
        elif self._state != "thinking":
            found += self._close()
        self._enter("name")
        return found

    def _call_end(self) -> list[Event]:
        found = self._flush()
        return found + self._close() if self._state not in ("thinking", "text", "done") else found

    def _close(self) -> list[Event]:
        """The call ends, whatever of it is there."""
        found = self._named() if self._state == "name" else []
        if self._arguments is not None:
            found += [*self._grown(self._arguments.close()), CallEnded()]
        self._arguments = None
        self._enter("text")
        return found

    def _named(self) -> list[Event]:
        name = self._word.strip()
        if not name:
            return []
        tool = (self._tools or {}).get(name)
        self._arguments = ArgumentWriter(tool.parameters if tool else {}, tool is not None and tool.exact)
        self._called = True
        return [CallBegun(name)]

    def _key(self) -> list[Event] | None:
        if self._state == "value":
            return None
        found = self._flush()
        if self._state == "name":
            found += self._named()
        if self._state in ("name", "between", "key"):
            self._enter("key")
        return found

    def _key_end(self) -> list[Event] | None:
        return None if self._state == "value" else self._flush()

    def _begin_value(self) -> list[Event] | None:
        if self._state == "value":
            return None
        found = self._flush()
        if self._state == "key":
            found += self._grown(self._arguments.begin(self._word.strip()) if self._arguments else "")
            self._enter("value")
        return found

    def _value_end(self) -> list[Event]:
        found = self._flush()
        if self._state == "value":
            found += self._grown(self._arguments.end() if self._arguments else "")
            self._enter("between")
        return found
