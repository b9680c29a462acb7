"""What is written is no file that is read, and no other that is written; names with line ends stay in their line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.cli.app import command
from runtime.cli.outputs import WRITTEN
from tests.cli.cli import refused

LOAD = ["--model", "glm-4.7-flash", "--profile", "h200-sxm", "--isl", "100", "--osl", "10", "--concurrency", "1"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["simulate", "--plan", "a", "--html", "a"], "--html a is the file of --plan too; name another"),
        (["simulate", "--plan", "a", "--html", "./here/../a"], "--html here/../a is the file of --plan too"),
        (["simulate", "--plan", "a", "--html", "link"], "--html link is the file of --plan too"),
        (["simulate", *LOAD, "--trace", "new", "--html", "new"], "is the file of --trace too"),
        (["plan", *LOAD, "--out", "new", "--html", "new"], "is the file of --html too"),
        (["plan", *LOAD, "--expert-load", "a", "--out", "a"], "is the file of --expert-load too"),
        (["fit", "a", "--out", "a", "--profile", "h200-sxm"], "--out a is the file of"),
        (
            ["compare", "--formats", "fp8", "--profile", "h200-sxm", "--prompts", "a", "--html", "a"],
            "is the file of --prompts too",
        ),
        (
            ["calibrate", "--from", "a.prices.json", "--profile", "ascend-910c-die", "--out", "a.toml"],
            "--out a.prices.json is the file of --from too",
        ),
        (["run", "--prompts", "a", "--dump-logits", "a"], "is the file of --prompts too"),
        (
            ["choose", "--profiles", "h200-sxm", *LOAD[:2], *LOAD[4:], "--prices", "a", "--html", "a"],
            "is the file of --prices too",
        ),
        (["plan", "experts", "--load", "a", "--devices", "8", "--sglang", "a"], "is the file of --load too"),
    ],
)
def test_what_is_written_is_not_read(
    words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("kept")
    Path("here").mkdir()
    os.symlink("a", "link")
    os.symlink("a", "a.prices.json")
    assert text in refused(*words)
    assert Path("a").read_text() == "kept" and not Path("new").exists()


def test_each_option_that_is_written_is_one() -> None:
    """By its help: an option that writes a file is in the list."""
    group = command()
    verbs = [*group.commands.values(), *getattr(group.commands["plan"], "commands", {}).values()]
    written = {
        each.name
        for verb in verbs
        for each in verb.params
        if (getattr(each, "help", None) or "")
        .removeprefix("With sim: ")
        .lower()
        .startswith(("write", "store", "where to w"))
    }
    assert written and written <= set(WRITTEN)


def test_a_name_of_two_lines_is_refused_in_one(tmp_path: Path) -> None:
    odd = tmp_path / "a\nb.toml"
    odd.write_text("x = 1")
    line = refused("simulate", "--model", "glm-4.7-flash", "--profile", str(odd))
    assert "a\\nb.toml" in line and "\n" not in line
