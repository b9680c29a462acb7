"""Text from outside: the gate says in one line what is wrong, and every reader makes an error of its own of that."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import hw_profiles
from backends.errors import ArtifactError
from foundation import reading
from foundation.errors import Failure, UsageError
from foundation.npy import read_npy
from foundation.reading import (
    Reason,
    Unreadable,
    parse_json,
    parse_toml,
    read_csv,
    read_json,
    read_lines,
    read_text,
    read_toml,
)
from foundation.safetensors import read_header
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
        ("[NaN]", "NaN is not a number in JSON", 1),
        ('{"a": -Infinity}', "-Infinity is not a number in JSON", 1),
        (DEEP, "nested too deep, beyond 100 levels: line 1 column 101", 1),
        ('{"a":\n' * 100_000, "nested too deep, beyond 100 levels: line 101 column 1", 101),
        ("[" * 101 + "]" * 101, "nested too deep", 1),
        ('["]", ' * 101, "nested too deep", 1),
        (LONG, "holds an integer of too many digits, more than 100: line 1 column 1", 1),
        ("[\n" + "1" * 101 + "]", "holds an integer of too many digits, more than 100: line 2 column 1", 2),
        ("[1e999]", "'1e999' is beyond what a number can be: line 1 column 2", 1),
        ('{"a":\n-1E+400}', "'-1E+400' is beyond what a number can be: line 2 column 1", 2),
        ("9" * 400 + ".5", "'99999", 1),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "key 'c' stands twice in an object", None),
        ('{"a": 1, "\\u0061": 2}', "key 'a' stands twice in an object", None),
        ('{"' + "a" * 9999 + '": 1, "' + "a" * 9999 + '": 1}', "key 'aaaa", None),
        ('["\\ud800"]', "holds half of a surrogate pair, which is no text: line 1 column 3", 1),
        ('["\\udfff\\ud800"]', "holds half of a surrogate pair", 1),
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
        ("a = " + DEEP, "nested too deep, beyond 100 levels: line 1 column 105"),
        ("\na" + ".b" * 200 + " = 1", "nested too deep, beyond 100 levels: line 2 column 1"),
        ("[" + "'a' . " * 200 + "b]", "nested too deep"),
        ("a = [" + "{b=" * 200, "nested too deep"),
        ("a = " + LONG, "holds an integer of too many digits"),
        ("a = " + "1" * 101, "holds an integer of too many digits"),
        ("a = 0x" + "f" * 90_000, "holds an integer of too many digits"),
        ("a = [1.0,\n1e999]", "'1e999' is beyond what a number can be: line 2 column 1"),
        ("a = 2026-13-45", "Expected newline"),
    ],
    ids=lambda value: value[:12],
)
def test_what_is_no_toml(text: str, said: str) -> None:
    assert str(refused("syntax", parse_toml, text)).startswith(said)


def test_what_is_within_the_limits() -> None:
    deepest, half = "[" * 100 + "]" * 100, "0." + "1" * 900
    assert parse_json(deepest) and parse_json(f'["{DEEP}", 1e308, {half}, -{"9" * 99}]')[0] == DEEP
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600" and parse_json('["\\\\ud800", 1]')[0] == "\\ud800"
    assert parse_toml(f'a = \'{DEEP}\' # {DEEP}\nb = [{"1.5, " * 300}]\nc = """\n{DEEP}"\n"""')["a"] == DEEP


def test_a_text_of_too_many_values_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_VALUES", 1000)
    assert len(parse_json("[" + "1," * 998 + "1]")) == 999
    for text in ("[" + "1," * 1000 + "1]", "[]" * 1000, '{"a":' * 1000):
        assert str(refused("size", parse_json, text)) == "holds more than 1,000 values"


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """Each of these would be waited for, or read without end, by `open` and `read`."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", "/dev/zero", "/dev/tty"):
        for read in (read_text, read_lines, read_json, read_toml, read_csv, read_npy, read_header):
            assert refused("file", read, path).reason == "file"
    listening.close()
    vast = tmp_path / "vast"
    vast.touch()
    os.truncate(vast, 1 << 42)
    for read in (read_text, read_lines, read_json, read_toml, read_csv, read_npy):
        refused("size", read, vast)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffa,b\n1,"x,\ny"\n\n2\n3,4,5\n')
    assert read_csv(path) == (["a", "b"], [{"a": "1", "b": "x,\ny"}, {"a": "2", "b": ""}, {"a": "3", "b": "4"}])
    path.write_text("")
    assert read_csv(path) == ([], [])
    for text in ("a,b,a\n1,2,3", 'a\n"b', 'a\n"b"c', "a\n" + "b" * 200_000):
        path.write_text(text)
        refused("syntax", read_csv, path)


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "f2", "i1", "<u8", "|b1"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 0), (), (7,)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_as_numpy_reads_it(tmp_path: Path, dtype: str, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
    path = tmp_path / "array.npy"
    np.save(path, np.arange(math.prod(shape)).reshape(shape).astype(dtype, order=order))
    found = read_npy(path)
    again = np.frombuffer(found.content, found.dtype).reshape(found.shape, order="F" if found.fortran else "C")
    assert again.dtype == np.dtype(dtype) and (again == np.load(path)).all() and again.shape == shape


def npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode() + content


NPY = "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a .npy file"),
        (b"\x93NUMPY", "not a .npy file"),
        (npy(NPY, b"\0" * 47), "a .npy file of 47 bytes of numbers, whose header says 48"),
        (npy(NPY.replace("(2, 3)", "(1000000000000, 1000000)")), "a .npy file of 0 bytes"),
        (npy(NPY.replace("(2, 3)", "(-2, -3)"), b"\0" * 48), "not a .npy file of numbers"),
        (npy(NPY.replace("(2, 3)", "(" + "1, " * 5 + "9" * 5000 + ")")), "not a .npy file of numbers"),
        (npy(NPY.replace("<f8", "|O"), b"\0" * 48), "not a .npy file of numbers"),
        (npy("__import__('os').abort()"), "not a .npy file of numbers"),
        (npy("(" * 60_000), "not a .npy file of numbers"),
        (npy(NPY)[:40], "not a .npy file of numbers"),
        (npy("{'descr': '<f8", version=2), "not a .npy file of numbers"),
    ],
    ids=range(11),
)
def test_what_is_no_npy(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    assert str(refused("syntax", read_npy, tmp_path / "a.npy")).startswith(said)


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
