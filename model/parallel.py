"""How a layer's program is split over devices: the collectives of the per-device graph.

The graph is written for one device's share: local shapes come from the weights it is given, and where
a split leaves a partial sum the graph calls one of the methods below. Without mesh axes they do
nothing, so the one-device program has no collectives. Under `shard_map` (or `vmap` with an axis name)
the axes are real and the same code is the program of every device.

`tp` splits heads, feed-forward width and vocabulary; `dp` splits sequences (attention data
parallelism). Routed experts are split over the product of both, by tensor (each expert's width) or by
expert: then a device holds some of the stage's expert *slots*, and an expert may be in several of them.
Or both: `expert_parts` neighbours share the slots of their group, each a part of their width; what they
compute are partial sums, which the sums over `tp` and `dp` that are there anyhow complete.

Tokens meet the experts of other `dp` groups in one of two ways. "gather": every group's tokens go to
every device, and the results are summed back. "all_to_all": a device sends each group a buffer with a
place for each of its tokens, filled where one of the token's experts lives there, and gets the results
back in the same places. Every place is there at any load, so no token is ever dropped. A chip may have operators that
do the exchange and so belong to the op of the experts ("operators"): a device then gives in its share of its group's
tokens, cut over `tp`, and what comes back stands among zeros that the sum over `tp` completes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from model import ops
from model.split import Layout


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Names of the mesh axes, how experts are split, how tokens reach those of other `dp` groups ("gather" where
    a group's width is split too; "operators" is for a caller to choose), and the devices of a group. The default is
    one device."""

    tp: str | None = None
    dp: str | None = None
    moe: Literal["tensor", "expert"] = "tensor"
    exchange: Literal["gather", "all_to_all", "operators"] = "gather"
    expert_parts: int = 1

    @classmethod
    def of(cls, layout: Layout) -> Parallel:
        """The collectives of a device's program under a layout."""
        return cls(
            tp="tp" if layout.tp > 1 else None,
            dp="dp" if layout.dp > 1 else None,
            moe="expert" if layout.by_expert else "tensor",
            exchange="gather" if layout.grouped else "all_to_all",
            expert_parts=layout.expert_tensor_parts if layout.grouped else 1,
        )

    def sum_heads(self, x: Array) -> Array:
        """Completes a product whose contracted dim is split over `tp`."""
        return lax.psum(x, self.tp) if self.tp else x

    def embed(self, tokens: Array, table: Array) -> Array:
        """Embedding rows from a table split over `tp` by vocabulary."""
        if not self.tp:
            return ops.embed(tokens, table)
        rows = table.shape[0]
        local = tokens - lax.axis_index(self.tp) * rows
        here = (local >= 0) & (local < rows)
        found = ops.embed(jnp.where(here, local, 0), table)
        return lax.psum(jnp.where(here[..., None], found, jnp.zeros((), found.dtype)), self.tp)

    def gather_vocab(self, logits: Array) -> Array:
        """Logits `[.., vocab]` from each device's share of the vocabulary."""
        return lax.all_gather(logits, self.tp, axis=logits.ndim - 1, tiled=True) if self.tp else logits

    # --- routed experts: x [n, d] on each device, replicated over tp and split over dp

    def slots(self, experts: Array, table: Array | None) -> Array:
        """Chosen experts [n,k] to the slots that serve them; without a table, expert e is in slot e.

        table [e, m]: the slots of each expert, repeated in turn up to `m`; tokens take them in turn.
        """
        if table is None:
            return experts
        turn = jnp.arange(experts.shape[0], dtype=jnp.int32)
        if self.dp:  # groups of a few tokens each would all begin with the same slot
            turn = turn + lax.axis_index(self.dp).astype(jnp.int32)
        turn = jnp.broadcast_to((turn % table.shape[1])[:, None], experts.shape)
        return table.at[experts, turn].get(mode="promise_in_bounds")

    def dispatch(self, x: Array, slots: Array, weights: Array, count: int) -> tuple[Array, Array, Array]:
        """What this device's `count` slots compute: tokens [m,d], their choices [m,k] as numbers of local slots,
        `count` (nobody) for those elsewhere, and the choices' weights [m,k]."""
        if self.dp and self.moe == "expert" and self.exchange == "all_to_all":
            return self._send(x, slots, weights, count)
        if self.across:
            return self._share(x), self._share(slots), self._share(weights)
        x, slots, weights = (self._gather(part) for part in (x, slots, weights))
        if self.moe != "expert" or not (self.tp or self.dp):
            return x, slots, weights
        return x, _local(slots, self._first_slot(count), count), weights

    def combine(self, out: Array, tokens: int) -> Array:
        """The inverse of `dispatch`, for results [m,d]: each group's own `tokens`, [n,d], summed over the groups
        that served them; the sum over `tp` is left to the caller."""
        if not self.dp:
            return out
        if self.across:
            return self._among_zeros(out, tokens)
        if self.moe != "expert" or self.exchange == "gather":
            return lax.psum_scatter(out, self.dp, scatter_dimension=0, tiled=True)
        groups = lax.axis_size(self.dp)
        served = lax.all_to_all(out.reshape(groups, -1, out.shape[1]), self.dp, 0, 0, tiled=True)
        return jnp.sum(served, axis=0, dtype=jnp.float32).astype(out.dtype)

    @property
    def across(self) -> ops.Across:
        """The devices whose experts the op of the experts reaches itself: none where the graph does it."""
        if self.exchange != "operators" or self.moe != "expert" or not self.dp:
            return ()
        return tuple((axis, lax.axis_size(axis)) for axis in (self.dp, self.tp) if axis)

    def _share(self, x: Array) -> Array:
        """This tp rank's equal share of x [n, ..]; where n does not divide, the last row again."""
        if not self.tp:
            return x
        share = -(-x.shape[0] // lax.axis_size(self.tp))
        rows = lax.axis_index(self.tp).astype(jnp.int32) * share + jnp.arange(share, dtype=jnp.int32)
        return x.at[jnp.minimum(rows, x.shape[0] - 1)].get(mode="promise_in_bounds")

    def _among_zeros(self, share: Array, tokens: int) -> Array:
        """Rows [m, d] of `_share` in their places of [tokens, d]."""
        if not self.tp:
            return share
        mine = jnp.arange(lax.axis_size(self.tp), dtype=jnp.int32) == lax.axis_index(self.tp).astype(jnp.int32)
        rows = jnp.where(mine[:, None, None], share[None], jnp.zeros((), share.dtype))
        return rows.reshape(-1, share.shape[1])[:tokens]

    def _gather(self, x: Array) -> Array:
        """Of all `dp` groups."""
        return lax.all_gather(x, self.dp, axis=0, tiled=True) if self.dp else x

    def _send(self, x: Array, slots: Array, weights: Array, count: int) -> tuple[Array, Array, Array]:
        """To each group, from each tp rank to the device of the same tp rank: the tokens with a slot there."""
        groups, top_k = lax.axis_size(self.dp), slots.shape[1]
        group = jnp.arange(groups, dtype=jnp.int32)
        width = lax.axis_size(self.tp) if self.tp else 1
        rank = lax.axis_index(self.tp).astype(jnp.int32) if self.tp else jnp.int32(0)
        local = _local(slots[None], ((group * width + rank) * count)[:, None, None], count)
        wanted = jnp.any(local < count, axis=-1)
        rows = jnp.where(wanted[:, :, None], x[None], jnp.zeros((), x.dtype))
        shares = jnp.broadcast_to(weights[None], local.shape)
        rows, local, shares = (lax.all_to_all(part, self.dp, 0, 0, tiled=True) for part in (rows, local, shares))
        return rows.reshape(-1, x.shape[1]), local.reshape(-1, top_k), shares.reshape(-1, top_k)

    def _first_slot(self, count: int) -> Array:
        """The slot that this device's slots begin at."""
        rank = lax.axis_index(self.tp) if self.tp else jnp.int32(0)
        if self.dp:
            rank = rank + lax.axis_index(self.dp) * (lax.axis_size(self.tp) if self.tp else 1)
        rank = rank.astype(jnp.int32)
        return (rank // self.expert_parts if self.expert_parts > 1 else rank) * count


def _local(slots: Array, first: Array, count: int) -> Array:
    local = slots - first
    return jnp.where((local >= 0) & (local < count), local, count)


SINGLE = Parallel()
