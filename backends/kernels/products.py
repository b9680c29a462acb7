"""Lowerings of `glm.linear` and `glm.expert_ffn`."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from backends.kernels.launch import launch
from backends.kernels.library import Capability
from backends.kernels.lowering import KernelLowering, blocks, is_fp8, not_bfloat16, out, splits
from backends.kernels.variants import DEPTH, DOWN_DEPTH, FEW, MANY
from model.quantised import shared_size

_LINEAR_ROWS = 128  # above, dequantising the matrix once costs less than it saves
_COLUMNS, _DOWN_COLUMNS = 64, 128
_UNSORTED = 128  # choices: so few that each may be a tile of its own
_AT_ONCE, _LARGE_BYTES = 4, 32e6  # choices of a token that are in memory with all columns; of small steps all are
_MANY_AN_EXPERT = 12  # choices an expert on average, from which tiles are larger


def _misfit(depth: int, width: int, scale_depth: int | None, step: int) -> str | None:
    """Why a matrix [depth, width] does not suit the kernels; `scale_depth`: how many scales lie along its depth."""
    if depth % 16 or width % 16:
        return f"a matrix of {depth} x {width}: not multiples of 16"
    if scale_depth is not None:
        each = shared_size(depth, scale_depth)
        if each % step and each < depth:
            return f"a scale for every {each} of the depth: not a multiple of {step}"
    return None


def linear_why_not(x: Array, *matrix: Array) -> str | None:
    if not is_fp8(matrix):
        return "a matrix that is not in block-FP8: XLA's libraries have that product"
    if why := not_bfloat16(x=x):
        return why
    values, scale = matrix
    if (rows := x.size // x.shape[-1]) > _LINEAR_ROWS:
        return f"{rows} rows: above {_LINEAR_ROWS} XLA widens the matrix and uses a library"
    if values.shape[1:-1] != scale.shape[1:-1]:
        return f"scales of shape {scale.shape} for {values.shape}: not one for each of the middle dims"
    return _misfit(values.shape[0], values.size // values.shape[0], scale.shape[0], DEPTH)


def linear(capability: Capability, x: Array, values: Array, scale: Array) -> Array:
    depth, last = values.shape[0], values.shape[1:]
    rows, width = x.size // depth, values.size // depth
    tile = FEW if rows <= FEW else MANY
    grid = (blocks(width, _COLUMNS), blocks(rows, tile))
    steps = blocks(depth, DEPTH)
    each_split = blocks(steps, splits(grid[0] * grid[1], steps))
    parts = blocks(steps, each_split)
    dtype = jnp.bfloat16 if parts == 1 else jnp.float32
    numbers = [
        rows, depth, width, scale.size // scale.shape[0], shared_size(depth, scale.shape[0]),
        shared_size(last[-1], scale.shape[-1]), last[-1], scale.shape[-1], each_split * DEPTH,
    ]  # fmt: skip
    name = f"linear_{tile}_{'bf16' if parts == 1 else 'fp32'}"
    (done,) = launch(
        name, capability, [out((parts, rows, width), dtype)], (*grid, parts), [x, _bytes(values), scale], numbers
    )
    return (
        jnp.sum(done, 0).astype(x.dtype).reshape(*x.shape[:-1], *last)
        if parts > 1
        else done.reshape(*x.shape[:-1], *last)
    )


def _bytes(values: Array) -> Array:
    return lax.bitcast_convert_type(values, jnp.uint8)


def expert_ffn_why_not(x: Array, experts: Array, weights: Array, *matrices: Array) -> str | None:
    half = len(matrices) // 2
    gate_up, down = matrices[:half], matrices[half:]
    if half == 1:
        if why := not_bfloat16(x=x, gate_up=gate_up[0], down=down[0]):
            return why
    elif not (is_fp8(gate_up) and is_fp8(down)):
        return "experts in a format other than bfloat16 and block-FP8"
    elif why := not_bfloat16(x=x):
        return why
    count, width, depth = down[0].shape
    if half == 2 and (gate_up[1].shape[::2] != (count, 2) or down[1].shape[0] != count):
        return f"scales of shapes {gate_up[1].shape} and {down[1].shape}: not one for each expert and half"
    up_scales, down_scales = (gate_up[1].shape[1], down[1].shape[1]) if half == 2 else (None, None)
    return _misfit(depth, width, up_scales, DEPTH) or _misfit(width, depth, down_scales, DOWN_DEPTH)


def expert_ffn(capability: Capability, x: Array, experts: Array, weights: Array, *matrices: Array) -> Array:
    half = len(matrices) // 2
    gate_up, down = matrices[:half], matrices[half:]
    (tokens, top_k), (count, width, depth) = experts.shape, down[0].shape
    choices, kind = tokens * top_k, "bf16" if half == 1 else "u8"
    rows = MANY if choices >= _MANY_AN_EXPERT * count else FEW
    order, tiles = _one_each(experts, count) if choices <= _UNSORTED else tiles_of(experts, count, rows)
    up_operands = [x, order, tiles, *_matrix(gate_up)]
    up_sizes = _scale_sizes(gate_up, 1, 3)
    (hidden,) = launch(
        f"expert_up_{rows}_{kind}", capability, [out((choices, width), jnp.bfloat16)],
        (blocks(width, _COLUMNS), tiles.shape[0]), up_operands, [top_k, depth, width, *up_sizes],
    )  # fmt: skip
    flat = weights.astype(jnp.float32).reshape(-1)
    dtype = jnp.float32 if rows == FEW else jnp.bfloat16
    here = (experts < count)[:, :, None]  # what is another device's is in no tile, and was not written
    parts = blocks(top_k, _AT_ONCE) if choices * depth * jnp.dtype(dtype).itemsize > _LARGE_BYTES else 1
    each, made = _DOWN_COLUMNS * blocks(depth, parts * _DOWN_COLUMNS), []
    for begin in range(0, depth, each):
        part = min(each, depth - begin)
        (done,) = launch(
            f"expert_down_{rows}_{kind}", capability, [out((choices, part), dtype)],
            (blocks(part, _DOWN_COLUMNS), tiles.shape[0]), [hidden, order, tiles, flat, *_matrix(down)],
            [width, depth, begin, part, *_scale_sizes(down, 1, 2)],
        )  # fmt: skip
        done = jnp.where(here, done.reshape(tokens, top_k, part), 0).astype(jnp.float32)
        made.append(jnp.sum(done, axis=1).astype(x.dtype))
        if begin + part < depth:
            hidden, made[-1] = lax.optimization_barrier((hidden, made[-1]))  # the next part lies where this one did
    return jnp.concatenate(made, axis=1) if len(made) > 1 else made[0]


def _matrix(matrix: tuple[Array, ...]) -> tuple[Array, ...]:
    return (_bytes(matrix[0]), matrix[1]) if len(matrix) == 2 else matrix


def _scale_sizes(matrix: tuple[Array, ...], depth: int, width: int) -> list[int]:
    """How many scales lie along these dims, and how many entries share one."""
    if len(matrix) == 1:
        return [1, 1, 1, 1]
    sizes, parts = matrix[0].shape, matrix[1].shape
    return [parts[depth], parts[width], *(shared_size(sizes[dim], parts[dim]) for dim in (depth, width))]


def _one_each(experts: Array, count: int) -> tuple[Array, Array]:
    """See `tiles_of`: every choice a tile."""
    chosen = experts.reshape(-1).astype(jnp.int32)
    order = jnp.arange(chosen.size, dtype=jnp.int32)
    here = chosen < count
    return order, jnp.stack([jnp.where(here, chosen, 0), order, here.astype(jnp.int32)], axis=1)


def tiles_of(experts: Array, count: int, rows: int) -> tuple[Array, Array]:
    """experts [n,k] -> order [n*k], the choices sorted by expert, and tiles [.., 3]: expert, first place, places.

    A tile is up to `rows` choices of one expert. There are as many tiles as there can be; those left over have no
    places, and choices of experts beyond `count` are in none.
    """
    chosen = experts.reshape(-1).astype(jnp.int32)
    choices = chosen.size
    order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    ids = jnp.arange(count, dtype=jnp.int32)
    sizes = jnp.sum(chosen[None, :] == ids[:, None], axis=1, dtype=jnp.int32)
    first = jnp.cumsum(sizes) - sizes
    tiles = (sizes + rows - 1) // rows
    end = jnp.cumsum(tiles)
    tile = jnp.arange(min(choices, min(count, choices) + choices // rows), dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(end[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), count - 1)
    before = (tile - (end - tiles)[owner]) * rows
    places = jnp.where(tile < end[-1], jnp.clip(sizes[owner] - before, 0, rows), 0)
    return order, jnp.stack([owner, first[owner] + before, places], axis=1)


LOWERINGS = (
    KernelLowering(
        "glm.linear",
        f"block-FP8 matrices with bfloat16 rows, {_LINEAR_ROWS} of them at most; XLA's libraries have the others",
        linear_why_not,
        linear,
    ),
    KernelLowering(
        "glm.expert_ffn",
        "bfloat16 rows; experts in bfloat16 or block-FP8, widths multiples of 16",
        expert_ffn_why_not,
        expert_ffn,
    ),
)
