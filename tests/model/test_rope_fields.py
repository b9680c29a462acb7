"""Every field of a config's rotary embedding is used as transformers uses it, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from model.config import Mla
from model.errors import ConfigError
from model.hf_config import from_hf
from tests.model.test_config import raw_preset

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"truncate": False}, {"truncate": True}, {"truncate": None}, {"beta_fast": 16.0, "beta_slow": 2},
        {"beta_fast": 1.0, "beta_slow": 1.0}, {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
        {"attention_factor": 1.25}, {"attention_factor": 1, "mscale": 2.0, "mscale_all_dim": 1.0},
        {"mscale": 0.707, "mscale_all_dim": 1.0}, {"mscale": 0.707}, {"mscale_all_dim": 0.5}, {"factor": None},
        {"factor": 0.5}, {"original_max_position_embeddings": 4}, {"original_max_position_embeddings": 4_000_000},
        {"original_max_position_embeddings": None}, {"rope_theta": 1e6, "truncate": False, "beta_fast": 100},
    ],
)  # fmt: skip
@pytest.mark.parametrize("preset", ["deepseek-v3", "glm-4.5-air", "glm-5"])
def test_every_yarn_field(preset: str, changes: dict[str, Any]) -> None:
    """Frequencies, the factor on cos and sin, and MLA's on the softmax, to the ends of its ranges."""
    pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    rope = {**YARN, **changes}
    if rope["original_max_position_embeddings"] is None:
        del rope["original_max_position_embeddings"]
    raw = {key: value for key, value in raw_preset(preset).items() if key not in ("rope_scaling", "rope_theta")}
    raw |= {"rope_parameters": rope, "max_position_embeddings": 256}
    cfg = from_hf(raw)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps({**raw, "model_type": cfg.model_type})))
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    np.testing.assert_allclose(cfg.rope.inv_freq(), expected.numpy(), rtol=2e-6)
    assert cfg.rope.attention_factor == pytest.approx(factor)
    if isinstance(cfg.attention, Mla) and rope["factor"]:  # grouped queries have no factor on the softmax
        scale = cfg.attention_scale / cfg.attention.qk_dim**-0.5
        assert scale == pytest.approx(yarn_apply_mscale(theirs.rope_parameters, 1.0))


@pytest.mark.parametrize(
    ("rope", "mention"),
    [
        ({**YARN, "long_factor": [1.0]}, "`long_factor`"),
        ({**YARN, "extrapolation_factor": 1.0}, "`extrapolation_factor`"),
        ({**YARN, "rope_type": "default"}, "`factor`"),
        ({"rope_theta": 1e4, "mrope_section": [8, 8, 8]}, "`mrope_section`"),
        ({**YARN, "attention_factor": 0.0}, "`attention_factor`"),
        ({**YARN, "truncate": "no"}, "`truncate`"),
        ({**YARN, "rope_type": "longrope"}, "'longrope'"),
    ],
)
def test_a_field_that_is_not_read_is_refused_by_name(rope: dict[str, Any], mention: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf({**raw_preset("glm-5"), "rope_parameters": rope})
    assert mention in str(error.value) and "\n" not in str(error.value)
    from_hf({**raw_preset("glm-5"), "rope_parameters": {**YARN, "long_factor": None}})


def test_two_ropes_must_agree() -> None:
    raw = {**raw_preset("glm-5"), "rope_parameters": YARN}
    assert from_hf({**raw, "rope_scaling": {"factor": 4.0, "rope_type": "yarn"}}).rope == from_hf(raw).rope
    with pytest.raises(ConfigError, match="contradict each other in `factor`"):
        from_hf({**raw, "rope_scaling": {"factor": 8.0, "rope_type": "yarn"}})
