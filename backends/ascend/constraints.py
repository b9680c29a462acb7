"""What the kernels behind torch_npu's operators take, in numbers; each says why a call is refused, or None. What
differs by series of chips is in `npu_operators.toml`.

Sources, all of 2026-08-22: the READMEs of CANN's ops-transformer: attention/lightning_indexer,
attention/sparse_flash_attention, moe/moe_gating_top_k, moe/moe_init_routing_v3, gmm/grouped_matmul. And op-plugin's
documents of torch_npu's operators (docs/zh/custom_APIs/torch_npu, 2026-08-21): npu_moe_distribute_dispatch_v2 and
combine_v2 (the limits of Atlas A3, which Ascend 950 shares), npu_interleave_rope, npu_quant_lightning_indexer,
npu_kv_quant_sparse_flash_attention, npu_mla_prolog_v3 (torch_npu 2.13.0's own document of it is older and has fewer
sizes).
"""

from __future__ import annotations

import dataclasses

from backends.ascend.operators import npu_release

DISPATCH = "npu_moe_distribute_dispatch_v2"
ACTIVATIONS = frozenset({"float16", "bfloat16"})
"""Types of activations that attention, quantisation and exchanges take."""
LATENT, ROPE = 512, 64
_SPARSE_COUNTS = frozenset((*range(1, 2049), *range(3072, 8193, 1024)))
_INT8_COUNTS = range(1, 2049)
_INDEX_DIM = 128
_PROLOG_HIDDEN = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
_PROLOG_QUERY_LATENTS, _PROLOG_HEADS = (1536, 2048), (128, 192)
_PAGE, _LARGEST_PAGE = 16, 1024
_MOST_EXPERTS, _ALIGNED = 2048, 32
_WIDEST = 65535
DEFAULT_SERIES = "Atlas A3"
"""Whose limits hold where no chip is named, or one of a series that the documents do not tell of."""
_SENT_WIDTH, _SENT_TOKENS, _SENT_CHOICES = (1024, 8192), 512, 16
_SENT_RANKS, _SENT_EXPERTS = (2, 768), 1024
_MB, _LEAST_BUFFER_MB = 1 << 20, 200

Shape = tuple[int, ...]


def page_fits(size: int) -> bool:
    """Whether CANN's attention reads pages of `size` tokens."""
    return size % _PAGE == 0 and size <= _LARGEST_PAGE


def undocumented(operator: str, series: str) -> str | None:
    """Why an operator is not used on a series of chips."""
    known = npu_release().operators[operator].series
    return None if series in known else f"{operator} is not documented for {series} as graphs call it"


def lightning_indexer(
    query: Shape, page: int, count: int | None, int8: bool = False, series: str = DEFAULT_SERIES
) -> str | None:
    """Why LightningIndexer, or QuantLightningIndexer, refuses query [b,t,h,i], pages of `page` keys or selecting
    `count`; None where it takes them."""
    operator = "npu_quant_lightning_indexer" if int8 else "npu_lightning_indexer"
    name, counts = ("QuantLightningIndexer", _INT8_COUNTS) if int8 else ("LightningIndexer", _SPARSE_COUNTS)
    heads, width = query[2:]
    if width != _INDEX_DIM:
        return f"{name} takes no {heads} heads of {width}"
    if why := _heads(operator, name, heads, series):
        return why
    if not page_fits(page):
        return f"{name} takes no pages of {page} tokens"
    if count is not None and count not in counts:
        return f"{name} does not select {count}"
    return None


def _heads(operator: str, name: str, heads: int, series: str) -> str | None:
    taken = npu_release().operators[operator].heads[series]
    return None if heads in taken else f"{name} takes no {heads} heads on {series}"


def sparse_flash_attention(
    heads: int, latent: int, rope: int, page: int, int8: bool = False, series: str = DEFAULT_SERIES
) -> str | None:
    """int8: of KvQuantSparseFlashAttention."""
    operator = "npu_kv_quant_sparse_flash_attention" if int8 else "npu_sparse_flash_attention"
    name = "KvQuantSparseFlashAttention" if int8 else "SparseFlashAttention"
    if (latent, rope) != (LATENT, ROPE):
        return f"{name} takes latents of {LATENT} + {ROPE}, not {latent} + {rope}"
    if not page_fits(page):
        return f"{name} takes no pages of {page} tokens"
    return _heads(operator, name, heads, series)


