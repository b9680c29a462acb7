"""A run: killed and resumed it ends where it would have, to the bit; what goes wrong is one line and keeps the last
good state."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.safetensors_file import SafetensorsFile
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.training import config, metrics, state, steps, trainer
from runtime.training.params import named
from tests.cli.cli import refused
from tests.training import small


class Killed(BaseException):
    """What `kill -9` is to a process: no handler of the code under test sees it."""


LAST = ("sparse",)  # the stage that trains everything
FEWER = (  # layers: one of each kind, which is all that a run's states and files depend on
    ("num_hidden_layers = 3", "num_hidden_layers = 2"),
    ('indexer_types = ["full", "full", "shared"]', 'indexer_types = ["full", "shared"]'),
)
ALL = tuple(small.STAGES)


def short(folder: Path, *replacements: tuple[str, str]) -> Path:
    """The config of a run of one stage."""
    return small.write(folder, *FEWER, *replacements, stages=LAST)


def made(folder: Path, source: Path) -> Path:
    trainer.train(config.read(source), folder / "run", source)
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted, of one stage."""
    folder = tmp_path_factory.mktemp("whole")
    return made(folder, short(folder))


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted, of every stage."""
    folder = tmp_path_factory.mktemp("staged")
    return made(folder, small.write(folder))


def records(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "tokens_per_s"} for record in metrics.load(folder)]


def killed_and_resumed(folder: Path, after: int, *replacements: tuple[str, str], stages: tuple[str, ...]) -> Path:
    """A run that is killed when it reports a step past `after`, and then resumed."""
    source = small.write(folder, *replacements, stages=stages)
    read = config.read(source)

    def kill(step: int, record: dict[str, Any]) -> None:
        if step > after:
            raise Killed

    with pytest.raises(Killed):
        trainer.train(read, folder / "run", source, report=kill)
    assert not records(folder / "run") or records(folder / "run")[-1]["step"] < read.steps
    trainer.train(read, folder / "run", source, resume=True)
    return folder / "run"


def tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """What a file holds, to the bit. (How its header orders the metadata differs from one file to the next.)"""
    file = SafetensorsFile(path)
    return {name: (file.shape(name), file.dtype_name(name), file.array(name).tobytes()) for name in file.names}


def assert_same(ours: Path, theirs: Path) -> None:
    """Two runs that ended have the same parameters, moments, counters and weights, and said the same of every step."""
    assert records(ours) == records(theirs)
    for file in (state.FILE, f"{trainer.CHECKPOINT}/model.safetensors"):
        mine, wanted = (tensors(run / file) for run in (ours, theirs))
        assert mine == wanted, file


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path, after: int) -> None:
    """Killed before the first state, and past one with a record past it."""
    assert_same(killed_and_resumed(tmp_path, after, *FEWER, stages=LAST), whole)


@pytest.mark.slow
@pytest.mark.parametrize("after", [5, 9])
def test_a_killed_run_of_every_stage(staged: Path, tmp_path: Path, after: int) -> None:
    assert_same(killed_and_resumed(tmp_path, after, stages=ALL), staged)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "after"),
    [
        ('name = "muon"', 3),
        ('name = "adamw"\nweight_decay = 0.1\nclip = 0.5\nbalance_rate = 0.0', 3),
        ('name = "muon-split"\nweight_decay = 0.1\nrise = 0.3', 9),
    ],
)
def test_a_killed_run_of_any_optimizer(tmp_path: Path, options: str, after: int) -> None:
    """Saved at steps at which nothing else is reported, too."""
    given = (('name = "muon-split"', options), ("save_every = 4", "save_every = 3"))
    source = small.write(tmp_path / "whole", *given)
    trainer.train(config.read(source), tmp_path / "whole" / "run", source)
    assert_same(killed_and_resumed(tmp_path / "killed", after, *given, stages=ALL), tmp_path / "whole" / "run")


@pytest.mark.parametrize("optimizer", ["muon-split", "muon", "adamw"])
def test_a_state_comes_back_as_it_was(tmp_path: Path, optimizer: str) -> None:
    """Counters without dims too, as any reader of safetensors sees it."""
    read = config.read(small.write(tmp_path, ('name = "muon-split"', f'name = "{optimizer}"')))
    model = steps.initial_model(read.raw_model, read.seed)
    begun = steps.Optimizers(read, model).begin(model)
    rng = np.random.default_rng(7)

    def drawn(leaf: jax.Array) -> jax.Array:
        bits = rng.integers(1, 2**30, leaf.shape, np.int32)
        return jax.numpy.asarray(bits.view(np.float32) if leaf.dtype == np.float32 else bits)

    held = state.State(model, *jax.tree.map(drawn, (begun.main, begun.index)))
    state.write(tmp_path, held, 7, read.hash)
    found, done = state.read(tmp_path, begun, read.hash)
    assert done == 7
    ours, theirs = (jax.tree.leaves((named(s.model), s.main, s.index)) for s in (found, held))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.shape == wanted.shape and mine.dtype == wanted.dtype and mine.weak_type == wanted.weak_type
        assert np.asarray(mine).tobytes() == np.asarray(wanted).tobytes()
    stored = load_file(tmp_path / state.FILE)
    counts = [array for name, array in stored.items() if name.endswith("count")]
    assert counts and all(array.shape == () for array in counts)


def test_a_run_killed_before_its_last_checkpoint_has_it_when_resumed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an earlier stage left one."""
    folder, source = tmp_path / "run", short(tmp_path)
    shutil.copytree(whole, folder)
    (folder / trainer.CHECKPOINT / "model.safetensors").write_bytes(b"of an earlier stage")
    trainer.train(config.read(source), folder, source, resume=True)
    assert_same(folder, whole)


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
    other = short(tmp_path, ("hidden_size = 32", "hidden_size = 64"))
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
    source = short(tmp_path)
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
    assert not [file for file in folder.iterdir() if "tmp" in file.name]


