"""The one graph: a layer of every type, and the `step` that runs a schedule of them over paged caches.

A step feeds `t` new tokens of each of `b` sequences: a prefill chunk, one decoded token, or a token
with its drafts. Sequences may be ragged (`length` of the `t` tokens are real). Each sequence has a row
of the page table; page 0 belongs to nobody and takes the writes of padding.

Life of a layer: norm -> queries, latent row (and index key) -> cache write -> [scores -> top-k] ->
attention -> output projection -> norm -> experts or dense feed-forward. Prefill expands keys and values
from the latents; decode absorbs the key projection into the queries. Once the context outgrows
`index_topk`, both use sparse absorbed attention over the selected rows; below that the selection would
take every row, so it is skipped.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export

from model import ops
from model.config import Gqa, LayerType, Mla, ModelConfig
from model.narrow_rows import is_narrow
from model.parallel import SINGLE, Parallel
from model.weights import Quantized

LayerWeights = dict[str, Any]  # name -> Array | Quantized
LayerCache = dict[str, Array]  # cache row name -> pages [pages, page_size, ..]


class Batch(NamedTuple):
    """What a step is given: tokens [b,t]; start [b], the tokens already cached; length [b], how many
    of the t tokens are real; page_table [b,p]. All int32, on the device or as numpy arrays."""

    tokens: Any
    start: Any
    length: Any
    page_table: Any


class View(NamedTuple):
    """Where a batch's tokens stand: positions [b,t], and the cache slot each is written to [b,t]."""

    positions: Array
    slots: Array
    page_table: Array


@dataclasses.dataclass(frozen=True)
class Mode:
    """The static choices of a step.

    `attention`: "expanded" for long chunks, "absorbed" for decoding. `logits`: of the "last" real token
    of each sequence, or of "all" tokens.
    """

    attention: Literal["expanded", "absorbed"] = "absorbed"
    logits: Literal["last", "all"] = "last"


class Carried(NamedTuple):
    """What one pipeline stage hands to the next: x [b,t,d], and the selection [b,t,k] where the next stage
    begins with a layer that shares it (else None)."""

    x: Any
    selected: Any


class StageOutput(NamedTuple):
    """Of the last stage logits and hidden, as of a step (elsewhere None); `carried` of all others; new caches."""

    carried: Any
    logits: Any
    hidden: Any
    caches: list[LayerCache]


class StepOutput(NamedTuple):
    """logits float32 [b,vocab] or [b,t,vocab]; hidden [b,t,d] after the final norm; the new caches."""

    logits: Array
    hidden: Array
    caches: list[LayerCache]


# so that they may cross the boundary of an exported program
for _type in (Batch, Carried, StageOutput, StepOutput, Quantized):
    export.register_namedtuple_serialization(_type, serialized_name=f"glm5.{_type.__name__}")


