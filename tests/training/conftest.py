"""A small config and its first model, once a session; what runs of a config compute alike is made once, too."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest

from model.module import Model
from runtime.training import config, export, steps
from runtime.training.config import TrainConfig
from tests.training import small


@pytest.fixture(scope="package", autouse=True)
def made_once() -> Iterator[None]:
    """Runs of the same config share its tokenizer and the tracing of its steps, which are all that they cost."""
    kept: dict[Hashable, Any] = {}

    def once(make: Callable[..., Any], key: Callable[..., Hashable]) -> Callable[..., Any]:
        def found(*given: Any) -> Any:
            at = (make, key(*given))
            if at not in kept:
                kept[at] = make(*given)
            return kept[at]

        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "make_tokenizer", once(export.make_tokenizer, lambda read: read.model.vocab_size))
        patch.setattr(steps, "Optimizers", once(steps.Optimizers, lambda read, model: read.hash))
        patch.setattr(steps, "compile_step", once(steps.compile_step, lambda stage, by: (repr(stage), id(by))))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return config.read(small.write(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def model(tiny: TrainConfig) -> Model:
    return steps.initial_model(tiny.raw_model, seed=0)
