"""How large what bench/cuda.sh measures is: on a card, and so small that a CPU goes through all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.rank import RANK
from foundation.reading import read_json

Steps = Mapping[str, tuple[int, int, int]]
"""Sequences, new tokens of each, and where they begin, by name."""

LARGE: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 8192,
    "moe_intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_shared_experts": 1, "n_routed_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 16384,
    "q_lora_rank": 1024, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 32, "first_k_dense_replace": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
_TINY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip
_TINY_INDEX = {"index_topk": 32, "index_head_dim": 64, "index_n_heads": 2}


def _flash() -> dict[str, Any]:
    return read_json(Path(__file__).parents[1] / "model" / "configs" / "glm-4.7-flash.json")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """large, rank, flash: models as in a config.json: of the older timings, GLM-5's TP8 rank, GLM-4.7-Flash.

    steps: of ops and layers. flash_steps: of the whole model. depths: of the two stacks that layers are told from.
    context: tokens before a decode step of `large`, and `batches` of it; chunk: of its prompt. copy_elements: of the
    array whose copy gives the bandwidth. repeats: of what is timed. answer: tokens of the engine's answers, whose
    prompts have `prompt`. parity: prompt and answer tokens.
    """

    large: Mapping[str, Any] = dataclasses.field(default_factory=lambda: LARGE)
    rank: Mapping[str, Any] = dataclasses.field(default_factory=lambda: RANK)
    flash: Mapping[str, Any] = dataclasses.field(default_factory=_flash)
    steps: Steps = dataclasses.field(
        default_factory=lambda: {
            "b1": (1, 1, 8100),
            "b16": (16, 1, 8100),
            "b64": (64, 1, 8100),
            "t2048": (1, 2048, 6144),
        }
    )
    flash_steps: Steps = dataclasses.field(
        default_factory=lambda: {"b1": (1, 1, 4000), "b16": (16, 1, 4000), "b64": (64, 1, 4000), "t2048": (1, 2048, 0)}
    )
    depths: tuple[int, int] = (2, 6)
    batches: tuple[int, ...] = (1, 8, 64)
    context: int = 4096
    chunk: int = 2048
    copy_elements: int = 512 * 1024 * 1024
    repeats: int = 30
    prompt: int = 1024
    answer: int = 128
    parity: tuple[int, int] = (150, 32)


DRY = Sizes(
    large={**LARGE, **_TINY, **_TINY_INDEX, "num_hidden_layers": 2},
    rank={**RANK, **_TINY, **_TINY_INDEX},
    flash={
        **_flash(),
        **_TINY,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 0,
        "eos_token_id": [7],
    },  # fmt: skip
    steps={"b1": (1, 1, 100), "t64": (1, 64, 64)},
    flash_steps={"b1": (1, 1, 60), "t64": (1, 64, 0)},
    depths=(1, 2),
    batches=(1, 2),
    context=64,
    chunk=64,
    copy_elements=1 << 16,
    repeats=2,
    prompt=16,
    answer=6,
    parity=(40, 4),
)