def test_a_state_of_an_earlier_version_is_read(whole: Path, tmp_path: Path) -> None:
    """Which kept the heads of `q_b` in a dim of their own, and gave counters a dim."""
    read, stored = config.read(whole.parent / "small.toml"), load_file(whole / state.FILE)
    earlier = {name: a.reshape(16, 2, 16) if "params" in name and "q_b" in name else a for name, a in stored.items()}
    earlier = {name: a.reshape(1) if a.ndim == 0 else a for name, a in earlier.items()}
    save_file(earlier, tmp_path / state.FILE, {"step": "5", "config": read.hash})
    model = steps.initial_model(read.raw_model, seed=0)
    found, done = state.read(tmp_path, steps.Optimizers(read, model).begin(model), read.hash)
    assert done == 5
    state.write(tmp_path, found, done, read.hash)
    again = load_file(tmp_path / state.FILE)
    assert again.keys() == stored.keys()
    assert all(again[name].shape == a.shape and np.array_equal(again[name], a) for name, a in stored.items())


BROKEN: dict[str, Callable[[dict[str, np.ndarray], dict[str, str]], object]] = {
    "a step that is no number": lambda tensors, metadata: metadata.update(step="[4]"),
    "no step": lambda tensors, metadata: metadata.pop("step"),
    "a step before the first": lambda tensors, metadata: metadata.update(step="-4"),
    "a step of many digits": lambda tensors, metadata: metadata.update(step="9" * 5000),
    "no tensor": lambda tensors, metadata: tensors.pop(min(tensors)),
    "another type": lambda tensors, metadata: tensors.update({k: a.astype(np.float16) for k, a in tensors.items()}),
    "another size": lambda tensors, metadata: tensors.update({min(tensors): np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("what", ["not a state", "a folder", "a pipe", *BROKEN])
def test_a_broken_state_is_one_line(whole: Path, tmp_path: Path, what: str) -> None:
    source = short(tmp_path)
    path = tmp_path / "run" / state.FILE
    path.parent.mkdir()
    match what:
        case "not a state":
            path.write_bytes(b"not a state")
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case _:
            broken, metadata = load_file(whole / state.FILE), {"step": "4", "config": config.read(source).hash}
            BROKEN[what](broken, metadata)
            save_file(broken, path, metadata)
    said = refused("train", "--config", source, "--out", path.parent, "--resume")
    assert said.startswith(f"{path} cannot be read (") and said.endswith("; remove it to begin anew")


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
