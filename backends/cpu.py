"""The host CPU through XLA.

Kernels of its own, where XLA's form of the decomposition is slow on a CPU:

- Routed experts. The decomposition reads every expert, or copies the chosen ones. Here each chosen expert's
  matrices are sliced out once and meet its rows in a product of the next size up from a few fixed ones.
- Selection for a chunk of queries. A sort of every row is far slower than bisection on the bits of the scores;
  bisection gives a mask, which is what the attention below wants. So `select_topk` and `sparse_attention` agree
  between themselves on a mask, bool [b,t,c], in place of positions, whenever `_masks` says so. Where a selection
  leaves its program, for the next pipeline stage, it does so as positions (`settle`).
- Sparse attention of a chunk. Gathering a set of rows for every query costs more than masked attention over the
  whole context, until the context is many times the selection.
- Cache writes. XLA rewrites a scatter of one row into a form that copies the whole cache, while a loop of
  updates works in place on the donated buffer: a row at a time for a few tokens, a page at a time for a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from backends.interface import Capabilities
from backends.xla import NARROW_ROWS, XlaBackend
from model.ops import OPS, context_rows, dequantise, masked_softmax, read_rows, stored_rows, swiglu_body


class CpuBackend(XlaBackend):
    """Runs anywhere; computes in float32 by preference, since XLA's bfloat16 products are slow on CPUs."""

    name = "cpu"
    summary = "the host CPU through XLA"
    platform = "cpu"

    def unavailable(self) -> str | None:
        return None if self._found[0] else self._found[1]

    def capabilities(self) -> Capabilities:
        return Capabilities(
            platform=self.platform,
            devices=self.devices(),
            dtypes=frozenset({"float32", "bfloat16"}),
            preferred_dtype="float32",
            fp8_weights=True,
            donation=True,
            dlpack=True,
            cache_rows=NARROW_ROWS,
        )

    def lowerings(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "glm.cache_write": cache_write,
            "glm.expert_ffn": expert_ffn,
            "glm.select_topk": select_topk,
            "glm.sparse_attention": sparse_attention,
        }

    def settle(self, value: Any, meant: jax.ShapeDtypeStruct) -> Any:
        if value.dtype != jnp.bool_ or meant.dtype == jnp.bool_:
            return value
        # entries of a mask before others, the lowest positions first: a row that sees few keeps all it sees
        return lax.top_k(value.astype(jnp.int32), meant.shape[-1])[1].astype(meant.dtype)


def cache_write(pages: Array, rows: Array, slots: Array, *, cache: str = "", plain: int = 0) -> Array:
    """See `model.ops.cache_write`."""
    rows = stored_rows(pages, rows, plain)
    if slots.shape[1] < pages.shape[1]:
        return _write_rows(pages, rows, slots)
    return _write_pages(pages, rows, slots)


_FEW_ROWS = 16


