"""Finding, reading and overriding profiles: what a caller of `hw_profiles` relies on."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles import (
    FIELDS,
    RATE_OF_SCHEME,
    WEIGHT_SCHEMES,
    Curve,
    InvalidOverride,
    InvalidProfile,
    MissingFigure,
    UnknownProfile,
    dumps,
    is_profile_path,
    load,
    names,
    parse_override,
    weakest,
)
from hw_profiles.loader import ALIASES

ROOT = Path(__file__).parents[2]
BANDWIDTH = "chip.memory.bandwidth_bytes_per_s"


def test_needs_the_standard_library_only() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    code += "; import hw_profiles; print(hw_profiles.load('h200').name)"
    bare = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(bare, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "h200-sxm"


def test_aliases_lead_to_shipped_profiles() -> None:
    assert load("h20-sxm").name == "h20-96gb"
    for alias, name in ALIASES.items():
        assert alias not in names()
        assert load(alias).name == name


def test_a_file_loads_by_path(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_text(dumps(load("b300-sxm")), encoding="utf-8")
    assert load(copy) == load(str(copy)) == load("b300-sxm")


@pytest.mark.parametrize("name", names())
def test_writing_a_profile_loses_nothing(name: str, tmp_path: Path) -> None:
    profile = load(name, {BANDWIDTH: 1e12, "efficiency.memory": 0.5, "chip.memory.kind": 'odd "kind" \\ Ω'})
    file = tmp_path / "p.toml"
    file.write_text(dumps(profile), encoding="utf-8")
    assert load(file) == profile


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h200_sxm", ("h200_sxm", "did you mean h200-sxm")),
        ("zebra", ("zebra", "shipped are", "ascend-910c-die")),
        ("no/such.toml", ("no/such.toml", "no such file")),
        ("", ("no profile named",)),
    ],
)
def test_an_unknown_name_is_one_helpful_line(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UnknownProfile) as caught:
        load(name)
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_a_missing_figure_says_how_to_supply_it() -> None:
    with pytest.raises(MissingFigure) as caught:
        load("ascend-910c-die").require("chip.peak.fp8_flops_per_s")
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert "ascend-910c-die" in line and "--set chip.peak.fp8_flops_per_s=" in line and "FLOP/s" in line


def test_a_missing_curve_says_how_to_supply_it() -> None:
    with pytest.raises(MissingFigure, match="--set efficiency.network="):
        load("cpu-host").curve("efficiency.network")


def test_supplying_a_missing_figure_helps() -> None:
    field = "chip.peak.fp8_flops_per_s"
    figure = load("ascend-910c-die", {field: 7e14}).require(field)
    assert (figure.value, figure.grade, figure.evidence) == (7e14, "user", "assumed")


def test_a_misspelt_field_in_code_is_a_bug_not_an_absence() -> None:
    with pytest.raises(KeyError, match="did you mean chip.memory.bandwidth_bytes_per_s"):
        load("h200-sxm").get("chip.memory.bandwith_bytes_per_s")


def test_an_override_changes_that_figure_alone() -> None:
    plain, changed = load("h200-sxm"), load("h200-sxm", {BANDWIDTH: 4e12})
    assert changed.value(BANDWIDTH) == 4e12
    assert {k for k in plain.figures if plain.figures[k] != changed.figures[k]} == {BANDWIDTH}
    assert plain.value(BANDWIDTH) == 4.8e12
    assert changed.weakest_grade == "user"


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        (BANDWIDTH, -1.0, "greater than 0"),
        (BANDWIDTH, float("nan"), "finite"),
        (BANDWIDTH, 1e15, "between"),
        (BANDWIDTH, "fast", "number"),
        ("chip.peak.bf16_flops_per_s", 2e17, "between"),
        ("chip.memory.capacity_bytes", 2e13, "between"),
        ("efficiency.memory", 1.2, "at most 1"),
        ("link.scale_up.topology", "star", "one of switch"),
        ("link.scale_up.domain_devices", 7.5, "whole"),
        ("chip.memory.bandwith_bytes_per_s", 1e12, "did you mean chip.memory.bandwidth_bytes_per_s"),
        ("formats.weights", "bf16", "no such field"),
    ],
)
def test_a_bad_override_is_one_line_naming_the_field(field: str, value: float | str, word: str) -> None:
    with pytest.raises(InvalidOverride) as caught:
        load("h200-sxm", {field: value})
    assert len(str(caught.value).splitlines()) == 1
    assert field in str(caught.value) and word in str(caught.value)


def test_override_text() -> None:
    assert parse_override(f"{BANDWIDTH} = 4.0e12") == (BANDWIDTH, 4e12)
    assert parse_override("link.scale_up.topology=switch") == ("link.scale_up.topology", "switch")
    for text in ("", "=", "a=", "=3", "chip.peak"):
        with pytest.raises(InvalidOverride, match="field=value"):
            parse_override(text)


def test_profile_fields_are_told_from_model_fields() -> None:
    assert all(is_profile_path(field) for field in FIELDS)
    assert not is_profile_path("model.index_topk")


def test_every_weight_scheme_has_a_rate() -> None:
    assert set(RATE_OF_SCHEME) == set(WEIGHT_SCHEMES)
    for rate in RATE_OF_SCHEME.values():
        assert f"chip.peak.{rate}_flops_per_s" in FIELDS


def test_grades_go_from_measured_to_user() -> None:
    assert weakest(["A", "C", "B"]) == "C"
    assert weakest(["measured", "A"]) == "A"
    assert weakest(["C", "user"]) == "user"
    assert weakest([]) == "measured"


def curve(*knots: tuple[float, float]) -> Curve:
    return Curve(knots, "bytes", "here", "2026", "B")


def test_a_curve_is_linear_in_the_log_of_the_size() -> None:
    steps = curve((1e4, 0.2), (1e6, 0.6), (1e7, 0.8))
    assert steps.at(1e5) == pytest.approx(0.4)
    assert steps.at(1e6) == 0.6
    assert steps.at(1) == steps.at(0) == 0.2
    assert steps.at(1e12) == 0.8
    assert curve((1, 0.7)).at(5e9) == 0.7


@given(
    st.dictionaries(st.floats(1, 1e15), st.floats(0.01, 1), min_size=1, max_size=6),
    st.floats(0, 1e16),
)
def test_a_curve_stays_between_its_knots(knots: dict[float, float], size: float) -> None:
    share = curve(*sorted(knots.items())).at(size)
    assert min(knots.values()) * (1 - 1e-9) <= share <= max(knots.values()) * (1 + 1e-9)


def test_prices_are_a_file_below_the_folder_of_the_profile(tmp_path: Path) -> None:
    """Links too: a profile that was sent opens nothing but what came with it."""
    folder, outside = tmp_path / "sent", tmp_path / "prices.json"
    (folder / "more").mkdir(parents=True)
    outside.write_text("{}")
    named = 'prices = "PATH"\n' + (ROOT / "hw_profiles/profiles/h200-sxm.toml").read_text()
    (folder / "link.json").symlink_to(outside)
    (folder / "more" / "own.json").write_text("{}")
    (folder / "near.json").symlink_to("more/own.json")
    for path, wrong in (("link.json", "leads out of the folder"), ("more", "no regular file")):
        (folder / "chip.toml").write_text(named.replace("PATH", path))
        with pytest.raises(InvalidProfile, match=wrong):
            load(folder / "chip.toml")
    for path in ("more/own.json", "near.json", "./more/own.json", "absent.json"):
        (folder / "chip.toml").write_text(named.replace("PATH", path))
        assert load(folder / "chip.toml").prices_path == folder / path
