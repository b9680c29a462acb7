"""Losses and gauges around the one graph.

A training batch is a `graph.step` over fresh caches: a page a sequence, as long as the sequence. The graph's ops are
inlined by `model.ops.substitute`, but for a few that are computed in an equivalent form which differentiates fast, or
where something is read off on the way: attention logits and distributions, index scores, expert choices. So there is
no second model, and `tests/training/test_forward.py` holds the substituted step to the plain one.

The recipe of DeepSeek sparse attention (DSA), one `Attention` a stage:
- "dense": every query sees all of its past; indexers take no part.
- "warmup": attention stays dense and indexers score it. Their target is the attention distribution summed over heads
  (L1-normalised), the loss a Kullback-Leibler divergence; nothing else is trained.
- "sparse": attention sees what the indexers select. The language loss trains everything but the indexers, the
  divergence, now over the selected positions only, trains the indexers: no gradient of it enters their inputs.
An indexer that several layers share has the mean of their distributions as its target.

Shapes: b sequences, t tokens, c context (= t), h heads, e experts, n = b * t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from model import graph, ops, qat
from model.config import LayerType, Mla, ModelConfig
from model.module import MODE, Model, fresh
from model.weights import Weight

Attention = Literal["dense", "warmup", "sparse"]


# --- the graph, with gauges ------------------------------------------------------------------------


@dataclasses.dataclass
class Gauges:
    """What is read off a pass, in the order of the layers: the largest attention logit of each, the load of each
    router's experts [e], and for each indexer its scores, the positions it selected and the distributions it served.
    chosen: by "experts" and "selections", what each layer is to choose instead, int32 [b,t,width], -1 where it may."""

    attention: Attention
    index_weights: frozenset[int]
    chosen: dict[str, Iterator[Array]] = dataclasses.field(default_factory=dict)
    logit_max: list[Array] = dataclasses.field(default_factory=list)
    loads: list[Array] = dataclasses.field(default_factory=list)
    scores: list[Array] = dataclasses.field(default_factory=list)
    allowed: list[Array] = dataclasses.field(default_factory=list)
    served: list[list[Array]] = dataclasses.field(default_factory=list)

    def lowerings(self) -> dict[str, Callable[..., Any]]:
        return {
            "glm.cache_write": _write_fresh,
            "glm.linear": self._linear,
            "glm.expanded_attention": self._expanded,
            "glm.sparse_attention": self._sparse,
            "glm.index_scores": self._index_scores,
            "glm.route": self._route,
            "glm.expert_ffn": _expert_ffn,
            **({"glm.select_topk": self._select_topk} if "selections" in self.chosen else {}),
        }

    def _linear(self, x: Array, *weight: Array) -> Array:
        return ops.OPS["glm.linear"].meaning(
            lax.stop_gradient(x) if id(weight[0]) in self.index_weights else x, *weight
        )

    def _route(self, x: Array, router: Array, bias: Array, **attributes: Any) -> tuple[Array, Array]:
        experts, weights = ops.OPS["glm.route"].meaning(x, router, bias, **attributes)
        if "experts" in self.chosen:
            experts = _chosen(next(self.chosen["experts"]).reshape(experts.shape), experts)
            weights = ops.expert_weights(
                ops.affinities(x, router), experts, normalise=attributes["normalise"], scale=attributes["scale"]
            )
        self.loads.append(jnp.sum(jax.nn.one_hot(experts, bias.shape[0], dtype=jnp.float32), axis=(0, 1)))
        return experts, weights

    def _select_topk(self, scores: Array, *, k: int) -> Array:
        return _chosen(next(self.chosen["selections"]), ops.OPS["glm.select_topk"].meaning(scores, k=k))

    def _index_scores(self, query: Array, head_weights: Array, pages: Array, table: Array, positions: Array) -> Array:
        keys, heads, width = pages[1:], query.shape[2], query.shape[3]
        dots = jnp.maximum(jnp.einsum("bthi,bci->bthc", query, keys), 0.0)
        scores = jnp.einsum("bthc,bth->btc", dots, head_weights * jnp.float32((heads * width) ** -0.5))
        scores = jnp.where(_past(scores.shape[1])[None], scores, -jnp.inf)
        self.scores.append(scores)
        self.served.append([])
        return lax.stop_gradient(scores)

    def _expanded(
        self, query: Array, pages: Array, table: Array, k_up: Array, v_up: Array, positions: Array, *, scale: float
    ) -> Array:
        nope = k_up.shape[1]
        absorbed = jnp.concatenate([ops.OPS["glm.head_linear"].meaning(query[..., :nope], k_up), query[..., nope:]], -1)
        out = self._attend(absorbed, pages[1:], _past(query.shape[1])[None, :, :], scale, k_up.shape[2])
        return ops.OPS["glm.head_linear"].meaning(out, v_up)

    def _sparse(
        self,
        query: Array,
        pages: Array,
        table: Array,
        selected: Array,
        positions: Array,
        *,
        scale: float,
        value_dim: int,
    ) -> Array:
        b, t = selected.shape[:2]
        past = _past(t)[None, :, :]
        allowed = past
        if self.attention == "sparse":
            index = (jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None], selected)
            allowed = past & jnp.zeros((b, t, t), bool).at[index].set(True, mode="promise_in_bounds")
        if not self.served[-1]:  # the first layer that the last indexer serves is its own
            self.allowed.append(allowed)
        return self._attend(query, pages[1:], allowed, scale, value_dim)

    def _attend(self, query: Array, rows: Array, allowed: Array, scale: float, value_dim: int) -> Array:
        """Absorbed attention: query [b,t,h,l] over rows [b,c,l], `allowed` [b or 1,t,c] -> [b,t,h,value_dim]."""
        scores = jnp.einsum("bthl,bcl->bthc", query * jnp.float32(scale), rows)
        scores = jnp.where(allowed[:, :, None, :], scores, -jnp.inf)
        self.logit_max.append(lax.stop_gradient(jnp.max(scores)))
        weights = jax.nn.softmax(scores, axis=-1)
        if self.served:
            self.served[-1].append(lax.stop_gradient(jnp.mean(weights, axis=2)))
        return jnp.einsum("bthc,bcv->bthv", weights, rows[..., :value_dim])

    def targets(self) -> list[Array]:
        """For each indexer the mean distribution of the layers it serves, [b,t,c]."""
        return [sum(served[1:], served[0]) / jnp.float32(len(served)) for served in self.served]

    def index_loss(self) -> Array:
        """Mean over indexers and queries of KL(attention || softmax of the index scores), in nats."""
        if not self.scores:
            return jnp.float32(0.0)
        losses = []
        for scores, allowed, target in zip(self.scores, self.allowed, self.targets(), strict=True):
            inside = jnp.where(allowed, scores, -jnp.inf)
            log_share = inside - jax.scipy.special.logsumexp(inside, axis=-1, keepdims=True)
            gap = jnp.log(jnp.maximum(target, 1e-20)) - jnp.where(allowed, log_share, 0.0)
            losses.append(jnp.mean(jnp.sum(jnp.where(target > 0, target * gap, 0.0), axis=-1)))
        return sum(losses[1:], losses[0]) / jnp.float32(len(losses))


def _chosen(recorded: Array, own: Array) -> Array:
    return jnp.where(recorded >= 0, recorded, own)


def _past(t: int) -> Array:
    return jnp.tril(jnp.ones((t, t), bool))


def _write_fresh(pages: Array, rows: Array, slots: Array, **_: Any) -> Array:
    """`cache_write` of whole sequences to fresh pages, one a sequence."""
    return jnp.concatenate([pages[:1], rows.astype(pages.dtype)], axis=0)


def _expert_ffn(x: Array, experts: Array, weights: Array, gate_up: Array, down: Array) -> Array:
    """`expert_ffn` as two products over all experts, the routing weights between them."""
    count, d, _, f = gate_up.shape
    share = jnp.einsum("nke,nk->ne", jax.nn.one_hot(experts, count, dtype=x.dtype), weights)
    hidden = (x @ gate_up.transpose(1, 0, 2, 3).reshape(d, -1)).reshape(-1, count, 2, f)
    hidden = ops.swiglu_body(hidden) * share[:, :, None]
    return hidden.reshape(-1, count * f) @ down.reshape(count * f, d)


class Passed(NamedTuple):
    """Logits [b,t,vocab] of the main stack, those of each draft depth, and what was read off."""

    logits: Array
    drafts: list[Array]
    gauges: Gauges


def staged(cfg: ModelConfig, attention: Attention, length: int) -> ModelConfig:
    """The config whose graph takes the stage's path over a context of `length`."""
    assert cfg.indexer is not None
    if attention == "dense":  # the graph leaves out a selection that would take every row
        return dataclasses.replace(cfg, indexer=dataclasses.replace(cfg.indexer, topk=length))
    if cfg.indexer.topk >= length:
        raise ValueError(f"a context of {length} is no longer than what the indexer selects ({cfg.indexer.topk})")
    return cfg


