"""Attention of a chunk of a prompt over keys and values that have been expanded from the latents, in one pass.

The scores never leave the chip: what XLA's form writes and reads of them is [b, heads, tokens, context] in float32.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)  # of a block in which nothing is visible: finite, so that no difference is NaN
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def step(
    at, query, query_more, query_rest, keys, values, rotated, position, heads, context, scale,
    total, greatest, denominator,
    NOPE: tl.constexpr, MORE: tl.constexpr, REST: tl.constexpr, LATENT: tl.constexpr, VALUE: tl.constexpr,
    BLOCK: tl.constexpr, LOOK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys from position `at` on into the running softmax. MASKED: some may be behind a query, or behind the
    context's end."""
    index = at + tl.arange(0, BLOCK)
    inside = index < context
    key = keys + index[None, :].to(tl.int64) * heads * (NOPE + MORE)
    rest = rotated + index[None, :].to(tl.int64) * (LATENT + REST) + LATENT
    value = values + index[:, None].to(tl.int64) * heads * VALUE + tl.arange(0, VALUE)[None, :]
    if MASKED:
        columns = tl.load(key + tl.arange(0, NOPE)[:, None], mask=inside[None, :], other=0.0)
        columns_rest = tl.load(rest + tl.arange(0, REST)[:, None], mask=inside[None, :], other=0.0)
        content = tl.load(value, mask=inside[:, None], other=0.0)
    else:
        columns = tl.load(key + tl.arange(0, NOPE)[:, None])
        columns_rest = tl.load(rest + tl.arange(0, REST)[:, None])
        content = tl.load(value)
    # each product adds to the one before: sums of products would leave Hopper's units waiting
    scores = tl.dot(query_rest, columns_rest)
    if MORE:
        more = key + NOPE + tl.arange(0, MORE)[:, None]
        columns_more = tl.load(more, mask=inside[None, :], other=0.0) if MASKED else tl.load(more)
        scores = tl.dot(query_more, columns_more, scores)
    scores = tl.dot(query, columns, scores)
    scores *= scale
    if MASKED:
        visible = inside[None, :] & (index[None, :] <= position[:, None])
        scores = tl.where(visible, scores, LOWEST)
    most = tl.maximum(greatest, tl.max(scores, 1))
    shrink = tl.exp2(greatest - most)
    share = tl.exp2(scores - most[:, None])
    if MASKED:
        share = tl.where(visible, share, 0.0)
    total = tl.dot(share.to(content.dtype), content, total * shrink[:, None])
    # For Hopper; `at` always is inside. Triton waits for a sum that is looked at, and leaves one that is not to the
    # next block, whose first product then begins while this one is at work: ptxas makes all products of such a loop
    # wait, each for itself (C7515).
    if LOOK:
        total = tl.where(at < context, total, 0.0)
    return total, most, denominator * shrink + tl.sum(share, 1)


@triton.jit
def expanded_attention(
    query, latents, keys, values, positions, out,
    tokens, heads, context, scale,
    ROWS: tl.constexpr, NOPE: tl.constexpr, MORE: tl.constexpr, REST: tl.constexpr, LATENT: tl.constexpr,
    VALUE: tl.constexpr, BLOCK: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """query [b, t, heads, NOPE + MORE + REST], latents [b, context, LATENT + REST], of which the last are rotated keys,
    keys [b, context, heads, NOPE + MORE], values [b, context, heads, VALUE], positions [b, t] -> [b, t, heads, VALUE].

    A program: ROWS tokens of one head of one sequence. Those that see most come first.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    token = tile * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    line = (sequence * tokens + token).to(tl.int64)
    own = query + (line * heads + head)[:, None] * (NOPE + MORE + REST)
    wide = tl.load(own + tl.arange(0, NOPE)[None, :], mask=real[:, None], other=0.0)
    rest = tl.load(own + NOPE + MORE + tl.arange(0, REST)[None, :], mask=real[:, None], other=0.0)
    more = rest
    if MORE:
        more = tl.load(own + NOPE + tl.arange(0, MORE)[None, :], mask=real[:, None], other=0.0)
    position = tl.load(positions + line, mask=real, other=-1)
    seen = tl.minimum(tl.max(position, 0) + 1, context)
    by_all = tl.minimum(tl.min(tl.where(real, position, context), 0) + 1, context) // BLOCK * BLOCK
    of_head = sequence.to(tl.int64) * context * heads + head
    of_keys = keys + of_head * (NOPE + MORE)
    of_values = values + of_head * VALUE
    rotated = latents + sequence.to(tl.int64) * context * (LATENT + REST)
    scale *= LOG2_E
    total = tl.zeros((ROWS, VALUE), tl.float32)
    greatest = tl.full((ROWS,), LOWEST, tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    for at in range(0, by_all, BLOCK):
        total, greatest, denominator = step(
            at, wide, more, rest, of_keys, of_values, rotated, position, heads, context, scale,
            total, greatest, denominator, NOPE, MORE, REST, LATENT, VALUE, BLOCK, LOOK, False,
        )  # fmt: skip
    for at in range(by_all, seen, BLOCK):
        total, greatest, denominator = step(
            at, wide, more, rest, of_keys, of_values, rotated, position, heads, context, scale,
            total, greatest, denominator, NOPE, MORE, REST, LATENT, VALUE, BLOCK, LOOK, True,
        )  # fmt: skip
    made = total / tl.where(denominator > 0, denominator, 1.0)[:, None]
    place = out + (line * heads + head)[:, None] * VALUE + tl.arange(0, VALUE)[None, :]
    tl.store(place, made.to(out.dtype.element_ty), mask=real[:, None])
