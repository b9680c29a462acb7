"""torch_npu's operators on the CPU, after their documentation: what a graph of them is run with.

Written from the documents of the operators (torch_npu's own `_op_plugin_docs.py` and the READMEs of CANN's
ops-transformer and ops-nn), not from our lowerings. Accelerators' rounding is not imitated: sums are taken in float64.
What a document leaves undefined is NaN here.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.ascend.declare import declare
from tests.npu import cann

_SCALAR_TYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}  # c10


@functools.cache
def register() -> Any:
    """Registers the references for the CPU; the library is what keeps them so."""
    declare()
    library = torch.library.Library("npu", "IMPL")
    for name, reference in REFERENCES.items():
        library.impl(name, reference, "CPU")
    if hasattr(torch.ops.npu, "npu_scatter_nd_update"):  # what torch_npu makes of operators in place, to compile them
        library.impl("npu_scatter_nd_update", lambda into, *rest: _scatter_nd_update_(into.clone(), *rest), "CPU")
        library.impl("npu_mla_prolog_v3_functional", _mla_prolog_v3_functional, "CPU")
    return library


def _np(x: Tensor) -> np.ndarray:
    return x.to(torch.float64).numpy() if x.dtype.is_floating_point else x.numpy()


def _as(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert gamma.dtype == x.dtype and gamma.shape == x.shape[-1:]
    wide = _np(x)
    rstd = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    return _as(wide * rstd * _np(gamma), x.dtype), _as(rstd, torch.float32)


def _dynamic_quant(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    assert not any(options.values()) and x.dim() > 1
    wide = np.nan_to_num(_np(x))  # rows that no expert has
    scale = np.maximum(np.abs(wide).max(-1), 1e-12) / 127
    return _as(np.rint(wide / scale[..., None]), torch.int8), _as(scale, torch.float32)


def _quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor, output_dtype: int) -> Tensor:
    assert x1.dtype == x2.dtype == torch.int8 and scale.shape == (x2.shape[1],)
    assert pertoken_scale.shape == (x1.shape[0],) and pertoken_scale.dtype == torch.float32
    sums = _np(x1).astype(np.int64) @ _np(x2).astype(np.int64)
    return _as(sums * _np(scale) * _np(pertoken_scale)[:, None], _SCALAR_TYPES[output_dtype])


def _scatter_nd_update_(into: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    assert indices.dim() == 2 and indices.shape[1] == 1 and updates.dtype == into.dtype
    assert ((indices >= 0) & (indices < into.shape[0])).all()
    into[indices[:, 0].long()] = updates
    return into


def _lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, *, actual_seq_lengths_key: Tensor, block_table: Tensor, **given: Any
) -> tuple[Tensor, Tensor]:
    assert all(x.is_contiguous() for x in (query, key, weights)) and query.dtype == key.dtype == weights.dtype
    assert actual_seq_lengths_key.dtype == block_table.dtype == torch.int32
    chosen, _ = cann.lightning_indexer(
        _np(query), _np(key), _np(weights), None, _np(actual_seq_lengths_key), _np(block_table), **given
    )
    return _as(chosen, torch.int32), query.new_empty([0])


def _sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_indices: Tensor,
    scale_value: float,
    *,
    block_table: Tensor,
    actual_seq_lengths_kv: Tensor,
    query_rope: Tensor,
    key_rope: Tensor,
    **given: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (query, key, value, query_rope, key_rope)
    assert all(x.is_contiguous() and x.dtype == query.dtype for x in tensors)
    assert sparse_indices.dtype == block_table.dtype == actual_seq_lengths_kv.dtype == torch.int32
    q, k, v, q_rope, k_rope = map(_np, tensors)
    out, _, _ = cann.sparse_flash_attention(
        q,
        k,
        v,
        _np(sparse_indices),
        _np(block_table),
        None,
        _np(actual_seq_lengths_kv),
        q_rope,
        k_rope,
        scale_value=scale_value,
        **given,
    )
    none = query.new_empty([0], dtype=torch.float32)
    return _as(out, query.dtype), none, none.clone()


def _mla_prolog_v3(
    x: Tensor,
    dq: Tensor,
    uq: Tensor,
    uk: Tensor,
    dkv: Tensor,
    gamma_cq: Tensor,
    gamma_ckv: Tensor,
    sin: Tensor,
    cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    *,
    cache_index: Tensor,
    query_norm_flag: bool,
    rmsnorm_epsilon_cq: float = 1e-5,
    rmsnorm_epsilon_ckv: float = 1e-5,
    dequant_scale_x: Tensor | None = None,
    dequant_scale_w_dq: Tensor | None = None,
    dequant_scale_w_uq_qr: Tensor | None = None,
    dequant_scale_w_dkv_kr: Tensor | None = None,
    weight_quant_mode: int = 0,
    **cached: Any,
) -> tuple[Tensor, ...]:
    """Its four paths. weight_quant_mode 2: rows and matrices in int8, the query's latent rounded a token."""
    wide, heads, nope = uk.dtype, uk.shape[0], uk.shape[1]
    assert query_norm_flag and cache_index.dtype == torch.int64 and cache_index.shape == x.shape[:1]
    assert x.shape[1] == dq.shape[0] == dkv.shape[0] and gamma_cq.dtype == sin.dtype == cos.dtype == wide
    assert nope in (128, 192) and dq.shape[1] in (1536, 2048) and uq.shape == (dq.shape[1], heads * (nope + 64))
    assert (dequant_scale_x is not None) == (weight_quant_mode == 2)

    def product(rows: Tensor, scale: Tensor | None, matrix: Tensor, columns: Tensor | None) -> np.ndarray:
        if scale is None or columns is None:
            assert rows.dtype == matrix.dtype == wide
            return _np(rows) @ _np(matrix)
        assert rows.dtype == matrix.dtype == torch.int8 and scale.shape == (len(rows), 1)
        assert columns.shape == (1, matrix.shape[1])
        return (_np(rows).astype(np.int64) @ _np(matrix).astype(np.int64)) * _np(scale) * _np(columns)

    def norm(value: np.ndarray, gamma: Tensor, epsilon: float) -> np.ndarray:
        return value / np.sqrt((value**2).mean(-1, keepdims=True) + epsilon) * _np(gamma)

    def rope(value: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
        first, second = value[..., ::2], value[..., 1::2]
        return np.concatenate([first, second], -1) * cosines + np.concatenate([-second, first], -1) * sines

    q_latent = _as(norm(product(x, dequant_scale_x, dq, dequant_scale_w_dq), gamma_cq, rmsnorm_epsilon_cq), wide)
    q_scale = torch.zeros(1)
    if weight_quant_mode == 2:
        q_latent, scale = _dynamic_quant(q_latent)
        q_scale = scale.unsqueeze(-1)
    query = product(q_latent, q_scale if weight_quant_mode else None, uq, dequant_scale_w_uq_qr)
    query = query.reshape(len(x), heads, nope + 64)
    q_nope = np.einsum("thn,hnl->thl", query[..., :nope], _np(uk))
    q_rope = rope(query[..., nope:], _np(cos)[:, None], _np(sin)[:, None])
    kv = product(x, dequant_scale_x, dkv, dequant_scale_w_dkv_kr)
    latent = norm(kv[:, :512], gamma_ckv, rmsnorm_epsilon_ckv)
    _cached(latent, rope(kv[:, 512:], _np(cos), _np(sin)), wide, kv_cache, kr_cache, cache_index, **cached)
    return _as(q_nope, wide), _as(q_rope, wide), torch.zeros(1), q_latent, q_scale


def _cached(
    latent: np.ndarray,
    rope: np.ndarray,
    wide: torch.dtype,
    kv_cache: Tensor,
    kr_cache: Tensor,
    index: Tensor,
    kv_cache_quant_mode: int = 0,
    ckvkr_repo_mode: int = 0,
    quant_scale_repo_mode: int = 0,
    tile_size: int = 128,
    k_nope_clip_alpha: Tensor | None = None,
) -> None:
    """Written in place: to two caches, or in int8 to one, with a scale for each 128 behind the rotary part."""
    pages, offsets = index // kv_cache.shape[1], index % kv_cache.shape[1]
    if kv_cache_quant_mode == 0:
        kv_cache[pages, offsets, 0], kr_cache[pages, offsets, 0] = _as(latent, wide), _as(rope, wide)
        return
    assert (kv_cache_quant_mode, ckvkr_repo_mode, quant_scale_repo_mode, tile_size) == (3, 1, 1, 128)
    assert k_nope_clip_alpha is not None and k_nope_clip_alpha.tolist() == [1.0] and kr_cache.numel() == 0
    values, scale = _dynamic_quant(_as(latent, wide).reshape(-1, 128))
    scales = scale.reshape(len(latent), 4).view(torch.int8)
    rows = [values.reshape(len(latent), 512), _as(rope, wide).view(torch.int8), scales]
    kv_cache[pages, offsets, 0] = torch.cat(rows, -1)


def _mla_prolog_v3_functional(*given: Any, **attributes: Any) -> tuple[Tensor, ...]:
    caches = [each.clone() for each in given[9:11]]
    return (*_mla_prolog_v3(*given[:9], *caches, **attributes), *caches)


def _quant_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    query_dequant_scale: Tensor,
    key_dequant_scale: Tensor,
    query_quant_mode: int,
    key_quant_mode: int,
    *,
    actual_seq_lengths_key: Tensor,
    block_table: Tensor,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
) -> Tensor:
    """Top-k of the sum over heads of W * ReLU((scale_q scale_k) * (q k)): the document's formula."""
    assert (query_quant_mode, key_quant_mode, layout_query, layout_key, sparse_mode) == (0, 0, "BSND", "PA_BSND", 3)
    assert query.dtype == key.dtype == torch.int8 and all(x.is_contiguous() for x in (query, weights))
    assert query_dequant_scale.dtype == key_dequant_scale.dtype == torch.float16
    assert query_dequant_scale.shape == weights.shape == query.shape[:3] and key_dequant_scale.shape == key.shape[:3]
    assert query.shape[3] == key.shape[3] == 128 and key.shape[2] == 1 and key.shape[1] % 16 == 0
    wide = _np(weights) * _np(query_dequant_scale)
    assert (np.abs(wide) <= 65504).all(), "W * scale_q has to be in float16's range"
    b, s, heads, _ = query.shape
    out = np.full((b, s, 1, sparse_count), -1, np.int32)
    for i, length in enumerate(actual_seq_lengths_key.tolist()):
        rows = [(key[page, :, 0], key_dequant_scale[page, :, 0]) for page in block_table[i].tolist()]
        keys, scales = (np.concatenate([_np(each[part]) for each in rows])[:length] for part in (0, 1))
        for j in range(s):
            seen = length - s + j + 1
            dots = _np(query[i, j]).astype(np.int64) @ keys[:seen].astype(np.int64).T
            scale = _np(query_dequant_scale[i, j])[:, None] * scales[None, :seen]
            best = np.argsort(-(_np(weights[i, j])[:, None] * np.maximum(scale * dots, 0)).sum(0), kind="stable")
            out[i, j, 0, : min(seen, sparse_count)] = best[:sparse_count]
    return torch.from_numpy(out)