def forward(
    model: Model,
    tokens: Array,
    attention: Attention,
    drafts: int = 0,
    draft_rows: int = 0,
    rounding: str = "",
    chosen: Mapping[str, ArrayLike] = MappingProxyType({}),
) -> Passed:
    """The graph over tokens [b,t]. With `drafts`, the MTP layer's depths too, for the first `draft_rows` sequences:
    depth k gives at position i the logits of token i + 1 + k, each depth carrying the hidden state of the last.
    rounding: of the weights, see `model.qat`. chosen: what the layers of the main stack are to choose, as of `Gauges`,
    [layers,b,t,width]."""
    cfg = staged(model.config, attention, tokens.shape[1])
    seen = qat.rounding(rounding) if rounding else None
    of_indexers: set[int] = set()

    def see(weight: Weight, array: Array) -> Array:
        found = seen(weight, array) if seen else array
        if weight.of_indexer:
            of_indexers.add(id(found))
        return found

    weights = model.seen(see)
    gauges = Gauges(attention, frozenset(of_indexers), {name: iter(jnp.asarray(each)) for name, each in chosen.items()})

    def run(fn: Callable[..., Any], kinds: Sequence[LayerType], tokens: Array, *more: Any) -> graph.StepOutput:
        caches, batch = fresh(cfg, kinds, tokens, jnp.float32)
        return ops.substitute(fn, gauges.lowerings(), inline=True)(weights, caches, batch, *more)

    out = run(lambda w, c, batch: graph.step(cfg, w, c, batch, MODE), cfg.layers, tokens)
    hidden, said = out.hidden[:draft_rows], []
    for depth in range(1, drafts + 1):
        ahead = jnp.roll(tokens[:draft_rows], -depth, axis=1)
        draft = run(lambda w, c, batch, h: graph.mtp_step(cfg, w, c[0], batch, h, MODE), [cfg.mtp_type], ahead, hidden)
        hidden = draft.hidden
        said.append(draft.logits)
    return Passed(out.logits, said, gauges)


