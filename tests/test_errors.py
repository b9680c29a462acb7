"""What an error says, in a line: an empty message too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import Failure, first_line, printable

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError(""), "RuntimeError"),
        (Failure(), "Failure"),
        (ValueError(" \n\n"), "ValueError"),
        (ValueError("\n  what is wrong\nand where"), "what is wrong"),
        (ValueError("one"), "one"),
        (OSError(28, "No space left"), "[Errno 28] No space left"),
    ],
)
def test_the_first_line_of_an_error(error: BaseException, shown: str) -> None:
    assert first_line(error) == shown


@given(st.text(st.characters()))
def test_text_of_others_is_one_line_and_commands_no_terminal(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and (shown == text or not text.isprintable())
    assert shown.encode().decode("unicode_escape" if shown.isascii() and "\\" not in text else "utf-8") in (text, shown)


def test_no_other_way_to_the_first_line_of_an_error() -> None:
    """`str(error).splitlines()[0]` fails where an error says nothing."""
    packages = ("foundation", "hw_profiles", "model", "backends", "runtime")
    for path in (file for package in packages for file in (ROOT / package).rglob("*.py")):
        found = re.search(r"(error|found|msg\"\])\)?\.(splitlines\(\)|split\(\"\\n\"\))\[0\]", path.read_text())
        assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}: foundation.errors.first_line"
