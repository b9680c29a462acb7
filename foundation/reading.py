"""The gate for text from outside: files are read here, and JSON, TOML and CSV are parsed.

What is wrong is an `Unreadable`: one line that does not name the file. Whoever reads names it, says what to change, and
raises a `Failure` of its own; an `Unreadable` that nobody took is a bug.

Nothing here waits, and what is read is bounded before it is parsed: a text is a regular file of a known size, and what
comes of it holds no more values, levels and digits than the limits below, no number beyond float64, no key twice.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from foundation.errors import first_line, shortened

MOST_BYTES = 1 << 26
"""67 MB: twice the largest tokenizer.json, and more than an index of a million tensors."""
MOST_TOML_BYTES = 1 << 20
"""TOML is written by hand, and parsed at a second a megabyte."""
MOST_CSV_BYTES = 1 << 22
"""4 MB, a hundred bytes to a measurement: 40,000 of them. In memory a cell takes up to a hundred times its text."""
MOST_VALUES = 2_000_000
"""Of a JSON text: a plan of 10,000 devices has 400,000. Parsed and checked, a value takes up to 900 bytes."""
MOST_DEPTH = 100
"""Levels of lists and tables in each other; no file of ours has ten. Checkers below end at about 200."""
MOST_DIGITS = 100
"""Of an integer, so that each is a float64 too; identifiers of 256 bits have 78."""

Reason = Literal["absent", "file", "size", "encoding", "syntax"]


class Unreadable(Exception):
    """A text that cannot be read: why, `what` that is in words, and on which line where that is known.

    reason: "absent": no such file. "file": no regular file, or refused by the system. "size": larger than allowed.
    "encoding": not UTF-8. "syntax": not JSON, TOML or CSV, or more than is taken of them.
    """

    def __init__(self, reason: Reason, what: str, line: int | None = None, place: str = "") -> None:
        super().__init__(what + place)
        self.reason, self.what, self.line = reason, what, line


# --- files -------------------------------------------------------------------------------------------


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, opened to read its bytes. A pipe, a device, a socket and a directory are refused, and none is
    waited for. Raises `Unreadable`."""
    try:
        _regular(os.stat(path))  # first, since opening a device may do something
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            _regular(os.fstat(descriptor))  # and again: it may be another by now
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError as error:
        raise Unreadable("absent", error.strerror or str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path, or a lone surrogate
        raise Unreadable("file", getattr(error, "strerror", None) or str(error)) from None


def _regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise Unreadable("file", os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("file", "not a regular file")


def read_bytes(path: str | Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file. Raises `Unreadable`."""
    with open_regular(path) as file:
        try:
            large = os.fstat(file.fileno()).st_size > most_bytes
            content = b"" if large else file.read(most_bytes + 1)  # the kernel's own files say size 0
        except OSError as error:
            raise Unreadable("file", error.strerror or str(error)) from None
    if large or len(content) > most_bytes:
        raise Unreadable("size", f"larger than {most_bytes:,} bytes")
    return content


def read_text(path: str | Path, most_bytes: int = MOST_BYTES) -> str:
    r"""The text of a UTF-8 file, line ends as "\n". Raises `Unreadable`."""
    return _decoded(path, most_bytes).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path, most_bytes: int = MOST_BYTES) -> list[str]:
    r"""The lines of a UTF-8 file, which end with "\n" or "\r\n" and with nothing else that Unicode counts as a line's
    end: a text may hold that. Raises `Unreadable`."""
    lines = _decoded(path, most_bytes).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _decoded(path: str | Path, most_bytes: int) -> str:
    try:
        return read_bytes(path, most_bytes).decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable("encoding", "not UTF-8 text") from None


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises `Unreadable`."""
    return parse_json(read_text(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds. Raises `Unreadable`."""
    return parse_toml(read_text(path, MOST_TOML_BYTES))


def read_csv(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns that the first line of a CSV file names, and a row a line; a cell that a line lacks is "", what it
    has beyond the columns is left out. Raises `Unreadable`."""
    text = read_text(path, MOST_CSV_BYTES).removeprefix("\ufeff")
    try:
        lines = csv.reader(io.StringIO(text), strict=True)
        columns = next(lines, [])
        padding = [""] * len(columns)
        rows = [dict(zip(columns, [*cells, *padding], strict=False)) for cells in lines if cells]
    except csv.Error as error:
        raise Unreadable("syntax", str(error)) from None
    if len(set(columns)) != len(columns):
        raise Unreadable("syntax", f"column {shortened(repr(_twice(columns)))} stands twice", 1)
    return columns, rows


# --- texts -------------------------------------------------------------------------------------------

# Strings and comments, unclosed ones too, and possessively: no text is gone through twice.
_JSON_STRINGS = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_TOML_STRINGS = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+(?:"{3,5})?|' + r"'''(?:[^']++|'(?!''))*+(?:'{3,5})?|"
    r'"(?:[^"\\\n]++|\\.)*+"?|' + r"'[^'\n]*+'?|#[^\n]*+",
    re.DOTALL,
)
_DOTTED = re.compile(rf"(?<![\w-])[\w-]++(?:[ \t]*+\.[ \t]*+[\w-]++){{{MOST_DEPTH}}}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LEVEL = [0] * 256
for _opening, _closing in (b"[]", b"{}"):
    _LEVEL[_opening], _LEVEL[_closing] = 1, -1


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises `Unreadable`, for NaN and Infinity and for 1e999 too."""
    if text.startswith("\ufeff"):
        raise Unreadable("syntax", "starts with a byte order mark", 1)
    if max(text.count(","), text.count("[") + text.count("{")) >= MOST_VALUES:
        raise Unreadable("size", f"holds more than {MOST_VALUES:,} values")
    _bound_depth(text, _JSON_STRINGS)
    try:
        value = (_CHECKED if _extreme(text) else _PLAIN).decode(text)
    except json.JSONDecodeError as error:
        place = f": line {error.lineno} column {error.colno} (char {error.pos})"
        raise Unreadable("syntax", error.msg, error.lineno, place) from None
    except _NoNumber as error:
        raise _placed(error.what, text, max(0, text.find(error.digits))) from None
    if (escape := _SURROGATE.search(text)) and _lone_surrogate(value):
        raise _placed("holds half of a surrogate pair, which is no text", text, escape.start())
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises `Unreadable`, for 1e999 too; TOML has inf and nan by name."""
    if len(text) > MOST_TOML_BYTES:
        raise Unreadable("size", f"larger than {MOST_TOML_BYTES:,} bytes")
    _bound_depth(text, _TOML_STRINGS)
    if text.count(".") >= MOST_DEPTH and (dotted := _DOTTED.search(_blanked(text, _TOML_STRINGS))):
        raise _placed(_TOO_DEEP, text, dotted.start())
    try:
        tables = tomllib.loads(text, parse_float=_float)
        for number in _integers(tables):
            if abs(number) >= 10**MOST_DIGITS:
                raise Unreadable("syntax", _TOO_LONG)
        return tables
    except tomllib.TOMLDecodeError as error:
        raise Unreadable("syntax", first_line(error)) from None
    except _NoNumber as error:
        raise _placed(error.what, text, max(0, text.find(error.digits))) from None
    except ValueError:  # more digits than Python takes
        raise Unreadable("syntax", _TOO_LONG) from None


_TOO_DEEP = f"nested too deep, beyond {MOST_DEPTH} levels"
_TOO_LONG = f"holds an integer of too many digits, more than {MOST_DIGITS}"


class _NoNumber(Exception):
    """A number that is none here, as it is spelt."""

    def __init__(self, what: str, digits: str) -> None:
        super().__init__(what)
        self.what, self.digits = what, digits


def _constant(name: str) -> NoReturn:
    raise _NoNumber(f"{name} is not a number in JSON", name)


def _int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _NoNumber(_TOO_LONG, digits)
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number) and digits[-1] != "f":  # TOML's own name of it
        raise _NoNumber(f"{shortened(repr(digits))} is beyond what a number can be", digits)
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Unreadable("syntax", f"key {shortened(repr(_twice(key for key, _ in pairs)))} stands twice in an object")
    return made


_PLAIN = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_object)
_CHECKED = json.JSONDecoder(parse_constant=_constant, parse_int=_int, parse_float=_float, object_pairs_hook=_object)
_ALIKE = bytes.maketrans(b"123456789E", b"000000000e")
_EXTREMES = (b"0" * MOST_DIGITS, b"e000", b"e+000")


def _extreme(text: str) -> bool:
    """Whether numbers must be looked at one by one, which takes several times as long: without these, all are small."""
    alike = text.encode("utf-8", "replace").translate(_ALIKE)
    return any(each in alike for each in _EXTREMES)


def _bound_depth(text: str, strings: re.Pattern[str]) -> None:
    """Raises `Unreadable` for more levels than `MOST_DEPTH`, before a parser goes down them."""
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return
    brackets = strings.sub("", text).encode("utf-8", "replace").translate(None, _NO_BRACKETS)
    if max(accumulate(map(_LEVEL.__getitem__, brackets)), default=0) > MOST_DEPTH:
        levels = accumulate((_LEVEL[ord(c)] if c in "[]{}" else 0) for c in _blanked(text, strings))
        raise _placed(_TOO_DEEP, text, next(at for at, level in enumerate(levels) if level > MOST_DEPTH))


def _blanked(text: str, strings: re.Pattern[str]) -> str:
    """The text with its strings and comments written over, everything in its place."""
    return strings.sub(lambda found: "_" * len(found[0]), text)


def _placed(what: str, text: str, at: int) -> Unreadable:
    line = text.count("\n", 0, at) + 1
    return Unreadable("syntax", what, line, f": line {line} column {at - text.rfind(chr(10), 0, at)}")


def _integers(value: Any) -> Iterable[int]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _integers(inner)
    elif isinstance(value, int):
        yield value


def _lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _twice(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))
