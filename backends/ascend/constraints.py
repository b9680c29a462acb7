"""What the kernels behind torch_npu's operators take, in numbers; each says why a call is refused, or None.

Sources, all of 2026-08-22: the READMEs of CANN's ops-transformer: attention/lightning_indexer,
attention/sparse_flash_attention, moe/moe_gating_top_k, moe/moe_init_routing_v3, gmm/grouped_matmul.
"""

from __future__ import annotations

LATENT, ROPE = 512, 64
_SPARSE_COUNTS = frozenset((*range(1, 2049), *range(3072, 8193, 1024)))
_INDEX_DIM, _INDEX_HEADS = 128, 64
_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_PAGE, _LARGEST_PAGE = 16, 1024
_MOST_EXPERTS, _ALIGNED = 2048, 32
_WIDEST = 65535

Shape = tuple[int, ...]


def page_fits(size: int) -> bool:
    """Whether CANN's attention reads pages of `size` tokens."""
    return size % _PAGE == 0 and size <= _LARGEST_PAGE


def lightning_indexer(query: Shape, key: Shape, count: int | None) -> str | None:
    """Why LightningIndexer refuses query [b,t,h,i], key [P,s,1,i] or selecting `count`; None where it takes them."""
    heads, width = query[2:]
    if heads > _INDEX_HEADS or width != _INDEX_DIM:
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
