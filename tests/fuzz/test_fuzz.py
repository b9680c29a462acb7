"""Whatever a file or a command line holds, it is taken, or refused in one line that names it: no traceback, no hang, no
memory without end. By seed; `python -m tests.fuzz.server KIND SEED` shows a case that failed, and its file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEW, MANY = 30, 150  # cases of a kind; more by `python -m tests.fuzz.server KIND FIRST LAST`
COSTLY = 12  # of one that opens a checkpoint, a tokenizer or a command, or starts a runtime, in place of the few
_CHEAP = (
    "quantised config", "plan", "manifest", "package weights", "training config", "engine", "profile", "prices",
    "trace", "expert load", "load", "placement", "measured rows", "prompts",
)  # fmt: skip
_COSTLY = (
    "config", "index", "safetensors", "tokenizer", "tokenizer config", "generation config", "template", "command",
)  # fmt: skip
KINDS: dict[str, int] = {
    **dict.fromkeys(_CHEAP, FEW),
    **dict.fromkeys(_COSTLY, COSTLY),
    "request": COSTLY,  # more in tests/api
    **{"onnx graph": FEW, "torch graph": COSTLY, "stablehlo graphs": 1},
}
AT_ONCE = {"stablehlo graphs": 25}  # cases in a case, `graphs.AT_ONCE`
Run = Callable[..., list[tuple[int, str]]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    command = [sys.executable, "-m", "tests.fuzz.server"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin and server.stdout
        asked, answers = server.stdin, server.stdout

        def run(kind: str, first: int, last: int, seconds: float = 20.0) -> list[tuple[int, str]]:
            asked.write(f"{kind}\t{first}\t{last}\t{seconds}\n")
            asked.flush()
            return [(seed, what) for seed, what in json.loads(answers.readline())]

        yield run
        asked.close()


def told(kind: str, wrong: list[tuple[int, str]]) -> str:
    lines = [f"{kind} {seed}: {what}" for seed, what in wrong[:20]]
    return "\n".join([f"{len(wrong)} cases", *lines])


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_taken_or_refused(run: Run, kind: str) -> None:
    wrong = run(kind, 0, KINDS[kind])
    assert not wrong, told(kind, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_taken_or_refused(run: Run, kind: str) -> None:
    wrong = run(kind, KINDS[kind], MANY // AT_ONCE.get(kind, 1))
    assert not wrong, told(kind, wrong)


def test_the_judge_sees_what_it_looks_for(run: Run) -> None:
    """A kind for each thing that may go wrong."""
    found = {seed: what for seed, what in run("the judge", 0, 8, 0.5)}
    assert found.keys() == {1, 2, 3, 4, 5, 6, 7}
    assert found[1].startswith("ZeroDivisionError at ?") and found[2].startswith("MemoryError")
    assert found[3] == "hangs" and found[4] == "ends the process, SIGSEGV"
    assert found[5].startswith("not one line") and found[6].startswith("does not name") and found[7] == "left more"
