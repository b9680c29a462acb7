"""A small config and its first weights, once a session."""

from __future__ import annotations

import pytest

from runtime.training import config, steps
from runtime.training.config import TrainConfig
from runtime.training.forward import Params
from tests.training import small


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return config.read(small.write(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def params(tiny: TrainConfig) -> Params:
    return steps.initial_params(tiny.model, seed=0)
