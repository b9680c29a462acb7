"""A small config and its first model, once a session."""

from __future__ import annotations

import pytest

from model.module import Model
from runtime.training import config, steps
from runtime.training.config import TrainConfig
from tests.training import small


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return config.read(small.write(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def model(tiny: TrainConfig) -> Model:
    return steps.initial_model(tiny.raw_model, seed=0)
