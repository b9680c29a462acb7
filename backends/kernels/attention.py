"""Lowerings of `glm.sparse_attention`, `glm.latent_attention`, `glm.paged_attention` and `glm.expanded_attention`."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from backends.kernels.launch import launch
from backends.kernels.library import Capability, fits, target_for
from backends.kernels.lowering import KernelLowering, blocks, not_bfloat16, out, splits
from backends.kernels.variants import EXPANDED, FEW, HEAD_WIDTH, MANY, REST, TALL, VALUE, native_fp8
from model.narrow_rows import is_narrow
from model.ops import context_rows, read_rows

_EXPANDED = tuple((nope + more, value) for nope, more, value in EXPANDED)
_LATENT_BLOCK, _HEAD_BLOCK = 32, 64  # positions a step
_RECORDS = "_u8"


def _latent_misfit(query: Array, pages: Array, value_dim: int) -> str | None:
    if (value_dim, query.shape[-1]) != (VALUE, VALUE + REST):
        return f"latents of {value_dim} + {query.shape[-1] - value_dim}: kernels are for {VALUE} + {REST}"
    return not_bfloat16(query=query) or (None if is_narrow(pages) else not_bfloat16(pages=pages))


def _of(pages: Array) -> str:
    """Of the names of kernels that read records of FP8, what tells them."""
    return _RECORDS if is_narrow(pages) else ""


def _rows(kernel: str, needed: int, capability: Capability) -> int:
    """Rows of a program: many where there are as many, and shared memory for them. Records widened by arithmetic leave
    no registers for them."""
    widens = kernel.endswith(_RECORDS) and not native_fp8(target_for(capability))
    return MANY if needed > FEW and not widens and fits(f"{kernel}_{MANY}", capability) else FEW


def sparse_attention_why_not(
    query: Array, pages: Array, page_table: Array, selected: Array, positions: Array, *, scale: float, value_dim: int
) -> str | None:
    return _latent_misfit(query, pages, value_dim)


def sparse_attention(
    capability: Capability, query: Array, pages: Array, page_table: Array, selected: Array, positions: Array, *,
    scale: float, value_dim: int,
) -> Array:  # fmt: skip
    b, t, heads, _ = query.shape
    count = selected.shape[2]
    name = f"sparse_attention{_of(pages)}"
    rows = _rows(name, heads, capability)
    grid = (b * t, blocks(heads, rows))
    parts = splits(grid[0] * grid[1], blocks(count, _LATENT_BLOCK))
    operands = [query, pages, page_table, selected, positions]
    numbers = [t, heads, count, pages.shape[1], page_table.shape[1], parts, float(scale)]
    return _finish(capability, f"{name}_{rows}", query, VALUE, (*grid, parts), operands, numbers)


def latent_attention_why_not(
    query: Array, pages: Array, page_table: Array, positions: Array, *, scale: float, value_dim: int
) -> str | None:
    return _latent_misfit(query, pages, value_dim)


def latent_attention(
    capability: Capability, query: Array, pages: Array, page_table: Array, positions: Array, *, scale: float,
    value_dim: int,
) -> Array:  # fmt: skip
    operands = [query, pages, page_table, positions]
    return _context(capability, f"latent_attention{_of(pages)}", VALUE, query, operands, 1, _LATENT_BLOCK, scale)


def paged_attention_why_not(
    query: Array, key_pages: Array, value_pages: Array, page_table: Array, positions: Array, *, scale: float
) -> str | None:
    if query.shape[-1] != HEAD_WIDTH:
        return f"heads of width {query.shape[-1]}: kernels are for {HEAD_WIDTH}"
    return not_bfloat16(query=query, key_pages=key_pages, value_pages=value_pages)


def paged_attention(
    capability: Capability, query: Array, key_pages: Array, value_pages: Array, page_table: Array, positions: Array, *,
    scale: float,
) -> Array:  # fmt: skip
    operands = [query, key_pages, value_pages, page_table, positions]
    return _context(capability, "paged_attention", HEAD_WIDTH, query, operands, key_pages.shape[2], _HEAD_BLOCK, scale)


def _context(
    capability: Capability, name: str, width: int, query: Array, operands: list[Array], groups: int, block: int,
    scale: float,
) -> Array:  # fmt: skip
    """Attention over the whole context, of heads in groups that share keys."""
    b, t, heads, _ = query.shape
    page_size, table_width = operands[1].shape[1], operands[-2].shape[1]
    pairs = t * (heads // groups)
    rows = _rows(name, pairs, capability)
    grid = (blocks(pairs, rows), b * groups)
    parts = splits(grid[0] * grid[1], blocks(table_width * page_size, block))
    numbers = [t, heads, groups, page_size, table_width, parts, float(scale)]
    return _finish(capability, f"{name}_{rows}", query, width, (*grid, parts), operands, numbers)


def _finish(
    capability: Capability, name: str, query: Array, width: int, grid: tuple[int, int, int], operands: list[Array],
    numbers: list[int | float],
) -> Array:  # fmt: skip
    """Launches a kernel of splits, and joins them."""
    lead, parts = query.shape[:3], grid[2]
    sums = [out((*lead, parts, width), jnp.float32), out((*lead, parts, 2), jnp.float32)]
    done = launch(name, capability, sums, grid, operands, numbers)
    return join(capability, *(each.reshape(-1, *each.shape[3:]) for each in done)).reshape(*lead, width)


def join(capability: Capability, parts: Array, stats: Array) -> Array:
    """What the splits of a row found, [rows, splits, width] and [rows, splits, 2], as one: bfloat16 [rows, width]."""
    rows, count, width = parts.shape
    (joined,) = launch(
        f"join_{width}", capability, [out((rows, width), jnp.bfloat16)], (rows,), [parts, stats], [count]
    )
    return joined


def expanded_attention_why_not(
    query: Array, pages: Array, page_table: Array, k_up: Array, v_up: Array, positions: Array, *, scale: float
) -> str | None:
    nope, value = k_up.shape[1], v_up.shape[2]
    if (nope, value) not in _EXPANDED or query.shape[-1] != nope + REST:
        known = " and ".join(f"{nope} + {REST} and {value}" for nope, value in _EXPANDED)
        return f"heads of {nope} + {query.shape[-1] - nope} and {value}: kernels are for {known}"
    if k_up.shape[2] != VALUE:
        return f"latents of {k_up.shape[2]} + {query.shape[-1] - nope}: kernels are for {VALUE} + {REST}"
    return not_bfloat16(query=query) or (None if is_narrow(pages) else not_bfloat16(pages=pages))


def expanded_attention(
    capability: Capability, query: Array, pages: Array, page_table: Array, k_up: Array, v_up: Array,
    positions: Array, *, scale: float,
) -> Array:  # fmt: skip
    """The expansion is XLA's: two products, whose rows are [context, heads, ..] as they come out of them."""
    b, t, heads, _ = query.shape
    nope, value = k_up.shape[1], v_up.shape[2]
    rows = read_rows(context_rows(pages, page_table), query, VALUE + REST, REST)
    latents = rows[..., :VALUE]
    keys = jnp.einsum("bcl,hnl->bchn", latents, k_up.astype(query.dtype))
    values = jnp.einsum("bcl,hlv->bchv", latents, v_up.astype(query.dtype))
    tall = t > MANY and fits(f"expanded_attention_{TALL}_{nope}", capability)
    tile = TALL if tall else MANY
    (made,) = launch(
        f"expanded_attention_{tile}_{nope}", capability, [out((b, t, heads, value), query.dtype)],
        (blocks(t, tile), b * heads), [query, rows, keys, values, positions], [t, heads, rows.shape[1], float(scale)],
    )  # fmt: skip
    return made


_LATENTS = f"bfloat16 queries, caches in bfloat16 or FP8 records, latents of {VALUE} + {REST}"
LOWERINGS = (
    KernelLowering("glm.sparse_attention", _LATENTS, sparse_attention_why_not, sparse_attention),
    KernelLowering("glm.latent_attention", _LATENTS, latent_attention_why_not, latent_attention),
    KernelLowering(
        "glm.paged_attention",
        f"bfloat16 queries and caches, heads of width {HEAD_WIDTH}",
        paged_attention_why_not,
        paged_attention,
    ),
    KernelLowering(
        "glm.expanded_attention",
        f"{_LATENTS}, heads of {' or '.join(f'{nope} + {REST} and {value}' for nope, value in _EXPANDED)}",
        expanded_attention_why_not,
        expanded_attention,
    ),
)
