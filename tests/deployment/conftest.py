"""Checkpoints whose bytes are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.checkpoint_writer import save
from model.formats import BF16
from model.hf_config import from_hf
from tests.deployment.counted import SIZES, raw
from tests.engine.conftest import CONFIGS, random_weights


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family as releases have it: bfloat16, the router's bias in float32."""
    folder = tmp_path_factory.mktemp("bytes")
    for family in CONFIGS:
        config = raw(family, **SIZES)
        made = random_weights(from_hf(config))
        for held in (made["outer"], *made["layers"], *made["mtp"]):
            held |= {name: value.astype(BF16) for name, value in held.items() if name != "router_bias"}
        save(folder / family, config, made)
    return {family: folder / family for family in CONFIGS}