def view_of(batch: Batch, page_size: int) -> View:
    """Positions and cache slots of a batch's tokens."""
    t = batch.tokens.shape[1]
    offset = jnp.arange(t, dtype=jnp.int32)[None, :]
    positions = batch.start[:, None] + offset
    real = offset < batch.length[:, None]
    page = jnp.take_along_axis(
        batch.page_table, jnp.where(real, positions // page_size, 0), axis=1, mode="promise_in_bounds"
    )
    slots = jnp.where(real, page * page_size + positions % page_size, 0)
    return View(positions, slots, batch.page_table)


def _linear(x: Array, weight: Any) -> Array:
    return ops.linear(x, *ops.operands(weight))


def _heads(x: Array, width: int) -> Array:
    return x.reshape(*x.shape[:-1], -1, width)


def _rope(cfg: ModelConfig, x: Array, view: View, interleaved: bool | None = None) -> Array:
    rope = cfg.rope
    return ops.rope(
        x,
        view.positions,
        jnp.asarray(rope.inv_freq()),
        interleaved=rope.interleaved if interleaved is None else interleaved,
        factor=rope.attention_factor,
    )


def _mla(
    cfg: ModelConfig,
    kind: LayerType,
    w: LayerWeights,
    x: Array,
    cache: LayerCache,
    view: View,
    selected: Array | None,
    mode: Mode,
) -> tuple[Array, LayerCache, Array | None]:
    mla = cfg.attention
    assert isinstance(mla, Mla)
    with jax.named_scope("qkv"):
        if mla.q_lora_rank is None:
            q_latent, query = None, _linear(x, w["q"])
        else:
            # transformers builds both low-rank norms with its class default, not the config's eps
            q_latent = ops.rms_norm(_linear(x, w["q_a"]), w["q_a_norm"], eps=1e-6)
            query = _linear(q_latent, w["q_b"])
        query = _heads(query, mla.qk_dim)
        q_nope, q_rope = query[..., : mla.nope_dim], _rope(cfg, query[..., mla.nope_dim :], view)
        kv = _linear(x, w["kv_a"])
        latent = ops.rms_norm(kv[..., : mla.kv_lora_rank], w["kv_a_norm"], eps=1e-6)
        k_rope = _rope(cfg, kv[..., None, mla.kv_lora_rank :], view)[..., 0, :]
        row = jnp.concatenate([latent, k_rope], axis=-1)
        kept = {"plain": mla.rope_dim} if is_narrow(cache["latent"]) else {}
        cache = {**cache, "latent": ops.cache_write(cache["latent"], row, view.slots, cache="latent", **kept)}

    context = view.page_table.shape[1] * cache["latent"].shape[1]
    sparse = cfg.indexer is not None and context > cfg.indexer.topk
    if kind.indexer == "full":
        assert q_latent is not None
        cache, selected = _select(cfg, w, x, q_latent, cache, view, sparse)
    pages, scale = cache["latent"], cfg.attention_scale
    with jax.named_scope("attention"):
        if mode.attention == "expanded" and not sparse:
            query = jnp.concatenate([q_nope, q_rope], axis=-1)
            out = ops.expanded_attention(
                query, pages, view.page_table, w["k_up"], w["v_up"], view.positions, scale=scale
            )
        else:
            query = jnp.concatenate([ops.head_linear(q_nope, w["k_up"]), q_rope], axis=-1)
            attributes = {"scale": scale, "value_dim": mla.kv_lora_rank}
            if sparse:
                out = ops.sparse_attention(query, pages, view.page_table, selected, view.positions, **attributes)
            else:
                out = ops.latent_attention(query, pages, view.page_table, view.positions, **attributes)
            out = ops.head_linear(out, w["v_up"])
        return _linear(out.reshape(*out.shape[:2], -1), w["o"]), cache, selected


def _select(
    cfg: ModelConfig, w: LayerWeights, x: Array, q_latent: Array, cache: LayerCache, view: View, sparse: bool
) -> tuple[LayerCache, Array | None]:
    """The lightning indexer: writes its keys, and returns the selected context positions [b,t,k]
    (None where the context is no longer than the selection)."""
    index = cfg.indexer
    assert index is not None
    with jax.named_scope("indexer"):
        key = ops.layer_norm(_linear(x, w["index_k"]), w["index_k_norm"], w["index_k_bias"], eps=index.norm_eps)
        key = _rope(cfg, key[..., None, :], view, index.rope_interleaved)[..., 0, :]
        cache = {**cache, "index": ops.cache_write(cache["index"], key, view.slots, cache="index")}
        if not sparse:
            return cache, None
        query = _rope(cfg, _heads(_linear(q_latent, w["index_q"]), index.head_dim), view, index.rope_interleaved)
        head_weights = _linear(x, w["index_w"])
        scores = ops.index_scores(query, head_weights, cache["index"], view.page_table, view.positions)
        return cache, ops.select_topk(scores, k=index.topk)


def _gqa(cfg: ModelConfig, w: LayerWeights, x: Array, cache: LayerCache, view: View) -> tuple[Array, LayerCache]:
    gqa = cfg.attention
    assert isinstance(gqa, Gqa)
    q, k, v = (_linear(x, w[name]) for name in "qkv")
    if gqa.bias:
        q, k, v = ops.add_bias(q, w["q_bias"]), ops.add_bias(k, w["k_bias"]), ops.add_bias(v, w["v_bias"])
    q, k, v = (_heads(part, gqa.head_dim) for part in (q, k, v))
    if gqa.qk_norm:
        q = ops.rms_norm(q, w["q_norm"], eps=cfg.norm_eps)
        k = ops.rms_norm(k, w["k_norm"], eps=cfg.norm_eps)
    q, k = _rope(cfg, q, view), _rope(cfg, k, view)
    cache = {
        "key": ops.cache_write(cache["key"], k, view.slots, cache="key"),
        "value": ops.cache_write(cache["value"], v, view.slots, cache="value"),
    }
    with jax.named_scope("attention"):
        out = ops.paged_attention(
            q, cache["key"], cache["value"], view.page_table, view.positions, scale=cfg.attention_scale
        )
    return _linear(out.reshape(*out.shape[:2], -1), w["o"]), cache


def _feed_forward(cfg: ModelConfig, kind: LayerType, w: LayerWeights, x: Array, par: Parallel) -> Array:
    if kind.ffn == "dense":
        return par.sum_heads(_linear(ops.swiglu(_linear(x, w["gate_up"])), w["down"]))
    moe = cfg.moe
    assert moe is not None
    flat = x.reshape(-1, x.shape[-1])
    with jax.named_scope("route"):
        experts, weights = ops.route(
            flat,
            w["router"],
            w["router_bias"],
            top_k=moe.top_k,
            n_group=moe.n_group,
            topk_group=moe.topk_group,
            normalise=moe.normalise,
            scale=moe.scale,
        )
        slots = par.slots(experts, w.get("expert_slots"))
    gate_up, down = ops.operands(w["experts_gate_up"]), ops.operands(w["experts_down"])
    with jax.named_scope("dispatch"):
        flat, slots, weights = par.dispatch(flat, slots, weights, gate_up[0].shape[0])
    with jax.named_scope("experts"):
        reach = {"across": par.across} if par.across else {}
        out = ops.expert_ffn(flat, slots, weights, *gate_up, *down, **reach)
    with jax.named_scope("combine"):
        out = par.combine(out, x.shape[0] * x.shape[1]).reshape(x.shape)
    return par.sum_heads(out + _shared_experts(w, x) if moe.shared_experts else out)


def _shared_experts(w: LayerWeights, x: Array) -> Array:
    return _linear(ops.swiglu(_linear(x, w["shared_gate_up"])), w["shared_down"])


def layer(
    cfg: ModelConfig,
    kind: LayerType,
    w: LayerWeights,
    x: Array,
    cache: LayerCache,
    view: View,
    selected: Array | None = None,
    mode: Mode = Mode(),
    par: Parallel = SINGLE,
) -> tuple[Array, LayerCache, Array | None]:
    """One decoder layer: x [b,t,d] and the layer's cache -> (x, cache, the selection it used).

    `selected` is the selection of the nearest full-indexer layer below, read by a sharing layer. Where experts
    are in other slots than their own number, or in several, `w["expert_slots"]` says in which (`Parallel.slots`).
    """
    with jax.named_scope(kind.name):
        hidden = ops.rms_norm(x, w["input_norm"], eps=cfg.norm_eps)
        if kind.attention == "mla":
            out, cache, selected = _mla(cfg, kind, w, hidden, cache, view, selected, mode)
        else:
            out, cache = _gqa(cfg, w, hidden, cache, view)
        x = x + par.sum_heads(out)
        hidden = ops.rms_norm(x, w["ffn_norm"], eps=cfg.norm_eps)
        return x + _feed_forward(cfg, kind, w, hidden, par), cache, selected


def head(cfg: ModelConfig, outer: LayerWeights, hidden: Array, par: Parallel = SINGLE) -> Array:
    """Normalised hidden states [.., d] -> float32 logits [.., vocab]."""
    weight = outer["embed"].T if cfg.tie_embeddings else outer["head"]
    return par.gather_vocab(_linear(hidden, weight).astype(jnp.float32))


def last_token(x: Array, length: Array) -> Array:
    """x [b,t,d] at each sequence's last real token: [b,1,d]."""
    index = jnp.maximum(length - 1, 0)[:, None, None]
    return jnp.take_along_axis(x, jnp.broadcast_to(index, (x.shape[0], 1, x.shape[2])), axis=1)


def _logits(cfg: ModelConfig, outer: LayerWeights, hidden: Array, batch: Batch, mode: Mode, par: Parallel) -> Array:
    if mode.logits == "all":
        return head(cfg, outer, hidden, par)
    return head(cfg, outer, last_token(hidden, batch.length), par)[:, 0, :]


def stage(
    cfg: ModelConfig,
    layers: range,
    weights: dict[str, Any],
    caches: list[LayerCache],
    batch: Batch,
    carried: Carried | None = None,
    mode: Mode = Mode(),
    par: Parallel = SINGLE,
) -> StageOutput:
    """Feeds a batch through some of the layers: what one pipeline stage computes.

    `weights` is `{"outer": .., "layers": [..]}`, the latter of `layers` only, and `caches` has an entry for each.
    The stage with layer 0 embeds the tokens and needs `embed` of the outer weights; the others are given what
    the stage below `carried`. The stage with the last layer needs `final_norm` and `head`.
    """
    outer = weights["outer"]
    view = view_of(batch, next(iter(caches[0].values())).shape[1])
    if layers.start == 0:
        x, selected = par.embed(batch.tokens, outer["embed"]), None
    else:
        assert carried is not None
        x, selected = carried
    out = []
    for kind, w, cache in zip(cfg.layers[layers.start : layers.stop], weights["layers"], caches, strict=True):
        x, cache, selected = layer(cfg, kind, w, x, cache, view, selected, mode, par)
        out.append(cache)
    if layers.stop < cfg.num_layers:
        shared = cfg.layers[layers.stop].indexer == "shared"
        return StageOutput(Carried(x, selected if shared else None), None, None, out)
    hidden = ops.rms_norm(x, outer["final_norm"], eps=cfg.norm_eps)
    return StageOutput(None, _logits(cfg, outer, hidden, batch, mode, par), hidden, out)


def step(
    cfg: ModelConfig,
    weights: dict[str, Any],
    caches: list[LayerCache],
    batch: Batch,
    mode: Mode = Mode(),
    par: Parallel = SINGLE,
) -> StepOutput:
    """Feeds a batch's tokens through the main stack.

    `weights` is `{"outer": .., "layers": [..], "mtp": [..]}` as `model.checkpoint` loads it; `caches` has
    one entry a main layer.
    """
    out = stage(cfg, range(cfg.num_layers), weights, caches, batch, None, mode, par)
    return StepOutput(out.logits, out.hidden, out.caches)


def mtp_step(
    cfg: ModelConfig,
    weights: dict[str, Any],
    cache: LayerCache,
    batch: Batch,
    hidden: Array,
    mode: Mode = Mode(),
    par: Parallel = SINGLE,
) -> StepOutput:
    """The multi-token-prediction layer: from the hidden state of position i and the token at i+1, the
    logits of the token at i+2.

    `batch.tokens[:, j]` is the token *after* position `start + j`, and `hidden` [b,t,d] the state at that
    position: the main stack's after its final norm, then this layer's own from draft to draft. GLM carries
    it after the shared-head norm, DeepSeek before (carrying the wrong one leaves the first draft right
    and ruins the later ones).
    """
    outer, w, kind = weights["outer"], weights["mtp"][0], cfg.mtp_type
    view = view_of(batch, next(iter(cache.values())).shape[1])
    embedded = ops.rms_norm(par.embed(batch.tokens, outer["embed"]), w["embed_norm"], eps=cfg.norm_eps)
    carried = ops.rms_norm(hidden, w["hidden_norm"], eps=cfg.norm_eps)
    x = _linear(jnp.concatenate([embedded, carried], axis=-1), w["embed_hidden"])
    x, cache, _ = layer(cfg, kind, w, x, cache, view, None, mode, par)
    normed = ops.rms_norm(x, w["head_norm"], eps=cfg.norm_eps)
    carry = normed if cfg.mtp_carries_norm else x
    return StepOutput(_logits(cfg, outer, normed, batch, mode, par), carry, [cache])


def draft(
    cfg: ModelConfig,
    weights: dict[str, Any],
    cache: LayerCache,
    batch: Batch,
    hidden: Array,
    drafts: int,
    mode: Mode = Mode(),
    par: Parallel = SINGLE,
) -> tuple[Array, LayerCache]:
    """The best guesses at what follows a batch, int32 [b,drafts]: `mtp_step` over the confirmed tokens, then over one
    guess after the other. Arguments as of `mtp_step`, whose cache is returned."""
    found = []
    for _ in range(drafts):
        out = mtp_step(cfg, weights, cache, batch, hidden, mode, par)
        cache = out.caches[0]
        token = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
        found.append(token)
        last = batch.start + batch.length
        # a row of padding (length 0) stays one: its writes go to page 0
        length = jnp.minimum(batch.length, 1)
        hidden = last_token(out.hidden, batch.length)
        batch = Batch(token[:, None], last, length, batch.page_table)
    return jnp.stack(found, axis=1), cache
