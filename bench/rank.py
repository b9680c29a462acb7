"""GLM-5 as one of eight tensor-parallel ranks holds it: an eighth of its heads, widths and vocabulary."""

from typing import Any

RANK: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 19360, "hidden_size": 6144, "intermediate_size": 1536,
    "moe_intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
    "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "max_position_embeddings": 202752,
    "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 32, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
