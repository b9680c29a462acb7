"""Products of bfloat16 rows with a matrix as the graph keeps it, [depth, width] in bfloat16 or block-FP8.

FP8 values go into the product unscaled (every e4m3 number is a bfloat16 number); the scales, one to a step of the
depth and a column, multiply the float32 sums. So nothing is rounded between the stored weight and the sum.
"""

import triton
import triton.language as tl


@triton.jit
def widened(values, QUANTISED: tl.constexpr, NATIVE: tl.constexpr):
    """A tile of a matrix in bfloat16: of e4m3's bits by the chip's own conversion, or by arithmetic where it has none
    (there the two codes that are no number read 480)."""
    if not QUANTISED:
        wide = values
    elif NATIVE:
        wide = values.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
    else:
        bits = values.to(tl.uint32)
        # the exponent lands 120 too low; the product puts it right, of subnormal numbers too
        shifted = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        wide = (shifted.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0).to(tl.bfloat16)
    return wide


@triton.jit
def linear(
    x, matrix, scale, out,
    rows, depth, width, scale_width, each_depth, each_width, group, group_scales, split_depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """x [rows, depth] times matrix [depth, width] -> out [splits, rows, width], a split a part of the depth.

    scale [.., scale_width]: a column's is that of its group of `group` columns, which have `group_scales`.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(2) * split_depth
    end = tl.minimum(begin + split_depth, depth)
    inside = column < width
    scales = scale + (column // group) * group_scales + (column % group) // each_width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(begin, end, DEPTH):
        step = at + tl.arange(0, DEPTH)
        left = tl.load(
            x + row[:, None] * depth + step[None, :], mask=(row[:, None] < rows) & (step[None, :] < end), other=0.0
        )
        right = tl.load(
            matrix + step[:, None].to(tl.int64) * width + column[None, :],
            mask=(step[:, None] < end) & inside[None, :],
            other=0,
        )
        factor = tl.load(scales + (at // each_depth) * scale_width, mask=inside, other=0.0)
        total += tl.dot(left, widened(right, True, NATIVE)) * factor[None, :]
    place = (tl.program_id(2) * rows + row[:, None]).to(tl.int64) * width + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row[:, None] < rows) & inside[None, :])


@triton.jit
def expert_up(
    x, order, tiles, matrix, scale, hidden,
    choices, depth, width, scale_depth, scale_width, each_depth, each_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, QUANTISED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """x [n, depth], a tile's rows, times its expert's [depth, 2, width] -> silu(gate) * up, hidden [place, width].

    order [place]: which choice, n * choices + k, is at a place. tiles [.., 3]: expert, first place, places.
    """
    tile = tiles + tl.program_id(1) * 3
    expert = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    count = tl.load(tile + 2)
    if count == 0:
        return
    index = tl.arange(0, ROWS)
    token = tl.load(order + first + index, mask=index < count, other=0) // choices
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    values = matrix + expert * depth * 2 * width + column
    gate_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    up_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, depth, DEPTH):
        step = at + tl.arange(0, DEPTH)
        mask = (step[:, None] < depth) & inside[None, :]
        here = values[None, :] + step[:, None].to(tl.int64) * (2 * width)
        rows = tl.load(
            x + token[:, None].to(tl.int64) * depth + step[None, :],
            mask=(index[:, None] < count) & (step[None, :] < depth),
            other=0.0,
        )
        gate = tl.dot(rows, widened(tl.load(here, mask=mask, other=0), QUANTISED, NATIVE))
        up = tl.dot(rows, widened(tl.load(here + width, mask=mask, other=0), QUANTISED, NATIVE))
        if QUANTISED:
            line = scale + (expert * scale_depth + at // each_depth) * 2 * scale_width + column // each_width
            gate *= tl.load(line, mask=inside, other=0.0)[None, :]
            up *= tl.load(line + scale_width, mask=inside, other=0.0)[None, :]
        gate_sum += gate
        up_sum += up
    out = gate_sum / (1.0 + tl.exp(-gate_sum)) * up_sum
    place = (first + index)[:, None].to(tl.int64) * width + column[None, :]
    tl.store(hidden + place, out.to(hidden.dtype.element_ty), mask=(index[:, None] < count) & inside[None, :])


@triton.jit
def expert_down(
    hidden, order, tiles, weights, matrix, scale, out,
    depth, width, begin, part_width, scale_depth, scale_width, each_depth, each_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, QUANTISED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """hidden [place, depth] times `part_width` columns, from `begin` on, of the tile's expert's [depth, width], times
    its choice's weight -> out [choice, part_width].

    Choices in no tile are not written.
    """
    tile = tiles + tl.program_id(1) * 3
    expert = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    count = tl.load(tile + 2)
    if count == 0:
        return
    index = tl.arange(0, ROWS)
    place_in = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place_in < part_width
    column = begin + place_in
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, depth, DEPTH):
        step = at + tl.arange(0, DEPTH)
        rows = tl.load(
            hidden + (first + index)[:, None].to(tl.int64) * depth + step[None, :],
            mask=(index[:, None] < count) & (step[None, :] < depth),
            other=0.0,
        )
        values = tl.load(
            matrix + (expert * depth + step[:, None]) * width + column[None, :],
            mask=(step[:, None] < depth) & inside[None, :],
            other=0,
        )
        part = tl.dot(rows, widened(values, QUANTISED, NATIVE))
        if QUANTISED:
            line = scale + (expert * scale_depth + at // each_depth) * scale_width + column // each_width
            part *= tl.load(line, mask=inside, other=0.0)[None, :]
        total += part
    choice = tl.load(order + first + index, mask=index < count, other=0)
    total *= tl.load(weights + choice, mask=index < count, other=0.0)[:, None]
    place = choice[:, None].to(tl.int64) * part_width + place_in[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(index[:, None] < count) & inside[None, :])