def _kv_quant_sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_indices: Tensor,
    scale_value: float,
    key_quant_mode: int,
    value_quant_mode: int,
    *,
    block_table: Tensor,
    actual_seq_lengths_kv: Tensor,
    quant_scale_repo_mode: int = 1,
    tile_size: int = 128,
    rope_head_dim: int = 64,
    **given: Any,
) -> Tensor:
    """A row is 512 integers, 64 numbers of the query's type and four float32, each the scale of 128 integers."""
    assert (key_quant_mode, value_quant_mode, quant_scale_repo_mode, tile_size, rope_head_dim) == (2, 2, 1, 128, 64)
    assert all(x.dtype == torch.int8 and x.is_contiguous() for x in (key, value)) and query.is_contiguous()
    assert query.shape[3] == 576 and key.shape[3] == 512 + 64 * query.dtype.itemsize + 4 * 4

    def parts(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows[..., -16:].contiguous().view(torch.float32).to(torch.float64)
        nope = rows[..., :512].reshape(*rows.shape[:-1], 4, 128).to(torch.float64) * scale[..., None]
        return nope.reshape(*rows.shape[:-1], 512), rows[..., 512:-16].contiguous().view(query.dtype)

    (k, k_rope), (v, _) = parts(key), parts(value)
    out, _, _ = cann.sparse_flash_attention(
        *map(_np, (query[..., :512], k, v, sparse_indices, block_table)),
        None,
        *map(_np, (actual_seq_lengths_kv, query[..., 512:], k_rope)),
        scale_value=scale_value,
        **given,
    )
    return _as(out, query.dtype)


def _moe_gating_top_k(x: Tensor, k: int, *, bias: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert bias.dtype == x.dtype
    weights, experts, normed = cann.moe_gating_top_k(_np(x), _np(bias), k=k, **given)
    return _as(weights, x.dtype), _as(experts, torch.int32), _as(normed, torch.float32)


def _moe_init_routing_v2(x: Tensor, expert_idx: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert expert_idx.dtype == torch.int32 and given["expert_tokens_num_flag"] is True
    rows, places, counts, _ = cann.moe_init_routing(_np(x), _np(expert_idx), **given)
    undefined = torch.full((expert_idx.numel(),), torch.nan)
    return _as(rows, x.dtype), _as(places, torch.int32), _as(counts, torch.int64), undefined


def _int4(packed: Tensor) -> np.ndarray:
    """Eight to an int32, the first in its lowest bits (npu_convert_weight_to_int4pack)."""
    raw = packed.contiguous().numpy().view(np.uint8)
    halves = np.stack([raw & 15, raw >> 4], -1).reshape(*packed.shape[:-1], -1).astype(np.int64)
    return np.where(halves > 7, halves - 16, halves)


def _integers(weight: Tensor) -> np.ndarray:
    return _int4(weight) if weight.dtype == torch.int32 else _np(weight)


def _int8_times_int4(rows: np.ndarray, matrix: np.ndarray, scale: Tensor, bias: Tensor) -> np.ndarray:
    """The two halves of an int8, of which the kernel takes the lower less 8; the bias makes up for it."""
    assert scale.dtype == torch.int64 and scale.dim() == 2 and scale.shape[0] == 1 and bias.dtype == torch.float32
    high, low = rows >> 4, (rows & 15) - 8
    factors = scale.to(torch.int32).view(torch.float32).to(torch.float64).numpy()
    return (16 * (high @ matrix) + low @ matrix) * factors + _np(bias)


def _grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    output_dtype: int | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
) -> list[Tensor]:
    (rows,), (weights,) = x, weight
    assert (split_item, group_type, group_list_type) == (3, 0, 1)
    assert group_list.dtype == torch.int64 and group_list.shape == (weights.shape[0],) and len(group_list) > 1
    assert (scale is None) == (per_token_scale is None) == (rows.dtype != torch.int8)
    assert (antiquant_scale is None) == (antiquant_offset is None) == (rows.dtype == weights.dtype or scale is not None)
    dtype = rows.dtype if output_dtype is None else _SCALAR_TYPES[output_dtype]
    matrices = _integers(weights)
    out = np.full((rows.shape[0], matrices.shape[2]), np.nan)  # rows of no group are left as they are
    start = 0
    for group, count in enumerate(group_list.tolist()):
        own, matrix = _np(rows[start : start + count]), matrices[group]
        if scale is not None and per_token_scale is not None:
            own = own.astype(np.int64)
            if weights.dtype == torch.int32:
                assert bias is not None
                part = _int8_times_int4(own, matrix.astype(np.int64), scale[0][group], bias[0][group])
            else:
                assert scale[0].dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
                part = own @ matrix.astype(np.int64) * _np(scale[0][group])
            part = part * _np(per_token_scale[0][start : start + count])[:, None]
        else:
            if antiquant_scale is not None and antiquant_offset is not None:
                matrix = _widened(matrix, antiquant_scale[0][group], antiquant_offset[0][group])
            part = own.astype(np.float64) @ matrix.astype(np.float64)
        out[start : start + count] = part
        start += count
    return [_as(out, dtype)]


def _widened(matrix: np.ndarray, scale: Tensor, offset: Tensor | None = None) -> np.ndarray:
    """(matrix + offset) * scale; [k, n] with a scale [n], or [groups, n]."""
    factors, shift = _np(scale), 0.0 if offset is None else _np(offset)
    if factors.ndim == 2:
        each = matrix.shape[0] // factors.shape[0]
        assert each * factors.shape[0] == matrix.shape[0]
        factors = np.repeat(factors, each, 0)
        shift = shift if offset is None else np.repeat(shift, each, 0)
    return (matrix + shift) * factors


def _weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: None = None,
    quant_scale: None = None,
    quant_offset: None = None,
    bias: None = None,
    antiquant_group_size: int = 0,
) -> Tensor:
    matrix = _integers(weight)
    groups = antiquant_scale.shape[0]
    assert antiquant_scale.dtype == x.dtype and antiquant_scale.dim() == 2
    assert groups == 1 if antiquant_group_size == 0 else groups == matrix.shape[0] // antiquant_group_size
    assert antiquant_group_size == 0 or (antiquant_group_size % 32 == 0 and antiquant_group_size < matrix.shape[0])
    return _as(_np(x) @ _widened(matrix, antiquant_scale), x.dtype)


def _swiglu(x: Tensor, dim: int = -1) -> Tensor:
    assert dim == -1
    gate, up = np.split(_np(x), 2, axis=-1)
    return _as(gate / (1 + np.exp(-gate)) * up, x.dtype)


def _interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, S, 64] as pairs, put out as halves; cos and sin of one head, of S or one place."""
    assert x.is_contiguous() and x.dtype == cos.dtype == sin.dtype and cos.shape == sin.shape
    assert x.shape[3] == cos.shape[3] == 64 and cos.shape[:2] == (x.shape[0], 1) and cos.shape[2] in (1, x.shape[2])
    q = np.swapaxes(_np(x).reshape(*x.shape[:3], 32, 2), -1, -2).reshape(x.shape)
    half = np.concatenate([-q[..., 32:], q[..., :32]], axis=-1)
    return _as(q * _np(cos) + half * _np(sin), x.dtype)


def _moe_finalize_routing(
    rows: Tensor,
    skip1: None,
    skip2: None,
    bias: None,
    scales: Tensor,
    places: Tensor,
    experts: None,
    drop_pad_mode: int = 0,
) -> Tensor:
    """drop_pad_mode 2: no row is dropped, and a token's places follow each other. torch_npu's own document has mode 0
    only; this is how cann-recipes-infer calls it on the places of npu_moe_init_routing_v2."""
    assert drop_pad_mode == 2 and scales.dtype == rows.dtype and places.dtype == torch.int32
    assert ((places >= 0) & (places < rows.shape[0])).all()
    own = _np(rows)[places.numpy()].reshape(*scales.shape, rows.shape[1])
    return _as((own * _np(scales)[:, :, None]).sum(1), rows.dtype)


class Meeting:
    """Where ranks that are threads of one process hand each other what an exchange sends, under a group's name."""

    def __init__(self, ranks: int):
        self.barrier, self.held = threading.Barrier(ranks, timeout=60), [None] * ranks

    def all_gather(self, rank: int, value: Any) -> list[Any]:
        self.held[rank] = value
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()
        return found


