"""Checkpoints of the small models, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.checkpoint import Checkpoint
from tests.sim.servers import RANDOM, SMALL, make_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """By attention family."""
    folder: Path = tmp_path_factory.mktemp("sim")
    return {family: make_checkpoint(folder, family) for family in SMALL}


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    """Six layers, eight heads and sixteen experts: what many layouts divide."""
    return Checkpoint(RANDOM)
