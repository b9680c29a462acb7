"""torch_npu's operators on a host without torch_npu: their schemas, and the shapes and types of their results.

Where torch_npu has been imported, its own are used. The shapes here are written for what our lowerings call; `make
test-npu` compares them with the vendor's Meta kernels (`tests/npu/test_meta.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ascend.operators import npu_release

SCALAR_TYPES = {torch.int8: 1, torch.int32: 3, torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
"""at::ScalarType, which `output_dtype` is a number of. (CANN's own GroupedMatmul has other numbers for it.)"""


@functools.cache
def declare() -> Any:
    """Declares the recorded operators that are not registered; the library is what keeps them so."""
    library = torch.library.Library("npu", "FRAGMENT")
    for name, operator in npu_release().operators.items():
        if not hasattr(torch.ops.npu, name):
            library.define(operator.signature)
            library.impl(name, SHAPES[name], "Meta")
    return library


def _of_scalar_type(number: int | None, default: torch.dtype) -> torch.dtype:
    return default if number is None else {n: dtype for dtype, n in SCALAR_TYPES.items()}[number]


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    lead = x.dim() - gamma.dim()
    rstd = x.new_empty([*x.shape[:lead], *[1] * gamma.dim()], dtype=torch.float32)
    return torch.empty_like(x), rstd


def _dynamic_quant(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, *, output_dtype: int | None = None, **_: Any) -> Tensor:
    return x1.new_empty((*x1.shape[:-1], x2.shape[-1]), dtype=_of_scalar_type(output_dtype, torch.int8))


def _lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, *, sparse_count: int = 2048, **_: Any
) -> tuple[Tensor, Tensor]:
    indices = query.new_empty((*query.shape[:2], key.shape[2], sparse_count), dtype=torch.int32)
    return indices, query.new_empty([0])


def _sparse_flash_attention(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    none = query.new_empty([0], dtype=torch.float32)
    return query.new_empty(query.shape), none, torch.empty_like(none)


def _mla_prolog_v3(
    x: Tensor, dq: Tensor, uq: Tensor, uk: Tensor, *rest: Tensor, weight_quant_mode: int = 0, **_: Any
) -> tuple[Tensor, ...]:
    tokens, heads, latent, rope = x.shape[0], uk.shape[0], uk.shape[2], rest[3].shape[-1]
    none = uk.new_empty((1,), dtype=torch.float32)
    scale = uk.new_empty((tokens, 1), dtype=torch.float32) if weight_quant_mode else torch.empty_like(none)
    norm = uq.new_empty((tokens, dq.shape[1]))
    return uk.new_empty((tokens, heads, latent)), uk.new_empty((tokens, heads, rope)), none, norm, scale


def _quant_lightning_indexer(query: Tensor, key: Tensor, *_: Any, sparse_count: int = 2048, **__: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], key.shape[2], sparse_count), dtype=torch.int32)


def _kv_quant_sparse_flash_attention(query: Tensor, *_: Any, rope_head_dim: int = 64, **__: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], query.shape[-1] - rope_head_dim))


def _moe_gating_top_k(x: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    chosen = (x.shape[0], k)
    return x.new_empty(chosen), x.new_empty(chosen, dtype=torch.int32), x.new_empty(x.shape, dtype=torch.float32)


def _moe_init_routing_v2(
    x: Tensor, expert_idx: Tensor, *, active_expert_range: Sequence[int], **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots, (low, high) = expert_idx.numel(), active_expert_range
    return (
        x.new_empty((slots, x.shape[1])),
        x.new_empty((slots,), dtype=torch.int32),
        x.new_empty((high - low,), dtype=torch.int64),
        x.new_empty((slots,), dtype=torch.float32),
    )


def _grouped_matmul(
    x: Sequence[Tensor], weight: Sequence[Tensor], *, output_dtype: int | None = None, **_: Any
) -> list[Tensor]:
    columns = weight[0].shape[2] * (8 if weight[0].dtype == torch.int32 else 1)
    return [x[0].new_empty((x[0].shape[0], columns), dtype=_of_scalar_type(output_dtype, x[0].dtype))]


def _weight_quant_batchmatmul(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)))


def _swiglu(x: Tensor, dim: int = -1) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= 2
    return x.new_empty(shape)


def _moe_finalize_routing(
    rows: Tensor, skip1: Any, skip2: Any, bias: Any, scales: Tensor, *_: Any, **__: Any
) -> Tensor:
    return rows.new_empty((scales.shape[0], rows.shape[1]))


def _moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    quant_mode: int = 0,
    **_: Any,
) -> tuple[Tensor, ...]:
    local = moe_expert_num // ep_world_size
    rows = x.shape[0] * ep_world_size * min(local, expert_ids.shape[1])

    def int32(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    return (
        x.new_empty((rows, x.shape[1]), dtype=torch.int8 if quant_mode else x.dtype),
        x.new_empty((rows,), dtype=torch.float32),
        int32(max(expert_ids.numel(), rows * 128)),
        x.new_empty((local,), dtype=torch.int64),
        int32(moe_expert_num),
        int32(0),
        x.new_empty((0,), dtype=torch.float32),
    )


def _moe_distribute_combine_v2(expand_x: Tensor, expert_ids: Tensor, *_: Any, **__: Any) -> Tensor:
    return expand_x.new_empty((expert_ids.shape[0], expand_x.shape[1]))


SHAPES: Mapping[str, Callable[..., Any]] = {
    "npu_rms_norm": _rms_norm,
    "npu_dynamic_quant": _dynamic_quant,
    "npu_quant_matmul": _quant_matmul,
    "npu_scatter_nd_update_": lambda into, indices, updates: into,
    "npu_lightning_indexer": _lightning_indexer,
    "npu_sparse_flash_attention": _sparse_flash_attention,
    "npu_mla_prolog_v3": _mla_prolog_v3,
    "npu_quant_lightning_indexer": _quant_lightning_indexer,
    "npu_kv_quant_sparse_flash_attention": _kv_quant_sparse_flash_attention,
    "npu_moe_gating_top_k": _moe_gating_top_k,
    "npu_moe_init_routing_v2": _moe_init_routing_v2,
    "npu_grouped_matmul": _grouped_matmul,
    "npu_weight_quant_batchmatmul": _weight_quant_batchmatmul,
    "npu_swiglu": _swiglu,
    "npu_interleave_rope": lambda x, cos, sin: torch.empty_like(x),
    "npu_moe_finalize_routing": _moe_finalize_routing,
    "npu_moe_distribute_dispatch_v2": _moe_distribute_dispatch_v2,
    "npu_moe_distribute_combine_v2": _moe_distribute_combine_v2,
}
"""By operator: what it returns, of tensors without data."""
