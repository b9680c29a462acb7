"""Damage and malice by seed: to a JSON document, to a text of `name = value` lines, to a table, to bytes, to words."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from random import Random
from typing import Any

DEEP = 100_000  # brackets


class Raw(str):
    """JSON or TOML text as it is, which no value of Python is written as."""


def nested(depth: int = DEEP) -> Raw:
    return Raw("[" * depth + "]" * depth)


VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 0.5, -0.5, 64, 100, 10**6, 10**9, 1e9, -1e9, 2**31 - 1, 2**31, 2**32,
    2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, Raw("1" + "0" * 400), Raw("9" * 5000), 1e308, 5e-324,
    Raw("NaN"),
    Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), "", "a", "x" * 100_000, "../../../../etc/hostname",
    "/etc/hostname", "/dev/zero", "nan", "1e400", "0x10", "a\nb", "\0", "\u202e\U0001f600", "<script>alert(1)</script>",
    "$(id)", "{{7*7}}",
    [], {}, [[]], [1, 2, 3], ["a"], [None], [0.5, "a", None], [1] * 1000, {"a": 1}, {"": {}}, nested(), nested(900),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw('"\\ud800"'),
)  # fmt: skip
TOML_VALUES = (
    "nan", "inf", "-inf", "-1", "0", "1e308", "5e-324", "9" * 5000, "1" + "0" * 300, "99999999999999999999", "true",
    "''",
    "'x'", "'a b'", '"a\\nb"', '"\\u0000"', "[]", "{}", "{a=1}", "1979-05-27", "[[0,0]]", "[[1,2],[1,3]]",
    "[[1e308,1e308],[2,3]]", nested(3000), "0x7fffffffffffffffffff", "1_000", "2.5", "1000000000", "[1,'x']",
    "['1:1000000000000:1']", "['1:10:0']", "['1:10:-1']", "['10:1:1']", "['a:b:c']", "[true]", "[nan]", '"<script>"',
)  # fmt: skip
CELLS = (
    "", "nan", "inf", "-1", "0", "1e400", "9" * 20, "1e9", "1000000000", "=cmd|'/c calc'!A0", "../../etc/hostname",
    "/dev/zero", "x" * 200_000, "\0", 'a"b', "1.5", " 8 ", "0x8", "\u0663", "true", "2", "<script>",
)  # fmt: skip


def text_of(value: Any) -> str:
    """JSON with what is `Raw` as it is, and keys that end in "\\0" and a digit without that: twice the same key."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k.split(chr(0))[0])}:{text_of(v)}" for k, v in value.items()) + "}"
    return "[" + ",".join(map(text_of, value)) + "]" if isinstance(value, list) else json.dumps(value)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _value(rng: Random) -> Any:
    """One of `VALUES`; a copy, since a later change may be inside it."""
    return copy.deepcopy(rng.choice(VALUES))


