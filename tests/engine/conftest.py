"""A tiny random model of the GLM-5 architecture, made by our own writer: no oracle is needed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.config import ModelConfig
from model.hf_config import from_hf
from model.weights import Arrangement, Weight, layer_weights, outer_weights
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.load import load_engine

DSA: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96,
    "moe_intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "max_position_embeddings": 512,
    "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "index_topk": 16, "index_head_dim": 32, "index_n_heads": 16, "first_k_dense_replace": 1,
    "indexer_types": ["full", "full", "shared"], "num_nextn_predict_layers": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "eos_token_id": [7],
}  # fmt: skip
GQA: dict[str, Any] = {
    "model_type": "glm4_moe", "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32,
    "moe_intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "max_position_embeddings": 512,
    "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "eos_token_id": 7,
}  # fmt: skip
DENSE_MLA: dict[str, Any] = {
    **{k: v for k, v in DSA.items() if not k.startswith("index")},
    "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
}  # fmt: skip
CONFIGS = {"dsa": DSA, "gqa": GQA, "mla": DENSE_MLA}


def random_weights(cfg: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Weights of sensible scale in the graph's layout, with an MTP layer."""
    rng = np.random.default_rng(seed)

    def make(weight: Weight) -> np.ndarray:
        if weight.arrangement is Arrangement.PLAIN and len(weight.shape) == 1:
            centre = 1.0 if "norm" in weight.name else 0.0
            return (centre + 0.1 * rng.standard_normal(weight.shape)).astype(np.float32)
        return (0.08 * rng.standard_normal(weight.shape)).astype(np.float32)

    def group(weights: tuple[Weight, ...]) -> dict[str, np.ndarray]:
        return {weight.name: make(weight) for weight in weights}

    return {
        "outer": group(outer_weights(cfg)),
        "layers": [group(layer_weights(cfg, kind)) for kind in cfg.layers],
        "mtp": [group(layer_weights(cfg, cfg.mtp_type)) for _ in range(cfg.mtp_layers)],
    }


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint directory for each attention family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    shallow = {"num_hidden_layers": 2, "indexer_types": ["full", "shared"]}  # what is compiled is what these tests cost
    for name, raw in {**CONFIGS, "dsa": {**DSA, **shallow}}.items():
        save(folder / name, raw, random_weights(from_hf(raw)))
    return {name: folder / name for name in CONFIGS}


SMALL = EngineConfig(
    page_size=8, pool_tokens=1024, max_running=4, prefill_chunk=32, least_batch=4, least_chunk=32, least_context=128
)


@pytest.fixture(scope="session")
def engines(checkpoints: dict[str, Path]) -> dict[tuple[str, int], LocalEngine]:
    """Engines by (family, drafts); session-wide, so that each shape is compiled once."""
    return {
        (name, drafts): load_engine(
            Checkpoint(checkpoints[name]),
            registry.usable("cpu"),
            EngineConfig(**{**vars(SMALL), "drafts": drafts}),
        )
        for name, drafts in (("dsa", 0), ("dsa", 3), ("gqa", 0), ("gqa", 2), ("mla", 0), ("mla", 3))
    }
