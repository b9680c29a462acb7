"""What commands print: no figure cut at any width, nothing but text under NO_COLOR, quiet when the reader leaves."""

import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

from runtime.cli.terminal import Terminal
from tests.cli.cli import glm5

SIMULATE = "simulate --model glm-5-fp8 --profile h200-sxm --devices 8 --tp 8 --isl 1024 --osl 8 --concurrency 2"


def figures(text: str) -> Counter[str]:
    """Every word with a digit in it, and how often it is there."""
    return Counter(word.strip(",") for word in re.findall(r"\S*\d\S*", text))


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("columns", [80, 60, 34])
@pytest.mark.parametrize(
    "command",
    [
        "profiles list",
        "profiles show ascend-950pr",
        "profiles diff h200-sxm ascend-950pr",
        "model glm-5-fp8 --profile h200-sxm",
        SIMULATE + " --requests 4",
        "plan experts --load LOAD --devices 4 --slots 12",
    ],
)
def test_figures_are_whole(command: str, columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "load.npy", np.arange(1.0, 9.0)[None])
    words = command.replace("LOAD", str(tmp_path / "load.npy")).split()
    shown = {}
    for width in (400, columns):
        monkeypatch.setenv("COLUMNS", str(width))
        code, shown[width], err = glm5(*words)
        assert code == 0, err
    if "experts" in command:  # which says how long it took
        shown = {width: re.sub(r"\S+ s$", "", text.rstrip()) for width, text in shown.items()}
    wide, narrow = figures(shown[400]), figures(shown[columns])
    # a record repeats headings, so there may be more of a word, never less
    assert not wide - narrow
    assert "…" not in shown[columns]
    lines = shown[columns].split("\nsources\n")[0].splitlines()  # whose addresses stay in one piece
    assert all(len(line.rstrip()) <= columns for line in lines)


def _show(width: int, table: Table) -> str:
    out = io.StringIO()
    Terminal(file=out, width=width).print(table)
    return out.getvalue()


def _table() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("plan")
    table.add_column("tok/s", justify="right")
    table.add_column("within", justify="right")
    table.add_row("prefill tp4 and decode dp8", "1,234.5", "10.1 to 20.2")
    table.add_row("[bold]one[/] pool", "7.0", "")
    return table


def test_text_is_wrapped_before_rows_are_taken_apart() -> None:
    assert _show(60, _table()).splitlines()[1].rstrip() == "prefill tp4 and decode dp8  1,234.5  10.1 to 20.2"
    assert [line.rstrip() for line in _show(36, _table()).splitlines()] == [
        "plan             tok/s        within",
        "prefill tp4    1,234.5  10.1 to 20.2",
        "and decode",
        "dp8",
        "one pool           7.0",
    ]
    assert [line.rstrip() for line in _show(26, _table()).splitlines()] == [
        "prefill tp4 and decode dp8",
        "  tok/s 1,234.5",
        "  within 10.1 to 20.2",
        "one pool",
        "  tok/s 7.0",
    ]


@pytest.mark.parametrize("setting", ["1", "true"])
def test_no_color_means_text_alone(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in _show(60, _table())
    monkeypatch.setenv("NO_COLOR", setting)
    assert "\x1b" not in _show(60, _table())
    assert "\x1b" not in glm5("profiles", "list").out


@pytest.mark.parametrize("command", ["profiles list", "model glm-5 --json", "profiles show none"])
def test_a_reader_that_leaves_ends_it_quietly(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "runtime.cli.main", *command.split()],
            stdout=writer,
            stderr=writer if command.endswith("none") else subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == 141 and not done.stderr
