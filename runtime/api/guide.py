"""What may come next in an answer: thoughts free and within a budget, then text, JSON of a schema, or calls.

The `Constraint` of a job. It follows the same marks as `Reader`, on the service's thread, and asks a grammar only where
there is one: inside a call, and in text that is JSON.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import llguidance
import numpy as np

from runtime.api.grammar import Calls
from runtime.api.vocabulary import Vocabulary
from runtime.serving.service import ConstraintBroken

_Phase = Literal["thinking", "text", "name", "arguments", "called", "parted", "over"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What holds for an answer.

    ends: tokens that end the answer. text: the grammar of its text; None where it is free. calls: those of calls; None
    where nothing is told of them. required: a call there must be, and no text. parallel: more than one may be. forbid:
    no call may be. budget: most tokens of thinking.
    """

    vocabulary: Vocabulary
    ends: frozenset[int]
    text: llguidance.LLMatcher | None = None
    calls: Calls | None = None
    required: bool = False
    parallel: bool = True
    forbid: bool = False
    budget: int | None = None

    @property
    def needed(self) -> bool:
        """Whether there is anything to hold to."""
        return self.forbid or not (self.text is None and self.calls is None and self.budget is None)


class Guide:
    """A `Constraint`: one answer's way through its rules. thinking: whether it begins inside thoughts."""

    def __init__(self, rules: Rules, thinking: bool):
        self._rules, self._markup = rules, rules.vocabulary.markup
        self._phase: _Phase = "thinking" if thinking else "text"
        self._matcher = rules.text.deep_copy() if rules.text is not None else None
        self._text = self._matcher
        self._thoughts, self._begun = 0, False
        self._name = b""

    @property
    def thinking(self) -> bool:
        return self._phase == "thinking"

    @property
    def closes(self) -> bool:
        """Whether the answer is held to a form that has an end of its own."""
        return self._rules.text is not None or self._rules.required or self._phase not in ("thinking", "text")

    def copy(self) -> Guide:
        made = object.__new__(Guide)
        made.__dict__.update(self.__dict__)
        if self._text is not None:
            made._text = self._text.deep_copy()
        if self._matcher is not None:
            made._matcher = made._text if self._matcher is self._text else self._matcher.deep_copy()
        return made

    def allowed(self) -> np.ndarray | None:
        rules, markup, mask = self._rules, self._markup, self._rules.vocabulary.mask
        match self._phase:
            case "over":
                return mask(())
            case "thinking":
                if rules.budget is not None and self._thoughts >= rules.budget and markup.think_end is not None:
                    return mask((markup.think_end,))
                barred = frozenset() if rules.calls is not None else self._calls
                if rules.text is not None or rules.required:
                    barred |= rules.ends
                elif rules.calls is None and not rules.forbid:
                    return None
                return mask(barred, others=True) if barred else None
            case "text" if rules.required:
                return mask(self._calls)
            case "text" if self._text is None:
                return mask(self._calls, others=True) if rules.forbid else None
            case "called" | "parted":
                more = self._calls if rules.parallel else frozenset()
                line = rules.vocabulary.lines if more and self._phase == "called" else frozenset()
                return mask(more | line | rules.ends)
        found = self._follow()
        if self._phase == "text" and rules.calls is not None and not self._begun:
            found[list(self._calls)] = True
        return found

    def accept(self, token: int) -> None:
        markup, rules = self._markup, self._rules
        if token in rules.ends and self._phase != "over":
            self._phase = "over"
            return
        match self._phase:
            case "thinking":
                self._thoughts += 1
                if token == markup.think_end:
                    self._phase = "text"
                elif token == markup.call and rules.calls is not None:
                    self._call()
            case "text" | "called" | "parted":
                if token == markup.call and rules.calls is not None:
                    self._call()
                elif self._phase == "text" and self._text is not None:
                    self._begun = True
                    self._take(token)
                elif self._phase == "called":
                    self._phase = "parted"
                elif token == markup.think and self._phase == "text":
                    self._phase = "thinking"
            case "name":
                self._take(token)
                if token in (markup.key, markup.call_end) and rules.calls is not None:
                    self._matcher = rules.calls.arguments[self._name.decode().strip()].deep_copy()
                    self._phase = "arguments"
                    self._take(token)
                    self._ended(token)
                else:
                    self._name += rules.vocabulary.pieces[token]
            case "arguments":
                self._take(token)
                self._ended(token)

    @property
    def _calls(self) -> frozenset[int]:
        return frozenset() if self._markup.call is None else frozenset({self._markup.call})

    def _call(self) -> None:
        assert self._rules.calls is not None
        self._phase, self._name, self._matcher = "name", b"", self._rules.calls.names.deep_copy()

    def _ended(self, token: int) -> None:
        if token == self._markup.call_end:
            self._phase, self._matcher = "called", self._text

    def _follow(self) -> np.ndarray:
        """What the grammar at work allows; what ends an answer only where the answer does end with it."""
        assert self._matcher is not None
        size = self._rules.vocabulary.size
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ConstraintBroken(_reason(self._matcher))
        found = np.unpackbits(bits, bitorder="little")[:size].astype(bool)
        stop_ids = list(self._rules.vocabulary.stop_ids)
        over = self._phase == "text" and bool(found[stop_ids].any())
        found[stop_ids] = False
        if over:
            found[list(self._rules.ends)] = True
        return found

    def _take(self, token: int) -> None:
        assert self._matcher is not None
        if not self._matcher.consume_token(token):
            raise ConstraintBroken(_reason(self._matcher))


def _reason(matcher: llguidance.LLMatcher) -> str:
    said = " ".join(matcher.get_error().split("\n")[0].split())[:200]
    return f"the answer cannot be held to its schema any further ({said or matcher.stop_reason()})"
