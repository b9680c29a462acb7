"""Regular expressions of strangers, for names. Python's matcher tries one way after the other, cannot be stopped, and
has more ways than there is time where repeats lie in each other: how many there may be is counted before."""

from __future__ import annotations

import re
import re._parser as parser  # type: ignore[import-not-found]
import warnings
from math import comb, inf
from typing import Any

MOST_CHARACTERS = 64
"""Of a name: `model.layers.99.mlp.experts.999.gate_up_proj` has 44."""
MOST_WAYS = 1 << 22
"""Through a name, of all patterns together; each takes some 30 ns. One that is as real ones are has up to 300,000:
`.*layers.(1|2).*experts.\\d+.(gate|up|down)_proj`."""
MOST_TEXT = 1 << 18
"""Characters of all patterns together, which are parsed at a second a million."""


class PatternError(Exception):
    """What is wrong with a pattern: the text follows its name."""


class Patterns:
    """Patterns that names of at most `MOST_CHARACTERS` are compared with, within one budget for all of them."""

    def __init__(self) -> None:
        self._ways, self._text = float(MOST_WAYS), MOST_TEXT

    def compiled(self, pattern: str) -> re.Pattern[str]:
        """Raises `PatternError`."""
        self._text -= len(pattern)
        if self._text < 0:
            raise PatternError(f"is beyond the {MOST_TEXT:,} characters that all patterns may have")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._ways -= _ways(pattern)
                if self._ways >= 0:
                    return re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise PatternError("is no regular expression") from None
        raise PatternError(f"is one too many, or goes too many ways through a name: {MOST_WAYS:,} are the most of all")


def _ways(pattern: str) -> float:
    """How many ways there are at most: of its alternatives, and to deal out a name's characters to its repeats."""
    try:
        alternatives, repeats = _paths(parser.parse(pattern))
        return alternatives * comb(MOST_CHARACTERS + repeats, repeats) if alternatives < inf else inf
    except OverflowError:
        return inf


def _paths(parsed: Any) -> tuple[float, int]:
    """Alternatives, and repeats of one character without an end; infinitely many where repeats lie in each other."""
    alternatives, repeats = 1.0, 0
    for kind, held in parsed:
        more, inner = _paths_of(str(kind), held)
        alternatives, repeats = alternatives * more, repeats + inner
    return alternatives, repeats


def _paths_of(kind: str, held: Any) -> tuple[float, int]:
    match kind:
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            least, most, item = held
            alternatives, repeats = _paths(item)
            if alternatives == 1 and repeats == 0:  # one way: how often is all there is to choose
                return (1.0, 1) if most > MOST_CHARACTERS else (float(most - least + 1), 0)
            if most > MOST_CHARACTERS:
                return inf, 0
            return (alternatives + 1) ** int(most), repeats * int(most)
        case "BRANCH":
            return _either(held[1])
        case "GROUPREF_EXISTS":
            return _either([each for each in held[1:] if each is not None])
        case "SUBPATTERN" | "ASSERT" | "ASSERT_NOT":
            return _paths(held[-1])
        case "ATOMIC_GROUP":  # as in what `fnmatch` makes: once it is through, none of its other ways is tried
            alternatives, repeats = _paths(held)
            return (1.0, 0) if alternatives == 1 and repeats <= 1 else (alternatives, repeats)
        case _:  # a character, a set, a place, what a group held
            return 1.0, 0


def _either(parts: Any) -> tuple[float, int]:
    paths = [_paths(each) for each in parts]
    return 1.0 + sum(each for each, _ in paths), max(repeats for _, repeats in paths)
