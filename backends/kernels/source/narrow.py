"""Attention and index scores over caches whose rows are FP8 records (`model/narrow_rows.py`): e4m3 values, a float32
scale for each 128 of them, then what is kept in bfloat16. They are widened in registers; the cache is read once, as it
lies."""

import triton
import triton.language as tl

from backends.kernels.source.attention import LOWEST, absorb, slots_of
from backends.kernels.source.products import widened


@triton.jit
def latent_attention(
    query, pages, table, selected, positions, parts, stats,
    tokens, heads, count, page_size, table_width, splits, scale,
    ROWS: tl.constexpr, VALUE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
    SELECTED: tl.constexpr,
):  # fmt: skip
    """query [b, t, heads, VALUE + REST], pages of records -> parts [b, t, heads, splits, VALUE], stats [.., 2].

    SELECTED: over selected [b, t, count]; a program: one query, ROWS heads. Else over all that is visible; a program:
    ROWS pairs of a sequence's token and head.
    """
    split = tl.program_id(2)
    lane = tl.arange(0, ROWS)
    if SELECTED:
        first = tl.program_id(0)
        sequence = first // tokens
        head = tl.program_id(1) * ROWS + lane
        real = head < heads
        line = first + 0 * lane
    else:
        sequence = tl.program_id(1)
        first = sequence * tokens
        pair = tl.program_id(0) * ROWS + lane
        real = pair < tokens * heads
        line = first + pair // heads
        head = pair % heads
    WIDTH: tl.constexpr = VALUE + REST
    GROUPS: tl.constexpr = VALUE // 128
    BYTES: tl.constexpr = VALUE + 4 * GROUPS + 2 * REST
    value = tl.arange(0, VALUE)
    rest = tl.arange(0, REST)
    group = tl.arange(0, GROUPS)
    own = query + (line.to(tl.int64) * heads + head)[:, None] * WIDTH
    query_value = tl.load(own + value[None, :], mask=real[:, None], other=0.0)
    query_rest = tl.load(own + VALUE + rest[None, :], mask=real[:, None], other=0.0)
    position = tl.load(positions + line, mask=real, other=-1)
    reach = tl.max(position, 0)
    seen = count
    if not SELECTED:
        seen = tl.minimum(reach + 1, table_width * page_size)
    pages_of = table + sequence * table_width
    per = tl.cdiv(tl.cdiv(seen, BLOCK), splits) * BLOCK
    total = tl.zeros((ROWS, VALUE), tl.float32)
    greatest = tl.full((ROWS,), LOWEST, tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    for at in range(split * per, tl.minimum(split * per + per, seen), BLOCK):
        index = at + tl.arange(0, BLOCK)
        inside = index < seen
        if SELECTED:
            index = tl.load(selected + first.to(tl.int64) * count + index, mask=inside, other=0)
            inside = inside & (index <= reach)
        rows = pages + slots_of(pages_of, index, page_size, inside) * BYTES
        narrow = tl.load(rows[:, None] + value[None, :], mask=inside[:, None], other=0)
        scales = (rows + VALUE).to(tl.pointer_type(tl.float32), bitcast=True)
        factor = tl.load(scales[:, None] + group[None, :], mask=inside[:, None], other=0.0)
        rests = (rows + VALUE + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        keys_rest = tl.load(rests[:, None] + rest[None, :], mask=inside[:, None], other=0.0)
        wide = tl.reshape(widened(narrow, True, NATIVE).to(tl.float32), (BLOCK, GROUPS, 128)) * factor[:, :, None]
        keys = tl.reshape(wide, (BLOCK, VALUE)).to(tl.bfloat16)
        scores = tl.dot(query_value, keys.T)
        scores += tl.dot(query_rest, keys_rest.T)
        visible = inside[None, :] & (index[None, :] <= position[:, None])
        total, greatest, denominator = absorb(scores * scale, visible, keys, total, greatest, denominator)
    place = (line.to(tl.int64) * heads + head) * splits + split
    tl.store(parts + place[:, None] * VALUE + value[None, :], total, mask=real[:, None])
    tl.store(stats + place * 2, greatest, mask=real)
    tl.store(stats + place * 2 + 1, denominator, mask=real)


@triton.jit
def index_scores(
    query, head_weights, pages, table, positions, out,
    tokens, heads, page_size, table_width, factor, head_factor,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """As `indexer.index_scores`, of records of WIDTH values and one scale, which multiplies the sums: a key goes into
    the product as it is stored."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.program_id(2)
    context = table_width * page_size
    inside = index < context
    rows = pages + slots_of(table + sequence * table_width, index, page_size, inside) * (WIDTH + 4)
    width = tl.arange(0, WIDTH)
    keys = widened(tl.load(rows[:, None] + width[None, :], mask=inside[:, None], other=0), True, NATIVE).T
    scale = tl.load((rows + WIDTH).to(tl.pointer_type(tl.float32), bitcast=True), mask=inside, other=0.0) * factor
    head = tl.arange(0, HEADS)
    begin = tl.program_id(1) * QUERIES
    for token in range(begin, tl.minimum(begin + QUERIES, tokens)):
        line = sequence * tokens + token
        own = (line * heads + head).to(tl.int64)
        rows_of = tl.load(query + own[:, None] * WIDTH + width[None, :], mask=(head < heads)[:, None], other=0.0)
        weight = tl.load(head_weights + own, mask=head < heads, other=0.0).to(tl.float32) * head_factor
        dots = tl.maximum(tl.dot(rows_of, keys) * scale[None, :], 0.0)
        scores = tl.sum(dots * weight[:, None], 0)
        position = tl.load(positions + line)
        scores = tl.where(index <= position, scores, float("-inf"))
        tl.store(out + line.to(tl.int64) * context + index, scores, mask=inside)
