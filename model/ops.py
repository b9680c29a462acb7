"""The op contract: the named operations the graph is made of, each with its meaning in plain JAX.

An op is a `jax.lax.composite`: one equation in a traced graph and one `stablehlo.composite` in an
export, carrying a name, static attributes and a decomposition that is its meaning. Backends register
a *lowering* for a name, the cost model a *price*, exporters a *mapping*, an emulated chip its *number
format*; `OPS` lists the names they may register. A composite has neither a gradient nor a batching
rule, so where those are needed `substitute` evaluates a function with the bodies inlined.

Shapes use: b sequences, t query tokens, c context tokens (pages x page size), h heads, d model width,
l latent width, n flat tokens, k choices, e experts, f expert width, p pages per sequence, s page size.
Scores, softmax, norms and routing are computed in float32 whatever the operands' type; matrix products
accumulate in float32 and return the type of the left operand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core as jex_core

from model.formats import E4M3
from model.narrow_rows import is_narrow, narrowed, packed, unpacked
from model.quantised import shared_size
from model.weights import Quantized

PREFIX = "glm."


@dataclasses.dataclass(frozen=True)
class Op:
    """A named op: `call` binds the composite, `meaning` is its decomposition."""

    name: str
    meaning: Callable[..., Any]
    call: Callable[..., Any]


OPS: dict[str, Op] = {}


def op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the op `glm.<name>`; positional arguments are arrays, keywords attributes."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        full = PREFIX + name
        bound = lax.composite(body, name=full)

        @functools.wraps(body)
        def call(*args: Any, **attributes: Any) -> Any:
            return bound(*args, **attributes)

        OPS[full] = Op(full, body, call)
        return call

    return register


def operands(weight: Array | Quantized) -> tuple[Array, ...]:
    """A weight as the operands of an op."""
    return tuple(weight) if isinstance(weight, Quantized) else (weight,)


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def full_scale(scale: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Scales repeated along `axis` to the matrix's own size: from one an equal group, or a 128-block of which the last
    may be shorter (`model.quantised.shared_size`)."""
    each = shared_size(shape[axis], scale.shape[axis])
    if each == 1:
        return scale
    return lax.slice_in_dim(jnp.repeat(scale, each, axis=axis), 0, shape[axis], axis=axis)


def dequantise(values: Array, scale: Array, dtype: Any) -> Array:
    """Quantised values to `dtype`. Each dim of scale is the values' own, 1, or the number of their blocks: FP8 blocks
    divide the last and the first dim of a matrix (a middle gate/up dim and a leading expert dim have one scale an
    entry)."""
    full = _f32(scale)
    for axis in range(values.ndim):
        full = full_scale(full, values.shape, axis)
    return (_f32(values) * full).astype(dtype)


def _dense(weight: tuple[Array, ...], dtype: Any) -> Array:
    if len(weight) == 2:
        return dequantise(weight[0], weight[1], dtype)
    return weight[0].astype(dtype)


def _matmul(x: Array, w: Array) -> Array:
    """`[.., i] x [i, ...] -> [.., ...]` with float32 accumulation."""
    out = lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


# --- elementwise and projections -----------------------------------------------------------------


@op("embed")
def embed(tokens: Array, table: Array) -> Array:
    """tokens [b,t], table [v,d] -> [b,t,d]."""
    return table.at[tokens].get(mode="promise_in_bounds")


@op("rms_norm")
def rms_norm(x: Array, weight: Array, *, eps: float) -> Array:
    """x [.., d] over its root mean square, times weight [d]."""
    x32 = _f32(x)
    inv = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + jnp.float32(eps))
    weight = lax.broadcast_in_dim(weight, x.shape, (x.ndim - 1,))
    return weight.astype(x.dtype) * (x32 * inv).astype(x.dtype)


@op("layer_norm")
def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
    """x [.., d] normalised to zero mean and unit variance, times weight [d], plus bias [d]."""
    x32 = _f32(x)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inv = lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + jnp.float32(eps))
    scale = lax.broadcast_in_dim(_f32(weight), x.shape, (x.ndim - 1,))
    shift = lax.broadcast_in_dim(_f32(bias), x.shape, (x.ndim - 1,))
    return (centred * inv * scale + shift).astype(x.dtype)