def mutated_json(rng: Random, document: Any) -> Any:
    """A copy with one to three places changed."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(_places(document)))
        if len(path) > 2 and rng.random() < 0.4:  # there are more deep places than shallow ones
            path = path[: rng.randint(1, 2)]
        if not path:
            if rng.random() < 0.1:
                return _value(rng)
            continue
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        _change(rng, holder, path[-1])
    return document


def _change(rng: Random, holder: Any, key: Any) -> None:
    kind, now = rng.random(), holder[key]
    if kind < 0.55:
        holder[key] = _value(rng)
    elif kind < 0.67:
        del holder[key]
    elif kind < 0.78 and isinstance(holder, dict):
        holder[f"{key}\0{rng.randint(0, 9)}" if kind < 0.74 else "zz"] = _value(rng)
    elif isinstance(now, bool):
        holder[key] = not now
    elif isinstance(now, int | float):
        holder[key] = rng.choice((now + 1, now - 1, now * 2, -now, now * 1000, now * 10**9, now / 2, str(now), [now]))
    elif isinstance(now, str):
        holder[key] = rng.choice((now + "x", now[:-1], now.upper(), now * 2, "../" + now, "/" + now, now + "\0", [now]))
    elif isinstance(now, list):
        more = _value(rng)
        holder[key] = rng.choice((now * 2, now[::-1], now[:-1], [*now, more], {str(i): x for i, x in enumerate(now)}))
    elif isinstance(now, dict):
        holder[key] = rng.choice((list(now.values()), list(now), {**now, "x": 1}))


def mutated_bytes(rng: Random, content: bytes) -> bytes:
    """Bits, cuts, insertions, repetitions, long numbers, marks that UTF-8 has or lacks."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not made:
            break
        at = rng.randrange(len(made))
        match rng.randrange(8):
            case 0:
                del made[at:]
            case 1:
                made[at] ^= 1 << rng.randrange(8)
            case 2:
                made[at:at] = rng.randbytes(rng.randint(1, 16))
            case 3:
                del made[at : at + rng.randint(1, 64)]
            case 4:
                made[at:at] = made[at : at + rng.randint(1, 200)] * rng.choice((1, 3))
            case 5:
                made[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, bytes(7) + b"\x10"))
            case 6:
                digits = [i for i in range(max(0, at - 300), min(len(made), at + 300)) if 48 <= made[i] <= 57]
                if digits:
                    i = rng.choice(digits)
                    made[i : i + 1] = rng.choice(
                        (b"-1", b"9" * 20, b"0", b"1e400", b"9", b"4294967295", b"nan", b"0.5")
                    )
            case _:
                made[at:at] = rng.choice(
                    (b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\0", b"\r", b'"', b"[", b"{", b"\xe2\x80\xae")
                )
    return bytes(made)


def mutated_toml(rng: Random, text: str) -> str:
    """Values, names and whole lines changed; what is in a value stays around what is changed in it."""
    lines = text.split("\n")
    settings = [i for i, line in enumerate(lines) if "=" in line and not line.lstrip().startswith("#")]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.choice(settings)
        name, _, value = lines[at].partition("=")
        numbers = list(re.finditer(r'(?<![\w"-])-?\d[\d_.e+-]*', value))
        match rng.randrange(7):
            case 0 | 1 | 2 if numbers:
                found, new = rng.choice(numbers), rng.choice(TOML_VALUES)
                lines[at] = f"{name}={value[: found.start()]}{new}{value[found.end() :]}"
            case 0 | 1 | 2 | 3:
                lines[at] = f"{name}= {rng.choice(TOML_VALUES)}"
            case 4:
                lines[at] = f"{lines[at]}\n{lines[at]}"
            case 5:
                lines[at] = "zz" + lines[at]
            case _:
                lines[at] = ""
    return "\n".join(lines)


def mutated_csv(rng: Random, text: str) -> str:
    rows = [row.split(",") for row in text.strip().split("\n")]
    for _ in range(rng.choice((1, 1, 2))):
        row = rng.choice(rows[rng.random() < 0.9 :])
        row[rng.randrange(len(row))] = rng.choice(CELLS)
    if rng.random() < 0.2:
        rows[-1] = rng.choice((rows[-1][: rng.randrange(len(rows[-1]))], [*rows[-1], "a", "b"]))
    return "\n".join(map(",".join, rows))


WORDS = (
    "", "-", "--", "-1", "0", "1", "3", "nan", "inf", "1e999", "9" * 20, "9" * 5000, "1e9", "\u0663", "a,b", ",", ":",
    "=", "x=y",
    "a" * 5000, "none.json", "none.toml", "none/none", ".", "..", "a\nb", "\u202e", "{}", "chip.x=1", "engine.x=nan",
    "power_law:nan", "power_law:1e9", "h200-sxm:0", "h200-sxm:99999999999", "tp8", "'", '"', "$(id)", "%s", "{0}",
)  # fmt: skip


def mutated_words(rng: Random, words: list[str], options: list[str]) -> list[str]:
    """Of a command line, its verb apart. Names no path outside the folder it runs in: a verb may write."""
    made = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randint(0, len(made))
        match rng.randrange(4):
            case 0 if made:
                made[at % len(made)] = rng.choice(WORDS)
            case 1 if made:
                del made[at % len(made)]
            case _:
                made[at:at] = [rng.choice(options), rng.choice(WORDS)][: rng.choice((1, 2, 2, 2))]
    return made
