"""A run: killed and resumed it ends where it would have; what goes wrong is one line and keeps the last good state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.training import config, metrics, state, steps, trainer
from tests.cli.cli import refused
from tests.training import small


class Killed(BaseException):
    """What `kill -9` is to a process: no handler of the code under test sees it."""


LAST = ("sparse",)  # the stage that trains everything
ALL = tuple(small.STAGES)


def made(folder: Path, stages: tuple[str, ...]) -> Path:
    source = small.write(folder, stages=stages)
    trainer.train(config.read(source), folder / "run", source)
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted, of one stage."""
    return made(tmp_path_factory.mktemp("whole"), LAST)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted, of every stage."""
    return made(tmp_path_factory.mktemp("staged"), ALL)


def records(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "tokens_per_s"} for record in metrics.load(folder)]


def numbers(found: Any) -> list[float]:
    """Every number in records, in order."""
    if isinstance(found, dict | list):
        return [n for each in (found.values() if isinstance(found, dict) else found) for n in numbers(each)]
    return [] if isinstance(found, str) else [float(found)]


@pytest.mark.parametrize(
    ("run", "after"),
    [("whole", 1), ("whole", 3), *(pytest.param("staged", after, marks=pytest.mark.slow) for after in (1, 5, 9))],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    request: pytest.FixtureRequest, tmp_path: Path, run: str, after: int
) -> None:
    """Killed before the first state and past one, in each kind of stage, with a record past the last state."""
    whole: Path = request.getfixturevalue(run)
    often = [("save_every = 4", "save_every = 2")] if run == "whole" else []
    source = small.write(tmp_path, *often, stages=LAST if run == "whole" else ALL)
    read = config.read(source)

    def kill(step: int, record: dict[str, Any]) -> None:
        if step > after:
            raise Killed

    with pytest.raises(Killed):
        trainer.train(read, tmp_path / "run", source, report=kill)
    assert not records(tmp_path / "run") or records(tmp_path / "run")[-1]["step"] < read.steps
    trainer.train(read, tmp_path / "run", source, resume=True)
    for ours, theirs in zip(numbers(records(tmp_path / "run")), numbers(records(whole)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)  # threads sum in no fixed order: measured 1e-7
    ours, theirs = (load_file(folder / "run" / state.FILE) for folder in (tmp_path, whole.parent))
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[name], theirs[name], atol=1e-3) for name in ours if ".params" in name)


def test_the_checkpoint_opens_and_speaks(whole: Path) -> None:
    opened = Checkpoint(whole / trainer.CHECKPOINT)
    tokenizer = Tokenizer.load(opened.path)
    assert opened.has_mtp and tokenizer.vocab_size == opened.config.vocab_size
    assert tokenizer.stop_token_ids == opened.config.eos_token_ids
    text = ChatTemplate.load(opened.path).render([{"role": "user", "content": "1+1="}])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "not a language model to use" in (opened.path / "README.md").read_text()
    assert opened.load("bfloat16")["mtp"]


@pytest.mark.slow
def test_what_a_run_says(staged: Path) -> None:
    found = metrics.load(staged)
    assert [record["step"] for record in found] == [2, 4, 6, 7, 8, 10, 12]
    assert [record["stage"] for record in found] == ["dense"] * 2 + ["warmup"] * 2 + ["sparse"] * 3
    for record in found:
        assert record["loss"] > 0 and record["logit_max"] > 0 and record["load_ratio"] >= 1
        assert set(record["task_loss"]) <= {"recall", "arithmetic", "copy", "tools", "sentences"}
        assert 0 <= record["index_recall"] <= 1
    assert found[0]["index_loss"] == 0 and found[3]["index_loss"] > 0 and found[-1]["draft_loss"] > 0
    page = (staged / metrics.PAGE).read_text()
    for heading in ("by task", "attention logit", "Expert load", "Indexer recall"):
        assert heading in page


def test_a_folder_with_a_run_is_not_overwritten(whole: Path, tmp_path: Path) -> None:
    source = whole.parent / "small.toml"
    before = (whole / state.FILE).read_bytes()
    assert "holds a run already; --resume continues it" in refused("train", "--config", source, "--out", whole)
    other = small.write(tmp_path, ("hidden_size = 32", "hidden_size = 64"), stages=LAST)
    assert "run of another config" in refused("train", "--config", other, "--out", whole, "--resume")
    assert (whole / state.FILE).read_bytes() == before


def test_what_is_not_there_is_not_resumed(tmp_path: Path) -> None:
    source = small.write(tmp_path)
    line = refused("train", "--config", source, "--out", tmp_path / "run", "--resume")
    assert line == f"--resume: {tmp_path / 'run'} holds no run; leave it out to begin one there"
    assert not (tmp_path / "run").exists()


def test_a_finished_run_may_be_resumed(whole: Path) -> None:
    source = whole.parent / "small.toml"
    before = records(whole)
    trainer.train(config.read(source), whole, source, resume=True)
    assert records(whole) == before  # read back, not made again


def test_a_full_disk_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small.write(tmp_path, stages=LAST)
    read, folder = config.read(source), tmp_path / "run"
    plain, writes = Path.write_bytes, 0

    def fills_up(self: Path, data: bytes) -> int:
        nonlocal writes
        writes += state.FILE in self.name
        if writes == 2:
            plain(self, data[:100])
            raise OSError(28, "No space left on device")
        return plain(self, data)

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        trainer.train(read, folder, source)
    monkeypatch.undo()
    model = steps.initial_model(read.raw_model, read.seed)
    like = steps.Optimizers(read, model).begin(model)
    assert state.read(folder, like, read.hash)[1] == 4  # the state of the first save
    assert not [file for file in folder.iterdir() if file.name.endswith(".tmp")]


def test_a_state_of_an_earlier_version_is_read(whole: Path, tmp_path: Path) -> None:
    """Which kept the heads of `q_b` in a dim of their own."""
    read, stored = config.read(whole.parent / "small.toml"), load_file(whole / state.FILE)
    earlier = {name: a.reshape(16, 2, 16) if "params" in name and "q_b" in name else a for name, a in stored.items()}
    save_file(earlier, tmp_path / state.FILE, {"step": "5", "config": read.hash})
    model = steps.initial_model(read.raw_model, seed=0)
    found, done = state.read(tmp_path, steps.Optimizers(read, model).begin(model), read.hash)
    assert done == 5
    state.write(tmp_path, found, done, read.hash)
    again = load_file(tmp_path / state.FILE)
    assert again.keys() == stored.keys() and all(np.array_equal(again[name], stored[name]) for name in stored)


def test_a_broken_state_is_one_line(tmp_path: Path) -> None:
    source = small.write(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / state.FILE).write_bytes(b"not a state")
    assert "cannot be read" in refused("train", "--config", source, "--out", folder, "--resume")


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    source = small.write(tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("train", "--config", source, "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 3", "sead = 3", "unknown key `sead`; it takes model, optimizer, stage, seed"),
        ("seed = 3", "seed = -1", "`seed` must be a whole number, 0 or more, not -1"),
        ("hidden_size = 32", "hiden_size = 32", "[model]: unknown key `hiden_size`"),
        ("q_lora_rank = 16", "", "missing field `q_lora_rank`"),
        ('name = "muon-split"', 'name = "sgd"', "`name` must be 'muon-split' or 'muon' or 'adamw', not 'sgd'"),
        ('name = "muon-split"', "momentum = 0.9", "[optimizer]: unknown key `momentum`; it takes name, matrix_rate"),
        ('name = "muon-split"', "matrix_rate = -1.0", "`matrix_rate` must be above 0"),
        ('name = "muon-split"', "rise = 0.9", "`rise` + `fall` = 0.9 + 0.4 must lie between 0 and 1"),
        ("steps = 4", "", "[[stage]] 1: missing key `steps`"),
        ("steps = 4", "steps = 0", "[[stage]] 1: `steps` must be at least 1, not 0"),
        ("steps = 4", "steps = 4.5", "[[stage]] 1: `steps` must be int, not 4.5"),
        ("steps = 4", "step = 4", "[[stage]] 1: unknown key `step`; it takes attention, steps, rows"),
        ('name = "muon-split"', "clip = inf", "[optimizer]: `clip` must be a finite number, not inf"),
        ("steps = 4", "steps = 4\nmix = { copy = 'x' }", "[[stage]] 1: `mix.copy` must be a number, not 'x'"),
        ("steps = 4", "steps = 4\nmix = { poetry = 1.0 }", "`mix` has no task 'poetry'"),
        ('attention = "warmup"', 'attention = "warm"', "must be 'dense' or 'warmup' or 'sparse', not 'warm'"),
        ("draft_weight = 0.3", "draft_rows = 9", "Cannot overwrite a value"),
        ("length = 32\ndraft_rows = 2\n\n", "length = 8\n\n", "[[stage]] 2: `length` 8 must exceed `index_topk` 8"),
        ("max_position_embeddings = 256", "max_position_embeddings = 16", "exceeds `max_position_embeddings` 16"),
        ("[optimizer]", "[optimizer", "not valid TOML"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_meant(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert said in refused("train", "--config", small.write(tmp_path, (old, new)), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_config(tmp_path: Path) -> None:
    assert "No such file" in refused("train", "--config", tmp_path / "none.toml", "--out", tmp_path / "run")


def test_the_hash_is_of_what_decides_the_weights(tmp_path: Path) -> None:
    plain = config.read(small.write(tmp_path))
    same = config.read(small.write(tmp_path, ("save_every = 4", "save_every = 5")))
    other = config.read(small.write(tmp_path, ("steps = 5", "steps = 6")))
    assert plain.hash == same.hash != other.hash
    assert json.dumps(plain.raw_model)