def mla_prolog(
    hidden: int, q_lora: int, heads: int, head: Shape, page: int, series: str = DEFAULT_SERIES
) -> str | None:
    """Why MlaProlog refuses a layer; head: its part without position, its rotary part, and the latent."""
    if hidden not in _PROLOG_HIDDEN:
        return f"MlaProlog takes no hidden size of {hidden}"
    if q_lora not in _PROLOG_QUERY_LATENTS:
        return f"MlaProlog takes no query latents of {q_lora}"
    if head[0] not in _PROLOG_HEADS or head[1:] != (ROPE, LATENT):
        return f"MlaProlog takes no heads of {head[0]} + {head[1]} with latents of {head[2]}"
    if why := _heads("npu_mla_prolog_v3", "MlaProlog", heads, series):
        return why
    return None if page_fits(page) else f"MlaProlog takes no pages of {page} tokens"


def moe_gating_top_k(experts: int, groups: int) -> str | None:
    in_group = experts // groups
    if groups > 1 and in_group < 2:
        return f"MoeGatingTopK takes no groups of {in_group}"
    if max(experts, -(-in_group // _ALIGNED) * _ALIGNED * groups) > _MOST_EXPERTS:
        return f"MoeGatingTopK takes at most {_MOST_EXPERTS} experts, each group counted as a multiple of {_ALIGNED}"
    return None


def interleave_rope(width: int) -> str | None:
    return None if width == ROPE else f"InterleaveRope takes heads of {ROPE}, not {width}"


def grouped_matmul(*last_dims: int, needs: str = "", series: str = DEFAULT_SERIES) -> str | None:
    """needs: what some series lack ("int4 in groups")."""
    widest = max(last_dims)
    if widest > _WIDEST:
        return f"GroupedMatmul takes no rows of {widest}"
    lacking = npu_release().operators["npu_grouped_matmul"].lacks.get(series, ())
    return f"GroupedMatmul takes no {needs} on {series}" if needs in lacking else None


@dataclasses.dataclass(frozen=True)
class Sent:
    """What a device gives MoeDistributeDispatch: tokens [tokens, width] for `choices` experts each, of `experts` on
    each of `ranks` devices."""

    tokens: int
    width: int
    choices: int
    experts: int
    ranks: int

    @property
    def buffer_mb(self) -> int:
        """What the group's buffers must hold (hccl_buffer_size), at least what HCCL has by default."""
        row = _up(2 * self.width, 32)
        places = self.experts * self.tokens * self.ranks * _up(row + 64, 512)
        back = (self.choices + 1) * self.tokens * _up(2 * self.width, 512)  # + 1: shared_expert_num, by default
        return max(_LEAST_BUFFER_MB, -(-2 * (places + back) // _MB))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def moe_distribute(sent: Sent) -> str | None:
    """Why MoeDistributeDispatch and Combine do not take what a device sends, or what then comes no grouped product."""
    (narrowest, widest), (fewest, most) = _SENT_WIDTH, _SENT_RANKS
    if not narrowest <= sent.width <= widest:
        return f"MoeDistributeDispatch takes rows of {narrowest} to {widest}, not {sent.width}"
    if sent.tokens > _SENT_TOKENS:
        return f"MoeDistributeDispatch takes at most {_SENT_TOKENS} tokens of a device, not {sent.tokens}"
    if sent.choices > _SENT_CHOICES:
        return f"MoeDistributeDispatch takes at most {_SENT_CHOICES} experts a token, not {sent.choices}"
    if not fewest <= sent.ranks <= most:
        return f"MoeDistributeDispatch takes {fewest} to {most} devices, not {sent.ranks}"
    if sent.experts * sent.ranks > _SENT_EXPERTS:
        return f"MoeDistributeDispatch takes at most {_SENT_EXPERTS} experts, not {sent.experts * sent.ranks}"
    if sent.experts < 2:
        return "GroupedMatmul takes no single group"
    return None
