"""The gate for text from outside: files are read here, and JSON and TOML are parsed.

What is wrong is an `Unreadable`: one line that does not name the file. Whoever reads names it, says what to change, and
raises a `Failure` of its own; an `Unreadable` that nobody took is a bug.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal, NoReturn

MOST_BYTES = 1 << 28  # 268 MB: more than any plan, manifest or index of shards

Reason = Literal["absent", "file", "size", "encoding", "syntax"]


class Unreadable(Exception):
    """A text that cannot be read: why, `what` that is in words, and on which line where that is known.

    reason: "absent": no such file. "file": a directory, or refused by the system. "size": larger than allowed.
    "encoding": not UTF-8. "syntax": not JSON, not TOML, or more than is taken of them.
    """

    def __init__(self, reason: Reason, what: str, line: int | None = None, place: str = "") -> None:
        super().__init__(what + place)
        self.reason, self.what, self.line = reason, what, line


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
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError as error:
        raise Unreadable("absent", error.strerror or str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise Unreadable("file", getattr(error, "strerror", None) or str(error)) from None
    if len(content) > most_bytes:
        raise Unreadable("size", f"larger than {most_bytes:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable("encoding", "not UTF-8 text") from None


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises `Unreadable`."""
    return parse_json(read_text(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds. Raises `Unreadable`."""
    return parse_toml(read_text(path))


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises `Unreadable`, for NaN and Infinity too."""
    if text.startswith("\ufeff"):
        raise Unreadable("syntax", "starts with a byte order mark", 1)
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        place = f": line {error.lineno} column {error.colno} (char {error.pos})"
        raise Unreadable("syntax", error.msg, error.lineno, place) from None
    except (RecursionError, ValueError) as error:
        raise _beyond(error) from None


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises `Unreadable`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unreadable("syntax", str(error).splitlines()[0]) from None
    except (RecursionError, ValueError) as error:
        raise _beyond(error) from None


def _no_number(name: str) -> NoReturn:
    raise Unreadable("syntax", f"{name} is not a number in JSON")


# What is well-formed and yet not taken is refused here, and by `_beyond`.
_JSON = json.JSONDecoder(parse_constant=_no_number)


def _beyond(error: RecursionError | ValueError) -> Unreadable:
    """A text that goes beyond what Python reads: in depth, or in the digits of an integer."""
    what = "nested too deep" if isinstance(error, RecursionError) else "holds an integer of too many digits"
    return Unreadable("syntax", what)