@op("linear")
def linear(x: Array, *weight: Array) -> Array:
    """x [.., i] times weight [i, ...] (or FP8 values and block scales)."""
    return _matmul(x, _dense(weight, x.dtype))


@op("head_linear")
def head_linear(x: Array, weight: Array) -> Array:
    """One matrix a head: x [b,t,h,i] times weight [h,i,o] -> [b,t,h,o]. Absorbs the key half of
    `kv_b_proj` into queries, and expands latent outputs with the value half."""
    # heads lead: XLA on the CPU has no bfloat16 product with a batch dim in the middle
    by_head = jnp.transpose(x, (2, 0, 1, 3))
    out = jnp.einsum("hbti,hio->hbto", by_head, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.transpose(out.astype(x.dtype), (1, 2, 0, 3))


@op("bias")
def add_bias(x: Array, bias: Array) -> Array:
    """x [.., d] plus bias [d]."""
    return x + lax.broadcast_in_dim(bias.astype(x.dtype), x.shape, (x.ndim - 1,))


@op("swiglu")
def swiglu(gate_up: Array) -> Array:
    """gate_up [.., 2, f] -> silu(gate) * up, [.., f]."""
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    return jax.nn.silu(gate) * up


@op("rope")
def rope(x: Array, positions: Array, inv_freq: Array, *, interleaved: bool, factor: float) -> Array:
    """Rotates the first `2 * len(inv_freq)` dims of x [b,t,h,r] by positions [b,t].

    The rotated part comes out as two concatenated halves for either input layout (as transformers has
    it; a cache written in one layout must be read in it).
    """
    half = inv_freq.shape[0]
    angle = _f32(positions)[:, :, None, None] * inv_freq[None, None, None, :]
    cos, sin = jnp.cos(angle) * jnp.float32(factor), jnp.sin(angle) * jnp.float32(factor)
    rotated, rest = _f32(x[..., : 2 * half]), x[..., 2 * half :]
    if interleaved:
        pairs = rotated.reshape(*rotated.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    halves = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in halves), rest], axis=-1)


# --- paged caches --------------------------------------------------------------------------------


@op("cache_write")
def cache_write(pages: Array, rows: Array, slots: Array, *, cache: str = "", plain: int = 0) -> Array:
    """Writes rows [b,t,..] to pages [pages,s,..] at flat slots [b,t] (page * s + offset).

    `cache` names the cache ("latent", "index", "key", "value"): its number format may differ from the others'.
    Pages in uint8 hold rows as `model.narrow_rows` packs them, of which the last `plain` elements are not rounded.

    Padding tokens carry slots of page 0, which belongs to no sequence.
    """
    flat = pages.reshape(-1, *pages.shape[2:])
    rows = stored_rows(pages, rows, plain)
    flat = flat.at[slots.reshape(-1)].set(rows.reshape(-1, *rows.shape[2:]), mode="promise_in_bounds")
    return flat.reshape(pages.shape)


def stored_rows(pages: Array, rows: Array, plain: int) -> Array:
    """Rows as pages hold them."""
    if is_narrow(pages):
        return packed(rows, plain)
    return narrowed(rows) if pages.dtype == E4M3 else rows.astype(pages.dtype)


def read_rows(held: Array, like: Array, width: int, plain: int = 0) -> Array:
    """What pages hold of rows as rows [.., width], in the type of `like`."""
    return unpacked(held, width, plain, like.dtype) if is_narrow(held) else held.astype(like.dtype)


def context_rows(pages: Array, page_table: Array) -> Array:
    """pages [pages,s,..] of each sequence in order: [b,c,..]."""
    rows = pages.at[page_table].get(mode="promise_in_bounds")
    return rows.reshape(page_table.shape[0], -1, *pages.shape[2:])


def _visible(positions: Array, context: int) -> Array:
    """positions [b,t] -> bool [b,t,c]: the context tokens a query may see."""
    return lax.broadcasted_iota(jnp.int32, (*positions.shape, context), 2) <= positions[:, :, None]


def masked_softmax(scores: Array, visible: Array) -> Array:
    """Softmax over the last dim of scores, of the entries that are visible."""
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


# --- attention -----------------------------------------------------------------------------------