MEETINGS: dict[str, Meeting] = {}


def _all_gather(group: str, rank: int, ranks: int, value: Any) -> list[Any]:
    """What each rank of a group has, on all of them: threads that meet, or processes of torch.distributed."""
    if group in MEETINGS:
        return MEETINGS[group].all_gather(rank, value)
    import torch.distributed as dist

    made = dist.distributed_c10d._resolve_process_group(group)
    assert dist.get_world_size(made) == ranks and dist.get_rank(made) == rank
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, value, made)
    return found


def _moe_distribute_dispatch_v2(
    x: Tensor, ids: Tensor, group: str, ranks: int, rank: int, experts: int, *, quant_mode: int = 0, **given: Any
) -> tuple[Tensor, ...]:
    """A row for each choice that lives here: by expert, then by the rank that it comes from. What is sent in
    assist_info_for_combine is the kernel's own matter; here the rank, token and choice of each row."""
    assert given in ({}, {"expert_token_nums_type": 1}) and experts % ranks == 0 and 0 <= rank < ranks
    assert ids.dtype == torch.int32 and ids.shape[0] == x.shape[0] and ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist()), "an expert twice for one token"
    local, choices = experts // ranks, ids.shape[1]
    values, scale = _dynamic_quant(x) if quant_mode == 2 else (x, torch.zeros(x.shape[0]))
    sent = _all_gather(group, rank, ranks, (values.clone(), scale, ids.clone()))
    assert len({each[2].shape for each in sent}) == 1, "global_bs 0: all ranks have as many tokens"
    room = x.shape[0] * ranks * min(local, choices)
    rows = torch.full((room, x.shape[1]), -77 if quant_mode == 2 else torch.nan, dtype=values.dtype)
    scales, assist = torch.full((room,), torch.nan), torch.full((max(ids.numel(), room * 128),), -1, dtype=torch.int32)
    counts, received, place = torch.zeros(local, dtype=torch.int64), [], 0
    for expert in range(local):
        for source, (theirs, theirs_scale, theirs_ids) in enumerate(sent):
            for token, choice in (theirs_ids == rank * local + expert).nonzero().tolist():
                rows[place], scales[place] = theirs[token], theirs_scale[token]
                assist[place * 128 : place * 128 + 3] = torch.tensor([source, token, choice])
                counts[expert] += 1
                place += 1
            received.append(place)
    none = torch.zeros(0, dtype=torch.int32)
    return rows, scales, assist, counts, torch.tensor(received, dtype=torch.int32), none, torch.zeros(0)


