"""Ctrl-C: "interrupted" and 130 from the first moment, in every verb, whatever runs; nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import small as training

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

# Interrupts itself where `sys.argv[1]` says, in code that goes on whatever is raised in it.
STUCK = """
import os, signal, sys, time

def stuck(*_):
    os.kill(os.getpid(), signal.SIGINT)
    try:
        time.sleep(1000)
    except BaseException:
        time.sleep(1000)

class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            stuck()

moment = sys.argv.pop(1)
sys.meta_path.insert(0, AtImport())
from runtime.cli.main import main
if moment == "shards":
    from runtime.porting import quantize
    quantize._write_config = stuck
if moment == "name":
    import os as _os
    real = _os.replace
    _os.replace = lambda *paths: (os.kill(os.getpid(), signal.SIGINT), time.sleep(1), real(*paths))
try:
    main()
finally:
    if moment == "name":
        time.sleep(1000)  # whoever answers may be late
"""


def interrupted(*words: object, start: Callable[[], object] | None = None) -> subprocess.CompletedProcess[str]:
    def as_in_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.run(
        [sys.executable, "-c", STUCK, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600,
        preexec_fn=start or as_in_a_terminal,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        ("typing", ("backends",)),  # what is imported first of all
        ("typer", ("profiles", "list")),
        ("runtime.serving", ("simulate",)),
        ("runtime.planning.search", ("plan",)),
        ("runtime.porting.compare", ("compare", "--profile", "h200-sxm")),
        ("runtime.training.evaluate", ("eval",)),
        ("runtime.training.trainer", ("train", "--out", "run")),
    ],
)
def test_at_any_moment(moment: str, words: tuple[str, ...]) -> None:
    done = interrupted(moment, *words)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "glm5: interrupted\n")


def test_what_is_half_written_is_removed(tmp_path: Path) -> None:
    done = interrupted("shards", "quantize", "--formats", "fp8", "--out", tmp_path / "new" / "q")
    assert (done.returncode, done.stderr) == (130, "glm5: interrupted\n")
    assert not [path for path in tmp_path.rglob("*") if path.name != "new"]


def test_what_takes_its_name_is_whole(tmp_path: Path) -> None:
    words = ("simulate", "--requests", 10, "--isl", 64, "--osl", 8, "--trace", tmp_path / "trace.json")
    done = interrupted("name", *words)
    assert (done.returncode, done.stderr) == (130, "glm5: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_where_it_is_ignored_it_stays_so() -> None:
    """As a shell has it for what runs behind `&`."""
    quick = STUCK.replace("time.sleep(1000)", "pass")
    done = subprocess.run(
        [sys.executable, "-c", quick, "typer", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=600,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("glm5 ")


@pytest.mark.slow
def test_a_training_run_goes_on_from_its_last_state(tmp_path: Path) -> None:
    source, folder = training.write(tmp_path, stages=("sparse",)), tmp_path / "run"
    command = [sys.executable, "-m", "runtime.cli.main", "train", "--config", source, "--out", folder, "--json"]
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert running.stdout is not None
    running.stdout.readline()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=300)
    assert (running.returncode, err) == (130, "glm5: interrupted\n")
    assert not [path for path in folder.rglob(".*")]
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and (folder / "checkpoint" / "config.json").exists(), done.stderr
