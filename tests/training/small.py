"""A run small enough for a test: three layers, a few steps of each stage."""

from __future__ import annotations

from pathlib import Path

CONFIG = """
seed = 3
save_every = 4
log_every = 2

[model]
vocab_size = 700
hidden_size = 32
intermediate_size = 48
moe_intermediate_size = 16
num_hidden_layers = 3
first_k_dense_replace = 1
indexer_types = ["full", "full", "shared"]
num_attention_heads = 2
num_key_value_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 16
index_topk = 8
index_n_heads = 4
index_head_dim = 16
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
routed_scaling_factor = 1.0
max_position_embeddings = 256
rope_parameters = { rope_theta = 10000.0, rope_type = "default" }

[optimizer]
name = "muon-split"
"""
STAGES = {
    "dense": """
[[stage]]
attention = "dense"
steps = 4
rows = 4
length = 32
""",
    "warmup": """
[[stage]]
attention = "warmup"
steps = 3
rows = 4
length = 32
draft_rows = 2
""",
    "sparse": """
[[stage]]
attention = "sparse"
steps = 5
rows = 4
length = 32
draft_rows = 2
draft_weight = 0.3
drafts = 1
""",
}


def write(folder: Path, *replacements: tuple[str, str], stages: tuple[str, ...] = tuple(STAGES)) -> Path:
    """The config of those stages as a file in `folder`, with texts replaced."""
    text = CONFIG + "".join(STAGES[name] for name in stages)
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.toml"
    path.write_text(text)
    return path