@op("index_scores")
def index_scores(query: Array, head_weights: Array, pages: Array, page_table: Array, positions: Array) -> Array:
    """The lightning indexer's scores.

    query [b,t,h,i], head_weights [b,t,h], index pages [pages,s,i], positions [b,t] -> float32 [b,t,c]:
    sum over heads of weight * relu(query . key) with both scales applied; -inf where not visible.
    """
    heads, width = query.shape[2], query.shape[3]
    keys = read_rows(context_rows(pages, page_table), query, width)
    dots = jnp.einsum("bthi,bci->bthc", query, keys, preferred_element_type=jnp.float32)
    dots = jnp.maximum(dots * jnp.float32(width**-0.5), 0.0)
    scores = jnp.einsum("bth,bthc->btc", _f32(head_weights) * jnp.float32(heads**-0.5), dots)
    return jnp.where(_visible(positions, keys.shape[1]), scores, -jnp.inf)


@op("select_topk")
def select_topk(scores: Array, *, k: int) -> Array:
    """scores [b,t,c] -> the k best context positions, int32 [b,t,k], best first.

    Equal scores are taken in order of position, lowest first: the order is defined, so a run repeats. What reads a
    selection takes it as a set: a backend's kernel may give its positions in another order.
    """
    return lax.top_k(scores, k)[1].astype(jnp.int32)


