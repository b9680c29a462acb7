"""A step's inputs as one array: a transfer to the device each would take longer than the step of a small model.

int32 [b, t + 2 + p (+ 5)]: tokens, start, length, page table, and where tokens are drawn how (float32 by their bits). A
token of -1 is the one that the launch before chose for the same row, which the host need not have seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from model.choosing import Draws
from model.graph import Batch
from runtime.execution.batches import DRAWN_BY, draws_of
from runtime.serving.executor import TokenChoice

LAST = -1


def packed(batch: Batch, choices: Sequence[TokenChoice | None] | None = None) -> np.ndarray:
    """A batch on the host, and how its first rows' tokens are drawn, where any are."""
    parts = [batch.tokens, batch.start[:, None], batch.length[:, None], batch.page_table]
    if choices is not None:
        draws = draws_of([choices], len(batch.start))
        parts += [getattr(draws, name).view(np.int32)[:, None] for name in DRAWN_BY] + [draws.top_k[:, None]]
    return np.concatenate(parts, axis=1, dtype=np.int32)


def unpacked(fed: Array, previous: Array, tokens: int, pages: int) -> tuple[Batch, Draws | None]:
    """Inside a program: what `packed` made one of. previous: int32 [b], what the launch before chose."""
    ids = jnp.where(fed[:, :tokens] == LAST, previous[:, None], fed[:, :tokens])
    end = tokens + 2 + pages
    # what was not chosen is -1 here, too: some token's row, for a result that nobody takes
    batch = Batch(jnp.maximum(ids, 0), fed[:, tokens], fed[:, tokens + 1], fed[:, tokens + 2 : end])
    if fed.shape[1] == end:
        return batch, None
    floats = lax.bitcast_convert_type(fed[:, end : end + len(DRAWN_BY)], jnp.float32)
    named = {name: floats[:, at] for at, name in enumerate(DRAWN_BY)}
    return batch, Draws(**named, top_k=fed[:, end + len(DRAWN_BY)])