# --- losses ----------------------------------------------------------------------------------------


def surprise(logits: Array, tokens: Array, weights: Array, ahead: int) -> tuple[Array, Array]:
    """Weighted surprise in nats of the tokens `ahead` positions on: (losses, weights), both [b,t]."""
    targets, counts = jnp.roll(tokens, -ahead, axis=1), jnp.roll(weights, -ahead, axis=1)
    counts = jnp.where(jnp.arange(tokens.shape[1]) < tokens.shape[1] - ahead, counts, 0.0)
    log_total = jax.scipy.special.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (log_total - picked) * counts, counts


@dataclasses.dataclass(frozen=True)
class Aim:
    """What a stage trains: its attention, how many draft depths over how many sequences, and their loss's weight; and
    what its weights are rounded to on the way."""

    attention: Attention
    drafts: int = 0
    draft_rows: int = 0
    draft_weight: float = 0.0
    rounding: str = ""


def loss(model: Model, aim: Aim, tokens: Array, weights: Array) -> tuple[Array, dict[str, Any]]:
    """The loss of a batch, and its parts. `row_loss`, `row_count` [b]: surprise over the answers of each sequence."""
    passed = forward(model, tokens, aim.attention, aim.drafts, aim.draft_rows, aim.rounding)
    gauges = passed.gauges
    losses, counts = surprise(passed.logits, tokens, weights, 1)
    language = jnp.sum(losses) / jnp.sum(counts)
    answers = counts == 1.0
    index = gauges.index_loss()
    draft_losses = []
    for depth, logits in enumerate(passed.drafts, 1):
        part, count = surprise(logits, tokens[: aim.draft_rows], weights[: aim.draft_rows], 1 + depth)
        draft_losses.append(jnp.sum(part) / jnp.maximum(jnp.sum(count), 1.0))
    drafted = jnp.mean(jnp.stack(draft_losses)) if draft_losses else jnp.float32(0.0)
    total = index if aim.attention == "warmup" else language + jnp.float32(aim.draft_weight) * drafted + index
    return total, {
        "loss": language,
        "draft_loss": drafted,
        "index_loss": index,
        "row_loss": jnp.sum(jnp.where(answers, losses, 0.0), axis=1),
        "row_count": jnp.sum(answers, axis=1),
        "logit_max": jnp.max(jnp.stack(gauges.logit_max)),
        "loads": gauges.loads,
    }


def index_recall(model: Model, tokens: Array) -> Array:
    """Of the positions that dense attention weighs most, the share that the indexers select: the mean over indexers
    and the queries whose past is longer than the selection."""
    cfg, gauges = model.config, forward(model, tokens, "warmup").gauges
    assert cfg.indexer is not None and isinstance(cfg.attention, Mla)
    k, t, shares = cfg.indexer.topk, tokens.shape[1], []
    for scores, target in zip(gauges.scores, gauges.targets(), strict=True):
        chosen = lax.top_k(scores[:, k:], k)[1]
        best = lax.top_k(jnp.where(_past(t)[None, k:], target[:, k:], -1.0), k)[1]
        shares.append(jnp.mean(jnp.any(chosen[..., :, None] == best[..., None, :], axis=-1).astype(jnp.float32)))
    return jnp.mean(jnp.stack(shares))
