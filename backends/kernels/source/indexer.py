"""The lightning indexer's scores, the selection of the best of them, and the router's choice of experts."""

import triton
import triton.language as tl


@triton.jit
def index_scores(
    query, head_weights, pages, table, positions, out,
    tokens, heads, page_size, table_width, factor, head_factor,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """query [b, t, heads, WIDTH], pages of keys -> out [b, t, context]. A program: QUERIES queries over BLOCK keys."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.program_id(2)
    context = table_width * page_size
    inside = index < context
    page = tl.load(table + sequence * table_width + index // page_size, mask=inside, other=0).to(tl.int64)
    width = tl.arange(0, WIDTH)
    rows = pages + (page * page_size + index % page_size) * WIDTH
    keys = tl.load(rows[:, None] + width[None, :], mask=inside[:, None], other=0.0).T
    head = tl.arange(0, HEADS)
    begin = tl.program_id(1) * QUERIES
    for token in range(begin, tl.minimum(begin + QUERIES, tokens)):
        line = sequence * tokens + token
        own = (line * heads + head).to(tl.int64)
        rows_of = tl.load(query + own[:, None] * WIDTH + width[None, :], mask=(head < heads)[:, None], other=0.0)
        weight = tl.load(head_weights + own, mask=head < heads, other=0.0).to(tl.float32) * head_factor
        dots = tl.maximum(tl.dot(rows_of, keys) * factor, 0.0)
        scores = tl.sum(dots * weight[:, None], 0)
        position = tl.load(positions + line)
        scores = tl.where(index <= position, scores, float("-inf"))
        tl.store(out + line.to(tl.int64) * context + index, scores, mask=inside)


@triton.jit
def ordered(scores):
    """float32 as integers without a sign, in the same order; -0 before 0."""
    bits = scores.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def select_topk(scores, out, context, count, BLOCK: tl.constexpr):
    """scores [row, context] -> out [row, count], the positions of the `count` greatest, ascending; of equal ones at the
    edge the lowest positions. A program: one row.

    The bits of the least that is taken are found eight at a time: those above are known, a histogram of the next.
    """
    line = tl.program_id(0).to(tl.int64)
    row = scores + line * context
    bins = tl.arange(0, 256)
    known = tl.zeros((), tl.uint32)
    wanted = count
    for digit in tl.static_range(4):
        tally = tl.zeros((256,), tl.int32)
        for at in range(0, context, BLOCK):
            index = at + tl.arange(0, BLOCK)
            key = ordered(tl.load(row + index, mask=index < context, other=float("-inf")))
            alive = index < context
            if digit > 0:
                alive = alive & ((key >> (32 - 8 * digit)) == known)
            tally += tl.histogram(((key >> (24 - 8 * digit)) & 0xFF).to(tl.int32), 256, mask=alive)
        # of each bin, how many are in it or above
        above = tl.sum(tally, 0) - tl.cumsum(tally, 0) + tally
        best = tl.max(tl.where(above >= wanted, bins, 0), 0)
        wanted -= tl.sum(tl.where(bins > best, tally, 0), 0)
        known = (known << 8) | best.to(tl.uint32)
    written = tl.zeros((), tl.int32)
    equals = tl.zeros((), tl.int32)
    for at in range(0, context, BLOCK):
        index = at + tl.arange(0, BLOCK)
        key = ordered(tl.load(row + index, mask=index < context, other=float("-inf")))
        same = (index < context) & (key == known)
        rank = equals + tl.cumsum(same.to(tl.int32), 0)
        taken = ((index < context) & (key > known)) | (same & (rank <= wanted))
        place = written + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(out + line * count + place, index, mask=taken)
        written += tl.sum(taken.to(tl.int32), 0)
        equals += tl.sum(same.to(tl.int32), 0)


@triton.jit
def best_of(values, index, FAR: tl.constexpr):
    """Which entry is greatest, the first of equal ones."""
    return tl.min(tl.where(values == tl.max(values, 0), index, FAR), 0)


@triton.jit
def route(
    logits, bias, chosen, weights,
    experts, count, groups, best_groups, normalise, scale,
    EXPERTS: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """logits [row, experts] -> chosen [row, count], weights [row, count], as `glm.route` has them. A program: a row."""
    line = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    real = expert < experts
    affinity = 1.0 / (1.0 + tl.exp(-tl.load(logits + line * experts + expert, mask=real, other=0.0)))
    choice = tl.where(real, affinity + tl.load(bias + expert, mask=real, other=0.0), float("-inf"))
    if groups > 1:
        group = expert // (experts // groups)
        lane = tl.arange(0, GROUPS)
        scores = tl.full((GROUPS,), float("-inf"), tl.float32)
        for each in range(0, groups):
            own = tl.where(group == each, choice, float("-inf"))
            first = tl.max(own, 0)
            second = tl.max(tl.where(expert == best_of(own, expert, EXPERTS), float("-inf"), own), 0)
            scores = tl.where(lane == each, first + second, scores)
        allowed = tl.zeros((EXPERTS,), tl.int32)
        for _ in range(0, best_groups):
            best = best_of(scores, lane, GROUPS)
            allowed = tl.where(group == best, 1, allowed)
            scores = tl.where(lane == best, float("-inf"), scores)
        choice = tl.where(allowed == 1, choice, float("-inf"))
    lane = tl.arange(0, COUNT)
    ids = tl.zeros((COUNT,), tl.int32)
    shares = tl.zeros((COUNT,), tl.float32)
    for each in range(0, count):
        best = best_of(choice, expert, EXPERTS)
        ids = tl.where(lane == each, best, ids)
        shares = tl.where(lane == each, tl.sum(tl.where(expert == best, affinity, 0.0), 0), shares)
        choice = tl.where(expert == best, float("-inf"), choice)
    if normalise == 1:
        shares = shares / (tl.sum(shares, 0) + 1e-20)
    tl.store(chosen + line * count + lane, ids, mask=lane < count)
    tl.store(weights + line * count + lane, shares * scale, mask=lane < count)