def _moe_distribute_combine_v2(
    x: Tensor,
    ids: Tensor,
    assist: Tensor,
    counts: Tensor,
    weights: Tensor,
    group: str,
    ranks: int,
    rank: int,
    experts: int,
) -> Tensor:
    assert weights.dtype == torch.float32 and weights.shape == ids.shape and len(counts) == experts
    mine = assist.reshape(-1, 128)[: int(counts[-1]), :3].clone() if len(counts) else assist.new_empty((0, 3))
    total = np.zeros((ids.shape[0], x.shape[1]))
    seen = np.zeros(ids.shape, bool)
    for rows, places in _all_gather(group, rank, ranks, (x[: len(mine)].clone(), mine)):
        for row, (source, token, choice) in zip(_np(rows), places.tolist(), strict=True):
            if source == rank:
                total[token] += row * float(weights[token, choice])
                seen[token, choice] = True
    assert seen.all()
    return _as(total, x.dtype)


REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": _rms_norm,
    "npu_dynamic_quant": _dynamic_quant,
    "npu_quant_matmul": _quant_matmul,
    "npu_scatter_nd_update_": _scatter_nd_update_,
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
    "npu_interleave_rope": _interleave_rope,
    "npu_moe_finalize_routing": _moe_finalize_routing,
    "npu_moe_distribute_dispatch_v2": _moe_distribute_dispatch_v2,
    "npu_moe_distribute_combine_v2": _moe_distribute_combine_v2,
}
