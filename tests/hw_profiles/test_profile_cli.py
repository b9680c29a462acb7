"""`glm5 profiles`: what it prints and how it fails."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hw_profiles import dumps, load, names
from runtime.cli.profiles import app

BANDWIDTH = "chip.memory.bandwidth_bytes_per_s"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_list_has_a_row_a_profile() -> None:
    code, out, _ = run("list")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(names()) <= set(rows)
    assert "989" in rows["h200-sxm"] and "1979" in rows["h200-sxm"] and "450" in rows["h200-sxm"]


def test_list_json_is_null_where_nothing_is_known() -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--json")[1])["profiles"]}
    assert set(rows) == set(names())
    assert rows["h200-sxm"]["bf16_flops_per_s"] == 989e12
    assert rows["ascend-910c-die"]["fp8_flops_per_s"] is None
    assert rows["cambricon-mlu590"]["weakest_grade"] == "C"


def test_show_gives_every_figure_its_source() -> None:
    code, out, _ = run("show", "b300-sxm")
    assert code == 0
    for field in load("b300-sxm").figures:
        assert field in out
    assert "4500 TFLOP/s" in out and "Not a slip" in out and "Blackwell Ultra (HGX B300) datasheet" in out
    assert "link.scale_up.latency_s" in out.partition("absent")[2]


def test_show_json_with_an_override() -> None:
    shown = json.loads(run("show", "h200", "--set", f"{BANDWIDTH}=4e12", "--json")[1])
    figure = shown["figures"][BANDWIDTH]
    assert set(figure) == {"value", "unit", "range", "source", "date", "grade", "note"}
    assert (figure["value"], figure["unit"], figure["grade"]) == (4e12, "bytes/s", "user")
    assert shown["curves"]["efficiency.memory"]["size_unit"] == "bytes"
    assert "fp8-block" in shown["formats"]["weights"] and "link.scale_up.latency_s" in shown["absent"]


def test_diff_shows_the_ratio() -> None:
    rows = {row["field"]: row for row in json.loads(run("diff", "h100", "h200", "--json")[1])["fields"]}
    assert rows[BANDWIDTH]["ratio"] == pytest.approx(4.8 / 3.35)
    code, out, _ = run("diff", "h200", "ascend-910c-die")
    (line,) = (line for line in out.splitlines() if "fp8_flops" in line)
    assert code == 0 and line.split()[-2:] == ["-", "-"]


def test_check_accepts_every_shipped_profile() -> None:
    for name in names():
        assert run("check", name) == (0, f"OK {name}\n", "")


def test_check_prints_each_problem_on_a_line_and_exits_2(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    text = dumps(load("h200-sxm")).replace("value = 4800000000000.0", "value = -1").replace('"HBM3e"', "3")
    file.write_text(text, encoding="utf-8")
    code, out, err = run("check", str(file))
    assert (code, out) == (2, "")
    assert sorted(line.split(": ")[1] for line in err.splitlines()) == [BANDWIDTH, "chip.memory.kind"]
    code, out, _ = run("check", str(file), "--json")
    report = json.loads(out)
    assert code == 2 and not report["ok"] and len(report["problems"]) == 2


def test_check_reports_the_implausible(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(dumps(load("h200-sxm")).replace("150109106995.0", "160e9"), encoding="utf-8")
    code, _, err = run("check", str(file))
    assert code == 2 and "chip.memory.usable_bytes" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "h300"),
        ("show", "no/such.toml"),
        ("diff", "h200", "h300"),
        ("show", "h200", "--set", "nonsense"),
        ("show", "h200", "--set", f"{BANDWIDTH}=0"),
        ("show", "h200", "--set", "chip.memory.speed=3"),
        *[
            ("new", "no/my.toml", "--bf16", "1e14", "--memory", "8e10", "--bandwidth", "2e12", *more)
            for more in (
                ("--name", "a\nb"),
                ("--vendor", "a\x7fb"),
                ("--source", "\ud800"),
                ("--name", "x = 1\n[link]"),
            )
        ],
    ],
)
def test_an_expected_error_is_one_line_and_exit_2(arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
