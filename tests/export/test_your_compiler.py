"""docs/your_compiler.md: what it types is run, and what it says comes out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.cli import glm5

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "your_compiler.md"


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of the page's blocks."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        yield found[1], found[2]


def sessions(block: str) -> Iterator[tuple[str, str]]:
    """(command, what it prints) of a console block."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def expected(printed: str) -> re.Pattern[str]:
    return re.compile(re.escape(printed).replace(r"\.\.\.", ".*"), re.S)


def run(command: str) -> str:
    """What a command prints, in the folder that the page is tried in."""
    program, *words = shlex.split(command)
    if program == "glm5":
        done = glm5(*words)
        return done.out + done.err
    assert program == "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried = 0
    for language, block in blocks(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            (tmp_path / block.partition("\n")[0].removeprefix("# ")).write_text(block)
        for command, printed in sessions(block) if language == "console" else ():
            out = run(command)
            assert expected(printed).fullmatch(out), f"$ {command}\n{out}"
            tried += 1
    assert tried >= 8
    import onnxruntime as ort

    ort.InferenceSession("layer-0.onnx", providers=["CPUExecutionProvider"])
