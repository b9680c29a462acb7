"""A broken TOML is answered by one line a problem, never by a traceback."""

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hw_profiles import InvalidProfile, Profile, ProfileError, load
from hw_profiles.loader import PROFILES
from hw_profiles.parse import parse

TEXT = (PROFILES / "h200-sxm.toml").read_text(encoding="utf-8")
GOOD = tomllib.loads(TEXT)
BANDWIDTH = "chip.memory.bandwidth_bytes_per_s"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good document with one dotted key set; `...` removes it."""
    document = copy.deepcopy(GOOD)
    table, keys = document, path.split(".")
    for key in keys[:-1]:
        table = table.setdefault(key, {})
    if value is ...:
        del table[keys[-1]]
    else:
        table[keys[-1]] = value
    return document


CASES = [
    (f"{BANDWIDTH}.value", -1.0, BANDWIDTH, "greater than 0"),
    (f"{BANDWIDTH}.value", 0, BANDWIDTH, "leave out what is unknown"),
    (f"{BANDWIDTH}.value", 2e14, BANDWIDTH, "check the unit"),
    (f"{BANDWIDTH}.value", float("nan"), BANDWIDTH, "finite"),
    (f"{BANDWIDTH}.value", float("inf"), BANDWIDTH, "finite"),
    (f"{BANDWIDTH}.value", 10**400, BANDWIDTH, "check the unit"),
    (f"{BANDWIDTH}.value", "4.8 TB/s", BANDWIDTH, "must be a number in bytes/s"),
    (f"{BANDWIDTH}.value", True, BANDWIDTH, "must be a number"),
    (f"{BANDWIDTH}.value", ..., BANDWIDTH, "has no value"),
    (f"{BANDWIDTH}.source", ..., BANDWIDTH, "one line of text"),
    (f"{BANDWIDTH}.source", "nowhere", BANDWIDTH, "no [sources.nowhere]"),
    (f"{BANDWIDTH}.grade", "D", BANDWIDTH, "must be one of measured, A, B, C"),
    (f"{BANDWIDTH}.date", "last May", BANDWIDTH, "YYYY-MM"),
    (f"{BANDWIDTH}.range", [5e12, 6e12], BANDWIDTH, "must hold the value"),
    (f"{BANDWIDTH}.range", [1], BANDWIDTH, "[low, high]"),
    (f"{BANDWIDTH}.unit", "TB/s", f"{BANDWIDTH}.unit", "unknown key"),
    (BANDWIDTH, 4.8e12, BANDWIDTH, "needs a source"),
    ("chip.memory.bandwith_bytes_per_s", {}, "chip.memory.bandwith_bytes_per_s", f"did you mean {BANDWIDTH}"),
    ("chip.peak", 3, "chip.peak", "must be a table"),
    ("chip.peak.bf16_flops_per_s.value", 2e17, "chip.peak.bf16_flops_per_s", "check the unit"),
    ("chip.memory.capacity_bytes.value", 2e13, "chip.memory.capacity_bytes", "check the unit"),
    ("link.scale_up.domain_devices.value", 8.5, "link.scale_up.domain_devices", "whole number"),
    ("link.scale_up.topology", "star", "link.scale_up.topology", "must be one of switch"),
    ("efficiency.memory.knots", [[1, 1.2]], "efficiency.memory.knots", "at most 1"),
    ("efficiency.memory.knots", [[10, 0.5], [1, 0.6]], "efficiency.memory.knots", "increase"),
    ("efficiency.memory.knots", [], "efficiency.memory.knots", "list of"),
    ("efficiency.memory.knots", 0.8, "efficiency.memory.knots", "list of"),
    ("efficiency.memory.size_unit", "MB", "efficiency.memory.size_unit", '"bytes"'),
    ("formats.weights", ["bf16", "fp7"], "formats.weights", "w8a8"),
    ("formats.kv", [], "formats.kv", "int8"),
    ("formats", ..., "formats", "[formats] table"),
    ("name", "H200 SXM", "name", "lower-case"),
    ("name", ..., "name", "nothing"),
    ("kind", "gpu", "kind", "accelerator"),
    ("schema", 2, "schema", "must be 1"),
    ("memory", {}, "memory", "unknown key"),
    *[
        ("prices", path, "prices", "relative to the TOML")
        for path in (
            "/etc/prices.json",
            "../prices.json",
            "a/../../b.json",
            "c:/b.json",
            "..\\b.json",
            "x" * 2000,
        )
    ],
    ("package_devices", 0, "package_devices", "from 1 to 16"),
    ("sources.smi.grade", ..., "sources.smi", "must be one of"),
    ("sources.smi", "a string", "sources.smi", "title, date and grade"),
]


@pytest.mark.parametrize(("path", "value", "field", "word"), CASES)
def test_one_fault_is_one_line_with_field_and_remedy(path: str, value: Any, field: str, word: str) -> None:
    with pytest.raises(InvalidProfile) as caught:
        parse(changed(path, value), "mine.toml")
    (line,) = caught.value.problems
    assert line.startswith(f"mine.toml: {field}") and word in line
    assert len(line.splitlines()) == 1 and len(line) < 250


def test_all_faults_are_reported_at_once() -> None:
    document = changed(f"{BANDWIDTH}.value", -1)
    document["chip"]["peak"]["bf16_flops_per_s"]["value"] = "fast"
    document["surprise"] = 1
    with pytest.raises(InvalidProfile) as caught:
        parse(document, "mine.toml")
    assert len(caught.value.problems) == 3
    assert str(caught.value) == f"{caught.value.problems[0]} (and 2 more problems)"


def test_a_grade_of_user_needs_no_date() -> None:
    document = changed(BANDWIDTH, {"value": 4e12, "source": "my guess", "grade": "user"})
    assert parse(document, "mine.toml").require(BANDWIDTH).grade == "user"


def test_a_toml_date_is_a_date() -> None:
    figure = tomllib.loads('f = { value = 4e12, source = "mine", grade = "B", date = 2026-05-01 }')["f"]
    assert parse(changed(BANDWIDTH, figure), "mine.toml").require(BANDWIDTH).date == "2026-05-01"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"name = ",
        b"\xff\xfe",
        b"[" * 20000,
        b"x = " + b"[" * 20000,
        b"x = " + b"9" * 5000,
        b"a." * 3000 + b"b = 1",
    ],
)
def test_a_file_that_is_no_profile(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(ProfileError, match=r"^mine\.toml: ") as caught:
        load(file)
    assert all(len(line.splitlines()) == 1 for line in caught.value.problems)


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(ProfileError, match="no such file"):
        load(tmp_path / "d.toml")


values = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The good document with one to three entries replaced, removed or added anywhere."""
    document = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        table = document
        while True:
            inner = [key for key, value in table.items() if isinstance(value, dict)]
            if not inner or draw(st.integers(0, 3)) == 0:
                break
            table = table[draw(st.sampled_from(inner))]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "add" or not table:
            table[draw(st.text(max_size=8))] = draw(values)
        elif action == "remove":
            del table[draw(st.sampled_from(list(table)))]
        else:
            table[draw(st.sampled_from(list(table)))] = draw(values)
    return document


@given(mutated())
def test_any_mutation_gives_a_profile_or_a_profile_error(document: dict[str, Any]) -> None:
    try:
        profile = parse(document, "mine.toml")
    except ProfileError as error:
        assert error.problems
        for line in error.problems:
            assert line.startswith("mine.toml: ") and len(line.splitlines()) == 1
    else:
        assert isinstance(profile, Profile)
        for figure in profile.figures.values():
            assert 0 < figure.value < float("inf") and figure.source and figure.grade


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 40), st.text(max_size=6))
def test_any_edit_gives_a_profile_or_a_profile_error(tmp_path: Path, at: int, cut: int, put: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes((TEXT[:at] + put + TEXT[at + cut :]).encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load(file), Profile)
    except ProfileError as error:
        assert all(len(line.splitlines()) == 1 for line in error.problems)
