"""A random checkpoint of the widths that CANN's attention takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint import groups
from model.checkpoint_writer import save as save_checkpoint
from model.hf_config import from_hf
from model.weights import Arrangement, Weight
from tests.cli.cli import CONFIG


def glm_like(folder: Path, **changed: Any) -> Path:
    """A random checkpoint of two layers with the widths that CANN's attention takes; the second shares the first's
    selection. `changed`: keys of its config."""
    config = {
        **CONFIG, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "index_head_dim": 128, "index_topk": 32, **changed,
    }  # fmt: skip
    rng = np.random.default_rng(3)
    made = {
        place: [{w.name: _random(rng, w) for w in group.weights} for group in found]
        for place, found in groups(from_hf(config), mtp=True).items()
    }
    save_checkpoint(folder, config, {**made, "outer": made["outer"][0]})
    return folder


def _random(rng: np.random.Generator, weight: Weight) -> np.ndarray:
    """Of the size that keeps activations near 1."""
    if weight.arrangement is Arrangement.PLAIN and weight.name != "embed":
        centre = 1.0 if "norm" in weight.name else 0.0
        return (centre + 0.1 * rng.standard_normal(weight.shape)).astype(np.float32)
    inner = weight.shape[1] if weight.expert_count or weight.name in ("k_up", "v_up") else weight.shape[0]
    scale = 1.0 if weight.name == "embed" else inner**-0.5
    return (scale * rng.standard_normal(weight.shape)).astype(np.float32)
