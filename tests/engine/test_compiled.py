"""What was compiled is found again: by the next start of the same, by nobody else, and only in one's own folder."""

from __future__ import annotations

import collections
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from backends import compiled, registry
from backends.interface import Artifact, Backend, Program
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.hf_config import from_hf
from runtime.execution.local.engine import LocalEngine
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Prompt
from tests.engine.conftest import GQA, SMALL, random_weights

ONE_LAYER = {**GQA, "num_hidden_layers": 1, "num_nextn_predict_layers": 0}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """A folder that is open for this test."""
    names = ("dir", "min_compile_time_secs", "min_entry_size_bytes")
    names = tuple(f"jax_{'compilation' if name == 'dir' else 'persistent'}_cache_{name}" for name in names)
    before = {name: getattr(jax.config, name) for name in names}
    compiled.keep_in(tmp_path / "kept")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a test's programs are small
    yield tmp_path / "kept"
    compiled.keep_nothing()
    for name, value in before.items():
        jax.config.update(name, value)


class Counts:
    """Programs exported, and what JAX's cache was asked for, since the last look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._seen: collections.Counter[str] = collections.Counter()
        jax.monitoring.register_event_listener(self._heard)
        export = type(registry.get("cpu")).export

        def counted(backend: Backend, program: Program) -> Artifact:
            self._seen["exported"] += 1
            return export(backend, program)

        monkeypatch.setattr(type(registry.get("cpu")), "export", counted)

    def _heard(self, event: str, **_: Any) -> None:
        self._seen[event.rpartition("/")[2]] += 1

    def look(self) -> tuple[int, int, int]:
        """Exported, compiled, found compiled."""
        seen = self._seen.copy()
        self._seen.clear()
        return seen["exported"], seen["cache_misses"], seen["cache_hits"]


def started(checkpoint: Path) -> tuple[LocalEngine, tuple[int, ...]]:
    engine = load_engine(Checkpoint(checkpoint), registry.usable("cpu"), SMALL, "float32")
    (answer,) = engine.generate([Prompt(tuple(range(9, 25)), max_tokens=3)])
    return engine, answer.token_ids


def test_the_second_start_compiles_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, counts = kept.parent / "checkpoint", Counts(monkeypatch)
    save(checkpoint, ONE_LAYER, random_weights(from_hf(ONE_LAYER)))
    engine, first = started(checkpoint)
    exported, missed, _ = counts.look()
    assert exported == engine.programs.compiled and missed >= exported
    _, second = started(checkpoint)
    exported, missed, found = counts.look()
    assert (exported, missed) == (0, 0) and found >= engine.programs.compiled
    assert second == first
    for each in (kept / "exported").iterdir():  # a start that was killed while it wrote, say
        each.write_bytes(each.read_bytes()[:-9])
    _, third = started(checkpoint)
    assert counts.look()[:2] == (engine.programs.compiled, 0) and third == first


def test_whatever_decides_a_program_makes_it_another(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, counts = registry.usable("cpu"), Counts(monkeypatch)

    def program(shape: tuple[int, ...] = (3,), dtype: str = "float32", **given: Any) -> Program:
        return Program(given.pop("name", "p"), lambda x: x * 2, (jax.ShapeDtypeStruct(shape, dtype),), **given)

    asked: list[tuple[Program, str]] = [
        (program(), "a"), (program(), "b"), (program((4,)), "a"), (program(dtype="bfloat16"), "a"),
        (program(donate=(0,)), "a"), (program(optimise=False), "a"), (program(name="q"), "a"),
    ]  # fmt: skip
    made = [compiled.exported(backend, *each) for each in asked]
    assert counts.look()[0] == len(asked)
    assert [compiled.exported(backend, *each) for each in asked] == made
    assert counts.look()[0] == 0
    monkeypatch.setattr(compiled, "_code", lambda: "another release")
    compiled.exported(backend, *asked[0])
    assert counts.look()[0] == 1


def test_a_folder_that_others_could_write_to_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, words: str) -> None:
        before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        with pytest.raises(UsageError, match=words) as error:
            compiled.keep_in(folder)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"--compile-cache {folder}: ")
        assert jax.config.jax_compilation_cache_dir == before  # type: ignore[attr-defined]

    for mode in (0o777, 0o770, 0o722, 0o1777):
        (tmp_path / "open").mkdir(exist_ok=True)
        (tmp_path / "open").chmod(mode)
        refused(tmp_path / "open", "others may write")
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "own").mkdir(mode=0o700)
    refused(tmp_path / "open" / "own", f"others may write to {tmp_path / 'open'},")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "File exists")
    refused(tmp_path / "file" / "below", "Not a directory")
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    refused(own, "belongs to another user")


def test_a_folder_is_made_for_its_user_alone_and_does_not_grow_for_ever(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (kept, kept / "exported"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for age, name in enumerate(("newest", "middle", "exported/oldest")):
        (kept / name).write_bytes(bytes(100))
        os.utime(kept / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compiled, "MOST_BYTES", 250)
    compiled.keep_in(kept)
    assert {path.name for path in kept.rglob("*") if path.is_file()} == {"newest", "middle"}
