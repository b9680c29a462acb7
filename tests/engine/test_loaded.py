"""As many programs are kept loaded as a backend says, and answers are the same with fewer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import registry
from backends.interface import Capabilities
from backends.loaded import LoadedPrograms
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.hf_config import from_hf
from runtime.execution.local.engine import LocalEngine
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Prompt
from tests.engine.conftest import SMALL, random_weights
from tests.engine.test_compiled import ONE_LAYER


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 5))
def test_what_was_not_used_for_longest_goes(asked: list[int], most: int) -> None:
    held, made = LoadedPrograms(most), []

    def make(key: int) -> Any:
        made.append(key)
        return lambda: key

    for at, key in enumerate(asked):
        before = len(made)
        assert held.get(key, lambda key=key: make(key))() == key
        recent = list(dict.fromkeys(reversed(asked[:at])))[:most]
        assert (len(made) > before) is (key not in recent)
        assert len(held) == min(most, len({*asked[: at + 1]}))
    assert held.made == len(made)


def test_one_that_cannot_be_made_leaves_the_others() -> None:
    held = LoadedPrograms(2)

    def fails() -> Any:
        raise RuntimeError("no")

    held.get("a", lambda: lambda: 1)
    with pytest.raises(RuntimeError):
        held.get("b", fails)
    assert held.get("a", fails)() == 1


@pytest.mark.slow
def test_answers_are_the_same_with_one_program_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "checkpoint", ONE_LAYER, random_weights(from_hf(ONE_LAYER)))
    prompts = [Prompt(tuple(range(5, 5 + length)), max_tokens=6) for length in (3, 20, 40)]
    backend = registry.usable("cpu")
    offered = backend.capabilities()

    def answered(most: int) -> tuple[LocalEngine, list[tuple[int, ...]]]:
        few: Capabilities = dataclasses.replace(offered, programs=most)
        monkeypatch.setattr(type(backend), "capabilities", lambda self: few)
        engine = load_engine(Checkpoint(tmp_path / "checkpoint"), backend, SMALL, "float32")
        return engine, [engine.generate([prompt])[0].token_ids for prompt in prompts]

    many, expected = answered(64)
    one, found = answered(1)
    assert found == expected
    assert one.programs.compiled > many.programs.compiled > 1 == one.programs.held
