"""The ops of the contract that torch_npu has operators for."""

from __future__ import annotations

from collections.abc import Mapping

from backends.ascend import attention, dense, experts
from backends.ascend.target import NpuLowering

LOWERINGS: Mapping[str, NpuLowering] = {
    "glm.rms_norm": dense.rms_norm,
    "glm.swiglu": dense.swiglu,
    "glm.rope": dense.rope,
    "glm.linear": dense.linear,
    "glm.cache_write": attention.cache_write,
    "glm.index_scores": attention.index_scores,
    "glm.select_topk": attention.select_topk,
    "glm.sparse_attention": attention.sparse_attention,
    "glm.latent_attention": attention.latent_attention,
    "glm.route": experts.route,
    "glm.expert_ffn": experts.expert_ffn,
}
"""Lowerings by op."""
BODIES: Mapping[str, NpuLowering] = {
    "glm.cache_write": attention.written,
    "glm.index_scores": attention.scores,
    "glm.sparse_attention": attention.over_selection,
    "glm.latent_attention": attention.over_context,
    "glm.expanded_attention": attention.over_context,
}
"""Decompositions by op, of those that are not the graph's own."""
