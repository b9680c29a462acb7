"""What the kernels of CANN's fused operators take, in numbers: for a lowering before it emits a node, and for the
checker of a finished package. The sources are those of `cann_operators.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATENT, ROPE = 512, 64
_SPARSE_COUNTS = frozenset((*range(1, 2049), *range(3072, 8193, 1024)))
_INDEX_DIM, _INDEX_HEADS, _INDEX_HEADS_950 = 128, 64, (8, 16, 24, 32, 64)
_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_PAGE, _LARGEST_PAGE = 16, 1024
_MOST_EXPERTS, _ALIGNED, _MOST_ROUTED = 2048, 32, 10240
_WIDEST = 65535

Shape = tuple[int, ...]

_RANKS: Mapping[str, Mapping[str, int]] = {
    "LightningIndexer": {"query": 4, "key": 4, "weights": 3, "block_table": 2},
    "SparseFlashAttention": {"query": 4, "key": 4, "sparse_indices": 4, "query_rope": 4, "key_rope": 4},
    "MoeGatingTopK": {"x": 2, "bias": 1},
    "MoeInitRoutingV3": {"x": 2, "expert_idx": 2},
    "GroupedMatmul": {"x": 2, "weight": 3},
}
"""Of inputs in the layouts that our nodes name (BSND, PA_BSND, one tensor of weights)."""


def page_fits(size: int) -> bool:
    """Whether CANN's attention reads pages of `size` tokens."""
    return size % _PAGE == 0 and size <= _LARGEST_PAGE


def lightning_indexer(query: Shape, key: Shape, count: int | None, family: str | None) -> str | None:
    """Why LightningIndexer refuses query [b,t,h,i], key [P,s,1,i] or selecting `count`; None where it takes them."""
    heads, width = query[2:]
    fits = heads in _INDEX_HEADS_950 if family == "ascend950" else heads <= _INDEX_HEADS
    if not fits or width != _INDEX_DIM:
        return f"LightningIndexer takes no {heads} heads of {width}"
    if not page_fits(key[1]):
        return f"LightningIndexer takes no pages of {key[1]} tokens"
    if count is not None and count not in _SPARSE_COUNTS:
        return f"LightningIndexer does not select {count}"
    return None


def sparse_flash_attention(heads: int, latent: int, rope: int, page: int) -> str | None:
    if (latent, rope) != (LATENT, ROPE):
        return f"SparseFlashAttention takes latents of {LATENT} + {ROPE}, not {latent} + {rope}"
    if not page_fits(page):
        return f"SparseFlashAttention takes no pages of {page} tokens"
    if heads not in _HEADS:
        return f"SparseFlashAttention takes no {heads} heads"
    return None


def moe_gating_top_k(experts: int, groups: int) -> str | None:
    in_group = experts // groups
    if groups > 1 and in_group < 2:
        return f"MoeGatingTopK takes no groups of {in_group}"
    if max(experts, -(-in_group // _ALIGNED) * _ALIGNED * groups) > _MOST_EXPERTS:
        return f"MoeGatingTopK takes at most {_MOST_EXPERTS} experts, each group counted as a multiple of {_ALIGNED}"
    return None


def grouped_matmul(*last_dims: int) -> str | None:
    widest = max(last_dims)
    return f"GroupedMatmul takes no rows of {widest}" if widest > _WIDEST else None


def of_node(type_: str, shapes: Mapping[str, Shape], attributes: Mapping[str, Any], family: str | None) -> str | None:
    """Why CANN's operator refuses a node, from the shapes of its inputs (by the operator's input names; those that are
    not known are absent) and its attributes; None where it takes them, or where nothing is documented."""
    for name, rank in _RANKS.get(type_, {}).items():
        if name in shapes and len(shapes[name]) != rank:
            return f"{type_} takes {name} of {rank} dims, not {len(shapes[name])}"
    known = shapes.keys()
    if type_ == "LightningIndexer" and {"query", "key"} <= known:
        return lightning_indexer(shapes["query"], shapes["key"], attributes.get("sparse_count", 2048), family)
    if type_ == "SparseFlashAttention" and {"query", "key", "query_rope"} <= known:
        query, key = shapes["query"], shapes["key"]
        return sparse_flash_attention(query[2], query[3], shapes["query_rope"][3], key[1])
    if type_ == "MoeGatingTopK" and "x" in known:
        return moe_gating_top_k(shapes["x"][-1], attributes.get("group_count", 1))
    if type_ == "MoeInitRoutingV3" and "expert_idx" in known:
        rows, choices = shapes["expert_idx"]
        if attributes.get("active_num") != rows * choices:
            return f"MoeInitRoutingV3 has active_num {attributes.get('active_num')} for {rows} x {choices} choices"
        if attributes.get("expert_num", 0) > _MOST_ROUTED:
            return f"MoeInitRoutingV3 takes at most {_MOST_ROUTED} experts"
    if type_ == "GroupedMatmul" and {"x", "weight"} <= known:
        return grouped_matmul(shapes["x"][-1], shapes["weight"][-1])
    return None