@op("sparse_attention")
def sparse_attention(
    query: Array, pages: Array, page_table: Array, selected: Array, positions: Array, *, scale: float, value_dim: int
) -> Array:
    """Absorbed attention over the selected rows only.

    query [b,t,h,l], latent pages [pages,s,l], selected [b,t,k] context positions -> [b,t,h,value_dim].
    """
    page_size = pages.shape[1]
    page = jnp.take_along_axis(page_table[:, None, :], selected // page_size, axis=2, mode="promise_in_bounds")
    slots = page * page_size + selected % page_size
    held = pages.reshape(-1, pages.shape[2]).at[slots].get(mode="promise_in_bounds")
    rows = read_rows(held, query, query.shape[3], query.shape[3] - value_dim)
    scores = jnp.einsum("bthl,btkl->bthk", query, rows, preferred_element_type=jnp.float32) * jnp.float32(scale)
    weights = masked_softmax(scores, (selected <= positions[:, :, None])[:, :, None, :]).astype(query.dtype)
    out = jnp.einsum("bthk,btkv->bthv", weights, rows[..., :value_dim], preferred_element_type=jnp.float32)
    return out.astype(query.dtype)


@op("latent_attention")
def latent_attention(
    query: Array, pages: Array, page_table: Array, positions: Array, *, scale: float, value_dim: int
) -> Array:
    """Absorbed attention over the whole context: query [b,t,h,l] -> [b,t,h,value_dim]."""
    rows = read_rows(context_rows(pages, page_table), query, query.shape[3], query.shape[3] - value_dim)
    scores = jnp.einsum("bthl,bcl->bthc", query, rows, preferred_element_type=jnp.float32) * jnp.float32(scale)
    weights = masked_softmax(scores, _visible(positions, rows.shape[1])[:, :, None, :]).astype(query.dtype)
    out = jnp.einsum("bthc,bcv->bthv", weights, rows[..., :value_dim], preferred_element_type=jnp.float32)
    return out.astype(query.dtype)


@op("expanded_attention")
def expanded_attention(
    query: Array, pages: Array, page_table: Array, k_up: Array, v_up: Array, positions: Array, *, scale: float
) -> Array:
    """MLA with keys and values expanded from the latents: cheaper than absorbed when a chunk is long.

    query [b,t,h,nope+rope], latent pages, k_up [h,nope,lora], v_up [h,lora,v] -> [b,t,h,v].
    """
    nope, lora = k_up.shape[1], k_up.shape[2]
    rest = query.shape[3] - nope
    rows = read_rows(context_rows(pages, page_table), query, lora + rest, rest)
    latent, k_rope = rows[..., :lora], rows[..., lora:]
    keys = jnp.einsum("bcl,hnl->bhcn", latent, k_up.astype(query.dtype))
    values = jnp.einsum("bcl,hlv->bhcv", latent, v_up.astype(query.dtype))
    scores = jnp.einsum("bthn,bhcn->bhtc", query[..., :nope], keys, preferred_element_type=jnp.float32)
    scores += jnp.einsum("bthr,bcr->bhtc", query[..., nope:], k_rope, preferred_element_type=jnp.float32)
    weights = masked_softmax(scores * jnp.float32(scale), _visible(positions, rows.shape[1])[:, None, :, :])
    out = jnp.einsum("bhtc,bhcv->bthv", weights.astype(query.dtype), values, preferred_element_type=jnp.float32)
    return out.astype(query.dtype)


@op("paged_attention")
def paged_attention(
    query: Array, key_pages: Array, value_pages: Array, page_table: Array, positions: Array, *, scale: float
) -> Array:
    """Grouped-query attention: query [b,t,h,i], pages [pages,s,g,i] with g KV heads -> [b,t,h,i]."""
    keys = context_rows(key_pages, page_table).astype(query.dtype)
    values = context_rows(value_pages, page_table).astype(query.dtype)
    b, t, h, width = query.shape
    groups = keys.shape[2]
    query = query.reshape(b, t, groups, h // groups, width)
    scores = jnp.einsum("btgqi,bcgi->bgqtc", query, keys, preferred_element_type=jnp.float32) * jnp.float32(scale)
    weights = masked_softmax(scores, _visible(positions, keys.shape[1])[:, None, None, :, :]).astype(query.dtype)
    out = jnp.einsum("bgqtc,bcgi->btgqi", weights, values, preferred_element_type=jnp.float32)
    return out.astype(query.dtype).reshape(b, t, h, width)


# --- mixture of experts --------------------------------------------------------------------------


@op("route")
def route(
    x: Array,
    router: Array,
    bias: Array,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
) -> tuple[Array, Array]:
    """Sigmoid `noaux_tc` routing: x [n,d], router [d,e], bias [e] -> (experts int32 [n,k], weights float32 [n,k]).

    The bias takes part in choosing only. With groups, a group scores by its two best experts and only
    the `topk_group` best groups are considered. Ties go to the lowest expert.
    """
    affinity = affinities(x, router)
    choice = affinity + bias[None, :]
    tokens, experts = choice.shape
    if n_group > 1:
        per_group = choice.reshape(tokens, n_group, experts // n_group)
        group_score = jnp.sum(lax.top_k(per_group, 2)[0], axis=-1)
        best = lax.top_k(group_score, topk_group)[1]
        allowed = jnp.any(best[:, :, None] == jnp.arange(n_group, dtype=best.dtype)[None, None, :], axis=1)
        choice = jnp.where(allowed[:, :, None], per_group, -jnp.inf).reshape(tokens, experts)
    chosen = lax.top_k(choice, top_k)[1].astype(jnp.int32)
    return chosen, expert_weights(affinity, chosen, normalise=normalise, scale=scale)


def affinities(x: Array, router: Array) -> Array:
    """What `route` chooses by: x [n,d], router [d,e] -> float32 [n,e]."""
    logits = lax.dot_general(_f32(x), _f32(router), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return jax.nn.sigmoid(logits)


def expert_weights(affinity: Array, chosen: Array, *, normalise: bool, scale: float) -> Array:
    """The weights of `route`: affinity [n,e], chosen [n,k] -> float32 [n,k]."""
    weights = jnp.take_along_axis(affinity, chosen, axis=1, mode="promise_in_bounds")
    if normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.float32(1e-20))
    return weights * jnp.float32(scale)


Across = tuple[tuple[str, int], ...]
"""Mesh axes and their sizes, the slowest first: the devices of a group in order of rank."""


def spread(ffn: Callable[..., Array], x: Array, experts: Array, weights: Array, count: int, across: Across) -> Array:
    """`expert_ffn` over the experts of a group of devices, `count` on each: expert e is number e % count of rank
    e // count. A device gives in tokens of its own and has theirs back. ffn(x, experts, weights): of this device's
    experts, by their numbers here."""
    rank = jnp.int32(0)
    for axis, size in across:
        rank = rank * size + lax.axis_index(axis).astype(jnp.int32)
    for axis, _ in reversed(across):
        x, experts, weights = (lax.all_gather(part, axis, axis=0, tiled=True) for part in (x, experts, weights))
    local = experts - rank * count
    out = ffn(x, jnp.where((local >= 0) & (local < count), local, count), weights)
    for axis, _ in across:
        out = lax.psum_scatter(out, axis, scatter_dimension=0, tiled=True)
    return out


@op("expert_ffn")
def expert_ffn(x: Array, experts: Array, weights: Array, *matrices: Array, across: Across = ()) -> Array:
    """The routed experts: x [n,d], experts [n,k], weights [n,k] -> [n,d].

    matrices: gate_up [e,d,2,f] and down [e,f,d] (each as FP8 values and block scales where kept so). An
    expert id of e or more contributes nothing: it lives on another device. With `across` ids are of all devices'
    experts, which the op reaches itself (`spread`).
    """
    if across:
        here = functools.partial(OPS["glm.expert_ffn"].meaning, across=())
        return spread(lambda *given: here(*given, *matrices), x, experts, weights, matrices[0].shape[0], across)
    half = len(matrices) // 2
    gate_up, down = _dense(matrices[:half], x.dtype), _dense(matrices[half:], x.dtype)
    tokens, count = x.shape[0], gate_up.shape[0]
    f32 = jnp.float32
    if tokens * experts.shape[1] <= count:  # few choices: gather the chosen experts' matrices
        here = experts < count
        local = jnp.where(here, experts, 0)
        hidden = jnp.einsum("nd,nkdgf->nkgf", x, gate_up[local], preferred_element_type=f32).astype(x.dtype)
        out = jnp.einsum("nkf,nkfd->nkd", swiglu_body(hidden), down[local], preferred_element_type=f32)
        return jnp.sum(out * jnp.where(here, weights, 0.0)[:, :, None], axis=1).astype(x.dtype)
    ids = jnp.arange(count, dtype=experts.dtype)
    share = jnp.sum(jnp.where(experts[:, :, None] == ids[None, None, :], weights[:, :, None], 0.0), axis=1)
    hidden = jnp.einsum("nd,edgf->engf", x, gate_up, preferred_element_type=f32).astype(x.dtype)
    out = jnp.einsum("enf,efd->end", swiglu_body(hidden), down, preferred_element_type=f32)
    return jnp.einsum("end,ne->nd", out, share).astype(x.dtype)


swiglu_body = OPS["glm.swiglu"].meaning

# --- inlining ------------------------------------------------------------------------------------

Lowerings = Mapping[str, Callable[..., Any]]
Settle = Callable[[Any, jax.ShapeDtypeStruct], Any]


FORMAT = "format"
"""The attribute of an op in a number format of its own, as exports write them: its body is no op's of `OPS`."""


def substitute(
    fn: Callable[..., Any],
    lowerings: Lowerings = MappingProxyType({}),
    inline: bool = False,
    settle: Settle | None = None,
) -> Callable[..., Any]:
    """`fn` with every op named in `lowerings` computed by it instead (attributes as keywords).

    An op that says its `FORMAT` is in a form of its own already, and stays.

    With `inline`, all other ops are replaced by their decompositions too, so that the result can be
    differentiated and batched. Looks inside `jit`; the graph uses no other control flow around ops.

    Lowerings may agree on another form of what passes between them. `settle(value, meant)` makes of what leaves
    `fn` that which the contract says, of the shape and type of `meant`.
    """

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        flat = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), lowerings, inline)
        if settle:
            flat = [settle(value, meant) for value, meant in zip(flat, jax.tree.leaves(shape), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return run


def _evaluate(jaxpr: jex_core.Jaxpr, consts: Any, args: list[Any], lowerings: Lowerings, inline: bool) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        name = eqn.params.get("name", "") if eqn.primitive.name == "composite" else ""
        if name in lowerings and FORMAT not in attributes_of(eqn):
            out = jax.tree.leaves(lowerings[name](*values, **attributes_of(eqn)))
        elif (name and inline) or eqn.primitive.name in ("jit", "pjit"):
            body = eqn.params["jaxpr"]
            out = _evaluate(body.jaxpr, body.consts, values, lowerings, inline)
        else:
            result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            out = result if eqn.primitive.multiple_results else [result]
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def attributes_of(eqn: Any) -> dict[str, Any]:
    """The attributes of a composite equation."""
    return {name: jax.tree.unflatten(tree, leaves) for name, leaves, tree in eqn.params["attributes"]}
