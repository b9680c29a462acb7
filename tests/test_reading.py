"""Text from outside: the gate says in one line what is wrong, and every reader makes an error of its own of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hw_profiles
from backends.errors import ArtifactError
from foundation.errors import Failure, UsageError
from foundation.reading import Reason, Unreadable, parse_json, parse_toml, read_json, read_lines, read_text, read_toml
from hw_profiles.errors import ProfileError
from model.errors import ConfigError, TokenizerError
from model.hf_config import read_config
from model.tokenizer import Tokenizer
from runtime.deployment import engines
from runtime.deployment.errors import EngineError, PlanFileError, PreviousError
from runtime.deployment.manifest import Manifest
from runtime.deployment.plan import Plan
from runtime.planning.experts.files import read_placement
from runtime.pricing import load
from runtime.pricing.book import read_prices
from runtime.pricing.price import PriceError
from runtime.serving import mooncake_trace
from runtime.serving.errors import TraceFileError
from runtime.simulation.validation import read_rows
from runtime.training import config

DEEP, LONG = "[" * 100_000, "1" * 5000


def refused(reason: Reason, read: Callable[..., Any], *arguments: Any) -> Unreadable:
    with pytest.raises(Unreadable) as caught:
        read(*arguments)
    assert caught.value.reason == reason and "\n" not in str(caught.value) and len(str(caught.value)) < 200
    return caught.value


def test_what_is_well_formed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes('{"a": [1, 2.5, "é", null]}\r\n'.encode())
    assert read_text(path) == '{"a": [1, 2.5, "é", null]}\n' and read_json(str(path)) == {"a": [1, 2.5, "é", None]}
    path.write_text("a = [1, inf]\n")
    assert read_toml(path) == {"a": [1, float("inf")]}


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a\u2028b\nc\r\n\nd", ["a\u2028b", "c", "", "d"]),
        ("\x0b\x0c\x1c\x1d\x1e\x85\u2029\n\r\n", ["\x0b\x0c\x1c\x1d\x1e\x85\u2029", ""]),
        ("a\rb\r\r\n", ["a\rb\r"]),
        ("", []),
        ("\n", [""]),
    ],
)
def test_a_line_ends_with_a_line_feed_alone(tmp_path: Path, content: str, lines: list[str]) -> None:
    (tmp_path / "text").write_bytes(content.encode())
    assert read_lines(tmp_path / "text") == lines
    refused("absent", read_lines, tmp_path / "none")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert str(refused("absent", read_text, tmp_path / "none")) == "No such file or directory"
    assert str(refused("file", read_text, tmp_path)) == "Is a directory"
    refused("file", read_text, tmp_path / "a\0b")
    refused("file", read_text, tmp_path / ("n" * 300))
    path = tmp_path / "text"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(refused("encoding", read_json, path)) == "not UTF-8 text"
    path.write_bytes(b"12345")
    assert read_text(path, most_bytes=5) == "12345"
    assert str(refused("size", read_text, path, 4)) == "larger than 4 bytes"


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)", 1),
        ('{\n"a": 1,\n"b"}', "Expecting ':' delimiter: line 3 column 4 (char 13)", 3),
        ("{}{}", "Extra data", 1),
        ("[NaN]", "NaN is not a number in JSON", None),
        ('{"a": -Infinity}', "-Infinity is not a number in JSON", None),
        (DEEP, "nested too deep", None),
        ('{"a":' * 100_000, "nested too deep", None),
        (LONG, "holds an integer of too many digits", None),
        ("\ufeff{}", "starts with a byte order mark", 1),
    ],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_what_is_no_json(text: str, said: str, line: int | None) -> None:
    error = refused("syntax", parse_json, text)
    assert str(error).startswith(said) and error.line == line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a =\n", "Invalid value (at line 1, column 4)"),
        ("a = 1\na = 2\n", "Cannot overwrite a value"),
        ("a = " + DEEP, "nested too deep"),
        ("a = " + LONG, "holds an integer of too many digits"),
        ("a = 2026-13-45", "Expected newline"),
    ],
    ids=lambda value: value[:12],
)
def test_what_is_no_toml(text: str, said: str) -> None:
    assert str(refused("syntax", parse_toml, text)).startswith(said)


READERS: dict[str, tuple[Callable[[Path], Any], type[Failure]]] = {
    "plan.json": (Plan.read, PlanFileError),
    "manifest.json": (lambda path: Manifest.read(path.parent), ArtifactError),
    "config.json": (read_config, ConfigError),
    "tokenizer_config.json": (lambda path: Tokenizer.load(path.parent), TokenizerError),
    "train.toml": (config.read, UsageError),
    "engine.toml": (lambda path: engines.load(str(path)), EngineError),
    "profile.toml": (hw_profiles.load, ProfileError),
    "trace.jsonl": (mooncake_trace, TraceFileError),
    "counts.json": (lambda path: load.parse(str(path), 4), PriceError),
    "prices.json": (read_prices, PriceError),
    "placement.json": (lambda path: read_placement(path, np.ones((2, 4))), PreviousError),
    "rows.csv": (read_rows, UsageError),
}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"=", DEEP.encode(), b"[NaN]", LONG.encode(), b"3", None])
@pytest.mark.parametrize("name", READERS)
def test_a_reader_raises_its_own_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None
) -> None:
    read, error = READERS[name]
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    if content is None:
        Path(name).mkdir()
    else:
        Path(name).write_bytes(content)
    with pytest.raises(error) as caught:
        read(Path(name))
    for line in str(caught.value).splitlines() if name == "profile.toml" else [str(caught.value)]:
        assert "\n" not in line and len(line) < 500 and name in line, line
