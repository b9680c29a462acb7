"""Tokens chosen from logits where the logits are, so that not they but ids leave the device.

What a host would choose (`runtime.serving.sampling`, in float64) is the contract: a row's id is that, or -1 where
float32 cannot tell, and the host looks at the row's logits itself. So tokens hang on neither the device nor on who
chose. A draw is one number in [0,1), which the request's own generator has drawn on the host, and the token is where it
falls in the distribution, ids ascending; -1 says that it falls nearer to a boundary than rounding may have moved that.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, export, lax

MARGIN = 2.0**-15
"""Of a sum of probabilities: more than rounding can move one. An exponent of -25 is off by 3e-6 of its weight, the
exponential itself by 1e-6, and three sums one upon the other of 64 entries or fewer by 1e-5 at the very worst."""
_NEAR = 2.0**-16  # of a weight, relative
_BLOCK = 64


class Draws(NamedTuple):
    """How each row's token is chosen: float32 [b] but top_k, int32 [b]. Temperature 0 is greedy, and top_k 0, top_p 1
    and min_p 0 keep everything. uniform: in [0,1)."""

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    uniform: Array


export.register_namedtuple_serialization(Draws, serialized_name="glm5.Draws")


def greedy(logits: Array) -> Array:
    """Logits [..,vocab] -> int32 [..]: the best, the lowest id among equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def drawn(logits: Array, draws: Draws) -> Array:
    """Logits float32 [b,(t,)vocab] -> int32 [b,(t,)]: the tokens drawn, or -1 where the host has to. Each of a row's t
    by the same number: one of them is asked for."""
    if logits.ndim == 3:
        each = Draws(*(jnp.repeat(column, logits.shape[1]) for column in draws))
        return drawn(logits.reshape(-1, logits.shape[2]), each).reshape(logits.shape[:2])
    temperature = jnp.where(draws.temperature > 0, draws.temperature, 1.0)
    best = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp((logits - best) / temperature[:, None])
    key = _ordered(logits)
    vocab = logits.shape[-1]

    count = jnp.where((draws.top_k > 0) & (draws.top_k < vocab), draws.top_k, vocab)
    ones = jnp.ones((), jnp.int32)
    least = _least(key, jnp.broadcast_to(ones, key.shape), count)
    kept = _from(key, least, count - _sum(jnp.where(key > least[:, None], ones, 0)))

    weights = jnp.where(kept, weights, 0.0)
    total = _sum(weights)
    goal = draws.top_p * total
    least = _least(key, weights, goal)
    at = kept & (key == least[:, None])
    one = jnp.max(jnp.where(at, weights, 0.0), axis=-1)
    wanted = (goal - _sum(jnp.where(key > least[:, None], weights, 0.0))) / jnp.where(one > 0, one, 1.0)
    places = jnp.clip(jnp.ceil(wanted), 1, vocab).astype(jnp.int32)
    nucleus = draws.top_p < 1
    kept &= ~nucleus[:, None] | _from(key, jnp.where(nucleus, least, 0), places, at)
    unsure = jnp.abs(wanted - jnp.round(wanted)) * one <= MARGIN * total
    error = jnp.where(nucleus & unsure, one + MARGIN * total, 0.0)

    floor = draws.min_p[:, None]  # of the best, whose weight is 1
    near = kept & (weights < 1) & (jnp.abs(weights - floor) <= _NEAR * floor)
    error += jnp.where(draws.min_p > 0, _sum(jnp.where(near, weights, 0.0)), 0.0)
    kept &= weights >= floor

    return jnp.where(draws.temperature > 0, _where(jnp.where(kept, weights, 0.0), draws.uniform, error), greedy(logits))


def chosen(logits: Array, draws: Draws | None, best: int | None) -> tuple[Array, Array | None]:
    """Ids of logits, the best or as `draws` says, and what `with_logprobs` tells of them, where `best` asks for it."""
    ids = greedy(logits) if draws is None else drawn(logits, draws)
    return ids, None if best is None else with_logprobs(logits, ids, best)


def with_logprobs(logits: Array, ids: Array, best: int) -> Array:
    """Logits float32 [..,vocab] and what was chosen from them, int32 [..] -> int32 [.., 2 + 2 * best], which is all
    that a host is told: the id; the natural logarithm of its probability before temperature and truncation; the `best`
    likeliest ids, the likeliest first and the lowest first among equals; and theirs. Logarithms are float32 by their
    bits. Of logits that are not all numbers the id is -1. Of a smaller vocabulary all are named."""
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    logits, ids = logits.reshape(-1, vocab), ids.reshape(-1)
    most = jnp.max(logits, axis=-1, keepdims=True)
    log_sum = most[:, 0] + jnp.log(_sum(jnp.exp(logits - most)))
    own = jnp.take_along_axis(logits, jnp.maximum(ids, 0)[:, None], axis=-1)[:, 0]
    ids = jnp.where(jnp.isnan(log_sum), -1, ids)
    likeliest, values = _likeliest(logits, min(best, vocab))
    told = [own - log_sum, likeliest, values - log_sum[:, None]]
    columns = [ids, *(each if each.dtype == jnp.int32 else lax.bitcast_convert_type(each, jnp.int32) for each in told)]
    rows = jnp.concatenate([each.reshape(len(ids), -1) for each in columns], axis=1)
    return rows.reshape(*shape, rows.shape[-1])