def _write_rows(pages: Array, rows: Array, slots: Array) -> Array:
    page_size, origin = pages.shape[1], (jnp.int32(0),) * (pages.ndim - 2)
    flat_rows, flat_slots = rows.reshape(-1, *rows.shape[2:]), slots.reshape(-1)

    def body(i: Array, pages: Array) -> Array:
        row = lax.dynamic_slice_in_dim(flat_rows, i, 1, 0)[None]
        slot = flat_slots[i]
        return lax.dynamic_update_slice(pages, row, (slot // page_size, slot % page_size, *origin))

    count = flat_rows.shape[0]
    return lax.fori_loop(0, count, body, pages, unroll=count <= _FEW_ROWS)


def _write_pages(pages: Array, rows: Array, slots: Array) -> Array:
    """A sequence's tokens are consecutive, so that its chunk falls into blocks of one page each."""
    (b, t), s, origin = slots.shape, pages.shape[1], (jnp.int32(0),) * (pages.ndim - 2)
    blocks = -(-(t - 1) // s) + 1
    # nothing on either side keeps every slice in bounds
    rows = jnp.pad(rows, ((0, 0), (s, 2 * s), *((0, 0),) * (rows.ndim - 2)))
    real = jnp.pad(slots, ((0, 0), (s, 2 * s)), constant_values=-1)
    first = slots[:, 0] % s

    def body(i: Array, pages: Array) -> Array:
        sequence, at = i // blocks, s + (i % blocks) * s - first[i // blocks]
        new = lax.dynamic_slice(rows, (sequence, at, *origin), (1, s, *rows.shape[2:]))
        block = lax.dynamic_slice(real, (sequence, at), (1, s))
        page = jnp.maximum(jnp.max(block), 0) // s
        here = (page, jnp.int32(0), *origin)
        old = lax.dynamic_slice(pages, here, (1, *pages.shape[1:]))
        # padding among them has slots of page 0, and is not written
        mine = ((block >= 0) & (block // s == page)).reshape(1, s, *(1,) * (pages.ndim - 2))
        return lax.dynamic_update_slice(pages, jnp.where(mine, new, old), here)

    return lax.fori_loop(0, b * blocks, body, pages)


_MASK_UP_TO = 16  # times the selection: the context up to which masking beats gathering for chunks


def _masks(queries: int, context: int, k: int) -> bool:
    """Whether the selection is kept as a mask."""
    return queries > 1 and context <= _MASK_UP_TO * k


def select_topk(scores: Array, *, k: int) -> Array:
    """See `model.ops.select_topk`: its positions, or a mask of them, bool [b,t,c], if `_masks`.

    Where a row has fewer than k visible entries, the mask may hold any number of invisible ones.
    """
    if not _masks(scores.shape[1], scores.shape[2], k):
        return OPS["glm.select_topk"].meaning(scores, k=k)
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # integers in lax.top_k's order of the floats

    def at_least(bound: Array) -> Array:
        return jnp.sum(order >= bound[..., None], axis=-1, dtype=jnp.int32)

    # The bits of each row's bound from the highest down, until as many as wanted are at least as large. Rows that
    # see fewer than k have nothing to choose.
    few = at_least(jnp.full(scores.shape[:2], _ORDER_OF_MINUS_INFINITY + 1, jnp.int32)) <= k
    zero = jnp.zeros(scores.shape[:2], jnp.int32)
    positive = at_least(zero)
    bound = jnp.where(positive >= k, zero, jnp.iinfo(jnp.int32).min)
    count = jnp.where(positive >= k, positive, scores.shape[2])
    bound = jnp.where(few, _ORDER_OF_MINUS_INFINITY, bound)

    def undecided(state: tuple[Array, Array, Array]) -> Array:
        bit, _, count = state
        return (bit >= 0) & jnp.any((count != k) & ~few)

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, bound, count = state
        higher = bound + (jnp.int32(1) << bit)
        there = at_least(higher)
        raise_it = (there >= k) & ~few
        return bit - 1, jnp.where(raise_it, higher, bound), jnp.where(raise_it, there, count)

    _, kth, _ = lax.while_loop(undecided, body, (jnp.int32(30), bound, count))
    above, equal = order > kth[..., None], order == kth[..., None]
    left = k - jnp.sum(above, axis=-1, dtype=jnp.int32)
    tied = (jnp.sum(equal, axis=-1, dtype=jnp.int32) > left) & (kth > _ORDER_OF_MINUS_INFINITY)

    def lowest_positions() -> Array:
        return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= left[..., None]))

    return lax.cond(jnp.any(tied), lowest_positions, lambda: above | equal)


_ORDER_OF_MINUS_INFINITY = -0x7F800001


def sparse_attention(
    query: Array, pages: Array, page_table: Array, selected: Array, positions: Array, *, scale: float, value_dim: int
) -> Array:
    """See `model.ops.sparse_attention`; `selected` may be the mask of `select_topk` here."""
    context = page_table.shape[1] * pages.shape[1]
    if selected.dtype != jnp.bool_:
        if not _masks(query.shape[1], context, selected.shape[2]):
            meaning = OPS["glm.sparse_attention"].meaning
            return meaning(query, pages, page_table, selected, positions, scale=scale, value_dim=value_dim)
        selected = _mask(selected, context)
    rows = read_rows(context_rows(pages, page_table), query, query.shape[3], query.shape[3] - value_dim)
    visible = lax.broadcasted_iota(jnp.int32, (1, 1, context), 2) <= positions[:, :, None]
    scores = jnp.einsum("bthl,bcl->bthc", query, rows, preferred_element_type=jnp.float32) * jnp.float32(scale)
    weights = masked_softmax(scores, (selected & visible)[:, :, None, :]).astype(query.dtype)
    out = jnp.einsum("bthc,bcv->bthv", weights, rows[..., :value_dim], preferred_element_type=jnp.float32)
    return out.astype(query.dtype)


def _mask(selected: Array, context: int) -> Array:
    b, t, _ = selected.shape
    index = (jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None], selected)
    return jnp.zeros((b, t, context), bool).at[index].set(True, mode="promise_in_bounds")


_FEW_CHOICES = 16
_GEARS = (8, 16, 24, 32, 48, 64, 96, 128)  # rows of an expert's product, in a chunk; each is a loop to compile
_DECODE_GEARS = (1, 8)


def expert_ffn(x: Array, experts: Array, weights: Array, *matrices: Array) -> Array:
    """The routed experts, see `model.ops.expert_ffn`."""
    half = len(matrices) // 2
    gate_up, down = matrices[:half], matrices[half:]
    by = _by_choice if experts.size <= _FEW_CHOICES else _by_expert
    return by(x, experts, weights, gate_up, down)


def _pick(matrix: tuple[Array, ...], expert: Array, dtype: Any) -> Array:
    chosen = [lax.dynamic_index_in_dim(part, expert, 0, keepdims=False) for part in matrix]
    return dequantise(chosen[0], chosen[1], dtype) if len(chosen) == 2 else chosen[0].astype(dtype)


def _one(rows: Array, gate_up: tuple[Array, ...], down: tuple[Array, ...], expert: Array) -> Array:
    """One expert over rows [r,d] -> float32 [r,d]."""
    w = _pick(gate_up, expert, rows.dtype)
    hidden = lax.dot_general(rows, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    hidden = swiglu_body(hidden.astype(rows.dtype))
    return jnp.dot(hidden, _pick(down, expert, rows.dtype), preferred_element_type=jnp.float32)


def _by_choice(x: Array, experts: Array, weights: Array, gate_up: tuple[Array, ...], down: tuple[Array, ...]) -> Array:
    top_k, count = experts.shape[1], gate_up[0].shape[0]

    def body(i: Array, out: Array) -> Array:
        token = i // top_k
        expert = experts[token, i % top_k]
        here = expert < count
        rows = lax.dynamic_slice_in_dim(x, token, 1, 0)
        share = jnp.where(here, weights[token, i % top_k], 0.0)
        done = _one(rows, gate_up, down, jnp.where(here, expert, 0)) * share
        return lax.dynamic_update_slice_in_dim(out, lax.dynamic_slice_in_dim(out, token, 1, 0) + done, token, 0)

    return lax.fori_loop(0, experts.size, body, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def _by_expert(x: Array, experts: Array, weights: Array, gate_up: tuple[Array, ...], down: tuple[Array, ...]) -> Array:
    """A product for each tile: an expert's rows, or as many of them as the largest gear takes."""
    tokens, top_k = experts.shape
    count, choices = gate_up[0].shape[0], experts.size
    gears = [gear for gear in (_DECODE_GEARS if tokens <= _DECODE_GEARS[-1] else _GEARS) if gear < 2 * tokens]
    most = gears[-1]
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    sizes = jnp.zeros((count + 1,), jnp.int32).at[chosen].add(1, mode="promise_in_bounds")[:count]
    first_row = jnp.cumsum(sizes) - sizes
    tiles = (sizes + most - 1) // most
    tile_end = jnp.cumsum(tiles)
    tile = jnp.arange(count + choices // most, dtype=jnp.int32)  # no more than these, the rest have no rows
    owner = jnp.minimum(jnp.sum(tile_end[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), count - 1)
    before = (tile - (tile_end - tiles)[owner]) * most
    size = jnp.where(tile < tile_end[-1], jnp.minimum(sizes[owner] - before, most), 0)
    begin = first_row[owner] + before
    by_size = jnp.argsort(size, stable=True)
    owner, begin, size = owner[by_size], begin[by_size], size[by_size]
    # rows sorted by expert, with room behind them to keep every slice in bounds
    rows = jnp.concatenate([x[order // top_k], jnp.zeros((most, x.shape[1]), x.dtype)])
    out = jnp.zeros(rows.shape, jnp.float32)
    done = jnp.sum(size == 0, dtype=jnp.int32)
    # a loop a gear, and not one loop that chooses: a choice inside it would copy `out` every time
    for gear in gears:
        end = jnp.sum(size <= gear, dtype=jnp.int32)

        def body(i: Array, out: Array, gear: int = gear) -> Array:
            new = _one(lax.dynamic_slice_in_dim(rows, begin[i], gear, 0), gate_up, down, owner[i])
            old = lax.dynamic_slice_in_dim(out, begin[i], gear, 0)
            own = (jnp.arange(gear, dtype=jnp.int32) < size[i])[:, None]
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own, new, old), begin[i], 0)

        out = lax.fori_loop(done, end, body, out)
        done = end
    place = jnp.zeros_like(order).at[order].set(jnp.arange(choices, dtype=jnp.int32), mode="promise_in_bounds")
    per_choice = out[place].reshape(tokens, top_k, x.shape[1])
    share = jnp.where(experts < count, weights, 0.0)
    return jnp.einsum("nkd,nk->nd", per_choice, share).astype(x.dtype)
