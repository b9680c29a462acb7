"""How evenly tokens fall on experts, and what that makes of the busiest rank.

A load is a share per expert. Two numbers of the busiest rank decide the time of its grouped GEMMs: how
many rows it computes and how many experts' weights it reads. With kernels fitted on evenly loaded rows only,
the pair explains the measured power-law rows to 4-7 % (SGLang), 5-9 % (vLLM) and 8-12 % (TensorRT-LLM),
medians; `power_law_rows` in the price files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from foundation.reading import Unreadable, read_json
from runtime.pricing.grid import Array
from runtime.pricing.price import PriceError


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Popularity of each expert in placement order; shares sum to 1.

    `even` marks the benchmark's round-robin load: no two ranks differ and no expert is hit twice before
    all were hit once. Real routers are at best random, see `uniform`. `shared`: experts beside these that every
    token meets, where an engine runs the shared expert in the routed ones' kernels; on one rank's slice only.
    """

    name: str
    shares: Array
    even: bool = False
    shared: int = 0

    def busiest_rank(self, tokens: ArrayLike, top_k: int, ranks: int) -> tuple[Array, Array]:
        """Expected (rows, active experts) of the busiest of `ranks` equal slices, per batch size.

        Random routing: an expert is active with probability 1 - (1 - q)^tokens, q being the chance that a
        token picks it. The busiest rank exceeds its mean by the expected maximum of `ranks` Poisson draws.
        Raises PriceError when the experts do not divide over the ranks.
        """
        experts = len(self.shares)
        if experts % ranks:
            raise PriceError(f"{experts} experts / {ranks} ranks = {experts / ranks:g}: not a whole number")
        batch = np.maximum(np.asarray(tokens, float), 1e-9)
        if self.shared:
            assert ranks == 1, "experts of every token are not spread over ranks"
            rows, active = dataclasses.replace(self, shared=0).busiest_rank(tokens, top_k, 1)
            return rows + np.maximum(batch, 1.0) * self.shared, active + self.shared
        if self.even:
            rows = np.maximum(batch * top_k / ranks, 1.0)
            return rows, np.minimum(experts / ranks, rows)
        chance = _pick_probability(self.shares, top_k).reshape(ranks, -1)
        worst = chance[int(chance.sum(axis=1).argmax())]
        mean = batch * worst.sum()
        rows = mean + (np.sqrt(2.0 * np.log(ranks) * mean) if ranks > 1 else 0.0)
        active = (1.0 - np.power(1.0 - worst, batch[..., None])).sum(axis=-1)
        rows = np.maximum(np.minimum(rows, batch * min(top_k, experts // ranks)), 1.0)
        return rows, np.clip(active, 1.0, np.minimum(len(worst), rows))

    def imbalance(self, ranks: int) -> float:
        """Load of the busiest rank over the mean (>= 1)."""
        return float(self.shares.reshape(ranks, -1).sum(axis=1).max() * ranks)


def _pick_probability(shares: Array, top_k: int) -> Array:
    """Chance that a token picks each expert: top_k * share, capped at 1, the excess given to the others."""
    chance = shares * top_k
    for _ in range(8):
        over = chance > 1.0
        if not over.any():
            break
        excess = float((chance[over] - 1.0).sum())
        chance = np.where(over, 1.0, chance)
        free = ~over & (chance < 1.0)
        if not free.any() or chance[free].sum() <= 0:
            break
        chance = np.where(free, chance * (1.0 + excess / chance[free].sum()), chance)
    return np.minimum(chance, 1.0)


@lru_cache(maxsize=64)
def with_shared(load: ExpertLoad, shared: int) -> ExpertLoad:
    """The load beside experts that every token meets; one object for one load."""
    return dataclasses.replace(load, name=f"{load.name}+{shared}", shared=shared)


def uniform(experts: int) -> ExpertLoad:
    """Random routing, every expert as likely as the next."""
    return ExpertLoad("uniform", np.full(experts, 1.0 / experts))


def balanced(experts: int) -> ExpertLoad:
    """Round-robin routing, as the operator benchmarks feed it."""
    return ExpertLoad("balanced", np.full(experts, 1.0 / experts), even=True)


def power_law(experts: int, alpha: float, spread: float = 1000.0, seed: int = 0) -> ExpertLoad:
    """Popularity with density x^-alpha on [1, spread], at mid quantiles, in an order drawn from `seed`.

    alpha 1.01 and 1.2 are the settings of the operator tables (there with spread 0.8 * tokens).
    """
    u = (np.arange(experts) + 0.5) / experts
    if abs(alpha - 1.0) < 1e-6:
        values = spread**u
    else:
        e = 1.0 - alpha
        values = ((spread**e - 1.0) * u + 1.0) ** (1.0 / e)
    order = np.random.default_rng(seed).permutation(experts)
    return ExpertLoad(f"power_law:{alpha:g}", (values / values.sum())[order])


def from_counts(counts: ArrayLike, name: str = "counts") -> ExpertLoad:
    """Measured tokens per expert, in placement order. Raises PriceError for empty or negative counts."""
    values = np.asarray(counts, float).ravel()
    if values.size == 0 or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise PriceError(f"expert counts {name!r}: need non-negative numbers with a positive sum")
    return ExpertLoad(name, values / values.sum())


def named(text: str, experts: int) -> ExpertLoad | None:
    """'uniform', 'balanced' or 'power_law:1.2', else None. Raises `PriceError` for a power that is none."""
    if text == "uniform":
        return uniform(experts)
    if text == "balanced":
        return balanced(experts)
    if text.startswith("power_law:"):
        try:
            return power_law(experts, float(text.split(":", 1)[1]))
        except ValueError:
            raise PriceError(f"expert load {text!r}: the exponent is not a number") from None
    return None


def parse(text: str, experts: int) -> ExpertLoad:
    """'uniform', 'balanced', 'power_law:1.2', or the path of a JSON list of counts per expert.

    Raises PriceError when the text is none of these or the file holds another number of experts.
    """
    if (known := named(text, experts)) is not None:
        return known
    path = Path(text)
    if not path.is_file():
        raise PriceError(f"expert load {text!r}: not uniform, balanced, power_law:ALPHA or a file of counts")
    try:
        load = from_counts(read_json(path), path.name)
    except (Unreadable, TypeError, ValueError):
        raise PriceError(f"expert load {text!r}: not a JSON list of numbers") from None
    if len(load.shares) != experts:
        raise PriceError(f"expert load {text!r}: {len(load.shares)} counts for {experts} experts")
    return load
