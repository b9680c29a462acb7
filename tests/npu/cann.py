"""Fused operators of CANN in NumPy, after their READMEs (sources: `backends/ascend/constraints.py`).

Not written from our lowerings, so that a test compares a graph's meaning on a chip, as documented, with the JAX op.
Accelerators' rounding is not imitated: sums are taken in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _context(pages: np.ndarray, table: np.ndarray, length: int) -> np.ndarray:
    """PA_BSND pages [P, s, 1, w] of one sequence: [length, w]."""
    return np.concatenate([pages[page, :, 0] for page in table])[:length]


def lightning_indexer(
    query,
    key,
    weights,
    q_lengths,
    k_lengths,
    block_table,
    layout_query="BSND",
    layout_key="BSND",
    sparse_count=2048,
    sparse_mode=3,
):
    assert (layout_query, layout_key, sparse_mode) == ("BSND", "PA_BSND", 3) and q_lengths is None
    assert query.shape[3] == 128 and query.shape[2] <= 64 and key.shape[2] == 1 and key.shape[1] % 16 == 0
    assert query.dtype == key.dtype == weights.dtype and block_table.shape[0] == query.shape[0]
    b, s, _, _ = query.shape
    out = np.full((b, s, 1, sparse_count), -1, np.int32)
    for i in range(b):
        keys = f64(_context(key, block_table[i], k_lengths[i]))
        assert len(keys) == k_lengths[i], "the block table is too short for the context"
        for j in range(s):
            visible = int(k_lengths[i]) - s + j + 1  # right-down causal
            scores = (f64(weights[i, j])[:, None] * np.maximum(f64(query[i, j]) @ keys[:visible].T, 0)).sum(0)
            best = np.argsort(-scores, kind="stable")[:sparse_count]
            out[i, j, 0, : len(best)] = best
    return out, np.zeros(out.shape, query.dtype)


def sparse_flash_attention(
    query,
    key,
    value,
    sparse_indices,
    block_table,
    q_lengths,
    kv_lengths,
    query_rope,
    key_rope,
    scale_value=1.0,
    sparse_block_size=1,
    layout_query="BSND",
    layout_kv="BSND",
    sparse_mode=3,
    attention_mode=0,
):
    assert (layout_query, layout_kv, sparse_mode, attention_mode) == ("BSND", "PA_BSND", 3, 2)
    assert query.shape[3] == key.shape[3] == 512 and query_rope.shape[3] == key_rope.shape[3] == 64
    assert key.shape[1] % 16 == 0 and query.shape[2] in (1, 2, 4, 8, 16, 32, 64, 128) and sparse_block_size == 1
    b, s, heads, _ = query.shape
    out = np.zeros(query.shape, np.float64)
    for i in range(b):
        keys = f64(_context(key, block_table[i], kv_lengths[i]))
        ropes = f64(_context(key_rope, block_table[i], kv_lengths[i]))
        values = f64(_context(value, block_table[i], kv_lengths[i]))
        for j in range(s):
            chosen = sparse_indices[i, j, 0]
            valid = chosen >= 0
            assert not valid[np.argmin(valid) :].any() or valid.all(), "invalid indices must come last"
            chosen = chosen[valid]
            assert (chosen <= int(kv_lengths[i]) - s + j).all(), "a selected key is in the query's future"
            scores = f64(query[i, j]) @ keys[chosen].T + f64(query_rope[i, j]) @ ropes[chosen].T
            weights = np.exp(scores * scale_value - (scores * scale_value).max(-1, keepdims=True))
            out[i, j] = weights / weights.sum(-1, keepdims=True) @ values[chosen]
    lse = np.zeros((b, 1, s, heads), np.float32)
    return out.astype(query.dtype), lse, lse


def moe_gating_top_k(
    x,
    bias,
    k=1,
    k_group=1,
    group_count=1,
    group_select_mode=0,
    renorm=0,
    norm_type=0,
    out_flag=0,
    routed_scaling_factor=1.0,
    eps=1e-20,
):
    assert norm_type == 1 and group_select_mode == 1 and x.shape[-1] <= 2048
    normed = 1 / (1 + np.exp(-f64(x)))
    choice = normed + f64(bias)
    rows = np.arange(len(x))[:, None]
    if group_count > 1:
        grouped = choice.reshape(len(x), group_count, -1)
        best = np.argsort(-np.sort(grouped, -1)[..., -2:].sum(-1), kind="stable")[:, :k_group]
        masked = np.full_like(grouped, -np.inf)
        masked[rows, best] = grouped[rows, best]
        choice = masked.reshape(choice.shape)
    indices = np.argsort(-choice, kind="stable")[:, :k]
    weights = normed[rows, indices]
    weights = weights / (weights.sum(-1, keepdims=True) + eps) * routed_scaling_factor
    return weights.astype(x.dtype), indices.astype(np.int32), normed.astype(np.float32)


def moe_init_routing(
    x,
    expert_idx,
    active_num=-1,
    expert_capacity=-1,
    expert_num=-1,
    drop_pad_mode=0,
    expert_tokens_num_type=0,
    expert_tokens_num_flag=0,
    quant_mode=-1,
    active_expert_range=(),
    row_idx_type=0,
):
    assert drop_pad_mode == 0 and expert_tokens_num_type == 1 and row_idx_type == 0 and quant_mode == -1
    flat = expert_idx.reshape(-1)
    assert active_num == len(flat) and (flat >= 0).all() and (flat < expert_num).all()
    low, high = active_expert_range
    order = np.argsort(np.where((flat >= low) & (flat < high), flat, expert_num), kind="stable")
    active = int(((flat >= low) & (flat < high)).sum())
    expanded = np.full((len(flat), x.shape[1]), np.nan, x.dtype)  # what is not active is not initialised
    expanded[:active] = x[order[:active] // expert_idx.shape[1]]
    places = np.full(len(flat), -1, np.int32)
    places[order[:active]] = np.arange(active)
    counts = np.bincount(flat[order[:active]], minlength=high)[low:high].astype(np.int64)
    return expanded, places, counts, np.zeros(len(flat), np.float32)
