"""A run: in step, killed and resumed, it ends where it would have to the bit; apart, a lost process is replaced and no
group is trained on twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from backends.registry import usable
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.module import Model
from runtime.training import metrics, state
from runtime.training.params import named
from runtime.training.rl import config, generators, trainer
from runtime.training.rl.episodes import Episode
from runtime.training.rl.generators import Apart
from runtime.training.rl.learner import LEARNS
from tests.cli.cli import refused
from tests.training.test_rl_rollouts import checkpoint as checkpoint
from tests.training.test_trainer import Killed

TEXT = """save_every = 2
questions = 4
[schedule]
mode = "sync"
[generation]
max_tokens = 4
running = 8
[[stage]]
steps = 4
groups = 2
group_size = 4
length = 32
decay = 0.5
tasks = { arithmetic = 1.0 }
"""
SECOND = """
[[stage]]
steps = 2
imitate = 2
groups = 2
group_size = 4
length = 32
tasks = { arithmetic = 1.0, copy = 1.0 }
objective = { correction = "none", distill = 0.1 }
"""


@pytest.fixture(autouse=True)
def rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was taught nothing is never right: here an answer is worth something by chance of its ids."""
    say = Episode.say

    def said(self: Episode, ids: Any, *rest: Any) -> bool:
        goes_on = say(self, ids, *rest)
        self.reward = float(sum(ids) % 2)
        return goes_on

    monkeypatch.setattr(Episode, "say", said)


def written(folder: Path, *replacements: tuple[str, str], more: str = "") -> Path:
    text = TEXT + more
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rl.toml").write_text(text)
    return folder / "rl.toml"


def run(source: Path, checkpoint: Path, resume: bool = False, report: Any = lambda step, record: None) -> Path:
    read = config.read(source)
    trainer.train(read, Checkpoint(checkpoint), usable("cpu"), source.parent / "run", source, resume, report)
    return source.parent / "run"


def same(one: Path, other: Path) -> None:
    for file in (state.FILE, "checkpoint/model.safetensors"):
        left, right = load_file(one / file), load_file(other / file)
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def killed_and_resumed(source: Path, checkpoint: Path, after: int) -> Path:
    def kill(step: int, record: dict[str, Any]) -> None:
        if step > after:
            raise Killed

    with pytest.raises(Killed):
        run(source, checkpoint, report=kill)
    return run(source, checkpoint, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replaced", "more", "after"),
    [
        ((), "", 0),
        (('mode = "sync"', 'mode = "sync"\nlag = 2'), "", 3),
        ((), SECOND, 6),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path: Path, checkpoint: Path, replaced: tuple[str, str], more: str, after: int
) -> None:
    changes = [replaced] if replaced else []
    whole = run(written(tmp_path / "whole", *changes, more=more), checkpoint)
    again = killed_and_resumed(written(tmp_path / "again", *changes, more=more), checkpoint, after)
    same(whole, again)
    told = [{k: v for k, v in r.items() if not k.endswith("_s")} for r in metrics.load(whole)]
    assert told == [{k: v for k, v in r.items() if not k.endswith("_s")} for r in metrics.load(again)]


@pytest.mark.slow
def test_what_a_run_changes_and_says(tmp_path: Path, checkpoint: Path) -> None:
    folder = run(written(tmp_path), checkpoint)
    before, after = Model.load(checkpoint), Model.load(folder / "checkpoint")
    moved = {name for name, a in named(after).items() if (np.asarray(a) != np.asarray(named(before)[name])).any()}
    assert moved and moved <= set(named(before, LEARNS))
    assert not any("index" in name or "router_bias" in name or name.startswith("mtp") for name in moved)
    first, *records = metrics.load(folder)
    assert first["step"] == 0 and set(first["held_out"]) == {"arithmetic"}
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all(r["behind"] == 0 and r["gap_max"] < 1e-4 for r in records), "in step, the two agree"
    assert set(records[-1]["held_out"]) == {"arithmetic"}
    assert "Held-out questions" in (folder / metrics.PAGE).read_text()


@pytest.mark.slow
def test_replaying_what_the_learner_would_choose_changes_nothing(tmp_path: Path, checkpoint: Path) -> None:
    """In step and in one number format, to the bit; the questions are longer than what an indexer selects."""
    replays = ("max_tokens = 4", 'max_tokens = 4\nreplay = "all"')
    same(run(written(tmp_path / "plain"), checkpoint), run(written(tmp_path / "replayed", replays), checkpoint))


@pytest.mark.slow
def test_lag_is_what_the_tokens_say(tmp_path: Path, checkpoint: Path) -> None:
    _, *records = metrics.load(run(written(tmp_path, ('mode = "sync"', 'mode = "sync"\nlag = 2')), checkpoint))
    assert [r["behind"] for r in records] == [0, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ['mode = "ahead"', 'mode = "async"\nstaleness = 2'])
def test_a_process_of_its_own(tmp_path: Path, checkpoint: Path, mode: str) -> None:
    """What begins is bounded, whatever comes first; killed once, it is replaced, and every group is trained on once."""
    trained: list[int] = []
    taken, killed = trainer.batch, []

    def told(groups: Any, *rest: Any) -> Any:
        trained.extend(group.number for group in groups)
        return taken(groups, *rest)

    def kill_once(step: int, record: dict[str, Any]) -> None:
        if not killed:
            killed.append(step)
            process = started[-1]._process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)

    started: list[Apart] = []
    begin = generators.Apart.__init__

    def remember(self: Apart, *given: Any) -> None:
        begin(self, *given)
        started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "batch", told)
        patch.setattr(generators.Apart, "__init__", remember)
        folder = run(written(tmp_path, ('mode = "sync"', mode)), checkpoint, report=kill_once)
    assert killed and sorted(trained) == list(range(8))
    _, *records = metrics.load(folder)
    assert max(r["behind_most"] for r in records) <= (1 if "ahead" in mode else 2)
    assert started[0]._process is None, "nobody is left behind"


@pytest.mark.slow
def test_a_process_that_cannot_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    source = written(tmp_path, ('mode = "sync"', 'mode = "ahead"'))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match="3 times in a row: see"):
        patch.setattr(generators.sys, "executable", "/bin/false")
        run(source, checkpoint)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, checkpoint: Path) -> None:
    source = written(tmp_path)
    with pytest.raises(UsageError, match="holds no run"):
        run(source, checkpoint, resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / state.FILE).write_bytes(b"nothing")
    with pytest.raises(UsageError, match="holds a run already"):
        run(source, checkpoint)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "rl.toml").write_text("[[stage]]\nsteps = 1\n")
    assert "missing key `tasks`" in refused("rl", "--config", str(tmp_path / "rl.toml"), "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
