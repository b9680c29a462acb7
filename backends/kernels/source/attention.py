"""Attention over a paged cache, in one pass: scores, softmax and values of a block of rows at a time.

Every kernel cuts what it reads into splits, for as many programs as a chip has room for. A split writes its unfinished
sum, its greatest score and the sum of its exponentials; `join` makes one of them.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)  # of a block in which nothing is visible: finite, so that no difference is NaN


@triton.jit
def slots_of(table, position, page_size, mask):
    """Rows of the cache, as if its pages lay in one, of positions in a sequence's context."""
    page = tl.load(table + position // page_size, mask=mask, other=0).to(tl.int64)
    return page * page_size + position % page_size


@triton.jit
def absorb(scores, visible, values, total, greatest, denominator):
    """Takes a block into the running softmax."""
    scores = tl.where(visible, scores, LOWEST)
    most = tl.maximum(greatest, tl.max(scores, 1))
    shrink = tl.exp(greatest - most)
    share = tl.where(visible, tl.exp(scores - most[:, None]), 0.0)
    total = total * shrink[:, None] + tl.dot(share.to(values.dtype), values)
    return total, most, denominator * shrink + tl.sum(share, 1)


@triton.jit
def sparse_attention(
    query, pages, table, selected, positions, parts, stats,
    tokens, heads, count, page_size, table_width, splits, scale,
    ROWS: tl.constexpr, VALUE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Latents that each query has selected, `count` of them: query [b, t, heads, VALUE + REST], pages of rows as wide,
    selected [b, t, count] -> parts [b, t, heads, splits, VALUE], stats [.., 2]. A program: one query, ROWS heads."""
    line = tl.program_id(0)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    real = head < heads
    WIDTH: tl.constexpr = VALUE + REST
    value = tl.arange(0, VALUE)
    rest = VALUE + tl.arange(0, REST)
    own = query + (line * heads + head)[:, None].to(tl.int64) * WIDTH
    query_value = tl.load(own + value[None, :], mask=real[:, None], other=0.0)
    query_rest = tl.load(own + rest[None, :], mask=real[:, None], other=0.0)
    position = tl.load(positions + line)
    pages_of = table + (line // tokens) * table_width
    per = tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK
    total = tl.zeros((ROWS, VALUE), tl.float32)
    greatest = tl.full((ROWS,), LOWEST, tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    for at in range(split * per, tl.minimum(split * per + per, count), BLOCK):
        index = at + tl.arange(0, BLOCK)
        chosen = tl.load(selected + line.to(tl.int64) * count + index, mask=index < count, other=0)
        visible = (index < count) & (chosen <= position)
        rows = pages + slots_of(pages_of, chosen, page_size, visible) * WIDTH
        keys = tl.load(rows[:, None] + value[None, :], mask=visible[:, None], other=0.0)
        keys_rest = tl.load(rows[:, None] + rest[None, :], mask=visible[:, None], other=0.0)
        scores = (tl.dot(query_value, keys.T) + tl.dot(query_rest, keys_rest.T)) * scale
        total, greatest, denominator = absorb(scores, visible[None, :], keys, total, greatest, denominator)
    place = (line * heads + head).to(tl.int64) * splits + split
    tl.store(parts + place[:, None] * VALUE + value[None, :], total, mask=real[:, None])
    tl.store(stats + place * 2, greatest, mask=real)
    tl.store(stats + place * 2 + 1, denominator, mask=real)


@triton.jit
def context_attention(
    query, key_pages, value_pages, table, positions, parts, stats,
    tokens, heads, groups, page_size, table_width, splits, scale,
    ROWS: tl.constexpr, VALUE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """The whole context that a query sees: query [b, t, heads, width], pages of rows [groups, width], heads / groups
    heads to a group -> parts [b, t, heads, splits, VALUE], stats [.., 2].

    A program: ROWS pairs of token and head of one group and sequence. LATENT: rows are keys, and their first VALUE
    entries are values, so that `value_pages` is not read; else REST is nothing.
    """
    group = tl.program_id(1) % groups
    sequence = tl.program_id(1) // groups
    split = tl.program_id(2)
    each = heads // groups
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = pair // each
    real = token < tokens
    line = sequence * tokens + token
    head = group * each + pair % each
    WIDTH: tl.constexpr = VALUE + REST if LATENT else VALUE
    value = tl.arange(0, VALUE)
    own = query + (line * heads + head)[:, None].to(tl.int64) * WIDTH
    query_value = tl.load(own + value[None, :], mask=real[:, None], other=0.0)
    if LATENT:
        rest = VALUE + tl.arange(0, REST)
        query_rest = tl.load(own + rest[None, :], mask=real[:, None], other=0.0)
    position = tl.load(positions + line, mask=real, other=-1)
    pages_of = table + sequence * table_width
    seen = tl.minimum(tl.max(position, 0) + 1, table_width * page_size)
    per = tl.cdiv(tl.cdiv(seen, BLOCK), splits) * BLOCK
    total = tl.zeros((ROWS, VALUE), tl.float32)
    greatest = tl.full((ROWS,), LOWEST, tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    for at in range(split * per, tl.minimum(split * per + per, seen), BLOCK):
        index = at + tl.arange(0, BLOCK)
        inside = index < seen
        row = (slots_of(pages_of, index, page_size, inside) * groups + group) * WIDTH
        keys = tl.load(key_pages + row[:, None] + value[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(query_value, keys.T)
        values = keys
        if LATENT:
            keys_rest = tl.load(key_pages + row[:, None] + rest[None, :], mask=inside[:, None], other=0.0)
            scores += tl.dot(query_rest, keys_rest.T)
        else:
            values = tl.load(value_pages + row[:, None] + value[None, :], mask=inside[:, None], other=0.0)
        visible = inside[None, :] & (index[None, :] <= position[:, None])
        total, greatest, denominator = absorb(scores * scale, visible, values, total, greatest, denominator)
    place = (line * heads + head).to(tl.int64) * splits + split
    tl.store(parts + place[:, None] * VALUE + value[None, :], total, mask=real[:, None])
    tl.store(stats + place * 2, greatest, mask=real)
    tl.store(stats + place * 2 + 1, denominator, mask=real)


@triton.jit
def join(parts, stats, out, splits, VALUE: tl.constexpr):
    """parts [row, splits, VALUE], stats [row, splits, 2] -> out [row, VALUE]. A program: one row."""
    row = tl.program_id(0).to(tl.int64)
    value = tl.arange(0, VALUE)
    total = tl.zeros((VALUE,), tl.float32)
    greatest = LOWEST
    denominator = 0.0
    for split in range(0, splits):
        place = row * splits + split
        top = tl.load(stats + place * 2)
        most = tl.maximum(greatest, top)
        kept = tl.exp(greatest - most)
        share = tl.exp(top - most)
        total = total * kept + tl.load(parts + place * VALUE + value) * share
        denominator = denominator * kept + tl.load(stats + place * 2 + 1) * share
        greatest = most
    tl.store(out + row * VALUE + value, (total / denominator).to(out.dtype.element_ty))