def _likeliest(logits: Array, count: int) -> tuple[Array, Array]:
    """The largest of each row [b,n], as `lax.top_k` has them: ids and values [b,count]. They are in the `count` blocks
    of the largest maxima, so that what is sorted is short."""
    logits = jnp.where(logits == 0, 0.0, logits)  # both zeros are one
    blocks = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % _BLOCK)), constant_values=-jnp.inf)
    blocks = blocks.reshape(len(logits), -1, _BLOCK)
    chosen = jnp.sort(lax.top_k(jnp.max(blocks, axis=-1), min(count, blocks.shape[1]))[1], axis=-1)
    among = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(len(logits), -1)
    values, places = lax.top_k(among, count)
    block = jnp.take_along_axis(chosen, places // _BLOCK, axis=1)
    return (block * _BLOCK + places % _BLOCK).astype(jnp.int32), values


def _ordered(x: Array) -> Array:
    """float32 as uint32 of the same order; both zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _least(key: Array, amounts: Array, goal: Array) -> Array:
    """uint32 [b]: the largest bound whose keys, it and those above, have amounts of `goal` [b] together. Four bits at a
    time."""
    found = jnp.zeros(key.shape[0], jnp.uint32)
    for shift in range(28, -1, -4):
        bounds = found[:, None] | (jnp.arange(1, 16, dtype=jnp.uint32) << shift)[None, :]
        reached = jnp.sum(
            jnp.where(key[:, None, :] >= bounds[:, :, None], amounts[:, None, :], 0), axis=-1, dtype=amounts.dtype
        )
        digit = jnp.sum(reached >= goal[:, None], axis=-1, dtype=jnp.int32).astype(jnp.uint32)
        found |= digit << shift
    return found


def _from(key: Array, least: Array, places: Array, at: Array | None = None) -> Array:
    """bool [b,vocab]: keys above a bound [b], and as many at it (or at `at`) as there are places [b], lowest ids
    first."""
    equal = key == least[:, None] if at is None else at
    count = jnp.cumsum(_blocks(equal.astype(jnp.int32)), axis=-1)
    blocks = count[..., -1]
    before = jnp.cumsum(blocks, axis=-1) - blocks
    rank = (count + before[..., None]).reshape(key.shape[0], -1)[:, : key.shape[1]]
    return (key > least[:, None]) | (equal & (rank <= places[:, None]))


def _blocks(x: Array) -> Array:
    """[b,n] -> [b,m,64], zeros behind."""
    short = -x.shape[1] % _BLOCK
    return jnp.pad(x, ((0, 0), (0, short))).reshape(x.shape[0], -1, _BLOCK)


def _sum(x: Array) -> Array:
    """[b,n] -> [b], of blocks: long sums one entry after the other would lose more than `MARGIN` allows."""
    while x.shape[1] > _BLOCK:
        x = jnp.sum(_blocks(x), axis=-1, dtype=x.dtype)
    return jnp.sum(x, axis=-1, dtype=x.dtype)


def _where(weights: Array, uniform: Array, error: Array) -> Array:
    """int32 [b]: where a share `uniform` of the sum of weights [b,n] falls, -1 where that is within `error` [b], or
    rounding, of either end of it."""
    levels = [weights]
    while levels[-1].shape[1] > _BLOCK:
        levels.append(jnp.sum(_blocks(levels[-1]), axis=-1))
    total = jnp.sum(levels[-1], axis=-1)
    wanted = uniform * total
    place, low = jnp.zeros(weights.shape[0], jnp.int32), jnp.zeros_like(total)
    high = total
    for level in reversed(levels):
        blocks = _blocks(level)
        entries = jnp.take_along_axis(blocks, place[:, None, None], axis=1)[:, 0]
        ends = low[:, None] + jnp.cumsum(entries, axis=-1)
        within = jnp.minimum(jnp.sum(ends <= wanted[:, None], axis=-1, dtype=jnp.int32), _BLOCK - 1)
        high = jnp.take_along_axis(ends, within[:, None], axis=1)[:, 0]
        low = high - jnp.take_along_axis(entries, within[:, None], axis=1)[:, 0]
        place = place * _BLOCK + within
    error = error + MARGIN * total
    sure = (wanted - low > error) & (high - wanted > error)
    return jnp.where(sure, place, -1)
